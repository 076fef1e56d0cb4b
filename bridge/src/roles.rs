//! Carries out what [`crate::domain`] decides: one link at a time, to the parent
//! or to a member of the domain, for as long as that is the best to follow.
//!
//! Nothing about roles is on disk. After a start, a lost link or a refusal the
//! node looks around again and decides anew. A link has a thread of its own, for it
//! writes to the disk: when that hangs the node goes on deciding and telling.

mod ends;
mod orders;
mod parents;

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::client::Client;
use crate::conninfo::ConnInfo;
use crate::domain::{self, Decider, Decision, Link, Own, Peer, Sight};
use crate::lsn::Lsn;
use crate::observe::Observer;
use crate::queue::Writer;
use crate::status::{Role, Shared, State, View, cursor_name};
use crate::timeline;
use crate::upstream::{LinkEnd, SILENCE, Target, follow};

/// Decides at least this often.
const TICK: Duration = Duration::from_millis(100);
/// A server of the parent domain that failed comes last for so long.
const TRIED: Duration = Duration::from_secs(2);
/// The cursor of an initial copy is held until our own has been registered for so long.
const PINNED: Duration = Duration::from_secs(5);
/// A link that has not ended when it was told to for so long hangs in its disk.
const GRACE: Duration = Duration::from_secs(1);
/// A bridge sends something twice a second; one that has not for so long may be gone.
const FLOWS: Duration = Duration::from_millis(1500);
/// What a server told longer ago says nothing of what it is.
const STALE: Duration = Duration::from_secs(30);
/// A parent that sends nothing is given up after this, or a little more.
const SILENT: Duration = SILENCE.saturating_sub(Duration::from_secs(1));
/// First pause after a link that could not be opened; it grows.
const AGAIN: Duration = Duration::from_millis(100);
/// Pause after a link that the disk has ended.
const REST: Duration = Duration::from_millis(500);
/// What somebody asks this node to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Hand mastership to this member, or to the best one.
    Switchover(Option<String>),
    /// Become master once we hold all up to here.
    TakeOver(Lsn),
    /// Throw the data away and copy it anew.
    Resync,
    /// Leave out the transaction that cannot be applied, which ends here.
    Skip(Lsn),
}

/// An order, and where its outcome goes: an error is for the person who asked.
pub type Ordered = (Order, oneshot::Sender<Result<(), String>>);

/// Why the roles of a node end.
pub enum End {
    /// The bridge stops.
    Shutdown,
    /// The data here cannot be continued, or is not to be: copy anew.
    CopyAnew {
        /// For people.
        reason: String,
        /// No other server of the domain has better data.
        from_parent: bool,
    },
    /// A part of the queue cannot be read: fetch what follows the database's position
    /// anew.
    Fetch {
        /// For people.
        reason: String,
    },
}

/// Plays the node's roles.
pub struct Roles {
    shared: Arc<Shared>,
    observer: Arc<Observer>,
    decider: Decider,
    /// Servers of the parent domain that failed lately.
    tried: Vec<(usize, Instant)>,
    /// The one that is followed or tried.
    parent: Option<usize>,
    /// The master of the domain that was seen last.
    last_master: Option<String>,
    /// The last try at the parent has shown that the slot is lost.
    slot_lost: Option<String>,
    /// Servers of the parent domain that have no slot for us.
    without_slot: BTreeSet<usize>,
    /// The data here cannot be gone on with, and no other server's can.
    in_gap: bool,
    /// A file says that the history here is another one than the top's.
    kept_divergence: bool,
    /// A link to the parent is being opened: that takes its time over a long way, and another
    /// server of the parent domain would take as much.
    opening: bool,
    /// No link before this: the disk has just refused what the last one brought.
    rest_until: Instant,
    /// Servers that could not be followed: how often by now, and when they are tried again.
    failed: HashMap<String, (u32, Instant)>,
}

/// A link on its thread; it gives the writer back when it ends.
type Following = JoinHandle<(Writer, LinkEnd)>;

