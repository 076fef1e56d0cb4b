//! Who is master, and whom to follow: the decision, without I/O or a clock of its own.
//!
//! In: what this node is ([`Own`]), what it sees of the other servers of its domain
//! and of those of the parent domain ([`Peer`]), the time. Out: a [`Decision`]. [`Decider`] remembers
//! only what cannot be seen: since when no master is in sight, and how the last tries at the
//! parent ended. Correctness never depends on it: every server holds a prefix of one
//! history, and whoever takes the slot verifies that nothing is missing. Deciding
//! well saves time and bandwidth.
//!
//! A server that holds another history than ours, which has another top or is one, is as if it
//! were not there, as long as ours is not known to be wrong.
//!
//! The rules, in the order in which they are asked:
//!
//! 1. *A master stays* (`master.rs`) unless another master is in sight that comes before it (reads the top later, is
//!    sound, is reached by a majority, then priority and name), and says so again a moment later: one that was
//!    deposed finds that out first. It makes room for a slave that is in sight and can lead when its
//!    own database or disk is broken, when the parent is out of its reach, when a majority of the domain
//!    has been for a while, when the servers above that it reaches read the top no more and the slave reaches another
//!    one, or alone can go on from it, or when it is asked to (switchover). A slave that did not take over
//!    is asked ever more rarely. One that hands over and cannot let
//!    the slot go, for its disk hangs, is deposed by the one that it has asked to take over. One that only a
//!    minority reaches leaves when a sibling that it can follow follows another master.
//! 2. *A master in sight is followed*, through a sibling when it no longer keeps
//!    what follows our end. If nobody keeps that, the data is copied anew from a sound server that has
//!    more; a server that does not answer is given time to say otherwise.
//! 3. *A master out of sight, but in a sibling's*, is followed through the sibling, or the
//!    data is copied from there.
//! 4. *Without a master* the member that is sound, reaches the parent, has a database that is not far
//!    behind, then the longest history, then the priority, then the name, tries the parent first;
//!    each other one waits its turn, and one that is not sound `takeover_after` more. A refused
//!    connection means dead at once; silence counts after `takeover_after`.
//! 5. *What the slot has confirmed and we lack*, or what all servers of the parent domain have let
//!    go, is fetched from siblings first. If nobody has it, or the slot is gone, that is a gap: one
//!    server of the domain copies anew, if that is allowed and everybody has been heard, or been
//!    waited for for five minutes; the parent is asked again now and then, for its position may have
//!    gone back.
//! 6. *A slot that is held by nobody in sight* may be taken from its holder by a
//!    majority, at growing intervals. What is ended is the one session that was in
//!    the way all the while, not one that has come after it: that may be a sibling's,
//!    which leads and has had no time to say so. Nobody is deposed on the word of a
//!    network that fails us too: a try at the parent that gets no answer begins the
//!    wait anew, only who answers at once counts for the majority, and nobody may
//!    know of a master.
//! 7. *Of several servers of the parent domain* the present one is followed while it is sound, reads
//!    the top as lately as the others, but for a moment, and keeps what follows our end; else the
//!    first of them that does (`parents.rs`).
//!
//! Who has no data yet copies from a sibling that has some, else from the parent, one server after
//! the other (`source.rs`).

mod master;
mod parents;
mod source;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

pub use parents::{parent_to_copy_from, top_in_sight};
pub use source::{SlotWatch, Source, copy_source, has_in_sight};
pub use view::{Link, Own, Peer, Sight, Told, in_sight, parent_sight, stranger};

use crate::lsn::Lsn;
use crate::status::Role;
use parents::keeps_it;
use view::{View, name_hash, with_life};

/// Time since the bridge started.
pub type Now = Duration;

