//! Keys and values of the eBPF maps: the contract between `ebpf/programs` and `kernel`.
//!
//! Owns: the layout of every map ([`service`], [`pod`], [`policy`], [`edge`], [`flow`], [`trace`]), their names ([`maps`]), the program
//! names ([`programs`]) and the [`VERSION`] that is part of the path under which all of it is pinned.
//!
//! Never does: anything. These are plain `repr(C)` structs without padding; host code converts them to and from
//! the model's types in one file (`kernel/src/convert.rs`).
//!
//! Byte order: addresses and fields named `_be` are in network order, everything else in that of the host.
#![no_std]
#![forbid(unsafe_op_in_unsafe_fn)]

pub mod edge;
pub mod flow;
pub mod pod;
pub mod policy;
pub mod service;
pub mod trace;

pub use edge::{
    EdgeBackend, EdgeBackendKey, EdgeConfig, EdgeNode, EdgeReason, EdgeService, EdgeSource,
    EdgeSourceKey, EdgeTable, EdgeUplink, Flow, FlowKey, Fragment, FragmentKey,
};
pub use flow::{
    DatagramKey, FlowConfig, FlowCounter, FlowDirection, FlowEnd, FlowEvent, FlowKind, FlowLimit,
    FlowLimitKey, FlowSlot, FlowSocket,
};
pub use pod::{Counter, LocalPod, NodeConfig, PodPort, Reason, RemoteBlock, RemoteBlockKey};
pub use policy::{
    BlockKey, Connection, ConnectionKey, ConnectionState, HostPort, PieceKey, PodPolicy,
    PolicyRule, PolicyState, RuleKey, RuleMatch,
};
pub use service::{
    AffinityKey, AffinityValue, Member, MemberKey, Peer, Reverse, ReverseKey, Service, ServiceKey,
    Slot, SlotKey, Sticky, StickyKey,
};
pub use trace::{TraceEvent, TraceHook, TraceKey, TraceKind, TraceState};

/// Version of this layout. Increase it with every change that an older program or agent would misread.
pub const VERSION: u32 = 4;

/// Plain data: any bit pattern is a value, and there is no padding.
///
/// # Safety
///
/// Only for `repr(C)` types whose fields are all integers (or arrays or `Plain` structs of them) and whose size is the
/// sum of the sizes of their fields, so that every byte is initialised and every byte string of that size is valid.
pub unsafe trait Plain: Copy + 'static {}

// SAFETY: integers have no padding and no invalid values.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}

/// Declares that a struct is [`Plain`] and pins its size.
macro_rules! plain {
    ($type:ty, $size:literal) => {
        const _: () = assert!(core::mem::size_of::<$type>() == $size);
        const _: () = assert!(core::mem::align_of::<$type>() <= 8);
        // SAFETY: repr(C), integers only, explicit padding; the size is asserted above.
        unsafe impl $crate::Plain for $type {}
    };
}
pub(crate) use plain;

/// An address of either family: 16 bytes in network order, IPv4 as `::ffff:a.b.c.d`.
///
/// Four words, so that the programs compare it with four loads. Each word is in network order in memory.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// The words as they lie in memory.
    pub words: [u32; 4],
}
plain!(Address, 16);

impl Address {
    /// The address that is no address (`::`).
    pub const UNSPECIFIED: Self = Self { words: [0; 4] };
    /// Third word of an IPv4-mapped address.
    pub const MAPPED: u32 = 0x0000_ffff_u32.to_be();

    /// From an IPv4 address as it lies in a header.
    #[inline(always)]
    pub const fn v4(word: u32) -> Self {
        Self { words: [0, 0, Self::MAPPED, word] }
    }

    /// From the bytes of an IPv6 (or mapped) address.
    #[inline(always)]
    pub const fn from_bytes(b: [u8; 16]) -> Self {
        Self {
            words: [
                u32::from_ne_bytes([b[0], b[1], b[2], b[3]]),
                u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
                u32::from_ne_bytes([b[8], b[9], b[10], b[11]]),
                u32::from_ne_bytes([b[12], b[13], b[14], b[15]]),
            ],
        }
    }