/// What a decision comes to.
enum Next {
    Nothing,
    Go(Target),
    Leave,
    HandOver(String),
    End(End),
}

impl Roles {
    /// For a node whose queue has been opened.
    pub fn new(shared: Arc<Shared>, observer: Arc<Observer>) -> Roles {
        let failover = &shared.config.failover;
        let decider = Decider::new(failover.takeover_after, shared.config.peers.len() + 1);
        Roles {
            decider,
            kept_divergence: shared.has_diverged(),
            shared,
            observer,
            tried: Vec::new(),
            parent: None,
            slot_lost: None,
            without_slot: BTreeSet::new(),
            in_gap: false,
            last_master: None,
            opening: false,
            rest_until: Instant::now(),
            failed: HashMap::new(),
        }
    }

    /// Follows whoever is to be followed until `cancel`, or until the data here is
    /// of no use. `pinned` holds the upstream's queue since the initial copy.
    pub async fn run(
        mut self,
        mut writer: Writer,
        mut pinned: Option<Client>,
        orders: &mut mpsc::Receiver<Ordered>,
        cancel: &CancellationToken,
    ) -> End {
        let mut changes = self.observer.changes();
        while !cancel.is_cancelled() {
            let next = self.next(&Link::None);
            let done = match next {
                Next::Go(target) if self.may_try(&target) => {
                    let link = self.link(target, writer, &mut pinned, orders, cancel);
                    let (back, end) = link.await;
                    writer = back;
                    end
                }
                Next::End(end) => return end,
                _ => tokio::select! {
                    () = sleep(TICK) => None,
                    _ = changes.changed() => None,
                    Some(ordered) = orders.recv() => self.obey(ordered, &Link::None).await,
                    () = cancel.cancelled() => None,
                },
            };
            if let Some(end) = done {
                return end;
            }
        }
        End::Shutdown
    }

    /// One link, to its end.
    async fn link(
        &mut self,
        target: Target,
        writer: Writer,
        pinned: &mut Option<Client>,
        orders: &mut mpsc::Receiver<Ordered>,
        cancel: &CancellationToken,
    ) -> (Writer, Option<End>) {
        let shared = Arc::clone(&self.shared);
        let ending = cancel.child_token();
        let mut changes = self.observer.changes();
        let (mut asked, mut done, mut told_to_end) = (None, None, None);
        let started = Instant::now();
        self.opening = target.role == Role::Master;
        let target = Arc::new(target);
        let mut following = self.start_link(&target, writer, &ending);
        let (writer, ended) = loop {
            tokio::select! {
                ended = &mut following => break joined(ended),
                () = sleep(TICK) => {}
                _ = changes.changed() => {}
                Some(ordered) = orders.recv() => {
                    let link = self.link_of(&target);
                    done = self.obey(ordered, &link).await.or(done);
                }
            }
            self.note_deposed(&target);
            if ending.is_cancelled() {
                let since = *told_to_end.get_or_insert_with(Instant::now);
                if since.elapsed() > GRACE {
                    self.hangs(&mut asked).await;
                }
                continue;
            }
            if started.elapsed() > PINNED && shared.role() != Role::None {
                pinned.take();
            }
            let link = self.link_of(&target);
            self.opening &= link == Link::None;
            match self.next(&link) {
                _ if done.is_some() => ending.cancel(),
                Next::Nothing => {}
                Next::Go(other) if link == Link::None && other.name == target.name => {}
                Next::Go(_) | Next::Leave => ending.cancel(),
                Next::HandOver(to) => {
                    asked = Some(to);
                    ending.cancel();
                }
                Next::End(end) => {
                    done = Some(end);
                    ending.cancel();
                }
            }
        };
        self.opening = false;
        self.note_deposed(&target);
        let opened = shared.role() != Role::None;
        let in_vain = opened && shared.heard_ago().is_some_and(|ago| ago >= SILENT);
        shared.set_role(Role::None, None, "");
        self.observer.hurry(true);
        self.note_failure(&target, opened, &ended);
        self.note_end(&target, in_vain, &ended);
        if let Some(to) = asked {
            self.hand_over(&to).await;
        }
        (writer, done)
    }

