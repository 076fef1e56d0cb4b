//! Who is master, and whom to follow: the decision, without I/O or a clock of its own.
//!
//! In: what this node is ([`Own`]), what it sees of the other servers of its domain
//! ([`Peer`]), the time. Out: a [`Decision`]. [`Decider`] remembers only what cannot
//! be seen: since when no master is in sight, and how the last tries at the parent
//! ended. Correctness never depends on it: every server holds a prefix of one
//! history, and whoever takes the slot verifies that nothing is missing. Deciding
//! well saves time and bandwidth.
//!
//! The rules, in the order in which they are asked:
//!
//! 1. *A master stays* unless another master is in sight that comes before it, its
//!    own database or disk is broken or the parent is out of its reach while a
//!    slave that has no such trouble is in sight, or it hands over (switchover). One
//!    that hands over and cannot let the slot go, for its disk hangs, is deposed by
//!    the one that it has asked to take over.
//! 2. *A master in sight is followed*, through a sibling when it no longer keeps
//!    what follows our end. If nobody keeps that, the data is copied anew; a server
//!    that does not answer is given time to say otherwise.
//! 3. *A master out of sight, but in a sibling's*, is followed through the sibling.
//! 4. *Without a master* the member that is sound, then has the longest history,
//!    then the priority, then the name, tries the parent first; each other one
//!    waits its turn. A refused connection means dead at once; silence counts
//!    after `takeover_after`.
//! 5. *What the slot has confirmed and we lack* is fetched from siblings first. If
//!    nobody has it, that is a gap; the parent is asked again now and then, for its
//!    position may have gone back.
//! 6. *A slot that is held by nobody in sight* may be taken from its holder by a
//!    majority, at growing intervals.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::lsn::{Identity, Lsn};
use crate::status::Role;

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
const MISSED: Duration = Duration::from_secs(30);
/// Longest pause between two times that a holder out of sight is deposed.
const MAX_DEPOSE_PAUSE: Duration = Duration::from_secs(60);
/// A master whose knowledge of the top is older than the other's by this loses.
const STALE_MICROS: i64 = 3_000_000;

/// What one server tells another (`SHOW terrace.status`), as far as it matters here.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct Told {
    /// Node name.
    pub node: String,
    /// Its domain.
    pub domain: String,
    /// Whom it follows: its parent domain, a sibling, nobody.
    pub role: Role,
    /// Whether it has been copied to.
    pub has_data: bool,
    /// Whether it copies from the parent now.
    pub copying: bool,
    /// Its database and the disk under its queue work, and it serves.
    pub healthy: bool,
    /// Its history is not known to be another one than the top's or the domain's, so
    /// that it gives it to others.
    pub serves: bool,
    /// Which history its positions are of (an [`Identity`] as text).
    pub identity: Option<String>,
    /// The parent answers it.
    pub parent_ok: bool,
    /// The domain's master answers it (or it is the master).
    pub master_ok: bool,
    /// Durable end of its queue.
    #[serde(rename = "flush_lsn")]
    pub flush: Lsn,
    /// Oldest position that its queue can serve.
    #[serde(rename = "first_lsn")]
    pub first: Lsn,
    /// Configured preference.
    pub priority: i64,
    /// The top's clock as it knows it, microseconds.
    pub top_time: i64,
    /// Names of the servers from the top to it.
    pub path: Vec<String>,
    /// Names of the domains on that way.
    pub domains: Vec<String>,
    /// It hands over to this server.
    pub yields_to: Option<String>,
}

/// How another server looks from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sight {
    /// Not tried yet.
    Unknown,
    /// Answered when last asked.
    Answers,
    /// Has not answered for so long.
    Silent(Duration),
    /// Its host says that nobody listens, or its process ended.
    Refused,
}

impl Sight {
    /// It answers, or did just now.
    fn is_live(self, limit: Duration) -> bool {
        match self {
            Sight::Answers => true,
            Sight::Silent(age) => age < limit,
            Sight::Unknown | Sight::Refused => false,
        }
    }
}

