//! What is altered and dropped at the top, while rows flow.

use terrace_tests::load::{Background, STEPS, count_up, fill_partitions};
use terrace_tests::tree::Node;
use terrace_tests::wait_until;

use crate::ddl::{tree_with_ddl, wait_for_catalog};

// A rewrite copies the rows that there are; those that come meanwhile wait, and none is lost or doubled.
#[test]
fn a_table_that_is_written_anew_in_traffic_neither_loses_nor_doubles_a_row() {
    let hot = "CREATE SCHEMA app; CREATE TABLE app.hot (id bigint PRIMARY KEY, v int, w text);
               CREATE TABLE app.keyless (id bigint, v int); SELECT terrace.add_table(r)
               FROM unnest('{app.hot, app.keyless}'::regclass[]) r;";
    let tree = tree_with_ddl(&format!("{STEPS}{hot}"));
    let counting = count_up(&tree.top);
    let writing = Background::paced(&tree.top, |client, n| {
        client.batch_execute(&format!(
            "BEGIN; INSERT INTO app.hot (id, v) VALUES ({n}, '7'); UPDATE app.hot SET v = '8' WHERE id = {n} - 1;
             DELETE FROM app.hot WHERE id = {n} - 5 AND id % 3 = 0; INSERT INTO app.keyless (id, v) VALUES ({n}, '1'); COMMIT"
        ))
    });
    for alter in [
        "ALTER TABLE app.hot ALTER v TYPE bigint",
        "ALTER TABLE app.hot ADD COLUMN u uuid DEFAULT gen_random_uuid()",
        "ALTER TABLE app.keyless ALTER v TYPE numeric, ADD COLUMN at timestamptz DEFAULT clock_timestamp()",
        "ALTER TABLE app.hot ALTER v TYPE text USING 'v' || v, DROP COLUMN w",
        "ALTER TABLE app.hot ALTER id TYPE numeric",
        // Who writes waits from the start: in the middle it would be a deadlock.
        "BEGIN; LOCK TABLE app.hot; UPDATE app.hot SET v = v || '!'; ALTER TABLE app.hot ALTER v TYPE varchar(20); UPDATE app.hot SET v = v || '?'; COMMIT",
    ] {
        writing.go_on(20);
        tree.top.sql(alter);
    }
    writing.go_on(20);
    let written = writing.stop();
    assert_eq!(
        tree.top.value("SELECT count(*) FROM app.keyless"),
        written.to_string()
    );
    wait_for_catalog(&tree);
    tree.wait_for_equal(&["app.hot", "app.keyless"]);
    tree.all_is_well(counting);
    tree.must_have_no_conflict();
}

// Rows that are sent again lose what a server has of its own.
#[test]
fn what_gives_no_row_a_value_of_its_own_sends_none_again() {
    let tree = tree_with_ddl(
        "CREATE TABLE t (id int PRIMARY KEY, v int, w varchar(9)); INSERT INTO t SELECT g, g FROM generate_series(1, 99) g;
         SELECT terrace.add_table('t');",
    );
    tree.wait_for_equal(&["t"]);
    for node in &tree.nodes {
        node.server.sql(
            "SET session_replication_role = replica; ALTER TABLE t ADD COLUMN own text; UPDATE t SET own = 'kept'",
        );
    }
    let kept = "SELECT count(own) FROM t";
    let mut n = 100;
    let mut alter = |sql: &str, expected: &str| {
        tree.top.sql(sql);
        n += 1;
        tree.top.sql(&format!("INSERT INTO t (id) VALUES ({n})"));
        for node in &tree.nodes {
            wait_until("it is there", || {
                node.server.value("SELECT max(id) FROM t") == n.to_string()
            });
            assert_eq!(node.server.value(kept), expected, "{sql}");
        }
    };
    for sql in [
        "ALTER TABLE t ADD COLUMN serial_number text",
        "ALTER TABLE t ADD COLUMN status text DEFAULT 'unknown'",
        "ALTER TABLE t ADD COLUMN said text DEFAULT 'now', ADD COLUMN many int DEFAULT 7",
        "ALTER TABLE t ADD COLUMN n int CHECK (n > 0) CHECK (abs(n) < 9)",
        "ALTER TABLE t ADD COLUMN day date DEFAULT '2026-11-28'",
        "ALTER TABLE t ADD COLUMN twice int GENERATED ALWAYS AS (v * 2) STORED",
        "ALTER TABLE t DROP COLUMN twice, ALTER v TYPE bigint, ALTER w TYPE text",
    ] {
        alter(sql, "99");
    }
    for sql in [
        "ALTER TABLE t ADD COLUMN today date DEFAULT ' Today'",
        "ALTER TABLE t ADD COLUMN made serial",
        "ALTER TABLE t ADD COLUMN late timestamptz DEFAULT 'now' CHECK (late > '2000-01-01')",
        "ALTER TABLE t ADD COLUMN moments timestamptz[] DEFAULT '{\"now\"}'",
        "ALTER TABLE t ADD COLUMN dice float8 DEFAULT random()",
        "ALTER TABLE t ADD COLUMN number int GENERATED ALWAYS AS IDENTITY",
        "ALTER TABLE t ALTER w TYPE timestamptz USING w::timestamptz",
    ] {
        alter(sql, "0");
        for node in &tree.nodes {
            node.server
                .sql("SET session_replication_role = replica; UPDATE t SET own = 'kept'");
        }
        let count = tree.top.value("SELECT count(*) FROM t");
        for node in &tree.nodes {
            assert_eq!(node.server.value(kept), count);
        }
    }
    tree.must_have_no_conflict();
}

