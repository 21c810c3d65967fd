//! Changing addresses, ports and the largest segment, with all checksums.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM};
use aya_ebpf::helpers::generated::bpf_csum_diff;
use aya_ebpf::programs::TcContext;
use mesh_abi::Address;

use super::packet::{Packet, Part, SYN, TCP, UDP};
use super::sctp;
use crate::packet::ETH_HLEN;

/// Which side of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Source,
    Destination,
}

impl Side {
    /// Offset of the address in the IP header.
    #[inline(always)]
    pub fn address(self, v4: bool) -> usize {
        match (self, v4) {
            (Self::Source, true) => 12,
            (Self::Destination, true) => 16,
            (Self::Source, false) => 8,
            (Self::Destination, false) => 24,
        }
    }

    #[inline(always)]
    fn port(self) -> usize {
        if self == Self::Source { 0 } else { 2 }
    }
}

/// Puts another address and port into the packet. Right for packets that are not cut yet and for those whose checksum the
/// device will compute: only differences are applied.
#[inline(never)]
pub fn rewrite(
    ctx: &TcContext,
    packet: &Packet,
    side: Side,
    address: &Address,
    port_be: u16,
) -> bool {
    rewritten(ctx, packet, side, address, port_be).is_some()
}

#[inline(always)]
fn rewritten(
    ctx: &TcContext,
    packet: &Packet,
    side: Side,
    address: &Address,
    port_be: u16,
) -> Option<()> {
    let (old, old_port_be) = match side {
        Side::Source => (packet.source, packet.source_port_be),
        Side::Destination => (packet.destination, packet.destination_port_be),
    };
    if packet.part != Part::Later {
        let transport = packet.transport as usize;
        let (checksum, flags) = match packet.protocol {
            TCP => (transport + 16, 0),
            // A sum of zero means "none" and stays so.
            UDP => (transport + 6, u64::from(BPF_F_MARK_MANGLED_0)),
            _ => {
                // Its sum does not cover addresses.
                sctp::put_port(ctx, packet, side.port(), old_port_be, port_be).then_some(())?;
                return put_address(ctx, ETH_HLEN, packet.v4, side, &old, address);
            }
        };
        let difference = difference(&old, address);
        let pseudo = flags | u64::from(BPF_F_PSEUDO_HDR);
        ctx.l4_csum_replace(checksum, 0, difference, pseudo).ok()?;
        ctx.l4_csum_replace(checksum, old_port_be.into(), port_be.into(), flags | 2).ok()?;
        ctx.store(transport + side.port(), &port_be, 0).ok()?;
    }
    put_address(ctx, ETH_HLEN, packet.v4, side, &old, address)
}

/// Puts another port into one side of the packet; 0 leaves it as it is.
#[inline(always)]
pub fn put_port(ctx: &TcContext, packet: &Packet, side: Side, port_be: u16) -> bool {
    port_be == 0 || packet.part == Part::Later || other_port(ctx, packet, side, port_be)
}

#[inline(never)]
fn other_port(ctx: &TcContext, packet: &Packet, side: Side, port_be: u16) -> bool {
    let old_be =
        if side == Side::Source { packet.source_port_be } else { packet.destination_port_be };
    let transport = packet.transport as usize;
    let (checksum, flags) = match packet.protocol {
        TCP => (transport + 16, 0),
        UDP => (transport + 6, u64::from(BPF_F_MARK_MANGLED_0)),
        _ => return sctp::put_port(ctx, packet, side.port(), old_be, port_be),
    };
    ctx.l4_csum_replace(checksum, old_be.into(), port_be.into(), flags | 2).is_ok()
        && ctx.store(transport + side.port(), &port_be, 0).is_ok()
}

/// Puts another address into the IP header at `offset`; sums of what follows are the caller's business.
#[inline(always)]
pub fn put_address(
    ctx: &TcContext,
    offset: usize,
    v4: bool,
    side: Side,
    old: &Address,
    new: &Address,
) -> Option<()> {
    let place = offset + side.address(v4);
    if v4 {
        let (from, to) = (old.words[3].into(), new.words[3].into());
        ctx.l3_csum_replace(offset + 10, from, to, 4).ok()?;
        ctx.store(place, &new.words[3], 0).ok()
    } else {
        // No sum in the header makes up for the change, so the one over the whole packet has to be told.
        ctx.store(place, new, u64::from(BPF_F_RECOMPUTE_CSUM)).ok()
    }
}

/// What the change adds to a sum. The words that mapped IPv4 addresses share add nothing.
#[inline(always)]
pub fn difference(old: &Address, new: &Address) -> u64 {
    let (mut old, mut new) = (*old, *new);
    // SAFETY: both buffers are 16 bytes long.
    unsafe { bpf_csum_diff(old.words.as_mut_ptr(), 16, new.words.as_mut_ptr(), 16, 0) as u64 }
}

/// Lowers the largest segment that the sender of a SYN announces, so that packets of `mtu` bytes can carry it.
#[inline(always)]
pub fn clamp(ctx: &TcContext, packet: &Packet, mtu: u32) {
    if packet.protocol == TCP && packet.tcp_flags & SYN != 0 && packet.part == Part::Whole {
        clamp_syn(ctx, packet, mtu);
    }
}

#[inline(never)]
fn clamp_syn(ctx: &TcContext, packet: &Packet, mtu: u32) {
    let headers = if packet.v4 { 40 } else { 60 };
    let largest = mtu.saturating_sub(headers).clamp(216, 0xffff) as u16;
    let transport = packet.transport as usize;
    let Ok(length) = ctx.load::<u8>(transport + 12) else { return };
    let end = transport + usize::from(length >> 4) * 4;
    let mut at = transport + 20;
    // Few options come before it: every stack that we know of puts it first.
    for _ in 0..4 {
        if at + 4 > end {
            return;
        }
        let Ok([kind, size]) = ctx.load::<[u8; 2]>(at) else { return };
        match kind {
            0 => return,
            1 => at += 1,
            2 => {
                let Ok(now_be) = ctx.load::<u16>(at + 2) else { return };
                if u16::from_be(now_be) > largest {
                    lower(ctx, transport + 16, at + 2, now_be, largest.to_be());
                }
                return;
            }
            _ if size < 2 => return,
            _ => at += usize::from(size),
        }
    }
}

#[inline(always)]
fn lower(ctx: &TcContext, checksum: usize, at: usize, old_be: u16, new_be: u16) {
    // The sum is over words; an option at an odd place has its bytes the other way round there.
    let (from, to) = if at % 2 == checksum % 2 {
        (old_be, new_be)
    } else {
        (old_be.swap_bytes(), new_be.swap_bytes())
    };
    if ctx.l4_csum_replace(checksum, from.into(), to.into(), 2).is_ok() {
        let _ = ctx.store(at, &new_be, 0);
    }
}