/// Each member waits so long for every one that goes before it.
pub const TURN: Duration = Duration::from_millis(400);
/// A slot must be held by nobody in sight for so long before its holder is deposed:
/// one that has just acquired it is seen by then.
const UNSEEN: Duration = Duration::from_secs(1);
/// A switchover that is not done by then has failed.
pub const HANDOVER: Duration = Duration::from_secs(5);
/// What only servers that do not answer may still keep is waited for so long.
pub const MISSED: Duration = Duration::from_secs(30);
/// The same when the whole domain would have to be copied anew: a server may be starting.
pub const LAST_CALL: Duration = Duration::from_secs(300);
/// Longest pause between two times that a holder out of sight is deposed.
const MAX_DEPOSE_PAUSE: Duration = Duration::from_secs(60);
/// Who has deposed nobody for so long, though it might have, begins with the shortest pause
/// again. Seeing a master is not enough: one that comes and goes is deposed ever more rarely.
const CALM: Duration = Duration::from_secs(10);

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Go on as it is, also with following nobody.
    Stay,
    /// Follow the parent: try to become master.
    Lead {
        /// Which of the servers of the parent domain, in the order of the configuration.
        parent: usize,
        /// First end this session, if it still holds the slot.
        depose: Option<Session>,
    },
    /// Follow this member.
    Follow(String),
    /// End the present link; the reason is for people.
    Leave(String),
    /// End the present link in favour of this member.
    HandOver {
        /// Name of the member.
        to: String,
        /// For people.
        reason: String,
    },
    /// No server of the parent domain can be followed.
    NoParent,
    /// Nobody keeps what follows our end, and there is nobody that is in order to copy from.
    NoSource,
    /// Nobody in sight can go on from our end.
    Gap {
        /// Why.
        missing: Missing,
        /// Servers that do not answer, and may have what is missing.
        unseen: Vec<String>,
        /// Nobody can have it any more, or those have been waited for, for [`LAST_CALL`].
        sure: bool,
    },
    /// Copy the data anew.
    CopyAnew {
        /// What nobody has, so that the copy is one of the parent; else everybody in the domain has
        /// forgotten what follows our end, and it comes from a sibling.
        missing: Option<Missing>,
    },
}

/// What keeps a whole domain from going on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// The parent has forgotten what lies between our end and this position.
    Forgotten(Lsn),
    /// The parent has no slot of the domain any more.
    Slot,
}

/// A connection at the parent, by the number that it has there.
pub type Session = u32;

/// How a try at the parent ended, when that says something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// This session of somebody else holds the slot.
    Busy(Session),
    /// The slot has confirmed this position, which is beyond our end.
    Ahead(Lsn),
    /// There is no slot of the domain.
    NoSlot,
}

/// Memory between decisions.
#[derive(Clone, Debug)]
pub struct Decider {
    takeover_after: Duration,
    members: usize,
    resync_on_gap: bool,
    /// The server of the parent domain that is followed or was tried last.
    parent: Option<usize>,
    /// Those that failed lately.
    tried: Vec<(usize, Now)>,
    /// Those that have no slot for us, and whether the last try has shown that.
    without_slot: BTreeSet<usize>,
    slot_missing: bool,
    masterless_since: Option<Now>,
    /// Since when, to us as master, others that go first have been in sight.
    rivals: BTreeMap<String, Now>,
    /// Since when we, as master, reach no majority of the domain.
    outnumbered_since: Option<Now>,
    /// Since when, as master, others have seen the top later than we can.
    stale_since: Option<Now>,
    /// Since when, as master, the server above that is followed has been behind others of its domain.
    behind_since: Option<Now>,
    /// Who did not take over when it was asked to: how often, and until when it is not asked again.
    unfit: BTreeMap<String, (u32, Now)>,
    /// Who is in the way at the parent, and since when.
    busy: Option<(Session, Now)>,
    lacking: Option<Lacking>,
    /// Since when nobody in sight keeps what follows our end.
    unserved_since: Option<Now>,
    next_try: Now,
    next_depose: Now,
    depose_pause: Duration,
    handover: Option<Handover>,
}

/// What the parent has confirmed to the domain and is not here.
#[derive(Clone, Copy, Debug)]
struct Lacking {
    confirmed: Lsn,
    since: Now,
    /// When the parent said so last.
    asked: Now,
}

#[derive(Clone, Debug)]
struct Handover {
    /// We hand over to this server; `None` when it is us who take over.
    to: Option<String>,
    /// Where the old master ends.
    end: Lsn,
    until: Now,
}

