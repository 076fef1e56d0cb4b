//! Random tables with random histories, applied set-wise on one server and in order on
//! another: both must come to hold what the top holds.
//!
//! A history is what happens to one table, or to two by turns. The bridges are stopped meanwhile, so that it
//! piles up; a statement that goes alone ends each pile, so that each history is folded by
//! itself or not at all; every third one is a single transaction, which is folded in parts.
//! The server that applies in order has a trigger on each table,
//! enabled for replicas, which says no to folding. Below, tables may have their columns in
//! another order and one more.

use std::fmt::Write;

use postgres::Client;

use crate::random::Random;
use crate::{Server, Tree, wait_until};

/// So few keys that each row lives through much.
const KEYS: usize = 10;
/// A tree carries so many histories, then another one is grown.
pub const TREE: u64 = 200;
/// Transactions of a history: always enough to be worth folding.
const TRANSACTIONS: (usize, usize) = (30, 80);

/// Around a step of a history that is a single transaction.
const IN_BEGIN: &str = "SAVEPOINT step; SET CONSTRAINTS ALL DEFERRED;";
const IN_END: &str = "SET CONSTRAINTS ALL IMMEDIATE; RELEASE step";

const TYPES: &str = "
    CREATE EXTENSION IF NOT EXISTS btree_gist;
    CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
    CREATE DOMAIN short AS varchar(7);
    CREATE TYPE pair AS (a int, b text);
    CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
    CREATE TABLE said (n bigint GENERATED ALWAYS AS IDENTITY, name text, what text, old jsonb, new jsonb);
    CREATE FUNCTION says() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO public.said (name, what, old, new)
        VALUES (TG_ARGV[0], TG_OP, to_jsonb(OLD) - 'local', to_jsonb(NEW) - 'local');
        RETURN NULL;
    END $$;";

/// A column that is no key, by the name of its type, and values of it: `$` stands for a number.
const COLUMNS: [(&str, &[&str]); 17] = [
    ("int", &["$", "-$", "$ % 3"]),
    (
        "text",
        &[
            "'it''s {\"$\\}'",
            "''",
            "E'a\\tb\\nc\\\\$'",
            "'\\N'",
            "repeat(md5('$'), 20)",
        ],
    ),
    ("numeric(12,3)", &["$.5", "'NaN'", "-$.125"]),
    ("numeric", &["$::numeric ^ 20", "'Infinity'"]),
    ("float8", &["$ / 3.0", "'NaN'", "'-infinity'", "-0.0"]),
    (
        "timestamptz",
        &[
            "'2026-03-29 00:00Z'::timestamptz + $ * interval '1 s'",
            "'infinity'",
        ],
    ),
    (
        "date",
        &["'2000-01-01'::date + $ % 9999", "'4713-01-01 BC'"],
    ),
    ("interval", &["$ * interval '1 mon 3 s'"]),
    ("jsonb", &["'{\"v\": $, \"n\": null}'", "'null'"]),
    ("int[]", &["'{$, NULL}'", "'{}'", "'[3:4]={1,$}'"]),
    ("text[]", &["ARRAY['NULL', NULL, '\"$\"', '{}', E'\\\\']"]),
    ("bytea", &["decode(md5('$'), 'hex')", "''"]),
    ("mood", &["'happy'", "'sad'"]),
    ("short", &["'$'::text::varchar(7)"]),
    ("pair", &["ROW($, 'a,\"b')::pair"]),
    ("bpchar(9)", &["'$'::text::bpchar(9)"]),
    // Stored out of line, and mostly not sent when something else is changed.
    (
        "varchar",
        &["(SELECT string_agg(md5($::text || g), '') FROM generate_series(1, 90) g)"],
    ),
];

#[derive(Clone, Copy, PartialEq)]
enum Key {
    Int,
    Pair,
    Uuid,
    Text,
    /// Equal keys are written in two ways.
    Numeric,
    /// A key that may be violated for a while, which tells no rows apart.
    Deferred,
    /// Identified by an index that is no primary key.
    Index,
    /// A primary key, and REPLICA IDENTITY FULL.
    Full,
    None,
}

/// What stands in the way of writing rows in any order.
#[derive(Clone, Copy, PartialEq)]
enum Obstacle {
    Nothing,
    Unique,
    Deferred,
    Partial,
    Exclusion,
    DeferredExclusion,
}

/// A random table.
struct Table {
    name: String,
    key: Key,
    obstacle: Obstacle,
    generated: bool,
    identity: bool,
    partitioned: bool,
    /// Below, a trigger that is enabled for replicas says what it sees.
    says: bool,
    /// Indexes into [`COLUMNS`]; they are called `c0`, `c1` and so on.
    columns: Vec<usize>,
}

