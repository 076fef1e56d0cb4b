//! Watches the other servers of the domain and those of the parent domain.
//!
//! One task a server keeps a session open and asks at each heartbeat, more often
//! while this node follows nobody. A process that dies is seen at once, by its
//! connection; one that is silent, by the age of its last answer.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::Deserialize;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::client::{Client, PgError};
use crate::config::Config;
use crate::conninfo::ConnInfo;
use crate::domain::{Peer, Sight, Told, stranger};
use crate::lsn::{Identity, Lsn};
use crate::matching::Windows;
use crate::upstream::{BRIDGE_PARAMETER, is_standby, session};

/// How long a server may take to answer …
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// … and to let us in, which takes six or seven answers.
const OPENING_LIMIT: Duration = Duration::from_secs(5);
/// Pause between questions while nobody is followed.
const HURRY: Duration = Duration::from_millis(200);
/// One that has not answered for so long may have been mended meanwhile.
const GONE: Duration = Duration::from_secs(30);
/// An answer that is later than this counts as silence.
const LATE: Duration = Duration::from_millis(500);

/// A server to watch.
#[derive(Clone)]
struct Watched {
    name: String,
    info: ConnInfo,
    /// Of our own domain, so that it must be a bridge of that name.
    peer: bool,
}

/// What a server's status holds besides what decisions need.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Status {
    #[serde(flatten)]
    told: Told,
    /// Positions of the child domains that it serves.
    cursors: BTreeMap<String, Lsn>,
    /// Servers that it knows of its domain.
    peers: Vec<String>,
    /// Hashes of parts of that.
    windows: Windows,
    /// How far those that follow it may show what they have.
    #[serde(rename = "shown_lsn")]
    shown: Lsn,
}

#[derive(Clone, Default)]
struct Seen {
    tried: bool,
    heard: Option<Instant>,
    refused: bool,
    standby: bool,
    status: Option<Status>,
    problem: Option<String>,
    /// Why it does not let us in, if people must mend that.
    trouble: Option<String>,
}

impl Seen {
    /// What it told of itself counts until it is gone.
    fn fail(&mut self, refused: bool, trouble: Option<String>) {
        self.tried = true;
        self.refused = refused;
        self.trouble = trouble;
        if refused || self.heard.is_none_or(|heard| heard.elapsed() > GONE) {
            self.problem = None;
        }
    }
}

/// What is known of the servers around this one.
pub struct Observer {
    node: String,
    domain: String,
    heartbeat: Duration,
    started: Instant,
    peers: Vec<Watched>,
    parents: Vec<Watched>,
    seen: Mutex<BTreeMap<String, Seen>>,
    changed: watch::Sender<()>,
    hurry: watch::Sender<bool>,
    again: Notify,
}

impl Observer {
    /// For the servers that the configuration names.
    pub fn new(config: &Config) -> anyhow::Result<Arc<Observer>> {
        let watched = |name: &str, url: &str, peer| {
            anyhow::Ok(Watched {
                name: name.to_owned(),
                info: ConnInfo::parse(url)?,
                peer,
            })
        };
        let peers = config
            .peers
            .iter()
            .map(|(name, url)| watched(name, url, true));
        let urls = config.parent.iter().flat_map(|parent| &parent.servers);
        let parents = urls.map(|url| watched(&ConnInfo::parse(url)?.endpoint(), url, false));
        Ok(Arc::new(Observer {
            node: config.node.name.clone(),
            domain: config.node.domain.clone(),
            heartbeat: config.failover.heartbeat,
            started: Instant::now(),
            peers: peers.collect::<anyhow::Result<_>>()?,
            parents: parents.collect::<anyhow::Result<_>>()?,
            seen: Mutex::default(),
            changed: watch::Sender::new(()),
            hurry: watch::Sender::new(true),
            again: Notify::new(),
        }))
    }

    fn seen(&self) -> MutexGuard<'_, BTreeMap<String, Seen>> {
        self.seen
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Time since the bridge started, as decisions count it.
    pub fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Wakes when something looks different.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Asks everybody anew, and often, until told otherwise.
    pub fn hurry(&self, hurry: bool) {
        let changed = self
            .hurry
            .send_if_modified(|known| std::mem::replace(known, hurry) != hurry);
        if changed && hurry {
            self.again.notify_waiters();
        }
    }

    /// The other servers of the domain.
    pub fn peers(&self) -> Vec<Peer> {
        self.look(&self.peers)
    }

    /// The servers of the parent domain, in the configured order.
    pub fn parents(&self) -> Vec<Peer> {
        self.look(&self.parents)
    }

    /// Address of a peer.
    pub fn peer_info(&self, name: &str) -> Option<&ConnInfo> {
        self.peers
            .iter()
            .find(|peer| peer.name == name)
            .map(|peer| &peer.info)
    }

