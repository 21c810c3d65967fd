//! Stopping a container: hook first, then the stop signal, then the kill, all within one grace period.

use std::time::{Duration, Instant};

use super::{Job, OpError};
use crate::pods::plan::LEAST_GRACE;
use crate::pods::probes::action::{Action, Trouble};

impl Job {
    pub(super) async fn stop(
        &self,
        id: &str,
        name: &str,
        grace: Duration,
        why: &str,
    ) -> Result<(), OpError> {
        self.event(false, name, "Killing", why.to_owned());
        tracing::info!(pod = %self.pod, container = name, grace_secs = grace.as_secs(), why, "stopping container");
        let begun = Instant::now();
        if !grace.is_zero() {
            self.pre_stop(id, name, grace).await;
        }
        let left = grace.saturating_sub(begun.elapsed());
        self.context
            .client
            .stop_container(id, left.max(LEAST_GRACE.min(grace)))
            .await
            .map_err(|error| OpError::new("FailedKill", error))
    }

    async fn pre_stop(&self, id: &str, name: &str, grace: Duration) {
        let Ok(container) = self.container(name) else { return };
        let hook = container.lifecycle.as_ref().and_then(|l| l.pre_stop.as_ref());
        let Some(hook) = hook else { return };
        let result = match Action::of_hook(hook, &container, self.pod_ips.first().copied()) {
            Ok(action) => action.run(&self.context.client, id, grace).await,
            Err(why) => Err(Trouble::Failed(why)),
        };
        if let Err(why) = result {
            self.event(true, name, "FailedPreStopHook", format!("PreStopHook failed: {why}"));
        }
    }
}