/// Another server of the domain, or of the parent domain.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Node name.
    pub name: String,
    /// How it looks.
    pub sight: Sight,
    /// What it told last; `None` for one that never answered, or that is a Postgres.
    pub told: Option<Told>,
    /// How long ago it told that.
    pub age: Duration,
}

/// Whom we follow at present.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Link {
    /// Nobody.
    None,
    /// The parent, as master.
    Parent,
    /// This member of the domain.
    Peer(String),
}

/// This node.
#[derive(Clone, Debug)]
pub struct Own {
    /// What it tells others.
    pub told: Told,
    /// Whom it follows.
    pub link: Link,
    /// How the parent domain looks.
    pub parent: Sight,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Go on as it is, also with following nobody.
    Stay,
    /// Follow the parent: try to become master, if need be by ending the
    /// connection of whoever holds the slot.
    Lead {
        /// End the holder's connection first.
        depose: bool,
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
    /// Nobody in sight has what lies between our end and this position.
    Gap {
        /// What the parent has forgotten goes up to here.
        confirmed: Lsn,
        /// Members that do not answer, and may have it.
        unseen: Vec<String>,
    },
    /// Everybody has forgotten what follows our end: copy the data anew.
    CopyAnew,
}

/// What a node without data does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Copy from this member.
    Peer(String),
    /// Copy from the parent.
    Parent,
    /// Look again soon.
    Wait,
}

/// How a try at the parent ended, when that says something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Somebody else holds the slot.
    Busy,
    /// The slot has confirmed this position, which is beyond our end.
    Ahead(Lsn),
}

/// Memory between decisions.
#[derive(Clone, Debug)]
pub struct Decider {
    takeover_after: Duration,
    members: usize,
    masterless_since: Option<Now>,
    busy_since: Option<Now>,
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
    /// For a domain of `members` servers.
    pub fn new(takeover_after: Duration, members: usize) -> Decider {
        Decider {
            takeover_after,
            members,
            masterless_since: None,
            busy_since: None,
            lacking: None,
            unserved_since: None,
            next_try: Duration::ZERO,
            next_depose: Duration::ZERO,
            depose_pause: takeover_after,
            handover: None,
        }
    }

    /// Notes that a try at the parent did not succeed.
    pub fn refused(&mut self, now: Now, refusal: Refusal) {
        match refusal {
            Refusal::Busy => {
                self.busy_since.get_or_insert(now);
            }
            Refusal::Ahead(confirmed) => {
                let since = self.lacking.map_or(now, |lacking| lacking.since);
                self.lacking = Some(Lacking {
                    confirmed,
                    since,
                    asked: now,
                });
            }
        }
        self.next_try = now + TURN / 2;
    }

    /// Notes that the parent could not be followed for another reason.
    pub fn failed(&mut self, now: Now) {
        self.next_try = now + TURN / 2;
    }

