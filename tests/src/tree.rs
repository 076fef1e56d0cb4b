//! A tree: the top, and domains of servers with their bridges.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::bridge::{Bridge, BridgeOptions, LOCAL, relay_conninfo};
use crate::load::{Background, GAPLESS};
use crate::netns::{Host, Network};
use crate::proxy::Proxy;
use crate::scratch::{Scratch, free_port};
use crate::server::{Server, ServerOptions};
use crate::wait_until;

/// A server and the bridge beside it.
pub struct Node {
    /// Its domain.
    pub domain: String,
    /// The bridge.
    pub bridge: Bridge,
    /// The Postgres.
    pub server: Server,
}

/// The top and everything below it; the last to be dropped is the directory.
pub struct Tree {
    /// Servers with bridges, level by level.
    pub nodes: Vec<Node>,
    /// The only place that is written to.
    pub top: Server,
    /// Links between servers, by who connects and to whom; empty unless asked for.
    pub links: BTreeMap<(String, String), Proxy>,
    /// Put at the end of each bridge's configuration.
    pub settings: String,
    /// Where the servers have addresses of their own, if they do.
    pub network: Option<Network>,
    /// Where everything is.
    pub scratch: Scratch,
    linked: bool,
}

impl Node {
    /// Bridge and database die, and the queue is gone for good.
    pub fn lose(&mut self) {
        self.bridge.kill9();
        self.server.kill9();
        let queue = self.bridge.directory().join("data");
        std::fs::remove_dir_all(queue).expect("remove the queue");
    }
}

impl Tree {
    /// Boots the top alone and runs `schema` there.
    pub fn plant(schema: &str) -> Result<Tree> {
        Tree::plant_in(schema, None)
    }

    /// The same, with every server on a host of its own in `network`, if one is given.
    pub fn plant_in(schema: &str, mut network: Option<Network>) -> Result<Tree> {
        let scratch = Scratch::new("terrace-")?;
        let options = ServerOptions {
            top: true,
            host: network.as_mut().map(|net| net.add("top")).transpose()?,
            ..Default::default()
        };
        let top = Server::start(&scratch, "top", &options)?;
        top.sql(schema);
        Ok(Tree {
            nodes: Vec::new(),
            top,
            links: BTreeMap::new(),
            settings: String::new(),
            network,
            scratch,
            linked: false,
        })
    }

    /// Every link between two servers is to go over a [`Proxy`] of its own.
    pub fn with_links(mut self) -> Tree {
        self.linked = true;
        self
    }

    /// How `from` reaches the port of `to`.
    fn way(&mut self, from: &str, to: &str, port: u16) -> Result<String> {
        if let Some(network) = &self.network {
            return Ok(relay_conninfo(&network.host(to).address, port));
        }
        if !self.linked {
            return Ok(relay_conninfo(LOCAL, port));
        }
        let proxy = Proxy::start(port)?;
        let way = relay_conninfo(LOCAL, proxy.port);
        self.links.insert((from.into(), to.into()), proxy);
        Ok(way)
    }

    /// Boots servers of these names side by side.
    fn start_servers(&mut self, names: &[&str]) -> Result<Vec<Server>> {
        let network = &mut self.network;
        let hosts = names
            .iter()
            .map(|name| network.as_mut().map(|net| net.add(name)).transpose());
        let hosts: Vec<Option<Host>> = hosts.collect::<Result<_>>()?;
        let scratch = &self.scratch;
        std::thread::scope(|scope| {
            let boot = |(name, host): (&&'_ str, Option<Host>)| {
                let options = ServerOptions {
                    host,
                    ..Default::default()
                };
                let name = (*name).to_owned();
                scope.spawn(move || Server::start(scratch, &name, &options))
            };
            let boots: Vec<_> = names.iter().zip(hosts).map(boot).collect();
            boots
                .into_iter()
                .map(|boot| boot.join().expect("boot a server"))
                .collect()
        })
    }

