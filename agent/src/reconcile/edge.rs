//! Services for clients outside, in the maps of the programs on the uplinks; and who answers for their addresses.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use ipnet::IpNet;
use mesh_kernel::LinuxEdge;
use mesh_kernel::edge::{
    Applied, Desired as Wanted, EdgeError, Observed, Service, Unfit, plan_within,
};
use mesh_kernel::services::FrontendKey;
use mesh_model::Snapshot;
use mesh_model::cluster::node_overlay_address;
use mesh_model::snapshot::{Backend, EdgeService, Peer};

use super::{Concern, Failures};
use crate::announce::{Announcer, owned};
use crate::board::{Board, FullMaps};
use crate::errors::chain;
use crate::observe::Desired;
use crate::paths::outlook::Outlook;

const NAME: &str = "edge";
/// Most failures that a report names.
const NAMED: usize = 5;
/// How often a round is planned again because what it deleted has made room for more of it.
const AGAIN: usize = 2;

/// Keeps the edge as the snapshot says.
pub(crate) struct Edge {
    kernel: Arc<Kernel>,
    announcer: Announcer,
    mtu: u16,
}

/// The kernel's side, and what is known of it.
struct Kernel {
    edge: LinuxEdge,
    mirror: Mutex<Option<Observed>>,
    board: Board,
}

impl Edge {
    /// `board` hears of what there is no room for.
    pub(crate) fn new(edge: LinuxEdge, mtu: u16, board: Board) -> Self {
        let kernel = Arc::new(Kernel { edge, mirror: Mutex::default(), board });
        Self { kernel, announcer: Announcer::start(), mtu }
    }
}

/// The snapshot and the paths, compared by what of them the edge follows from.
#[derive(Clone)]
pub(crate) struct Outside(Arc<Snapshot>, Arc<Outlook>);

impl PartialEq for Outside {
    fn eq(&self, other: &Self) -> bool {
        let snapshot = self.0.edge == other.0.edge
            && self.0.peers == other.0.peers
            && self.0.node_addresses == other.0.node_addresses
            && self.0.node == other.0.node;
        snapshot && self.1.away == other.1.away && self.1.mtus == other.1.mtus
    }
}

impl Concern for Edge {
    const NAME: &'static str = NAME;
    // Devices come and go, and with them our program.
    const HEAL: std::time::Duration = std::time::Duration::from_secs(15);
    type Slice = Outside;

    fn slice(&self, desired: &Desired) -> Option<Outside> {
        Some(Outside(Arc::clone(&desired.snapshot), Arc::clone(&desired.outlook)))
    }

    async fn apply(&mut self, slice: &Outside, heal: bool) -> Result<(), Failures> {
        let (kernel, mtu) = (Arc::clone(&self.kernel), self.mtu);
        let Outside(snapshot, outlook) = slice.clone();
        let round = tokio::task::spawn_blocking(move || {
            let wanted = wanted(&snapshot, &outlook, mtu);
            let uplinks = kernel.round(&snapshot, &wanted, heal)?;
            Ok((wanted.owned, uplinks))
        });
        let (owned, uplinks) = round.await.unwrap_or_else(|panic| Err(vec![panic.to_string()]))?;
        self.announcer.announce(owned, uplinks);
        Ok(())
    }
}

/// Devices by which clients come in: index and MAC address.
pub(crate) type Uplinks = BTreeMap<u32, [u8; 6]>;

impl Kernel {
    fn round(&self, snapshot: &Snapshot, wanted: &Wanted, heal: bool) -> Result<Uplinks, Failures> {
        let mut mirror = self.mirror.lock().unwrap_or_else(PoisonError::into_inner);
        let known = mirror.take().filter(|_| !heal);
        let observed = match known {
            Some(known) => self.edge.observe_again(wanted, known),
            None => self.edge.observe(wanted),
        };
        let mut observed = observed.map_err(|error| vec![chain(&error)])?;
        let (unfit, applied) = self.make(wanted, &mut observed, heal);
        self.board.found_full(NAME, full(snapshot, &unfit, &applied));
        let uplinks = observed.uplinks.values().map(|u| (u.ifindex, u.mac)).collect();
        if applied.failed.is_empty() {
            *mirror = Some(observed);
            return Ok(uplinks);
        }
        let failed =
            applied.failed.iter().map(|(step, error)| format!("{step:?}: {}", chain(error)));
        let mut failures: Failures = failed.take(NAMED).collect();
        if applied.failed.len() > NAMED {
            failures.push(format!("and {} more", applied.failed.len() - NAMED));
        }
        Err(failures)
    }

