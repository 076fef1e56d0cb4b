//! Tells how this node is: to the Postgres beside it, and up the tree with what
//! it was told from below.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::client::{Client, PgError, Row, SessionOptions};
use crate::clock::timestamp;
use crate::conninfo::ConnInfo;
use crate::plain::plain;
use crate::status::Shared;
use crate::top::send_added;

/// Shortest time between two reports.
const AT_MOST: Duration = Duration::from_millis(200);
/// Longest time between two reports.
const AT_LEAST: Duration = Duration::from_secs(1);
/// Longest time for a report to be taken.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// The relay's role is tried this often …
const RELAY_AGAIN: Duration = Duration::from_secs(30);
/// … and where it is not let in, which somebody may be mending.
const RELAY_SOON: Duration = Duration::from_secs(5);
/// PostgreSQL's `errcodes.txt`.
const UNTRANSLATABLE_CHARACTER: &str = "22P05";
/// Role of what the relay passes through to the local Postgres.
pub const RELAY_ROLE: &str = "terrace_relay";

/// Two sessions that change one role at the same time fail.
static PREPARING: Mutex<()> = Mutex::const_new(());

/// Makes the relay's restricted role what it must be, with this run's password and
/// without settings, whatever became of it; and learns the local server's parameters.
pub async fn prepare_local(client: &mut Client, shared: &Shared) -> anyhow::Result<()> {
    let prepared = timeout(CALL_LIMIT, prepare(client, shared)).await;
    prepared.context("the local database takes too long to prepare role terrace_relay")?
}

async fn prepare(client: &mut Client, shared: &Shared) -> anyhow::Result<()> {
    let _alone = PREPARING.lock().await;
    *shared
        .server_parameters
        .lock()
        .unwrap_or_else(|p| p.into_inner()) = client.parameters().clone();
    let version = client
        .query(
            "SELECT extversion FROM pg_catalog.pg_extension WHERE extname = 'terrace'",
            &[],
        )
        .await?;
    let version = version
        .first()
        .and_then(|row| row.first().cloned().flatten());
    match version.as_deref() {
        Some(env!("CARGO_PKG_VERSION")) => {}
        Some(version) => anyhow::bail!(
            "extension terrace is of version {version}, this bridge of {}; run ALTER EXTENSION \
             terrace UPDATE or install the matching bridge",
            env!("CARGO_PKG_VERSION")
        ),
        None => anyhow::bail!("extension terrace is missing; run CREATE EXTENSION terrace"),
    }
    // Nothing here waits for a standby that is down.
    client.simple("SET synchronous_commit = local").await?;
    let password = shared.relay_password.as_bytes();
    let verifier = postgres_protocol::password::scram_sha_256(password);
    let sql = format!(
        "DO $$ DECLARE place name; BEGIN \
           IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = '{RELAY_ROLE}') THEN \
             CREATE ROLE {RELAY_ROLE}; \
           END IF; \
           IF NOT pg_catalog.pg_has_role('{RELAY_ROLE}', 'terrace_reader', 'USAGE') THEN \
             GRANT terrace_reader TO {RELAY_ROLE}; \
           END IF; \
           FOR place IN SELECT d.datname FROM pg_catalog.pg_db_role_setting s \
             JOIN pg_catalog.pg_database d ON d.oid = s.setdatabase \
             WHERE s.setrole = '{RELAY_ROLE}'::pg_catalog.regrole LOOP \
             EXECUTE pg_catalog.format('ALTER ROLE {RELAY_ROLE} IN DATABASE %I RESET ALL', place); \
           END LOOP; \
         END $$; \
         ALTER ROLE {RELAY_ROLE} RESET ALL; \
         ALTER ROLE {RELAY_ROLE} LOGIN INHERIT NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION \
           BYPASSRLS CONNECTION LIMIT -1 VALID UNTIL 'infinity' PASSWORD '{verifier}'"
    );
    client
        .simple(&sql)
        .await
        .context("prepare role terrace_relay")?;
    Ok(())
}

/// Who follows this server, or copies from it, looks into its database as that role.
async fn try_relay_role(shared: &Shared, info: &ConnInfo, link: &mut Link) {
    let now = Instant::now();
    if link.relay_next.is_some_and(|next| now < next) {
        return;
    }
    let restricted = info.with_user_password(RELAY_ROLE, &shared.relay_password);
    let options = SessionOptions::default();
    let opened = timeout(CALL_LIMIT, Client::connect(&restricted, &options)).await;
    let problem = match opened {
        Ok(Err(error)) if error.is_for_people() => Some(format!(
            "those who come through the relay are not let in: {error}; let role {RELAY_ROLE} in by \
             password (scram-sha-256) at {}, with a line of pg_hba.conf before those that say otherwise, \
             and let it CONNECT",
            info.endpoint()
        )),
        _ => None,
    };
    link.relay_next = Some(match problem {
        Some(_) => now + RELAY_SOON,
        None => now + RELAY_AGAIN,
    });
    shared.set_relay_problem(problem);
}