    fn note_deposed(&mut self, target: &Target) {
        if target.deposed.swap(false, Ordering::Relaxed) {
            self.decider.deposes(self.observer.now());
        }
    }

    fn start_link(
        &self,
        target: &Arc<Target>,
        mut writer: Writer,
        ending: &CancellationToken,
    ) -> Following {
        let (shared, target) = (Arc::clone(&self.shared), Arc::clone(target));
        let (ending, runtime) = (ending.clone(), Handle::current());
        spawn_blocking(move || {
            let ended = runtime.block_on(follow(&shared, &mut writer, &target, &ending));
            (writer, ended)
        })
    }

    /// The link is told to end and does not: it is none any more, whatever its
    /// connection is, and the one that takes over may end that.
    async fn hangs(&mut self, asked: &mut Option<String>) {
        if self.shared.role() != Role::None {
            self.shared.set_role(Role::None, None, "");
        }
        if let Some(to) = asked.take() {
            self.hand_over(&to).await;
        }
        // Without the writer nothing can be done, but the others are to know what
        // is seen from here, and a handover has its time.
        self.next(&Link::None);
    }

    /// The link as decisions see it: one that is only being opened is none yet.
    fn link_of(&self, target: &Target) -> Link {
        match (self.shared.role(), target.role) {
            (Role::None, _) => Link::None,
            (_, Role::Master) => Link::Parent,
            _ => Link::Peer(target.name.clone()),
        }
    }

    // ----- what to do next --------------------------------------------------

    fn next(&mut self, link: &Link) -> Next {
        let (mut peers, parents) = (self.observer.peers(), self.observer.parents());
        self.note_life(link, &mut peers);
        let is_led = self.publish_view(link, &peers, &parents);
        if let Some((segment, reason)) = self.shared.take_damage() {
            return self.damaged(&segment, reason);
        }
        if self.shared.config.parent.is_none() {
            if let Some(reason) = self.slot_lost.take() {
                self.shared.event_once("gap", &reason);
                let hint = "; stop this bridge, remove its data_dir and start it: it makes a new slot, \
                            and the domains below copy anew";
                self.shared.set_link(State::Stalled, Some(reason + hint));
                return Next::Nothing;
            }
            return match link {
                Link::None => Next::Go(self.own_database()),
                _ => Next::Nothing,
            };
        }
        if *link == Link::Parent {
            self.decider.leads();
            self.without_slot.clear();
        }
        if *link != Link::None {
            self.in_gap = false;
            if is_led {
                // A link to a sibling outlives what was said while nobody led.
                self.shared.set_link(State::Streaming, None);
            }
            if std::mem::take(&mut self.kept_divergence) {
                let shared = Arc::clone(&self.shared);
                spawn_blocking(move || timeline::forget_divergence(&shared.config.node.data_dir));
            }
        }
        if let Some(reason) = self.slot_lost.take() {
            // Another one may have it, once it answers; a standby has none before it leads.
            let lacks = |(index, parent): (usize, &Peer)| {
                self.without_slot.contains(&index) || self.observer.is_standby(&parent.name)
            };
            let sure = parents.iter().enumerate().all(lacks);
            return self.tell_gap(State::Stalled, reason, sure, &peers);
        }
        self.observer.hurry(*link == Link::None);
        let own = Own {
            told: self.shared.told(),
            link: link.clone(),
            parent: self.parent_sight(link, &parents),
        };
        let handing_over = self.decider.yields_to();
        let decision = self.decider.decide(self.observer.now(), &own, &peers);
        if let Some(to) = handing_over.filter(|_| self.decider.yields_to().is_none()) {
            self.tell_handover(&to, &peers);
        }
        self.note_master(&peers);
        match self.with_care(decision) {
            Decision::Stay if *link == Link::Parent => self.better_parent(&own, &peers, &parents),
            Decision::Stay => Next::Nothing,
            Decision::Lead { depose } => self.lead(&own, &peers, &parents, depose),
            Decision::Follow(name) => self.peer_target(name),
            Decision::Leave(reason) => {
                tracing::info!(reason, "leaves its upstream");
                Next::Leave
            }
            Decision::HandOver { to, reason } => {
                if self.decider.yields_to().is_none() {
                    let why = self.shared.state().1.unwrap_or_default();
                    let reason = format!("to {to}: {reason} ({why})");
                    self.shared
                        .event("handover", reason.trim_end_matches(" ()"));
                }
                Next::HandOver(to)
            }
            Decision::Gap {
                confirmed,
                unseen,
                waited,
            } => {
                // So may a server of the parent domain.
                let bridges = parents.iter().any(|parent| parent.told.is_some());
                let silent = parents
                    .iter()
                    .filter(|parent| bridges && parent.sight != Sight::Answers);
                let unseen: Vec<String> = unseen
                    .into_iter()
                    .chain(silent.map(|parent| parent.name.clone()))
                    .collect();
                self.gap(confirmed, &unseen, waited, &peers)
            }
            Decision::CopyAnew => Next::End(End::CopyAnew {
                reason: "no server of the domain keeps what follows this one's end".into(),
                from_parent: false,
            }),
        }
    }

