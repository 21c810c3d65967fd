//! A pod's place in the network: veth pair, addresses, routes, and the TC program that guards it.
//!
//! ```text
//!   pod namespace                         node namespace
//!   eth0  10.244.1.5/32 fd10:..:5/128 --- mvHASH  (TC ingress: from_pod)
//!   default via 169.254.1.1 / fe80::1     10.244.1.5 dev mvHASH, permanent neighbour
//!     (permanent neighbours)
//! ```

pub(crate) mod check;
mod fake;
mod gone;
mod linux;
mod ports;
mod ready;
mod shape;
mod take_over;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use crate::IfName;
use crate::bpf::MapError;
pub use crate::ifname::MacAddress;
use crate::netlink::NetlinkError;

pub use fake::FakePodNetwork;
pub use linux::LinuxPodNetwork;
pub use ports::{HostPort, PORTS_TABLE};
pub use shape::{Bandwidth, Rate};

/// First word of the alias (`ip link` shows it) of every interface of ours; the owner follows.
pub const ALIAS_PREFIX: &str = "mesh-pod:";
/// Alias of what is left of a pod's interface: nobody's, and about to be deleted.
pub const GONE_ALIAS: &str = "mesh-gone";
/// Link group of such interfaces ("mesh" in ASCII), so that one request deletes them all.
pub const GONE_GROUP: u32 = 0x6d65_7368;
/// Routing protocol number of host routes to local pods.
pub const POD_ROUTE_PROTOCOL: u8 = 78;
/// IPv6 gateway that pods see; it exists only as a permanent neighbour entry.
pub const POD_GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// A pod's interface, as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodPort {
    /// Path of the pod's network namespace (`CNI_NETNS`).
    pub netns: PathBuf,
    /// Name inside the pod (`CNI_IFNAME`).
    pub interface: IfName,
    /// Name on the node: [`IfName::for_pod`].
    pub host_interface: IfName,
    /// Who it belongs to, for people and for garbage collection, such as `namespace/pod container-id`. At most 200 bytes.
    pub owner: String,
    /// IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// IPv6 address.
    pub v6: Option<Ipv6Addr>,
    /// MTU of both ends: that of the overlay.
    pub mtu: u32,
    /// MAC address inside the pod; one of its own unless somebody wants another.
    pub mac: Option<MacAddress>,
    /// Ports of the node that lead to it.
    pub ports: Vec<HostPort>,
    /// How much may pass.
    pub bandwidth: Bandwidth,
}

impl PodPort {
    /// The addresses, IPv4 first.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.v4.map(IpAddr::from).into_iter().chain(self.v6.map(IpAddr::from))
    }

    /// MAC address of the pod's end. Unless one is wanted, a function of the host-side name, so that nothing has to be remembered.
    pub fn pod_mac(&self) -> MacAddress {
        self.mac.unwrap_or_else(|| MacAddress::derived(&["pod", self.host_interface.as_str()]))
    }

    /// MAC address of the node's end.
    pub fn host_mac(&self) -> MacAddress {
        MacAddress::derived(&["host", self.host_interface.as_str()])
    }
}

/// What was made, as a CNI result needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Index of the host-side interface.
    pub host_ifindex: u32,
    /// MAC address of the host-side interface.
    pub host_mac: MacAddress,
    /// MAC address inside the pod.
    pub pod_mac: MacAddress,
}

/// A host-side interface of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedPort {
    /// Its name.
    pub host_interface: IfName,
    /// Its index.
    pub ifindex: u32,
    /// The owner that it was made for.
    pub owner: String,
    /// MAC address of the pod's end.
    pub pod_mac: MacAddress,
}

/// Something that a pod's interface lacks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// The host-side interface does not exist.
    #[error("interface {0} does not exist")]
    HostInterface(IfName),
    /// It exists but is not ours.
    #[error("interface {0} does not carry the mark of this network")]
    ForeignInterface(IfName),
    /// It is down.
    #[error("interface {0} is down")]
    Down(IfName),
    /// No route from the node to the pod.
    #[error("no route to {address} through {interface}")]
    HostRoute {
        /// The pod's address.
        address: IpAddr,
        /// The host-side interface.
        interface: IfName,
    },
    /// No permanent neighbour entry from the node to the pod.
    #[error("no permanent neighbour entry for {address} on {interface}")]
    HostNeighbour {
        /// The pod's address.
        address: IpAddr,
        /// The host-side interface.
        interface: IfName,
    },
    /// The TC program is not attached.
    #[error("no TC program on {0}")]
    Program(IfName),
    /// The eBPF maps do not know the pod.
    #[error("map {map} has no entry, or a wrong one, for {interface}")]
    MapEntry {
        /// The map.
        map: &'static str,
        /// The host-side interface.
        interface: IfName,
    },
    /// The pod's network namespace cannot be entered.
    #[error("network namespace {0} cannot be entered")]
    Namespace(PathBuf),
    /// The interface does not exist inside the pod.
    #[error("interface {0} does not exist in the pod")]
    PodInterface(IfName),
    /// An address is not on the interface inside the pod.
    #[error("address {0} is not on the pod's interface")]
    PodAddress(IpAddr),
    /// The pod has no default route of a family.
    #[error("the pod has no default route via {0}")]
    PodRoute(IpAddr),
}

