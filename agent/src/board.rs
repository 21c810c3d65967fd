//! How the concerns of the node are doing: written by those who drive them, read by status and readiness.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_model::ObjectKey;
use tokio::sync::watch;

/// The state of one concern.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Standing {
    /// Whether it has ever been as desired since the agent started.
    pub(crate) ever: bool,
    /// What failed in the last round.
    pub(crate) failures: Vec<String>,
    /// The revision of the endpoints that it follows from, where it follows from any.
    pub(crate) revision: Option<u64>,
    /// What has no room in its maps, once it has looked.
    pub(crate) full: Option<FullMaps>,
}

/// Maps that are full, by name, and what they have no room for.
pub(crate) type FullMaps = BTreeMap<&'static str, Lacking>;

/// What lacks something in a map.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Lacking {
    pub(crate) services: BTreeSet<ObjectKey>,
    pub(crate) policies: BTreeSet<ObjectKey>,
}

/// All concerns; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Board(Arc<watch::Sender<BTreeMap<&'static str, Standing>>>);

impl Default for Board {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(BTreeMap::new())))
    }
}

impl Board {
    /// The concern is as desired.
    pub(crate) fn done(&self, concern: &'static str) {
        let standing = self.standing(concern);
        self.set(concern, Standing { ever: true, failures: vec![], ..standing });
    }

    /// The concern is as the endpoints of this revision want it.
    pub(crate) fn stands_at(&self, concern: &'static str, revision: u64) {
        let standing = self.standing(concern);
        self.set(concern, Standing { revision: Some(revision), ..standing });
    }

    /// The newest endpoints that all of these concerns follow, as far as they are at work here.
    pub(crate) fn programmed(&self, concerns: &[&str]) -> u64 {
        let board = self.0.borrow();
        let known = concerns.iter().filter_map(|concern| board.get(concern)?.revision);
        known.min().unwrap_or(0)
    }

    /// The concern is not as desired.
    pub(crate) fn failed(&self, concern: &'static str, failures: Vec<String>) {
        let standing = self.standing(concern);
        self.set(concern, Standing { failures, ..standing });
    }

    /// The concern has found these maps full, and no others.
    pub(crate) fn found_full(&self, concern: &'static str, full: FullMaps) {
        let standing = self.standing(concern);
        self.set(concern, Standing { full: Some(full), ..standing });
    }

    /// How a concern is doing.
    pub(crate) fn standing(&self, concern: &'static str) -> Standing {
        self.0.borrow().get(concern).cloned().unwrap_or_default()
    }

    /// All failures, one line each.
    pub(crate) fn failures(&self) -> Vec<String> {
        let board = self.0.borrow();
        let lines = board.iter().flat_map(|(concern, standing)| {
            let full = standing.full.iter().flatten();
            let full = full.map(|(map, lacking)| {
                let (services, policies) = (lacking.services.len(), lacking.policies.len());
                format!(
                    "map {map} is full: {services} services and {policies} policies lack something"
                )
            });
            let all = standing.failures.iter().cloned().chain(full);
            all.map(move |failure| format!("{concern}: {failure}"))
        });
        lines.collect()
    }

    /// Tells when something changes.
    pub(crate) fn subscribe(&self) -> watch::Receiver<BTreeMap<&'static str, Standing>> {
        self.0.subscribe()
    }

    fn set(&self, concern: &'static str, standing: Standing) {
        self.0.send_if_modified(|board| {
            let changed = board.get(concern) != Some(&standing);
            if changed {
                board.insert(concern, standing);
            }
            changed
        });
    }
}
