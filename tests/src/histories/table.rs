//! Random tables, and random statements that change their rows.

use std::fmt::Write;

use crate::random::Random;

/// So few keys that each row lives through much, or so many that some do not.
const KEYS: [usize; 3] = [10, 10, 40];
/// Of what [`Table::statement`] knows, what neither deletes rows nor gives them other keys.
const MILD: [usize; 15] = [0, 1, 2, 3, 4, 5, 6, 6, 6, 7, 12, 13, 13, 13, 16];

pub const TYPES: &str = "
    CREATE EXTENSION IF NOT EXISTS btree_gist; CREATE EXTENSION IF NOT EXISTS citext;
    CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
    CREATE DOMAIN short AS varchar(7);
    CREATE DOMAIN once AS int; CREATE DOMAIN twice AS once CHECK (VALUE >= 0);
    CREATE TYPE pair AS (a int, b text);
    CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
    CREATE TABLE said (n bigint GENERATED ALWAYS AS IDENTITY, name text, what text, old jsonb, new jsonb);
    CREATE FUNCTION says() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO public.said (name, what, old, new)
        VALUES (TG_ARGV[0], TG_OP, to_jsonb(OLD) - 'local', to_jsonb(NEW) - 'local');
        RETURN coalesce(NEW, OLD);
    END $$;";

/// Stored out of line, and mostly not sent when something else is changed.
const LONG: &str = "varchar";

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
    (
        LONG,
        &["(SELECT string_agg(md5($::text || g), '') FROM generate_series(1, 90) g)"],
    ),
];

