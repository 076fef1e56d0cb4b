//! Wrong input and hostile clients: one clear message, and everybody else goes on.

use std::fs::Permissions;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};
use terrace_tests::bridge::{Bridge, BridgeOptions, options};
use terrace_tests::scratch::free_port;
use terrace_tests::server::explain;
use terrace_tests::{Scratch, Server, ServerOptions, Tree, wait_until};

use crate::network::psql;

#[test]
fn check_names_what_is_wrong() {
    let scratch = Scratch::new("terrace-").expect("scratch");
    let start = |name: &str, options: &ServerOptions| {
        Server::start(&scratch, name, options).expect("boot a server")
    };
    let usual = ServerOptions::default();
    let top_options = ServerOptions {
        top: true,
        ..usual.clone()
    };
    let top = start("top", &top_options);
    top.sql("SELECT terrace.create_domain('region')");
    top.sql("CREATE ROLE plain LOGIN REPLICATION PASSWORD 'terrace'");
    let replica = ServerOptions {
        settings: "wal_level = replica".into(),
        ..top_options
    };
    let physical = start("physical", &replica);
    let server = start("server", &usual);
    let bare = start(
        "bare",
        &ServerOptions {
            extension: false,
            ..usual
        },
    );

    let good = options(&server, "region", &[top.conninfo()]);
    let wrong = |url: &str| url.replace("password=terrace", "password=wrong");
    let nobody = format!(
        "host=127.0.0.1 port={} user=terrace dbname=app",
        free_port()
    );
    let with = |change: &dyn Fn(&mut BridgeOptions)| {
        let mut changed = good.clone();
        change(&mut changed);
        changed
    };
    // What is changed, the file, and the words that the message must hold.
    let cases: Vec<(&str, BridgeOptions, &[&str])> = vec![
        (
            "unknown key",
            with(&|o| o.extra_node = "colour = 1".into()),
            &["colour"],
        ),
        (
            "unknown section",
            with(&|o| o.extra = "[paint]\na = 1".into()),
            &["paint"],
        ),
        (
            "missing key",
            with(&|o| o.database = String::new()),
            &["database.url"],
        ),
        (
            "bad name",
            with(&|o| o.domain = "No Good".into()),
            &["node.domain"],
        ),
        (
            "wrong password",
            with(&|o| o.database = wrong(&o.database)),
            &["password"],
        ),
        (
            "wrong parent password",
            with(&|o| o.parents = vec![wrong(&o.parents[0])]),
            &["password"],
        ),
        (
            "a role that may not read",
            with(&|o| o.parents = vec![o.parents[0].replace("user=terrace", "user=plain")]),
            &["\"plain\" may not read", "GRANT terrace_reader"],
        ),
        (
            "nobody there",
            with(&|o| o.database = nobody.clone()),
            &["refused"],
        ),
        (
            "wal_level",
            with(&|o| o.parents = vec![physical.conninfo()]),
            &["wal_level"],
        ),
        (
            "no extension",
            with(&|o| o.database = bare.conninfo()),
            &["extension", "terrace"],
        ),
        (
            "unknown domain",
            with(&|o| o.domain = "nowhere".into()),
            &["nowhere"],
        ),
    ];
    let mut failed = Vec::new();
    for (case, options, words) in cases {
        let bridge = Bridge::prepare(&scratch, &options, free_port()).expect("prepare");
        if case == "missing key" {
            let text = std::fs::read_to_string(bridge.config()).expect("read");
            std::fs::write(bridge.config(), text.replace("url = \"\"", "")).expect("write");
        }
        let output = bridge.run("check").expect("run check");
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        // A missing key is named by its last part.
        let names = |word: &&str| said.contains(word.rsplit('.').next().unwrap_or(word));
        if output.status.code() != Some(1) || !words.iter().all(names) {
            failed.push(format!("{case}: {}\n{said}", output.status));
        }
        if said.contains("password=") || said.contains("panicked") {
            failed.push(format!("{case}: shows a password or panics\n{said}"));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));

    let bridge = Bridge::prepare(&scratch, &good, free_port()).expect("prepare");
    let output = bridge.run("check").expect("run check");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(
        output.status.code(),
        Some(0),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let output = bridge.run("nonsense").expect("run");
    assert_eq!(output.status.code(), Some(2), "wrong usage");
}

#[test]
fn a_bad_file_ends_the_bridge_and_a_bad_password_does_not_lose_it() {
    let scratch = Scratch::new("terrace-").expect("scratch");
    let top = Server::top(&scratch).expect("boot the top");
    let server = Server::start(&scratch, "server", &ServerOptions::default()).expect("boot");
    top.sql(
        "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1);
             SELECT terrace.create_domain('region'), terrace.add_table('t')",
    );
    let good = options(&server, "region", &[top.conninfo()]);

    let bad = BridgeOptions {
        extra_node: "colour = 1".into(),
        ..good.clone()
    };
    let mut bridge = Bridge::start(&scratch, &bad).expect("start");
    let status = bridge
        .wait(Duration::from_secs(10))
        .expect("the bridge ends");
    assert_eq!(status.code(), Some(1));
    assert!(bridge.logged().contains("colour"), "{}", bridge.logged());

    // The password is mended at the server: the bridge goes on by itself.
    bridge.configure(&good).expect("configure");
    top.sql("ALTER ROLE terrace PASSWORD 'other'");
    bridge.restart().expect("start");
    let told = |words: &str| {
        let reason =
            server.value("SELECT reason FROM terrace.node_status WHERE self AND state = 'stalled'");
        reason.contains(words) && bridge.logged().contains(words)
    };
    wait_until("the password is named", || {
        told("password authentication failed") && told("correct the password")
    });
    // Not only at first.
    std::thread::sleep(Duration::from_secs(5));
    assert!(told("password authentication failed"));
    assert!(bridge.is_running(), "{}", bridge.logged());
    top.sql("ALTER ROLE terrace PASSWORD 'terrace'");
    wait_until("the row arrives", || {
        server
            .checksum("t")
            .is_ok_and(|sum| sum.starts_with("1 rows"))
    });
    assert_eq!(
        bridge.stop().and_then(|status| status.code()),
        Some(0),
        "SIGTERM ends it well"
    );
}

#[test]
fn hostile_clients_do_not_harm_the_bridge() {
    let mut tree = Tree::grow(
        "CREATE TABLE t (id int PRIMARY KEY); SELECT terrace.add_table('t')",
        &[("region", None, 1)],
    );
    let port = tree.nodes[0].bridge.port;
    let connect = || {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("connect");
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .expect("timeout");
        stream
    };
    let startup = |length: u32, rest: &[u8]| [&length.to_be_bytes()[..], rest].concat();
    let version: [u8; 4] = [0, 3, 0, 0];
    let hostile: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", vec![]),
        ("garbage", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("zeros", vec![0; 64]),
        ("length 2^31", startup(1 << 31, &version)),
        ("length 2^32 - 1", startup(u32::MAX, &version)),
        ("length 3", startup(3, &version)),
        ("no terminator", startup(16, b"\0\x03\0\0user\0abc")),
        ("no user", startup(9, b"\0\x03\0\0\0")),
        ("a bad first answer", {
            let mut bytes = startup(22, b"\0\x03\0\0user\0terrace\0\0");
            bytes.extend_from_slice(b"p\xff\xff\xff\xffSCRAM");
            bytes
        }),
        ("a query instead of a password", {
            let mut bytes = startup(22, b"\0\x03\0\0user\0terrace\0\0");
            bytes.extend_from_slice(b"Q\0\0\0\x0dselect 1\0");
            bytes
        }),
    ];
    // Some only hang there while everything else goes on, and are hung up on.
    let half_open: Vec<TcpStream> = (0..20)
        .map(|_| {
            let mut stream = connect();
            stream.write_all(&startup(100, &version)).expect("write");
            stream
        })
        .collect();
    for (case, bytes) in hostile {
        let mut stream = connect();
        // The bridge may have hung up already, which is what we want.
        let _ = stream.write_all(&bytes);
        // What is wrong in itself ends the connection, without an end from us.
        if case == "nothing" {
            let _ = stream.shutdown(Shutdown::Write);
        }
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{case}"),
        }
        assert!(answer.len() < 10_000, "{case}: {} bytes", answer.len());
        assert!(
            !answer.starts_with(b"R\0\0\0\x08\0\0\0\0"),
            "{case}: let in"
        );
    }
    let wrong = tree.nodes[0]
        .bridge
        .conninfo()
        .replace("password=terrace", "password=wrong");
    let refused = Client::connect(&wrong, NoTls).err().expect("a refusal");
    assert_eq!(
        refused.code().map(|code| code.code()),
        Some("28P01"),
        "{refused}"
    );
    let stranger = tree.nodes[0]
        .bridge
        .conninfo()
        .replace("user=terrace", "user=postgres");
    let refused = Client::connect(&stranger, NoTls).err().expect("a refusal");
    assert_eq!(
        refused.code().map(|code| code.code()),
        Some("28P01"),
        "{refused}"
    );

    // SQL passes, but only to read.
    let mut client = tree.nodes[0].bridge.try_connect().expect("an SQL session");
    assert_eq!(client.query("SELECT * FROM t", &[]).expect("read").len(), 0);
    client
        .batch_execute("INSERT INTO t VALUES (7)")
        .expect_err("may not write");
    let server = &tree.nodes[0].server;
    server.sql("CREATE TABLE secret (word text)");
    client
        .batch_execute("SELECT * FROM secret")
        .expect_err("may not read what is not synchronised");
    let superuser = "SELECT pg_read_file('postgresql.conf')";
    client
        .batch_execute(superuser)
        .expect_err("may not read files");

    tree.top.sql("INSERT INTO t VALUES (1)");
    tree.wait_for_equal(&["t"]);
    assert!(tree.nodes[0].bridge.is_running());
    assert!(!tree.nodes[0].bridge.logged().contains("panicked"));
    for mut stream in half_open {
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "half-open"),
        }
    }
    for page in ["/healthz", "/readyz", "/metrics"] {
        let answer = tree.nodes[0].bridge.get(page).expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 200"), "{page}: {answer}");
    }
    assert_eq!(
        tree.nodes[0].bridge.stop().and_then(|status| status.code()),
        Some(0)
    );
}

