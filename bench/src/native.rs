//! Native subscriptions in the shape of the tree: each server of a level
//! subscribes to one of the level above.
//!
//! This is the arrangement with the fewest hops: the slaves of Terrace's regions
//! follow their master, a native subscriber asks the top itself.

use std::time::Duration;

use anyhow::Result;
use terrace_tests::{Server, ServerOptions, Tree};

use crate::pgbench::{SCHEMA, TABLES, create_tables};
use crate::side::Side;
use crate::workload::{Plan, wait};
use crate::world::{Shape, settle};

pub struct Native {
    servers: Vec<Server>,
}

/// Makes the publication that subscribers ask for.
pub fn publish(server: &Server) {
    let tables = TABLES.join(", ");
    server.sql(&format!("CREATE PUBLICATION native FOR TABLE {tables}"));
}

impl Native {
    /// Boots the servers and waits until all have their initial copy.
    pub fn boot(tree: &Tree, shape: Shape, plan: &Plan) -> Result<Native> {
        let mut native = Native {
            servers: Vec::new(),
        };
        for i in 0..shape.region + shape.branch {
            let name = if i < shape.region {
                format!("native-region-{}", i + 1)
            } else {
                format!("native-branch-{}", i - shape.region + 1)
            };
            let options = ServerOptions {
                extension: false,
                ..Default::default()
            };
            let mut server = Server::start(&tree.scratch, &name, &options)?;
            settle(&mut server)?;
            create_tables(&server, plan.scale, "", false)?;
            server.sql(SCHEMA);
            publish(&server);
            let above = match i.checked_sub(shape.region) {
                None => &tree.top,
                Some(branch) => &native.servers[branch % shape.region],
            };
            server.sql(&format!(
                "CREATE SUBSCRIPTION bench CONNECTION '{}' PUBLICATION native \
                 WITH (slot_name = {})",
                above.conninfo(),
                name.replace('-', "_")
            ));
            wait_for(&server, COPIED)?;
            native.servers.push(server);
        }
        Ok(native)
    }

    /// Sets `synchronous_commit` of every subscription; `off` is PostgreSQL's default.
    pub fn synchronous_commit(&self, value: &str) {
        let sql = format!("ALTER SUBSCRIPTION bench SET (synchronous_commit = {value})");
        self.servers.iter().for_each(|server| server.sql(&sql));
    }
}

const COPIED: &str = "SELECT bool_and(srsubstate = 'r') FROM pg_subscription_rel";
const IDLE: &str = "SELECT bool_and(pid IS NULL) FROM pg_stat_subscription";

fn wait_for(server: &Server, sql: &str) -> Result<()> {
    let what = format!("{}: {sql}", server.name);
    wait(&what, Duration::from_millis(20), || {
        Ok(server.value(sql) == "t")
    })
}

impl Side for Native {
    fn resume(&mut self) -> Result<()> {
        let sql = "ALTER SUBSCRIPTION bench ENABLE";
        self.servers.iter().for_each(|server| server.sql(sql));
        Ok(())
    }

    fn pause(&mut self) -> Result<()> {
        let sql = "ALTER SUBSCRIPTION bench DISABLE";
        self.servers.iter().for_each(|server| server.sql(sql));
        self.servers
            .iter()
            .try_for_each(|server| wait_for(server, IDLE))
    }

    fn servers(&self) -> Vec<&Server> {
        self.servers.iter().collect()
    }

    fn helpers(&self) -> Vec<i32> {
        Vec::new()
    }
}
