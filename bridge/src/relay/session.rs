//! A replication session: commands until a stream starts, and again after it.

mod slots;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::BufMut;
use postgres_protocol::message::frontend;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::grammar::{Command, parse};
use super::stream::{EXTENSION_SCHEMA, Outcome, SILENCE, Start, stream};
use super::{Relay, splice};
use crate::client::{Client, PgError};
use crate::lsn::Lsn;
use crate::queue::{QueueError, Reader};
use crate::roles::Order;
use crate::status::OpenQueue;
use crate::timeline;
use crate::top;
use crate::upstream::{BRIDGE_PARAMETER, PUBLICATION};
use crate::wire::{self, Framed, MAX_UNAUTHENTICATED};

const TEXT: u32 = 25;
/// How long a stock client waits for a queue that is being opened.
const OPENING: Duration = Duration::from_secs(10);
/// How long an ending session may take to do so.
const FAREWELL: Duration = Duration::from_secs(2);

/// An error for the client: SQLSTATE and text.
pub struct Refusal(pub &'static str, pub String);

type Reply = Result<(), Refusal>;

fn refuse<T>(code: &'static str, text: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal(code, text.into()))
}

impl From<PgError> for Refusal {
    fn from(error: PgError) -> Refusal {
        Refusal("58000", format!("local database: {error}"))
    }
}

/// One client.
pub struct Session {
    relay: Arc<Relay>,
    framed: Framed,
    parameters: BTreeMap<String, String>,
    id: u32,
    /// Came over the socket in `data_dir`.
    local: bool,
    /// Speaks our own frames.
    bridge: bool,
    /// For SQL that is passed through.
    sql: Option<Client>,
    /// Holds an exported snapshot until the next command.
    snapshot: Option<Client>,
    temporary: Vec<String>,
    /// The timeline that the client has been told that the history here is of.
    timeline: Option<u32>,
}

impl Drop for Session {
    fn drop(&mut self) {
        // Also of a queue that serves nobody any more: the place would be taken for ever.
        let open = self.relay.shared.queue.borrow().clone();
        let Some(open) = open else { return };
        for slot in &self.temporary {
            open.queue.drop_cursor(slot);
        }
    }
}

impl Session {
    /// For a client that has been let in.
    pub fn new(
        relay: Arc<Relay>,
        mut framed: Framed,
        parameters: BTreeMap<String, String>,
        id: u32,
        local: bool,
    ) -> Session {
        let bridge = parameters.contains_key(BRIDGE_PARAMETER);
        framed.give_up_after(SILENCE);
        Session {
            relay,
            framed,
            parameters,
            id,
            local,
            bridge,
            sql: None,
            snapshot: None,
            temporary: Vec::new(),
            timeline: None,
        }
    }

    /// Serves until the client goes.
    pub async fn run(mut self) -> anyhow::Result<()> {
        if !self.bridge {
            // A bridge that has just started opens its queue in a moment; a stock client
            // that is told so gives up.
            let mut queue = self.relay.shared.queue.subscribe();
            timeout(OPENING, queue.wait_for(Option::is_some)).await.ok();
        }
        self.greet();
        loop {
            wire::ready_for_query(self.framed.out(), b'I');
            self.framed.flush().await?;
            let cancel = self.relay.cancel.clone();
            let message = tokio::select! {
                message = self.framed.read_message(MAX_UNAUTHENTICATED) => message?,
                () = cancel.cancelled() => {
                    let text = "terminating connection because the bridge shuts down";
                    wire::error_response(self.framed.out(), "FATAL", "57P01", text, "");
                    return Ok(self.framed.flush().await?);
                }
            };
            let mut body = message.body;
            match message.kind {
                b'X' => return Ok(()),
                b'Q' => {
                    let text = wire::take_cstr(&mut body).context("query is not UTF-8")?;
                    if !self.query(&text).await? {
                        return Ok(());
                    }
                }
                // Answers of a stream that has just ended.
                b'd' | b'c' | b'f' => {}
                kind => {
                    let text = format!("message 0x{kind:02x} is not supported in replication mode");
                    wire::error_response(self.framed.out(), "FATAL", "08P01", &text, "");
                    return Ok(self.framed.flush().await?);
                }
            }
        }
    }

    fn greet(&mut self) {
        let known = self.relay.shared.server_parameters.lock();
        let known = known
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .clone();
        let user = self.parameters.get("user").cloned().unwrap_or_default();
        let application = self
            .parameters
            .get("application_name")
            .cloned()
            .unwrap_or_default();
        let defaults = [
            ("server_version", "15.0"),
            ("server_encoding", "UTF8"),
            ("TimeZone", "UTC"),
        ];
        let fixed = [
            ("client_encoding", "UTF8"),
            ("integer_datetimes", "on"),
            ("standard_conforming_strings", "on"),
            ("DateStyle", "ISO, MDY"),
            ("IntervalStyle", "postgres"),
            ("in_hot_standby", "off"),
            ("default_transaction_read_only", "off"),
            ("is_superuser", "off"),
            ("session_authorization", &user),
            ("application_name", &application),
            ("terrace.relay", "1"),
        ];
        let out = self.framed.out();
        for (name, default) in defaults {
            let value = known.get(name).map_or(default, String::as_str);
            wire::parameter_status(out, name, value);
        }
        fixed
            .iter()
            .for_each(|(name, value)| wire::parameter_status(out, name, value));
        wire::put(out, b'K', |out| {
            out.put_u32(self.id);
            out.put_u32(0);
        });
    }

    /// Answers one query. False when the connection is to end.
    async fn query(&mut self, text: &str) -> anyhow::Result<bool> {
        self.snapshot = None;
        let reply = match parse(text) {
            None => refuse("42601", "syntax error in replication command"),
            Some(Command::IdentifySystem) => self.identify(),
            Some(Command::TimelineHistory(number)) => self.timeline_history(number),
            Some(Command::Show(name)) if name.eq_ignore_ascii_case("terrace.status") => {
                let status = self.relay.shared.status_json().to_string();
                self.row(&[("terrace.status", Some(&status))], "SHOW");
                Ok(())
            }
            Some(Command::Create {
                slot,
                temporary,
                logical,
                snapshot,
            }) => self.create(slot, temporary, logical, snapshot).await,
            Some(Command::Drop { slot, wait }) => self.drop_slot(&slot, wait).await,
            Some(Command::Order(Order::Resync | Order::Skip(_))) if !self.local => {
                refuse("42501", "only the machine of the bridge may order that")
            }
            Some(Command::Order(order)) if self.bridge => self.order(order).await,
            Some(Command::AtTop(request)) if self.bridge => self.at_top(&request).await,
            Some(Command::Order(_) | Command::AtTop(_)) => {
                refuse("42501", "only another bridge may order that")
            }
            Some(Command::Start {
                slot,
                from,
                options,
            }) => match self.start(slot, from, &options).await? {
                Ok(Outcome::Closed) => return Ok(false),
                Ok(Outcome::CopyDone) => Ok(()),
                Err(refusal) => Err(refusal),
            },
            Some(Command::Unsupported(what)) => {
                refuse("0A000", format!("{what} is not supported by this server"))
            }
            Some(Command::Show(_) | Command::Sql) => self.pass(text).await?,
        };
        if let Err(Refusal(code, text)) = reply {
            wire::error_response(self.framed.out(), "ERROR", code, &text, "");
        }
        Ok(true)
    }

    fn open_queue(&self) -> Result<OpenQueue, Refusal> {
        if self.relay.shared.has_diverged() {
            return refuse(
                "55000",
                "this server's history has diverged; see its reason in terrace.lag",
            );
        }
        let open = self.relay.shared.queue.borrow().clone();
        open.ok_or_else(|| Refusal("57P03", "this server has no data yet".into()))
    }

    /// Hands an order to the node and waits for what comes of it.
    async fn order(&mut self, order: Order) -> Reply {
        let (reply, outcome) = oneshot::channel();
        let gone = || Refusal("57P01", "the bridge shuts down".into());
        let sent = self.relay.orders.send((order, reply)).await;
        sent.map_err(|_| gone())?;
        match outcome.await.map_err(|_| gone())? {
            Ok(()) => {
                wire::command_complete(self.framed.out(), "ORDER");
                Ok(())
            }
            Err(text) => refuse("55000", text),
        }
    }

    async fn at_top(&mut self, request: &str) -> Reply {
        let shared = Arc::clone(&self.relay.shared);
        let asked = async {
            let request = serde_json::from_str(request)?;
            top::ask(&shared.config, &request).await
        };
        tokio::pin!(asked);
        // What is done for a client that is gone holds off writers at the top.
        let answer = tokio::select! {
            answer = &mut asked => answer,
            kind = self.framed.peek_kind() => match kind {
                Err(_) | Ok(b'X') => return refuse("57014", "nobody waits for the answer"),
                Ok(_) => asked.await,
            }
        };
        match answer {
            Ok(answer) => {
                self.row(&[("answer", Some(&answer.to_string()))], "AT_TOP");
                Ok(())
            }
            Err(error) => refuse("55000", format!("{error:#}")),
        }
    }

    fn row(&mut self, columns: &[(&str, Option<&str>)], completion: &str) {
        let out = self.framed.out();
        let names: Vec<(&str, u32)> = columns.iter().map(|(name, _)| (*name, TEXT)).collect();
        let values: Vec<Option<&str>> = columns.iter().map(|(_, value)| *value).collect();
        wire::row_description(out, &names);
        wire::data_row(out, &values);
        wire::command_complete(out, completion);
    }

    fn identify(&mut self) -> Reply {
        let queue = self.open_queue()?.queue;
        let identity = queue.identity();
        let (system_id, timeline) = (
            identity.system_id.to_string(),
            identity.timeline.to_string(),
        );
        self.timeline = Some(identity.timeline);
        let end = queue.end().to_string();
        self.row(
            &[
                ("systemid", Some(&system_id)),
                ("timeline", Some(&timeline)),
                ("xlogpos", Some(&end)),
                ("dbname", Some(&identity.database)),
            ],
            "IDENTIFY_SYSTEM",
        );
        Ok(())
    }

    fn timeline_history(&mut self, number: u32) -> Reply {
        let dir = &self.relay.shared.config.node.data_dir;
        let Some(history) = timeline::load(dir, number) else {
            return refuse(
                "58P01",
                format!("no history file of timeline {number} is kept here"),
            );
        };
        let name = format!("{number:08X}.history");
        let columns = [
            ("filename", Some(name.as_str())),
            ("content", Some(history.as_str())),
        ];
        self.row(&columns, "TIMELINE_HISTORY");
        Ok(())
    }

    async fn start(
        &mut self,
        slot: String,
        from: Lsn,
        options: &[(String, Option<String>)],
    ) -> anyhow::Result<Result<Outcome, Refusal>> {
        let options = match check_options(options, self.bridge) {
            Ok(options) => options,
            Err(refusal) => return Ok(Err(refusal)),
        };
        if let Err(refusal) = self.keep_from_others(&slot) {
            return Ok(Err(refusal));
        }
        let (open, reader, from) = match self.reader(&slot, from).await {
            Ok(opened) => opened,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let active = match self.activate(&slot, &options).await {
            Ok(active) => active,
            Err(refusal) => return Ok(Err(refusal)),
        };
        open.queue.register_cursor(&slot, from);
        wire::copy_both_response(self.framed.out());
        self.framed.flush().await?;
        let start = Start {
            slot: &slot,
            from,
            messages: options.messages,
            bridge: self.bridge,
            queue: &open.queue,
        };
        tokio::select! {
            outcome = stream(&self.relay, &mut self.framed, reader, &start) => {
                if let Some(error) = outcome.as_ref().err().and_then(|e| e.downcast_ref::<QueueError>()) {
                    self.relay.shared.note_damage(error);
                }
                outcome.map(Ok)
            }
            () = active.end.cancelled() => bail!("another session takes the cursor"),
            () = open.closed.cancelled() => {
                // As a walsender ends; a client comes again.
                let last = async {
                    wire::command_complete(self.framed.out(), "COPY 0");
                    self.framed.flush().await
                };
                timeout(FAREWELL, last).await.ok();
                Ok(Ok(Outcome::Closed))
            }
        }
    }

    /// A reader of what follows `from`, or for a stock client what it confirmed.
    async fn reader(&self, slot: &str, from: Lsn) -> Result<(OpenQueue, Reader, Lsn), Refusal> {
        let open = self.open_queue()?;
        let cursors = open.queue.cursors();
        let cursor = cursors.into_iter().find(|(name, _, _)| name == slot);
        let from = match (self.bridge, cursor) {
            (true, _) => from,
            (false, Some((_, lsn, false))) => from.max(lsn),
            (false, Some((_, _, true))) => {
                let text = format!("can no longer get changes from replication slot \"{slot}\"");
                return refuse("55000", text);
            }
            (false, None) => {
                let text = format!("replication slot \"{slot}\" does not exist");
                return refuse("42704", text);
            }
        };
        if self.relay.shared.contested().is_some_and(|end| from < end) {
            let text = format!("what follows {from} is disputed; see the reason in terrace.lag");
            return refuse("55000", text);
        }
        // Not the one that it may be of by now.
        let timeline = self.timeline.unwrap_or(open.queue.identity().timeline);
        let reader = open.queue.open_reader(from).await;
        let reader = reader.and_then(|reader| reader.up_to_timeline(timeline));
        let reader = reader.map_err(|error| {
            self.relay.shared.note_damage(&error);
            Refusal("58P01", error.to_string())
        })?;
        Ok((open, reader, from))
    }

    /// Runs SQL on the local Postgres and passes the answer on.
    async fn pass(&mut self, text: &str) -> anyhow::Result<Reply> {
        if self.sql.is_none() {
            match splice::open(&self.relay, &self.parameters).await {
                Ok(client) => self.sql = Some(client),
                Err(error) => return Ok(Err(error.into())),
            }
        }
        let client = self.sql.as_mut().context("no local session")?;
        frontend::query(&without_internal(text), client.buffer())?;
        client.flush().await?;
        loop {
            let message = client.message().await?;
            match message.kind {
                b'Z' => return Ok(Ok(())),
                // The rows would have to come from the client, which is not read here.
                b'G' => {
                    let text = "COPY FROM STDIN is not supported in replication mode";
                    frontend::copy_fail(text, client.buffer())?;
                    client.flush().await?;
                    continue;
                }
                _ => {}
            }
            let out = self.framed.out();
            wire::put(out, message.kind, |out| out.put_slice(&message.body));
            if out.len() > 64 << 10 {
                self.framed.flush().await?;
            }
        }
    }
}

/// A subscriber asks which tables there are, and must have all that it is told of:
/// leave out the extension's own. The queries are those of `fetch_table_list`, before
/// PostgreSQL 16 and since; both end in a condition.
fn without_internal(text: &str) -> Cow<'_, str> {
    let column = [
        ("SELECT DISTINCT t.schemaname,", "t.schemaname"),
        ("SELECT DISTINCT n.nspname, c.relname,", "n.nspname"),
    ]
    .into_iter()
    .find_map(|(start, column)| text.starts_with(start).then_some(column));
    match column {
        Some(column) => format!("{text} AND {column} <> '{EXTENSION_SCHEMA}'").into(),
        None => text.into(),
    }
}

/// What a client wants of its stream.
struct Options {
    messages: bool,
    /// End this session if it holds the cursor.
    depose: Option<u32>,
    /// Of the bridge: its data directory's.
    instance: Option<String>,
}

/// pgoutput's options, and for a bridge our own.
fn check_options(options: &[(String, Option<String>)], bridge: bool) -> Result<Options, Refusal> {
    let (mut protocol, mut publications) = (None, None);
    let (mut messages, mut depose, mut instance) = (false, None, None);
    for (name, value) in options {
        let value = value.as_deref().unwrap_or("on");
        let on = matches!(value, "on" | "true" | "1" | "yes");
        match name.as_str() {
            "proto_version" => protocol = value.parse::<u32>().ok(),
            "publication_names" => publications = Some(value),
            "messages" => messages = on,
            "depose" if bridge => depose = value.parse().ok(),
            "instance" if bridge => instance = Some(value.to_owned()),
            "streaming" | "origin" => {}
            "binary" | "two_phase" if !on => {}
            "binary" | "two_phase" => {
                return refuse("0A000", format!("option \"{name}\" is not supported"));
            }
            name => return refuse("22023", format!("unrecognized pgoutput option: {name}")),
        }
    }
    match protocol {
        Some(1..=4) => {}
        Some(version) => {
            let text = format!(
                "client sent proto_version={version} but server only supports protocol 4 or lower"
            );
            return refuse("0A000", text);
        }
        None => return refuse("22023", "proto_version option missing"),
    }
    let Some(publications) = publications else {
        return refuse("22023", "publication_names parameter missing");
    };
    for name in publications.split(',') {
        let name = name.trim().trim_matches('"');
        if name != PUBLICATION {
            return refuse("42704", format!("publication \"{name}\" does not exist"));
        }
    }
    Ok(Options {
        messages,
        depose,
        instance,
    })
}
