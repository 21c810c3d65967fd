//! The agent's settings: flags, the configuration file that may stand for them, and what they are when nobody gives them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use ipnet::IpNet;
use mesh_model::{NodeName, wellknown};
use serde::Deserialize;

use crate::capacity::{self, InvalidCapacity};
use crate::pods::{AllowedSysctls, DEFAULT_EVICTION, InvalidSysctl, InvalidThreshold, Thresholds};

const ROTATE_KEY_DAYS: u16 = 30;
/// Time for the clients of a proxy that is replaced.
pub(crate) const DRAIN_SECS: u64 = 30;
pub(crate) const LONGEST_DRAIN_SECS: u64 = 24 * 3600;
const FLOW_HISTORY: u32 = 4096;
const LEAST_BACKENDS: u32 = 1 << 10;
const MOST_BACKENDS: u32 = 1 << 24;

/// Which WireGuard to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum OverlayChoice {
    /// The kernel's where it has one
    Auto,
    /// The kernel's, or fail
    Kernel,
    /// The worker process
    User,
}

/// Who runs the node's pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum PodsChoice {
    /// This agent, through containerd
    Cri,
    /// Somebody else, such as a kubelet: the agent only connects them
    External,
}

/// Settings of the agent. A flag wins over the configuration file, which wins over the default.
#[derive(Debug, Clone, Default, Args, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(crate) struct Settings {
    /// Read settings from this file: YAML, the keys are the long flags
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub(crate) config: Option<PathBuf>,
    /// Name of the node [default: the host name]
    #[arg(long, value_name = "NAME")]
    pub(crate) node_name: Option<String>,
    /// Addresses of the node on the underlay, the preferred one first [default: those of the default route]
    #[arg(long, value_name = "IP[,IP]", value_delimiter = ',')]
    pub(crate) node_ip: Option<Vec<IpAddr>>,
    /// URL of mesh-control; needed for the first start
    #[arg(long, value_name = "URL", env = "MESH_SERVER")]
    pub(crate) server: Option<String>,
    /// Join token; needed for the first start
    #[arg(long, value_name = "TOKEN", env = "MESH_TOKEN", hide_env_values = true)]
    pub(crate) token: Option<String>,
    /// File with the join token
    #[arg(long, value_name = "FILE", conflicts_with = "token")]
    pub(crate) token_file: Option<PathBuf>,
    /// Sockets and process identities [default: /run/mesh]
    #[arg(long, value_name = "DIR")]
    pub(crate) run_dir: Option<PathBuf>,
    /// Keys, certificates, the last snapshot, the address journal [default: /var/lib/mesh]
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,
    /// Directory on a bpffs for maps, programs and links [default: /sys/fs/bpf/mesh]
    #[arg(long, value_name = "DIR")]
    pub(crate) bpf_dir: Option<PathBuf>,
    /// cgroup v2 directory whose processes use service addresses [default: the root of the hierarchy]
    #[arg(long, value_name = "DIR")]
    pub(crate) cgroup: Option<PathBuf>,
    /// cgroup under which pods run, as containerd names it [default: /mesh/pods]
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup_parent: Option<String>,
    /// containerd's socket [default: /run/containerd/containerd.sock]
    #[arg(long, value_name = "PATH")]
    pub(crate) containerd: Option<PathBuf>,
    /// Where the CNI configuration is written [default: /etc/cni/net.d]
    #[arg(long, value_name = "DIR")]
    pub(crate) cni_conf_dir: Option<PathBuf>,
    /// Where containers' logs are kept [default: /var/log/pods]
    #[arg(long, value_name = "DIR")]
    pub(crate) pod_logs_dir: Option<PathBuf>,
    /// Manifests of static pods, which run without the control service [default: /etc/mesh/static-pods]
    #[arg(long, value_name = "DIR")]
    pub(crate) static_pods_dir: Option<PathBuf>,
    /// What the node keeps free, as the kubelet's evictionHard; empty for nothing [default: memory.available<100Mi,nodefs.available<10%,nodefs.inodesFree<5%,imagefs.available<15%,imagefs.inodesFree<5%,pid.available<5%]
    #[arg(long, value_name = "SIGNAL<AMOUNT,..")]
    pub(crate) eviction_hard: Option<String>,
    /// Sysctls that pods may set beyond the safe ones, as the kubelet's allowedUnsafeSysctls, such as net.core.* [default: none]
    #[arg(long, value_name = "SYSCTL,..")]
    pub(crate) allowed_unsafe_sysctls: Option<String>,
    /// Let a container that runs out of memory lose one process instead of all, as the kubelet's singleProcessOOMKill (cgroup v2) [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) single_process_oom_kill: Option<bool>,
    /// Which WireGuard to use [default: auto]
    #[arg(long, value_enum)]
    pub(crate) overlay: Option<OverlayChoice>,
    /// Who runs pods [default: cri]
    #[arg(long, value_enum)]
    pub(crate) pods: Option<PodsChoice>,
    /// DNS servers for names outside the cluster [default: those of /etc/resolv.conf]
    #[arg(long, value_name = "ADDRESS[:PORT],...", value_delimiter = ',')]
    pub(crate) dns_upstream: Option<Vec<String>>,
    /// Port of the proxy for plain HTTP, 0 for none [default: 80]
    #[arg(long, value_name = "PORT")]
    pub(crate) http_port: Option<u16>,
    /// Port of the proxy for TLS, 0 for none [default: 443]
    #[arg(long, value_name = "PORT")]
    pub(crate) https_port: Option<u16>,
    /// Places for backends in the service maps, 1024 to 16777216; taken when the maps are made, after a boot or a reset
    /// [default: 262144]
    #[arg(long, value_name = "NUMBER")]
    pub(crate) max_backends: Option<u32>,
    /// Entries of a map of the programs, 64 to 16777216, also where --max-backends says something else; taken when the maps are made
    #[arg(long, value_name = "MAP=ENTRIES,...", value_delimiter = ',')]
    pub(crate) map_capacity: Option<Vec<String>>,
    /// How long the proxy's connections may go on when it is replaced by a newer one [default: 30]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) drain_secs: Option<u64>,
    /// Age at which the node's key on the overlay is replaced, 0 for never [default: 30]
    #[arg(long, value_name = "DAYS")]
    pub(crate) rotate_key_days: Option<u16>,
    /// Range outside the cluster where pods keep their addresses; may be given several times
    #[arg(long, value_name = "CIDR")]
    pub(crate) no_masquerade: Option<Vec<String>>,
    /// Connection events that are remembered, 0 to look at connections only while somebody follows them [default: 4096]
    #[arg(long, value_name = "EVENTS")]
    pub(crate) flow_history: Option<u32>,
}

