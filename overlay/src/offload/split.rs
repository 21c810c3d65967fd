//! A train of segments, as the kernel hands it over, into the packets that it stands for.

use super::checksum;
use super::vnet::{Gso, NEEDS_CHECKSUM, VnetHeader};

/// What the kernel handed over makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

/// Packets are padded to a multiple of this (WG section 5.4.6).
const PADDING: usize = 16;

/// Longest headers of a train: IPv6 with extensions, TCP with options.
const MAX_HEADERS: usize = 256;

/// Transport header lengths, and places in them.
const TCP_FLAGS: usize = 13;
const TCP_CHECKSUM: usize = 16;
const UDP_HEADER: usize = 8;
const UDP_CHECKSUM: usize = 6;

/// Bits that only the last segment carries: FIN, PSH.
const LAST_ONLY: u8 = 0x01 | 0x08;
/// Bit that only the first segment carries: CWR (RFC 3168, section 6.1.2).
const FIRST_ONLY: u8 = 0x80;

/// Calls `each` with every packet that `frame[..len]` stands for, checksums complete, padded with zeros to a multiple of
/// 16 bytes but not beyond `mtu`.
///
/// Nothing is copied but headers: each packet is assembled in `frame`, over those that `each` has seen already.
/// `frame` needs 15 bytes beyond `len` for padding.
pub fn split(
    (frame, len): (&mut [u8], usize),
    vnet: &VnetHeader,
    mtu: u16,
    mut each: impl FnMut(&[u8]),
) -> Result<(), Malformed> {
    if len + PADDING - 1 > frame.len() || len < 20 {
        return Err(Malformed);
    }
    match vnet.gso {
        Gso::Unknown => Err(Malformed),
        Gso::None => {
            if vnet.flags & NEEDS_CHECKSUM != 0 {
                complete_checksum(&mut frame[..len], vnet)?;
            }
            padded(frame, 0, len, mtu, &mut each);
            Ok(())
        }
        _ => {
            let train = Train::read(&frame[..len], vnet)?;
            train.segments(frame, len, mtu, &mut each);
            Ok(())
        }
    }
}

fn complete_checksum(packet: &mut [u8], vnet: &VnetHeader) -> Result<(), Malformed> {
    let start = usize::from(vnet.checksum_start);
    let place = start + usize::from(vnet.checksum_offset);
    if place + 2 > packet.len() {
        return Err(Malformed);
    }
    let mut sum = checksum::finish(checksum::add(0, &packet[start..]));
    if usize::from(vnet.checksum_offset) == UDP_CHECKSUM && sum == [0, 0] {
        sum = [0xff, 0xff]; // zero says "none" (RFC 768)
    }
    packet[place..place + 2].copy_from_slice(&sum);
    Ok(())
}

/// Lends `frame[at..at + len]` with zeros after it, and puts back what was there.
fn padded(frame: &mut [u8], at: usize, len: usize, mtu: u16, each: &mut impl FnMut(&[u8])) {
    let padded = len.next_multiple_of(PADDING).min(len.max(usize::from(mtu)));
    let extra = padded - len;
    let mut kept = [0; PADDING];
    let tail = &mut frame[at + len..at + padded];
    kept[..extra].copy_from_slice(tail);
    tail.fill(0);
    each(&frame[at..at + padded]);
    frame[at + len..at + padded].copy_from_slice(&kept[..extra]);
}

/// The headers of a train, and how it is cut.
struct Train {
    headers: [u8; MAX_HEADERS],
    /// Length of all headers, and where the transport header is.
    length: usize,
    transport: usize,
    tcp: bool,
    gso_bytes: usize,
    pseudo_header: checksum::Sum,
}

