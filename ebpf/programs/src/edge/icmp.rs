//! Errors about translated packets: they quote the packet as it was where the error arose, and have to quote it as its sender
//! knows it (RFC 5508, section 4).

use aya_ebpf::bindings::BPF_F_PSEUDO_HDR;
use aya_ebpf::programs::TcContext;
use mesh_abi::{Address, Flow, FlowKey};

use super::flow;
use super::packet::{ICMP, ICMPV6, Packet, Part, has_ports};
use super::translate::{Side, difference, put_address};
use crate::packet::{ETH_HLEN, Ipv4, Ipv6};

/// Whether it is an ICMP error with its quote.
#[inline(always)]
pub fn is_error(ctx: &TcContext, packet: &Packet) -> bool {
    if packet.part != Part::Whole {
        return false;
    }
    let kind = |ctx: &TcContext| ctx.load::<u8>(packet.transport as usize).unwrap_or(0xff);
    match packet.protocol {
        // Destination unreachable (too big is one of them), time exceeded, parameter problem.
        ICMP if packet.v4 => matches!(kind(ctx), 3 | 11 | 12),
        ICMPV6 if !packet.v4 => matches!(kind(ctx), 1..=4),
        _ => false,
    }
}

/// The packet that an error is about.
struct Quote {
    source: Address,
    destination: Address,
    source_port_be: u16,
    destination_port_be: u16,
    protocol: u8,
    /// Offset of its IP header.
    network: usize,
    /// Offset of its transport header.
    transport: usize,
}

#[inline(always)]
fn quote(ctx: &TcContext, packet: &Packet) -> Option<Quote> {
    let network = packet.transport as usize + 8;
    let mut quote = if packet.v4 {
        let header = ctx.load::<Ipv4>(network).ok()?;
        if !header.has_transport_header() {
            return None;
        }
        Quote {
            source: Address::v4(header.source),
            destination: Address::v4(header.destination),
            source_port_be: 0,
            destination_port_be: 0,
            protocol: header.protocol,
            network,
            transport: network + header.header_bytes()?,
        }
    } else {
        let header = ctx.load::<Ipv6>(network).ok()?;
        Quote {
            source: header.source,
            destination: header.destination,
            source_port_be: 0,
            destination_port_be: 0,
            protocol: header.next,
            network,
            transport: network + 40,
        }
    };
    if !has_ports(quote.protocol) {
        return None;
    }
    let ports = ctx.load::<[u16; 2]>(quote.transport).ok()?;
    [quote.source_port_be, quote.destination_port_be] = ports;
    Some(quote)
}

/// The connection that an error is about: of what the client gets when the error comes from it, and of what it sends when it
/// goes to it.
#[inline(never)]
pub fn find(ctx: &TcContext, packet: &Packet, direction: u8, found: &mut Flow) -> bool {
    let Some(quote) = quote(ctx, packet) else { return false };
    let mut key = FlowKey {
        client: quote.destination,
        other: quote.source,
        client_port_be: quote.destination_port_be,
        other_port_be: quote.source_port_be,
        protocol: quote.protocol,
        direction,
        pad: 0,
    };
    if direction == FlowKey::OUTBOUND {
        (key.client, key.other) = (quote.source, quote.destination);
        (key.client_port_be, key.other_port_be) = (quote.source_port_be, quote.destination_port_be);
    }
    let Some(flow) = flow::find(&key, flow::now()) else { return false };
    *found = flow;
    true
}

/// Puts the address and port of a connection into one side of an error, and into the other side of what it quotes.
#[inline(never)]
pub fn rewrite(ctx: &TcContext, packet: &Packet, side: Side, flow: &Flow) -> bool {
    rewritten(ctx, packet, side, flow).is_some()
}

#[inline(always)]
fn rewritten(ctx: &TcContext, packet: &Packet, side: Side, flow: &Flow) -> Option<()> {
    let quote = quote(ctx, packet)?;
    let quoted = match side {
        Side::Destination => (Side::Source, &quote.source, quote.source_port_be),
        Side::Source => (Side::Destination, &quote.destination, quote.destination_port_be),
    };
    rewrite_quote(ctx, packet, &quote, quoted, &flow.address, flow.port_be)?;
    rewrite_client_port(ctx, packet, &quote, side, flow.client_port_be)?;
    rewrite_outer(ctx, packet, side, &flow.address)
}

#[inline(always)]
fn checksum(packet: &Packet) -> usize {
    packet.transport as usize + 2
}

/// Changes one side of the quoted packet. Its own transport checksum stays: it is cut off as a rule, and nobody looks.
#[inline(always)]
fn rewrite_quote(
    ctx: &TcContext,
    packet: &Packet,
    quote: &Quote,
    (side, old, old_port_be): (Side, &Address, u16),
    address: &Address,
    port_be: u16,
) -> Option<()> {
    let place = quote.network + side.address(packet.v4);
    if packet.v4 {
        // The quoted header's own sum makes up for the address.
        let (from, to) = (old.words[3].into(), address.words[3].into());
        ctx.l3_csum_replace(quote.network + 10, from, to, 4).ok()?;
        ctx.store(place, &address.words[3], 0).ok()?;
    } else {
        ctx.l4_csum_replace(checksum(packet), 0, difference(old, address), 0).ok()?;
        ctx.store(place, address, 0).ok()?;
    }
    let port = quote.transport + if side == Side::Source { 0 } else { 2 };
    ctx.l4_csum_replace(checksum(packet), old_port_be.into(), port_be.into(), 2).ok()?;
    ctx.store(port, &port_be, 0).ok()
}

/// Changes the client's port in the quoted packet, which is on the side that the error itself comes from or goes to.
#[inline(always)]
fn rewrite_client_port(
    ctx: &TcContext,
    packet: &Packet,
    quote: &Quote,
    side: Side,
    port_be: u16,
) -> Option<()> {
    if port_be == 0 {
        return Some(());
    }
    let (old_be, place) = match side {
        Side::Destination => (quote.destination_port_be, quote.transport + 2),
        Side::Source => (quote.source_port_be, quote.transport),
    };
    ctx.l4_csum_replace(checksum(packet), old_be.into(), port_be.into(), 2).ok()?;
    ctx.store(place, &port_be, 0).ok()
}

/// Changes one side of the error itself. The sum of ICMP for IPv6 covers its addresses.
#[inline(always)]
fn rewrite_outer(ctx: &TcContext, packet: &Packet, side: Side, address: &Address) -> Option<()> {
    let old = if side == Side::Source { &packet.source } else { &packet.destination };
    if !packet.v4 {
        let difference = difference(old, address);
        ctx.l4_csum_replace(checksum(packet), 0, difference, BPF_F_PSEUDO_HDR.into()).ok()?;
    }
    put_address(ctx, ETH_HLEN, packet.v4, side, old, address)
}
