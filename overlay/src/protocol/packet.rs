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
