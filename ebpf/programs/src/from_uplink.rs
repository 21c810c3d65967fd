//! What comes in from outside: what is for a service goes to a backend, everything else to the stack as before.

use aya_ebpf::programs::TcContext;
use mesh_abi::TraceHook;

use crate::edge::{announce, inbound};
use crate::packet::{ETH_HLEN, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, NEXT};
use crate::trace;

/// `PACKET_OTHERHOST` of `linux/if_packet.h`.
const FOR_ANOTHER: u32 = 3;

pub fn run(ctx: &TcContext) -> i32 {
    // A switch that has forgotten a machine sends its packets everywhere: they are not for this node.
    // SAFETY: the kernel hands a valid context to the program.
    if unsafe { (&raw const (*ctx.skb.skb).pkt_type).read_volatile() } == FOR_ANOTHER {
        return NEXT;
    }
    trace::enter(ctx, ETH_HLEN, TraceHook::FromUplink);
    let verdict = handle(ctx);
    trace::leave(ctx);
    verdict
}

#[inline(always)]
fn handle(ctx: &TcContext) -> i32 {
    let Ok(ethernet) = ctx.load::<Ethernet>(0) else { return NEXT };
    match u16::from_be(ethernet.ethertype_be) {
        ETHERTYPE_IPV4 => inbound::from_client(ctx, true),
        ETHERTYPE_IPV6 => match announce::neighbour(ctx) {
            NEXT => inbound::from_client(ctx, false),
            verdict => verdict,
        },
        ETHERTYPE_ARP => announce::arp(ctx),
        _ => NEXT,
    }
}