    /// Notes that we are master, with all that was confirmed before.
    pub fn leads(&mut self) {
        (self.busy_since, self.lacking) = (None, None);
        self.depose_pause = self.takeover_after;
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
    pub fn keep(&mut self) {
        self.handover = None;
    }

    /// Whom we hand over to.
    pub fn yields_to(&self) -> Option<String> {
        self.handover.as_ref().and_then(|h| h.to.clone())
    }

    /// Takes over once we hold all up to `end`.
    pub fn take_over(&mut self, now: Now, end: Lsn) {
        self.busy_since = None;
        self.handover = Some(Handover {
            to: None,
            end,
            until: now + HANDOVER,
        });
    }

    /// Decides; see the module's rules.
    pub fn decide(&mut self, now: Now, own: &Own, peers: &[Peer]) -> Decision {
        if self.handover.as_ref().is_some_and(|h| now >= h.until) {
            self.handover = None;
        }
        let view = View {
            own,
            limit: self.takeover_after,
            peers,
        };
        if own.link == Link::Parent {
            self.masterless_since = None;
            return self.as_master(&view);
        }
        let is_done = |to: String| view.master().is_some_and(|master| master.name == to);
        if self.yields_to().is_some_and(is_done) {
            // Should it die the next moment, this is no reason to wait.
            self.handover = None;
        }
        if let Some(decision) = self.handing_over(now, &view) {
            return decision;
        }
        if let Some(master) = view.master() {
            self.masterless_since = None;
            self.busy_since = None;
            self.depose_pause = self.takeover_after;
            return self.follow(now, &view, master);
        }
        self.unserved_since = None;
        let since = *self.masterless_since.get_or_insert(now);
        if let Some(sibling) = view.sibling_with_master(now - since) {
            return view.go_to(&sibling.name);
        }
        self.without_master(now, since, &view)
    }

    fn as_master(&mut self, view: &View<'_>) -> Decision {
        if let Some(to) = self.yields_to() {
            return hand_over(&to, "it is asked to");
        }
        let own = &view.own.told;
        let rival = view.live().find(|(_, told)| told.role == Role::Master);
        if let Some((name, told)) = rival
            && goes_before(told, own)
        {
            return Decision::Leave(format!("{name} is master as well and goes first"));
        }
        let sound = view
            .live()
            .filter(|(_, told)| told.has_data && told.healthy && told.parent_ok)
            .max_by_key(|(_, told)| key(told));
        if let Some((name, _)) = sound {
            if !own.healthy {
                return hand_over(name, "this server is out of order, that one is not");
            }
            if !view.own.parent.is_live(self.takeover_after) && view.own.parent != Sight::Unknown {
                return hand_over(name, "the parent is in reach from there, and not from here");
            }
        }
        Decision::Stay
    }

    /// During a switchover only the two that take part act.
    fn handing_over(&self, now: Now, view: &View<'_>) -> Option<Decision> {
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
                // Mostly what is missing comes over the link that there is.
                if own < end && view.own.link == Link::None {
                    let from = view.longest_that_serves(own);
                    return Some(from.map_or(Decision::Stay, |peer| view.go_to(&peer.name)));
                }
                let ready = own >= end && now >= self.next_try;
                // The old master lets the slot go, unless it is cut off from the parent or its
                // disk hangs. It asked, so no majority is needed to end its session; somebody
                // else who leads by now is left alone.
                Some(match ready {
                    true => Decision::Lead {
                        depose: view.master().is_none() && self.is_unseen(now),
                    },
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
        let since = *self.unserved_since.get_or_insert(now);
        match view.unheard(now - since).is_empty() || now - since >= MISSED {
            true => Decision::CopyAnew,
            false => Decision::Stay,
        }
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
        Decision::Lead {
            depose: self.may_depose(now, view),
        }
    }

    /// From a sibling that has more, as long as there is one. `None` when the parent is
    /// to be asked again.
    fn fetch(&self, now: Now, lacking: Lacking, view: &View<'_>) -> Option<Decision> {
        let confirmed = lacking.confirmed;
        if let Some(sibling) = view.longest_that_serves(view.own.told.flush) {
            return Some(view.go_to(&sibling.name));
        }
        if now - lacking.asked >= self.takeover_after {
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
            true => Decision::Gap { confirmed, unseen },
            false => Decision::Stay,
        })
    }

    /// Whether the holder of the slot, seen by nobody, may be ended now.
    fn may_depose(&mut self, now: Now, view: &View<'_>) -> bool {
        // One that lacks what the holder has brought home could not lead in its place.
        let depose = self.lacking.is_none()
            && self.is_unseen(now)
            && view.is_majority(self.members)
            && now >= self.next_depose;
        if depose {
            self.next_depose = now + self.depose_pause;
            self.depose_pause = (self.depose_pause * 2).min(MAX_DEPOSE_PAUSE);
        }
        depose
    }

    /// The slot has been held by nobody in sight for long enough.
    fn is_unseen(&self, now: Now) -> bool {
        self.busy_since.is_some_and(|busy| now >= busy + UNSEEN)
    }

    /// When we may try the parent; `None` while somebody may still be master.
    fn next_turn(&self, now: Now, since: Now, view: &View<'_>) -> Option<Now> {
        for peer in view.peers {
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

struct View<'a> {
    own: &'a Own,
    peers: &'a [Peer],
    limit: Duration,
}

impl<'a> View<'a> {
    fn live(&self) -> impl Iterator<Item = (&'a str, &'a Told)> + use<'a> {
        let limit = self.limit;
        self.peers
            .iter()
            .filter(move |peer| peer.sight.is_live(limit))
            .filter_map(|peer| Some((peer.name.as_str(), peer.told.as_ref()?)))
    }

    fn live_peers(&self) -> impl Iterator<Item = &'a Peer> + use<'a> {
        let limit = self.limit;
        let peers = self.peers.iter();
        peers.filter(move |peer| peer.sight.is_live(limit) && peer.told.is_some())
    }

    fn told(peer: &'a Peer) -> &'a Told {
        peer.told.as_ref().expect("a live peer has told")
    }

    /// The master that goes first of those in sight.
    fn master(&self) -> Option<&'a Peer> {
        self.live_peers()
            .filter(|peer| Self::told(peer).role == Role::Master && Self::told(peer).has_data)
            .reduce(|a, b| {
                if goes_before(Self::told(b), Self::told(a)) {
                    b
                } else {
                    a
                }
            })
    }

    fn go_to(&self, name: &str) -> Decision {
        if self.own.link == Link::Peer(name.to_owned()) {
            Decision::Stay
        } else {
            Decision::Follow(name.to_owned())
        }
    }

    fn longest_that_serves(&self, end: Lsn) -> Option<&'a Peer> {
        self.live_peers()
            .filter(|peer| {
                let told = Self::told(peer);
                let has_more = told.first <= end && told.flush > end;
                told.has_data && has_more && self.gives(told) && !self.is_behind_us(told)
            })
            .max_by_key(|peer| (Self::told(peer).flush, &peer.name))
    }

    /// Its positions can be compared with ours, and it gives what it has.
    fn gives(&self, told: &Told) -> bool {
        told.serves && same_origin(&self.own.told, told)
    }

    /// It gets its data through us.
    fn is_behind_us(&self, told: &Told) -> bool {
        told.path.contains(&self.own.told.node)
    }

    /// What was told before the master went out of our sight says nothing of now.
    fn sibling_with_master(&self, masterless: Duration) -> Option<&'a Peer> {
        self.live_peers()
            .filter(|peer| {
                let told = Self::told(peer);
                peer.age < masterless
                    && told.role == Role::Slave
                    && told.master_ok
                    && self.gives(told)
                    && told.first <= self.own.told.flush
                    && !self.is_behind_us(told)
            })
            .min_by_key(|peer| (Self::told(peer).path.len(), &peer.name))
    }

    /// Members that have not told anything within so long.
    fn unheard(&self, within: Duration) -> Vec<String> {
        let heard =
            |peer: &Peer| peer.sight == Sight::Answers && peer.told.is_some() && peer.age < within;
        let peers = self.peers.iter().filter(|peer| !heard(peer));
        peers.map(|peer| peer.name.clone()).collect()
    }

    /// Number of members in sight that go before us.
    fn rank(&self) -> u32 {
        let own = key(&self.own.told);
        let before = self
            .live()
            .filter(|(_, told)| told.has_data && self.gives(told) && key(told) > own);
        u32::try_from(before.count()).unwrap_or(u32::MAX)
    }

    fn is_majority(&self, members: usize) -> bool {
        2 * (self.live_peers().count() + 1) > members
    }
}

/// Whether both tell of one history, perhaps of different timelines of it.
fn same_origin(one: &Told, other: &Told) -> bool {
    let identity = |told: &Told| told.identity.as_ref()?.parse::<Identity>().ok();
    match (identity(one), identity(other)) {
        (Some(one), Some(other)) => one.same_origin(&other),
        // One that has none has no positions either.
        _ => true,
    }
}

fn hand_over(to: &str, reason: &str) -> Decision {
    Decision::HandOver {
        to: to.to_owned(),
        reason: reason.to_owned(),
    }
}

/// Who goes first when there is no master.
fn key(told: &Told) -> (bool, bool, Lsn, i64, &str) {
    (
        told.healthy,
        told.parent_ok,
        told.flush,
        told.priority,
        &told.node,
    )
}

/// Which of two masters stays: both get the same history, so positions only tell
/// who is read later. One that has lost sight of the top goes.
fn goes_before(one: &Told, other: &Told) -> bool {
    let fresher = one.top_time - other.top_time;
    if one.top_time != 0 && other.top_time != 0 && fresher.abs() > STALE_MICROS {
        return fresher > 0;
    }
    let key = |told: &Told| (told.healthy, told.priority, told.node.clone());
    key(one) > key(other)
}

/// FNV-1a; spreads equal turns.
fn name_hash(name: &str) -> u32 {
    let start = 0x811c_9dc5_u32;
    name.bytes().fold(start, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

/// Whom a node without data copies from: one that has data, a sound one before
/// others, then the master; else the parent, one member after the other.
pub fn copy_source(waited: Duration, own: &Told, peers: &[Peer], limit: Duration) -> Source {
    let view = peers
        .iter()
        .filter(|peer| peer.sight.is_live(limit))
        .filter_map(|peer| Some((&peer.name, peer.told.as_ref()?)));
    let with_data = view
        .clone()
        .filter(|(_, told)| told.has_data && told.serves);
    // One that is out of order may still be read; if nobody else has data it is tried.
    let best = with_data
        .max_by_key(|(name, told)| (told.healthy, told.role == Role::Master, told.flush, *name));
    if let Some((name, _)) = best {
        return Source::Peer(name.clone());
    }
    if view.clone().any(|(_, told)| told.copying) {
        return Source::Wait;
    }
    let key = |told: &Told| (told.parent_ok, told.priority, told.node.clone());
    let before = view.filter(|(_, told)| key(told) > key(own)).count();
    let unknown = peers.iter().any(|peer| peer.sight == Sight::Unknown);
    let turn = TURN * u32::try_from(before).unwrap_or(u32::MAX);
    match waited >= turn && (!unknown || waited >= limit) {
        true => Source::Parent,
        false => Source::Wait,
    }
}

/// Whether, of the servers of a domain that none can go on, this one is to copy from the
/// parent: the first by the order in which they would lead, and one at a time.
pub fn copies_first(own: &Told, peers: &[Peer], limit: Duration) -> bool {
    let live = peers.iter().filter(|peer| peer.sight.is_live(limit));
    live.filter_map(|peer| peer.told.as_ref())
        .all(|told| !told.copying && (!told.has_data || key(told) < key(own)))
}

/// Which server of the parent domain to attach to: the present one while it is
/// sound, else the first in the configured order that is sound, reads the top as
/// lately as the others, keeps what follows our end, and is not below us itself.
/// `tried` holds those that failed just now.
pub fn choose_parent(
    own: &Told,
    parents: &[Peer],
    present: Option<usize>,
    tried: &[usize],
    limit: Duration,
) -> Option<usize> {
    let latest = parents
        .iter()
        .filter_map(|parent| Some(parent.told.as_ref()?.top_time))
        .max()
        .unwrap_or(0);
    let grade = |index: usize, parent: &Peer| {
        let usable = match &parent.told {
            // A Postgres; whether it can be followed shows when it is tried.
            None => true,
            Some(told) => {
                let serves = told.has_data && told.serves && told.first <= own.flush;
                !told.domains.contains(&own.domain) && serves
            }
        };
        let told = parent.told.as_ref();
        let sound = told.is_none_or(|told| told.healthy && latest - told.top_time < STALE_MICROS);
        (
            usable && parent.sight.is_live(limit),
            !tried.contains(&index),
            sound,
            present == Some(index),
        )
    };
    let graded = parents
        .iter()
        .enumerate()
        .map(|(index, parent)| (grade(index, parent), index));
    graded
        .filter(|(grade, _)| grade.0)
        .max_by_key(|(grade, index)| (*grade, std::cmp::Reverse(*index)))
        .map(|(_, index)| index)
}
