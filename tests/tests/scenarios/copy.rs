//! The initial copy, and trees of other shapes.

use std::time::Duration;

use terrace_tests::bridge::{Bridge, options};
use terrace_tests::load::{Background, GAPLESS, STEPS, count_up};
use terrace_tests::{Scratch, Server, ServerOptions, Tree, wait_until};

#[test]
fn the_initial_copy_runs_under_load() {
    let schema = format!(
        "{STEPS} CREATE TABLE wide (id int PRIMARY KEY, txt text, arr int[], at timestamptz, js jsonb);
         INSERT INTO wide SELECT i, repeat(md5(i::text), 25), ARRAY[i, NULL], now(), '{{\"a\": 1}}'
         FROM generate_series(1, 90000) i;
         SELECT terrace.add_table('wide');"
    );
    let mut tree = Tree::plant(&schema).expect("boot the top");
    let counting = count_up(&tree.top);
    // Rows go from page to page, while parts of the table are copied by themselves.
    let moving = Background::start(&tree.top, |client, step| {
        let id = i32::try_from(step * 7919 % 90000).expect("an int");
        let sql = "UPDATE wide SET js = js || jsonb_build_object('b', $1::int) WHERE id = $1";
        client.execute(sql, &[&id])?;
        std::thread::sleep(Duration::from_millis(2));
        Ok(())
    });
    tree.boot(&[("region", None, 2), ("branch", Some("region"), 1)])
        .expect("boot the servers");
    counting.go_on(50);
    tree.start_bridges().expect("start the bridges");
    tree.wait_streaming();
    for node in &tree.nodes {
        let log = node.bridge.logged();
        let told = log.lines().find(|line| line.contains("copies 3 tables in"));
        assert!(
            told.is_some_and(|line| !line.contains("in 3 parts")),
            "{told:?}"
        );
    }
    counting.go_on(50);
    counting.stop();
    moving.stop();
    tree.wait_for_equal(&["wide", "steps", "trail"]);
    tree.assert_gapless();
}

#[test]
fn an_interrupted_copy_starts_again() {
    let schema = "CREATE TABLE heavy (id int PRIMARY KEY, txt text);
         INSERT INTO heavy SELECT i, repeat(md5(i::text), 10) FROM generate_series(1, 200000) i;
         CREATE TABLE light AS SELECT g AS a FROM generate_series(1, 10) g;
         SELECT terrace.add_table('heavy'), terrace.add_table('light');";
    let mut tree = Tree::plant(schema).expect("boot the top");
    tree.boot(&[("region", None, 1)]).expect("boot the servers");
    tree.start_bridges().expect("start the bridges");
    let server = &tree.nodes[0].server;
    // What is there already would come twice: no key keeps it out.
    wait_until(
        "one table is there, and rows of the other are being written",
        || {
            let sql = "SELECT to_regclass('light') IS NOT NULL \
                   AND (SELECT coalesce(sum(tuples_processed), 0) > 0 FROM pg_stat_progress_copy)";
            server.value(sql) == "t" && server.value("SELECT count(*) FROM light") == "10"
        },
    );
    tree.nodes[0].bridge.kill9();
    let progress = "SELECT count(*) FROM terrace.progress";
    assert_eq!(tree.nodes[0].server.value(progress), "0", "cut short");
    tree.start_bridges().expect("start the bridges");
    tree.wait_streaming();
    tree.wait_for_equal(&["heavy", "light"]);
}

