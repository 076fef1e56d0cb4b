//! Random faults on seven servers under load, for as long as it is told to, with
//! readers on every server all the time, and a comparison of every row at the end.
//!
//! `terrace-torture SECONDS SEED`. Exit 0 when nothing was lost, doubled, reordered
//! or torn, and the tree healed by itself.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use terrace_tests::load::{ACCOUNTS, Background, GAPLESS, Observer, STEPS, count_up, transfers};
use terrace_tests::proxy::Proxy;
use terrace_tests::random::Random;
use terrace_tests::{Server, Tree};

const DOMAINS: [(&str, Option<&str>, usize); 2] =
    [("region", None, 3), ("branch", Some("region"), 3)];
const TABLES: [&str; 4] = ["account", "steps", "trail", "wide"];
const WIDE: &str = "
    CREATE TABLE wide (id bigint PRIMARY KEY, body text);
    SELECT terrace.add_table('wide');";

/// What undoes a fault, and when.
struct Undo {
    due: Instant,
    what: Fault,
}

#[derive(Clone, Debug)]
enum Fault {
    Bridge(String),
    Postgres(String),
    Both(String),
    Pause(String),
    Top,
    Cut(String, String),
    /// Answers get lost, questions do not.
    Deaf(String, String),
    /// To this one, as its domain's operator would ask.
    Switchover(String),
    Slow(String),
    Disk(String),
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<u64>());
    let (Some(Ok(seconds)), Some(Ok(seed))) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: terrace-torture SECONDS SEED");
        return ExitCode::from(2);
    };
    println!("seed {seed}, {seconds} s of faults");
    match torture(Duration::from_secs(seconds), seed) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("seed {seed}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn torture(time: Duration, seed: u64) -> Result<()> {
    let tree = Tree::plant(&format!("{ACCOUNTS}{STEPS}{WIDE}"))?.with_links();
    let mut tree = tree.grow_on(&DOMAINS);
    let observers: Vec<Observer> = tree
        .nodes
        .iter()
        .map(|n| Observer::start(&n.server))
        .collect();
    let loads = [
        transfers(&tree.top),
        count_up(&tree.top),
        wide_rows(&tree.top),
    ];
    // The same faults for the same seed, not the same timing.
    let mut random = Random::new(seed);
    let (started, mut undo, mut count) = (Instant::now(), Vec::<Undo>::new(), 0);
    while started.elapsed() < time {
        std::thread::sleep(random.between(200, 2_500));
        let now = Instant::now();
        let (due, later): (Vec<Undo>, Vec<Undo>) = undo.into_iter().partition(|u| u.due <= now);
        undo = later;
        for Undo { what, .. } in due {
            mend(&mut tree, &what)?;
        }
        if undo.len() < 3
            && let Some(fault) = choose(&tree, &mut random, &undo)
        {
            count += 1;
            println!("{:6.1} s  {fault:?}", started.elapsed().as_secs_f32());
            cause(&mut tree, &fault)?;
            undo.push(Undo {
                due: Instant::now() + random.between(300, 9_000),
                what: fault,
            });
        }
    }
    for Undo { what, .. } in &undo {
        mend(&mut tree, what)?;
    }
    tree.heal();
    let healing = Instant::now();
    let done: Vec<i64> = loads.into_iter().map(Background::stop).collect();
    tree.wait_for_equal(&TABLES);
    let healed = healing.elapsed();
    let sql = "SELECT terrace.wait_for(pg_current_wal_lsn(), timeout => '60s')";
    anyhow::ensure!(
        tree.top.value(sql) == "t",
        "not every server has replayed all"
    );
    let reads: usize = observers.into_iter().map(Observer::stop).sum();
    for node in &tree.nodes {
        let name = &node.server.name;
        anyhow::ensure!(node.server.value(GAPLESS) == "t", "numbers on {name}");
        let conflicts = node.server.rows("SELECT * FROM terrace.conflicts");
        anyhow::ensure!(conflicts.is_empty(), "conflicts on {name}: {conflicts:?}");
    }
    let events = tree
        .top
        .rows("SELECT kind, count(*) FROM terrace.events GROUP BY kind ORDER BY kind");
    let events: Vec<String> = events
        .iter()
        .map(|row| format!("{} {}", row[1], row[0]))
        .collect();
    println!(
        "{count} faults; {} transfers, {} numbers, {} wide rows; {reads} reads below, each of one sum, \
         without a gap, and none behind the one before; at the end every row of {} equal on all seven \
         servers, {:.1} s after the last fault, and no conflicts; events: {}",
        done[0],
        done[1],
        done[2],
        TABLES.join(", "),
        healed.as_secs_f32(),
        events.join(", ")
    );
    Ok(())
}

