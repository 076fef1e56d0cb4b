//! `on_error = "quarantine"`: a row that the database refuses for its values is put aside,
//! and the rest of its transaction is applied.
//!
//! Guarantee: what is put aside is one change of one row, with all that the stream says of
//! it, in the same local transaction as the rest. What may be mended (a missing table or
//! column, a right, a full disk) stalls all the same.

use bytes::Bytes;
use serde_json::{Map, Value};

use super::Session;
use super::obstacle::is_in_the_way;
use super::plan::Planner;
use super::skip::refused;
use crate::client::{DbError, PgError};
use crate::lsn::Lsn;
use crate::pgoutput::{self, Datum, Message, Tuple};

/// Classes of SQLSTATE that are about values: data exceptions, constraints, check options of
/// views, and what triggers raise.
const OF_VALUES: [&str; 4] = ["22", "23", "44", "P0"];

/// A change as it is put aside.
pub(super) struct Change {
    table: String,
    kind: &'static str,
    old: Option<Value>,
    new: Option<Value>,
}

impl Session<'_> {
    /// Makes one change, or puts it aside when that is wanted and the database refuses it.
    pub(super) async fn change(&mut self, payload: &Bytes, lsn: Lsn) -> anyhow::Result<()> {
        // Only rows are put aside; DDL may end the transaction and begin another one.
        let is_message = payload.first() == Some(&b'M');
        if is_message || !self.shared.config.apply.quarantines() {
            return self.careful_change(payload).await;
        }
        self.client.simple("SAVEPOINT change").await?;
        let conflicts = self.conflicts;
        let Err(error) = self.careful_change(payload).await else {
            self.client.simple("RELEASE change").await?;
            return Ok(());
        };
        let Some(refusal) = refusal(&error) else {
            return Err(error);
        };
        // Nothing of the top's is put aside before what is in its way.
        if is_in_the_way(&error) && self.clears.is_none() {
            return Err(error);
        }
        let Some(change) = self.planner.change(payload)? else {
            return Err(error);
        };
        self.client
            .simple("ROLLBACK TO change; RELEASE change")
            .await?;
        self.conflicts = conflicts;
        let text = |value: &Option<Value>| value.as_ref().map(Value::to_string);
        let (lsn, old, new) = (lsn.to_string(), text(&change.old), text(&change.new));
        self.client
            .execute(
                "INSERT INTO terrace.quarantine (lsn, relation, kind, old, new, sqlstate, error) \
                 VALUES ($1, $2, $3, $4, $5, $6, $7)",
                &[
                    Some(&lsn),
                    Some(&change.table),
                    Some(change.kind),
                    old.as_deref(),
                    new.as_deref(),
                    Some(&refusal.code),
                    Some(&refusal.message),
                ],
            )
            .await?;
        let reason = format!(
            "{} of table \"{}\": {}; see terrace.quarantine",
            change.kind,
            change.table,
            refusal.open_message()
        );
        self.shared.event_once("quarantine", &reason);
        Ok(())
    }
}

/// What the server said, if it is for its values that a row is refused.
fn refusal(error: &anyhow::Error) -> Option<DbError> {
    let PgError::Db(error) = refused(error)? else {
        return None;
    };
    let of_values = OF_VALUES.iter().any(|class| error.code.starts_with(class));
    of_values.then(|| DbError::clone(error))
}

impl Planner {
    /// What a message changes; `None` for what is no change of a row.
    fn change(&self, payload: &Bytes) -> anyhow::Result<Option<Change>> {
        let message = pgoutput::decode(payload)?;
        let Some(names) = self.column_names(&message) else {
            return Ok(None);
        };
        let row = |tuple: Tuple<'_>| Some(object(&names, tuple));
        let (kind, old, new) = match message {
            Message::Insert { new, .. } => ("INSERT", None, row(new)),
            Message::Update { old, new, .. } => {
                ("UPDATE", old.and_then(|(_, old)| row(old)), row(new))
            }
            Message::Delete { old: (_, old), .. } => ("DELETE", row(old), None),
            _ => return Ok(None),
        };
        let table = self.row_of(payload)?.table;
        Ok(Some(Change {
            table,
            kind,
            old,
            new,
        }))
    }
}

/// Values in the types' text forms; one that was not sent is left out.
fn object(names: &[&str], tuple: Tuple<'_>) -> Value {
    let mut row = Map::new();
    for (name, datum) in names.iter().zip(tuple.iter()) {
        let value = match datum {
            Datum::Null => Value::Null,
            Datum::Unchanged => continue,
            Datum::Text(text) => String::from_utf8_lossy(text).into(),
        };
        row.insert((*name).to_owned(), value);
    }
    Value::Object(row)
}
