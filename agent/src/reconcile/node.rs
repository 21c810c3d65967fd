//! Addresses, routes, sysctls and masquerading of the node.

use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use mesh_kernel::node::{Desired as Network, Step, SysctlWatch, conflicts, plan};
use mesh_kernel::steps::Applied;
use mesh_kernel::{IfName, NetNs, NodeNetwork};
use tokio::sync::Notify;

use super::{Concern, Failures};
use crate::board::{Board, FullMaps, Lacking};
use crate::errors::chain;
use crate::observe::Desired;
use crate::originals::Originals;

/// Keeps the node's own network configuration as the snapshot says.
pub(crate) struct Node {
    pub(crate) network: Arc<dyn NodeNetwork>,
    pub(crate) mtu: u16,
    /// Ranges outside the cluster where pods keep their addresses.
    pub(crate) no_masquerade: Vec<IpNet>,
    /// Told when the overlay device has been made.
    pub(crate) made: Arc<Notify>,
    /// What the node's sysctls were.
    pub(crate) before: Originals,
    /// Hears of what there is no room for.
    pub(crate) board: Board,
    /// Whether the cluster's ranges were compared with the node's routes, and agree.
    pub(crate) compared: bool,
    /// Told when a sysctl is not as it has to be.
    pub(crate) disturbed: Arc<Notify>,
}

/// Whoever fights for a sysctl with us does not get all of our time.
const CALM: Duration = Duration::from_millis(50);
const RETRY: Duration = Duration::from_secs(1);

/// Has the kernel tell of sysctls that somebody has changed, on a thread of its own, for ever. What it does not tell of is found
/// with the rest, later.
pub(crate) fn watch_sysctls(overlay: IfName) -> Arc<Notify> {
    let disturbed = Arc::new(Notify::new());
    let told = Arc::clone(&disturbed);
    let thread = std::thread::Builder::new().name("sysctls".to_owned());
    let watching = SysctlWatch::open(NetNs::current(), overlay).and_then(|watch| {
        thread.spawn(move || {
            loop {
                match watch.wait() {
                    Ok(names) => {
                        tracing::warn!(?names, "somebody else changed sysctls, repairing");
                        told.notify_one();
                        std::thread::sleep(CALM);
                    }
                    Err(error) => {
                        tracing::debug!(%error, "sysctls not looked at");
                        std::thread::sleep(RETRY);
                    }
                }
            }
        })
    });
    if let Err(error) = watching {
        tracing::warn!(%error, "changed sysctls are found late");
    }
    disturbed
}

impl Concern for Node {
    const NAME: &'static str = "node";
    // Others flush routes and change sysctls that nobody tells of: systemd-networkd, DHCP clients, people.
    const HEAL: Duration = Duration::from_secs(15);
    type Slice = Network;

    fn slice(&self, desired: &Desired) -> Option<Network> {
        let mut network = Network::from_snapshot(&desired.snapshot, u32::from(self.mtu));
        for peer in desired.snapshot.peers.iter() {
            if let Some(&mtu) =
                desired.outlook.mtus.get(&peer.public_key).filter(|m| **m < self.mtu)
            {
                let blocks = peer.allowed_ips.iter().map(|block| (block.trunc(), u32::from(mtu)));
                network.block_mtus.extend(blocks);
            }
        }
        if let Some(masquerade) = &mut network.masquerade {
            masquerade.keep_source_towards(&self.no_masquerade);
        }
        Some(network)
    }

    async fn apply(&mut self, slice: &Network, heal: bool) -> Result<(), Failures> {
        let (network, wanted) = (Arc::clone(&self.network), slice.clone());
        let (compared, before, board) = (self.compared, self.before.clone(), self.board.clone());
        let round = tokio::task::spawn_blocking(move || {
            // Once, before anything of ours is there: later a route of others must not take the node out of service.
            if !compared {
                agree(&*network, &wanted)?;
            }
            Ok(round(&*network, &wanted, &before, &board, heal))
        });
        match round.await {
            Ok(Ok(result)) => {
                self.compared = true;
                result
            }
            Ok(Err(conflicts)) => Err(conflicts),
            Err(panic) => Err(vec![panic.to_string()]),
        }
    }

