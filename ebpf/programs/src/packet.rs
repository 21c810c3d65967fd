//! Headers, counters and verdicts.

use aya_ebpf::bindings::TC_ACT_SHOT;
use aya_ebpf::programs::TcContext;
use mesh_abi::{Address, Reason, TraceKind};

use crate::maps::COUNTERS;
use crate::{flow, trace};

/// Bytes of an Ethernet header.
pub const ETH_HLEN: usize = 14;
/// Pass on to the next program, and to the stack after the last: other programs on the hook keep their say.
pub const NEXT: i32 = -1;

pub const ETHERTYPE_IPV4: u16 = 0x0800;
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
pub const ETHERTYPE_ARP: u16 = 0x0806;

pub const IPPROTO_HOPOPTS: u8 = 0;
pub const IPPROTO_ICMP: u8 = 1;
pub const IPPROTO_TCP: u8 = 6;
pub const IPPROTO_UDP: u8 = 17;
pub const IPPROTO_FRAGMENT: u8 = 44;
pub const IPPROTO_ICMPV6: u8 = 58;
pub const IPPROTO_SCTP: u8 = 132;

/// An Ethernet header as it lies in the packet.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ethernet {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    pub ethertype_be: u16,
}

/// An IPv4 header without options as it lies in the packet.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ipv4 {
    pub version_length: u8,
    pub tos: u8,
    pub length_be: u16,
    pub id_be: u16,
    pub fragment_be: u16,
    pub ttl: u8,
    pub protocol: u8,
    pub checksum_be: u16,
    pub source: u32,
    pub destination: u32,
}

impl Ipv4 {
    /// Length of the header with options, in bytes; nothing when the header is no IPv4 header.
    #[inline(always)]
    pub fn header_bytes(&self) -> Option<usize> {
        let words = self.version_length & 0x0f;
        (self.version_length >> 4 == 4 && words >= 5).then_some(usize::from(words) * 4)
    }

    /// Whether the transport header is in this packet.
    #[inline(always)]
    pub fn has_transport_header(&self) -> bool {
        self.fragment_be & 0x1fff_u16.to_be() == 0
    }
}

/// An IPv6 header as it lies in the packet.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ipv6 {
    pub version_class_flow: u32,
    pub length_be: u16,
    pub next: u8,
    pub hop_limit: u8,
    pub source: Address,
    pub destination: Address,
}

/// An ARP packet for IPv4 over Ethernet as it lies behind the Ethernet header.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct Arp {
    pub hardware_be: u16,
    pub protocol_be: u16,
    pub lengths: [u8; 2],
    pub operation_be: u16,
    pub sender_mac: [u8; 6],
    pub sender: u32,
    pub target_mac: [u8; 6],
    pub target: u32,
}

const _: () = assert!(core::mem::size_of::<Ethernet>() == ETH_HLEN);
const _: () = assert!(core::mem::size_of::<Ipv4>() == 20);
const _: () = assert!(core::mem::size_of::<Ipv6>() == 40);
const _: () = assert!(core::mem::size_of::<Arp>() == 28);

/// Whether the transport header begins with a source and a destination port.
#[inline(always)]
pub fn has_ports(protocol: u8) -> bool {
    matches!(protocol, IPPROTO_TCP | IPPROTO_UDP | IPPROTO_SCTP)
}

/// What becomes of the packet: it is counted, and told where it is traced.
#[inline(always)]
pub fn decide(ctx: &TcContext, reason: Reason) {
    count(ctx, reason);
    trace::decided(TraceKind::Verdict, reason as u32);
}

#[inline(always)]
fn count(ctx: &TcContext, reason: Reason) {
    if let Some(counter) = COUNTERS.get_ptr_mut(reason as u32) {
        // SAFETY: a per-CPU value, and a program is not interrupted by another TC program on its CPU.
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += u64::from(ctx.len());
        }
    }
}

/// Counts, tells and drops the packet, which has an Ethernet header.
#[inline(always)]
pub fn drop(ctx: &TcContext, reason: Reason) -> i32 {
    drop_at(ctx, ETH_HLEN, reason)
}

/// As [`drop`], for a packet whose IP header begins at `network`.
#[inline(always)]
pub fn drop_at(ctx: &TcContext, network: usize, reason: Reason) -> i32 {
    decide(ctx, reason);
    flow::dropped(ctx, network, reason);
    TC_ACT_SHOT
}

/// Counts the packet and leaves it to the stack.
#[inline(always)]
pub fn pass(ctx: &TcContext, reason: Reason) -> i32 {
    decide(ctx, reason);
    NEXT
}

/// Index of the device that the packet came in by.
#[inline(always)]
pub fn ifindex(ctx: &TcContext) -> u32 {
    // SAFETY: the kernel hands a valid context to the program.
    unsafe { (&raw const (*ctx.skb.skb).ifindex).read_volatile() }
}
