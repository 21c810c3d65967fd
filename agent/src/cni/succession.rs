//! From programs of another ABI version to ours: each pod that is here is taken over with what the journal knows of it.

use std::path::PathBuf;

use mesh_cni::wire::{Failure, Owner};
use mesh_kernel::pods::{ListError, ObservedPort};

use super::failure::Trouble;
use super::{Cni, owner};

/// What became of the pods.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Succession {
    /// How many were another version's, and are ours now.
    pub(crate) taken: usize,
    /// Why others are not, a line for each. Programs of the other version go on guarding them.
    pub(crate) failures: Vec<String>,
}

impl Cni {
    /// Lets our programs guard the pods that those of another version guard; one that fails keeps no other. To be called when everything
    /// but pods is in the maps; repeating it goes on with what is left.
    pub(crate) async fn take_over(&self) -> Result<Succession, ListError> {
        let mut outcome = Succession::default();
        for seen in self.blocking(|network| network.list()).await? {
            let Some((owner, _)) = owner::parse(&seen.owner) else { continue };
            match self.take_over_one(&owner, seen).await {
                Ok(taken) => outcome.taken += usize::from(taken),
                Err(Failure { msg, details, .. }) => {
                    outcome.failures.push(format!("{owner}: {msg}: {details}"));
                }
            }
        }
        Ok(outcome)
    }

    async fn take_over_one(&self, owner: &Owner, seen: ObservedPort) -> Result<bool, Failure> {
        // It neither comes nor goes meanwhile.
        let _turn = self.turn(owner).await;
        let asked = owner.clone();
        let lease = self.0.ledger.ask(move |pool| pool.lease(&asked).cloned()).await;
        let lease = lease.map_err(Trouble::Ledger)?;
        let Some(lease) = lease.filter(|lease| lease.committed) else { return Ok(false) };
        // Its namespace is not entered, so neither a path nor an MTU is needed. By the text of the interface its policies are found.
        let port = owner::port(owner, &lease, PathBuf::new(), 0, seen.owner)?;
        let taken = self.blocking(move |network| network.take_over(&port)).await;
        Ok(taken.map_err(Trouble::Attach)?)
    }
}