    /// The 16 bytes in network order.
    pub const fn to_bytes(self) -> [u8; 16] {
        let [a, b, c, d] = self.words;
        let (a, b, c, d) = (a.to_ne_bytes(), b.to_ne_bytes(), c.to_ne_bytes(), d.to_ne_bytes());
        [
            a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1],
            d[2], d[3],
        ]
    }

    /// Whether it stands for an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == Self::MAPPED
    }
}

/// Names of the maps, which are also their file names below the pin directory.
pub mod maps {
    /// [`ServiceKey`](crate::ServiceKey) -> [`Service`](crate::Service); written by user space.
    pub const SERVICES: &str = "SERVICES";
    /// [`SlotKey`](crate::SlotKey) -> [`Slot`](crate::Slot); written by user space.
    pub const SLOTS: &str = "SLOTS";
    /// [`MemberKey`](crate::MemberKey) -> [`Member`](crate::Member); written by user space.
    pub const MEMBERS: &str = "MEMBERS";
    /// [`Address`](crate::Address) of any node -> 0; written by user space.
    pub const NODE_ADDRESSES: &str = "NODE_ADDRESSES";
    /// Socket storage: [`Peer`](crate::Peer) of a connected socket; written by the connect hooks.
    pub const PEERS: &str = "PEERS";
    /// [`ReverseKey`](crate::ReverseKey) -> [`Reverse`](crate::Reverse), LRU; written by the sendmsg and connect hooks.
    pub const REVERSE: &str = "REVERSE";
    /// [`StickyKey`](crate::StickyKey) -> [`Sticky`](crate::Sticky), LRU; written by the sendmsg hooks.
    pub const STICKY: &str = "STICKY";
    /// [`AffinityKey`](crate::AffinityKey) -> [`AffinityValue`](crate::AffinityValue), LRU; written by the hooks.
    pub const AFFINITY: &str = "AFFINITY";
    /// [`Address`](crate::Address) -> [`LocalPod`](crate::LocalPod); written by user space.
    pub const LOCAL_PODS: &str = "LOCAL_PODS";
    /// Interface index of a host-side veth -> [`PodPort`](crate::PodPort); written by user space.
    pub const POD_PORTS: &str = "POD_PORTS";
    /// [`RemoteBlockKey`](crate::RemoteBlockKey) -> [`RemoteBlock`](crate::RemoteBlock); written by user space.
    pub const REMOTE_BLOCKS: &str = "REMOTE_BLOCKS";
    /// One [`NodeConfig`](crate::NodeConfig) at index 0; written by user space.
    pub const NODE: &str = "NODE";
    /// Per-CPU [`Counter`](crate::Counter) at each [`Reason`](crate::Reason); written by the TC programs.
    pub const COUNTERS: &str = "COUNTERS";
    /// [`ServiceKey`](crate::ServiceKey) -> [`EdgeService`](crate::EdgeService); written by user space.
    pub const EDGE_SERVICES: &str = "EDGE_SERVICES";
    /// Service number -> [`EdgeTable`](crate::EdgeTable); written by user space.
    pub const EDGE_TABLES: &str = "EDGE_TABLES";
    /// [`EdgeBackendKey`](crate::EdgeBackendKey) -> [`EdgeBackend`](crate::EdgeBackend); written by user space.
    pub const EDGE_BACKENDS: &str = "EDGE_BACKENDS";
    /// [`EdgeSourceKey`](crate::EdgeSourceKey) -> 0; written by user space.
    pub const EDGE_SOURCES: &str = "EDGE_SOURCES";
    /// [`FlowKey`](crate::FlowKey) -> [`Flow`](crate::Flow), LRU; written by the TC programs.
    pub const EDGE_FLOWS: &str = "EDGE_FLOWS";
    /// [`FragmentKey`](crate::FragmentKey) -> [`Fragment`](crate::Fragment), LRU; written by the TC programs.
    pub const EDGE_FRAGMENTS: &str = "EDGE_FRAGMENTS";
    /// Overlay [`Address`](crate::Address) of a node -> [`EdgeNode`](crate::EdgeNode); written by user space.
    pub const EDGE_NODES: &str = "EDGE_NODES";
    /// One [`EdgeConfig`](crate::EdgeConfig) at index 0; written by user space.
    pub const EDGE_CONFIG: &str = "EDGE_CONFIG";
    /// Interface index -> [`EdgeUplink`](crate::EdgeUplink); written by user space.
    pub const EDGE_UPLINKS: &str = "EDGE_UPLINKS";
    /// [`Address`](crate::Address) that this node answers for on the local network -> 0; written by user space.
    pub const EDGE_OWNED: &str = "EDGE_OWNED";
    /// [`Address`](crate::Address) of this node on the underlay -> 0; written by user space.
    pub const EDGE_ADDRESSES: &str = "EDGE_ADDRESSES";
    /// Per-CPU [`Counter`](crate::Counter) at each [`EdgeReason`](crate::EdgeReason); written by the TC programs.
    pub const EDGE_COUNTERS: &str = "EDGE_COUNTERS";

