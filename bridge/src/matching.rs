//! Log matching (rule E): finds servers of one domain that hold different things
//! for the same part of the history.
//!
//! Each server reads its own queue, as any consumer does, and hashes the committed
//! transactions of each window of [`WINDOW_BYTES`] of the top's LSNs. What it tells
//! others are the hashes of its last windows, and it compares theirs with its own.
//!
//! Why a difference is one, and never a matter of how the servers came by the data:
//! - Hashed are each transaction's end and the pgoutput messages from its Begin to its
//!   Commit. PostgreSQL makes these from the WAL alone. Left out is what depends on
//!   the session that received them: definitions, where a transaction was cut into
//!   parts, and the watermarks of an idle top.
//! - Only servers of one domain and one stream identity are compared: routing leaves
//!   out the same transactions on each of them.
//! - A window is claimed when it has been read from before its start to beyond its
//!   end. Nothing comes into it later, as positions only grow. A server that began
//!   in the middle of one claims the next.
//! - The hashes are not stored but made anew from the queue after a start, so they
//!   say what is on the disk now, not what was there once.
//!
//! Who is right: what a strict majority of the domain's servers holds, configured
//! ones, not those in sight. One that a majority disagrees with is *outvoted*: it
//! serves nothing until its data has been copied anew. Without a majority each of
//! those that differ is in *doubt*: it goes on, for a domain of two would stand
//! still otherwise, says `diverged`, and refuses streams that begin before the end
//! of that window. A person decides, with `terrace-bridge resync` on one of them.
//!
//! It finds faults, not forgeries; a server that lags more windows than are kept is
//! compared from there on only; levels are not compared, as routing differs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::lsn::Lsn;
use crate::observe::Observer;
use crate::queue::{Queue, QueueError, Reader};
use crate::record::{Kind, Record, RecordError};
use crate::status::Shared;

/// Length of a window in the top's WAL.
pub const WINDOW_BYTES: u64 = 64 << 20;
/// Windows that are kept, and told.
const KEPT: u64 = 8;
/// Pause between two looks at what is new.
const EVERY: Duration = Duration::from_secs(1);
/// Bytes of records that are read before others are listened to.
const SLICE_BYTES: usize = 4 << 20;

/// Hashes of whole windows by the windows' starts.
pub type Windows = BTreeMap<Lsn, u64>;

/// Hashes the records of a queue in order.
pub struct Hasher {
    /// Number of the window that is open.
    window: u64,
    /// It was not read from its start.
    partial: bool,
    hash: u64,
    /// Of the messages of the transaction so far.
    crc: u32,
    whole: Windows,
}

impl Hasher {
    /// For records that follow `from`.
    pub fn new(from: Lsn) -> Hasher {
        Hasher {
            window: from.0 / WINDOW_BYTES,
            partial: true,
            hash: 0,
            crc: 0,
            whole: Windows::new(),
        }
    }

    /// Takes the next record.
    pub fn add(&mut self, record: &Record) -> Result<(), RecordError> {
        match record.kind {
            Kind::Schema | Kind::Mark => {}
            Kind::Part => self.messages(record)?,
            Kind::Commit => {
                self.messages(record)?;
                self.go_to(record.lsn);
                let crc = u64::from(std::mem::take(&mut self.crc));
                self.hash = mix(mix(self.hash ^ record.lsn.0) ^ crc);
            }
            Kind::Watermark => self.go_to(record.lsn),
        }
        Ok(())
    }

    fn messages(&mut self, record: &Record) -> Result<(), RecordError> {
        for frame in record.frames() {
            self.crc = crc32c::crc32c_append(self.crc, frame?.payload);
        }
        Ok(())
    }

    /// Closes the windows before that of `lsn`; some may hold nothing.
    fn go_to(&mut self, lsn: Lsn) {
        let window = lsn.0 / WINDOW_BYTES;
        while self.window < window {
            let hash = std::mem::take(&mut self.hash);
            if !std::mem::take(&mut self.partial) {
                self.whole.insert(Lsn(self.window * WINDOW_BYTES), hash);
            }
            // Of a long leap only the last windows are of interest.
            self.window = (self.window + 1).max(window.saturating_sub(KEPT));
        }
    }

    /// Forgets old windows, but none that is disputed.
    fn forget_but(&mut self, disputed: Option<Lsn>) {
        let oldest = Lsn(self.window.saturating_sub(KEPT) * WINDOW_BYTES);
        let kept = |start: &Lsn| *start >= oldest || Some(*start) == disputed;
        self.whole.retain(|start, _| kept(start));
    }
}

/// The finaliser of SplitMix64.
fn mix(mut hash: u64) -> u64 {
    hash = hash.wrapping_add(0x9e37_79b9_7f4a_7c15);
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// How this server stands in a disputed window, from bad to worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// A majority holds the same.
    Upheld,
    /// There is no majority.
    Doubt,
    /// A majority holds something else.
    Outvoted,
}

