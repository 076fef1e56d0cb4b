//! PostgreSQL's own clients feel at home on a relay.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use nix::sys::signal::Signal;
use terrace_tests::bridge::{Bridge, options};
use terrace_tests::process::{Process, command};
use terrace_tests::server::program;
use terrace_tests::{Server, ServerOptions, Tree, wait_until};

use crate::tls::both;

pub(crate) const TABLE: &str =
    "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT terrace.add_table('t')";

// ----- clients ----------------------------------------------------------------

pub(crate) fn limited(program: &str) -> Command {
    let mut command = Command::new("timeout");
    command.arg("60").arg(program).stdin(Stdio::null());
    command
}

pub(crate) fn told(output: Output) -> Result<String, String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stderr))
    }
}

/// What libpq makes of a connection string.
pub(crate) fn psql(conninfo: &str, sql: &str) -> Result<String, String> {
    let mut psql = limited(&program("psql"));
    psql.args(["-XAtq", "-d", conninfo, "-c", sql]);
    told(psql.output().expect("run psql"))
}
/// A top and one server, whose bridge has `relay` in its section `[relay]`.
pub(crate) fn one_server(relay: &str) -> (Tree, Server, Bridge) {
    let tree = Tree::plant(TABLE).expect("boot the top");
    tree.top.sql("SELECT terrace.create_domain('region')");
    let server =
        Server::start(&tree.scratch, "region-1", &ServerOptions::default()).expect("boot a server");
    let mut options = options(&server, "region", &[tree.top.conninfo()]);
    options.extra_relay = relay.into();
    let bridge = Bridge::start(&tree.scratch, &options).expect("start the bridge");
    wait_until("the server streams", || {
        let sql = "SELECT count(*) FROM terrace.lag WHERE state = 'streaming' AND level > 0";
        tree.top.value(sql) == "1"
    });
    (tree, server, bridge)
}

/// Waits until `server` holds what the top holds.
pub(crate) fn wait_for_rows(top: &Server, server: &Server) {
    let wanted = top.checksum("t").expect("checksum");
    wait_until("the rows arrive", || {
        server.checksum("t").is_ok_and(|sum| sum == wanted)
    });
}

// ----- stock clients ------------------------------------------------------------