    /// Does something with each link between one of `some` and one of `others`, whoever
    /// connects.
    pub fn between(&self, some: &[&str], others: &[&str], act: impl Fn(&Proxy)) {
        let touched = self.links.iter().filter(|((from, to), _)| {
            let (from, to) = (from.as_str(), to.as_str());
            (some.contains(&from) && others.contains(&to))
                || (some.contains(&to) && others.contains(&from))
        });
        let mut count = 0;
        for (_, link) in touched {
            act(link);
            count += 1;
        }
        assert!(count > 0, "no link between {some:?} and {others:?}");
    }

    /// Every link passes all again.
    pub fn heal(&self) {
        self.links.values().for_each(Proxy::heal);
    }

    /// Boots the servers of all `domains` (name, parent, number of servers), parents first,
    /// creates the domains at the top and writes the bridges' files; starts no bridge.
    pub fn boot(&mut self, domains: &[(&str, Option<&str>, usize)]) -> Result<()> {
        let names: Vec<(String, String)> = domains
            .iter()
            .flat_map(|(domain, _, count)| {
                (1..=*count).map(move |i| ((*domain).to_owned(), format!("{domain}-{i}")))
            })
            .collect();
        let to_boot: Vec<&str> = names.iter().map(|(_, name)| name.as_str()).collect();
        let mut servers = self.start_servers(&to_boot)?;
        let ports: Vec<u16> = names.iter().map(|_| free_port()).collect();
        for (domain, parent, _) in domains {
            let above = parent.map_or("NULL".into(), |parent| format!("'{parent}'"));
            self.top.sql(&format!(
                "SELECT terrace.create_domain('{domain}', {above})"
            ));
            let above: Vec<(String, u16)> = match parent {
                None => vec![("top".into(), self.top.port)],
                Some(parent) => self
                    .domain(parent)
                    .map(|node| (node.bridge.name.clone(), node.bridge.port))
                    .collect(),
            };
            let members: Vec<(String, u16)> = names
                .iter()
                .zip(&ports)
                .filter(|((of, _), _)| of == domain)
                .map(|((_, name), port)| (name.clone(), *port))
                .collect();
            for (name, port) in &members {
                let server = servers.remove(0);
                let mut options = BridgeOptions {
                    node: name.clone(),
                    domain: (*domain).to_owned(),
                    database: server.conninfo(),
                    extra: self.settings.clone(),
                    host: self.network.as_ref().map(|net| net.host(name).clone()),
                    ..Default::default()
                };
                for (parent, port) in &above {
                    options.parents.push(self.way(name, parent, *port)?);
                }
                for (peer, port) in members.iter().filter(|(peer, _)| peer != name) {
                    let way = self.way(name, peer, *port)?;
                    options.peers.push((peer.clone(), way));
                }
                let bridge = Bridge::prepare(&self.scratch, &options, *port)?;
                self.nodes.push(Node {
                    domain: (*domain).to_owned(),
                    server,
                    bridge,
                });
            }
        }
        Ok(())
    }

    /// Starts the bridges, which apply nothing before they, and those above, have everything.
    pub fn start_bridges_on_a_pile(&mut self) {
        let held = self.nodes.iter().map(|node| node.server.hold_apply());
        let mut holders: Vec<_> = held.collect();
        let end = self.top.value("SELECT pg_current_wal_lsn()");
        self.start_bridges().expect("start the bridges");
        let with = |what: &str| {
            let sql =
                format!("SELECT count(*) FROM terrace.lag WHERE level > 0 AND {what} >= '{end}'");
            self.top.value(&sql).parse::<usize>().expect("a number")
        };
        let all = self.nodes.len();
        wait_until("all of it is there", || with("flush_lsn") == all);
        for domain in self.nodes.chunk_by(|one, next| one.domain == next.domain) {
            let shown = all - holders.len() + domain.len();
            drop(holders.drain(..domain.len()));
            wait_until("it is shown", || with("replay_lsn") >= shown);
        }
    }

    /// Waits until nobody holds the slot of a domain of the first level.
    pub fn wait_slot_free(&self, domain: &str) {
        let sql = format!(
            "SELECT NOT active FROM pg_replication_slots WHERE slot_name = 'terrace_{domain}'"
        );
        wait_until("the slot is free", || self.top.value(&sql) == "t");
    }

