//! Carries out what [`crate::domain`] decides: one link at a time, to the parent
//! or to a member of the domain, for as long as that is the best to follow.
//!
//! Nothing about roles is on disk. After a start, a lost link or a refusal the
//! node looks around again and decides anew. A link has a thread of its own, for it
//! writes to the disk: when that hangs the node goes on deciding and telling.

mod ends;
mod next;
mod orders;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::runtime::Builder;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::client::Client;
use crate::domain::{Decider, Link};
use crate::lsn::Lsn;
use crate::observe::Observer;
use crate::queue::Writer;
use crate::status::{Role, Shared};
use crate::upstream::{LinkEnd, SILENCE, Target, follow};

/// Decides at least this often.
const TICK: Duration = Duration::from_millis(100);
/// The cursor of an initial copy is held until our own has been registered for so long.
const PINNED: Duration = Duration::from_secs(5);
/// A link that has not ended when it was told to for so long hangs in its disk.
const GRACE: Duration = Duration::from_secs(1);
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
    /// The master of the domain that was seen last.
    last_master: Option<String>,
    /// What the last try at the parent has shown of the slot: it is lost.
    slot_lost: Option<String>,
    /// The data here cannot be gone on with, and no other server's can.
    in_gap: bool,
    /// A file says that the history here is another one than the top's.
    kept_divergence: bool,
    /// A link to the parent is being opened.
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
        let members = shared.config.peers.len() + 1;
        let resync = failover.resync_on_gap;
        let decider = Decider::new(failover.takeover_after, members, resync);
        Roles {
            decider,
            kept_divergence: shared.has_diverged(),
            shared,
            observer,
            slot_lost: None,
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
        let ending = ending.clone();
        spawn_blocking(move || {
            // Waits for its socket itself: otherwise another thread would, to wake this one.
            let ended = match Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => {
                    let link = follow(&shared, &mut writer, &target, &ending);
                    let ended = runtime.block_on(link);
                    // A host name that is still being looked up keeps nobody.
                    runtime.shutdown_background();
                    ended
                }
                Err(error) => LinkEnd::Lost(format!("start the link's event loop: {error}")),
            };
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
}

/// What a link's thread gave; its panic is ours.
fn joined(ended: Result<(Writer, LinkEnd), tokio::task::JoinError>) -> (Writer, LinkEnd) {
    ended.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}