/// A running `pg_recvlogical` that writes what it receives to `file`.
fn receive(conninfo: &str, slot: &str, file: &Path) -> Process {
    let mut receive = command(&program("pg_recvlogical"), None, Signal::SIGKILL);
    receive
        .args(["--start", "-d", conninfo, "--slot", slot, "--file"])
        .arg(file)
        .args(["--fsync-interval", "1", "--status-interval", "1"])
        .args(["-o", "proto_version=1", "-o", "publication_names=terrace"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    Process::start(receive, Signal::SIGINT).expect("start pg_recvlogical")
}

fn manage_slot(conninfo: &str, slot: &str, action: &str) -> Result<String, String> {
    let mut receive = limited(&program("pg_recvlogical"));
    receive.args([action, "-d", conninfo, "--slot", slot, "-P", "pgoutput"]);
    told(receive.output().expect("run pg_recvlogical"))
}

/// Where `needle` is in a file, which may not be there yet.
fn place(file: &Path, needle: &[u8]) -> Option<usize> {
    let bytes = fs::read(file).unwrap_or_default();
    bytes
        .windows(needle.len())
        .position(|window| window == needle)
}

/// Waits until the bridge has on disk that the consumer has all that the top has now.
fn wait_confirmed(bridge: &Bridge, slot: &str, top: &Server) {
    let now = top.value("SELECT pg_current_wal_lsn() - '0/0'");
    wait_until("it is confirmed", || {
        let cursors = fs::read_to_string(bridge.directory().join("data/queue/cursors.json"));
        let cursors = cursors.unwrap_or_else(|_| "{}".into());
        let sql = format!("SELECT ('{cursors}'::jsonb -> '{slot}' ->> 'lsn')::numeric >= {now}");
        top.value(&sql) == "t"
    });
}

#[test]
fn psql_and_pg_dump_read_through_the_relay() {
    let tree = Tree::grow(TABLE, &[("region", None, 1)]);
    tree.top.sql(
        "INSERT INTO t VALUES (1, 'it''s'), (2, NULL); CREATE TABLE here (id int PRIMARY KEY)",
    );
    let (server, bridge) = (&tree.nodes[0].server, &tree.nodes[0].bridge);
    wait_for_rows(&tree.top, server);
    let conninfo = bridge.conninfo();
    assert_eq!(
        psql(&conninfo, "SELECT v FROM t WHERE id = 1").as_deref(),
        Ok("it's\n")
    );
    let copied = psql(&conninfo, "COPY (SELECT id FROM t ORDER BY 1) TO STDOUT");
    assert_eq!(copied.as_deref(), Ok("1\n2\n"));
    let said = psql(&conninfo, "UPDATE t SET v = 'no'").expect_err("may not write");
    assert!(said.contains("cannot change rows"), "{said}");
    let said = psql(
        &conninfo.replace("dbname=app", "dbname=postgres"),
        "SELECT 1",
    );
    assert!(
        said.expect_err("another database")
            .contains("does not exist")
    );

    let bound = format!("{conninfo} channel_binding=require");
    both(&tree.scratch, &bound).expect_err("there is no TLS to bind to");

    // A replication session takes SQL, but no rows: it would wait for them for ever.
    let server = &tree.nodes[0].server;
    server.sql("CREATE TABLE x (a int); GRANT INSERT ON x TO terrace_relay");
    let mut copy = limited(&program("psql"));
    copy.args(["-XAtq", "-d", &format!("{conninfo} replication=database")]);
    copy.args(["-c", "COPY x FROM STDIN"]);
    let said = told(copy.output().expect("run psql")).expect_err("no rows");
    assert!(said.contains("cannot do more than read"), "{said}");

    let mut dump = limited(&program("pg_dump"));
    dump.args(["-d", &conninfo, "--table", "t"]);
    let dump = told(dump.output().expect("run pg_dump")).expect("a dump");
    for line in ["CREATE TABLE public.t (", "1\tit's\n", "2\t\\N\n"] {
        assert!(dump.contains(line), "{line:?} is not in {dump}");
    }
}

// A slot used to be promised before it was on disk.
#[test]
fn a_slot_is_there_once_it_was_promised() {
    let mut tree = Tree::grow(TABLE, &[("region", None, 1)]);
    let conninfo = tree.nodes[0].bridge.conninfo();
    let again = |tree: &mut Tree| {
        tree.nodes[0].bridge.kill9();
        tree.nodes[0].bridge.restart().expect("start the bridge");
        wait_until("the relay answers", || psql(&conninfo, "SELECT 1").is_ok());
    };
    manage_slot(&conninfo, "stock", "--create-slot").expect("create the slot");
    again(&mut tree);
    for action in ["--drop-slot", "--create-slot"] {
        let said = manage_slot(&conninfo, "terrace_branch", action).expect_err("a domain's");
        assert!(said.contains("reserved for bridges"), "{said}");
    }
    let said = manage_slot(&conninfo, "stock", "--create-slot").expect_err("it is there");
    assert!(said.contains("already exists"), "{said}");
    manage_slot(&conninfo, "stock", "--drop-slot").expect("drop the slot");
    again(&mut tree);
    manage_slot(&conninfo, "stock", "--create-slot").expect("it is gone");
}

#[test]
fn a_query_through_the_relay_can_be_cancelled() {
    let tree = Tree::grow(TABLE, &[("region", None, 1)]);
    let (server, bridge) = (&tree.nodes[0].server, &tree.nodes[0].bridge);
    let said = tree.scratch.path().join("said");
    let mut psql = command(&program("psql"), None, Signal::SIGKILL);
    psql.args(["-X", "-d", &bridge.conninfo(), "-c", "SELECT pg_sleep(600)"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(&said).expect("create"));
    let mut psql = Process::start(psql, Signal::SIGINT).expect("start psql");
    let asleep = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
    wait_until("it sleeps", || server.value(asleep) == "1");
    psql.signal(Signal::SIGINT);
    wait_until("it is awake", || server.value(asleep) == "0");
    psql.wait(terrace_tests::PATIENCE).expect("psql ends");
    let said = fs::read_to_string(said).expect("read");
    assert!(
        said.contains("canceling statement due to user request"),
        "{said}"
    );
}

#[test]
fn pg_recvlogical_goes_on_where_it_confirmed() {
    let mut tree = Tree::grow(TABLE, &[("region", None, 1)]);
    let conninfo = tree.nodes[0].bridge.conninfo();
    manage_slot(&conninfo, "stock", "--create-slot").expect("create the slot");
    let said = manage_slot(&conninfo, "stock", "--create-slot").expect_err("once only");
    assert!(said.contains("already exists"), "{said}");

    let (first, second) = (
        tree.scratch.path().join("first"),
        tree.scratch.path().join("second"),
    );
    let mut receiver = receive(&conninfo, "stock", &first);
    tree.top.sql("INSERT INTO t VALUES (1, 'before the kill')");
    wait_until("the row is received", || {
        place(&first, b"before the kill").is_some()
    });
    let twin = limited(&program("pg_recvlogical"))
        .args(["--start", "--no-loop", "-d", &conninfo, "--slot", "stock"])
        .args([
            "-f",
            "-",
            "-o",
            "proto_version=1",
            "-o",
            "publication_names=terrace",
        ])
        .output();
    let refused = told(twin.expect("run pg_recvlogical")).expect_err("in use");
    assert!(refused.contains("is active for PID"), "{refused}");
    let bytes = fs::read(&first).expect("read");
    assert_eq!(bytes.first(), Some(&b'B'), "it begins with a begin");
    let at = |needle: &[u8]| place(&first, needle).expect("received");
    assert!(at(b"\nR") < at(b"\nI"), "the table comes before the row");
    wait_until("the commit is received", || {
        place(&first, b"\nC\0\0\0").is_some()
    });
    wait_confirmed(&tree.nodes[0].bridge, "stock", &tree.top);
    receiver.kill().expect("kill -9");

    tree.top.sql("INSERT INTO t VALUES (2, 'while away')");
    tree.nodes[0].bridge.kill9();
    tree.nodes[0].bridge.restart().expect("start the bridge");
    tree.top.sql("INSERT INTO t VALUES (3, 'afterwards')");
    let relay = ("127.0.0.1", tree.nodes[0].bridge.port);
    wait_until("the relay is there", || {
        std::net::TcpStream::connect(relay).is_ok()
    });
    let _receiver = receive(&conninfo, "stock", &second);
    wait_until("the rest is received", || {
        place(&second, b"while away").is_some() && place(&second, b"afterwards").is_some()
    });
    assert_eq!(place(&second, b"before the kill"), None, "not again");
    let said = manage_slot(&conninfo, "stock", "--drop-slot").expect_err("in use");
    assert!(said.contains("is active for PID"), "{said}");
}

#[test]
fn a_native_subscription_follows_a_relay() {
    let mut tree = Tree::grow(TABLE, &[("region", None, 1)]);
    let native = ServerOptions {
        extension: false,
        ..Default::default()
    };
    let subscriber = Server::start(&tree.scratch, "native", &native).expect("boot a server");
    subscriber.sql("CREATE TABLE t (id int PRIMARY KEY, v text)");
    subscriber.sql(&format!(
        "CREATE SUBSCRIPTION stock CONNECTION '{}' PUBLICATION terrace \
         WITH (create_slot = true, copy_data = false)",
        tree.nodes[0].bridge.conninfo()
    ));
    tree.top.sql(
        "INSERT INTO t SELECT i, repeat('x', i % 50) FROM generate_series(1, 20000) i;
         INSERT INTO t VALUES (0, repeat('long', 10000))",
    );
    tree.top.sql("UPDATE t SET v = 'changed' WHERE id % 3 = 0");
    tree.top.sql("UPDATE t SET id = 100001 WHERE id = 1");
    tree.top.sql("DELETE FROM t WHERE id % 7 = 0");
    wait_for_rows(&tree.top, &subscriber);

    // The relay is gone for a while; the subscriber tries again by itself.
    tree.nodes[0].bridge.kill9();
    tree.top.sql("INSERT INTO t VALUES (100002, 'while away')");
    tree.nodes[0].bridge.restart().expect("start the bridge");
    wait_for_rows(&tree.top, &subscriber);
    tree.top.sql("TRUNCATE t");
    tree.top
        .sql("INSERT INTO t VALUES (1, 'after the truncate')");
    wait_for_rows(&tree.top, &subscriber);

    subscriber.sql("DROP SUBSCRIPTION stock");
    let conninfo = tree.nodes[0].bridge.conninfo();
    let said = manage_slot(&conninfo, "stock", "--drop-slot").expect_err("gone already");
    assert!(said.contains("does not exist"), "{said}");
}

#[test]
fn a_client_that_never_reads_holds_back_nobody() {
    let mut tree = Tree::grow(TABLE, &[("region", None, 1), ("branch", Some("region"), 1)]);
    let conninfo = tree.nodes[0].bridge.conninfo();
    let files = ["stuck", "lively"].map(|name| tree.scratch.path().join(name));
    for slot in ["stuck", "lively"] {
        manage_slot(&conninfo, slot, "--create-slot").expect("create the slot");
    }
    let stuck = receive(&conninfo, "stuck", &files[0]);
    let _lively = receive(&conninfo, "lively", &files[1]);
    tree.top.sql("INSERT INTO t VALUES (0, 'all are here')");
    wait_until("both receive", || {
        files
            .iter()
            .all(|file| place(file, b"all are here").is_some())
    });
    stuck.signal(Signal::SIGSTOP);

    // The kernel asks after hosts that have gone silent (timer 2 is the keepalive).
    let port = format!(":{:04X}", tree.nodes[0].bridge.port);
    let sockets = fs::read_to_string("/proc/net/tcp").expect("read");
    let timers: Vec<&str> = sockets
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|line| line[3] == "01" && (line[1].ends_with(&port) || line[2].ends_with(&port)))
        .map(|line| line[5])
        .collect();
    assert!(
        timers
            .iter()
            .filter(|timer| timer.starts_with("02"))
            .count()
            >= 4,
        "{timers:?}"
    );

    // More than all socket buffers on the way hold.
    for _ in 0..4 {
        tree.top.sql(
            "INSERT INTO t SELECT last + i, repeat(md5(i::text), 100)
             FROM (SELECT coalesce(max(id), 0) AS last FROM t) t, generate_series(1, 5000) i",
        );
    }
    tree.top.sql("INSERT INTO t VALUES (-1, 'the last one')");
    tree.wait_for_equal(&["t"]);
    wait_until("the other client has all", || {
        place(&files[1], b"the last one").is_some()
    });
    assert!(
        place(&files[0], b"the last one").is_none(),
        "it was stopped"
    );
    assert_eq!(
        psql(&conninfo, "SELECT count(*) FROM t").as_deref(),
        Ok("20002\n")
    );
    assert_eq!(
        tree.nodes[0].bridge.stop().and_then(|status| status.code()),
        Some(0),
        "nor does it keep the bridge from stopping"
    );
}
