//! Disks that go wrong, mounted over a directory. Only root may mount.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A file system of its own that holds what the directory held; unmounted when dropped.
pub struct Disk {
    path: PathBuf,
    /// Thaws the disk when its input ends, so also when this process is killed.
    thaws: Option<Child>,
}

fn done(program: &str, arguments: &[&str]) -> bool {
    let output = Command::new(program).args(arguments).output();
    output.is_ok_and(|output| output.status.success())
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

impl Disk {
    /// 24 MiB of memory, to be filled.
    pub fn small(path: &Path) -> Option<Disk> {
        Disk::of(path, 24)
    }

    /// So many MiB.
    pub fn of(path: &Path, mib: u32) -> Option<Disk> {
        let size = format!("size={mib}m");
        Disk::over(path, &["-t", "tmpfs", "-o", &size, "tmpfs"])
    }

    /// A file system on a loop device, to be frozen.
    pub fn freezable(path: &Path) -> Option<Disk> {
        let image = path.with_extension("image");
        let file = std::fs::File::create(&image).expect("create the image");
        file.set_len(256 << 20).expect("size the image");
        if !done("mkfs.ext4", &["-q", "-F", text(&image)]) {
            crate::skipped("there is no mkfs.ext4 here");
            return None;
        }
        Disk::over(path, &["-o", "loop", text(&image)])
    }

    /// Whatever uses the directory must be stopped meanwhile.
    fn over(path: &Path, mount: &[&str]) -> Option<Disk> {
        let kept = path.with_extension("kept");
        std::fs::rename(path, &kept).expect("rename");
        std::fs::create_dir(path).expect("create");
        if !done("mount", &[mount, &[text(path)]].concat()) {
            crate::skipped("mounting a disk takes root, and a loop device");
            return None;
        }
        let disk = Disk {
            path: path.to_owned(),
            thaws: None,
        };
        let all = kept.join(".");
        assert!(
            done("cp", &["-a", text(&all), text(path)]),
            "copy {all:?} to {path:?}"
        );
        Some(disk)
    }

    /// Leaves no room.
    pub fn fill(&self) {
        let file = format!("of={}", text(&self.filler()));
        let filled = !done("dd", &["if=/dev/zero", &file, "bs=64k"]);
        assert!(filled, "the disk is full now");
    }

    /// Gives the room back.
    pub fn make_room(&self) {
        std::fs::remove_file(self.filler()).expect("make room");
    }

    fn filler(&self) -> PathBuf {
        self.path.join("filler")
    }

    /// From now on every write and fsync waits.
    pub fn freeze(&mut self) {
        let thaw = "cat > /dev/null; exec fsfreeze --unfreeze \"$0\"";
        let child = Command::new("setsid")
            .args(["sh", "-c", thaw])
            .arg(&self.path)
            .stdin(Stdio::piped())
            .spawn();
        self.thaws = Some(child.expect("start what thaws the disk"));
        assert!(
            done("fsfreeze", &["--freeze", text(&self.path)]),
            "freeze the disk"
        );
    }

    /// Lets them go on.
    pub fn thaw(&mut self) {
        if let Some(mut child) = self.thaws.take() {
            drop(child.stdin.take());
            let thawed = child.wait().is_ok_and(|status| status.success());
            assert!(thawed || std::thread::panicking(), "thaw the disk");
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.thaw();
        done("umount", &["-l", text(&self.path)]);
    }
}