    /// Makes it so, as far as there is room.
    fn make(&self, wanted: &Wanted, observed: &mut Observed, heal: bool) -> (Vec<Unfit>, Applied) {
        let mut left = AGAIN;
        loop {
            let plan = plan_within(wanted, observed, self.edge.room());
            if heal && left == AGAIN && !plan.steps.is_empty() {
                tracing::warn!(
                    steps = plan.steps.len(),
                    "somebody else changed the edge, repairing"
                );
            }
            let applied = self.edge.apply(&plan, observed);
            if left == 0 || plan.unfit.is_empty() || !plan.frees() || !applied.failed.is_empty() {
                return (plan.unfit, applied);
            }
            left -= 1;
        }
    }
}

/// The maps that lack room, and for which Services.
fn full(snapshot: &Snapshot, unfit: &[Unfit], applied: &Applied) -> FullMaps {
    let mut full = FullMaps::new();
    for (_, error) in &applied.failed {
        if let EdgeError::Full { map } = error {
            full.entry(*map).or_default();
        }
    }
    if unfit.is_empty() {
        return full;
    }
    let services = snapshot.edge.services.iter();
    let names: BTreeMap<FrontendKey, _> = services.map(|s| (key(s), &s.service)).collect();
    for Unfit { frontend, map } in unfit {
        let services = &mut full.entry(*map).or_default().services;
        services.extend(names.get(frontend).map(|name| (*name).clone()));
    }
    full
}

fn key(service: &EdgeService) -> FrontendKey {
    FrontendKey { vip: service.vip, protocol: service.protocol, port: service.port }
}

/// What the snapshot asks for, as things are.
fn wanted(snapshot: &Snapshot, outlook: &Outlook, mtu: u16) -> Wanted {
    let mut wanted = Wanted {
        own: of_each_family(snapshot.node.blocks.iter().map(node_overlay_address)),
        addresses: snapshot.node.addresses.iter().copied().collect(),
        owned: owned(&snapshot.edge.announced, snapshot, &outlook.away),
        ..Wanted::default()
    };
    for peer in snapshot.peers.iter() {
        let mtu = outlook.mtus.get(&peer.public_key).map_or(mtu, |narrow| mtu.min(*narrow));
        wanted.nodes.extend(overlay_addresses(peer).map(|address| (address, u32::from(mtu))));
    }
    for service in outlook.edge(snapshot) {
        let places = service.backends.iter().filter_map(|backend| {
            let via = place(snapshot, backend)?;
            Some((SocketAddr::new(backend.address, backend.port), via))
        });
        wanted.services.insert(
            key(&service),
            Service {
                affinity: service.affinity,
                local_only: service.local_only,
                sources: service.sources.clone(),
                backends: places.collect(),
            },
        );
    }
    wanted
}

fn of_each_family<B: FromIterator<IpAddr>>(addresses: impl Iterator<Item = IpAddr>) -> B {
    let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = addresses.partition(IpAddr::is_ipv4);
    v4.into_iter().take(1).chain(v6.into_iter().take(1)).collect()
}

/// A node's addresses on the overlay by which others know it: of its first block of each family.
fn overlay_addresses(peer: &Peer) -> impl Iterator<Item = IpAddr> {
    of_each_family::<Vec<IpAddr>>(peer.allowed_ips.iter().map(node_overlay_address)).into_iter()
}

/// Where a backend is: on this node, or on the one with this address. Nothing when it is neither a pod nor a process in a node's own
/// network: answers could not be followed back.
fn place(snapshot: &Snapshot, backend: &Backend) -> Option<Option<IpAddr>> {
    let (node, address) = (&snapshot.node, backend.address);
    let in_any = |blocks: &[IpNet]| blocks.iter().any(|block| block.contains(&address));
    if in_any(&node.blocks) || node.addresses.contains(&address) {
        return Some(None);
    }
    let is_node = snapshot.node_addresses.contains(&address);
    // Who writes endpoints by hand often leaves the node out.
    let is_at = |peer: &Peer| match &backend.node {
        Some(node) => *node == peer.node,
        None => peer.endpoints.iter().any(|endpoint| endpoint.ip() == address),
    };
    let has = |peer: &&Peer| in_any(&peer.allowed_ips) || is_node && is_at(peer);
    let peer = snapshot.peers.iter().find(has)?;
    overlay_addresses(peer).find(|a| a.is_ipv4() == address.is_ipv4()).map(Some)
}

#[cfg(test)]
mod tests;
