//! Servers, bridges, disks and links die; the tree goes on without anybody's help,
//! loses nothing, and shows what happened.

use std::path::Path;
use std::time::{Duration, Instant};

use terrace_tests::load::{Background, GAPLESS, STEPS, count_up};
use terrace_tests::proxy::Proxy;
use terrace_tests::{Disk, Tree, wait_until};

const THREE: [(&str, Option<&str>, usize); 2] =
    [("region", None, 3), ("branch", Some("region"), 1)];
const TWO_LEVELS: [(&str, Option<&str>, usize); 2] =
    [("region", None, 3), ("branch", Some("region"), 3)];

#[test]
fn three_masters_in_a_row_die_and_come_back_as_slaves() {
    let mut tree = Tree::grow(STEPS, &THREE);
    let counting = count_up(&tree.top);
    let mut master = tree.with_role("region", "master");
    for round in 0..3 {
        counting.go_on(20);
        let started = Instant::now();
        tree.node(&master).bridge.kill9();
        tree.rows_arrive("branch-1", Duration::from_secs(5));
        let next = tree.successor("region", &master);
        println!(
            "round {round}: {next} follows {master} after {:?}",
            started.elapsed()
        );
        tree.node(&master)
            .bridge
            .restart()
            .expect("start the bridge");
        let sql = format!(
            "SELECT count(*) FROM terrace.lag WHERE node = '{master}' AND role = 'slave' \
             AND state = 'streaming'"
        );
        wait_until("the old master is a slave", || tree.top.value(&sql) == "1");
        master = next;
    }
    let told =
        "SELECT count(*) >= 3 FROM terrace.events WHERE kind = 'master' AND domain = 'region'";
    wait_until("the events tell of it", || tree.top.value(told) == "t");
    // No copy was made again.
    assert_eq!(
        tree.top
            .value("SELECT count(*) FROM terrace.events WHERE kind = 'resync'"),
        "0"
    );
    tree.all_is_well(counting);
}

#[test]
fn a_master_whose_postgres_dies_hands_over() {
    let mut tree = Tree::grow(STEPS, &THREE);
    let counting = count_up(&tree.top);
    counting.go_on(50);
    let master = tree.with_role("region", "master");
    tree.node(&master).server.kill9();
    tree.rows_arrive("branch-1", Duration::from_secs(8));
    tree.successor("region", &master);
    tree.node(&master)
        .server
        .restart()
        .expect("start the server");
    tree.wait_streaming();
    // And both at once.
    let master = tree.with_role("region", "master");
    tree.node(&master).server.kill9();
    tree.node(&master).bridge.kill9();
    tree.rows_arrive("branch-1", Duration::from_secs(8));
    tree.node(&master)
        .server
        .restart()
        .expect("start the server");
    tree.start_bridges().expect("start the bridge");
    tree.wait_streaming();
    tree.all_is_well(counting);
}

/// A tree whose `region-1` is master and has its queue on the disk.
pub fn tree_on_a_disk(make: fn(&Path) -> Option<Disk>) -> Option<(Tree, Disk)> {
    let mut tree = Tree::grow(STEPS, &THREE);
    let bridge = &mut tree.node("region-1").bridge;
    bridge.stop();
    let disk = make(&bridge.directory().join("data"))?;
    bridge.restart().expect("start the bridge");
    tree.wait_streaming();
    // What the top knows of it may be of before the restart.
    let arguments = ["--domain", "region", "--to", "region-1"];
    wait_until("region-1 is made master", || {
        let node = tree.node("region-1");
        let output = node.bridge.command("switchover", &arguments);
        let said = String::from_utf8(output.expect("run switchover").stderr);
        said.is_ok_and(|said| said.contains("is the master already"))
    });
    wait_until("the top knows", || {
        tree.settled_master("region") == "region-1"
    });
    Some((tree, disk))
}

