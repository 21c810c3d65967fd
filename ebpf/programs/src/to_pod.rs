//! What the node's stack sends to a pod: from processes of the node, from outside, or from where the short ways did not
//! lead. `redirect_peer` passes by this hook, so each packet meets its policy once.

use aya_ebpf::programs::TcContext;
use mesh_abi::TraceHook;

use crate::packet::{
    ETH_HLEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, IPPROTO_ICMPV6, Ipv6, NEXT, drop, ifindex,
};
use crate::policy::{self, Ends};
use crate::trace;

pub fn run(ctx: &TcContext) -> i32 {
    let Ok(ethernet) = ctx.load::<Ethernet>(0) else { return NEXT };
    let ethertype = u16::from_be(ethernet.ethertype_be);
    let is_ip = ethertype == ETHERTYPE_IPV4 || ethertype == ETHERTYPE_IPV6;
    if !is_ip || is_neighbour_discovery(ctx, ethertype) {
        return NEXT;
    }
    trace::enter(ctx, ETH_HLEN, TraceHook::ToPod);
    let came_by = policy::came_by(ctx);
    let trusted = came_by == 0;
    // A pod here that has sent this to a port of the node, which is another pod's: it has to be allowed to speak to that one.
    let sender = if trusted { 0 } else { policy::pod_behind(came_by) };
    let ends = Ends { sender, receiver: ifindex(ctx), trusted, unproven: !trusted };
    let verdict = match policy::admit(ctx, ETH_HLEN, ethertype, ends) {
        Ok(()) => NEXT,
        Err(reason) => drop(ctx, reason),
    };
    trace::leave(ctx);
    verdict
}

/// Router and neighbour discovery belongs to the link.
#[inline(always)]
fn is_neighbour_discovery(ctx: &TcContext, ethertype: u16) -> bool {
    ethertype == ETHERTYPE_IPV6
        && ctx.load::<Ipv6>(ETH_HLEN).is_ok_and(|header| header.next == IPPROTO_ICMPV6)
        && ctx.load::<u8>(ETH_HLEN + 40).is_ok_and(|kind| (133..=137).contains(&kind))
}
