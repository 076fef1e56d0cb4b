//! `terrace-bridge`: the command line.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use terrace_bridge::check::check;
use terrace_bridge::config::Config;
use terrace_bridge::lsn::Lsn;
use terrace_bridge::show::say;
use terrace_bridge::{compare, control, log, node, show};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Keeps the Postgres beside it in step with the top of a Terrace tree.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run until stopped
    Run {
        /// Configuration file
        #[arg(short)]
        config: PathBuf,
    },
    /// Say what would keep `run` from working, and how to mend it
    Check {
        /// Configuration file
        #[arg(short)]
        config: PathBuf,
    },
    /// Make another server of the domain its master
    Switchover {
        /// Configuration file of any server of the domain
        #[arg(short)]
        config: PathBuf,
        /// The domain
        #[arg(long)]
        domain: String,
        /// The server; without it, the best one
        #[arg(long)]
        to: Option<String>,
    },
    /// Throw this server's data away and copy it anew
    Resync {
        /// Configuration file
        #[arg(short)]
        config: PathBuf,
        /// Only this table, for this server's whole domain
        #[arg(long)]
        table: Option<String>,
        /// With a table: for every domain that gets it
        #[arg(long, requires = "table")]
        everywhere: bool,
    },
    /// Say whether every server has the rows of the top
    Compare(Which),
    /// Compare, and send what differs once more
    Repair(Which),
    /// Leave out the transaction that this server cannot apply
    Skip {
        /// Configuration file
        #[arg(short)]
        config: PathBuf,
        /// Where it ends, as the reason in terrace.lag tells
        #[arg(long)]
        lsn: Lsn,
    },
    /// Show the tree as the database beside this bridge knows it
    Status {
        /// Configuration file
        #[arg(short)]
        config: PathBuf,
        /// As JSON
        #[arg(long)]
        json: bool,
        /// Again every second
        #[arg(long)]
        watch: bool,
    },
}

/// What is compared.
#[derive(Args)]
struct Which {
    /// Configuration file of any server
    #[arg(short)]
    config: PathBuf,
    /// Only this table
    #[arg(long)]
    table: Option<String>,
    /// Only servers of this domain
    #[arg(long)]
    domain: Option<String>,
}

/// Followers and clients take a descriptor each, and the usual limit is for programs that use
/// select().
fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // What cannot be had is done without.
    setrlimit(Resource::Nofile, limit).ok();
}

fn main() -> ExitCode {
    // What we write holds rows, and the socket takes orders.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    raise_file_limit();
    let arguments = Arguments::parse();
    log::start();
    // The other half is for the Postgres beside us; the link has a thread of its own. One that
    // reads the queue from a disk that hangs must not keep the others from telling and deciding.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads((cores / 2).max(2))
        .enable_all()
        .build();
    let result = runtime
        .context("start the runtime")
        .and_then(|rt| rt.block_on(run(arguments)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("terrace-bridge: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    match arguments.command {
        Command::Run { config } => {
            let config = Config::load(&config)?;
            log::name(&config.node.domain, &config.node.name);
            let cancel = CancellationToken::new();
            stop_on_signal(cancel.clone())?;
            node::run(config, cancel).await
        }
        Command::Check { config } => {
            let findings = check(&Config::load(&config)?).await;
            for finding in &findings {
                let mark = if finding.good { "ok   " } else { "WRONG" };
                say(format!("{mark} {}", finding.text));
            }
            let wrong = findings.iter().filter(|finding| !finding.good).count();
            anyhow::ensure!(wrong == 0, "{wrong} to mend");
            Ok(())
        }
        Command::Switchover { config, domain, to } => {
            control::switchover(&Config::load(&config)?, &domain, to.as_deref()).await
        }
        Command::Resync {
            config,
            table,
            everywhere,
        } => {
            let config = Config::load(&config)?;
            match table {
                Some(table) => compare::resync_table(&config, &table, everywhere).await,
                None => control::resync(&config).await,
            }
        }
        Command::Compare(which) => {
            let (table, domain) = (which.table.as_deref(), which.domain.as_deref());
            compare::compare(&Config::load(&which.config)?, table, domain).await
        }
        Command::Repair(which) => {
            let (table, domain) = (which.table.as_deref(), which.domain.as_deref());
            compare::repair(&Config::load(&which.config)?, table, domain).await
        }
        Command::Skip { config, lsn } => control::skip(&Config::load(&config)?, lsn).await,
        Command::Status {
            config,
            json,
            watch,
        } => loop {
            show::status(&Config::load(&config)?, json).await?;
            if !watch {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        },
    }
}

fn stop_on_signal(cancel: CancellationToken) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("handle SIGINT")?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        cancel.cancel();
    });
    Ok(())
}
