//! Sessions with servers above and beside, as a bridge opens them, and what it asks first.

use crate::client::{Client, PATIENT, PgError, SessionOptions, quote_ident};
use crate::conninfo::ConnInfo;
use crate::lsn::{Identity, Lsn};
use crate::record::FORMAT;

/// Name of the publication at the top.
pub const PUBLICATION: &str = "terrace";
/// Start-up parameter by which two bridges know each other.
pub const BRIDGE_PARAMETER: &str = "_pq_.terrace";
/// Session settings that fix the text form of values, whatever the server's are; that let what
/// takes long take long; and by which the server notices a host that is gone without a word.
pub fn pinned_settings() -> Vec<(String, String)> {
    let form = [
        ("datestyle", "ISO"),
        ("intervalstyle", "postgres"),
        ("extra_float_digits", "3"),
        ("bytea_output", "hex"),
        ("timezone", "UTC"),
        ("xmloption", "content"),
        ("lc_monetary", "C"),
        ("array_nulls", "on"),
        ("wal_sender_timeout", "10s"),
        ("tcp_keepalives_idle", "30"),
        ("tcp_keepalives_interval", "10"),
        ("tcp_keepalives_count", "3"),
    ];
    let all = form.into_iter().chain(PATIENT);
    all.map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// [`pinned_settings`] of a session that reads others' rows: an error rather than some of them,
/// where policies hide the others.
pub fn reading_settings() -> Vec<(String, String)> {
    let mut settings = pinned_settings();
    settings.push(("row_security".into(), "off".into()));
    settings.push(NAMED_WHOLE.map(str::to_owned).into());
    settings
}

/// Names of objects (regclass and the like) come with their schema: whoever reads them finds none in a
/// path of his own.
const NAMED_WHOLE: [&str; 2] = ["search_path", "pg_catalog, pg_temp"];

/// Opens a session that a bridge answers itself; at a Postgres it is a plain one,
/// unless `replication` is wanted.
pub async fn session(
    conninfo: &ConnInfo,
    application: &str,
    replication: bool,
) -> Result<Client, PgError> {
    let mut gucs = pinned_settings();
    if replication {
        gucs.push(NAMED_WHOLE.map(str::to_owned).into());
    }
    let options = SessionOptions {
        application_name: application.to_owned(),
        replication,
        gucs,
        extensions: vec![(BRIDGE_PARAMETER.to_owned(), "1".to_owned())],
        ..Default::default()
    };
    Client::connect(conninfo, &options).await
}

/// Whether a Postgres is not known to be none.
pub async fn is_standby(client: &mut Client) -> Result<bool, PgError> {
    let rows = client
        .simple("SELECT pg_catalog.pg_is_in_recovery()")
        .await?;
    let answer = rows.first().and_then(|row| row.first()?.as_deref());
    Ok(answer != Some("f"))
}

/// Opens a replication session and asks whose history it tells, and how far it has come.
///
/// A standby is refused, although newer ones decode: in the middle of the session it may
/// be promoted to a history that is not the one it told of.
pub async fn connect(
    conninfo: &ConnInfo,
    application: &str,
) -> Result<(Client, Identity, Lsn), PgError> {
    let mut client = session(conninfo, application, true).await?;
    // Asked first: one that is no standby now will be none while the session lasts.
    if !client.extension_accepted(BRIDGE_PARAMETER) && is_standby(&mut client).await? {
        return Err(PgError::Standby);
    }
    let rows = client.simple("IDENTIFY_SYSTEM").await?;
    let field = |column: usize| {
        rows.first()
            .and_then(|row| row.get(column)?.clone())
            .ok_or_else(|| PgError::Protocol("IDENTIFY_SYSTEM gave no row".into()))
    };
    let number = |text: String| {
        text.parse::<u64>()
            .map_err(|_| PgError::Protocol("IDENTIFY_SYSTEM: not a number".into()))
    };
    let identity = Identity {
        system_id: number(field(0)?)?,
        timeline: number(field(1)?)? as u32,
        database: field(3)?,
        publication: PUBLICATION.to_owned(),
        format: FORMAT,
    };
    let end = field(2)?.parse();
    let end = end.map_err(|_| PgError::Protocol("IDENTIFY_SYSTEM: not an LSN".into()))?;
    Ok((client, identity, end))
}

/// Makes a temporary slot (or cursor, at a bridge) and exports the snapshot that it
/// starts from. Both last until the session's next command or end.
pub async fn create_snapshot(client: &mut Client, slot: &str) -> Result<(Lsn, String), PgError> {
    client.lift_transaction_limit().await?;
    let sql = format!(
        "CREATE_REPLICATION_SLOT {} TEMPORARY LOGICAL pgoutput (SNAPSHOT 'export')",
        quote_ident(slot)
    );
    let rows = client.simple(&sql).await?;
    let point = |lsn: &str| {
        lsn.parse()
            .map_err(|_| PgError::Protocol("CREATE_REPLICATION_SLOT: not an LSN".into()))
    };
    match rows.first().map(Vec::as_slice) {
        Some([_, Some(lsn), Some(snapshot), ..]) => Ok((point(lsn)?, snapshot.clone())),
        _ => Err(PgError::Protocol("the server exported no snapshot".into())),
    }
}
