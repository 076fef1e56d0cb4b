//! Real servers for tests: [`Server`] is a Postgres, [`Bridge`] a terrace-bridge,
//! [`Tree`] a top with domains below it.
//!
//! Everything lives in one temporary directory, which is kept when a test fails,
//! and every process ends with the test, however that ends.

use std::fs;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use tokio_postgres::{Client, NoTls};

/// How long anything may take that a test waits for.
pub const PATIENCE: Duration = Duration::from_secs(60);
const PASSWORD: &str = "terrace";

/// A port that nobody listens on now.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind a free port");
    listener.local_addr().expect("its address").port()
}

fn bin_dir() -> PathBuf {
    let config = std::env::var("PG_CONFIG").unwrap_or_else(|_| "pg_config".into());
    let output = Command::new(&config)
        .arg("--bindir")
        .output()
        .expect("run pg_config");
    PathBuf::from(String::from_utf8(output.stdout).expect("bindir").trim())
}

/// User and group that Postgres runs as: itself refuses root.
fn postgres_ids() -> Option<(u32, u32)> {
    static IDS: OnceLock<Option<(u32, u32)>> = OnceLock::new();
    *IDS.get_or_init(|| {
        let id = |flag: &str, user: &str| {
            let output = Command::new("id").args([flag, user]).output().ok()?;
            String::from_utf8(output.stdout)
                .ok()?
                .trim()
                .parse::<u32>()
                .ok()
        };
        let own = Command::new("id").arg("-u").output().ok()?;
        if String::from_utf8_lossy(&own.stdout).trim() != "0" {
            return None;
        }
        Some((id("-u", "postgres")?, id("-g", "postgres")?))
    })
}

fn as_postgres(program: &Path) -> Command {
    let mut command = Command::new(program);
    if let Some((uid, gid)) = postgres_ids() {
        command.uid(uid).gid(gid);
    }
    command.current_dir("/");
    command
}

fn give_to_postgres(path: &Path) {
    if let Some((uid, gid)) = postgres_ids() {
        std::os::unix::fs::chown(path, Some(uid), Some(gid)).expect("chown");
    }
}

/// Sends a signal to a child.
pub fn signal(child: &Child, name: &str) {
    let pid = child.id().to_string();
    Command::new("kill")
        .args([&format!("-{name}"), &pid])
        .status()
        .expect("run kill");
}

/// A directory for one test.
pub struct Scratch {
    dir: PathBuf,
}

impl Scratch {
    /// Makes it, open to the user that Postgres runs as.
    pub fn new() -> Scratch {
        let dir = tempfile::Builder::new()
            .prefix("terrace-")
            .tempdir()
            .expect("temporary dir");
        let dir = dir.keep();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&dir, open).expect("chmod");
        Scratch { dir }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.dir
    }
}

impl Default for Scratch {
    fn default() -> Scratch {
        Scratch::new()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("logs and data are kept in {}", self.dir.display());
        } else {
            fs::remove_dir_all(&self.dir).ok();
        }
    }
}

/// A Postgres with database `app` and the extension.
pub struct Server {
    /// For people.
    pub name: String,
    /// TCP port on 127.0.0.1.
    pub port: u16,
    dir: PathBuf,
    child: Option<Child>,
}

