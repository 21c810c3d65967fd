//! Which containers run here, for those who read logs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::core::v1::ContainerStatus;

use super::observed::{Observed, PodRef, State};

/// A container as readers of logs see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    /// It runs, or has run. `previous` is the run that its status shows as the last one that ended.
    Run { attempt: u32, previous: Option<u32>, running: bool },
    /// It has never been started; why.
    Waiting(String),
    /// The pod has no such container.
    NoContainer,
}

impl Found {
    /// What the runtime has of a container with this status.
    pub(crate) fn of(status: &ContainerStatus, observed: &Observed) -> Self {
        let mut started = observed.runs(&status.name).filter(|run| run.state != State::Created);
        let Some(run) = started.next() else {
            let waiting = status.state.as_ref().and_then(|s| s.waiting.as_ref());
            return Self::Waiting(waiting.and_then(|w| w.reason.clone()).unwrap_or_default());
        };
        let last = status.last_state.as_ref().and_then(|s| s.terminated.as_ref());
        let last = last.and_then(|ended| ended.container_id.as_deref());
        let last = last.and_then(|id| observed.instances.iter().find(|run| id.ends_with(&run.id)));
        Self::Run {
            attempt: run.attempt,
            previous: last.map(|run| run.attempt),
            running: run.is_running(),
        }
    }
}

/// The containers of a pod.
#[derive(Debug, Default)]
pub(crate) struct Containers {
    /// All, by name.
    pub(crate) found: BTreeMap<String, Found>,
    /// The names of those that have a terminal.
    pub(crate) terminals: BTreeSet<String>,
}

/// The containers of all pods.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    pods: Mutex<BTreeMap<PodRef, Containers>>,
}

impl Registry {
    fn pods(&self) -> MutexGuard<'_, BTreeMap<PodRef, Containers>> {
        // The map is replaced entry by entry: a panic elsewhere leaves it whole.
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes the containers of a pod.
    pub(crate) fn set(&self, pod: &PodRef, containers: Containers) {
        self.pods().insert(pod.clone(), containers);
    }

    /// Forgets a pod.
    pub(crate) fn remove(&self, pod: &PodRef) {
        self.pods().remove(pod);
    }

    /// A container by name. Of two pods of one name, one that runs comes first.
    pub(crate) fn find(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
    ) -> Option<(PodRef, Found)> {
        let pods = self.pods();
        let mut named = pods.iter().filter(|(p, _)| p.namespace == namespace && p.name == pod);
        let first = named.next()?;
        let runs = |(_, all): &(&PodRef, &Containers)| {
            all.found.values().any(|c| matches!(c, Found::Run { running: true, .. }))
        };
        let best = if runs(&first) { first } else { named.find(runs).unwrap_or(first) };
        let found = best.1.found.get(container).cloned().unwrap_or(Found::NoContainer);
        Some((best.0.clone(), found))
    }

    /// Whether a container has a terminal.
    pub(crate) fn has_terminal(&self, pod: &PodRef, container: &str) -> bool {
        self.pods().get(pod).is_some_and(|all| all.terminals.contains(container))
    }

    /// Whether that very run of a container still runs.
    pub(crate) fn is_running(&self, uid: &str, container: &str, attempt: u32) -> bool {
        let pods = self.pods();
        let all = pods.iter().find(|(pod, _)| pod.uid == uid).map(|(_, all)| all);
        let found = all.and_then(|all| all.found.get(container));
        matches!(found, Some(Found::Run { attempt: now, running: true, .. }) if *now == attempt)
    }
}
