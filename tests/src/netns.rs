//! Servers on addresses of their own: each in a network namespace, joined by a
//! switch in another, so that packets between any two can be dropped or refused.
//!
//! Needs root, `ip` and `nft`. All of it goes when the [`Network`] does, and also when this
//! process is killed: a shell waits for our end.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};

/// Removes every namespace whose name begins with `$0` once its standard input ends.
const SWEEP: &str = "read -r _; ip netns list | while read -r name _; do
    case \"$name\" in \"$0\"*) ip netns del \"$name\";; esac; done";

/// Where a server and its bridge run.
#[derive(Clone, Debug)]
pub struct Host {
    /// Name of the network namespace.
    pub namespace: String,
    /// Its address, known to all others.
    pub address: String,
}

impl Host {
    /// `program` with its arguments, run in this namespace.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.namespace))
            .arg("--")
            .arg(program);
        command
    }
}

/// What happens to packets on their way.
#[derive(Clone, Copy, Debug)]
pub enum Fate {
    /// They vanish.
    Drop,
    /// So many of a hundred vanish.
    Lose(u8),
    /// Connections are reset.
    Reset,
}

impl Fate {
    fn rule(self) -> String {
        match self {
            Fate::Drop => "drop".into(),
            Fate::Lose(percent) => format!("numgen random mod 100 < {percent} drop"),
            Fate::Reset => "meta l4proto tcp reject with tcp reset".into(),
        }
    }
}

/// A switch and the hosts around it.
pub struct Network {
    prefix: String,
    hosts: BTreeMap<String, Host>,
    sweeper: Child,
}

impl Network {
    /// Why there cannot be one on this machine; `None` when there can.
    pub fn missing() -> Option<&'static str> {
        static MISSING: OnceLock<Option<&str>> = OnceLock::new();
        *MISSING.get_or_init(Network::look)
    }

    fn look() -> Option<&'static str> {
        let runs = |program: &str, argument: &str| {
            let mut command = Command::new(program);
            command
                .arg(argument)
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        };
        let makes_one = || {
            let name = format!("terrace-{}-probe", std::process::id());
            ip(&format!("netns add {name}"))
                .is_ok_and(|()| ip(&format!("netns del {name}")).is_ok())
        };
        if !nix::unistd::geteuid().is_root() {
            Some("only root may make network namespaces")
        } else if !runs("ip", "-V") {
            Some("there is no program ip (Debian package iproute2)")
        } else if !runs("nft", "-v") {
            Some("there is no program nft (Debian package nftables)")
        } else if !makes_one() {
            Some("namespaces cannot be made here, as in a container without the right to")
        } else {
            None
        }
    }

    /// The switch alone.
    pub fn new() -> Result<Network> {
        use std::os::unix::process::CommandExt;
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("terrace-{}-{number}-", std::process::id());
        let sweeper = Command::new("sh")
            .args(["-c", SWEEP, &prefix])
            .stdin(Stdio::piped())
            .process_group(0)
            .spawn()
            .context("start a shell")?;
        let network = Network {
            prefix,
            hosts: BTreeMap::new(),
            sweeper,
        };
        let switch = network.namespace("switch");
        ip(&format!("netns add {switch}"))?;
        ip(&format!("-n {switch} link add switch type bridge"))?;
        ip(&format!("-n {switch} link set switch up"))?;
        Ok(network)
    }

    fn namespace(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Adds a host.
    pub fn add(&mut self, name: &str) -> Result<Host> {
        let (switch, namespace) = (self.namespace("switch"), self.namespace(name));
        let number = self.hosts.len() + 1;
        let address = format!("10.77.0.{number}");
        ip(&format!("netns add {namespace}"))?;
        ip(&format!(
            "-n {switch} link add port{number} type veth peer name eth0 netns {namespace}"
        ))?;
        ip(&format!(
            "-n {switch} link set port{number} master switch up"
        ))?;
        ip(&format!("-n {namespace} address add {address}/24 dev eth0"))?;
        for link in ["lo", "eth0"] {
            ip(&format!("-n {namespace} link set {link} up"))?;
        }
        let host = Host { namespace, address };
        nft(
            &host,
            "add table ip cut; add chain ip cut input { type filter hook input priority 0; }",
        )?;
        self.hosts.insert(name.into(), host.clone());
        Ok(host)
    }

    /// The host of that name.
    pub fn host(&self, name: &str) -> &Host {
        let found = self.hosts.get(name);
        found.unwrap_or_else(|| panic!("no host {name}"))
    }

    /// What each of `some` sends to each of `others` meets this fate, and not what comes back.
    pub fn one_way(&self, some: &[&str], others: &[&str], fate: Fate) {
        for to in others {
            let rules: String = some
                .iter()
                .filter(|from| *from != to)
                .map(|from| {
                    let address = &self.host(from).address;
                    format!("add rule ip cut input ip saddr {address} {};", fate.rule())
                })
                .collect();
            nft(self.host(to), &rules).expect("cut a link");
        }
    }

    /// The same both ways.
    pub fn between(&self, some: &[&str], others: &[&str], fate: Fate) {
        self.one_way(some, others, fate);
        self.one_way(others, some, fate);
    }

    /// Everything passes again.
    pub fn heal(&self) {
        for host in self.hosts.values() {
            nft(host, "flush chain ip cut input").expect("heal a link");
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        drop(self.sweeper.stdin.take());
        let _ = self.sweeper.wait();
    }
}

fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.with_context(|| format!("ip {arguments}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {arguments}: {said}");
    Ok(())
}

fn nft(host: &Host, rules: &str) -> Result<()> {
    let mut nft = host.command("nft");
    nft.args(["-f", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped());
    let mut nft = nft.spawn().context("nft")?;
    let mut stdin = nft.stdin.take().context("nft")?;
    stdin.write_all(rules.as_bytes()).context("nft")?;
    drop(stdin);
    let output = nft.wait_with_output().context("nft")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "nft {rules}: {said}");
    Ok(())
}