    /// A part of the queue cannot be read. If the database has it, only a server that
    /// follows may miss it, and finds it elsewhere.
    fn damaged(&self, segment: &Path, reason: String) -> Next {
        let queue = self.shared.queue.borrow().clone();
        let replayed = *self.shared.replayed.borrow();
        let gone = queue.map(|open| open.queue.remove_damaged(segment, replayed));
        match gone {
            Some(Ok(true)) => {
                self.shared.event("damaged", &reason);
                Next::Nothing
            }
            Some(Err(error)) => {
                tracing::warn!("{error}");
                Next::Nothing
            }
            _ => Next::End(End::Fetch { reason }),
        }
    }

    /// While the servers of the domain do not name each other as they should, what is
    /// seen of the domain may not be all of it: nothing is done that cannot be undone.
    fn with_care(&self, decision: Decision) -> Decision {
        let unsure = self.problem().is_some();
        match decision {
            Decision::Lead { .. } if unsure => Decision::Lead { depose: None },
            Decision::Gap { .. } | Decision::CopyAnew if unsure => Decision::Stay,
            decision => decision,
        }
    }

    /// What is wrong with the domain as it is seen from here.
    fn problem(&self) -> Option<String> {
        self.observer.problem(&self.shared.told())
    }

    fn gap(&mut self, confirmed: Lsn, unseen: &[String], waited: bool, peers: &[Peer]) -> Next {
        let end = self.shared.told().flush;
        let mut reason = format!(
            "the parent has forgotten what lies between {end} and {confirmed}, and no server of \
             the domain has it"
        );
        if !unseen.is_empty() {
            reason += &format!(
                ", unless one of those that do not answer: {}",
                unseen.join(", ")
            );
        }
        self.tell_gap(State::Gap, reason, unseen.is_empty() || waited, peers)
    }

    /// No server of the domain can go on. When it is allowed, and sure, one of them copies
    /// from the parent; the others serve what they have until they can copy from that one.
    fn tell_gap(&mut self, state: State, reason: String, sure: bool, peers: &[Peer]) -> Next {
        let failover = &self.shared.config.failover;
        if failover.resync_on_gap && sure && self.problem().is_none() {
            let own = self.shared.told();
            if domain::copies_first(&own, peers, failover.takeover_after) {
                return Next::End(End::CopyAnew {
                    reason,
                    from_parent: true,
                });
            }
        }
        if !std::mem::replace(&mut self.in_gap, true) {
            self.shared.event("gap", &reason);
        }
        let hint = match failover.resync_on_gap {
            true if sure => "; waits for another server of the domain to copy anew",
            true => "; those are waited for, before one server of the domain copies anew",
            false => {
                "; copy the data anew with terrace-bridge resync, or set failover.resync_on_gap"
            }
        };
        self.shared.set_link(state, Some(reason + hint));
        Next::Nothing
    }

