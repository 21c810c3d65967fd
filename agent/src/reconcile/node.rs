//! Addresses, routes, sysctls and masquerading of the node.

use std::sync::Arc;
use std::time::Duration;

use mesh_kernel::NodeNetwork;
use mesh_kernel::node::{Desired as Network, plan};
use tokio::sync::Notify;

use super::{Concern, Failures};
use crate::errors::chain;
use crate::observe::Desired;

/// Keeps the node's own network configuration as the snapshot says.
pub(crate) struct Node {
    pub(crate) network: Arc<dyn NodeNetwork>,
    pub(crate) mtu: u16,
    /// Told when the overlay device has been made.
    pub(crate) made: Arc<Notify>,
}

impl Concern for Node {
    const NAME: &'static str = "node";
    // Others change sysctls and flush routes: systemd-networkd, DHCP clients, people.
    const HEAL: Duration = Duration::from_secs(15);
    type Slice = Network;

    fn slice(&self, desired: &Desired) -> Option<Network> {
        let mut network = Network::from_snapshot(&desired.snapshot, u32::from(self.mtu));
        for peer in &desired.snapshot.peers {
            if let Some(&mtu) =
                desired.outlook.mtus.get(&peer.public_key).filter(|m| **m < self.mtu)
            {
                let blocks = peer.allowed_ips.iter().map(|block| (block.trunc(), u32::from(mtu)));
                network.block_mtus.extend(blocks);
            }
        }
        Some(network)
    }

    async fn apply(&mut self, slice: &Network, heal: bool) -> Result<(), Failures> {
        let (network, wanted) = (Arc::clone(&self.network), slice.clone());
        let round = tokio::task::spawn_blocking(move || round(&*network, &wanted, heal));
        round.await.unwrap_or_else(|panic| Err(vec![panic.to_string()]))
    }

    /// Until its addresses, routes and programs are there, the new device carries nothing.
    async fn undone(&self) {
        self.made.notified().await;
    }
}

fn round(network: &dyn NodeNetwork, wanted: &Network, heal: bool) -> Result<(), Failures> {
    let observed = network.observe(&wanted.overlay).map_err(|error| vec![chain(&error)])?;
    let plan = plan(wanted, &observed);
    if heal && !plan.steps.is_empty() {
        tracing::warn!(steps = ?plan.steps, "somebody else changed the node's network, repairing");
    }
    let applied = network.apply(&plan);
    let mut failures: Failures =
        applied.failed.iter().map(|(step, error)| format!("{step:?}: {}", chain(error))).collect();
    if observed.overlay.is_none() {
        failures.push(format!("device {} does not exist yet", wanted.overlay));
    }
    if failures.is_empty() { Ok(()) } else { Err(failures) }
}
