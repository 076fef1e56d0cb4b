//! Who is let in, and over what.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd,
};
use terrace_tests::bridge::{Bridge, BridgeOptions, bridge_program, options};
use terrace_tests::scratch::free_port;
use terrace_tests::{PASSWORD, Scratch, Server, ServerOptions, Tree, wait_until};

use crate::network::{TABLE, limited, one_server, psql, told, wait_for_rows};

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
        Pair::write(&self.directory, name, &certificate, &key)
    }
}

impl Pair {
    fn write(directory: &Path, name: &str, certificate: &Certificate, key: &KeyPair) -> Pair {
        let pair = Pair {
            certificate: directory.join(format!("{name}.crt")),
            key: directory.join(format!("{name}.key")),
        };
        fs::write(&pair.certificate, certificate.pem()).expect("write");
        fs::write(&pair.key, key.serialize_pem()).expect("write");
        // libpq and Postgres refuse a key that others can read.
        fs::set_permissions(&pair.key, fs::Permissions::from_mode(0o600)).expect("chmod");
        pair
    }

    /// As `openssl req -x509` makes it: its own authority.
    fn self_signed(scratch: &Scratch, name: &str, until: i32) -> Pair {
        let mut params = CertificateParams::new(["relay.test".to_owned()]).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "relay.test");
        params.not_after = date_time_ymd(until, 1, 1);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        Pair::write(scratch.path(), name, &certificate, &key)
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
pub(crate) fn both(scratch: &Scratch, conninfo: &str) -> Result<(), [String; 2]> {
    let ours = status(scratch, conninfo).map(drop);
    let libpq = psql(conninfo, "SELECT 1").map(drop);
    match (ours, libpq) {
        (Ok(()), Ok(())) => Ok(()),
        (Err(ours), Err(libpq)) => Err([ours, libpq]),
        (ours, libpq) => panic!("{conninfo}\nours: {ours:?}\nlibpq: {libpq:?}"),
    }
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

// As the manual of PostgreSQL makes it.
#[test]
fn a_certificate_that_is_trusted_itself_is_good() {
    let scratch = Scratch::new("terrace-").expect("scratch");
    let (good, other, old) = (
        Pair::self_signed(&scratch, "good", 2090),
        Pair::self_signed(&scratch, "other", 2090),
        Pair::self_signed(&scratch, "old", 2020),
    );
    let (tree, server, mut bridge) = one_server(&tls_lines(&good, None));
    let at = |bridge: &Bridge, host: &str, mode: &str, pair: &Pair| {
        format!(
            "host={host} hostaddr=127.0.0.1 port={} user=terrace dbname=app password={PASSWORD} \
             sslmode={mode} sslrootcert={}",
            bridge.port,
            pair.certificate.display()
        )
    };
    for (host, mode) in [
        ("relay.test", "verify-full"),
        ("other.test", "verify-ca"),
        ("other.test", "require"),
    ] {
        both(&scratch, &at(&bridge, host, mode, &good))
            .unwrap_or_else(|said| panic!("{host} {mode}: {said:?}"));
    }
    both(&scratch, &at(&bridge, "other.test", "verify-full", &good)).expect_err("another name");
    both(&scratch, &at(&bridge, "relay.test", "verify-full", &other)).expect_err("another one");
    let mut options = options(&server, "region", &[tree.top.conninfo()]);
    options.extra_relay = tls_lines(&old, None);
    bridge.stop();
    bridge.configure(&options).expect("configure");
    bridge.restart().expect("start");
    let refused = || both(&scratch, &at(&bridge, "relay.test", "verify-full", &old));
    wait_until("an old one is refused", || {
        refused().is_err_and(|[ours, _]| ours.contains("expired"))
    });
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
        let refused = "SELECT count(*) FROM terrace.node_status WHERE self AND state = 'stalled' \
                       AND reason LIKE '%certificate%sslmode%'";
        wait_until("the certificate is refused", || {
            server.value(refused) == "1"
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

    // "allow" begins in plain text and "prefer" with TLS; either goes on the other way where that
    // is refused.
    let rules = tree.top.socket_dir().join("data/pg_hba.conf");
    let text = fs::read_to_string(&rules).expect("read");
    for (id, mode, line, with_tls) in [
        (3, "allow", "hostssl", "t"),
        (4, "prefer", "hostnossl", "f"),
    ] {
        fs::write(&rules, text.replace("\nhost ", &format!("\n{line} "))).expect("write");
        tree.top.sql("SELECT pg_reload_conf()");
        bridge.stop();
        let parent = tree.top.conninfo() + &format!(" sslmode={mode}");
        bridge
            .configure(&options(&server, "region", &[parent]))
            .expect("configure");
        bridge.restart().expect("start");
        tree.top
            .sql(&format!("INSERT INTO t VALUES ({id}, '{mode}')"));
        wait_for_rows(&tree.top, &server);
        assert_eq!(tree.top.value(encrypted), with_tls, "{mode}");
    }
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
    fs::set_permissions(&passfile, fs::Permissions::from_mode(0o640)).expect("chmod");
    let said = status(&passfile).expect_err("others may read it");
    let named = said.contains("passfile\" is open to others");
    assert!(named && said.contains("0600"), "{said}");
    let said = status(Path::new("/nowhere")).expect_err("no password");
    assert!(said.contains("passfile"), "{said}");
}
