//! A tree of real servers: what is written at the top is everywhere below, whole
//! and in order, whatever dies meanwhile.

use std::time::{Duration, Instant};

use terrace_tests::load::{ACCOUNTS, Background, Observer, STEPS, count_up, transfers};
use terrace_tests::{Node, Server, Tree, wait_until};

const DOMAINS: [(&str, Option<&str>, usize); 2] =
    [("region", None, 3), ("branch", Some("region"), 3)];

#[test]
fn two_levels_hold_what_the_top_holds() {
    let schema = format!(
        "{ACCOUNTS} CREATE TABLE keyless (a int, b text); SELECT terrace.add_table('keyless')"
    );
    let tree = Tree::grow(&schema, &DOMAINS);
    tree.top.sql(
        "INSERT INTO keyless VALUES (1, 'x'), (1, 'x'), (2, NULL);
         DELETE FROM keyless WHERE ctid = (SELECT min(ctid) FROM keyless WHERE a = 1);
         UPDATE keyless SET b = 'it''s \\ \"ü\"' WHERE a = 2;
         UPDATE account SET note = repeat('long ', 20000) WHERE id = 5;
         UPDATE account SET balance = balance WHERE id = 5;
         UPDATE account SET id = 1005 WHERE id = 6;
         UPDATE account SET id = 6 WHERE id = 1005;
         BEGIN; SAVEPOINT s; INSERT INTO keyless VALUES (9, 'gone'); ROLLBACK TO s;
         INSERT INTO keyless VALUES (3, 'kept'); COMMIT",
    );
    tree.wait_for_equal(&["account", "keyless"]);
    assert_eq!(
        tree.top
            .value("SELECT terrace.wait_for(pg_current_wal_lsn())"),
        "t"
    );

    // What stays at the top, and labels. One session, one transaction a statement.
    let mut client = tree.top.connect();
    for sql in [
        "SET terrace.sync = off",
        "INSERT INTO keyless VALUES (100, 'stays')",
        "RESET terrace.sync",
        "SET terrace.label = 'prices 7'",
        "INSERT INTO keyless VALUES (4, 'labelled')",
    ] {
        client.batch_execute(sql).expect(sql);
    }
    for node in &tree.nodes {
        let sql = "SELECT string_agg(a::text, ' ' ORDER BY a) FROM keyless";
        wait_until("the labelled row is there", || {
            node.server.value(sql).ends_with('4')
        });
        assert_eq!(node.server.value(sql), "1 2 3 4", "{}", node.server.name);
    }
    let labelled = "SELECT count(*) FROM terrace.lag WHERE last_label = 'prices 7' AND level > 0";
    wait_until("the label is shown", || tree.top.value(labelled) == "6");
    let delivered = "SELECT count(DISTINCT node) FROM terrace.delivery WHERE label = 'prices 7' \
                     AND applied_at BETWEEN committed_at AND now() AND tag <> ''";
    wait_until("its delivery is told", || tree.top.value(delivered) == "6");
    let roles = "SELECT count(*) FILTER (WHERE role = 'master') || ' ' || count(*) \
                 FROM terrace.lag WHERE level > 0 AND state = 'streaming'";
    wait_until("each domain has one master", || {
        tree.top.value(roles) == "2 6"
    });

    // A message comes with the data, in order.
    let mut listener = tree.nodes[5].server.connect();
    listener.batch_execute("LISTEN shop").expect("listen");
    tree.top.sql("SELECT terrace.send('shop', 'open')");
    let heard = {
        use postgres::fallible_iterator::FallibleIterator;
        let mut heard = listener.notifications();
        let first = heard.timeout_iter(terrace_tests::PATIENCE).next();
        first.expect("listen").expect("a notification")
    };
    assert_eq!((heard.channel(), heard.payload()), ("shop", "open"));

    // One that was heard before is heard again, however many came between.
    let many = "SELECT count(terrace.send('shop', n::text)) FROM generate_series(1, 1500) n";
    tree.top.sql(many);
    tree.top.sql("SELECT terrace.send('shop', '1400')");
    let heard: Vec<String> = {
        use postgres::fallible_iterator::FallibleIterator;
        let mut heard = listener.notifications();
        let all = heard.timeout_iter(terrace_tests::PATIENCE).take(1501);
        let payloads = all.map(|heard| Ok(heard.payload().to_owned()));
        payloads.collect().expect("listen")
    };
    assert_eq!(heard.len(), 1501);
    assert_eq!(heard[1500], "1400");
}