impl Decider {
    /// For a domain of `members` servers, one of which copies from the parent after a gap if it
    /// may.
    pub fn new(takeover_after: Duration, members: usize, resync_on_gap: bool) -> Decider {
        Decider {
            takeover_after,
            members,
            resync_on_gap,
            parent: None,
            tried: Vec::new(),
            without_slot: BTreeSet::new(),
            slot_missing: false,
            masterless_since: None,
            rivals: BTreeMap::new(),
            outnumbered_since: None,
            stale_since: None,
            behind_since: None,
            unfit: BTreeMap::new(),
            busy: None,
            lacking: None,
            unserved_since: None,
            next_try: Duration::ZERO,
            next_depose: Duration::ZERO,
            depose_pause: takeover_after,
            handover: None,
        }
    }

    /// The server of the parent domain that is followed or was tried last.
    pub fn parent(&self) -> Option<usize> {
        self.parent
    }

    /// Notes that the parent server that was tried last did not let us lead, and why.
    pub fn refused(&mut self, now: Now, refusal: Refusal) {
        match refusal {
            Refusal::Busy(holder) => {
                if self.busy.is_none_or(|(other, _)| other != holder) {
                    self.busy = Some((holder, now));
                }
                // Somebody has what we lack.
                if let Some(lacking) = &mut self.lacking {
                    lacking.since = now;
                }
            }
            Refusal::Ahead(confirmed) => {
                let since = self.lacking.map_or(now, |lacking| lacking.since);
                self.lacking = Some(Lacking {
                    confirmed,
                    since,
                    asked: now,
                });
            }
            Refusal::NoSlot => {
                self.slot_missing = true;
                self.without_slot.extend(self.parent);
                self.failed(now);
            }
        }
        // Who hands over is just letting the slot go.
        let takes_over = self.handover.as_ref().is_some_and(|h| h.to.is_none());
        self.next_try = now + if takes_over { TURN / 8 } else { TURN / 2 };
    }

    /// Notes that the parent server that was tried or followed last could not be, for another
    /// reason.
    pub fn failed(&mut self, now: Now) {
        self.busy = None;
        self.next_try = now + TURN / 2;
        self.tried.extend(self.parent.map(|parent| (parent, now)));
    }

    /// Notes that the parent let us lead and then sent nothing: somebody else may fare better.
    pub fn led_in_vain(&mut self, now: Now) {
        self.failed(now);
        self.next_try = now + self.takeover_after;
    }

    /// Notes that a holder is being deposed, as was decided.
    pub fn deposes(&mut self, now: Now) {
        if now >= self.next_depose + CALM {
            self.depose_pause = self.takeover_after;
        }
        self.next_depose = now + self.depose_pause;
        self.depose_pause = (self.depose_pause * 2).min(MAX_DEPOSE_PAUSE);
    }

    /// We are master, with all that was confirmed before.
    fn leads(&mut self) {
        (self.busy, self.lacking) = (None, None);
        self.without_slot.clear();
        if self.handover.as_ref().is_some_and(|h| h.to.is_none()) {
            self.handover = None;
        }
    }

    /// Starts handing over to `to`.
    pub fn yield_to(&mut self, now: Now, to: &str) {
        self.handover = Some(Handover {
            to: Some(to.to_owned()),
            end: Lsn::ZERO,
            until: now + HANDOVER,
        });
    }

    /// The one that we hand over to cannot be told: whoever is fit goes on.
    pub fn keep(&mut self, now: Now) {
        self.handover_failed(now);
    }

    /// Whoever did not take over is not asked again at once, and ever more rarely.
    fn handover_failed(&mut self, now: Now) {
        if let Some(to) = self.handover.take().and_then(|handover| handover.to) {
            let (times, until) = self.unfit.entry(to).or_default();
            *until = now + (HANDOVER * 2_u32.pow((*times).min(6))).min(LAST_CALL);
            *times += 1;
        }
    }

    /// Whom we hand over to.
    pub fn yields_to(&self) -> Option<String> {
        self.handover.as_ref().and_then(|h| h.to.clone())
    }

    /// Takes over once we hold all up to `end`.
    pub fn take_over(&mut self, now: Now, end: Lsn) {
        self.busy = None;
        self.handover = Some(Handover {
            to: None,
            end,
            until: now + HANDOVER,
        });
    }

