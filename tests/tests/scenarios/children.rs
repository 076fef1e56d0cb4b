//! Servers below a domain: which server of it they follow, and what is kept there for them (rule H).

use std::time::Duration;

use terrace_tests::load::{ACCOUNTS, Observer, STEPS, WIDE, count_up, fill_wide, transfers};
use terrace_tests::proxy::Proxy;
use terrace_tests::{Tree, wait_until};

use crate::rules::{GONE, follows, have_every_row};

fn strs(names: &[String]) -> Vec<&str> {
    names.iter().map(String::as_str).collect()
}

// A downstream that is away for good may fill no disk.
#[test]
fn a_child_that_is_away_too_long_loses_its_place_aloud_and_copies_anew() {
    let settings = "[queue]\nretain_min = \"1MiB\"\nretain_max = \"48MiB\"\n\
                    [failover]\nresync_on_gap = true";
    let domains = [("region", None, 1), ("branch", Some("region"), 1)];
    let mut tree = Tree::grow_with(settings, WIDE, &domains);
    tree.node("branch-1").bridge.stop();
    fill_wide(&tree.top, 0..12);
    let lost = "SELECT count(*) FROM terrace.events WHERE kind = 'gap' AND node = 'region-1' \
                AND reason LIKE '%terrace_branch%retain_max%'";
    wait_until("the top knows whose place is lost", || {
        tree.top.value(lost) == "1"
    });
    let bridge = &tree.node("region-1").bridge;
    wait_until("the disk has room again", || {
        bridge.queue_bytes() < 80 << 20
    });
    tree.node("branch-1")
        .bridge
        .restart()
        .expect("start the bridge");
    let server = &tree.node("branch-1").server;
    wait_until("the child has it all", || {
        server.value("SELECT count(*) FROM wide") == "144"
    });
    let told = "SELECT count(*) FROM terrace.events WHERE kind = 'resync'";
    assert_ne!(server.value(told), "0", "by a copy");
}

// Rule H: a child is known to all servers of the domain above, and each keeps what it
// needs, also the one that it never spoke to.
#[test]
fn a_child_that_was_away_finds_its_place_at_another_server_of_its_parent() {
    let domains = [("region", None, 2), ("branch", Some("region"), 1)];
    let mut tree = Tree::grow_with("[queue]\nretain_min = \"1MiB\"", WIDE, &domains);
    tree.node("branch-1").bridge.stop();
    // Five segments of the queue and more.
    fill_wide(&tree.top, 0..8);
    let rows = "SELECT count(*) FROM wide";
    for name in ["region-1", "region-2"] {
        let server = &tree.node(name).server;
        wait_until("the rows are there", || server.value(rows) == "96");
    }
    // Time for each to forget what it may.
    std::thread::sleep(Duration::from_secs(3));
    let master = tree.with_role("region", "master");
    let node = tree.node(&master);
    node.bridge.kill9();
    node.server.kill9();
    tree.node("branch-1")
        .bridge
        .restart()
        .expect("start the bridge");
    let server = &tree.node("branch-1").server;
    wait_until("the child has the rows", || server.value(rows) == "96");
    let told = "SELECT count(*) FROM terrace.events WHERE kind IN ('gap', 'resync')";
    assert_eq!(server.value(told), "0", "and not by a copy");
}

// Rule H: what a child shows never goes back, also when all that is left above is a server
// that is behind it.
#[test]
fn a_child_goes_to_a_server_that_is_behind_it() {
    let tree = Tree::plant(&format!("{ACCOUNTS}{STEPS}")).expect("boot the top");
    let domains = [("region", None, 3), ("branch", Some("region"), 1)];
    let mut tree = tree.with_links().grow_on(&domains);
    let observer = Observer::start(&tree.node("branch-1").server);
    let (moving, counting) = (transfers(&tree.top), count_up(&tree.top));
    counting.go_on(50);
    tree.settled_master("region");
    let stale = tree.with_role("region", "slave");
    let ahead = tree.others("region", &stale);
    tree.between(
        &[&stale],
        &[&["top"], &strs(&ahead)[..]].concat(),
        Proxy::cut,
    );
    let count = "SELECT count(*) FROM steps";
    let had: i64 = tree.node(&stale).server.value(count).parse().expect("n");
    let branch = &tree.nodes[3].server;
    wait_until("the branch is far ahead", || {
        branch.value(count).parse::<i64>().expect("n") > had + 500
    });
    for name in &ahead {
        tree.node(name).bridge.kill9();
    }
    let branch = &tree.nodes[3].server;
    wait_until("it goes to the one that is left", || {
        follows(&tree, "branch-1", &stale)
    });
    let place = "SELECT lsn FROM terrace.progress";
    let shown = branch.value(place);
    counting.go_on(500);
    assert_eq!(branch.value(place), shown, "nothing new is to be had there");
    // It looks for the others now and then.
    wait_until("it is there still", || follows(&tree, "branch-1", &stale));
    let behind = tree.node(&stale).server.value(count);
    assert!(behind.parse::<i64>().expect("n") < had + 400, "{behind}");
    // It sees the top again, whose slot is beyond it: it does not lead with a hole.
    tree.heal();
    counting.go_on(500);
    tree.start_bridges().expect("start the bridges");
    tree.settled_master("region");
    tree.wait_streaming();
    moving.stop();
    tree.all_is_well(counting);
    tree.wait_for_equal(&["account"]);
    observer.stop();
    let copies = "SELECT count(*) FROM terrace.events WHERE kind = 'resync'";
    assert_eq!(tree.top.value(copies), "0");
}

