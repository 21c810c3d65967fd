//! From node to node inside a packet (RFC 2003, RFC 2473), because the overlay lets only a node's own addresses through.

use aya_ebpf::bindings::{
    BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6, BPF_F_ADJ_ROOM_FIXED_GSO,
    bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
};
use aya_ebpf::helpers::generated::{bpf_csum_diff, bpf_redirect, bpf_skb_change_head};
use aya_ebpf::programs::TcContext;
use mesh_abi::{Address, EdgeReason, TraceHook};

use super::packet::{self, Packet};
use super::{Scratch, count, drop, inbound, is_own, outbound, scratch};
use crate::deliver::local_pod;
use crate::maps::{EDGE_CONFIG, EDGE_NODES, NODE};
use crate::packet::{ETH_HLEN, Ipv4, Ipv6};
use crate::trace;

const IPV4_IN: u8 = 4;
const IPV6_IN: u8 = 41;
const HOPS: u8 = 64;

/// Bytes that the outer header takes.
#[inline(always)]
pub fn overhead(v4: bool) -> u32 {
    if v4 { 20 } else { 40 }
}

/// Largest packets that fit into those to a node; nothing when it is unknown.
#[inline(always)]
pub fn room(via: &Address, v4: bool) -> Option<u32> {
    // SAFETY: the value is copied.
    let mtu = unsafe { EDGE_NODES.get(via) }?.mtu;
    Some(mtu.saturating_sub(overhead(v4)))
}

/// Wraps the packet and gives it to the overlay device.
#[inline(never)]
pub fn enter(ctx: &TcContext, v4: bool, via: &Address, reason: EdgeReason) -> i32 {
    let length = ctx.len() - ETH_HLEN as u32;
    let wrapped = if v4 { wrap_v4(ctx, via, length) } else { wrap_v6(ctx, via, length) };
    let overlay = NODE.get(0).map_or(0, |node| node.overlay_ifindex);
    if wrapped.is_none() || overlay == 0 {
        return drop(ctx, EdgeReason::NoRoom);
    }
    count(ctx, reason);
    // SAFETY: takes integers.
    unsafe { bpf_redirect(overlay, 0) as i32 }
}

#[inline(always)]
fn wrap_v4(ctx: &TcContext, via: &Address, length: u32) -> Option<()> {
    let source = EDGE_CONFIG.get(0)?.v4;
    let inner = ctx.load::<Ipv4>(ETH_HLEN).ok()?;
    let flags = BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_FIXED_GSO;
    ctx.adjust_room(20, BPF_ADJ_ROOM_MAC, flags.into()).ok()?;
    let mut outer = Ipv4 {
        version_length: 0x45,
        tos: inner.tos,
        length_be: ((length + 20) as u16).to_be(),
        id_be: 0,
        // The receiver puts nothing together again.
        fragment_be: 0x4000_u16.to_be(),
        ttl: HOPS,
        protocol: IPV4_IN,
        checksum_be: 0,
        source: source.words[3],
        destination: via.words[3],
    };
    let header = (&raw mut outer).cast::<u32>();
    // SAFETY: the header is 20 bytes long.
    let sum = unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, header, 20, 0) } as u32;
    outer.checksum_be = fold(sum);
    ctx.store(ETH_HLEN, &outer, 0).ok()
}

#[inline(always)]
fn wrap_v6(ctx: &TcContext, via: &Address, length: u32) -> Option<()> {
    let source = EDGE_CONFIG.get(0)?.v6;
    let inner = ctx.load::<u32>(ETH_HLEN).ok()?;
    let flags = BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 | BPF_F_ADJ_ROOM_FIXED_GSO;
    ctx.adjust_room(40, BPF_ADJ_ROOM_MAC, flags.into()).ok()?;
    let outer = Ipv6 {
        version_class_flow: inner,
        length_be: (length as u16).to_be(),
        next: IPV6_IN,
        hop_limit: HOPS,
        source,
        destination: *via,
    };
    ctx.store(ETH_HLEN, &outer, 0).ok()
}

/// The checksum that a sum of words stands for.
#[inline(always)]
pub fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// A packet from the overlay device, without an Ethernet header. Nothing when it is none that a node has wrapped: one that only
/// looks so is left to the stack, which has nobody who would unwrap it.
#[inline(always)]
pub fn receive(ctx: &TcContext) -> Option<i32> {
    let mut from = Address::UNSPECIFIED;
    let version = wrapped(ctx, &mut from);
    if version == 0 {
        return None;
    }
    let v4 = version == 4;
    // SAFETY: only its presence matters.
    unsafe { EDGE_NODES.get(&from) }?;
    // SAFETY: a valid context.
    if unsafe { bpf_skb_change_head(ctx.skb.skb, ETH_HLEN as u32, 0) } != 0 {
        return Some(drop(ctx, EdgeReason::NoRoom));
    }
    let Scratch { packet, flow } = scratch()?;
    if !unwrap(ctx, v4, packet) {
        return Some(drop(ctx, EdgeReason::Forged));
    }
    // Only now it shows whether it is a traced one.
    trace::enter(ctx, ETH_HLEN, TraceHook::FromOverlay);
    // For somebody here, or an answer; or from a client for a pod that is gone. What pods send is an answer or nothing.
    if local_pod(&packet.destination).is_none() && !is_own(&packet.destination) {
        if let Some(verdict) = outbound::from_node(ctx, packet, flow) {
            return Some(verdict);
        }
        if inbound::is_pods(&packet.source) {
            return Some(drop(ctx, EdgeReason::Forged));
        }
    }
    Some(inbound::from_node(ctx, packet, &from))
}

/// Who has wrapped the packet, if it is one for this node: the version of its header, or 0. A function of its own, so that headers
/// are not on the stack of everything that follows.
#[inline(never)]
fn wrapped(ctx: &TcContext, from: &mut Address) -> u32 {
    let version = ctx.load::<u8>(0).unwrap_or(0) >> 4;
    let found = match version {
        4 => wrapped_v4(ctx),
        6 => wrapped_v6(ctx),
        _ => None,
    };
    let Some(node) = found else { return 0 };
    *from = node;
    u32::from(version)
}

#[inline(always)]
fn wrapped_v4(ctx: &TcContext) -> Option<Address> {
    let outer = ctx.load::<Ipv4>(0).ok()?;
    let here = Address::v4(outer.destination) == EDGE_CONFIG.get(0)?.v4;
    let wrapped = outer.protocol == IPV4_IN && outer.version_length == 0x45 && here;
    wrapped.then_some(Address::v4(outer.source))
}

#[inline(always)]
fn wrapped_v6(ctx: &TcContext) -> Option<Address> {
    let outer = ctx.load::<Ipv6>(0).ok()?;
    let here = outer.destination == EDGE_CONFIG.get(0)?.v6;
    (outer.next == IPV6_IN && here).then_some(outer.source)
}

/// Takes the outer header off; the packet has an Ethernet header by now.
#[inline(always)]
fn unwrap(ctx: &TcContext, v4: bool, packet: &mut Packet) -> bool {
    let bytes = overhead(v4) as i32;
    let flags = BPF_F_ADJ_ROOM_FIXED_GSO.into();
    ctx.adjust_room(-bytes, BPF_ADJ_ROOM_MAC, flags).is_ok() && packet::parse(ctx, v4, packet)
}