/// The settings make no sense; the message names the flag.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SettingsError {
    #[error("read --config {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("understand --config {path}")]
    Malformed {
        path: PathBuf,
        #[source]
        source: Box<serde_saphyr::Error>,
    },
    #[error("--node-name {name}")]
    NodeName {
        name: String,
        #[source]
        source: mesh_model::names::InvalidName,
    },
    #[error("no --node-name, and the host has no usable name")]
    NoNodeName,
    #[error("--dns-upstream {0:?}: expected an address, with or without a port")]
    Upstream(String),
    #[error("--drain-secs {0}: expected 0 to {LONGEST_DRAIN_SECS}")]
    Drain(u64),
    #[error("--eviction-hard: {0}")]
    Eviction(#[from] InvalidThreshold),
    #[error("--allowed-unsafe-sysctls: {0}")]
    Sysctls(#[from] InvalidSysctl),
    #[error(
        "--no-masquerade {0}: expected a range, such as 192.0.2.0/24, without bits behind its prefix"
    )]
    NoMasquerade(String),
    #[error("--max-backends {0}: expected {LEAST_BACKENDS} to {MOST_BACKENDS}")]
    MaxBackends(u32),
    #[error("--map-capacity {0}")]
    MapCapacity(String, #[source] InvalidCapacity),
    #[error("--cgroup: no cgroup v2 hierarchy is mounted")]
    NoCgroup,
    #[error(
        "--node-ip: no address on the interface of the default route; give the node's addresses"
    )]
    NoAddress,
}