impl Server {
    /// Makes a cluster and starts it.
    pub fn start(scratch: &Scratch, name: &str) -> Server {
        let dir = scratch.path().join(name);
        fs::create_dir(&dir).expect("server dir");
        give_to_postgres(&dir);
        let data = dir.join("data");
        let made = as_postgres(&bin_dir().join("initdb"))
            .args(["-D"])
            .arg(&data)
            .args([
                "-U",
                "postgres",
                "--auth=trust",
                "--no-sync",
                "-E",
                "UTF8",
                "--locale=C.UTF-8",
            ])
            .output()
            .expect("run initdb");
        assert!(
            made.status.success(),
            "initdb: {}",
            String::from_utf8_lossy(&made.stderr)
        );
        let port = free_port();
        let conf = format!(
            "\nport = {port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{}'\n\
             wal_level = logical\nfsync = off\nshared_buffers = 32MB\nmax_connections = 60\n\
             max_wal_senders = 20\nmax_replication_slots = 20\nlogging_collector = off\n\
             log_line_prefix = '%m [%p] %a '\n",
            dir.display()
        );
        let path = data.join("postgresql.conf");
        let text = fs::read_to_string(&path).expect("postgresql.conf");
        fs::write(&path, text + &conf).expect("postgresql.conf");
        let hba = "local all postgres trust\nlocal all all scram-sha-256\n\
                   host all all 127.0.0.1/32 scram-sha-256\n\
                   host replication all 127.0.0.1/32 scram-sha-256\n";
        fs::write(data.join("pg_hba.conf"), hba).expect("pg_hba.conf");
        let mut server = Server {
            name: name.into(),
            port,
            dir,
            child: None,
        };
        server.resume();
        server
    }

    /// Starts the cluster again.
    pub fn resume(&mut self) {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("log"));
        let log = log.expect("server log");
        let child = as_postgres(&bin_dir().join("postgres"))
            .arg("-D")
            .arg(self.dir.join("data"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("log"))
            .stderr(log)
            .spawn()
            .expect("start postgres");
        self.child = Some(child);
    }

    /// Kills the postmaster outright and waits for its children to notice.
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            signal(&child, "KILL");
            child.wait().expect("wait for postgres");
            fs::remove_file(self.dir.join("data/postmaster.pid")).ok();
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    /// Connection string of a role, over the socket.
    pub fn url(&self, user: &str, dbname: &str) -> String {
        let dir = self.dir.display();
        let port = self.port;
        format!("host={dir} port={port} user={user} password={PASSWORD} dbname={dbname}")
    }

    /// Connection string over TCP, as other hosts would use it.
    pub fn tcp_url(&self) -> String {
        let port = self.port;
        format!("host=127.0.0.1 port={port} user=terrace password={PASSWORD} dbname=app")
    }

    /// A session as superuser, once the server is up.
    pub async fn connect_to(&self, dbname: &str) -> Client {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match tokio_postgres::connect(&self.url("postgres", dbname), NoTls).await {
                Ok((client, connection)) => {
                    tokio::spawn(connection);
                    return client;
                }
                Err(error) => {
                    assert!(
                        Instant::now() < deadline,
                        "{} does not come up: {error}",
                        self.name
                    );
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    /// A session on database `app`.
    pub async fn connect(&self) -> Client {
        self.connect_to("app").await
    }

    /// Makes database, extension and role; `role` holds the role's attributes.
    pub async fn prepare(&self, role: &str) {
        let client = self.connect_to("postgres").await;
        client
            .batch_execute("CREATE DATABASE app")
            .await
            .expect("create database");
        let client = self.connect().await;
        let sql = format!(
            "CREATE EXTENSION terrace; CREATE ROLE terrace LOGIN {role} PASSWORD '{PASSWORD}'; \
             GRANT terrace_reader TO terrace"
        );
        client
            .batch_execute(&sql)
            .await
            .expect("prepare the server");
    }

    /// The first column of the first row, as text.
    pub async fn value(&self, sql: &str) -> Option<String> {
        let rows = self.connect().await.simple_query(sql).await.ok()?;
        rows.into_iter().find_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        })
    }

    /// Waits until the first column is `wanted`.
    pub async fn wait_value(&self, sql: &str, wanted: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let value = self.value(sql).await;
            if value.as_deref() == Some(wanted) {
                return;
            }
            let name = &self.name;
            assert!(
                Instant::now() < deadline,
                "{name}: {sql} gives {value:?}, not {wanted}"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            signal(&child, "QUIT");
            child.wait().ok();
        }
    }
}

/// A terrace-bridge.
pub struct Bridge {
    /// Node name.
    pub name: String,
    /// Port of its relay.
    pub relay_port: u16,
    /// Port of its metrics.
    pub http_port: u16,
    dir: PathBuf,
    child: Option<Child>,
}

/// The binary under test.
pub fn bridge_binary() -> PathBuf {
    if let Some(path) = std::env::var_os("TERRACE_BRIDGE") {
        return path.into();
    }
    let test = std::env::current_exe().expect("path of the test");
    let profile = test
        .ancestors()
        .find(|dir| dir.join("terrace-bridge").exists());
    profile
        .expect("terrace-bridge is not built; run make build")
        .join("terrace-bridge")
}

/// What a bridge's configuration holds besides its own ports and directory.
#[derive(Clone, Default)]
pub struct BridgeSettings {
    /// Connection strings of the parent domain's servers; none for a top bridge.
    pub parents: Vec<String>,
    /// The other members: name and connection string.
    pub peers: Vec<(String, String)>,
}

impl Bridge {
    /// Chooses ports and makes the directory.
    pub fn new(scratch: &Scratch, name: &str) -> Bridge {
        let dir = scratch.path().join(format!("bridge-{name}"));
        fs::create_dir(&dir).expect("bridge dir");
        let (relay_port, http_port) = (free_port(), free_port());
        Bridge {
            name: name.into(),
            relay_port,
            http_port,
            dir,
            child: None,
        }
    }