#[test]
fn any_server_shows_the_tree() {
    let mut tree = Tree::grow(STEPS, &[("region", None, 2), ("branch", Some("region"), 1)]);
    tree.wait_streaming();
    let topology =
        "SELECT string_agg(trim(tree) || coalesce(' ' || role, ''), ', ') FROM terrace.topology";
    let master = tree.with_role("region", "master");
    let slave = tree.with_role("region", "slave");
    let seen =
        format!("top master, region:, {master} master, {slave} slave, branch:, branch-1 master");
    wait_until("the top shows all", || tree.top.value(topology) == seen);

    let node = tree.node("branch-1");
    let shown = |arguments: &[&str]| {
        let limit = std::time::Duration::from_secs(4);
        let output = node.bridge.command_within(limit, "status", arguments);
        String::from_utf8(output.expect("run status").stdout).expect("text")
    };
    let json = shown(&["--json"]);
    let from_json = |column: &str| {
        node.server.value(&format!(
            "SELECT string_agg(n ->> '{column}', ' ') FROM json_array_elements($${json}$$) n \
             WHERE n ->> 'node' = 'branch-1'"
        ))
    };
    assert_eq!(from_json("domain"), "branch");
    assert_eq!(from_json("state"), "streaming");
    let headers = |text: &str| {
        text.lines()
            .filter(|line| line.starts_with("node "))
            .count()
    };
    let once = shown(&[]);
    assert_eq!(headers(&once), 1, "{once}");
    assert!(
        once.contains("branch-1") && once.contains("copied"),
        "{once}"
    );
    let watched = shown(&["--watch"]);
    assert!(headers(&watched) > 1, "{watched}");

    // Ready is who streams; alive is also who waits, and it says for what.
    let get = |page: &str| node.bridge.get(page).expect("an answer");
    assert!(get("/readyz").starts_with("HTTP/1.1 200"));
    tree.node("branch-1").server.kill9();
    let node = tree.node("branch-1");
    let get = |page: &str| node.bridge.get(page).expect("an answer");
    let mut said = String::new();
    wait_until("it is not ready", || {
        said = get("/readyz");
        said.starts_with("HTTP/1.1 503")
    });
    assert!(
        said.contains("stalled: ") && said.contains("connect"),
        "{said}"
    );
    assert!(get("/healthz").starts_with("HTTP/1.1 200"));
    let output = node.bridge.run("status").expect("run status");
    let said = String::from_utf8_lossy(&output.stderr);
    let names_it = said.contains("connect to the local database at");
    assert!(names_it && output.status.code() == Some(1), "{said}");
}

#[test]
fn whatever_is_killed_nothing_is_lost_or_doubled() {
    let mut tree = Tree::grow(&format!("{ACCOUNTS}{STEPS}"), &DOMAINS);
    let observers: Vec<Observer> = tree
        .nodes
        .iter()
        .map(|node| Observer::start(&node.server))
        .collect();
    let (moving, counting) = (transfers(&tree.top), count_up(&tree.top));
    counting.go_on(100);

    for (domain, role) in [
        ("region", "master"),
        ("region", "slave"),
        ("branch", "master"),
        ("branch", "slave"),
    ] {
        let name = tree.with_role(domain, role);
        tree.node(&name).bridge.kill9();
        counting.go_on(30);
        tree.node(&name).bridge.restart().expect("start the bridge");
        counting.go_on(30);
        tree.node(&name).server.kill9();
        counting.go_on(30);
        tree.node(&name).server.restart().expect("start the server");
        counting.go_on(30);
        tree.wait_streaming();
    }
    tree.top.kill9();
    tree.top.restart().expect("start the top");
    counting.go_on(100);
    tree.wait_streaming();

    counting.stop();
    moving.stop();
    tree.wait_for_equal(&["account", "steps", "trail"]);
    observers.into_iter().map(Observer::stop).for_each(drop);
    tree.assert_gapless();
    // Exactly where each was, and not by copying anew.
    let copied = "SELECT count(*) FROM terrace.events WHERE kind IN ('copied', 'resync', 'gap')";
    assert_eq!(tree.top.value(copied), "6");
}

/// One session writes the same numbers to two tables, a transaction each.
fn by_turns(top: &Server) -> Background {
    Background::start(top, |client, n| {
        let sql = "INSERT INTO first VALUES ($1) ON CONFLICT DO NOTHING";
        client.execute(sql, &[&n])?;
        let sql = "INSERT INTO second VALUES ($1) ON CONFLICT DO NOTHING";
        client.execute(sql, &[&n]).map(drop)
    })
}

