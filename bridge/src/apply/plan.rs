//! From a change of the stream to the statement that does it here.
//!
//! Tables are found by name and columns by name, so that OIDs, column order and
//! extra columns may differ between servers. Values stay text from end to end;
//! the local server's own types read them.

mod known;

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;

use super::fold::{Fold, NotFoldable};
use super::relation::{Column, Relation};
use super::sealed::{SealedOrder, Seals, is_order};
use super::statement::{
    Expect, Row, Step, Written, clear_partition, delete, find, insert, key, moves, others, unnamed,
    update,
};
use crate::client::Client;
use crate::pgoutput::{self, Datum, Message, OldKind, TRUNCATE_RESTART_IDENTITY};

/// So many statements are prepared at a time, each of which holds memory of the server …
const MOST_STATEMENTS: usize = 4_000;
/// … or so many bytes of their text: a plan is a hundred times as large …
const MOST_TEXT: usize = 2 << 20;
/// … and for so long: a plan that was the best for a table of one page is kept otherwise until
/// somebody analyzes it.
const STATEMENTS_AGE: Duration = Duration::from_secs(60);

/// Prefix of messages that [`terrace.send`] writes.
const SEND_PREFIX: &str = "terrace.send";

/// What is to be done for a message.
pub enum Planned {
    /// These, in order.
    Steps(Vec<Step>),
    /// Nothing on this server.
    Nothing,
    /// First [`Planner::lookup`] this relation, then plan again.
    Lookup(u32),
    /// The extension at the top asks for this, for which the transaction must go by itself.
    Order(SealedOrder),
}

/// What became of a message that is to be folded.
pub enum Folded {
    /// It is in, or asks for nothing on this server.
    Added,
    /// First [`Planner::lookup`] this relation, then fold again.
    Lookup(u32),
    /// All of it must go in order.
    Not,
}

/// Turns messages into steps; knows the relations and the prepared statements.
pub struct Planner {
    domain: String,
    relations: HashMap<u32, Relation>,
    /// Tables that other domains get and this one does not.
    elsewhere: HashSet<(String, String)>,
    routing_changed: bool,
    /// Name of the prepared statement by its text.
    statements: HashMap<String, String>,
    /// Bytes of all of them.
    text: usize,
    /// When the first of them was.
    prepared_since: Instant,
    /// Names are not used twice in a session.
    named: u64,
    /// OIDs here of tables that are not folded for now.
    pub(super) resting: HashSet<String>,
    /// Of the transaction that is planned.
    pub(super) seals: Seals,
    /// Every relation that the message planned last must have looked up.
    unknown: Vec<u32>,
}

/// Whether the message empties tables.
pub fn is_truncate(payload: &[u8]) -> bool {
    payload.first() == Some(&b'T')
}

/// Content of the message if it raises a notification.
pub fn notify_content(payload: &[u8]) -> Option<&[u8]> {
    if payload.first() != Some(&b'M') {
        return None;
    }
    match pgoutput::decode(payload) {
        Ok(Message::Logical {
            prefix: SEND_PREFIX,
            content,
            ..
        }) => Some(content),
        _ => None,
    }
}

impl Planner {
    /// For a fresh session.
    pub async fn open(client: &mut Client, domain: &str) -> anyhow::Result<Planner> {
        let mut planner = Planner::new(domain);
        planner.reload_routing(client).await?;
        Ok(planner)
    }

    fn new(domain: &str) -> Planner {
        Planner {
            domain: domain.to_owned(),
            relations: HashMap::new(),
            elsewhere: HashSet::new(),
            routing_changed: false,
            statements: HashMap::new(),
            text: 0,
            prepared_since: Instant::now(),
            named: 0,
            resting: HashSet::new(),
            seals: Seals::default(),
            unknown: Vec::new(),
        }
    }

