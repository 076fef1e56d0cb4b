//! The tables that the stream tells of, and what they are on this server.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, bail};
use bytes::Bytes;

use super::fold::{Shape, ShapeColumn};
use crate::client::{Client, quote_ident, quote_table};
use crate::pgoutput::OldKind;

/// One of its columns.
pub(super) struct Column {
    pub name: String,
    /// Of the replica identity at the top.
    pub key: bool,
    /// What it is here, once looked up.
    pub local: Option<LocalColumn>,
}

/// The column here.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct LocalColumn {
    pub generated: bool,
    pub primary: bool,
    /// Of a type that has an order of its own, or whose elements have: finds what is written in the same way.
    pub equality: Option<Equality>,
    /// What is equal is the same: there is no other way to write it.
    pub exact: bool,
    pub input: Input,
    /// The same for a value that it is compared with: of a domain, the type below.
    pub compared: Input,
}

impl Column {
    /// Of the primary key here.
    pub fn is_primary(&self) -> bool {
        self.local.as_ref().is_some_and(|local| local.primary)
    }
}

impl LocalColumn {
    /// The condition that the column of this name has the value of a parameter.
    pub fn equals(&self, name: &str, number: usize) -> String {
        match &self.equality {
            Some(equality) => equality.of(name, &self.compared.parameter(number)),
            // A cast to text might be anybody's.
            None => format!(
                "pg_catalog.format('%s', {name}) = ${number}::pg_catalog.text AND NOT {}",
                self.is_null(name)
            ),
        }
    }

    /// The condition that the column of this name is null: of a row type not that all in it is.
    pub fn is_null(&self, name: &str) -> String {
        match &self.equality {
            Some(_) => format!("{name} IS NULL"),
            None => format!("(pg_catalog.num_nulls({name}) = 1)"),
        }
    }
}

/// The operator that indexes of a column know equal values by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Equality {
    /// As SQL writes it between two values.
    operator: String,
    /// What a value of a domain is to the operator.
    base: Option<String>,
}

impl Equality {
    /// The condition that the column of this name has the value, which is of its type, or of the
    /// one below its domain.
    pub fn of(&self, name: &str, value: &str) -> String {
        let operator = &self.operator;
        match &self.base {
            Some(base) => format!("{name}::{base} {operator} {value}"),
            None => format!("{name} {operator} {value}"),
        }
    }
}

/// How a value of a type is made from text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// As SQL writes it, without modifier.
    pub type_name: String,
    /// One of PostgreSQL's own: reading it calls nobody's code.
    pub plain: bool,
}

impl Input {
    /// A parameter as such a value. Its type is always said: told by a column it might be another
    /// one by now, and what a domain checks would run where the value is bound, with our rights
    /// (`pg_ext/src/owner.rs`).
    pub fn parameter(&self, number: usize) -> String {
        match self.plain {
            true => format!("${number}::{}", self.type_name),
            false => self.read(&format!("${number}::pg_catalog.text")),
        }
    }

    /// An expression of type text as such a value. A cast might be anybody's.
    pub fn read(&self, text: &str) -> String {
        let type_name = &self.type_name;
        if self.plain {
            format!("{text}::{type_name}")
        } else if type_name.ends_with("[]") {
            format!("terrace.read_array({text}, NULL::{type_name})")
        } else {
            format!("terrace.read_value({text}, NULL::{type_name}[])")
        }
    }
}

/// Who may leave a row of a table as it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Keeper {
    Nobody,
    /// BEFORE, for each row.
    Triggers,
    Rules,
}

/// What a table is on this server.
type Here = (
    [Option<String>; 2],
    [bool; 2],
    Keeper,
    Vec<Option<LocalColumn>>,
    Option<Arc<Shape>>,
);

/// A table, as the stream describes it and as it is here.
pub(super) struct Relation {
    /// Its Relation message.
    pub definition: Bytes,
    pub namespace: String,
    pub name: String,
    /// Where its rows are here, if it is a partition at the top and none here.
    pub place: Option<String>,
    pub columns: Vec<Column>,
    pub looked_up: bool,
    /// Of the table here, once looked up.
    pub oid: String,
    pub routed: bool,
    /// Columns of the primary key here.
    pub primaries: usize,
    /// Rows of tables that inherit from it are not its own.
    pub only: bool,
    /// `pg_class.relreplident` at the top.
    pub identity: u8,
    /// Where it is known who wrote a row last: after the transaction of this number that may have been
    /// a session of this server.
    pub local_since: Option<String>,
    /// An ordinary table here, for whose rows nothing else is done.
    pub plain: bool,
    /// What here may keep a row from being changed, as far as is known.
    pub keeper: Keeper,
    /// How to change it set-wise; known once looked up.
    pub shape: Option<Arc<Shape>>,
}