#[test]
fn transactions_become_visible_in_their_order() {
    let schema =
        "CREATE TABLE first (n bigint PRIMARY KEY); CREATE TABLE second (n bigint PRIMARY KEY);
         SELECT terrace.add_table('first'), terrace.add_table('second');";
    let mut tree = Tree::grow(
        schema,
        &[("region", None, 2), ("branch", Some("region"), 2)],
    );
    let writing = by_turns(&tree.top);
    writing.go_on(50);
    let look = "SELECT (SELECT count(*) FROM first) - (SELECT count(*) FROM second)";
    for round in 0..40 {
        for node in &tree.nodes {
            let ahead = node.server.value(look);
            assert!(
                ahead == "0" || ahead == "1",
                "{} shows {ahead}",
                node.server.name
            );
        }
        // Also while much is behind, which goes set-wise.
        match round {
            10 => tree.node("region-1").bridge.pause(),
            20 => tree.node("region-1").bridge.resume(),
            _ => std::thread::sleep(std::time::Duration::from_millis(20)),
        }
    }
    writing.stop();
    tree.wait_for_equal(&["first", "second"]);
}

#[test]
fn lag_grows_while_a_bridge_is_paused_and_comes_back() {
    let mut tree = Tree::grow(STEPS, &[("region", None, 1), ("branch", Some("region"), 1)]);
    let counting = count_up(&tree.top);
    let lag = |tree: &Tree, more: &str| {
        let sql = format!("SELECT count(*) FROM terrace.lag WHERE node = 'branch-1' AND {more}");
        tree.top.value(&sql) == "1"
    };
    wait_until("it is up to date", || {
        lag(&tree, "replay_lag < interval '1 s'")
    });
    tree.node("branch-1").bridge.pause();
    wait_until("the lag grows", || {
        lag(&tree, "replay_lag > interval '2 s' AND lag_bytes > 0")
    });
    wait_until("it goes on growing, and the silence is seen", || {
        lag(&tree, "replay_lag > interval '6 s' AND state = 'down'")
    });
    // The link is made anew: what is behind is still behind.
    tree.node("branch-1").bridge.resume();
    wait_until("it has caught up", || {
        lag(&tree, "replay_lag < interval '1 s' AND state <> 'down'")
    });
    counting.stop();
    tree.wait_for_equal(&["steps", "trail"]);
}

// A report moved the top's position, and that was news which was worth another report.
#[test]
fn a_tree_that_nobody_writes_to_tells_of_itself_once_a_second() {
    let tree = Tree::grow(STEPS, &[("region", None, 1), ("branch", Some("region"), 1)]);
    tree.top.sql("INSERT INTO steps VALUES (1)");
    tree.wait_for_equal(&["steps"]);
    let reports = || {
        let sql = "SELECT report ->> 'seq' FROM terrace.status WHERE node = 'region-1'";
        tree.top.value(sql)
    };
    std::thread::sleep(Duration::from_secs(3));
    let (begun, mut count, mut last) = (Instant::now(), 0, reports());
    while begun.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(50));
        let now = reports();
        count += u32::from(now != last);
        last = now;
    }
    assert!((3..=9).contains(&count), "{count} reports in 5 s");
}

#[test]
fn who_was_gone_when_the_top_crashed_is_shown_all_the_same() {
    let mut tree = Tree::grow(STEPS, &[("region", None, 1)]);
    let shown =
        "SELECT state || ' ' || level || ' ' || reason FROM terrace.lag WHERE node = 'region-1'";
    for _ in 0..2 {
        tree.nodes[0].bridge.stop();
        tree.top.kill9();
        tree.top.restart().expect("start the top");
        let wanted = "down 1 no report since the PostgreSQL of the top crashed";
        assert_eq!(tree.top.value(shown), wanted);
        tree.nodes[0].bridge.restart().expect("start");
        tree.wait_streaming();
    }
    // Once forgotten it is shown no more.
    tree.nodes[0].bridge.stop();
    tree.top.kill9();
    tree.top.restart().expect("start the top");
    tree.top.sql("SELECT terrace.forget_node('region-1')");
    assert_eq!(tree.top.value(shown), "");
}

#[test]
fn who_does_not_wait_for_the_server_above_shows_what_has_come() {
    const TWO: [(&str, Option<&str>, usize); 2] =
        [("region", None, 1), ("branch", Some("region"), 1)];
    for (settings, waits) in [("", true), ("[apply]\nwait_for_upstream = false", false)] {
        let tree = Tree::grow_with(settings, STEPS, &TWO);
        let [above, below] = [&tree.nodes[0].server, &tree.nodes[1].server];
        let locked = above.lock("steps");
        tree.top.sql("INSERT INTO steps VALUES (1)");
        let shown = || below.value("SELECT count(*) FROM steps") == "1";
        if waits {
            std::thread::sleep(Duration::from_secs(2));
            assert!(!shown(), "it is not shown above");
        } else {
            wait_until("it is shown", shown);
        }
        drop(locked);
        tree.wait_for_equal(&["steps"]);
    }
}

