//! What stands in the alias of an interface, so that interfaces alone can rebuild a lost journal.
//!
//! `CONTAINER/INTERFACE IPV4 IPV6 [NAMESPACE/POD]`, with `-` for an address that is not there.

use std::net::IpAddr;
use std::path::PathBuf;

use mesh_cni::wire::{Code, Failure, Owner, PodName, Transport, Wishes};
use mesh_kernel::IfName;
use mesh_kernel::pods::{Bandwidth, HostPort, MacAddress, PodPort, Rate};
use mesh_model::snapshot::Protocol;

use super::pool::Lease;

/// Longest owner text that an interface carries.
const MAX_BYTES: usize = 200;

/// The text for an interface.
pub fn describe(owner: &Owner, addresses: &[IpAddr], pod: Option<&PodName>) -> String {
    let family = |v4: bool| {
        let found = addresses.iter().find(|a| a.is_ipv4() == v4);
        found.map_or_else(|| "-".to_owned(), ToString::to_string)
    };
    let mut text = format!("{owner} {} {}", family(true), family(false));
    if let Some(pod) = pod {
        let full = format!(" {}/{}", pod.namespace, pod.name);
        let room = MAX_BYTES.saturating_sub(text.len());
        text.extend(full.chars().scan(0, |used, c| {
            *used += c.len_utf8();
            (*used <= room).then_some(c)
        }));
    }
    text
}

/// Owner and lease from the text; nothing when it is not one of ours.
pub fn parse(text: &str) -> Option<(Owner, Lease)> {
    let mut words = text.split(' ');
    let (container, interface) = words.next()?.split_once('/')?;
    let owner = Owner::new(container, interface).ok()?;
    let mut addresses = vec![];
    for word in [words.next()?, words.next()?] {
        if word != "-" {
            addresses.push(word.parse().ok()?);
        }
    }
    Some((owner, Lease { addresses, committed: true, wishes: Wishes::default() }))
}

/// Whether the text names a pod: then the interface was made for CRI.
pub(super) fn names_pod(text: &str) -> bool {
    text.split(' ').nth(3).is_some()
}

/// The pod in the text, perhaps cut off; nothing when the runtime did not say.
pub fn pod(text: &str) -> Option<mesh_model::ObjectKey> {
    let (namespace, name) = text.split(' ').nth(3)?.split_once('/')?;
    Some(mesh_model::ObjectKey::new(namespace, name))
}

/// The interface for an owner.
pub(super) fn port(
    owner: &Owner,
    lease: &Lease,
    netns: PathBuf,
    mtu: u32,
    text: String,
) -> Result<PodPort, Failure> {
    let interface: IfName = owner.interface.parse().map_err(|e| {
        Failure::new(Code::Environment, "invalid request", format!("CNI_IFNAME: {e}"))
    })?;
    let addresses = &lease.addresses;
    let v4 = addresses.iter().find_map(|a| if let IpAddr::V4(a) = a { Some(*a) } else { None });
    let v6 = addresses.iter().find_map(|a| if let IpAddr::V6(a) = a { Some(*a) } else { None });
    let host_interface = IfName::for_pod(&owner.container, &owner.interface);
    let wishes = &lease.wishes;
    Ok(PodPort {
        netns,
        interface,
        host_interface,
        owner: text,
        v4,
        v6,
        mtu,
        mac: wishes.mac.as_deref().and_then(mac),
        ports: host_ports(wishes),
        bandwidth: Bandwidth {
            to_pod: rate(wishes.bandwidth.ingress_rate, wishes.bandwidth.ingress_burst),
            from_pod: rate(wishes.bandwidth.egress_rate, wishes.bandwidth.egress_burst),
        },
    })
}

/// Ports of the node that were asked for.
pub(super) fn host_ports(wishes: &Wishes) -> Vec<HostPort> {
    let one = |mapping: &mesh_cni::wire::PortMapping| HostPort {
        protocol: match mapping.protocol {
            Transport::Tcp => Protocol::Tcp,
            Transport::Udp => Protocol::Udp,
            Transport::Sctp => Protocol::Sctp,
        },
        address: mapping.host_ip,
        port: mapping.host_port,
        pod_port: mapping.container_port,
    };
    wishes.ports.iter().map(one).collect()
}

fn rate(bits_per_sec: u64, burst_bits: u64) -> Option<Rate> {
    let burst_bits = Some(burst_bits).filter(|bits| *bits > 0);
    (bits_per_sec > 0).then_some(Rate { bits_per_sec, burst_bits })
}

/// The plugin lets only well-formed ones pass.
fn mac(text: &str) -> Option<MacAddress> {
    let bytes: Option<Vec<u8>> =
        text.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect();
    Some(MacAddress(bytes?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owner_and_addresses_come_back_from_the_text() {
        let owner = Owner::new(&"a".repeat(128), "fifteen-bytes-x").unwrap();
        let addresses: Vec<IpAddr> = vec![
            "10.244.255.255".parse().unwrap(),
            "fd10:2444:5555:6666:7777:8888:9999:aaaa".parse().unwrap(),
        ];
        let pod = PodName { namespace: "n".repeat(63), name: "p".repeat(200) };
        for pod in [None, Some(&pod)] {
            let text = describe(&owner, &addresses, pod);
            assert!(text.len() <= MAX_BYTES, "{}", text.len());
            let (same, lease) = parse(&text).unwrap();
            assert_eq!((same, lease.addresses), (owner.clone(), addresses.clone()));
        }
        let short = Owner::new("abc", "eth0").unwrap();
        let text = describe(&short, &addresses[..1], None);
        assert_eq!(parse(&text).unwrap().1.addresses, addresses[..1]);
        for foreign in ["", "web", "a/b", "a/b c d", "../x/eth0 - -"] {
            assert!(parse(foreign).is_none(), "{foreign}");
        }
    }
}