    /// Whether prepared statements had better be made anew: there are too many (a table that is told whole
    /// has one for each set of columns that are null), or the tables may have grown out of their plans.
    pub fn wants_statements_anew(&self) -> bool {
        let old = || self.prepared_since.elapsed() > STATEMENTS_AGE;
        self.has_enough_statements() || !self.statements.is_empty() && old()
    }

    fn has_enough_statements(&self) -> bool {
        self.statements.len() >= MOST_STATEMENTS || self.text >= MOST_TEXT
    }

    /// Forgets the prepared statements: none is known to exist any more.
    pub fn forget_statements(&mut self) {
        self.statements.clear();
        self.text = 0;
    }

    /// What `payload` asks for on this server; `minds` who wrote a row last, if that is known.
    pub fn plan(&mut self, payload: &Bytes, minds: bool) -> anyhow::Result<Planned> {
        let message = pgoutput::decode(payload)?;
        let relids = match &message {
            Message::Insert { relid, .. }
            | Message::Update { relid, .. }
            | Message::Delete { relid, .. } => vec![*relid],
            Message::Truncate { relids, .. } => relids.clone(),
            Message::Logical {
                prefix: SEND_PREFIX,
                content,
                ..
            } => {
                return Ok(match notify(payload.slice_ref(content)) {
                    Some(step) => Planned::Steps(vec![step]),
                    None => {
                        // Anybody at the top may write such a message; it is no data.
                        tracing::warn!("a message that is no notification is left out");
                        Planned::Nothing
                    }
                });
            }
            Message::Logical {
                prefix, content, ..
            } => {
                let order = self.seals.open(prefix, payload.slice_ref(content))?;
                return Ok(order.map_or(Planned::Nothing, Planned::Order));
            }
            Message::Begin { .. } => {
                self.seals.clear();
                return Ok(Planned::Nothing);
            }
            _ => return Ok(Planned::Nothing),
        };
        let mut unknown = Vec::new();
        for relid in &relids {
            let relation = self
                .relations
                .get(relid)
                .context("change of an undefined relation")?;
            if self.is_unknown(relation) {
                unknown.push(*relid);
            }
        }
        if let Some(relid) = unknown.first().copied() {
            self.unknown = unknown;
            return Ok(Planned::Lookup(relid));
        }
        let relation = &self.relations[&relids[0]];
        // Not before: a change that needs a look is planned twice, and each seal is for one message.
        if let Message::Insert { new, .. } = &message
            && relation.namespace == "terrace"
        {
            self.seals.note(&relation.name, *new);
        }
        let list = Some(relation.name.as_str()).filter(|_| relation.namespace == "terrace");
        if matches!(list, Some("sync_table" | "partition")) {
            self.routing_changed |= list == Some("sync_table");
            // Whatever follows in this transaction may go elsewhere.
            let others = self
                .relations
                .values_mut()
                .filter(|r| r.namespace != "terrace");
            others.for_each(|other| other.looked_up = false);
        }
        let relation = &self.relations[&relids[0]];
        // These are for this transaction in the stream, not for the table here.
        let name = (relation.namespace.as_str(), relation.name.as_str());
        let announces = matches!(name, ("terrace", "seal" | "slice"));
        if announces || !relation.routed && relids.len() == 1 {
            return Ok(Planned::Nothing);
        }
        let mut cleared = Vec::new();
        let (sql, values, expect) = match message {
            Message::Insert { new, .. } => {
                insert(relation, &new.iter().collect::<Vec<_>>(), payload)?
            }
            Message::Update { old, new, .. } => update(relation, old, new, payload, minds)?,
            Message::Delete { old, .. } => delete(relation, old, payload, minds)?,
            Message::Truncate { options, relids } => {
                let routed = relids
                    .iter()
                    .filter_map(|relid| self.relations.get(relid))
                    .filter(|relation| relation.routed);
                let (elsewhere, here): (Vec<_>, Vec<_>) =
                    routed.partition(|relation| relation.place.is_some());
                cleared.extend(elsewhere.into_iter().map(clear_partition));
                let tables: Vec<String> = here.into_iter().map(Relation::rows).collect();
                if tables.is_empty() {
                    return Ok(match cleared.is_empty() {
                        true => Planned::Nothing,
                        false => Planned::Steps(cleared),
                    });
                }
                let restart = if options & TRUNCATE_RESTART_IDENTITY != 0 {
                    " RESTART IDENTITY"
                } else {
                    ""
                };
                let sql = format!("TRUNCATE {}{restart}", tables.join(", "));
                (sql, Vec::new(), Expect::Done)
            }
            _ => return Ok(Planned::Nothing),
        };
        if sql.is_empty() {
            return Ok(Planned::Nothing);
        }
        cleared.push(self.step(sql, values, expect));
        Ok(Planned::Steps(cleared))
    }