impl Relation {
    /// The table here.
    pub fn qualified(&self) -> String {
        let own = || quote_table(&self.namespace, &self.name);
        self.place.clone().unwrap_or_else(own)
    }

    /// For statements that would touch inheriting tables as well.
    pub fn rows(&self) -> String {
        let only = if self.only { "ONLY " } else { "" };
        format!("{only}{}", self.qualified())
    }

    /// Its name at the top, for people.
    pub fn table(&self) -> String {
        format!("{}.{}", self.namespace, self.name)
    }

    /// SQL: the row was not written by a session of this server; if that is known, and rows are told
    /// by a key.
    pub fn is_from_above(&self, kind: OldKind) -> Option<String> {
        let told = kind != OldKind::Full || self.has_primary();
        let since = self.local_since.as_deref().filter(|_| told);
        since.map(|since| is_from_above(since, ""))
    }

    /// The primary key here is in the stream, with all its columns.
    pub fn has_primary(&self) -> bool {
        let told = self.columns.iter().filter(|column| column.is_primary());
        self.primaries > 0 && told.count() == self.primaries
    }

    /// The primary key here has all columns of the replica identity at the top: two rows of the top's
    /// cannot both have it. Of a row that is told whole it is not said what its key is.
    pub fn primary_is_the_tops(&self) -> bool {
        let mut keys = self.columns.iter().filter(|column| column.key).peekable();
        self.identity != b'f' && keys.peek().is_some() && keys.all(Column::is_primary)
    }

    pub fn writable(&self) -> impl Iterator<Item = (usize, &Column)> {
        self.columns
            .iter()
            .enumerate()
            .filter(|(_, c)| c.local.as_ref().is_some_and(|local| !local.generated))
    }

    /// Its changes may go before or after those of other tables: nothing that is run for each of its
    /// rows looks at any. (A CHECK that does so may refuse it then, and a default of a column of this
    /// server alone is nothing of the top's.) Who holds the rows of a partition of the top holds those of
    /// others as well.
    pub fn stands_alone(&self) -> bool {
        self.plain && self.place.is_none()
    }

    /// A row that a change did nothing to may be there all the same. Of a partition's triggers nobody tells.
    pub fn may_keep_rows(&self) -> bool {
        self.keeper != Keeper::Nobody || !self.only
    }

    /// What the table is here.
    pub fn here(&self) -> Here {
        let columns = self.columns.iter().map(|column| column.local.clone());
        let columns = columns.collect();
        let whole = [self.only, self.plain];
        let place = [self.place.clone(), Some(self.oid.clone())];
        (place, whole, self.keeper, columns, self.shape.clone())
    }

