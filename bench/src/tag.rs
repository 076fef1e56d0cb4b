//! What the tag costs the writer at the top.
//!
//! Two sets of pgbench's tables in one database, both published, one of them
//! added to Terrace; pgbench goes over them turn by turn. A machine's speed
//! drifts, so each tagged run is compared with the untagged one beside it, and the
//! median of those ratios is the figure. It is taken with the flush at each
//! commit, and without, where nothing hides what the tag takes from the CPU.

use anyhow::Result;
use terrace_tests::Server;

use crate::pgbench::{create_tables, pgbench, rate};
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
            for round in 0..rounds {
                top.sql("CHECKPOINT");
                for i in rotated(&[0, 1], round) {
                    rates[i].push(run(top, SCHEMAS[i], commit, seconds)?);
                }
                println!(
                    "    sync commit {commit}: tagged {:.0} tx/s, plain {:.0} tx/s",
                    rates[0][round], rates[1][round]
                );
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
        Ok(())
    }
}

fn search_path(schema: &str) -> String {
    format!("-c search_path={schema}")
}

fn run(top: &Server, schema: &str, commit: &str, seconds: u64) -> Result<f64> {
    let settings = format!("{} -c synchronous_commit={commit}", search_path(schema));
    let seconds = seconds.to_string();
    rate(&pgbench(
        top,
        &settings,
        &["-n", "-c", "4", "-j", "2", "-T", &seconds],
    )?)
}
