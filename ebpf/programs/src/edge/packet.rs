//! What identifies a packet, for both families.

use aya_ebpf::programs::TcContext;
use mesh_abi::{Address, Fragment, FragmentKey};

use crate::maps::EDGE_FRAGMENTS;
use crate::packet::{ETH_HLEN, Ipv4, Ipv6};

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;
pub const ICMP: u8 = 1;
pub const ICMPV6: u8 = 58;
const IPV6_FRAGMENT: u8 = 44;

/// Bits of the 14th byte of a TCP header.
pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const ACK: u8 = 0x10;

/// How much of a packet this is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Whole,
    First,
    /// Without a transport header.
    Later,
}

/// A packet's headers as far as they matter here.
#[derive(Clone, Copy)]
pub struct Packet {
    pub source: Address,
    pub destination: Address,
    pub source_port_be: u16,
    pub destination_port_be: u16,
    pub protocol: u8,
    pub v4: bool,
    pub part: Part,
    /// TCP flags; of other protocols none.
    pub tcp_flags: u8,
    /// Offset of the transport header.
    pub transport: u32,
    id: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct FragmentHeader {
    next: u8,
    reserved: u8,
    offset_be: u16,
    id: u32,
}

/// Reads the packet behind an Ethernet header. Whether it is an IP packet, and no strange one.
#[inline(never)]
pub fn parse(ctx: &TcContext, v4: bool, packet: &mut Packet) -> bool {
    // What is left from the packet before must not be taken for this one's.
    *packet = Packet::EMPTY;
    let network = if v4 { ipv4(ctx, packet) } else { ipv6(ctx, packet) };
    network.and_then(|()| ports(ctx, packet)).is_some()
}

#[inline(always)]
fn ports(ctx: &TcContext, packet: &mut Packet) -> Option<()> {
    if packet.part == Part::Later || !has_ports(packet.protocol) {
        return Some(());
    }
    let transport = packet.transport as usize;
    [packet.source_port_be, packet.destination_port_be] = ctx.load::<[u16; 2]>(transport).ok()?;
    if packet.protocol == TCP {
        packet.tcp_flags = ctx.load::<u8>(transport + 13).ok()?;
    }
    Some(())
}

#[inline(always)]
pub fn has_ports(protocol: u8) -> bool {
    matches!(protocol, TCP | UDP | SCTP)
}

#[inline(always)]
fn ipv4(ctx: &TcContext, packet: &mut Packet) -> Option<()> {
    let header = ctx.load::<Ipv4>(ETH_HLEN).ok()?;
    let fragment = u16::from_be(header.fragment_be);
    packet.source = Address::v4(header.source);
    packet.destination = Address::v4(header.destination);
    packet.protocol = header.protocol;
    packet.v4 = true;
    packet.part = part(fragment & 0x1fff != 0, fragment & 0x2000 != 0);
    packet.transport = (ETH_HLEN + header.header_bytes()?) as u32;
    packet.id = u32::from(header.id_be);
    Some(())
}

#[inline(always)]
fn ipv6(ctx: &TcContext, packet: &mut Packet) -> Option<()> {
    let header = ctx.load::<Ipv6>(ETH_HLEN).ok()?;
    packet.source = header.source;
    packet.destination = header.destination;
    packet.protocol = header.next;
    packet.transport = ETH_HLEN as u32 + 40;
    if header.next == IPV6_FRAGMENT {
        let piece = ctx.load::<FragmentHeader>(ETH_HLEN + 40).ok()?;
        let offset = u16::from_be(piece.offset_be);
        packet.protocol = piece.next;
        packet.part = part(offset & 0xfff8 != 0, offset & 1 != 0);
        packet.transport += 8;
        packet.id = piece.id;
    }
    Some(())
}

#[inline(always)]
fn part(later: bool, more: bool) -> Part {
    match (later, more) {
        (true, _) => Part::Later,
        (false, true) => Part::First,
        (false, false) => Part::Whole,
    }
}

impl Packet {
    /// One to be filled by [`parse`].
    pub const EMPTY: Self = Self {
        source: Address::UNSPECIFIED,
        destination: Address::UNSPECIFIED,
        source_port_be: 0,
        destination_port_be: 0,
        protocol: 0,
        v4: false,
        part: Part::Whole,
        tcp_flags: 0,
        transport: 0,
        id: 0,
    };

    #[inline(always)]
    fn fragment_key(&self) -> FragmentKey {
        FragmentKey {
            source: self.source,
            destination: self.destination,
            id: self.id,
            protocol: u32::from(self.protocol),
        }
    }

    /// Remembers the ports for the pieces that follow, if any do.
    #[inline(always)]
    pub fn remember_ports(&self) {
        if self.part == Part::First {
            self.remember();
        }
    }

    #[inline(never)]
    fn remember(&self) {
        let ports = Fragment {
            source_port_be: self.source_port_be,
            destination_port_be: self.destination_port_be,
        };
        // Without the entry the other pieces are lost, and the sender has to try again.
        let _ = EDGE_FRAGMENTS.insert(&self.fragment_key(), &ports, 0);
    }

    /// Fills in the ports of a later piece. Whether they are known.
    #[inline(always)]
    pub fn recall_ports(&mut self) -> bool {
        self.part != Part::Later || self.recall()
    }

    #[inline(never)]
    fn recall(&mut self) -> bool {
        // SAFETY: the value is copied at once.
        let Some(ports) = (unsafe { EDGE_FRAGMENTS.get(&self.fragment_key()) }).copied() else {
            return false;
        };
        self.source_port_be = ports.source_port_be;
        self.destination_port_be = ports.destination_port_be;
        true
    }
}
