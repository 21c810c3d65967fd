//! What comes out of the overlay device: bare IP packets, already authenticated by WireGuard's allowed IPs.

use aya_ebpf::helpers::generated::bpf_skb_change_head;
use aya_ebpf::programs::TcContext;
use mesh_abi::{Address, Reason, TraceHook};

use crate::deliver::{local_pod, to_pod};
use crate::packet::{ETH_HLEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ipv4, Ipv6, drop, drop_at, pass};
use crate::policy::{self, Ends};
use crate::{edge, host, trace};

pub fn run(ctx: &TcContext) -> i32 {
    trace::enter(ctx, 0, TraceHook::FromOverlay);
    let verdict = handle(ctx);
    trace::leave(ctx);
    verdict
}

#[inline(always)]
fn handle(ctx: &TcContext) -> i32 {
    if let Some(verdict) = edge::tunnel::receive(ctx) {
        return verdict;
    }
    let Some((source, destination, ethertype)) = ends(ctx) else {
        return pass(ctx, Reason::OverlayToStack);
    };
    let Some(pod) = local_pod(&destination) else {
        let protected = host::is_loopback(&destination)
            || !host::is_node(&source) && host::is_protected(ctx, 0, ethertype);
        if protected {
            return drop_at(ctx, 0, Reason::HostProtected);
        }
        return pass(ctx, Reason::OverlayToStack);
    };
    let ends = Ends { sender: 0, receiver: pod.device(), trusted: false, unproven: false };
    if let Err(reason) = policy::admit(ctx, 0, ethertype, ends) {
        return drop_at(ctx, 0, reason);
    }
    // A pod's device expects an Ethernet header. Without room for one the packet cannot be delivered at all.
    // SAFETY: a valid context.
    if unsafe { bpf_skb_change_head(ctx.skb.skb, ETH_HLEN as u32, 0) } != 0 {
        return drop_at(ctx, 0, Reason::NoRoom);
    }
    to_pod(ctx, &pod, ethertype.to_be(), Reason::OverlayToPod)
        .unwrap_or_else(|| drop(ctx, Reason::NoRoom))
}

/// From where to where, by the version in its first byte: there is no link layer that could say otherwise.
#[inline(always)]
fn ends(ctx: &TcContext) -> Option<(Address, Address, u16)> {
    match ctx.load::<u8>(0).ok()? >> 4 {
        4 => {
            let header = ctx.load::<Ipv4>(0).ok()?;
            let (source, destination) =
                (Address::v4(header.source), Address::v4(header.destination));
            Some((source, destination, ETHERTYPE_IPV4))
        }
        6 => {
            let header = ctx.load::<Ipv6>(0).ok()?;
            Some((header.source, header.destination, ETHERTYPE_IPV6))
        }
        _ => None,
    }
}
