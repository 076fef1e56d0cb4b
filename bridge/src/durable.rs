//! How far the local database has durably come: what is before that may be forgotten.
//!
//! Invariant: no crash of the local server takes back what [`Shared::replay_durable`] has told. The applier
//! commits without waiting for the disk, so a position counts when the WAL that was written after its commit is
//! flushed. What a bridge remembers of a commit may be of before a crash; but no session outlives one, so what a
//! living session has committed is before the end of the WAL that is asked for next.

use std::sync::Arc;

use anyhow::bail;

use crate::client::Client;
use crate::lsn::Lsn;
use crate::open::local_client;
use crate::status::Shared;

/// What `terrace.progress` was left with.
#[derive(Clone, Debug)]
pub struct Noted {
    /// End of what is in the database; what is only shown is not.
    pub lsn: Lsn,
    /// Who has seen or written it.
    pub session: Arc<Backend>,
}

/// One session of the local server among all that it ever has.
#[derive(Debug)]
pub struct Backend {
    pid: String,
    started: String,
}

impl Backend {
    /// That of `client`.
    pub async fn of(client: &mut Client) -> anyhow::Result<Backend> {
        let sql = "SELECT pid::text, backend_start::text \
                   FROM pg_catalog.pg_stat_get_activity(pg_catalog.pg_backend_pid())";
        let mut rows = client.query(sql, &[]).await?.into_iter().flatten();
        match (rows.next().flatten(), rows.next().flatten()) {
            (Some(pid), Some(started)) => Ok(Backend { pid, started }),
            _ => bail!("the local database does not tell of its own session"),
        }
    }
}

/// A position whose commit is before `wal`, which may not be on disk yet.
struct Pending {
    lsn: Lsn,
    wal: String,
}

/// Asks the local server again and again.
pub struct Durable {
    client: Option<Client>,
    pending: Option<Pending>,
}

impl Durable {
    /// `client` is a session of the local server, if there is one.
    pub fn new(client: Option<Client>) -> Durable {
        let pending = None;
        Durable { client, pending }
    }

    /// After an error: what a server that crashes had written and not flushed is gone.
    pub fn start_again(&mut self) {
        *self = Durable::new(None);
    }

    /// Tells of what has become durable since the last call.
    pub async fn advance(&mut self, shared: &Shared) -> anyhow::Result<()> {
        let client = match &mut self.client {
            Some(client) => client,
            None => self.client.insert(local_client(shared).await?),
        };
        let noted = shared.noted.borrow().clone();
        let lsn = position(client, noted).await?;
        let waiting = self.pending.as_ref().map(|pending| pending.wal.as_str());
        let (wal, flushed) = look(client, waiting.unwrap_or("0/0")).await?;
        if flushed && let Some(pending) = self.pending.take() {
            shared.replay_durable.send_replace(pending.lsn);
        }
        let further = lsn > *shared.replay_durable.borrow();
        if self.pending.is_none() && further {
            self.pending = Some(Pending { lsn, wal });
        }
        Ok(())
    }
}

/// What is committed. The row of `terrace.progress` would have to be looked for among all its versions that
/// somebody's snapshot keeps, so the applier's word is taken while its session lives.
async fn position(client: &mut Client, noted: Option<Noted>) -> anyhow::Result<Lsn> {
    if let Some(noted) = noted
        && lives(client, &noted.session).await?
    {
        return Ok(noted.lsn);
    }
    let rows = client.query("SELECT lsn::text FROM terrace.progress", &[]);
    match rows.await?.first().map(Vec::as_slice) {
        Some([Some(lsn)]) => Ok(lsn.parse()?),
        _ => bail!("terrace.progress is empty"),
    }
}

async fn lives(client: &mut Client, session: &Backend) -> anyhow::Result<bool> {
    let sql = "SELECT FROM pg_catalog.pg_stat_get_activity($1::pg_catalog.int4) \
               WHERE backend_start = $2::pg_catalog.timestamptz";
    let values = [&session.pid, &session.started].map(|value| Some(value.as_str()));
    Ok(!client.query(sql, &values).await?.is_empty())
}

/// The end of the WAL, and whether it is on disk to where `waiting` is.
async fn look(client: &mut Client, waiting: &str) -> anyhow::Result<(String, bool)> {
    let sql = "SELECT pg_catalog.pg_current_wal_insert_lsn()::text, \
               pg_catalog.pg_current_wal_flush_lsn() >= $1::pg_catalog.pg_lsn";
    let rows = client.query(sql, &[Some(waiting)]).await?;
    match rows.first().map(Vec::as_slice) {
        Some([Some(end), Some(flushed)]) => Ok((end.clone(), flushed == "t")),
        _ => bail!("no position"),
    }
}
