//! One relay and many followers, each of which reads all and throws it away.
//!
//! A follower speaks as a bridge of a domain below does and tells its position every
//! second, but has neither queue nor database, so that the relay is what is measured.
//! All run in this process, on the same cores as the relay.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use bytes::{Buf, Bytes};
use terrace_bridge::client::quote_ident;
use terrace_bridge::conninfo::ConnInfo;
use terrace_bridge::lsn::Lsn;
use terrace_bridge::record::{HEADER_LEN, body_len};
use terrace_bridge::upstream;
use terrace_tests::{Server, Tree};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio::time::{interval, timeout};

use crate::pgbench::{INSERT, SCHEMA, pgbench, processed, script_file};
use crate::proc;
use crate::report::{Better, Figure, Report};
use crate::workload::{Plan, Workload, rotated};
use crate::world::{Stage, boot, go_live, plant};

pub struct Fanout;

/// Transactions per second at the top.
const RATE: u32 = 100;
const COUNTS: [u32; 5] = [0, 1, 10, 100, 500];
/// Where ten of them are, which the others are held against.
const TEN: usize = 2;
/// Nobody may be further behind at any time.
const LIVE: Duration = Duration::from_secs(2);
/// Connections are made so many at a time.
const AT_ONCE: usize = 20;

impl Workload for Fanout {
    fn name(&self) -> &'static str {
        "fanout"
    }

    fn about(&self) -> &'static str {
        "one relay, 1 to 500 followers at 100 tx/s"
    }

    fn run(&self, stage: &mut Stage, plan: &Plan, report: &mut Report) -> Result<()> {
        stage.clear();
        let runtime = Runtime::new().context("start a runtime")?;
        let rounds: Vec<Vec<Used>> = (0..plan.fanout.0)
            .map(|n| round(&runtime, n, plan.fanout.1))
            .collect::<Result<_>>()?;
        // Those of all, and of each one more than the first, for whom all is read and checked.
        for (base, each) in [(0, "each"), (1, "each further")] {
            let costs = |of: usize, cost: fn(&Cost) -> f64| -> Vec<f64> {
                let round = |used: &Vec<Used>| cost(&Cost::of(&used[of], &used[base]));
                rounds.iter().map(round).collect()
            };
            for (of, count) in COUNTS.into_iter().enumerate().skip(base + 1) {
                let mut add = |what, unit, cost| {
                    report.add(Figure {
                        workload: format!("fanout: {count} followers, {each}"),
                        what,
                        unit,
                        better: Better::Lower,
                        against: "10 followers",
                        terrace: costs(of, cost),
                        baseline: costs(TEN, cost),
                        paired: false,
                    });
                };
                if of != TEN {
                    add("CPU per tx", "us", |cost| cost.micros);
                    add("memory", "KiB", |cost| cost.kib);
                }
            }
        }
        Ok(())
    }
}

/// A relay with each number of followers, in another order each round; each time one of its own, so
/// that none finds what others have left in its memory.
fn round(runtime: &Runtime, round: usize, seconds: u64) -> Result<Vec<Used>> {
    let mut measured = Vec::new();
    for followers in rotated(&COUNTS, round) {
        let tree = relay()?;
        let crowd = runtime.block_on(Crowd::gather(&tree, followers))?;
        let used = load(&tree, seconds, followers, || crowd.behind(&tree.top))?;
        println!(
            "    {followers} followers: the relay takes {:.1} % of a core and {:.1} MiB; all have \
             everything {:.0} ms later at most",
            used.cpu / used.seconds * 100.0,
            used.mib,
            used.behind.as_secs_f64() * 1e3
        );
        measured.push(used);
        runtime.block_on(crowd.leave());
    }
    measured.sort_by_key(|used| used.followers);
    Ok(measured)
}

/// One server below a top, which streams.
fn relay() -> Result<Tree> {
    let mut tree = plant()?;
    tree.top.sql(SCHEMA);
    tree.top.sql("SELECT terrace.add_table('bench_insert')");
    boot(&mut tree, &[("region", None, 1)])?;
    go_live(&mut tree)?;
    Ok(tree)
}

/// What the bridge of the region used.
struct Used {
    followers: u32,
    seconds: f64,
    transactions: f64,
    cpu: f64,
    mib: f64,
    /// What it took at most until all followers had what the top had.
    behind: Duration,
}

/// Writes at the top for a while; looks every second how far behind the followers are.
fn load(
    tree: &Tree,
    seconds: u64,
    followers: u32,
    behind: impl Fn() -> Result<Duration> + Sync,
) -> Result<Used> {
    let bridge = proc::bridge(&tree.nodes[0].bridge).context("the bridge does not run")?;
    let (time, rate) = (seconds.to_string(), RATE.to_string());
    let script = script_file(&tree.top, INSERT)?.context("a script")?;
    let arguments = ["-n", "-c", "2", "-T", &time, "-R", &rate, "-f", &script];
    let (before, start) = (proc::own_cpu_seconds(bridge)?, Instant::now());
    let ended = AtomicBool::new(false);
    let watch = || {
        let mut most = Duration::ZERO;
        while !ended.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_secs(1));
            most = most.max(behind()?);
        }
        anyhow::Ok(most.max(behind()?))
    };
    let (written, used, behind) = thread::scope(|scope| {
        let watched = scope.spawn(watch);
        let written = pgbench(&tree.top, "", &arguments);
        let used = proc::own_cpu_seconds(bridge).map(|cpu| (start.elapsed(), cpu - before));
        ended.store(true, Ordering::Relaxed);
        (written, used, watched.join())
    });
    let (transactions, _) = processed(&written?)?;
    let (elapsed, cpu) = used?;
    let behind = behind.map_err(|_| anyhow!("the watch panicked"))??;
    Ok(Used {
        followers,
        seconds: elapsed.as_secs_f64(),
        transactions,
        cpu,
        mib: proc::memory_mib(bridge, "VmRSS").context("memory of the bridge")?,
        behind,
    })
}

