//! The replication slot at the top's Postgres.

use std::time::Duration;

use tokio::time::sleep;

use super::{LinkEnd, Target};
use crate::client::{Client, PgError, SessionOptions, quote_ident};
use crate::domain::Session;
use crate::lsn::Lsn;

/// Pause between tries to take a slot whose holder has been told to end.
const DEPOSE_STEP: Duration = Duration::from_millis(50);
/// So many tries; it is told to end at each fourth.
const DEPOSE_STEPS: u32 = 20;

/// Which session "replication slot … is active for PID n" names: the last number in it,
/// whatever the language. 0, which none has, without one.
pub(super) fn named_session(message: &str) -> Session {
    let number = message
        .rsplit(|c: char| !c.is_ascii_digit())
        .find(|digits| !digits.is_empty());
    number.and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

/// Ends the walsender that holds the slot, unless another one does by now. Sessions of one
/// role may end each other.
async fn depose(target: &Target, holder: Session) -> Result<(), PgError> {
    let mut client = Client::connect(&target.conninfo, &SessionOptions::default()).await?;
    let sql = "SELECT pg_catalog.pg_terminate_backend(active_pid) \
               FROM pg_catalog.pg_replication_slots \
               WHERE slot_name = $1 AND active_pid = $2";
    let holder = holder.to_string();
    client
        .query(sql, &[Some(&target.slot), Some(&holder)])
        .await?;
    Ok(())
}

/// Starts, when the holder of the slot that is to be deposed, if there is one, has ended.
///
/// A walsender that is told to end says so to its client first. Where that takes nothing any more
/// it waits for it, and ends when it is told again.
pub(super) async fn start_when_free(
    client: &mut Client,
    start: &str,
    target: &Target,
) -> Result<(), PgError> {
    let Some(holder) = target.depose else {
        return client.copy_both(start).await;
    };
    for step in 0..DEPOSE_STEPS {
        if step % 4 == 0 {
            depose(target, holder).await?;
        }
        match client.copy_both(start).await {
            Err(error) if error.code() == Some("55006") => sleep(DEPOSE_STEP).await,
            result => return result,
        }
    }
    client.copy_both(start).await
}

/// A slot that is gone, or was invalidated to keep the disk from filling, does not come
/// back by itself.
pub(super) async fn why_not_started(target: &Target, error: PgError) -> LinkEnd {
    let invalidated = match error.code() {
        Some("42704") => true,
        Some("55000") => slot_value(target, "wal_status")
            .await
            .is_ok_and(|status| status.as_deref() == Some("lost")),
        _ => false,
    };
    match invalidated {
        true => LinkEnd::NoSlot(error.to_string()),
        false => error.into(),
    }
}

/// A server without the slot has none of what follows our end.
pub(super) async fn slot_exists(target: &Target) -> Result<(), LinkEnd> {
    match slot_value(target, "slot_name").await? {
        Some(_) => Ok(()),
        None => Err(LinkEnd::NoSlot(format!(
            "replication slot \"{}\" does not exist",
            target.slot
        ))),
    }
}

/// Rule A: with the slot ours, its confirmed position must not be above our end. Gives that
/// position.
pub(super) async fn verify_slot(target: &Target, end: Lsn) -> Result<Lsn, LinkEnd> {
    let confirmed = slot_value(target, "confirmed_flush_lsn").await?;
    match confirmed.and_then(|text| text.parse::<Lsn>().ok()) {
        Some(confirmed) if confirmed > end => Err(LinkEnd::Gap { confirmed, end }),
        Some(confirmed) => Ok(confirmed),
        None => Err(LinkEnd::Lost(format!(
            "slot \"{}\" has vanished",
            target.slot
        ))),
    }
}

/// What `pg_replication_slots` says of the slot.
pub(super) async fn slot_value(target: &Target, column: &str) -> Result<Option<String>, PgError> {
    let options = SessionOptions {
        application_name: "terrace".into(),
        ..Default::default()
    };
    let mut client = Client::connect(&target.conninfo, &options).await?;
    let sql = format!(
        "SELECT {} FROM pg_catalog.pg_replication_slots WHERE slot_name = $1",
        quote_ident(column)
    );
    let rows = client.query(&sql, &[Some(&target.slot)]).await?;
    Ok(rows
        .into_iter()
        .next()
        .and_then(|row| row.into_iter().next()?))
}