#[test]
fn a_data_directory_is_used_once() {
    let tree = Tree::grow(
        "CREATE TABLE t (id int PRIMARY KEY); SELECT terrace.add_table('t')",
        &[("region", None, 1)],
    );
    let node = &tree.nodes[0];
    let output = node.bridge.run("run").expect("run a second one");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("is in use by another terrace-bridge"),
        "{said}"
    );
    tree.top.sql("INSERT INTO t VALUES (1)");
    tree.wait_for_equal(&["t"]);
}

#[test]
fn a_node_name_is_used_once() {
    let mut tree = Tree::grow(
        "CREATE TABLE t (id int PRIMARY KEY); SELECT terrace.add_table('t')",
        &[("region", None, 1)],
    );
    tree.top.sql("SELECT terrace.create_domain('other')");
    let directory = Scratch::new("terrace-").expect("scratch");
    let server = Server::start(&directory, "second", &ServerOptions::default()).expect("boot");
    let mut twin = options(&server, "other", &[tree.top.conninfo()]);
    twin.node = "region-1".into();
    let check = |bridge: &Bridge| {
        let output = bridge.run("check").expect("run check");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.code(), said)
    };
    let mut bridge = Bridge::prepare(&directory, &twin, free_port()).expect("prepare");
    let (code, said) = check(&bridge);
    assert!(
        code == Some(1) && said.contains("\"region-1\" is already in use"),
        "{said}"
    );
    let (code, said) = check(&tree.nodes[0].bridge);
    assert_eq!(code, Some(0), "{said}");
    bridge.restart().expect("start");
    wait_until("the name is refused", || {
        bridge.logged().contains("already in use")
    });
    tree.top.sql("INSERT INTO t VALUES (1)");
    tree.wait_for_equal(&["t"]);
    assert!(tree.nodes[0].bridge.is_running());
}

