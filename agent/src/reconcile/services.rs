//! Service frontends and backends in the maps of the socket hooks.

use std::sync::{Arc, Mutex, PoisonError};

use mesh_kernel::services::{FrontendKey, Gone, Outcome, ServiceReconciler, ServiceTable};
use mesh_model::Snapshot;
use mesh_model::snapshot::Frontend;
use tokio::sync::mpsc::UnboundedSender;

use super::{Concern, Failures};
use crate::differences::{self, Differences};
use crate::errors::chain;
use crate::observe::Desired;
use crate::paths::outlook::Outlook;

/// Most failures that a report names: a full map fails for every backend.
const NAMED: usize = 5;

/// What whoever ends sockets hears of the table.
#[derive(Debug, PartialEq)]
pub(crate) enum News {
    /// For the first time it is as it should be. The agent before may have been killed between a change and what follows from it.
    Begun,
    /// These backends are gone.
    Gone(Vec<Gone>),
}

/// Keeps the kernel's service table as the snapshot says.
pub(crate) struct Services<T> {
    table: Arc<Mutex<Table<T>>>,
}

impl<T: ServiceTable> Services<T> {
    /// `news` hears of backends that are gone.
    pub(crate) fn new(table: T, news: UnboundedSender<News>) -> Self {
        Self { table: Arc::new(Mutex::new(Table::new(table, news))) }
    }
}

/// The snapshot, compared by its frontends: a copy of ten thousand services for each change would be waste; and which
/// nodes are away.
#[derive(Clone)]
pub(crate) struct Frontends(Arc<Snapshot>, Arc<Outlook>);

impl PartialEq for Frontends {
    fn eq(&self, other: &Self) -> bool {
        let same = Arc::ptr_eq(&self.0, &other.0)
            || self.0.frontends == other.0.frontends
                && self.0.node_addresses == other.0.node_addresses;
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
        let (table, slice) = (Arc::clone(&self.table), slice.clone());
        let round = tokio::task::spawn_blocking(move || {
            let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
            table.round(slice, heal)
        });
        round.await.unwrap_or_else(|panic| Err(vec![panic.to_string()]))
    }
}

struct Table<T> {
    reconciler: ServiceReconciler<T>,
    /// What the table follows from, when the last round was complete.
    done: Option<Frontends>,
    /// Whether a round was complete ever.
    begun: bool,
    news: UnboundedSender<News>,
}

impl<T: ServiceTable> Table<T> {
    fn new(table: T, news: UnboundedSender<News>) -> Self {
        Self { reconciler: ServiceReconciler::new(table), done: None, begun: false, news }
    }

    fn round(&mut self, wanted: Frontends, heal: bool) -> Result<(), Failures> {
        let failed = |error: &dyn std::error::Error| vec![chain(error)];
        let done = self.done.take();
        let Frontends(snapshot, outlook) = &wanted;
        if heal && self.reconciler.refresh().map_err(|error| failed(&error))? {
            tracing::warn!("somebody else changed the service maps, repairing");
        }
        let known = |done: &Frontends| done.0.node_addresses == snapshot.node_addresses;
        let nodes = match &done {
            Some(done) if !heal && known(done) => Ok(0),
            _ => {
                let nodes = snapshot.node_addresses.iter().copied().collect();
                self.reconciler.table().set_node_addresses(&nodes)
            }
        };
        let outcome = match done.filter(|done| !heal && done.1.away == outlook.away) {
            Some(done) if done.0.peers == snapshot.peers => {
                let Differences { gone, put } =
                    differences::of_lists(&done.0.frontends, &snapshot.frontends, key);
                let put: Vec<&Frontend> = put.into_iter().map(|frontend| &**frontend).collect();
                self.reconciler.reconcile_changes(&outlook.narrow(snapshot, &put), &gone)
            }
            _ => {
                let all = outlook.frontends(snapshot);
                self.reconciler.reconcile(&all).map_err(|error| failed(&error))?
            }
        };
        if outcome.operations > 0 {
            tracing::debug!(operations = outcome.operations, "service maps updated");
        }
        let mut failures = named(&outcome);
        if !outcome.gone.is_empty() {
            // Nobody listens in an agent that ends.
            let _ = self.news.send(News::Gone(outcome.gone));
        }
        failures.extend(nodes.err().map(|error| chain(&error)));
        if !failures.is_empty() {
            return Err(failures);
        }
        self.done = Some(wanted);
        if !std::mem::replace(&mut self.begun, true) {
            let _ = self.news.send(News::Begun);
        }
        Ok(())
    }
}

