//! The worker processes of the node: what they are called, where their files are, how they are started.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mesh_model::wellknown::{NODE_LOCAL_ADDRESS, NODE_LOCAL_ADDRESS_V6, OVERLAY_DEVICE};
use mesh_worker::SocketSpec;
use mesh_worker::supervise::{Replacement, WorkerSpec};

use crate::settings::Options;

const DNS_PORT: u16 = 53;
/// What a replaced worker gets beyond its drain time before it is killed.
const SPARE: Duration = Duration::from_secs(10);

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

    #[cfg(test)]
    pub(crate) fn at(run: &Path, state: &Path) -> Self {
        Self { run: run.to_owned(), state: state.to_owned() }
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

    pub(crate) fn preshared(&self) -> PathBuf {
        self.state.join("preshared.json")
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

    /// What sysctls were before the agent came.
    pub(crate) fn sysctls(&self) -> PathBuf {
        self.state.join("sysctls.json")
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
    let listen: [SocketAddr; 2] =
        [(NODE_LOCAL_ADDRESS, DNS_PORT).into(), (NODE_LOCAL_ADDRESS_V6, DNS_PORT).into()];
    let args = listen.iter().flat_map(|address| flag("--listen", address));
    let more = Own {
        args: args.collect(),
        sockets: mesh_dns::sockets(&listen),
        replacement: Replacement::Overlapping { grace: SPARE },
    };
    spec(DNS, paths, program, more)
}

/// The L7 proxy; nothing when it has no port.
pub(crate) fn ingress(paths: &Paths, program: &Path, options: &Options) -> Option<WorkerSpec> {
    let any = |port: Option<u16>| -> Vec<SocketAddr> {
        let both =
            |port| [(Ipv4Addr::UNSPECIFIED, port).into(), (Ipv6Addr::UNSPECIFIED, port).into()];
        port.into_iter().flat_map(both).collect()
    };
    let (http, https) = (any(options.http_port), any(options.https_port));
    if http.is_empty() && https.is_empty() {
        return None;
    }
    let mut args: Vec<String> = http.iter().flat_map(|address| flag("--http", address)).collect();
    args.extend(https.iter().flat_map(|address| flag("--https", address)));
    args.extend(flag("--drain-secs", &options.drain.as_secs()));
    let more = Own {
        args,
        sockets: mesh_ingress::sockets(&http, &https, 0),
        replacement: Replacement::Overlapping { grace: options.drain + SPARE },
    };
    Some(spec(INGRESS, paths, program, more))
}

/// The user-space overlay.
pub(crate) fn overlay(paths: &Paths, program: &Path) -> WorkerSpec {
    let key = paths.node_key().display().to_string();
    let args = ["--device", OVERLAY_DEVICE, "--private-key", &key].map(str::to_owned).to_vec();
    // Two engines on one device would each get half of the packets.
    let more = Own { args, sockets: vec![], replacement: Replacement::Yielding };
    spec(OVERLAY, paths, program, more)
}

/// The relay between other nodes.
pub(crate) fn relay(paths: &Paths, program: &Path) -> WorkerSpec {
    // Two relays on one port would each get half of the datagrams.
    let more = Own { args: vec![], sockets: vec![], replacement: Replacement::Exclusive };
    spec(RELAY, paths, program, more)
}

/// What suffices to stop a worker, however it was started.
pub(crate) fn any(name: &'static str, paths: &Paths) -> WorkerSpec {
    let nothing = Own { args: vec![], sockets: vec![], replacement: Replacement::Exclusive };
    spec(name, paths, Path::new(""), nothing)
}

/// What distinguishes one worker from the others.
struct Own {
    args: Vec<String>,
    sockets: Vec<SocketSpec>,
    replacement: Replacement,
}

fn flag(name: &str, value: &dyn std::fmt::Display) -> [String; 2] {
    [name.to_owned(), value.to_string()]
}

fn spec(name: &'static str, paths: &Paths, program: &Path, own: Own) -> WorkerSpec {
    let mut args = vec![name.to_owned()];
    args.extend(flag("--control-socket", &paths.worker_socket(name).display()));
    args.extend(flag("--state-file", &paths.worker_state(name).display()));
    args.extend(own.args);
    WorkerSpec {
        name,
        program: program.to_owned(),
        args,
        identity_file: paths.identity(name),
        log_file: None,
        control_socket: paths.worker_socket(name),
        sockets: own.sockets,
        replacement: own.replacement,
        started: Arc::default(),
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
