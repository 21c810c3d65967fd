//! What the runner remembers of a pod beyond what the runtime shows. None of it is needed to adopt running
//! containers: a new agent starts with an empty memory.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;

use super::observed::Instance;
use super::outcome::Cause;
use super::restart::{Policy, after, retry_delay};

/// Why a start failed when the runtime has the container, but could not run it.
pub(crate) const RUN_FAILED: &str = "RunContainerError";

/// Something under way or failed; there is at most one of each at a time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Task {
    /// Writing the pod's volumes.
    Volumes,
    /// Making a sandbox.
    RunSandbox,
    /// Stopping that sandbox.
    StopSandbox(String),
    /// Deleting that sandbox.
    RemoveSandbox(String),
    /// Fetching, creating and starting the container of that name.
    Start(String),
    /// Stopping that run of a container.
    Stop(String),
    /// Stopping that run, which is being stopped, sooner.
    Hurry(String),
    /// Deleting that run of a container.
    RemoveContainer(String),
    /// Deleting the volumes of a pod that has ended.
    Free,
    /// Deleting what the pod has on disk.
    Clean,
    /// Telling the API that the pod is gone from here.
    Confirm,
}

/// A task failed; it is tried again later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// As Kubernetes calls it, such as `ErrImagePull`.
    pub(crate) reason: &'static str,
    /// For people.
    pub(crate) message: String,
    /// When it failed.
    pub(crate) at: Timestamp,
    /// When it is tried again.
    pub(crate) until: Timestamp,
    /// How often in a row.
    pub(crate) count: u32,
}

/// What the probes of a running container have found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Verdicts {
    /// The startup probe has passed, or there is none.
    pub(crate) started: bool,
    /// The readiness probe passes, or there is none.
    pub(crate) ready: bool,
    /// Why it must be restarted.
    pub(crate) dead: Option<String>,
}

/// State of the pod's files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Volumes {
    /// Grows with each change of what the files should be.
    pub(crate) wanted: u64,
    /// What was written last.
    pub(crate) written: Option<u64>,
    /// When tokens among them have to be renewed.
    pub(crate) renew_at: Option<Timestamp>,
}

/// See the module.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) busy: BTreeSet<Task>,
    pub(crate) failures: BTreeMap<Task, Failure>,
    pub(crate) volumes: Volumes,
    /// By identifier of the run.
    pub(crate) verdicts: BTreeMap<String, Verdicts>,
    /// When runs that are being stopped are killed, by identifier.
    pub(crate) killed_at: BTreeMap<String, Timestamp>,
    /// Runs that are stopped in order to run anew, by identifier. What they say at their end, such as that they have done their work,
    /// says only that they were stopped.
    pub(crate) renewed: BTreeSet<String>,
    /// Sandboxes that have given back their network.
    pub(crate) stopped: BTreeSet<String>,
    /// The volumes of the pod, which has ended, are gone.
    pub(crate) freed: bool,
    /// Why the node does not run the pod, or not any longer.
    pub(crate) ended_by: Option<Cause>,
    /// The pod's files are gone.
    pub(crate) cleaned: bool,
    /// The API was told that the pod is gone.
    pub(crate) confirmed: bool,
    /// When the pod's deletion was first seen.
    pub(crate) deleting_since: Option<Timestamp>,
    /// The endpoints that said first that it leaves.
    pub(crate) told: Option<u64>,
    /// From when on nobody sends to it any more.
    pub(crate) left_at: Option<Timestamp>,
}

impl Memory {
    /// Notes that a task failed and when it is tried again.
    pub(crate) fn fail(
        &mut self,
        task: Task,
        reason: &'static str,
        message: String,
        now: Timestamp,
    ) {
        let count = self.failures.get(&task).map_or(0, |f| f.count).saturating_add(1);
        let until = after(now, wait(&task, reason, count));
        self.failures.insert(task, Failure { reason, message, at: now, until, count });
    }

    /// Whether another run follows one that has ended.
    pub(crate) fn is_followed(&self, run: &Instance, policy: Policy) -> bool {
        let by_policy = run.exit().is_none_or(|exit| policy.restarts(exit.code));
        by_policy || self.renewed.contains(&run.id)
    }

    /// Why the start of that container failed last.
    pub(crate) fn start_failure(&self, name: &str) -> Option<&Failure> {
        self.failures.get(&Task::Start(name.to_owned()))
    }
}

fn wait(task: &Task, reason: &str, count: u32) -> Duration {
    match task {
        // The failed run itself is in the runtime, and its restart has a back-off of its own.
        Task::Start(_) if reason == RUN_FAILED => Duration::ZERO,
        Task::Start(_) => retry_delay(count),
        // What is missing may come with the next change of the API, and a token when it answers again.
        Task::Volumes => Duration::from_secs(1 << count.saturating_sub(1).min(6)),
        // The network of a node that just started comes up within seconds.
        Task::RunSandbox => Duration::from_secs(1 << count.min(5)),
        _ => Duration::from_secs(1 << count.min(6)),
    }
}
