//! Loading, pinning, attaching and replacing the eBPF programs.
//!
//! ```text
//! BPF_DIR/v4/maps/SERVICES ...           pinned maps, reused by the next agent
//! BPF_DIR/v4/links/cgroup-connect4 ...   pinned links: programs stay attached without an agent
//! BPF_DIR/v4/links/overlay-mesh-wg
//! ```
//!
//! Pods' veths carry a clsact filter instead of a link (see `netlink/tc.rs`): it lives and dies with the device.
//!
//! The version is that of the ABI. A new set of programs is verified, tried on golden packets (`bpf/golden.rs`) and loaded
//! completely before the first link is switched; each link is switched by the kernel in one step.
//!
//! Programs of another ABI, older or newer, go on with their own maps until the agent has filled the new ones. Then it takes each pod over
//! ([`PodNetwork::take_over`](crate::PodNetwork::take_over)) and ends the others ([`Programs::retire_old_versions`]). What remembers
//! connections is one map for both (`bpf/inherit.rs`).
//!
//! On kernels before 6.6 the overlay device and the uplinks carry filters, too (`bpf/filters.rs`); those are replaced by the rounds
//! that look at the devices, and another ABI's when it is retired.

mod bpffs;
mod capacity;
mod edge;
mod filters;
mod golden;
mod inherit;
mod link;
mod load;
mod map;
mod map_error;
mod sys;
pub mod test_run;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use mesh_abi as abi;

pub use bpffs::{BpffsError, detach_all, ensure_mounted};
pub use capacity::{WhenFull, sized_maps};
pub(crate) use edge::{EdgeMaps, Gate};
pub use link::AttachError;
pub use load::LoadError;
pub(crate) use map::Map;
pub use map_error::MapError;

use crate::ifname::MacAddress;
use crate::netlink::device::Device;
use crate::netlink::message::RouteRequest;
use crate::netlink::{NetlinkError, RouteSocket, tc};
use crate::policy::BpfPolicyTable;
use crate::services::BpfServiceTable;
use crate::{NetNs, convert};
use bpffs::Pins;
use filters::Held;
use link::{LinkSpec, put_link};
use load::Loaded;

/// Where and how to load.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Directory on a BPF file system, which is mounted when it is not; ours alone.
    pub bpf_dir: PathBuf,
    /// Directory in the cgroup v2 tree whose processes see service addresses.
    pub cgroup_dir: PathBuf,
    /// Map capacities by name, where they differ from those in the object. Only for maps that are not pinned yet.
    pub capacities: BTreeMap<&'static str, u32>,
    /// Object to load instead of the built-in one.
    pub object: Option<Vec<u8>>,
    /// The node's network namespace, whose pods get the new programs.
    pub node: NetNs,
}

impl LoadOptions {
    /// The built-in object with its capacities, in the current network namespace.
    pub fn new(bpf_dir: impl Into<PathBuf>, cgroup_dir: impl Into<PathBuf>) -> Self {
        Self {
            bpf_dir: bpf_dir.into(),
            cgroup_dir: cgroup_dir.into(),
            capacities: BTreeMap::new(),
            object: None,
            node: NetNs::current(),
        }
    }
}

/// The loaded programs and their maps. Dropping it detaches nothing.
#[derive(Debug)]
pub struct Programs {
    pins: Pins,
    programs: BTreeMap<&'static str, OwnedFd>,
    instructions: BTreeMap<&'static str, u32>,
    pub(crate) services: BpfServiceTable,
    pub(crate) local_pods: Map<abi::Address, abi::LocalPod>,
    pub(crate) pod_ports: Map<u32, abi::PodPort>,
    pub(crate) remote_blocks: Map<abi::RemoteBlockKey, abi::RemoteBlock>,
    pub(crate) node: Map<u32, abi::NodeConfig>,
    pub(crate) edge: EdgeMaps,
    counters: Map<u32, abi::Counter>,
    pub(crate) namespaces: Map<u64, u32>,
    pub(crate) flow_config: Map<u32, abi::FlowConfig>,
    pub(crate) flow_counters: Map<u32, u64>,
    lacking: Vec<String>,
    capacities: BTreeMap<&'static str, u32>,
    held: Held,
    node_namespace: NetNs,
    pub(crate) policy: BpfPolicyTable,
    pub(crate) trace: Map<u32, abi::TraceState>,
    pub(crate) traces: Map<abi::TraceKey, u32>,
}

