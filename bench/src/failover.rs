//! How long the levels below wait when a server dies, falls silent, hands over or was away.
//!
//! Nothing native does this for a tree, so the figures stand beside the goals of
//! the project. All rounds run on one tree of seven servers under load, by turns
//! in `region` and in `branch`; at the end every row on every server is
//! compared.
//!
//! A row is written at the top right after the blow. What counts is when the last server
//! below shows it: those of `branch` when `region` is hit, else the others of `branch`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use postgres::Client;
use terrace_tests::load::Background;
use terrace_tests::proxy::Proxy;
use terrace_tests::{Server, Tree};

use crate::report::{Better, Figure, Report, median};
use crate::workload::{Plan, Workload, all, wait};
use crate::world::{Stage, boot, go_live, plant};

const DOMAINS: [(&str, Option<&str>, usize); 2] =
    [("region", None, 3), ("branch", Some("region"), 3)];
/// `hit` is what the load writes, `mark` what is waited for.
const SCHEMA: &str = "
    CREATE TABLE hit (id bigint PRIMARY KEY, body text NOT NULL);
    CREATE TABLE total (writer int PRIMARY KEY, n bigint NOT NULL);
    CREATE TABLE mark (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY);
    INSERT INTO total SELECT g, 0 FROM generate_series(0, 3) g;
    SELECT terrace.add_table(t) FROM unnest(ARRAY['hit', 'total', 'mark']::regclass[]) t;";
const TABLES: [&str; 3] = ["hit", "total", "mark"];
const WRITERS: i64 = 4;
/// Of each writer.
const PERIOD: Duration = Duration::from_millis(4);
/// Between two looks at a server.
const LOOK: Duration = Duration::from_millis(1);
/// Between two blows.
const REST: Duration = Duration::from_secs(5);
/// Of the log of each bridge when a round is far slower than it should be.
const LINES: usize = 40;
/// Default of `failover.takeover_after`, and what is allowed beyond it.
const SILENCE_GOAL: f64 = 3.0 + 2.0;

/// What is done to a master.
#[derive(Clone, Copy)]
enum Blow {
    KillBridge,
    KillPostgres,
    StopBridge,
    Partition,
}

impl Blow {
    fn name(self) -> &'static str {
        match self {
            Blow::KillBridge => "SIGKILL of the bridge",
            Blow::KillPostgres => "SIGKILL of its Postgres",
            Blow::StopBridge => "SIGSTOP of the bridge",
            Blow::Partition => "silent partition",
        }
    }

    /// Seconds, median and worst.
    fn goals(self) -> [f64; 2] {
        match self {
            Blow::KillBridge => [1.0, 2.0],
            Blow::KillPostgres => [3.0, 3.0],
            Blow::StopBridge | Blow::Partition => [SILENCE_GOAL; 2],
        }
    }

    fn strike(self, tree: &mut Tree, master: &str) {
        match self {
            Blow::KillBridge => tree.node(master).bridge.kill9(),
            Blow::KillPostgres => tree.node(master).server.kill9(),
            Blow::StopBridge => tree.node(master).bridge.pause(),
            Blow::Partition => tree.between(&[master], &all_but(tree, master), Proxy::cut),
        }
    }

    fn mend(self, tree: &mut Tree, master: &str) -> Result<()> {
        match self {
            Blow::KillBridge => tree.node(master).bridge.restart()?,
            Blow::KillPostgres => tree.node(master).server.restart()?,
            Blow::StopBridge => tree.node(master).bridge.resume(),
            Blow::Partition => tree.heal(),
        }
        Ok(())
    }
}

/// Masters are struck, in turn.
pub struct Blows {
    name: &'static str,
    about: &'static str,
    /// Connections pass through proxies, which can cut them.
    linked: bool,
    blows: [Blow; 2],
    /// And are asked to hand over.
    switchover: bool,
}

impl Blows {
    /// A master dies or is asked to hand over.
    pub fn deaths() -> Blows {
        Blows {
            name: "failover-deaths",
            about: "a master is killed, or hands over, until new rows are below",
            linked: false,
            blows: [Blow::KillBridge, Blow::KillPostgres],
            switchover: true,
        }
    }