    /// Starts every bridge that does not run.
    pub fn start_bridges(&mut self) -> Result<()> {
        for node in &mut self.nodes {
            if !node.bridge.is_running() {
                node.bridge
                    .restart()
                    .with_context(|| format!("start {}", node.bridge.name))?;
            }
        }
        Ok(())
    }

    /// Boots `domains` below a planted top, starts the bridges and waits until all stream.
    pub fn grow_on(mut self, domains: &[(&str, Option<&str>, usize)]) -> Tree {
        self.boot(domains).expect("boot the servers");
        self.start_bridges().expect("start the bridges");
        self.wait_streaming();
        self
    }

    /// The whole of it: top with `schema`, `domains`, bridges, and waits until all stream.
    pub fn grow(schema: &str, domains: &[(&str, Option<&str>, usize)]) -> Tree {
        Tree::plant(schema).expect("boot the top").grow_on(domains)
    }

    /// The same with lines at the end of each bridge's configuration.
    pub fn grow_with(
        settings: &str,
        schema: &str,
        domains: &[(&str, Option<&str>, usize)],
    ) -> Tree {
        let mut tree = Tree::plant(schema).expect("boot the top");
        tree.settings = settings.into();
        tree.grow_on(domains)
    }

    /// Nodes of a domain.
    pub fn domain<'a>(&'a self, domain: &'a str) -> impl Iterator<Item = &'a Node> {
        self.nodes.iter().filter(move |node| node.domain == domain)
    }

    /// Names of the other servers of the domain.
    pub fn others(&self, domain: &str, name: &str) -> Vec<String> {
        let names = self.domain(domain).map(|node| node.server.name.clone());
        names.filter(|other| other != name).collect()
    }

    /// The node of that name.
    pub fn node(&mut self, name: &str) -> &mut Node {
        let found = self.nodes.iter_mut().find(|node| node.server.name == name);
        found.unwrap_or_else(|| panic!("no node {name}"))
    }

    /// Name of a node of `domain` with the given role, as the top sees it.
    pub fn with_role(&self, domain: &str, role: &str) -> String {
        let sql = format!(
            "SELECT node FROM terrace.lag WHERE domain = '{domain}' AND role = '{role}' \
             AND state = 'streaming' ORDER BY node LIMIT 1"
        );
        let mut node = String::new();
        wait_until(&format!("domain {domain} has a {role}"), || {
            node = self.top.value(&sql);
            !node.is_empty()
        });
        node
    }

    /// Waits until another node than `old` is master of `domain`, as the top sees it.
    pub fn successor(&self, domain: &str, old: &str) -> String {
        let mut name = String::new();
        wait_until(&format!("{domain} has another master than {old}"), || {
            name = self.with_role(domain, "master");
            name != old
        });
        name
    }

    /// Waits until all servers stream and one of the domain is master, by what each tells
    /// from now on: what one that died told last is shown until it tells anew.
    pub fn settled_master(&self, domain: &str) -> String {
        let moment = self.top.value("SELECT clock_timestamp()");
        let sql = format!(
            "SELECT string_agg(node, ' ') FROM terrace.lag \
             WHERE domain = '{domain}' AND role = 'master'"
        );
        let mut name = String::new();
        wait_until("all stream, below one master", || {
            name = self.top.value(&sql);
            let one = !name.is_empty() && !name.contains(' ');
            one && self.is_streaming() && self.has_news_since(&moment)
        });
        name
    }

    /// Whether every server has told of itself after a moment of the top's clock.
    pub fn has_news_since(&self, moment: &str) -> bool {
        let sql = format!("SELECT min(reply_time) > '{moment}' FROM terrace.lag WHERE level > 0");
        self.top.value(&sql) == "t"
    }

    /// Waits until a server shows numbers of [`crate::load::count_up`] that are written from
    /// now on; fails when that takes longer than `limit`.
    pub fn rows_arrive(&self, node: &str, limit: Duration) {
        let found = self.nodes.iter().find(|n| n.server.name == node);
        let server = &found.unwrap_or_else(|| panic!("no node {node}")).server;
        let wanted = self.top.value("SELECT max(n) FROM steps");
        let sql = format!("SELECT max(n) > {wanted} FROM steps");
        let started = Instant::now();
        wait_until("new rows arrive", || server.value(&sql) == "t");
        let waited = started.elapsed();
        assert!(
            waited < limit,
            "{node} waited {waited:?}\n{}",
            self.show_lag()
        );
    }

