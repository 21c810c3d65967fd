//! Whether a pod has ended, and how.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use mesh_model::containers::is_sidecar;

use super::memory::Memory;
use super::observed::{Instance, Observed};
use super::restart::{Policy, after};

/// See [`outcome`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Its containers run, or will run; at the deadline it ends.
    Open { deadline: Option<Timestamp> },
    /// It never runs again.
    Ended { succeeded: bool, cause: Option<Cause> },
}

/// Why a pod ended that its containers did not end themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cause {
    /// As Kubernetes calls it.
    pub(crate) reason: &'static str,
    /// For people.
    pub(crate) message: String,
}

const EVICTED: &str = "Evicted";

impl Cause {
    /// The node could not keep it.
    pub(crate) fn evicted(why: String) -> Self {
        Self { reason: EVICTED, message: why }
    }

    pub(crate) fn is_eviction(&self) -> bool {
        self.reason == EVICTED
    }

    /// The node does not run what asks for this.
    pub(crate) fn rejected(reason: &'static str, why: &str) -> Self {
        Self { reason, message: format!("Pod was rejected: {why}") }
    }
}

/// The pod's outcome. What was reported once stays, whatever the runtime still has.
pub(crate) fn outcome(pod: &Pod, observed: &Observed, memory: &Memory, now: Timestamp) -> Outcome {
    let ended = |succeeded| Outcome::Ended { succeeded, cause: None };
    let failed = |cause: Cause| Outcome::Ended { succeeded: false, cause: Some(cause) };
    match pod.status.as_ref().and_then(|s| s.phase.as_deref()) {
        Some("Succeeded") => return ended(true),
        Some("Failed") => return ended(false),
        _ => {}
    }
    if let Some(cause) = &memory.ended_by {
        return failed(cause.clone());
    }
    let Some(spec) = pod.spec.as_ref() else { return Outcome::Open { deadline: None } };
    let deadline = deadline(pod, spec);
    if deadline.is_some_and(|at| at <= now) {
        let message = "Pod was active on the node longer than the specified deadline".to_owned();
        return failed(Cause { reason: "DeadlineExceeded", message });
    }
    match of_containers(spec, observed, memory) {
        Some(succeeded) => ended(succeeded),
        None => Outcome::Open { deadline },
    }
}

fn deadline(pod: &Pod, spec: &PodSpec) -> Option<Timestamp> {
    let start = pod.status.as_ref()?.start_time.as_ref()?.0;
    let limit = u64::try_from(spec.active_deadline_seconds?).ok()?;
    Some(after(start, Duration::from_secs(limit)))
}

fn of_containers(spec: &PodSpec, observed: &Observed, memory: &Memory) -> Option<bool> {
    let inits = spec.init_containers.iter().flatten().filter(|c| !is_sidecar(c));
    for init in inits {
        let code = observed.newest(&init.name).and_then(Instance::exit).map(|e| e.code);
        if code.is_some_and(|code| code != 0 && !Policy::of_init(spec).restarts(code)) {
            return Some(false);
        }
    }
    let policy = Policy::of(spec);
    let mut succeeded = true;
    for container in &spec.containers {
        let run = observed.newest(&container.name)?;
        let code = run.exit()?.code;
        if memory.is_followed(run, policy) {
            return None;
        }
        succeeded &= code == 0;
    }
    Some(succeeded)
}
