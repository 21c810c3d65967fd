//! Removing a cluster: the inverse of everything that made it, found by names, not by memory.
//!
//! Works after a crash of anything, and twice in a row. Does not stop at the first failure: what can go, goes.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::layout::{Layout, MAX_NODES};
use crate::{cgroups, containers, underlay};

/// Removes all traces of the cluster.
pub fn remove(layout: &Layout) -> Result<()> {
    // Known from logs and folders that are removed below.
    let shared = containers::shared_files(layout);
    let steps: [(&str, Step); 7] = [
        ("end its processes", |l, _| cgroups::kill_all(&l.cgroup())),
        ("end its containers", |l, _| kill_containers(l)),
        ("unmount its folders", |l, _| unmount_below(&[l.run(), l.state()])),
        ("remove its network", |l, _| underlay::remove(l)),
        ("remove its control groups", |l, _| cgroups::remove(&l.cgroup())),
        ("remove what the runtime left", |_, shared| remove_shared(shared)),
        ("remove its folders", |l, _| {
            remove_folder(&l.run())?;
            remove_folder(&l.state())
        }),
    ];
    let mut failures = Vec::new();
    for (what, step) in steps {
        if let Err(e) = step(layout, &shared) {
            failures.push(format!("{what}: {e:#}"));
        }
    }
    if failures.is_empty() {
        return Ok(());
    }
    bail!("cluster {} is not gone:\n  {}", layout.id(), failures.join("\n  "))
}

type Step = fn(&Layout, &[PathBuf]) -> Result<()>;

/// Whether anything of the cluster is there.
pub fn traces(layout: &Layout) -> bool {
    layout.run().exists()
        || layout.state().exists()
        || !underlay::namespaces(layout).is_empty()
        || Path::new("/sys/class/net").join(layout.bridge()).exists()
}

/// Kills what was started without our control group, such as by `ctr run`.
fn kill_containers(layout: &Layout) -> Result<()> {
    let nodes = (1..=MAX_NODES).map(|number| layout.node(number));
    for bundle in nodes.flat_map(|node| containers::bundles(&node)) {
        let id = bundle.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let pid = fs::read_to_string(bundle.join("init.pid")).unwrap_or_default();
        let Ok(pid) = pid.trim().parse::<i32>() else { continue };
        // The number may be another process's by now: only one in a group with the container's name is meant.
        let group = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        if group.lines().any(|l| l.ends_with(&format!("/{id}"))) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    Ok(())
}

fn remove_shared(paths: &[PathBuf]) -> Result<()> {
    for path in paths {
        let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        absent_is_fine(removed).with_context(|| format!("remove {}", path.display()))?;
    }
    // Only when empty: another containerd may use them.
    for folder in ["runc/k8s.io", "runc", "s", "fifo", "."] {
        let _ = fs::remove_dir(Path::new(containers::SHARED).join(folder));
    }
    Ok(())
}

/// Unmounts all that is mounted below some folders.
pub fn unmount_below(folders: &[PathBuf]) -> Result<()> {
    let mut points = mounts(folders)?;
    // What was mounted last is on top.
    points.reverse();
    let mut failed = None;
    for point in points {
        if let Err(e) = umount2(&point, MntFlags::MNT_DETACH) {
            failed = Some(anyhow::Error::from(e).context(format!("unmount {}", point.display())));
        }
    }
    failed.map_or(Ok(()), Err)
}

/// What is mounted below some folders.
pub(crate) fn mounts(folders: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("read the mount table")?;
    Ok(mounts_below(&table, folders))
}

fn mounts_below(table: &str, folders: &[PathBuf]) -> Vec<PathBuf> {
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| PathBuf::from(unescape(point)))
        .filter(|point| folders.iter().any(|f| point.starts_with(f)))
        .collect()
}

/// The mount table writes blanks as `\040` and so on.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
}

fn remove_folder(folder: &Path) -> Result<()> {
    // A part of the machine's own files may be mounted for a pod: those must not be deleted with it.
    let mounted = mounts(&[folder.to_owned()])?;
    ensure!(mounted.is_empty(), "{mounted:?} are still mounted");
    absent_is_fine(fs::remove_dir_all(folder))
        .with_context(|| format!("remove {}", folder.display()))?;
    // The folder of all clusters goes with the last one.
    if let Some(parent) = folder.parent() {
        let _ = fs::remove_dir(parent);
    }
    Ok(())
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_of_the_cluster_are_taken() {
        let table = "1 0 0:1 / / rw - ext4 x rw\n\
                     2 1 0:2 / /run/mesh-dev/t1/bpf rw - bpf bpf rw\n\
                     3 1 0:3 / /run/mesh-dev/t12/bpf rw - bpf bpf rw\n\
                     4 1 0:4 / /var/lib/mesh-dev/t1/a\\040b rw - tmpfs x rw\n";
        let folders = ["/run/mesh-dev/t1", "/var/lib/mesh-dev/t1"].map(PathBuf::from);
        let found = mounts_below(table, &folders);
        assert_eq!(found, ["/run/mesh-dev/t1/bpf", "/var/lib/mesh-dev/t1/a b"].map(PathBuf::from));
    }
}
