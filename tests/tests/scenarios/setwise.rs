//! What has piled up is applied set-wise: whatever the history, the rows are those
//! of the top.

use std::fmt::Write;

use terrace_tests::random::Random;
use terrace_tests::{Server, Tree, histories, wait_until};

/// Tables that can be folded, and some that cannot.
const SCHEMA: &str = "
    CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
    CREATE TABLE plain (id int PRIMARY KEY, a text, b numeric(12,3), c timestamptz, d mood[]);
    CREATE TABLE pair (x varchar(9), y bigint, doc jsonb, big text, PRIMARY KEY (x, y));
    CREATE TABLE made (id int PRIMARY KEY, twice int GENERATED ALWAYS AS (id * 2) STORED,
                       n int GENERATED ALWAYS AS IDENTITY, note bpchar(5));
    CREATE TABLE only_key (id uuid PRIMARY KEY);
    CREATE TABLE second (id int PRIMARY KEY, u int UNIQUE DEFERRABLE INITIALLY DEFERRED);
    CREATE TABLE keyless (a int, b text);
    SELECT terrace.add_table(t) FROM unnest(ARRAY['plain', 'pair', 'made', 'only_key', 'second',
                                                  'keyless']::regclass[]) t;";
const TABLES: [&str; 6] = ["plain", "pair", "made", "only_key", "second", "keyless"];

/// One statement on few keys, so that each row lives through much.
fn statement(random: &mut Random, foldable: bool) -> String {
    let (k, v) = (random.below(12), random.below(1_000_000));
    let other = random.below(12);
    match random.below(if foldable { 13 } else { 17 }) {
        0 | 1 => format!(
            "INSERT INTO plain VALUES ({k}, 'it''s {{\"{v}\\\\}}', {v}.1, now(), '{{sad,NULL,ok}}') ON CONFLICT DO NOTHING"
        ),
        2 => format!("UPDATE plain SET a = NULL, b = {v} WHERE id = {k}"),
        3 => format!("UPDATE plain SET d = '{{happy}}', c = 'infinity' WHERE id = {k}"),
        4 => format!("DELETE FROM plain WHERE id = {k}"),
        5 => format!(
            "UPDATE plain SET id = {k} WHERE id = {other} AND NOT EXISTS (SELECT FROM plain WHERE id = {k})"
        ),
        6 => format!(
            "INSERT INTO pair VALUES ('k{k}', {other}, '{{\"v\": {v}}}', repeat(md5('{v}'), 400)) ON CONFLICT (x, y) DO UPDATE SET doc = EXCLUDED.doc"
        ),
        7 => format!("UPDATE pair SET doc = NULL WHERE x = 'k{k}'"),
        8 => format!("UPDATE pair SET y = y + 100 WHERE x = 'k{k}' AND y < 12"),
        9 => format!("DELETE FROM pair WHERE y % 5 = {}", v % 5),
        10 => format!(
            "INSERT INTO made (id, note) VALUES ({k}, 'n{}') ON CONFLICT (id) DO UPDATE SET note = 'u'",
            v % 99
        ),
        11 => format!("DELETE FROM made WHERE id = {k}"),
        12 => format!(
            "INSERT INTO only_key VALUES (md5('{k}')::uuid) ON CONFLICT DO NOTHING; UPDATE only_key SET id = id; DELETE FROM only_key WHERE id = md5('{other}')::uuid"
        ),
        13 => format!("INSERT INTO second VALUES ({k}, {other}) ON CONFLICT (id) DO NOTHING"),
        14 => "UPDATE second SET u = u + 1".into(),
        15 => format!("INSERT INTO keyless VALUES ({k}, 'v'), ({k}, 'v')"),
        _ => format!(
            "UPDATE keyless SET b = b || '.' WHERE a = {k}; DELETE FROM keyless WHERE a = {other}"
        ),
    }
}