async fn connect(info: &ConnInfo, shared: &Shared) -> Result<Client, PgError> {
    let gucs = [
        ("search_path", "pg_catalog"),
        ("default_transaction_read_only", "off"),
        // Each statement of these functions would be planned anew the first five times, just while a
        // bridge starts.
        ("plan_cache_mode", "force_generic_plan"),
        // Nothing here waits for a standby that is down.
        ("synchronous_commit", "local"),
    ];
    let options = SessionOptions {
        application_name: format!("terrace report {}", shared.config.node.name),
        gucs: gucs.map(|(name, value)| (name.into(), value.into())).into(),
        ..Default::default()
    };
    Client::connect(info, &options).await
}

/// Reports until `cancel`, and sends rows that the top has for all.
pub async fn run(shared: Arc<Shared>, cancel: CancellationToken) -> anyhow::Result<()> {
    let local_info = ConnInfo::parse(&shared.config.database.url)?;
    let (mut local, mut upward) = (Link::default(), Link::default());
    let mut below = Below::default();
    let mut sender = Sender::default();
    let mut patience = AT_MOST;
    loop {
        let moved = async {
            sleep(patience - AT_MOST).await;
            shared.moved.notified().await;
        };
        patience = tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            () = shared.changed.notified() => AT_MOST,
            () = moved => AT_LEAST.min(2 * patience),
            () = sleep(AT_LEAST - AT_MOST) => AT_LEAST,
        };
        tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            () = report_here(&shared, &local_info, &mut local, &mut below) => {}
        }
        if below.rows_wait {
            sender.send(&shared, &local_info);
        }
        // A bridge of the top has the top beside it, and nobody above.
        if let (Some(upstream), Some(_)) = (shared.upstream(), &shared.config.parent) {
            let rows_wait = tokio::select! {
                () = cancel.cancelled() => return Ok(()),
                rows_wait = report_up(&shared, &upstream, &mut upward, &mut below) => rows_wait,
            };
            if rows_wait {
                sender.send(&shared, &upstream);
            }
        }
        tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            () = sleep(AT_MOST) => {}
        }
    }
}

/// Sends rows of tables that were added, or are wanted once more ([`crate::top::send_added`]), one at a time. What it does
/// ends with it.
#[derive(Default)]
struct Sender {
    task: JoinSet<()>,
}

impl Sender {
    fn send(&mut self, shared: &Arc<Shared>, top: &ConnInfo) {
        while self.task.try_join_next().is_some() {}
        if !self.task.is_empty() {
            return;
        }
        let (shared, top) = (shared.clone(), top.clone());
        self.task.spawn(async move {
            let name = format!("terrace rows {}", shared.config.node.name);
            if let Err(error) = send_added(&top, &name, None).await {
                tracing::warn!("send rows of a table: {error:#}");
            }
            sleep(AT_LEAST).await;
        });
    }
}

/// A connection that is made again when it is needed.
#[derive(Default)]
struct Link {
    client: Option<(String, Client)>,
    /// When the relay's role is tried next.
    relay_next: Option<Instant>,
}

impl Link {
    /// Whether the next call goes over the connection of the last one.
    fn is_open_to(&self, info: &ConnInfo) -> bool {
        matches!(&self.client, Some((known, _)) if *known == info.endpoint())
    }

    async fn call(
        &mut self,
        info: &ConnInfo,
        shared: &Shared,
        sql: &str,
        parameters: &[Option<&str>],
    ) -> Result<Option<String>, PgError> {
        let endpoint = info.endpoint();
        let mut client = match self.client.take() {
            Some((known, client)) if known == endpoint => client,
            _ => connect(info, shared).await?,
        };
        let rows = timeout(CALL_LIMIT, query(&mut client, sql, parameters))
            .await
            .map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))?;
        // An error of the server leaves the session usable.
        if matches!(rows, Ok(_) | Err(PgError::Db(_))) {
            self.client = Some((endpoint, client));
        }
        Ok(rows?
            .into_iter()
            .next()
            .and_then(|row| row.into_iter().next().flatten()))
    }
}