    /// Ring buffer of [`FlowEvent`](crate::FlowEvent); written by all programs.
    pub const FLOWS: &str = "FLOWS";
    /// One [`FlowConfig`](crate::FlowConfig) at index 0; written by user space.
    pub const FLOW_CONFIG: &str = "FLOW_CONFIG";
    /// Per-CPU `u64` at each [`FlowCounter`](crate::FlowCounter).
    pub const FLOW_COUNTERS: &str = "FLOW_COUNTERS";
    /// [`FlowLimitKey`](crate::FlowLimitKey) -> [`FlowLimit`](crate::FlowLimit), LRU.
    pub const FLOW_LIMITS: &str = "FLOW_LIMITS";
    /// [`FlowSlot`](crate::FlowSlot) at a place that follows from the two ends of a connection; written by `sock_ops`.
    pub const FLOW_SLOTS: &str = "FLOW_SLOTS";
    /// Socket storage: [`FlowSocket`](crate::FlowSocket).
    pub const FLOW_SOCKETS: &str = "FLOW_SOCKETS";
    /// [`DatagramKey`](crate::DatagramKey) -> time of the last event, nanoseconds of the monotonic clock, LRU.
    pub const DATAGRAMS: &str = "DATAGRAMS";
    /// Cookie of a network namespace of this node -> index of its pod's host-side veth, 0 for the node's own; written by
    /// user space.
    pub const NAMESPACES: &str = "NAMESPACES";

    /// One [`PolicyState`](crate::PolicyState) at index 0; written by user space.
    pub const POLICY_STATE: &str = "POLICY_STATE";
    /// Interface index of a host-side veth -> [`PodPolicy`](crate::PodPolicy); written by user space.
    pub const POD_POLICIES: &str = "POD_POLICIES";
    /// [`Address`](crate::Address) -> identity; written by user space.
    pub const IDENTITIES: &str = "IDENTITIES";
    /// [`BlockKey`](crate::BlockKey) -> identity; written by user space.
    pub const POLICY_BLOCKS: &str = "POLICY_BLOCKS";
    /// [`RuleKey`](crate::RuleKey) -> [`PolicyRule`](crate::PolicyRule); written by user space.
    pub const POLICY_RULES: &str = "POLICY_RULES";
    /// [`ConnectionKey`](crate::ConnectionKey) -> [`Connection`](crate::Connection), LRU; written by the TC programs.
    pub const CONNECTIONS: &str = "CONNECTIONS";
    /// The same about flows without a handshake before there is a policy for either end: who began, and when it was seen last.
    pub const BEGINNINGS: &str = "BEGINNINGS";
    /// [`PieceKey`](crate::PieceKey) -> second of its first fragment, LRU; written by the TC programs.
    pub const FRAGMENTS: &str = "FRAGMENTS";
    /// [`HostPort`](crate::HostPort) -> 1; written by user space.
    pub const HOST_PORTS: &str = "HOST_PORTS";