fn wide_rows(top: &Server) -> Background {
    Background::start(top, |client, n| {
        let sql = "INSERT INTO wide VALUES ($1, repeat(md5(($1::bigint)::text), 3000)) \
                   ON CONFLICT (id) DO UPDATE SET body = wide.body || 'x'";
        client.execute(sql, &[&(n % 500)])?;
        std::thread::sleep(Duration::from_millis(20));
        Ok(())
    })
}

/// A fault that leaves what is broken already alone.
fn choose(tree: &Tree, random: &mut Random, undo: &[Undo]) -> Option<Fault> {
    let broken = |name: &str| {
        undo.iter().any(|undo| match &undo.what {
            Fault::Top => name == "top",
            Fault::Cut(a, b) | Fault::Deaf(a, b) => a == name || b == name,
            Fault::Switchover(_) => false,
            Fault::Bridge(n)
            | Fault::Postgres(n)
            | Fault::Both(n)
            | Fault::Pause(n)
            | Fault::Slow(n)
            | Fault::Disk(n) => n == name,
        })
    };
    let node = &tree.nodes[random.below(tree.nodes.len())];
    let name = node.server.name.clone();
    if broken(&name) {
        return None;
    }
    Some(match random.below(12) {
        0 | 1 => Fault::Bridge(name),
        2 => Fault::Postgres(name),
        3 => Fault::Both(name),
        4 => Fault::Pause(name),
        5 if !broken("top") => Fault::Top,
        6 | 7 => {
            let others: Vec<&(String, String)> = tree
                .links
                .keys()
                .filter(|(from, _)| *from == name)
                .collect();
            let (from, to) = others[random.below(others.len())].clone();
            match random.below(3) {
                0 => Fault::Deaf(from, to),
                _ => Fault::Cut(from, to),
            }
        }
        10 | 11 => Fault::Switchover(name),
        8 => Fault::Slow(name),
        // What is lost must be held by somebody: nothing else may be broken.
        9 if undo.is_empty() => Fault::Disk(name),
        _ => return None,
    })
}

fn cause(tree: &mut Tree, fault: &Fault) -> Result<()> {
    match fault {
        Fault::Bridge(name) => tree.node(name).bridge.kill9(),
        Fault::Postgres(name) => tree.node(name).server.kill9(),
        Fault::Both(name) => {
            tree.node(name).bridge.kill9();
            tree.node(name).server.kill9();
        }
        Fault::Pause(name) => tree.node(name).bridge.pause(),
        Fault::Top => tree.top.kill9(),
        Fault::Cut(from, to) => tree.between(&[from], &[to], Proxy::cut),
        Fault::Deaf(from, to) => tree.between(&[from], &[to], Proxy::cut_answers),
        Fault::Switchover(name) => {
            let domain = name.rsplit_once('-').map_or("", |(domain, _)| domain);
            // Refused where it cannot be; nothing must come of that.
            tree.node(name)
                .bridge
                .command("switchover", &["--domain", domain, "--to", name])?;
        }
        Fault::Slow(name) => slow(tree, name, Duration::from_millis(200)),
        Fault::Disk(name) => {
            let node = tree.node(name);
            node.bridge.kill9();
            let queue = node.bridge.directory().join("data");
            // It may be gone from the last time still.
            if queue.exists() {
                std::fs::remove_dir_all(queue).context("remove the queue")?;
            }
            let tables = TABLES.join(", ");
            node.server.sql(&format!(
                "SET session_replication_role = replica; \
                 TRUNCATE {tables}, terrace.progress, terrace.status"
            ));
        }
    }
    Ok(())
}

fn mend(tree: &mut Tree, fault: &Fault) -> Result<()> {
    match fault {
        Fault::Bridge(name) | Fault::Disk(name) => tree.node(name).bridge.restart()?,
        Fault::Postgres(name) => tree.node(name).server.restart()?,
        Fault::Both(name) => {
            tree.node(name).server.restart()?;
            tree.node(name).bridge.restart()?;
        }
        Fault::Pause(name) => tree.node(name).bridge.resume(),
        Fault::Top => tree.top.restart()?,
        Fault::Cut(from, to) | Fault::Deaf(from, to) => {
            tree.between(&[from], &[to], Proxy::heal);
        }
        Fault::Switchover(_) => {}
        Fault::Slow(name) => slow(tree, name, Duration::ZERO),
    }
    Ok(())
}

fn slow(tree: &Tree, name: &str, delay: Duration) {
    let links = tree.links.iter().filter(|((from, _), _)| from == name);
    links.for_each(|(_, link)| link.delay(delay));
}
