//! What the tag costs the writer at the top.
//!
//! Two sets of pgbench's tables in one database, both published, one of them
//! added to Terrace; pgbench goes over them turn by turn. A machine's speed
//! drifts, so each tagged run is compared with the untagged one beside it, and the
//! median of those ratios is the figure. It is taken with the flush at each
//! commit, and without, where nothing hides what the tag takes from the CPU. What
//! the server's processes take for a transaction is told as well: that moves
//! least with whatever else the machine does.

use anyhow::{Context, Result};
use terrace_tests::Server;

use crate::pgbench::{create_tables, pgbench, processed};
use crate::proc::{cpu_seconds, postmaster};
use crate::report::{Better, Figure, Report};
use crate::workload::{Plan, Workload, rotated};
use crate::world::{Stage, plant};

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
            for schema in SCHEMAS {
                run(top, schema, commit, 1)?; // warms up
            }
            let mut rates: [Vec<f64>; 2] = Default::default();
            let mut cpu: [Vec<f64>; 2] = Default::default();
            for round in 0..rounds {
                top.sql("CHECKPOINT");
                for i in rotated(&[0, 1], round) {
                    let (rate, micros) = run(top, SCHEMAS[i], commit, seconds)?;
                    rates[i].push(rate);
                    cpu[i].push(micros);
                }
                println!(
                    "    sync commit {commit}: tagged {:.0} tx/s, plain {:.0} tx/s",
                    rates[0][round], rates[1][round]
                );
            }
            for (what, unit, better, [terrace, baseline]) in [
                ("rate", "tx/s", Better::Higher, rates),
                ("CPU of the top", "us/tx", Better::Lower, cpu),
            ] {
                report.add(Figure {
                    workload: workload.into(),
                    what,
                    unit,
                    better,
                    against: "untagged",
                    terrace,
                    baseline,
                    paired: true,
                });
            }
        }
        Ok(())
    }
}

fn search_path(schema: &str) -> String {
    format!("-c search_path={schema}")
}

/// Transactions per second, and CPU microseconds of the server for each.
fn run(top: &Server, schema: &str, commit: &str, seconds: u64) -> Result<(f64, f64)> {
    let settings = format!("{} -c synchronous_commit={commit}", search_path(schema));
    let seconds = seconds.to_string();
    let pid = postmaster(top).context("the top does not run")?;
    let before = cpu_seconds(pid);
    let arguments = ["-n", "-c", "4", "-j", "2", "-T", &seconds];
    let (number, rate) = processed(&pgbench(top, &settings, &arguments)?)?;
    Ok((rate, (cpu_seconds(pid) - before) * 1e6 / number))
}
