//! The stream itself: records to bridges, pgoutput to stock clients.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::bail;
use bytes::{Buf, BufMut, Bytes};
use tokio::time::{MissedTickBehavior, interval};

use super::Relay;
use crate::clock::{PG_EPOCH_MICROS, unix_micros};
use crate::lsn::Lsn;
use crate::pgoutput::{self, Message};
use crate::queue::{Queue, Reader};
use crate::record::{Kind, Record};
use crate::wire::{self, Framed, MAX_UNAUTHENTICATED};

/// Sent to the socket at the latest when so much is buffered.
const FLUSH_BYTES: usize = 256 << 10;
/// How often a bridge is told of our position when nothing changes.
const TICK: Duration = Duration::from_millis(500);
/// A bridge tells its positions every second; after this its cursor is free.
const LEASE: Duration = Duration::from_secs(10);
/// A client that says nothing, or takes nothing, for so long is gone.
pub const SILENCE: Duration = Duration::from_secs(60);
/// A stock client is asked for a sign of life at half of that.
const ASK_AFTER: Duration = Duration::from_secs(30);

/// Where the extension has its tables, some of which flow down with the users'.
pub const EXTENSION_SCHEMA: &str = "terrace";

/// How a stream ended.
pub enum Outcome {
    /// The client ended it and may send commands again.
    CopyDone,
    /// The connection is over.
    Closed,
}

/// What was asked for.
pub struct Start<'a> {
    pub slot: &'a str,
    pub from: Lsn,
    pub messages: bool,
    pub bridge: bool,
    pub queue: &'a Queue,
}

/// Streams until either side ends it.
pub async fn stream(
    relay: &Relay,
    framed: &mut Framed,
    reader: Reader,
    start: &Start<'_>,
) -> anyhow::Result<Outcome> {
    let sender = Sender {
        relay,
        framed,
        start,
        sent: start.from,
        told_replayed: Lsn::ZERO,
        asked: Instant::now(),
        schema: HashMap::new(),
        internal: HashSet::new(),
        waiting: None,
        reader,
    };
    sender.run().await
}

struct Sender<'a> {
    relay: &'a Relay,
    framed: &'a mut Framed,
    start: &'a Start<'a>,
    reader: Reader,
    /// Read, but not replayed here yet.
    waiting: Option<Record>,
    /// End of the last transaction sent whole, or idle position.
    sent: Lsn,
    told_replayed: Lsn,
    asked: Instant,
    /// Definitions of a stock client's session by kind and OID, and whether it has them.
    schema: HashMap<(u8, u32), (Bytes, bool)>,
    /// Tables of the extension: the tree's own affair.
    internal: HashSet<u32>,
}

