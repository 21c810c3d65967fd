//! The worker processes of the node: what they are called, where their files are, how they are started.

use std::path::{Path, PathBuf};

use mesh_model::wellknown::{NODE_LOCAL_ADDRESS, NODE_LOCAL_ADDRESS_V6, OVERLAY_DEVICE};
use mesh_worker::supervise::WorkerSpec;

use crate::cli::Options;

const DNS_PORT: u16 = 53;

/// Where a node's things are.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    run: PathBuf,
    state: PathBuf,
}

impl Paths {
    pub(crate) fn new(options: &Options) -> Self {
        Self { run: options.run_dir.clone(), state: options.state_dir.clone() }
    }

    pub(crate) fn run(&self) -> &Path {
        &self.run
    }

    pub(crate) fn state(&self) -> &Path {
        &self.state
    }

    pub(crate) fn node_key(&self) -> PathBuf {
        self.state.join("overlay.key")
    }

    pub(crate) fn snapshot(&self) -> PathBuf {
        self.state.join("snapshot.json")
    }

    pub(crate) fn journal(&self) -> PathBuf {
        self.state.join("cni").join("journal")
    }

    pub(crate) fn cni_socket(&self) -> PathBuf {
        self.run.join("cni.sock")
    }

    pub(crate) fn admin_socket(&self) -> PathBuf {
        self.run.join("agent.sock")
    }

    pub(crate) fn worker_socket(&self, worker: &str) -> PathBuf {
        self.run.join(format!("{worker}.sock"))
    }

    pub(crate) fn worker_state(&self, worker: &str) -> PathBuf {
        self.state.join(format!("{worker}.json"))
    }

    /// What is known about the paths to other nodes.
    pub(crate) fn paths(&self) -> PathBuf {
        self.run.join("paths.json")
    }

    fn identity(&self, worker: &str) -> PathBuf {
        self.run.join(format!("{worker}.pid"))
    }
}

/// The names of all workers, whether they run or not.
pub(crate) const ALL: [&str; 4] = [DNS, INGRESS, OVERLAY, RELAY];
pub(crate) const DNS: &str = "dns";
pub(crate) const INGRESS: &str = "ingress";
pub(crate) const OVERLAY: &str = "overlay";
pub(crate) const RELAY: &str = "relay";

/// The DNS server.
pub(crate) fn dns(paths: &Paths, program: &Path) -> WorkerSpec {
    let listen = [
        format!("{NODE_LOCAL_ADDRESS}:{DNS_PORT}"),
        format!("[{NODE_LOCAL_ADDRESS_V6}]:{DNS_PORT}"),
    ];
    let args = listen.into_iter().flat_map(|address| ["--listen".to_owned(), address]);
    spec(DNS, paths, program, args.collect())
}

/// The L7 proxy; nothing when it has no port.
pub(crate) fn ingress(paths: &Paths, program: &Path, options: &Options) -> Option<WorkerSpec> {
    let mut args = vec![];
    for (flag, port) in [("--http", options.http_port), ("--https", options.https_port)] {
        for host in ["0.0.0.0", "[::]"] {
            args.extend(port.iter().flat_map(|port| [flag.to_owned(), format!("{host}:{port}")]));
        }
    }
    (!args.is_empty()).then(|| spec(INGRESS, paths, program, args))
}

/// The user-space overlay.
pub(crate) fn overlay(paths: &Paths, program: &Path) -> WorkerSpec {
    let key = paths.node_key().display().to_string();
    let args = ["--device", OVERLAY_DEVICE, "--private-key", &key].map(str::to_owned).to_vec();
    spec(OVERLAY, paths, program, args)
}

/// The relay between other nodes.
pub(crate) fn relay(paths: &Paths, program: &Path) -> WorkerSpec {
    spec(RELAY, paths, program, vec![])
}

/// What suffices to stop a worker, however it was started.
pub(crate) fn any(name: &'static str, paths: &Paths) -> WorkerSpec {
    spec(name, paths, Path::new(""), vec![])
}

fn spec(name: &'static str, paths: &Paths, program: &Path, more: Vec<String>) -> WorkerSpec {
    let text = |path: PathBuf| path.display().to_string();
    let mut args = vec![name.to_owned()];
    args.extend(["--control-socket".to_owned(), text(paths.worker_socket(name))]);
    args.extend(["--state-file".to_owned(), text(paths.worker_state(name))]);
    args.extend(more);
    WorkerSpec {
        name,
        program: program.to_owned(),
        args,
        identity_file: paths.identity(name),
        log_file: None,
        // Two engines on one device would each get half of the packets, two relays on one port half of the datagrams; the
        // others share their ports.
        handover: (![OVERLAY, RELAY].contains(&name)).then(|| paths.worker_socket(name)),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn workers_understand_their_own_command_lines() {
        let settings =
            ["mesh-agent", "--node-name", "n", "--node-ip", "192.0.2.1", "--cgroup", "/x"];
        let options = Cli::parse_from(settings).settings.resolve().unwrap();
        let paths = Paths::new(&options);
        let program = Path::new("/usr/bin/mesh-agent");
        let specs = [
            dns(&paths, program),
            ingress(&paths, program, &options).unwrap(),
            overlay(&paths, program),
            relay(&paths, program),
        ];
        for (spec, name) in specs.iter().zip(ALL) {
            assert_eq!(spec.name, name);
            let words = std::iter::once("mesh-agent").chain(spec.args.iter().map(String::as_str));
            Cli::try_parse_from(words).unwrap();
        }
        let silent = Options { http_port: None, https_port: None, ..options };
        assert!(ingress(&paths, program, &silent).is_none());
    }
}
