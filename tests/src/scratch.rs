//! Directories and ports of one test.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};

static MADE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Where those are made that follow; none is the system's own, `TMPDIR`.
static ROOM: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Directories that are made from now on are made in this one.
pub fn make_in(room: &Path) {
    *ROOM.lock().unwrap_or_else(PoisonError::into_inner) = Some(room.to_owned());
}

/// Removes all that were made, for a program that is interrupted.
pub fn remove_all() {
    for path in MADE.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        let _ = std::fs::remove_dir_all(path);
    }
}

/// A temporary directory: removed at the end, kept when the test has failed.
pub struct Scratch {
    path: PathBuf,
    kept: bool,
}

impl Scratch {
    /// Makes the directory; others may pass through it, as the servers may run as another user.
    pub fn new(prefix: &str) -> Result<Scratch> {
        use std::os::unix::fs::PermissionsExt;
        let room = ROOM.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let directory = tempfile::Builder::new()
            .prefix(prefix)
            .permissions(std::fs::Permissions::from_mode(0o755))
            .tempdir_in(room.unwrap_or_else(std::env::temp_dir))
            .context("make a scratch directory")?;
        let path = directory.keep();
        let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        made.push(path.clone());
        Ok(Scratch { path, kept: false })
    }

    /// Leaves it there when it ends.
    pub fn keep(&mut self) {
        self.kept = true;
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.kept || std::thread::panicking() {
            eprintln!("logs and data are left in {}", self.path.display());
        } else {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// A port of 127.0.0.1 that nobody listens on, below those given to outgoing connections.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = std::process::id().wrapping_mul(97) % 12_000;
    loop {
        let step = u32::from(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = u16::try_from(20_000 + (first + step) % 12_000).unwrap_or(20_000);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
