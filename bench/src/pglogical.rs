//! pglogical over one hop, where it is installed.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use terrace_tests::server::program;
use terrace_tests::{Server, Tree};

use crate::pgbench::{SCHEMA, TABLES, create_tables};
use crate::side::Side;
use crate::workload::{Plan, wait};
use crate::world::bare;

/// A subscriber; its provider is the tree's top.
pub struct Pglogical {
    server: Server,
    /// How to ask the top whether somebody reads from it.
    top: postgres::Config,
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

fn start_with_it(server: &mut Server) -> Result<()> {
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

impl Pglogical {
    /// Boots a subscriber and waits until it has its initial copy.
    pub fn boot(tree: &mut Tree, plan: &Plan) -> Result<Pglogical> {
        start_with_it(&mut tree.top)?;
        let top = &tree.top;
        top.sql(&format!(
            "SELECT pglogical.create_node('top', '{}')",
            dsn(top)
        ));
        for table in TABLES {
            // One without a key can only be added to.
            let set = match table {
                "pgbench_history" => "default_insert_only",
                _ => "default",
            };
            top.sql(&format!(
                "SELECT pglogical.replication_set_add_table('{set}', '{table}')"
            ));
        }
        let mut server = bare(tree, "pglogical")?;
        start_with_it(&mut server)?;
        create_tables(&server, plan.scale, "", false)?;
        server.sql(SCHEMA);
        server.sql(&format!(
            "SELECT pglogical.create_node('below', '{}')",
            dsn(&server)
        ));
        server.sql(&format!(
            "SELECT pglogical.create_subscription('bench', '{}', '{{default,default_insert_only}}')",
            dsn(top)
        ));
        let copied =
            "SELECT bool_and(status = 'replicating') FROM pglogical.show_subscription_status()";
        wait("pglogical has its copy", Duration::from_millis(50), || {
            Ok(server.value(copied) == "t")
        })?;
        let top = top.config();
        Ok(Pglogical { server, top })
    }
}

impl Side for Pglogical {
    fn resume(&mut self) -> Result<()> {
        self.server
            .sql("SELECT pglogical.alter_subscription_enable('bench', true)");
        Ok(())
    }

    fn pause(&mut self) -> Result<()> {
        self.server
            .sql("SELECT pglogical.alter_subscription_disable('bench', true)");
        let mut top = self
            .top
            .connect(postgres::NoTls)
            .context("connect to the top")?;
        let sql = "SELECT FROM pg_replication_slots WHERE active AND plugin = 'pglogical_output'";
        wait("pglogical is idle", Duration::from_millis(20), || {
            Ok(top.query(sql, &[])?.is_empty())
        })
    }

    fn servers(&self) -> Vec<&Server> {
        vec![&self.server]
    }

    fn helpers(&self) -> Vec<i32> {
        Vec::new()
    }
}