// A role may change itself: one client could keep all others out, past the next start, or
// give itself a password for the Postgres behind the relay.
#[test]
fn a_client_cannot_change_what_it_runs_under() {
    let mut tree = Tree::grow(
        "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1); SELECT terrace.add_table('t')",
        &[("region", None, 1)],
    );
    // What a client wants to be set, and may not, is no fault of the role.
    let conninfo = tree.nodes[0].bridge.conninfo();
    psql(
        &format!("{conninfo} options='-c role=postgres'"),
        "SELECT 1",
    )
    .expect_err("a refusal");
    let logged = tree.nodes[0].bridge.logged();
    assert!(!logged.contains("has been changed"), "{logged}");
    let node = &tree.nodes[0];
    // What others left open to everybody, also with somebody else's rights.
    node.server.sql(
        "CREATE TABLE open (a int); GRANT ALL ON open TO PUBLIC;
         CREATE FUNCTION note() RETURNS void LANGUAGE sql SECURITY DEFINER AS 'INSERT INTO public.open VALUES (1)'",
    );
    let mut passed = Vec::new();
    for sql in [
        "ALTER ROLE terrace_relay PASSWORD 'mine'",
        "ALTER USER CURRENT_USER PASSWORD NULL",
        "ALTER ROLE terrace_relay SET statement_timeout = 1",
        "ALTER ROLE terrace_relay IN DATABASE app SET search_path = 'nowhere'",
        "ALTER ROLE terrace_relay RESET ALL",
        "GRANT terrace_relay TO terrace_reader",
        "SET ROLE terrace_reader; DROP OWNED BY terrace_reader",
        "DO $$ BEGIN EXECUTE 'ALTER ROLE terrace_relay SET lock_timeout = 1'; END $$",
        "CREATE TEMP TABLE x (a int)",
        "SELECT 1 AS a INTO TEMP x",
        "INSERT INTO open VALUES (1)",
        "DELETE FROM open",
        "COPY open FROM STDIN",
        "WITH w AS (INSERT INTO open VALUES (1) RETURNING a) SELECT * FROM w",
        "SELECT note()",
        "DO $$ BEGIN PERFORM note(); END $$",
        "BEGIN; SELECT * FROM t; PREPARE TRANSACTION 'stays'",
        "SELECT lo_create(0)",
        "SELECT lo_from_bytea(0, 'x')",
        "SELECT pg_notify('a', 'b')",
        "NOTIFY a",
        "SELECT pg_logical_emit_message(true, 'terrace.send', '{}')",
        "SELECT terrace.send('a', 'b')",
        "SELECT terrace.attach_table('public', 't')",
    ] {
        let mut client = node.bridge.try_connect().expect("an SQL session");
        if client.batch_execute(sql).is_ok() {
            passed.push(sql);
        }
    }
    for sql in [
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; LOCK TABLE t IN ACCESS SHARE MODE; \
         SAVEPOINT a; DECLARE c CURSOR FOR SELECT * FROM t; FETCH c; CLOSE c; ROLLBACK TO a; COMMIT",
        "SET statement_timeout = '1min'; SHOW statement_timeout; RESET statement_timeout",
        "DISCARD ALL",
        "PREPARE p AS SELECT * FROM t; EXECUTE p; DEALLOCATE p; EXPLAIN SELECT * FROM t; LISTEN x; UNLISTEN *",
        "SELECT terrace.report('{\"nodes\": [], \"events\": []}'); SELECT * FROM terrace.lag",
    ] {
        let mut client = node.bridge.try_connect().expect("an SQL session");
        client
            .batch_execute(sql)
            .unwrap_or_else(|error| panic!("{sql}: {}", explain(&error)));
    }
    assert!(passed.is_empty(), "{passed:#?}");
    assert_eq!(node.server.value("SELECT count(*) FROM open"), "0");
    let settings = "SELECT count(*) FROM pg_db_role_setting s JOIN pg_roles r ON r.oid = s.setrole \
                    WHERE rolname = 'terrace_relay'";
    assert_eq!(node.server.value(settings), "0");

    // Whatever became of the role, the next session has it as it must be.
    node.server.sql(
        "ALTER ROLE terrace_relay NOLOGIN CREATEDB PASSWORD 'other' VALID UNTIL '2020-01-01';
         ALTER ROLE terrace_relay SET statement_timeout = 1;
         ALTER ROLE terrace_relay IN DATABASE app SET default_transaction_isolation = 'serializable';
         REVOKE terrace_reader FROM terrace_relay",
    );
    let mut client = node.bridge.try_connect().expect("an SQL session");
    client
        .batch_execute("SELECT pg_sleep(0.1) FROM t")
        .expect("no timeout");
    assert_eq!(node.server.value(settings), "0");
    let attributes =
        "SELECT rolcreatedb, rolcanlogin FROM pg_roles WHERE rolname = 'terrace_relay'";
    assert_eq!(node.server.rows(attributes), [["f", "t"]]);
    // Settings alone are put right by the next start.
    node.server
        .sql("ALTER ROLE terrace_relay SET statement_timeout = 1");
    tree.nodes[0].bridge.stop();
    tree.start_bridges().expect("start the bridge");
    wait_until("sessions work", || {
        let client = tree.nodes[0].bridge.try_connect();
        client.is_ok_and(|mut client| client.batch_execute("SELECT pg_sleep(0.1)").is_ok())
    });
}

