//! Local rows that have a unique value of one of the top's.

use terrace_tests::{Tree, wait_until};

use crate::stalls::wait_stalled;

const TREE: [(&str, Option<&str>, usize); 2] = [("region", None, 1), ("branch", Some("region"), 1)];

const SCHEMA: &str = "
    CREATE TABLE person (id int PRIMARY KEY, email text UNIQUE, code int, n numeric, part int, line int,
                         UNIQUE (line, part));
    CREATE UNIQUE INDEX ON person (code);
    CREATE UNIQUE INDEX ON person (lower(email)) WHERE n > 1000;
    CREATE TABLE plain (a int NOT NULL, b text);
    CREATE UNIQUE INDEX plain_a ON plain (a);
    ALTER TABLE plain REPLICA IDENTITY USING INDEX plain_a;
    CREATE TABLE late (id int PRIMARY KEY, v text, w int UNIQUE DEFERRABLE);
    SELECT terrace.add_table(r) FROM unnest('{person, plain, late}'::regclass[]) r;
    INSERT INTO person SELECT g, 'p' || g, g, g, g, g FROM generate_series(1, 5) g";

const NAMES: [&str; 3] = ["person", "plain", "late"];

/// Where nobody should write, somebody does.
fn accident(tree: &mut Tree, node: &str, sql: &str) {
    let sql = format!("SET session_replication_role = replica; {sql}");
    tree.node(node).server.sql(&sql);
}

#[test]
fn a_local_row_gives_way_to_one_of_the_top_s() {
    let mut tree = Tree::grow(SCHEMA, &TREE);
    tree.wait_for_equal(&NAMES);
    accident(
        &mut tree,
        "branch-1",
        "INSERT INTO person VALUES (101, 'a', NULL, 0, 100, 200), (102, 'b', NULL, 0, 7, 7), (106, NULL, 77, 0, 6, 7),
                                   (103, 'c', 78, 0, 8, 9), (104, 'keep', 79, 0, 9, 8), (105, NULL, NULL, 0, 1, NULL);
         INSERT INTO late VALUES (50, 'local', 50)",
    );
    accident(
        &mut tree,
        "region-1",
        "INSERT INTO person VALUES (7, 'other', 80, 0, 50, 50), (109, 'd', 81, 0, 51, 51)",
    );
    for change in [
        // By one value, by two, by an update, by two columns; and with a null, which is in nobody's way.
        "INSERT INTO person VALUES (6, 'a', NULL, 0, 10, 20)",
        "INSERT INTO person VALUES (7, 'b', 77, 0, 10, 30)",
        "UPDATE person SET code = 78 WHERE id = 3",
        "UPDATE person SET n = 9.50 WHERE id = 3",
        "UPDATE person SET email = 'd', part = 51, line = 51 WHERE id = 2",
        "INSERT INTO person VALUES (8, NULL, NULL, 0, 1, NULL)",
        "INSERT INTO plain VALUES (1, 'top')",
        "INSERT INTO late VALUES (1, 'top', 1)",
        // Values that change hands within one transaction.
        "BEGIN; UPDATE person SET code = -1 WHERE id = 4; UPDATE person SET code = 4 WHERE id = 5;
         UPDATE person SET code = 5 WHERE id = 4; COMMIT",
    ] {
        tree.top.sql(change);
    }
    // What was in nobody's way is still there.
    accident(
        &mut tree,
        "branch-1",
        "DELETE FROM person WHERE id IN (104, 105); DELETE FROM late WHERE id = 50",
    );
    tree.wait_for_equal(&NAMES);
    let counted = "SELECT string_agg(concat_ws(' ', node, \"table\", kind, count, last_key), ', ' \
                   ORDER BY node, \"table\", kind) FROM terrace.conflicts";
    let expected = "branch-1 public.person insert_exists 1 (id)=(6), \
                    branch-1 public.person multiple_unique_conflicts 2 (id)=(7), \
                    branch-1 public.person update_exists 1 (id)=(3), \
                    region-1 public.person insert_exists 1 (id)=(7), \
                    region-1 public.person update_exists 1 (id)=(2)";
    wait_until("conflicts are told", || tree.top.value(counted) == expected);
    // Nothing of the top's was put aside, and what made way is kept.
    let kept = "SELECT string_agg(concat_ws(' ', relation, kind, old), ', ' ORDER BY seq) FROM terrace.quarantine";
    let row = |id: u32, email: &str, code: &str, part: u32, line: u32| {
        format!(
            "public.person LOCAL {{\"n\": \"0\", \"id\": \"{id}\", \"code\": {code}, \"line\": \"{line}\", \
             \"part\": \"{part}\", \"email\": {email}}}"
        )
    };
    assert_eq!(
        tree.node("branch-1").server.value(kept),
        [
            row(101, "\"a\"", "null", 100, 200),
            row(102, "\"b\"", "null", 7, 7),
            row(106, "null", "\"77\"", 6, 7),
            row(103, "\"c\"", "\"78\"", 8, 9),
        ]
        .join(", ")
    );
    let local = "SELECT string_agg(concat_ws(' ', kind, old ->> 'id'), ', ' ORDER BY seq) FROM terrace.quarantine";
    let region = &tree.node("region-1").server;
    assert_eq!(region.value(local), "LOCAL 109");
    for node in &tree.nodes {
        let log = node.bridge.logged();
        assert!(log.contains("applying with care"), "{}", node.bridge.name);
        assert!(!log.contains("cannot be applied"), "{}", node.bridge.name);
    }
}

