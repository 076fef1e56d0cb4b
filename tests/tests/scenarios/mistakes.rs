//! What people and disks do wrong to a domain: it says so, and throws nothing away.

use std::fs;
use std::path::Path;
use std::time::Duration;

use terrace_tests::bridge::{Bridge, BridgeOptions, options};
use terrace_tests::load::{STEPS, WIDE, count_up, fill_wide};
use terrace_tests::scratch::free_port;
use terrace_tests::{Scratch, Server, ServerOptions, Tree, wait_until};

use crate::failover::lose_the_middle;

const TWO: [(&str, Option<&str>, usize); 1] = [("region", None, 2)];
const THREE: [(&str, Option<&str>, usize); 1] = [("region", None, 3)];
const COPIES: &str = "SELECT count(*) FROM terrace.events WHERE kind IN ('gap', 'resync')";

fn reason(tree: &mut Tree, node: &str) -> String {
    let sql = format!(
        "SELECT state || ': ' || coalesce(reason, '') FROM terrace.lag WHERE node = '{node}'"
    );
    tree.node(node).server.value(&sql)
}

// A server that lists nobody used to be the majority of its domain all by itself: it took
// the slot, found that it lacked something, and began anew; the others followed it there.
#[test]
fn a_server_that_lists_no_peers_harms_nobody() {
    let mut tree = Tree::grow_with("[failover]\nresync_on_gap = true", STEPS, &THREE);
    let counting = count_up(&tree.top);
    counting.go_on(50);
    let master = tree.settled_master("region");
    let slave = tree.with_role("region", "slave");
    let config = tree.node(&slave).bridge.config();
    let text = fs::read_to_string(&config).expect("read");
    let peers = text.find("[peers]").expect("peers");
    let relay = text.find("[relay]").expect("relay");
    let alone = format!("{}{}", &text[..peers], &text[relay..]);
    fs::write(&config, alone).expect("write");
    tree.node(&slave).bridge.stop();
    counting.go_on(50);
    tree.node(&slave).bridge.restart().expect("start");
    wait_until("it says what is wrong", || {
        let said = reason(&mut tree, &slave);
        said.starts_with("stalled") && said.contains("is not in [peers] here")
    });
    // Also with the slot free for a moment.
    tree.node(&master).bridge.kill9();
    let next = tree.successor("region", &master);
    assert_ne!(next, slave, "the one that knows nobody does not lead");
    tree.rows_arrive(&next, Duration::from_secs(5));
    tree.node(&master).bridge.restart().expect("start");
    fs::write(&config, text).expect("write");
    tree.node(&slave).bridge.stop();
    tree.node(&slave).bridge.restart().expect("start");
    tree.wait_streaming();
    assert_eq!(tree.top.value(COPIES), "0", "nobody has copied anew");
    tree.all_is_well(counting);
}

