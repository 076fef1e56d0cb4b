//! Bugs that other replication systems shipped: each is a story here, or is named with the
//! test that tells it in `docs/reliability.md`.

use terrace_tests::load::{Background, STEPS, count_up};
use terrace_tests::proxy::Proxy;
use terrace_tests::server::rows;
use terrace_tests::{Server, Tree, wait_until};

use super::stalls::wait_stalled;

const ONE: [(&str, Option<&str>, usize); 1] = [("region", None, 1)];
const CHAIN: [(&str, Option<&str>, usize); 2] =
    [("region", None, 1), ("branch", Some("region"), 1)];
const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT terrace.add_table('t');";

fn has_replayed_all(tree: &Tree) -> bool {
    let sql = "SELECT terrace.wait_for(pg_current_wal_lsn(), timeout => '20s')";
    tree.top.value(sql) == "t"
}

// pgcopydb #1033: keepalives moved the position past changes that were never applied.
#[test]
fn an_idle_top_moves_no_position_past_what_is_not_applied() {
    let mut tree = Tree::grow(TABLE, &ONE);
    assert!(has_replayed_all(&tree));
    let lock = tree.nodes[0].server.lock("t");
    tree.top.sql("INSERT INTO t VALUES (1, 'held up')");
    let committed = tree.top.value("SELECT pg_current_wal_lsn()");
    let told = |what: &str| {
        let sql = format!("SELECT {what} FROM terrace.lag WHERE node = 'region-1'");
        tree.top.value(&sql)
    };
    let beyond = format!("received_lsn > '{committed}'");
    wait_until("keepalives have come", || told(&beyond) == "t");
    wait_until("the lag is seen", || {
        told("replay_lag > interval '2 s'") == "t"
    });
    assert_eq!(told(&format!("replay_lsn < '{committed}'")), "t");
    // What was held up is not taken for done by the next start either.
    tree.nodes[0].bridge.kill9();
    drop(lock);
    assert_eq!(tree.nodes[0].server.value("SELECT count(*) FROM t"), "0");
    tree.start_bridges().expect("start the bridge");
    tree.wait_for_equal(&["t"]);
}

// supabase/etl PR 935: after a slot was made anew, what lay before its start was skipped.
#[test]
fn a_slot_that_was_made_anew_is_a_gap() {
    let mut tree = Tree::grow(STEPS, &ONE);
    let counting = count_up(&tree.top);
    counting.go_on(20);
    tree.nodes[0].bridge.stop();
    counting.go_on(20);
    tree.top.sql(
        "SELECT pg_drop_replication_slot('terrace_region');
         SELECT pg_create_logical_replication_slot('terrace_region', 'pgoutput')",
    );
    counting.go_on(20);
    counting.stop();
    let before = tree.nodes[0].server.checksum("steps").expect("checksum");
    tree.start_bridges().expect("start the bridge");
    let gap = "SELECT count(*) FROM terrace.lag WHERE state = 'gap'";
    wait_until("the gap is told", || tree.nodes[0].server.value(gap) == "1");
    let after = tree.nodes[0].server.checksum("steps").expect("checksum");
    assert_eq!(after, before, "nothing is applied beyond the hole");
    tree.nodes[0].bridge.resync();
    tree.wait_for_equal(&["steps", "trail"]);
}

// postgres_exporter #977: the lag stood still while a link was cut, and fell to nothing with
// the reconnection, before anything had been applied.
#[test]
fn lag_grows_over_a_cut_link_and_falls_only_with_what_is_applied() {
    let tree = Tree::plant(STEPS).expect("boot the top").with_links();
    let tree = tree.grow_on(&CHAIN);
    let counting = count_up(&tree.top);
    counting.go_on(50);
    let branch = &tree.nodes[1].server;
    let lag = |seen_by: &Server| {
        let sql = "SELECT coalesce(extract(epoch FROM replay_lag), 0) FROM terrace.lag \
                   WHERE node = 'branch-1'";
        seen_by.value(sql).parse::<f64>().unwrap_or(0.0)
    };
    wait_until("it is up to date", || lag(&tree.top) < 1.0);
    tree.between(&["region-1"], &["branch-1"], Proxy::cut);
    let mut last = 0.0;
    for seconds in [2.0, 4.0, 6.0] {
        for server in [&tree.top, branch] {
            wait_until("the lag grows", || lag(server) > seconds);
        }
        let now = lag(branch);
        assert!(now > last, "{now} after {last}");
        last = now;
    }
    let wanted: i64 = tree
        .top
        .value("SELECT max(n) FROM steps")
        .parse()
        .expect("n");
    tree.between(&["region-1"], &["branch-1"], Proxy::reset);
    tree.heal();
    wait_until("it has caught up", || {
        let now = lag(branch);
        // Asked after the lag, so that it may only have got more.
        let shown: i64 = branch.value("SELECT max(n) FROM steps").parse().expect("n");
        assert!(
            now > 1.0 || shown >= wanted,
            "lag {now}, but {shown} of {wanted}"
        );
        now < 1.0
    });
    counting.stop();
    tree.wait_for_equal(&["steps", "trail"]);
}

