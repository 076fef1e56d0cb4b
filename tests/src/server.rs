//! One PostgreSQL server with the extension, as a direct child of the test.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use postgres::{Client, Config, NoTls, SimpleQueryMessage};

use crate::netns::Host;
use crate::process::{Process, command, command_on};
use crate::scratch::{Scratch, free_port};
use crate::{PASSWORD, PATIENCE};

/// What a server is and how it is set.
#[derive(Clone)]
pub struct ServerOptions {
    /// The top: its role `terrace` may read and replicate; elsewhere it is a superuser.
    pub top: bool,
    /// `CREATE EXTENSION terrace` at the start.
    pub extension: bool,
    /// Whether files are made durable; a killed process loses nothing either way.
    pub fsync: bool,
    /// Lines added to `postgresql.conf`.
    pub settings: String,
    /// The network namespace that it runs in, if not ours.
    pub host: Option<Host>,
}

impl Default for ServerOptions {
    fn default() -> ServerOptions {
        ServerOptions {
            top: false,
            extension: true,
            fsync: false,
            settings: String::new(),
            host: None,
        }
    }
}

/// What sets what a session learns only as it begins.
const AT_BEGIN: [&str; 4] = [
    "ALTER ROLE",
    "ALTER DATABASE",
    "ALTER SYSTEM",
    "pg_reload_conf",
];

/// A server; stopped when dropped.
pub struct Server {
    /// Name in the tree, and of its directory.
    pub name: String,
    /// Port on 127.0.0.1 and in the socket's name.
    pub port: u16,
    host: Option<Host>,
    directory: PathBuf,
    process: Option<Process>,
    /// A session for looking and writing: tests look every few milliseconds, and opening one
    /// costs more.
    session: Mutex<Option<Client>>,
}

/// Directory of the server programs.
pub fn bin_dir() -> &'static Path {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let config = std::env::var("PG_CONFIG").unwrap_or_else(|_| "pg_config".into());
        let output = Command::new(&config).arg("--bindir").output();
        let output = output.unwrap_or_else(|error| panic!("run {config}: {error}"));
        PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
    })
}

/// One of PostgreSQL's programs.
pub fn program(name: &str) -> String {
    bin_dir().join(name).to_string_lossy().into_owned()
}

/// Whom the servers run as: they refuse to run as root.
fn user() -> Option<&'static str> {
    nix::unistd::geteuid().is_root().then_some("postgres")
}

fn run(mut command: Command, what: &str) -> Result<()> {
    let output = command.output().with_context(|| what.to_owned())?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{what}: {}\n{said}", output.status);
    Ok(())
}

fn hand_over(path: &Path) -> Result<()> {
    if let Some(user) = user() {
        let mut chown = Command::new("chown");
        chown.arg(format!("{user}:")).arg(path);
        run(chown, "chown")?;
    }
    Ok(())
}

/// A cluster to copy from, with the extension or without. The top has one of its own, hence
/// another system identifier.
fn template(top: bool, extension: bool) -> Result<&'static Path> {
    type Made = OnceLock<Result<PathBuf, String>>;
    static TEMPLATES: [Made; 4] = [const { Made::new() }; 4];
    let made = TEMPLATES[2 * usize::from(top) + usize::from(extension)]
        .get_or_init(|| make_template(top, extension).map_err(|error| format!("{error:#}")));
    made.as_deref().map_err(|error| anyhow::anyhow!("{error}"))
}

fn make_template(top: bool, extension: bool) -> Result<PathBuf> {
    let scratch = templates()?.join(format!("top-{top}-extension-{extension}"));
    fs::create_dir(&scratch)?;
    hand_over(&scratch)?;
    let data = scratch.join("data");
    let mut initdb = command(&program("initdb"), user(), Signal::SIGTERM);
    initdb.args([
        "--no-sync",
        "--auth=trust",
        "--username=postgres",
        "--encoding=UTF8",
    ]);
    initdb
        // Each server is a copy of it: of 40 MB, 16 would be one empty segment of WAL.
        .args(["--wal-segsize=1", "--no-locale", "--pgdata"])
        .arg(&data)
        .current_dir(&scratch);
    run(initdb, "initdb")?;
    let rights = if top { "REPLICATION" } else { "SUPERUSER" };
    // Nobody misses these two databases, and every server would copy them.
    single(
        &data,
        &[
            &format!("CREATE ROLE terrace LOGIN {rights} PASSWORD '{PASSWORD}'"),
            "ALTER DATABASE postgres RENAME TO app",
            "UPDATE pg_database SET datistemplate = false WHERE datname = 'template0'",
            "DROP DATABASE template0",
        ],
    )?;
    if extension {
        // By a server like any other: what is made without a postmaster gets the numbers of
        // the system's own, and is not published.
        let mut server = Server {
            name: "template".into(),
            port: free_port(),
            host: None,
            directory: scratch,
            process: None,
            session: Mutex::default(),
        };
        let conf = data.join("postgresql.conf");
        let settings = format!(
            "\nport = {}\nlisten_addresses = ''\nunix_socket_directories = '{}'\nfsync = off\n",
            server.port,
            server.directory.display()
        );
        fs::write(&conf, fs::read_to_string(&conf)? + &settings)?;
        server.restart()?;
        server.sql("CREATE EXTENSION terrace");
        if top {
            server.sql("GRANT terrace_reader TO terrace");
        }
        server.stop();
    }
    Ok(data)
}

