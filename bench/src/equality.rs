//! `terrace-bridge compare` of a large table on seven servers, while pgbench writes to it.
//!
//! All servers share the machine's cores here, so what pgbench loses it loses to the sums
//! of seven servers; where each has a machine of its own, the top pays for one. pgbench goes on
//! all the time, in steps of equal length: its rate falls in the course of minutes without any
//! comparison, so that it is compared with what it is before and after.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::pgbench::{create_tables, pgbench, processed};
use crate::report::{Better, Figure, Report};
use crate::workload::{Plan, Workload};
use crate::world::{Stage, boot, go_live, plant, tidy};

/// It has failed then.
const LIMIT: Duration = Duration::from_secs(300);

/// pgbench's rate is measured over so long each time.
const STEP: Duration = Duration::from_secs(5);

pub struct Compare;

const DOMAINS: [(&str, Option<&str>, usize); 2] =
    [("region", None, 3), ("branch", Some("region"), 3)];

impl Workload for Compare {
    fn name(&self) -> &'static str {
        "compare"
    }

    fn about(&self) -> &'static str {
        "every row of a table on seven servers, while pgbench writes to it"
    }

    fn is_large(&self) -> bool {
        true
    }

    fn run(&self, stage: &mut Stage, plan: &Plan, report: &mut Report) -> Result<()> {
        stage.clear();
        let mut tree = plant()?;
        create_tables(&tree.top, plan.compare_scale, "", true)?;
        tree.top.sql("SELECT terrace.add_schema('public')");
        boot(&mut tree, &DOMAINS)?;
        go_live(&mut tree)?;
        let rate = |clients: &[&str]| -> Result<f64> {
            let seconds = STEP.as_secs().to_string();
            let arguments = [&["-n", "-T", seconds.as_str()], clients].concat();
            Ok(processed(&pgbench(&tree.top, "", &arguments)?)?.1)
        };
        let compare = || -> Result<f64> {
            let started = Instant::now();
            let bridge = &tree.nodes.last().context("a server")?.bridge;
            let arguments = ["--table", "pgbench_accounts"];
            let output = bridge.command_within(LIMIT, "compare", &arguments)?;
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            ensure!(
                output.status.success(),
                "compare: {said}{}",
                String::from_utf8_lossy(&output.stderr)
            );
            ensure!(
                said.matches("equal, ").count() == tree.nodes.len(),
                "{said}"
            );
            Ok(started.elapsed().as_secs_f64())
        };
        let rows = plan.compare_scale * 100_000;
        for (load, clients) in [
            ("500 tx/s", &["-c", "2", "-j", "1", "-R", "500"] as &[&str]),
            ("as fast as it can", &["-c", "4", "-j", "2"]),
        ] {
            let below = tree.nodes.iter().map(|node| &node.server);
            tidy(below.chain([&tree.top]))?;
            let (mut times, mut meanwhile, mut without) = (Vec::new(), Vec::new(), Vec::new());
            let mut quiet = || -> Result<()> {
                for _ in 0..plan.compare_quiet {
                    without.push(rate(clients)?);
                }
                Ok(())
            };
            quiet()?;
            for _ in 0..plan.compare_rounds {
                times.push(std::thread::scope(|scope| {
                    let comparing = scope.spawn(compare);
                    while !comparing.is_finished() {
                        meanwhile.push(rate(clients)?);
                    }
                    comparing.join().map_err(|_| anyhow::anyhow!("panicked"))?
                })?);
                quiet()?;
            }
            let workload = format!("compare {rows} rows, pgbench at {load}");
            println!(
                "    {workload}: {times:.1?} s; tx/s meanwhile {meanwhile:.0?}, without {without:.0?}"
            );
            report.add(Figure {
                workload: workload.clone(),
                what: "elapsed",
                unit: "s",
                better: Better::Lower,
                against: "goal",
                terrace: times,
                baseline: vec![120.0],
                paired: false,
            });
            report.add(Figure {
                workload,
                what: "pgbench meanwhile",
                unit: "tx/s",
                better: Better::Higher,
                against: "before and after",
                terrace: meanwhile,
                baseline: without,
                paired: false,
            });
        }
        Ok(())
    }
}