#[test]
fn whatever_piles_up_the_rows_are_those_of_the_top() {
    let mut tree = Tree::grow(SCHEMA, &[("region", None, 1)]);
    for seed in 4..=8_u64 {
        let mut random = Random::new(seed);
        if seed == 7 {
            // Nothing of what follows deletes it at the top.
            tree.top.sql("INSERT INTO pair VALUES ('lost', -7)");
            tree.wait_for_equal(&TABLES);
        }
        tree.nodes[0].bridge.stop();
        // Rows that do not fit here are resolved for the top, and only then counted.
        if seed == 7 {
            let log = tree.nodes[0].bridge.logged();
            assert!(
                log.matches("applied set-wise").count() > 0,
                "it was hardly tried"
            );
            assert!(
                !log.contains("applying in order") && !log.contains("applying with care"),
                "it did not do what it should"
            );
            tree.nodes[0].server.sql(
                "SET session_replication_role = replica; DELETE FROM plain WHERE id = 3;
                 DELETE FROM pair; INSERT INTO plain SELECT g, 'stray' FROM generate_series(0, 11) g
                 ON CONFLICT DO NOTHING",
            );
        }
        let mut client = tree.top.connect();
        for _ in 0..400 {
            let mut sql = String::from("BEGIN;");
            for _ in 0..=random.below(4) {
                let foldable = seed % 2 == 1;
                write!(sql, "{};", statement(&mut random, foldable)).expect("write");
            }
            sql.push_str("COMMIT");
            // A deferred constraint may refuse some: then they are no history.
            if client.batch_execute(&sql).is_err() {
                client.batch_execute("ROLLBACK").expect("rollback");
            }
        }
        tree.start_bridges_on_a_pile();
        if seed == 7 {
            // What the top changes is as at the top again; the rest is a stray's own.
            tree.top
                .sql("UPDATE plain SET a = 'end'; UPDATE pair SET big = 'end'");
            tree.wait_streaming();
            let missing =
                "SELECT count(*) > 0 FROM terrace.conflicts WHERE kind = 'update_missing'";
            wait_until("conflicts are counted", || tree.top.value(missing) == "t");
            tree.nodes[0]
                .server
                .sql("SET session_replication_role = replica; DELETE FROM plain WHERE a = 'stray'");
        }
        tree.wait_for_equal(&TABLES);
    }
}

#[test]
fn random_histories_come_to_the_same_set_wise_and_in_order() {
    let tried = histories::run(1, 80);
    println!("{tried}");
    tried.must_have_folded();
}

#[test]
fn a_table_that_is_routed_elsewhere_in_the_middle_of_a_pile_stops_there() {
    const DOMAINS: [(&str, Option<&str>, usize); 2] = [("region", None, 1), ("other", None, 1)];
    let schema = "CREATE TABLE t (id int PRIMARY KEY); SELECT terrace.add_table('t')";
    let mut tree = Tree::grow(schema, &DOMAINS);
    for node in &mut tree.nodes {
        node.bridge.stop();
    }
    let route = |domains: &str| {
        tree.top.sql(&format!(
            "BEGIN; SELECT terrace.remove_table('t'); SELECT terrace.add_table('t', {domains}); COMMIT"
        ));
    };
    let insert = |from: i32| {
        let mut client = tree.top.connect();
        for id in from..from + 100 {
            let sql = format!("INSERT INTO t VALUES ({id})");
            client.batch_execute(&sql).expect("insert");
        }
    };
    insert(0);
    route("ARRAY['other']");
    insert(100);
    tree.start_bridges_on_a_pile();
    tree.wait_streaming();
    let ids = "SELECT format('%s %s', count(*), count(*) FILTER (WHERE id / 100 = 1)) FROM t";
    for (node, expected) in tree.nodes.iter().zip(["100 0", "200 100"]) {
        wait_until("the rows are there", || node.server.value(ids) == expected);
        let log = node.bridge.logged();
        assert!(log.contains("applied set-wise"), "it was not tried");
    }
}