// pgcopydb #518, debezium #7272: WAL of other databases looked like lag, and was kept.
#[test]
fn wal_of_another_database_is_no_lag_and_is_not_kept() {
    let tree = Tree::grow(TABLE, &ONE);
    tree.top.sql("CREATE DATABASE other");
    let slot = |what: &str| {
        tree.top
            .value(&format!("SELECT {what} FROM pg_replication_slots"))
    };
    let before = tree.top.value("SELECT pg_current_wal_lsn()");
    let mut other = tree.top.config();
    let mut other = other
        .dbname("other")
        .connect(postgres::NoTls)
        .expect("connect");
    for _ in 0..4 {
        let sql = "CREATE TABLE big AS SELECT g, repeat('x', 500) FROM generate_series(1, 20000) g;
                   DROP TABLE big";
        other.batch_execute(sql).expect("write elsewhere");
    }
    let written = format!("SELECT pg_current_wal_lsn() - '{before}' > 30000000");
    assert_eq!(tree.top.value(&written), "t", "it is much");
    assert!(has_replayed_all(&tree));
    let lag = "SELECT lag_bytes < 1000000 AND replay_lag < interval '2 s' FROM terrace.lag \
               WHERE node = 'region-1'";
    wait_until("it is no lag", || tree.top.value(lag) == "t");
    let end = tree.top.value("SELECT pg_current_wal_lsn()");
    wait_until("the slot keeps none of it", || {
        // A running-transactions record lets the slot go forward; a checkpoint writes one.
        tree.top.sql("CHECKPOINT");
        slot(&format!(
            "restart_lsn >= '{end}' AND confirmed_flush_lsn >= '{end}'"
        )) == "t"
    });
}

// spock #610: a large transaction, spilled to disk, with a row that cannot be applied.
#[test]
fn a_large_transaction_with_a_bad_row_waits_whole() {
    let tree = Tree::grow(TABLE, &ONE);
    tree.top
        .sql("ALTER SYSTEM SET logical_decoding_work_mem = '64kB'");
    tree.top.sql("SELECT pg_reload_conf()");
    let server = &tree.nodes[0].server;
    server.sql("ALTER TABLE t ADD CONSTRAINT picky CHECK (id <> 7900)");
    tree.top
        .sql("INSERT INTO t SELECT g, repeat('x', 100) FROM generate_series(1, 8000) g");
    let reason = "SELECT state || ' ' || coalesce(reason, '') FROM terrace.lag";
    wait_until("it says why it waits", || {
        let said = server.value(reason);
        said.starts_with("stalled") && said.contains("picky")
    });
    assert_eq!(server.value("SELECT count(*) FROM t"), "0", "no part of it");
    let spilled = "SELECT sum(spill_txns) > 0 FROM pg_stat_replication_slots";
    wait_until("it was spilled", || tree.top.value(spilled) == "t");
    server.sql("ALTER TABLE t DROP CONSTRAINT picky");
    tree.wait_for_equal(&["t"]);
    tree.wait_streaming();
}

// spock #599: a local update in flight hid the row from the look-up, and the change was lost.
#[test]
fn a_local_update_in_flight_hides_no_row() {
    let tree = Tree::grow(TABLE, &ONE);
    tree.top
        .sql("INSERT INTO t VALUES (1, 'old'), (2, 'old'), (3, 'old')");
    tree.wait_for_equal(&["t"]);
    let server = &tree.nodes[0].server;
    let mut local = server.connect();
    local
        .batch_execute("SET session_replication_role = replica; BEGIN; UPDATE t SET v = 'local'")
        .expect("update");
    tree.top
        .sql("UPDATE t SET v = 'new' WHERE id < 3; DELETE FROM t WHERE id = 3");
    let waits = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted";
    wait_until("the bridge waits for it", || server.value(waits) == "t");
    local.batch_execute("COMMIT").expect("commit");
    tree.wait_for_equal(&["t"]);
}