/// While the master's disk is sick another one leads, and the top knows why; then
/// the old one follows, without a copy.
fn another_leads_until(tree: &Tree, counting: Background, words: &str, mend: impl FnOnce()) {
    let started = Instant::now();
    tree.rows_arrive("branch-1", Duration::from_secs(10));
    println!("{words}: rows went on after {:?}", started.elapsed());
    let next = tree.successor("region", "region-1");
    let told = format!(
        "SELECT count(*) FROM terrace.lag WHERE node = 'region-1' AND state = 'stalled' \
         AND reason LIKE '%{words}%'"
    );
    // All but full, it takes a little now and then at first.
    let mut steady = 0;
    wait_until("the top knows of the disk", || {
        steady = if tree.top.value(&told) == "1" {
            steady + 1
        } else {
            0
        };
        steady > 60
    });
    // Nobody relies on it: not even who asks for it.
    let asked = tree.nodes.iter().find(|node| node.server.name == next);
    let asked = &asked.expect("the successor").bridge;
    let output = asked.command("switchover", &["--domain", "region", "--to", "region-1"]);
    let said = String::from_utf8(output.expect("run switchover").stderr).expect("UTF-8");
    assert!(said.contains("is not in order"), "{said}");
    counting.go_on(500);
    tree.rows_arrive("branch-1", Duration::from_secs(2));
    mend();
    tree.wait_streaming();
    assert_eq!(tree.with_role("region", "master"), next, "no way back");
    let copies = "SELECT count(*) FROM terrace.events WHERE kind = 'resync'";
    assert_eq!(tree.top.value(copies), "0");
    tree.all_is_well(counting);
}

#[test]
fn a_master_whose_disk_is_full_hands_over_and_comes_back() {
    let Some((tree, disk)) = tree_on_a_disk(Disk::small) else {
        return;
    };
    let counting = count_up(&tree.top);
    counting.go_on(50);
    disk.fill();
    another_leads_until(&tree, counting, "No space left on device", || {
        disk.make_room();
    });
}

#[test]
fn a_master_whose_disk_hangs_hands_over_and_comes_back() {
    let Some((tree, mut disk)) = tree_on_a_disk(Disk::freezable) else {
        return;
    };
    let counting = count_up(&tree.top);
    counting.go_on(50);
    disk.freeze();
    another_leads_until(&tree, counting, "has not answered for", || disk.thaw());
    let told = "SELECT count(*) > 0 FROM terrace.events \
                WHERE kind = 'handover' AND reason LIKE '%has not answered%'";
    assert_eq!(tree.top.value(told), "t", "the events tell why");
}

#[test]
fn a_paused_master_is_deposed_and_steps_back() {
    let mut tree = Tree::grow(STEPS, &THREE);
    let counting = count_up(&tree.top);
    counting.go_on(50);
    let master = tree.with_role("region", "master");
    tree.node(&master).bridge.pause();
    let next = tree.successor("region", &master);
    tree.rows_arrive("branch-1", Duration::from_secs(10));
    tree.node(&master).bridge.resume();
    let sql = format!(
        "SELECT count(*) FROM terrace.lag WHERE node = '{master}' AND role = 'slave' \
         AND state = 'streaming'"
    );
    wait_until("it has stepped back", || tree.top.value(&sql) == "1");
    assert_eq!(
        tree.with_role("region", "master"),
        next,
        "and the other stays master"
    );
    let told = "SELECT count(*) > 0 FROM terrace.events WHERE kind = 'depose'";
    wait_until("the events tell who deposed it", || {
        tree.top.value(told) == "t"
    });
    tree.all_is_well(counting);
}

