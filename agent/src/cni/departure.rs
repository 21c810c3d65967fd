//! The end of an interface, most of which the caller of DEL need not wait for: the kernel takes some 20 ms to be sure that
//! no processor uses a device any more.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_cni::wire::Owner;
use mesh_kernel::IfName;
use tokio::sync::RwLock;

use super::failure::Trouble;
use super::ledger::Change;
use super::{Cni, Turn};

/// How often to look whether an interface is out of sight.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// Interfaces that are going.
#[derive(Default)]
pub(super) struct Departures {
    /// Each of them holds it for reading.
    under_way: Arc<RwLock<()>>,
    /// Those that could not go.
    failed: Mutex<BTreeSet<Owner>>,
}

impl Departures {
    /// Waits for all that are under way.
    pub(super) async fn wait(&self) {
        drop(self.under_way.write().await);
    }
}

impl Cni {
    /// Lets an interface go, and returns when nobody sees it any more, or with what prevents that. Its addresses are
    /// free when it has gone for good; until then nobody else has the owner's turn.
    pub(super) async fn depart(&self, owner: &Owner, turn: Turn) -> Result<(), Trouble> {
        let retired = self.0.ledger.change(Change::Retire(owner.clone())).await;
        if retired.map_err(Trouble::Ledger)?.is_none() {
            // Not ours, or gone before; what is left of it is not worth an early answer.
            return self.release(owner).await;
        }
        let guard = Arc::clone(&self.0.departures.under_way).read_owned().await;
        let (cni, leaving) = (self.clone(), owner.clone());
        let mut going = tokio::spawn(async move {
            let _held = (turn, guard);
            let result = cni.release(&leaving).await;
            if let Err(trouble) = &result {
                tracing::warn!(owner = %leaving, error = trouble as &(dyn std::error::Error + 'static), "not gone yet");
                cni.0.departures.failed().insert(leaving);
            }
            result
        });
        tokio::select! {
            result = &mut going => match result {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic.into_panic()),
            },
            () = self.out_of_sight(owner) => Ok(()),
        }
    }

    async fn out_of_sight(&self, owner: &Owner) {
        let host = IfName::for_pod(&owner.container, &owner.interface);
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let (host, network) = (host.clone(), Arc::clone(&self.0.network));
            // Not in turn with those who change devices: this one only looks.
            let seen = tokio::task::spawn_blocking(move || network.exists(&host)).await;
            if !seen.unwrap_or(true) {
                return;
            }
        }
    }

    /// Tries again what could not go.
    pub(super) async fn depart_again(&self) {
        let failed: Vec<Owner> = self.0.departures.failed().iter().cloned().collect();
        for owner in failed {
            let _turn = self.turn(&owner).await;
            if let Err(trouble) = self.finish_departure(&owner).await {
                let error = &trouble as &(dyn std::error::Error + 'static);
                tracing::warn!(owner = %owner, error, "still not gone");
            }
        }
    }

    /// What is left of the owner's last interface goes first, or nothing happens; the caller holds the owner's turn.
    pub(super) async fn finish_departure(&self, owner: &Owner) -> Result<(), Trouble> {
        if self.0.departures.failed().contains(owner) {
            self.release(owner).await?;
            self.0.departures.failed().remove(owner);
        }
        Ok(())
    }
}

impl Departures {
    fn failed(&self) -> std::sync::MutexGuard<'_, BTreeSet<Owner>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