    /// Reads what the table looks like here, and has the session told when that changes.
    pub async fn look_up(&mut self, client: &mut Client) -> anyhow::Result<()> {
        self.place = other_place(client, &self.namespace, &self.name).await?;
        let watch = "SELECT terrace.watch(pg_catalog.to_regclass($1))";
        let watched = client.query(watch, &[Some(&self.qualified())]).await?;
        let watched = watched.into_iter().next().and_then(|mut row| row.pop()?);
        self.oid = watched.unwrap_or_default();
        let sql = format!(
            "SELECT a.attname, a.attgenerated <> '', \
                 EXISTS (SELECT FROM pg_index i WHERE i.indrelid = a.attrelid AND i.indisprimary AND i.indimmediate \
                         AND a.attnum = ANY ({KEY})), \
                 {EQUALITY}, \
                 pg_catalog.format_type(a.atttypid, -1), \
                 k.relkind = 'r' AND NOT k.relhasrules AND NOT EXISTS \
                     (SELECT FROM pg_trigger g WHERE g.tgrelid = k.oid AND g.tgenabled IN ('R', 'A')), \
                 a.attidentity = 'a', \
                 k.relkind = 'r', \
                 (t.typtype = 'e' OR t.oid IN ('bool'::regtype, 'int2'::regtype, 'int4'::regtype, \
                      'int8'::regtype, 'oid'::regtype, 'text'::regtype, 'varchar'::regtype, 'name'::regtype, \
                      'bytea'::regtype, 'uuid'::regtype, 'date'::regtype, 'time'::regtype, \
                      'timestamp'::regtype, 'timestamptz'::regtype)) \
                   AND NOT EXISTS (SELECT FROM pg_collation l \
                      WHERE l.oid = a.attcollation AND NOT l.collisdeterministic), \
                 t.typnamespace = 'pg_catalog'::regnamespace AND t.typtype IN ('b', 'r', 'm') AND t.oid <> {CAST}, \
                 pg_catalog.format_type(b.oid, -1), \
                 b.typnamespace = 'pg_catalog'::regnamespace AND b.typtype IN ('b', 'r', 'm') AND b.oid <> {CAST}, \
                 k.relkind, \
                 (SELECT CASE WHEN age(k.xmin) < age(first) THEN k.xmin::text ELSE first::text END \
                  FROM terrace.progress p, pg_snapshot_xmax(pg_current_snapshot()) next, \
                       greatest(p.copied::text::numeric, \
                                next::text::numeric - 1000000000 - mod(next::text::numeric, 100000000)) since, \
                       CAST(mod(since, 4294967296)::text AS xid) first \
                  WHERE current_setting('track_commit_timestamp') = 'on'), \
                 EXISTS (SELECT FROM pg_index i WHERE i.indrelid = k.oid \
                         AND (i.indisunique OR i.indisexclusion) AND NOT (i.indisprimary AND i.indimmediate)), \
                 k.relhasrules, \
                 EXISTS (SELECT FROM pg_trigger g \
                     WHERE g.tgenabled IN ('R', 'A') AND (g.tgtype & {BEFORE_ROW}) = {BEFORE_ROW} \
                       AND (g.tgrelid = k.oid OR k.relkind = 'p' \
                            AND k.oid IN (SELECT relid FROM pg_partition_ancestors(g.tgrelid)))) \
             FROM pg_class k \
             LEFT JOIN (pg_attribute a JOIN pg_type t ON t.oid = a.atttypid \
                        JOIN pg_type b ON b.oid = {base} \
                        JOIN pg_type x ON x.oid = CASE WHEN b.typcategory = 'A' AND b.typelem <> 0 THEN b.typelem \
                                                       ELSE b.oid END \
                        JOIN pg_type y ON y.oid = {base_of_x}) \
               ON a.attrelid = k.oid AND a.attnum > 0 AND NOT a.attisdropped \
             WHERE k.oid = pg_catalog.to_regclass($1)",
            base = below_domains("t"),
            base_of_x = below_domains("x")
        );
        let rows = client.query(&sql, &[Some(&self.qualified())]).await?;
        if rows.is_empty() {
            bail!(
                "table \"{}\" does not exist on this server; create it here with the columns that \
                 it has at the top",
                self.table()
            );
        }
        if rows
            .iter()
            .any(|row| !matches!(row[12].as_deref(), Some("r" | "p")))
        {
            bail!(
                "\"{}\" is no table on this server; put a table back in its place",
                self.table()
            );
        }
        // Such a column can be written to by DEFAULT alone, and here it is the top's
        // value that counts.
        for row in rows.iter().filter(|row| row[6].as_deref() == Some("t")) {
            let column = quote_ident(row[0].as_deref().unwrap_or_default());
            // From 17 on it is the whole's, of which a partition can have no other.
            let whole = "SELECT CASE WHEN current_setting('server_version_num')::int >= 170000 \
                              THEN coalesce(pg_catalog.pg_partition_root(own), own) ELSE own END::text \
                         FROM pg_catalog.to_regclass($1) own";
            let whole = client.query(whole, &[Some(&self.qualified())]).await?;
            let whole = whole.into_iter().next().and_then(|mut row| row.pop()?);
            let table = whole.unwrap_or_else(|| self.qualified());
            tracing::info!(%table, %column, "identity becomes BY DEFAULT on this server");
            let sql = format!("ALTER TABLE {table} ALTER COLUMN {column} SET GENERATED BY DEFAULT");
            client
                .simple(&sql)
                .await
                .context("make the identity column writable")?;
        }
        let since = rows.first().and_then(|row| row[13].clone());
        self.local_since = since.filter(|_| self.namespace != "terrace");
        self.only = rows.iter().all(|row| row[7].as_deref() == Some("t"));
        let is_constrained = rows.iter().any(|row| row[14].as_deref() == Some("t"));
        self.plain = rows.iter().all(|row| row[5].as_deref() == Some("t"));
        let any = |index: usize| rows.iter().any(|row| row[index].as_deref() == Some("t"));
        self.keeper = match (any(15), any(16)) {
            (true, _) => Keeper::Rules,
            (_, true) => Keeper::Triggers,
            _ => Keeper::Nobody,
        };
        let locals: HashMap<String, LocalColumn> = rows
            .into_iter()
            .filter_map(|row| {
                let is = |index: usize| row[index].as_deref() == Some("t");
                let base = row[10].clone().filter(|_| row[10] != row[4]);
                let operator = row[3].clone();
                let local = LocalColumn {
                    generated: is(1),
                    primary: is(2),
                    equality: operator.map(|operator| Equality { operator, base }),
                    exact: is(8),
                    input: Input {
                        type_name: row[4].clone().unwrap_or_default(),
                        plain: is(9),
                    },
                    compared: Input {
                        type_name: row[10].clone().unwrap_or_default(),
                        plain: is(11),
                    },
                };
                Some((row[0].clone()?, local))
            })
            .collect();
        self.primaries = locals.values().filter(|local| local.primary).count();
        let table = self.table();
        for column in &mut self.columns {
            column.local = locals.get(&column.name).cloned();
            if column.local.is_none() {
                bail!(
                    "table \"{table}\" has no column \"{}\" on this server",
                    column.name
                );
            }
        }
        if let Some(place) = &self.place
            && self.identity != b'f'
        {
            let keys = self.columns.iter().filter(|column| column.key);
            let keys: Vec<&str> = keys.map(|column| column.name.as_str()).collect();
            if !keys.is_empty() {
                must_tell_rows_apart(client, place, &keys, &table).await?;
            }
        }
        self.looked_up = true;
        let shape = self.plain.then(|| shape(self, &locals, is_constrained));
        self.shape = shape.flatten().map(Arc::new);
        Ok(())
    }
}