#[test]
fn a_disk_that_is_lost_after_an_acknowledgement_loses_nothing() {
    let mut tree = Tree::grow(STEPS, &THREE);
    let counting = count_up(&tree.top);
    counting.go_on(100);
    let master = tree.with_role("region", "master");
    // Just after what was written last has been acknowledged, while more flows.
    let written = tree.top.value("SELECT pg_current_wal_lsn()");
    let acknowledged = format!(
        "SELECT confirmed_flush_lsn >= '{written}' FROM pg_replication_slots WHERE slot_name = 'terrace_region'"
    );
    wait_until("it is acknowledged", || {
        tree.top.value(&acknowledged) == "t"
    });
    // Queue and database.
    tree.node(&master).lose();
    tree.successor("region", &master);
    tree.rows_arrive("branch-1", Duration::from_secs(8));
    // A new server takes the old one's name.
    let node = tree.node(&master);
    node.server.replace().expect("start a new server");
    node.bridge.restart().expect("start the bridge");
    tree.wait_streaming();
    tree.all_is_well(counting);
}

#[test]
fn masters_of_both_levels_die_at_once() {
    let mut tree = Tree::grow(STEPS, &TWO_LEVELS);
    let counting = count_up(&tree.top);
    counting.go_on(50);
    let masters = ["region", "branch"].map(|domain| tree.with_role(domain, "master"));
    for master in &masters {
        tree.node(master).bridge.kill9();
    }
    for (domain, master) in ["region", "branch"].iter().zip(&masters) {
        tree.successor(domain, master);
    }
    for master in &masters {
        tree.node(master)
            .bridge
            .restart()
            .expect("start the bridge");
    }
    tree.wait_streaming();

    // All bridges of a domain, in any order.
    for name in ["region-3", "region-1", "region-2"] {
        tree.node(name).bridge.kill9();
    }
    counting.go_on(20);
    for name in ["region-2", "region-3", "region-1"] {
        tree.node(name).bridge.restart().expect("start the bridge");
        counting.go_on(5);
    }
    tree.wait_streaming();
    tree.all_is_well(counting);
}

/// The slot and what it has confirmed are the parent's: it may forget the last of it.
#[test]
fn the_parents_position_goes_back_and_nothing_comes_twice() {
    let mut tree = Tree::grow(STEPS, &THREE);
    let counting = count_up(&tree.top);
    let confirmed =
        "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = 'terrace_region'";
    let mut went_back = 0;
    for _ in 0..3 {
        counting.go_on(50);
        // Nobody moves it on before it has been seen.
        tree.nodes.iter().for_each(|node| node.bridge.pause());
        let before = tree.top.value(confirmed);
        tree.top.kill9();
        tree.top.restart().expect("start the top");
        let is_lower = format!("SELECT ({confirmed}) < '{before}'");
        went_back += usize::from(tree.top.value(&is_lower) == "t");
        tree.nodes.iter().for_each(|node| node.bridge.resume());
    }
    assert!(went_back > 0, "it never went back");
    tree.wait_streaming();
    tree.all_is_well(counting);
}

#[test]
fn a_slave_that_lags_takes_the_slot_only_after_it_has_fetched_what_it_lacks() {
    let mut tree = Tree::grow(STEPS, &THREE);
    let counting = count_up(&tree.top);
    counting.go_on(20);
    let master = tree.with_role("region", "master");
    let slaves = tree.others("region", &master);
    // One slave is stopped, the two others acknowledge what it has not.
    tree.node(&slaves[0]).bridge.kill9();
    let end = tree.top.value("SELECT pg_current_wal_lsn()");
    let beyond = format!("SELECT confirmed_flush_lsn > '{end}' FROM pg_replication_slots");
    wait_until("more is acknowledged", || tree.top.value(&beyond) == "t");
    // Now only it and the one that is ahead remain, and it starts first.
    tree.node(&master).bridge.kill9();
    tree.node(&slaves[1]).bridge.kill9();
    // The last word of the dead master has been heard.
    tree.wait_slot_free("region");
    tree.node(&slaves[0])
        .bridge
        .restart()
        .expect("start the bridge");
    let behind = format!(
        "SELECT count(*) FROM terrace.lag WHERE node = '{}' AND role = 'master' AND state <> 'down'",
        slaves[0]
    );
    let slot =
        "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = 'terrace_region'";
    let confirmed = tree.top.value(slot);
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        assert_ne!(tree.top.value(&behind), "1", "it leads with a hole");
        std::thread::sleep(Duration::from_millis(100));
    }
    let moved = format!(
        "SELECT '{confirmed}' = confirmed_flush_lsn::text FROM pg_replication_slots \
                         WHERE slot_name = 'terrace_region'"
    );
    assert_eq!(tree.top.value(&moved), "t", "it has confirmed nothing");
    tree.node(&slaves[1])
        .bridge
        .restart()
        .expect("start the bridge");
    tree.node(&master)
        .bridge
        .restart()
        .expect("start the bridge");
    tree.wait_streaming();
    tree.all_is_well(counting);
}

