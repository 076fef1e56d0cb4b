//! What a node sees of its domain, and the order of its servers.

use std::borrow::Cow;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Decision;
use crate::lsn::{Identity, Lsn};
use crate::status::Role;

/// A master whose knowledge of the top is older than the other's by this loses.
pub(super) const STALE_MICROS: i64 = 3_000_000;
/// A bridge sends something twice a second; one that has not for so long may be gone.
const FLOWS: Duration = Duration::from_millis(1500);
/// What a server told longer ago says nothing of what it is.
const STALE: Duration = Duration::from_secs(30);

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
    /// It has just started and does not know yet what it has.
    pub opening: bool,
    /// Whether it has been copied to.
    pub has_data: bool,
    /// Whether it copies from the parent now …
    pub copying: bool,
    /// … or has thrown its data away to do so.
    pub anew: bool,
    /// Its database and the disk under its queue work, and it serves.
    pub healthy: bool,
    /// Its history is not known to be another one than the top's or the domain's, so
    /// that it gives it to others.
    pub serves: bool,
    /// Which history its positions are of.
    pub identity: Option<Identity>,
    /// The parent answers it.
    pub parent_ok: bool,
    /// The domain's master answers it (or it is the master).
    pub master_ok: bool,
    /// Servers of its domain that answer it, and itself.
    pub in_sight: usize,
    /// Its database is far behind what its queue holds: who takes over from it would wait.
    #[serde(default)]
    pub lagging: bool,
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
    /// The same, as the latest of the bridges above that answer it knows it; 0 without any.
    pub top_in_sight: i64,
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
    pub fn is_live(self, limit: Duration) -> bool {
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
    /// A Postgres that is a standby: nobody can follow it, or report to it.
    pub standby: bool,
}

impl Peer {
    /// It answers, and is master.
    pub fn leads(&self) -> bool {
        let told = self.told.as_ref();
        self.sight == Sight::Answers && told.is_some_and(|told| told.role == Role::Master)
    }
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
    /// How long ago anything came over that link.
    pub heard: Option<Duration>,
    /// A link to the server of the parent domain that was decided on last is being opened: that
    /// takes its time over a long way, and another one would take as much.
    pub opening: bool,
    /// The servers of the domain do not name each other as they should, so that what is seen of
    /// it may not be all: nothing is to be done that cannot be undone.
    pub doubtful: bool,
}

/// How the parent domain looks. What comes over the link says that it is there, also where so
/// many packets get lost that questions go unanswered.
pub fn parent_sight(
    link: &Link,
    heard: Option<Duration>,
    parents: &[Peer],
    limit: Duration,
) -> Sight {
    let order = |sight: &Sight| match sight {
        Sight::Answers => (0, Duration::ZERO),
        Sight::Silent(age) => (1, *age),
        Sight::Unknown => (2, Duration::ZERO),
        Sight::Refused => (3, Duration::ZERO),
    };
    if *link == Link::Parent && heard.is_some_and(|heard| heard < limit) {
        return Sight::Answers;
    }
    let primaries = parents.iter().filter(|parent| !parent.standby);
    let best = primaries.map(|parent| parent.sight).min_by_key(order);
    best.unwrap_or(Sight::Unknown)
}

/// What comes over a link says that a member is there, as long as something comes all the time;
/// what it told last still holds, as far as we know.
pub(super) fn with_life<'a>(own: &Own, peers: &'a [Peer]) -> Cow<'a, [Peer]> {
    let mut peers = Cow::Borrowed(peers);
    let flows = own.heard.filter(|heard| *heard < FLOWS);
    let (Link::Peer(followed), Some(heard)) = (&own.link, flows) else {
        return peers;
    };
    // For ever that would hold us at one that has become another meanwhile.
    let knows = |peer: &Peer| peer.name == *followed && peer.age < STALE;
    if let Some(at) = peers.iter().position(knows)
        && let Sight::Silent(age) = peers[at].sight
    {
        peers.to_mut()[at].sight = Sight::Silent(age.min(heard));
    }
    peers
}

