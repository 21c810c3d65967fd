//! As much of an IP header as routing by key needs.

use std::net::IpAddr;

/// Destination of an IP packet; none when it is too short to have one.
pub fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 if packet.len() >= 20 => address_v4(&packet[16..20]),
        6 if packet.len() >= 40 => address_v6(&packet[24..40]),
        _ => None,
    }
}

/// Source of an IP packet; none when it is too short to have one.
pub fn source(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 if packet.len() >= 20 => address_v4(&packet[12..16]),
        6 if packet.len() >= 40 => address_v6(&packet[8..24]),
        _ => None,
    }
}

/// Length of an IP packet without what follows it; none when it says that it is longer than it is.
pub fn length(packet: &[u8]) -> Option<usize> {
    let (least, len) = match packet.first()? >> 4 {
        4 => (20, u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]).into()),
        6 => (40, 40 + usize::from(u16::from_be_bytes([*packet.get(4)?, *packet.get(5)?]))),
        _ => return None,
    };
    (least..=packet.len()).contains(&len).then_some(len)
}

fn address_v4(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from)
}

fn address_v6(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_is_not_part_of_a_packet() {
        let mut v4 = [0u8; 64];
        v4[0] = 0x45;
        for (said, expected) in
            [(20, Some(20)), (61, Some(61)), (64, Some(64)), (65, None), (19, None)]
        {
            v4[3] = said;
            assert_eq!(length(&v4), expected, "{said}");
        }
        let mut v6 = [0u8; 64];
        v6[0] = 0x60;
        v6[5] = 24;
        assert_eq!(length(&v6), Some(64));
        assert_eq!(length(&v6[..63]), None);
        assert_eq!(length(&[0x45]), None);
        assert_eq!(length(&[]), None);
    }

    #[test]
    fn short_packets_have_no_addresses() {
        let mut v4 = [0u8; 20];
        v4[0] = 0x45;
        v4[12..20].copy_from_slice(&[10, 244, 1, 2, 10, 244, 2, 3]);
        assert_eq!(source(&v4), Some("10.244.1.2".parse().unwrap()));
        assert_eq!(destination(&v4), Some("10.244.2.3".parse().unwrap()));
        assert_eq!(destination(&v4[..19]), None);
        let mut v6 = [0u8; 40];
        v6[0] = 0x60;
        v6[39] = 1;
        assert_eq!(destination(&v6), Some("::1".parse().unwrap()));
        assert_eq!(source(&v6[..39]), None);
        assert_eq!(destination(&[]), None);
        assert_eq!(destination(&[0x55; 60]), None);
    }
}