impl Sender<'_> {
    async fn run(mut self) -> anyhow::Result<Outcome> {
        let mut replayed = self.relay.shared.replayed.subscribe();
        let mut above = self.relay.shared.upstream_replayed.subscribe();
        let mut written = self.start.queue.written();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        loop {
            replayed.mark_unchanged();
            above.mark_unchanged();
            written.mark_unchanged();
            // While one waits for a client to take it, what that one says is heard all the same:
            // over a thin link, and where its disk is full, that is what tells that it lives.
            self.fill()?;
            let follows_above = self.start.bridge && self.relay.shared.is_stuck();
            tokio::select! {
                biased;
                message = self.framed.exchange(MAX_UNAUTHENTICATED) => {
                    let Some(message) = message? else { continue };
                    heard = Instant::now();
                    match message.kind {
                        b'd' => self.feedback(message.body)?,
                        b'c' => return self.finish().await,
                        b'X' => return Ok(Outcome::Closed),
                        kind => bail!("unexpected message 0x{kind:02x} while streaming"),
                    }
                }
                _ = written.changed() => {}
                _ = replayed.changed() => {}
                _ = above.changed(), if follows_above => {}
                _ = tick.tick() => {
                    let limit = if self.start.bridge { LEASE } else { SILENCE };
                    if heard.elapsed() > limit {
                        bail!("client has been silent for {} s", limit.as_secs());
                    }
                    self.beat(heard);
                }
            }
        }
    }

    async fn finish(&mut self) -> anyhow::Result<Outcome> {
        wire::put(self.framed.out(), b'c', |_| {});
        wire::command_complete(self.framed.out(), "COPY 0");
        wire::command_complete(self.framed.out(), "START_REPLICATION");
        Ok(Outcome::CopyDone)
    }

    fn beat(&mut self, heard: Instant) {
        if self.is_behind() {
            // It gets enough, and that is to be limited.
        } else if self.start.bridge {
            self.tell_replayed();
        } else if heard.elapsed() > ASK_AFTER && self.asked.elapsed() > ASK_AFTER {
            self.asked = Instant::now();
            self.keepalive(true);
        }
    }

    /// It has not taken yet what was put out for it.
    fn is_behind(&self) -> bool {
        self.framed.unsent() >= FLUSH_BYTES
    }

    /// Puts out what there is, up to a limit.
    fn fill(&mut self) -> anyhow::Result<()> {
        if self.is_behind() {
            return Ok(());
        }
        if self.start.bridge {
            while !self.is_behind() {
                let Some((records, lsn)) = self.reader.try_next_bytes()? else {
                    if self.relay.shared.shown() != self.told_replayed {
                        self.tell_replayed();
                    }
                    return Ok(());
                };
                self.sent = self.sent.max(lsn);
                self.framed.put_shared(b'd', b"T", records);
            }
            self.tell_replayed();
            return Ok(());
        }
        let replayed = *self.relay.shared.replayed.borrow();
        let before = self.sent;
        while !self.is_behind() {
            let next = match self.waiting.take() {
                Some(record) => Some(record),
                None => self.reader.try_next()?,
            };
            let Some(record) = next else { break };
            // The parts of a transaction carry no position; their commit decides.
            if record.lsn > replayed || record.kind == Kind::Part && replayed <= self.sent {
                self.waiting = Some(record);
                break;
            }
            self.frames(&record)?;
        }
        if self.sent > before && self.framed.unsent() == 0 {
            self.keepalive(false);
        }
        Ok(())
    }

    fn tell_replayed(&mut self) {
        let shared = &self.relay.shared;
        self.told_replayed = shared.shown();
        let (replayed, time) = (self.told_replayed, shared.top_time());
        let clock = shared.top_clock.load(Relaxed);
        wire::put(self.framed.out(), b'd', |out| {
            out.put_u8(b'P');
            out.put_u64(replayed.0);
            out.put_i64(time);
            out.put_i64(clock);
        });
    }

    fn keepalive(&mut self, reply: bool) {
        let sent = self.sent;
        wire::put(self.framed.out(), b'd', |out| {
            out.put_u8(b'k');
            out.put_u64(sent.0);
            out.put_i64(unix_micros() - PG_EPOCH_MICROS);
            out.put_u8(reply.into());
        });
    }

    fn feedback(&mut self, mut body: Bytes) -> anyhow::Result<()> {
        if body.len() != 34 || body.get_u8() != b'r' {
            bail!("malformed status update");
        }
        let [write, flush, apply] = [(); 3].map(|()| Lsn(body.get_u64()));
        body.get_i64();
        // Nobody holds for us what we do not have.
        let flush = flush.min(self.start.queue.end());
        if flush > Lsn::ZERO {
            self.start
                .queue
                .set_cursor(self.start.slot, flush.min(self.sent.max(self.start.from)));
        }
        if self.start.bridge {
            self.relay
                .shared
                .set_downstream(self.start.slot, write, flush, apply);
        }
        if body.get_u8() == 1 && !self.is_behind() {
            if self.start.bridge {
                self.tell_replayed()
            } else {
                self.keepalive(false)
            }
        }
        Ok(())
    }

    // ----- for stock clients ------------------------------------------------

    fn frames(&mut self, record: &Record) -> anyhow::Result<()> {
        match record.kind {
            Kind::Schema => {
                let body = record.body();
                let key = match pgoutput::decode(&body)? {
                    Message::Relation(relation) => {
                        if relation.namespace == EXTENSION_SCHEMA {
                            self.internal.insert(relation.relid);
                        }
                        (b'R', relation.relid)
                    }
                    Message::Type { oid, .. } => (b'Y', oid),
                    _ => bail!("schema record without a definition"),
                };
                self.schema.insert(key, (body, false));
            }
            Kind::Watermark => self.sent = record.lsn,
            Kind::Part | Kind::Commit => {
                for frame in record.frames() {
                    let frame = frame?;
                    let tables = changed_tables(frame.payload)?;
                    if self.is_for_stock(frame.payload, &tables) {
                        self.define(tables)?;
                        self.frame(frame.lsn, frame.payload);
                    }
                }
                self.sent = self.sent.max(record.lsn);
            }
            Kind::Mark => {}
        }
        Ok(())
    }

    /// Messages only when asked for, and nothing of the extension's own tables,
    /// which a subscriber does not have.
    fn is_for_stock(&self, payload: &[u8], tables: &[u32]) -> bool {
        let own = |table| self.internal.contains(table);
        match payload.first() {
            Some(b'M') => self.start.messages,
            _ => tables.is_empty() || !tables.iter().all(own),
        }
    }

    /// Sends the definitions of these tables, each once.
    fn define(&mut self, tables: Vec<u32>) -> anyhow::Result<()> {
        for relid in tables {
            let Some((definition, sent)) = self.schema.get_mut(&(b'R', relid)) else {
                continue;
            };
            if std::mem::replace(sent, true) {
                continue;
            }
            let definition = definition.clone();
            let mut types = Vec::new();
            if let Message::Relation(relation) = pgoutput::decode(&definition)? {
                types.extend(relation.columns.iter().map(|column| column.type_oid));
            }
            for oid in types {
                if let Some((body, sent)) = self.schema.get_mut(&(b'Y', oid))
                    && !std::mem::replace(sent, true)
                {
                    let body = body.clone();
                    self.frame(Lsn::ZERO, &body);
                }
            }
            self.frame(Lsn::ZERO, &definition);
        }
        Ok(())
    }

    fn frame(&mut self, lsn: Lsn, payload: &[u8]) {
        wire::put(self.framed.out(), b'd', |out| {
            out.put_u8(b'w');
            out.put_u64(lsn.0);
            out.put_u64(lsn.0);
            out.put_i64(unix_micros() - PG_EPOCH_MICROS);
            out.put_slice(payload);
        });
    }
}

/// OIDs of the tables that a message changes.
fn changed_tables(payload: &[u8]) -> anyhow::Result<Vec<u32>> {
    Ok(match payload {
        [b'I' | b'U' | b'D', rest @ ..] => rest
            .first_chunk()
            .map(|oid| u32::from_be_bytes(*oid))
            .into_iter()
            .collect(),
        [b'T', ..] => match pgoutput::decode(payload)? {
            Message::Truncate { relids, .. } => relids,
            _ => Vec::new(),
        },
        _ => Vec::new(),
    })
}
