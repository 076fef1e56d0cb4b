//! The rules of the failover, each where no other one covers for it.

use std::time::{Duration, Instant};

use terrace_tests::load::{STEPS, WIDE, count_up, fill_wide};
use terrace_tests::proxy::Proxy;
use terrace_tests::{Tree, wait_until};

const REGION: [(&str, Option<&str>, usize); 1] = [("region", None, 3)];

pub const GONE: &str = "SELECT count(*) FROM terrace.events WHERE kind IN ('gap', 'resync')";

/// Waits until these have all that is at the top.
pub fn have_every_row(tree: &mut Tree, names: &[String]) {
    let rows = "SELECT format('%s %s', count(*), max(n)) FROM steps";
    let all = tree.top.value(rows);
    for name in names {
        let server = &tree.node(name).server;
        wait_until("every row is there", || server.value(rows) == all);
    }
}

fn confirmed(tree: &Tree) -> String {
    tree.top.value(
        "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = 'terrace_region'",
    )
}

// Rule C: what one server alone holds is not acknowledged, so its disk may go.
#[test]
fn what_no_slave_holds_is_not_acknowledged_before_its_time() {
    let mut tree = Tree::grow_with("[failover]\nack_timeout = \"8s\"", STEPS, &REGION);
    let counting = count_up(&tree.top);
    counting.go_on(50);
    let master = tree.settled_master("region");
    let slaves = tree.others("region", &master);
    for slave in &slaves {
        tree.node(slave).bridge.pause();
    }
    std::thread::sleep(Duration::from_millis(500));
    let before = confirmed(&tree);
    let count = "SELECT count(*) FROM steps";
    let had: i64 = tree.top.value(count).parse().expect("count");
    tree.rows_arrive(&master, Duration::from_secs(5));
    wait_until("the master has far more than the slaves", || {
        let has: i64 = tree
            .node(&master)
            .server
            .value(count)
            .parse()
            .expect("count");
        has > had + 300
    });
    assert_eq!(confirmed(&tree), before, "the slaves do not have it");

    // The master and all that it holds are gone for good: nothing is missed.
    tree.node(&master).lose();
    for slave in &slaves {
        tree.node(slave).bridge.resume();
    }
    let next = tree.successor("region", &master);
    tree.rows_arrive(&next, Duration::from_secs(10));

    // With the last slave silent for `ack_timeout` it goes on alone, and says so.
    let last = slaves.iter().find(|name| **name != next).expect("a slave");
    tree.rows_arrive(last, Duration::from_secs(10));
    tree.node(last).bridge.pause();
    let degraded = format!(
        "SELECT count(*) FROM terrace.lag WHERE node = '{next}' AND reason LIKE 'degraded:%'"
    );
    wait_until("the master is degraded", || {
        tree.top.value(&degraded) == "1"
    });
    let before = confirmed(&tree);
    wait_until("it acknowledges what it holds", || {
        confirmed(&tree) != before
    });
    tree.node(last).bridge.resume();
    wait_until("it is no longer", || tree.top.value(&degraded) == "0");
    counting.stop();
    have_every_row(&mut tree, &slaves);
}

// Rule F: of two servers neither is a majority; what ends the silent one's hold of the
// slot is that its lease is short.
#[test]
fn the_lease_of_a_silent_master_ends_by_itself() {
    let mut tree = Tree::grow(STEPS, &[("region", None, 2)]);
    let counting = count_up(&tree.top);
    counting.go_on(50);
    let master = tree.settled_master("region");
    tree.node(&master).bridge.pause();
    let started = Instant::now();
    let next = tree.successor("region", &master);
    tree.rows_arrive(&next, Duration::from_secs(5));
    let waited = started.elapsed();
    assert!(waited < Duration::from_secs(25), "it took {waited:?}");
    tree.node(&master).bridge.resume();
    assert_eq!(tree.settled_master("region"), next);
    tree.all_is_well(counting);
}

