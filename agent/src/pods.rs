//! The pods of this node, run through a container runtime (CRI).
//!
//! Owns: everything from a pod's manifest to its processes: sandboxes, images, volumes, environment, restarts with
//! back-off, probes, graceful stops, status and events, logs.
//!
//! Never does: networking (the runtime calls the CNI plugin), scheduling, or anything to containers that lack the
//! label `mesh.dev/managed-by=mesh-agent`. Nothing is removed before the first [`Runner::set_desired`].
//!
//! Shape: one task per pod ([`worker`]) repeats observe -> [`plan`] -> act. The plan is a pure function of the pod, of
//! what the runtime has and of the time; all that matters is in labels and annotations of the containers, so a new
//! agent takes over the containers of the old one as they are. Dropping the [`Runner`] stops nothing.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Router;
use mesh_model::NodeName;
use mesh_model::snapshot::PodWork;
use tokio::sync::watch;
use tokio::task::JoinSet;

mod apparmor;
mod container;
mod env;
mod evict;
mod expand;
mod facts;
mod hosts;
mod image;
mod images;
mod inputs;
mod layout;
mod logs;
mod memory;
mod observe;
mod observed;
mod oom;
mod ops;
mod outbox;
mod outcome;
mod plan;
mod pressure;
mod probes;
mod quantity;
mod registry;
mod removal;
mod report;
mod resolv;
mod resources;
mod restart;
mod sandbox;
mod security;
mod statics;
mod status;
mod streams;
mod supervise;
mod sysctls;
mod tokens;
mod turns;
mod usage;
mod volumes;
mod worker;

pub use observed::PodRef;
pub use pressure::{DEFAULT_EVICTION, InvalidThreshold, Pressures, Thresholds};
pub use removal::Removal;
pub use report::{KubeReporter, PodEvent, ReportError, StatusReporter};
pub use sysctls::{AllowedSysctls, InvalidSysctl};
pub use tokens::{Token, TokenKind, TokenWanted};

use crate::drain::Drain;
use crate::register::storage_kib;
use inputs::Inputs;
use logs::Logs;
use ops::Context;
use statics::{Directory, Mirrored};

/// Images that are fetched at the same time.
const PARALLEL_PULLS: usize = 3;

/// Sandboxes and containers that are started at the same time. More at once are not ready earlier, and none of them soon.
const PARALLEL_STARTS: usize = 8;

/// The kubelet's limit for a log file.
pub const LOG_MAX_BYTES: u64 = 10 << 20;

/// Where and as whom the runner works.
#[derive(Debug, Clone)]
pub struct RunnerOptions {
    /// Unix socket of the runtime.
    pub containerd_socket: PathBuf,
    /// Control group under which sandboxes and containers run, in the notation of the runtime (`/mesh/pods`).
    pub cgroup_parent: String,
    /// Directory of the containers' logs, usually `/var/log/pods`.
    pub log_dir: PathBuf,
    /// A log that has grown larger is put aside; of each run the newest five files are kept.
    pub log_max_bytes: u64,
    /// Directory with manifests of static pods; they run whether the API is there or not.
    pub static_pods_dir: PathBuf,
    /// Directory that outlives a reboot; the runner uses `pods/` in it, and reads seccomp profiles from `seccomp/`.
    pub state_dir: PathBuf,
    /// Directory that does not, in memory: Secrets are only written here, in `pods/`.
    pub run_dir: PathBuf,
    /// The node.
    pub node_name: NodeName,
    /// The node's addresses: those of pods with the node's network, and `status.hostIPs`.
    pub node_addresses: Vec<IpAddr>,
    /// The cluster's DNS domain.
    pub cluster_domain: String,
    /// DNS servers of pods; empty means those of the node.
    pub dns_servers: Vec<IpAddr>,
    /// What the node keeps free: pods are evicted for it.
    pub eviction: Thresholds,
    /// What pods may set beyond what is safe.
    pub unsafe_sysctls: AllowedSysctls,
    /// A container that runs out of memory loses one process, and not all of them as the kernel can do with cgroup v2.
    pub single_process_oom_kill: bool,
    /// The node's resolv.conf, for pods that want the node's DNS and for its search domains.
    pub host_resolv_conf: PathBuf,
}

impl RunnerOptions {
    /// Where the seccomp profiles are that pods may name.
    pub(crate) fn seccomp_dir(&self) -> PathBuf {
        self.state_dir.join("seccomp")
    }
}

/// Whether the runtime can run pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeHealth {
    /// It answers and says that it is ready.
    pub runtime_ready: bool,
    /// Its network is ready, too: a CNI configuration is there.
    pub network_ready: bool,
    /// Why not; empty when both are ready.
    pub message: String,
    /// Name and version, such as `containerd://1.6.20`; empty when it does not answer.
    pub version: String,
}

/// Runs the node's pods. Dropping it ends the runner and leaves every container as it is.
pub struct Runner {
    context: Arc<Context>,
    inputs: Arc<Inputs>,
    pressures: watch::Receiver<Pressures>,
    _tasks: JoinSet<()>,
}

