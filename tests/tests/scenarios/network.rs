//! Who is let in, over what, and that PostgreSQL's own clients feel at home.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::signal::Signal;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use terrace_tests::bridge::{Bridge, BridgeOptions, bridge_program, options};
use terrace_tests::process::{Process, command};
use terrace_tests::scratch::free_port;
use terrace_tests::server::program;
use terrace_tests::{PASSWORD, Scratch, Server, ServerOptions, Tree, wait_until};

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT terrace.add_table('t')";

// ----- certificates -----------------------------------------------------------

/// One that signs certificates, for tests only.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    directory: PathBuf,
    /// Its own certificate.
    file: PathBuf,
}

/// A certificate and its key.
struct Pair {
    certificate: PathBuf,
    key: PathBuf,
}

impl Authority {
    fn new(scratch: &Scratch, name: &str) -> Authority {
        let directory = scratch.path().join(name);
        fs::create_dir(&directory).expect("a directory");
        let mut params = CertificateParams::new([]).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        let file = directory.join("ca.crt");
        fs::write(&file, certificate.pem()).expect("write");
        Authority {
            issuer: Issuer::new(params, key),
            directory,
            file,
        }
    }

    fn issue(&self, name: &str) -> Pair {
        let mut params = CertificateParams::new([name.to_owned()]).expect("parameters");
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        let pair = Pair {
            certificate: self.directory.join(format!("{name}.crt")),
            key: self.directory.join(format!("{name}.key")),
        };
        fs::write(&pair.certificate, certificate.pem()).expect("write");
        fs::write(&pair.key, key.serialize_pem()).expect("write");
        // libpq and Postgres refuse a key that others can read.
        fs::set_permissions(&pair.key, fs::Permissions::from_mode(0o600)).expect("chmod");
        pair
    }
}

/// Lines for `[relay]`.
fn tls_lines(pair: &Pair, client_ca: Option<&Authority>) -> String {
    let mut lines = format!(
        "tls_cert = \"{}\"\ntls_key = \"{}\"\n",
        pair.certificate.display(),
        pair.key.display()
    );
    if let Some(authority) = client_ca {
        lines += &format!("tls_client_ca = \"{}\"\n", authority.file.display());
    }
    lines
}

// ----- clients ----------------------------------------------------------------

fn limited(program: &str) -> Command {
    let mut command = Command::new("timeout");
    command.arg("60").arg(program).stdin(Stdio::null());
    command
}

fn told(output: Output) -> Result<String, String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stderr))
    }
}

/// What libpq makes of a connection string.
fn psql(conninfo: &str, sql: &str) -> Result<String, String> {
    let mut psql = limited(&program("psql"));
    psql.args(["-XAtq", "-d", conninfo, "-c", sql]);
    told(psql.output().expect("run psql"))
}

/// What our client makes of it: `status` only connects and reads.
fn status(scratch: &Scratch, conninfo: &str) -> Result<String, String> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let options = BridgeOptions {
        node: format!("probe-{}", NEXT.fetch_add(1, Ordering::Relaxed)),
        domain: "probe".into(),
        database: conninfo.into(),
        ..Default::default()
    };
    let probe = Bridge::prepare(scratch, &options, free_port()).expect("prepare");
    told(probe.run("status").expect("run status"))
}

/// Both clients agree; gives what was said against it.
fn both(scratch: &Scratch, conninfo: &str) -> Result<(), [String; 2]> {
    let ours = status(scratch, conninfo).map(drop);
    let libpq = psql(conninfo, "SELECT 1").map(drop);
    match (ours, libpq) {
        (Ok(()), Ok(())) => Ok(()),
        (Err(ours), Err(libpq)) => Err([ours, libpq]),
        (ours, libpq) => panic!("{conninfo}\nours: {ours:?}\nlibpq: {libpq:?}"),
    }
}

