//! A node: a namespace that stands for a machine, its containerd and its agent.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::unistd::Pid;

use crate::cluster::{Cluster, backtrace};
use crate::containerd;
use crate::image::Named;
use crate::layout::{Layout, NodeLayout, Subnet};
use crate::process::{self, Daemon, Launch};
use crate::{cgroups, underlay};

/// Where Debian's containernetworking-plugins has the plugin that containerd always calls.
const LOOPBACK: &str = "/usr/lib/cni/loopback";

/// One node of a cluster.
#[derive(Debug, Clone)]
pub struct Node {
    layout: NodeLayout,
    logs: PathBuf,
    subnet: Subnet,
}

impl Node {
    pub(crate) fn new(cluster: &Layout, subnet: Subnet, number: u8) -> Self {
        Self { layout: cluster.node(number), logs: cluster.logs(), subnet }
    }

    /// Name of its Node object.
    pub fn name(&self) -> &str {
        &self.layout.name
    }

    /// Its names and paths.
    pub fn layout(&self) -> &NodeLayout {
        &self.layout
    }

    /// Its addresses on the underlay.
    pub fn addresses(&self) -> (Ipv4Addr, Ipv6Addr) {
        self.subnet.node(self.layout.number)
    }

    /// Its containerd.
    pub fn containerd(&self) -> Daemon {
        self.daemon("containerd")
    }

    /// Its agent.
    pub fn agent(&self) -> Daemon {
        self.daemon("agent")
    }

    /// The agent's worker `dns`, `ingress` or `overlay`, when it runs; not one that was replaced and drains.
    pub fn worker(&self, name: &str) -> Option<Pid> {
        let identity = fs::read(self.layout.agent_run().join(format!("{name}.pid"))).ok()?;
        let identity: serde_json::Value = serde_json::from_slice(&identity).ok()?;
        let mut running = self.workers().into_iter();
        let is_it = |pid: Pid| identity["pid"].as_i64() == Some(pid.as_raw().into());
        running.find(|(found, pid)| found == name && is_it(*pid)).map(|(_, pid)| pid)
    }

    /// Names and processes of the agent's workers: the agent's own program with another word behind it.
    pub fn workers(&self) -> Vec<(String, Pid)> {
        let agent = self.agent().pid();
        let members = cgroups::members(&self.daemons_cgroup()).unwrap_or_default();
        let others = members.into_iter().filter(|pid| Some(*pid) != agent);
        let mut found: Vec<_> = others.filter_map(|pid| Some((worker_name(pid)?, pid))).collect();
        found.sort();
        found
    }

    fn daemon(&self, name: &str) -> Daemon {
        let log = self.logs.join(format!("{}-{name}.log", self.layout.name));
        Daemon::new(name, &self.layout.run, log)
    }

    /// The control group of the node's own programs. A leaf beside the pods: where all controllers are in the
    /// v2 hierarchy, a group with groups below it may hold no processes.
    fn daemons_cgroup(&self) -> String {
        format!("{}/system", self.layout.cgroup)
    }

    /// Namespace, cable, folders, control groups.
    pub(crate) fn make_machine(&self, cluster: &Layout) -> Result<()> {
        underlay::make_node(cluster, &self.layout, self.subnet)?;
        cgroups::make(&self.daemons_cgroup())?;
        let layout = &self.layout;
        for folder in [&layout.run, &layout.state, &layout.bpf] {
            fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        }
        Ok(())
    }

    /// What runs with this is on the node: its network, its services.
    pub fn launch<S: Into<String>>(&self, words: impl IntoIterator<Item = S>) -> Launch {
        let group = cgroups::unified_root().map(|root| root.join(self.daemons_cgroup()));
        Launch {
            words: words.into_iter().map(Into::into).collect(),
            env: backtrace(),
            netns: Some(self.layout.netns_path()),
            cgroup: group.ok(),
        }
    }

    /// A command that runs on the node in the foreground.
    pub fn command<S: Into<String>>(&self, words: impl IntoIterator<Item = S>) -> Command {
        self.launch(words).command()
    }

    /// Runs a command on the node and returns what it prints.
    pub fn exec(&self, words: &[&str]) -> Result<String> {
        crate::command::output(&mut self.command(words.iter().copied()))
    }

    /// Starts containerd, unless it runs.
    pub fn start_containerd(&self) -> Result<()> {
        let launch = self.launch(Vec::<String>::new());
        containerd::start(&self.layout, &self.containerd(), launch)
    }

    pub(crate) fn import(&self, archive: &Path, images: &[Named]) -> Result<()> {
        containerd::import(&self.layout, archive, images)
    }

    /// Starts the agent, or restarts it when it runs another program. `program` is in the cluster's own folder.
    pub fn start_agent(&self, cluster: &Cluster, program: &Path, plugin: &Path) -> Result<()> {
        let bin = containerd::cni_bin(&self.layout);
        fs::create_dir_all(&bin).with_context(|| format!("make {}", bin.display()))?;
        process::install(plugin, &bin.join("mesh-cni"))?;
        // containerd itself calls this one before ours, for the pod's `lo`.
        process::install(Path::new(LOOPBACK), &bin.join("loopback"))?;
        let daemon = self.agent();
        let launch = self.launch(self.agent_words(cluster, program));
        if daemon.runs(&launch) {
            return Ok(());
        }
        daemon.stop(Duration::from_secs(15))?;
        daemon.start(&launch)
    }

    /// The agent's command line.
    fn agent_words(&self, cluster: &Cluster, program: &Path) -> Vec<String> {
        let layout = &self.layout;
        let (v4, v6) = self.addresses();
        let token = cluster.layout().control_state().join("join-token");
        let hooks = cgroups::unified_root().unwrap_or_default().join(&layout.cgroup);
        let path = |p: PathBuf| p.display().to_string();
        let settings = [
            ("--node-name", layout.name.clone()),
            ("--node-ip", format!("{v4},{v6}")),
            ("--server", cluster.server()),
            ("--token-file", path(token)),
            ("--run-dir", path(layout.agent_run())),
            ("--state-dir", path(layout.agent_state())),
            ("--bpf-dir", path(layout.bpf.clone())),
            ("--cgroup", path(hooks)),
            ("--cgroup-parent", format!("/{}/pods", layout.cgroup)),
            ("--containerd", path(layout.containerd_socket())),
            // The disk is the machine's own, and others fill it.
            ("--eviction-hard", String::new()),
            // Small enough to be filled by one Service.
            ("--map-capacity", "EDGE_SOURCES=64".to_owned()),
            ("--static-pods-dir", path(layout.state.join("static-pods"))),
            ("--cni-conf-dir", path(containerd::cni_conf(layout))),
            ("--pod-logs-dir", path(layout.state.join("pod-logs"))),
        ];
        let pairs = settings.into_iter().flat_map(|(name, value)| [name.to_owned(), value]);
        [path(program.to_owned()), "run".to_owned()].into_iter().chain(pairs).collect()
    }
}

fn worker_name(pid: Pid) -> Option<String> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut words = line.split(|b| *b == 0).map(|w| String::from_utf8_lossy(w).into_owned());
    let program = words.next()?;
    let name = words.next()?;
    (program.ends_with("/mesh-agent") && name != "run").then_some(name)
}