/// Complete settings.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) node: NodeName,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) server: Option<String>,
    pub(crate) token: Option<String>,
    pub(crate) token_file: Option<PathBuf>,
    pub(crate) run_dir: PathBuf,
    pub(crate) state_dir: PathBuf,
    pub(crate) bpf_dir: PathBuf,
    pub(crate) cgroup: PathBuf,
    pub(crate) cgroup_parent: String,
    pub(crate) containerd: PathBuf,
    pub(crate) cni_conf_dir: PathBuf,
    pub(crate) pod_logs_dir: PathBuf,
    pub(crate) static_pods_dir: PathBuf,
    /// What the node keeps free.
    pub(crate) eviction: Thresholds,
    /// What pods may set beyond what is safe.
    pub(crate) unsafe_sysctls: AllowedSysctls,
    /// A container that runs out of memory loses one process.
    pub(crate) single_process_oom_kill: bool,
    pub(crate) overlay: OverlayChoice,
    pub(crate) pods: PodsChoice,
    pub(crate) dns_upstreams: Vec<SocketAddr>,
    pub(crate) http_port: Option<u16>,
    pub(crate) https_port: Option<u16>,
    /// Entries of maps, where that is not the default.
    pub(crate) map_capacities: BTreeMap<&'static str, u32>,
    pub(crate) drain: Duration,
    /// Ranges outside the cluster where pods keep their addresses.
    pub(crate) no_masquerade: Vec<IpNet>,
    /// Connection events that are remembered.
    pub(crate) flow_history: usize,
    /// Age at which the node's key is replaced.
    pub(crate) rotate_key_every: Option<Duration>,
}

impl Settings {
    /// Reads the file, fills in what is not given, and checks the rest.
    pub(crate) fn resolve(self) -> Result<Options, SettingsError> {
        let file = match &self.config {
            Some(path) => Self::read(path)?,
            None => Self::default(),
        };
        let all = self.or(file);
        let dir = |given: Option<PathBuf>, default: &str| given.unwrap_or_else(|| default.into());
        let cgroup = match all.cgroup {
            Some(dir) => dir,
            None => cgroup2_root().ok_or(SettingsError::NoCgroup)?,
        };
        Ok(Options {
            node: node_name(all.node_name)?,
            addresses: match all.node_ip {
                Some(addresses) => addresses,
                None => default_addresses().ok_or(SettingsError::NoAddress)?,
            },
            server: all.server,
            token: all.token,
            token_file: all.token_file,
            run_dir: dir(all.run_dir, "/run/mesh"),
            state_dir: dir(all.state_dir, "/var/lib/mesh"),
            bpf_dir: dir(all.bpf_dir, "/sys/fs/bpf/mesh"),
            cgroup,
            cgroup_parent: all.cgroup_parent.unwrap_or_else(|| "/mesh/pods".to_owned()),
            containerd: dir(all.containerd, "/run/containerd/containerd.sock"),
            cni_conf_dir: dir(all.cni_conf_dir, "/etc/cni/net.d"),
            pod_logs_dir: dir(all.pod_logs_dir, "/var/log/pods"),
            static_pods_dir: dir(all.static_pods_dir, "/etc/mesh/static-pods"),
            eviction: all.eviction_hard.as_deref().unwrap_or(DEFAULT_EVICTION).parse()?,
            unsafe_sysctls: all.allowed_unsafe_sysctls.as_deref().unwrap_or_default().parse()?,
            single_process_oom_kill: all.single_process_oom_kill.unwrap_or(false),
            overlay: all.overlay.unwrap_or(OverlayChoice::Auto),
            pods: all.pods.unwrap_or(PodsChoice::Cri),
            dns_upstreams: upstreams(all.dns_upstream)?,
            http_port: Some(all.http_port.unwrap_or(80)).filter(|p| *p != 0),
            https_port: Some(all.https_port.unwrap_or(443)).filter(|p| *p != 0),
            map_capacities: capacity::chosen(
                all.max_backends.map(max_backends).transpose()?,
                &all.map_capacity.unwrap_or_default(),
            )
            .map_err(|(given, why)| SettingsError::MapCapacity(given, why))?,
            drain: drain(all.drain_secs.unwrap_or(DRAIN_SECS))?,
            no_masquerade: ranges(all.no_masquerade.unwrap_or_default())?,
            flow_history: all.flow_history.unwrap_or(FLOW_HISTORY) as usize,
            rotate_key_every: days(all.rotate_key_days.unwrap_or(ROTATE_KEY_DAYS)),
        })
    }