impl Runner {
    /// Starts the runner. It does nothing to any pod before [`set_desired`](Self::set_desired). Needs a Tokio runtime.
    pub fn start(options: RunnerOptions, reporter: impl StatusReporter, drain: Drain) -> Self {
        let (desired, receiver) = watch::channel(None);
        let directory = Directory::new(options.static_pods_dir.clone(), options.node_name.clone());
        let inputs = Inputs::new(directory, desired);
        let reporter = Arc::new(Mirrored::new(reporter, Arc::clone(inputs.uids())));
        let context = Arc::new(Context::new(options, reporter.clone(), drain));
        let (told, pressures) = watch::channel(Pressures::default());
        let mut tasks = JoinSet::new();
        tasks.spawn(evict::run(Arc::clone(&context), inputs.goal(), told));
        tasks.spawn(statics::keep(inputs.mirrors(), Arc::clone(&reporter)));
        tasks.spawn(context.outbox.clone().deliver(reporter));
        tasks.spawn(Arc::clone(&inputs).follow());
        tasks.spawn(supervise::run(Arc::clone(&context), receiver));
        tasks.spawn(logs::rotate::run(Arc::clone(&context)));
        Self { context, inputs, pressures, _tasks: tasks }
    }

    /// Makes these the pods of the node: all of them, from a full view of the API or from the saved snapshot. Pods
    /// that run here and are neither among them nor static are taken down. Returns at once.
    pub fn set_desired(&self, pods: impl IntoIterator<Item = Arc<PodWork>>) {
        self.inputs.set_api(pods);
    }

    /// `GET /containerLogs/{namespace}/{pod}/{container}?follow&tailLines&sinceSeconds&sinceTime&timestamps&previous&limitBytes&stream`,
    /// the streams of [`streams`], and `GET /mesh/v1/usage`.
    pub fn router(&self) -> Router {
        let (registry, layout) = (Arc::clone(&self.context.registry), self.context.layout.clone());
        let streams = streams::router(Arc::clone(&registry), self.context.client.clone());
        let usage = usage::router(usage::Meter::new(self.context.client.clone()));
        logs::router(Logs { registry, layout }).merge(streams).merge(usage)
    }

    /// What the node runs out of: for the conditions of the Node object.
    pub fn pressures(&self) -> watch::Receiver<Pressures> {
        self.pressures.clone()
    }

    /// Asks the runtime how it is: for the conditions of the Node object.
    pub async fn runtime_health(&self) -> RuntimeHealth {
        let client = &self.context.client;
        let (version, conditions) = match (client.version().await, client.status().await) {
            (Ok(version), Ok(conditions)) => (version, conditions),
            (Err(error), _) | (_, Err(error)) => {
                return RuntimeHealth {
                    runtime_ready: false,
                    network_ready: false,
                    message: error.to_string(),
                    version: String::new(),
                };
            }
        };
        let is_ready = |name: &str| conditions.iter().any(|c| c.r#type == name && c.status);
        let wrong = conditions.iter().filter(|c| !c.status);
        let wrong: Vec<String> =
            wrong.map(|c| format!("{}: {} {}", c.r#type, c.reason, c.message)).collect();
        RuntimeHealth {
            runtime_ready: is_ready("RuntimeReady"),
            network_ready: is_ready("NetworkReady"),
            message: wrong.join("; "),
            version: format!("{}://{}", version.runtime_name, version.runtime_version),
        }
    }
}

/// As the Node object has it.
fn storage_bytes(disk: &Path) -> i64 {
    i64::try_from(storage_kib(disk)).unwrap_or(i64::MAX).saturating_mul(1024)
}

fn cpu_millis() -> i64 {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    i64::try_from(cores).unwrap_or(1) * 1000
}

/// `MemTotal` of proc(5).
fn memory_bytes() -> i64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kibibytes = line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<i64>().ok());
    kibibytes.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Options whose directories are all below one.
    pub(super) fn options(directory: &str) -> RunnerOptions {
        let directory = Path::new(directory);
        RunnerOptions {
            containerd_socket: directory.join("containerd.sock"),
            cgroup_parent: "/mesh/pods".to_owned(),
            log_dir: directory.join("log"),
            log_max_bytes: LOG_MAX_BYTES,
            static_pods_dir: directory.join("static"),
            state_dir: directory.join("state"),
            run_dir: directory.join("run"),
            node_name: "node-1".parse().unwrap(),
            node_addresses: vec!["192.0.2.1".parse().unwrap()],
            cluster_domain: "cluster.local".to_owned(),
            dns_servers: vec!["10.96.0.10".parse().unwrap()],
            eviction: Thresholds::default(),
            unsafe_sysctls: AllowedSysctls::default(),
            single_process_oom_kill: false,
            host_resolv_conf: "/etc/resolv.conf".into(),
        }
    }

    #[test]
    fn the_node_knows_its_size() {
        assert!(cpu_millis() >= 1000);
        assert!(memory_bytes() > 1 << 20);
        assert!(storage_bytes(Path::new("/")) > 1 << 20);
    }
}
