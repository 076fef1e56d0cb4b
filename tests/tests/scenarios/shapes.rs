//! Tables of every shape, made anywhere and at any time.

use postgres::{Client, NoTls};
use terrace_tests::server::explain;
use terrace_tests::{Server, Tree, wait_until};

const ONE: [(&str, Option<&str>, usize); 1] = [("region", None, 1)];

// UPDATEs of a table that somebody made below without its key were refused there, as it is
// published there too.
#[test]
fn a_keyless_table_below_takes_updates() {
    let schema =
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a'), (2, 'b');
         SELECT terrace.add_table('t')";
    let mut tree = Tree::plant(schema).expect("boot the top");
    tree.boot(&ONE).expect("boot the server");
    tree.nodes[0].server.sql("CREATE TABLE t (id int, v text)");
    tree.start_bridges().expect("start the bridge");
    tree.wait_streaming();
    tree.top
        .sql("UPDATE t SET v = 'c' WHERE id = 1; DELETE FROM t WHERE id = 2");
    tree.wait_for_equal(&["t"]);
}

// What was made below after the stall that asks for it was published and granted to nobody,
// and neither were later partitions: the next copy from there was refused.
#[test]
fn a_table_that_is_made_later_is_copied_on() {
    let mut tree = Tree::grow(
        "CREATE TABLE parted (a int PRIMARY KEY, v text) PARTITION BY LIST (a);
         CREATE TABLE parted_1 PARTITION OF parted FOR VALUES IN (1);
         SELECT terrace.add_table('parted')",
        &ONE,
    );
    let late = "CREATE TABLE late (id int PRIMARY KEY, v text)";
    tree.top
        .sql(&format!("{late}; SELECT terrace.add_table('late')"));
    tree.top.sql("INSERT INTO late VALUES (1, 'a')");
    let stalled = "SELECT count(*) FROM terrace.lag WHERE state = 'stalled' AND reason LIKE '%create it here%'";
    wait_until("the stall is told", || tree.top.value(stalled) == "1");
    tree.nodes[0].server.sql(late);
    tree.wait_for_equal(&["late"]);
    let partition = "CREATE TABLE parted_2 PARTITION OF parted FOR VALUES IN (2)";
    tree.nodes[0].server.sql(partition);
    tree.top.sql(partition);
    tree.top.sql("INSERT INTO parted VALUES (1, 'a'), (2, 'b')");
    tree.wait_for_equal(&["parted"]);
    tree.boot(&[("branch", Some("region"), 1), ("far", None, 1)])
        .expect("boot more servers");
    tree.start_bridges().expect("start their bridges");
    tree.wait_streaming();
    tree.wait_for_equal(&["late", "parted"]);
    // What is dropped at the top leaves the list everywhere, and stays where it is below.
    tree.top.sql("DROP TABLE late");
    wait_until("it leaves the list", || {
        let listed = "SELECT count(*) FROM terrace.tables WHERE \"table\" = 'public.late'";
        tree.nodes
            .iter()
            .all(|node| node.server.value(listed) == "0")
    });
    tree.top.sql("UPDATE parted SET v = 'c' WHERE a = 2");
    tree.wait_for_equal(&["parted"]);
}