// Slony's testdatestyles, Spock's 037: every server writes dates, intervals, floats and
// bytes in its own way, and runs in its own time zone.
#[test]
fn settings_of_each_hop_change_no_value() {
    const SCHEMA: &str = "
        CREATE TABLE form (id int PRIMARY KEY, d date, ts timestamp, tz timestamptz, i interval,
                           f float8, r real, b bytea, m text, a timestamptz[]);
        SELECT terrace.add_table('form');";
    // Day and month cannot be told apart, and an hour that comes twice (end of summer time).
    const ROWS: &str = "
        SET timezone = 'Europe/Berlin'; SET datestyle = ISO; SET intervalstyle = postgres;
        INSERT INTO form SELECT g, '2024-02-03', '2024-03-04 05:06:07.123456',
            '2024-10-27 02:30:00+02'::timestamptz + g * interval '20 min',
            '-1 year 2 mons -3 days 04:05:06.7', 1.0 / 3 * g, 0.1::real * g, '\\x00ff5c27',
            'Größe \\ \"€\"', ARRAY['2024-03-31 01:59:59+01', NULL]::timestamptz[]
        FROM generate_series(%, % + 3) g;
        UPDATE form SET i = '1 day -00:00:01', f = 1e-300 / 7 WHERE id % 4 = 0;";
    let rows_from = |id: i32| ROWS.replace("%, % + 3", &format!("{id}, {id} + 3"));
    let mut tree = Tree::plant(SCHEMA).expect("boot the top");
    let odd = |server: &Server, style: &str, zone: &str, interval: &str| {
        for (name, value) in [
            ("datestyle", style),
            ("timezone", zone),
            ("intervalstyle", interval),
            ("bytea_output", "escape"),
            ("extra_float_digits", "-5"),
            ("client_encoding", "LATIN1"),
        ] {
            server.sql(&format!("ALTER DATABASE app SET {name} = '{value}'"));
        }
        server.sql("ALTER ROLE terrace SET client_encoding = 'LATIN9'");
    };
    odd(&tree.top, "German, DMY", "America/St_Johns", "sql_standard");
    tree.top.sql(&rows_from(1)); // by the initial copy
    tree.boot(&CHAIN).expect("boot the servers");
    odd(
        &tree.nodes[0].server,
        "SQL, DMY",
        "Asia/Kathmandu",
        "iso_8601",
    );
    odd(
        &tree.nodes[1].server,
        "Postgres, MDY",
        "Australia/Lord_Howe",
        "postgres_verbose",
    );
    tree.start_bridges().expect("start the bridges");
    tree.wait_streaming();
    tree.top.sql(&rows_from(5)); // by the stream
    tree.top.sql("DELETE FROM form WHERE id = 6");
    assert!(has_replayed_all(&tree));
    let content = |server: &Server| {
        let mut client = server.connect();
        let pinned = "SET datestyle = ISO; SET timezone = 'UTC'; SET intervalstyle = postgres;
                      SET bytea_output = hex; SET extra_float_digits = 3;
                      SET client_encoding = 'UTF8'";
        client.batch_execute(pinned).expect("settings");
        rows(&mut client, "SELECT * FROM form ORDER BY id").expect("rows")
    };
    let wanted = content(&tree.top);
    assert_eq!(wanted.len(), 7);
    for node in &tree.nodes {
        assert_eq!(content(&node.server), wanted, "{}", node.server.name);
    }
}

