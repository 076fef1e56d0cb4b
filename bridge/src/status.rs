//! The node's live state, shared by its tasks.
//!
//! Each task writes what it alone knows (the receiver the upstream, the applier
//! its progress, the relay its downstreams); reports, metrics and peers read it.
//! Nothing here is durable and no decision about data is taken from it, with
//! one exception: [`Shared::acknowledgeable`], whose inputs are durable positions.

mod downstreams;
mod events;
mod kinds;
mod stuck;
mod told;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::AtomicI64;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

pub use downstreams::cursor_name;
pub use kinds::{Applied, Downstream, Event, Role, State};
use stuck::Stuck;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::clock::unix_micros;
use crate::config::Config;
use crate::conninfo::ConnInfo;
use crate::durable::Noted;
use crate::lsn::{Identity, Lsn};
use crate::matching::{Dispute, Standing, Windows};
use crate::queue::{Queue, QueueError};
use crate::rate::RateMeter;

#[derive(Default)]
struct Inner {
    role: Role,
    /// The last one but [`Role::None`].
    played: Role,
    link: State,
    link_problem: Option<String>,
    apply_problem: Option<String>,
    apply_failing_since: Option<Instant>,
    report_problem: Option<String>,
    /// Who comes through the relay is not let in by the database here.
    relay_problem: Option<String>,
    degraded: Option<String>,
    upstream: Option<ConnInfo>,
    upstream_name: Option<String>,
    copy_progress: Option<String>,
    received: Lsn,
    /// How far the upstream of the present link has told to be.
    upstream_end: Option<Lsn>,
    top_time: i64,
    heard: Option<Instant>,
    applied: Applied,
    rate: RateMeter,
    downstreams: BTreeMap<String, Downstream>,
    member_flush: BTreeMap<String, (Lsn, Instant)>,
    view: View,
    domain_path: Vec<String>,
    /// All of them, as the data here has them.
    domains: BTreeSet<String>,
    events: VecDeque<Event>,
    last_once: (String, String),
    identity: Option<Identity>,
    has_data: bool,
    /// It is known that there is none.
    empty: bool,
    /// It was thrown away to copy the parent's.
    anew: bool,
    diverged: Option<String>,
    matching: Matching,
    /// How often each kind of event has happened.
    happened: BTreeMap<String, u64>,
    stuck: Option<Stuck>,
    /// The queue has come to its limit, as the database takes nothing from it.
    full: bool,
    /// A segment of the queue that cannot be read, and why.
    damage: Option<(PathBuf, String)>,
}

impl Inner {
    fn has_diverged(&self) -> bool {
        self.diverged.is_some() || self.matching.outvoted.is_some()
    }

    fn note_upstream_end(&mut self, lsn: Lsn) {
        if lsn > Lsn::ZERO {
            self.upstream_end = self.upstream_end.max(Some(lsn));
        }
    }

    fn heard_within(&self, limit: Duration) -> bool {
        self.heard.is_some_and(|heard| heard.elapsed() < limit)
    }
}

/// What comparing the history with the other servers of the domain has shown.
#[derive(Default)]
struct Matching {
    windows: Windows,
    equal: usize,
    dispute: Option<Dispute>,
    /// A majority has held something else: until the data is copied anew.
    outvoted: Option<String>,
}

/// What the node sees around it, and where it stands in the tree.
#[derive(Clone, Debug, Default)]
#[expect(missing_docs, reason = "as in domain::Told")]
pub struct View {
    pub parent_ok: bool,
    /// The domain's master that answers, or oneself.
    pub master: Option<String>,
    /// Servers of the domain that answer, and oneself.
    pub in_sight: usize,
    pub copying: bool,
    pub path: Vec<String>,
    pub domains: Vec<String>,
    pub yields_to: Option<String>,
    /// Server to report to while nobody is followed.
    pub report_to: Option<ConnInfo>,
    /// The top's clock as the latest of the bridges above that answer knows it, microseconds.
    pub top_in_sight: i64,
    /// What is wrong with how the servers of the domain name each other.
    pub problem: Option<String>,
    /// What keeps us from other servers, and is for people to mend.
    pub trouble: Option<String>,
}

