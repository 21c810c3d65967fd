//! Answers of our own to packets that cannot go on: the packet itself is turned into the answer and sent back.

use aya_ebpf::bindings::TC_ACT_SHOT;
use aya_ebpf::helpers::generated::{bpf_csum_diff, bpf_redirect, bpf_skb_change_tail};
use aya_ebpf::programs::TcContext;
use mesh_abi::{Address, EdgeReason};

use super::packet::{ACK, ICMP, ICMPV6, Packet, Part, RST, SCTP, SYN, TCP, UDP};
use super::tunnel::{self, fold};
use super::{count, drop};
use crate::packet::{ETH_HLEN, Ethernet, Ipv4, Ipv6, ifindex};

/// Nobody serves this, or not any more: a reset for TCP, "port unreachable" for the rest.
#[inline(always)]
pub fn unreachable(ctx: &TcContext, packet: &Packet) -> i32 {
    let done = turned(ctx, packet).then_some(());
    send_back(ctx, done, 0)
}

/// The same for a packet that another node has sent here for a client: the answer goes back to that node.
#[inline(always)]
pub fn unreachable_by(ctx: &TcContext, packet: &Packet, node: &Address) -> i32 {
    if !turned(ctx, packet) {
        return TC_ACT_SHOT;
    }
    tunnel::enter(ctx, packet.v4, node, EdgeReason::PodToNode)
}

/// Counts the packet and turns it into the refusal, if it may be answered by one.
#[inline(never)]
fn turned(ctx: &TcContext, packet: &Packet) -> bool {
    count(ctx, EdgeReason::NoBackend);
    let done = match (packet.part, packet.protocol) {
        (Part::Later, _) => None,
        // Nobody answers a reset by another one.
        (_, TCP) if packet.tcp_flags & RST != 0 => None,
        (_, TCP) => reset(ctx, packet),
        _ => error(ctx, packet, if packet.v4 { (3, 3, 0) } else { (1, 4, 0) }),
    };
    done.is_some()
}

/// The way on takes packets of `room` bytes at most (RFC 1191, RFC 8201). `back` is how the answer goes back by the packet's
/// device: out of it, or as if it came in there (`BPF_F_INGRESS`).
#[inline(never)]
pub fn too_big(ctx: &TcContext, packet: &Packet, room: u32, back: u32) -> i32 {
    if packet.part == Part::Later {
        // Its first piece, which is as long, has been answered.
        return drop(ctx, EdgeReason::TooBig);
    }
    count(ctx, EdgeReason::TooBig);
    let done = error(ctx, packet, if packet.v4 { (3, 4, room) } else { (2, 0, room) });
    send_back(ctx, done, back)
}

/// Whether the packet, or one of those that it will be cut into, is longer than that.
#[inline(always)]
pub fn is_too_big(ctx: &TcContext, room: u32) -> bool {
    // SAFETY: the kernel hands a valid context to the program.
    let segment = unsafe { (&raw const (*ctx.skb.skb).gso_size).read_volatile() };
    // Of what will be cut only the payload of a piece is known here; its headers take 40 bytes at least.
    let bytes = if segment == 0 { ctx.len() - ETH_HLEN as u32 } else { segment + 40 };
    bytes > room
}

/// Sends what the packet was turned into back to where it came from; drops it when it could not be turned.
#[inline(always)]
pub fn send_back(ctx: &TcContext, done: Option<()>, back: u32) -> i32 {
    let turned = done.and_then(|()| {
        let header = ctx.load::<Ethernet>(0).ok()?;
        let Ethernet { destination, source, ethertype_be } = header;
        let back = Ethernet { destination: source, source: destination, ethertype_be };
        ctx.store(0, &back, 0).ok()
    });
    match turned {
        // SAFETY: takes integers.
        Some(()) => unsafe { bpf_redirect(ifindex(ctx), back.into()) as i32 },
        None => TC_ACT_SHOT,
    }
}