    /// Decides; see the module's rules.
    pub fn decide(&mut self, now: Now, own: &Own, peers: &[Peer], parents: &[Peer]) -> Decision {
        let is_dead = |to: String| {
            let mut peers = peers.iter();
            peers.any(|peer| peer.name == to && peer.sight == Sight::Refused)
        };
        if self.handover.as_ref().is_some_and(|h| now >= h.until) {
            self.handover_failed(now);
        }
        if self.yields_to().is_some_and(is_dead) {
            self.handover = None;
        }
        let view = View {
            own,
            peers: with_life(own, peers),
            parents,
            limit: self.takeover_after,
            members: self.members,
        };
        if own.link == Link::Parent {
            self.leads();
            self.masterless_since = None;
            return self.as_master(now, &view);
        }
        self.rivals.clear();
        (self.outnumbered_since, self.stale_since) = (None, None);
        self.behind_since = None;
        let slot_missing = std::mem::take(&mut self.slot_missing);
        let is_done = |to: &String| view.master().is_some_and(|master| master.name == *to);
        if let Some(to) = self.yields_to().filter(is_done) {
            // Should it die the next moment, this is no reason to wait.
            self.handover = None;
            self.unfit.remove(&to);
        }
        if let Some(decision) = self.handing_over(now, &view) {
            return decision;
        }
        if let Some(master) = view.master() {
            self.masterless_since = None;
            self.busy = None;
            self.without_slot.clear();
            return self.follow(now, &view, master);
        }
        if slot_missing {
            return self.without_slot(&view);
        }
        let since = *self.masterless_since.get_or_insert(now);
        if let Some(sibling) = view.sibling_with_master(now - since) {
            (self.busy, self.unserved_since) = (None, None);
            return view.go_to(&sibling.name);
        }
        if !view.is_master_seen(now - since) {
            self.unserved_since = None;
        } else if let Some(peer) = view.longest_that_serves(own.told.flush) {
            return view.go_to(&peer.name);
        } else if self.is_missed(now, &view) {
            return copy_anew(&view);
        }
        self.without_master(now, since, &view)
    }

    /// During a switchover only the two that take part act.
    fn handing_over(&mut self, now: Now, view: &View<'_>) -> Option<Decision> {
        let told_by_other = || {
            view.live().any(|(_, told)| {
                told.yields_to
                    .as_ref()
                    .is_some_and(|to| *to != view.own.told.node)
            })
        };
        match self.handover {
            Some(Handover { to: None, end, .. }) => {
                let own = view.own.told.flush;
                let linked = view.own.link != Link::None;
                if own < end
                    && !linked
                    && let Some(peer) = view.longest_that_serves(own)
                {
                    return Some(view.go_to(&peer.name));
                }
                // Mostly what is missing comes over the link that there is; what no sibling keeps
                // the parent may.
                let ready = (own >= end || !linked) && now >= self.next_try;
                // The old master lets the slot go, unless it is cut off from the parent or its
                // disk hangs. As long as it asks, no majority is needed to end its session;
                // somebody else who leads by now is left alone.
                let asked = view.master().is_none() && view.is_asked_to_lead();
                let depose = self.unseen(now).filter(|_| asked);
                Some(match ready {
                    true => self.lead(now, view, depose),
                    false => Decision::Stay,
                })
            }
            Some(Handover { to: Some(_), .. }) => Some(Decision::Stay),
            None if view.master().is_none() && told_by_other() => Some(Decision::Stay),
            None => None,
        }
    }

    /// Itself, or through one who keeps what it has forgotten.
    fn follow(&mut self, now: Now, view: &View<'_>, master: &Peer) -> Decision {
        self.lacking = None;
        let end = view.own.told.flush;
        let from = match View::told(master).first <= end {
            true => Some(master),
            false => view.longest_that_serves(end),
        };
        if let Some(peer) = from {
            self.unserved_since = None;
            return view.go_to(&peer.name);
        }
        match self.is_missed(now, view) {
            true => copy_anew(view),
            false => Decision::Stay,
        }
    }

