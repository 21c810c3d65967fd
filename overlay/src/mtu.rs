//! The MTU of the overlay, in its only place.

use std::net::IpAddr;

/// Smallest MTU that IPv6 allows on a link (RFC 8200, section 5). Below it the underlay has to fragment.
pub const FLOOR: u16 = 1280;

/// Largest MTU that the engine's buffers serve: an underlay of 9216 bytes.
pub const CEILING: u16 = 9216;

/// What WireGuard adds to a packet: data header 16 and authentication tag 16 (WG section 5.4.6).
pub const WIREGUARD_OVERHEAD: u16 = 32;

/// UDP header, IPv4 header without options.
const UDP: u16 = 8;
const IPV4: u16 = 20;
const IPV6: u16 = 40;

/// Bytes that a packet grows by on its way over an underlay of IPv4 (60) or IPv6 (80).
pub fn overhead(endpoint: IpAddr) -> u16 {
    WIREGUARD_OVERHEAD + UDP + if endpoint.is_ipv4() { IPV4 } else { IPV6 }
}

/// The MTU for packets inside the tunnel, where the path between two endpoints carries `path_mtu` bytes.
///
/// Rounded down to a multiple of 4, at least [`FLOOR`], at most [`CEILING`]. Senders pad to 16 bytes but never
/// beyond this MTU (WG section 5.4.6), so that no rounding to 16 is needed.
pub fn tunnel_mtu(path_mtu: u16, endpoint: IpAddr) -> u16 {
    (path_mtu.saturating_sub(overhead(endpoint)) & !3).clamp(FLOOR, CEILING)
}

/// The MTU of a device whose peers are reached over links of `link_mtus`, over either protocol: 1420 for Ethernet.
///
/// [`FLOOR`] when no link is known.
pub fn device_mtu(link_mtus: impl IntoIterator<Item = u16>) -> u16 {
    let smallest = link_mtus.into_iter().min().unwrap_or(0);
    tunnel_mtu(smallest, IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        let v4 = "192.0.2.1".parse().unwrap();
        let v6 = "2001:db8::1".parse().unwrap();
        for (path, endpoint, expected) in [
            (1500, v4, 1440),
            (1500, v6, 1420),
            (1400, v4, 1340),
            (1400, v6, 1320),
            (9000, v4, 8940),
            (9000, v6, 8920),
            (1280, v6, FLOOR),
            (0, v4, FLOOR),
            (1450, v4, 1388),
            (u16::MAX, v4, CEILING),
        ] {
            assert_eq!(tunnel_mtu(path, endpoint), expected, "path {path} to {endpoint}");
        }
        assert_eq!(device_mtu([9000, 1500]), 1420);
        assert_eq!(device_mtu([]), FLOOR);
    }
}