    /// Ends the load, some steps from now; every row of it must be on every server, and
    /// none twice.
    pub fn all_is_well(&self, counting: Background) {
        counting.go_on(20);
        counting.stop();
        self.wait_for_equal(&["steps", "trail"]);
        self.assert_gapless();
    }

    /// Whether the top sees every server streaming.
    pub fn is_streaming(&self) -> bool {
        let sql = "SELECT node FROM terrace.lag WHERE state = 'streaming'";
        let streaming = self.top.rows(sql);
        self.nodes
            .iter()
            .all(|node| streaming.iter().any(|row| row[0] == node.server.name))
    }

    /// Waits until the top sees every server streaming.
    pub fn wait_streaming(&self) {
        wait_until("every server streams", || self.is_streaming());
    }

    /// The first difference between the top and a server, if there is one.
    pub fn difference(&self, tables: &[&str]) -> Option<String> {
        for table in tables {
            let wanted = match self.top.checksum(table) {
                Ok(sum) => sum,
                Err(error) => return Some(format!("top, {table}: {error}")),
            };
            let mut nodes = self.nodes.iter();
            let difference = nodes.find_map(|node| differs(node, table, &wanted));
            if difference.is_some() {
                return difference;
            }
        }
        None
    }

    /// Waits until the tables hold the same rows everywhere; nobody may write meanwhile.
    pub fn wait_for_equal(&self, tables: &[&str]) {
        let begun = Instant::now();
        for table in tables {
            let wanted = self.top.checksum(table);
            let wanted = wanted.unwrap_or_else(|error| panic!("top, {table}: {error}"));
            for node in &self.nodes {
                while let Some(difference) = differs(node, table, &wanted) {
                    let waited = begun.elapsed();
                    assert!(
                        waited < crate::PATIENCE,
                        "servers still differ: {difference}\n{}",
                        self.show_lag()
                    );
                    std::thread::sleep(crate::pause(waited));
                }
            }
        }
    }

    /// Every server holds the numbers of [`crate::load::count_up`] without a gap, each
    /// once, and has met no conflict.
    pub fn assert_gapless(&self) {
        for node in &self.nodes {
            let name = &node.server.name;
            assert_eq!(node.server.value(GAPLESS), "t", "numbers on {name}");
        }
        self.must_have_no_conflict();
    }

    /// As each server has it itself, for what it has applied.
    pub fn must_have_no_conflict(&self) {
        for node in &self.nodes {
            let conflicts = node.server.rows("SELECT * FROM terrace.conflict");
            assert!(conflicts.is_empty(), "{}: {conflicts:?}", node.server.name);
        }
    }

    /// `terrace.lag` at the top as a table.
    pub fn show_lag(&self) -> String {
        let sql = "SELECT node, role, state, coalesce(upstream, '-'), coalesce(replay_lsn, '0/0'), \
                   coalesce(lag_bytes, 0), coalesce(date_trunc('milliseconds', replay_lag), '0'), \
                   coalesce(reason, '') FROM terrace.lag";
        let mut lines = vec![format!(
            "{:<12} {:<7} {:<10} {:<12} {:<12} {:>12}  {:<14} reason",
            "node", "role", "state", "upstream", "replay_lsn", "lag_bytes", "replay_lag"
        )];
        for row in self.top.rows(sql) {
            lines.push(format!(
                "{:<12} {:<7} {:<10} {:<12} {:<12} {:>12}  {:<14} {}",
                row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7]
            ));
        }
        lines.join("\n")
    }
}

/// How a server's table is not what it is to be.
fn differs(node: &Node, table: &str, wanted: &str) -> Option<String> {
    let name = &node.server.name;
    match node.server.checksum(table) {
        Ok(sum) if sum == wanted => None,
        Ok(sum) => Some(format!("{name}, {table}: {sum}, top: {wanted}")),
        Err(error) => Some(format!("{name}, {table}: {error}")),
    }
}
