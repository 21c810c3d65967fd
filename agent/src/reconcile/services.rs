//! Service frontends and backends in the maps of the socket hooks.

use std::borrow::Borrow;
use std::sync::{Arc, Mutex, PoisonError};

use mesh_kernel::services::{ServiceReconciler, ServiceTable};
use mesh_model::Snapshot;
use mesh_model::snapshot::Frontend;

use super::{Concern, Failures};
use crate::errors::chain;
use crate::observe::Desired;
use crate::paths::outlook::Outlook;

/// Most failures that a report names: a full map fails for every backend.
const NAMED: usize = 5;

/// Keeps the kernel's service table as the snapshot says.
pub(crate) struct Services<T> {
    reconciler: Arc<Mutex<ServiceReconciler<T>>>,
}

impl<T: ServiceTable> Services<T> {
    pub(crate) fn new(table: T) -> Self {
        Self { reconciler: Arc::new(Mutex::new(ServiceReconciler::new(table))) }
    }
}

/// The snapshot, compared by its frontends: a copy of ten thousand services for each change would be waste; and which
/// nodes are away.
pub(crate) struct Frontends(Arc<Snapshot>, Arc<Outlook>);

impl PartialEq for Frontends {
    fn eq(&self, other: &Self) -> bool {
        let same = Arc::ptr_eq(&self.0, &other.0) || self.0.frontends == other.0.frontends;
        same && self.1.away == other.1.away
    }
}

impl<T: ServiceTable + 'static> Concern for Services<T> {
    const NAME: &'static str = "services";
    type Slice = Frontends;

    fn slice(&self, desired: &Desired) -> Option<Frontends> {
        Some(Frontends(Arc::clone(&desired.snapshot), Arc::clone(&desired.outlook)))
    }

    async fn apply(&mut self, slice: &Frontends, heal: bool) -> Result<(), Failures> {
        let reconciler = Arc::clone(&self.reconciler);
        let (snapshot, outlook) = (Arc::clone(&slice.0), Arc::clone(&slice.1));
        let round = tokio::task::spawn_blocking(move || {
            let mut reconciler = reconciler.lock().unwrap_or_else(PoisonError::into_inner);
            round(&mut reconciler, &outlook.frontends(&snapshot), heal)
        });
        round.await.unwrap_or_else(|panic| Err(vec![panic.to_string()]))
    }
}

fn round<T: ServiceTable, F: Borrow<Frontend>>(
    reconciler: &mut ServiceReconciler<T>,
    wanted: &[F],
    heal: bool,
) -> Result<(), Failures> {
    if heal && reconciler.refresh().map_err(|error| vec![chain(&error)])? {
        tracing::warn!("somebody else changed the service maps, repairing");
    }
    let outcome = reconciler.reconcile(wanted).map_err(|error| vec![chain(&error)])?;
    if outcome.operations > 0 {
        tracing::debug!(operations = outcome.operations, "service maps updated");
    }
    let failed = outcome.failed.iter().map(|(step, error)| format!("{step:?}: {}", chain(error)));
    let mut failures: Failures = failed.take(NAMED).collect();
    if outcome.failed.len() > NAMED {
        failures.push(format!("and {} more", outcome.failed.len() - NAMED));
    }
    if failures.is_empty() { Ok(()) } else { Err(failures) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_kernel::services::FakeServiceTable;

    #[test]
    fn a_full_map_is_named_and_a_tampered_one_repaired() {
        let frontend: Frontend = serde_json::from_value(serde_json::json!({
            "vip": "10.96.0.1", "protocol": "TCP", "port": 443, "kind": "clusterIp", "service": "default/kubernetes",
            "portName": "https", "affinitySecs": null,
            "backends": [{"address": "192.0.2.1", "port": 6443, "node": null}],
        }))
        .unwrap();
        let mut reconciler = ServiceReconciler::new(FakeServiceTable::new());
        round(&mut reconciler, std::slice::from_ref(&frontend), false).unwrap();
        reconciler.table().tamper(|observed| observed.entries.clear());
        round(&mut reconciler, std::slice::from_ref(&frontend), true).unwrap();
        assert_eq!(reconciler.table().observe().unwrap().entries.len(), 1);

        let mut full = ServiceReconciler::new(FakeServiceTable::new());
        full.table().limit_slots(0);
        assert!(!round(&mut full, &[frontend], false).unwrap_err().is_empty());
    }
}
