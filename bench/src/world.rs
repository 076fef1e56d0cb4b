//! One top, and below it both sides in the same shape.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use terrace_tests::{Server, ServerOptions, Tree};

use crate::native::{Native, publish};
use crate::pgbench::{ROWS, SCHEMA, TABLES, create_tables};
use crate::pglogical::{self, Pglogical};
use crate::proc;
use crate::side::{Side, Which};
use crate::terrace::Terrace;
use crate::workload::{Plan, wait};

/// Of every server, on both sides: what an operator would set on a small machine. Checkpoints
/// and vacuum come when asked for, not in the middle of a measurement; a subscription that was
/// disabled a moment ago is started again without a pause.
const SETTINGS: [(&str, &str); 6] = [
    ("fsync", "on"),
    ("shared_buffers", "128MB"),
    ("max_wal_size", "8GB"),
    ("checkpoint_timeout", "30min"),
    ("autovacuum", "off"),
    ("wal_retrieve_retry_interval", "100ms"),
];

/// Servers in the two levels below the top.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub region: usize,
    pub branch: usize,
}

impl Shape {
    /// Has each of the servers, level by level, subscribe to one of the level above.
    pub fn subscribe(
        self,
        servers: &[Server],
        top: &Server,
        subscribe: impl Fn(&Server, &Server) -> Result<()> + Sync,
    ) -> Result<()> {
        let (regions, branches) = servers.split_at(self.region);
        // One after the other: PostgreSQL names a copy's slot after the subscriber's system
        // identifier, and the harness makes all servers from one template.
        for region in regions {
            subscribe(region, top)?;
        }
        at_once(
            branches.iter().zip(regions.iter().cycle()),
            |(branch, region)| subscribe(branch, region),
        )
    }
}

/// From the top to one server.
pub const HOP: Shape = Shape {
    region: 1,
    branch: 0,
};

/// Keeps the servers for the next workload if that wants as many.
#[derive(Default)]
pub struct Stage(Option<(Shape, World)>);

impl Stage {
    /// All sides in this shape, paused; pglogical, if it is installed.
    pub fn world(&mut self, shape: Shape, plan: &Plan) -> Result<&mut World> {
        if !self.0.as_ref().is_some_and(|(there, _)| *there == shape) {
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

/// All sides, paused. The other servers go before the directory they are in.
pub struct World {
    pub pglogical: Option<Pglogical>,
    pub native: Native,
    pub terrace: Terrace,
}

/// Boots a top alone.
pub fn plant() -> Result<Tree> {
    let mut tree = Tree::plant("")?;
    settle(&mut tree.top)?;
    Ok(tree)
}

/// Gives the settings to a server that the harness has started with its own.
fn settle(server: &mut Server) -> Result<()> {
    for (name, value) in SETTINGS {
        server.sql(&format!("ALTER SYSTEM SET {name} = '{value}'"));
    }
    server.stop();
    server.restart()
}

/// Boots a server below that has the settings and no extension.
pub fn bare(tree: &Tree, name: &str) -> Result<Server> {
    let lines = SETTINGS.map(|(name, value)| format!("{name} = '{value}'\n"));
    let options = ServerOptions {
        extension: false,
        settings: lines.concat(),
        ..Default::default()
    };
    Server::start(&tree.scratch, name, &options)
}

/// Boots the servers of these domains, with the settings; their bridges do not run yet.
pub fn boot(tree: &mut Tree, domains: &[(&str, Option<&str>, usize)]) -> Result<()> {
    tree.boot(domains)?;
    at_once(tree.nodes.iter_mut().map(|node| &mut node.server), settle)
}

/// Starts all bridges and waits until every server has its copy and streams.
pub fn go_live(tree: &mut Tree) -> Result<()> {
    tree.start_bridges()?;
    wait("all servers stream", Duration::from_millis(20), || {
        Ok(tree.is_streaming())
    })
}

/// Does a step for many, each in a thread of its own.
pub fn at_once<T: Send>(
    items: impl Iterator<Item = T>,
    step: impl Fn(T) -> Result<()> + Sync,
) -> Result<()> {
    let step = &step;
    std::thread::scope(|scope| {
        let threads: Vec<_> = items.map(|item| scope.spawn(move || step(item))).collect();
        threads.into_iter().try_for_each(|thread| {
            let result = thread.join();
            result.unwrap_or_else(|_| Err(anyhow!("a thread panicked")))
        })
    })
}

/// Vacuums and checkpoints, so that neither is due in what is measured next.
pub fn tidy<'a>(servers: impl Iterator<Item = &'a Server>) -> Result<()> {
    at_once(servers, |server| {
        let mut client = server.try_connect()?;
        client.batch_execute("VACUUM ANALYZE")?;
        Ok(client.batch_execute("CHECKPOINT")?)
    })
}

impl World {
    /// Boots everything, waits until everybody has a copy of the tables, and pauses all sides.
    pub fn boot(shape: Shape, plan: &Plan) -> Result<World> {
        let start = Instant::now();
        let mut tree = plant()?;
        create_tables(&tree.top, plan.scale, "", true)?;
        tree.top.sql(SCHEMA);
        tree.top.sql(ROWS);
        for table in TABLES {
            tree.top
                .sql(&format!("SELECT terrace.add_table('{table}')"));
        }
        publish(&tree.top, &TABLES);
        let mut domains = vec![("region", None, shape.region)];
        if shape.branch > 0 {
            domains.push(("branch", Some("region"), shape.branch));
        }
        boot(&mut tree, &domains)?;
        let mut native = Native::boot(&tree, shape, plan)?;
        native.pause()?;
        let mut pglogical = None;
        if pglogical::is_installed() {
            pglogical = Some(Pglogical::boot(&mut tree, shape, plan)?);
        }
        if let Some(side) = &mut pglogical {
            side.pause()?;
        }
        let mut terrace = Terrace { tree };
        terrace.resume()?;
        let ready = terrace.wait_streaming().and_then(|()| terrace.pause());
        let mut world = World {
            pglogical,
            native,
            terrace,
        };
        world.explain(ready)?;
        world.tidy()?;
        println!("    booted in {:.0} s", start.elapsed().as_secs_f64());
        Ok(world)
    }

    pub fn top(&self) -> &Server {
        &self.terrace.tree.top
    }

    /// Process id of the top's postmaster.
    pub fn top_pid(&self) -> Result<i32> {
        proc::postmaster(self.top()).context("the top does not run")
    }

    /// A side that is there.
    pub fn side(&mut self, which: Which) -> &mut dyn Side {
        match which {
            Which::Terrace => &mut self.terrace,
            Which::Native => &mut self.native,
            Which::Pglogical => self.pglogical.as_mut().expect("it is installed"),
        }
    }

    /// Those that are there.
    pub fn sides(&self) -> Vec<Which> {
        let beside = self.pglogical.iter().map(|_| Which::Pglogical);
        [Which::Terrace, Which::Native]
            .into_iter()
            .chain(beside)
            .collect()
    }

    /// [`tidy`] of all that there is.
    pub fn tidy(&self) -> Result<()> {
        let beside = self.pglogical.iter().flat_map(Side::servers);
        let below = self.native.servers().into_iter().chain(beside);
        tidy(below.chain(self.terrace.servers()).chain([self.top()]))
    }

    /// Adds to an error what the bridges logged.
    pub fn explain<T>(&mut self, result: Result<T>) -> Result<T> {
        result.map_err(|error| {
            let lag = self.terrace.tree.show_lag();
            anyhow!("{error:#}\n{lag}\n{}", self.terrace.logs())
        })
    }
}