/// An administrator's tool reads from our slot: what it took is to be had nowhere.
#[test]
fn another_client_on_the_slot_makes_a_gap_that_is_told_and_mended() {
    let mut tree = Tree::grow(STEPS, &[("region", None, 1)]);
    let counting = count_up(&tree.top);
    counting.go_on(20);
    tree.nodes[0].bridge.stop();
    counting.go_on(20);
    let take = "SELECT count(*) > 0 FROM pg_logical_slot_get_binary_changes('terrace_region', NULL, \
                NULL, 'proto_version', '1', 'publication_names', 'terrace')";
    assert_eq!(tree.top.value(take), "t");
    counting.go_on(20);
    tree.start_bridges().expect("start the bridge");
    let gap = "SELECT reason FROM terrace.lag WHERE state = 'gap'";
    let server = &tree.nodes[0].server;
    wait_until("the gap is told", || {
        server.value(gap).contains("no server of the domain has it")
    });
    // It stops where it was, whole, and does not go on with a hole.
    assert_eq!(server.value(GAPLESS), "t");
    tree.nodes[0].bridge.resync();
    tree.wait_streaming();
    tree.all_is_well(counting);
}

/// While all bridges of the domain are stopped its slot is moved on: what lies between is
/// to be had nowhere.
pub fn lose_the_middle(tree: &mut Tree, counting: &Background) {
    counting.go_on(20);
    for node in &mut tree.nodes {
        node.bridge.stop();
    }
    counting.go_on(20);
    tree.top
        .sql("SELECT pg_replication_slot_advance('terrace_region', pg_current_wal_lsn())");
    counting.go_on(20);
    tree.start_bridges().expect("start the bridges");
}

#[test]
fn a_gap_is_mended_by_itself_when_that_is_allowed() {
    let mut tree = Tree::grow_with(
        "[failover]\nresync_on_gap = true",
        STEPS,
        &[("region", None, 2)],
    );
    let counting = count_up(&tree.top);
    lose_the_middle(&mut tree, &counting);
    let told = "SELECT count(*) > 0 FROM terrace.events WHERE kind = 'resync'";
    wait_until("it copies anew by itself", || tree.top.value(told) == "t");
    tree.wait_streaming();
    tree.all_is_well(counting);
}