    /// Adds a message to a fold.
    pub fn fold_into<'a>(
        &mut self,
        fold: &mut Fold<'a>,
        payload: &'a [u8],
    ) -> anyhow::Result<Folded> {
        let message = pgoutput::decode(payload)?;
        let relid = match &message {
            Message::Insert { relid, .. }
            | Message::Update { relid, .. }
            | Message::Delete { relid, .. } => *relid,
            Message::Begin { .. } => {
                self.seals.clear();
                return Ok(Folded::Added);
            }
            Message::Commit { .. } => return Ok(Folded::Added),
            Message::Logical { prefix, .. } if *prefix != SEND_PREFIX && !is_order(prefix) => {
                return Ok(Folded::Added);
            }
            _ => return Ok(Folded::Not),
        };
        let relation = self
            .relations
            .get(&relid)
            .context("change of an undefined relation")?;
        if relation.namespace == "terrace" {
            // What it says of the routing must be seen.
            return Ok(Folded::Not);
        }
        if self.is_unknown(relation) {
            return Ok(Folded::Lookup(relid));
        }
        if !relation.routed {
            return Ok(Folded::Added);
        }
        let shape = relation.shape.as_ref();
        let shape =
            shape.filter(|shape| !shape.is_constrained || !self.resting.contains(&shape.oid));
        let added = shape.map_or(Err(NotFoldable), |shape| fold.add(relid, shape, &message));
        Ok(match added {
            Ok(()) => Folded::Added,
            Err(NotFoldable) if relation.stands_alone() => {
                fold.leave_out(relid);
                Folded::Added
            }
            Err(NotFoldable) => Folded::Not,
        })
    }

    /// OIDs here of the tables that a fold leaves out; `None` if it writes to one of them.
    pub fn apart(&self, fold: &Fold<'_>) -> Option<Vec<String>> {
        let left_out = fold.left_out();
        let known = left_out.filter_map(|relid| self.relations.get(&relid));
        let oids: Vec<String> = known.map(|relation| relation.oid.clone()).collect();
        let is_written = fold.shapes().any(|shape| oids.contains(&shape.oid));
        (!is_written).then_some(oids)
    }

    /// Name of the prepared statement of this text, and whether it is to be prepared. Of one that is too
    /// many it is none.
    pub fn statement(&mut self, sql: &str) -> (String, bool) {
        if let Some(name) = self.statements.get(sql) {
            return (name.clone(), false);
        }
        if self.has_enough_statements() {
            return (String::new(), true);
        }
        if self.statements.is_empty() {
            self.prepared_since = Instant::now();
        }
        self.named += 1;
        self.text += sql.len();
        let name = format!("t{}", self.named);
        self.statements.insert(sql.to_owned(), name.clone());
        (name, true)
    }

    /// A statement that is prepared when it is used first.
    pub(super) fn step(&mut self, sql: String, values: Vec<Option<Bytes>>, expect: Expect) -> Step {
        let (name, parse) = self.statement(&sql);
        Step {
            name,
            sql,
            parse,
            values,
            expect,
            notify: None,
        }
    }

    pub(super) fn relation_of<'a>(&self, message: &Message<'a>) -> Option<&Relation> {
        self.relations.get(&message.changes()?)
    }

    /// Names of the columns of the table that a message changes a row of.
    pub(super) fn column_names(&self, message: &Message<'_>) -> Option<Vec<&str>> {
        let columns = &self.relation_of(message)?.columns;
        Some(columns.iter().map(|column| column.name.as_str()).collect())
    }

    /// The row that the message is about.
    pub fn row_of(&self, payload: &Bytes) -> anyhow::Result<Row> {
        let message = pgoutput::decode(payload)?;
        let Some(relation) = self.relation_of(&message) else {
            return Ok(Row::default());
        };
        let row = match &message {
            Message::Insert { new, .. } => Some(*new),
            Message::Update { old, new, .. } => Some(old.map_or(*new, |(_, old)| old)),
            Message::Delete { old, .. } => Some(old.1),
            _ => None,
        };
        Ok(Row {
            table: relation.table(),
            key: row.and_then(|row| key(relation, row)),
        })
    }

    /// Whether a row that is told whole is found by its primary key here.
    pub fn is_told_by_primary(&self, payload: &Bytes) -> anyhow::Result<bool> {
        let message = pgoutput::decode(payload)?;
        let is_whole = match &message {
            Message::Update { old, .. } => matches!(old, Some((OldKind::Full, _))),
            Message::Delete { old, .. } => old.0 == OldKind::Full,
            _ => false,
        };
        Ok(is_whole
            && self
                .relation_of(&message)
                .is_some_and(Relation::has_primary))
    }

    /// Whether somebody here may keep the row of a change as it is.
    pub fn may_keep_row(&self, payload: &Bytes) -> anyhow::Result<bool> {
        let message = pgoutput::decode(payload)?;
        let relation = self.relation_of(&message);
        Ok(relation.is_some_and(Relation::may_keep_rows))
    }

    /// For an insert, or an update to another key: the statement that removes a row
    /// that has the primary key already. Where that is none at the top, as far as the stream tells,
    /// the server above is asked (`obstacle.rs`).
    pub fn clear_way(&self, payload: &Bytes) -> anyhow::Result<Option<Step>> {
        let message = pgoutput::decode(payload)?;
        let Some(relation) = self.relation_of(&message) else {
            return Ok(None);
        };
        let Some(written) = Written::by(&message) else {
            return Ok(None);
        };
        let old = written.old;
        let stays = old.is_some_and(|(_, old)| !moves(relation, old, written.new));
        if !relation.routed || !relation.primary_is_the_tops() || stays {
            return Ok(None);
        }
        let others = others(relation, Column::is_primary, written, payload)?;
        Ok(others.map(|(condition, values)| {
            let sql = format!("DELETE FROM {} WHERE {condition}", relation.rows());
            unnamed(sql, values, Expect::Done)
        }))
    }

    /// What PostgreSQL calls it when another row has what is this one's.
    pub fn conflict(&self, payload: &Bytes) -> anyhow::Result<&'static str> {
        let message = pgoutput::decode(payload)?;
        Ok(Written::by(&message).map_or("", |written| written.conflict()))
    }

    /// For an update or a delete: the statement that finds its row, and what PostgreSQL calls it when a
    /// session of this server wrote that last; `only_local` leaves out others, and asks for nothing where
    /// that is not known.
    pub fn find(
        &self,
        payload: &Bytes,
        only_local: bool,
    ) -> anyhow::Result<Option<(Step, &'static str)>> {
        let message = pgoutput::decode(payload)?;
        let Some(relation) = self
            .relation_of(&message)
            .filter(|relation| relation.routed)
        else {
            return Ok(None);
        };
        let (old, kind) = match &message {
            Message::Update { old, new, .. } => {
                (old.unwrap_or((OldKind::Key, *new)), "update_origin_differs")
            }
            Message::Delete { old, .. } => (*old, "delete_origin_differs"),
            _ => return Ok(None),
        };
        let found = find(relation, old, payload, only_local)?;
        Ok(found.map(|step| (step, kind)))
    }

    /// For an update whose row is missing: the insert of its new row, if that is whole. Of a row
    /// that is told whole, what has not changed is in the old one.
    pub fn insert_instead(&self, payload: &Bytes) -> anyhow::Result<Option<Step>> {
        let message = pgoutput::decode(payload)?;
        let (Message::Update { old, new, .. }, Some(relation)) =
            (&message, self.relation_of(&message))
        else {
            return Ok(None);
        };
        let mut row: Vec<Datum<'_>> = new.iter().collect();
        if let Some((OldKind::Full, old)) = old {
            for (datum, old) in row.iter_mut().zip(old.iter()) {
                if *datum == Datum::Unchanged {
                    *datum = old;
                }
            }
        }
        if row.contains(&Datum::Unchanged) {
            return Ok(None);
        }
        let (sql, values, expect) = insert(relation, &row, payload)?;
        Ok(Some(unnamed(sql, values, expect)))
    }
}

