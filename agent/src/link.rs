//! The link that carries the overlay's datagrams.

use std::fs;
use std::net::IpAddr;

use nix::ifaddrs::getifaddrs;

/// What Ethernet carries, where the link cannot be asked.
const ETHERNET: u16 = 1500;

/// All addresses that this machine has.
pub(crate) fn own_addresses() -> Vec<IpAddr> {
    let Ok(all) = getifaddrs() else { return vec![] };
    all.filter_map(|entry| entry.address.as_ref().and_then(ip)).collect()
}

/// The MTUs of the links that hold one of these addresses; that of Ethernet where they cannot be asked.
///
/// Asked through `/proc/sys/net`, which shows the namespace of whoever reads it; `/sys` shows that of its mount.
pub(crate) fn mtus(addresses: &[IpAddr]) -> Vec<u16> {
    let names = interfaces(addresses);
    let mtus = names.iter().filter_map(|name| {
        let text = fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{name}/mtu")).ok()?;
        text.trim().parse::<u32>().ok().map(|mtu| u16::try_from(mtu).unwrap_or(u16::MAX))
    });
    let mtus: Vec<u16> = mtus.collect();
    if mtus.is_empty() { vec![ETHERNET] } else { mtus }
}

fn interfaces(addresses: &[IpAddr]) -> Vec<String> {
    let Ok(all) = getifaddrs() else { return vec![] };
    let holds = |entry: &nix::ifaddrs::InterfaceAddress| {
        entry.address.as_ref().and_then(ip).is_some_and(|ip| addresses.contains(&ip))
    };
    all.filter(holds).map(|entry| entry.interface_name).collect()
}

fn ip(address: &nix::sys::socket::SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
    v4.or(address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_found_and_strangers_give_ethernet() {
        assert_eq!(interfaces(&["127.0.0.1".parse().unwrap()]), ["lo"]);
        assert!(own_addresses().contains(&"127.0.0.1".parse().unwrap()));
        assert_eq!(mtus(&["192.0.2.77".parse().unwrap()]), [ETHERNET]);
    }
}