#[test]
fn what_is_on_disk_is_for_the_bridge_alone() {
    let mut tree =
        Tree::plant("CREATE TABLE t (id int PRIMARY KEY); SELECT terrace.add_table('t')")
            .expect("boot the top");
    tree.boot(&[("region", None, 1)]).expect("boot the server");
    let data = tree.nodes[0].bridge.directory().join("data");
    // Made by an administrator, or by an older bridge.
    std::fs::create_dir(&data).expect("make the directory");
    std::fs::set_permissions(&data, Permissions::from_mode(0o755)).expect("chmod");
    tree.start_bridges().expect("start the bridge");
    tree.wait_streaming();
    tree.top.sql("INSERT INTO t VALUES (1)");
    tree.wait_for_equal(&["t"]);
    let (mut open, mut seen, mut waiting) = (Vec::new(), 0, vec![data]);
    while let Some(path) = waiting.pop() {
        let state = std::fs::symlink_metadata(&path).expect("stat");
        let mode = state.permissions().mode() & 0o777;
        seen += 1;
        if mode & 0o077 != 0 {
            open.push(format!("{} {mode:o}", path.display()));
        }
        if state.is_dir() {
            let entries = std::fs::read_dir(&path).expect("list");
            waiting.extend(entries.map(|entry| entry.expect("entry").path()));
        }
    }
    assert!(seen > 4, "the queue and the socket are there");
    assert!(open.is_empty(), "{open:#?}");
}

