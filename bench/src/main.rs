//! Measures Terrace beside PostgreSQL's own subscriptions, and pglogical where it is installed.
//!
//! Both sides do the same work in the same run, turn by turn, on servers with
//! the same settings. A number taken on another day or machine proves nothing;
//! the ratio of two medians of one run is what is looked at.
//!
//! `terrace-bench [--quick] [WORKLOAD …]`
//!
//! Servers are in `TMPDIR`; the large ones are on a disk if that is in memory.

mod copying;
mod drain;
mod equality;
mod failover;
mod fanout;
mod latency;
mod memory;
mod native;
mod pgbench;
mod pglogical;
mod plot;
mod proc;
mod report;
mod side;
mod tag;
mod terrace;
mod workload;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use report::Report;
use terrace_tests::process::end_all;
use terrace_tests::scratch;
use workload::{Plan, Workload};
use world::Stage;

fn workloads() -> Vec<Box<dyn Workload>> {
    vec![
        Box::new(drain::Drain::hop()),
        Box::new(drain::Drain::tree()),
        Box::new(latency::Latency),
        Box::new(tag::Tag),
        Box::new(fanout::Fanout),
        Box::new(drain::Drain::large()),
        Box::new(memory::Memory),
        Box::new(copying::Copying),
        Box::new(equality::Compare),
        Box::new(failover::Blows::deaths()),
        Box::new(failover::Blows::silences()),
        Box::new(failover::Rejoin),
    ]
}

fn main() -> ExitCode {
    let mut quick = false;
    let mut wanted = Vec::new();
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--quick" => quick = true,
            name if workloads().iter().any(|one| is_meant(name, one.name())) => {
                wanted.push(argument);
            }
            _ => {
                let names: Vec<&str> = workloads().iter().map(|one| one.name()).collect();
                eprintln!("usage: terrace-bench [--quick] [{}]…", names.join(" | "));
                return ExitCode::from(2);
            }
        }
    }
    let handler = || {
        end_all();
        scratch::remove_all();
        std::process::exit(130);
    };
    match ctrlc::set_handler(handler)
        .context("set a handler for Ctrl-C")
        .and_then(|()| bench(&Plan::new(quick), &wanted))
    {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("terrace-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A workload is meant by its name, or by what stands before the dash in it.
fn is_meant(word: &str, name: &str) -> bool {
    name == word
        || name
            .split_once('-')
            .is_some_and(|(family, _)| family == word)
}

/// Runs the workloads, in the short form without failovers unless they are named; false when one of
/// them failed. The others' numbers are kept.
fn bench(plan: &Plan, wanted: &[String]) -> Result<bool> {
    let directory = results()?;
    let mut report = Report::new(plan, wanted);
    let mut stage = Stage::default();
    let mut last_room = PathBuf::new();
    for workload in workloads() {
        let is_wanted = |name: &String| is_meant(name, workload.name());
        let in_all = !(plan.quick && workload.name().starts_with("failover"));
        if !(wanted.iter().any(is_wanted) || wanted.is_empty() && in_all) {
            continue;
        }
        let room = room(!plan.quick && workload.is_large());
        if room != last_room {
            stage.clear();
            scratch::make_in(&room);
            println!("servers are in {}", room.display());
            last_room.clone_from(&room);
        }
        report.servers_in(workload.name(), &room);
        println!("{}: {}", workload.name(), workload.about());
        let started = report.elapsed();
        // The harness panics where a test would fail.
        let run = AssertUnwindSafe(|| workload.run(&mut stage, plan, &mut report));
        let result = catch_unwind(run).unwrap_or_else(|_| Err(anyhow!("panicked, see above")));
        if let Err(error) = result {
            println!("    FAILED: {error:#}");
            report.failed(workload.name(), &error);
            stage.clear();
        }
        println!("    {:.0} s", (report.elapsed() - started).as_secs_f64());
    }
    stage.clear();
    println!("\n{}", report.table());
    println!("{:.0} s in all", report.elapsed().as_secs_f64());
    let json = serde_json::to_string_pretty(&report.json()).context("write JSON")?;
    for (name, text) in [
        ("bench.json", json + "\n"),
        ("bench.svg", plot::svg(&report)),
    ] {
        let path = directory.join(name);
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        println!("{}", path.display());
    }
    Ok(!report.has_failures())
}

/// Where a workload's servers are to be.
fn room(is_large: bool) -> PathBuf {
    let room = std::env::temp_dir();
    let in_memory = statfs(&room).is_ok_and(|system| system.filesystem_type() == TMPFS_MAGIC);
    if is_large && in_memory {
        // What is too large for `/tmp` is at home here.
        PathBuf::from("/var/tmp")
    } else {
        room
    }
}

/// `bench` in the target directory, which is where this program was built.
fn results() -> Result<PathBuf> {
    let own = std::env::current_exe().context("own path")?;
    let target = own.parent().and_then(Path::parent);
    let directory = target.context("own path has no parent")?.join("bench");
    std::fs::create_dir_all(&directory).context("make the directory of the results")?;
    Ok(directory)
}
