//! The top is replaced by a standby of it.

use terrace_tests::bridge::options;
use terrace_tests::load::{GAPLESS, STEPS, count_up};
use terrace_tests::{Bridge, Scratch, Server, ServerOptions, Tree, wait_until};

const SLOT: &str = "terrace_region";

struct Story {
    bridges: Vec<Bridge>,
    region: Server,
    site: Server,
    standby: Server,
    top: Server,
    _scratch: Scratch,
}

/// A top with a standby, a domain that knows both, and a domain below that.
fn begin() -> Story {
    let scratch = Scratch::new("terrace-").expect("scratch");
    let top_options = ServerOptions {
        top: true,
        settings: "wal_keep_size = 1GB".into(),
        ..Default::default()
    };
    let top = Server::start(&scratch, "top", &top_options).expect("boot the top");
    let [region, site] = ["region-1", "site-1"]
        .map(|name| Server::start(&scratch, name, &ServerOptions::default()).expect("boot"));
    top.sql(STEPS);
    top.sql("SELECT terrace.create_domain('region'), terrace.create_domain('site', 'region')");
    let standby = top.standby(&scratch, "standby").expect("make a standby");
    let above = [top.conninfo(), standby.conninfo()];
    let mut bridges =
        vec![Bridge::start(&scratch, &options(&region, "region", &above)).expect("start")];
    let above = [bridges[0].conninfo()];
    bridges.push(Bridge::start(&scratch, &options(&site, "site", &above)).expect("start"));
    let story = Story {
        bridges,
        region,
        site,
        standby,
        top,
        _scratch: scratch,
    };
    let counting = count_up(&story.top);
    counting.go_on(50);
    let last = counting.stop();
    story.wait_for(last);
    story
}

impl Story {
    fn wait_for(&self, last: i64) {
        for server in [&self.region, &self.site] {
            wait_until("all rows are there", || {
                server.value("SELECT count(*) FROM terrace.progress") == "1"
                    && server.value("SELECT coalesce(max(n), 0) FROM steps") == last.to_string()
            });
            assert_eq!(server.value(GAPLESS), "t", "numbers on {}", server.name);
        }
    }

    /// What is written at this top now comes down; the last number of it.
    fn flows_from(&self, top: &Server) -> i64 {
        let counting = count_up(top);
        counting.go_on(30);
        counting.stop();
        let last = top.value("SELECT max(n) FROM steps");
        let last = last.parse().expect("number");
        self.wait_for(last);
        last
    }

    /// The top is gone; the standby takes its place, with the slot as the top had it.
    fn promote(&mut self) {
        self.standby.restart().expect("start the standby");
        self.standby.sql("SELECT pg_promote()");
    }

    fn reason(&self) -> String {
        let sql =
            "SELECT state || ': ' || coalesce(reason, '') FROM terrace.lag WHERE node = 'region-1'";
        self.region.value(sql)
    }
}

#[test]
fn a_standby_that_has_more_is_followed() {
    let mut story = begin();
    // The domain stops; the top and its standby go on, and hold what it lacks.
    story.bridges[0].stop();
    let counting = count_up(&story.top);
    counting.go_on(30);
    counting.stop();
    let last = story.top.value("SELECT max(n) FROM steps");
    wait_until("the standby has it too", || {
        story.standby.value("SELECT max(n) FROM steps") == last
    });
    story.top.sql("CHECKPOINT");
    story.standby.stop();
    story
        .standby
        .take_slot(&story.top, SLOT)
        .expect("copy the slot");
    story.top.stop();
    story.promote();
    story.bridges[0].restart().expect("start the bridge");
    story.wait_for(last.parse().expect("number"));
    story.flows_from(&story.standby);
    let told = "SELECT count(*) FROM terrace.progress WHERE split_part(identity, '/', 2) = '2'";
    for server in [&story.region, &story.site] {
        wait_until("the database says so", || server.value(told) == "1");
    }
}

// In a drill, or by mistake: who has touched it followed the top no more.
#[test]
fn a_standby_without_the_slot_ties_nobody_to_itself() {
    let mut story = begin();
    story.top.stop();
    story.standby.sql("SELECT pg_promote()");
    wait_until("the standby is asked", || {
        let said = story.reason();
        said.contains("\"terrace_region\" does not exist") && said.contains("resync")
    });
    story.top.restart().expect("start the top");
    story.flows_from(&story.top);
    let timeline = "SELECT split_part(identity, '/', 2) FROM terrace.progress";
    assert_eq!(story.region.value(timeline), "1");
}

#[test]
fn a_standby_that_has_less_is_not_followed_and_nothing_is_served() {
    let mut story = begin();
    // The standby stops; the domain gets what the standby never will.
    story.top.sql("CHECKPOINT");
    story.standby.stop();
    story
        .standby
        .take_slot(&story.top, SLOT)
        .expect("copy the slot");
    let last = story.flows_from(&story.top);
    story.top.kill9();
    story.promote();
    wait_until("it says that it has diverged", || {
        story.reason().starts_with("diverged") && story.reason().contains("resync")
    });
    let events = "SELECT count(*) FROM terrace.events WHERE kind = 'diverged'";
    wait_until("an event tells", || story.region.value(events) == "1");
    story
        .standby
        .sql("INSERT INTO steps VALUES (1000000); INSERT INTO trail VALUES (1000000)");
    // It keeps what it has, and gives it to nobody.
    let relay = story.bridges[0].conninfo() + " replication=database";
    let refused = std::process::Command::new(terrace_tests::server::program("psql"))
        .args([&relay, "-c", "IDENTIFY_SYSTEM"])
        .output()
        .expect("run psql");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("has diverged"), "{said}");
    assert_eq!(
        story.region.value("SELECT max(n) FROM steps"),
        last.to_string()
    );
    // The operator decides for the new top.
    story.bridges[0].resync();
    wait_until("the new top's rows are there", || {
        story.region.value("SELECT max(n) FROM steps") == "1000000"
    });
}