    /// A master falls silent.
    pub fn silences() -> Blows {
        Blows {
            name: "failover-silences",
            about: "a master is paused or cut off without a word, until new rows are below",
            linked: true,
            blows: [Blow::StopBridge, Blow::Partition],
            switchover: false,
        }
    }
}

impl Workload for Blows {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn run(&self, stage: &mut Stage, plan: &Plan, report: &mut Report) -> Result<()> {
        let mut scene = Scene::boot(stage, self.linked)?;
        for blow in self.blows {
            let times = scene.rounds(plan, |scene, domain| scene.blow(domain, blow))?;
            add(report, blow.name(), "first row", &times, blow.goals());
        }
        if self.switchover {
            let pauses = scene.rounds(plan, Scene::switchover)?;
            add(report, "switchover", "longest pause", &pauses, [0.5, 0.5]);
        }
        scene.end()
    }
}

/// A server comes back.
pub struct Rejoin;

impl Workload for Rejoin {
    fn name(&self) -> &'static str {
        "failover-rejoin"
    }

    fn about(&self) -> &'static str {
        "a master of one level and a slave of the other were away, until they have caught up"
    }

    fn run(&self, stage: &mut Stage, plan: &Plan, report: &mut Report) -> Result<()> {
        let mut scene = Scene::boot(stage, false)?;
        let (rounds, away) = plan.rejoin;
        let mut times = Vec::new();
        for round in 0..rounds {
            times.extend(scene.rejoin(round, Duration::from_secs(away))?);
        }
        let what = format!("rejoin after {away} s");
        add(report, &what, "caught up", &times, [15.0, 15.0]);
        scene.end()
    }
}

/// Median and worst, each beside its goal.
fn add(report: &mut Report, story: &str, what: &'static str, times: &[f64], goals: [f64; 2]) {
    let worst = times.iter().copied().fold(f64::MIN, f64::max);
    println!(
        "    {story}: {what} after {:.2} s, worst {worst:.2} s, of {} rounds",
        median(times),
        times.len()
    );
    for (against, values, goal) in [
        ("goal, median", times.to_vec(), goals[0]),
        ("goal, worst", vec![worst], goals[1]),
    ] {
        report.add(Figure {
            workload: format!("failover: {story}"),
            what,
            unit: "s",
            better: Better::Lower,
            against,
            terrace: values,
            baseline: vec![goal],
            paired: false,
        });
    }
}

/// The tree under load.
struct Scene {
    tree: Tree,
    load: Vec<Background>,
    marker: Client,
    started: Instant,
}

impl Scene {
    fn boot(stage: &mut Stage, linked: bool) -> Result<Scene> {
        stage.clear();
        let mut tree = plant()?;
        if linked {
            tree = tree.with_links();
        }
        tree.top.sql(SCHEMA);
        boot(&mut tree, &DOMAINS)?;
        go_live(&mut tree)?;
        let load = (0..WRITERS)
            .map(|writer| write(&tree.top, writer))
            .collect();
        let marker = tree.top.try_connect()?;
        let started = Instant::now();
        let scene = Scene {
            tree,
            load,
            marker,
            started,
        };
        scene.settle()?;
        Ok(scene)
    }

    /// By turns in both domains.
    fn rounds(
        &mut self,
        plan: &Plan,
        mut step: impl FnMut(&mut Scene, &str) -> Result<f64>,
    ) -> Result<Vec<f64>> {
        let mut times = Vec::new();
        for round in 0..plan.failover_rounds {
            let (domain, _, _) = DOMAINS[round % DOMAINS.len()];
            let seconds = step(self, domain)?;
            println!("    {domain}: {seconds:.3} s");
            times.push(seconds);
        }
        Ok(times)
    }

    /// Waits until all stream below one master in each domain, by what every server has told
    /// a moment from now: what was held up on the way until now comes first.
    fn settle(&self) -> Result<()> {
        let top = &self.tree.top;
        let moment = top.value("SELECT clock_timestamp() + interval '1.5 s'");
        let sql = "SELECT count(*) = 2 FROM terrace.lag WHERE level > 0 AND role = 'master'";
        wait("every server streams, below one master", 20 * LOOK, || {
            let settled = self.tree.is_streaming() && self.tree.has_news_since(&moment);
            Ok(settled && top.value(sql) == "t")
        })
    }