#[test]
fn ddl_in_the_middle_of_a_large_transaction_is_run_there() {
    let schema = "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT terrace.add_table('t')";
    let mut tree = Tree::grow(schema, &[("region", None, 1)]);
    tree.nodes[0].bridge.stop();
    tree.top.sql(
        "BEGIN; INSERT INTO t SELECT g, repeat('x', 100) FROM generate_series(1, 20000) g;
         SELECT terrace.replicate_ddl('ALTER TABLE t ADD COLUMN c int');
         UPDATE t SET c = id % 7; DELETE FROM t WHERE id % 100 = 0; COMMIT",
    );
    tree.start_bridges_on_a_pile();
    tree.wait_streaming();
    tree.wait_for_equal(&["t"]);
    tree.top
        .sql("BEGIN; UPDATE t SET c = c + 1; UPDATE t SET v = NULL WHERE c = 3; COMMIT");
    tree.wait_for_equal(&["t"]);
    let log = tree.nodes[0].bridge.logged();
    assert!(log.contains("a part went set-wise"), "nothing was folded");
}

#[test]
fn a_row_that_is_missing_here_does_not_make_a_large_transaction_slow() {
    let schema = "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT terrace.add_table('t');
                  INSERT INTO t SELECT g, repeat('x', 50) FROM generate_series(1, 20000) g";
    let tree = Tree::grow(schema, &[("region", None, 1)]);
    tree.nodes[0]
        .server
        .sql("SET session_replication_role = replica; DELETE FROM t WHERE id = 7");
    tree.top.sql("DELETE FROM t WHERE id <= 15000");
    tree.wait_for_equal(&["t"]);
    let missing = "SELECT count FROM terrace.conflicts WHERE kind = 'delete_missing'";
    wait_until("it is counted", || tree.top.value(missing) == "1");
    let log = tree.nodes[0].bridge.logged();
    assert!(log.contains("a part went set-wise"), "nothing was folded");
    assert!(log.contains("applying in order"), "it was not noticed");
    assert!(!log.contains("applying with care"), "row by row");
}

#[test]
fn a_pile_that_a_constraint_refuses_goes_in_order() {
    let schema = "CREATE TABLE t (id int PRIMARY KEY, u int UNIQUE); SELECT terrace.add_table('t')";
    let mut tree = Tree::grow(schema, &[("region", None, 1)]);
    tree.nodes[0].bridge.stop();
    let mut client = tree.top.connect();
    for id in 0..400 {
        let insert = format!("INSERT INTO t VALUES ({id}, {id})");
        client.batch_execute(&insert).expect("insert");
    }
    // Of all that comes one row cannot be there beside one of this server's own.
    tree.nodes[0]
        .server
        .sql("SET session_replication_role = replica; INSERT INTO t VALUES (-1, 300), (-2, 1000)");
    tree.start_bridges_on_a_pile();
    wait_until("the rows are there", || {
        tree.nodes[0].server.value("SELECT count(*) FROM t") == "401"
    });
    let log = tree.nodes[0].bridge.logged();
    let refused = log.lines().filter(|line| {
        line.contains("applying in order") && line.contains("duplicate key value violates")
    });
    assert_eq!(refused.count(), 1, "{log}");
    let kinds = "SELECT string_agg(kind || count, ' ') FROM terrace.conflicts";
    wait_until("it is counted", || {
        tree.top.value(kinds) == "insert_exists1"
    });
    tree.nodes[0]
        .server
        .sql("SET session_replication_role = replica; DELETE FROM t WHERE id = -2");
    tree.wait_for_equal(&["t"]);
}