    /// Connection string of its relay.
    pub fn url(&self) -> String {
        let port = self.relay_port;
        format!("host=127.0.0.1 port={port} user=terrace password={PASSWORD} dbname=app")
    }

    /// Writes the configuration.
    pub fn configure(&self, domain: &str, database: &Server, settings: &BridgeSettings) {
        let verifier = postgres_protocol::password::scram_sha_256(PASSWORD.as_bytes());
        fs::write(
            self.dir.join("users"),
            format!("\"terrace\" \"{verifier}\"\n"),
        )
        .expect("users");
        let mut text = format!(
            "[node]\nname = \"{}\"\ndomain = \"{domain}\"\ndata_dir = \"{}\"\n\
             [database]\nurl = \"{}\"\n\
             [relay]\nlisten = \"127.0.0.1:{}\"\nauth_file = \"{}\"\n\
             [http]\nlisten = \"127.0.0.1:{}\"\n[peers]\n",
            self.name,
            self.dir.join("data").display(),
            database.url("terrace", "app"),
            self.relay_port,
            self.dir.join("users").display(),
            self.http_port,
        );
        for (name, url) in &settings.peers {
            text.push_str(&format!("{name} = \"{url}\"\n"));
        }
        if !settings.parents.is_empty() {
            text.push_str(&format!("[parent]\nservers = {:?}\n", settings.parents));
        }
        fs::write(self.config(), text).expect("bridge.toml");
    }

    /// Path of the configuration.
    pub fn config(&self) -> PathBuf {
        self.dir.join("bridge.toml")
    }

    /// Starts it, or starts it again.
    pub fn start(&mut self) {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("log"));
        let child = Command::new(bridge_binary())
            .args(["run", "-c"])
            .arg(self.config())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.expect("bridge log"))
            .spawn()
            .expect("start terrace-bridge");
        self.child = Some(child);
    }

    /// Sends a signal to the process.
    pub fn signal(&self, name: &str) {
        signal(self.child.as_ref().expect("running bridge"), name);
    }

    /// Kills it outright.
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            signal(&child, "KILL");
            child.wait().expect("wait for the bridge");
        }
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            signal(&child, "CONT");
            signal(&child, "TERM");
            child.wait().ok();
        }
    }
}

/// A domain's servers with their bridges.
pub struct Domain {
    /// Name.
    pub name: String,
    /// The Postgres servers.
    pub servers: Vec<Server>,
    /// The bridges, in the same order.
    pub bridges: Vec<Bridge>,
}