    /// Seconds until those below show what was written after the blow.
    fn blow(&mut self, domain: &str, blow: Blow) -> Result<f64> {
        let master = self.tree.with_role(domain, "master");
        let mut below = self.below(&master)?;
        let start = Instant::now();
        blow.strike(&mut self.tree, &master);
        let mark = self.mark()?;
        wait("what was written after it is below", LOOK, || {
            all(&mut below, |client| shows(client, mark))
        })?;
        let elapsed = start.elapsed().as_secs_f64();
        if elapsed > 1.3 * blow.goals()[1] {
            self.explain(domain);
        }
        blow.mend(&mut self.tree, &master)?;
        self.settle()?;
        // Who deposes often does so at growing intervals; these are to be deaths of their own.
        std::thread::sleep(REST);
        Ok(elapsed)
    }

    /// What the servers of a domain have logged of late.
    fn explain(&self, domain: &str) {
        for node in self.tree.domain(domain) {
            let log = node.bridge.logged();
            let told = log.lines().filter(|line| !line.contains("connection peer"));
            let lines: Vec<&str> = told.collect();
            let name = &node.server.name;
            for line in &lines[lines.len().saturating_sub(LINES)..] {
                println!("      {name}: {line}");
            }
        }
    }

    /// The longest time in which a server of the last level showed nothing new.
    fn switchover(&mut self, domain: &str) -> Result<f64> {
        let old = self.tree.with_role(domain, "master");
        let node = self.tree.domain(domain).next().context("a server")?;
        let watched: Vec<&Server> = self.tree.domain("branch").map(|n| &n.server).collect();
        let done = AtomicBool::new(false);
        let pauses = std::thread::scope(|scope| {
            let watchers: Vec<_> = watched
                .iter()
                .map(|server| scope.spawn(|| longest_pause(server, &done)))
                .collect();
            // It must have begun to look, and see what comes of it.
            sleep(Duration::from_millis(500));
            let output = node.bridge.command("switchover", &["--domain", domain]);
            sleep(Duration::from_secs(2));
            done.store(true, Ordering::Relaxed);
            let output = output?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "switchover of {domain}: {said}");
            let pauses = watchers.into_iter().map(|watcher| {
                let watched = watcher.join().ok().context("a watcher panicked")?;
                watched.map(|pause| pause.as_secs_f64())
            });
            pauses.collect::<Result<Vec<f64>>>()
        })?;
        self.settle()?;
        let new = self.tree.with_role(domain, "master");
        ensure!(new != old, "{old} is still master of {domain}");
        Ok(pauses.into_iter().fold(0.0, f64::max))
    }

    /// Takes two servers away, both Postgres and bridge, and measures each one's way back.
    fn rejoin(&mut self, round: usize, away: Duration) -> Result<Vec<f64>> {
        let roles = [["master", "slave"], ["slave", "master"]][round % 2];
        let names: Vec<String> = DOMAINS
            .iter()
            .zip(roles)
            .map(|((domain, _, _), role)| self.tree.with_role(domain, role))
            .collect();
        for name in &names {
            self.tree.node(name).bridge.kill9();
            self.tree.node(name).server.kill9();
        }
        let written = || self.load.iter().map(Background::count).sum::<i64>();
        let before = (written(), Instant::now());
        sleep(away);
        let rate = (written() - before.0) as f64 / before.1.elapsed().as_secs_f64();
        let start = Instant::now();
        for name in &names {
            let node = self.tree.node(name);
            node.server.restart()?;
            node.bridge.restart()?;
        }
        let mark = self.mark()?;
        let mut times = Vec::new();
        let mut waiting = self.clients(|name| names.iter().any(|one| one == name))?;
        wait("they have caught up", LOOK, || {
            all(&mut waiting, |client| {
                let there = shows(client, mark)?;
                times.extend(there.then(|| start.elapsed().as_secs_f64()));
                Ok(there)
            })
        })?;
        println!(
            "    {}: {times:.2?} s, {rate:.0} tx/s meanwhile",
            names.join(", ")
        );
        self.settle()?;
        // Each was copied to once, at the start.
        let copies =
            "SELECT count(*) FROM terrace.events WHERE kind IN ('copied', 'resync', 'gap')";
        let (copied, nodes) = (self.tree.top.value(copies), self.tree.nodes.len());
        ensure!(
            copied == nodes.to_string(),
            "{copied} copies to {nodes} servers"
        );
        Ok(times)
    }

    /// Those that must go on when `master` is out: see the module's head.
    fn below(&self, master: &str) -> Result<Vec<Client>> {
        self.clients(|name| name.starts_with("branch") && name != master)
    }

    fn clients(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<Client>> {
        let servers = self.tree.nodes.iter().map(|node| &node.server);
        let wanted = servers.filter(|server| wanted(&server.name));
        wanted.map(|server| Ok(server.try_connect()?)).collect()
    }

    /// Writes a row at the top.
    fn mark(&mut self) -> Result<i32> {
        let sql = "INSERT INTO mark DEFAULT VALUES RETURNING id";
        Ok(self.marker.query_one(sql, &[])?.get(0))
    }

    /// Ends the load; nothing may be lost or doubled anywhere.
    fn end(self) -> Result<()> {
        let seconds = self.started.elapsed().as_secs_f64();
        let written: i64 = self.load.into_iter().map(Background::stop).sum();
        self.tree.wait_for_equal(&TABLES);
        let counted = "SELECT (SELECT count(*) FROM hit), (SELECT sum(n) FROM total)";
        for count in self.tree.top.rows(counted).into_iter().flatten() {
            ensure!(
                count == written.to_string(),
                "{written} written, {count} there"
            );
        }
        for node in &self.tree.nodes {
            let conflicts = node.server.rows("SELECT * FROM terrace.conflicts");
            let name = &node.server.name;
            ensure!(conflicts.is_empty(), "conflicts on {name}: {conflicts:?}");
        }
        println!(
            "    {written} transactions, {:.0} a second; the same rows on all seven servers",
            written as f64 / seconds
        );
        Ok(())
    }
}