    /// Address of a server of the parent domain.
    pub fn parent_info(&self, index: usize) -> Option<&ConnInfo> {
        self.parents.get(index).map(|parent| &parent.info)
    }

    /// Address of the first of these servers of the parent domain that answers.
    pub fn parent_in_sight(&self, parents: &[Peer]) -> Option<ConnInfo> {
        let answers = |parent: &Peer| parent.sight == Sight::Answers && !parent.standby;
        let index = parents.iter().position(answers)?;
        self.parent_info(index).cloned()
    }

    /// Positions of child domains as the other servers of the domain know them that hold this history.
    pub fn child_cursors(&self, identity: &Identity) -> BTreeMap<String, Lsn> {
        let seen = self.seen();
        let mut cursors = BTreeMap::new();
        let peers = self.peers.iter();
        let statuses = peers.filter_map(|peer| status_of(&seen, peer, identity));
        for (name, lsn) in statuses.flat_map(|status| &status.cursors) {
            let known = cursors.entry(name.clone()).or_insert(*lsn);
            *known = (*known).max(*lsn);
        }
        cursors
    }

    /// How far those that follow `server` may show what they have, if it holds this history.
    pub fn shown(&self, server: &ConnInfo, identity: &Identity) -> Option<Lsn> {
        let mut servers = self.peers.iter().chain(&self.parents);
        let followed = servers.find(|one| one.info.endpoint() == server.endpoint())?;
        Some(status_of(&self.seen(), followed, identity)?.shown)
    }

    /// What the other servers of the domain that hold this history have told of it.
    pub fn windows(&self, identity: &Identity) -> Vec<(String, Windows)> {
        let seen = self.seen();
        let told = |peer: &Watched| {
            let status = status_of(&seen, peer, identity)?;
            Some((peer.name.clone(), status.windows.clone()))
        };
        self.peers.iter().filter_map(told).collect()
    }

    /// What is wrong with how the servers of the domain name each other, or with what they hold
    /// beside `own`.
    pub fn problem(&self, own: &Told) -> Option<String> {
        let seen = self.seen();
        let named = self
            .peers
            .iter()
            .find_map(|peer| seen.get(&peer.name)?.problem.clone());
        drop(seen);
        named.or_else(|| stranger(own, &self.peers()))
    }

    fn look(&self, servers: &[Watched]) -> Vec<Peer> {
        let seen = self.seen();
        let nothing = Seen::default();
        let look = |server: &Watched| {
            let seen = seen.get(&server.name).unwrap_or(&nothing);
            Peer {
                name: server.name.clone(),
                sight: self.sight(seen),
                told: seen.status.as_ref().map(|status| status.told.clone()),
                age: seen.heard.map_or(Duration::MAX, |heard| heard.elapsed()),
                standby: seen.standby,
            }
        };
        servers.iter().map(look).collect()
    }

    fn sight(&self, seen: &Seen) -> Sight {
        let age = |since: Instant| since.elapsed();
        match seen.heard {
            _ if seen.refused => Sight::Refused,
            None if !seen.tried => Sight::Unknown,
            None => Sight::Silent(age(self.started)),
            Some(heard) if age(heard) < self.heartbeat + LATE => Sight::Answers,
            Some(heard) => Sight::Silent(age(heard)),
        }
    }

    fn note(&self, name: &str, edit: impl FnOnce(&mut Seen)) {
        edit(self.seen().entry(name.to_owned()).or_default());
        self.changed.send_replace(());
    }

    /// Watches until `cancel`.
    pub async fn run(self: Arc<Self>, cancel: CancellationToken) -> anyhow::Result<()> {
        let mut tasks = JoinSet::new();
        for server in self.peers.iter().chain(&self.parents) {
            let (observer, server) = (Arc::clone(&self), server.clone());
            tasks.spawn(async move { observer.watch(&server).await });
        }
        cancel.cancelled().await;
        Ok(())
    }

    async fn watch(&self, server: &Watched) {
        let mut session = None;
        loop {
            let limit = match session {
                Some(_) => ANSWER_LIMIT,
                None => OPENING_LIMIT,
            };
            let asked = timeout(limit, self.ask(server, &mut session)).await;
            let problem = match asked {
                Ok(Ok(())) => None,
                Ok(Err(error)) => {
                    session = None;
                    self.note_failure(server, &error);
                    Some(error.to_string())
                }
                Err(_) => {
                    session = None;
                    self.note(&server.name, |seen| seen.fail(seen.refused, None));
                    Some("no answer".to_owned())
                }
            };
            if let Some(problem) = problem {
                tracing::debug!(server = %server.name, problem, "no status");
            }
            let pause = if *self.hurry.borrow() {
                HURRY.min(self.heartbeat)
            } else {
                self.heartbeat
            };
            tokio::select! {
                () = sleep(pause) => {}
                () = self.again.notified() => {}
                // It says nothing by itself, so this is its end.
                () = ended(&mut session) => session = None,
            }
        }
    }

