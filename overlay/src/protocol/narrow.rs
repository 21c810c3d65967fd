//! Packets on a way that carries less than the device: what a router would do with them.
//!
//! A packet that is too large and may be cut is cut (RFC 791); for one that may not, its sender is told the size that fits
//! (RFC 1191, RFC 8201), by the node at the other end of the tunnel as far as it can see. TCP connections are told at their
//! start (RFC 879, section 7), so that the rest is for the others and for those that were there before.

use std::net::IpAddr;

use crate::offload::checksum;

/// Headers of IP without options, and what a maximum segment size leaves out.
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const TCP_HEADER: u16 = 20;
const TCP: u8 = 6;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const SYN: u8 = 0x02;
const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_MSS: u8 = 2;

/// Most of a packet that a message about it repeats: 576 bytes in all (RFC 1812, section 4.3.2.3), the smallest MTU over
/// IPv6 (RFC 4443, section 3.2).
const QUOTED_V4: usize = 576 - IPV4_HEADER - 8;
const QUOTED_V6: usize = 1280 - IPV6_HEADER - 8;

/// Lowers the segment size that a connection offers to what fits. `partial` when the checksum is not complete yet.
pub fn clamp_segments(packet: &mut [u8], partial: bool, mtu: u16) {
    let Some((transport, header)) = tcp(packet) else { return };
    let most = mtu.saturating_sub(header as u16 + TCP_HEADER);
    let Some(end) = packet.get(transport + 12).map(|offset| usize::from(offset >> 4) * 4) else {
        return;
    };
    if packet.get(transport + 13).is_none_or(|flags| flags & SYN == 0) {
        return;
    }
    let (mut at, end) = (transport + 20, (transport + end).min(packet.len()));
    while at < end {
        let length = match packet[at] {
            OPTION_END => return,
            OPTION_NOP => 1,
            OPTION_MSS if at + 4 <= end && packet[at + 1] == 4 => {
                let offered = u16::from_be_bytes([packet[at + 2], packet[at + 3]]);
                if offered > most && partial {
                    packet[at + 2..at + 4].copy_from_slice(&most.to_be_bytes());
                } else if offered > most {
                    checksum::replace(packet, at + 2, most, transport + 16);
                }
                return;
            }
            _ => packet.get(at + 1).map_or(0, |length| usize::from(*length)),
        };
        if length == 0 {
            return;
        }
        at += length;
    }
}

/// Where the TCP header is, and the length of IP's without options.
fn tcp(packet: &[u8]) -> Option<(usize, usize)> {
    match packet.first()? >> 4 {
        4 if packet.len() > IPV4_HEADER && packet[9] == TCP => {
            let first = u16::from_be_bytes([packet[6], packet[7]]) & 0x1fff == 0;
            first.then_some((usize::from(packet[0] & 15) * 4, IPV4_HEADER))
        }
        6 if packet.len() > IPV6_HEADER && packet[6] == TCP => Some((IPV6_HEADER, IPV6_HEADER)),
        _ => None,
    }
}

/// Calls `each` with the pieces of a packet over IPv4 that may be cut; returns false when it may not be.
pub fn cut(packet: &[u8], mtu: u16, mut each: impl FnMut(&[u8])) -> bool {
    if packet.len() < IPV4_HEADER {
        return false;
    }
    let header = usize::from(packet[0] & 15) * 4;
    let flags = u16::from_be_bytes([packet[6], packet[7]]);
    let (may, more, first) = (flags & 0x4000 == 0, flags & 0x2000, usize::from(flags & 0x1fff));
    let room = usize::from(mtu).saturating_sub(header) / 8 * 8;
    let total = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
    if packet[0] >> 4 != 4
        || header < IPV4_HEADER
        || !may
        || room == 0
        || !(header..=packet.len()).contains(&total)
    {
        return false;
    }
    let mut piece = vec![0; header + room];
    for (number, part) in packet[header..total].chunks(room).enumerate() {
        let last = header + number * room + part.len() == total;
        let len = header + part.len();
        piece[..header].copy_from_slice(&packet[..header]);
        piece[header..len].copy_from_slice(part);
        if number > 0 {
            // Options that only the first piece has are not told apart: all are made to do nothing.
            piece[IPV4_HEADER..header].fill(OPTION_NOP);
        }
        let offset = (first + number * room / 8) as u16 | if last { more } else { 0x2000 };
        piece[2..4].copy_from_slice(&(len as u16).to_be_bytes());
        piece[6..8].copy_from_slice(&offset.to_be_bytes());
        piece[10..12].fill(0);
        let sum = checksum::finish(checksum::add(0, &piece[..header]));
        piece[10..12].copy_from_slice(&sum);
        each(&piece[..len]);
    }
    true
}

