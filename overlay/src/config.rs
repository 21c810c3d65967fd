//! What the engine has to do: the whole configuration of a node's overlay device.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use ipnet::IpNet;
pub use mesh_model::preshared::PresharedKey;
use mesh_model::snapshot::{Peer, WgKey};
use serde::{Deserialize, Serialize};

use crate::mtu;

/// The configuration of the overlay device, whole every time: what is missing is removed.
///
/// The private key is not in it. It stays in its file on the node ([`crate::keys`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OverlayConfig {
    /// UDP port to listen on, all addresses, IPv4 and IPv6.
    pub listen_port: u16,
    /// MTU of the device, in bytes; see [`mtu`].
    pub mtu: u16,
    /// The other nodes.
    pub peers: Vec<PeerConfig>,
    /// Public halves of the node's own keys: the engine reads its key files anew when it has others. Empty: as they are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub own_keys: Vec<WgKey>,
}

/// One other node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerConfig {
    /// The public key that it had first. It names the peer for good, whichever key is in use.
    pub public_key: WgKey,
    /// The keys that it may call by, if not that one: the one in use, and the one that takes over; the last is the one to call it by.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<WgKey>,
    /// Where it may be reached, the preferred endpoint first. May be empty: then it has to call first.
    #[serde(default)]
    pub endpoints: Vec<SocketAddr>,
    /// A relay's port to send to instead, as long as none of the endpoints answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relay: Option<SocketAddr>,
    /// Addresses that are sent to it, and the only ones accepted from it (WG section 3, cryptokey routing).
    pub allowed_ips: Vec<IpNet>,
    /// Seconds between keepalives; only for peers behind NAT. None when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_keepalive_secs: Option<u16>,
    /// Mixed into the handshake (WG section 5.2); both sides need the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preshared_key: Option<PresharedKey>,
    /// The one before it, where it is not known yet whether the other side has the new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub former_preshared_key: Option<PresharedKey>,
}

impl From<&Peer> for PeerConfig {
    fn from(peer: &Peer) -> Self {
        Self {
            public_key: peer.public_key,
            keys: peer.keys.clone(),
            endpoints: peer.endpoints.clone(),
            relay: None,
            allowed_ips: peer.allowed_ips.clone(),
            persistent_keepalive_secs: None,
            preshared_key: None,
            former_preshared_key: None,
        }
    }
}

/// A configuration that cannot be put in force. Nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidConfig {
    /// Port zero cannot be told to other nodes.
    #[error("listen port is 0")]
    NoPort,
    /// Smaller than IPv6 allows, or larger than a datagram can carry.
    #[error("MTU {0} is outside {min}..={max}", min = mtu::FLOOR, max = mtu::CEILING)]
    Mtu(u16),
    /// A key stands for one peer.
    #[error("peer {0} is listed twice")]
    DuplicatePeer(WgKey),
    /// The node itself is no peer of its own.
    #[error("peer {0} has this node's own key")]
    OwnKey(WgKey),
    /// An address belongs to one peer.
    #[error("allowed address {prefix} is claimed by {first} and {second}")]
    Conflict {
        /// The prefix, host bits cleared.
        prefix: IpNet,
        /// The peer that comes first.
        first: WgKey,
        /// The other one.
        second: WgKey,
    },
    /// Port zero or an unspecified address cannot be sent to.
    #[error("endpoint {endpoint} of peer {peer} cannot be sent to")]
    Endpoint {
        /// The peer.
        peer: WgKey,
        /// The endpoint.
        endpoint: SocketAddr,
    },
}