/// Runs statements, of one line each, on a cluster that no server runs on.
fn single(data: &Path, statements: &[&str]) -> Result<()> {
    use std::io::Write;
    let mut single = command(&program("postgres"), user(), Signal::SIGTERM);
    single
        .args(["--single", "-F", "-D"])
        .arg(data)
        .arg("template1")
        .current_dir(data);
    single
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = single.spawn().context("postgres --single")?;
    let mut stdin = child.stdin.take().context("postgres --single")?;
    for statement in statements {
        writeln!(stdin, "{statement}")?;
    }
    drop(stdin);
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success() && !said.contains("ERROR"),
        "postgres --single: {said}"
    );
    Ok(())
}

/// Where the templates are, for as long as this process lives.
fn templates() -> Result<&'static Path> {
    static DIRECTORY: OnceLock<Result<(PathBuf, Child), String>> = OnceLock::new();
    let made = DIRECTORY.get_or_init(|| make_templates().map_err(|error| format!("{error:#}")));
    made.as_ref()
        .map(|(path, _)| path.as_path())
        .map_err(|error| anyhow::anyhow!("{error}"))
}

/// Statics are never dropped, so a shell removes the directory: it reads from a
/// pipe that ends when we do.
fn make_templates() -> Result<(PathBuf, Child)> {
    use std::os::unix::{fs::PermissionsExt, process::CommandExt};
    let path = tempfile::Builder::new()
        .prefix("terrace-template-")
        .permissions(fs::Permissions::from_mode(0o755))
        .tempdir()?
        .keep();
    let sweeper = Command::new("sh")
        .args(["-c", "read -r _; rm -rf -- \"$0\""])
        .arg(&path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()?;
    Ok((path, sweeper))
}

impl Server {
    /// Boots a server that is a top, of that name.
    pub fn top(scratch: &Scratch) -> Result<Server> {
        let options = ServerOptions {
            top: true,
            ..Default::default()
        };
        Server::start(scratch, "top", &options)
    }

    /// Boots a server in `scratch` and waits until it answers.
    pub fn start(scratch: &Scratch, name: &str, options: &ServerOptions) -> Result<Server> {
        let directory = scratch.path().join(name);
        fs::create_dir(&directory)?;
        hand_over(&directory)?;
        let mut copy = command("cp", user(), Signal::SIGTERM);
        copy.arg("-a")
            .arg(template(options.top, options.extension)?)
            .arg(directory.join("data"));
        run(copy, "copy the template cluster")?;
        let port = free_port();
        let fsync = if options.fsync { "on" } else { "off" };
        let listen = match &options.host {
            Some(host) => format!("127.0.0.1, {}", host.address),
            None => "127.0.0.1".into(),
        };
        let settings = format!(
            "\nport = {port}\nlisten_addresses = '{listen}'\n\
             unix_socket_directories = '{}'\nwal_level = logical\nmax_wal_senders = 20\n\
             max_replication_slots = 20\nmax_connections = 60\nshared_buffers = 32MB\n\
             fsync = {fsync}\nmax_wal_size = 1GB\nlog_line_prefix = '%m [%p] %a '\n{}\n",
            directory.display(),
            options.settings
        );
        let data = directory.join("data");
        let conf = data.join("postgresql.conf");
        fs::write(&conf, fs::read_to_string(&conf)? + &settings)?;
        fs::write(
            data.join("pg_hba.conf"),
            "local all postgres trust\nlocal all all scram-sha-256\n\
             host all all 127.0.0.1/32 scram-sha-256\n\
             local replication postgres trust\n\
             local replication all scram-sha-256\n\
             host replication all 127.0.0.1/32 scram-sha-256\n\
             host all all samenet scram-sha-256\n\
             host replication all samenet scram-sha-256\n",
        )?;
        let mut server = Server {
            name: name.into(),
            port,
            host: options.host.clone(),
            directory,
            process: None,
            session: Mutex::default(),
        };
        server.restart()?;
        Ok(server)
    }

    /// Makes a physical standby of this server, as it is now, and starts it.
    pub fn standby(&self, scratch: &Scratch, name: &str) -> Result<Server> {
        let directory = scratch.path().join(name);
        fs::create_dir(&directory)?;
        hand_over(&directory)?;
        let mut backup = command(&program("pg_basebackup"), user(), Signal::SIGTERM);
        backup
            .arg("-h")
            .arg(&self.directory)
            .args([
                "-p",
                &self.port.to_string(),
                "-U",
                "postgres",
                "-c",
                "fast",
                "-R",
                "-D",
            ])
            .arg(directory.join("data"))
            .current_dir(&directory);
        run(backup, "pg_basebackup")?;
        let port = free_port();
        let conf = directory.join("data/postgresql.conf");
        let settings = format!(
            "\nport = {port}\nunix_socket_directories = '{}'\n",
            directory.display()
        );
        fs::write(&conf, fs::read_to_string(&conf)? + &settings)?;
        let mut server = Server {
            name: name.into(),
            port,
            host: None,
            directory,
            process: None,
            session: Mutex::default(),
        };
        server.restart()?;
        Ok(server)
    }

    /// Puts an empty server with the extension in the place of this one, whose disk is lost.
    pub fn replace(&mut self) -> Result<()> {
        let data = self.directory.join("data");
        let files = ["postgresql.conf", "pg_hba.conf"].map(|name| data.join(name));
        let kept = files
            .iter()
            .map(fs::read_to_string)
            .collect::<Result<Vec<_>, _>>()?;
        fs::remove_dir_all(&data)?;
        let mut copy = command("cp", user(), Signal::SIGTERM);
        copy.arg("-a")
            .arg(template(false, true)?)
            .arg(&data)
            .current_dir("/");
        run(copy, "copy the template cluster")?;
        for (file, text) in files.iter().zip(kept) {
            fs::write(file, text)?;
        }
        self.restart()
    }

    /// Keeps the state of this stopped server, for [`Server::set_back`].
    pub fn keep_state(&self) -> Result<()> {
        self.copy_data("data", "kept")
    }

    /// Gives this stopped server the state that was kept.
    pub fn set_back(&self) -> Result<()> {
        fs::remove_dir_all(self.directory.join("data"))?;
        self.copy_data("kept", "data")
    }

    fn copy_data(&self, from: &str, to: &str) -> Result<()> {
        let mut copy = command("cp", user(), Signal::SIGTERM);
        copy.arg("-a")
            .arg(self.directory.join(from))
            .arg(self.directory.join(to))
            .current_dir("/");
        run(copy, "copy a server's state")
    }

    /// Gives this stopped server a replication slot of another, as it is there now.
    pub fn take_slot(&self, from: &Server, slot: &str) -> Result<()> {
        let path = |server: &Server| server.directory.join("data/pg_replslot").join(slot);
        let mut copy = command("cp", user(), Signal::SIGTERM);
        copy.arg("-a")
            .arg(path(from))
            .arg(path(self))
            .current_dir("/");
        run(copy, "copy a replication slot")
    }

    /// Starts it, once it is stopped.
    pub fn restart(&mut self) -> Result<()> {
        self.stop();
        let deadline = Instant::now() + PATIENCE;
        let log = File::options().create(true).append(true).open(self.log())?;
        loop {
            let host = self.host.as_ref();
            let mut postgres = command_on(host, &program("postgres"), user(), Signal::SIGQUIT);
            postgres
                .arg("-D")
                .arg(self.directory.join("data"))
                .current_dir(&self.directory);
            postgres
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log.try_clone()?);
            let mut process = Process::start(postgres, Signal::SIGQUIT)?;
            while process.ended().is_none() && Instant::now() < deadline {
                if let Ok(client) = self.try_connect() {
                    self.session = Mutex::new(Some(client));
                    self.process = Some(process);
                    return Ok(());
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            if Instant::now() > deadline {
                bail!(
                    "server {} does not start, see {}",
                    self.name,
                    self.log().display()
                );
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// SIGKILL for the postmaster and all its children.
    pub fn kill9(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().expect("kill a server");
        }
    }

    /// It does nothing any more, and says nothing, until [`Server::thaw`].
    pub fn freeze(&self) {
        let process = self.process.as_ref().expect("a running server");
        process.signal(Signal::SIGSTOP);
        process.signal_children(Signal::SIGSTOP);
    }

    /// It goes on.
    pub fn thaw(&self) {
        let process = self.process.as_ref().expect("a running server");
        process.signal_children(Signal::SIGCONT);
        process.signal(Signal::SIGCONT);
    }

    /// Fast shutdown.
    pub fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.signal(Signal::SIGINT);
            process.wait(PATIENCE).expect("stop a server");
        }
    }

    /// The server's log file.
    pub fn log(&self) -> PathBuf {
        self.directory.join("postgres.log")
    }

    /// For psql and pgbench as superuser, over the socket.
    pub fn socket_dir(&self) -> &Path {
        &self.directory
    }

    /// What a bridge or a user types to get here.
    pub fn conninfo(&self) -> String {
        format!(
            "host=127.0.0.1 port={} user=terrace password={PASSWORD} dbname=app",
            self.port
        )
    }

    /// How a superuser gets here, over the socket.
    pub fn config(&self) -> Config {
        let mut config = Config::new();
        config
            .host_path(&self.directory)
            .port(self.port)
            .user("postgres")
            .dbname("app");
        config
    }

    /// A superuser's connection, if the server answers.
    pub fn try_connect(&self) -> Result<Client, postgres::Error> {
        self.config().connect(NoTls)
    }

    /// A superuser's connection.
    pub fn connect(&self) -> Client {
        self.try_connect()
            .unwrap_or_else(|error| panic!("connect to {}: {error}", self.name))
    }

    /// Locks a table against everybody else until the session that this gives is dropped.
    pub fn lock(&self, table: &str) -> Client {
        let mut client = self.connect();
        let sql = format!("BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE");
        client.batch_execute(&sql).expect("lock a table");
        client
    }

    /// Keeps a bridge from committing what it applies here until the session that this gives is dropped.
    pub fn hold_apply(&self) -> Client {
        let mut client = self.connect();
        let sql = "BEGIN; LOCK TABLE terrace.progress IN EXCLUSIVE MODE";
        client.batch_execute(sql).expect("hold the apply");
        client
    }

    /// Runs statements, as if in a session of their own; an error fails the test.
    pub fn sql(&self, sql: &str) {
        let result = self.write(sql);
        result.unwrap_or_else(|error| panic!("{}: {sql}: {}", self.name, explain(&error)));
    }

    fn write(&self, sql: &str) -> Result<(), postgres::Error> {
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        let open = session.take();
        // What is written must not be sent twice, so one learns before whether it is open.
        let alive = open.and_then(|mut client| client.batch_execute("").map(|()| client).ok());
        let mut client = alive.map_or_else(|| self.try_connect(), Ok)?;
        client.batch_execute(sql)?;
        let settles = |what: &&str| sql.contains(*what);
        if !AT_BEGIN.iter().any(settles) && client.batch_execute("DISCARD ALL").is_ok() {
            *session = Some(client);
        }
        Ok(())
    }

    /// What is said to a statement that is refused.
    pub fn refusal(&self, sql: &str) -> String {
        explain(&self.connect().batch_execute(sql).expect_err(sql))
    }

    /// First field of the first row, as text; NULL is the empty string.
    pub fn value(&self, sql: &str) -> String {
        let rows = self.rows(sql);
        rows.into_iter()
            .next()
            .and_then(|row| row.into_iter().next())
            .unwrap_or_default()
    }

    /// All rows as text; an error fails the test.
    pub fn rows(&self, sql: &str) -> Vec<Vec<String>> {
        self.look(sql)
            .unwrap_or_else(|error| panic!("{}: {sql}: {}", self.name, explain(&error)))
    }

    fn look(&self, sql: &str) -> Result<Vec<Vec<String>>, postgres::Error> {
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        // One that was opened before the server ended is of no use.
        if let Some(client) = &mut *session {
            match rows(client, sql) {
                Err(_) if client.is_closed() => {}
                result => return result,
            }
        }
        rows(session.insert(self.try_connect()?), sql)
    }

    /// Number and content of the rows of a table, whatever their order and the server's
    /// settings.
    pub fn checksum(&self, table: &str) -> Result<String, postgres::Error> {
        let sql = format!(
            "SET LOCAL datestyle = 'ISO'; SET LOCAL intervalstyle = 'postgres'; \
             SET LOCAL timezone = 'UTC'; SET LOCAL extra_float_digits = 3; \
             SET LOCAL bytea_output = 'hex'; \
             SELECT count(*) || ' rows ' || coalesce(sum(hashtextextended(t::text, 0)), 0) \
             FROM {table} t"
        );
        let rows = self.look(&sql)?;
        Ok(rows.into_iter().flatten().next().unwrap_or_default())
    }
}

/// All rows as text.
pub fn rows(client: &mut Client, sql: &str) -> Result<Vec<Vec<String>>, postgres::Error> {
    let messages = client.simple_query(sql)?;
    Ok(messages
        .iter()
        .filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(
                (0..row.len())
                    .map(|i| row.get(i).unwrap_or("").to_owned())
                    .collect(),
            ),
            _ => None,
        })
        .collect())
}

/// The server's own words for an error.
pub fn explain(error: &postgres::Error) -> String {
    error
        .as_db_error()
        .map_or_else(|| error.to_string(), |db| db.to_string())
}
