//! A service table in memory, for tests of those who use it.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Applied, Observed, Plan, Room, ServiceTable, Step};
use crate::bpf::MapError;

/// A [`ServiceTable`] without a kernel. All clones are one table.
#[derive(Debug, Clone, Default)]
pub struct FakeServiceTable {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    observed: Observed,
    nodes: BTreeSet<IpAddr>,
    capacity: Option<usize>,
    steps: usize,
}

impl FakeServiceTable {
    /// An empty table.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets no more than so many slots in, as a full map does.
    pub fn limit_slots(&self, capacity: usize) {
        self.lock().capacity = Some(capacity);
    }

    /// Changes the table behind the user's back.
    pub fn tamper(&self, change: impl FnOnce(&mut Observed)) {
        change(&mut self.lock().observed);
    }

    /// Addresses by which a node port of any node is meant.
    pub fn node_addresses(&self) -> BTreeSet<IpAddr> {
        self.lock().nodes.clone()
    }

    /// Number of steps carried out so far.
    pub fn steps(&self) -> usize {
        self.lock().steps
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ServiceTable for FakeServiceTable {
    fn room(&self) -> Room {
        Room { slots: self.lock().capacity.unwrap_or(usize::MAX), ..Room::UNLIMITED }
    }

    fn observe(&self) -> Result<Observed, MapError> {
        Ok(self.lock().observed.clone())
    }

    fn set_node_addresses(&self, addresses: &BTreeSet<IpAddr>) -> Result<usize, MapError> {
        let mut state = self.lock();
        let operations = state.nodes.symmetric_difference(addresses).count();
        state.nodes.clone_from(addresses);
        Ok(operations)
    }

    fn reached_by(&self, _cookie: u64, _backend: SocketAddr) -> Option<SocketAddr> {
        None
    }

    fn apply(&self, plan: &Plan) -> Applied {
        let mut state = self.lock();
        super::apply_each(&plan.steps, |step| {
            let full = matches!(step, Step::PutSlot { service, slot, .. }
                if !state.observed.slots.contains_key(&(*service, *slot))
                    && state.capacity.is_some_and(|c| state.observed.slots.len() >= c));
            if full {
                return Err(MapError::Full { map: mesh_abi::maps::SLOTS }.into());
            }
            state.observed.apply(step);
            state.steps += 1;
            Ok(())
        })
    }
}
