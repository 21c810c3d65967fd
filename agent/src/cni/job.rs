//! What ADD and DEL do on one thread that may block: journal, kernel, journal. Every change of threads in between would cost a busy
//! machine a time slice.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_cni::wire::{Failure, Owner, PodName, Wishes};
use mesh_kernel::IfName;
use mesh_kernel::pods::{AttachError, Attached, PodNetwork, PodPort};

use super::failure::Trouble;
use super::ledger::{Change, LedgerError, LedgerHandle};
use super::owner;
use crate::errors::chain;

/// An ADD that was found to make sense.
pub(super) struct Add {
    pub(super) owner: Owner,
    pub(super) netns: PathBuf,
    pub(super) pod: Option<PodName>,
    pub(super) wishes: Wishes,
    pub(super) blocks: Arc<[IpNet]>,
    pub(super) mtu: u32,
}

/// Why there is no interface.
pub(super) enum AddError {
    /// The request is wrong after all.
    Refused(Failure),
    /// It did not work.
    Trouble(Trouble),
}

impl From<AddError> for Failure {
    fn from(error: AddError) -> Self {
        match error {
            AddError::Refused(failure) => failure,
            AddError::Trouble(trouble) => trouble.into(),
        }
    }
}

impl Add {
    /// Reserves, attaches, commits; or takes back what it has done.
    pub(super) fn run(
        self,
        network: &dyn PodNetwork,
        ledger: &LedgerHandle,
    ) -> Result<(PodPort, Attached), AddError> {
        let failed = |error| AddError::Trouble(Trouble::Ledger(error));
        let reserve = Change::Reserve(self.owner.clone(), self.blocks, self.wishes);
        let lease = ledger.apply(reserve).map_err(failed)?;
        let lease = lease.ok_or(failed(LedgerError::Ended))?;
        let text = owner::describe(&self.owner, &lease.addresses, self.pod.as_ref());
        let port = owner::port(&self.owner, &lease, self.netns, self.mtu, text)
            .map_err(AddError::Refused)?;
        let attached = network.attach(&port).map_err(Trouble::Attach).and_then(|attached| {
            let commit = ledger.apply(Change::Commit(self.owner.clone()));
            commit.map(|_| attached).map_err(Trouble::Ledger)
        });
        match attached {
            Ok(attached) => Ok((port, attached)),
            Err(trouble) => {
                take_back(&self.owner, &port, &trouble, network, ledger);
                Err(AddError::Trouble(trouble))
            }
        }
    }
}

/// Undoes an ADD that failed. What cannot be undone now stays reserved and is taken back later.
fn take_back(
    owner: &Owner,
    port: &PodPort,
    trouble: &Trouble,
    network: &dyn PodNetwork,
    ledger: &LedgerHandle,
) {
    let nothing_made =
        matches!(trouble, Trouble::Attach(AttachError::Exists(_) | AttachError::Namespace { .. }));
    if !nothing_made {
        let addresses: Vec<IpAddr> = port.addresses().collect();
        if let Err(error) = network.detach(&port.host_interface, &addresses) {
            tracing::warn!(owner = %owner, error = chain(&error), "failed ADD not undone yet");
            return;
        }
    }
    if let Err(error) = ledger.apply(Change::Release(owner.clone())) {
        let error = chain(&error);
        tracing::warn!(owner = %owner, error, "address of a failed ADD not released yet");
    }
}

/// Detaches and releases. Whether there was a lease.
pub(super) fn release(
    owner: &Owner,
    network: &dyn PodNetwork,
    ledger: &LedgerHandle,
) -> Result<bool, Trouble> {
    let addresses = ledger.look(|pool| pool.lease(owner).map(|lease| lease.addresses.clone()));
    let host = IfName::for_pod(&owner.container, &owner.interface);
    network.detach(&host, &addresses.unwrap_or_default()).map_err(Trouble::Detach)?;
    let released = ledger.apply(Change::Release(owner.clone())).map_err(Trouble::Ledger)?;
    Ok(released.is_some())
}