fn all_but<'a>(tree: &'a Tree, name: &str) -> Vec<&'a str> {
    let servers = tree
        .nodes
        .iter()
        .map(|node| &node.server)
        .chain([&tree.top]);
    let names = servers.map(|server| server.name.as_str());
    names.filter(|other| *other != name).collect()
}

/// An insert and an update, so many times a second and no faster.
fn write(top: &Server, writer: i64) -> Background {
    let start = Instant::now();
    Background::start(top, move |client, n| {
        let due = start + PERIOD * u32::try_from(n).unwrap_or(u32::MAX);
        sleep(due.saturating_duration_since(Instant::now()));
        let sql = "WITH one AS (INSERT INTO hit VALUES ($1, md5(($1::bigint)::text)) \
                   ON CONFLICT DO NOTHING RETURNING 1) \
                   UPDATE total SET n = n + 1 FROM one WHERE writer = $1 % 4";
        client.execute(sql, &[&(n * WRITERS + writer)]).map(drop)
    })
}

fn shows(client: &mut Client, mark: i32) -> Result<bool> {
    let row = client.query_one("SELECT coalesce(max(id), 0) FROM mark", &[])?;
    Ok(row.get::<_, i32>(0) >= mark)
}

fn longest_pause(server: &Server, done: &AtomicBool) -> Result<Duration> {
    let mut client = server.try_connect()?;
    let question = client.prepare("SELECT coalesce(max(id), 0) FROM hit")?;
    let (mut last, mut longest) = (0, Duration::ZERO);
    let mut since = Instant::now();
    while !done.load(Ordering::Relaxed) {
        let seen: i64 = client.query_one(&question, &[])?.get(0);
        longest = longest.max(since.elapsed());
        if seen > last {
            (last, since) = (seen, Instant::now());
        }
        sleep(LOOK);
    }
    Ok(longest)
}
