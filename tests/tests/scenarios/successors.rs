//! Who takes over, when the one that would is dead, behind or away.

use std::process::Command;
use std::time::{Duration, Instant};

use terrace_tests::bridge::bridge_program;
use terrace_tests::disk::Disk;
use terrace_tests::load::{STEPS, WIDE, count_up, fill_wide};
use terrace_tests::proxy::Proxy;
use terrace_tests::{Tree, wait_until};

use crate::failover::tree_on_a_disk;

const REGION: [(&str, Option<&str>, usize); 1] = [("region", None, 3)];

/// What `switchover --to` says when it is refused.
fn refusal(tree: &mut Tree, to: &str) -> String {
    let arguments = ["--domain", "region", "--to", to];
    let output = tree.node(to).bridge.command("switchover", &arguments);
    let output = output.expect("run switchover");
    String::from_utf8(output.stderr).expect("UTF-8")
}

// It had agreed to take over; the others waited for it as long as a handover may take.
#[test]
fn the_chosen_one_dies_and_nobody_waits_for_it() {
    let mut tree = Tree::grow(STEPS, &REGION);
    let counting = count_up(&tree.top);
    counting.go_on(50);
    let master = tree.settled_master("region");
    let chosen = &tree.others("region", &master)[0];
    // Its way to the top, and to nobody else, can be cut.
    let way = Proxy::start(tree.top.port).expect("start a proxy");
    let top = format!("port={}", tree.top.port);
    let bridge = &mut tree.node(chosen).bridge;
    let text = std::fs::read_to_string(bridge.config()).expect("read the configuration");
    assert!(text.contains(&top), "{text}");
    let text = text.replace(&top, &format!("port={}", way.port));
    std::fs::write(bridge.config(), text).expect("write it");
    bridge.stop();
    bridge.restart().expect("start the bridge");
    tree.wait_streaming();
    counting.go_on(50);
    // It does not know yet that it cannot lead.
    way.cut();
    let asked = Instant::now();
    let config = tree.node(&master).bridge.config();
    let order = Command::new(bridge_program())
        .args(["switchover", "-c", config.to_str().expect("UTF-8")])
        .args(["--domain", "region", "--to", chosen])
        .spawn();
    let event = format!("to {chosen}, as asked");
    wait_until("it is asked to take over", || {
        tree.node(&master).bridge.logged().contains(&event)
    });
    std::thread::sleep(Duration::from_millis(300));
    let written = tree.top.value("SELECT max(n) FROM steps");
    let has_news = format!("SELECT max(n) > {written} FROM steps");
    tree.node(chosen).bridge.kill9();
    let server = &tree.node(&master).server;
    wait_until("rows go on", || server.value(&has_news) == "t");
    let waited = asked.elapsed();
    assert!(waited < Duration::from_secs(4), "it took {waited:?}");
    order.expect("run switchover").wait().expect("its end");
    way.heal();
    tree.node(chosen)
        .bridge
        .restart()
        .expect("start the bridge");
    tree.wait_streaming();
    tree.all_is_well(counting);
}

// Everybody below would wait until its database has caught up with its queue.
#[test]
fn a_server_whose_database_is_far_behind_leads_last() {
    let schema = format!("{STEPS}{WIDE}");
    let mut tree = Tree::grow(&schema, &REGION);
    // By its name it would come first.
    let slow = "region-3";
    if tree.settled_master("region") == slow {
        let arguments = ["--domain", "region", "--to", "region-1"];
        let output = tree.node(slow).bridge.command("switchover", &arguments);
        assert!(output.expect("run switchover").status.success());
    }
    let master = tree.settled_master("region");
    tree.node(slow).server.sql(
        "CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS \
         $$BEGIN PERFORM pg_sleep(2); RETURN NEW; END$$;
         CREATE TRIGGER slowly BEFORE INSERT ON wide FOR EACH ROW EXECUTE FUNCTION slowly();
         ALTER TABLE wide ENABLE ALWAYS TRIGGER slowly",
    );
    fill_wide(&tree.top, 0..8);
    let behind = format!(
        "SELECT received_lsn - replay_lsn > 70 << 20 FROM terrace.lag WHERE node = '{slow}'"
    );
    wait_until("the top knows", || tree.top.value(&behind) == "t");
    // The master asks only now and then.
    std::thread::sleep(Duration::from_secs(2));
    wait_until("it is told to be far behind", || {
        refusal(&mut tree, slow).contains("is far behind; wait until it has caught up")
    });
    let rows = "SELECT count(*) FROM wide";
    for name in ["region-1", "region-2"] {
        let server = &tree.node(name).server;
        wait_until("the others have all", || server.value(rows) == "96");
    }
    // The slow one need not be seen to stream: it is busy with one transaction after the other.
    let moment = tree.top.value("SELECT clock_timestamp()");
    wait_until("all tell of themselves", || tree.has_news_since(&moment));
    let masters =
        "SELECT string_agg(node, ' ') FROM terrace.lag WHERE domain = 'region' AND role = 'master'";
    assert_eq!(tree.top.value(masters), master, "nothing has changed");
    let others = tree.others("region", &master);
    tree.node(&master).bridge.kill9();
    // The slow one is the last of these.
    assert_eq!(tree.successor("region", &master), others[0]);

    tree.node(slow).server.sql("DROP TRIGGER slowly ON wide");
    tree.node(&master)
        .bridge
        .restart()
        .expect("start the bridge");
    tree.wait_streaming();
    tree.wait_for_equal(&["wide"]);
}

// What it lacks is held by servers that are silent, not gone: the slot is not to be dropped for it.
#[test]
fn a_slot_is_kept_for_who_has_what_follows_it() {
    let Some((tree, disk)) = tree_on_a_disk(Disk::small) else {
        return;
    };
    let counting = count_up(&tree.top);
    counting.go_on(50);
    disk.fill();
    let next = tree.successor("region", "region-1");
    counting.go_on(300);
    tree.rows_arrive(&next, Duration::from_secs(10));
    let silent = tree
        .nodes
        .iter()
        .filter(|node| ["region-2", "region-3"].contains(&node.server.name.as_str()));
    silent.clone().for_each(|node| node.bridge.pause());
    disk.make_room();
    let alone = tree
        .nodes
        .iter()
        .find(|node| node.server.name == "region-1");
    let alone = &alone.expect("region-1").bridge;
    let says = |words: &str| wait_until(words, || alone.logged().contains(words));
    says("unless one of those that do not answer");
    let slot = "SELECT confirmed_flush_lsn FROM pg_replication_slots \
                WHERE slot_name = 'terrace_region'";
    let confirmed = tree.top.value(slot);
    alone.resync();
    says("this one waits for it");
    assert_eq!(tree.top.value(slot), confirmed, "the slot is as it was");
    silent.for_each(|node| node.bridge.resume());
    tree.wait_streaming();
    assert_ne!(
        tree.with_role("region", "master"),
        "region-1",
        "the others had it"
    );
    tree.all_is_well(counting);
}