/// The queue while there is one, and when it is done with.
#[derive(Clone)]
pub struct OpenQueue {
    /// The queue.
    pub queue: Queue,
    /// Whoever reads it stops.
    pub closed: CancellationToken,
}

/// The node's live state; cheap to share as `Arc<Shared>`.
pub struct Shared {
    /// The node's configuration.
    pub config: Arc<Config>,
    /// Unique to the data directory; tells two bridges of one name apart.
    pub instance: String,
    started: Instant,
    started_micros: i64,
    /// Password of the relay's restricted role, made anew at each start.
    pub relay_password: String,
    /// End of what is committed in the local Postgres, and of what there was for others behind that.
    pub replayed: watch::Sender<Lsn>,
    /// What was last seen or written in `terrace.progress`.
    pub noted: watch::Sender<Option<Noted>>,
    /// The end that it has durably: nothing behind it may be forgotten.
    pub replay_durable: watch::Sender<Lsn>,
    /// The applier goes no further than this.
    pub upstream_replayed: watch::Sender<Lsn>,
    /// Durable end of the queue.
    pub flushed: watch::Sender<Lsn>,
    /// The queue; `None` before there is data.
    pub queue: watch::Sender<Option<OpenQueue>>,
    /// The top's own clock when it last sent something, in microseconds since 2000-01-01 UTC:
    /// against the time of a commit it tells how far behind that is, whatever the clock here says.
    pub top_clock: AtomicI64,
    /// A report should go out soon.
    pub changed: Notify,
    /// Some position has moved, without there being any data: news, but not for ever. Each report
    /// is written to the top's database, whose position that moves.
    pub moved: Notify,
    /// ParameterStatus values of the local Postgres, empty until first seen.
    pub server_parameters: Mutex<BTreeMap<String, String>>,
    inner: Mutex<Inner>,
}

