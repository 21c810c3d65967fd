//! Between the model's types and those of the eBPF maps. The only file that knows both.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use mesh_abi as abi;
use mesh_model::policy::{Ports, Rule};
use mesh_model::snapshot::Protocol;

use crate::pods::PodPort;
use crate::services::{Entry, FrontendKey, Member};

/// To the 16-byte form.
pub(crate) fn address(address: IpAddr) -> abi::Address {
    let v6 = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    abi::Address::from_bytes(v6.octets())
}

/// From the 16-byte form; mapped addresses become IPv4.
pub(crate) fn ip(address: abi::Address) -> IpAddr {
    Ipv6Addr::from(address.to_bytes()).to_canonical()
}

/// Reads a value of the maps; nothing when there are too few bytes.
pub(crate) fn plain<T: abi::Plain>(bytes: &[u8]) -> Option<T> {
    let bytes = bytes.get(..size_of::<T>())?;
    // SAFETY: there are enough bytes, any bit pattern is a value, and the read asks for no alignment.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

pub(crate) fn service_key(key: &FrontendKey) -> abi::ServiceKey {
    abi::ServiceKey {
        address: match key.vip {
            IpAddr::V4(vip) if vip.is_unspecified() => abi::ServiceKey::ANY_NODE_V4,
            IpAddr::V6(vip) if vip.is_unspecified() => abi::ServiceKey::ANY_NODE_V6,
            vip => address(vip),
        },
        port_be: key.port.to_be(),
        protocol: key.protocol.number(),
        pad: 0,
    }
}

/// Nothing for a protocol number that we never write.
pub(crate) fn frontend_key(key: &abi::ServiceKey) -> Option<FrontendKey> {
    let all = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    let protocol = all.into_iter().find(|p| p.number() == key.protocol)?;
    let vip = match key.address {
        abi::ServiceKey::ANY_NODE_V4 => Ipv4Addr::UNSPECIFIED.into(),
        abi::ServiceKey::ANY_NODE_V6 => Ipv6Addr::UNSPECIFIED.into(),
        address => ip(address),
    };
    Some(FrontendKey { vip, protocol, port: u16::from_be(key.port_be) })
}

pub(crate) fn service(entry: &Entry) -> abi::Service {
    abi::Service { id: entry.id, count: entry.count, affinity_secs: entry.affinity_secs, flags: 0 }
}

pub(crate) fn entry(service: &abi::Service) -> Entry {
    Entry { id: service.id, count: service.count, affinity_secs: service.affinity_secs }
}

pub(crate) fn slot(backend: SocketAddr) -> abi::Slot {
    abi::Slot { address: address(backend.ip()), port_be: backend.port().to_be(), pad: 0 }
}

pub(crate) fn backend(slot: &abi::Slot) -> SocketAddr {
    SocketAddr::new(ip(slot.address), u16::from_be(slot.port_be))
}

pub(crate) fn member_value(member: Member) -> abi::Member {
    let leaving = if member.leaving { abi::Member::LEAVING } else { 0 };
    let terminating = if member.terminating { abi::Member::TERMINATING } else { 0 };
    abi::Member { flags: leaving | terminating }
}

pub(crate) fn member(value: abi::Member) -> Member {
    Member {
        leaving: value.flags & abi::Member::LEAVING != 0,
        terminating: value.flags & abi::Member::TERMINATING != 0,
    }
}

pub(crate) fn remote_block(block: &IpNet) -> abi::RemoteBlockKey {
    let extra = if block.addr().is_ipv4() { 96 } else { 0 };
    abi::RemoteBlockKey {
        prefix_len: u32::from(block.prefix_len()) + extra,
        address: address(block.network()),
    }
}

pub(crate) fn policy_block(block: &IpNet) -> abi::BlockKey {
    let abi::RemoteBlockKey { prefix_len, address } = remote_block(block);
    abi::BlockKey { prefix_len, address }
}

pub(crate) fn rule(rule: &Rule) -> abi::RuleKey {
    let mut matches =
        abi::RuleMatch { policy: rule.policy, identity: rule.identity, ..Default::default() };
    let prefix_len = match rule.ports {
        Ports::Everything => abi::RuleKey::IDENTITY_BITS,
        Ports::Prefix { protocol, first, bits } => {
            matches.protocol = protocol.number();
            matches.port = first.to_be_bytes();
            abi::RuleKey::PROTOCOL_BITS + u32::from(bits)
        }
    };
    abi::RuleKey { prefix_len, matches }
}

/// Nothing for a prefix length that does not fit the family.
pub(crate) fn block(key: &abi::RemoteBlockKey) -> Option<IpNet> {
    let address = ip(key.address);
    let extra = if address.is_ipv4() { 96 } else { 0 };
    let length = u8::try_from(key.prefix_len.checked_sub(extra)?).ok()?;
    IpNet::new(address, length).ok()
}

pub(crate) fn pod_port(port: &PodPort) -> abi::PodPort {
    abi::PodPort {
        v4: port.v4.map_or(abi::Address::UNSPECIFIED, |v4| address(v4.into())),
        v6: port.v6.map_or(abi::Address::UNSPECIFIED, |v6| address(v6.into())),
        mac: port.pod_mac().0,
        pad: 0,
    }
}

pub(crate) fn local_pod(port: &PodPort, ifindex: u32) -> abi::LocalPod {
    let queued = if port.bandwidth.to_pod.is_some() { abi::LocalPod::QUEUED } else { 0 };
    let ifindex = ifindex | queued;
    abi::LocalPod { ifindex, pod_mac: port.pod_mac().0, host_mac: port.host_mac().0 }
}

pub(crate) fn edge_backend_value(backend: SocketAddr, via: Option<IpAddr>) -> abi::EdgeBackend {
    abi::EdgeBackend {
        address: address(backend.ip()),
        via: via.map_or(abi::Address::UNSPECIFIED, address),
        port_be: backend.port().to_be(),
        pad: 0,
    }
}

pub(crate) fn edge_backend(value: &abi::EdgeBackend) -> (SocketAddr, Option<IpAddr>) {
    let backend = SocketAddr::new(ip(value.address), u16::from_be(value.port_be));
    (backend, (value.via != abi::Address::UNSPECIFIED).then(|| ip(value.via)))
}

pub(crate) fn source_key(service: u32, net: &IpNet) -> abi::EdgeSourceKey {
    let abi::RemoteBlockKey { prefix_len, address } = remote_block(net);
    abi::EdgeSourceKey { prefix_len: prefix_len + 32, service, address }
}

/// Nothing for a prefix length that does not fit the family.
pub(crate) fn source(key: &abi::EdgeSourceKey) -> Option<(u32, IpNet)> {
    let prefix_len = key.prefix_len.checked_sub(32)?;
    let net = block(&abi::RemoteBlockKey { prefix_len, address: key.address })?;
    Some((key.service, net))
}
// What the model and the programs have to agree on without knowing each other.
const _: () = {
    use mesh_model::policy as model;
    assert!(model::ANYBODY == abi::policy::ANYBODY && model::OPEN == abi::policy::OPEN);
    assert!(model::THIS_NODE == abi::policy::THIS_NODE);
    assert!(model::OTHER_NODE == abi::policy::OTHER_NODE);
    assert!(model::FIRST_FREE == abi::policy::FIRST_FREE);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_blocks_survive_the_way_there_and_back() {
        for text in ["10.244.1.0/24", "fd10:244:0:1::/64", "0.0.0.0/0", "::/0"] {
            let net: IpNet = text.parse().unwrap();
            if text != "::/0" {
                assert_eq!(block(&remote_block(&net)), Some(net));
            }
            assert_eq!(ip(address(net.addr())), net.addr());
        }
        let v4 = remote_block(&"10.244.1.0/24".parse().unwrap());
        assert_eq!(v4.prefix_len, 120);
    }

    #[test]
    fn every_frontend_comes_back_from_the_map() {
        for vip in ["10.96.0.1", "0.0.0.0", "fd10:96::1", "::"] {
            let key = FrontendKey { vip: vip.parse().unwrap(), protocol: Protocol::Udp, port: 53 };
            assert_eq!(frontend_key(&service_key(&key)), Some(key));
        }
        let any = FrontendKey { vip: "::".parse().unwrap(), protocol: Protocol::Tcp, port: 1 };
        assert_ne!(service_key(&any).address, abi::Address::UNSPECIFIED, "a client may mean that");
    }

    #[test]
    fn ports_are_in_network_order() {
        let there = slot("10.0.0.1:443".parse().unwrap());
        assert_eq!(there.port_be.to_ne_bytes(), [0x01, 0xbb]);
        assert_eq!(backend(&there).to_string(), "10.0.0.1:443");
    }
}
