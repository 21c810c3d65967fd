//! A start with another kind of overlay than the one that carries the packets.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_kernel::NetNs;
use mesh_kernel::NodeNetwork as _;
use mesh_kernel::wireguard::KernelWireGuard;

use super::Agent;
use super::kernel::overlay_device;
use crate::errors::chain;
use crate::preshared::Keeper;
use crate::switch::{Switch, Whereabouts};
use crate::{api, workers};

/// How long anything else waits for an overlay of another kind.
const CARRIES_WITHIN: Duration = Duration::from_secs(5);
/// How long the node's network is waited for; on a slow machine `nft` takes more than a second.
const OBSERVED_WITHIN: Duration = Duration::from_secs(5);
/// How often the other kind is asked to make way.
const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_secs(1);

impl Agent {
    /// Lets the chosen kind of overlay begin, where it was the other one so far; none where it was not. An agent that cannot have it
    /// ends, and the next one tries again: meanwhile the other kind goes on, with the programs and routes that are there.
    pub(super) async fn switch(&self) -> anyhow::Result<Option<Whereabouts>> {
        let switch = Switch {
            device: Arc::new(KernelWireGuard::new(NetNs::current(), overlay_device())),
            supported: || mesh_overlay::Kind::detect() == mesh_overlay::Kind::Kernel,
            worker: workers::any(workers::OVERLAY, &self.paths),
            paths: self.paths.clone(),
        };
        if !switch.is_due(self.overlay.kind()).await.unwrap_or(true) {
            return Ok(None);
        }
        self.prepare().await;
        ensure!(self.programs.get().is_some(), "the overlay keeps its kind: no eBPF programs");
        for _ in 1..TRIES {
            match switch.to(self.overlay.kind()).await {
                Ok(found) => return Ok(Some(found)),
                Err(error) => tracing::error!(
                    error = chain(&error),
                    "the other kind of overlay stays, trying again"
                ),
            }
            tokio::time::sleep(PAUSE).await;
        }
        let found = switch.to(self.overlay.kind()).await;
        found.map(Some).context("the other kind of overlay did not make way")
    }

    /// Has what takes seconds on a slow machine, while the other kind goes on: programs, without which the new device carries nothing; the
    /// pre-shared keys of today, because peers understand no call by those of an epoch that is over; and the node's network, because
    /// its rules are read by a process, and remembered.
    async fn prepare(&self) {
        let mut keeper = self.early_keeper();
        let renewed = async {
            match &mut keeper {
                Some(keeper) => keeper.renew().await,
                None => false,
            }
        };
        let ((), renewed) = tokio::join!(self.load_programs_once(), renewed);
        if let Some(programs) = self.programs.get() {
            let network = self.node_network(programs);
            // What fails is told when the network is configured.
            let observe = move || network.observe(&overlay_device()).is_ok();
            let observed = tokio::task::spawn_blocking(observe);
            if tokio::time::timeout(OBSERVED_WITHIN, observed).await.is_err() {
                tracing::warn!("the node's network is not known yet, going on");
            }
        }
        // The programs may have taken until after the end of the epoch. The connection is there now.
        if let Some(keeper) = keeper.as_mut().filter(|_| renewed) {
            keeper.renew().await;
        }
    }

    /// After a change of the overlay's kind: waits until packets go their way again, since whatever else is to be done at a
    /// start would only make that take longer. Returns whether they do.
    pub(super) async fn carries_again(&self) -> bool {
        let mut standings = self.board.subscribe();
        let made = |concern| self.board.standing(concern).ever;
        let both = async {
            while !["overlay", "node"].into_iter().all(made) && standings.changed().await.is_ok() {}
        };
        tokio::time::timeout(CARRIES_WITHIN, both).await.is_ok()
    }

    /// What keeps the pre-shared keys, for a node that is a member already.
    fn early_keeper(&self) -> Option<Keeper> {
        let identity = self.joining().known()?;
        Some(self.keeper(api::client(&identity).ok()?))
    }
}