/// Asks once more without what the database's encoding does not have.
async fn query(
    client: &mut Client,
    sql: &str,
    parameters: &[Option<&str>],
) -> Result<Vec<Row>, PgError> {
    match client.query(sql, parameters).await {
        Err(error) if error.code() == Some(UNTRANSLATABLE_CHARACTER) => {
            let plain: Vec<_> = parameters.iter().map(|text| text.map(plain)).collect();
            let plain: Vec<_> = plain.iter().map(Option::as_deref).collect();
            client.query(sql, &plain).await
        }
        rows => rows,
    }
}

/// What the local database says of this server and those below, for the upstream.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Below {
    /// This is the top, and has rows to send.
    rows_wait: bool,
    /// The domains with those above each, as this server's data has them.
    paths: Option<BTreeMap<String, Vec<String>>>,
    conflicts: Value,
    compared: Value,
    nodes: Vec<Value>,
    events: Vec<Value>,
    /// Number of the last event that the upstream took.
    #[serde(skip)]
    told: i64,
}

/// Tells the local database, and learns what it was told from below.
async fn report_here(shared: &Arc<Shared>, info: &ConnInfo, link: &mut Link, below: &mut Below) {
    if !link.is_open_to(info) {
        let prepared = async {
            let mut client = connect(info, shared).await?;
            let prepared = prepare_local(&mut client, shared).await;
            // One that took too long may have answers on the way.
            if prepared.is_ok() {
                link.client = Some((info.endpoint(), client));
            }
            // While a bridge starts there is enough to do.
            link.relay_next = Some(Instant::now() + RELAY_SOON);
            prepared
        };
        if let Err(error) = prepared.await {
            tracing::debug!("prepare the local database: {error:#}");
        }
    }
    let mut own = shared.status_json();
    own["self"] = true.into();
    let node = &shared.config.node;
    let as_json = |event: &crate::status::Event| {
        json!({
            "id": event.id, "time": timestamp(event.unix_micros), "node": node.name,
            "domain": node.domain, "kind": event.kind, "reason": event.reason,
        })
    };
    let events: Vec<Value> = shared.events().iter().map(as_json).collect();
    let report = json!({ "nodes": [own], "events": events }).to_string();
    let sql = "SELECT terrace.to_report($2), terrace.report($1)";
    let told = below.told;
    match link
        .call(info, shared, sql, &[Some(&report), Some(&told.to_string())])
        .await
    {
        Ok(text) => {
            shared.events_reported(events.len());
            *below = text
                .and_then(|text| serde_json::from_str(&text).ok())
                .unwrap_or_default();
            below.told = told;
            let mut paths = below.paths.take().unwrap_or_default();
            let gone = shared.set_domains(paths.keys().cloned().collect());
            gone.iter().for_each(|domain| forget_domain(shared, domain));
            shared.set_domain_path(paths.remove(&node.domain).unwrap_or_default());
            try_relay_role(shared, info, link).await;
        }
        Err(error) => {
            tracing::debug!("report to the local database: {error}");
            *below = Below {
                told,
                ..Below::default()
            };
        }
    }
}

/// What was kept for a domain that is no more is kept no longer.
fn forget_domain(shared: &Shared, domain: &str) {
    let open = shared.queue.borrow().clone();
    let kept = open.is_some_and(|open| open.queue.drop_cursor(&format!("terrace_{domain}")));
    if kept {
        shared.event("dropped", &format!("nothing is kept for domain {domain}"));
    }
}

/// Tells the upstream. True if that is the top, and has rows to send.
async fn report_up(
    shared: &Arc<Shared>,
    info: &ConnInfo,
    link: &mut Link,
    below: &mut Below,
) -> bool {
    if !link.is_open_to(info) {
        // Another upstream may know none of them; it leaves out what it knows.
        below.told = 0;
    }
    let mut own = shared.status_json();
    own["conflicts"] = below.conflicts.clone();
    own["compared"] = below.compared.clone();
    let mut nodes = vec![own];
    nodes.append(&mut below.nodes);
    let report = json!({ "nodes": nodes, "events": below.events }).to_string();
    let sql = "SELECT terrace.rows_wait(), terrace.report($1)";
    match link.call(info, shared, sql, &[Some(&report)]).await {
        Ok(rows_wait) => {
            let last = below.events.last().and_then(|event| event["seq"].as_i64());
            below.told = last.unwrap_or(below.told);
            shared.set_report_problem(None);
            return rows_wait.as_deref() == Some("t");
        }
        Err(error) if matches!(error.code(), Some("42710" | "42704" | "42501" | "42883")) => {
            shared.set_report_problem(Some(format!("report to {}: {error}", info.endpoint())));
        }
        Err(error) => tracing::debug!("report to {}: {error}", info.endpoint()),
    }
    false
}
