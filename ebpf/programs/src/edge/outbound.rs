//! From a backend to a client.

use aya_ebpf::programs::TcContext;
use mesh_abi::{Address, EdgeReason, Flow, FlowKey};

use super::packet::{self, Packet, has_ports};
use super::translate::{Side, clamp, put_port, rewrite};
use super::{Scratch, drop, flow, icmp, refuse, scratch, to_client, tunnel};
use crate::packet::{ETHERTYPE_IPV4, NEXT};

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
    let Some(room) = tunnel::room(&flow.via, packet.v4) else { return NEXT };
    if refuse::is_too_big(ctx, room) {
        return refuse::too_big(ctx, packet, room);
    }
    clamp(ctx, packet, room);
    tunnel::enter(ctx, packet.v4, &flow.via, EdgeReason::PodToNode)
}

/// An answer that another node has sent here, because the client knows this one.
#[inline(always)]
pub fn from_node(ctx: &TcContext, packet: &mut Packet, flow: &mut Flow) -> i32 {
    if !find(ctx, packet, flow) || flow.via != Address::UNSPECIFIED {
        return drop(ctx, EdgeReason::Forged);
    }
    translated(ctx, packet, flow, EdgeReason::NodeToClient)
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

#[inline(always)]
fn translated(ctx: &TcContext, packet: &Packet, flow: &Flow, reason: EdgeReason) -> i32 {
    let done = if has_ports(packet.protocol) {
        rewrite(ctx, packet, Side::Source, &flow.address, flow.port_be)
            && put_port(ctx, packet, Side::Destination, flow.client_port_be)
    } else {
        icmp::rewrite(ctx, packet, Side::Source, flow)
    };
    if done { to_client(ctx, flow.ifindex, reason) } else { drop(ctx, EdgeReason::NoRoom) }
}
