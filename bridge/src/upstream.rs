//! The upstream link: receives, records, makes readable, acknowledges.
//!
//! Guarantees:
//! - What is acknowledged as flushed is on our disk, and, for a master, on the
//!   disks of as many members of the domain as `ack_members` says.
//! - What has been acknowledged stays so. A slot whose position is told to go back may have
//!   let go of what lies between.
//! - Nothing is acknowledged before the slot's confirmed position has been
//!   compared with our end: a slot that is ahead of us has forgotten what we
//!   miss, and PostgreSQL would skip it without a word (rule A).
//! - A transaction that the link's end leaves unfinished is cut.
//!
//! The parent is a Postgres (frames `w` and `k`) or a bridge, which sends whole
//! records (`T`) and how far it has replayed (`P`); see `docs/architecture.md`.

mod history;
mod session;
mod slot;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::assemble::{AssembleError, Assembler, passes};
use crate::client::{Client, PgError, quote_ident, quote_literal};
use crate::clock::{PG_EPOCH_MICROS, unix_micros};
use crate::conninfo::ConnInfo;
use crate::domain::Session;
use crate::lsn::Lsn;
use crate::queue::{QueueError, Writer};
use crate::record::{Kind, Record, RecordError};
use crate::status::{Role, Shared, State};
use crate::wire::put;
pub use history::timeline_history;
use history::{adopt_timeline, check_members, not_known_as_set_back, not_set_back, same_timeline};
pub use session::{
    BRIDGE_PARAMETER, PUBLICATION, connect, create_snapshot, is_standby, pinned_settings,
    reading_settings, session,
};
use slot::{named_session, slot_exists, start_when_free, verify_slot, why_not_started};

/// A link on which nothing comes for so long is dead; we ask every second.
pub const SILENCE: Duration = Duration::from_secs(10);
/// A link that is not there by then is given up.
const OPENING: Duration = Duration::from_secs(20);
/// How long what was decided before the link was opened is reason enough to end a session.
const DECIDED: Duration = Duration::from_secs(6);
/// How often positions are told.
const TICK: Duration = Duration::from_millis(100);
/// Messages taken from the socket before they are made readable and our positions told …
const BATCH_MESSAGES: usize = 10_000;
/// … or as many bytes of them: a bridge sends many records in one.
const BATCH_BYTES: usize = 4 << 20;

/// Why a link ended; most ends are not faults.
#[derive(Debug, thiserror::Error)]
pub enum LinkEnd {
    /// The bridge is asked to stop.
    #[error("shut down")]
    Shutdown,
    /// The connection failed or was closed.
    #[error("{0}")]
    Lost(String),
    /// Another member of the domain holds the slot or cursor.
    #[error("{message}")]
    Busy {
        /// Its session.
        holder: Session,
        /// As the upstream put it.
        message: String,
    },
    /// The upstream has forgotten what follows our end.
    #[error(
        "the upstream's confirmed position {confirmed} is ahead of this server's {end}: what lies between is to be had only from another server of the domain"
    )]
    Gap {
        /// Where the slot stands.
        confirmed: Lsn,
        /// Where we stand.
        end: Lsn,
    },
    /// The upstream no longer keeps what follows our end.
    #[error("{0}")]
    Gone(String),
    /// The slot is lost, and with it what follows our end at the parent.
    #[error("{0}")]
    NoSlot(String),
    /// The upstream tells another history.
    #[error("the upstream's history {theirs} is not this server's {ours}")]
    Diverged {
        /// Identity told by the upstream.
        theirs: String,
        /// Identity of our queue.
        ours: String,
    },
    /// The top has lost what this server holds.
    #[error("{0}")]
    SetBack(String),
    /// The upstream refuses, and will until somebody mends it.
    #[error("{0}")]
    Refused(String),
    /// Our queue failed.
    #[error(transparent)]
    Queue(#[from] QueueError),
}

impl From<PgError> for LinkEnd {
    fn from(error: PgError) -> LinkEnd {
        match error.code() {
            Some("55006") => LinkEnd::Busy {
                holder: named_session(&error.message()),
                message: error.to_string(),
            },
            Some("58P01") => LinkEnd::Gone(error.to_string()),
            Some("28P01" | "28000" | "3D000" | "42501" | "42704" | "42710") => {
                LinkEnd::Refused(error.to_string())
            }
            _ => LinkEnd::Lost(error.to_string()),
        }
    }
}