    fn read(path: &Path) -> Result<Self, SettingsError> {
        let text = fs::read_to_string(path)
            .map_err(|source| SettingsError::Read { path: path.to_owned(), source })?;
        serde_saphyr::from_str(&text).map_err(|source| SettingsError::Malformed {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }

    fn or(self, file: Self) -> Self {
        Self {
            config: self.config,
            node_name: self.node_name.or(file.node_name),
            node_ip: self.node_ip.or(file.node_ip),
            server: self.server.or(file.server),
            token_file: if self.token.is_some() {
                None
            } else {
                self.token_file.or(file.token_file)
            },
            token: self.token.or(file.token),
            run_dir: self.run_dir.or(file.run_dir),
            state_dir: self.state_dir.or(file.state_dir),
            bpf_dir: self.bpf_dir.or(file.bpf_dir),
            cgroup: self.cgroup.or(file.cgroup),
            cgroup_parent: self.cgroup_parent.or(file.cgroup_parent),
            containerd: self.containerd.or(file.containerd),
            cni_conf_dir: self.cni_conf_dir.or(file.cni_conf_dir),
            pod_logs_dir: self.pod_logs_dir.or(file.pod_logs_dir),
            static_pods_dir: self.static_pods_dir.or(file.static_pods_dir),
            eviction_hard: self.eviction_hard.or(file.eviction_hard),
            allowed_unsafe_sysctls: self.allowed_unsafe_sysctls.or(file.allowed_unsafe_sysctls),
            single_process_oom_kill: self.single_process_oom_kill.or(file.single_process_oom_kill),
            overlay: self.overlay.or(file.overlay),
            pods: self.pods.or(file.pods),
            dns_upstream: self.dns_upstream.or(file.dns_upstream),
            http_port: self.http_port.or(file.http_port),
            https_port: self.https_port.or(file.https_port),
            max_backends: self.max_backends.or(file.max_backends),
            map_capacity: self.map_capacity.or(file.map_capacity),
            drain_secs: self.drain_secs.or(file.drain_secs),
            rotate_key_days: self.rotate_key_days.or(file.rotate_key_days),
            no_masquerade: self.no_masquerade.or(file.no_masquerade),
            flow_history: self.flow_history.or(file.flow_history),
        }
    }
}

fn node_name(given: Option<String>) -> Result<NodeName, SettingsError> {
    let name = match given {
        Some(name) => name,
        None => nix::unistd::gethostname()
            .ok()
            .and_then(|name| name.into_string().ok())
            .map(|name| name.to_ascii_lowercase())
            .ok_or(SettingsError::NoNodeName)?,
    };
    name.parse().map_err(|source| SettingsError::NodeName { name, source })
}

/// None for zero.
fn days(days: u16) -> Option<Duration> {
    (days > 0).then(|| Duration::from_secs(u64::from(days) * 86_400))
}

fn max_backends(number: u32) -> Result<u32, SettingsError> {
    let fits = (LEAST_BACKENDS..=MOST_BACKENDS).contains(&number);
    if fits { Ok(number) } else { Err(SettingsError::MaxBackends(number)) }
}

fn ranges(given: Vec<String>) -> Result<Vec<IpNet>, SettingsError> {
    let range = |text: &String| text.parse().ok().filter(|net: &IpNet| net.trunc() == *net);
    given.into_iter().map(|text| range(&text).ok_or(SettingsError::NoMasquerade(text))).collect()
}

fn drain(secs: u64) -> Result<Duration, SettingsError> {
    if secs > LONGEST_DRAIN_SECS {
        return Err(SettingsError::Drain(secs));
    }
    Ok(Duration::from_secs(secs))
}

fn upstreams(given: Option<Vec<String>>) -> Result<Vec<SocketAddr>, SettingsError> {
    let Some(given) = given else { return Ok(resolv_conf_servers()) };
    given.into_iter().map(|text| upstream(&text).ok_or(SettingsError::Upstream(text))).collect()
}

fn upstream(text: &str) -> Option<SocketAddr> {
    text.parse().ok().or_else(|| Some(SocketAddr::new(text.parse().ok()?, 53)))
}

/// The host's servers, but not our own: a question must not come back to the one who asked.
fn resolv_conf_servers() -> Vec<SocketAddr> {
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let own: [IpAddr; 2] =
        [wellknown::NODE_LOCAL_ADDRESS.into(), wellknown::NODE_LOCAL_ADDRESS_V6.into()];
    text.lines()
        .filter_map(|line| line.strip_prefix("nameserver"))
        .filter_map(|rest| upstream(rest.trim()))
        .filter(|server| !own.contains(&server.ip()))
        .collect()
}

/// Where cgroup v2 is mounted: alone, or beside version 1.
fn cgroup2_root() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields.find(|f| f.get(2) == Some(&"cgroup2")).and_then(|f| f.get(1).map(PathBuf::from))
}

/// The source address that the host uses towards the world; a UDP `connect` sends nothing.
fn default_addresses() -> Option<Vec<IpAddr>> {
    let towards = |bind: &str, target: &str| {
        let socket = std::net::UdpSocket::bind(bind).ok()?;
        socket.connect(target).ok()?;
        Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_unspecified() && !ip.is_loopback())
    };
    let found: Vec<IpAddr> =
        [towards("0.0.0.0:0", "192.0.2.1:9"), towards("[::]:0", "[2001:db8::1]:9")]
            .into_iter()
            .flatten()
            .collect();
    (!found.is_empty()).then_some(found)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn flags_win_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.yaml");
        fs::write(&path, "node-name: from-file\nhttp-port: 8080\nnode-ip: [192.0.2.1]\ncgroup: /x\noverlay: user\n").unwrap();
        let path = path.to_str().unwrap();
        let parse =
            |args: &[&str]| Cli::parse_from([&["mesh-agent", "--config", path], args].concat());
        let options =
            parse(&["--node-name", "from-flag", "--https-port", "0"]).settings.resolve().unwrap();
        assert_eq!(options.node.as_str(), "from-flag");
        assert_eq!((options.http_port, options.https_port), (Some(8080), None));
        assert_eq!(options.overlay, OverlayChoice::User);
        assert_eq!(options.drain, Duration::from_secs(30));
        assert_eq!(options.rotate_key_every, Some(Duration::from_secs(30 * 86_400)));
        let few = parse(&["--max-backends", "7"]).settings.resolve().unwrap_err();
        assert!(few.to_string().starts_with("--max-backends 7: "), "{few}");
        let sized = parse(&["--max-backends", "2048", "--map-capacity", "IDENTITIES=99,SLOTS=98"]);
        let sized = sized.settings.resolve().unwrap().map_capacities;
        assert_eq!((sized["MEMBERS"], sized["SLOTS"], sized["IDENTITIES"]), (2048, 98, 99));
        let fixed = parse(&["--map-capacity", "NODE=64"]).settings.resolve().unwrap_err();
        assert_eq!(fixed.to_string(), "--map-capacity NODE=64");
        let endless = parse(&["--drain-secs", "86401"]).settings.resolve().unwrap_err();
        assert!(endless.to_string().starts_with("--drain-secs 86401: "), "{endless}");
        let global = parse(&["--allowed-unsafe-sysctls", "net.core.*,vm.*"]).settings.resolve();
        let global = global.unwrap_err().to_string();
        assert!(global.starts_with("--allowed-unsafe-sysctls: \"vm.*\""), "{global}");
        let single = parse(&["--single-process-oom-kill"]).settings.resolve().unwrap();
        let kills = (single.single_process_oom_kill, options.single_process_oom_kill);
        assert_eq!(kills, (true, false));
        let error = parse(&["--node-name", "Not A Name"]).settings.resolve().unwrap_err();
        assert!(error.to_string().contains("--node-name"), "{error}");
        let ranges = parse(&["--no-masquerade", "10.0.0.0/8", "--no-masquerade", "2001:db8::/32"]);
        let ranges = ranges.settings.resolve().unwrap().no_masquerade;
        assert_eq!(
            ranges.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["10.0.0.0/8", "2001:db8::/32"]
        );
        for wrong in ["10.0.0.1/8", "10.0.0.0", "10.0.0.0/33", ""] {
            let error = parse(&["--no-masquerade", wrong]).settings.resolve().unwrap_err();
            assert!(
                error.to_string().starts_with(&format!("--no-masquerade {wrong}: ")),
                "{error}"
            );
        }
        fs::write(path, "no-masquerade: [192.0.2.0/24]").unwrap();
        let rest = ["--node-name", "n", "--node-ip", "192.0.2.1", "--cgroup", "/x"];
        assert_eq!(parse(&rest).settings.resolve().unwrap().no_masquerade.len(), 1);
        fs::write(path, "no-such-key: 1").unwrap();
        assert!(matches!(parse(&[]).settings.resolve(), Err(SettingsError::Malformed { .. })));
    }

    #[test]
    fn upstream_servers_may_have_a_port() {
        assert_eq!(upstream("192.0.2.1"), Some("192.0.2.1:53".parse().unwrap()));
        assert_eq!(upstream("[2001:db8::1]:5353"), Some("[2001:db8::1]:5353".parse().unwrap()));
        assert_eq!(upstream("dns.example"), None);
    }
}
