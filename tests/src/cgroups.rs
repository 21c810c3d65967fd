//! Control groups of a cluster, in every hierarchy that is mounted: v2, v1, or both ("hybrid").
//!
//! Processes are only ever moved in the v2 hierarchy, which is where the agent's programs are attached and where
//! a group can be killed as a whole. runc makes groups of the same names in the others.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// Mount point.
    pub root: PathBuf,
    /// Whether it is the v2 one.
    pub unified: bool,
}

/// All hierarchies, from the mount table.
pub fn hierarchies() -> Result<Vec<Hierarchy>> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("read the mount table")?;
    Ok(parse_mounts(&table))
}

fn parse_mounts(table: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in table.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let unified = match right.split(' ').next() {
            Some("cgroup2") => true,
            Some("cgroup") => false,
            _ => continue,
        };
        let Some(root) = left.split(' ').nth(4) else { continue };
        let root = PathBuf::from(root);
        if !found.iter().any(|h| h.root == root || (unified && h.unified)) {
            found.push(Hierarchy { root, unified });
        }
    }
    found
}

/// Mount point of the v2 hierarchy.
pub fn unified_root() -> Result<PathBuf> {
    let unified = hierarchies()?.into_iter().find(|h| h.unified).map(|h| h.root);
    unified
        .context("no cgroup v2 hierarchy is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")
}

/// Makes a group in the v2 hierarchy, with its parents.
pub fn make(relative: &str) -> Result<PathBuf> {
    let path = unified_root()?.join(relative);
    fs::create_dir_all(&path).with_context(|| format!("make control group {}", path.display()))?;
    Ok(path)
}

/// Processes of a group and of those below it, in the v2 hierarchy.
pub fn members(relative: &str) -> Result<Vec<Pid>> {
    let mut found = Vec::new();
    for folder in tree(&unified_root()?.join(relative)) {
        let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
        found.extend(text.lines().filter_map(|l| l.parse().ok()).map(Pid::from_raw));
    }
    Ok(found)
}

/// Kills every process of a group and waits until none is left.
pub fn kill_all(relative: &str) -> Result<()> {
    let group = unified_root()?.join(relative);
    if !group.exists() {
        return Ok(());
    }
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        // Absent before Linux 5.14: there the signal below does it, again until no fork is left.
        let _ = fs::write(group.join("cgroup.kill"), "1");
        let left = members(relative)?;
        if left.is_empty() {
            return Ok(());
        }
        for pid in &left {
            // Gone in between is what is wanted.
            let _ = kill(*pid, Signal::SIGKILL);
        }
        if Instant::now() > end {
            bail!("processes {left:?} of control group {relative} do not end");
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Removes a group and those below it in all hierarchies. Its processes must be gone.
pub fn remove(relative: &str) -> Result<()> {
    for hierarchy in hierarchies()? {
        let mut folders = tree(&hierarchy.root.join(relative));
        folders.reverse();
        for folder in folders {
            remove_group(&folder)?;
        }
    }
    Ok(())
}

/// A group whose last process has just ended stays busy for a moment.
fn remove_group(folder: &Path) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        match fs::remove_dir(folder) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) if Instant::now() > end => {
                return Err(e).with_context(|| format!("remove group {}", folder.display()));
            }
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// A folder and all folders below it, parents first; empty when it does not exist.
pub(crate) fn tree(top: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![top.to_owned()];
    while let Some(folder) = open.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        let folders = entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
        open.extend(folders.map(|e| e.path()));
        found.push(folder);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hybrid_and_pure_mount_tables() {
        let hybrid = "30 25 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      31 25 0:27 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n\
                      32 25 0:28 / /proc rw - proc proc rw\n";
        let found = parse_mounts(hybrid);
        assert_eq!(found.len(), 2);
        assert_eq!(found[1].root, Path::new("/sys/fs/cgroup/unified"));
        assert!(found[1].unified && !found[0].unified);
        let pure = "30 25 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup rw\n";
        assert_eq!(
            parse_mounts(pure),
            [Hierarchy { root: "/sys/fs/cgroup".into(), unified: true }]
        );
    }

    #[test]
    fn folders_come_before_what_is_in_them() {
        let top = tempfile::tempdir().unwrap();
        fs::create_dir_all(top.path().join("a/b")).unwrap();
        let found = tree(top.path());
        assert_eq!(found, [top.path().to_owned(), top.path().join("a"), top.path().join("a/b")]);
        assert!(tree(&top.path().join("none")).is_empty());
    }
}
