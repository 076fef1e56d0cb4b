//! Real addresses and a real packet filter: packets get lost, links go one way or are
//! reset between any two servers, and the tree heals by itself.
//!
//! Needs root, `ip` and `nft`; says so and does nothing where one of them is missing.

use std::time::{Duration, Instant};

use terrace_tests::load::{Background, STEPS, count_up};
use terrace_tests::netns::{Fate, Network};
use terrace_tests::{Tree, wait_until};

const DOMAINS: [(&str, Option<&str>, usize); 2] =
    [("region", None, 3), ("branch", Some("region"), 1)];
const REGION: [&str; 3] = ["region-1", "region-2", "region-3"];
const ALL: [&str; 5] = ["top", "region-1", "region-2", "region-3", "branch-1"];
/// `takeover_after` and then some, on a small machine.
const SOON: Duration = Duration::from_secs(12);
/// In a network that is whole again.
const CALM: Duration = Duration::from_secs(25);

/// A tree with an address for each server; `None`, with a word why, where that cannot be.
fn grow() -> Option<Tree> {
    if let Some(why) = Network::missing() {
        terrace_tests::skipped(why);
        return None;
    }
    let network = Network::new().expect("make a network");
    let tree = Tree::plant_in(STEPS, Some(network)).expect("boot the top");
    Some(tree.grow_on(&DOMAINS))
}

fn network(tree: &Tree) -> &Network {
    tree.network.as_ref().expect("a network")
}

fn others<'a>(names: &[&'a str], name: &str) -> Vec<&'a str> {
    names.iter().copied().filter(|one| *one != name).collect()
}

/// Times that a server of region became master, as the top has been told.
fn promotions(tree: &Tree) -> i64 {
    let sql = "SELECT count(*) FROM terrace.events WHERE kind = 'master' AND domain = 'region'";
    tree.top.value(sql).parse().expect("a number")
}

/// What every story ends with: all rows on all servers, none twice, none copied anew.
fn all_is_well(tree: &Tree, counting: Background) {
    tree.all_is_well(counting);
    let copies = "SELECT count(*) FROM terrace.events WHERE kind IN ('resync', 'gap')";
    assert_eq!(tree.top.value(copies), "0");
}

/// How long it takes until one master stays. A stream whose packets were lost may be found dead
/// no sooner than 10 s after the last of them came, and its master makes room then.
fn becomes_calm(tree: &Tree) -> Duration {
    let healed = Instant::now();
    let mut master = tree.settled_master("region");
    loop {
        std::thread::sleep(Duration::from_secs(3));
        let now = tree.settled_master("region");
        if now == master {
            return healed.elapsed();
        }
        assert!(healed.elapsed() < CALM, "{now} leads instead of {master}");
        master = now;
    }
}

#[test]
fn a_third_of_all_packets_is_lost_and_no_row() {
    let Some(tree) = grow() else { return };
    let counting = count_up(&tree.top);
    counting.go_on(50);
    let before = promotions(&tree);
    network(&tree).one_way(&ALL, &ALL, Fate::Lose(5));
    tree.rows_arrive("branch-1", SOON);
    // So much that hardly a session opens in time. It need not be good, but must not end badly.
    network(&tree).one_way(&ALL, &ALL, Fate::Lose(30));
    std::thread::sleep(Duration::from_secs(20));
    let under_loss = promotions(&tree) - before;
    network(&tree).heal();
    let calm = becomes_calm(&tree);
    let after = promotions(&tree) - before;
    println!("{under_loss} promotions in 20 s of loss, {after} in all, calm after {calm:?}");
    assert!(after <= 10, "{after} promotions: no master may stay");
    all_is_well(&tree, counting);
}

#[test]
fn a_master_is_cut_off_this_way_and_that() {
    let Some(tree) = grow() else { return };
    let counting = count_up(&tree.top);
    counting.go_on(50);
    let before = promotions(&tree);
    let mut master = tree.settled_master("region");

    // From its slaves: those still reach the parent and are a majority.
    network(&tree).between(&[&master], &others(&REGION, &master), Fate::Drop);
    master = replaced(&tree, &master);
    // From the parent, silently, and then by resets.
    for fate in [Fate::Drop, Fate::Reset] {
        network(&tree).between(&[&master], &["top"], fate);
        master = replaced(&tree, &master);
    }
    // From everybody, and only what it sends.
    network(&tree).one_way(&[&master], &others(&ALL, &master), Fate::Drop);
    master = replaced(&tree, &master);
    // From everybody, and only what it is sent.
    network(&tree).one_way(&others(&ALL, &master), &[&master], Fate::Drop);
    master = replaced(&tree, &master);

    // A child from the server that it follows, both ways and one way: it goes to another one.
    let parent = parent_of_the_branch(&tree);
    network(&tree).between(&[&parent], &["branch-1"], Fate::Drop);
    child_goes_on(&tree, &master);
    let parent = parent_of_the_branch(&tree);
    network(&tree).one_way(&[&parent], &["branch-1"], Fate::Drop);
    child_goes_on(&tree, &master);

    let promotions = promotions(&tree) - before;
    println!("{promotions} promotions for 5 masters cut off");
    assert!(promotions <= 10, "{promotions} promotions for 5");
    all_is_well(&tree, counting);
}

/// Another one leads, new rows arrive below, and after the healing it still leads.
fn replaced(tree: &Tree, old: &str) -> String {
    let new = tree.successor("region", old);
    tree.rows_arrive("branch-1", SOON);
    network(tree).heal();
    assert_eq!(tree.settled_master("region"), new, "{old} is a slave");
    new
}

/// Name of the server that branch-1 follows.
fn parent_of_the_branch(tree: &Tree) -> String {
    let upstream = "SELECT coalesce(upstream, '') FROM terrace.lag WHERE node = 'branch-1'";
    let mut found = None;
    wait_until("branch-1 follows a server", || {
        let upstream = tree.top.value(upstream);
        let is_it =
            |name: &&str| upstream.starts_with(&format!("{}:", network(tree).host(name).address));
        found = REGION.into_iter().find(is_it);
        found.is_some()
    });
    found.expect("a server").to_owned()
}

/// New rows arrive below, and the master of the level above stays.
fn child_goes_on(tree: &Tree, master: &str) {
    tree.rows_arrive("branch-1", SOON);
    network(tree).heal();
    assert_eq!(tree.settled_master("region"), master);
}
