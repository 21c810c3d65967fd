//! Policy tables in memory, for tests of those who use them.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{PolicyTable, Step, Tables};
use crate::bpf::MapError;

/// A [`PolicyTable`] without a kernel.
#[derive(Debug, Default)]
pub struct FakePolicyTable {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    tables: Tables,
    steps: Vec<Step>,
    most_rules: Option<usize>,
}

impl FakePolicyTable {
    /// Empty tables.
    pub fn new() -> Self {
        Self::default()
    }

    /// What the tables hold.
    pub fn tables(&self) -> Tables {
        self.lock().tables.clone()
    }

    /// The steps since the last call.
    pub fn steps(&self) -> Vec<Step> {
        std::mem::take(&mut self.lock().steps)
    }

    /// Lets new rules fail from this many on, as a full map does.
    pub fn limit_rules(&self, most: usize) {
        self.lock().most_rules = Some(most);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PolicyTable for FakePolicyTable {
    fn observe(&self) -> Result<Tables, MapError> {
        Ok(self.tables())
    }

    fn apply(&self, step: &Step) -> Result<(), MapError> {
        let mut state = self.lock();
        let full = state.most_rules.is_some_and(|most| state.tables.rules.len() >= most);
        if full && matches!(step, Step::PutRule(..)) {
            return Err(MapError::Full { map: mesh_abi::maps::POLICY_RULES });
        }
        state.tables.apply(step);
        state.steps.push(*step);
        Ok(())
    }
}