impl Table {
    fn random(random: &mut Random, name: String) -> Table {
        let keys = [
            Key::Int,
            Key::Int,
            Key::Pair,
            Key::Pair,
            Key::Uuid,
            Key::Text,
            Key::Text,
            Key::Numeric,
            Key::Index,
            Key::Deferred,
            Key::Full,
            Key::None,
        ];
        let obstacles = [
            Obstacle::Unique,
            Obstacle::Deferred,
            Obstacle::Partial,
            Obstacle::Exclusion,
            Obstacle::DeferredExclusion,
        ];
        let key = *random.of(&keys);
        let obstacle = match random.one_in(4) {
            true => *random.of(&obstacles),
            false => Obstacle::Nothing,
        };
        let count = 1 + random.below(4);
        Table {
            name,
            key,
            obstacle,
            generated: random.one_in(4),
            identity: random.one_in(6),
            // A unique constraint would need the key in it.
            partitioned: obstacle == Obstacle::Nothing
                && !matches!(key, Key::None | Key::Deferred)
                && random.one_in(6),
            says: random.one_in(12),
            columns: (0..count).map(|_| random.below(COLUMNS.len())).collect(),
        }
    }

    fn key_columns(&self) -> &'static str {
        match self.key {
            Key::Pair => "k, l",
            _ => "k",
        }
    }

    /// An expression for the key number `n`.
    fn key_value(&self, n: usize) -> String {
        match self.key {
            Key::Int | Key::Index | Key::Deferred | Key::Full | Key::None => n.to_string(),
            Key::Pair => format!("'k{}', {}", n % 3, n / 3),
            Key::Uuid => format!("md5('{n}')::uuid"),
            Key::Numeric if n.is_multiple_of(2) => format!("{}.0", n / 2),
            Key::Numeric => format!("{}.00", n / 2),
            Key::Text => format!("E'it''s \\\\ \"{n}'"),
        }
    }

    fn is_key(&self, n: usize) -> String {
        format!("({}) = ({})", self.key_columns(), self.key_value(n))
    }

    /// What it is made by; below it may look a little different.
    fn create(&self, random: Option<&mut Random>) -> String {
        let name = &self.name;
        let mut parts: Vec<String> = match self.key {
            Key::Pair => vec!["k varchar(9) NOT NULL".into(), "l bigint NOT NULL".into()],
            Key::Uuid => vec!["k uuid NOT NULL".into()],
            Key::Text => vec!["k text NOT NULL".into()],
            Key::Numeric => vec!["k numeric NOT NULL".into()],
            Key::None => vec!["k int".into()],
            Key::Int | Key::Index | Key::Deferred | Key::Full => vec!["k int NOT NULL".into()],
        };
        for (index, column) in self.columns.iter().enumerate() {
            parts.push(format!("c{index} {}", COLUMNS[*column].0));
        }
        parts.push("u int".into());
        if self.generated {
            parts.push("g int GENERATED ALWAYS AS (u * 2) STORED".into());
        }
        if self.identity {
            parts.push("n int GENERATED ALWAYS AS IDENTITY".into());
        }
        if let Some(random) = random {
            for at in (1..parts.len()).rev() {
                parts.swap(at, random.below(at + 1));
            }
            if random.one_in(3) {
                parts.insert(
                    random.below(parts.len()),
                    "local text DEFAULT 'here'".into(),
                );
            }
        }
        if !matches!(self.key, Key::Index | Key::None) {
            let deferred = match self.key {
                Key::Deferred => " DEFERRABLE INITIALLY DEFERRED",
                _ => "",
            };
            parts.push(format!("PRIMARY KEY ({}){deferred}", self.key_columns()));
        }
        parts.extend(match self.obstacle {
            Obstacle::Unique => Some("UNIQUE (u)".to_owned()),
            Obstacle::Deferred => Some("UNIQUE (u) DEFERRABLE INITIALLY DEFERRED".to_owned()),
            Obstacle::Exclusion => Some("EXCLUDE USING gist (u WITH =)".to_owned()),
            Obstacle::DeferredExclusion => {
                Some("EXCLUDE USING gist (u WITH =) DEFERRABLE INITIALLY DEFERRED".to_owned())
            }
            Obstacle::Nothing | Obstacle::Partial => None,
        });
        let by = match self.partitioned {
            true => " PARTITION BY HASH (k)",
            false => "",
        };
        let mut sql = format!("CREATE TABLE {name} ({}){by};", parts.join(", "));
        if self.partitioned {
            for rest in 0..2 {
                let _ = write!(
                    sql,
                    "CREATE TABLE {name}_{rest} PARTITION OF {name} FOR VALUES WITH (MODULUS 2, REMAINDER {rest});"
                );
            }
        }
        if self.obstacle == Obstacle::Partial {
            let _ = write!(sql, "CREATE UNIQUE INDEX ON {name} (u) WHERE u % 2 = 0;");
        }
        match self.key {
            Key::Index => {
                let _ = write!(
                    sql,
                    "CREATE UNIQUE INDEX {name}_key ON {name} (k); \
                     ALTER TABLE {name} REPLICA IDENTITY USING INDEX {name}_key;"
                );
            }
            Key::Full => sql += &format!("ALTER TABLE {name} REPLICA IDENTITY FULL;"),
            _ => {}
        }
        for (index, column) in self.columns.iter().enumerate() {
            if COLUMNS[*column].0 == "varchar" {
                let _ = write!(
                    sql,
                    "ALTER TABLE {name} ALTER c{index} SET STORAGE EXTERNAL;"
                );
            }
        }
        sql
    }

    fn value(&self, random: &mut Random, column: usize) -> String {
        let number = random.below(1_000_000).to_string();
        match random.one_in(6) {
            true => "NULL".into(),
            false => random
                .of(COLUMNS[self.columns[column]].1)
                .replace('$', &number),
        }
    }

    fn row(&self, random: &mut Random, key: usize) -> String {
        let mut row = self.key_value(key);
        for column in 0..self.columns.len() {
            let _ = write!(row, ", {}", self.value(random, column));
        }
        let _ = write!(row, ", {}", random.below(30));
        row
    }

    /// Names of what a row gives, in its order.
    fn written(&self) -> String {
        let columns = (0..self.columns.len()).map(|index| format!("c{index}, "));
        format!("{}, {}u", self.key_columns(), columns.collect::<String>())
    }

    /// Names of all that is compared.
    fn compared(&self) -> String {
        let mut names = self.written();
        for (there, name) in [(self.generated, ", g"), (self.identity, ", n")] {
            if there {
                names += name;
            }
        }
        names
    }

    /// PostgreSQL takes no constraint that may be violated for a while for a conflict.
    fn is_deferred(&self) -> bool {
        self.key == Key::Deferred
            || matches!(
                self.obstacle,
                Obstacle::Deferred | Obstacle::DeferredExclusion
            )
    }

    fn statement(&self, random: &mut Random) -> String {
        let name = &self.name;
        let (key, other) = (random.below(KEYS), random.below(KEYS));
        let (is_key, is_other) = (self.is_key(key), self.is_key(other));
        let column = random.below(self.columns.len());
        let value = self.value(random, column);
        let written = self.written();
        match random.below(16) {
            0..=2 => {
                let on_conflict = match (self.key, random.below(3)) {
                    _ if self.is_deferred() => String::new(),
                    (Key::None, _) => String::new(),
                    (_, 0) => " ON CONFLICT DO NOTHING".to_owned(),
                    (..) => format!(
                        " ON CONFLICT ({}) DO UPDATE SET c{column} = EXCLUDED.c{column}, u = EXCLUDED.u",
                        self.key_columns()
                    ),
                };
                let row = self.row(random, key);
                format!("INSERT INTO {name} ({written}) VALUES ({row}){on_conflict}")
            }
            3 => {
                let last = key + 1 + random.below(KEYS - key);
                let rows: Vec<String> = (key..last)
                    .map(|key| format!("({})", self.row(random, key)))
                    .collect();
                let (rows, target) = (rows.join(", "), " ON CONFLICT DO NOTHING");
                let target = if self.is_deferred() { "" } else { target };
                format!("INSERT INTO {name} ({written}) VALUES {rows}{target}")
            }
            4 | 5 => format!("UPDATE {name} SET c{column} = {value} WHERE {is_key}"),
            6 => format!("UPDATE {name} SET u = u + 1 WHERE {is_key} OR {is_other}"),
            7 => format!("UPDATE {name} SET c{column} = {value}"),
            8 => format!("DELETE FROM {name} WHERE {is_key}"),
            9 => format!("DELETE FROM {name} WHERE u % 5 = {}", key % 5),
            // The key itself, to where there may be a row or not.
            10 | 11 => format!(
                "UPDATE {name} SET ({}) = ROW({}) WHERE {is_other}",
                self.key_columns(),
                self.key_value(key)
            ),
            // What is unique goes round; possible only when that is looked at late.
            12 => format!("UPDATE {name} SET u = 29 - u"),
            13 => format!(
                "DELETE FROM {name} WHERE {is_key}; INSERT INTO {name} ({written}) VALUES ({})",
                self.row(random, key)
            ),
            14 => format!(
                "DELETE FROM {name} WHERE ctid IN (SELECT ctid FROM {name} ORDER BY ctid LIMIT 1) AND {is_key}"
            ),
            _ if random.one_in(100) => format!("TRUNCATE {name}"),
            _ => format!(
                "SAVEPOINT s; UPDATE {name} SET c{column} = {value}; DELETE FROM {name} WHERE {is_other}; \
                 ROLLBACK TO s; UPDATE {name} SET u = {} WHERE {is_key}",
                random.below(30)
            ),
        }
    }

    fn digest(&self) -> String {
        format!(
            "SELECT count(*) || ' ' || coalesce(md5(string_agg(t, E'\\n' ORDER BY t COLLATE \"C\")), '') \
             FROM (SELECT ROW({})::text t FROM {}) r",
            self.compared(),
            self.name
        )
    }
}

