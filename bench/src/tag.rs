//! What the tag costs the writer at the top.
//!
//! Two sets of pgbench's tables in one database, both published, one of them
//! added to Terrace; two pgbench run at the same time, one over each. A machine's speed
//! drifts by far more than the tag costs, and hits both alike this way: they have the same
//! processors, which they use up, and the same disk. So the ratio of their rates is
//! that of what a transaction takes. It is measured with the flush at each
//! commit, and without, where nothing hides what the tag takes from the CPU.
//!
//! Which of the two gets a processor next is chance, though; so one is also run after the other,
//! and what is compared is the CPU that the server took for a transaction.

use anyhow::{Context, Result};
use terrace_tests::Server;

use crate::pgbench::{create_tables, pgbench, processed};
use crate::proc;
use crate::report::{Better, Figure, Report};
use crate::workload::{Plan, Workload, rotated};
use crate::world::{Stage, at_once, plant};

pub struct Tag;

const SCHEMAS: [&str; 2] = ["tagged", "plain"];

impl Workload for Tag {
    fn name(&self) -> &'static str {
        "tag"
    }

    fn about(&self) -> &'static str {
        "pgbench at the top, tagged against published only"
    }

    fn run(&self, stage: &mut Stage, plan: &Plan, report: &mut Report) -> Result<()> {
        stage.clear();
        let tree = plant()?;
        let top = &tree.top;
        for schema in SCHEMAS {
            top.sql(&format!("CREATE SCHEMA {schema}"));
            create_tables(top, plan.scale, &search_path(schema), true)?;
        }
        top.sql("SELECT terrace.add_schema('tagged')");
        top.sql("CREATE PUBLICATION plain FOR TABLES IN SCHEMA plain");
        let (rounds, seconds) = plan.tag;
        for (commit, workload) in [
            ("on", "tag: pgbench, sync commit on"),
            ("off", "tag: pgbench, sync commit off"),
        ] {
            run(top, commit, 1)?; // warms up
            let mut rates: [Vec<f64>; 2] = Default::default();
            for _ in 0..rounds {
                top.sql("CHECKPOINT");
                let round = run(top, commit, seconds)?;
                let [tagged, plain] = round;
                println!(
                    "    sync commit {commit}: tagged {tagged:.0} tx/s, plain {plain:.0} tx/s"
                );
                for (all, rate) in rates.iter_mut().zip(round) {
                    all.push(rate);
                }
            }
            let [terrace, baseline] = rates;
            report.add(Figure {
                workload: workload.into(),
                what: "rate",
                unit: "tx/s",
                better: Better::Higher,
                against: "untagged",
                terrace,
                baseline,
                paired: true,
            });
        }
        report.add(cpu(top, rounds, seconds)?);
        Ok(())
    }
}

/// CPU of a transaction, over one schema and then the other.
fn cpu(top: &Server, rounds: usize, seconds: u64) -> Result<Figure> {
    let mut costs: [Vec<f64>; 2] = Default::default();
    for round in 0..rounds {
        top.sql("CHECKPOINT");
        for which in rotated(&[0, 1], round) {
            costs[which].push(cpu_alone(top, SCHEMAS[which], seconds)?);
        }
        println!(
            "    alone: tagged {:.1} us of CPU a transaction, plain {:.1} us",
            costs[0][round], costs[1][round]
        );
    }
    let [terrace, baseline] = costs;
    Ok(Figure {
        workload: "tag: pgbench, sync commit off".into(),
        what: "CPU per tx",
        unit: "us",
        better: Better::Lower,
        against: "untagged",
        terrace,
        baseline,
        paired: true,
    })
}

/// Microseconds of CPU that the server takes for a transaction, while nothing else runs.
fn cpu_alone(top: &Server, schema: &str, seconds: u64) -> Result<f64> {
    let server = proc::postmaster(top).context("the top does not run")?;
    let settings = format!("{} -c synchronous_commit=off", search_path(schema));
    let before = proc::cpu_seconds(server);
    let arguments = ["-n", "-c", "2", "-j", "1", "-T", &seconds.to_string()];
    let (transactions, _) = processed(&pgbench(top, &settings, &arguments)?)?;
    Ok((proc::cpu_seconds(server) - before) / transactions * 1e6)
}

fn search_path(schema: &str) -> String {
    format!("-c search_path={schema}")
}

/// Transactions per second over each schema, at the same time.
fn run(top: &Server, commit: &str, seconds: u64) -> Result<[f64; 2]> {
    let seconds = seconds.to_string();
    let arguments = ["-n", "-c", "2", "-j", "1", "-T", &seconds];
    let mut rates = [0.0; 2];
    at_once(rates.iter_mut().zip(SCHEMAS), |(rate, schema)| {
        let settings = format!("{} -c synchronous_commit={commit}", search_path(schema));
        (_, *rate) = processed(&pgbench(top, &settings, &arguments)?)?;
        Ok(())
    })?;
    Ok(rates)
}
