//! What stops a server, says why, loses nothing, and goes on when it is mended.

use std::fs;

use terrace_tests::bridge::options;
use terrace_tests::load::{GAPLESS, STEPS, WIDE, count_up, fill_wide};
use terrace_tests::{Bridge, Disk, Node, Scratch, Server, ServerOptions, Tree, wait_until};

const ONE: [(&str, Option<&str>, usize); 1] = [("region", None, 1)];

/// Waits until the server itself says that it is stalled, for a reason that has these words.
pub fn wait_stalled(node: &Node, words: &[&str]) {
    let sql = "SELECT state || ': ' || coalesce(reason, '') FROM terrace.lag";
    let mut said = String::new();
    wait_until(&format!("stalled for {words:?}"), || {
        said = node.server.value(sql);
        said.starts_with("stalled") && words.iter().all(|word| said.contains(word))
    });
}

/// Orders that what the server says cannot be applied is left out.
fn leave_out(node: &Node) {
    let reason = format!(
        "SELECT substring(reason FROM 'ends at ([0-9A-F/]+)') FROM terrace.lag WHERE node = '{}'",
        node.server.name
    );
    let lsn = node.server.value(&reason);
    let skipped = node.bridge.command("skip", &["--lsn", &lsn]);
    assert!(skipped.expect("run skip").status.success());
}

fn check_says(node: &Node, words: &str) {
    let output = node.bridge.run("check").expect("run check");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(
        output.status.code() == Some(1) && said.contains(words),
        "{words}: {said}"
    );
}

#[test]
fn a_missing_table_or_column_stalls_until_it_is_made() {
    let tree = Tree::grow(STEPS, &ONE);
    let node = &tree.nodes[0];
    tree.top.sql(
        "CREATE TABLE price (id int PRIMARY KEY, cents int);
         SELECT terrace.add_table('price'); INSERT INTO price VALUES (1, 30)",
    );
    wait_stalled(
        node,
        &["table \"public.price\" does not exist", "create it"],
    );
    check_says(node, "table public.price is missing on this server");
    node.server.sql("CREATE TABLE price (id int PRIMARY KEY)");
    wait_stalled(node, &["table \"public.price\" has no column \"cents\""]);
    check_says(
        node,
        "table public.price lacks columns on this server: cents",
    );
    node.server.sql("ALTER TABLE price ADD cents int");
    tree.wait_for_equal(&["price"]);
    node.server
        .sql("ALTER TABLE price ALTER cents TYPE smallint");
    tree.top.sql("INSERT INTO price VALUES (2, 70000)");
    wait_stalled(
        node,
        &["of table \"public.price\" cannot hold", "out of range"],
    );
    // The value is for those who may read the table.
    let quoted = "SELECT count(*) FROM terrace.lag WHERE reason LIKE '%70000%'";
    assert_eq!(tree.top.value(quoted), "0");
    assert!(node.bridge.logged().contains("\"70000\" is out of range"));
    node.server.sql("ALTER TABLE price ALTER cents TYPE int");
    tree.wait_for_equal(&["price"]);
    tree.wait_streaming();
}

#[test]
fn a_slot_that_was_dropped_is_missed() {
    let mut tree = Tree::grow(STEPS, &ONE);
    let counting = count_up(&tree.top);
    counting.go_on(20);
    tree.nodes[0].bridge.stop();
    tree.wait_slot_free("region");
    tree.top
        .sql("SELECT pg_drop_replication_slot('terrace_region')");
    tree.start_bridges().expect("start the bridge");
    wait_stalled(
        &tree.nodes[0],
        &["\"terrace_region\" does not exist", "resync"],
    );
    counting.go_on(20);
    // The way out that the message names.
    tree.nodes[0].bridge.resync();
    tree.wait_streaming();
    counting.go_on(20);
    counting.stop();
    tree.wait_for_equal(&["steps", "trail"]);
    assert_eq!(tree.nodes[0].server.value(GAPLESS), "t");
    let events = "SELECT count(*) FROM terrace.events WHERE kind = 'resync'";
    wait_until("the top knows of it", || tree.top.value(events) == "1");
}