fn named(outcome: &Outcome) -> Failures {
    let failed = outcome.failed.iter().map(|(step, error)| format!("{step:?}: {}", chain(error)));
    let mut failures: Failures = failed.take(NAMED).collect();
    if outcome.failed.len() > NAMED {
        failures.push(format!("and {} more", outcome.failed.len() - NAMED));
    }
    failures
}

fn key(frontend: &Frontend) -> FrontendKey {
    FrontendKey { vip: frontend.vip, protocol: frontend.protocol, port: frontend.port }
}

#[cfg(test)]
mod tests {
    use mesh_kernel::services::FakeServiceTable;
    use mesh_model::{Objects, compile};
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    use super::*;

    fn wanted(frontends: &[(&str, u16)]) -> Frontends {
        let mut snapshot = compile(&Objects::default(), &"n".parse().unwrap());
        let frontend = |(vip, port): &(&str, u16)| {
            serde_json::from_value(serde_json::json!({
                "vip": vip, "protocol": "TCP", "port": 443, "kind": "clusterIp", "service": "default/kubernetes",
                "portName": "https", "affinitySecs": null,
                "backends": [{"address": "192.0.2.1", "port": port, "node": null}],
            }))
            .unwrap()
        };
        let frontends = frontends.iter().map(frontend).map(Arc::new);
        snapshot.frontends = Arc::new(frontends.collect());
        snapshot.node_addresses = vec!["192.0.2.1".parse().unwrap()];
        Frontends(Arc::new(snapshot), Arc::default())
    }

    fn table() -> (Table<FakeServiceTable>, UnboundedReceiver<News>) {
        let (news, heard) = unbounded_channel();
        (Table::new(FakeServiceTable::new(), news), heard)
    }

    #[test]
    fn a_full_map_is_named_and_a_tampered_one_repaired() {
        let one = || wanted(&[("10.96.0.1", 6443)]);
        let (mut table, _news) = table();
        table.round(one(), false).unwrap();
        table.reconciler.table().tamper(|observed| observed.entries.clear());
        table.round(one(), true).unwrap();
        assert_eq!(table.reconciler.table().observe().unwrap().entries.len(), 1);
        assert_eq!(
            table.reconciler.table().node_addresses(),
            ["192.0.2.1".parse().unwrap()].into()
        );

        let (mut full, mut unheard) = self::table();
        full.reconciler.table().limit_slots(0);
        assert!(!full.round(one(), false).unwrap_err().is_empty());
        assert!(unheard.try_recv().is_err(), "not whole yet");
        full.reconciler.table().limit_slots(1);
        full.round(one(), false).unwrap();
        assert_eq!(unheard.try_recv().unwrap(), News::Begun);
        assert_eq!(
            full.reconciler.table().observe().unwrap().slots.len(),
            1,
            "a full round follows"
        );
    }

    #[test]
    fn a_change_costs_what_changed() {
        let (mut table, mut heard) = table();
        let first = [("10.96.0.1", 1), ("10.96.0.2", 1), ("10.96.0.4", 1)];
        table.round(wanted(&first), false).unwrap();
        let before = table.reconciler.table().steps();
        let then = [("10.96.0.1", 1), ("10.96.0.2", 2), ("10.96.0.3", 1)];
        table.round(wanted(&then), false).unwrap();
        // One backend replaced (3), one frontend made (3) and one removed (3).
        assert_eq!(table.reconciler.table().steps() - before, 9);
        assert_eq!(heard.try_recv().unwrap(), News::Begun);
        let News::Gone(gone) = heard.try_recv().unwrap() else { panic!("once is enough") };
        assert_eq!(gone.len(), 2, "of the changed one and of the removed one");
        let followed = table.reconciler.table().observe().unwrap();
        table.round(wanted(&then), true).unwrap();
        assert_eq!(table.reconciler.table().observe().unwrap(), followed, "nothing was missed");
    }
}