/// Only a table with the same primary key here and at the top can be changed row by row in any
/// order; one without any can be added to.
fn shape(
    relation: &Relation,
    locals: &HashMap<String, LocalColumn>,
    is_constrained: bool,
) -> Option<Shape> {
    let (mut columns, mut keys) = (Vec::new(), Vec::new());
    for (index, column) in relation.columns.iter().enumerate() {
        let local = column.local.as_ref()?;
        // With REPLICA IDENTITY FULL every column is key at the top.
        let key = column.key && relation.identity != b'f';
        if key != local.primary || key && (local.generated || local.equality.is_none()) {
            return None;
        }
        keys.extend(key.then_some(index));
        columns.push(ShapeColumn {
            name: quote_ident(&column.name),
            input: match key {
                true => local.compared.clone(),
                false => local.input.clone(),
            },
            generated: local.generated,
            equality: local.equality.clone().filter(|_| key),
        });
    }
    let is_written = columns.iter().any(|column| !column.generated);
    // A key column that is not replicated is not in the list.
    let writable = locals.values().filter(|local| !local.generated).count();
    (is_written && keys.len() == relation.primaries).then(|| Shape {
        table: relation.qualified(),
        oid: relation.oid.clone(),
        local_since: relation.local_since.clone(),
        is_constrained,
        whole: columns.iter().filter(|column| !column.generated).count() == writable,
        columns,
        keys,
    })
}

/// SQL: a row of `table.`, or of the only one, was not written by a session of this server after its
/// initial copy, and after the table was altered here, which writes all rows; nobody knows who wrote
/// what is frozen.
pub(super) fn is_from_above(since: &str, table: &str) -> String {
    format!(
        "((pg_catalog.pg_xact_commit_timestamp_origin({table}xmin)).roident IS DISTINCT FROM 0 \
          OR pg_catalog.age({table}xmin) >= pg_catalog.age('{since}'::pg_catalog.xid))"
    )
}

