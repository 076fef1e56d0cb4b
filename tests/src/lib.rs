//! Real servers for Terrace's tests: [`Server`] is a Postgres, [`Bridge`] a
//! terrace-bridge, [`Tree`] a top with domains below it.
//!
//! Everything lives in one scratch directory, which is kept when a test fails,
//! and every process ends with the test, however that ends.

pub mod bridge;
pub mod disk;
pub mod histories;
pub mod load;
pub mod netns;
pub mod process;
pub mod proxy;
pub mod random;
pub mod scratch;
pub mod server;
pub mod tree;

use std::time::{Duration, Instant};

pub use bridge::{Bridge, BridgeOptions};
pub use disk::Disk;
pub use scratch::Scratch;
pub use server::{Server, ServerOptions};
pub use tree::{Node, Tree};

/// How long anything may take that a test waits for.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Of every role in a test.
pub const PASSWORD: &str = "terrace";

/// A top by itself, and the directory that it is in.
///
/// # Panics
/// When it does not boot.
pub fn top() -> (Server, Scratch) {
    let scratch = Scratch::new("terrace-").expect("scratch");
    let options = ServerOptions {
        top: true,
        ..Default::default()
    };
    (
        Server::start(&scratch, "top", &options).expect("boot"),
        scratch,
    )
}

/// Polls until `condition` holds; panics with `what` after [`PATIENCE`].
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        let waited = begun.elapsed();
        assert!(waited < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(pause(waited));
    }
}

/// Until one looks again at what was not there for so long: looks take time from what they wait for.
fn pause(waited: Duration) -> Duration {
    (waited / 10).clamp(Duration::from_millis(20), Duration::from_millis(200))
}

/// Says, past the test harness, which shows nothing of a test that passes, that this one did
/// not look at what it is about.
pub fn skipped(why: &str) {
    use std::io::Write;
    let test = std::thread::current();
    let name = test.name().unwrap_or("a test").to_owned();
    writeln!(std::io::stderr(), "SKIPPED {name}: {why}").ok();
}