/// A top with a chain of domains below it. Bridges end before servers do.
pub struct Tree {
    /// Each below the one before it.
    pub domains: Vec<Domain>,
    /// The writer.
    pub top: Server,
    _scratch: Scratch,
}

impl Tree {
    /// Boots the servers in parallel. `shape` names the domains with their sizes,
    /// `schema` runs at the top before any bridge starts.
    pub async fn start(shape: &[(&str, usize)], schema: &str) -> Tree {
        let scratch = Scratch::new();
        let mut names = vec!["top".to_owned()];
        for (domain, size) in shape {
            names.extend((1..=*size).map(|number| format!("{domain}-{number}")));
        }
        let mut servers: Vec<Server> = std::thread::scope(|scope| {
            let boot = |name: &String| {
                let name = name.clone();
                let scratch = &scratch;
                scope.spawn(move || Server::start(scratch, &name))
            };
            let booting: Vec<_> = names.iter().map(boot).collect();
            booting
                .into_iter()
                .map(|thread| thread.join().expect("boot"))
                .collect()
        });
        let below = servers.split_off(1);
        let top = servers.remove(0);
        top.prepare("REPLICATION").await;
        for server in &below {
            server.prepare("SUPERUSER").await;
        }
        let client = top.connect().await;
        let mut parent = "NULL".to_owned();
        for (domain, _) in shape {
            let sql = format!("SELECT terrace.create_domain('{domain}', {parent})");
            client.batch_execute(&sql).await.expect("create the domain");
            parent = format!("'{domain}'");
        }
        client
            .batch_execute(schema)
            .await
            .expect("schema at the top");

        let mut below = below.into_iter();
        let mut parents = vec![top.tcp_url()];
        let mut domains = Vec::new();
        for (name, size) in shape {
            let servers: Vec<Server> = below.by_ref().take(*size).collect();
            let mut bridges: Vec<Bridge> = servers
                .iter()
                .map(|server| Bridge::new(&scratch, &server.name))
                .collect();
            let urls: Vec<(String, String)> = bridges
                .iter()
                .map(|bridge| (bridge.name.clone(), bridge.url()))
                .collect();
            for (bridge, server) in bridges.iter_mut().zip(&servers) {
                let peers = urls
                    .iter()
                    .filter(|(peer, _)| *peer != bridge.name)
                    .cloned()
                    .collect();
                let settings = BridgeSettings {
                    parents: parents.clone(),
                    peers,
                };
                bridge.configure(name, server, &settings);
                bridge.start();
            }
            parents = urls.into_iter().map(|(_, url)| url).collect();
            domains.push(Domain {
                name: (*name).to_owned(),
                servers,
                bridges,
            });
        }
        Tree {
            domains,
            top,
            _scratch: scratch,
        }
    }

    /// Every server below the top.
    pub fn below(&self) -> impl Iterator<Item = &Server> {
        self.domains.iter().flat_map(|domain| &domain.servers)
    }

    /// Waits until every server has applied as far as the top is now.
    pub async fn settle(&self) {
        let lsn = self
            .top
            .value("SELECT pg_current_wal_lsn()")
            .await
            .expect("position");
        for server in self.below() {
            let sql = format!("SELECT coalesce(max(lsn) >= '{lsn}', false) FROM terrace.progress");
            server.wait_value(&sql, "t").await;
        }
    }

    /// Waits for, and checks, equal content of a table everywhere.
    pub async fn assert_equal(&self, table: &str) {
        self.settle().await;
        let sql = format!(
            "SELECT count(*) || ' ' || md5(string_agg(t::text, '|' ORDER BY t::text)) FROM {table} t"
        );
        let wanted = self.top.value(&sql).await.expect("content at the top");
        for server in self.below() {
            let found = server.value(&sql).await;
            assert_eq!(found.as_ref(), Some(&wanted), "{table} on {}", server.name);
        }
    }
}