/// The history of one or two tables.
struct History {
    seed: u64,
    tables: Vec<Table>,
    /// Those that were committed, or the steps of a single one.
    transactions: Vec<String>,
}

impl History {
    fn of(seed: u64) -> (History, Random) {
        let mut random = Random::new(seed);
        let names = (0..1 + random.below(2)).map(|number| format!("h{seed}_{number}"));
        let names: Vec<String> = names.collect();
        let tables = names
            .into_iter()
            .map(|name| Table::random(&mut random, name));
        let tables = tables.collect();
        let transactions = Vec::new();
        let history = History {
            seed,
            tables,
            transactions,
        };
        (history, random)
    }

    /// All of it is a single transaction.
    fn is_at_once(&self) -> bool {
        self.seed.is_multiple_of(3)
    }

    fn live(&mut self, top: &mut Client, random: &mut Random) {
        let at_once = self.is_at_once();
        let (begin, end, back) = match at_once {
            true => (IN_BEGIN, IN_END, "ROLLBACK TO step"),
            false => ("BEGIN;", "COMMIT", "ROLLBACK"),
        };
        let mut run = |sql: String, back: &str| match top.batch_execute(&sql) {
            Ok(()) => self.transactions.push(sql),
            // A constraint may refuse some: then they are no history.
            Err(_) => top.batch_execute(back).expect("rollback"),
        };
        if at_once {
            run("BEGIN".into(), "");
        }
        // A table that is seen for the first time ends a pile.
        let first = self.tables.iter().map(|table| {
            let (written, row) = (table.written(), table.row(random, 0));
            format!("INSERT INTO {} ({written}) VALUES ({row});", table.name)
        });
        run(format!("{begin}{}{end}", first.collect::<String>()), back);
        let (few, many) = TRANSACTIONS;
        let steps = few + random.below(many - few);
        for _ in 0..if at_once { 3 * steps } else { steps } {
            let mut sql = String::from(begin);
            for _ in 0..=random.below(4) {
                let table = &self.tables[random.below(self.tables.len())];
                sql += &table.statement(random);
                sql.push(';');
            }
            if at_once && random.one_in(30) {
                // It is described anew, which ends a part.
                let fill = 50 + random.below(50);
                let _ = write!(
                    sql,
                    "ALTER TABLE {} SET (fillfactor = {fill});",
                    self.tables[0].name
                );
            }
            sql += end;
            run(sql, back);
        }
        if at_once {
            run("COMMIT".into(), "");
        }
    }