/// The domain and its parent as one decision sees them.
pub(super) struct View<'a> {
    pub own: &'a Own,
    pub peers: Cow<'a, [Peer]>,
    pub parents: &'a [Peer],
    pub limit: Duration,
    /// Servers of the domain.
    pub members: usize,
}

impl<'a> View<'a> {
    /// How the parent domain looks.
    pub fn parent(&self) -> Sight {
        parent_sight(&self.own.link, self.own.heard, self.parents, self.limit)
    }

    pub fn live(&self) -> impl Iterator<Item = (&str, &Told)> {
        self.live_peers()
            .filter_map(|peer| Some((peer.name.as_str(), peer.told.as_ref()?)))
    }

    pub fn live_peers(&self) -> impl Iterator<Item = &Peer> {
        let (limit, own) = (self.limit, &self.own.told);
        self.peers
            .iter()
            .filter(move |peer| peer.sight.is_live(limit))
            .filter(move |peer| {
                let told = peer.told.as_ref();
                told.is_some_and(|told| !is_stranger(own, told))
            })
    }

    pub fn told(peer: &Peer) -> &Told {
        peer.told.as_ref().expect("a live peer has told")
    }

    /// The master that goes first of those in sight.
    pub fn master(&self) -> Option<&Peer> {
        self.live_peers()
            .filter(|peer| Self::told(peer).role == Role::Master && Self::told(peer).has_data)
            .reduce(|a, b| {
                if goes_before(Self::told(b), Self::told(a), self.members) {
                    b
                } else {
                    a
                }
            })
    }

    pub fn go_to(&self, name: &str) -> Decision {
        if self.own.link == Link::Peer(name.to_owned()) {
            Decision::Stay
        } else {
            Decision::Follow(name.to_owned())
        }
    }

    pub fn longest_that_serves(&self, end: Lsn) -> Option<&Peer> {
        self.live_peers()
            .filter(|peer| {
                let told = Self::told(peer);
                let has_more = told.first <= end && told.flush > end;
                told.has_data && has_more && self.gives(told) && !self.is_behind_us(told)
            })
            .max_by_key(|peer| (Self::told(peer).flush, &peer.name))
    }

    /// Its positions can be compared with ours, and it gives what it has.
    pub fn gives(&self, told: &Told) -> bool {
        told.serves && same_origin(&self.own.told, told)
    }

    /// It gets its data through us.
    pub fn is_behind_us(&self, told: &Told) -> bool {
        told.path.contains(&self.own.told.node)
    }

    /// It follows a master that is not us.
    pub fn follows_another(&self, told: &Told) -> bool {
        told.role == Role::Slave && told.master_ok && !self.is_behind_us(told)
    }

    /// A sibling that follows a master, and keeps what follows our end.
    pub fn sibling_with_master(&self, masterless: Duration) -> Option<&Peer> {
        self.siblings_with_master(masterless)
            .filter(|peer| Self::told(peer).first <= self.own.told.flush)
            .min_by_key(|peer| (Self::told(peer).path.len(), &peer.name))
    }

    /// Whether any sibling follows a master.
    pub fn is_master_seen(&self, masterless: Duration) -> bool {
        self.siblings_with_master(masterless).next().is_some()
    }

    /// What was told before the master went out of our sight says nothing of now.
    fn siblings_with_master(&self, masterless: Duration) -> impl Iterator<Item = &Peer> {
        self.live_peers().filter(move |peer| {
            let told = Self::told(peer);
            peer.age < masterless && self.follows_another(told) && self.gives(told)
        })
    }

    /// Members that have not told anything within so long.
    pub fn unheard(&self, within: Duration) -> Vec<String> {
        let heard = |peer: &Peer| {
            let knows = peer.told.as_ref().is_some_and(|told| !told.opening);
            peer.sight == Sight::Answers && knows && peer.age < within
        };
        let peers = self.peers.iter().filter(|peer| !heard(peer));
        peers.map(|peer| peer.name.clone()).collect()
    }

