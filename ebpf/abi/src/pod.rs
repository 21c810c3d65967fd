//! Maps of the TC programs: who lives here, who lives elsewhere, and what was counted.

use crate::{Address, plain};

/// A pod on this node, by its address. Tells where to deliver.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LocalPod {
    /// Index of the host-side veth, in the node's network namespace; [`QUEUED`](Self::QUEUED) beside it.
    pub ifindex: u32,
    /// MAC address of the pod's device.
    pub pod_mac: [u8; 6],
    /// MAC address of the host-side veth.
    pub host_mac: [u8; 6],
}
plain!(LocalPod, 16);

impl LocalPod {
    /// Set in `ifindex`, which the kernel keeps below it: packets go through the queue of the host-side veth, which limits their rate.
    pub const QUEUED: u32 = 1 << 31;

    /// Index of the host-side veth.
    pub const fn device(&self) -> u32 {
        self.ifindex & !Self::QUEUED
    }
}

/// What may come out of a pod, by the index of its host-side veth.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PodPort {
    /// Its IPv4 address, mapped; unspecified when it has none.
    pub v4: Address,
    /// Its IPv6 address; unspecified when it has none.
    pub v6: Address,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Zero.
    pub pad: u16,
}
plain!(PodPort, 40);

/// Key of the longest-prefix table of other nodes' blocks.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RemoteBlockKey {
    /// Significant bits of `address`: IPv4 prefixes are 96 bits longer here.
    pub prefix_len: u32,
    /// The block.
    pub address: Address,
}
plain!(RemoteBlockKey, 20);

/// A block that is reached through the overlay.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RemoteBlock {
    /// Zero.
    pub flags: u32,
}
plain!(RemoteBlock, 4);

/// Facts about the node.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NodeConfig {
    /// Index of the overlay device; 0 while there is none, and then packets for other nodes go to the stack.
    pub overlay_ifindex: u32,
    /// Zero.
    pub flags: u32,
}
plain!(NodeConfig, 8);

/// Packets and bytes, per CPU.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counter {
    /// Packets (segments that were not cut yet count once).
    pub packets: u64,
    /// Bytes, link layer header included.
    pub bytes: u64,
}
plain!(Counter, 16);

/// Why a TC program did what it did: the index into the counters.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// From a pod, handed to the node's network stack.
    PodToStack = 0,
    /// From a pod, delivered to a pod on the same node.
    PodToPod = 1,
    /// From a pod, given to the overlay device.
    PodToOverlay = 2,
    /// From the overlay, delivered to a pod.
    OverlayToPod = 3,
    /// From the overlay, handed to the node's network stack.
    OverlayToStack = 4,
    /// Dropped: the source MAC address is not the pod's.
    SpoofedMac = 5,
    /// Dropped: the source address is not the pod's (IPv4, IPv6, ARP or neighbour discovery).
    SpoofedAddress = 6,
    /// Dropped: the host-side veth has no entry, so nothing it sends can be verified.
    UnknownPort = 7,
    /// Dropped: a router advertisement, redirect or DHCP message from a pod.
    Forbidden = 8,
    /// Dropped: too short, or not what its header says.
    Malformed = 9,
    /// Dropped: neither IP nor ARP.
    UnknownProtocol = 10,
    /// Dropped: multicast listener reports and the like, which every pod sends and nobody here needs.
    Noise = 11,
    /// Dropped: the packet could not be prepared for delivery (no memory for a header).
    NoRoom = 12,
    /// Dropped: the sending pod's policies do not allow it.
    PolicyEgress = 13,
    /// Dropped: the receiving pod's policies do not allow it.
    PolicyIngress = 14,
    /// Dropped: a fragment for a pod with policies, without an allowed first fragment before it.
    PolicyFragment = 15,
    /// Dropped: from a pod to a port of the node that is none of its business.
    HostProtected = 16,
}

impl Reason {
    /// Number of reasons, and of entries in the counters map.
    pub const COUNT: u32 = 17;

    /// All of them, in order.
    pub const ALL: [Self; Self::COUNT as usize] = [
        Self::PodToStack,
        Self::PodToPod,
        Self::PodToOverlay,
        Self::OverlayToPod,
        Self::OverlayToStack,
        Self::SpoofedMac,
        Self::SpoofedAddress,
        Self::UnknownPort,
        Self::Forbidden,
        Self::Malformed,
        Self::UnknownProtocol,
        Self::Noise,
        Self::NoRoom,
        Self::PolicyEgress,
        Self::PolicyIngress,
        Self::PolicyFragment,
        Self::HostProtected,
    ];

    /// A stable name for metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PodToStack => "pod_to_stack",
            Self::PodToPod => "pod_to_pod",
            Self::PodToOverlay => "pod_to_overlay",
            Self::OverlayToPod => "overlay_to_pod",
            Self::OverlayToStack => "overlay_to_stack",
            Self::SpoofedMac => "spoofed_mac",
            Self::SpoofedAddress => "spoofed_address",
            Self::UnknownPort => "unknown_port",
            Self::Forbidden => "forbidden",
            Self::Malformed => "malformed",
            Self::UnknownProtocol => "unknown_protocol",
            Self::Noise => "noise",
            Self::NoRoom => "no_room",
            Self::PolicyEgress => "policy_egress",
            Self::PolicyIngress => "policy_ingress",
            Self::PolicyFragment => "policy_fragment",
            Self::HostProtected => "host_protected",
        }
    }

    /// Whether the packet was dropped because it is forbidden.
    pub const fn is_policy(self) -> bool {
        matches!(
            self,
            Self::PolicyEgress | Self::PolicyIngress | Self::PolicyFragment | Self::HostProtected
        )
    }

    /// Whether the packet was dropped.
    pub const fn is_drop(self) -> bool {
        self as u32 >= Self::SpoofedMac as u32
    }
}