// A server that stays connected to the one above used to store the new top's transactions as
// the old one's, and what it held beyond the switch counted for an acknowledgement.
#[test]
fn every_server_of_a_domain_learns_of_the_new_timeline() {
    let mut tree = Tree::plant(STEPS).expect("boot the top");
    tree.top.sql("ALTER SYSTEM SET wal_keep_size = '1GB'");
    tree.top.sql("SELECT pg_reload_conf()");
    tree.boot(&[("region", None, 2), ("branch", Some("region"), 1)])
        .expect("boot");
    let mut standby = tree
        .top
        .standby(&tree.scratch, "standby")
        .expect("make a standby");
    // Both name the standby as another server of the level above.
    let (top, other) = (tree.top.conninfo(), standby.conninfo());
    for node in tree.domain("region") {
        let config = node.bridge.config();
        let text = std::fs::read_to_string(&config).expect("read");
        let both = format!("servers = [\"{top}\", \"{other}\"]");
        let text = text.replace(&format!("servers = [\"{top}\"]"), &both);
        assert!(text.contains(&both), "{text}");
        std::fs::write(&config, text).expect("write");
    }
    tree.start_bridges().expect("start the bridges");
    tree.wait_streaming();
    let counting = count_up(&tree.top);
    counting.go_on(50);
    counting.stop();
    let rows = "SELECT format('%s %s', count(*), max(n)) FROM steps";
    let has = |server: &Server, all: &str| {
        wait_until("the rows are there", || server.value(rows) == all);
    };
    let all = tree.top.value(rows);
    tree.nodes.iter().for_each(|node| has(&node.server, &all));
    has(&standby, &all);
    // Its last WAL goes to all that follow it.
    tree.top.stop();
    standby.stop();
    standby.take_slot(&tree.top, SLOT).expect("copy the slot");
    standby.restart().expect("start the standby");
    standby.sql("SELECT pg_promote()");
    wait_until("it is the top", || {
        standby.value("SELECT pg_is_in_recovery()") == "f"
    });
    let counting = count_up(&standby);
    counting.go_on(30);
    counting.stop();
    let all = standby.value(rows);
    let told = "SELECT count(*) FROM terrace.progress WHERE split_part(identity, '/', 2) = '2'";
    for node in &mut tree.nodes {
        has(&node.server, &all);
        wait_until("the database says so", || node.server.value(told) == "1");
        // What is in its queue is the new top's by name too: it starts from that.
        node.bridge.stop();
        node.bridge.restart().expect("start the bridge");
    }
    let counting = count_up(&standby);
    counting.go_on(30);
    counting.stop();
    let all = standby.value(rows);
    tree.nodes.iter().for_each(|node| has(&node.server, &all));
    let wrong = "SELECT count(*) FROM terrace.events WHERE kind IN ('diverged', 'resync', 'gap')";
    assert_eq!(standby.value(wrong), "0");
}

// A snapshot of the machine is restored: PostgreSQL takes a START beyond its end, and sends nothing
// of what it writes up to there.
#[test]
fn a_top_that_is_set_back_is_not_gone_on_with() {
    let mut tree = Tree::grow(STEPS, &[("region", None, 2)]);
    let write = |tree: &Tree| {
        let next = "INSERT INTO steps SELECT coalesce(max(n), 0) + 1 FROM steps RETURNING n";
        tree.top.value(next)
    };
    let arrives = |tree: &Tree, n: &str| {
        for node in &tree.nodes {
            let has = format!("SELECT count(*) FROM steps WHERE n = {n}");
            wait_until("it is there", || node.server.value(&has) == "1");
        }
    };
    let n = write(&tree);
    arrives(&tree, &n);
    tree.top.stop();
    tree.top.keep_state().expect("keep the state");
    tree.top.restart().expect("start the top");
    // More than the top writes of its own accord while they ask it.
    tree.top
        .sql("INSERT INTO trail SELECT generate_series(1, 20000)");
    let n = write(&tree);
    arrives(&tree, &n);
    tree.top.stop();
    tree.top.set_back().expect("set the top back");
    tree.top.restart().expect("start the top");
    let diverged = "SELECT count(*) FROM terrace.lag WHERE state = 'diverged' \
                    AND reason LIKE '%set back to an earlier state%resync%'";
    wait_until("both say so", || tree.top.value(diverged) == "2");
    // Also when it has come further than they have.
    tree.top
        .sql("INSERT INTO trail SELECT generate_series(1, 30000)");
    tree.top
        .sql("INSERT INTO steps SELECT g FROM generate_series(1000, 6000) g");
    std::thread::sleep(std::time::Duration::from_secs(7));
    assert_eq!(tree.top.value(diverged), "2");
    for node in &tree.nodes {
        let beyond = "SELECT count(*) FROM steps WHERE n >= 1000";
        assert_eq!(node.server.value(beyond), "0");
    }
    let first = tree.nodes[0].server.name.clone();
    tree.node(&first).bridge.resync();
    wait_until("it has copied", || {
        tree.nodes[0]
            .server
            .value("SELECT count(*) FROM steps WHERE n >= 1000")
            == "5001"
    });
    let second = tree.nodes[1].server.name.clone();
    tree.node(&second).bridge.resync();
    tree.wait_streaming();
    tree.wait_for_equal(&["steps", "trail"]);
}