/// A window in which servers of the domain differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dispute {
    /// How this server stands.
    pub standing: Standing,
    /// Start of the window.
    pub start: Lsn,
    /// The servers that hold something else.
    pub others: Vec<String>,
}

impl Dispute {
    /// First position after the window.
    pub fn end(&self) -> Lsn {
        Lsn(self.start.0 + WINDOW_BYTES)
    }
}

impl std::fmt::Display for Dispute {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (start, end, others) = (self.start, self.end(), self.others.join(", "));
        write!(f, "from {start} to {end} this server and {others} hold ")?;
        match self.standing {
            Standing::Upheld => write!(f, "different changes; a majority holds those of here"),
            Standing::Doubt => write!(
                f,
                "different changes; copy the data of the wrong one anew with terrace-bridge resync"
            ),
            Standing::Outvoted => write!(
                f,
                "different changes; a majority holds those of there: copy the data here anew with \
                 terrace-bridge resync"
            ),
        }
    }
}

/// Compares what this server holds with what the others do. Gives the worst dispute,
/// and the number of windows that another server holds as well and equally.
pub fn compare(
    own: &Windows,
    others: &[(String, Windows)],
    members: usize,
) -> (Option<Dispute>, usize) {
    let (mut worst, mut equal) = (None::<Dispute>, 0);
    for (start, hash) in own {
        let claims = || {
            let claim = |(name, windows): &'_ (String, Windows)| {
                let claim = *windows.get(start)?;
                Some((name.clone(), claim))
            };
            others.iter().filter_map(claim)
        };
        let with = |hash: u64| claims().filter(|(_, claim)| *claim == hash).count();
        let differ: Vec<(String, u64)> = claims().filter(|(_, claim)| claim != hash).collect();
        if differ.is_empty() {
            equal += usize::from(with(*hash) > 0);
            continue;
        }
        let standing = if 2 * (with(*hash) + 1) > members {
            Standing::Upheld
        } else if differ.iter().any(|(_, claim)| 2 * with(*claim) > members) {
            Standing::Outvoted
        } else {
            Standing::Doubt
        };
        if worst.as_ref().is_none_or(|worst| worst.standing < standing) {
            worst = Some(Dispute {
                standing,
                start: *start,
                others: differ.into_iter().map(|(name, _)| name).collect(),
            });
        }
    }
    (worst, equal)
}

/// While there is more to hash it rests so many times as long as it has worked: all servers do it at once when a
/// site starts, and data comes first.
const RESTS: u32 = 3;

/// The own queue, as far as it has been hashed.
struct Walk {
    reader: Reader,
    hasher: Hasher,
}

impl Walk {
    /// From as far back as windows are kept, or as the queue reaches.
    fn start(queue: &Queue) -> Result<Walk, QueueError> {
        let window = (queue.end().0 / WINDOW_BYTES).saturating_sub(KEPT);
        // What ends at a window's start belongs to it.
        let before = Lsn((window * WINDOW_BYTES).saturating_sub(1));
        let from = before.max(queue.first());
        Ok(Walk {
            reader: queue.reader(from)?,
            hasher: Hasher::new(from),
        })
    }

    /// Reads on; tells whether there is more.
    fn read_on(&mut self) -> Result<bool, QueueError> {
        let mut bytes = 0;
        while bytes < SLICE_BYTES {
            let Some(record) = self.reader.try_next()? else {
                return Ok(false);
            };
            bytes += record.bytes.len();
            self.hasher.add(&record)?;
        }
        Ok(true)
    }
}

