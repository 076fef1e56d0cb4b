//! One bridge beside a server.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use postgres::{Client, NoTls};

use crate::netns::Host;
use crate::process::{Process, command_on};
use crate::scratch::{Scratch, free_port};
use crate::server::{Server, bin_dir};
use crate::{PASSWORD, PATIENCE};

/// What goes into a bridge's configuration file.
#[derive(Clone, Default)]
pub struct BridgeOptions {
    /// `node.name`, and the name of the directory.
    pub node: String,
    /// `node.domain`
    pub domain: String,
    /// Connection string of the Postgres beside it.
    pub database: String,
    /// Connection strings of the level above; none for a top bridge.
    pub parents: Vec<String>,
    /// Names and connection strings of the other servers of the domain.
    pub peers: Vec<(String, String)>,
    /// Lines put at the end of the file.
    pub extra: String,
    /// Lines put in the section `[node]`.
    pub extra_node: String,
    /// Lines put in the section `[relay]`.
    pub extra_relay: String,
    /// The network namespace that it runs in, if not ours.
    pub host: Option<Host>,
}

/// A bridge; stopped when dropped.
pub struct Bridge {
    /// `node.name`
    pub name: String,
    /// Port of the relay.
    pub port: u16,
    /// Port of `/metrics`, `/healthz` and `/readyz`.
    pub http_port: u16,
    host: Option<Host>,
    directory: PathBuf,
    process: Option<Process>,
}

/// The program: `TERRACE_BRIDGE`, or the one built beside this one.
pub fn bridge_program() -> PathBuf {
    if let Some(path) = std::env::var_os("TERRACE_BRIDGE") {
        return path.into();
    }
    let own = std::env::current_exe().expect("own path");
    let found = own.ancestors().skip(1).take(3).find_map(|directory| {
        ["", "debug", "release"]
            .iter()
            .map(|profile| directory.join(profile).join("terrace-bridge"))
            .find(|path| path.is_file())
    });
    found.expect("terrace-bridge is not built: run `cargo build -p terrace-bridge`")
}

/// Where everything listens that has no address of its own.
pub const LOCAL: &str = "127.0.0.1";

