//! What a cluster's things are known by, also after it is gone, and a search of the whole machine for them.
//!
//! Other clusters and other containers may come and go on the machine meanwhile.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::cluster::Cluster;
use crate::layout::Layout;
use crate::{cgroups, command, containers, teardown, underlay};

/// The marks of one cluster.
pub struct Marks {
    layout: Layout,
    /// Its containers and the sockets of their shims, those included that ended long ago.
    names: BTreeSet<String>,
    /// Its network namespaces: a process may hold one that has no name any more.
    namespaces: BTreeSet<u64>,
}

impl Marks {
    /// The marks of a cluster that is there.
    pub fn of(cluster: &Cluster) -> Result<Self> {
        let layout = cluster.layout().clone();
        let mut names = BTreeSet::new();
        let mut namespaces = BTreeSet::new();
        for node in cluster.nodes().iter().map(|node| node.layout()) {
            let ids = containers::ids(&layout, node);
            names.extend(ids.iter().map(|id| containers::socket(node, id)));
            names.extend(ids);
            let namespace = fs::metadata(node.netns_path());
            namespaces.insert(namespace.with_context(|| format!("find {}", node.netns))?.ino());
        }
        Ok(Self { layout, names, namespaces })
    }

    /// All that is on the machine with one of the marks: its kind and its name.
    pub fn search(&self) -> Result<BTreeSet<(&'static str, String)>> {
        let layout = &self.layout;
        let mut found = BTreeSet::new();
        let mut add = |kind: &'static str, names: Vec<String>| {
            found.extend(names.into_iter().map(|name| (kind, name)));
        };
        add("device", underlay::devices(layout)?);
        add("namespace", underlay::namespaces(layout));
        let rules = command::run("nft", &["list", "ruleset"]).unwrap_or_default();
        let names_us = |line: &&str| line.contains(&layout.bridge());
        add("rule", rules.lines().filter(names_us).map(str::to_owned).collect());
        add("mount", shown(teardown::mounts(&[layout.run(), layout.state()])?));
        add("folder", shown([layout.run(), layout.state()].into_iter().filter(|f| f.exists())));
        for hierarchy in cgroups::hierarchies()? {
            let groups = cgroups::tree(&hierarchy.root);
            add("control group", shown(groups.into_iter().filter(|g| self.is_our_group(g))));
        }
        add(
            "runtime file",
            shown(files(Path::new(containers::SHARED)).into_iter().filter(|f| self.is_our_file(f))),
        );
        add("process", self.processes());
        Ok(found)
    }

    fn is_our_group(&self, path: &Path) -> bool {
        let is_ours = |part: &str| part == self.layout.cgroup() || self.names.contains(part);
        path.iter().any(|part| part.to_str().is_some_and(is_ours))
    }

    /// A shim's files have the container's id as their name or at its beginning.
    fn is_our_file(&self, path: &Path) -> bool {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        self.names.contains(name.as_ref())
            || name.get(..64).is_some_and(|start| self.names.contains(start))
    }

    fn processes(&self) -> Vec<String> {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let processes = entries.map(|entry| entry.path()).filter(|path| self.is_our_process(path));
        let line = |path: PathBuf| {
            let words = fs::read(path.join("cmdline")).unwrap_or_default();
            format!("{} {}", path.display(), String::from_utf8_lossy(&words).replace('\0', " "))
        };
        processes.map(line).collect()
    }

    /// By its control group, its network, its program or its arguments.
    fn is_our_process(&self, path: &Path) -> bool {
        if path.file_name().is_some_and(|name| *name == *std::process::id().to_string()) {
            return false;
        }
        let folders = [self.layout.run(), self.layout.state()];
        let group = fs::read_to_string(path.join("cgroup")).unwrap_or_default();
        let network = fs::metadata(path.join("ns/net")).map(|m| m.ino());
        let program = fs::read_link(path.join("exe")).unwrap_or_default();
        let words = fs::read(path.join("cmdline")).unwrap_or_default();
        group.lines().any(|line| self.is_our_group(Path::new(line)))
            || network.is_ok_and(|inode| self.namespaces.contains(&inode))
            || folders.iter().any(|folder| {
                let text = folder.as_os_str().as_encoded_bytes();
                program.starts_with(folder)
                    || words.split(|byte| *byte == 0).any(|word| {
                        word.strip_prefix(text)
                            .is_some_and(|rest| matches!(rest.first(), None | Some(b'/')))
                    })
            })
    }
}

fn shown(paths: impl IntoIterator<Item = PathBuf>) -> Vec<String> {
    paths.into_iter().map(|path| path.display().to_string()).collect()
}

/// Everything below a folder, without following links.
fn files(top: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(top).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(files(&entry.path()));
        }
        found.push(entry.path());
    }
    found
}