// A constraint that is only here says nothing of the top's rows, and takes none of them away.
#[test]
fn what_is_unique_here_alone_stalls_and_takes_no_row_away() {
    let mut tree = Tree::grow(SCHEMA, &[("region", None, 1)]);
    tree.wait_for_equal(&NAMES);
    tree.node("region-1")
        .server
        .sql("CREATE UNIQUE INDEX own ON person (n)");
    // The top lets go of one that stays here.
    tree.top.sql("DROP INDEX person_code_idx");
    tree.top
        .sql("INSERT INTO person VALUES (6, 'six', 6, 5, 6, 6)");
    wait_stalled(
        &tree.nodes[0],
        &["own", "public.person", "cannot be applied"],
    );
    let rows = "SELECT string_agg(id::text, ' ' ORDER BY id) FROM person";
    let server = &tree.nodes[0].server;
    assert_eq!(server.value(rows), "1 2 3 4 5");
    server.sql("DROP INDEX own");
    wait_until("it goes on", || server.value(rows) == "1 2 3 4 5 6");
    tree.top
        .sql("INSERT INTO person VALUES (7, 'seven', 6, 7, 7, 7)");
    wait_stalled(&tree.nodes[0], &["person_code_idx", "public.person"]);
    assert_eq!(server.value(rows), "1 2 3 4 5 6");
    server.sql("DROP INDEX person_code_idx");
    tree.wait_for_equal(&NAMES);
    // A row of the top's that was changed here: whoever did may know what it was.
    let accident = "SET session_replication_role = replica; UPDATE person SET email =";
    server.sql(&format!("{accident} 'taken' WHERE id = 1"));
    tree.top
        .sql("INSERT INTO person VALUES (8, 'taken', 8, 8, 8, 8)");
    wait_stalled(&tree.nodes[0], &["person_email_key", "public.person"]);
    server.sql(&format!("{accident} 'p1' WHERE id = 1"));
    tree.wait_for_equal(&NAMES);
    tree.must_have_no_conflict();
}