/// The notification that a message asks for, if Postgres would take it.
fn notify(content: Bytes) -> Option<Step> {
    let message: serde_json::Value = serde_json::from_slice(&content).ok()?;
    let field = |name: &str, lengths: std::ops::RangeInclusive<usize>| {
        let text = message[name].as_str()?;
        let fits = lengths.contains(&text.len()) && !text.contains('\0');
        fits.then(|| Bytes::from(text.to_owned()))
    };
    let values = vec![
        Some(field("channel", 1..=63)?),
        Some(field("payload", 0..=7999)?),
    ];
    let mut step = unnamed(
        "SELECT pg_catalog.pg_notify($1, $2)".into(),
        values,
        Expect::Done,
    );
    step.notify = Some(content);
    Some(step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_statements_are_prepared_than_a_server_can_hold() {
        let mut planner = Planner::new("region");
        let sql = |n: usize| format!("UPDATE t SET c{n} = $1");
        for n in 0..MOST_STATEMENTS {
            assert!(!planner.wants_statements_anew());
            assert_ne!(planner.statement(&sql(n)).0, "");
        }
        assert!(planner.wants_statements_anew());
        assert_eq!(planner.statement("DELETE FROM t"), (String::new(), true));
        let (first, prepare) = planner.statement(&sql(0));
        assert!(!first.is_empty() && !prepare);
        planner.forget_statements();
        assert!(!planner.wants_statements_anew());
        let (again, prepare) = planner.statement(&sql(0));
        assert!(again != first && prepare);
    }

    // Of a table that is told whole each set of columns that are null has a statement.
    #[test]
    fn long_statements_are_prepared_in_smaller_numbers() {
        let mut planner = Planner::new("region");
        let sql = |n: usize| format!("UPDATE t SET c{n} = $1 {}", " ".repeat(8 << 10));
        let prepared =
            (0..MOST_STATEMENTS).take_while(|n| !planner.statement(&sql(*n)).0.is_empty());
        assert!((200..300).contains(&prepared.count()));
        assert!(planner.wants_statements_anew());
    }

    // Its seal may have come in the part before.
    #[test]
    fn an_order_is_not_folded_and_a_message_of_somebody_s_is_left_out() {
        let mut planner = Planner::new("region");
        let mut folded = |prefix: &str| {
            let head = [&b"M\x01"[..], &[0; 8], prefix.as_bytes(), b"\0"].concat();
            let message = [&head[..], &2_u32.to_be_bytes(), b"{}"].concat();
            let mut fold = Fold::default();
            matches!(planner.fold_into(&mut fold, &message), Ok(Folded::Added))
        };
        assert!(folded("somebody"));
        for order in ["terrace.ddl", "terrace.rows", SEND_PREFIX] {
            assert!(!folded(order), "{order}");
        }
    }
}
