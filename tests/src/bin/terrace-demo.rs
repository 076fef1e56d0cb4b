//! Seven servers and six bridges on this machine, under pgbench, to look at.
//!
//! `ONCE=1` ends after the check; otherwise the tree stays until Ctrl-C.

use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use terrace_tests::process::end_all;
use terrace_tests::server::program;
use terrace_tests::{Server, Tree, scratch, wait_until};

const TABLES: [&str; 4] = [
    "pgbench_accounts",
    "pgbench_branches",
    "pgbench_tellers",
    "pgbench_history",
];
const DOMAINS: [(&str, Option<&str>, usize); 2] =
    [("region", None, 3), ("branch", Some("region"), 3)];
const COPY_LIMIT: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    let once = std::env::var("ONCE").is_ok_and(|value| value == "1");
    let handler = move || {
        eprintln!("\nending the tree");
        end_all();
        scratch::remove_all();
        std::process::exit(if once { 130 } else { 0 });
    };
    if let Err(error) = ctrlc::set_handler(handler) {
        eprintln!("terrace-demo: {error}");
        return ExitCode::FAILURE;
    }
    match demo(once) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("terrace-demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo(once: bool) -> Result<()> {
    println!("booting 7 servers");
    let mut tree = Tree::plant("")?;
    tree.boot(&DOMAINS)?;
    let result = run(&mut tree);
    if let Err(error) = &result {
        eprintln!("{}\n", tree.show_lag());
        for node in &tree.nodes {
            let log = node.bridge.logged();
            let lines: Vec<&str> = log.lines().rev().take(5).collect();
            eprintln!("{}:", node.bridge.log().display());
            lines.iter().rev().for_each(|line| eprintln!("    {line}"));
        }
        tree.scratch.keep();
        bail!("{error:#}");
    }
    println!("\nwrite at the top, read anywhere:");
    let servers = [&tree.top]
        .into_iter()
        .chain(tree.nodes.iter().map(|node| &node.server));
    for server in servers {
        println!("  {:<9} psql '{}'", server.name, server.conninfo());
    }
    println!(
        "  superuser at the top: psql 'host={} port={} user=postgres dbname=app'",
        tree.top.socket_dir().display(),
        tree.top.port
    );
    if !once {
        println!(
            "\nstays up until Ctrl-C; everything is in {}",
            tree.scratch.path().display()
        );
        loop {
            std::thread::park();
        }
    }
    Ok(())
}

fn pgbench(top: &Server, arguments: &[&str]) -> Command {
    let mut command = Command::new(program("pgbench"));
    command
        .arg("-h")
        .arg(top.socket_dir())
        .args(["-p", &top.port.to_string()]);
    command.args(["-U", "postgres"]).args(arguments).arg("app");
    command
}

fn run(tree: &mut Tree) -> Result<()> {
    println!("loading the tables of pgbench at the top (scale 5: 500,000 accounts)");
    let load = pgbench(&tree.top, &["-i", "-q", "-s", "5"])
        .output()
        .context("run pgbench")?;
    ensure!(
        load.status.success(),
        "pgbench -i: {}",
        String::from_utf8_lossy(&load.stderr)
    );
    for table in TABLES {
        tree.top
            .sql(&format!("SELECT terrace.add_table('{table}')"));
    }

    println!("starting 6 bridges; each copies what is there to its server");
    let start = Instant::now();
    tree.start_bridges()?;
    while !tree.is_streaming() {
        ensure!(
            start.elapsed() < COPY_LIMIT,
            "not all servers stream after {COPY_LIMIT:?}"
        );
        ensure!(
            tree.nodes.iter_mut().all(|node| node.bridge.is_running()),
            "a bridge has ended"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    println!(
        "copied in {:.1} s\n\npgbench at the top: 4 clients, 10 s",
        start.elapsed().as_secs_f32()
    );

    let mut load = pgbench(&tree.top, &["-n", "-c", "4", "-j", "2", "-T", "10"]);
    let mut load = load.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut shown = Instant::now();
    while load.try_wait()?.is_none() {
        if shown.elapsed() >= Duration::from_secs(2) {
            shown = Instant::now();
            show(tree);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let output = load.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "pgbench: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let end = Instant::now();
    said.lines()
        .filter(|line| line.starts_with("tps") || line.contains("actually processed"))
        .for_each(|line| println!("{line}"));

    let wait = "SELECT terrace.wait_for(pg_current_wal_lsn(), timeout => '60s')";
    ensure!(
        tree.top.value(wait) == "t",
        "not every server has replayed all after 60 s"
    );
    println!(
        "\nevery server has replayed all {:.2} s after the last commit",
        end.elapsed().as_secs_f32()
    );
    show(tree);
    compare(tree)?;
    failover(tree)?;
    compare(tree)
}

fn compare(tree: &Tree) -> Result<()> {
    if let Some(difference) = tree.difference(&TABLES) {
        bail!("the servers differ: {difference}");
    }
    println!("\nthe same rows on all seven servers:");
    for table in TABLES {
        println!("  {table:<17} {}", tree.top.checksum(table)?);
    }
    Ok(())
}

/// Kills a master, and shows who goes on and when the level below hears of it.
fn failover(tree: &mut Tree) -> Result<()> {
    let old = tree.with_role("region", "master");
    println!("\nkilling the bridge of {old}, master of region");
    let killed = Instant::now();
    tree.node(&old).bridge.kill9();
    tree.top.sql(
        "INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) VALUES (0, 0, 0, 0, now())",
    );
    let below = tree.domain("branch").next().context("a server of branch")?;
    let arrived = "SELECT count(*) FROM pgbench_history WHERE tid = 0";
    wait_until("the row written after that is on the level below", || {
        below.server.value(arrived) == "1"
    });
    println!(
        "a row written after that is on {} {:.2} s later",
        below.server.name,
        killed.elapsed().as_secs_f32()
    );
    let role_of = |tree: &Tree, role: &str| {
        let sql = format!(
            "SELECT node FROM terrace.lag WHERE domain = 'region' AND role = '{role}' \
             AND state = 'streaming' AND node <> '{old}'"
        );
        tree.top.value(&sql)
    };
    wait_until("another server is master", || {
        !role_of(tree, "master").is_empty()
    });
    println!(
        "{} is master now; starting {old} again",
        role_of(tree, "master")
    );
    tree.node(&old).bridge.restart()?;
    let back = format!(
        "SELECT count(*) FROM terrace.lag WHERE node = '{old}' AND role = 'slave' \
         AND state = 'streaming'"
    );
    wait_until("it is back as a slave", || tree.top.value(&back) == "1");
    let sql = "SELECT terrace.wait_for(pg_current_wal_lsn(), timeout => '60s')";
    ensure!(
        tree.top.value(sql) == "t",
        "not every server has replayed all"
    );
    show(tree);
    println!();
    for row in tree
        .top
        .rows("SELECT node, kind, reason FROM terrace.events WHERE domain = 'region'")
    {
        println!("{:<10} {:<10} {}", row[0], row[1], row[2]);
    }
    Ok(())
}

fn show(tree: &Tree) {
    println!();
    for row in tree
        .top
        .rows("SELECT tree, role, state FROM terrace.topology")
    {
        println!("{:<24} {:<8} {}", row[0], row[1], row[2]);
    }
    println!("\n{}", tree.show_lag());
}