// All tables with further constraints used to go in order for a while after one of them had refused a fold.
#[test]
fn a_table_that_refuses_a_fold_keeps_no_other_from_being_folded() {
    let schema = "CREATE TABLE swaps (id int PRIMARY KEY, u int UNIQUE);
         CREATE TABLE grows (id int PRIMARY KEY, u int UNIQUE);
         SELECT terrace.add_table('swaps'), terrace.add_table('grows');
         INSERT INTO swaps VALUES (1, 1), (2, 2); INSERT INTO grows SELECT n, n FROM generate_series(1, 50) n";
    let mut tree = Tree::grow(schema, &[("region", None, 1)]);
    tree.nodes[0].bridge.stop();
    let mut client = tree.top.connect();
    // An odd number of swaps is one in the end, which no order of the two rows lets pass.
    for _ in 0..4 {
        for id in 1..50 {
            let sql = format!(
                "BEGIN; UPDATE grows SET u = u + 1000 WHERE id = {id};
                 UPDATE swaps SET u = u + 10 WHERE id = 1;
                 UPDATE swaps SET u = 3 - u WHERE id = 2; UPDATE swaps SET u = 13 - u WHERE id = 1; COMMIT"
            );
            client.batch_execute(&sql).expect("change");
        }
        let ends_the_pile = "SELECT terrace.replicate_ddl('COMMENT ON TABLE swaps IS ''''')";
        client.batch_execute(ends_the_pile).expect("end the pile");
    }
    tree.start_bridges_on_a_pile();
    tree.wait_for_equal(&["swaps", "grows"]);
    let log = tree.nodes[0].bridge.logged();
    let (_, after) = log.split_once("applying in order").expect("it is refused");
    assert!(after.contains("applied set-wise"), "{after}");
}

/// Changes that pile up by turns: what can be folded, and what of a table without a key cannot.
fn by_turns(tree: &mut Tree, count: i32) {
    tree.nodes[0].bridge.stop();
    let mut client = tree.top.connect();
    for id in 0..count {
        let sql = format!(
            "BEGIN; INSERT INTO t VALUES ({id}, 'v'); UPDATE keyless SET b = b || {id} % 10 WHERE a = {id} % 7;
             UPDATE t SET v = 'w' WHERE id = {id} - 3; DELETE FROM keyless WHERE a = {id} - 7;
             INSERT INTO keyless VALUES ({id}, 'x'), ({id}, 'x'); COMMIT"
        );
        client.batch_execute(&sql).expect("change");
    }
    tree.start_bridges_on_a_pile();
}

#[test]
fn what_cannot_be_folded_goes_in_order_beside_what_can() {
    const COUNT: i32 = 400;
    let schema =
        "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE keyless (a int, b text);
                  SELECT terrace.add_table('t'), terrace.add_table('keyless')";
    let mut tree = Tree::grow(schema, &[("region", None, 1)]);
    by_turns(&mut tree, COUNT);
    tree.wait_for_equal(&["t", "keyless"]);
    let log = tree.nodes[0].bridge.logged();
    let folded = histories::folded(&log);
    assert!(folded >= COUNT as usize - 20, "{folded} were folded");
    assert!(!log.contains("applying in order"), "{log}");

    // A row that is missing is resolved and counted all the same.
    let server = &tree.nodes[0].server;
    server.sql("SET session_replication_role = replica; DELETE FROM keyless WHERE a = 398");
    tree.top.sql(
        "BEGIN; INSERT INTO t SELECT g, 'z' FROM generate_series(1000, 1100) g; \
         UPDATE keyless SET b = 'y' WHERE a = 398; COMMIT",
    );
    let missing = "SELECT sum(count) FROM terrace.conflicts WHERE kind = 'update_missing'";
    wait_until("they are counted", || tree.top.value(missing) == "2");
    tree.wait_for_equal(&["t", "keyless"]);

    // Who may look at other tables sees them as they were.
    server.sql(
        "CREATE TABLE seen (a int, there bigint);
         CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN INSERT INTO public.seen SELECT NEW.a, count(*) FROM public.t; RETURN NULL; END';
         CREATE TRIGGER see AFTER INSERT ON keyless FOR EACH ROW EXECUTE FUNCTION see();
         ALTER TABLE keyless ENABLE ALWAYS TRIGGER see",
    );
    tree.top.sql("TRUNCATE t, keyless");
    by_turns(&mut tree, 100);
    tree.wait_for_equal(&["t", "keyless"]);
    let seen = "SELECT count(*) FROM seen WHERE there = a + 1";
    assert_eq!(tree.nodes[0].server.value(seen), "200");
}