    /// Ends the pile.
    fn end(&self, top: &mut Client) {
        let name = &self.tables[0].name;
        let sql = format!("SELECT terrace.replicate_ddl('COMMENT ON TABLE {name} IS ''done''')");
        top.batch_execute(&sql).expect("end a history");
    }

    fn must_be_everywhere(&self, tree: &Tree) {
        let [one, other] = [0, 1].map(|node| &tree.nodes[node].server);
        for table in &self.tables {
            let digest = table.digest();
            let wanted = tree.top.value(&digest);
            for server in [one, other] {
                self.must_be(server, server.value(&digest), &wanted);
            }
        }
        // In one order, whichever table it was.
        let said = format!(
            "SELECT count(*) || ' ' || coalesce(md5(string_agg(concat(name, what, old, new), E'\\n' ORDER BY n)), '') \
             FROM said WHERE name LIKE 'h{}\\_%'",
            self.seed
        );
        self.must_be(one, one.value(&said), &other.value(&said));
    }

    fn must_be(&self, server: &Server, found: String, wanted: &str) {
        assert_eq!(
            found,
            wanted,
            "{} after history {}:\n{}\n{}",
            server.name,
            self.seed,
            self.tables
                .iter()
                .map(|table| table.create(None))
                .collect::<String>(),
            self.transactions.join("\n")
        );
    }
}