// The way out when a transaction cannot be applied and never will be.
#[test]
fn a_transaction_that_stands_in_the_way_is_left_out_when_told() {
    let tree = Tree::grow(STEPS, &ONE);
    let node = &tree.nodes[0];
    let skip = |lsn: &str| {
        let output = node
            .bridge
            .command("skip", &["--lsn", lsn])
            .expect("run skip");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), said)
    };
    let (code, said) = skip("0/1");
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("nothing stands in the way"), "{said}");
    node.server
        .sql("ALTER TABLE steps ADD CONSTRAINT picky CHECK (n % 100 <> 50)");
    tree.top
        .sql("INSERT INTO steps SELECT generate_series(1, 40)");
    tree.top.sql(
        "BEGIN; SET LOCAL terrace.label = 'the bad one'; INSERT INTO steps VALUES (50), (51);
         COMMIT",
    );
    tree.top.sql("INSERT INTO steps VALUES (60)");
    wait_stalled(node, &["picky", "the transaction that ends at"]);
    let reason = "SELECT substring(reason FROM 'ends at ([0-9A-F/]+)') FROM terrace.lag";
    let lsn = node.server.value(reason);
    let (code, said) = skip("0/1");
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains(&lsn), "{said}");
    assert_eq!(skip("nonsense").0, Some(2));
    let (code, said) = skip(&lsn);
    assert_eq!(code, Some(0), "{said}");
    let rows = "SELECT string_agg(n::text, ' ' ORDER BY n) FROM steps WHERE n > 39";
    wait_until("it goes on without it", || {
        node.server.value(rows) == "40 60"
    });
    tree.wait_streaming();
    let told = "SELECT reason FROM terrace.events WHERE kind = 'skipped'";
    wait_until("the top is told", || {
        tree.top.value(told).contains("the bad one")
    });
    // One that comes after it is not left out.
    tree.top.sql("INSERT INTO steps VALUES (150)");
    wait_stalled(node, &["picky"]);
    node.server.sql("ALTER TABLE steps DROP CONSTRAINT picky");
    tree.wait_streaming();
    wait_until("it is applied", || node.server.value(rows) == "40 60 150");
}

#[test]
fn rows_that_are_refused_are_put_aside_when_that_is_wanted() {
    let tree = Tree::grow_with("[apply]\non_error = \"quarantine\"", STEPS, &ONE);
    let node = &tree.nodes[0];
    tree.top.sql("INSERT INTO steps VALUES (1), (2), (3)");
    tree.wait_for_equal(&["steps"]);
    node.server
        .sql("ALTER TABLE steps ADD CONSTRAINT picky CHECK (n % 100 <> 50)");
    let position = || tree.top.value("SELECT pg_current_wal_insert_lsn()");
    let before = position();
    tree.top.sql(
        "BEGIN; INSERT INTO steps VALUES (50), (51); UPDATE steps SET n = 150 WHERE n = 2;
         INSERT INTO trail VALUES (7); DELETE FROM steps WHERE n = 3; COMMIT",
    );
    let after = position();
    tree.top.sql("INSERT INTO steps VALUES (60)");
    let rows = "SELECT string_agg(n::text, ' ' ORDER BY n) FROM steps";
    wait_until("the rest is applied", || {
        node.server.value(rows) == "1 2 51 60"
    });
    assert_eq!(node.server.value("SELECT n FROM trail"), "7");
    tree.wait_streaming();
    let aside = "SELECT string_agg(format('%s %s %s %s %s %s', relation, kind, old ->> 'n', \
                 new ->> 'n', sqlstate, error ~ 'picky'), '; ' ORDER BY lsn) \
                 FROM terrace.quarantine";
    assert_eq!(
        node.server.value(aside),
        "public.steps INSERT  50 23514 t; public.steps UPDATE 2 150 23514 t"
    );
    let there =
        format!("SELECT bool_and(lsn >= '{before}' AND lsn <= '{after}') FROM terrace.quarantine");
    assert_eq!(node.server.value(&there), "t");
    let told = "SELECT count(*) > 0 FROM terrace.events WHERE kind = 'quarantine'";
    wait_until("the top is told", || tree.top.value(told) == "t");
    // The value is for those who may read the table.
    node.server.sql("ALTER TABLE steps ALTER n TYPE smallint");
    tree.top.sql("INSERT INTO steps VALUES (70007)");
    let kept = "SELECT count(*) FROM terrace.quarantine WHERE error LIKE '%\"70007\"%'";
    wait_until("it is put aside", || node.server.value(kept) == "1");
    let told = "SELECT count(*) FROM terrace.events WHERE reason LIKE '%\"…\" is out of range%'";
    wait_until("the top is told", || tree.top.value(told) == "1");
    // What can be mended stalls all the same.
    node.server.sql(
        "CREATE FUNCTION broken() RETURNS trigger LANGUAGE plpgsql AS
         'BEGIN PERFORM missing(); RETURN NEW; END';
         CREATE TRIGGER broken BEFORE INSERT ON steps FOR EACH ROW EXECUTE FUNCTION broken();
         ALTER TABLE steps ENABLE ALWAYS TRIGGER broken",
    );
    tree.top.sql("INSERT INTO steps VALUES (61)");
    wait_stalled(node, &["function missing() does not exist"]);
    node.server.sql("DROP TRIGGER broken ON steps");
    wait_until("it goes on", || node.server.value(rows) == "1 2 51 60 61");
}

