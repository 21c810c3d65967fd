//! The pods of the node.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use mesh_model::Snapshot;

use super::{Concern, Failures};
use crate::board::Board;
use crate::observe::Desired;
use crate::pods::{Runner, RuntimeHealth};

/// Name of the runtime's line on the board.
pub(crate) const RUNTIME: &str = "runtime";
const HEALTH_INTERVAL: Duration = Duration::from_secs(5);
/// While the runtime is not ready, somebody waits for it.
const IMPATIENT_INTERVAL: Duration = Duration::from_millis(500);

/// Tells the runner which pods there should be; it works on its own time.
pub(crate) struct Pods(pub(crate) Arc<Runner>);

/// The snapshot, compared by its pods.
pub(crate) struct Work(Arc<Snapshot>);

impl PartialEq for Work {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0.pods == other.0.pods
    }
}

impl Concern for Pods {
    const NAME: &'static str = "pods";
    type Slice = Work;

    fn slice(&self, desired: &Desired) -> Option<Work> {
        Some(Work(Arc::clone(&desired.snapshot)))
    }

    async fn apply(&mut self, slice: &Work, _heal: bool) -> Result<(), Failures> {
        self.0.set_desired(slice.0.pods.iter().cloned());
        Ok(())
    }
}

/// Keeps the board informed about the container runtime, for ever.
pub(crate) async fn watch_runtime(
    runner: Arc<Runner>,
    board: Board,
    version: Arc<OnceLock<String>>,
) {
    loop {
        let health = runner.runtime_health().await;
        if !health.version.is_empty() {
            let _ = version.set(health.version.clone());
        }
        let failures = complaints(&health);
        let pause = if failures.is_empty() { HEALTH_INTERVAL } else { IMPATIENT_INTERVAL };
        if failures.is_empty() {
            board.done(RUNTIME);
        } else {
            board.failed(RUNTIME, failures);
        }
        tokio::time::sleep(pause).await;
    }
}

fn complaints(health: &RuntimeHealth) -> Failures {
    if health.runtime_ready && health.network_ready {
        return vec![];
    }
    let message = if health.message.is_empty() { "not ready" } else { health.message.as_str() };
    vec![message.to_owned()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_without_network_is_not_ready() {
        let mut health = RuntimeHealth {
            runtime_ready: true,
            network_ready: false,
            message: "NetworkReady: no CNI configuration".to_owned(),
            version: "containerd://1.6.20".to_owned(),
        };
        assert_eq!(complaints(&health), ["NetworkReady: no CNI configuration"]);
        health.network_ready = true;
        assert!(complaints(&health).is_empty());
    }
}