/// Hashes the queue and compares it with the others' until `cancel`.
pub async fn run(
    shared: Arc<Shared>,
    observer: Arc<Observer>,
    queue: Queue,
    cancel: CancellationToken,
) -> anyhow::Result<()> {
    let (mut walk, mut pause) = (None, EVERY);
    loop {
        tokio::select! {
            () = sleep(pause) => {}
            () = cancel.cancelled() => return Ok(()),
        }
        let source = queue.clone();
        let began = Instant::now();
        let step = tokio::task::spawn_blocking(move || {
            let mut walk = walk.map_or_else(|| Walk::start(&source), Ok)?;
            let more = walk.read_on()?;
            Ok::<_, QueueError>((walk, more))
        });
        let step = tokio::select! {
            step = step => step.context("hash the queue")?,
            () = cancel.cancelled() => return Ok(()),
        };
        let (mut read, more) = match step {
            Ok(read) => read,
            Err(error) => {
                // What has been trimmed before it was read is no fault of anybody.
                if !matches!(error, QueueError::Gone { .. }) {
                    shared.event_once("unreadable", &error.to_string());
                }
                (walk, pause) = (None, EVERY * 10);
                continue;
            }
        };
        pause = if more { RESTS * began.elapsed() } else { EVERY };
        let identity = queue.identity();
        let others = observer.windows(&identity);
        let members = shared.config.peers.len() + 1;
        let (dispute, equal) = compare(&read.hasher.whole, &others, members);
        read.hasher
            .forget_but(dispute.as_ref().map(|dispute| dispute.start));
        shared.set_matching(read.hasher.whole.clone(), equal, dispute);
        walk = Some(read);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{CommitInfo, commit_record, put_frame};
    use bytes::{Bytes, BytesMut};

    const W: u64 = WINDOW_BYTES;

    fn body(messages: &[&str]) -> BytesMut {
        let mut body = BytesMut::new();
        for message in messages {
            put_frame(&mut body, Lsn(7), message.as_bytes());
        }
        body
    }

    fn commit(end: u64, messages: &[&str]) -> Record {
        let info = CommitInfo {
            xid: 1,
            commit_lsn: Lsn(end),
            commit_time: 0,
            tag: Bytes::new(),
        };
        commit_record(&info, Lsn(end), &body(messages))
    }

    fn part(messages: &[&str]) -> Record {
        Record::new(Kind::Part, Lsn::ZERO, &body(messages))
    }

    fn mark(end: u64) -> Record {
        Record::watermark(Lsn(end), 0)
    }

    fn windows(from: u64, records: &[Record]) -> Windows {
        let mut hasher = Hasher::new(Lsn(from));
        records
            .iter()
            .for_each(|record| hasher.add(record).unwrap());
        hasher.whole
    }

    #[test]
    fn what_differs_by_session_is_left_out_and_what_differs_is_seen() {
        let one = windows(
            9,
            &[
                commit(W + 5, &["B", "I1", "C"]),
                mark(W + 9),
                mark(3 * W + 1),
            ],
        );
        let schema = Record::new(Kind::Schema, Lsn::ZERO, b"R1234");
        let cut = [
            part(&["B"]),
            schema,
            commit(W + 5, &["I1", "C"]),
            mark(3 * W),
        ];
        assert_eq!(one, windows(W - 1, &cut), "cut otherwise, from elsewhere");
        assert_eq!(
            one.keys().copied().collect::<Vec<_>>(),
            [Lsn(W), Lsn(2 * W)]
        );
        for other in [
            vec![commit(W + 5, &["B", "I2", "C"])],
            vec![commit(W + 6, &["B", "I1", "C"])],
            vec![mark(W + 5)],
            vec![commit(W + 5, &["B", "I1", "C"]), commit(W + 7, &["B", "C"])],
        ] {
            let other = windows(9, &[other, vec![mark(3 * W)]].concat());
            assert_ne!(one[&Lsn(W)], other[&Lsn(W)]);
            assert_eq!(one[&Lsn(2 * W)], other[&Lsn(2 * W)], "each for itself");
        }
    }

    #[test]
    fn only_whole_windows_are_claimed() {
        let records = [commit(W + 5, &["I1"]), mark(2 * W - 1)];
        assert!(windows(9, &records).is_empty(), "it is open");
        let records = [commit(W + 5, &["I1"]), mark(2 * W)];
        assert!(windows(W + 1, &records).is_empty(), "begun in the middle");
        assert_eq!(windows(W - 1, &records).len(), 1);
    }

    #[test]
    fn a_long_leap_leaves_the_last_windows_and_a_dispute_stays() {
        let mut hasher = Hasher::new(Lsn(9));
        hasher.add(&mark(W)).unwrap();
        hasher.add(&commit(2 * W, &["I"])).unwrap();
        hasher.add(&mark(1 << 60)).unwrap();
        hasher.forget_but(Some(Lsn(W)));
        assert_eq!(hasher.whole.len() as u64, KEPT + 1);
        assert!(hasher.whole.contains_key(&Lsn(W)));
    }

    #[test]
    fn a_majority_of_all_servers_is_right() {
        let of = |hash: u64| Windows::from([(Lsn(W), hash)]);
        let named = |name: &str, hash| (name.to_owned(), of(hash));
        let standing = |others: &[(String, Windows)], members| {
            let (dispute, _) = compare(&of(1), others, members);
            dispute.map(|dispute| dispute.standing)
        };
        let two = [named("b", 1), named("c", 2)];
        assert_eq!(standing(&two, 3), Some(Standing::Upheld));
        // Two of five are none.
        assert_eq!(standing(&two, 5), Some(Standing::Doubt));
        let two = [named("b", 2), named("c", 2)];
        assert_eq!(standing(&two, 3), Some(Standing::Outvoted));
        assert_eq!(standing(&[named("b", 2)], 2), Some(Standing::Doubt));
        assert_eq!(standing(&[named("b", 1)], 2), None);
        let elsewhere = ("b".to_owned(), Windows::from([(Lsn(2 * W), 5)]));
        assert_eq!(compare(&of(1), &[elsewhere], 2), (None, 0));
        assert_eq!(compare(&of(1), &[named("b", 1)], 2), (None, 1));
    }
}
