//! The node itself and its peers.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;

use super::Objects;
use crate::snapshot::{LocalNode, Peer, WgKey};
use crate::{NodeName, wellknown};

/// The one in use, and the one that takes over.
const MOST_KEYS: usize = 2;

pub(super) fn local(objects: &Objects, name: &NodeName) -> LocalNode {
    let node = objects.nodes.iter().find(|n| n.metadata.name.as_deref() == Some(name.as_str()));
    LocalNode {
        name: name.clone(),
        blocks: node.map(|n| blocks(n)).unwrap_or_default(),
        addresses: node.map(|n| addresses(n)).unwrap_or_default(),
        zone: node.and_then(|n| n.metadata.labels.as_ref()?.get(wellknown::LABEL_ZONE).cloned()),
    }
}

/// The addresses of all nodes, ordered.
pub(super) fn all_addresses(objects: &Objects) -> Vec<IpAddr> {
    let all: BTreeSet<IpAddr> = objects.nodes.iter().flat_map(|n| addresses(n)).collect();
    all.into_iter().collect()
}

/// All other nodes that can be spoken to. A key, a block or a part of a block that two nodes claim goes to the older one:
/// traffic must never be drawn away from a node by one that came later.
pub(super) fn peers(objects: &Objects, local: &LocalNode) -> Vec<Peer> {
    let mut nodes: Vec<&Node> = objects.nodes.iter().map(AsRef::as_ref).collect();
    nodes.sort_by_key(|n| (n.metadata.creation_timestamp.clone(), n.metadata.name.clone()));
    let mut taken_blocks = TakenBlocks::default();
    local.blocks.iter().for_each(|block| _ = taken_blocks.take(*block));
    // Nobody takes this node's own keys away from it.
    let own = nodes.iter().filter(|n| n.metadata.name.as_deref() == Some(local.name.as_str()));
    let own = own.filter_map(|n| peer(n, objects.cluster.overlay_port));
    let mut taken_keys: BTreeSet<WgKey> =
        own.flat_map(|own| own.keys.into_iter().chain([own.public_key])).collect();
    let mut peers: Vec<Peer> = nodes
        .into_iter()
        .filter_map(|n| peer(n, objects.cluster.overlay_port))
        .filter(|peer| peer.node != local.name)
        .filter_map(|mut peer| {
            if !taken_keys.insert(peer.public_key) {
                return None;
            }
            let announced = !peer.keys.is_empty();
            peer.keys.retain(|key| *key == peer.public_key || taken_keys.insert(*key));
            if announced && peer.keys.is_empty() {
                return None;
            }
            peer.allowed_ips.retain(|block| taken_blocks.take(*block));
            (!peer.allowed_ips.is_empty()).then_some(peer)
        })
        .collect();
    peers.sort_by(|a, b| a.node.cmp(&b.node));
    peers
}

/// Blocks that have an owner. No two of them overlap, so that one that overlaps any has a part in common with a neighbour.
#[derive(Default)]
struct TakenBlocks(BTreeSet<IpNet>);

impl TakenBlocks {
    /// Takes a block; false when it is taken, or a part of it, or what it is a part of.
    fn take(&mut self, block: IpNet) -> bool {
        let before = self.0.range(..=block).next_back();
        let behind = self.0.range(block..).next();
        let overlaps = |other: &IpNet| other.contains(&block) || block.contains(other);
        !before.into_iter().chain(behind).any(overlaps) && self.0.insert(block)
    }
}

fn peer(node: &Node, overlay_port: u16) -> Option<Peer> {
    let name: NodeName = node.metadata.name.as_deref()?.parse().ok()?;
    let annotations = node.metadata.annotations.as_ref()?;
    let public_key: WgKey = annotations.get(wellknown::ANNOTATION_WIREGUARD_KEY)?.parse().ok()?;
    let keys = annotations.get(wellknown::ANNOTATION_WIREGUARD_KEYS);
    let keys = keys.into_iter().flat_map(|list| list.split(','));
    let keys = keys.filter_map(|key| key.trim().parse().ok()).take(MOST_KEYS).collect();
    let announced = annotations.get(wellknown::ANNOTATION_ENDPOINTS);
    let announced = announced.into_iter().flat_map(|list| list.split(','));
    let announced = announced.filter_map(|endpoint| endpoint.trim().parse().ok());
    let mut endpoints: Vec<SocketAddr> = announced.filter_map(reachable).collect();
    if endpoints.is_empty() {
        let own = addresses(node).into_iter().map(|a| SocketAddr::new(a, overlay_port));
        endpoints = own.filter_map(reachable).collect();
    }
    Some(Peer { node: name, public_key, keys, endpoints, allowed_ips: blocks(node) })
}

/// The endpoint as it is sent to, if it can be: one that cannot would make void what all other nodes are told of their peers.
fn reachable(endpoint: SocketAddr) -> Option<SocketAddr> {
    let (ip, port) = (endpoint.ip().to_canonical(), endpoint.port());
    let one = port != 0 && !ip.is_unspecified() && !ip.is_multicast();
    one.then(|| SocketAddr::new(ip, port))
}

pub(super) fn blocks(node: &Node) -> Vec<IpNet> {
    let Some(spec) = &node.spec else { return vec![] };
    let single = spec.pod_cidr.iter();
    let all = spec.pod_cidrs.iter().flatten();
    let mut seen = BTreeSet::new();
    all.chain(single)
        .filter_map(|text| text.parse::<IpNet>().ok())
        .map(|block| block.trunc())
        .filter(|block| seen.insert(*block))
        .collect()
}

pub(super) fn addresses(node: &Node) -> Vec<IpAddr> {
    let status = node.status.as_ref();
    status
        .and_then(|s| s.addresses.as_ref())
        .into_iter()
        .flatten()
        .filter(|a| a.type_ == "InternalIP")
        .filter_map(|a| a.address.parse().ok())
        .collect()
}