// A server that shows what it has at once may be ahead of the one that it asks.
#[test]
fn a_row_that_is_not_above_yet_takes_no_harm() {
    let at_once = "\n[apply]\nwait_for_upstream = false\n";
    let tree = Tree::grow_with(at_once, SCHEMA, &TREE);
    tree.wait_for_equal(&NAMES);
    let (region, node) = (&tree.nodes[0].server, &tree.nodes[1]);
    let branch = &node.server;
    branch.sql("CREATE UNIQUE INDEX own ON person (n)");
    // What region waits for.
    let mut held = region.connect();
    held.batch_execute(
        "SET session_replication_role = replica; BEGIN; INSERT INTO person (id) VALUES (10)",
    )
    .expect("hold a key");
    tree.top
        .sql("INSERT INTO person VALUES (10, 'x', 10, 50, 10, 10), (11, 'y', 11, 50, 11, 11)");
    wait_stalled(node, &["has not come to"]);
    held.batch_execute("ROLLBACK").expect("let go");
    wait_stalled(node, &["own", "public.person"]);
    branch.sql("DROP INDEX own");
    tree.wait_for_equal(&NAMES);
    tree.must_have_no_conflict();
}

// Two rows of the top's that have one key here: neither makes way for the other.
#[test]
fn a_key_that_is_none_at_the_top_takes_no_row_away() {
    let schema = "CREATE TABLE pair (a int, b int, c text, PRIMARY KEY (a, b));
        CREATE TABLE whole (a int, c text);
        ALTER TABLE whole REPLICA IDENTITY FULL;
        CREATE TABLE told (id int PRIMARY KEY, c text);
        ALTER TABLE told REPLICA IDENTITY FULL;
        SELECT terrace.add_table(r) FROM unnest('{pair, whole, told}'::regclass[]) r;
        INSERT INTO pair VALUES (1, 1, 'x'); INSERT INTO whole VALUES (1, 'x')";
    let mut tree = Tree::grow(schema, &[("region", None, 1)]);
    let names = ["pair", "whole", "told"];
    tree.wait_for_equal(&names);
    let narrow = "ALTER TABLE pair DROP CONSTRAINT pair_pkey; ALTER TABLE pair ADD PRIMARY KEY (a);
                  ALTER TABLE whole ADD PRIMARY KEY (a)";
    tree.node("region-1").server.sql(narrow);
    accident(
        &mut tree,
        "region-1",
        "INSERT INTO told VALUES (7, 'local')",
    );
    tree.top.sql("INSERT INTO told VALUES (7, 'top')");
    tree.wait_for_equal(&["told"]);
    for (table, insert) in [
        ("pair", "INSERT INTO pair VALUES (1, 2, 'y')"),
        ("whole", "INSERT INTO whole VALUES (1, 'y')"),
    ] {
        tree.top.sql(insert);
        let key = format!("{table}_pkey");
        wait_stalled(&tree.nodes[0], &[&key, "cannot be applied"]);
        let server = &tree.nodes[0].server;
        assert_eq!(server.value(&format!("SELECT c FROM {table}")), "x");
        server.sql(&format!("ALTER TABLE {table} DROP CONSTRAINT {key}"));
        tree.wait_for_equal(&names);
    }
    let counted =
        "SELECT string_agg(concat_ws(' ', \"table\", kind, count), ', ') FROM terrace.conflicts";
    wait_until("the one that made way is told", || {
        tree.top.value(counted) == "public.told insert_exists 1"
    });
}