impl Train {
    fn read(packet: &[u8], vnet: &VnetHeader) -> Result<Self, Malformed> {
        let transport = usize::from(vnet.checksum_start);
        let version = packet[0] >> 4;
        let fits = match version {
            4 => transport == usize::from(packet[0] & 15) * 4 && transport >= 20,
            6 => transport >= 40,
            _ => false,
        };
        let tcp = match vnet.gso {
            Gso::TcpV4 if version == 4 => true,
            Gso::TcpV6 if version == 6 => true,
            Gso::Udp => false,
            _ => return Err(Malformed),
        };
        let transport_bytes = match packet.get(transport + 12) {
            Some(offset) if tcp => usize::from(offset >> 4) * 4,
            _ if tcp => return Err(Malformed),
            _ => UDP_HEADER,
        };
        let length = transport + transport_bytes;
        let short = if tcp { transport_bytes < 20 } else { false };
        if !fits || short || length > packet.len().min(MAX_HEADERS) || vnet.gso_bytes == 0 {
            return Err(Malformed);
        }
        let mut headers = [0; MAX_HEADERS];
        headers[..length].copy_from_slice(&packet[..length]);
        let pseudo_header = checksum::pseudo_header(packet, if tcp { 6 } else { 17 });
        let gso_bytes = usize::from(vnet.gso_bytes);
        Ok(Self { headers, length, transport, tcp, gso_bytes, pseudo_header })
    }

    fn segments(&self, frame: &mut [u8], len: usize, mtu: u16, each: &mut impl FnMut(&[u8])) {
        let payload = len - self.length;
        let count = payload.div_ceil(self.gso_bytes).max(1);
        for number in 0..count {
            // The headers go right before the payload, over the end of the segment before.
            let at = number * self.gso_bytes;
            let end = len.min(at + self.length + self.gso_bytes);
            frame[at..at + self.length].copy_from_slice(&self.headers[..self.length]);
            self.finish(&mut frame[at..end], number, number + 1 == count);
            padded(frame, at, end - at, mtu, each);
        }
    }

    /// Puts lengths, numbers, flags and checksums of one segment right.
    fn finish(&self, segment: &mut [u8], number: usize, last: bool) {
        let (ip, transport) = segment.split_at_mut(self.transport);
        finish_ip(ip, transport.len(), number);
        let place = if self.tcp {
            let offset = (number * self.gso_bytes) as u32;
            let sequence =
                u32::from_be_bytes([transport[4], transport[5], transport[6], transport[7]]);
            transport[4..8].copy_from_slice(&sequence.wrapping_add(offset).to_be_bytes());
            if !last {
                transport[TCP_FLAGS] &= !LAST_ONLY;
            }
            if number > 0 {
                transport[TCP_FLAGS] &= !FIRST_ONLY;
            }
            TCP_CHECKSUM
        } else {
            let len = transport.len() as u16;
            transport[4..6].copy_from_slice(&len.to_be_bytes());
            UDP_CHECKSUM
        };
        transport[place..place + 2].fill(0);
        let sum = checksum::add_be(self.pseudo_header, transport.len() as u16);
        let mut sum = checksum::finish(checksum::add(sum, transport));
        if !self.tcp && sum == [0, 0] {
            sum = [0xff, 0xff];
        }
        transport[place..place + 2].copy_from_slice(&sum);
    }
}

