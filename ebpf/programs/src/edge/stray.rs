//! What comes for an address that this node answers for, and for none of its services. Left to the stack it would go on: to
//! the network that was told that the address is here, or by the default route back to where it came from.

use aya_ebpf::programs::TcContext;
use mesh_abi::EdgeReason;

use super::packet::{ICMP, ICMPV6, Packet, Part, has_ports};
use super::{announce, count, is_own, refuse};
use crate::host;
use crate::packet::{ETH_HLEN, NEXT};

/// What a packet starts with that an answer sends anew.
const HOPS: u8 = 64;

/// Refuses a connection, answers an echo request, and leaves the rest to the stack; also everything for other addresses.
#[inline(always)]
pub fn answer(ctx: &TcContext, packet: &Packet) -> i32 {
    if announce::is_owned(&packet.destination) { answer_owned(ctx, packet) } else { NEXT }
}

#[inline(never)]
fn answer_owned(ctx: &TcContext, packet: &Packet) -> i32 {
    // Somebody has given a service an address that the node itself has: its own ports stay open.
    if is_own(&packet.destination) || host::is_at_home(ctx, &packet.source, &packet.destination) {
        return NEXT;
    }
    if has_ports(packet.protocol) {
        return refuse::unreachable(ctx, packet);
    }
    let Some(types) = echo(ctx, packet) else { return NEXT };
    count(ctx, EdgeReason::Answered);
    refuse::send_back(ctx, reply(ctx, packet, types), 0)
}

/// Type and code of an echo request, and of the reply to it. A request in pieces is none: the reply's sum would need all.
#[inline(always)]
fn echo(ctx: &TcContext, packet: &Packet) -> Option<[[u8; 2]; 2]> {
    let types = match packet.protocol {
        ICMP if packet.v4 => [8, 0],
        ICMPV6 if !packet.v4 => [128, 129],
        _ => return None,
    };
    let request = ctx.load::<[u8; 2]>(packet.transport as usize).ok()?;
    let is_whole = packet.part == Part::Whole;
    (is_whole && request[0] == types[0]).then_some([request, [types[1], request[1]]])
}

/// Turns the request into its reply (RFC 792, RFC 4443 section 4.2).
#[inline(always)]
fn reply(ctx: &TcContext, packet: &Packet, [request, reply]: [[u8; 2]; 2]) -> Option<()> {
    let transport = packet.transport as usize;
    let (from, to) = (u16::from_ne_bytes(request), u16::from_ne_bytes(reply));
    ctx.l4_csum_replace(transport + 2, from.into(), to.into(), 2).ok()?;
    ctx.store(transport, &reply, 0).ok()?;
    if packet.v4 {
        let old = ctx.load::<[u8; 2]>(ETH_HLEN + 8).ok()?;
        let (from, to) = (u16::from_ne_bytes(old), u16::from_ne_bytes([HOPS, old[1]]));
        ctx.l3_csum_replace(ETH_HLEN + 10, from.into(), to.into(), 2).ok()?;
        ctx.store(ETH_HLEN + 8, &HOPS, 0).ok()?;
    } else {
        ctx.store(ETH_HLEN + 7, &HOPS, 0).ok()?;
    }
    refuse::swap_addresses(ctx, packet)
}