impl OverlayConfig {
    /// Checks what can be checked without a device; `own` are this node's public keys.
    pub fn validate(&self, own: &[WgKey]) -> Result<(), InvalidConfig> {
        if self.listen_port == 0 {
            return Err(InvalidConfig::NoPort);
        }
        if !(mtu::FLOOR..=mtu::CEILING).contains(&self.mtu) {
            return Err(InvalidConfig::Mtu(self.mtu));
        }
        let mut keys = BTreeSet::new();
        let mut owners = BTreeMap::new();
        for peer in &self.peers {
            peer.validate(own)?;
            // A name is nobody else's key, either.
            let own = peer.keys().iter().filter(|key| **key != peer.public_key);
            if let Some(twice) = own.chain([&peer.public_key]).find(|key| !keys.insert(**key)) {
                return Err(InvalidConfig::DuplicatePeer(*twice));
            }
            for prefix in peer.allowed_ips.iter().map(IpNet::trunc) {
                let first = *owners.entry(prefix).or_insert(peer.public_key);
                if first != peer.public_key {
                    let second = peer.public_key;
                    return Err(InvalidConfig::Conflict { prefix, first, second });
                }
            }
        }
        Ok(())
    }
}

impl PeerConfig {
    /// The keys that it may call by, at least one.
    pub fn keys(&self) -> &[WgKey] {
        if self.keys.is_empty() { std::slice::from_ref(&self.public_key) } else { &self.keys }
    }

    fn validate(&self, own: &[WgKey]) -> Result<(), InvalidConfig> {
        if let Some(ours) = self.keys().iter().find(|key| own.contains(key)) {
            return Err(InvalidConfig::OwnKey(*ours));
        }
        match self
            .endpoints
            .iter()
            .chain(&self.relay)
            .find(|e| e.port() == 0 || e.ip().is_unspecified())
        {
            Some(&endpoint) => Err(InvalidConfig::Endpoint { peer: self.public_key, endpoint }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: WgKey = WgKey([9; 32]);

    fn peer(n: u8, prefix: &str) -> PeerConfig {
        PeerConfig {
            public_key: WgKey([n; 32]),
            keys: vec![],
            endpoints: vec!["192.0.2.1:51900".parse().unwrap()],
            relay: None,
            allowed_ips: vec![prefix.parse().unwrap()],
            persistent_keepalive_secs: None,
            preshared_key: None,
            former_preshared_key: None,
        }
    }

    fn config(peers: Vec<PeerConfig>) -> OverlayConfig {
        OverlayConfig { listen_port: 51900, mtu: 1420, peers, own_keys: vec![] }
    }

    #[test]
    fn contradictions_are_refused_by_name() {
        let good = config(vec![peer(1, "10.244.1.0/24"), peer(2, "10.244.2.0/24")]);
        assert_eq!(good.validate(&[OWN]), Ok(()));

        let twice = config(vec![peer(1, "10.244.1.0/24"), peer(1, "10.244.2.0/24")]);
        assert_eq!(twice.validate(&[OWN]), Err(InvalidConfig::DuplicatePeer(WgKey([1; 32]))));

        let mut stolen = peer(3, "10.244.3.0/24");
        stolen.keys = vec![WgKey([3; 32]), WgKey([1; 32])];
        let stolen = config(vec![peer(1, "10.244.1.0/24"), stolen]);
        assert_eq!(stolen.validate(&[OWN]), Err(InvalidConfig::DuplicatePeer(WgKey([1; 32]))));

        let same = config(vec![peer(1, "10.244.1.0/24"), peer(2, "10.244.1.7/24")]);
        let said = same.validate(&[OWN]).unwrap_err().to_string();
        assert!(said.contains("10.244.1.0/24"), "{said}");

        assert_eq!(config(vec![peer(9, "::/0")]).validate(&[OWN]), Err(InvalidConfig::OwnKey(OWN)));
        assert_eq!(
            OverlayConfig { mtu: 500, ..config(vec![]) }.validate(&[OWN]),
            Err(InvalidConfig::Mtu(500))
        );
        assert_eq!(
            OverlayConfig { listen_port: 0, ..config(vec![]) }.validate(&[OWN]),
            Err(InvalidConfig::NoPort)
        );
        let mut nowhere = peer(1, "10.244.1.0/24");
        nowhere.endpoints[0].set_port(0);
        assert!(matches!(
            config(vec![nowhere]).validate(&[OWN]),
            Err(InvalidConfig::Endpoint { .. })
        ));
    }
}
