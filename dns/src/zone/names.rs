//! Addresses inside names.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The address and the namespace of `a-b-c-d.NAMESPACE.pod`.
pub fn pod_name(relative: &str) -> Option<(IpAddr, &str)> {
    let (label, rest) = relative.split_once('.')?;
    let namespace = rest.strip_suffix(".pod").filter(|n| !n.contains('.'))?;
    let address = match label.replace('-', ".").parse::<Ipv4Addr>() {
        Ok(address) => address.into(),
        Err(_) => label.replace('-', ":").parse::<Ipv6Addr>().ok()?.into(),
    };
    Some((address, namespace))
}

/// The address that a name below `in-addr.arpa` or `ip6.arpa` stands for (RFC 1035, 3.5; RFC 3596, 2.5).
pub fn reverse_address(name: &str) -> Option<IpAddr> {
    if let Some(digits) = name.strip_suffix(".in-addr.arpa") {
        let mut octets = [0u8; 4];
        let mut labels = digits.split('.');
        for octet in octets.iter_mut().rev() {
            *octet =
                labels.next().filter(|l| l.bytes().all(|b| b.is_ascii_digit()))?.parse().ok()?;
        }
        return labels.next().is_none().then(|| Ipv4Addr::from(octets).into());
    }
    let nibbles = name.strip_suffix(".ip6.arpa")?;
    let mut bits = 0u128;
    let mut count = 0;
    for label in nibbles.split('.').rev() {
        let nibble = u8::from_str_radix(label, 16).ok().filter(|_| label.len() == 1)?;
        bits = bits << 4 | u128::from(nibble);
        count += 1;
    }
    (count == 32).then(|| Ipv6Addr::from(bits).into())
}