// A server whose Postgres is not up yet does not know what it has. That counted as "has
// nothing", and who came back first threw its data away.
#[test]
fn who_has_only_started_may_have_what_is_missing() {
    let mut tree = Tree::grow_with("[failover]\nresync_on_gap = true", STEPS, &REGION);
    let counting = count_up(&tree.top);
    counting.go_on(50);
    let master = tree.settled_master("region");
    let slaves = tree.others("region", &master);
    let (late, other) = (&slaves[0], &slaves[1]);
    tree.node(late).bridge.pause();
    counting.go_on(50);
    let written = tree.top.value("SELECT pg_current_wal_lsn()");
    let acknowledged = format!("SELECT '{}' <= ", written);
    wait_until("two hold it", || {
        tree.top
            .value(&format!("{acknowledged} '{}'", confirmed(&tree)))
            == "t"
    });
    let all = [late, other, &master];
    all.iter().for_each(|name| tree.node(name).bridge.kill9());
    for name in [other, &master] {
        tree.node(name).server.kill9();
    }
    for name in all {
        tree.node(name).bridge.restart().expect("start the bridge");
    }
    let asks = "SELECT coalesce(reason, '') FROM terrace.node_status WHERE self";
    let server = &tree.node(late).server;
    wait_until("it asks for the others", || {
        let said = server.value(asks);
        let (_, unseen) = said.split_once("that do not answer").unwrap_or_default();
        unseen.contains(other.as_str()) && unseen.contains(&master)
    });
    std::thread::sleep(Duration::from_secs(2));
    for name in [other, &master] {
        tree.node(name).server.restart().expect("start the server");
    }
    tree.wait_streaming();
    tree.all_is_well(counting);
    let copies = "SELECT count(*) FROM terrace.events WHERE kind IN ('copied', 'resync')";
    assert_eq!(tree.top.value(copies), "3", "nobody copies anew");
}

// Rule G: it has one slave and the parent, and that slave has all others.
#[test]
fn a_master_that_most_cannot_reach_makes_room() {
    let tree = Tree::plant(STEPS).expect("boot the top").with_links();
    let tree = tree.grow_on(&[("region", None, 4)]);
    let counting = count_up(&tree.top);
    counting.go_on(50);
    let master = tree.settled_master("region");
    let slaves = tree.others("region", &master);
    tree.between(&[&master], &[&slaves[1], &slaves[2]], Proxy::cut);
    // That one is asked; another one that hears of it in time may be faster.
    let next = tree.successor("region", &master);
    for slave in &slaves {
        tree.rows_arrive(slave, Duration::from_secs(5));
    }
    tree.rows_arrive(&master, Duration::from_secs(5));
    tree.heal();
    assert_eq!(tree.settled_master("region"), next);
    tree.all_is_well(counting);
}

#[test]
fn a_slave_that_cannot_reach_its_master_follows_a_sibling() {
    let tree = Tree::plant(STEPS).expect("boot the top").with_links();
    let tree = tree.grow_on(&REGION);
    let counting = count_up(&tree.top);
    counting.go_on(50);
    let master = tree.settled_master("region");
    let slaves = tree.others("region", &master);
    let upstream = format!(
        "SELECT upstream FROM terrace.lag WHERE node = '{}'",
        slaves[0]
    );
    tree.between(&[&slaves[0]], &[&master], Proxy::cut);
    wait_until("the sibling is followed", || {
        tree.top.value(&upstream) == slaves[1]
    });
    tree.rows_arrive(&slaves[0], Duration::from_secs(5));
    let promotions = "SELECT count(*) FROM terrace.events WHERE kind = 'master'";
    assert_eq!(tree.top.value(promotions), "1", "nobody is promoted for it");
    tree.heal();
    wait_until("the master is followed again", || {
        tree.top.value(&upstream) == master
    });
    tree.all_is_well(counting);
}

// PostgreSQL's fast shutdown waits until what it has sent is acknowledged, and that waits
// for slaves: `ack_timeout` is what bounds it.
#[test]
fn the_top_stops_while_acknowledgements_wait() {
    let mut tree = Tree::grow_with("[failover]\nack_timeout = \"5s\"", STEPS, &REGION);
    let counting = count_up(&tree.top);
    counting.go_on(50);
    let master = tree.settled_master("region");
    let slaves = tree.others("region", &master);
    for slave in &slaves {
        tree.node(slave).bridge.pause();
    }
    // Something that they have not.
    counting.go_on(3);
    let written = tree.top.value("SELECT pg_current_wal_lsn()");
    tree.rows_arrive(&master, Duration::from_secs(4));
    let waits = format!(
        "SELECT confirmed_flush_lsn < '{written}' FROM pg_replication_slots \
         WHERE slot_name = 'terrace_region'"
    );
    assert_eq!(tree.top.value(&waits), "t", "nothing waits");
    let started = Instant::now();
    tree.top.stop();
    let took = started.elapsed();
    println!("the top stopped after {took:?}");
    assert!(took < Duration::from_secs(9), "it took {took:?}");
    for slave in &slaves {
        tree.node(slave).bridge.resume();
    }
    // What a slave says of a parent that is away used to stay when it was back.
    let away = "SELECT reason LIKE 'no parent server answers%' FROM terrace.node_status WHERE self";
    for slave in &slaves {
        let server = &tree.node(slave).server;
        wait_until("the top is missed", || server.value(away) == "t");
    }
    tree.top.restart().expect("start the top");
    tree.wait_streaming();
    tree.all_is_well(counting);
    assert_eq!(tree.top.value(GONE), "0");
}