// A server whose parent was forgotten in its file is a top of its own. It used to be the master
// that goes first, and the healthy one threw its data away to copy from it.
#[test]
fn a_server_without_its_parent_is_no_master_of_the_others() {
    let mut tree = Tree::grow(STEPS, &TWO);
    let counting = count_up(&tree.top);
    counting.go_on(20);
    let master = tree.settled_master("region");
    let slave = tree.with_role("region", "slave");
    let config = tree.node(&slave).bridge.config();
    let text = fs::read_to_string(&config).expect("read");
    let parent = text.find("[parent]").expect("parent");
    let peers = text.find("[peers]").expect("peers");
    fs::write(&config, format!("{}{}", &text[..parent], &text[peers..])).expect("write");
    let node = tree.node(&slave);
    node.bridge.stop();
    node.server.sql("ALTER SYSTEM SET wal_level = logical");
    node.server.restart().expect("restart");
    for command in ["check", "run"] {
        let output = node.bridge.run(command).expect("run");
        let said = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{command}: {said}");
        assert!(
            said.contains("receives changes from above"),
            "{command}: {said}"
        );
    }
    // One that never received anything cannot know.
    node.server
        .sql("DROP EXTENSION terrace CASCADE; CREATE EXTENSION terrace");
    fs::remove_dir_all(node.bridge.directory().join("data")).expect("remove the queue");
    node.bridge.restart().expect("start");
    wait_until("the master says what is wrong", || {
        let said = reason(&mut tree, &master);
        said.contains(&format!("{slave} holds another history"))
    });
    counting.go_on(100);
    // Nor when the one that is right begins anew.
    tree.node(&master).bridge.kill9();
    tree.node(&master).bridge.restart().expect("start");
    tree.rows_arrive(&master, Duration::from_secs(10));
    assert_eq!(tree.with_role("region", "master"), master);
    let node = tree.node(&slave);
    node.bridge.stop();
    node.server
        .sql("SELECT pg_drop_replication_slot('terrace_region')");
    node.server
        .sql("DROP EXTENSION terrace CASCADE; DROP TABLE steps, trail");
    node.server.sql("CREATE EXTENSION terrace");
    fs::remove_dir_all(node.bridge.directory().join("data")).expect("remove the queue");
    fs::write(&config, text).expect("write");
    node.bridge.restart().expect("start");
    tree.wait_streaming();
    assert_eq!(tree.top.value(COPIES), "0", "nobody has copied anew");
    tree.all_is_well(counting);
}

// Both servers are told to copy anew, as the message has it; they used to copy from each
// other for ever.
#[test]
fn a_gap_of_a_whole_domain_ends_with_resync_on_one_after_the_other() {
    let mut tree = Tree::grow(STEPS, &TWO);
    let counting = count_up(&tree.top);
    lose_the_middle(&mut tree, &counting);
    for name in ["region-1", "region-2"] {
        wait_until("the gap is told", || {
            reason(&mut tree, name).starts_with("gap")
        });
    }
    // Those who follow nobody are heard of at the top all the same.
    let told = "SELECT count(*) FROM terrace.lag WHERE state = 'gap' AND reason LIKE '%resync%'";
    wait_until("the top knows", || tree.top.value(told) == "2");
    for name in ["region-1", "region-2"] {
        // The second one may have found a master by itself, and be copying from it.
        let output = tree.node(name).bridge.run("resync").expect("resync");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() || said.contains("no data yet"),
            "{said}"
        );
        wait_until("it has copied", || {
            reason(&mut tree, name).starts_with("streaming")
        });
    }
    tree.wait_streaming();
    tree.all_is_well(counting);
}

// PostgreSQL gives a slot up that would fill its disk: that is no failure of the network.
#[test]
fn a_slot_that_was_given_up_is_a_gap_that_is_mended_when_allowed() {
    let mut tree = Tree::grow_with("[failover]\nresync_on_gap = true", STEPS, &TWO);
    tree.top
        .sql("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'");
    tree.top.sql("SELECT pg_reload_conf()");
    let counting = count_up(&tree.top);
    counting.go_on(20);
    for node in &mut tree.nodes {
        node.bridge.stop();
    }
    let lost = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'terrace_region'";
    wait_until("the slot is given up", || {
        tree.top.sql("SELECT pg_switch_wal(); CHECKPOINT");
        tree.top.value(lost) == "lost"
    });
    tree.start_bridges().expect("start the bridges");
    let told = "SELECT count(*) > 0 FROM terrace.events WHERE kind = 'resync' AND reason LIKE \
                '%terrace_region%'";
    wait_until("it copies anew by itself", || tree.top.value(told) == "t");
    tree.wait_streaming();
    tree.all_is_well(counting);
}

