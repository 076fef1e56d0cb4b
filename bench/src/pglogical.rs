//! pglogical in the shape of the native subscriptions, where it is installed.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use terrace_tests::server::program;
use terrace_tests::{Server, Tree};

use crate::pgbench::{KEYLESS, SCHEMA, TABLES, create_tables};
use crate::side::Side;
use crate::workload::{Plan, wait};
use crate::world::{Shape, at_once, bare};

/// Subscribers of the tree's top, and of each other.
pub struct Pglogical {
    servers: Vec<Server>,
    /// How to ask whether somebody reads from it: the top and those of the first level.
    providers: Vec<postgres::Config>,
}

/// Whether this PostgreSQL has it.
pub fn is_installed() -> bool {
    let output = Command::new(program("pg_config"))
        .arg("--pkglibdir")
        .output();
    let directory = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    directory.is_ok_and(|directory| Path::new(&directory).join("pglogical.so").is_file())
}

/// What a server must have been started with.
fn preload(server: &Server) -> Vec<(&'static str, &'static str)> {
    let mut lines = vec![("shared_preload_libraries", "pglogical")];
    let listed = "SELECT 1 FROM pg_settings WHERE name = 'output_plugin_libraries'";
    if !server.rows(listed).is_empty() {
        lines.push((
            "output_plugin_libraries",
            "pgoutput, test_decoding, pglogical_output",
        ));
    }
    lines
}

/// Starts a server anew, with it.
pub fn start_with_it(server: &mut Server) -> Result<()> {
    for (name, value) in preload(server) {
        server.sql(&format!("ALTER SYSTEM SET {name} = {value}"));
    }
    server.stop();
    server.restart()?;
    server.sql("CREATE EXTENSION pglogical");
    Ok(())
}

fn dsn(server: &Server) -> String {
    let directory = server.socket_dir();
    format!(
        "host={} port={} user=postgres dbname=app",
        directory.display(),
        server.port
    )
}

/// Each has a name of its own, as its slot at the provider gets its name from it.
fn subscription(server: &Server) -> String {
    server.name.replace('-', "_")
}

/// Makes a node that others may subscribe to.
pub fn provide(server: &Server, tables: &[&str]) {
    server.sql(&format!(
        "SELECT pglogical.create_node('{}', '{}')",
        server.name,
        dsn(server)
    ));
    for table in tables {
        // One without a key can only be added to.
        let set = match *table {
            KEYLESS => continue,
            "pgbench_history" => "default_insert_only",
            _ => "default",
        };
        server.sql(&format!(
            "SELECT pglogical.replication_set_add_table('{set}', '{table}')"
        ));
    }
}

/// Subscribes and waits for the initial copy.
pub fn subscribe(server: &Server, above: &Server) -> Result<()> {
    server.sql(&format!(
        "SELECT pglogical.create_subscription('{}', '{}', '{{default,default_insert_only}}')",
        subscription(server),
        dsn(above)
    ));
    let copied =
        "SELECT bool_and(status = 'replicating') FROM pglogical.show_subscription_status()";
    wait("pglogical has its copy", Duration::from_millis(50), || {
        Ok(server.value(copied) == "t")
    })
}

impl Pglogical {
    /// Boots subscribers and waits until all have their initial copy.
    pub fn boot(tree: &mut Tree, shape: Shape, plan: &Plan) -> Result<Pglogical> {
        start_with_it(&mut tree.top)?;
        provide(&tree.top, &TABLES);
        let mut servers = Vec::new();
        for number in 1..=shape.region + shape.branch {
            servers.push(bare(tree, &format!("pglogical-{number}"))?);
        }
        at_once(servers.iter_mut(), |server| {
            start_with_it(server)?;
            create_tables(server, plan.scale, "", false)?;
            server.sql(SCHEMA);
            provide(server, &TABLES);
            Ok(())
        })?;
        shape.subscribe(&servers, &tree.top, subscribe)?;
        let providers = servers[..shape.region]
            .iter()
            .chain([&tree.top])
            .map(Server::config);
        let providers = providers.collect();
        Ok(Pglogical { servers, providers })
    }

    /// Enables or disables all subscriptions.
    fn alter(&self, what: &str) {
        for server in &self.servers {
            let name = subscription(server);
            server.sql(&format!(
                "SELECT pglogical.alter_subscription_{what}('{name}', true)"
            ));
        }
    }
}

impl Side for Pglogical {
    fn resume(&mut self) -> Result<()> {
        self.alter("enable");
        Ok(())
    }

    fn pause(&mut self) -> Result<()> {
        self.alter("disable");
        let sql = "SELECT FROM pg_replication_slots WHERE active AND plugin = 'pglogical_output'";
        self.providers.iter().try_for_each(|provider| {
            let connected = provider.connect(postgres::NoTls);
            let mut provider = connected.context("connect to a provider")?;
            wait("pglogical is idle", Duration::from_millis(20), || {
                Ok(provider.query(sql, &[])?.is_empty())
            })
        })
    }

    fn servers(&self) -> Vec<&Server> {
        self.servers.iter().collect()
    }

    fn helpers(&self) -> Vec<i32> {
        Vec::new()
    }
}