// Such a row came without the value, which was written as NULL.
#[test]
fn a_row_that_comes_to_pass_a_filter_without_a_large_value_is_not_written_without_it() {
    let schema = "CREATE TABLE docs (id int, open bool, doc text, PRIMARY KEY (id, open));
        ALTER TABLE docs ALTER doc SET STORAGE EXTERNAL;
        INSERT INTO docs VALUES (1, false, repeat('x', 10000)), (2, false, repeat('y', 10000));
        SELECT terrace.add_table('docs', filter => 'open');";
    let tree = Tree::grow(schema, &[("region", None, 1)]);
    let node = &tree.nodes[0];
    tree.top.sql("UPDATE docs SET open = true WHERE id = 1");
    wait_stalled(node, &["\"doc\"", "REPLICA IDENTITY FULL"]);
    // What it says to do does it, and lasts.
    tree.top.sql("ALTER TABLE docs REPLICA IDENTITY FULL");
    let reason = "SELECT substring(reason FROM 'ends at ([0-9A-F/]+)') FROM terrace.lag";
    let lsn = node.server.value(reason);
    for (command, arguments) in [("skip", ["--lsn", &lsn]), ("resync", ["--table", "docs"])] {
        let done = node.bridge.command(command, &arguments).expect("run it");
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{command}: {said}");
    }
    tree.top.sql("UPDATE docs SET open = true WHERE id = 2");
    let rows = "SELECT string_agg(id || left(doc, 1) || length(doc), ' ' ORDER BY id) FROM docs";
    wait_until("both are below", || {
        node.server.value(rows) == "1x10000 2y10000"
    });
    // Who adds one is told of it, where it can happen.
    let (told, notices) = std::sync::mpsc::channel();
    let mut config = tree.top.config();
    config.notice_callback(move |notice| told.send(notice.message().to_owned()).expect("tell"));
    let add = "CREATE TABLE notes (id int, open bool, note text, PRIMARY KEY (id, open));
        SELECT terrace.add_table('notes', filter => 'open');
        SELECT terrace.remove_table('notes');
        SELECT terrace.add_table('notes', filter => 'open', columns => '{id, open}');
        SELECT terrace.remove_table('notes'); ALTER TABLE notes REPLICA IDENTITY FULL;
        SELECT terrace.add_table('notes', filter => 'open');";
    let mut client = config.connect(postgres::NoTls).expect("connect");
    client.batch_execute(add).expect("add the table");
    drop((client, config));
    let of_filters: Vec<String> = notices.iter().filter(|n| n.contains("filter")).collect();
    let told =
        "a row of table \"public.notes\" that comes to pass its filter later may lack long values";
    assert_eq!(of_filters, [told]);
}

// pglogical #143, #496: a filter at the initial copy, and rows that walk through it later.
#[test]
fn a_row_filter_holds_at_the_copy_and_in_the_stream() {
    let schema = "
        CREATE TABLE seen (id int, open bool, v text, PRIMARY KEY (id, open));
        CREATE TABLE whole (id int PRIMARY KEY, open bool, v text);
        ALTER TABLE whole REPLICA IDENTITY FULL;
        CREATE TABLE part (id int, open bool, v text, hidden int DEFAULT 7, PRIMARY KEY (id, open));
        INSERT INTO seen SELECT g, g % 2 = 0, 'before' FROM generate_series(1, 100) g;
        INSERT INTO whole SELECT * FROM seen; INSERT INTO part SELECT * FROM seen;
        SELECT terrace.add_table('seen', filter => 'open'), terrace.add_table('whole', filter => 'open'),
               terrace.add_table('part', filter => 'open', columns => '{id, open, v}');";
    let mut tree = Tree::plant(schema).expect("boot the top");
    tree.boot(&CHAIN).expect("boot the servers");
    // Made by hand, one does not say that the whole row tells it.
    let by_hand = "CREATE TABLE seen (id int, open bool, v text, PRIMARY KEY (id, open));
        CREATE TABLE whole (id int PRIMARY KEY, open bool, v text);
        CREATE TABLE part (LIKE seen INCLUDING ALL)";
    tree.nodes[0].server.sql(by_hand);
    tree.start_bridges().expect("start the bridges");
    tree.wait_streaming();
    let same = |tree: &Tree| {
        ["seen", "whole", "part"].iter().all(|table| {
            let select = format!("SELECT id, open, v FROM {table}");
            let wanted = tree.top.rows(&format!("{select} WHERE open ORDER BY id"));
            let shows = |server: &Server| server.rows(&format!("{select} ORDER BY id")) == wanted;
            tree.nodes.iter().all(|node| shows(&node.server))
        })
    };
    assert!(same(&tree), "the copy is filtered");
    for table in ["seen", "whole", "part"] {
        tree.top.sql(&format!(
            "UPDATE {table} SET open = true, v = 'came in' WHERE id IN (1, 3, 5);
             UPDATE {table} SET open = false, v = 'went out' WHERE id IN (2, 4);
             UPDATE {table} SET v = 'stays in' WHERE id = 6;
             UPDATE {table} SET v = 'stays out' WHERE id = 7;
             DELETE FROM {table} WHERE id IN (8, 9);
             INSERT INTO {table} VALUES (101, true, 'in'), (102, false, 'out');
             UPDATE {table} SET id = 103 WHERE id = 10"
        ));
    }
    wait_until("what passes the filter is below", || same(&tree));

    // What has piled up is folded: rows go out and come in again and again.
    tree.nodes[0].bridge.stop();
    let before = tree.nodes[0].bridge.logged().len();
    let mut client = tree.top.connect();
    for id in 11..60 {
        for (table, times) in [("seen", 3), ("part", 4)] {
            for _ in 0..times - id % 2 {
                let toggle =
                    format!("UPDATE {table} SET open = NOT open, v = v || '.' WHERE id = {id}");
                client.batch_execute(&toggle).expect("toggle");
            }
        }
    }
    tree.nodes[0].bridge.restart().expect("restart");
    wait_until("all of it is below", || same(&tree));
    let log = &tree.nodes[0].bridge.logged()[before..];
    assert!(
        log.contains("applied set-wise") && !log.contains("applying"),
        "{log}"
    );
    tree.must_have_no_conflict();
}