/// Hooks of a cgroup: program and attach type.
const CGROUP_HOOKS: [(&str, u32); 9] = [
    (abi::programs::CONNECT4, sys::BPF_CGROUP_INET4_CONNECT),
    (abi::programs::CONNECT6, sys::BPF_CGROUP_INET6_CONNECT),
    (abi::programs::SENDMSG4, sys::BPF_CGROUP_UDP4_SENDMSG),
    (abi::programs::SENDMSG6, sys::BPF_CGROUP_UDP6_SENDMSG),
    (abi::programs::RECVMSG4, sys::BPF_CGROUP_UDP4_RECVMSG),
    (abi::programs::RECVMSG6, sys::BPF_CGROUP_UDP6_RECVMSG),
    (abi::programs::GETPEERNAME4, sys::BPF_CGROUP_INET4_GETPEERNAME),
    (abi::programs::GETPEERNAME6, sys::BPF_CGROUP_INET6_GETPEERNAME),
    (abi::programs::SOCK_OPS, sys::BPF_CGROUP_SOCK_OPS),
];

impl Programs {
    /// Loads the programs, on the maps that are pinned already where there are any; attaches the socket hooks to the
    /// cgroup; and switches all links of an earlier load to the new programs.
    ///
    /// # Errors
    /// When anything cannot be loaded; what was attached before stays attached. When a hook cannot be attached; those before
    /// it are attached then, and calling again goes on.
    pub fn open_or_load(options: &LoadOptions) -> Result<Self, LoadError> {
        let pins = Pins::create(&options.bpf_dir)?;
        let generation = inherit::share_memory(&pins)?;
        let loaded = load::load(&pins, options)?;
        let held = Held::new(!pins.others()?.is_empty());
        let this = Self::with_maps(pins, loaded, held, options.node.clone())?;
        this.policy.go_on_after(generation.unwrap_or_default()).map_err(LoadError::Generation)?;
        let cgroup = File::open(&options.cgroup_dir)
            .map_err(|source| LoadError::Cgroup { path: options.cgroup_dir.clone(), source })?;
        for (name, attach_type) in CGROUP_HOOKS {
            if !this.programs.contains_key(name) {
                continue;
            }
            let spec = LinkSpec::cgroup(&cgroup, attach_type)
                .map_err(|source| LoadError::Cgroup { path: options.cgroup_dir.clone(), source })?;
            this.attach(&format!("cgroup-{name}"), name, &spec)
                .map_err(|source| LoadError::Attach { name: name.to_owned(), source })?;
        }
        this.switch_links()?;
        this.switch_filters(&options.node)?;
        Ok(this)
    }

    fn with_maps(
        pins: Pins,
        loaded: Loaded,
        held: Held,
        node_namespace: NetNs,
    ) -> Result<Self, LoadError> {
        use abi::maps;
        let services = BpfServiceTable::new(
            Map::open(&pins, maps::SERVICES)?,
            Map::open(&pins, maps::SLOTS)?,
            Map::open(&pins, maps::MEMBERS)?,
            Map::open(&pins, maps::NODE_ADDRESSES)?,
            Map::open(&pins, maps::REVERSE)?,
        );
        Ok(Self {
            services,
            local_pods: Map::open(&pins, maps::LOCAL_PODS)?,
            pod_ports: Map::open(&pins, maps::POD_PORTS)?,
            remote_blocks: Map::open(&pins, maps::REMOTE_BLOCKS)?,
            node: Map::open(&pins, maps::NODE)?,
            edge: EdgeMaps::open(&pins)?,
            counters: Map::open(&pins, maps::COUNTERS)?,
            namespaces: Map::open(&pins, maps::NAMESPACES)?,
            flow_config: Map::open(&pins, maps::FLOW_CONFIG)?,
            flow_counters: Map::open(&pins, maps::FLOW_COUNTERS)?,
            policy: BpfPolicyTable {
                state: Map::open(&pins, maps::POLICY_STATE)?,
                pods: Map::open(&pins, maps::POD_POLICIES)?,
                identities: Map::open(&pins, maps::IDENTITIES)?,
                blocks: Map::open(&pins, maps::POLICY_BLOCKS)?,
                rules: Map::open(&pins, maps::POLICY_RULES)?,
                host_ports: Map::open(&pins, maps::HOST_PORTS)?,
            },
            trace: Map::open(&pins, maps::TRACE)?,
            traces: Map::open(&pins, maps::TRACES)?,
            capacities: capacity::of_pinned(&pins)?,
            pins,
            programs: loaded.programs,
            instructions: loaded.instructions,
            lacking: loaded.lacking,
            held,
            node_namespace,
        })
    }

