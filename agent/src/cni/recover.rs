//! Putting journal, interfaces, queued releases and the runtime's sandboxes together: at the start, and again and again.

use std::collections::BTreeSet;
use std::sync::PoisonError;

use mesh_cni::queue;
use mesh_cni::wire::{Failure, Owner};
use mesh_kernel::pods::{ListError, ObservedPort};

use super::failure::Trouble;
use super::ledger::{Change, LedgerError};
use super::{Cni, owner};

/// Journal and interfaces could not be put together. Nothing was given away; to be tried again.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The interfaces could not be listed.
    #[error("list the pods' interfaces")]
    List(#[source] ListError),
    /// The journal could not be asked or written.
    #[error("bring the address journal up to date")]
    Ledger(#[source] LedgerError),
}

impl Cni {
    /// Takes back what an earlier agent began and did not finish, and learns of interfaces that the journal lost.
    ///
    /// To be called before the socket is served.
    pub async fn recover(&self) -> Result<(), RecoverError> {
        let ask = self.0.ledger.ask(|pool| pool.leases().clone()).await;
        let leases = ask.map_err(RecoverError::Ledger)?;
        for (owner, _) in leases.iter().filter(|(_, lease)| !lease.committed) {
            tracing::info!(owner = %owner, "removing what an unfinished ADD or DEL left");
            self.release_quietly(owner).await;
        }
        // Only now: what has just been removed must not be learned again.
        let ports = self.blocking(|network| network.list()).await.map_err(RecoverError::List)?;
        for port in &ports {
            self.learn(port).await;
        }
        // Nobody makes interfaces yet, so what is not there is not about to come.
        for (owner, _) in
            leases.iter().filter(|(owner, lease)| lease.committed && !present(&ports, owner))
        {
            tracing::info!(owner = %owner, "its interface is gone, releasing its addresses");
            self.release_quietly(owner).await;
        }
        self.drain_queue().await;
        self.publish().await.map_err(RecoverError::Ledger)?;
        // Devices that an earlier agent had put out of service.
        self.0.departures.add();
        if let Err(error) = self.blocking(|network| network.collect_garbage()).await {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "garbage of pods' interfaces not collected");
        }
        Ok(())
    }

    /// Writes the ports of the node that lead to pods, if they are not as they should be.
    async fn publish(&self) -> Result<(), LedgerError> {
        let published = |pool: &super::pool::Pool| {
            let with_ports = pool.leases().values().filter(|lease| !lease.wishes.ports.is_empty());
            let ports = |lease: &super::pool::Lease| {
                (owner::host_ports(&lease.wishes), lease.addresses.clone())
            };
            with_ports.map(ports).collect::<Vec<_>>()
        };
        let all = self.0.ledger.ask(published).await?;
        if let Err(error) = self.blocking(move |network| network.publish(&all)).await {
            tracing::warn!(%error, "ports of the node that lead to pods not written");
        }
        Ok(())
    }

    async fn learn(&self, port: &ObservedPort) {
        let Some((owner, lease)) = owner::parse(&port.owner) else {
            tracing::warn!(interface = %port.host_interface, owner = port.owner, "unknown owner, left alone");
            return;
        };
        let asked = owner.clone();
        let known = self.0.ledger.ask(move |pool| pool.lease(&asked).is_some()).await;
        if known.unwrap_or(true) {
            return;
        }
        match self.0.ledger.change(Change::Adopt(owner.clone(), lease)).await {
            Ok(_) => tracing::warn!(owner = %owner, "interface was missing in the journal"),
            Err(LedgerError::Conflict { other, .. }) => {
                tracing::error!(owner = %owner, other = %other, "two pods with one address, the unknown one is removed");
                self.release_quietly(&owner).await;
            }
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(owner = %owner, error, "interface not journaled");
            }
        }
    }

    /// Releases what was queued while no agent ran.
    pub async fn drain_queue(&self) {
        let queued = queue::list(&self.0.state_dir).unwrap_or_else(|error| {
            tracing::warn!(%error, "queue of releases unreadable");
            vec![]
        });
        for (file, owner) in queued {
            let _turn = self.turn(&owner).await;
            if self.release_quietly(&owner).await {
                let _ = std::fs::remove_file(file);
            }
        }
    }

    /// A release that is still queued must not hit the interface that is about to be made.
    pub(super) async fn drain_queue_of(&self, owner: &Owner) -> Result<(), Failure> {
        for (file, queued) in queue::list(&self.0.state_dir).unwrap_or_default() {
            if queued == *owner {
                self.release(owner).await?;
                let _ = std::fs::remove_file(file);
            }
        }
        Ok(())
    }

    /// Tries again what a DEL could not remove, and releases addresses whose interface was absent twice in a row: the
    /// pod's namespace is gone, and nobody said so.
    pub async fn sweep(&self) -> Result<(), RecoverError> {
        self.drain_queue().await;
        self.depart_again().await;
        self.publish().await.map_err(RecoverError::Ledger)?;
        let ask = self.0.ledger.ask(|pool| pool.leases().clone()).await;
        let leases = ask.map_err(RecoverError::Ledger)?;
        let ports = self.blocking(|network| network.list()).await.map_err(RecoverError::List)?;
        let absent: std::collections::BTreeSet<Owner> = leases
            .into_iter()
            .filter(|(owner, lease)| lease.committed && !present(&ports, owner))
            .map(|(owner, _)| owner)
            .collect();
        let before = {
            let mut known = self.0.absent.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            std::mem::replace(&mut *known, absent.clone())
        };
        for owner in absent.intersection(&before) {
            tracing::info!(owner = %owner, "interface gone without a DEL, releasing its addresses");
            let _turn = self.turn(owner).await;
            self.release_quietly(owner).await;
        }
        Ok(())
    }

    /// Releases what was made for sandboxes that the runtime does not know, twice in a row: it died between ADD and writing
    /// the sandbox down, or lost it, and the namespace is still mounted. What was not made for CRI is nobody's to judge here.
    pub(crate) async fn compare_sandboxes(
        &self,
        known: &BTreeSet<String>,
    ) -> Result<(), RecoverError> {
        let ports = self.blocking(|network| network.list()).await.map_err(RecoverError::List)?;
        let of_pods = ports.iter().filter(|port| owner::names_pod(&port.owner));
        let strangers: BTreeSet<Owner> = of_pods
            .filter_map(|port| Some(owner::parse(&port.owner)?.0))
            .filter(|owner| !known.contains(&owner.container))
            .collect();
        let before = {
            let mut seen = self.0.strangers.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *seen, strangers.clone())
        };
        for owner in strangers.intersection(&before) {
            tracing::warn!(owner = %owner, "the runtime does not know its sandbox, releasing its addresses");
            let _turn = self.turn(owner).await;
            self.release_quietly(owner).await;
        }
        Ok(())
    }

    async fn release_quietly(&self, owner: &Owner) -> bool {
        match self.release(owner).await {
            Ok(()) => true,
            Err(trouble) => {
                let error = &trouble as &(dyn std::error::Error + 'static);
                tracing::warn!(owner = %owner, error, "not released yet");
                false
            }
        }
    }
}

/// Whether there is an interface for that owner.
fn present(ports: &[ObservedPort], owner: &Owner) -> bool {
    let name = mesh_kernel::IfName::for_pod(&owner.container, &owner.interface);
    ports.iter().any(|port| port.host_interface == name)
}

impl From<LedgerError> for Trouble {
    fn from(error: LedgerError) -> Self {
        Self::Ledger(error)
    }
}