/// How a client reaches a relay, or a Postgres, that listens on `port`.
pub fn relay_conninfo(address: &str, port: u16) -> String {
    format!("host={address} port={port} user=terrace password={PASSWORD} dbname=app")
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

impl Bridge {
    /// Writes the configuration; `port` is the relay's, known to the peers beforehand.
    pub fn prepare(scratch: &Scratch, options: &BridgeOptions, port: u16) -> Result<Bridge> {
        let directory = scratch.path().join(format!("bridge-{}", options.node));
        fs::create_dir_all(&directory)?;
        let name = options.node.clone();
        let bridge = Bridge {
            name,
            port,
            http_port: free_port(),
            host: options.host.clone(),
            directory,
            process: None,
        };
        bridge.configure(options)?;
        Ok(bridge)
    }

    /// Writes the configuration again, for the next start.
    pub fn configure(&self, options: &BridgeOptions) -> Result<()> {
        let verifier = postgres_protocol::password::scram_sha_256(PASSWORD.as_bytes());
        let users = self.directory.join("users");
        fs::write(&users, format!("\"terrace\" \"{verifier}\"\n"))?;
        let mut text = format!(
            "[node]\nname = {}\ndomain = {}\ndata_dir = {}\n{}\n\n[database]\nurl = {}\n",
            quoted(&options.node),
            quoted(&options.domain),
            quoted(&self.directory.join("data").to_string_lossy()),
            options.extra_node,
            quoted(&options.database),
        );
        if !options.parents.is_empty() {
            let list: Vec<String> = options.parents.iter().map(|url| quoted(url)).collect();
            text += &format!("\n[parent]\nservers = [{}]\n", list.join(", "));
        }
        if !options.peers.is_empty() {
            text += "\n[peers]\n";
            for (peer, url) in &options.peers {
                text += &format!("{} = {}\n", quoted(peer), quoted(url));
            }
        }
        text += &format!(
            "\n[relay]\nlisten = \"{}:{}\"\nauth_file = {}\n{}\n\
             \n[http]\nlisten = \"127.0.0.1:{}\"\n{}\n",
            options.host.as_ref().map_or(LOCAL, |host| &host.address),
            self.port,
            quoted(&users.to_string_lossy()),
            options.extra_relay,
            self.http_port,
            options.extra
        );
        Ok(fs::write(self.config(), text)?)
    }

    /// Prepares and starts.
    pub fn start(scratch: &Scratch, options: &BridgeOptions) -> Result<Bridge> {
        let mut bridge = Bridge::prepare(scratch, options, free_port())?;
        bridge.restart()?;
        Ok(bridge)
    }

    /// Starts it, again if need be. Does not wait: it connects by itself.
    pub fn restart(&mut self) -> Result<()> {
        let log = File::options().create(true).append(true).open(self.log())?;
        let program = bridge_program();
        let host = self.host.as_ref();
        let mut bridge = command_on(host, &program.to_string_lossy(), None, Signal::SIGKILL);
        bridge
            .args(["run", "-c"])
            .arg(self.config())
            .env("RUST_LOG", "info,terrace_bridge=debug")
            .env("PATH", path());
        bridge
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        self.process = Some(Process::start(bridge, Signal::SIGTERM)?);
        Ok(())
    }

    /// Runs another command of the program on this configuration, and waits for its end.
    pub fn run(&self, subcommand: &str) -> Result<Output> {
        self.command(subcommand, &[])
    }

    /// The same with further arguments.
    pub fn command(&self, subcommand: &str, arguments: &[&str]) -> Result<Output> {
        self.command_within(Duration::from_secs(30), subcommand, arguments)
    }

    /// The same, where it may take longer.
    pub fn command_within(
        &self,
        limit: Duration,
        subcommand: &str,
        arguments: &[&str],
    ) -> Result<Output> {
        Command::new("timeout")
            .arg(limit.as_secs().to_string())
            .arg(bridge_program())
            .args([subcommand, "-c"])
            .arg(self.config())
            .args(arguments)
            .env("PATH", path())
            .output()
            .context("run terrace-bridge")
    }

    /// Has the data here copied anew; an error fails the test.
    pub fn resync(&self) {
        let output = self.run("resync").expect("run resync");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
    }

    /// The files of its queue that hold transactions, in order.
    pub fn segments(&self) -> Vec<PathBuf> {
        let files = fs::read_dir(self.directory.join("data/queue")).expect("read the queue");
        let paths = files.map(|file| file.expect("entry").path());
        let is_segment = |path: &PathBuf| path.extension().is_some_and(|name| name == "seg");
        let mut segments: Vec<PathBuf> = paths.filter(is_segment).collect();
        segments.sort();
        segments
    }

    /// How many bytes those hold. One may be removed at any moment.
    pub fn queue_bytes(&self) -> u64 {
        let segments = self.segments();
        let sizes = segments
            .iter()
            .filter_map(|path| Some(path.metadata().ok()?.len()));
        sizes.sum()
    }

    /// SIGKILL.
    pub fn kill9(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().expect("kill a bridge");
        }
    }

    /// SIGTERM, and how it ended.
    pub fn stop(&mut self) -> Option<ExitStatus> {
        self.process
            .take()
            .map(|mut process| process.stop(PATIENCE).expect("stop a bridge"))
    }

    /// Number of its open files and sockets.
    pub fn descriptors(&self) -> usize {
        let process = self.process.as_ref().expect("a running bridge");
        let list = fs::read_dir(format!("/proc/{}/fd", process.id()));
        list.map_or(0, Iterator::count)
    }

    /// The highest resident size of its process, in MiB, program text included.
    pub fn peak_mib(&self) -> u64 {
        let process = self.process.as_ref().expect("a running bridge");
        let status = fs::read_to_string(format!("/proc/{}/status", process.id()));
        let status = status.expect("its status");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = peak.and_then(|peak| peak.split_whitespace().next()?.parse::<u64>().ok());
        kib.expect("its peak") >> 10
    }

    /// SIGSTOP: there, but silent.
    pub fn pause(&self) {
        self.process
            .as_ref()
            .expect("a running bridge")
            .signal(Signal::SIGSTOP);
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.process
            .as_ref()
            .expect("a running bridge")
            .signal(Signal::SIGCONT);
    }

    /// Waits for it to end by itself.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.process
            .as_mut()
            .context("the bridge was not started")?
            .wait(limit)
    }

    /// Has not ended.
    pub fn is_running(&mut self) -> bool {
        self.process
            .as_mut()
            .is_some_and(|process| process.ended().is_none())
    }

    /// Its configuration file.
    pub fn config(&self) -> PathBuf {
        self.directory.join("bridge.toml")
    }

    /// Its log file.
    pub fn log(&self) -> PathBuf {
        self.directory.join("bridge.log")
    }

    /// What it has logged so far.
    pub fn logged(&self) -> String {
        fs::read_to_string(self.log()).unwrap_or_default()
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What a slave, a child domain or a user types to get to the relay.
    pub fn conninfo(&self) -> String {
        let address = self.host.as_ref().map_or(LOCAL, |host| &host.address);
        relay_conninfo(address, self.port)
    }

    /// An SQL session through the relay.
    pub fn try_connect(&self) -> Result<Client, postgres::Error> {
        Client::connect(&self.conninfo(), NoTls)
    }

    /// Value of a metric, without its prefix.
    pub fn metric(&self, name: &str) -> Option<i64> {
        let start = format!("terrace_{name}{{");
        let page = self.get("/metrics").ok()?;
        let line = page.lines().find(|line| line.starts_with(&start))?;
        line.split_whitespace().last()?.parse().ok()
    }

    /// Status line and body of one of its web pages.
    pub fn get(&self, page: &str) -> std::io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.http_port))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let host = "Host: localhost\r\nConnection: close";
        write!(stream, "GET {page} HTTP/1.1\r\n{host}\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }
}

fn path() -> String {
    format!(
        "{}:{}",
        bin_dir().display(),
        std::env::var("PATH").unwrap_or_default()
    )
}

/// Configuration of a bridge for `server`, alone in its domain.
pub fn options(server: &Server, domain: &str, parents: &[String]) -> BridgeOptions {
    BridgeOptions {
        node: server.name.clone(),
        domain: domain.into(),
        database: server.conninfo(),
        parents: parents.to_vec(),
        ..Default::default()
    }
}