/// A top and one server, whose bridge has `relay` in its section `[relay]`.
fn one_server(relay: &str) -> (Tree, Server, Bridge) {
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
fn wait_for_rows(top: &Server, server: &Server) {
    let wanted = top.checksum("t").expect("checksum");
    wait_until("the rows arrive", || {
        server.checksum("t").is_ok_and(|sum| sum == wanted)
    });
}

// ----- TLS --------------------------------------------------------------------

#[test]
fn a_relay_with_tls_is_what_its_certificate_says() {
    let scratch = Scratch::new("terrace-").expect("scratch");
    let (good, other) = (
        Authority::new(&scratch, "good"),
        Authority::new(&scratch, "other"),
    );
    let pair = good.issue("relay.test");
    let (tree, _server, bridge) = one_server(&tls_lines(&pair, None));
    let at = |host: &str, more: &str| {
        format!(
            "host={host} hostaddr=127.0.0.1 port={} user=terrace dbname=app {more}",
            bridge.port
        )
    };
    let password = format!("password={PASSWORD}");
    let ca = |authority: &Authority| format!("{password} sslrootcert={}", authority.file.display());

    for (host, more) in [
        ("relay.test", format!("{} sslmode=verify-full", ca(&good))),
        ("other.test", format!("{} sslmode=verify-ca", ca(&good))),
        ("127.0.0.1", format!("{} sslmode=verify-ca", ca(&good))),
        ("other.test", format!("{password} sslmode=require")),
        ("other.test", format!("{password} sslmode=prefer")),
        (
            "relay.test",
            format!("{} sslmode=verify-full channel_binding=require", ca(&good)),
        ),
        (
            "relay.test",
            format!("{} sslmode=verify-full channel_binding=disable", ca(&good)),
        ),
    ] {
        both(&scratch, &at(host, &more)).unwrap_or_else(|said| panic!("{host} {more}: {said:?}"));
    }
    for (host, more, words) in [
        ("relay.test", format!("{password} sslmode=disable"), "TLS"),
        (
            "relay.test",
            format!("{} sslmode=verify-full", ca(&other)),
            "certificate",
        ),
        (
            "relay.test",
            format!("{} sslmode=verify-ca", ca(&other)),
            "certificate",
        ),
        (
            "relay.test",
            format!("{} sslmode=require", ca(&other)),
            "certificate",
        ),
        (
            "other.test",
            format!("{} sslmode=verify-full", ca(&good)),
            "other.test",
        ),
        (
            "relay.test",
            format!(
                "password=wrong sslrootcert={} sslmode=verify-full channel_binding=require",
                good.file.display()
            ),
            "password authentication failed",
        ),
    ] {
        let said = both(&scratch, &at(host, &more)).expect_err("a refusal");
        for said in said {
            assert!(said.contains(words), "{host} {more}: {said}");
        }
    }

    // A child domain comes in with all of it, and its password from a file.
    let passfile = scratch.path().join("passfile");
    let line = format!("relay.test:{}:app:terrace:{PASSWORD}\n", bridge.port);
    fs::write(&passfile, line).expect("write");
    fs::set_permissions(&passfile, fs::Permissions::from_mode(0o600)).expect("chmod");
    tree.top.sql(
        "INSERT INTO t VALUES (1, 'copied'); SELECT terrace.create_domain('branch', 'region')",
    );
    let child = Server::start(&scratch, "branch-1", &ServerOptions::default()).expect("boot");
    let parent = at(
        "relay.test",
        &format!(
            "passfile={} sslrootcert={} sslmode=verify-full channel_binding=require",
            passfile.display(),
            good.file.display()
        ),
    );
    let _child_bridge =
        Bridge::start(&scratch, &options(&child, "branch", &[parent])).expect("start the bridge");
    wait_for_rows(&tree.top, &child);
    tree.top.sql("INSERT INTO t VALUES (2, 'streamed')");
    wait_for_rows(&tree.top, &child);
}

#[test]
fn a_relay_with_a_client_authority_wants_a_certificate() {
    let scratch = Scratch::new("terrace-").expect("scratch");
    let (servers, clients) = (
        Authority::new(&scratch, "servers"),
        Authority::new(&scratch, "clients"),
    );
    let pair = servers.issue("relay.test");
    let (tree, _server, bridge) = one_server(&tls_lines(&pair, Some(&clients)));
    let base = format!(
        "host=relay.test hostaddr=127.0.0.1 port={} user=terrace password={PASSWORD} dbname=app \
         sslmode=verify-full sslrootcert={}",
        bridge.port,
        servers.file.display()
    );
    let with = |pair: &Pair| {
        let (certificate, key) = (pair.certificate.display(), pair.key.display());
        format!("{base} sslcert={certificate} sslkey={key}")
    };
    let client = clients.issue("branch-1");
    both(&scratch, &with(&client)).unwrap_or_else(|said| panic!("{said:?}"));
    both(&scratch, &base).expect_err("no certificate");
    both(&scratch, &with(&servers.issue("branch-1"))).expect_err("of another authority");
    // The certificate is in addition to the password, not instead of it.
    let wrong = with(&client).replace("password=terrace", "password=wrong");
    let said = both(&scratch, &wrong).expect_err("a wrong password");
    assert!(said[0].contains("password authentication"), "{said:?}");

    tree.top
        .sql("SELECT terrace.create_domain('branch', 'region')");
    let child = Server::start(&scratch, "branch-1", &ServerOptions::default()).expect("boot");
    let _child_bridge = Bridge::start(&scratch, &options(&child, "branch", &[with(&client)]))
        .expect("start the bridge");
    tree.top.sql("INSERT INTO t VALUES (1, 'streamed')");
    wait_for_rows(&tree.top, &child);
}

/// Gives a running server a certificate.
fn turn_on_tls(server: &Server, pair: &Pair) {
    let data = server.socket_dir().join("data");
    let owner = fs::metadata(&data).expect("the data directory");
    for (from, name) in [(&pair.certificate, "server.crt"), (&pair.key, "server.key")] {
        let to = data.join(name);
        fs::copy(from, &to).expect("copy");
        chown(&to, Some(owner.uid()), Some(owner.gid())).expect("chown");
    }
    server.sql("ALTER SYSTEM SET ssl = on");
    server.sql("SELECT pg_reload_conf()");
    wait_until("the server has TLS", || server.value("SHOW ssl") == "on");
}

#[test]
fn the_top_may_be_reached_over_tls() {
    let tree = Tree::plant(TABLE).expect("boot the top");
    let (good, other) = (
        Authority::new(&tree.scratch, "good"),
        Authority::new(&tree.scratch, "other"),
    );
    turn_on_tls(&tree.top, &good.issue("hq.test"));
    tree.top
        .sql("INSERT INTO t VALUES (1, 'copied'); SELECT terrace.create_domain('region')");
    let server =
        Server::start(&tree.scratch, "region-1", &ServerOptions::default()).expect("boot a server");
    let parent = |host: &str, authority: &Authority| {
        tree.top.conninfo().replace(
            "host=127.0.0.1",
            &format!(
                "host={host} hostaddr=127.0.0.1 sslmode=verify-full channel_binding=require \
                 sslrootcert={}",
                authority.file.display()
            ),
        )
    };
    let mut bridge = Bridge::prepare(&tree.scratch, &options(&server, "region", &[]), free_port())
        .expect("prepare");
    for (host, authority) in [("hq.test", &other), ("other.test", &good)] {
        let wrong = options(&server, "region", &[parent(host, authority)]);
        bridge.configure(&wrong).expect("configure");
        bridge.restart().expect("start");
        wait_until("the certificate is refused", || {
            bridge.logged().contains("certificate")
        });
        bridge.stop();
        fs::remove_file(bridge.log()).expect("remove the log");
        assert_eq!(
            tree.top.value("SELECT count(*) FROM pg_replication_slots"),
            "0"
        );
    }
    let right = options(&server, "region", &[parent("hq.test", &good)]);
    bridge.configure(&right).expect("configure");
    bridge.restart().expect("start");
    wait_for_rows(&tree.top, &server);
    tree.top.sql("INSERT INTO t VALUES (2, 'streamed')");
    wait_for_rows(&tree.top, &server);
    let encrypted = "SELECT bool_and(ssl) FROM pg_stat_replication JOIN pg_stat_ssl USING (pid)";
    assert_eq!(tree.top.value(encrypted), "t");

    // "allow" begins in plain text, and goes on with TLS where that is refused.
    let rules = tree.top.socket_dir().join("data/pg_hba.conf");
    let text = fs::read_to_string(&rules).expect("read");
    fs::write(&rules, text.replace("\nhost ", "\nhostssl ")).expect("write");
    tree.top.sql("SELECT pg_reload_conf()");
    bridge.stop();
    let allowing = tree.top.conninfo() + " sslmode=allow";
    bridge
        .configure(&options(&server, "region", &[allowing]))
        .expect("configure");
    bridge.restart().expect("start");
    tree.top.sql("INSERT INTO t VALUES (3, 'allowed')");
    wait_for_rows(&tree.top, &server);
    assert_eq!(tree.top.value(encrypted), "t");
}

#[test]
fn a_port_for_others_needs_an_auth_file() {
    let scratch = Scratch::new("terrace-").expect("scratch");
    let open = BridgeOptions {
        node: "open".into(),
        domain: "region".into(),
        database: "host=127.0.0.1 user=terrace dbname=app".into(),
        ..Default::default()
    };
    let bridge = Bridge::prepare(&scratch, &open, free_port()).expect("prepare");
    let text = fs::read_to_string(bridge.config()).expect("read");
    let lines = text.lines().filter(|line| !line.starts_with("auth_file"));
    let text = lines.collect::<Vec<_>>().join("\n");
    for address in ["0.0.0.0", "[::]", "192.0.2.1", "example.org"] {
        let listen = format!("listen = \"{address}:{}\"", bridge.port);
        let text = text.replace(&format!("listen = \"127.0.0.1:{}\"", bridge.port), &listen);
        fs::write(bridge.config(), text).expect("write");
        let output = bridge.run("run").expect("run");
        assert_eq!(output.status.code(), Some(1), "{address}");
        let said = told(output).expect_err("a refusal");
        assert!(said.contains("relay.auth_file"), "{address}: {said}");
    }
}

#[test]
fn the_password_file_may_be_named_by_the_environment() {
    let scratch = Scratch::new("terrace-").expect("scratch");
    let server = Server::start(&scratch, "server", &ServerOptions::default()).expect("boot");
    let passfile = scratch.path().join("passfile");
    fs::write(&passfile, format!("*:*:app:terrace:{PASSWORD}\n")).expect("write");
    fs::set_permissions(&passfile, fs::Permissions::from_mode(0o600)).expect("chmod");
    let database = server
        .conninfo()
        .replace(&format!(" password={PASSWORD}"), "");
    let options = BridgeOptions {
        node: "probe".into(),
        domain: "probe".into(),
        database,
        ..Default::default()
    };
    let probe = Bridge::prepare(&scratch, &options, free_port()).expect("prepare");
    let status = |passfile: &Path| {
        let mut status = limited(&bridge_program().to_string_lossy());
        status
            .args(["status", "-c"])
            .arg(probe.config())
            .env("PGPASSFILE", passfile)
            .env("HOME", scratch.path());
        told(status.output().expect("run status"))
    };
    status(&passfile).unwrap_or_else(|said| panic!("{said}"));
    let said = status(Path::new("/nowhere")).expect_err("no password");
    assert!(said.contains("passfile"), "{said}");
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
            "INSERT INTO t SELECT coalesce(max(id), 0) + i, repeat(md5(i::text), 100)
             FROM t, generate_series(1, 5000) i GROUP BY i",
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