/// Of a random type; long values are what is not sent again.
fn column(random: &mut Random) -> usize {
    match random.one_in(6) {
        true => COLUMNS.len() - 1,
        false => random.below(COLUMNS.len()),
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Key {
    Int,
    Pair,
    Uuid,
    Text,
    /// Equal keys are written in two ways …
    Numeric,
    /// … also where it is an extension that says so.
    Word,
    Range,
    /// Of a domain over another one.
    Domain,
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
    /// Looked at late …
    Deferred,
    /// … or at the end of each statement.
    Deferrable,
    /// With another column.
    Two,
    /// Of which one row at most has none.
    NotDistinct,
    Partial,
    Expression,
    Exclusion,
    DeferredExclusion,
    /// Not equal, but near each other.
    Overlap,
}

const OBSTACLES: [Obstacle; 10] = [
    Obstacle::Unique,
    Obstacle::Deferred,
    Obstacle::Deferrable,
    Obstacle::Two,
    Obstacle::NotDistinct,
    Obstacle::Partial,
    Obstacle::Expression,
    Obstacle::Exclusion,
    Obstacle::DeferredExclusion,
    Obstacle::Overlap,
];

/// When the trigger of a table says what it sees, and how it is enabled.
const SAYINGS: [(&str, &str); 4] = [
    ("BEFORE", "REPLICA"),
    ("BEFORE", "ALWAYS"),
    ("AFTER", "REPLICA"),
    ("AFTER", "ALWAYS"),
];

/// What of a table is synchronised.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    Whole,
    /// All columns but the last and the identity.
    Listed,
    /// Rows of some keys.
    Filtered,
}

/// A random table.
pub struct Table {
    pub name: String,
    key: Key,
    /// How many there are.
    keys: usize,
    /// Rows stay, by the keys that they have.
    mild: bool,
    obstacle: Obstacle,
    generated: bool,
    identity: bool,
    partitioned: bool,
    part: Part,
    /// Below, a trigger that is enabled for replicas says what it sees.
    says: Option<(&'static str, &'static str)>,
    /// Indexes into [`COLUMNS`]; they are called `c0`, `c1` and so on.
    columns: Vec<usize>,
}

impl Table {
    pub fn random(random: &mut Random, name: String) -> Table {
        let keys = [
            Key::Int,
            Key::Int,
            Key::Pair,
            Key::Pair,
            Key::Uuid,
            Key::Text,
            Key::Text,
            Key::Numeric,
            Key::Word,
            Key::Range,
            Key::Domain,
            Key::Index,
            Key::Deferred,
            Key::Full,
            Key::None,
        ];
        let key = *random.of(&keys);
        let obstacle = match random.one_in(3) {
            true => *random.of(&OBSTACLES),
            false => Obstacle::Nothing,
        };
        let count = 1 + random.below(4);
        // A unique constraint would need the key in it.
        let partitioned = obstacle == Obstacle::Nothing
            && !matches!(key, Key::None | Key::Deferred)
            && random.one_in(6);
        let mut table = Table {
            name,
            key,
            keys: *random.of(&KEYS),
            // Without a key to refuse them, there would be more rows all the time.
            mild: random.one_in(2) && key != Key::None,
            obstacle,
            generated: random.one_in(4),
            identity: random.one_in(6),
            partitioned,
            part: Part::Whole,
            says: random.one_in(12).then(|| *random.of(&SAYINGS)),
            columns: (0..count).map(|_| column(random)).collect(),
        };
        let part = *random.of(&[Part::Whole, Part::Whole, Part::Listed, Part::Filtered]);
        if table.may_be(part) {
            table.part = part;
        }
        table
    }

    /// Rows are told by a primary key, here and at the top.
    fn has_key(&self) -> bool {
        !matches!(self.key, Key::Index | Key::Deferred | Key::Full | Key::None)
    }

    fn may_be(&self, part: Part) -> bool {
        // A row that comes to pass a filter lacks what is stored out of line.
        let is_short = |column: &usize| COLUMNS[*column].0 != LONG;
        match part {
            Part::Whole => true,
            Part::Listed => self.has_key() && !self.partitioned && self.columns.len() > 1,
            Part::Filtered => {
                let is_immutable = matches!(self.key, Key::Int | Key::Pair);
                is_immutable && !self.partitioned && self.columns.iter().all(is_short)
            }
        }
    }

    /// Nothing but a row that is not as expected keeps its changes from being folded.
    pub fn is_foldable(&self) -> bool {
        self.has_key() && !self.partitioned && self.says.is_none()
    }

    /// The trigger that says what it sees.
    pub fn trigger(&self) -> Option<String> {
        let (name, (when, enabled)) = (&self.name, self.says?);
        Some(format!(
            "CREATE TRIGGER says {when} INSERT OR UPDATE OR DELETE ON {name} FOR EACH ROW \
             EXECUTE FUNCTION says('{name}'); ALTER TABLE {name} ENABLE {enabled} TRIGGER says;"
        ))
    }

    fn filter(&self) -> Option<&'static str> {
        (self.part == Part::Filtered).then_some(match self.key {
            Key::Pair => "l <> 1",
            _ => "k % 3 <> 1",
        })
    }

    /// Has it synchronised.
    pub fn add(&self) -> String {
        let name = &self.name;
        let part = match (self.part, self.filter()) {
            (Part::Listed, _) => {
                let columns = self.columns.len() - 1;
                let columns: String = (0..columns).map(|index| format!("c{index}, ")).collect();
                format!(", columns => '{{{}, {columns}u}}'", self.key_columns())
            }
            (_, Some(filter)) => format!(", filter => '{filter}'"),
            (_, None) => String::new(),
        };
        format!("SELECT terrace.add_table('{name}'{part});")
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
            Key::Word if n.is_multiple_of(2) => format!("'Key{}'::citext", n / 2),
            Key::Word => format!("'kEY{}'::citext", n / 2),
            Key::Range => format!("'[{n},{}]'::int4range", n + n % 3),
            Key::Domain => format!("{n}::twice"),
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
    pub fn create(&self, random: Option<&mut Random>) -> String {
        let name = &self.name;
        let mut parts: Vec<String> = match self.key {
            Key::Pair => vec!["k varchar(9) NOT NULL".into(), "l bigint NOT NULL".into()],
            Key::Uuid => vec!["k uuid NOT NULL".into()],
            Key::Text => vec!["k text NOT NULL".into()],
            Key::Numeric => vec!["k numeric NOT NULL".into()],
            Key::Word => vec!["k citext NOT NULL".into()],
            Key::Range => vec!["k int4range NOT NULL".into()],
            Key::Domain => vec!["k twice NOT NULL".into()],
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
            Obstacle::Deferrable => Some("UNIQUE (u) DEFERRABLE".to_owned()),
            Obstacle::Two if self.generated => Some("UNIQUE (u), UNIQUE (g)".to_owned()),
            Obstacle::Two => Some("UNIQUE (u, c0)".to_owned()),
            Obstacle::NotDistinct => Some("UNIQUE NULLS NOT DISTINCT (u)".to_owned()),
            Obstacle::Overlap => {
                Some("EXCLUDE USING gist (int4range(u, u + 2) WITH &&)".to_owned())
            }
            Obstacle::Exclusion => Some("EXCLUDE USING gist (u WITH =)".to_owned()),
            Obstacle::DeferredExclusion => {
                Some("EXCLUDE USING gist (u WITH =) DEFERRABLE INITIALLY DEFERRED".to_owned())
            }
            Obstacle::Nothing | Obstacle::Partial | Obstacle::Expression => None,
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
        match self.obstacle {
            Obstacle::Partial => {
                let _ = write!(sql, "CREATE UNIQUE INDEX ON {name} (u) WHERE u % 2 = 0;");
            }
            Obstacle::Expression => {
                let _ = write!(sql, "CREATE UNIQUE INDEX ON {name} ((u % 11));");
            }
            _ => {}
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
            if COLUMNS[*column].0 == LONG {
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
        match random.one_in(20) {
            true => row += ", NULL",
            false => drop(write!(row, ", {}", random.below(self.values()))),
        }
        row
    }

    /// Of what may have to be unique.
    fn values(&self) -> usize {
        3 * self.keys
    }

    /// A row of each key.
    pub fn inserts<'a>(&'a self, random: &'a mut Random) -> impl Iterator<Item = String> + 'a {
        let (name, written) = (&self.name, self.written());
        (0..self.keys).map(move |key| {
            let row = self.row(random, key);
            format!("INSERT INTO {name} ({written}) VALUES ({row});")
        })
    }

    /// Names of what a row gives, in its order.
    fn written(&self) -> String {
        let columns = (0..self.columns.len()).map(|index| format!("c{index}, "));
        format!("{}, {}u", self.key_columns(), columns.collect::<String>())
    }

    /// Names of all that is compared.
    fn compared(&self) -> String {
        let is_listed = self.part == Part::Listed;
        let mut names = self.written();
        if is_listed {
            names = names.replace(&format!("c{}, ", self.columns.len() - 1), "");
        }
        for (there, name) in [
            (self.generated, ", g"),
            (self.identity && !is_listed, ", n"),
        ] {
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
                Obstacle::Deferred | Obstacle::Deferrable | Obstacle::DeferredExclusion
            )
    }

    pub fn statement(&self, random: &mut Random) -> String {
        let name = &self.name;
        let (key, other) = (random.below(self.keys), random.below(self.keys));
        let (is_key, is_other) = (self.is_key(key), self.is_key(other));
        let column = random.below(self.columns.len());
        let value = self.value(random, column);
        let written = self.written();
        let kind = match self.mild {
            true => *random.of(&MILD),
            false => random.below(17),
        };
        match kind {
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
                let last = key + 1 + random.below((self.keys - key).min(10));
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
            12 => format!("UPDATE {name} SET u = {} - u", self.values() - 1),
            // Of two rows, whenever it is looked at.
            13 => format!(
                "UPDATE {name} SET u = 10000 + u * 100 + (SELECT min(u) FROM {name} WHERE {is_other}) WHERE {is_key}; \
                 UPDATE {name} SET u = (SELECT (min(u) - 10000) / 100 FROM {name} WHERE {is_key}) WHERE {is_other}; \
                 UPDATE {name} SET u = (u - 10000) % 100 WHERE {is_key}"
            ),
            14 => format!(
                "DELETE FROM {name} WHERE {is_key}; INSERT INTO {name} ({written}) VALUES ({})",
                self.row(random, key)
            ),
            15 => format!(
                "DELETE FROM {name} WHERE ctid IN (SELECT ctid FROM {name} ORDER BY ctid LIMIT 1) AND {is_key}"
            ),
            _ if random.one_in(100) => format!("TRUNCATE {name}"),
            _ => format!(
                "SAVEPOINT s; UPDATE {name} SET c{column} = {value}; DELETE FROM {name} WHERE {is_other}; \
                 ROLLBACK TO s; UPDATE {name} SET u = {} WHERE {is_key}",
                random.below(self.values())
            ),
        }
    }

    pub fn digest(&self) -> String {
        format!(
            "SELECT count(*) || ' ' || coalesce(md5(string_agg(t, E'\\n' ORDER BY t COLLATE \"C\")), '') \
             FROM (SELECT ROW({})::text t FROM {} WHERE {}) r",
            self.compared(),
            self.name,
            self.filter().unwrap_or("true")
        )
    }
}