/// What is published changes again and again, also behind our back, while the masters do.
#[test]
fn what_is_published_changes_while_masters_do() {
    let three = [("region", None, 3), ("branch", Some("region"), 1)];
    let later = "CREATE TABLE later (n bigint PRIMARY KEY);";
    let mut tree = Tree::grow(&format!("{STEPS}{later}"), &three);
    for node in &tree.nodes {
        if node.server.value("SELECT to_regclass('later')").is_empty() {
            node.server.sql(later);
        }
    }
    let counting = count_up(&tree.top);
    let writing = Background::paced(&tree.top, |client, n| {
        let sql = "INSERT INTO later VALUES ($1) ON CONFLICT DO NOTHING";
        client.execute(sql, &[&n]).map(drop)
    });
    let changes = [
        (
            "SELECT terrace.add_table('later')",
            "SELECT terrace.remove_table('later')",
        ),
        (
            "ALTER PUBLICATION terrace ADD TABLE later",
            "ALTER PUBLICATION terrace DROP TABLE later",
        ),
    ];
    let mut windows = Vec::new();
    for round in 0..4 {
        let (begin, end) = changes[round % 2];
        let old = tree.with_role("region", "master");
        tree.node(&old).bridge.kill9();
        tree.top.sql(begin);
        // The row under way may be written by a transaction that began before.
        let from = writing.count() + 2;
        writing.go_on(30);
        if round == 2 {
            tree.top.kill9();
            tree.top.restart().expect("start the top");
        }
        tree.successor("region", &old);
        writing.go_on(30);
        tree.node(&old).bridge.restart().expect("start the bridge");
        tree.settled_master("region");
        let output = tree
            .node(&old)
            .bridge
            .command("switchover", &["--domain", "region"]);
        let output = output.expect("run switchover");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        writing.go_on(10);
        let to = writing.count();
        tree.top.sql(end);
        windows.push(format!("n BETWEEN {from} AND {to}"));
        counting.go_on(10);
    }
    writing.stop();
    counting.go_on(20);
    counting.stop();
    tree.wait_for_equal(&["steps", "trail"]);
    tree.assert_gapless();
    let published = format!("SELECT count(*) FROM later WHERE {}", windows.join(" OR "));
    let wanted = tree.top.value(&published);
    assert!(wanted.parse::<i64>().expect("count") > 4 * 50, "{wanted}");
    let all = tree.nodes[0].server.checksum("later").expect("checksum");
    for node in &tree.nodes {
        let name = &node.server.name;
        assert_eq!(node.server.value(&published), wanted, "{name} lacks rows");
        assert_eq!(
            node.server.checksum("later").expect("checksum"),
            all,
            "{name}"
        );
    }
    let more = tree.top.value("SELECT count(*) FROM later");
    assert!(
        !all.starts_with(&format!("{more} ")),
        "nothing was left out"
    );
}

