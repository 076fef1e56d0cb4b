//! One top, and below it both sides in the same shape.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use terrace_tests::{Server, Tree};

use crate::native::{Native, publish};
use crate::pgbench::{ROWS, SCHEMA, TABLES, create_tables};
use crate::proc;
use crate::side::{Side, Which};
use crate::terrace::Terrace;
use crate::workload::Plan;

/// Of every server, on both sides: what an operator would set on a small machine. Checkpoints
/// come when asked for, not in the middle of a measurement; a subscription that was
/// disabled a moment ago is started again without a pause.
const SETTINGS: [(&str, &str); 6] = [
    ("fsync", "on"),
    ("shared_buffers", "128MB"),
    ("max_wal_size", "8GB"),
    ("checkpoint_timeout", "30min"),
    ("wal_retrieve_retry_interval", "100ms"),
    ("jit", "off"),
];

static SCRATCH: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Servers in the two levels below the top.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub region: usize,
    pub branch: usize,
}

/// Keeps the servers for the next workload if that wants as many.
#[derive(Default)]
pub struct Stage(Option<(Shape, World)>);

impl Stage {
    /// Both sides in this shape, paused.
    pub fn world(&mut self, shape: Shape, plan: &Plan) -> Result<&mut World> {
        if self.0.as_ref().is_none_or(|(there, _)| *there != shape) {
            // First the old servers go, then the new ones come.
            self.clear();
            self.0 = Some((shape, World::boot(shape, plan)?));
        }
        let (_, world) = self.0.as_mut().context("a world")?;
        Ok(world)
    }

    /// Ends all servers.
    pub fn clear(&mut self) {
        self.0 = None;
    }
}

/// Both sides, paused. The native servers go before the directory they are in.
pub struct World {
    pub native: Native,
    pub terrace: Terrace,
}

/// Boots a top alone.
pub fn plant() -> Result<Tree> {
    let mut tree = Tree::plant("")?;
    let path = tree.scratch.path().to_owned();
    let mut paths = SCRATCH.lock().unwrap_or_else(PoisonError::into_inner);
    paths.push(path);
    settle(&mut tree.top)?;
    Ok(tree)
}

/// Removes what an interrupted run would leave behind.
pub fn remove_scratch() {
    let paths = SCRATCH.lock().unwrap_or_else(PoisonError::into_inner);
    for path in paths.iter() {
        let _ = std::fs::remove_dir_all(path);
    }
}

/// Gives a server the settings of the benchmark.
pub fn settle(server: &mut Server) -> Result<()> {
    for (name, value) in SETTINGS {
        server.sql(&format!("ALTER SYSTEM SET {name} = '{value}'"));
    }
    server.stop();
    server.restart()
}

impl World {
    /// Boots everything, waits until everybody has a copy of the tables, and pauses both sides.
    pub fn boot(shape: Shape, plan: &Plan) -> Result<World> {
        let mut tree = plant()?;
        create_tables(&tree.top, plan.scale, "", true)?;
        tree.top.sql(SCHEMA);
        tree.top.sql(ROWS);
        for table in TABLES {
            tree.top
                .sql(&format!("SELECT terrace.add_table('{table}')"));
        }
        publish(&tree.top);
        let mut domains = vec![("region", None, shape.region)];
        if shape.branch > 0 {
            domains.push(("branch", Some("region"), shape.branch));
        }
        tree.boot(&domains)?;
        for node in &mut tree.nodes {
            settle(&mut node.server)?;
        }
        let mut native = Native::boot(&tree, shape, plan)?;
        native.pause()?;
        let mut terrace = Terrace { tree };
        terrace.resume()?;
        let ready = terrace.wait_streaming().and_then(|()| terrace.pause());
        let mut world = World { native, terrace };
        world.explain(ready)?;
        world.checkpoint();
        Ok(world)
    }

    pub fn top(&self) -> &Server {
        &self.terrace.tree.top
    }

    /// Process id of the top's postmaster.
    pub fn top_pid(&self) -> Result<i32> {
        proc::postmaster(self.top()).context("the top does not run")
    }

    pub fn side(&mut self, which: Which) -> &mut dyn Side {
        match which {
            Which::Terrace => &mut self.terrace,
            Which::Native => &mut self.native,
        }
    }

    /// Checkpoints everywhere, so that none is due in what is measured next.
    pub fn checkpoint(&self) {
        let below = self.native.servers().into_iter();
        let servers = below.chain(self.terrace.servers()).chain([self.top()]);
        servers.for_each(|server| server.sql("CHECKPOINT"));
    }

    /// Adds to an error what the bridges logged.
    pub fn explain<T>(&mut self, result: Result<T>) -> Result<T> {
        result.map_err(|error| {
            let lag = self.terrace.tree.show_lag();
            anyhow::anyhow!("{error:#}\n{lag}\n{}", self.terrace.logs())
        })
    }
}
