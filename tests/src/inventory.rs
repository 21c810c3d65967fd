//! What a cluster could leave behind on a machine, listed before and after.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::cgroups;
use crate::command;

/// Names of everything that matters, one line each, prefixed with its kind.
pub type Inventory = BTreeSet<String>;

/// Lists devices, namespaces, firewall rules, mounts, control groups, processes and runtime files.
pub fn take() -> Result<Inventory> {
    let mut all = Inventory::new();
    add(&mut all, "device", names("/sys/class/net"));
    add(&mut all, "netns", names("/run/netns"));
    let rules = command::run("nft", &["list", "ruleset"]).unwrap_or_default();
    add(&mut all, "nft", rules.lines().map(|l| l.trim().to_owned()).filter(|l| l.len() > 1));
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let points = mounts.lines().filter_map(|l| l.split(' ').nth(1).map(str::to_owned));
    add(&mut all, "mount", points);
    for hierarchy in cgroups::hierarchies()? {
        let mut groups = Vec::new();
        // Two levels tell ours from the machine's own, whose deeper ones come and go.
        folders(&hierarchy.root, 2, &mut groups);
        add(&mut all, "cgroup", groups.iter().map(|g| g.display().to_string()));
    }
    for folder in ["/run/containerd/s", "/run/containerd/runc/k8s.io", "/sys/fs/bpf"] {
        add(&mut all, folder, names(folder));
    }
    for folder in ["/run/mesh-dev", "/var/lib/mesh-dev"] {
        add(&mut all, folder, names(folder));
    }
    add(&mut all, "process", processes());
    Ok(all)
}

fn add(all: &mut Inventory, kind: &str, names: impl IntoIterator<Item = String>) {
    all.extend(names.into_iter().map(|n| format!("{kind}: {n}")));
}

fn names(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().into_string().ok()).collect()
}

fn folders(top: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    if depth == 0 {
        return;
    }
    for entry in fs::read_dir(top).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            found.push(entry.path());
            folders(&entry.path(), depth - 1, found);
        }
    }
}

/// Command lines of the programs that a cluster runs.
fn processes() -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let program = line.split(' ').next().unwrap_or_default();
        let program = program.rsplit('/').next().unwrap_or_default();
        if program.starts_with("mesh-") || program.starts_with("containerd") {
            found.push(format!("{} {line}", entry.file_name().to_string_lossy()));
        }
    }
    found
}