    /// Nobody in sight keeps what follows our end, and who is not has been waited for.
    fn is_missed(&mut self, now: Now, view: &View<'_>) -> bool {
        let since = *self.unserved_since.get_or_insert(now);
        view.unheard(now - since).is_empty() || now - since >= MISSED
    }

    fn without_master(&mut self, now: Now, since: Now, view: &View<'_>) -> Decision {
        if self
            .lacking
            .is_some_and(|lacking| view.own.told.flush >= lacking.confirmed)
        {
            self.lacking = None;
        }
        if let Some(lacking) = self.lacking
            && let Some(decision) = self.fetch(now, lacking, view)
        {
            return decision;
        }
        match self.next_turn(now, since, view) {
            Some(at) if now >= at.max(self.next_try) => {}
            _ => return Decision::Stay,
        }
        let depose = self.may_depose(now, since, view);
        self.lead(now, view, depose)
    }

    /// From a sibling that has more, as long as there is one. `None` when the parent is
    /// to be asked again.
    fn fetch(&self, now: Now, lacking: Lacking, view: &View<'_>) -> Option<Decision> {
        let confirmed = lacking.confirmed;
        if let Some(sibling) = view.longest_that_serves(view.own.told.flush) {
            return Some(view.go_to(&sibling.name));
        }
        if now - lacking.asked >= self.takeover_after || keeps_it(view) {
            return None;
        }
        // One that has it all but not from our end on will be master, and copied from.
        let has_all = |told: &Told| told.has_data && view.gives(told) && told.flush >= confirmed;
        if view.live().any(|(_, told)| has_all(told)) {
            return Some(Decision::Stay);
        }
        // Only what was told after the parent's answer counts. One that does not answer may
        // have it, and is given a moment.
        let unseen = view.unheard(now - lacking.asked);
        let told = unseen.is_empty() || now - lacking.since >= self.takeover_after;
        Some(match told {
            true => self.forgotten(now, view, lacking, unseen),
            false => Decision::Stay,
        })
    }

    /// The holder of the slot, seen by nobody, if it may be ended now.
    fn may_depose(&self, now: Now, since: Now, view: &View<'_>) -> Option<Session> {
        // One that lacks what the holder has brought home could not lead in its place.
        let may = self.lacking.is_none()
            && view.is_majority()
            && !view.is_master_known(now - since)
            && now >= self.next_depose;
        self.unseen(now).filter(|_| may)
    }

    /// The session that holds the slot, and long enough with nobody in sight as master.
    fn unseen(&self, now: Now) -> Option<Session> {
        let (holder, since) = self.busy?;
        (now >= since + UNSEEN).then_some(holder)
    }

    /// When we may try the parent; `None` while somebody may still be master.
    fn next_turn(&self, now: Now, since: Now, view: &View<'_>) -> Option<Now> {
        for peer in view.peers.iter() {
            let was_master = peer
                .told
                .as_ref()
                .is_some_and(|told| told.role == Role::Master);
            match peer.sight {
                Sight::Unknown if now < self.takeover_after => return None,
                Sight::Silent(age) if was_master && age < self.takeover_after => return None,
                _ => {}
            }
        }
        let rank = view.rank();
        let jitter = match rank {
            0 => Duration::ZERO,
            _ => TURN / 4 * (name_hash(&view.own.told.node) % 4),
        };
        // One that is not sound leaves time to one that is.
        let sound = |told: &Told| told.healthy && told.parent_ok;
        let other_is_sound = view.live().any(|(_, told)| told.has_data && sound(told));
        let patience = match !sound(&view.own.told) && other_is_sound {
            true => self.takeover_after,
            false => Duration::ZERO,
        };
        Some(since + TURN * rank + jitter + patience)
    }
}

/// From a sibling that has more. One that is out of order may have nothing to give in the end.
fn copy_anew(view: &View<'_>) -> Decision {
    let end = view.own.told.flush;
    let has_more = |told: &Told| told.has_data && told.flush > end;
    let sound = |told: &Told| has_more(told) && told.healthy && view.gives(told);
    match view.live().any(|(_, told)| sound(told)) {
        _ if view.own.doubtful => Decision::Stay,
        true => Decision::CopyAnew { missing: None },
        false => Decision::NoSource,
    }
}