    /// One [`TraceState`](crate::TraceState) at index 0; written by user space.
    pub const TRACE: &str = "TRACE";
    /// [`TraceKey`](crate::TraceKey) -> 1; written by user space.
    pub const TRACES: &str = "TRACES";
    /// Ring buffer of [`TraceEvent`](crate::TraceEvent); written by all programs.
    pub const TRACE_EVENTS: &str = "TRACE_EVENTS";

    /// All of them, with the sizes of key and value in bytes.
    pub const ALL: &[(&str, usize, usize)] = &[
        (SERVICES, size::<crate::ServiceKey>(), size::<crate::Service>()),
        (SLOTS, size::<crate::SlotKey>(), size::<crate::Slot>()),
        (MEMBERS, size::<crate::MemberKey>(), size::<crate::Member>()),
        (NODE_ADDRESSES, size::<crate::Address>(), 4),
        (PEERS, 4, size::<crate::Peer>()),
        (REVERSE, size::<crate::ReverseKey>(), size::<crate::Reverse>()),
        (STICKY, size::<crate::StickyKey>(), size::<crate::Sticky>()),
        (AFFINITY, size::<crate::AffinityKey>(), size::<crate::AffinityValue>()),
        (LOCAL_PODS, size::<crate::Address>(), size::<crate::LocalPod>()),
        (POD_PORTS, 4, size::<crate::PodPort>()),
        (REMOTE_BLOCKS, size::<crate::RemoteBlockKey>(), size::<crate::RemoteBlock>()),
        (NODE, 4, size::<crate::NodeConfig>()),
        (COUNTERS, 4, size::<crate::Counter>()),
        (FLOWS, 0, 0),
        (FLOW_CONFIG, 4, size::<crate::FlowConfig>()),
        (FLOW_COUNTERS, 4, 8),
        (FLOW_LIMITS, size::<crate::FlowLimitKey>(), size::<crate::FlowLimit>()),
        (FLOW_SLOTS, 4, size::<crate::FlowSlot>()),
        (FLOW_SOCKETS, 4, size::<crate::FlowSocket>()),
        (DATAGRAMS, size::<crate::DatagramKey>(), 8),
        (NAMESPACES, 8, 4),
        (EDGE_SERVICES, size::<crate::ServiceKey>(), size::<crate::EdgeService>()),
        (EDGE_TABLES, 4, size::<crate::EdgeTable>()),
        (EDGE_BACKENDS, size::<crate::EdgeBackendKey>(), size::<crate::EdgeBackend>()),
        (EDGE_SOURCES, size::<crate::EdgeSourceKey>(), 4),
        (EDGE_FLOWS, size::<crate::FlowKey>(), size::<crate::Flow>()),
        (EDGE_FRAGMENTS, size::<crate::FragmentKey>(), size::<crate::Fragment>()),
        (EDGE_NODES, size::<crate::Address>(), size::<crate::EdgeNode>()),
        (EDGE_CONFIG, 4, size::<crate::EdgeConfig>()),
        (EDGE_UPLINKS, 4, size::<crate::EdgeUplink>()),
        (EDGE_OWNED, size::<crate::Address>(), 4),
        (EDGE_ADDRESSES, size::<crate::Address>(), 4),
        (EDGE_COUNTERS, 4, size::<crate::Counter>()),
        (POLICY_STATE, 4, size::<crate::PolicyState>()),
        (POD_POLICIES, 4, size::<crate::PodPolicy>()),
        (IDENTITIES, size::<crate::Address>(), 4),
        (POLICY_BLOCKS, size::<crate::BlockKey>(), 4),
        (POLICY_RULES, size::<crate::RuleKey>(), size::<crate::PolicyRule>()),
        (CONNECTIONS, size::<crate::ConnectionKey>(), size::<crate::Connection>()),
        (BEGINNINGS, size::<crate::ConnectionKey>(), size::<crate::Connection>()),
        (FRAGMENTS, size::<crate::PieceKey>(), 4),
        (HOST_PORTS, size::<crate::HostPort>(), 4),
        (TRACE, 4, size::<crate::TraceState>()),
        (TRACES, size::<crate::TraceKey>(), 4),
        (TRACE_EVENTS, 0, 0),
    ];

