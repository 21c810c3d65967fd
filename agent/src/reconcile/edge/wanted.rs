//! What the edge should be, from the snapshot and the paths.

mod places;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_kernel::edge::{Desired as Wanted, Service};
use mesh_kernel::services::FrontendKey;
use mesh_model::Snapshot;
use mesh_model::cluster::node_overlay_address;
use mesh_model::snapshot::{EdgeService, Peer};

use super::Outside;
use crate::announce::owned;
use crate::differences::{self, Differences};
use crate::paths::outlook::Outlook;
use places::Places;

/// What the snapshot asks for, as things are; and which services are others, or gone, than in what was done, when only those may be.
pub(super) fn wanted_since(
    done: Option<(Outside, Wanted)>,
    slice: &Outside,
    mtu: u16,
) -> (Wanted, Option<Vec<FrontendKey>>) {
    let Outside(snapshot, outlook) = slice;
    let Some((before, done)) = done.filter(|(before, _)| before.same_places(slice)) else {
        return (wanted(snapshot, outlook, mtu), None);
    };
    let Differences { gone, put } =
        differences::of_lists(&before.0.edge.services, &snapshot.edge.services, key);
    let mut services = done.services;
    let mut changed = gone;
    for key in &changed {
        services.remove(key);
    }
    for (key, service) in described(snapshot, outlook, put.into_iter()) {
        changed.push(key);
        services.insert(key, service);
    }
    (Wanted { services, ..surroundings(snapshot, outlook, mtu) }, Some(changed))
}

/// What the snapshot asks for, as things are.
fn wanted(snapshot: &Snapshot, outlook: &Outlook, mtu: u16) -> Wanted {
    let services = described(snapshot, outlook, snapshot.edge.services.iter());
    Wanted { services: services.collect(), ..surroundings(snapshot, outlook, mtu) }
}

/// All but the services.
fn surroundings(snapshot: &Snapshot, outlook: &Outlook, mtu: u16) -> Wanted {
    let way = |peer: &Peer| {
        let narrow = outlook.mtus.get(&peer.public_key);
        u32::from(narrow.map_or(mtu, |narrow| mtu.min(*narrow)))
    };
    let nodes = snapshot.peers.iter();
    let nodes = nodes.flat_map(|peer| overlay_addresses(peer).map(|a| (a, way(peer))));
    Wanted {
        nodes: nodes.collect(),
        own: of_each_family(snapshot.node.blocks.iter().map(node_overlay_address)),
        addresses: snapshot.node.addresses.iter().copied().collect(),
        owned: owned(&snapshot.edge.announced, snapshot, &outlook.away),
        ..Wanted::default()
    }
}

/// Services, with their backends' places.
fn described<'s>(
    snapshot: &Snapshot,
    outlook: &Outlook,
    services: impl Iterator<Item = &'s Arc<EdgeService>>,
) -> impl Iterator<Item = (FrontendKey, Service)> {
    let places = Places::of(snapshot);
    outlook.edge(snapshot, services).map(move |service| {
        let backends = service.backends.iter().filter_map(|backend| {
            let via = places.find(backend)?;
            Some((SocketAddr::new(backend.address, backend.port), via))
        });
        let described = Service {
            affinity: service.affinity,
            local_only: service.local_only,
            sources: service.sources.clone(),
            backends: backends.collect(),
        };
        (key(&service), described)
    })
}

fn of_each_family<B: FromIterator<IpAddr>>(addresses: impl Iterator<Item = IpAddr>) -> B {
    let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = addresses.partition(IpAddr::is_ipv4);
    v4.into_iter().take(1).chain(v6.into_iter().take(1)).collect()
}

/// A node's addresses on the overlay by which others know it: of its first block of each family.
fn overlay_addresses(peer: &Peer) -> impl Iterator<Item = IpAddr> {
    of_each_family::<Vec<IpAddr>>(peer.allowed_ips.iter().map(node_overlay_address)).into_iter()
}

/// By what clients use it.
pub(super) fn key(service: &EdgeService) -> FrontendKey {
    FrontendKey { vip: service.vip, protocol: service.protocol, port: service.port }
}

#[cfg(test)]
mod tests;