impl From<AssembleError> for LinkEnd {
    fn from(error: AssembleError) -> LinkEnd {
        match error {
            AssembleError::Queue(error) => LinkEnd::Queue(error),
            error => LinkEnd::Refused(error.to_string()),
        }
    }
}

impl From<RecordError> for LinkEnd {
    fn from(error: RecordError) -> LinkEnd {
        LinkEnd::Lost(format!("damaged record from upstream: {error}"))
    }
}

/// Whom to follow and as what.
pub struct Target {
    /// For people: the node's name or `host:port`.
    pub name: String,
    /// Address.
    pub conninfo: ConnInfo,
    /// Slot or cursor to stream from.
    pub slot: String,
    /// Role while the link lasts.
    pub role: Role,
    /// Why it is followed now, for people; may be empty.
    pub why: String,
    /// First end this session, if it still holds the slot.
    pub depose: Option<Session>,
    /// That has been done.
    pub deposed: AtomicBool,
}

/// What has been written, flushed and applied.
pub type Positions = (Lsn, Lsn, Lsn);

/// Appends a standby status update (protocol chapter "Streaming Replication Protocol").
pub fn put_status(out: &mut BytesMut, positions: Positions, ask: bool) {
    put(out, b'd', |out| {
        out.put_u8(b'r');
        for lsn in [positions.0, positions.1, positions.2] {
            out.put_u64(lsn.0);
        }
        out.put_i64(unix_micros() - PG_EPOCH_MICROS);
        out.put_u8(ask.into());
    });
}

/// Follows `target` until the link ends, and says why it did.
pub async fn follow(
    shared: &Arc<Shared>,
    writer: &mut Writer,
    target: &Target,
    cancel: &CancellationToken,
) -> LinkEnd {
    let link = async {
        if let Err(error) = writer.cut() {
            return error.into();
        }
        writer.begin_session();
        // Over a connection that is dead without a word an answer would be waited for until
        // TCP gives up.
        match timeout(OPENING, Link::open(shared, writer, target)).await {
            Ok(Ok(mut link)) => match link.run(writer).await {
                Ok(never) => match never {},
                Err(end) => end,
            },
            Ok(Err(end)) => end,
            Err(_) => LinkEnd::Lost(format!("no answer within {} s", OPENING.as_secs())),
        }
    };
    let end = tokio::select! {
        end = link => end,
        () = cancel.cancelled() => LinkEnd::Shutdown,
    };
    // What was whole and not yet readable is; the rest is cut.
    if let Err(error) = writer.cut().and_then(|()| writer.publish()) {
        return error.into();
    }
    end
}

struct Link<'a> {
    shared: &'a Arc<Shared>,
    target: &'a Target,
    client: Client,
    assembler: Assembler,
    /// The other end is a bridge.
    bridge: bool,
    /// Since when fewer servers than `ack_members` are in contact.
    enough_at: Instant,
    told: Positions,
    told_at: Instant,
    /// Acknowledged before, by whomever.
    acknowledged: Lsn,
    /// End and time of what has been taken in since the last publish.
    received: Option<(Lsn, i64)>,
}

enum Never {}

