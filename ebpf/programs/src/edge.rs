//! Traffic between clients outside and services.
//!
//! ```text
//! client --from_uplink--> inbound: choose, translate --+--> pod on this node
//!                                                      +--> process of this node, by its stack
//!                                                      +--> tunnel::enter --overlay--> from_overlay: tunnel::receive --> pod, process
//! pod -----from_pod---+--> outbound --+--> translate back --> client
//! process --to_uplink-+               +--> tunnel::enter --overlay--> from_overlay: tunnel::receive, outbound --> client
//! ```
//!
//! A process is a pod in the node's own network, whose address is the node's.
//!
//! The client's address is never changed. A packet for another node goes there inside a packet from node to node, because
//! WireGuard lets no foreign source through; the answer comes back the same way, since only the node that the client knows can
//! give it its own address. Every packet here has an Ethernet header.

pub mod announce;
mod choose;
mod flow;
mod icmp;
pub mod inbound;
pub mod outbound;
mod packet;
mod refuse;
mod sctp;
mod stray;
mod translate;
pub mod tunnel;

use aya_ebpf::bindings::TC_ACT_SHOT;
use aya_ebpf::helpers::generated::bpf_redirect_neigh;
use aya_ebpf::programs::TcContext;
use mesh_abi::{Address, EdgeReason, Flow, TraceKind};

use crate::maps::{EDGE_ADDRESSES, EDGE_COUNTERS, EDGE_SCRATCH};
use crate::trace;
use packet::Packet;

/// What is being worked on: more than fits on the stack.
#[derive(Clone, Copy)]
pub struct Scratch {
    packet: Packet,
    flow: Flow,
}

/// This CPU's. What is in it is old.
#[inline(always)]
fn scratch() -> Option<&'static mut Scratch> {
    // SAFETY: a per-CPU value; no program is interrupted by another one on its CPU, and each takes it once. All zeroes is a value,
    // and nobody but these programs writes any other.
    EDGE_SCRATCH.get_ptr_mut(0).map(|scratch| unsafe { &mut *scratch })
}

/// Whether the address is one of this node's on the underlay, where its own processes are reached.
#[inline(always)]
fn is_own(address: &Address) -> bool {
    // SAFETY: only its presence matters.
    unsafe { EDGE_ADDRESSES.get(address) }.is_some()
}

/// Counts the packet under `reason`, and tells it where it is traced.
#[inline(always)]
fn count(ctx: &TcContext, reason: EdgeReason) {
    trace::decided(TraceKind::Edge, reason as u32);
    if let Some(counter) = EDGE_COUNTERS.get_ptr_mut(reason as u32) {
        // SAFETY: a per-CPU value, and a program is not interrupted by another TC program on its CPU.
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += u64::from(ctx.len());
        }
    }
}

/// Counts and drops the packet.
#[inline(always)]
fn drop(ctx: &TcContext, reason: EdgeReason) -> i32 {
    count(ctx, reason);
    TC_ACT_SHOT
}

/// Sends the packet out of a device, to whatever neighbour the node's routes say.
#[inline(always)]
fn to_client(ctx: &TcContext, ifindex: u32, reason: EdgeReason) -> i32 {
    count(ctx, reason);
    // SAFETY: takes integers, and no parameters.
    unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}