/// Turns a TCP packet into a reset in its place. Swapping sides changes no sum, and what does is applied as a difference, so
/// that it is right too when the device was to compute the sum (RFC 9293, section 3.10.7.1).
#[inline(always)]
fn reset(ctx: &TcContext, packet: &Packet) -> Option<()> {
    let transport = packet.transport as usize;
    let [sequence, acknowledged] = ctx.load::<[u32; 2]>(transport + 4).ok()?;
    let (new, flags) = if packet.tcp_flags & ACK != 0 {
        ([acknowledged, 0], RST)
    } else {
        let length = u32::from(packet.tcp_flags & SYN != 0);
        ([0, (u32::from_be(sequence).wrapping_add(length)).to_be()], RST | ACK)
    };
    let checksum = transport + 16;
    ctx.l4_csum_replace(checksum, sequence.into(), new[0].into(), 4).ok()?;
    ctx.l4_csum_replace(checksum, acknowledged.into(), new[1].into(), 4).ok()?;
    ctx.store(transport + 4, &new, 0).ok()?;
    let old = ctx.load::<[u8; 2]>(transport + 12).ok()?;
    let turned = [old[0], flags];
    let (from, to) = (u16::from_ne_bytes(old), u16::from_ne_bytes(turned));
    ctx.l4_csum_replace(checksum, from.into(), to.into(), 2).ok()?;
    ctx.store(transport + 12, &turned, 0).ok()?;
    ctx.store(transport, &[packet.destination_port_be, packet.source_port_be], 0).ok()?;
    swap_addresses(ctx, packet)
}

/// Makes the receiver the sender. No sum tells the difference.
#[inline(always)]
pub fn swap_addresses(ctx: &TcContext, packet: &Packet) -> Option<()> {
    if packet.v4 {
        let sides = [packet.destination.words[3], packet.source.words[3]];
        ctx.store(ETH_HLEN + 12, &sides, 0).ok()
    } else {
        ctx.store(ETH_HLEN + 8, &packet.destination, 0).ok()?;
        ctx.store(ETH_HLEN + 24, &packet.source, 0).ok()
    }
}

/// Type, code, and the word behind the checksum.
type Error = (u8, u8, u32);

/// Turns a packet into an ICMP error about it, which quotes its headers.
#[inline(always)]
fn error(ctx: &TcContext, packet: &Packet, error: Error) -> Option<()> {
    // What stands before the transport header has to be quoted too: an IPv6 packet's fragment header, and no options.
    match (packet.transport as usize - ETH_HLEN, packet.protocol) {
        (20, TCP) if packet.v4 => error_v4::<20>(ctx, packet, error),
        (20, UDP | SCTP) if packet.v4 => error_v4::<8>(ctx, packet, error),
        (40, TCP) if !packet.v4 => error_v6::<20, 40>(ctx, packet, error),
        (40, UDP | SCTP) if !packet.v4 => error_v6::<8, 40>(ctx, packet, error),
        (48, UDP) if !packet.v4 => error_v6::<8, 48>(ctx, packet, error),
        _ => None,
    }
}

/// Cuts the packet behind `QUOTED` bytes of its transport header and makes sure of the sum over these: returns it.
///
/// A packet from this machine may still wait for its device to put the transport checksum in, and nothing tells. So the field
/// gets the one value that filling it in does not change: with `r` as the sum of all other words, `f = ~(r + f)`.
#[inline(always)]
fn cut<const QUOTED: usize>(ctx: &TcContext, packet: &Packet) -> Option<u32> {
    let transport = packet.transport as usize;
    let length = (transport + QUOTED) as u32;
    // SAFETY: a valid context.
    if unsafe { bpf_skb_change_tail(ctx.skb.skb, length, 0) } != 0 {
        return None;
    }
    if packet.protocol == SCTP {
        // Its sum lies behind what is quoted.
        return sum::<QUOTED>(ctx, transport);
    }
    let field = transport + if packet.protocol == TCP { 16 } else { 6 };
    ctx.store(field, &0_u16, 0).ok()?;
    let rest = sum::<QUOTED>(ctx, transport)?;
    // Half of the complement: 0x8000 is the inverse of 2 modulo 0xffff.
    let fixed = u32::from(fold(rest)).wrapping_mul(0x8000) % 0xffff;
    ctx.store(field, &(fixed as u16), 0).ok()?;
    sum::<QUOTED>(ctx, transport)
}

