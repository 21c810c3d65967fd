//! Another port in an SCTP packet.
//!
//! SCTP's sum is a CRC32c over the whole packet (RFC 9260, section 6.8). It is linear: a changed port changes it by the CRC of the
//! difference with zeroes behind it, and that many zeroes are a multiplication in the field of the CRC.

use aya_ebpf::programs::TcContext;

use super::packet::{Packet, Part};
use crate::packet::ETH_HLEN;

/// The polynomial with its bits turned round.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// Offset of the sum in the header.
const SUM: usize = 8;

/// Puts a port at `offset` of the header. False for a piece of a packet: the sum depends on the length of all.
#[inline(never)]
pub fn put_port(ctx: &TcContext, packet: &Packet, offset: usize, old_be: u16, new_be: u16) -> bool {
    if old_be == new_be {
        return true;
    }
    if packet.part != Part::Whole {
        return false;
    }
    put(ctx, packet, offset, old_be, new_be).is_some()
}

#[inline(always)]
fn put(ctx: &TcContext, packet: &Packet, offset: usize, old_be: u16, new_be: u16) -> Option<()> {
    let transport = packet.transport as usize;
    let end = if packet.v4 {
        ETH_HLEN + usize::from(u16::from_be(ctx.load(ETH_HLEN + 2).ok()?))
    } else {
        ETH_HLEN + 40 + usize::from(u16::from_be(ctx.load(ETH_HLEN + 4).ok()?))
    };
    let behind = end.checked_sub(transport + offset + 2)? as u32;
    let sum = ctx.load::<u32>(transport + SUM).ok()?;
    // Of a packet from this machine the device computes the sum later; until then it is zero.
    if sum != 0 {
        let change = difference(u16::from_le(old_be ^ new_be), behind);
        ctx.store(transport + SUM, &(sum ^ change.to_le()), 0).ok()?;
    }
    ctx.store(transport + offset, &new_be, 0).ok()
}

/// The CRC, without a start value, of two bytes and so many zeroes behind them. A packet is shorter than 2^16 bytes.
#[inline(always)]
fn difference(bytes: u16, zeroes: u32) -> u32 {
    // To take in the two bytes themselves is a step for each of their bits, too.
    let (steps, crc) = (zeroes + 2, u32::from(bytes));
    // Immediate values, so that no table has to be in memory.
    let crc = stepped(crc, steps, 0, const { x_to_bytes(0) });
    let crc = stepped(crc, steps, 1, const { x_to_bytes(1) });
    let crc = stepped(crc, steps, 2, const { x_to_bytes(2) });
    let crc = stepped(crc, steps, 3, const { x_to_bytes(3) });
    let crc = stepped(crc, steps, 4, const { x_to_bytes(4) });
    let crc = stepped(crc, steps, 5, const { x_to_bytes(5) });
    let crc = stepped(crc, steps, 6, const { x_to_bytes(6) });
    let crc = stepped(crc, steps, 7, const { x_to_bytes(7) });
    let crc = stepped(crc, steps, 8, const { x_to_bytes(8) });
    let crc = stepped(crc, steps, 9, const { x_to_bytes(9) });
    let crc = stepped(crc, steps, 10, const { x_to_bytes(10) });
    let crc = stepped(crc, steps, 11, const { x_to_bytes(11) });
    let crc = stepped(crc, steps, 12, const { x_to_bytes(12) });
    let crc = stepped(crc, steps, 13, const { x_to_bytes(13) });
    let crc = stepped(crc, steps, 14, const { x_to_bytes(14) });
    stepped(crc, steps, 15, const { x_to_bytes(15) })
}

/// The register after 2^`bit` bytes, if that bit of the number of bytes is set.
#[inline(always)]
fn stepped(crc: u32, bytes: u32, bit: u32, factor: u32) -> u32 {
    if bytes >> bit & 1 == 0 { crc } else { crc32c_times(factor, crc) }
}

/// x to the power of eight times 2^`bit`: what 2^`bit` zeroes multiply a register by.
const fn x_to_bytes(bit: u32) -> u32 {
    // x^8: the highest bit stands for x^0.
    let mut power = 1 << 31 >> 8;
    let mut squared = 0;
    while squared < bit {
        power = product(power, power);
        squared += 1;
    }
    power
}

/// A function that others could call: such ones the verifier looks at once, however often they are called.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn crc32c_times(one: u32, other: u32) -> u32 {
    product(one, other)
}

/// The product of two polynomials, modulo that of the CRC.
#[inline(always)]
const fn product(mut one: u32, mut other: u32) -> u32 {
    let (mut product, mut left) = (0, 32);
    // Without branches: the verifier would follow both ways of each.
    while left > 0 {
        product ^= other & (one >> 31).wrapping_neg();
        one <<= 1;
        other = other >> 1 ^ POLYNOMIAL & (other & 1).wrapping_neg();
        left -= 1;
    }
    product
}