// What a master's queue keeps for a slave that has become master itself used to be kept
// for ever.
#[test]
fn nothing_is_kept_for_a_server_that_needs_nothing() {
    let mut tree = Tree::grow_with("[queue]\nretain_min = \"1MiB\"", WIDE, &TWO);
    let old = tree.settled_master("region");
    // The other one may not have told yet that it is fit.
    wait_until("another server is made master", || {
        let bridge = &tree.node(&old).bridge;
        let output = bridge.command("switchover", &["--domain", "region"]);
        output.expect("run switchover").status.success()
    });
    tree.successor("region", &old);
    fill_wide(&tree.top, 0..10);
    let server = &tree.node(&old).server;
    wait_until("the rows are there", || {
        server.value("SELECT count(*) FROM wide") == "120"
    });
    let bridge = &tree.node(&old).bridge;
    wait_until("what all have is forgotten", || {
        bridge.queue_bytes() < 40 << 20
    });
    assert_eq!(
        tree.top.value(COPIES),
        "0",
        "and nobody is said to have lost his place"
    );
}

// Two bridges of one name used to throw each other out a hundred times a second.
#[test]
fn a_second_server_of_a_name_is_refused_and_the_first_goes_on() {
    let mut tree = Tree::grow(STEPS, &TWO);
    let counting = count_up(&tree.top);
    counting.go_on(20);
    let master = tree.settled_master("region");
    let slave = tree.with_role("region", "slave");
    let server = Server::start(&tree.scratch, "twin", &ServerOptions::default()).expect("boot");
    let options = BridgeOptions {
        node: slave.clone(),
        domain: "region".into(),
        database: server.conninfo(),
        parents: vec![tree.top.conninfo()],
        peers: vec![(master.clone(), tree.node(&master).bridge.conninfo())],
        ..Default::default()
    };
    // In a directory of its own, as on another machine.
    let elsewhere = terrace_tests::Scratch::new("terrace-").expect("scratch");
    let twin = Bridge::prepare(&elsewhere, &options, free_port());
    let mut twin = twin.expect("prepare");
    twin.restart().expect("start");
    wait_until("the twin is told", || {
        let said = server.value("SELECT coalesce(max(reason), '') FROM terrace.lag");
        said.contains("give one of them another name") || said.contains("is used by another")
    });
    let links = || {
        let told = "SELECT count(*) FROM terrace.events WHERE kind = 'slave'";
        tree.top.value(told).parse::<i64>().expect("count")
    };
    let before = links();
    tree.rows_arrive(&slave, Duration::from_secs(5));
    std::thread::sleep(Duration::from_secs(2));
    assert!(links() <= before + 1, "the first one is left alone");
    drop(twin);
    tree.all_is_well(counting);
}