// What an idle top has written for nobody is acknowledged as well, so that its WAL can go;
// one that has not seen that takes the slot and must not miss it.
#[test]
fn what_an_idle_top_was_acknowledged_is_missed_by_nobody() {
    let schema = "CREATE TABLE t (n int PRIMARY KEY); SELECT terrace.add_table('t');
                  CREATE TABLE apart (n int)";
    let mut tree = Tree::grow(schema, &REGION);
    tree.top.sql("CREATE DATABASE other");
    let mut other = tree.top.config();
    let mut other = other
        .dbname("other")
        .connect(postgres::NoTls)
        .expect("connect");
    let mut rows = 0;
    for round in 0..4 {
        let master = tree.settled_master("region");
        other
            .batch_execute(
                "DROP TABLE IF EXISTS t; CREATE TABLE t AS SELECT generate_series(1, 1000)",
            )
            .expect("write elsewhere");
        tree.top
            .sql("SELECT pg_logical_emit_message(true, 'x', 'y')");
        // The last of it is no transaction that flows.
        tree.top.sql(
            "INSERT INTO apart SELECT generate_series(1, 100); CHECKPOINT;
             SELECT pg_logical_emit_message(false, 'x', 'y')",
        );
        let end = tree.top.value("SELECT pg_current_wal_lsn()");
        let beyond = format!(
            "SELECT confirmed_flush_lsn >= '{end}' FROM pg_replication_slots \
             WHERE slot_name = 'terrace_region'"
        );
        wait_until("the slot goes on", || tree.top.value(&beyond) == "t");
        // One, or all of them at one moment.
        if round % 2 == 0 {
            tree.node(&master).bridge.kill9();
            tree.successor("region", &master);
        } else {
            tree.nodes.iter_mut().for_each(|node| node.bridge.kill9());
        }
        tree.start_bridges().expect("start the bridges");
        rows += 1;
        tree.top.sql(&format!("INSERT INTO t VALUES ({rows})"));
        tree.wait_for_equal(&["t"]);
    }
    tree.settled_master("region");
    assert_eq!(tree.top.value(GONE), "0");
}

// A server that slept believes what it knew of the others then. What it removes is its own,
// and what it does not know of any more it learns before it removes anything.
#[test]
fn a_master_that_wakes_makes_nobody_forget() {
    let mut tree = Tree::grow_with("[queue]\nretain_min = \"1MiB\"", WIDE, &REGION);
    let master = tree.settled_master("region");
    let [away, next] = <[String; 2]>::try_from(tree.others("region", &master)).expect("two");
    // Long enough for each to have heard where the others are.
    std::thread::sleep(Duration::from_millis(2500));
    tree.node(&away).bridge.stop();
    let place = format!("SELECT flush_lsn - '0/0' FROM terrace.lag WHERE node = '{away}'");
    let place: u64 = tree.top.value(&place).parse().expect("a position");
    fill_wide(&tree.top, 0..4);
    let rows = |tree: &mut Tree, name: &str| {
        let server = &tree.node(name).server;
        server.value("SELECT count(*) FROM wide")
    };
    for name in [&master, &next] {
        wait_until("the rows are there", || rows(&mut tree, name) == "48");
    }
    tree.node(&master).bridge.pause();
    // No majority is left: the slot is free when the lease is over.
    tree.successor("region", &master);
    fill_wide(&tree.top, 4..8);
    wait_until("the other leads", || rows(&mut tree, &next) == "96");
    tree.node(&master).bridge.resume();
    wait_until("it has what it slept over", || {
        rows(&mut tree, &master) == "96"
    });
    // Time for each to forget what it may.
    std::thread::sleep(Duration::from_secs(3));
    for name in [&master, &next] {
        let first = &tree.node(name).bridge.segments()[0];
        let start = first.file_stem().and_then(|stem| stem.to_str());
        let start = u64::from_str_radix(start.expect("a name"), 16).expect("a position");
        assert!(start <= place, "{name} begins at {start:X}, not {place:X}");
    }
    // It finds all of it at the one that slept.
    tree.node(&next).bridge.kill9();
    tree.node(&away).bridge.restart().expect("start the bridge");
    wait_until("it has caught up", || rows(&mut tree, &away) == "96");
    tree.node(&next).bridge.restart().expect("start the bridge");
    tree.settled_master("region");
    assert_eq!(tree.top.value(GONE), "0");
}