// The cursor at one parent server says nothing of that at another: two may lead, which costs
// bandwidth and nothing else.
#[test]
fn two_masters_of_a_child_follow_two_servers_above() {
    let mut tree = Tree::plant(&format!("{STEPS}{WIDE}"))
        .expect("boot the top")
        .with_links();
    tree.settings = "[queue]\nretain_min = \"1MiB\"".into();
    let tree = tree.grow_on(&[("region", None, 2), ("branch", Some("region"), 3)]);
    let counting = count_up(&tree.top);
    counting.go_on(50);
    let one = tree.settled_master("branch");
    let rest = tree.others("branch", &one);
    let regions = ["region-1", "region-2"];
    let first = regions.iter().find(|name| follows(&tree, &one, name));
    let first = *first.expect("it follows a server");
    let second = regions
        .into_iter()
        .find(|name| *name != first)
        .expect("another");
    tree.between(&strs(&rest), &[&one, first], Proxy::cut);
    wait_until("another leads as well, below the other server", || {
        rest.iter().any(|name| follows(&tree, name, second))
    });
    fill_wide(&tree.top, 0..2);
    tree.wait_for_equal(&["wide"]);
    counting.go_on(100);
    assert!(follows(&tree, &one, first), "and the first one still does");
    tree.heal();
    tree.settled_master("branch");
    // The place at the server that nobody follows any more holds nothing up.
    fill_wide(&tree.top, 2..7);
    tree.wait_for_equal(&["wide"]);
    for node in &tree.nodes {
        wait_until("what all have is forgotten", || {
            node.bridge.queue_bytes() < 40 << 20
        });
    }
    tree.all_is_well(counting);
    assert_eq!(tree.top.value(GONE), "0");
}

// Rule C where the parent is a bridge: a master that comes again acknowledges nothing by that.
#[test]
fn a_master_that_comes_again_acknowledges_nothing() {
    let domains = [("region", None, 1), ("branch", Some("region"), 3)];
    let mut tree = Tree::grow_with("[failover]\nack_timeout = \"300s\"", STEPS, &domains);
    let counting = count_up(&tree.top);
    counting.go_on(50);
    let master = tree.settled_master("branch");
    let slaves = tree.others("branch", &master);
    for slave in &slaves {
        tree.node(slave).bridge.pause();
    }
    let place = |tree: &Tree| {
        let sql = "SELECT report -> 'cursors' ->> 'terrace_branch' FROM terrace.status WHERE node = 'region-1'";
        tree.top.value(sql)
    };
    std::thread::sleep(Duration::from_millis(2500));
    let before = place(&tree);
    counting.go_on(300);
    tree.rows_arrive(&master, Duration::from_secs(5));
    tree.node(&master).bridge.kill9();
    tree.node(&master)
        .bridge
        .restart()
        .expect("start the master");
    tree.rows_arrive(&master, Duration::from_secs(20));
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(place(&tree), before, "the slaves do not have it");

    // It is gone for good with all that it holds: nothing is missed.
    tree.node(&master).lose();
    for slave in &slaves {
        tree.node(slave).bridge.resume();
    }
    let next = tree.successor("branch", &master);
    tree.rows_arrive(&next, Duration::from_secs(10));
    counting.stop();
    have_every_row(&mut tree, &slaves);
    assert_eq!(tree.top.value(GONE), "0");
}

// A link to a server of the parent domain was waited for as long as a connection may take.
#[test]
fn a_parent_that_freezes_as_it_is_asked_is_left_for_another() {
    let tree = Tree::plant(STEPS).expect("boot the top").with_links();
    let mut tree = tree.grow_on(&[("region", None, 3), ("branch", Some("region"), 2)]);
    let counting = count_up(&tree.top);
    counting.go_on(50);
    let master = tree.settled_master("branch");
    let above = ["region-1", "region-2", "region-3"];
    let parent = above.into_iter().find(|name| follows(&tree, &master, name));
    let parent = parent.expect("the branch follows a server of the region");
    if tree.settled_master("region") == parent {
        let switched = tree
            .node(parent)
            .bridge
            .command("switchover", &["--domain", "region"]);
        assert!(switched.expect("run switchover").status.success());
        tree.successor("region", parent);
        tree.settled_master("region");
    }
    tree.node(parent).bridge.pause();
    tree.node(&master).bridge.kill9();
    let next = tree.others("branch", &master).remove(0);
    tree.rows_arrive(&next, Duration::from_secs(8));
    tree.node(parent).bridge.resume();
    tree.node(&master).bridge.restart().expect("start it");
    tree.wait_streaming();
    // Who still leads and only has another upstream has become nothing new.
    let promoted =
        "SELECT count(*) FROM terrace.events WHERE kind = 'master' AND domain = 'branch'";
    let promotions: u32 = tree.top.value(promoted).parse().expect("count");
    assert!(promotions <= 3, "{promotions}");
    let why = format!(
        "SELECT count(*) FROM terrace.events WHERE kind = 'master' AND node = '{next}' \
                       AND reason LIKE '%, as %{master} %'"
    );
    wait_until("it is told why", || tree.top.value(&why) == "1");
    tree.all_is_well(counting);
}

// What one server forgot it was told of by the others.
#[test]
fn nothing_is_kept_for_a_domain_that_is_dropped() {
    let domains = [("region", None, 2), ("branch", Some("region"), 1)];
    let mut tree = Tree::grow(STEPS, &domains);
    let places = "SELECT count(*) FROM terrace.status WHERE domain = 'region' AND report -> 'cursors' ? 'terrace_branch'";
    wait_until("both keep a place", || tree.top.value(places) == "2");
    tree.node("branch-1").bridge.stop();
    tree.top.sql("SELECT terrace.drop_domain('branch')");
    wait_until("the places are gone", || tree.top.value(places) == "0");
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(tree.top.value(places), "0");
}