#[test]
fn what_is_altered_here_while_the_bridge_runs_counts_at_once() {
    let schema = "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT terrace.add_table('t')";
    let tree = Tree::grow(schema, &[("region", None, 1)]);
    let (top, node) = (&tree.top, &tree.nodes[0]);
    top.sql("INSERT INTO t SELECT g, 'v' FROM generate_series(1, 20000) g");
    tree.wait_for_equal(&["t"]);
    assert!(node.bridge.logged().contains("a part went set-wise"));
    let comes = |sql: &str, expected: &str| {
        wait_until("it is there", || {
            top.value("SELECT terrace.wait_for(terrace.top_lsn())") == "t"
        });
        assert_eq!(node.server.value(sql), expected);
    };

    // A row keeps what is known of it here alone when it gets another key.
    node.server.sql(
        "ALTER TABLE t ADD COLUMN own text DEFAULT 'new'; SET session_replication_role = replica;
         UPDATE t SET own = 'kept'",
    );
    top.sql("UPDATE t SET id = id + 100000");
    let kept = "SELECT count(*) FROM t WHERE own = 'kept' AND id > 100000";
    comes(kept, "20000");

    // A trigger sees each change, also where they come to nothing.
    node.server.sql(
        "CREATE TABLE seen (what text);
         CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN INSERT INTO public.seen VALUES (TG_OP); RETURN NULL; END';
         CREATE TRIGGER see AFTER INSERT OR UPDATE OR DELETE ON t FOR EACH ROW EXECUTE FUNCTION see();
         ALTER TABLE t ENABLE ALWAYS TRIGGER see",
    );
    top.sql(
        "BEGIN; INSERT INTO t SELECT g, 'v' FROM generate_series(1, 1000) g;
         UPDATE t SET v = 'w' WHERE id <= 1000; DELETE FROM t WHERE id <= 1000; COMMIT",
    );
    let seen = "SELECT string_agg(format('%s %s', what, n), ', ' ORDER BY what)
                FROM (SELECT what, count(*) AS n FROM seen GROUP BY what) s";
    let each = "DELETE 1000, INSERT 1000, UPDATE 1000";
    comes(seen, each);

    // So does a trigger of another table that is in its place, as its schema is.
    node.server.sql(
        "SET session_replication_role = replica; CREATE SCHEMA next;
         CREATE TABLE next.t (LIKE t INCLUDING ALL); INSERT INTO next.t SELECT * FROM t;
         CREATE TRIGGER see AFTER INSERT OR UPDATE OR DELETE ON next.t FOR EACH ROW EXECUTE FUNCTION see();
         ALTER TABLE next.t ENABLE ALWAYS TRIGGER see;
         DROP TRIGGER see ON t; CREATE SCHEMA seen; ALTER TABLE seen SET SCHEMA seen;
         CREATE OR REPLACE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN INSERT INTO seen.seen VALUES (TG_OP); RETURN NULL; END';
         TRUNCATE seen.seen",
    );
    // What was made here is known by now.
    top.sql("UPDATE t SET v = v WHERE id = 100001");
    comes("SELECT count(*) FROM t", "20000");
    node.server.sql(
        "BEGIN; ALTER SCHEMA public RENAME TO before; ALTER SCHEMA next RENAME TO public; COMMIT",
    );
    top.sql(
        "BEGIN; INSERT INTO t SELECT g, 'v' FROM generate_series(1, 1000) g;
         UPDATE t SET v = 'w' WHERE id <= 1000; DELETE FROM t WHERE id <= 1000; COMMIT",
    );
    comes(&seen.replace("FROM seen", "FROM seen.seen"), each);

    // What changes nothing of that is no reason to do anything twice.
    let again = |log: &str| log.matches("applying in order").count();
    let before = again(&node.bridge.logged());
    node.server
        .sql("ALTER TABLE t DROP COLUMN own; DROP TRIGGER see ON t");
    top.sql("UPDATE t SET v = 'x'");
    tree.wait_for_equal(&["t"]);
    node.server.sql("ANALYZE t");
    top.sql(
        "BEGIN; TRUNCATE t; INSERT INTO t SELECT g, 'y' FROM generate_series(1, 20000) g; COMMIT",
    );
    tree.wait_for_equal(&["t"]);
    assert_eq!(again(&node.bridge.logged()), before);
}