/// SQL: the operator of the default order of type `y`, which is `b` or that of its elements. One that is
/// not PostgreSQL's own is run with the rights of the bridge: none that anybody but a superuser can make.
const EQUALITY: &str = "(SELECT CASE WHEN x.oid <> b.oid OR n.nspname = 'pg_catalog' THEN '=' \
                                ELSE pg_catalog.format('OPERATOR(%I.%s)', n.nspname, p.oprname) END \
     FROM pg_opclass o JOIN pg_am m ON m.oid = o.opcmethod \
     JOIN pg_amop s ON s.amopfamily = o.opcfamily AND s.amopstrategy = 3 \
                       AND s.amoplefttype = o.opcintype AND s.amoprighttype = o.opcintype \
     JOIN pg_operator p ON p.oid = s.amopopr JOIN pg_namespace n ON n.oid = p.oprnamespace \
     JOIN pg_proc f ON f.oid = p.oprcode JOIN pg_language l ON l.oid = f.prolang \
     WHERE m.amname = 'btree' AND o.opcdefault AND l.lanname IN ('internal', 'c') AND o.opcintype = \
         CASE WHEN y.typtype = 'e' THEN 'anyenum'::regtype \
              WHEN y.oid = 'varchar'::regtype THEN 'text'::regtype \
              WHEN y.oid = 'cidr'::regtype THEN 'inet'::regtype \
              WHEN y.typtype = 'r' AND y.typnamespace = 'pg_catalog'::regnamespace THEN 'anyrange'::regtype \
              WHEN y.typtype = 'm' AND y.typnamespace = 'pg_catalog'::regnamespace THEN 'anymultirange'::regtype \
              ELSE y.oid END)";

/// SQL: the type that `of` is when it is no domain any more.
fn below_domains(of: &str) -> String {
    format!(
        "CASE {of}.typtype WHEN 'd' THEN \
           (WITH RECURSIVE d AS (SELECT {of}.oid, {of}.typbasetype \
              UNION ALL SELECT n.oid, n.typbasetype FROM d, LATERAL \
                  (SELECT oid, typbasetype FROM pg_type WHERE oid = d.typbasetype OFFSET 0) n) \
            SELECT oid FROM d WHERE typbasetype = 0) \
         ELSE {of}.oid END"
    )
}

/// `pg_trigger.tgtype` of those that may leave a row as it is (`catalog/pg_trigger.h`).
const BEFORE_ROW: u8 = 1 | 2;

/// SQL: the one type of PostgreSQL's own that a cast reads in another way than its input function:
/// '-', no table at all, is none to it.
const CAST: &str = "'regclass'::regtype";

/// The table here that holds the rows of a partition of the top, if that is not one of its name.
pub async fn other_place(
    client: &mut Client,
    namespace: &str,
    name: &str,
) -> anyhow::Result<Option<String>> {
    let sql = "SELECT place FROM terrace.place_of($1, $2) place \
               WHERE place <> pg_catalog.format('%I.%I', $1, $2)";
    let rows = client
        .query(sql, &[Some(namespace), Some(name)])
        .await
        .context("look for the table that holds the rows of a partition")?;
    Ok(rows
        .into_iter()
        .next()
        .and_then(|row| row.into_iter().next()?))
}

/// SQL: the index `i` holds all rows apart.
pub(super) const IS_UNIQUE: &str = "i.indisunique AND i.indisvalid AND i.indpred IS NULL \
     AND i.indexprs IS NULL";

/// SQL: numbers of its columns, but for those that it only carries.
pub(super) const KEY: &str = "(i.indkey::int2[])[0:i.indnkeyatts - 1]";

/// A key of a partition alone may be that of several rows of the whole.
async fn must_tell_rows_apart(
    client: &mut Client,
    place: &str,
    keys: &[&str],
    table: &str,
) -> anyhow::Result<()> {
    let sql = format!(
        "SELECT 1 FROM pg_catalog.pg_index i \
         WHERE i.indrelid = pg_catalog.to_regclass($1) AND {IS_UNIQUE} \
           AND NOT EXISTS (SELECT FROM pg_catalog.pg_attribute a WHERE a.attrelid = i.indrelid \
               AND a.attnum = ANY ({KEY}) \
               AND a.attname NOT IN (SELECT pg_catalog.json_array_elements_text($2::json)))"
    );
    let listed = serde_json::to_string(keys)?;
    let unique = client.query(&sql, &[Some(place), Some(&listed)]).await?;
    if unique.is_empty() {
        bail!(
            "rows of partition \"{table}\" go to {place} here, which has no unique index on the key that it \
             has at the top, ({}); make one",
            keys.join(", ")
        );
    }
    Ok(())
}