/// Turns a bit in the middle of a file.
fn damage(path: &Path) {
    let mut bytes = fs::read(path).expect("read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(path, bytes).expect("write");
}

#[test]
fn a_damaged_queue_is_fetched_anew_from_a_sibling() {
    let mut tree = Tree::grow(STEPS, &THREE);
    let counting = count_up(&tree.top);
    counting.go_on(1500);
    let slave = tree.with_role("region", "slave");
    // Received, durable, and not replayed yet.
    tree.node(&slave).server.kill9();
    counting.go_on(1500);
    tree.node(&slave).bridge.stop();
    let all = tree.node(&slave).bridge.segments();
    damage(all.last().expect("a segment"));
    tree.node(&slave)
        .server
        .restart()
        .expect("start the server");
    tree.node(&slave)
        .bridge
        .restart()
        .expect("start the bridge");
    let told = format!(
        "SELECT count(*) > 0 FROM terrace.events WHERE kind = 'damaged' AND node = '{slave}'"
    );
    wait_until("the damage is told", || tree.top.value(&told) == "t");
    tree.wait_streaming();
    assert_eq!(tree.top.value(COPIES), "0", "without a copy");
    assert_eq!(tree.node(&slave).bridge.metric("damages_total"), Some(1));
    tree.all_is_well(counting);
}

// What its slot has let go is nowhere else: who needs it copies anew, who does not goes on.
#[test]
fn a_damaged_queue_beside_the_top_is_begun_anew() {
    let scratch = Scratch::new("terrace-").expect("scratch");
    let top = Server::top(&scratch).expect("boot the top");
    let servers = ["region-1", "site-1"]
        .map(|name| Server::start(&scratch, name, &ServerOptions::default()).expect("boot"));
    top.sql("ALTER ROLE terrace SUPERUSER");
    top.sql(STEPS);
    top.sql("SELECT terrace.create_domain('region'), terrace.create_domain('site')");
    let mut beside = Bridge::start(&scratch, &options(&top, "top", &[])).expect("start");
    let parent = [beside.conninfo()];
    let [mut region, site] =
        [("region", &servers[0]), ("site", &servers[1])].map(|(domain, server)| {
            let options = BridgeOptions {
                extra: "[failover]\nresync_on_gap = true".into(),
                ..options(server, domain, &parent)
            };
            Bridge::start(&scratch, &options).expect("start")
        });
    let equal = |server: &Server| {
        let wanted = top.checksum("trail").expect("checksum");
        wait_until("it has all", || {
            server.checksum("trail").is_ok_and(|sum| sum == wanted)
        });
    };
    let counting = count_up(&top);
    counting.go_on(1500);
    servers.iter().for_each(|server| {
        wait_until("it has begun", || {
            server
                .checksum("trail")
                .is_ok_and(|sum| !sum.starts_with("0 "))
        });
    });
    region.stop();
    counting.go_on(1500);
    counting.stop();
    equal(&servers[1]);
    let end = top.value("SELECT pg_current_wal_lsn()");
    let held = format!("SELECT bool_and(confirmed_flush_lsn >= '{end}') FROM pg_replication_slots");
    wait_until("the slot has let it go", || top.value(&held) == "t");
    beside.stop();
    damage(beside.segments().last().expect("a segment"));
    beside.restart().expect("start");
    region.restart().expect("start");
    equal(&servers[0]);
    let told = "SELECT count(*) FROM terrace.events WHERE kind = 'damaged' AND node = 'top'";
    wait_until("the damage is told", || top.value(told) == "1");
    top.sql("INSERT INTO trail SELECT 1000000");
    servers.iter().for_each(equal);
    let copies = |bridge: &Bridge| bridge.logged().matches("initial copy is complete").count();
    assert_eq!((copies(&region), copies(&site)), (2, 1));
}

// Its row is looked for where it was left: rows were committed without it, and came twice.
#[test]
fn progress_that_is_rewritten_meanwhile_takes_nothing_twice() {
    const ONE: [(&str, Option<&str>, usize); 1] = [("region", None, 1)];
    let schema = "CREATE TABLE kept (id int PRIMARY KEY); CREATE TABLE heard (line int);
         SELECT terrace.add_table('kept'), terrace.add_table('heard')";
    let mut tree = Tree::grow(schema, &ONE);
    tree.top.sql("INSERT INTO kept VALUES (1)");
    tree.wait_for_equal(&["kept", "heard"]);
    tree.nodes[0].bridge.stop();
    // The row that is missing has all of it tried with care, and that takes its time.
    tree.nodes[0].server.sql(
        "SET session_replication_role = replica; DELETE FROM kept; RESET session_replication_role;
         CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
           $$BEGIN PERFORM pg_sleep(2); RETURN NEW; END$$;
         CREATE TRIGGER slow BEFORE INSERT ON heard FOR EACH ROW EXECUTE FUNCTION slow();
         ALTER TABLE heard ENABLE ALWAYS TRIGGER slow;",
    );
    tree.top.sql("INSERT INTO heard VALUES (1)");
    tree.top.sql("UPDATE kept SET id = 2");
    tree.top.sql("INSERT INTO heard VALUES (2)");
    let end = tree.top.value("SELECT pg_current_wal_lsn()");
    let holder = tree.nodes[0].server.hold_apply();
    tree.start_bridges().expect("start the bridge");
    let node = &tree.nodes[0];
    let there = format!("SELECT flush_lsn >= '{end}' FROM terrace.lag");
    wait_until("all of it is there", || node.server.value(&there) == "t");
    let applies = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
         WHERE application_name LIKE 'terrace apply%'";
    node.server.value(applies);
    drop(holder);
    let second =
        "SELECT (SELECT count(*) FROM heard) = 1 AND (SELECT id FROM kept) = 2 AND EXISTS (
         SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep')";
    wait_until("it is within the third, with care", || {
        node.server.value(second) == "t"
    });
    node.server.sql("VACUUM FULL terrace.progress");
    tree.wait_for_equal(&["kept", "heard"]);
    tree.wait_streaming();
    let log = tree.nodes[0].bridge.logged();
    assert!(log.contains("row of terrace.progress"), "{log}");
}

// It read nothing any more, and so did not hear that the server above had gone on.
#[test]
fn a_full_queue_that_waits_for_the_server_above_goes_on_with_it() {
    const CHAIN: [(&str, Option<&str>, usize); 2] =
        [("region", None, 1), ("branch", Some("region"), 1)];
    let settings = "[queue]\nretain_min = \"1MiB\"\nretain_max = \"32MiB\"";
    let mut tree = Tree::grow_with(settings, WIDE, &CHAIN);
    let lock = tree.node("region-1").server.lock("wide");
    fill_wide(&tree.top, 0..8);
    wait_until("both have more than that", || {
        let mut all = tree.nodes.iter();
        all.all(|node| node.bridge.queue_bytes() > 32 << 20)
    });
    // It is looked at each second.
    std::thread::sleep(Duration::from_secs(3));
    drop(lock);
    tree.wait_for_equal(&["wide"]);

    // Nor did one that had just been started hear anything.
    let lock = tree.node("branch-1").server.lock("wide");
    fill_wide(&tree.top, 8..16);
    wait_until("it says that it is full", || {
        reason(&mut tree, "branch-1").contains("retain_max")
    });
    let bridge = &mut tree.node("branch-1").bridge;
    bridge.stop();
    bridge.restart().expect("start the bridge");
    drop(lock);
    tree.wait_for_equal(&["wide"]);
}

// A database that takes nothing used to fill the disk under the queue.
#[test]
fn a_queue_that_its_database_does_not_empty_stops_at_its_limit_and_is_not_switched_to() {
    let settings = "[queue]\nretain_min = \"1MiB\"\nretain_max = \"32MiB\"";
    let mut tree = Tree::grow_with(settings, WIDE, &TWO);
    let master = tree.settled_master("region");
    let slave = tree.with_role("region", "slave");
    let lock = tree.node(&slave).server.lock("wide");
    fill_wide(&tree.top, 0..8);
    wait_until("it says that it is full", || {
        reason(&mut tree, &slave).contains("retain_max")
    });
    let before = tree.node(&slave).bridge.queue_bytes();
    fill_wide(&tree.top, 8..18);
    let server = &tree.node(&master).server;
    wait_until("the master has it all", || {
        server.value("SELECT count(*) FROM wide") == "216"
    });
    let to = ["--domain", "region", "--to", &slave];
    let output = tree.node(&master).bridge.command("switchover", &to);
    let said = String::from_utf8(output.expect("run switchover").stderr).expect("UTF-8");
    let refused = said.contains("bytes behind") || said.contains("is not in order");
    assert!(refused, "{said}");
    // Longer than a session lives that does not answer.
    std::thread::sleep(Duration::from_secs(12));
    let after = tree.node(&slave).bridge.queue_bytes();
    assert!(after < before + (64 << 20), "{before} bytes, then {after}");
    drop(lock);
    tree.wait_for_equal(&["wide"]);
    tree.wait_streaming();
}