    /// Number of members in sight that go before us.
    pub fn rank(&self) -> u32 {
        let own = key(&self.own.told);
        let before = self
            .live()
            .filter(|(_, told)| told.has_data && self.gives(told) && key(told) > own);
        u32::try_from(before.count()).unwrap_or(u32::MAX)
    }

    /// Whether a majority of the domain answers us.
    pub fn is_majority(&self) -> bool {
        2 * in_sight(&self.peers) > self.members
    }

    /// Whether anybody in sight has told of a master after it went out of our sight.
    pub fn is_master_known(&self, masterless: Duration) -> bool {
        self.live_peers()
            .any(|peer| peer.age < masterless && Self::told(peer).master_ok)
    }

    /// Whether the one that hands over to us still says so.
    pub fn is_asked_to_lead(&self) -> bool {
        self.live()
            .any(|(_, told)| told.yields_to.as_ref() == Some(&self.own.told.node))
    }
}

/// Members that answer now, and oneself: what one said seconds ago is no word on what is.
pub fn in_sight(peers: &[Peer]) -> usize {
    let answers = |peer: &&Peer| peer.sight == Sight::Answers && peer.told.is_some();
    peers.iter().filter(answers).count() + 1
}

/// Whether it holds another history than a server that serves its own: it has another top, or
/// none. What it leads is not ours, and nothing here is given up for it.
fn is_stranger(own: &Told, told: &Told) -> bool {
    own.serves && !same_origin(own, told)
}

/// What is wrong if there is such a server in the domain.
pub fn stranger(own: &Told, peers: &[Peer]) -> Option<String> {
    let told = peers.iter().filter_map(|peer| peer.told.as_ref());
    let stranger = told.into_iter().find(|told| is_stranger(own, told))?;
    let theirs = stranger.identity.as_ref()?;
    let ours = own.identity.as_ref()?;
    Some(format!(
        "node {} holds another history than this one ({theirs} and {ours}): it has another top; \
         correct its [parent], or this server's, and copy anew with \"terrace-bridge resync\" there",
        stranger.node
    ))
}

/// Whether both tell of one history, perhaps of different timelines of it.
fn same_origin(one: &Told, other: &Told) -> bool {
    match (&one.identity, &other.identity) {
        (Some(one), Some(other)) => one.same_origin(other),
        // One that has none has no positions either.
        _ => true,
    }
}

/// Who goes first when there is no master.
pub(super) fn key(told: &Told) -> (bool, bool, bool, Lsn, i64, &str) {
    (
        told.healthy,
        told.parent_ok,
        !told.lagging,
        told.flush,
        told.priority,
        &told.node,
    )
}

/// Which of two masters stays: both get the same history, so positions only tell
/// who is read later. One that has lost sight of the top goes.
pub(super) fn goes_before(one: &Told, other: &Told, members: usize) -> bool {
    // A top that was replaced may still be there.
    let timeline = |told: &Told| told.identity.as_ref().map(|identity| identity.timeline);
    if let (Some(one), Some(other)) = (timeline(one), timeline(other))
        && one != other
    {
        return one > other;
    }
    let fresher = one.top_time - other.top_time;
    if one.top_time != 0 && other.top_time != 0 && fresher.abs() > STALE_MICROS {
        return fresher > 0;
    }
    // Those that only a few servers reach are left to these.
    let reached = |told: &Told| 2 * told.in_sight > members;
    let key = |told: &Told| {
        let (healthy, node) = (told.healthy, told.node.clone());
        (healthy, reached(told), told.priority, node)
    };
    key(one) > key(other)
}

/// FNV-1a; spreads equal turns.
pub(super) fn name_hash(name: &str) -> u32 {
    let start = 0x811c_9dc5_u32;
    name.bytes().fold(start, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}
