//! Sums up this server's rows where the stream says so, for `terrace-bridge compare`.
//!
//! Guarantee: the rows of a slice are those of exactly the position of the transaction that
//! announces it, as a snapshot is taken between that one and the next. What takes long is done
//! in that snapshot beside the apply, by one session at a time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::sync::{Mutex, Semaphore};
use tokio::time::sleep;

use super::Session;
use crate::client::Client;
use crate::open::local_client;
use crate::status::Shared;

/// Snapshots that are held at once. Whoever compares waits for the servers that keep up; one that
/// lags could meet any number of slices at a time.
const AT_ONCE: usize = 16;
const SNAPSHOT: &str = "SET application_name = 'terrace comparison'; \
    SET idle_in_transaction_session_timeout = 0; SET lock_timeout = '2s'; SET statement_timeout = 0; \
    BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1";
/// What older comparisons have left; not in the snapshot, as another session may do it as well.
const TIDY: &str = "DELETE FROM terrace.own_checksum own WHERE NOT EXISTS ( \
    SELECT FROM terrace.comparison c WHERE c.id = own.comparison AND c.started = own.started)";
/// A session is kept for so long: one that has done this before does it at less cost.
const KEPT: Duration = Duration::from_secs(60);

/// Who may look, whose turn it is, and a session that is at rest.
pub(super) struct Slices {
    places: Arc<Semaphore>,
    turn: Arc<Mutex<()>>,
    resting: Resting,
    /// The comparison that was refused a place last.
    left_out: Option<String>,
}

type Resting = Arc<Mutex<Option<(Client, Instant)>>>;

impl Default for Slices {
    fn default() -> Slices {
        Slices {
            places: Arc::new(Semaphore::new(AT_ONCE)),
            turn: Arc::default(),
            resting: Arc::default(),
            left_out: None,
        }
    }
}

impl Session<'_> {
    /// Those that the last transaction has announced.
    pub(super) async fn sum_up_slices(&mut self) {
        for (comparison, number) in std::mem::take(&mut self.planner.seals.slices) {
            let Ok(place) = Arc::clone(&self.slices.places).try_acquire_owned() else {
                self.leave_out(comparison);
                continue;
            };
            let begun = snapshot(self.shared, &self.slices.resting, &comparison).await;
            let shared = Arc::clone(self.shared);
            let turn = Arc::clone(&self.slices.turn);
            let resting = Arc::clone(&self.slices.resting);
            tokio::spawn(async move {
                let done = async {
                    let mut client = begun?;
                    let _turn = turn.lock().await;
                    sum_up(&mut client, &comparison, &number, &shared).await?;
                    anyhow::Ok(client)
                };
                let done = done.await;
                shared.changed.notify_one();
                drop(place);
                match done {
                    Ok(client) => rest(client, &resting).await,
                    Err(error) => {
                        let what =
                            format!("slice {number} of comparison {comparison} failed: {error:#}");
                        shared.event("comparison", &what);
                    }
                }
            });
        }
    }

    /// Told once of each comparison.
    fn leave_out(&mut self, comparison: String) {
        if self.slices.left_out.as_ref() != Some(&comparison) {
            let what = format!(
                "comparison {comparison} is left out: {AT_ONCE} slices are under way; compare again \
                 when this server has caught up"
            );
            self.shared.event("comparison", &what);
        }
        self.slices.left_out = Some(comparison);
    }
}

/// Nothing is applied meanwhile: what the session sees and what it holds is of one position.
async fn snapshot(shared: &Shared, resting: &Resting, comparison: &str) -> anyhow::Result<Client> {
    let mut client = match rested(resting).await {
        Some(client) => client,
        None => {
            let mut client = local_client(shared).await?;
            client.lift_transaction_limit().await?;
            client.simple(SNAPSHOT).await.context("take a snapshot")?;
            client
        }
    };
    let hold = "SELECT terrace.hold_compared($1::bigint)";
    client.query(hold, &[Some(comparison)]).await?;
    Ok(client)
}

async fn rested(resting: &Resting) -> Option<Client> {
    let (mut client, _) = resting.lock().await.take()?;
    let snapshot = client.simple(SNAPSHOT).await;
    snapshot.is_ok().then_some(client)
}

/// Keeps a session that is done, and ends it when nobody has wanted it.
async fn rest(client: Client, resting: &Resting) {
    *resting.lock().await = Some((client, Instant::now()));
    sleep(KEPT).await;
    resting
        .lock()
        .await
        .take_if(|(_, since)| since.elapsed() >= KEPT);
}

async fn sum_up(
    client: &mut Client,
    comparison: &str,
    number: &str,
    shared: &Shared,
) -> anyhow::Result<()> {
    let domain = &shared.config.node.domain;
    let sql = "SELECT terrace.own_slice($1::bigint, $2::integer, $3)";
    let parameters = [Some(comparison), Some(number), Some(domain.as_str())];
    client.query(sql, &parameters).await?;
    client.simple("COMMIT").await?;
    if let Err(error) = client.simple(TIDY).await {
        tracing::debug!("remove old sums: {error}");
    }
    Ok(())
}