// Longer than a walsender waits for a sign of life, over thin links and while nobody can apply it.
#[test]
fn a_large_transaction_holds_up_no_sign_of_life_and_is_kept_in_no_memory() {
    const TWO: [(&str, Option<&str>, usize); 2] =
        [("region", None, 1), ("branch", Some("region"), 1)];
    let schema = format!(
        "{STEPS} CREATE TABLE large (id int PRIMARY KEY, v text); SELECT terrace.add_table('large')"
    );
    let tree = Tree::plant(&schema).expect("boot the top").with_links();
    let tree = tree.grow_on(&TWO);
    for link in tree.links.values() {
        link.slow(6 << 20);
    }
    let locked: Vec<_> = tree
        .nodes
        .iter()
        .map(|node| node.server.lock("large"))
        .collect();
    let start = Instant::now();
    tree.top.sql(
        "INSERT INTO large SELECT g, repeat(md5(g::text), 32) FROM generate_series(1, 80000) g",
    );
    let end = tree.top.value("SELECT pg_current_wal_lsn()");
    let received = format!(
        "SELECT count(*) FROM terrace.lag WHERE domain <> 'top' AND received_lsn >= '{end}'"
    );
    wait_until("all have received it", || tree.top.value(&received) == "2");
    assert!(
        start.elapsed() > Duration::from_secs(20),
        "{:?}",
        start.elapsed()
    );
    drop(locked);
    tree.wait_for_equal(&["large"]);
    let top = std::fs::read_to_string(tree.top.log()).expect("the top's log");
    assert!(!top.contains("terminating walsender"), "{top}");
    for node in &tree.nodes {
        let log = node.bridge.logged();
        assert!(!log.contains("link ended"), "{log}");
        let peak = node.bridge.peak_mib();
        assert!(peak < 64, "{} MiB", peak);
    }
}

// Each partition has a name of its own on the wire; what is kept of that is kept for long.
#[test]
fn a_transaction_over_many_partitions_is_kept_in_no_memory() {
    const TWO: [(&str, Option<&str>, usize); 2] =
        [("region", None, 1), ("branch", Some("region"), 1)];
    let schema =
        "CREATE TABLE days (day int, n int, v text, PRIMARY KEY (day, n)) PARTITION BY LIST (day);
         DO $$ BEGIN FOR i IN 1..400 LOOP
             EXECUTE format('CREATE TABLE day_%s PARTITION OF days FOR VALUES IN (%s)', i, i);
         END LOOP; END $$;
         SELECT terrace.add_table('days');";
    let tree = Tree::grow(schema, &TWO);
    tree.top.sql(
        "INSERT INTO days SELECT day, n, repeat(md5(n::text), 32)
         FROM generate_series(1, 400) day, generate_series(1, 250) n ORDER BY day",
    );
    tree.wait_for_equal(&["days"]);
    for node in &tree.nodes {
        let peak = node.bridge.peak_mib();
        assert!(peak < 64, "{}: {peak} MiB", node.server.name);
    }
}

// One row at a time: whoever waits for a tick of 100 ms or more somewhere, always waits for all of it.
#[test]
fn rows_are_shown_on_every_level_when_they_are_committed() {
    const TWO: [(&str, Option<&str>, usize); 2] =
        [("region", None, 2), ("branch", Some("region"), 2)];
    const ROWS: usize = 100;
    for settings in ["", "[apply]\nwait_for_upstream = false"] {
        let tree = Tree::grow_with(settings, STEPS, &TWO);
        let master = tree.settled_master("branch");
        let mut below = tree.nodes.iter().skip(2);
        let is_slave = |node: &&Node| node.server.name != master;
        let node = below.find(is_slave).expect("a slave");
        let (mut top, mut below) = (tree.top.connect(), node.server.connect());
        let mut taken = Vec::new();
        for n in 0..ROWS as i64 {
            top.execute("INSERT INTO steps VALUES ($1::bigint)", &[&n])
                .expect("insert");
            let committed = Instant::now();
            while below
                .query_one("SELECT count(*) FROM steps WHERE n = $1::bigint", &[&n])
                .expect("look")
                .get::<_, i64>(0)
                == 0
            {
                assert!(committed.elapsed() < Duration::from_secs(10), "row {n}");
                std::thread::sleep(Duration::from_millis(1));
            }
            taken.push(committed.elapsed());
        }
        taken.sort();
        let median = taken[ROWS / 2];
        assert!(median < Duration::from_millis(60), "{median:?}");
    }
}