/// Why a pod could not be attached. Everything made until then has been undone.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The pod's network namespace cannot be opened or entered.
    #[error("enter network namespace {path}")]
    Namespace {
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The node's network namespace cannot be entered.
    #[error("enter the node's network namespace")]
    NodeNamespace(#[source] io::Error),
    /// An interface with the host-side or the pod's name exists and is not the one asked for.
    #[error("interface {0} exists already")]
    Exists(IfName),
    /// Another pod has that port of the node.
    #[error("port {port} of the node leads to another pod")]
    PortTaken {
        /// The port, with address and protocol.
        port: String,
        /// The interface.
        interface: IfName,
    },
    /// The table of the node's ports could not be written.
    #[error("publish ports of {interface}")]
    Ports {
        /// The interface.
        interface: IfName,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A netlink request failed.
    #[error("{what} for {interface}")]
    Netlink {
        /// What was tried.
        what: &'static str,
        /// The interface.
        interface: IfName,
        /// The cause.
        #[source]
        source: NetlinkError,
    },
    /// A sysctl could not be written.
    #[error("configure {interface}")]
    Sysctl {
        /// The interface.
        interface: IfName,
        /// The cause.
        #[source]
        source: crate::sysctl::SysctlError,
    },
    /// A map entry could not be written.
    #[error("make {interface} known to the programs")]
    Map {
        /// The interface.
        interface: IfName,
        /// The cause.
        #[source]
        source: MapError,
    },
}

/// Why a pod could not be detached completely. What could be removed was.
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    /// The interface is not ours, and was left alone.
    #[error("interface {0} does not carry the mark of this network")]
    Foreign(IfName),
    /// The node's network namespace cannot be entered.
    #[error("enter the node's network namespace")]
    NodeNamespace(#[source] io::Error),
    /// A netlink request failed.
    #[error("delete {interface}")]
    Netlink {
        /// The interface.
        interface: IfName,
        /// The cause.
        #[source]
        source: NetlinkError,
    },
    /// A map entry or pin could not be removed.
    #[error("remove {what} of {interface}")]
    Bpf {
        /// What was to be removed.
        what: &'static str,
        /// The interface.
        interface: IfName,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Our interfaces could not be listed.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// The node's network namespace cannot be entered.
    #[error("enter the node's network namespace")]
    NodeNamespace(#[source] io::Error),
    /// The dump failed.
    #[error("list interfaces")]
    Netlink(#[from] NetlinkError),
    /// A map could not be read or cleaned.
    #[error(transparent)]
    Map(#[from] MapError),
}

/// Who has to know of a pod before anybody can reach it.
pub trait Guard: Send + Sync {
    /// Prepares for the pod whose host-side interface has that index. It is marked as ours already, and these programs let no packet
    /// through to it yet.
    ///
    /// # Errors
    /// When it cannot; the attachment fails then.
    fn place(&self, port: &PodPort, ifindex: u32) -> io::Result<()>;
}

/// Pods' interfaces on this node. Calls for different pods may run at the same time.
pub trait PodNetwork: Send + Sync {
    /// Makes the interface; when this returns, the pod can talk and is guarded. Repeating it for the same port succeeds
    /// and repairs what is missing.
    ///
    /// # Errors
    /// See [`AttachError`]; everything made by this call has been undone.
    fn attach(&self, port: &PodPort) -> Result<Attached, AttachError>;

    /// Lets these programs guard an interface that programs of another ABI version guard, with maps of their own; to be called
    /// when policies are in force. No packet is lost or unguarded meanwhile. Returns whether there was anything to do: not when
    /// the maps know it as it is, or it is gone.
    ///
    /// Of `port` neither the pod's namespace is entered nor its MTU looked at.
    ///
    /// # Errors
    /// See [`AttachError`]. The interface is guarded by the one or the other then, and repeating it goes on.
    fn take_over(&self, port: &PodPort) -> Result<bool, AttachError>;

    /// Puts the interface out of service: no packet passes it any more, its name and addresses can be used again, and the map
    /// entries of `addresses` are gone unless they belong to another interface by now. Nothing there is success.
    ///
    /// The device itself goes with the next [`bury`](Self::bury): deleting it takes the kernel 20 ms, for one as for a hundred, and
    /// part of that time nobody else can change any device.
    ///
    /// # Errors
    /// See [`DetachError`].
    fn detach(&self, host_interface: &IfName, addresses: &[IpAddr]) -> Result<(), DetachError>;

    /// Makes these, and no others, the ports of the node that lead to pods with these addresses.
    ///
    /// To be called before the first attachment, and now and then: others may have flushed the table.
    ///
    /// # Errors
    /// When the table cannot be written.
    fn publish(&self, ports: &[(Vec<HostPort>, Vec<IpAddr>)]) -> io::Result<()>;

    /// Deletes what [`detach`](Self::detach) left, also what it left to an earlier process. Returns how many devices there were.
    ///
    /// # Errors
    /// When they cannot be listed or deleted.
    fn bury(&self) -> Result<usize, ListError>;

    /// What the interface lacks; empty when all is well.
    ///
    /// # Errors
    /// When the node itself cannot be looked at.
    fn check(&self, port: &PodPort) -> Result<Vec<Missing>, ListError>;

    /// All our interfaces.
    ///
    /// # Errors
    /// When they cannot be listed.
    fn list(&self) -> Result<Vec<ObservedPort>, ListError>;

    /// Removes map entries of interfaces that no longer exist (a namespace that vanished takes its veth along).
    /// Returns how many it removed.
    ///
    /// # Errors
    /// When interfaces cannot be listed or maps not read.
    fn collect_garbage(&self) -> Result<usize, ListError>;
}
