//! At which node a backend is.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_model::snapshot::{Backend, Peer};
use mesh_model::{NodeName, Snapshot};

use super::overlay_addresses;

/// The cluster's nodes by what is at them: there are hundreds, and a hundred thousand backends.
pub(super) struct Places<'a> {
    snapshot: &'a Snapshot,
    blocks: BTreeMap<IpNet, &'a Peer>,
    /// Lengths of the blocks' prefixes.
    lengths: BTreeSet<u8>,
    names: BTreeMap<&'a NodeName, &'a Peer>,
    addresses: BTreeMap<IpAddr, &'a Peer>,
}

impl<'a> Places<'a> {
    pub(super) fn of(snapshot: &'a Snapshot) -> Self {
        let peers = || snapshot.peers.iter();
        let blocks = || peers().flat_map(|peer| peer.allowed_ips.iter().map(move |b| (*b, peer)));
        let addresses = peers().flat_map(|peer| peer.endpoints.iter().map(move |e| (e.ip(), peer)));
        Self {
            snapshot,
            blocks: blocks().map(|(block, peer)| (block.trunc(), peer)).collect(),
            lengths: blocks().map(|(block, _)| block.prefix_len()).collect(),
            names: peers().map(|peer| (&peer.node, peer)).collect(),
            addresses: addresses.collect(),
        }
    }

    /// On this node, or on the one with this address. Nothing when it is neither a pod nor a process in a node's own network:
    /// answers could not be followed back.
    pub(super) fn find(&self, backend: &Backend) -> Option<Option<IpAddr>> {
        let (node, address) = (&self.snapshot.node, backend.address);
        let is_pod_here = node.blocks.iter().any(|block| block.contains(&address));
        if is_pod_here || node.addresses.contains(&address) {
            return Some(None);
        }
        let peer = self.of_pod(address).or_else(|| self.of_process(backend))?;
        overlay_addresses(peer).find(|a| a.is_ipv4() == address.is_ipv4()).map(Some)
    }

    fn of_pod(&self, address: IpAddr) -> Option<&'a Peer> {
        let around = |length: &u8| IpNet::new(address, *length).ok().map(|net| net.trunc());
        self.lengths.iter().filter_map(around).find_map(|block| self.blocks.get(&block)).copied()
    }

    fn of_process(&self, backend: &Backend) -> Option<&'a Peer> {
        if !self.snapshot.node_addresses.contains(&backend.address) {
            return None;
        }
        // Who writes endpoints by hand often leaves the node out.
        match &backend.node {
            Some(node) => self.names.get(node).copied(),
            None => self.addresses.get(&backend.address).copied(),
        }
    }
}