impl<'a> Link<'a> {
    async fn open(
        shared: &'a Arc<Shared>,
        writer: &mut Writer,
        target: &'a Target,
    ) -> Result<Link<'a>, LinkEnd> {
        let node = &shared.config.node;
        not_known_as_set_back(shared)?;
        let begun = Instant::now();
        let (mut client, theirs, their_end) = connect(&target.conninfo, &node.name).await?;
        let bridge = client.extension_accepted(BRIDGE_PARAMETER);
        if theirs != writer.queue().identity() {
            if !bridge {
                // One that could not be followed anyhow must not tie us to its timeline.
                slot_exists(target).await?;
            }
            adopt_timeline(shared, &mut client, &theirs, writer).await?;
        } else if theirs.timeline > 1 {
            same_timeline(shared, &mut client, &theirs).await?;
        }
        if !bridge {
            not_set_back(shared, their_end, writer)?;
        }
        if target.role == Role::Master && shared.config.parent.is_some() {
            check_members(shared, &mut client).await?;
        }
        let mut acknowledged = Lsn::ZERO;
        let end = writer.end();
        let mut options = String::new();
        if bridge {
            options = format!(", instance {}", quote_literal(&shared.instance));
            if let Some(holder) = target.depose {
                options += &format!(", depose '{holder}'");
            }
        }
        let start = format!(
            "START_REPLICATION SLOT {} LOGICAL {end} \
             (proto_version '1', publication_names '\"{PUBLICATION}\"', messages 'true'{options})",
            quote_ident(&target.slot)
        );
        if let Some(holder) = target.depose {
            if begun.elapsed() > DECIDED {
                return Err(LinkEnd::Lost("the answer came too late to depose".into()));
            }
            let reason = format!("ends session {holder}, which holds slot {}", target.slot);
            shared.event("depose", &reason);
            target.deposed.store(true, Ordering::Relaxed);
        }
        if bridge {
            client.copy_both(&start).await?;
        } else {
            client.simple("SELECT terrace.gather_sends()").await?;
            if let Err(error) = start_when_free(&mut client, &start, target).await {
                return Err(why_not_started(target, error).await);
            }
            acknowledged = verify_slot(target, end).await?;
        }
        // Behind a bridge that does not tell yet how far it has replayed, what
        // we may show is what it told before, or nothing.
        if !bridge || !shared.config.apply.wait_for_upstream {
            shared.upstream_replayed.send_replace(Lsn::MAX);
        } else if *shared.upstream_replayed.borrow() == Lsn::MAX {
            shared.upstream_replayed.send_replace(Lsn::ZERO);
        }
        shared.set_role(
            target.role,
            Some((target.name.clone(), target.conninfo.clone())),
            &format!("follows {}{}", target.name, target.why),
        );
        shared.set_link(State::Streaming, None);
        tracing::info!(upstream = %target.name, slot = %target.slot, position = %end,
            role = %target.role, "streaming");
        let domain = shared.config.parent.is_some().then(|| node.domain.clone());
        Ok(Link {
            shared,
            target,
            client,
            assembler: Assembler::new(domain),
            bridge,
            enough_at: Instant::now(),
            told: (Lsn::ZERO, Lsn::ZERO, Lsn::ZERO),
            told_at: Instant::now(),
            acknowledged,
            received: None,
        })
    }

    async fn run(&mut self, writer: &mut Writer) -> Result<Never, LinkEnd> {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        // The answer to START_REPLICATION may have been read with what follows it.
        self.drain(writer).await?;
        self.publish(writer)?;
        loop {
            // With no room in the queue nothing is taken: the upstream waits, and is told
            // all the while that we are there.
            let full = self.shared.is_full();
            if full {
                heard = Instant::now();
            }
            tokio::select! {
                filled = self.client.fill(), if !full => {
                    filled?;
                    heard = Instant::now();
                    self.shared.note_heard();
                    self.drain(writer).await?;
                    self.publish(writer)?;
                }
                _ = tick.tick() => {
                    if heard.elapsed() > SILENCE {
                        return Err(LinkEnd::Lost("nothing heard from the upstream for 10 s".into()));
                    }
                    self.tell_if_changed(writer).await?;
                }
            }
            if self.told_at.elapsed() > Duration::from_secs(1) {
                self.tell(writer, true).await?;
            }
        }
    }

    /// Takes what has been read and what the socket holds, so that it is written at once.
    async fn drain(&mut self, writer: &mut Writer) -> Result<(), LinkEnd> {
        let (mut taken, mut bytes) = (0, 0);
        loop {
            while let Some(message) = self.client.buffered()? {
                bytes += message.body.len();
                taken += 1;
                self.take(message.kind, message.body, writer)?;
            }
            if taken > BATCH_MESSAGES || bytes > BATCH_BYTES {
                return Ok(());
            }
            tokio::select! {
                biased;
                filled = self.client.fill() => {
                    filled?;
                    self.shared.note_heard();
                }
                // What has come to the socket is seen when the event loop has looked: ask twice.
                () = tokio::task::yield_now() => return Ok(()),
            }
        }
    }

    fn note_received(&mut self, lsn: Lsn, time: i64) {
        let (end, last) = self.received.unwrap_or_default();
        self.received = Some((end.max(lsn), last.max(time)));
    }

    /// Makes what has been taken readable, and tells of it.
    fn publish(&mut self, writer: &mut Writer) -> Result<(), LinkEnd> {
        writer.publish()?;
        if let Some((lsn, time)) = self.received.take() {
            self.shared.set_received(lsn, time);
        }
        Ok(())
    }

    fn take(&mut self, kind: u8, body: Bytes, writer: &mut Writer) -> Result<(), LinkEnd> {
        match kind {
            b'd' => self.frame(body, writer),
            b'E' => Err(PgError::from_error_response(&body).into()),
            b'c' | b'C' | b'Z' => Err(LinkEnd::Lost("the upstream ended the stream".into())),
            kind => Err(LinkEnd::Lost(format!(
                "unexpected message 0x{kind:02x} from upstream"
            ))),
        }
    }

    fn frame(&mut self, mut body: Bytes, writer: &mut Writer) -> Result<(), LinkEnd> {
        let short = || LinkEnd::Lost("replication frame is cut short".into());
        if body.is_empty() {
            return Err(short());
        }
        match body.get_u8() {
            b'w' if !self.bridge && body.len() >= 24 => {
                let (start, _, clock) = (Lsn(body.get_u64()), body.get_u64(), body.get_i64());
                self.shared.top_clock.store(clock, Ordering::Relaxed);
                if let Some(received) = self.assembler.push(start, &body, writer)? {
                    self.note_received(received.0, received.1);
                }
            }
            b'k' if body.len() == 17 => {
                let (end, time) = (Lsn(body.get_u64()), body.get_i64());
                if body.get_u8() == 1 {
                    self.told_at -= Duration::from_secs(2);
                }
                if !self.bridge && !self.assembler.in_transaction() {
                    writer.append(&Record::watermark(end, time))?;
                    self.note_received(end, time);
                }
            }
            b'T' if self.bridge => {
                while !body.is_empty() {
                    self.record(Record::take(&mut body)?, writer)?;
                }
            }
            b'P' if self.bridge && body.len() == 24 => {
                let (replayed, time) = (Lsn(body.get_u64()), body.get_i64());
                let clock = body.get_i64();
                self.shared.top_clock.store(clock, Ordering::Relaxed);
                self.note_received(Lsn::ZERO, time);
                self.shared.set_upstream_end(replayed);
                if self.shared.config.apply.wait_for_upstream {
                    self.shared.note_shown_above(replayed);
                }
            }
            b'w' | b'k' | b'P' => return Err(short()),
            kind => {
                return Err(LinkEnd::Lost(format!(
                    "unknown replication frame 0x{kind:02x}"
                )));
            }
        }
        Ok(())
    }

    fn record(&mut self, record: Record, writer: &mut Writer) -> Result<(), LinkEnd> {
        let time = match record.kind {
            Kind::Commit => {
                let info = record.commit()?;
                let domain = self.shared.config.node.domain.as_str();
                if !passes(&info.tag, Some(domain)) {
                    writer.cut_data()?;
                    writer.append(&Record::watermark(record.lsn, info.commit_time))?;
                    self.note_received(record.lsn, info.commit_time);
                    return Ok(());
                }
                info.commit_time
            }
            Kind::Watermark => record.top_time()?,
            // Of the upstream's file.
            Kind::Mark => return Ok(()),
            Kind::Schema | Kind::Part => 0,
        };
        writer.append(&record)?;
        self.note_received(record.lsn, time);
        Ok(())
    }

    fn positions(&mut self, writer: &Writer) -> Positions {
        let durable = *writer.queue().durable().borrow();
        let flush = if self.target.role == Role::Master {
            let (lsn, enough) = self
                .shared
                .acknowledgeable(durable, self.enough_at.elapsed());
            if enough {
                self.enough_at = Instant::now();
            }
            // Fewer may hold it by now, or be known to. Zero says nothing of what is held, and lets
            // a Postgres that shuts down go.
            if lsn > Lsn::ZERO {
                self.acknowledged = lsn.max(self.acknowledged);
                self.acknowledged
            } else {
                lsn
            }
        } else {
            durable
        };
        (writer.end(), flush, *self.shared.replayed.borrow())
    }

    async fn tell_if_changed(&mut self, writer: &Writer) -> Result<(), LinkEnd> {
        if self.positions(writer) == self.told {
            return Ok(());
        }
        self.tell(writer, false).await
    }

    /// Asking for a reply makes an idle upstream tell its position.
    async fn tell(&mut self, writer: &Writer, ask: bool) -> Result<(), LinkEnd> {
        let positions = self.positions(writer);
        put_status(self.client.buffer(), positions, ask);
        timeout(SILENCE, self.client.flush())
            .await
            .map_err(|_| LinkEnd::Lost("the upstream takes no status updates".into()))??;
        (self.told, self.told_at) = (positions, Instant::now());
        Ok(())
    }
}
