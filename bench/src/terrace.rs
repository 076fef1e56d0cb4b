//! Terrace: the bridges of a tree, started and stopped together.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use terrace_tests::{Server, Tree};

use crate::proc;
use crate::side::Side;
use crate::workload::wait;

pub struct Terrace {
    pub tree: Tree,
}

impl Terrace {
    /// Waits until the top sees every server streaming.
    pub fn wait_streaming(&mut self) -> Result<()> {
        wait("every server streams", Duration::from_millis(50), || {
            for node in &mut self.tree.nodes {
                let name = &node.server.name;
                ensure!(node.bridge.is_running(), "the bridge of {name} has ended");
            }
            Ok(self.tree.is_streaming())
        })
    }

    /// Puts lines at the end of every bridge's configuration; the file as it was is returned.
    pub fn configure(&self, lines: &str) -> Result<Vec<String>> {
        let nodes = self.tree.nodes.iter();
        nodes
            .map(|node| {
                let before = std::fs::read_to_string(node.bridge.config())?;
                std::fs::write(node.bridge.config(), format!("{before}\n{lines}\n"))?;
                Ok(before)
            })
            .collect()
    }

    /// Puts the files back.
    pub fn restore(&self, files: &[String]) -> Result<()> {
        for (node, text) in self.tree.nodes.iter().zip(files) {
            std::fs::write(node.bridge.config(), text)?;
        }
        Ok(())
    }

    /// The last lines of each bridge's log, for the reader of a failure.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for node in &self.tree.nodes {
            text += &format!("{}:\n", node.bridge.name);
            let log = node.bridge.logged();
            let lines: Vec<&str> = log.lines().rev().take(8).collect();
            for line in lines.iter().rev() {
                text += &format!("    {line}\n");
            }
        }
        text
    }
}

impl Side for Terrace {
    fn resume(&mut self) -> Result<()> {
        self.tree.start_bridges()
    }

    fn pause(&mut self) -> Result<()> {
        for node in self.tree.nodes.iter_mut().rev() {
            let name = node.server.name.clone();
            let status = node.bridge.stop();
            let status = status.with_context(|| format!("the bridge of {name} did not run"))?;
            ensure!(status.success(), "the bridge of {name} ended: {status}");
        }
        let sql = "SELECT count(*) FROM pg_replication_slots \
                   WHERE active AND slot_name LIKE 'terrace%'";
        wait("the slots are free", Duration::from_millis(10), || {
            Ok(self.tree.top.value(sql) == "0")
        })
    }

    fn servers(&self) -> Vec<&Server> {
        self.tree.nodes.iter().map(|node| &node.server).collect()
    }

    fn helpers(&self) -> Vec<i32> {
        let nodes = self.tree.nodes.iter();
        nodes
            .filter_map(|node| proc::bridge(&node.bridge))
            .collect()
    }
}