    /// Maps that two versions of this layout share while the one takes over from the other, where their sizes are the same: they
    /// remember what is under way, and nobody could tell again. So what changes its meaning and not its size gets another
    /// name. The same holds for [`POLICY_STATE`], from which the numbers of generations go on.
    pub const MEMORY: &[&str] = &[
        CONNECTIONS,
        BEGINNINGS,
        FRAGMENTS,
        EDGE_FLOWS,
        EDGE_FRAGMENTS,
        REVERSE,
        STICKY,
        NAMESPACES,
    ];

    const fn size<T>() -> usize {
        core::mem::size_of::<T>()
    }
}

/// Names of the programs in the object.
pub mod programs {
    /// `connect(2)` of IPv4 sockets.
    pub const CONNECT4: &str = "connect4";
    /// `connect(2)` of IPv6 sockets, mapped addresses included.
    pub const CONNECT6: &str = "connect6";
    /// `sendmsg(2)` with an address, IPv4 datagram sockets.
    pub const SENDMSG4: &str = "sendmsg4";
    /// `sendmsg(2)` with an address, IPv6 datagram sockets.
    pub const SENDMSG6: &str = "sendmsg6";
    /// `recvmsg(2)` that returns an address, IPv4 datagram sockets.
    pub const RECVMSG4: &str = "recvmsg4";
    /// `recvmsg(2)` that returns an address, IPv6 datagram sockets.
    pub const RECVMSG6: &str = "recvmsg6";
    /// `getpeername(2)` of IPv4 sockets.
    pub const GETPEERNAME4: &str = "getpeername4";
    /// `getpeername(2)` of IPv6 sockets.
    pub const GETPEERNAME6: &str = "getpeername6";
    /// TC ingress of a pod's host-side veth.
    pub const FROM_POD: &str = "from_pod";
    /// TC egress of a pod's host-side veth: what the node's stack sends to the pod.
    pub const TO_POD: &str = "to_pod";
    /// TC ingress of the overlay device.
    pub const FROM_OVERLAY: &str = "from_overlay";
    /// Life of TCP sockets.
    pub const SOCK_OPS: &str = "sock_ops";
    /// Raw tracepoint `kfree_skb`: packets that the kernel drops.
    pub const KERNEL_DROP: &str = "kernel_drop";
    /// TC ingress of a device by which clients come in.
    pub const FROM_UPLINK: &str = "from_uplink";
    /// TC egress of such a device, where a process in the node's own network answers for a service.
    pub const TO_UPLINK: &str = "to_uplink";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_addresses_lie_in_network_order() {
        let word = u32::from_ne_bytes([10, 244, 1, 2]);
        let address = Address::v4(word);
        let bytes = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 244, 1, 2];
        assert_eq!(address.to_bytes(), bytes);
        assert_eq!(Address::from_bytes(bytes), address);
        assert!(address.is_v4());
        assert!(!Address::UNSPECIFIED.is_v4());
    }

    #[test]
    fn every_map_name_is_listed_once() {
        for (i, (name, ..)) in maps::ALL.iter().enumerate() {
            assert!(maps::ALL[i + 1..].iter().all(|(other, ..)| other != name));
            assert!(name.len() < 16, "the kernel cuts map names at 15 bytes");
        }
    }
}