#[test]
fn switchover_loses_nothing_and_wrong_ones_change_nothing() {
    let mut tree = Tree::grow(STEPS, &THREE);
    let counting = count_up(&tree.top);
    counting.go_on(20);
    let master = tree.with_role("region", "master");
    let switchover = |tree: &mut Tree, arguments: &[&str]| {
        let output = tree
            .node("region-1")
            .bridge
            .command("switchover", arguments);
        let output = output.expect("run switchover");
        let said = [output.stdout, output.stderr].concat();
        (
            output.status.code(),
            String::from_utf8_lossy(&said).into_owned(),
        )
    };
    for (arguments, words) in [
        (
            ["--domain", "region", "--to", "nobody"],
            "is no server of domain \"region\"",
        ),
        (
            ["--domain", "region", "--to", &master],
            "is the master already",
        ),
        (
            ["--domain", "branch", "--to", "branch-1"],
            "is not that of this configuration",
        ),
    ] {
        let (code, said) = switchover(&mut tree, &arguments);
        assert!(
            code == Some(1) && said.contains(words),
            "{arguments:?}: {said}"
        );
    }
    for round in 0..4 {
        let mut tries = 0;
        let to = loop {
            let old = tree.with_role("region", "master");
            let to = ["region-1", "region-2", "region-3"]
                .into_iter()
                .find(|name| *name != old);
            let to = to.expect("another");
            let (code, said) = switchover(&mut tree, &["--domain", "region", "--to", to]);
            if code == Some(0) {
                assert!(
                    said.contains(&format!("{to} is master of domain region")),
                    "{said}"
                );
                break to;
            }
            // On a busy machine it may not answer in time; another one leads then, and says so.
            tries += 1;
            let other = said.contains("has become master in its place");
            assert!(other && tries < 3, "round {round}: {said}");
        };
        wait_until("the top sees it", || {
            tree.with_role("region", "master") == to
        });
        tree.rows_arrive("branch-1", Duration::from_secs(5));
        wait_until("the old one is a slave", || tree.is_streaming());
    }
    // Who leads keeps its data, so that a copy of it may replace those of all others at once.
    for name in ["region-1", "region-2", "region-3"] {
        let leads = tree.with_role("region", "master") == name;
        wait_until("it knows who leads", || {
            let output = tree.node(name).bridge.run("resync").expect("run resync");
            let said = String::from_utf8_lossy(&output.stderr);
            // A switchover is soon over, and as soon others are told.
            let not_yet = said.contains("no other server of the domain is master");
            assert!(
                not_yet || output.status.success() != leads,
                "{name}: {said}"
            );
            assert!(
                not_yet || !leads || said.contains("is the master"),
                "{said}"
            );
            !not_yet
        });
    }
    tree.rows_arrive("branch-1", Duration::from_secs(5));
    let copied = "SELECT count(*) FROM terrace.events WHERE kind = 'copied'";
    wait_until("both have copied", || tree.top.value(copied) == "6");
    tree.wait_streaming();
    // A server that is down is refused.
    let master = tree.with_role("region", "master");
    let other = ["region-2", "region-3"]
        .into_iter()
        .find(|name| *name != master)
        .expect("one");
    tree.node(other).bridge.kill9();
    wait_until("the others see that it is down", || {
        let (code, said) = switchover(&mut tree, &["--domain", "region", "--to", other]);
        assert_eq!(code, Some(1), "{said}");
        said.contains("does not answer")
    });
    tree.node(other).bridge.restart().expect("start the bridge");
    tree.wait_streaming();
    // Who was master says nothing of those that report elsewhere now.
    for node in &tree.nodes {
        wait_until("nobody is taken for down", || {
            let down = "SELECT count(*) FROM terrace.lag WHERE state = 'down'";
            node.server.value(down) == "0"
        });
    }
    tree.all_is_well(counting);
}