/// The message to the sender of a packet that is too large, as if from `router`; none for packets that nobody may be told
/// about (RFC 1122, section 3.2.2; RFC 4443, section 2.4).
pub fn too_big(packet: &[u8], mtu: u16, router: IpAddr) -> Option<Vec<u8>> {
    match (packet.first()? >> 4, router) {
        (4, IpAddr::V4(router)) if packet.len() >= IPV4_HEADER => {
            let transport = usize::from(packet[0] & 15) * 4;
            let error = packet[9] == ICMP && !matches!(packet.get(transport), Some(0 | 8));
            let later = u16::from_be_bytes([packet[6], packet[7]]) & 0x1fff != 0;
            let source: [u8; 4] = packet[12..16].try_into().ok()?;
            let nobody = source[0] == 0 || source[0] >= 224;
            if error || later || nobody {
                return None;
            }
            let quoted = &packet[..packet.len().min(QUOTED_V4)];
            let mut message = vec![0; IPV4_HEADER + 8];
            let total = (message.len() + quoted.len()) as u16;
            message[..4].copy_from_slice(&[0x45, 0xc0, (total >> 8) as u8, total as u8]);
            message[8..10].copy_from_slice(&[64, ICMP]);
            message[12..16].copy_from_slice(&router.octets());
            message[16..20].copy_from_slice(&source);
            let sum = checksum::finish(checksum::add(0, &message[..IPV4_HEADER]));
            message[10..12].copy_from_slice(&sum);
            message[20..22].copy_from_slice(&[3, 4]);
            message[26..28].copy_from_slice(&mtu.to_be_bytes());
            message.extend(quoted);
            let sum = checksum::finish(checksum::add(0, &message[IPV4_HEADER..]));
            message[22..24].copy_from_slice(&sum);
            Some(message)
        }
        (6, IpAddr::V6(router)) if packet.len() >= IPV6_HEADER => {
            let error =
                packet[6] == ICMPV6 && packet.get(IPV6_HEADER).is_none_or(|kind| *kind < 128);
            let source: [u8; 16] = packet[8..24].try_into().ok()?;
            if error || source[0] == 0xff || source == [0; 16] {
                return None;
            }
            let quoted = &packet[..packet.len().min(QUOTED_V6)];
            let mut message = vec![0; IPV6_HEADER + 8];
            let payload = (8 + quoted.len()) as u16;
            message[0] = 0x60;
            message[4..6].copy_from_slice(&payload.to_be_bytes());
            message[6..8].copy_from_slice(&[ICMPV6, 64]);
            message[8..24].copy_from_slice(&router.octets());
            message[24..40].copy_from_slice(&source);
            message[40] = 2;
            message[44..48].copy_from_slice(&u32::from(mtu).to_be_bytes());
            message.extend(quoted);
            let pseudo = checksum::add_be(checksum::pseudo_header(&message, ICMPV6), payload);
            let sum = checksum::finish(checksum::add(pseudo, &message[IPV6_HEADER..]));
            message[42..44].copy_from_slice(&sum);
            Some(message)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests;