#[test]
fn partitions_are_attached_and_detached_in_traffic() {
    let tree = tree_with_ddl(&format!(
        "{STEPS} CREATE TABLE parted (a int, n bigint, PRIMARY KEY (a, n)) PARTITION BY LIST (a);
         CREATE TABLE parted_1 PARTITION OF parted FOR VALUES IN (1);
         SELECT terrace.add_table('parted');"
    ));
    let counting = count_up(&tree.top);
    let writing = fill_partitions(&tree.top);
    for (new, old) in [(2, 1), (3, 2), (4, 3)] {
        writing.go_on(20);
        tree.top.sql(&format!(
            "CREATE TABLE parted_{new} (LIKE parted); INSERT INTO parted_{new} SELECT {new}, -g FROM generate_series(1, 50) g"
        ));
        let attach =
            format!("ALTER TABLE parted ATTACH PARTITION parted_{new} FOR VALUES IN ({new})");
        tree.top.sql(&attach);
        writing.go_on(20);
        tree.top
            .sql(&format!("ALTER TABLE parted DETACH PARTITION parted_{old}"));
    }
    writing.go_on(20);
    writing.stop();
    tree.all_is_well(counting);
    wait_for_catalog(&tree);
    tree.wait_for_equal(&["parted", "parted_1", "parted_2", "parted_3", "parted_4"]);
    for node in &tree.nodes {
        node.server.sql("INSERT INTO parted_3 VALUES (3, -100)");
        let mut client = node.server.connect();
        let kept = client.batch_execute("INSERT INTO parted_4 VALUES (4, -100)");
        kept.expect_err("it is protected");
    }
    tree.must_have_no_conflict();
}

#[test]
fn what_is_altered_and_dropped_at_the_top_is_below() {
    let tree = tree_with_ddl(STEPS);
    tree.top.sql("CREATE SCHEMA app; CREATE SCHEMA other");
    tree.top
        .sql("SELECT terrace.add_schema('app'), terrace.add_schema('other')");
    for ddl in [
        "CREATE TYPE app.mood AS ENUM ('good', 'bad')",
        "CREATE TYPE app.point AS (x int, y int)",
        "CREATE DOMAIN app.few AS int",
        "CREATE TABLE app.t (id int PRIMARY KEY, mood app.mood, n app.few)",
        "CREATE TABLE app.second (id int PRIMARY KEY, t int REFERENCES app.t)",
        "CREATE INDEX by_mood ON app.t (mood)",
        "CREATE FUNCTION app.f(n int) RETURNS int LANGUAGE sql AS 'SELECT n'",
        "CREATE FUNCTION app.g(n int) RETURNS int LANGUAGE sql AS 'SELECT n'",
        "CREATE FUNCTION app.fire() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
        "CREATE TRIGGER fire BEFORE INSERT ON app.t FOR EACH ROW EXECUTE FUNCTION app.fire()",
        "CREATE TRIGGER gone BEFORE UPDATE ON app.t FOR EACH ROW EXECUTE FUNCTION app.fire()",
        "CREATE VIEW app.v AS SELECT id FROM app.t",
        "CREATE VIEW app.w AS SELECT id FROM app.t",
    ] {
        tree.top.sql(ddl);
    }
    tree.top
        .sql("INSERT INTO app.t VALUES (1, 'good', 1), (2, 'bad', 2)");
    wait_for_catalog(&tree);
    for ddl in [
        "ALTER TYPE app.mood RENAME VALUE 'bad' TO 'poor'",
        "ALTER TYPE app.mood RENAME TO temper",
        "ALTER TYPE app.temper SET SCHEMA other",
        "ALTER TYPE app.point ADD ATTRIBUTE z int",
        "ALTER DOMAIN app.few ADD CONSTRAINT is_few CHECK (value < 100)",
        "ALTER DOMAIN app.few RENAME TO several",
        "CREATE OR REPLACE FUNCTION app.f(n int) RETURNS int LANGUAGE sql AS 'SELECT n + 1'",
        "ALTER FUNCTION app.f(int) RENAME TO f2",
        "ALTER FUNCTION app.f2(int) STRICT",
        "DROP FUNCTION app.g(int)",
        "ALTER TRIGGER fire ON app.t RENAME TO fire2",
        "DROP TRIGGER gone ON app.t",
        "CREATE OR REPLACE VIEW app.v AS SELECT id, mood FROM app.t",
        "ALTER VIEW app.v RENAME TO v2",
        "DROP VIEW app.w",
        "ALTER INDEX app.by_mood RENAME TO by_temper",
        "ALTER TABLE app.second RENAME CONSTRAINT second_t_fkey TO to_t",
        "ALTER TABLE app.second SET SCHEMA other",
        "ALTER TABLE app.t ALTER n SET DEFAULT 5, ALTER n SET NOT NULL, ADD CHECK (n > 0)",
        "INSERT INTO app.t VALUES (3, 'poor')",
        "INSERT INTO other.second VALUES (1, 3)",
        "DROP INDEX app.by_temper",
        "DROP TYPE app.point",
        "ALTER TABLE other.second DROP CONSTRAINT to_t",
    ] {
        tree.top.sql(ddl);
    }
    wait_for_catalog(&tree);
    tree.wait_for_equal(&["app.t", "other.second"]);
    for ddl in [
        "ALTER TABLE app.t DROP COLUMN n",
        "DROP DOMAIN app.several",
        "DROP TABLE app.t CASCADE",
        "DROP FUNCTION app.fire, app.f2",
        "DROP SCHEMA app",
        "DROP SCHEMA other CASCADE",
    ] {
        tree.top.sql(ddl);
    }
    wait_for_catalog(&tree);
    let left = "SELECT count(*) FROM pg_namespace WHERE nspname IN ('app', 'other')";
    let is_gone = |node: &Node| node.server.value(left) == "0";
    wait_until("nothing is left", || tree.nodes.iter().all(is_gone));
}