/// What a follower costs.
struct Cost {
    /// CPU of a transaction, microseconds.
    micros: f64,
    kib: f64,
}

impl Cost {
    /// Of each of those that some have more than others.
    fn of(more: &Used, fewer: &Used) -> Cost {
        let of_all = |used: &Used| used.cpu / used.transactions * 1e6;
        let followers = f64::from(more.followers - fewer.followers);
        Cost {
            micros: (of_all(more) - of_all(fewer)) / followers,
            kib: (more.mib - fewer.mib) * 1024.0 / followers,
        }
    }
}

/// Followers of one relay.
struct Crowd {
    at: Vec<Arc<AtomicU64>>,
    tasks: JoinSet<Result<()>>,
}

impl Crowd {
    async fn gather(tree: &Tree, count: u32) -> Result<Crowd> {
        let relay = ConnInfo::parse(&tree.nodes[0].bridge.conninfo())?;
        let mut crowd = Crowd {
            at: Vec::new(),
            tasks: JoinSet::new(),
        };
        let names: Vec<String> = (1..=count)
            .map(|n| format!("follower-{count}-{n}"))
            .collect();
        for names in names.chunks(AT_ONCE) {
            let mut connecting = JoinSet::new();
            for name in names {
                let (relay, name) = (relay.clone(), name.clone());
                connecting.spawn(async move { Follower::connect(&relay, &name).await });
            }
            while let Some(follower) = connecting.join_next().await {
                let follower = follower.context("connect")??;
                crowd.at.push(Arc::clone(&follower.at));
                crowd.tasks.spawn(follower.run());
            }
        }
        Ok(crowd)
    }

    /// Waits until everybody has all that the top has now; how long that took.
    fn behind(&self, top: &Server) -> Result<Duration> {
        let end: Lsn = top
            .value("SELECT pg_current_wal_insert_lsn()")
            .parse()
            .map_err(|_| anyhow!("a position of the top"))?;
        let start = Instant::now();
        loop {
            let behind = self
                .at
                .iter()
                .filter(|at| at.load(Ordering::Relaxed) < end.0);
            match behind.count() {
                0 => return Ok(start.elapsed()),
                behind if start.elapsed() > LIVE => {
                    bail!(
                        "{behind} of {} followers are not at live rate",
                        self.at.len()
                    )
                }
                _ => thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    async fn leave(mut self) {
        self.tasks.shutdown().await;
    }
}

struct Follower {
    client: terrace_bridge::client::Client,
    at: Arc<AtomicU64>,
}

impl Follower {
    async fn connect(relay: &ConnInfo, name: &str) -> Result<Follower> {
        let (mut client, ..) = upstream::connect(relay, name).await?;
        let slot = quote_ident(name);
        let rows = client
            .simple(&format!(
                "CREATE_REPLICATION_SLOT {slot} TEMPORARY LOGICAL pgoutput"
            ))
            .await?;
        let point = rows.first().and_then(|row| row.get(1)?.clone());
        let point = point.context("CREATE_REPLICATION_SLOT gave no position")?;
        client
            .copy_both(&format!(
                "START_REPLICATION SLOT {slot} LOGICAL {point} (proto_version '1', \
                 publication_names 'terrace', messages 'true', instance '{name}')"
            ))
            .await?;
        Ok(Follower {
            client,
            at: Arc::default(),
        })
    }

    async fn run(mut self) -> Result<()> {
        let mut tick = interval(Duration::from_secs(1));
        loop {
            while let Some(message) = self.client.buffered()? {
                self.take(message.body)?;
            }
            tokio::select! {
                filled = self.client.fill() => filled?,
                _ = tick.tick() => self.tell().await?,
            }
        }
    }

    fn take(&mut self, mut body: Bytes) -> Result<()> {
        if body.try_get_u8()? != b'T' {
            return Ok(());
        }
        while !body.is_empty() {
            let len = HEADER_LEN + body_len(&body)?;
            let lsn = (&body[12..20]).get_u64();
            self.at.fetch_max(lsn, Ordering::Relaxed);
            body.advance(len);
        }
        Ok(())
    }

    async fn tell(&mut self) -> Result<()> {
        let at = Lsn(self.at.load(Ordering::Relaxed));
        upstream::put_status(self.client.buffer(), (at, at, at), false);
        timeout(Duration::from_secs(10), self.client.flush()).await??;
        Ok(())
    }
}