/// What was tried.
#[derive(Default)]
pub struct Tried {
    /// Transactions at the top, but for those that are a whole history.
    pub transactions: usize,
    /// Of them those that were folded.
    pub folded: usize,
    /// Parts of larger ones that were folded.
    pub parts: usize,
}

/// Runs so many histories, from `seed` on, on a tree of their own; panics, with the history,
/// where a server comes to hold something else than the top.
pub fn run(seed: u64, count: u64) -> Tried {
    let mut tree = Tree::plant(TYPES).expect("boot the top");
    tree.boot(&[("folding", None, 1), ("in_order", None, 1)])
        .expect("boot the servers");
    tree.start_bridges().expect("start the bridges");
    tree.wait_streaming();
    tree.nodes.iter_mut().for_each(|node| {
        node.bridge.stop();
    });
    let mut histories: Vec<(History, Random)> = (seed..seed + count).map(History::of).collect();
    make_tables(&tree, &mut histories);
    let mut top = tree.top.connect();
    for (history, random) in &mut histories {
        history.live(&mut top, random);
        history.end(&mut top);
    }
    tree.start_bridges_on_a_pile();
    tree.wait_streaming();
    let end = tree.top.value("SELECT pg_current_wal_insert_lsn()");
    let behind =
        format!("SELECT count(*) FROM terrace.lag WHERE level > 0 AND replay_lsn < '{end}'");
    wait_until("all is applied", || tree.top.value(&behind) == "0");
    let mut tried = Tried::default();
    for (history, _) in &histories {
        history.must_be_everywhere(&tree);
        if !history.is_at_once() {
            tried.transactions += history.transactions.len();
        }
    }
    let [folding, in_order] = &tree.nodes[..] else {
        panic!("two servers");
    };
    let (log, other) = (folding.bridge.logged(), in_order.bridge.logged());
    (tried.folded, tried.parts) = (folded(&log), log.matches(PART).count());
    assert_eq!(
        folded(&other) + other.matches(PART).count(),
        0,
        "one goes in order"
    );
    tried
}

/// What a bridge's log says of a part that was folded.
const PART: &str = "went set-wise";

/// Transactions that a bridge's log says were applied set-wise.
pub fn folded(log: &str) -> usize {
    let piles = log.split("applied set-wise transactions=").skip(1);
    let counts = piles.map(|rest| {
        rest.split_whitespace()
            .next()
            .and_then(|n| n.parse::<usize>().ok())
    });
    counts.map(|count| count.expect("a number")).sum()
}

fn make_tables(tree: &Tree, histories: &mut [(History, Random)]) {
    let mut everywhere = String::new();
    let mut below: Vec<String> = tree.nodes.iter().map(|_| TYPES.to_owned()).collect();
    let mut names = Vec::new();
    for (history, random) in histories {
        for table in &history.tables {
            everywhere += &table.create(None);
            for (node, sql) in tree.nodes.iter().zip(&mut below) {
                *sql += &table.create(random.one_in(2).then_some(&mut *random));
                if table.says {
                    let name = &table.name;
                    let _ = write!(
                        sql,
                        "CREATE TRIGGER says AFTER INSERT OR UPDATE OR DELETE ON {name} FOR EACH ROW \
                     EXECUTE FUNCTION says('{name}'); ALTER TABLE {name} ENABLE ALWAYS TRIGGER says;"
                    );
                }
                if node.server.name.starts_with("in_order") {
                    let name = &table.name;
                    let _ = write!(
                        sql,
                        "CREATE TRIGGER nothing BEFORE INSERT OR UPDATE ON {name} FOR EACH ROW EXECUTE FUNCTION nothing(); \
                     ALTER TABLE {name} ENABLE ALWAYS TRIGGER nothing;"
                    );
                }
            }
            names.push(format!("'{}'", table.name));
        }
    }
    let run = |server: &Server, sql: &str| {
        let result = server.connect().batch_execute(sql);
        result.unwrap_or_else(|error| panic!("{}: {error:?}", server.name));
    };
    run(&tree.top, &everywhere);
    for (node, sql) in tree.nodes.iter().zip(&below) {
        run(&node.server, sql);
    }
    tree.top.sql(&format!(
        "SELECT terrace.add_table(t) FROM unnest(ARRAY[{}]::regclass[]) t",
        names.join(", ")
    ));
}