// Connections that say nothing took all places of the relay for 10 s each.
#[test]
fn idle_connections_keep_nobody_out() {
    let mut tree = Tree::grow(
        "CREATE TABLE t (id int PRIMARY KEY); SELECT terrace.add_table('t')",
        &[("region", None, 2)],
    );
    let bridge = &tree.nodes[0].bridge;
    let connect = || TcpStream::connect(("127.0.0.1", bridge.port));
    let idle: Vec<TcpStream> = (0..650).filter_map(|_| connect().ok()).collect();
    for _ in 0..5 {
        let started = Instant::now();
        let mut client = bridge.try_connect().expect("an SQL session");
        client.batch_execute("SELECT 1").expect("an answer");
        let waited = started.elapsed();
        assert!(waited < Duration::from_secs(3), "waited {waited:?}");
    }
    tree.top.sql("INSERT INTO t VALUES (1)");
    tree.wait_for_equal(&["t"]);
    // Half a question on the other port takes no descriptors, and nobody waits for its end.
    let half = |port: u16| {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("connect");
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\n")
            .expect("write");
        stream
    };
    let bridge = &mut tree.nodes[0].bridge;
    drop(idle);
    let halves: Vec<TcpStream> = (0..300).map(|_| half(bridge.http_port)).collect();
    wait_until("few are let in", || {
        (64..150).contains(&bridge.descriptors())
    });
    let started = Instant::now();
    bridge.stop();
    let took = started.elapsed();
    assert!(took < Duration::from_secs(6), "it ended after {took:?}");
    drop(halves);
}
