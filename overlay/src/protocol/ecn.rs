//! Marks of congestion, on a packet and on the datagram around it (RFC 6040, normal mode).
//!
//! A router on the underlay sees the datagram only. So the datagram says what the packet says, and a router that is about to
//! drop may mark instead; and a mark on the datagram is put on the packet before its receiver gets it. The rest of the
//! traffic class stays zero outside: it would tell an observer what kind of packet that is.

use crate::offload::checksum;

/// The two bits (RFC 3168, section 5).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Ecn {
    /// Its sender does not know such marks: a congested router drops it.
    #[default]
    NotCapable = 0b00,
    /// Its sender knows them, and is told early and often (L4S, RFC 9331).
    Capable1 = 0b01,
    /// Its sender knows them.
    Capable0 = 0b10,
    /// A router on the way was congested.
    Congested = 0b11,
}

impl Ecn {
    /// The lowest two of these bits.
    pub fn from_bits(bits: u8) -> Self {
        match bits & 0b11 {
            0b00 => Self::NotCapable,
            0b01 => Self::Capable1,
            0b10 => Self::Capable0,
            _ => Self::Congested,
        }
    }

    /// What an IP packet says; what is none says nothing.
    pub fn of(packet: &[u8]) -> Self {
        match *packet {
            [first, class, ..] if first >> 4 == 4 => Self::from_bits(class),
            [first, class, ..] if first >> 4 == 6 => Self::from_bits(class >> 4),
            _ => Self::NotCapable,
        }
    }

    /// Puts what its datagram says on a packet with a whole IP header. False when the packet is to be dropped: a router was congested,
    /// and its sender would not learn of it in any other way (RFC 6040, section 4.2).
    #[must_use]
    pub fn pass_on(self, packet: &mut [u8]) -> bool {
        if self == Self::NotCapable {
            return true;
        }
        match (Self::of(packet), self) {
            (Self::NotCapable, Self::Congested) => return false,
            (Self::Capable0 | Self::Capable1, Self::Congested)
            | (Self::Capable0, Self::Capable1) => self.put(packet),
            _ => {}
        }
        true
    }

    fn put(self, packet: &mut [u8]) {
        if packet[0] >> 4 == 6 {
            packet[1] = packet[1] & 0xcf | (self as u8) << 4;
        } else {
            let class = packet[1] & 0xfc | self as u8;
            checksum::replace(packet, 0, u16::from_be_bytes([packet[0], class]), 10);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Ecn; 4] = [Ecn::NotCapable, Ecn::Capable0, Ecn::Capable1, Ecn::Congested];
    /// Traffic class without the two bits.
    const CLASS: u8 = 0b1010_1000;

    fn v4(ecn: Ecn) -> Vec<u8> {
        let mut packet = vec![0x45, CLASS | ecn as u8, 0, 20, 0x12, 0x34, 0x40, 0, 64, 17, 0, 0];
        packet.extend([10, 244, 1, 5, 10, 244, 2, 5]);
        let sum = checksum::finish(checksum::add(0, &packet));
        packet[10..12].copy_from_slice(&sum);
        packet
    }

    fn v6(ecn: Ecn) -> Vec<u8> {
        let class = CLASS | ecn as u8;
        let mut packet = vec![0x60 | class >> 4, class << 4 | 0x7, 0xab, 0xcd];
        packet.resize(40, 9);
        packet
    }

    #[test]
    fn what_arrives_follows_from_both_headers() {
        use Ecn::{Capable0, Capable1, Congested, NotCapable};
        // RFC 6040, figure 4; columns as in `ALL`.
        let table = [
            (NotCapable, [Some(NotCapable), Some(NotCapable), Some(NotCapable), None]),
            (Capable0, [Some(Capable0), Some(Capable0), Some(Capable1), Some(Congested)]),
            (Capable1, [Some(Capable1), Some(Capable1), Some(Capable1), Some(Congested)]),
            (Congested, [Some(Congested); 4]),
        ];
        for make in [v4, v6] {
            for (inner, row) in table {
                for (outer, expected) in ALL.into_iter().zip(row) {
                    let mut packet = make(inner);
                    assert_eq!(Ecn::of(&packet), inner);
                    let stays = outer.pass_on(&mut packet);
                    let wanted = make(expected.unwrap_or(inner));
                    assert_eq!(
                        (stays, packet),
                        (expected.is_some(), wanted),
                        "{inner:?} in {outer:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_is_no_packet_says_nothing() {
        for bytes in [&[][..], &[0x45], &[0x60], &[0, 0xff], &[0x5f, 0xff]] {
            assert_eq!(Ecn::of(bytes), Ecn::NotCapable);
        }
        assert!(ALL.iter().all(|ecn| Ecn::from_bits(0xfc | *ecn as u8) == *ecn));
    }
}
