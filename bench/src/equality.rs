//! `terrace-bridge compare` of a large table on seven servers, while pgbench writes to it.
//!
//! All servers share the machine's cores here, so what pgbench loses it loses to the sums
//! of seven servers; where each has a machine of its own, the top pays for one.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::pgbench::{create_tables, pgbench, processed};
use crate::report::{Better, Figure, Report};
use crate::workload::{Plan, Workload};
use crate::world::{Stage, boot, go_live, plant, tidy};

/// It has failed then.
const LIMIT: Duration = Duration::from_secs(300);

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

    fn run(&self, stage: &mut Stage, plan: &Plan, report: &mut Report) -> Result<()> {
        stage.clear();
        let mut tree = plant()?;
        create_tables(&tree.top, plan.compare_scale, "", true)?;
        tree.top.sql("SELECT terrace.add_schema('public')");
        boot(&mut tree, &DOMAINS)?;
        go_live(&mut tree)?;
        let run = |seconds: u64| -> Result<f64> {
            let seconds = seconds.to_string();
            let arguments = ["-n", "-c", "2", "-j", "1", "-R", "500", "-T", &seconds];
            Ok(processed(&pgbench(&tree.top, "", &arguments)?)?.1)
        };
        let free = |seconds: u64| -> Result<f64> {
            let seconds = seconds.to_string();
            let arguments = ["-n", "-c", "4", "-j", "2", "-T", &seconds];
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
        for (load, step) in [
            ("500 tx/s", &run as &(dyn Fn(u64) -> Result<f64> + Sync)),
            ("as fast as it can", &free),
        ] {
            let below = tree.nodes.iter().map(|node| &node.server);
            tidy(below.chain([&tree.top]))?;
            let before = step(10)?;
            let started = Instant::now();
            let (mut during, mut all) = (Vec::new(), Vec::new());
            let time = std::thread::scope(|scope| {
                let comparing = scope.spawn(compare);
                let mut is_comparing = true;
                while is_comparing || started.elapsed() < plan.compare_window {
                    let rate = step(3)?;
                    all.push(rate);
                    if is_comparing {
                        during.push(rate);
                    }
                    is_comparing = !comparing.is_finished();
                }
                comparing.join().map_err(|_| anyhow::anyhow!("panicked"))?
            })?;
            let workload = format!("compare {rows} rows, pgbench at {load}");
            println!("    {workload}: {time:.1} s");
            report.add(Figure {
                workload: workload.clone(),
                what: "elapsed",
                unit: "s",
                better: Better::Lower,
                against: "goal",
                terrace: vec![time],
                baseline: vec![120.0],
                paired: false,
            });
            let window = (!plan.compare_window.is_zero()).then_some(("pgbench in 2 minutes", all));
            for (what, rates) in [("pgbench meanwhile", during)].into_iter().chain(window) {
                let rate = rates.iter().sum::<f64>() / rates.len() as f64;
                println!("    {what}: {rate:.0} tx/s, {before:.0} before");
                report.add(Figure {
                    workload: workload.clone(),
                    what,
                    unit: "tx/s",
                    better: Better::Higher,
                    against: "without",
                    terrace: vec![rate],
                    baseline: vec![before],
                    paired: false,
                });
            }
        }
        Ok(())
    }
}
