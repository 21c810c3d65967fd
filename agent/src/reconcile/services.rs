//! Service frontends and backends in the maps of the socket hooks.

use std::sync::{Arc, Mutex, PoisonError};

use mesh_kernel::bpf::MapError;
use mesh_kernel::services::{
    FrontendKey, Gone, Outcome, ServiceReconciler, ServiceTable, StepError, Unfit,
};
use mesh_model::Snapshot;
use mesh_model::snapshot::Frontend;
use tokio::sync::mpsc::UnboundedSender;

use super::{Concern, Failures};
use crate::board::{Board, FullMaps};
use crate::differences::{self, Differences};
use crate::errors::chain;
use crate::observe::Desired;
use crate::paths::outlook::Outlook;

const NAME: &str = "services";
/// Most failures that a report names.
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
    /// `news` hears of backends that are gone, and `board` of what there is no room for.
    pub(crate) fn new(table: T, news: UnboundedSender<News>, board: Board) -> Self {
        Self { table: Arc::new(Mutex::new(Table::new(table, news, board))) }
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
    const NAME: &'static str = NAME;
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
    board: Board,
}

impl<T: ServiceTable> Table<T> {
    fn new(table: T, news: UnboundedSender<News>, board: Board) -> Self {
        let reconciler = ServiceReconciler::new(table);
        Self { reconciler, done: None, begun: false, news, board }
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
        let changes = match done.filter(|done| !heal && done.1.away == outlook.away) {
            Some(done) if done.0.peers == snapshot.peers => {
                let Differences { gone, put } =
                    differences::of_lists(&done.0.frontends, &snapshot.frontends, key);
                let put: Vec<&Frontend> = put.into_iter().map(|frontend| &**frontend).collect();
                Some(self.reconciler.reconcile_changes(&outlook.narrow(snapshot, &put), &gone))
            }
            _ => None,
        };
        let outcome = match changes {
            Some(outcome) if outcome.unfit.is_empty() => outcome,
            // Who lacks room is known only when all are looked at.
            incomplete => {
                let all = outlook.frontends(snapshot);
                let whole = self.reconciler.reconcile(&all).map_err(|error| failed(&error))?;
                after(incomplete.unwrap_or_default(), whole)
            }
        };
        self.board.found_full(NAME, full(&outcome, &nodes));
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
        // The rest is as it should be, and nothing is listed that is not wanted. What lacks room is tried again with the next change.
        if !outcome.unfit.is_empty() {
            return Ok(());
        }
        self.done = Some(wanted);
        if !std::mem::replace(&mut self.begun, true) {
            let _ = self.news.send(News::Begun);
        }
        Ok(())
    }
}

/// What came of two rounds, the second of which looked at everything.
fn after(first: Outcome, mut second: Outcome) -> Outcome {
    second.operations += first.operations;
    second.gone.splice(0..0, first.gone);
    second
}

/// The maps that lack room, and for which Services.
fn full(outcome: &Outcome, nodes: &Result<usize, MapError>) -> FullMaps {
    let mut full = FullMaps::new();
    for Unfit { service, map, .. } in &outcome.unfit {
        full.entry(*map).or_default().services.insert(service.clone());
    }
    let failed = outcome.failed.iter().filter_map(|(_, error)| match error {
        StepError::Map(error) => Some(error),
        StepError::Skipped => None,
    });
    for map in failed.chain(nodes.as_ref().err()).filter_map(MapError::full) {
        full.entry(map).or_default();
    }
    full
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
    use mesh_model::{ObjectKey, Objects, compile};
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
        (Table::new(FakeServiceTable::new(), news, Board::default()), heard)
    }

    #[test]
    fn a_service_without_room_is_named_until_it_has_room() {
        let two = || wanted(&[("10.96.0.1", 6443), ("10.96.0.2", 6443)]);
        let (mut table, mut heard) = table();
        table.reconciler.table().limit_slots(1);
        let full = |table: &Table<FakeServiceTable>| table.board.standing(NAME).full.unwrap();
        table.round(two(), false).unwrap();
        let service = ObjectKey::new("default", "kubernetes");
        assert_eq!(full(&table)["SLOTS"].services, [service].into());
        assert!(table.board.failures()[0].starts_with("services: map SLOTS is full: 1 services"));
        assert!(heard.try_recv().is_err(), "not whole yet");
        // What else changes is programmed all the same, and what is gone makes room.
        table.round(wanted(&[("10.96.0.2", 6443)]), false).unwrap();
        assert!(full(&table).is_empty());
        assert!(matches!(heard.try_recv().unwrap(), News::Gone(_)));
        assert_eq!(heard.try_recv().unwrap(), News::Begun);
        assert_eq!(table.reconciler.table().observe().unwrap().slots.len(), 1);
        table.round(two(), false).unwrap();
        assert_eq!(full(&table).len(), 1, "a change that does not fit is named, too");
        table.reconciler.table().limit_slots(2);
        table.round(two(), false).unwrap();
        assert!(full(&table).is_empty());
    }

    #[test]
    fn a_tampered_map_is_repaired() {
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
