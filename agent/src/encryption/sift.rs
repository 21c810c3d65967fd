//! What packets on the underlay say to somebody who has no keys. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use memchr::memmem::Finder;
use mesh_model::encryption::{Bare, Findings, Mark, Readable, Traffic, tag};
use mesh_model::{NodeName, Snapshot};
use mesh_overlay::paths::SLOTS;

const UDP: u8 = 17;
/// Different packets that are remembered; of canaries there are no more than were sent.
const REMEMBERED: usize = 1024;

/// Sorts packets.
pub(super) struct Sieve {
    mark: Mark,
    needle: Finder<'static>,
    pods: Vec<IpNet>,
    own: BTreeSet<IpAddr>,
    peers: BTreeMap<IpAddr, NodeName>,
    tunnel_ports: std::ops::RangeInclusive<u16>,
    readable: BTreeSet<Readable>,
    bare: BTreeMap<(String, IpAddr, IpAddr), u64>,
    traffic: BTreeMap<NodeName, Count>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Count {
    sealed: u64,
    handshakes: u64,
    others: u64,
}

impl Sieve {
    pub(super) fn new(mark: Mark, snapshot: &Snapshot) -> Self {
        let port = snapshot.cluster.overlay_port;
        let places = snapshot.peers.iter().flat_map(|peer| {
            peer.endpoints.iter().map(|endpoint| (endpoint.ip(), peer.node.clone()))
        });
        Self {
            mark,
            needle: Finder::new(&mark.0).into_owned(),
            pods: snapshot.cluster.pod_cidrs.clone(),
            own: snapshot.node.addresses.iter().copied().collect(),
            peers: places.collect(),
            tunnel_ports: port..=port.saturating_add(SLOTS.into()),
            readable: BTreeSet::new(),
            bare: BTreeMap::new(),
            traffic: snapshot.peers.iter().map(|p| (p.node.clone(), Count::default())).collect(),
        }
    }

    /// Looks at a packet, mostly one of IP. What is something else may hold a canary all the same.
    pub(super) fn look(&mut self, link: &str, outgoing: bool, packet: &[u8]) {
        let header = Header::read(packet);
        let nowhere = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let (from, to) = header.as_ref().map_or((nowhere, nowhere), |h| (h.from, h.to));
        // A packet may hold many: the canaries of a train, or the copy of one in an ICMP error.
        for place in self.needle.find_iter(packet) {
            let Some(tag) = tag(self.mark, &packet[place..]) else { continue };
            if self.readable.len() < REMEMBERED * 16 {
                let link = link.to_owned();
                self.readable.insert(Readable { tag, link, outgoing, from, to });
            }
        }
        let is_pod = |address| self.pods.iter().any(|block| block.contains(&address));
        if is_pod(from) && is_pod(to) && self.bare.len() < REMEMBERED {
            *self.bare.entry((link.to_owned(), from, to)).or_default() += 1;
        }
        if let Some(header) = header {
            self.count(&header);
        }
    }

    fn count(&mut self, header: &Header<'_>) {
        let other = match (self.own.contains(&header.from), self.own.contains(&header.to)) {
            (true, false) => header.to,
            (false, true) => header.from,
            _ => return,
        };
        let Some(count) = self.peers.get(&other).and_then(|node| self.traffic.get_mut(node)) else {
            return;
        };
        match header.message(&self.tunnel_ports) {
            Some(4) => count.sealed += 1,
            Some(_) => count.handshakes += 1,
            None => count.others += 1,
        }
    }

    pub(super) fn findings(self) -> Findings {
        let bare = self.bare.into_iter();
        let traffic = self.traffic.into_iter();
        Findings {
            readable: self.readable.into_iter().collect(),
            bare: bare
                .map(|((link, from, to), packets)| Bare { link, from, to, packets })
                .collect(),
            traffic: traffic
                .map(|(node, count)| Traffic {
                    node,
                    sealed: count.sealed,
                    handshakes: count.handshakes,
                    others: count.others,
                })
                .collect(),
            ..Findings::default()
        }
    }
}

/// The parts of a packet that tell what it is. Extension headers of IPv6 are not followed: no tunnel has them.
struct Header<'p> {
    from: IpAddr,
    to: IpAddr,
    protocol: u8,
    payload: &'p [u8],
}

impl<'p> Header<'p> {
    fn read(packet: &'p [u8]) -> Option<Self> {
        match packet.first()? >> 4 {
            4 => {
                let (header, _) = packet.split_first_chunk::<20>()?;
                let payload = packet.get(usize::from(header[0] & 0xf) * 4..)?;
                let address = |at: usize| {
                    Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]).into()
                };
                Some(Self { from: address(12), to: address(16), protocol: header[9], payload })
            }
            6 => {
                let (header, payload) = packet.split_first_chunk::<40>()?;
                let address = |bytes: &[u8]| {
                    let bytes: [u8; 16] = bytes.try_into().expect("16 bytes");
                    Ipv6Addr::from(bytes).into()
                };
                let (from, to) = (address(&header[8..24]), address(&header[24..40]));
                Some(Self { from, to, protocol: header[6], payload })
            }
            _ => None,
        }
    }

    /// Type of the WireGuard message that it is (WG section 5.4); nothing for anything else.
    fn message(&self, ports: &std::ops::RangeInclusive<u16>) -> Option<u8> {
        let (udp, payload) = self.payload.split_first_chunk::<8>()?;
        let port = |at: usize| u16::from_be_bytes([udp[at], udp[at + 1]]);
        let is_tunnel = ports.contains(&port(0)) || ports.contains(&port(2));
        match payload {
            [kind @ 1..=4, 0, 0, 0, ..] if self.protocol == UDP && is_tunnel => Some(*kind),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