    /// Until its addresses, routes and programs are there, a new device carries nothing; nor does a node that forwards nothing.
    async fn undone(&self) {
        tokio::select! {
            () = self.made.notified() => {}
            () = self.disturbed.notified() => {}
        }
    }
}

/// Refuses to begin where the cluster's ranges are the node's own.
fn agree(network: &dyn NodeNetwork, wanted: &Network) -> Result<(), Failures> {
    let observed = network.observe(&wanted.overlay).map_err(|error| vec![chain(&error)])?;
    let found = conflicts(wanted, &observed);
    if found.is_empty() { Ok(()) } else { Err(found.iter().map(ToString::to_string).collect()) }
}

fn round(
    network: &dyn NodeNetwork,
    wanted: &Network,
    before: &Originals,
    board: &Board,
    heal: bool,
) -> Result<(), Failures> {
    let observed = network.observe(&wanted.overlay).map_err(|error| vec![chain(&error)])?;
    let plan = plan(wanted, &observed);
    if heal && !plan.steps.is_empty() {
        tracing::warn!(steps = ?plan.steps, "somebody else changed the node's network, repairing");
    }
    before.note(network.originals(&plan)).map_err(|error| vec![chain(&error)])?;
    let applied = network.apply(&plan);
    board.found_full(Node::NAME, full(&applied));
    let mut failures: Failures =
        applied.failed.iter().map(|(step, error)| format!("{step:?}: {}", chain(error))).collect();
    if observed.overlay.is_none() {
        failures.push(format!("device {} does not exist yet", wanted.overlay));
    }
    if failures.is_empty() { Ok(()) } else { Err(failures) }
}

/// The maps that lack room.
fn full(applied: &Applied<Step>) -> FullMaps {
    applied.full_maps().map(|map| (map, Lacking::default())).collect()
}

#[cfg(test)]
mod tests {
    use mesh_kernel::node::{FakeNodeNetwork, Foreign};
    use mesh_model::{Objects, compile};

    use super::*;

    #[tokio::test]
    async fn a_node_whose_own_network_is_the_clusters_does_not_begin() {
        let fake = Arc::new(FakeNodeNetwork::new());
        let network: Arc<dyn NodeNetwork> = Arc::clone(&fake) as _;
        let dir = tempfile::tempdir().unwrap();
        let before = Originals::new(dir.path().join("sysctls.json"));
        let mut node = Node {
            network,
            mtu: 1420,
            no_masquerade: vec![],
            made: Arc::default(),
            before,
            board: Board::default(),
            compared: false,
            disturbed: Arc::default(),
        };
        let snapshot = compile(&Objects::default(), &"n".parse().unwrap());
        let wanted = Network::from_snapshot(&snapshot, 1420);
        let lan = Foreign { destination: "10.244.7.0/24".parse().unwrap(), on_link: true };
        fake.tamper(|node| node.foreign.extend([lan.clone()]));
        let failures = node.apply(&wanted, false).await.unwrap_err();
        assert!(
            failures[0].contains("10.244.0.0/16") && failures[0].contains("10.244.7.0/24"),
            "{failures:?}"
        );
        fake.tamper(|node| {
            assert!(node.routes.is_empty() && node.local_addresses.is_empty(), "nothing was done");
            node.foreign.clear();
        });
        let missing = node.apply(&wanted, false).await.unwrap_err();
        assert!(missing[0].contains("does not exist yet"), "{missing:?}");
        fake.tamper(|node| node.foreign.extend([lan]));
        let missing = node.apply(&wanted, false).await.unwrap_err();
        assert!(missing[0].contains("does not exist yet"), "a node at work goes on: {missing:?}");
    }
}