#[test]
fn a_copy_runs_in_parallel_tells_how_far_it_is_and_makes_indexes_last() {
    let schema = "CREATE TABLE heavy (id int PRIMARY KEY, txt text); CREATE INDEX by_txt ON heavy (md5(txt));
         INSERT INTO heavy SELECT i, repeat(md5(i::text), 20) FROM generate_series(1, 300000) i;
         SELECT terrace.add_table('heavy');";
    let mut tree = Tree::plant(schema).expect("boot the top");
    tree.boot(&[("region", None, 1)]).expect("boot the servers");
    tree.start_bridges().expect("start the bridges");
    let (top, node) = (&tree.top, &tree.nodes[0]);
    let is_copied = "SELECT count(*) FROM terrace.progress";
    let (mut told, mut shown, mut most, mut bare) = (false, false, 0, false);
    let mut indexing = false;
    wait_until("all is copied", || {
        let reason = "SELECT count(*) FROM terrace.lag
            WHERE state = 'copying' AND reason ~ '^[0-9]+ of about [0-9]+ bytes copied$'";
        if node.server.value(reason) == "1" {
            told = true;
            let status = node.bridge.command("status", &[]).expect("run status");
            shown |= String::from_utf8_lossy(&status.stdout).contains("bytes copied");
        }
        let reason = "SELECT count(*) FROM terrace.lag WHERE state = 'copying'
            AND reason ~ '^all rows copied, [0-9]+ of [0-9]+ indexes and other objects made$'";
        indexing |= node.server.value(reason) == "1";
        let copying = "SELECT count(*) FROM pg_stat_progress_copy WHERE tuples_processed > 0";
        most = top.value(copying).parse().unwrap_or(0).max(most);
        let without =
            "SELECT count(*) > 0 FROM pg_stat_progress_copy p WHERE p.tuples_processed > 0
            AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = p.relid)";
        bare |= node.server.value(without) == "t";
        node.server.value(is_copied) == "1"
    });
    assert!(told, "terrace.lag tells how far it is");
    assert!(shown, "so does the command");
    assert!(indexing, "and when indexes are made");
    assert!(most > 1, "{most} sessions at once");
    assert!(bare, "rows come before indexes");
    tree.wait_for_equal(&["heavy"]);
    let made = "SELECT count(*) FROM pg_index WHERE indrelid = 'heavy'::regclass AND indisvalid";
    assert_eq!(tree.nodes[0].server.value(made), "2");
}

// A relay's clients may read those columns alone.
#[test]
fn a_large_table_is_copied_in_parts_where_some_columns_are_kept_back() {
    let schema = "CREATE TABLE listed (id int PRIMARY KEY, secret text, txt text);
         INSERT INTO listed SELECT i, 'kept back', repeat(md5(i::text), 20) FROM generate_series(1, 70000) i;
         SELECT terrace.add_table('listed', columns => '{id,txt}');";
    let tree = Tree::plant(schema).expect("boot the top");
    let tree = tree.grow_on(&[("region", None, 1), ("branch", Some("region"), 1)]);
    let rows = "SELECT count(*) || ' ' || sum(hashtext(id || txt)) FROM listed";
    for node in &tree.nodes {
        assert_eq!(node.server.value(rows), tree.top.value(rows));
        let logged = node.bridge.logged();
        assert!(logged.contains("in 2 parts"), "{logged}");
    }
    let refused = tree.nodes[0]
        .bridge
        .try_connect()
        .expect("a session")
        .simple_query("SELECT secret FROM listed");
    assert!(refused.is_err());
}

// It had to be made by hand before anything was copied, by a site with nobody there.
#[test]
fn a_table_that_is_new_at_the_top_is_made_when_all_is_copied_anew() {
    let schema = "CREATE TABLE old (id int PRIMARY KEY, v text); SELECT terrace.add_table('old');
                  INSERT INTO old SELECT g, 'x' FROM generate_series(1, 100) g";
    let tree = Tree::grow(schema, &[("region", None, 1)]);
    let server = &tree.nodes[0].server;
    server.sql("CREATE INDEX own ON old (v)");
    tree.top.sql(
        "CREATE TABLE new (id int PRIMARY KEY, old int REFERENCES old);
         CREATE INDEX by_old ON new (old); INSERT INTO new SELECT id, id FROM old;
         SELECT terrace.add_table('new')",
    );
    tree.nodes[0].bridge.resync();
    let copies = "SELECT count(*) FROM terrace.events WHERE kind = 'copied'";
    wait_until("it is copied anew", || server.value(copies) == "2");
    tree.wait_streaming();
    tree.wait_for_equal(&["old", "new"]);
    let made = "SELECT string_agg(indexrelid::regclass::text, ' ' ORDER BY indexrelid::regclass::text) FROM pg_index \
                WHERE indrelid IN ('old'::regclass, 'new'::regclass)";
    assert_eq!(server.value(made), "by_old new_pkey old_pkey own");
    assert_eq!(
        server.value(
            "SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND conrelid = 'new'::regclass"
        ),
        "1"
    );
}