    /// The table of frontends and backends. Cheap to clone.
    pub fn services(&self) -> BpfServiceTable {
        self.services.clone()
    }

    /// The namespaces of the pods on this node, as far as a process runs in them. Looks into the namespace of every process.
    ///
    /// # Errors
    /// When the map of pods cannot be read, or processes not be listed.
    pub fn pod_namespaces(&self) -> io::Result<Vec<NetNs>> {
        let pods = self.local_pods.entries()?;
        let macs = pods.into_iter().map(|(_, pod)| MacAddress(pod.pod_mac));
        NetNs::with_devices(&macs.collect())
    }

    /// The tables of network policy. Cheap to clone.
    pub fn policy(&self) -> BpfPolicyTable {
        self.policy.clone()
    }

    /// Packets and bytes by reason, summed over all CPUs.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn counters(&self) -> io::Result<BTreeMap<abi::Reason, abi::Counter>> {
        let mut sums = BTreeMap::new();
        for reason in abi::Reason::ALL {
            let per_cpu = self.counters.per_cpu(&(reason as u32))?;
            let sum = per_cpu.iter().fold(abi::Counter::default(), |sum, one| abi::Counter {
                packets: sum.packets.wrapping_add(one.packets),
                bytes: sum.bytes.wrapping_add(one.bytes),
            });
            sums.insert(reason, sum);
        }
        Ok(sums)
    }

    /// Instructions that the verifier looked at, by program. Empty on kernels before 5.16.
    pub fn verified_instructions(&self) -> &BTreeMap<&'static str, u32> {
        &self.instructions
    }

    /// Programs that only tell, and that this kernel refused, with the verifier's log. Empty on any recent kernel.
    pub fn lacking(&self) -> &[String] {
        &self.lacking
    }

    /// Addresses of the pod of this node whose network namespace has this cookie.
    pub fn addresses_of_namespace(&self, cookie: u64) -> Vec<IpAddr> {
        let ifindex = self.namespaces.lookup(&cookie).ok().flatten();
        let port = ifindex.and_then(|ifindex| self.pod_ports.lookup(&ifindex).ok().flatten());
        let all = port.iter().flat_map(|port| [port.v4, port.v6]);
        all.filter(|a| *a != abi::Address::UNSPECIFIED).map(convert::ip).collect()
    }

    pub(crate) fn map_path(&self, name: &str) -> PathBuf {
        self.pins.map(name)
    }

    /// Lets the program see what the kernel drops, for as long as the descriptor is open.
    pub(crate) fn attach_kernel_drop(&self) -> io::Result<OwnedFd> {
        sys::raw_tracepoint(c"kfree_skb", self.program(abi::programs::KERNEL_DROP)?.as_fd())
    }

    /// How many entries fit, by map: of all that have a [chosen size](sized_maps).
    pub fn capacities(&self) -> &BTreeMap<&'static str, u32> {
        &self.capacities
    }

    /// Number of entries and capacity by map, for the maps that user space fills, and of the memory of connections at the edge.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn pressure(&self) -> io::Result<BTreeMap<&'static str, (usize, u32)>> {
        let mut all = self.services.pressure()?;
        all.extend(self.edge.pressure()?);
        all.extend(self.policy.pressure()?);
        all.insert(abi::maps::LOCAL_PODS, self.local_pods.pressure()?);
        all.insert(abi::maps::POD_PORTS, self.pod_ports.pressure()?);
        all.insert(abi::maps::REMOTE_BLOCKS, self.remote_blocks.pressure()?);
        all.insert(abi::maps::NAMESPACES, self.namespaces.pressure()?);
        Ok(all)
    }

    /// Removes links and maps of other ABI versions. Call it when the maps of this one are filled and the pods taken over. Returns
    /// whether there were any.
    ///
    /// # Errors
    /// When a filter cannot be switched, or a file not be removed; calling again goes on.
    pub fn retire_old_versions(&self) -> Result<bool, LoadError> {
        self.switch_held()?;
        Ok(self.pins.remove_other_versions()?)
    }

    /// Runs a program on a packet without sending it.
    ///
    /// # Errors
    /// When there is no such program, or the kernel refuses the input.
    pub fn test_run(
        &self,
        name: &str,
        input: &test_run::Input<'_>,
    ) -> io::Result<test_run::Output> {
        test_run::run(self.program(name)?.as_fd(), input)
    }

    /// The requests that attach `from_pod` and `to_pod` to a prepared host-side veth, or switch them there.
    pub(crate) fn guard_requests(&self, ifindex: u32) -> Result<[RouteRequest; 2], NetlinkError> {
        let from = self.program(abi::programs::FROM_POD).map_err(NetlinkError::Socket)?;
        let to = self.program(abi::programs::TO_POD).map_err(NetlinkError::Socket)?;
        Ok([
            tc::attach(ifindex, tc::Hook::Ingress, from.as_fd(), abi::programs::FROM_POD),
            tc::attach(ifindex, tc::Hook::Egress, to.as_fd(), abi::programs::TO_POD),
        ])
    }

    /// Attaches `from_overlay` to the overlay device of the calling thread's namespace.
    pub(crate) fn attach_overlay(
        &self,
        socket: &mut RouteSocket,
        name: &str,
        ifindex: u32,
    ) -> Result<(), AttachError> {
        let pin = overlay_pin(name);
        self.attach_tc(socket, &pin, abi::programs::FROM_OVERLAY, ifindex, tc::Hook::Ingress)
    }

    /// Whether the overlay device carries our program.
    pub(crate) fn is_overlay_attached(
        &self,
        socket: &mut RouteSocket,
        name: &str,
        ifindex: u32,
    ) -> Result<bool, NetlinkError> {
        let pin = overlay_pin(name);
        self.is_tc_attached(socket, &pin, abi::programs::FROM_OVERLAY, ifindex, tc::Hook::Ingress)
    }

    fn program(&self, name: &str) -> io::Result<&OwnedFd> {
        self.programs.get(name).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }

    fn attach(&self, pin: &str, program: &str, spec: &LinkSpec<'_>) -> Result<(), AttachError> {
        let program = self.program(program).map_err(AttachError::Create)?;
        put_link(&self.pins.link(pin), program.as_fd(), spec)
    }

    /// Switches pinned TC links of an earlier load. A link whose device is gone loses its pin.
    fn switch_links(&self) -> Result<(), LoadError> {
        let names = self.pins.link_names().map_err(|source| self.pins.links_error(source))?;
        for name in names {
            let program = match name.split_once('-') {
                Some((OVERLAY_PIN, _)) => Some(abi::programs::FROM_OVERLAY),
                Some((pin, _)) => Gate::of_pin(pin).map(Gate::program),
                None => None,
            };
            let Some(program) = program else { continue };
            let attach = |source| LoadError::Attach { name: name.clone(), source };
            let program = self.program(program);
            let program = program.map_err(|error| attach(AttachError::Create(error)))?;
            link::switch(&self.pins.link(&name), program.as_fd()).map_err(attach)?;
        }
        Ok(())
    }

    /// Switches the programs on the pods' veths. One that the maps do not know is guarded by another version, with maps of its own,
    /// until it is taken over.
    fn switch_filters(&self, node: &NetNs) -> Result<(), LoadError> {
        let failed = |error| LoadError::Attach {
            name: abi::programs::FROM_POD.to_owned(),
            source: AttachError::Filter(error),
        };
        let socket = RouteSocket::open_in(node);
        let mut socket = socket.map_err(|error| failed(NetlinkError::Socket(error)))?;
        let mut requests = Vec::new();
        for device in Device::of_pods(&mut socket).map_err(failed)? {
            if self.pod_ports.lookup(&device.ifindex).is_ok_and(|port| port.is_some()) {
                // One whose attachment was interrupted may not be prepared, and would be refused.
                requests.push(tc::prepare(device.ifindex));
                requests.extend(self.guard_requests(device.ifindex).map_err(failed)?);
            }
        }
        for answer in socket.batch(requests).map_err(failed)? {
            match answer {
                // A pod that is just going away, or is prepared as most are.
                Err(error) if !error.is_missing() && !error.is_exists() => {
                    return Err(failed(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The name of the overlay device's pinned link is this, and the device's name.
const OVERLAY_PIN: &str = "overlay";

fn overlay_pin(device: &str) -> String {
    format!("{OVERLAY_PIN}-{device}")
}

/// The built-in object; empty when the crate was built without it.
pub fn built_in_object() -> &'static [u8] {
    load::OBJECT
}

/// Mount point of the cgroup v2 tree, which is not always `/sys/fs/cgroup` (on hybrid systems it is
/// `/sys/fs/cgroup/unified`). Nothing when it is not mounted.
pub fn cgroup2_mount() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields.find(|f| f.get(2) == Some(&"cgroup2")).map(|f| Path::new(f[1]).to_owned())
}