#[test]
fn a_row_of_which_only_the_key_is_told_is_missed_all_the_same() {
    let schema = "CREATE TABLE bare (id int PRIMARY KEY); SELECT terrace.add_table('bare');
                  INSERT INTO bare SELECT generate_series(1, 2000)";
    let tree = Tree::grow(schema, &[("region", None, 1)]);
    tree.nodes[0]
        .server
        .sql("SET session_replication_role = replica; DELETE FROM bare WHERE id = 7");
    tree.top.sql("UPDATE bare SET id = id");
    tree.wait_for_equal(&["bare"]);
    let missing = "SELECT count FROM terrace.conflicts WHERE kind = 'update_missing'";
    wait_until("it is counted", || tree.top.value(missing) == "1");
    let log = tree.nodes[0].bridge.logged();
    assert!(log.contains("applying in order"), "it was not tried");
}

#[test]
fn what_is_for_others_does_not_cut_a_pile_short() {
    const DOMAINS: [(&str, Option<&str>, usize); 2] = [("region", None, 1), ("other", None, 1)];
    let schema = "CREATE TABLE t (id int PRIMARY KEY); SELECT terrace.add_table('t')";
    let mut tree = Tree::grow(schema, &DOMAINS);
    for node in &mut tree.nodes {
        node.bridge.stop();
    }
    let mut client = tree.top.connect();
    for id in 0..400 {
        let domain = DOMAINS[id % 2].0;
        let sql = format!("SET terrace.domains = '{domain}'; INSERT INTO t VALUES ({id})");
        client.batch_execute(&sql).expect("insert");
    }
    tree.start_bridges_on_a_pile();
    for (node, remainder) in tree.nodes.iter().zip(0..) {
        let count = format!("SELECT count(*) FROM t WHERE id % 2 = {remainder}");
        wait_until("the rows are there", || node.server.value(&count) == "200");
        assert_eq!(node.server.value("SELECT count(*) FROM t"), "200");
        let largest = histories::piles(&node.bridge.logged()).max();
        assert!(largest >= Some(100), "{largest:?} at most went together");
    }
}

#[test]
fn what_goes_in_order_sends_no_pile_that_way() {
    let schema = "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE other (id int PRIMARY KEY);
         SELECT terrace.add_table('t'), terrace.add_table('other')";
    let mut tree = Tree::grow(schema, &[("region", None, 1)]);
    tree.top.sql("INSERT INTO t VALUES (-1)");
    tree.top.sql("INSERT INTO other VALUES (-1)");
    tree.wait_for_equal(&["t", "other"]);
    tree.nodes[0].bridge.stop();
    let mut client = tree.top.connect();
    for id in 0..1000 {
        let also = match id {
            300 => "TRUNCATE other",
            _ if id % 80 == 0 => "SELECT terrace.send('heard', 'it')",
            _ => "SELECT",
        };
        let sql = format!("BEGIN; INSERT INTO t VALUES ({id}); {also}; COMMIT");
        client.batch_execute(&sql).expect("change");
    }
    tree.start_bridges_on_a_pile();
    tree.wait_for_equal(&["t", "other"]);
    let log = tree.nodes[0].bridge.logged();
    let folded = histories::folded(&log);
    assert!(folded >= 600, "{folded} of 1000 were folded");
    assert!(!log.contains("applying"), "{log}");
}

/// Until the bridge's session waits for a lock of the table.
fn wait_for_lock(server: &Server, table: &str) {
    let sql = format!(
        "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = '{table}'::regclass"
    );
    wait_until("the apply waits", || server.value(&sql) == "1");
}

/// Until all that was committed is in the queues, applied or not.
fn wait_received(top: &Server) {
    let end = top.value("SELECT pg_current_wal_lsn()");
    let received =
        format!("SELECT bool_and(flush_lsn >= '{end}') FROM terrace.lag WHERE level > 0");
    wait_until("all is there", || top.value(&received) == "t");
}

