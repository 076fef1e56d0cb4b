//! How far the local database has durably come: what is before that may be forgotten.
//!
//! Invariant: no crash of the local server takes back what [`Shared::replay_durable`] has told. The applier
//! commits without waiting for the disk, so a position counts when the WAL that was written after its commit is
//! flushed. What a bridge remembers of a commit may be of before a crash; but no session outlives one, so what a
//! living session has committed is before the end of the WAL that is asked for with it.

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

    /// Tells of what has become durable since the last call. The row of `terrace.progress` is not looked for: that
    /// would be among all its versions that somebody's snapshot keeps.
    pub async fn advance(&mut self, shared: &Shared) -> anyhow::Result<()> {
        let Some(noted) = shared.noted.borrow().clone() else {
            return Ok(());
        };
        let client = match &mut self.client {
            Some(client) => client,
            None => self.client.insert(local_client(shared).await?),
        };
        let waiting = self.pending.as_ref().map(|pending| pending.wal.as_str());
        let wal = look(client, waiting.unwrap_or("0/0"), &noted.session).await?;
        if wal.flushed
            && let Some(pending) = self.pending.take()
        {
            shared.replay_durable.send_replace(pending.lsn);
        }
        let further = noted.lsn > *shared.replay_durable.borrow();
        if self.pending.is_none() && wal.session_lives && further {
            let (lsn, wal) = (noted.lsn, wal.end);
            self.pending = Some(Pending { lsn, wal });
        }
        Ok(())
    }
}

struct Wal {
    end: String,
    /// To where it was asked for.
    flushed: bool,
    session_lives: bool,
}

async fn look(client: &mut Client, waiting: &str, session: &Backend) -> anyhow::Result<Wal> {
    let sql = "SELECT pg_catalog.pg_current_wal_insert_lsn()::text, \
               pg_catalog.pg_current_wal_flush_lsn() >= $1::pg_catalog.pg_lsn, \
               EXISTS (SELECT FROM pg_catalog.pg_stat_get_activity($2::pg_catalog.int4) \
                       WHERE backend_start = $3::pg_catalog.timestamptz)";
    let values = [waiting, &session.pid, &session.started].map(Some);
    let rows = client.query(sql, &values).await?;
    let Some([Some(end), Some(flushed), Some(lives)]) = rows.first().map(Vec::as_slice) else {
        bail!("no position");
    };
    Ok(Wal {
        end: end.clone(),
        flushed: flushed == "t",
        session_lives: lives == "t",
    })
}