// The server above is asked about the constraint as it is here, and about the table of the stream.
#[test]
fn another_constraint_or_another_table_above_says_nothing_of_a_row() {
    let mut tree = Tree::grow(SCHEMA, &[("region", None, 1)]);
    tree.wait_for_equal(&NAMES);
    let rows = "SELECT string_agg(id::text, ' ' ORDER BY id) FROM person";
    // What differs at the top by its case is one here.
    tree.nodes[0].server.sql(
        "ALTER TABLE person DROP CONSTRAINT person_email_key;
         CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
         ALTER TABLE person ALTER email TYPE text COLLATE loose; CREATE UNIQUE INDEX loose_key ON person (email)",
    );
    let local = "INSERT INTO person VALUES (201, 'Q', 201, 0, 201, 201)";
    accident(&mut tree, "region-1", local);
    tree.top
        .sql("INSERT INTO person VALUES (6, 'q', 6, 6, 6, 6)");
    wait_stalled(&tree.nodes[0], &["loose_key"]);
    assert_eq!(tree.nodes[0].server.value(rows), "1 2 3 4 5 201");
    tree.nodes[0]
        .server
        .sql("DROP INDEX loose_key; CREATE UNIQUE INDEX ON person (email COLLATE \"default\")");
    accident(&mut tree, "region-1", "DELETE FROM person WHERE id = 201");
    tree.wait_for_equal(&["person"]);
    // Before the top is asked, its table becomes another one, without that row.
    accident(
        &mut tree,
        "region-1",
        "UPDATE person SET email = 'taken' WHERE id = 1",
    );
    let held = tree.nodes[0].server.lock("person");
    tree.top.sql(
        "INSERT INTO person VALUES (9, 'taken', 9, 9, 9, 9);
         CREATE TABLE person_new (LIKE person INCLUDING ALL); ALTER TABLE person RENAME TO person_old;
         ALTER TABLE person_new RENAME TO person",
    );
    drop(held);
    wait_stalled(&tree.nodes[0], &["public.person"]);
    assert_eq!(tree.nodes[0].server.value(rows), "1 2 3 4 5 6");
}

// Two rows have one key for a while within a transaction, which the servers below do not allow.
#[test]
fn a_key_that_is_deferrable_at_the_top_alone_loses_no_row() {
    let mut tree = Tree::plant(
        "CREATE TABLE t (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, v text);
         ALTER TABLE t REPLICA IDENTITY FULL; INSERT INTO t SELECT g, g FROM generate_series(1, 9) g;
         SELECT terrace.add_table('t')",
    )
    .expect("boot the top");
    tree.boot(&TREE).expect("boot the servers");
    for node in &tree.nodes {
        node.server
            .sql("CREATE TABLE t (id int PRIMARY KEY, v text)");
    }
    tree.start_bridges().expect("start the bridges");
    tree.wait_streaming();
    tree.wait_for_equal(&["t"]);
    let key = |tree: &Tree, kind: &str| {
        for node in &tree.nodes {
            node.server.sql(&format!(
                "ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (id) {kind}"
            ));
        }
    };
    let mut stalled = 0;
    for change in [
        "UPDATE t SET id = 3 - id WHERE id < 3",
        "UPDATE t SET id = id + 1",
        "UPDATE t SET id = 6 WHERE v = '4'; DELETE FROM t WHERE v = '5'; UPDATE t SET id = 20 WHERE v = '4'",
        "UPDATE t SET id = 8 WHERE v = '6'; UPDATE t SET id = 30 WHERE v = '7'; UPDATE t SET id = 31 WHERE v = '6'",
        "INSERT INTO t VALUES (9, 'new'); DELETE FROM t WHERE v = '8'",
        "INSERT INTO t VALUES (10, 'newer'); UPDATE t SET id = 40 WHERE v = '9'",
    ] {
        tree.top.sql(&format!("BEGIN; {change}; COMMIT"));
        let equal = |tree: &Tree| {
            let wanted = tree.top.checksum("t").expect("sum");
            let mut nodes = tree.nodes.iter();
            nodes.all(|node| node.server.checksum("t").expect("sum") == wanted)
        };
        let stalls = "SELECT count(*) FROM terrace.lag WHERE state = 'stalled'";
        wait_until("it is applied, or stands still", || {
            equal(&tree) || tree.top.value(stalls) != "0"
        });
        if !equal(&tree) {
            stalled += 1;
            key(&tree, "DEFERRABLE");
            tree.wait_for_equal(&["t"]);
            key(&tree, "");
            wait_until("nobody stalls", || tree.top.value(stalls) == "0");
        }
    }
    assert!(stalled > 0, "nothing was in the way");
}