// A transaction that goes set-wise among others that go in order waits for who alters its table.
#[test]
fn what_is_altered_here_counts_for_what_was_sent_before() {
    let schema = "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE z (id int PRIMARY KEY);
                  CREATE TABLE keyless (a int); INSERT INTO keyless VALUES (1);
                  SELECT terrace.add_table('t'), terrace.add_table('z'), terrace.add_table('keyless');
                  INSERT INTO t SELECT g, 'v' FROM generate_series(1, 200) g";
    let tree = Tree::grow(schema, &[("region", None, 1)]);
    let (top, node) = (&tree.top, &tree.nodes[0]);
    top.sql("UPDATE t SET v = 'w'; INSERT INTO z VALUES (0); UPDATE keyless SET a = 2");
    tree.wait_for_equal(&["t", "z", "keyless"]);
    let first = node.server.lock("z");
    top.sql("INSERT INTO z VALUES (1)");
    wait_for_lock(&node.server, "z");
    let mut second = node.server.connect();
    let alter =
        "BEGIN; SET LOCAL session_replication_role = replica; ALTER TABLE t ADD COLUMN c int;
                 ALTER TABLE t ADD COLUMN own text DEFAULT 'new'; UPDATE t SET own = 'kept'";
    second.batch_execute(alter).expect("alter");
    // The first is no matter for a fold, so all go in order, but for the second, which is large.
    top.sql("UPDATE keyless SET a = 3; SELECT terrace.send('c', 'x')");
    top.sql("UPDATE t SET id = id + 1000");
    top.sql("ALTER TABLE t ADD COLUMN c int");
    top.sql("UPDATE t SET c = 7 WHERE id = 1001");
    wait_received(top);
    let folded = |log: &str| log.matches("a part went set-wise").count();
    let before = folded(&node.bridge.logged());
    drop(first);
    wait_for_lock(&node.server, "t");
    wait_until("it is folded", || folded(&node.bridge.logged()) > before);
    second.batch_execute("COMMIT").expect("commit");
    wait_until("the rows are there", || {
        node.server.value("SELECT count(*) FROM t WHERE c = 7") == "1"
    });
    let kept = "SELECT count(*) FROM t WHERE own = 'kept' AND id > 1000";
    assert_eq!(node.server.value(kept), "200");
}

// A table that is left out of a fold, as its rows are told whole, gets a trigger meanwhile.
#[test]
fn who_may_look_at_other_tables_from_now_on_sees_them_as_they_were() {
    let schema = "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE z (id int PRIMARY KEY);
                  CREATE TABLE whole (id int PRIMARY KEY, v int); INSERT INTO whole VALUES (1, 0);
                  ALTER TABLE whole REPLICA IDENTITY FULL;
                  SELECT terrace.add_table('t'), terrace.add_table('z'), terrace.add_table('whole')";
    let tree = Tree::grow(schema, &[("region", None, 1)]);
    let (top, server) = (&tree.top, &tree.nodes[0].server);
    server.sql(
        "CREATE TABLE seen (v int, there bigint);
         CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN INSERT INTO public.seen SELECT NEW.v, count(*) FROM public.t; RETURN NULL; END'",
    );
    top.sql("INSERT INTO t VALUES (0); INSERT INTO z VALUES (0); UPDATE whole SET v = 0");
    tree.wait_for_equal(&["t", "z", "whole"]);
    let first = server.lock("z");
    top.sql("INSERT INTO z VALUES (1)");
    wait_for_lock(server, "z");
    let second = server.lock("t");
    let mut client = top.connect();
    for v in 1..=100 {
        let sql = format!("BEGIN; INSERT INTO t VALUES ({v}); UPDATE whole SET v = {v}; COMMIT");
        client.batch_execute(&sql).expect("change");
    }
    wait_received(top);
    drop(first);
    wait_for_lock(server, "t");
    server.sql(
        "CREATE TRIGGER see AFTER UPDATE ON whole FOR EACH ROW EXECUTE FUNCTION see();
         ALTER TABLE whole ENABLE ALWAYS TRIGGER see",
    );
    drop(second);
    tree.wait_for_equal(&["t", "z", "whole"]);
    let log = tree.nodes[0].bridge.logged();
    assert!(log.contains("a table was altered"), "{log}");
    let seen = "SELECT count(*) FROM seen WHERE there = v + 1";
    assert_eq!(server.value(seen), "100");
}