/// Whether a server's own bridge is at work below `upstream`.
pub fn follows(tree: &Tree, name: &str, upstream: &str) -> bool {
    let port = tree.links[&(name.to_owned(), upstream.to_owned())].port;
    let sql = format!(
        "SELECT count(*) FROM terrace.lag WHERE node = '{name}' AND role = 'master' \
         AND upstream LIKE '%:{port}'"
    );
    let node = tree.nodes.iter().find(|node| node.server.name == name);
    node.expect("a node").server.value(&sql) == "1"
}

// What it has more comes to the one that leads from the parent, and then it goes on.
#[test]
fn a_slave_that_is_ahead_of_the_promoted_one_waits_for_it() {
    let bulk = "CREATE TABLE bulk (id int PRIMARY KEY, v text); SELECT terrace.add_table('bulk');";
    let schema = format!("{STEPS}{bulk}");
    let mut tree = Tree::plant(&schema).expect("boot the top").with_links();
    // Two holding it is not enough: the parent still has what the lagging one lacks.
    tree.settings = "[failover]\nack_members = 3\nack_timeout = \"60s\"".into();
    let mut tree = tree.grow_on(&REGION);
    let counting = count_up(&tree.top);
    counting.go_on(20);
    let master = tree.settled_master("region");
    let slaves = tree.others("region", &master);
    let (ahead, behind) = (slaves[0].as_str(), slaves[1].as_str());
    tree.node(behind).bridge.pause();
    // So much that it takes a while to send it.
    for part in 0..10 {
        tree.top.sql(&format!(
            "INSERT INTO bulk SELECT {part} * 50000 + g, repeat('x', 99) FROM generate_series(1, 50000) g"
        ));
    }
    counting.go_on(50);
    let shown = "SELECT coalesce(max(n), 0) FROM steps";
    let written: i64 = tree.top.value(shown).parse().expect("a number");
    wait_until("one slave has it all", || {
        tree.node(ahead)
            .server
            .value(shown)
            .parse::<i64>()
            .expect("a number")
            >= written
    });

    // The one that has it can neither lead nor give.
    tree.between(&[ahead], &["top", behind], Proxy::cut);
    tree.node(&master).bridge.kill9();
    tree.node(behind).bridge.resume();
    wait_until("the one that lags leads", || {
        tree.node(behind).bridge.logged().contains("role=master")
    });
    tree.between(&[behind], &["top"], Proxy::cut_answers);
    tree.between(&[ahead], &[behind], Proxy::heal);
    let follows = format!("streaming upstream={behind} ");
    let mut least = written;
    wait_until("the one that is ahead follows it", || {
        let node = tree.node(ahead);
        let now = node.server.value(shown).parse().expect("a number");
        assert!(now >= least, "a row is gone");
        least = now;
        node.bridge.logged().contains(&follows)
    });
    let progress = "SELECT lsn FROM terrace.progress";
    let [more, less] = [ahead, behind].map(|name| tree.node(name).server.value(progress));
    let is_more = format!("SELECT '{more}'::pg_lsn > '{less}'::pg_lsn");
    assert_eq!(
        tree.top.value(&is_more),
        "t",
        "{more} is not more than {less}"
    );

    tree.heal();
    tree.start_bridges().expect("start the bridge");
    tree.wait_streaming();
    tree.all_is_well(counting);
    tree.wait_for_equal(&["bulk"]);
    assert_eq!(tree.top.value(GONE), "0");
}