#[test]
fn a_top_bridge_relays_for_the_top() {
    let scratch = Scratch::new("terrace-").expect("scratch");
    let mut top = Server::top(&scratch).expect("boot the top");
    let below = ["region-1", "site-1"]
        .map(|name| Server::start(&scratch, name, &ServerOptions::default()).expect("boot"));
    // Beside the top, too, a bridge makes the role that SQL is passed on under.
    top.sql("ALTER ROLE terrace SUPERUSER");
    top.sql(STEPS);
    top.sql("SELECT terrace.create_domain('region'), terrace.create_domain('site')");
    let counting = count_up(&top);
    let mut top_bridge = Bridge::start(&scratch, &options(&top, "top", &[])).expect("start");
    let parent = [top_bridge.conninfo()];
    let _bridges = [("region", &below[0]), ("site", &below[1])].map(|(domain, server)| {
        Bridge::start(&scratch, &options(server, domain, &parent)).expect("start")
    });
    for server in &below {
        let sql = format!(
            "SELECT count(*) FROM terrace.lag WHERE state = 'streaming' AND node = '{}'",
            server.name
        );
        wait_until("it streams", || top.value(&sql) == "1");
    }
    counting.go_on(50);
    counting.stop();
    let wanted = top.checksum("trail").expect("checksum");
    for server in &below {
        wait_until("it has all", || {
            server.checksum("trail").is_ok_and(|sum| sum == wanted)
        });
        assert_eq!(server.value(GAPLESS), "t", "numbers on {}", server.name);
    }
    let decoding = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'";
    assert_eq!(
        top.value(decoding),
        "1",
        "the top decodes once for both domains"
    );
    assert_eq!(
        top.value("SELECT terrace.wait_for(pg_current_wal_lsn())"),
        "t"
    );

    // It sends the rows of a large table itself.
    for server in [&top, &below[0], &below[1]] {
        server.sql("CREATE TABLE big (id int PRIMARY KEY, v text)");
    }
    top.sql(
        "INSERT INTO big SELECT g, repeat(md5(g::text), 32) FROM generate_series(1, 40000) g;
         SELECT terrace.add_table('big')",
    );
    let wanted = top.checksum("big").expect("checksum");
    for server in &below {
        wait_until("it has the rows", || {
            server.checksum("big").is_ok_and(|sum| sum == wanted)
        });
    }
    let sent = "SELECT count(*) FROM terrace.events WHERE kind = 'sent'";
    wait_until("that is told", || top.value(sent) == "1");

    // What is in its queue is served without its Postgres too.
    let state = || below[0].value("SELECT state FROM terrace.node_status WHERE self");
    top_bridge.stop();
    wait_until("its followers miss it", || state() != "streaming");
    top.kill9();
    top_bridge.restart().expect("start");
    wait_until("they follow it again", || state() == "streaming");
    top.restart().expect("start the top");
    wait_until("the top answers", || top.try_connect().is_ok());

    // It has nobody to ask for what its slot does not keep, and says so, without haste.
    top_bridge.stop();
    wait_until("the slot is free", || {
        top.value("SELECT count(*) FROM pg_replication_slots WHERE active") == "0"
    });
    top.sql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots");
    top_bridge.restart().expect("start");
    let reason = "SELECT state || ' ' || coalesce(reason, '') FROM terrace.node_status WHERE self";
    wait_until("it tells of its slot", || {
        let said = top.value(reason);
        said.starts_with("stalled") && said.contains("does not exist") && said.contains("data_dir")
    });
    let sessions = "SELECT sum(sessions) FROM pg_stat_database WHERE datname = 'app'";
    let count = || top.value(sessions).parse::<i64>().expect("a number");
    let before = count();
    std::thread::sleep(Duration::from_secs(3));
    assert!(count() - before < 60, "{} tries", count() - before);
}

