//! Replication slots, which are the queue's cursors: made, dropped, taken.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{FAREWELL, Options, Refusal, Reply, Session, refuse};
use crate::client::{Client, PgError, SessionOptions};
use crate::conninfo::ConnInfo;
use crate::lsn::Lsn;
use crate::queue::Queue;
use crate::relay::stream::SILENCE;
use crate::relay::{Holder, Relay};
use crate::upstream::{connect, create_snapshot, pinned_settings};
use crate::wire;

fn already_exists<T>(slot: &str) -> Result<T, Refusal> {
    refuse(
        "42710",
        format!("replication slot \"{slot}\" already exists"),
    )
}

fn is_active<T>(slot: &str, pid: u32) -> Result<T, Refusal> {
    refuse(
        "55006",
        format!("replication slot \"{slot}\" is active for PID {pid}"),
    )
}

/// What a client is told of a cursor must still be so after a crash.
async fn save_cursors(queue: &Queue) -> Reply {
    let queue = queue.clone();
    let saved = tokio::task::spawn_blocking(move || queue.save_cursors()).await;
    match saved {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => refuse("58030", error.to_string()),
        Err(error) => refuse("58030", error.to_string()),
    }
}

impl Session {
    pub(super) async fn create(
        &mut self,
        slot: String,
        temporary: bool,
        logical: bool,
        snapshot: Option<String>,
    ) -> Reply {
        if !logical {
            return refuse(
                "0A000",
                "physical replication is not supported by this server",
            );
        }
        self.keep_from_others(&slot)?;
        let queue = self.open_queue()?.queue;
        if queue.cursors().iter().any(|(name, _, _)| *name == slot) {
            return already_exists(&slot);
        }
        let (lsn, name) = match snapshot.as_deref() {
            Some("nothing") => (*self.relay.shared.replayed.borrow(), None),
            Some("export") => {
                let (client, lsn, name) = self.export().await?;
                self.snapshot = Some(client);
                (lsn, Some(name))
            }
            _ => return refuse("0A000", "SNAPSHOT 'use' is not supported by this server"),
        };
        if !queue.create_cursor(&slot, lsn, temporary) {
            return already_exists(&slot);
        }
        if temporary {
            self.temporary.push(slot.clone());
        } else if let Err(refusal) = save_cursors(&queue).await {
            queue.drop_cursor(&slot);
            return Err(refusal);
        }
        let point = lsn.to_string();
        self.row(
            &[
                ("slot_name", Some(&slot)),
                ("consistent_point", Some(&point)),
                ("snapshot_name", name.as_deref()),
                ("output_plugin", Some("pgoutput")),
            ],
            "CREATE_REPLICATION_SLOT",
        );
        Ok(())
    }

    /// The place of a domain, which a client that is no bridge may neither move nor drop.
    pub(super) fn keep_from_others(&self, slot: &str) -> Reply {
        let is_ours = ["terrace_", "terracecopy_"]
            .iter()
            .any(|ours| slot.starts_with(ours));
        match is_ours && !self.bridge {
            false => Ok(()),
            true => refuse(
                "42939",
                format!("replication slot name \"{slot}\" is reserved for bridges; choose another"),
            ),
        }
    }

    pub(super) async fn drop_slot(&mut self, slot: &str, wait: bool) -> Reply {
        self.keep_from_others(slot)?;
        let deadline = Instant::now() + SILENCE;
        while let Some(holder) = self.holder(slot) {
            if !wait || Instant::now() > deadline {
                return is_active(slot, holder.session);
            }
            sleep(Duration::from_millis(50)).await;
        }
        let queue = self.open_queue()?.queue;
        if !queue.drop_cursor(slot) {
            let text = format!("replication slot \"{slot}\" does not exist");
            return refuse("42704", text);
        }
        save_cursors(&queue).await?;
        wire::command_complete(self.framed.out(), "DROP_REPLICATION_SLOT");
        Ok(())
    }

    pub(super) fn holder(&self, slot: &str) -> Option<Holder> {
        lock(&self.relay).get(slot).cloned()
    }

    /// A snapshot of the local database with the position that it shows.
    pub(super) async fn export(&self) -> Result<(Client, Lsn, String), Refusal> {
        let local = self
            .relay
            .local()
            .map_err(|error| Refusal("58000", error.to_string()))?;
        if self.relay.shared.config.parent.is_none() {
            let name = format!("terraceexport_{}_{}", std::process::id(), self.id);
            return Ok(export_at_top(&local, &name).await?);
        }
        let options = SessionOptions {
            application_name: "terrace snapshot".into(),
            gucs: pinned_settings(),
            ..Default::default()
        };
        let mut client = Client::connect(&local, &options).await?;
        client.lift_transaction_limit().await?;
        client
            .simple("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            .await?;
        let sql = "SELECT lsn, pg_catalog.pg_export_snapshot() FROM terrace.progress";
        let rows = client.simple(sql).await?;
        match rows.first().map(Vec::as_slice) {
            Some([Some(lsn), Some(name)]) => match lsn.parse() {
                Ok(lsn) => Ok((client, lsn, name.clone())),
                Err(_) => refuse("58000", "terrace.progress is damaged"),
            },
            _ => refuse("55000", "this server has no data to copy yet"),
        }
    }

    /// Takes the cursor, from another session only if that is an older one of the
    /// same bridge, or is to be deposed.
    pub(super) async fn activate(
        &self,
        slot: &str,
        options: &Options,
    ) -> Result<ActiveCursor, Refusal> {
        let application = self
            .parameters
            .get("application_name")
            .cloned()
            .unwrap_or_default();
        let holder = Holder {
            session: self.id,
            application,
            instance: options.instance.clone(),
            end: CancellationToken::new(),
        };
        let deadline = Instant::now() + FAREWELL;
        loop {
            let other = {
                let mut active = lock(&self.relay);
                match active.get(slot) {
                    None => {
                        active.insert(slot.to_owned(), holder.clone());
                        return Ok(ActiveCursor {
                            relay: Arc::clone(&self.relay),
                            slot: slot.to_owned(),
                            end: holder.end,
                        });
                    }
                    Some(other) => other.clone(),
                }
            };
            let same_name = self.bridge && other.application == holder.application;
            if same_name && other.instance != holder.instance {
                let text = format!(
                    "node \"{}\" is another bridge that is connected here, with a data_dir of its \
                     own; give one of them another name",
                    other.application
                );
                return refuse("42710", text);
            }
            let replaces = same_name || self.bridge && options.depose == Some(other.session);
            if !replaces || Instant::now() > deadline {
                return is_active(slot, other.session);
            }
            other.end.cancel();
            sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Beside the top it is the database's own WAL that counts: a temporary slot tells
/// where in it the snapshot stands.
async fn export_at_top(local: &ConnInfo, slot: &str) -> Result<(Client, Lsn, String), PgError> {
    let (mut client, _, _) = connect(local, "terrace snapshot").await?;
    let (lsn, snapshot) = create_snapshot(&mut client, slot).await?;
    Ok((client, lsn, snapshot))
}

fn lock(relay: &Relay) -> std::sync::MutexGuard<'_, HashMap<String, Holder>> {
    relay
        .active
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Leaves the cursor when dropped.
pub(super) struct ActiveCursor {
    relay: Arc<Relay>,
    slot: String,
    /// Cancelled when another session takes the cursor.
    pub end: CancellationToken,
}

impl Drop for ActiveCursor {
    fn drop(&mut self) {
        lock(&self.relay).remove(&self.slot);
        self.relay.shared.drop_downstream(&self.slot);
    }
}
