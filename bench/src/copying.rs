//! The initial copy of a new server, from nothing to live.
//!
//! Terrace makes the schema by itself; the native subscriber, and pglogical's, has been given it, with its
//! primary keys, as PostgreSQL's documentation asks for, and that time is not counted.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use terrace_tests::{Node, Server, Tree};

use crate::native::{publish, subscribe};
use crate::pgbench::create_tables;
use crate::pglogical;
use crate::report::{Better, Figure, Report};
use crate::side::{Which, must_be_equal};
use crate::workload::{Plan, Workload, rotated};
use crate::world::{Stage, bare, boot, go_live, plant};

pub struct Copying;

const TABLES: [&str; 4] = [
    "pgbench_accounts",
    "pgbench_branches",
    "pgbench_tellers",
    "pgbench_history",
];

impl Workload for Copying {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn about(&self) -> &'static str {
        "the initial copy of a new server"
    }

    fn is_large(&self) -> bool {
        true
    }

    fn run(&self, stage: &mut Stage, plan: &Plan, report: &mut Report) -> Result<()> {
        stage.clear();
        let mut tree = plant()?;
        create_tables(
            &tree.top,
            plan.copy_scale,
            "-c synchronous_commit=off",
            true,
        )?;
        for table in TABLES {
            tree.top
                .sql(&format!("SELECT terrace.add_table('{table}')"));
        }
        publish(&tree.top, &TABLES);
        let mut sides = vec![Which::Terrace, Which::Native];
        if pglogical::is_installed() {
            pglogical::start_with_it(&mut tree.top)?;
            pglogical::provide(&tree.top, &TABLES);
            sides.push(Which::Pglogical);
        }
        for step in ["VACUUM ANALYZE", "CHECKPOINT"] {
            tree.top.sql(step);
        }
        let size = tree
            .top
            .value("SELECT pg_size_pretty(pg_table_size('pgbench_accounts'))");
        let (mut terrace, mut native, mut beside) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..plan.copy_rounds {
            for which in rotated(&sides, round) {
                let (name, copies) = match which {
                    Which::Terrace => ("terrace", &mut terrace),
                    Which::Native => ("native", &mut native),
                    Which::Pglogical => ("pglogical", &mut beside),
                };
                copies.push(match which {
                    Which::Terrace => by_bridge(&mut tree, round)?,
                    Which::Native => by_subscription(&tree, round, plan)?,
                    Which::Pglogical => by_pglogical(&tree, round, plan)?,
                });
                println!("    {size}: {name} {:.1} s", copies[round]);
            }
        }
        for (against, baseline) in [("native", native), ("pglogical", beside)] {
            if !baseline.is_empty() {
                report.add(Figure {
                    workload: format!("initial copy, {size}"),
                    what: "elapsed",
                    unit: "s",
                    better: Better::Lower,
                    against,
                    terrace: terrace.clone(),
                    baseline,
                    paired: false,
                });
            }
        }
        Ok(())
    }
}

/// All definitions.
const INDEXES: &str = "SELECT string_agg(indexdef, '; ' ORDER BY indexdef) FROM pg_indexes \
     WHERE schemaname = 'public'";

/// Fails unless the server holds the rows and the indexes of the top.
fn must_be_whole(server: &Server, top: &Server) -> Result<()> {
    must_be_equal(&[server], top, &TABLES)?;
    let (found, wanted) = (server.value(INDEXES), top.value(INDEXES));
    ensure!(found == wanted, "{} has {found}, top {wanted}", server.name);
    Ok(())
}

/// All copies together are more than many a disk holds.
fn remove(server: Server) -> Result<()> {
    let directory = server.socket_dir().to_owned();
    drop(server);
    fs::remove_dir_all(&directory).with_context(|| format!("remove {}", directory.display()))
}

fn by_bridge(tree: &mut Tree, round: usize) -> Result<f64> {
    let domain = format!("copy{round}");
    boot(tree, &[(domain.as_str(), None, 1)])?;
    let start = Instant::now();
    go_live(tree)?;
    let elapsed = start.elapsed().as_secs_f64();
    must_be_whole(&tree.nodes[0].server, &tree.top)?;
    for Node { bridge, server, .. } in tree.nodes.drain(..) {
        drop(bridge);
        remove(server)?;
    }
    Ok(elapsed)
}

fn by_subscription(tree: &Tree, round: usize, plan: &Plan) -> Result<f64> {
    let server = bare(tree, &format!("native-copy-{round}"))?;
    create_tables(&server, plan.copy_scale, "", false)?;
    let start = Instant::now();
    subscribe(&server, &tree.top)?;
    let elapsed = start.elapsed().as_secs_f64();
    must_be_whole(&server, &tree.top)?;
    remove(server)?;
    Ok(elapsed)
}

fn by_pglogical(tree: &Tree, round: usize, plan: &Plan) -> Result<f64> {
    let mut server = bare(tree, &format!("pglogical-copy-{round}"))?;
    pglogical::start_with_it(&mut server)?;
    create_tables(&server, plan.copy_scale, "", false)?;
    pglogical::provide(&server, &TABLES);
    let start = Instant::now();
    pglogical::subscribe(&server, &tree.top)?;
    let elapsed = start.elapsed().as_secs_f64();
    must_be_whole(&server, &tree.top)?;
    remove(server)?;
    Ok(elapsed)
}