/// Waits until a copy from the server waits for a lock.
fn copy_waits(server: &Server) {
    wait_until("a copy waits for a lock", || {
        let sql = "SELECT EXISTS (SELECT FROM pg_stat_activity \
                   WHERE application_name = 'terrace copy' AND wait_event_type = 'Lock')";
        server.value(sql) == "t"
    });
}

/// Waits until so many copies were finished.
fn copied(bridge: &Bridge, times: usize) {
    wait_until("the copy is finished", || {
        bridge.logged().matches("initial copy is complete").count() == times
    });
}

// What is written anew has no rows for an older snapshot, and nothing says so; and what a copy
// has locked keeps TRUNCATE, and all that comes behind it, waiting.
#[test]
fn a_copy_misses_no_table_that_is_written_anew_and_stops_no_data() {
    let schema = "CREATE TABLE one (id int PRIMARY KEY); CREATE TABLE two (id int PRIMARY KEY);
         CREATE TABLE three (id int PRIMARY KEY, n int);
         INSERT INTO one SELECT generate_series(1, 100); INSERT INTO two SELECT generate_series(1, 100);
         INSERT INTO three SELECT i, i FROM generate_series(1, 100) i;
         SELECT terrace.add_table('one'), terrace.add_table('two'), terrace.add_table('three');";
    let mut tree = Tree::grow(
        schema,
        &[("region", None, 1), ("branch", Some("region"), 1)],
    );
    tree.wait_streaming();
    // The snapshot is there, and the table is not locked yet.
    let lock = tree.node("region-1").server.lock("two");
    tree.node("branch-1").bridge.resync();
    copy_waits(&tree.node("region-1").server);
    let alter = "SELECT terrace.replicate_ddl('ALTER TABLE three ALTER n TYPE bigint')";
    tree.top.sql(alter);
    let kind = "SELECT atttypid::regtype FROM pg_attribute \
                WHERE attrelid = 'three'::regclass AND attname = 'n'";
    wait_until("the region has it", || {
        tree.node("region-1").server.value(kind) == "bigint"
    });
    drop(lock);
    wait_until("the copy begins again", || {
        tree.node("branch-1")
            .bridge
            .logged()
            .contains("table public.three was written anew")
    });
    copied(&tree.node("branch-1").bridge, 2);
    tree.wait_for_equal(&["one", "two", "three"]);

    // It has locked everything, and waits to write.
    let lock = tree.node("branch-1").server.lock("two");
    tree.node("branch-1").bridge.resync();
    copy_waits(&tree.node("branch-1").server);
    let again = tree.node("branch-1").bridge.run("resync").expect("resync");
    let said = String::from_utf8_lossy(&again.stderr);
    assert!(
        !again.status.success() && said.contains("no data yet"),
        "{said}"
    );
    tree.top
        .sql("TRUNCATE one; INSERT INTO three VALUES (0, 0)");
    wait_until("the region says why", || {
        let said = tree.node("region-1").bridge.logged();
        said.contains("copy_ended")
    });
    wait_until("the region goes on", || {
        tree.node("region-1")
            .server
            .value("SELECT count(*) FROM one")
            == "0"
    });
    drop(lock);
    copied(&tree.node("branch-1").bridge, 3);
    tree.wait_for_equal(&["one", "two", "three"]);
}
