//! How the concerns of the node are doing: written by those who drive them, read by status and readiness.

use std::collections::BTreeMap;
use std::sync::Arc;

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
        let revision = self.standing(concern).revision;
        self.set(concern, Standing { ever: true, failures: vec![], revision });
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

    /// How a concern is doing.
    pub(crate) fn standing(&self, concern: &'static str) -> Standing {
        self.0.borrow().get(concern).cloned().unwrap_or_default()
    }

    /// All failures, one line each.
    pub(crate) fn failures(&self) -> Vec<String> {
        let board = self.0.borrow();
        let lines = board.iter().flat_map(|(concern, standing)| {
            standing.failures.iter().map(move |failure| format!("{concern}: {failure}"))
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