// The order of the tree is that of commits: a prepared transaction has its place where
// COMMIT PREPARED is, whoever leads between the two, and whatever is copied meanwhile.
#[test]
fn prepared_transactions_come_whole_where_they_are_committed() {
    let mut tree = Tree::plant(TABLE).expect("boot the top");
    tree.top
        .sql("ALTER SYSTEM SET max_prepared_transactions = 10");
    tree.top.stop();
    tree.top.restart().expect("start the top");
    let prepare = |top: &Server, name: &str, sql: &str| {
        top.sql(&format!("BEGIN; {sql}; PREPARE TRANSACTION '{name}'"));
    };
    let commit = |top: &Server, name: &str| top.sql(&format!("COMMIT PREPARED '{name}'"));

    // The snapshot of the copy waits for it, as for any transaction that began before.
    let rows = "INSERT INTO t SELECT g, 'first' FROM generate_series(1, 3) g";
    prepare(&tree.top, "first", rows);
    tree.boot(&[("region", None, 2)]).expect("boot the servers");
    tree.start_bridges().expect("start the bridges");
    let waits = "SELECT count(*) > 0 FROM pg_stat_activity \
                 WHERE backend_type = 'walsender' AND wait_event_type = 'Lock'";
    wait_until("the copy waits", || tree.top.value(waits) == "t");
    commit(&tree.top, "first");
    tree.wait_streaming();
    tree.wait_for_equal(&["t"]);

    // The branch copies while one is open that region knows nothing of yet.
    let rows = "UPDATE t SET v = 'second' WHERE id < 3; INSERT INTO t VALUES (11, 'second')";
    prepare(&tree.top, "second", rows);
    tree.boot(&[("branch", Some("region"), 1)])
        .expect("boot the branch");
    tree.start_bridges().expect("start its bridge");
    tree.wait_streaming();
    commit(&tree.top, "second");
    tree.wait_for_equal(&["t"]);

    // Others commit meanwhile, and the master changes. No reader sees a part.
    let branch = &tree.nodes[2].server;
    let reading = Background::paced(branch, |client, _| {
        let sql = "SELECT count(*), count(*) FILTER (WHERE v = 'gone') FROM t \
                   WHERE id BETWEEN 100 AND 199";
        let row = client.query_one(sql, &[])?;
        let (some, gone): (i64, i64) = (row.get(0), row.get(1));
        assert!(some == 0 || some == 50, "{some} rows of 50");
        assert_eq!(gone, 0, "rows of one that is rolled back");
        Ok(())
    });
    let half = |from: i32, v: &str| {
        format!("INSERT INTO t SELECT g, '{v}' FROM generate_series({from}, {from} + 49) g")
    };
    let kept = format!("SET LOCAL terrace.label = 'kept'; {}", half(100, "kept"));
    prepare(
        &tree.top,
        "kept",
        &format!("{kept}; UPDATE t SET v = 'kept' WHERE id = 1"),
    );
    prepare(&tree.top, "gone", &half(150, "gone"));
    tree.top.sql("UPDATE t SET v = 'between' WHERE id = 2");
    tree.wait_for_equal(&["t"]);
    let master = tree.settled_master("region");
    tree.node(&master).bridge.kill9();
    tree.successor("region", &master);
    tree.top.sql("UPDATE t SET v = 'later' WHERE id = 2");
    tree.top.kill9();
    tree.top.restart().expect("start the top");
    tree.start_bridges().expect("start the bridge");
    let label = "SELECT count(*) FROM terrace.lag WHERE last_label = 'kept' AND level > 0";
    commit(&tree.top, "kept");
    wait_until("its label has come", || tree.top.value(label) == "3");
    tree.top.sql("ROLLBACK PREPARED 'gone'");
    tree.top.sql("UPDATE t SET v = v || ', after' WHERE id < 3");
    tree.wait_for_equal(&["t"]);

    // Piled up.
    for node in &mut tree.nodes {
        node.bridge.stop();
    }
    for n in (1000..1400).step_by(4) {
        let other = n + 1;
        prepare(
            &tree.top,
            "one",
            &format!("INSERT INTO t VALUES ({n}, 'one')"),
        );
        prepare(
            &tree.top,
            "two",
            &format!("INSERT INTO t VALUES ({other}, 'two')"),
        );
        tree.top
            .sql(&format!("INSERT INTO t VALUES ({other} + 1, 'plain')"));
        if n % 3 == 0 {
            tree.top.sql("ROLLBACK PREPARED 'one'");
        } else {
            commit(&tree.top, "one");
        }
        tree.top.sql("UPDATE t SET v = v || '.' WHERE id > 1390");
        commit(&tree.top, "two");
    }
    tree.start_bridges().expect("start the bridges");
    tree.wait_streaming();
    tree.wait_for_equal(&["t"]);
    reading.stop();
    let bad = "SELECT (SELECT count(*) FROM terrace.conflicts) + \
               (SELECT count(*) FROM terrace.events WHERE kind IN ('gap', 'resync'))";
    assert_eq!(tree.top.value(bad), "0");
}