    fn note_failure(&self, server: &Watched, error: &PgError) {
        let trouble = error.is_for_people().then(|| {
            let key = if server.peer { "peers." } else { "parent " };
            format!("{key}{}: {error}{}", server.name, error.way_out())
        });
        let known = self.trouble_of(&server.name);
        if let Some(text) = trouble.as_ref().filter(|_| trouble != known) {
            tracing::warn!("{text}");
        }
        self.note(&server.name, |seen| seen.fail(error.is_refused(), trouble));
    }

    fn trouble_of(&self, name: &str) -> Option<String> {
        self.seen().get(name)?.trouble.clone()
    }

    /// Why these servers of the parent domain do not answer, where that is for people to mend, or
    /// their names; and whether that is so of all.
    pub fn why_not(&self, parents: &[Peer]) -> (bool, Vec<String>) {
        let troubles = parents.iter().map(|parent| self.trouble_of(&parent.name));
        let troubles: Vec<Option<String>> = troubles.collect();
        let all = !troubles.is_empty() && troubles.iter().all(Option::is_some);
        let word = |(trouble, parent): (Option<String>, &Peer)| {
            trouble.unwrap_or_else(|| parent.name.clone())
        };
        (all, troubles.into_iter().zip(parents).map(word).collect())
    }

    /// What keeps us from any server, and is for people to mend.
    pub fn trouble(&self) -> Option<String> {
        let mut servers = self.peers.iter().chain(&self.parents);
        servers.find_map(|server| self.trouble_of(&server.name))
    }

    /// Asks once, over the open session or a new one.
    async fn ask(&self, server: &Watched, open: &mut Option<Client>) -> Result<(), PgError> {
        let fresh = match open.take() {
            Some(client) => client,
            None => session(&server.info, &self.node, false).await?,
        };
        let client = open.insert(fresh);
        if !client.extension_accepted(BRIDGE_PARAMETER) {
            if server.peer {
                return Err(PgError::Protocol("the peer is no bridge".into()));
            }
            let standby = is_standby(client).await?;
            self.note(&server.name, |seen| {
                *seen = Seen {
                    tried: true,
                    heard: Some(Instant::now()),
                    standby,
                    ..Seen::default()
                };
            });
            return Ok(());
        }
        let rows = client.simple("SHOW terrace.status").await?;
        let status = read_status(&rows).map_err(|error| PgError::Protocol(format!("{error:#}")))?;
        let problem = self.problem_of(server, &status);
        if let Some(problem) = &problem {
            tracing::debug!("{problem}");
        }
        self.note(&server.name, |seen| {
            *seen = Seen {
                tried: true,
                heard: Some(Instant::now()),
                refused: false,
                standby: false,
                // A stranger's words count for nothing.
                status: problem.is_none().then_some(status),
                problem,
                trouble: None,
            };
        });
        Ok(())
    }

    fn problem_of(&self, server: &Watched, status: &Status) -> Option<String> {
        if !server.peer {
            return None;
        }
        let (name, told) = (&server.name, &status.told);
        if told.domain != self.domain {
            Some(format!(
                "peers.{name} belongs to domain \"{}\", not to \"{}\"; correct [peers]",
                told.domain, self.domain
            ))
        } else if told.node != *name {
            Some(format!(
                "peers.{name} is node \"{}\"; correct [peers]",
                told.node
            ))
        } else if !status.peers.contains(&self.node) {
            Some(format!(
                "node {name} does not list \"{}\" in its [peers]; add it there",
                self.node
            ))
        } else {
            None
        }
    }
}

/// What a server has told, if it holds this history.
fn status_of<'a>(
    seen: &'a BTreeMap<String, Seen>,
    server: &Watched,
    identity: &Identity,
) -> Option<&'a Status> {
    let status = seen.get(&server.name)?.status.as_ref()?;
    (status.told.identity.as_ref() == Some(identity)).then_some(status)
}

fn read_status(rows: &[crate::client::Row]) -> anyhow::Result<Status> {
    let text = rows.first().and_then(|row| row.first()?.as_deref());
    serde_json::from_str(text.context("no status")?).context("read the status")
}

async fn ended(session: &mut Option<Client>) {
    match session {
        Some(client) => client.ended().await,
        None => std::future::pending().await,
    }
}

/// Sends a command of ours to a bridge and waits for its answer.
pub async fn command(info: &ConnInfo, node: &str, text: &str) -> Result<(), PgError> {
    let sent = async {
        let mut client = session(info, node, false).await?;
        client.simple(text).await.map(drop)
    };
    let late = || PgError::Io(std::io::ErrorKind::TimedOut.into());
    timeout(ANSWER_LIMIT * 5, sent).await.map_err(|_| late())?
}
