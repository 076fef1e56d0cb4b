//! Native subscriptions in the shape of the tree: each server of a level
//! subscribes to one of the level above.
//!
//! This is the arrangement with the fewest hops: the slaves of Terrace's regions
//! follow their master, a native subscriber asks the top itself.

use std::time::Duration;

use anyhow::Result;
use terrace_tests::{Server, Tree};

use crate::pgbench::{SCHEMA, TABLES, create_tables};
use crate::side::Side;
use crate::workload::{Plan, wait};
use crate::world::{Shape, at_once, bare};

pub struct Native {
    servers: Vec<Server>,
}

/// Makes the publication that subscribers ask for.
pub fn publish(server: &Server, tables: &[&str]) {
    let tables = tables.join(", ");
    server.sql(&format!("CREATE PUBLICATION native FOR TABLE {tables}"));
}

impl Native {
    /// Boots the servers and waits until all have their initial copy.
    pub fn boot(tree: &Tree, shape: Shape, plan: &Plan) -> Result<Native> {
        let names: Vec<String> = (1..=shape.region)
            .map(|i| format!("native-region-{i}"))
            .chain((1..=shape.branch).map(|i| format!("native-branch-{i}")))
            .collect();
        let mut servers = Vec::new();
        for name in &names {
            servers.push(bare(tree, name)?);
        }
        at_once(servers.iter(), |server| {
            create_tables(server, plan.scale, "", false)?;
            server.sql(SCHEMA);
            publish(server, &TABLES);
            Ok(())
        })?;
        shape.subscribe(&servers, &tree.top, subscribe)?;
        Ok(Native { servers })
    }

    /// Sets `synchronous_commit` of every subscription; `off` is PostgreSQL's default.
    pub fn synchronous_commit(&self, value: &str) {
        let sql = format!("ALTER SUBSCRIPTION bench SET (synchronous_commit = {value})");
        self.servers.iter().for_each(|server| server.sql(&sql));
    }

    /// Sets `streaming` and `binary` of every subscription; both are `off` in PostgreSQL 15 by default.
    pub fn streaming_and_binary(&self, value: &str) {
        let sql = format!("ALTER SUBSCRIPTION bench SET (streaming = {value}, binary = {value})");
        self.servers.iter().for_each(|server| server.sql(&sql));
    }

    /// Sets with what long values are compressed; `pglz` is PostgreSQL's default.
    pub fn compression(&self, method: &str) {
        for server in &self.servers {
            server.sql(&format!(
                "ALTER SYSTEM SET default_toast_compression = {method}"
            ));
            server.sql("SELECT pg_reload_conf()");
        }
    }
}

/// Subscribes and waits for the initial copy.
pub fn subscribe(server: &Server, above: &Server) -> Result<()> {
    server.sql(&format!(
        "CREATE SUBSCRIPTION bench CONNECTION '{}' PUBLICATION native WITH (slot_name = {})",
        above.conninfo(),
        server.name.replace('-', "_")
    ));
    wait_for(server, COPIED)
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