fn finish_ip(ip: &mut [u8], transport_bytes: usize, number: usize) {
    if ip[0] >> 4 == 4 {
        let total = (ip.len() + transport_bytes) as u16;
        ip[2..4].copy_from_slice(&total.to_be_bytes());
        let id = u16::from_be_bytes([ip[4], ip[5]]).wrapping_add(number as u16);
        ip[4..6].copy_from_slice(&id.to_be_bytes());
        ip[10..12].fill(0);
        let sum = checksum::finish(checksum::add(0, ip));
        ip[10..12].copy_from_slice(&sum);
    } else {
        let payload = (ip.len() - 40 + transport_bytes) as u16;
        ip[4..6].copy_from_slice(&payload.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(frame: &[u8], vnet: &VnetHeader, mtu: u16) -> Result<Vec<Vec<u8>>, Malformed> {
        let mut room = frame.to_vec();
        room.extend([0xaa; PADDING - 1]);
        let mut packets = Vec::new();
        split((&mut room, frame.len()), vnet, mtu, |p| packets.push(p.to_vec()))?;
        Ok(packets)
    }

    /// A TCP train over IPv4 as the kernel hands it over: lengths of the whole, pseudo-header sum in the field.
    fn train(payload: usize, flags: u8) -> Vec<u8> {
        let mut packet =
            vec![0x45, 0, 0, 0, 0xff, 0xff, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        packet.extend([
            0x0f, 0xa0, 0, 80, 0xff, 0xff, 0xff, 0xf0, 0, 0, 0, 1, 0x50, flags, 1, 0, 0, 0, 0, 0,
        ]);
        packet.extend((0..payload).map(|n| n as u8));
        packet
    }

    const TCP: VnetHeader = VnetHeader {
        flags: NEEDS_CHECKSUM,
        gso: Gso::TcpV4,
        header_bytes: 40,
        gso_bytes: 100,
        checksum_start: 20,
        checksum_offset: 16,
    };

    #[test]
    fn segments_have_their_own_headers() {
        let packets = run(&train(250, 0x80 | 0x18), &TCP, 1420).unwrap();
        assert_eq!(packets.iter().map(Vec::len).collect::<Vec<_>>(), [144, 144, 96]);
        let mut payload: Vec<u8> = Vec::new();
        for (n, packet) in packets.iter().enumerate() {
            let len = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
            assert!(packet[len..].iter().all(|&b| b == 0), "padding is zero");
            let packet = &packet[..len];
            assert!(checksum::is_intact(checksum::add(0, &packet[..20])), "IP checksum");
            let pseudo = checksum::pseudo_header(packet, 6);
            let sum = checksum::add(checksum::add_be(pseudo, (len - 20) as u16), &packet[20..]);
            assert!(checksum::is_intact(sum), "TCP checksum of segment {n}");
            let sequence = u32::from_be_bytes(packet[24..28].try_into().unwrap());
            assert_eq!(sequence, 0xffff_fff0u32.wrapping_add(n as u32 * 100));
            assert_eq!(packet[33], [0x80 | 0x10, 0x10, 0x18][n], "CWR first, PSH last");
            assert_eq!(packet[4..6], [[0xff, 0xff], [0, 0], [0, 1]][n], "identification wraps");
            payload.extend(&packet[40..]);
        }
        assert_eq!(payload, train(250, 0)[40..]);
    }

    #[test]
    fn padding_stops_at_the_mtu() {
        let none = VnetHeader::default();
        for (len, mtu, expected) in [
            (20, 1420, 32),
            (32, 1420, 32),
            (1410, 1420, 1420),
            (1420, 1420, 1420),
            (1500, 1420, 1500),
        ] {
            let mut packet = vec![0; len];
            packet[0] = 0x45;
            assert_eq!(run(&packet, &none, mtu).unwrap()[0].len(), expected, "{len} of {mtu}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let good = train(250, 0x10);
        for vnet in [
            VnetHeader { gso: Gso::TcpV6, ..TCP },
            VnetHeader { gso: Gso::Unknown, ..TCP },
            VnetHeader { gso_bytes: 0, ..TCP },
            VnetHeader { checksum_start: 24, ..TCP },
            VnetHeader { gso: Gso::None, checksum_start: 300, ..TCP },
        ] {
            assert_eq!(run(&good, &vnet, 1420), Err(Malformed), "{vnet:?}");
        }
        assert_eq!(run(&good[..30], &TCP, 1420), Err(Malformed));
    }

    proptest! {
        #[test]
        fn no_input_panics(
            frame in prop::collection::vec(any::<u8>(), 0..400),
            first in prop_oneof![Just(0x45u8), Just(0x60), any::<u8>()],
            header in any::<[u8; 10]>(),
            start in 0u16..64,
            near in any::<bool>(),
        ) {
            let mut frame = frame;
            if let Some(byte) = frame.first_mut() {
                *byte = first;
            }
            let mut vnet = VnetHeader::read(&header).unwrap();
            if near {
                vnet.checksum_start = start;
            }
            let _ = run(&frame, &vnet, 1420);
        }
    }
}