// Objects that have nothing to do with what is synchronised kept the first copy from being made.
#[test]
fn strange_neighbours_do_not_block_the_copy() {
    let schema = "
        CREATE SCHEMA vault; CREATE TYPE vault.mood AS ENUM ('good', 'bad');
        CREATE TABLE cust (id int PRIMARY KEY, name text);
        CREATE FUNCTION all_cust() RETURNS SETOF cust LANGUAGE sql AS 'SELECT * FROM cust';
        CREATE FUNCTION one_cust(cust) RETURNS int LANGUAGE sql AS 'SELECT 1';
        CREATE FUNCTION doubled(n int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $f$
        BEGIN
        -- a body that looks like a dump
        --
        -- Name: fake; Type: TABLE; Schema: public; Owner: -
        --
        RETURN n * 2;
        END $f$;
        CREATE FUNCTION atomic(n int) RETURNS int LANGUAGE sql BEGIN ATOMIC SELECT n + 1; SELECT n + 2; END;
        CREATE VIEW seen AS SELECT * FROM cust;
        CREATE FUNCTION of_view() RETURNS SETOF seen LANGUAGE sql AS 'SELECT * FROM seen';
        CREATE TABLE line (
            id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, cust int REFERENCES cust, other int,
            mood vault.mood DEFAULT 'good', twice int GENERATED ALWAYS AS (doubled(other)) STORED,
            txt text DEFAULT 'it''s; a -- text', UNIQUE (other));
        CREATE TABLE part (line int REFERENCES line, n int CHECK (n > 0));
        CREATE INDEX ON part (n);
        INSERT INTO cust VALUES (1, 'a');
        INSERT INTO line (cust, other) SELECT 1, g FROM generate_series(1, 10) g;
        INSERT INTO part SELECT g, g FROM generate_series(1, 10) g;
        SELECT terrace.add_table('line'), terrace.add_table('part')";
    let mut tree = Tree::plant(schema).expect("boot the top");
    tree.boot(&[("region", None, 1), ("branch", Some("region"), 1)])
        .expect("boot the servers");
    // Left by an earlier try, or made by hand.
    tree.nodes[0]
        .server
        .sql("CREATE SCHEMA vault; CREATE TYPE vault.mood AS ENUM ('good', 'bad')");
    tree.start_bridges().expect("start the bridges");
    tree.wait_streaming();
    tree.top.sql(
        "INSERT INTO line (cust, other) VALUES (1, 11); UPDATE part SET n = 20 WHERE line = 2",
    );
    tree.wait_for_equal(&["line", "part"]);
    let has = |server: &Server, what: &str| server.value(&format!("SELECT count(*) FROM {what}"));
    for node in &tree.nodes {
        let server = &node.server;
        for (what, count) in [
            (
                "pg_constraint WHERE conrelid = 'line'::regclass AND contype = 'f'",
                "0",
            ),
            (
                "pg_constraint WHERE conrelid = 'part'::regclass AND contype IN ('f', 'c')",
                "2",
            ),
            (
                "pg_index WHERE indrelid IN ('line'::regclass, 'part'::regclass)",
                "3",
            ),
            ("pg_proc WHERE proname IN ('doubled', 'atomic')", "2"),
            (
                "pg_proc WHERE proname = 'doubled' AND prosrc LIKE '%looks like a dump%fake%'",
                "1",
            ),
        ] {
            assert_eq!(has(server, what), count, "{what} on {}", server.name);
        }
        let told = "SELECT reason FROM terrace.events WHERE kind = 'left_out' ORDER BY 1";
        let told = server.value(told);
        assert!(
            node.domain == "branch" || told.contains("line_cust_fkey"),
            "{told}"
        );
    }
}

// Tables that are copied by a filter read those that inherit from them as well.
#[test]
fn rows_of_inheriting_tables_stay_out_of_the_copy() {
    let schema = "
        CREATE TABLE parent (id int PRIMARY KEY, v text); CREATE TABLE child () INHERITS (parent);
        INSERT INTO parent VALUES (1, 'a'); INSERT INTO child VALUES (2, 'b');
        SELECT terrace.add_table('parent', filter => 'id > 0')";
    let mut tree = Tree::plant(schema).expect("boot the top");
    tree.boot(&ONE).expect("boot the server");
    tree.start_bridges().expect("start the bridge");
    tree.wait_streaming();
    assert_eq!(
        tree.nodes[0].server.value("SELECT count(*) FROM parent"),
        "1"
    );
    tree.top
        .sql("INSERT INTO child VALUES (3, 'c'); INSERT INTO parent VALUES (4, 'd')");
    wait_until("the row arrives", || {
        tree.nodes[0]
            .server
            .value("SELECT string_agg(id::text, ' ' ORDER BY id) FROM parent")
            == "1 4"
    });
}

// Whoever may read the listed columns could read all others too, at the top and through any
// relay; and a column that must not be null and is not listed kept the copy from being made.
#[test]
fn columns_that_are_not_listed_are_read_by_nobody() {
    let schema = "
        CREATE TYPE mood AS ENUM ('good', 'bad');
        CREATE TABLE person (
            id serial, name text COLLATE \"C\" NOT NULL, secret text NOT NULL, how mood DEFAULT 'good',
            PRIMARY KEY (id) INCLUDE (name), UNIQUE (name), UNIQUE (secret), CHECK (id > 0), CHECK (secret <> ''));
        CREATE INDEX ON person (how); CREATE INDEX ON person (secret, how);
        CREATE TABLE pet (id int PRIMARY KEY, owner int REFERENCES person);
        INSERT INTO person (name, secret) VALUES ('anna', 'a'), ('otto', 'b'); INSERT INTO pet VALUES (1, 2);
        SELECT terrace.add_table('person', columns => '{id, name, how}', filter => 'id > 1'), terrace.add_table('pet')";
    let mut tree = Tree::plant(schema).expect("boot the top");
    tree.boot(&[("region", None, 1), ("branch", Some("region"), 1)])
        .expect("boot the servers");
    let reader = |conninfo: &str| Client::connect(conninfo, NoTls).expect("connect");
    let mut at_top = reader(&tree.top.conninfo());
    at_top
        .batch_execute("SELECT id, name, how FROM person")
        .expect("what is listed is read");
    let refused = at_top.batch_execute("SELECT secret FROM person");
    assert!(explain(&refused.expect_err("a secret")).contains("permission denied"));
    tree.start_bridges().expect("start the bridges");
    tree.wait_streaming();
    tree.top.sql(
        "INSERT INTO person (name, secret) VALUES ('emil', 'c'); UPDATE person SET name = 'OTTO' WHERE id = 2;
         UPDATE person SET secret = secret || 'd'; INSERT INTO pet VALUES (2, 3)",
    );
    tree.wait_for_equal(&["pet"]);
    for node in &tree.nodes {
        let server = &node.server;
        let rows = server.rows("SELECT * FROM person ORDER BY id");
        assert_eq!(
            rows,
            [["2", "OTTO", "good"], ["3", "emil", "good"]],
            "{}",
            server.name
        );
        let made = "SELECT string_agg(pg_get_constraintdef(oid), '; ' ORDER BY contype, conname) \
                    FROM pg_constraint WHERE conrelid = 'person'::regclass AND contype <> 'n'";
        assert_eq!(
            server.value(made),
            "CHECK ((id > 0)); PRIMARY KEY (id) INCLUDE (name); UNIQUE (name)"
        );
        let indexes = "SELECT count(*) FROM pg_index WHERE indrelid = 'person'::regclass";
        assert_eq!(server.value(indexes), "3");
        let foreign =
            "SELECT count(*) FROM pg_constraint WHERE conrelid = 'pet'::regclass AND contype = 'f'";
        assert_eq!(server.value(foreign), "1");
        let mut client = reader(&node.bridge.conninfo());
        client
            .batch_execute("SELECT id, name, how FROM person")
            .expect("what is listed is read");
    }
    tree.top.sql("SELECT terrace.remove_table('person')");
    at_top
        .batch_execute("SELECT id FROM person")
        .expect_err("it is granted no more");
}

// Whoever comes through a relay, or as an ordinary role to the top, saw some of the rows at most.
#[test]
fn a_table_with_policies_is_copied_whole() {
    let schema = "
        CREATE TABLE guarded (id int PRIMARY KEY, v text);
        INSERT INTO guarded SELECT g, 'v' FROM generate_series(1, 100) g;
        ALTER TABLE guarded ENABLE ROW LEVEL SECURITY;
        CREATE POLICY few ON guarded USING (id < 10);
        SELECT terrace.add_table('guarded')";
    let mut tree = Tree::plant(schema).expect("boot the top");
    tree.boot(&[("region", None, 1), ("branch", Some("region"), 1)])
        .expect("boot the servers");
    tree.start_bridges().expect("start the bridges");
    let told = "SELECT count(*) > 0 FROM terrace.lag WHERE node = 'region-1' AND reason LIKE '%BYPASSRLS%'";
    wait_until("it is told what to do", || tree.top.value(told) == "t");
    tree.top.sql("ALTER ROLE terrace BYPASSRLS");
    tree.wait_streaming();
    tree.top.sql("UPDATE guarded SET v = 'w' WHERE id > 50");
    tree.wait_for_equal(&["guarded"]);
}

/// Tables of which every row has been looked through, and how often.
fn sequential_scans(server: &Server) -> String {
    server.sql("SELECT pg_stat_force_next_flush()");
    server.value(
        "SELECT coalesce(string_agg(relname || ' ' || seq_scan, ', '), '') FROM pg_stat_user_tables \
         WHERE relname ~ '^key_' AND seq_scan > 0",
    )
}

// A type that has its order from an extension, or from the type below it, was compared as text.
#[test]
fn a_key_of_any_type_is_found_by_its_index() {
    let types = [
        ("citext", "'Key' || n"),
        ("ltree", "'Key.' || n"),
        ("hstore", "'k=>' || n"),
        ("cidr", "'10.0.0.' || n"),
        ("int4range", "'[1,' || n + 1 || ')'"),
        ("int4multirange", "'{[1,' || n + 1 || ')}'"),
        ("citext[]", "'{Key,' || n || '}'"),
        ("feeling", "CASE n WHEN 1 THEN 'sad' ELSE 'm' || n END"),
        ("chosen", "CASE n WHEN 1 THEN 'sad' ELSE 'm' || n END"),
        ("twice", "n"),
        ("word", "'Key' || n"),
        ("list", "'{1,' || n || '}'"),
    ];
    let own = "CREATE EXTENSION citext; CREATE EXTENSION ltree; CREATE EXTENSION hstore;
         CREATE TYPE feeling AS ENUM ('sad', 'm2', 'm3', 'm4', 'm5', 'm6', 'm7', 'm8', 'm9', 'm10', 'm11', 'm12');
         CREATE DOMAIN once AS int CHECK (VALUE > 0); CREATE DOMAIN twice AS once;
         CREATE DOMAIN chosen AS feeling; CREATE DOMAIN word AS citext; CREATE DOMAIN list AS int[];";
    let mut schema = own.to_owned();
    for (place, (name, value)) in types.iter().enumerate() {
        schema += &format!(
            "CREATE TABLE key_{place} (k {name} PRIMARY KEY, v int);
             INSERT INTO key_{place} SELECT (({value})::text)::{name}, 0 FROM generate_series(1, 12) n;
             SELECT terrace.add_table('key_{place}');"
        );
    }
    let mut tree = Tree::plant(&schema).expect("boot the top");
    tree.boot(&ONE).expect("boot the server");
    let below = &tree.nodes[0].server;
    below.sql(own);
    tree.start_bridges().expect("start the bridge");
    tree.wait_streaming();
    let tables: Vec<String> = (0..types.len()).map(|n| format!("key_{n}")).collect();
    let names: Vec<&str> = tables.iter().map(String::as_str).collect();
    tree.wait_for_equal(&names);
    let below = &tree.nodes[0].server;
    // Of tables so small no index would be used.
    below.sql("ALTER SYSTEM SET enable_seqscan = off");
    // What costs as much as a forbidden scan would be compiled first.
    below.sql("ALTER SYSTEM SET jit = off");
    below.sql("SELECT pg_reload_conf()");
    tree.nodes[0].bridge.stop();
    for pile in [false, true] {
        tree.nodes[0].server.sql("SELECT pg_stat_reset()");
        let rounds = if pile { 12 } else { 1 };
        for n in 1..=rounds {
            for table in &tables {
                tree.top.sql(&format!(
                    "UPDATE {table} SET v = v + {n}; DELETE FROM {table} WHERE v = -{n};
                     UPDATE {table} SET v = {n} WHERE ctid = (SELECT max(ctid) FROM {table})"
                ));
            }
        }
        for table in &tables {
            tree.top.sql(&format!(
                "DELETE FROM {table} WHERE ctid = (SELECT min(ctid) FROM {table})"
            ));
        }
        match pile {
            true => tree.start_bridges_on_a_pile(),
            false => tree.start_bridges().expect("start the bridge"),
        }
        tree.wait_streaming();
        let done = "SELECT terrace.wait_for(pg_current_wal_lsn(), timeout => '20s')";
        assert_eq!(tree.top.value(done), "t");
        tree.nodes[0].bridge.stop();
        assert_eq!(sequential_scans(&tree.nodes[0].server), "", "pile: {pile}");
        let log = tree.nodes[0].bridge.logged();
        assert_eq!(log.contains("applied set-wise"), pile);
        assert!(!log.contains("applying"), "{log}");
    }
    tree.start_bridges().expect("start the bridge");
    tree.wait_for_equal(&names);
}

// A row that a trigger kept was taken for a missing one, and written once more.
#[test]
fn what_a_trigger_or_a_rule_keeps_stays_as_it_is() {
    let schema = "CREATE TABLE keyed (id int PRIMARY KEY, v text);
         CREATE TABLE whole (id int, v text); ALTER TABLE whole REPLICA IDENTITY FULL;
         CREATE TABLE ruled (id int PRIMARY KEY, v text);
         INSERT INTO keyed SELECT n, 'old' FROM generate_series(1, 6) n;
         INSERT INTO whole SELECT * FROM keyed; INSERT INTO ruled SELECT * FROM keyed;
         SELECT terrace.add_table(t) FROM unnest('{keyed,whole,ruled}'::regclass[]) t;";
    let tree = Tree::grow(schema, &ONE);
    tree.wait_for_equal(&["keyed", "whole", "ruled"]);
    tree.nodes[0].server.sql(
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS
           $$BEGIN RETURN CASE WHEN OLD.id % 2 = 0 THEN NULL WHEN TG_OP = 'DELETE' THEN OLD ELSE NEW END; END$$;
         CREATE TRIGGER keep BEFORE UPDATE OR DELETE ON keyed FOR EACH ROW EXECUTE FUNCTION keep();
         CREATE TRIGGER keep BEFORE UPDATE OR DELETE ON whole FOR EACH ROW EXECUTE FUNCTION keep();
         ALTER TABLE keyed ENABLE ALWAYS TRIGGER keep; ALTER TABLE whole ENABLE REPLICA TRIGGER keep;
         CREATE RULE keep AS ON DELETE TO ruled WHERE OLD.id % 2 = 0 DO INSTEAD NOTHING;
         ALTER TABLE ruled ENABLE ALWAYS RULE keep;",
    );
    for table in ["keyed", "whole", "ruled"] {
        tree.top.sql(&format!(
            "UPDATE {table} SET v = 'new' WHERE id < 4; DELETE FROM {table} WHERE id > 4"
        ));
    }
    let done = "SELECT terrace.wait_for(pg_current_wal_lsn(), timeout => '20s')";
    assert_eq!(tree.top.value(done), "t");
    let server = &tree.nodes[0].server;
    for (table, rows) in [
        ("keyed", "1 new, 2 old, 3 new, 4 old, 6 old"),
        ("whole", "1 new, 2 old, 3 new, 4 old, 6 old"),
        ("ruled", "1 new, 2 new, 3 new, 4 old, 6 old"),
    ] {
        let listed = format!("SELECT string_agg(id || ' ' || v, ', ' ORDER BY id) FROM {table}");
        assert_eq!(server.value(&listed), rows, "{table}");
    }
    tree.must_have_no_conflict();
    let log = tree.nodes[0].bridge.logged();
    let with_care = log.matches("applying with care").count();
    assert!(with_care <= 2, "triggers alone do not ask for care: {log}");

    // Who puts another row in the place of one does not keep it.
    tree.top.sql("INSERT INTO keyed VALUES (7, 'old')");
    assert_eq!(tree.top.value(done), "t");
    let server = &tree.nodes[0].server;
    let mut local = server.connect();
    let replace = "SET session_replication_role = replica; BEGIN; DELETE FROM keyed WHERE id = 7;
         INSERT INTO keyed VALUES (7, 'local')";
    local.batch_execute(replace).expect("replace the row");
    tree.top.sql("UPDATE keyed SET v = 'top' WHERE id = 7");
    let waits = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted";
    wait_until("the change waits for it", || server.value(waits) == "t");
    local.batch_execute("COMMIT").expect("commit");
    assert_eq!(tree.top.value(done), "t");
    let row = "SELECT v FROM keyed WHERE id = 7";
    assert_eq!(server.value(row), "top");

    // What is asked whether it wants a change is asked once, also where that goes with care.
    tree.nodes[0].server.sql(
        "CREATE TABLE asked (id int);
         CREATE OR REPLACE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS
           $$BEGIN INSERT INTO public.asked VALUES (OLD.id); RETURN NULL; END$$;
         CREATE RULE asked AS ON UPDATE TO ruled WHERE OLD.id % 2 = 0 DO INSTEAD INSERT INTO asked VALUES (OLD.id);
         ALTER TABLE ruled ENABLE ALWAYS RULE asked;",
    );
    tree.top.sql("BEGIN; UPDATE ruled SET v = 'kept' WHERE id = 4; UPDATE keyed SET v = 'kept' WHERE id = 2; COMMIT");
    assert_eq!(tree.top.value(done), "t");
    let asked = "SELECT string_agg(id::text, ' ' ORDER BY id) FROM asked";
    assert_eq!(tree.nodes[0].server.value(asked), "2 4");
}

// Each change of a row that a trigger had kept from coming in sent its batch the careful way.
#[test]
fn what_a_trigger_keeps_from_coming_in_is_no_missing_row() {
    let schema = "CREATE TABLE sifted (id int PRIMARY KEY, v text);
         CREATE TABLE large (id int PRIMARY KEY, v text, long text); ALTER TABLE large ALTER long SET STORAGE EXTERNAL;
         SELECT terrace.add_table(t) FROM unnest('{sifted,large}'::regclass[]) t;";
    let tree = Tree::grow(schema, &ONE);
    let server = &tree.nodes[0].server;
    server.sql(
        "CREATE FUNCTION sift() RETURNS trigger LANGUAGE plpgsql AS
           $$BEGIN RETURN CASE WHEN NEW.id % 2 = 1 OR NEW.v = 'wanted' THEN NEW END; END$$;
         CREATE TRIGGER sift BEFORE INSERT ON sifted FOR EACH ROW EXECUTE FUNCTION sift();
         CREATE TRIGGER sift BEFORE INSERT ON large FOR EACH ROW EXECUTE FUNCTION sift();
         ALTER TABLE sifted ENABLE ALWAYS TRIGGER sift; ALTER TABLE large ENABLE ALWAYS TRIGGER sift;",
    );
    tree.top.sql(
        "INSERT INTO sifted SELECT n, 'old' FROM generate_series(1, 6) n;
         INSERT INTO large SELECT n, 'old', repeat('x', 5000) FROM generate_series(1, 6) n",
    );
    for id in 1..=6 {
        tree.top
            .sql(&format!("UPDATE sifted SET v = 'new' WHERE id = {id}"));
    }
    let done = "SELECT terrace.wait_for(pg_current_wal_lsn(), timeout => '20s')";
    assert_eq!(tree.top.value(done), "t");
    let listed = "SELECT string_agg(id || ' ' || v, ', ' ORDER BY id) FROM";
    let here = |table: &str| server.value(&format!("{listed} {table}"));
    assert_eq!(here("sifted"), "1 new, 3 new, 5 new");
    tree.must_have_no_conflict();
    let log = tree.nodes[0].bridge.logged();
    assert!(!log.contains("with care"), "{log}");

    // One that it does want by now had been missing, and one without all of its values still is.
    tree.top.sql("UPDATE sifted SET v = 'wanted' WHERE id = 4");
    tree.top
        .sql("UPDATE large SET v = 'wanted' WHERE id IN (2, 3)");
    assert_eq!(tree.top.value(done), "t");
    assert_eq!(here("sifted"), "1 new, 3 new, 4 wanted, 5 new");
    assert_eq!(here("large"), "1 old, 3 wanted, 5 old");
    let counted = "SELECT string_agg(\"table\" || ' ' || kind || ' ' || count, ', ' ORDER BY count, \"table\"::text) FROM terrace.conflicts";
    assert_eq!(
        server.value(counted),
        "public.large update_missing 1, public.sifted update_missing 1"
    );
}

// A pile had the locks of all its tables at once, and was gone through one by one when those were
// too many.
#[test]
fn a_pile_of_many_tables_holds_no_more_locks_than_there_are() {
    let tables = 150;
    let schema = format!(
        "DO $$BEGIN FOR n IN 1..{tables} LOOP
             EXECUTE format('CREATE TABLE t_%s (id int PRIMARY KEY, v int)', n);
             EXECUTE format('INSERT INTO t_%s VALUES (1, 0)', n);
             FOR i IN 1..16 LOOP EXECUTE format('CREATE INDEX ON t_%s (v)', n); END LOOP;
             PERFORM terrace.add_table(format('t_%s', n)::regclass);
         END LOOP; END$$;"
    );
    let mut tree = Tree::grow(&schema, &ONE);
    tree.nodes[0].bridge.stop();
    let server = &mut tree.nodes[0].server;
    server.sql("ALTER SYSTEM SET max_locks_per_transaction = 10");
    server.sql("ALTER SYSTEM SET max_connections = 30");
    server.stop();
    server.restart().expect("restart");
    tree.top.sql(&format!(
        "DO $$BEGIN FOR v IN 1..2 LOOP FOR n IN 1..{tables} LOOP
             EXECUTE format('UPDATE t_%s SET v = %s', n, v); COMMIT;
         END LOOP; END LOOP; END$$;"
    ));
    tree.start_bridges_on_a_pile();
    tree.wait_for_equal(&["t_1", "t_100", "t_150"]);
    let log = tree.nodes[0].bridge.logged();
    assert!(log.contains("too many locks"), "it was no matter");
    assert!(!log.contains("applying"), "{log}");
}