impl Shared {
    /// State of a node that has just started.
    pub fn new(config: Arc<Config>, instance: String, relay_password: String) -> Arc<Shared> {
        Arc::new(Shared {
            config,
            instance,
            started: Instant::now(),
            started_micros: unix_micros(),
            relay_password,
            replayed: watch::Sender::new(Lsn::ZERO),
            noted: watch::Sender::new(None),
            replay_durable: watch::Sender::new(Lsn::ZERO),
            upstream_replayed: watch::Sender::new(Lsn::ZERO),
            flushed: watch::Sender::new(Lsn::ZERO),
            queue: watch::Sender::new(None),
            top_clock: AtomicI64::new(0),
            changed: Notify::new(),
            moved: Notify::new(),
            server_parameters: Mutex::default(),
            inner: Mutex::default(),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A panic of another holder leaves plain values behind, none half-made.
        self.inner
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn change<T>(&self, edit: impl FnOnce(&mut Inner) -> T) -> T {
        let result = edit(&mut self.inner());
        self.changed.notify_one();
        result
    }

    /// Sets role and upstream; an event tells a change of role.
    pub fn set_role(&self, role: Role, upstream: Option<(String, ConnInfo)>, reason: &str) {
        let before = self.change(|inner| {
            inner.role = role;
            let mut before = role;
            if role != Role::None {
                inner.diverged = None;
                // Whoever goes on as what it was under another link has become nothing new.
                before = std::mem::replace(&mut inner.played, role);
            }
            let (name, conninfo) = upstream.unzip();
            inner.upstream_name = name;
            inner.upstream = conninfo;
            inner.heard = (role != Role::None).then(Instant::now);
            inner.upstream_end = None;
            before
        });
        if before != role {
            self.event(&role.to_string(), reason);
        }
    }

    /// Role at present.
    pub fn role(&self) -> Role {
        self.inner().role
    }

    /// Sets what the upstream link is doing.
    /// Tells whether that is new.
    pub fn set_link(&self, state: State, problem: Option<String>) -> bool {
        let mut inner = self.inner();
        let new = inner.link != state || inner.link_problem != problem;
        if new {
            inner.link = state;
            inner.link_problem = problem;
            self.changed.notify_one();
        }
        new
    }

    /// The top tells another history than the one here, or most of the domain holds
    /// another, so none is to be served.
    pub fn has_diverged(&self) -> bool {
        self.inner().has_diverged()
    }

    /// Sets what comparing the history with the others' has shown.
    pub fn set_matching(&self, windows: Windows, equal: usize, dispute: Option<Dispute>) {
        let outvoted = dispute
            .as_ref()
            .filter(|dispute| dispute.standing == Standing::Outvoted);
        let outvoted = outvoted.map(Dispute::to_string);
        let problem = dispute.as_ref().map(Dispute::to_string);
        let stops = {
            let mut inner = self.inner();
            let matching = &mut inner.matching;
            let news = (matching.equal, &matching.dispute) != (equal, &dispute);
            (matching.windows, matching.equal) = (windows, equal);
            matching.dispute = dispute;
            let stops = matching.outvoted.is_none() && outvoted.is_some();
            matching.outvoted = matching.outvoted.take().or(outvoted);
            if news || stops {
                self.changed.notify_one();
            }
            stops
        };
        if let Some(problem) = problem {
            self.event_once("mismatch", &problem);
        }
        if stops {
            self.stop_serving();
        }
    }

    /// The number of windows that another server holds equally, and whether one is disputed.
    pub fn matching(&self) -> (usize, bool) {
        let matching = &self.inner().matching;
        let disputed = matching.dispute.is_some() || matching.outvoted.is_some();
        (matching.equal, disputed)
    }

    /// End of a part of the history of which nobody can tell whether it is right.
    pub fn contested(&self) -> Option<Lsn> {
        let inner = self.inner();
        let doubt = inner.matching.doubt()?;
        Some(doubt.end())
    }

    /// Most of the domain holds another history, and that is all that is wrong with this one.
    pub fn is_outvoted(&self) -> bool {
        let inner = self.inner();
        inner.matching.outvoted.is_some() && inner.diverged.is_none()
    }

    /// Notes where the database is, by what it says itself.
    pub fn set_position(&self, noted: Lsn) {
        self.replayed.send_replace(noted);
    }

    /// What may be shown here, of what ends up to `end`.
    pub fn due(&self, end: Lsn) -> Lsn {
        end.min(*self.upstream_replayed.borrow())
    }

    /// How far those below may show what they have. A transaction that only this server cannot apply
    /// holds none of them back from what may be shown here.
    pub fn shown(&self) -> Lsn {
        if !self.is_stuck() {
            return *self.replayed.borrow();
        }
        let queue = self.queue.borrow();
        queue
            .as_ref()
            .map_or(Lsn::ZERO, |open| self.due(open.queue.end()))
    }

    /// Notes how far the server above lets us show what we have; it never goes back.
    pub fn note_shown_above(&self, lsn: Lsn) {
        self.upstream_replayed.send_if_modified(|gate| {
            let moves = lsn > *gate;
            *gate = lsn.max(*gate);
            moves
        });
    }

    /// Notes that the queue has come to its limit, or that it has room again.
    pub fn set_full(&self, full: bool) {
        // It is said every second, and mostly nothing is new.
        if std::mem::replace(&mut self.inner().full, full) == full {
            return;
        }
        self.changed.notify_one();
        if full {
            tracing::warn!("the queue has come to retain_max: nothing more is received");
        }
    }

    /// Whether the upstream is not to be read for now.
    pub fn is_full(&self) -> bool {
        self.inner().full
    }

    /// Notes it if the error is that a part of the queue cannot be read.
    pub fn note_damage(&self, error: &QueueError) {
        if let QueueError::Damaged { path, .. } = error {
            self.keep_damage(path.clone(), error.to_string());
        }
    }

    /// It is to be looked at again.
    pub fn keep_damage(&self, segment: PathBuf, reason: String) {
        self.inner().damage = Some((segment, reason));
    }

    /// The segment of the queue that cannot be read, and why; once.
    pub fn take_damage(&self) -> Option<(PathBuf, String)> {
        self.inner().damage.take()
    }

    /// Ends every stream from the queue. New ones are refused while the state lasts.
    pub fn stop_serving(&self) {
        self.queue.send_if_modified(|open| {
            let Some(open) = open else { return false };
            open.closed.cancel();
            open.closed = CancellationToken::new();
            true
        });
    }

    /// Says that it does, until a link shows otherwise.
    pub fn set_diverged(&self, problem: String) {
        self.change(|inner| inner.diverged = Some(problem));
    }

    /// Sets what the node sees around it.
    pub fn set_view(&self, view: View) {
        self.inner().view = view;
    }

    /// Sets the domains from the first level to this node's own, as the data has them.
    pub fn set_domain_path(&self, path: Vec<String>) {
        self.inner().domain_path = path;
    }

    /// Notes which domains there are; gives those that are no more.
    pub fn set_domains(&self, domains: BTreeSet<String>) -> Vec<String> {
        // The list is being copied anew.
        if domains.is_empty() {
            return Vec::new();
        }
        let before = std::mem::replace(&mut self.inner().domains, domains.clone());
        before.difference(&domains).cloned().collect()
    }

    /// Whether a place in the queue may be one of a domain that there is.
    pub fn is_wanted(&self, cursor: &str) -> bool {
        let domains = &self.inner().domains;
        let domain = cursor.strip_prefix("terrace_").unwrap_or_default();
        domains.is_empty() || domains.contains(domain)
    }

    /// Notes what another server of the domain holds durably.
    pub fn set_member_flush(&self, name: &str, flush: Lsn) {
        let heard = Instant::now();
        self.inner()
            .member_flush
            .insert(name.to_owned(), (flush, heard));
    }

    /// Says why nothing can be applied, or that it can again.
    pub fn set_apply_problem(&self, problem: Option<String>) {
        let mut inner = self.inner();
        if inner.apply_problem != problem {
            // What stands in the way still does, after something that came before it.
            if problem.is_none()
                && inner
                    .stuck
                    .is_some_and(|stuck| stuck.end <= *self.replayed.borrow())
            {
                inner.stuck = None;
            }
            inner.apply_failing_since = match problem {
                None => None,
                Some(_) => inner.apply_failing_since.or(Some(Instant::now())),
            };
            inner.apply_problem = problem;
            self.changed.notify_one();
        }
    }

    /// Says why the upstream refuses our reports, or that it takes them.
    pub fn set_report_problem(&self, problem: Option<String>) {
        let mut inner = self.inner();
        if inner.report_problem != problem {
            if let Some(problem) = &problem {
                tracing::warn!("{problem}");
            }
            inner.report_problem = problem;
        }
    }

    /// Says why those who come through the relay cannot look into the database.
    pub fn set_relay_problem(&self, problem: Option<String>) {
        let mut inner = self.inner();
        if let Some(problem) = problem.as_ref().filter(|_| inner.relay_problem != problem) {
            tracing::warn!("{problem}");
        }
        inner.relay_problem = problem;
    }

    /// How far the initial copy is, for people.
    pub fn set_copy_progress(&self, progress: String) {
        self.change(|inner| inner.copy_progress = Some(progress));
    }

    /// Records a durable or shared fact: which history, and that data is here.
    pub fn set_identity(&self, identity: Identity, has_data: bool) {
        self.change(|inner| {
            if inner.identity.as_ref() != Some(&identity) {
                // What others hold is of the old one.
                inner.member_flush.clear();
                inner.downstreams.clear();
            }
            inner.identity = Some(identity);
            inner.has_data = has_data;
            inner.empty &= !has_data;
            inner.anew &= !has_data;
            inner.copy_progress = None;
        });
    }

    /// The database has said that it has no data; it may have been thrown away to copy the
    /// parent's `anew`.
    pub fn set_empty(&self, anew: bool) {
        self.change(|inner| (inner.empty, inner.anew) = (true, anew));
    }

    /// The data here is to be copied anew, from the parent or from somebody who has better.
    pub fn set_no_data(&self, from_parent: bool) {
        self.set_empty(from_parent);
        self.change(|inner| {
            inner.has_data = false;
            inner.diverged = None;
            inner.matching = Matching::default();
            inner.received = Lsn::ZERO;
            inner.apply_problem = None;
            inner.apply_failing_since = None;
            inner.stuck = None;
        });
        self.set_position(Lsn::ZERO);
        self.flushed.send_replace(Lsn::ZERO);
    }

    /// The history this node holds.
    pub fn identity(&self) -> Option<Identity> {
        self.inner().identity.clone()
    }

    /// Whether the initial copy has been done here.
    pub fn has_data(&self) -> bool {
        self.inner().has_data
    }

    /// Notes what has arrived, with the top's clock.
    pub fn set_received(&self, lsn: Lsn, top_time: i64) {
        let mut inner = self.inner();
        inner.top_time = inner.top_time.max(top_time);
        inner.note_upstream_end(lsn);
        if lsn > inner.received {
            inner.received = lsn;
            self.moved.notify_one();
        }
    }

    /// Notes how far the upstream is, whatever of that has come.
    pub fn set_upstream_end(&self, lsn: Lsn) {
        self.inner().note_upstream_end(lsn);
    }

    /// Notes that something has come from the upstream, be it a part of a message only: over
    /// a thin link a whole one takes its time.
    pub fn note_heard(&self) {
        self.inner().heard = Some(Instant::now());
    }

    /// How long ago the upstream of the present link has sent anything.
    pub fn heard_ago(&self) -> Option<Duration> {
        self.inner().heard.map(|heard| heard.elapsed())
    }

    /// The top's clock as far as it is known here.
    pub fn top_time(&self) -> i64 {
        self.inner().top_time
    }

    /// Notes a committed batch.
    pub fn set_applied(&self, edit: impl FnOnce(&mut Applied)) {
        let replayed = *self.replayed.borrow();
        let mut inner = self.inner();
        let before = (inner.applied.transactions, inner.applied.conflicts);
        edit(&mut inner.applied);
        let (transactions, received) = (inner.applied.transactions, inner.received);
        inner.rate.sample(transactions, replayed, received);
        if before != (transactions, inner.applied.conflicts) {
            self.changed.notify_one();
        }
        self.moved.notify_one();
    }

    /// What the applier has done.
    pub fn applied(&self) -> Applied {
        self.inner().applied.clone()
    }

    /// What is wrong with the disk under the queue, if something is. A disk that is
    /// silent counts as out of order when a server that is would count as gone.
    fn disk_problem(&self) -> Option<String> {
        let queue = self.queue.borrow();
        let limit = self.config.failover.takeover_after;
        queue.as_ref()?.queue.disk_problem(limit)
    }

    /// The server that is followed.
    pub fn followed(&self) -> Option<ConnInfo> {
        self.inner().upstream.clone()
    }

    /// Server to report to: the one that is followed, else the domain's master if it
    /// is in sight, else one above, so that whoever follows nobody is heard of all the same.
    pub fn upstream(&self) -> Option<ConnInfo> {
        let inner = self.inner();
        let in_sight = || {
            let master = inner.view.master.as_ref()?;
            ConnInfo::parse(self.config.peers.get(master)?).ok()
        };
        let upstream = inner.upstream.clone().or_else(in_sight);
        upstream.or_else(|| inner.view.report_to.clone())
    }
}

impl Matching {
    fn doubt(&self) -> Option<&Dispute> {
        let dispute = self.dispute.as_ref()?;
        (dispute.standing == Standing::Doubt).then_some(dispute)
    }
}
