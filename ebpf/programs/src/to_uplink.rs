//! What the node sends out by an uplink: answers of its own processes to clients of a service are put right. Attached only where
//! a service has such a backend here, since all that leaves the node passes by.

use aya_ebpf::programs::TcContext;
use mesh_abi::TraceHook;

use crate::edge::outbound;
use crate::packet::{ETH_HLEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, NEXT};
use crate::trace;

pub fn run(ctx: &TcContext) -> i32 {
    trace::enter(ctx, ETH_HLEN, TraceHook::ToUplink);
    let verdict = match ctx.load::<u16>(12).map(u16::from_be) {
        Ok(ETHERTYPE_IPV4) => outbound::from_host(ctx, true),
        Ok(ETHERTYPE_IPV6) => outbound::from_host(ctx, false),
        _ => NEXT,
    };
    trace::leave(ctx);
    verdict
}
