//! Names, paths and addresses of a cluster: pure functions of its id and its subnet.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use anyhow::{Result, ensure};

/// Longest id: `mesh-` + id + `-` + one digit must be a device name, at most 15 bytes.
pub const MAX_ID_BYTES: usize = 8;
/// Most nodes of a cluster.
pub const MAX_NODES: u8 = 8;

/// Where a cluster's things are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    id: String,
    run: PathBuf,
    state: PathBuf,
}

impl Layout {
    /// The layout of the cluster `id`, below the default folders or those of `MESH_DEV_RUN` and `MESH_DEV_STATE`.
    pub fn new(id: &str) -> Result<Self> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        ensure!(
            (1..=MAX_ID_BYTES).contains(&id.len()) && id.bytes().all(plain),
            "cluster id {id:?}: expected 1 to {MAX_ID_BYTES} lower-case letters and digits"
        );
        let base = |variable: &str, default: &str| {
            std::env::var_os(variable)
                .map_or_else(|| PathBuf::from(default), PathBuf::from)
                .join(id)
        };
        Ok(Self {
            id: id.to_owned(),
            run: base("MESH_DEV_RUN", "/run/mesh-dev"),
            state: base("MESH_DEV_STATE", "/var/lib/mesh-dev"),
        })
    }

    /// The cluster's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Sockets, process ids, mounts: short paths, because a Unix socket's path has at most 107 bytes.
    pub fn run(&self) -> PathBuf {
        self.run.clone()
    }

    /// What survives a restart of the programs, and logs.
    pub fn state(&self) -> PathBuf {
        self.state.clone()
    }

    /// Folder of all log files.
    pub fn logs(&self) -> PathBuf {
        self.state.join("logs")
    }

    /// The record of the cluster's shape.
    pub fn record(&self) -> PathBuf {
        self.state.join("cluster.json")
    }

    /// Folder of the binaries that the cluster runs: copies, so that a build does not change them underneath.
    pub fn bin(&self) -> PathBuf {
        self.state.join("bin")
    }

    /// Data folder of the control service.
    pub fn control_state(&self) -> PathBuf {
        self.state.join("control")
    }

    /// The cluster's own bpffs; each node has a folder in it.
    pub fn bpffs(&self) -> PathBuf {
        self.run.join("bpf")
    }

    /// The bridge.
    pub fn bridge(&self) -> String {
        format!("mesh-{}", self.id)
    }

    /// Control group of the cluster, relative to each hierarchy.
    pub fn cgroup(&self) -> String {
        format!("mesh-{}", self.id)
    }

    /// Prefix of the names of the nodes' network namespaces.
    pub fn netns_prefix(&self) -> String {
        format!("mesh-{}-node-", self.id)
    }

    /// Paths and names of node `number`, from 1.
    pub fn node(&self, number: u8) -> NodeLayout {
        let name = format!("node-{number}");
        NodeLayout {
            number,
            netns: format!("{}{number}", self.netns_prefix()),
            port: format!("mesh-{}-{number}", self.id),
            cgroup: format!("{}/{name}", self.cgroup()),
            run: self.run.join(&name),
            state: self.state.join(&name),
            bpf: self.bpffs().join(&name),
            name,
        }
    }
}

/// Where a node's things are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeLayout {
    /// From 1.
    pub number: u8,
    /// Name of its Node object.
    pub name: String,
    /// Its network namespace.
    pub netns: String,
    /// The bridge's end of its cable.
    pub port: String,
    /// Its control group, relative to each hierarchy.
    pub cgroup: String,
    /// Sockets, process ids.
    pub run: PathBuf,
    /// State of containerd and agent.
    pub state: PathBuf,
    /// Where its eBPF objects are pinned.
    pub bpf: PathBuf,
}

impl NodeLayout {
    /// File of the network namespace.
    pub fn netns_path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.netns)
    }

    /// The agent's run folder (`agent.sock`, `cni.sock`, workers' sockets).
    pub fn agent_run(&self) -> PathBuf {
        self.run.join("mesh")
    }

    /// The agent's state folder.
    pub fn agent_state(&self) -> PathBuf {
        self.state.join("mesh")
    }

    /// containerd's socket.
    pub fn containerd_socket(&self) -> PathBuf {
        self.run.join("containerd.sock")
    }

    /// containerd's state folder: runtime bundles and namespace files, gone at a reboot.
    pub fn containerd_run(&self) -> PathBuf {
        self.run.join("containerd")
    }
}

/// The underlay's addresses: `10.213.N.0/24` and `fd00:213:N::/64`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet(pub u8);

impl Subnet {
    /// Prefix lengths of both families.
    pub const PREFIX: (u8, u8) = (24, 64);

    /// The bridge's addresses, where mesh-control listens.
    pub fn control(self) -> (Ipv4Addr, Ipv6Addr) {
        self.host(1)
    }

    /// Addresses of node `number`.
    pub fn node(self, number: u8) -> (Ipv4Addr, Ipv6Addr) {
        self.host(10 + number)
    }

    /// Network addresses.
    pub fn network(self) -> (Ipv4Addr, Ipv6Addr) {
        self.host(0)
    }

    /// The cluster's plan: the defaults, and addresses for load balancers that nobody else on the bridge has.
    pub fn plan(self) -> String {
        let (v4, v6) = self.host(240);
        format!("loadBalancerCidrs: [{v4}/28, {v6}/124]\n")
    }

    fn host(self, n: u8) -> (Ipv4Addr, Ipv6Addr) {
        let v6 = Ipv6Addr::new(0xfd00, 0x213, u16::from(self.0), 0, 0, 0, 0, u16::from(n));
        (Ipv4Addr::new(10, 213, self.0, n), v6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_where_the_kernel_is_strict() {
        let layout = Layout::new("abcdefgh").unwrap();
        let node = layout.node(MAX_NODES);
        assert!(layout.bridge().len() <= 15 && node.port.len() <= 15, "{}", node.port);
        let socket = node.agent_run().join("overlay.sock");
        assert!(socket.as_os_str().len() <= 107, "{}", socket.display());
        for bad in ["", "abcdefghi", "A", "a-b", "a/b", ".."] {
            assert!(Layout::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_follow_from_the_index() {
        let subnet = Subnet(7);
        assert_eq!(subnet.control().0.to_string(), "10.213.7.1");
        assert_eq!(subnet.node(2).0.to_string(), "10.213.7.12");
        assert_eq!(subnet.node(2).1.to_string(), "fd00:213:7::c");
    }
}
