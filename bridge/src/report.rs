//! Tells how this node is: to the Postgres beside it, and up the tree with what
//! it was told from below.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::client::{Client, PgError, SessionOptions};
use crate::conninfo::ConnInfo;
use crate::status::{Shared, timestamp};

/// Shortest time between two reports.
const AT_MOST: Duration = Duration::from_millis(200);
/// Longest time between two reports.
const AT_LEAST: Duration = Duration::from_secs(1);
/// Role of what the relay passes through to the local Postgres.
pub const RELAY_ROLE: &str = "terrace_relay";

/// Makes the relay's restricted role usable with this run's password, and learns
/// the local server's parameters.
pub async fn prepare_local(shared: &Arc<Shared>) -> anyhow::Result<()> {
    let mut client = connect(&ConnInfo::parse(&shared.config.database.url)?, shared).await?;
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
    let password = shared.relay_password.as_bytes();
    let verifier = postgres_protocol::password::scram_sha_256(password);
    let sql = format!(
        "DO $$ BEGIN \
           IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = '{RELAY_ROLE}') THEN \
             CREATE ROLE {RELAY_ROLE} LOGIN IN ROLE terrace_reader; \
           END IF; \
         END $$; \
         ALTER ROLE {RELAY_ROLE} LOGIN PASSWORD '{verifier}'"
    );
    client
        .simple(&sql)
        .await
        .context("prepare role terrace_relay")?;
    Ok(())
}

async fn connect(info: &ConnInfo, shared: &Shared) -> Result<Client, PgError> {
    let options = SessionOptions {
        application_name: format!("terrace report {}", shared.config.node.name),
        gucs: vec![("search_path".into(), "pg_catalog".into())],
        ..Default::default()
    };
    Client::connect(info, &options).await
}

/// Reports until `cancel`.
pub async fn run(shared: Arc<Shared>, cancel: CancellationToken) -> anyhow::Result<()> {
    let local_info = ConnInfo::parse(&shared.config.database.url)?;
    let (mut local, mut upward) = (Link::new(), Link::new());
    loop {
        tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            _ = timeout(AT_LEAST, shared.changed.notified()) => {}
        }
        let below = report_here(&shared, &local_info, &mut local).await;
        if let Some(upstream) = shared.upstream() {
            report_up(&shared, &upstream, &mut upward, below).await;
        }
        tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            () = sleep(AT_MOST) => {}
        }
    }
}

/// A connection that is made again when it is needed.
struct Link {
    client: Option<(String, Client)>,
}

impl Link {
    fn new() -> Link {
        Link { client: None }
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
        let limit = Duration::from_secs(5);
        let rows = timeout(limit, client.query(sql, parameters))
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

fn events(shared: &Shared) -> Vec<Value> {
    let node = &shared.config.node;
    let as_json = |event: crate::status::Event| {
        json!({
            "id": event.id, "time": timestamp(event.unix_micros), "node": node.name,
            "domain": node.domain, "kind": event.kind, "reason": event.reason,
        })
    };
    shared.events().into_iter().map(as_json).collect()
}

/// Gives what the servers below said.
async fn report_here(shared: &Arc<Shared>, info: &ConnInfo, link: &mut Link) -> Vec<Value> {
    let mut own = shared.status_json();
    own["self"] = true.into();
    let report = json!({ "nodes": [own], "events": events(shared) }).to_string();
    let told = link
        .call(info, shared, "SELECT terrace.report($1)", &[Some(&report)])
        .await;
    let below = match told {
        Ok(_) => {
            link.call(info, shared, "SELECT terrace.status_json()", &[])
                .await
        }
        Err(error) => Err(error),
    };
    match below {
        Ok(text) => text
            .and_then(|text| serde_json::from_str(&text).ok())
            .unwrap_or_default(),
        Err(error) => {
            tracing::debug!("report to the local database: {error}");
            Vec::new()
        }
    }
}

async fn report_up(shared: &Arc<Shared>, info: &ConnInfo, link: &mut Link, below: Vec<Value>) {
    let events = events(shared);
    let count = events.len();
    let mut nodes = vec![shared.status_json()];
    nodes.extend(below);
    let report = json!({ "nodes": nodes, "events": events }).to_string();
    match link
        .call(info, shared, "SELECT terrace.report($1)", &[Some(&report)])
        .await
    {
        Ok(_) => {
            shared.events_reported(count);
            shared.set_report_problem(None);
        }
        Err(error) if matches!(error.code(), Some("42710" | "42704" | "42501" | "42883")) => {
            shared.set_report_problem(Some(format!("report to {}: {error}", info.endpoint())));
        }
        Err(error) => tracing::debug!("report to {}: {error}", info.endpoint()),
    }
}