#[test]
fn an_extension_of_another_version_is_named() {
    let scratch = Scratch::new("terrace-").expect("scratch");
    let top = Server::top(&scratch).expect("boot the top");
    let server = Server::start(&scratch, "server", &ServerOptions::default()).expect("boot");
    top.sql("SELECT terrace.create_domain('region')");
    server.sql("UPDATE pg_extension SET extversion = '0.0.9' WHERE extname = 'terrace'");
    let bridge = Bridge::start(&scratch, &options(&server, "region", &[top.conninfo()]));
    let bridge = bridge.expect("start");
    wait_until("the log names both versions", || {
        let log = bridge.logged();
        log.contains("0.0.9") && log.contains("ALTER EXTENSION terrace UPDATE")
    });
    let output = bridge.run("check").expect("run check");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("is of version 0.0.9"), "{said}");
    server.sql("UPDATE pg_extension SET extversion = '0.1.0' WHERE extname = 'terrace'");
    wait_until("it goes on by itself", || {
        server.value("SELECT count(*) FROM terrace.progress") == "1"
    });
}

#[test]
fn a_full_disk_under_the_queue_stops_it_cleanly() {
    let mut tree = Tree::grow(STEPS, &ONE);
    let data = tree.nodes[0].bridge.directory().join("data");
    tree.nodes[0].bridge.stop();
    let Some(disk) = Disk::small(&data) else {
        return;
    };
    tree.start_bridges().expect("start the bridge");
    tree.wait_streaming();
    disk.fill();
    let counting = count_up(&tree.top);
    let node = &tree.nodes[0];
    wait_stalled(node, &["No space left on device"]);
    counting.go_on(100);
    disk.make_room();
    tree.wait_streaming();
    counting.stop();
    tree.wait_for_equal(&["steps", "trail"]);
    assert_eq!(tree.nodes[0].server.value(GAPLESS), "t");
    assert!(tree.nodes[0].bridge.is_running(), "it never ended");
    // Before the disk goes.
    tree.nodes[0].bridge.stop();
}

// What makes room was not done where there was none to write down who had read what.
#[test]
fn a_full_disk_has_room_again_when_those_below_have_read() {
    const TWO: [(&str, Option<&str>, usize); 2] =
        [("region", None, 1), ("branch", Some("region"), 1)];
    let mut tree = Tree::grow_with("[queue]\nretain_min = \"1MiB\"", WIDE, &TWO);
    let data = tree.node("region-1").bridge.directory().join("data");
    tree.nodes.iter_mut().for_each(|node| {
        node.bridge.stop();
    });
    let Some(disk) = Disk::of(&data, 64) else {
        return;
    };
    let region = tree.node("region-1");
    region.bridge.restart().expect("start");
    fill_wide(&tree.top, 0..4);
    let region = tree.node("region-1");
    wait_until("it has them", || {
        region.server.value("SELECT count(*) FROM wide") == "48"
    });
    disk.fill();
    fill_wide(&tree.top, 4..6);
    wait_stalled(tree.node("region-1"), &["No space left on device"]);
    tree.start_bridges().expect("start the other bridge");
    tree.wait_for_equal(&["wide"]);
    // Before the disk goes.
    tree.node("region-1").bridge.stop();
}

#[test]
fn a_database_that_does_not_let_the_relays_clients_in_is_told_of() {
    let mut tree = Tree::grow(STEPS, &ONE);
    let rules = tree.nodes[0].server.socket_dir().join("data/pg_hba.conf");
    let text = fs::read_to_string(&rules).expect("read");
    let reason = "SELECT count(*) FROM terrace.lag WHERE reason LIKE '%let role terrace_relay in%'";
    let refused = format!("host all terrace_relay 127.0.0.1/32 reject\n{text}");
    for (rules_now, told) in [(&refused, "1"), (&text, "0")] {
        fs::write(&rules, rules_now).expect("write");
        let node = &mut tree.nodes[0];
        node.server.sql("SELECT pg_reload_conf()");
        if told == "1" {
            node.bridge.stop();
            node.bridge.restart().expect("start");
        }
        wait_until("what is told is so", || tree.top.value(reason) == told);
    }
    tree.wait_streaming();
}

