//! Between our types and the attributes of WireGuard's generic netlink family (`linux/wireguard.h`).

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use mesh_model::snapshot::WgKey;
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute,
    WireguardCmd, WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
};

use super::{AllowedIpsChange, Observed, ObservedPeer, PeerChange, SecretKey, Step};

/// Asks for a device and all its peers.
pub(super) fn query(device: &str) -> WireguardMessage {
    message(WireguardCmd::GetDevice, vec![WireguardAttribute::IfName(device.to_owned())])
}

/// A step as a message.
pub(super) fn request(device: &str, step: &Step) -> WireguardMessage {
    let mut attributes = vec![WireguardAttribute::IfName(device.to_owned())];
    match step {
        Step::SetDevice { private_key, listen_port, fwmark } => {
            attributes.extend(private_key.map(|key| WireguardAttribute::PrivateKey(key.0)));
            attributes.extend(listen_port.map(WireguardAttribute::ListenPort));
            attributes.extend(fwmark.map(WireguardAttribute::Fwmark));
        }
        Step::PutPeer { key, change } => {
            attributes.push(WireguardAttribute::Peers(vec![peer(key, change)]));
        }
        Step::RemovePeer(key) => {
            let gone = WireguardPeer(vec![
                WireguardPeerAttribute::PublicKey(key.0),
                WireguardPeerAttribute::Flags(WireguardPeerFlags::RemoveMe),
            ]);
            attributes.push(WireguardAttribute::Peers(vec![gone]));
        }
    }
    message(WireguardCmd::SetDevice, attributes)
}

fn message(cmd: WireguardCmd, attributes: Vec<WireguardAttribute>) -> WireguardMessage {
    WireguardMessage { cmd, attributes }
}

fn peer(key: &WgKey, change: &PeerChange) -> WireguardPeer {
    let mut flags = WireguardPeerFlags::empty();
    if !change.add {
        flags |= WireguardPeerFlags::UpdateOnly;
    }
    if matches!(change.allowed_ips, Some(AllowedIpsChange::Replace(_))) {
        flags |= WireguardPeerFlags::ReplaceAllowedIps;
    }
    let mut attributes =
        vec![WireguardPeerAttribute::PublicKey(key.0), WireguardPeerAttribute::Flags(flags)];
    attributes.extend(change.preshared_key.map(|k| WireguardPeerAttribute::PresharedKey(k.0)));
    attributes.extend(change.endpoint.map(WireguardPeerAttribute::Endpoint));
    attributes.extend(change.keepalive.map(|interval| {
        let seconds = u16::try_from(interval.as_secs()).unwrap_or(u16::MAX);
        WireguardPeerAttribute::PersistentKeepalive(seconds)
    }));
    if let Some(AllowedIpsChange::Add(nets) | AllowedIpsChange::Replace(nets)) = &change.allowed_ips
    {
        let nets = nets.iter().map(allowed_ip).collect();
        attributes.push(WireguardPeerAttribute::AllowedIps(nets));
    }
    WireguardPeer(attributes)
}

fn allowed_ip(net: &IpNet) -> WireguardAllowedIp {
    let family = match net {
        IpNet::V4(_) => WireguardAddressFamily::Ipv4,
        IpNet::V6(_) => WireguardAddressFamily::Ipv6,
    };
    WireguardAllowedIp(vec![
        WireguardAllowedIpAttr::Family(family),
        WireguardAllowedIpAttr::IpAddr(net.network()),
        WireguardAllowedIpAttr::Cidr(net.prefix_len()),
    ])
}

/// Adds what one message of an answer says. A peer with many addresses is spread over several messages.
pub(super) fn read(observed: &mut Observed, message: &WireguardMessage) {
    for attribute in &message.attributes {
        match attribute {
            WireguardAttribute::PrivateKey(key) => {
                observed.private_key = Some(SecretKey(*key)).filter(|k| k.0 != [0; 32]);
            }
            WireguardAttribute::ListenPort(port) => observed.listen_port = *port,
            WireguardAttribute::Fwmark(mark) => observed.fwmark = *mark,
            WireguardAttribute::Peers(peers) => peers.iter().for_each(|p| read_peer(observed, p)),
            _ => {}
        }
    }
}

fn read_peer(observed: &mut Observed, WireguardPeer(attributes): &WireguardPeer) {
    let key = attributes.iter().find_map(|attribute| match attribute {
        WireguardPeerAttribute::PublicKey(key) => Some(WgKey(*key)),
        _ => None,
    });
    let Some(key) = key else { return };
    let peer = observed.peers.entry(key).or_default();
    for attribute in attributes {
        match attribute {
            WireguardPeerAttribute::PresharedKey(key) => {
                peer.preshared_key = Some(SecretKey(*key)).filter(|k| k.0 != [0; 32]);
            }
            WireguardPeerAttribute::Endpoint(endpoint) => peer.endpoint = Some(*endpoint),
            WireguardPeerAttribute::PersistentKeepalive(seconds) => {
                peer.keepalive = (*seconds != 0).then(|| Duration::from_secs(u64::from(*seconds)));
            }
            WireguardPeerAttribute::AllowedIps(nets) => {
                peer.allowed_ips
                    .extend(nets.iter().filter_map(read_allowed_ip).collect::<BTreeSet<_>>());
            }
            other => read_statistics(peer, other),
        }
    }
}

fn read_statistics(peer: &mut ObservedPeer, attribute: &WireguardPeerAttribute) {
    match attribute {
        WireguardPeerAttribute::RxBytes(bytes) => peer.statistics.received_bytes = *bytes,
        WireguardPeerAttribute::TxBytes(bytes) => peer.statistics.sent_bytes = *bytes,
        WireguardPeerAttribute::LastHandshake(time) => {
            // To the nanosecond: two keys of one node may shake hands within a second, and the later one counts.
            let seconds = u64::try_from(time.seconds).unwrap_or(0);
            let nanoseconds = u32::try_from(time.nano_seconds).unwrap_or(0).min(999_999_999);
            peer.statistics.last_handshake = (seconds != 0)
                .then(|| SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds));
        }
        _ => {}
    }
}

fn read_allowed_ip(WireguardAllowedIp(attributes): &WireguardAllowedIp) -> Option<IpNet> {
    let (mut address, mut length): (Option<IpAddr>, Option<u8>) = (None, None);
    for attribute in attributes {
        match attribute {
            WireguardAllowedIpAttr::IpAddr(ip) => address = Some(*ip),
            WireguardAllowedIpAttr::Cidr(cidr) => length = Some(*cidr),
            _ => {}
        }
    }
    IpNet::new(address?, length?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_peer_reads_back_as_it_was_written() {
        let nets: BTreeSet<IpNet> =
            ["10.244.1.0/24".parse().unwrap(), "fd10::/64".parse().unwrap()].into();
        let change = PeerChange {
            add: true,
            endpoint: "192.0.2.1:51900".parse().ok(),
            allowed_ips: Some(AllowedIpsChange::Add(nets.clone())),
            keepalive: Some(Duration::from_secs(25)),
            preshared_key: Some(SecretKey([3; 32])),
        };
        let step = Step::PutPeer { key: WgKey([9; 32]), change: change.clone() };
        let mut observed = Observed::default();
        read(&mut observed, &request("mesh-wg", &step));
        let peer = &observed.peers[&WgKey([9; 32])];
        assert_eq!(peer.endpoint, change.endpoint);
        assert_eq!(peer.allowed_ips, nets);
        assert_eq!(peer.keepalive, change.keepalive);
        assert_eq!(peer.preshared_key, change.preshared_key);
    }
}