    /// Tells the others and the reports what this node sees; whether it sees a master.
    fn publish_view(&self, link: &Link, peers: &[Peer], parents: &[Peer]) -> bool {
        let node = &self.shared.config.node;
        let upstream = match link {
            Link::None => None,
            Link::Parent => self.parent.and_then(|index| parents.get(index)),
            Link::Peer(name) => peers.iter().find(|peer| peer.name == *name),
        };
        let told = upstream
            .and_then(|peer| peer.told.clone())
            .unwrap_or_default();
        let (mut path, mut domains) = (told.path, told.domains);
        if *link != Link::None {
            path.push(node.name.clone());
        }
        if !domains.contains(&node.domain) {
            domains.push(node.domain.clone());
        }
        let own = self.shared.identity();
        for peer in peers.iter().filter(|peer| peer.sight == Sight::Answers) {
            // Positions of another history, or of one that is in doubt, are none of ours.
            if let Some(told) = &peer.told
                && told.serves
                && told.identity == own
            {
                self.shared.set_member_flush(&peer.name, told.flush);
            }
        }
        let master = match link {
            Link::Parent => Some(node.name.clone()),
            _ => peers
                .iter()
                .find(|peer| peer.leads())
                .map(|peer| peer.name.clone()),
        };
        let is_led = master.is_some();
        self.shared.set_view(View {
            parent_ok: self.parent_sight(link, parents) == Sight::Answers,
            master,
            in_sight: domain::in_sight(peers),
            copying: false,
            path,
            domains,
            yields_to: self.decider.yields_to(),
            report_to: self.observer.parent_in_sight(parents),
            problem: self.problem(),
            trouble: self.observer.trouble(),
        });
        is_led
    }

    /// What comes over a link says that a member is there, as long as something comes all the time;
    /// what it told last still holds, as far as we know.
    fn note_life(&self, link: &Link, peers: &mut [Peer]) {
        let flows = self.shared.heard_ago().filter(|heard| *heard < FLOWS);
        let (Link::Peer(followed), Some(heard)) = (link, flows) else {
            return;
        };
        // For ever that would hold us at one that has become another meanwhile.
        let knows = |peer: &&mut Peer| peer.name == *followed && peer.age < STALE;
        for peer in peers.iter_mut().filter(knows) {
            if let Sight::Silent(age) = peer.sight {
                peer.sight = Sight::Silent(age.min(heard));
            }
        }
    }

    fn own_database(&self) -> Target {
        // The configuration has been checked when it was read.
        let url = &self.shared.config.database.url;
        let conninfo = ConnInfo::parse(url).expect("a checked connection string");
        Target {
            name: conninfo.endpoint(),
            conninfo,
            slot: self.shared.config.slot_name(),
            role: Role::Master,
            why: String::new(),
            depose: None,
            deposed: AtomicBool::new(false),
        }
    }

    fn peer_target(&self, name: String) -> Next {
        let node = &self.shared.config.node;
        let Some(info) = self.observer.peer_info(&name) else {
            return Next::Nothing;
        };
        Next::Go(Target {
            conninfo: info.clone(),
            slot: cursor_name(&node.domain, &node.name),
            role: Role::Slave,
            why: String::new(),
            depose: None,
            deposed: AtomicBool::new(false),
            name,
        })
    }
}

/// What a link's thread gave; its panic is ours.
fn joined(ended: Result<(Writer, LinkEnd), tokio::task::JoinError>) -> (Writer, LinkEnd) {
    ended.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}