// Each server has its own constraints; the levels below go by the stream alone.
#[test]
fn who_leaves_something_out_keeps_it_from_nobody_below() {
    const TWO: [(&str, Option<&str>, usize); 2] =
        [("region", None, 1), ("branch", Some("region"), 1)];
    let mut tree = Tree::grow(STEPS, &TWO);
    let rows = "SELECT string_agg(n::text, ' ' ORDER BY n) FROM steps";
    let picky = "ALTER TABLE steps ADD CONSTRAINT picky CHECK (n % 100 <> 50)";
    tree.node("region-1").server.sql(picky);
    tree.top.sql("INSERT INTO steps VALUES (50), (51)");
    tree.top.sql("INSERT INTO steps VALUES (60)");
    wait_stalled(tree.node("region-1"), &["picky"]);
    let below = tree.node("branch-1");
    wait_until("those below go on", || {
        below.server.value(rows) == "50 51 60"
    });
    let region = tree.node("region-1");
    leave_out(region);
    wait_until("it goes on", || region.server.value(rows) == "60");

    // The same where rows are put aside one by one.
    region.bridge.stop();
    let config = region.bridge.config();
    let text =
        fs::read_to_string(&config).expect("read") + "\n[apply]\non_error = \"quarantine\"\n";
    fs::write(&config, text).expect("write");
    region.bridge.restart().expect("start");
    tree.top.sql("INSERT INTO steps VALUES (150), (151)");
    tree.top.sql("UPDATE steps SET n = 250 WHERE n = 151");
    let below = tree.node("branch-1");
    wait_until("those below have all", || {
        below.server.value(rows) == "50 51 60 150 250"
    });
    let region = tree.node("region-1");
    wait_until("it has the rest", || region.server.value(rows) == "60 151");
    let aside = "SELECT string_agg(new ->> 'n', ' ' ORDER BY lsn) FROM terrace.quarantine";
    assert_eq!(region.server.value(aside), "150 250");
    let elsewhere = tree
        .node("branch-1")
        .server
        .value("SELECT count(*) FROM terrace.quarantine");
    assert_eq!(elsewhere, "0");

    // What is wrong is found, and sent again when it can be taken.
    let region = tree.node("region-1");
    region.server.sql("ALTER TABLE steps DROP CONSTRAINT picky");
    let compared = region
        .bridge
        .command("compare", &["--table", "steps"])
        .expect("compare");
    let said = String::from_utf8_lossy(&compared.stdout).into_owned();
    assert!(
        compared.status.code() == Some(1) && said.contains("region-1"),
        "{said}"
    );
    let sent = region
        .bridge
        .command("resync", &["--table", "steps"])
        .expect("resync");
    assert!(sent.status.success());
    tree.wait_for_equal(&["steps"]);
}

// What was put off to there was refused without a word, for ever; two that go one by one went
// together.
#[test]
fn what_is_refused_at_the_end_of_a_transaction_is_named_and_can_be_left_out() {
    let schema = "CREATE TABLE o (id int PRIMARY KEY); CREATE TABLE l (o int PRIMARY KEY);
         SELECT terrace.add_table('o'), terrace.add_table('l')";
    let mut tree = Tree::grow(schema, &ONE);
    tree.wait_for_equal(&["o", "l"]);
    tree.nodes[0].server.sql(
        "CREATE FUNCTION has_lines() RETURNS trigger LANGUAGE plpgsql AS
           $$BEGIN IF NOT EXISTS (SELECT FROM public.l WHERE o = NEW.id) THEN RAISE EXCEPTION 'no lines'; END IF;
             RETURN NULL; END$$;
         CREATE CONSTRAINT TRIGGER has_lines AFTER INSERT ON o DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION has_lines();
         ALTER TABLE o ENABLE ALWAYS TRIGGER has_lines;",
    );
    tree.nodes[0].bridge.stop();
    tree.top.sql(
        "BEGIN; INSERT INTO o VALUES (1); INSERT INTO l VALUES (1); COMMIT;
         BEGIN; DELETE FROM l; DELETE FROM o; COMMIT; INSERT INTO l VALUES (2)",
    );
    tree.start_bridges_on_a_pile();
    tree.wait_for_equal(&["o", "l"]);
    tree.top.sql("INSERT INTO o VALUES (9)");
    tree.top.sql("INSERT INTO l VALUES (3)");
    let node = &tree.nodes[0];
    wait_stalled(node, &["cannot be applied", "no lines"]);
    leave_out(node);
    tree.wait_for_equal(&["l"]);
    assert_eq!(tree.nodes[0].server.value("SELECT count(*) FROM o"), "0");
}