#[test]
fn a_master_cut_off_from_everybody_is_replaced_and_comes_back() {
    let tree = Tree::plant(STEPS).expect("boot the top").with_links();
    let tree = tree.grow_on(&THREE);
    let counting = count_up(&tree.top);
    counting.go_on(50);
    let names = ["region-1", "region-2", "region-3"];
    let all = ["region-1", "region-2", "region-3", "branch-1", "top"];

    // From all: silently.
    let master = tree.with_role("region", "master");
    let others: Vec<&str> = all.into_iter().filter(|name| *name != master).collect();
    tree.between(&[&master], &others, Proxy::cut);
    let next = tree.successor("region", &master);
    tree.rows_arrive("branch-1", Duration::from_secs(10));
    tree.heal();
    assert_eq!(
        tree.settled_master("region"),
        next,
        "the returned one is a slave"
    );

    // From its slaves only, in one direction: it does not hear them.
    let master = next;
    let slaves: Vec<&str> = names.into_iter().filter(|name| *name != master).collect();
    tree.between(&[&master], &slaves, Proxy::cut_answers);
    tree.successor("region", &master);
    tree.rows_arrive("branch-1", Duration::from_secs(10));
    tree.heal();

    // From the parent only.
    let master = tree.settled_master("region");
    tree.between(&[&master], &["top"], Proxy::cut);
    tree.successor("region", &master);
    tree.rows_arrive("branch-1", Duration::from_secs(10));
    tree.heal();

    // From the child: it goes to another server of the domain.
    let master = tree.settled_master("region");
    tree.between(&["branch-1"], &[&master], Proxy::cut);
    tree.rows_arrive("branch-1", Duration::from_secs(20));
    tree.heal();

    // A slow link is a slow link, and no reason for another master.
    let master = tree.settled_master("region");
    tree.links
        .values()
        .for_each(|link| link.delay(Duration::from_millis(200)));
    counting.go_on(300);
    tree.rows_arrive("branch-1", Duration::from_secs(10));
    assert_eq!(tree.with_role("region", "master"), master);
    tree.heal();
    tree.wait_streaming();
    tree.all_is_well(counting);
}

#[test]
fn wrong_neighbours_are_named() {
    let mut tree = Tree::grow(STEPS, &TWO_LEVELS);
    // A peer of another domain.
    let branch = tree.node("branch-1").bridge.conninfo();
    let config = tree.node("region-1").bridge.config();
    let text = std::fs::read_to_string(&config).expect("read");
    let region_2 = tree.node("region-2").bridge.conninfo();
    std::fs::write(&config, text.replace(&region_2, &branch)).expect("write");
    tree.node("region-1").bridge.stop();
    tree.start_bridges().expect("start the bridge");
    let reason = "SELECT coalesce(reason, '') FROM terrace.lag WHERE node = 'region-1'";
    wait_until("the wrong peer is named", || {
        tree.top
            .value(reason)
            .contains("belongs to domain \"branch\"")
    });
    std::fs::write(&config, text).expect("write");
    tree.node("region-1").bridge.stop();

    // A parent that is a descendant.
    let config = tree.node("region-2").bridge.config();
    let text = std::fs::read_to_string(&config).expect("read");
    let top = tree.top.conninfo();
    std::fs::write(&config, text.replace(&top, &branch)).expect("write");
    for name in ["region-2", "region-3"] {
        tree.node(name).bridge.stop();
    }
    tree.node("region-2")
        .bridge
        .restart()
        .expect("start the bridge");
    let server = tree.node("region-2").server.config();
    wait_until("the cycle is named", || {
        let row = server.connect(postgres::NoTls).ok().and_then(|mut client| {
            client
                .query_one(reason.replace("region-1", "region-2").as_str(), &[])
                .ok()
        });
        row.is_some_and(|row| {
            row.get::<_, String>(0)
                .contains("is itself below domain \"region\"")
        })
    });
}

// What hangs says nothing: the master stayed, and everything below waited for its database.
#[test]
fn a_master_whose_postgres_hangs_or_waits_for_a_lock_hands_over() {
    let mut tree = Tree::grow(STEPS, &THREE);
    let counting = count_up(&tree.top);
    counting.go_on(50);

    let frozen = tree.settled_master("region");
    tree.node(&frozen).server.freeze();
    let next = tree.successor("region", &frozen);
    tree.rows_arrive("branch-1", Duration::from_secs(30));
    tree.node(&frozen).server.thaw();
    assert_eq!(tree.settled_master("region"), next, "{frozen} is a slave");

    let lock = tree.node(&next).server.lock("steps");
    tree.successor("region", &next);
    tree.rows_arrive("branch-1", Duration::from_secs(30));
    let log = tree.node(&next).bridge.logged();
    assert!(log.contains("waits for a lock that session"), "{log}");
    drop(lock);
    tree.wait_streaming();
    tree.all_is_well(counting);
}
