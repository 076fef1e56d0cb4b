//! Servers of one domain that hold different things are found out, and no others.

use std::fs;

use terrace_tests::load::{STEPS, count_up};
use terrace_tests::{Bridge, Tree, wait_until};

/// Length of a window that is compared.
const WINDOW: u64 = 64 << 20;
/// Bytes before a record's body.
const HEADER: usize = 24;

fn end(tree: &Tree) -> u64 {
    let sql = "SELECT (pg_current_wal_lsn() - '0/0')::bigint";
    tree.top.value(sql).parse().expect("a position")
}

/// Lets the top's WAL go on beyond the window that is open.
fn to_next_window(tree: &Tree) -> u64 {
    let window = end(tree) / WINDOW;
    while end(tree) / WINDOW == window {
        tree.top
            .sql("SELECT pg_switch_wal(); UPDATE far SET n = n + 1");
    }
    end(tree) / WINDOW
}

/// Waits until so many windows are equal on every server of the domain.
fn wait_equal_windows(tree: &Tree, count: i64) {
    for node in tree.domain("region") {
        let name = &node.server.name;
        wait_until(&format!("{name} has compared {count} windows"), || {
            node.bridge.metric("equal_windows") >= Some(count)
        });
    }
}

fn mismatches(tree: &Tree) -> String {
    let sql = "SELECT count(*) FROM terrace.events WHERE kind = 'mismatch'";
    tree.top.value(sql)
}

/// Changes the time of the first commit in `window` of a stopped bridge's queue, as a
/// server that was told so would have it: the record is sound.
fn rewrite_a_commit(bridge: &Bridge, window: u64) {
    for path in bridge.segments() {
        let mut bytes = fs::read(&path).expect("read a segment");
        let number = |bytes: &[u8], at: usize, len: usize| {
            let digits = bytes[at..at + len].iter();
            digits.fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
        };
        for at in 0..bytes.len().saturating_sub(HEADER) {
            if !bytes[at..].starts_with(b"TERR\x03\0\0\0")
                || number(&bytes, at + 12, 8) / WINDOW != window
            {
                continue;
            }
            let end = at + HEADER + number(&bytes, at + 8, 4) as usize;
            bytes[end - 1] ^= 1;
            let crc = crc32c::crc32c(&bytes[at..at + 20]);
            let crc = crc32c::crc32c_append(crc, &bytes[at + HEADER..end]);
            bytes[at + 20..at + HEADER].copy_from_slice(&crc.to_be_bytes());
            fs::write(&path, bytes).expect("write a segment");
            return;
        }
    }
    panic!("no commit in window {window}");
}

/// Copies the server's data anew, and waits until that is done.
fn resync(tree: &mut Tree, name: &str) {
    let sql =
        format!("SELECT count(*) FROM terrace.events WHERE kind = 'copied' AND node = '{name}'");
    let before = tree.top.value(&sql);
    tree.node(name).bridge.resync();
    wait_until("it is copied anew", || tree.top.value(&sql) != before);
    tree.wait_streaming();
}

#[test]
fn a_server_that_was_told_something_else_is_outvoted_and_no_other_ever() {
    let schema = format!(
        "{STEPS} CREATE TABLE far (n int PRIMARY KEY); INSERT INTO far VALUES (1);
         SELECT terrace.add_table('far')"
    );
    let mut tree = Tree::grow(
        &schema,
        &[("region", None, 3), ("branch", Some("region"), 1)],
    );
    let counting = count_up(&tree.top);
    // An ordinary life: windows pass, the master dies and returns, a server is copied to.
    to_next_window(&tree);
    let master = tree.with_role("region", "master");
    tree.node(&master).bridge.kill9();
    counting.go_on(200);
    to_next_window(&tree);
    tree.node(&master)
        .bridge
        .restart()
        .expect("start the bridge");
    counting.go_on(200);
    to_next_window(&tree);
    tree.wait_streaming();
    wait_equal_windows(&tree, 2);
    let wrong = ["region-1", "region-2", "region-3"]
        .into_iter()
        .find(|name| *name != tree.with_role("region", "master"))
        .expect("a slave");
    resync(&mut tree, wrong);
    let window = to_next_window(&tree);
    counting.go_on(50);
    to_next_window(&tree);
    wait_equal_windows(&tree, 1);
    assert_eq!(mismatches(&tree), "0");

    // One is told something else.
    let wrong = ["region-1", "region-2", "region-3"]
        .into_iter()
        .find(|name| *name != wrong && *name != tree.with_role("region", "master"))
        .expect("another slave");
    tree.node(wrong).bridge.stop();
    rewrite_a_commit(&tree.node(wrong).bridge, window);
    tree.node(wrong).bridge.restart().expect("start the bridge");
    let outvoted = format!(
        "SELECT string_agg(node, ',') = '{wrong}' FROM terrace.lag WHERE state = 'diverged' \
         AND reason LIKE '%a majority holds those of there%'"
    );
    wait_until("it is outvoted, alone", || tree.top.value(&outvoted) == "t");
    wait_until("the others say so too", || mismatches(&tree) != "1");
    assert_eq!(tree.node(wrong).bridge.metric("disputed"), Some(1));
    let branch = tree
        .node("branch-1")
        .server
        .value("SELECT max(n) FROM steps");
    let goes_on = format!("SELECT max(n) > {branch} FROM steps");
    wait_until("the level below goes on", || {
        tree.node("branch-1").server.value(&goes_on) == "t"
    });
    // The way out.
    resync(&mut tree, wrong);
    counting.go_on(20);
    counting.stop();
    tree.wait_for_equal(&["steps", "trail", "far"]);
    tree.assert_gapless();
}

#[test]
fn two_servers_that_differ_are_both_in_doubt_and_go_on() {
    let mut tree = Tree::grow(STEPS, &[("region", None, 2)]);
    tree.top
        .sql("CREATE TABLE far (n int PRIMARY KEY); INSERT INTO far VALUES (1)");
    let counting = count_up(&tree.top);
    let window = to_next_window(&tree);
    counting.go_on(50);
    to_next_window(&tree);
    wait_equal_windows(&tree, 1);
    tree.node("region-2").bridge.stop();
    rewrite_a_commit(&tree.node("region-2").bridge, window);
    tree.node("region-2")
        .bridge
        .restart()
        .expect("start the bridge");
    let doubt = "SELECT count(*) FROM terrace.lag WHERE state = 'diverged' \
                 AND reason LIKE '%copy the data of the wrong one anew%'";
    wait_until("both say so", || tree.top.value(doubt) == "2");
    counting.go_on(50);
    resync(&mut tree, "region-2");
    counting.stop();
    tree.wait_for_equal(&["steps", "trail"]);
}
