//! SQL sessions: joined to the local Postgres, byte for byte, under the restricted role.

use std::collections::BTreeMap;

use anyhow::Context;
use bytes::Bytes;
use tokio::io::{AsyncWriteExt, copy_bidirectional};

use super::Relay;
use crate::client::{Client, PATIENT, PgError, SessionOptions, open_stream};
use crate::open::local_client;
use crate::report::{RELAY_ROLE, prepare_local};
use crate::wire::{self, Framed};

/// Passes a CancelRequest on, if its key is one of a session that is passed on.
pub async fn cancel(relay: &Relay, packet: &Bytes) -> anyhow::Result<()> {
    if !relay.keys().contains(packet) {
        return Ok(());
    }
    let mut stream = open_stream(&relay.local()?).await?;
    stream.write_all(&[0, 0, 0, 16, 4, 210, 22, 46]).await?;
    stream.write_all(packet).await?;
    Ok(stream.shutdown().await?)
}

/// Opens the restricted session that belongs to a client's.
///
/// The role may read what is synchronised and report. But a role may always change itself,
/// its password and settings above all, and one client would keep all others out or let
/// itself in past the relay. So each session is guarded by the extension before the client
/// says anything: it refuses every command that does more than read, for as long as the
/// session lives. When somebody else has changed the role (only a superuser can now), it
/// is made again.
pub async fn open(relay: &Relay, parameters: &BTreeMap<String, String>) -> Result<Client, PgError> {
    match open_guarded(relay, parameters).await {
        Err(Refused { error, ours: true }) => {
            tracing::warn!("the role {RELAY_ROLE} has been changed ({error}), making it again");
            let made = async {
                let mut client = local_client(&relay.shared).await?;
                prepare_local(&mut client, &relay.shared).await
            };
            made.await
                .map_err(|error| PgError::Protocol(format!("{error:#}")))?;
            open_guarded(relay, parameters)
                .await
                .map_err(|refused| refused.error)
        }
        opened => opened.map_err(|refused| refused.error),
    }
}

/// Why there is no session.
struct Refused {
    error: PgError,
    /// It has to do with the role, and not with what the client wants to be set.
    ours: bool,
}

async fn open_guarded(
    relay: &Relay,
    parameters: &BTreeMap<String, String>,
) -> Result<Client, Refused> {
    let info = relay.restricted().map_err(|error| Refused {
        error: PgError::Protocol(error.to_string()),
        ours: false,
    })?;
    let own = [
        "user",
        "database",
        "replication",
        "options",
        "client_encoding",
        "application_name",
    ];
    let wanted: Vec<(String, String)> = parameters
        .iter()
        .filter(|(name, _)| !own.contains(&name.as_str()) && !name.starts_with("_pq_."))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    let wants = !wanted.is_empty() || parameters.contains_key("options");
    // What a copy takes must not depend on what the role or the database is set to; the
    // search path is the database's. What the client wants comes after, and counts.
    let fixed = [("role", "none")].into_iter().chain(PATIENT);
    let fixed = fixed.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let mut options = SessionOptions {
        application_name: parameters
            .get("application_name")
            .cloned()
            .unwrap_or_default(),
        gucs: fixed.chain(wanted).collect(),
        ..Default::default()
    };
    // The client's own `-c name=value` list goes through as it came.
    options.raw_options = parameters.get("options").cloned();
    options.client_encoding = parameters.get("client_encoding").cloned();
    let about_role = |error: PgError| {
        let ours = match error.code() {
            Some("28P01" | "28000") => true,
            Some("42501") => !wants,
            _ => false,
        };
        Refused { error, ours }
    };
    let mut client = Client::connect(&info, &options).await.map_err(about_role)?;
    let guarded = client.simple("SELECT terrace.guard_session()").await;
    guarded.map_err(|error| Refused {
        ours: error.code() == Some("42501"),
        error,
    })?;
    Ok(client)
}

/// The key of a session that is passed on, known until this is dropped.
struct Known<'a> {
    relay: &'a Relay,
    key: Bytes,
}

impl<'a> Known<'a> {
    fn new(relay: &'a Relay, key: &Bytes) -> Known<'a> {
        let key = key.clone();
        relay.keys().insert(key.clone());
        Known { relay, key }
    }
}

impl Drop for Known<'_> {
    fn drop(&mut self) {
        self.relay.keys().remove(&self.key);
    }
}

/// Serves a plain session to its end.
pub async fn run(
    relay: &Relay,
    mut framed: Framed,
    parameters: BTreeMap<String, String>,
) -> anyhow::Result<()> {
    let wanted = parameters.get("database").or(parameters.get("user"));
    let here = relay.local()?;
    if wanted.map(String::as_str) != Some(here.dbname()) {
        let text = format!(
            "database \"{}\" does not exist",
            wanted.cloned().unwrap_or_default()
        );
        wire::error_response(framed.out(), "FATAL", "3D000", &text, "");
        return Ok(framed.flush().await?);
    }
    let local = match open(relay, &parameters).await {
        Ok(local) => local,
        Err(error) => {
            let code = error.code().unwrap_or("57P03").to_owned();
            let text = format!("cannot pass on to the local database: {error}");
            wire::error_response(framed.out(), "FATAL", &code, &text, "");
            return Ok(framed.flush().await?);
        }
    };
    for (name, value) in local.parameters() {
        wire::parameter_status(framed.out(), name, value);
    }
    let key = local.key_data().clone();
    let _known = Known::new(relay, &key);
    wire::put(framed.out(), b'K', |out| out.extend_from_slice(&key));
    wire::ready_for_query(framed.out(), b'I');
    framed.flush().await?;
    let (mut client, early) = framed.into_parts();
    let (mut server, first) = local.into_framed().into_parts();
    server.write_all(&early).await?;
    client.write_all(&first).await?;
    tokio::select! {
        copied = copy_bidirectional(&mut client, &mut server) => {
            copied.context("pass-through")?;
        }
        () = relay.cancel.cancelled() => {}
    }
    Ok(())
}