/// Sum of the words of a part of the packet.
#[inline(always)]
fn sum<const BYTES: usize>(ctx: &TcContext, offset: usize) -> Option<u32> {
    let mut bytes = ctx.load::<[u8; BYTES]>(offset).ok()?;
    Some(sum_of(bytes.as_mut_ptr(), BYTES as u32, 0))
}

#[inline(always)]
fn sum_of(bytes: *mut u8, length: u32, seed: u32) -> u32 {
    // SAFETY: all callers pass a buffer of that length, a multiple of four.
    unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, bytes.cast(), length, seed) as u32 }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct IcmpHeader {
    kind: u8,
    code: u8,
    checksum_be: u16,
    word_be: u32,
}

#[inline(always)]
fn error_v4<const QUOTED: usize>(ctx: &TcContext, packet: &Packet, error: Error) -> Option<()> {
    let quoted = cut::<QUOTED>(ctx, packet)?;
    let network = sum::<20>(ctx, ETH_HLEN)?;
    ctx.adjust_room(28, aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, 0).ok()?;
    let mut outer = Ipv4 {
        version_length: 0x45,
        tos: 0,
        length_be: ((20 + 8 + 20 + QUOTED) as u16).to_be(),
        id_be: 0,
        fragment_be: 0x4000_u16.to_be(),
        ttl: 64,
        protocol: ICMP,
        checksum_be: 0,
        source: packet.destination.words[3],
        destination: packet.source.words[3],
    };
    outer.checksum_be = fold(sum_of((&raw mut outer).cast(), 20, 0));
    ctx.store(ETH_HLEN, &outer, 0).ok()?;
    put_header(ctx, ETH_HLEN + 20, error, added(quoted, network))
}

#[inline(always)]
fn error_v6<const QUOTED: usize, const NETWORK: usize>(
    ctx: &TcContext,
    packet: &Packet,
    error: Error,
) -> Option<()> {
    let quoted = cut::<QUOTED>(ctx, packet)?;
    let network = sum::<NETWORK>(ctx, ETH_HLEN)?;
    ctx.adjust_room(48, aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, 0).ok()?;
    let length = (8 + NETWORK + QUOTED) as u16;
    let outer = ipv6_header(length, packet.destination, packet.source, 64);
    ctx.store(ETH_HLEN, &outer, 0).ok()?;
    let pseudo = pseudo_sum(&outer);
    put_header(ctx, ETH_HLEN + 40, error, added(added(quoted, network), pseudo))
}

/// The header of an ICMP packet for IPv6.
#[inline(always)]
pub fn ipv6_header(length: u16, source: Address, destination: Address, hop_limit: u8) -> Ipv6 {
    Ipv6 {
        version_class_flow: 0x6000_0000_u32.to_be(),
        length_be: length.to_be(),
        next: ICMPV6,
        hop_limit,
        source,
        destination,
    }
}

/// What the addresses, the length and the protocol add to the sum (RFC 8200, section 8.1).
#[inline(always)]
pub fn pseudo_sum(header: &Ipv6) -> u32 {
    let mut words = [
        header.source.words[0],
        header.source.words[1],
        header.source.words[2],
        header.source.words[3],
        header.destination.words[0],
        header.destination.words[1],
        header.destination.words[2],
        header.destination.words[3],
        u32::from(u16::from_be(header.length_be)).to_be(),
        u32::from(ICMPV6).to_be(),
    ];
    sum_of(words.as_mut_ptr().cast(), 40, 0)
}

/// Adds two sums.
#[inline(always)]
pub fn added(one: u32, other: u32) -> u32 {
    let sum = u64::from(one) + u64::from(other);
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    ((sum & 0xffff) + (sum >> 16)) as u32
}

#[inline(always)]
fn put_header(ctx: &TcContext, offset: usize, (kind, code, word): Error, rest: u32) -> Option<()> {
    let mut header = IcmpHeader { kind, code, checksum_be: 0, word_be: word.to_be() };
    let own = sum_of((&raw mut header).cast(), 8, 0);
    header.checksum_be = fold(added(own, rest));
    ctx.store(offset, &header, 0).ok()
}