// A sign of life that the database had not noted stood before what was to be left out: for ever.
#[test]
fn what_is_to_be_left_out_may_come_after_a_sign_of_life() {
    let schema = "CREATE TABLE o (id int PRIMARY KEY); CREATE TABLE l (o int PRIMARY KEY);
         SELECT terrace.add_table('o'), terrace.add_table('l')";
    let tree = Tree::grow(schema, &ONE);
    tree.top.sql("INSERT INTO o VALUES (1)");
    tree.wait_for_equal(&["o", "l"]);
    // Tried in a batch, then with care; and then it takes until the order has been given.
    tree.nodes[0].server.sql(
        "CREATE SEQUENCE tries;
         CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
           $$BEGIN IF nextval('public.tries') > 2 THEN PERFORM pg_advisory_lock_shared(7); END IF;
             RAISE EXCEPTION 'never'; END$$;
         CREATE TRIGGER refuse BEFORE INSERT ON o FOR EACH ROW EXECUTE FUNCTION refuse();
         ALTER TABLE o ENABLE ALWAYS TRIGGER refuse;",
    );
    let mut orders = tree.nodes[0].server.connect();
    orders
        .batch_execute("SELECT pg_advisory_lock(7)")
        .expect("lock");
    let elsewhere = r#"SELECT pg_logical_emit_message(true, 'terrace', '{"domains":["nowhere"]}')"#;
    tree.top.sql("INSERT INTO l VALUES (1)");
    tree.top.sql(elsewhere);
    let end = tree.top.value("SELECT pg_current_wal_lsn()");
    let node = &tree.nodes[0];
    wait_until("the sign of life has come", || {
        node.server
            .value(&format!("SELECT replay_lsn >= '{end}' FROM terrace.lag"))
            == "t"
    });
    tree.top.sql("INSERT INTO o VALUES (9)");
    tree.top.sql("INSERT INTO l VALUES (2)");
    wait_stalled(node, &["cannot be applied", "never"]);
    leave_out(node);
    drop(orders);
    tree.wait_for_equal(&["l"]);
    assert_eq!(tree.nodes[0].server.value("SELECT count(*) FROM o"), "1");
}

// Each of them was gone through by itself, and all that followed tried once more for it.
#[test]
fn what_is_for_others_does_not_hide_what_cannot_be_applied_behind_it() {
    let schema = "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE gone (id int PRIMARY KEY);
         SELECT terrace.add_table('t'), terrace.add_table('gone')";
    let tree = Tree::grow(schema, &ONE);
    tree.top.sql("INSERT INTO gone VALUES (1)");
    tree.wait_for_equal(&["t", "gone"]);
    let node = &tree.nodes[0];
    let holder = node.server.hold_apply();
    tree.top.sql("INSERT INTO t VALUES (0)");
    let waits = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted";
    wait_until("it waits", || node.server.value(waits) == "t");
    tree.top.sql(
        r#"DO $$BEGIN FOR n IN 1..300 LOOP
             PERFORM pg_logical_emit_message(true, 'terrace', '{"domains":["nowhere"]}'); COMMIT;
           END LOOP; END$$"#,
    );
    tree.top.sql("INSERT INTO gone VALUES (2)");
    tree.top.sql("INSERT INTO t VALUES (1)");
    let end = tree.top.value("SELECT pg_current_wal_lsn()");
    let there = format!("SELECT flush_lsn >= '{end}' FROM terrace.lag");
    wait_until("all of it is there", || node.server.value(&there) == "t");
    node.server.sql("DROP TABLE gone");
    let applies = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
         WHERE application_name LIKE 'terrace apply%'";
    node.server.value(applies);
    drop(holder);
    wait_stalled(node, &["cannot be applied", "gone"]);
    let log = node.bridge.logged();
    let tries = log.matches("applying with care").count();
    assert!(tries < 20, "{tries} tries");
    node.server.sql("CREATE TABLE gone (id int PRIMARY KEY)");
    tree.wait_for_equal(&["t"]);
}
