//! From a backend to a client.

use aya_ebpf::bindings::BPF_F_INGRESS;
use aya_ebpf::programs::TcContext;
use mesh_abi::{Address, EdgeReason, Flow, FlowKey};

use super::packet::{self, Packet, has_ports};
use super::translate::{Side, clamp, put_port, rewrite};
use super::{Scratch, count, drop, flow, icmp, is_own, refuse, scratch, to_client, tunnel};
use crate::packet::{ETHERTYPE_IPV4, NEXT, ifindex};

/// A packet that leaves one of this node's pods for an address that is no pod's. Nothing when it is no answer to a client.
#[inline(always)]
pub fn from_pod(ctx: &TcContext, ethertype: u16) -> Option<i32> {
    match answer(ctx, ethertype == ETHERTYPE_IPV4) {
        NEXT => None,
        verdict => Some(verdict),
    }
}

#[inline(never)]
fn answer(ctx: &TcContext, v4: bool) -> i32 {
    let Some(Scratch { packet, flow }) = scratch() else { return NEXT };
    if !packet::parse(ctx, v4, packet) || !find(ctx, packet, flow) {
        return NEXT;
    }
    if flow.via == Address::UNSPECIFIED {
        return translated(ctx, packet, flow, EdgeReason::PodToClient);
    }
    to_node(ctx, packet, flow, EdgeReason::PodToNode, 0)
}

/// A packet that this node sends out by an uplink: an answer of one of its own processes, or nothing of ours.
#[inline(always)]
pub fn from_host(ctx: &TcContext, v4: bool) -> i32 {
    let Some(Scratch { packet, flow }) = scratch() else { return NEXT };
    // What is forwarded for others has another source.
    if !packet::parse(ctx, v4, packet) || !is_own(&packet.source) || !find(ctx, packet, flow) {
        return NEXT;
    }
    if flow.via == Address::UNSPECIFIED {
        return translated(ctx, packet, flow, EdgeReason::HostToClient);
    }
    // The sender that has to hear of a packet that is too large is the node's own stack.
    to_node(ctx, packet, flow, EdgeReason::HostToNode, BPF_F_INGRESS)
}

/// An answer to a client of another node's, that has to go out from there. `back` is how what is refused goes back.
#[inline(always)]
fn to_node(ctx: &TcContext, packet: &Packet, flow: &Flow, reason: EdgeReason, back: u32) -> i32 {
    let Some(room) = tunnel::room(&flow.via, packet.v4) else { return NEXT };
    if refuse::is_too_big(ctx, room) {
        return refuse::too_big(ctx, packet, room, back);
    }
    clamp(ctx, packet, room);
    tunnel::enter(ctx, packet.v4, &flow.via, reason)
}

/// An answer that another node has sent here, because the client knows this one. Nothing when it answers to nobody.
#[inline(always)]
pub fn from_node(ctx: &TcContext, packet: &mut Packet, flow: &mut Flow) -> Option<i32> {
    if !find(ctx, packet, flow) || flow.via != Address::UNSPECIFIED {
        return None;
    }
    Some(translated(ctx, packet, flow, EdgeReason::NodeToClient))
}

/// The connection that the packet belongs to, or is an error about.
#[inline(always)]
fn find(ctx: &TcContext, packet: &mut Packet, flow: &mut Flow) -> bool {
    if icmp::is_error(ctx, packet) {
        icmp::find(ctx, packet, FlowKey::OUTBOUND, flow)
    } else {
        find_own(packet, flow)
    }
}

#[inline(never)]
fn find_own(packet: &mut Packet, found: &mut Flow) -> bool {
    if !has_ports(packet.protocol) || !packet.recall_ports() {
        return false;
    }
    let (key, now) = (flow::outbound_key(packet), flow::now());
    let Some(flow) = flow::find(&key, now) else { return false };
    packet.remember_ports();
    let state = flow::next_state(flow.state, packet);
    if flow::is_due(&flow, state, now) {
        flow::put(&key, &Flow { seen_ns: now, state, ..flow });
    }
    *found = flow;
    true
}

/// A function of its own: what it keeps on the stack is not there for what else its callers do.
#[inline(never)]
fn translated(ctx: &TcContext, packet: &Packet, flow: &Flow, reason: EdgeReason) -> i32 {
    let done = if has_ports(packet.protocol) {
        rewrite(ctx, packet, Side::Source, &flow.address, flow.port_be)
            && put_port(ctx, packet, Side::Destination, flow.client_port_be)
    } else {
        icmp::rewrite(ctx, packet, Side::Source, flow)
    };
    if !done {
        return drop(ctx, EdgeReason::NoRoom);
    }
    // Already on its way out by that device.
    if ifindex(ctx) == flow.ifindex {
        count(ctx, reason);
        return NEXT;
    }
    to_client(ctx, flow.ifindex, reason)
}
