//! What to do next for one pod: a pure function of the pod, of what the runtime has, and of the time.
//!
//! A plan holds only steps that may run at the same time. After each of them the pod is observed and planned
//! again, so no step needs to know what comes after it.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use mesh_model::containers::is_sidecar;
use mesh_model::snapshot::PodWork;

use super::container::spec_hash;
use super::memory::{Memory, Task};
use super::observed::{DEFAULT_GRACE_SECS, Instance, Observed, Sandbox, State};
use super::outcome::{Outcome, outcome};
use super::restart::{Fate, Policy, after, fate};

/// How long a deleted pod serves on at most, while other nodes have not confirmed that they send to it no more.
const LONGEST_DRAIN: Duration = Duration::from_secs(5);
/// How long it serves on once they have: what was sent to it just before is still on its way.
pub(crate) const SETTLE: Duration = Duration::from_millis(100);
/// How long containers of a lost sandbox are asked to stop.
const LOST_GRACE: Duration = Duration::from_secs(2);
/// How long containers of an evicted pod are asked to stop: what they use is needed.
const EVICTED_GRACE: Duration = Duration::from_secs(1);
/// What is left for the stop signal when others have used up the grace period.
pub(crate) const LEAST_GRACE: Duration = Duration::from_secs(2);
/// Less than this is not worth a second call.
const HASTE: Duration = Duration::from_secs(1);
/// After this time a failed pull is shown as a back-off.
pub(crate) const FRESH_FAILURE: Duration = Duration::from_secs(3);

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// Write the pod's volumes.
    PrepareVolumes,
    /// Make a sandbox.
    RunSandbox { attempt: u32 },
    /// End what runs in a sandbox and give back its network.
    StopSandbox { id: String },
    /// Delete a sandbox.
    RemoveSandbox { id: String },
    /// Fetch the image, create and start a container.
    Start { name: String, sandbox: String, attempt: u32, delay: Duration },
    /// Give up a start that is under way.
    CancelStart { name: String },
    /// Stop a run of a container; to `renew` it is to let another one follow, whatever its end says.
    Stop { id: String, name: String, grace: Duration, why: String, renew: bool },
    /// Give a run that is being stopped less time.
    Hurry { id: String, grace: Duration },
    /// Delete a run of a container that has ended.
    RemoveContainer { id: String },
    /// Delete the volumes of a pod that has ended.
    Free,
    /// Delete what the pod has on disk.
    Clean,
    /// Tell the API that nothing of the pod is left.
    Confirm,
}

impl Step {
    /// The task that the step is; cancelling has none.
    pub(crate) fn task(&self) -> Option<Task> {
        Some(match self {
            Self::PrepareVolumes => Task::Volumes,
            Self::RunSandbox { .. } => Task::RunSandbox,
            Self::StopSandbox { id } => Task::StopSandbox(id.clone()),
            Self::RemoveSandbox { id } => Task::RemoveSandbox(id.clone()),
            Self::Start { name, .. } => Task::Start(name.clone()),
            Self::Stop { id, .. } => Task::Stop(id.clone()),
            Self::Hurry { id, .. } => Task::Hurry(id.clone()),
            Self::RemoveContainer { id } => Task::RemoveContainer(id.clone()),
            Self::Free => Task::Free,
            Self::Clean => Task::Clean,
            Self::Confirm => Task::Confirm,
            Self::CancelStart { .. } => return None,
        })
    }
}

/// Steps to take now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) steps: Vec<Step>,
    /// When to plan again although nothing changed.
    pub(crate) wake_at: Option<Timestamp>,
    /// Nothing is left, and nothing is wanted.
    pub(crate) done: bool,
}

/// The next steps for a pod. `work` is absent for a pod that the API no longer knows.
pub(crate) fn plan(
    work: Option<&PodWork>,
    observed: &Observed,
    memory: &Memory,
    now: Timestamp,
) -> Plan {
    let mut planner = Planner { observed, memory, now, plan: Plan::default() };
    match work {
        None => planner.terminate(grace_of_orphan(observed), None, &[], false),
        Some(work) => planner.known(work),
    }
    planner.plan
}

/// Whether the pod is to be taken down.
pub(crate) fn is_deleting(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// How long the pod's containers are asked to stop.
pub(crate) fn grace_of(pod: &Pod) -> Duration {
    let deletion = pod.metadata.deletion_grace_period_seconds.filter(|_| is_deleting(pod));
    let spec = pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds);
    seconds(deletion.or(spec).unwrap_or(DEFAULT_GRACE_SECS))
}

fn grace_of_orphan(observed: &Observed) -> Duration {
    seconds(observed.sandboxes.iter().find_map(|s| s.grace_secs).unwrap_or(DEFAULT_GRACE_SECS))
}

fn seconds(value: i64) -> Duration {
    Duration::from_secs(u64::try_from(value).unwrap_or(0))
}

struct Planner<'a> {
    observed: &'a Observed,
    memory: &'a Memory,
    now: Timestamp,
    plan: Plan,
}

impl Planner<'_> {
    fn known(&mut self, work: &PodWork) {
        let Some(spec) = work.pod.spec.as_ref() else { return };
        let sidecars = sidecars(spec);
        if is_deleting(&work.pod) {
            let grace = grace_of(&work.pod);
            return match self.serves_until(grace) {
                Some(at) if self.now < at => {
                    self.cancel_starts();
                    self.wake(at);
                }
                served => {
                    let ends_at = served.map(|at| after(at, grace));
                    self.terminate(grace, ends_at, &sidecars, true);
                }
            };
        }
        match outcome(&work.pod, self.observed, self.memory, self.now) {
            Outcome::Open { deadline } => {
                if let Some(deadline) = deadline {
                    self.wake(deadline);
                }
                self.run(&work.pod, spec);
            }
            Outcome::Ended { .. } => {
                let grace = match &self.memory.ended_by {
                    Some(_) => EVICTED_GRACE.min(grace_of(&work.pod)),
                    None => grace_of(&work.pod),
                };
                self.rest(grace, &sidecars);
            }
        }
    }

    /// Until then a deleted pod serves on, because other nodes may still send to it. `None` when nothing of it runs.
    fn serves_until(&self, grace: Duration) -> Option<Timestamp> {
        let since = self.memory.deleting_since?;
        let runs = self.observed.instances.iter().any(is_alive);
        let bound = after(since, LONGEST_DRAIN.min(grace / 2));
        runs.then(|| self.memory.left_at.map_or(bound, |left| left.min(bound)))
    }

    /// A pod that has done its work keeps its containers, for their logs, and gives back its network and its volumes.
    fn rest(&mut self, grace: Duration, sidecars: &[&str]) {
        self.cancel_starts();
        let busy = |task| self.memory.busy.contains(&task);
        // Also sandboxes that are not ready: after a reboot their network is still held.
        if self.stop_all(grace, None, sidecars, "the pod has ended", false)
            && self.stop_sandboxes(|_| true)
            && !self.memory.freed
            && !busy(Task::Volumes)
        {
            self.push(Step::Free);
        }
    }

    fn terminate(
        &mut self,
        grace: Duration,
        ends_at: Option<Timestamp>,
        sidecars: &[&str],
        known: bool,
    ) {
        self.cancel_starts();
        if self.memory.busy.contains(&Task::RunSandbox) || self.memory.busy.contains(&Task::Volumes)
        {
            return;
        }
        if !self.stop_all(grace, ends_at, sidecars, "", false) {
            return;
        }
        if !self.observed.is_empty() {
            self.stop_sandboxes(|_| true);
            self.remove_stopped_sandboxes();
            self.remove_strays();
        } else if !self.memory.cleaned {
            self.push(Step::Clean);
        } else if known && !self.memory.confirmed {
            self.push(Step::Confirm);
        } else if !known {
            self.plan.done = true;
        }
    }

    fn cancel_starts(&mut self) {
        for task in &self.memory.busy {
            if let Task::Start(name) = task {
                self.plan.steps.push(Step::CancelStart { name: name.clone() });
            }
        }
    }

    /// Stops what runs, sidecars after all others and the last one first, in what is left until `ends_at`: the grace period is one
    /// for the whole pod. True when nothing runs.
    fn stop_all(
        &mut self,
        grace: Duration,
        ends_at: Option<Timestamp>,
        sidecars: &[&str],
        why: &str,
        renew: bool,
    ) -> bool {
        let alive: Vec<&Instance> =
            self.observed.instances.iter().filter(|i| is_alive(i)).collect();
        let rank = |i: &Instance| sidecars.iter().position(|s| *s == i.name).map_or(0, |p| p + 1);
        // Ordinary containers have rank 0 and go first; then the sidecar with the highest rank.
        let first = if alive.iter().any(|i| rank(i) == 0) {
            Some(0)
        } else {
            alive.iter().map(|i| rank(i)).max()
        };
        let grace = match ends_at {
            Some(at) if first != Some(0) => self.left(at).max(LEAST_GRACE.min(grace)),
            _ => grace,
        };
        for run in alive.iter().filter(|i| Some(rank(i)) == first) {
            let why = if why.is_empty() {
                format!("Stopping container {}", run.name)
            } else {
                format!("Stopping container {}: {why}", run.name)
            };
            self.hurry(&run.id, grace);
            let (id, name) = (run.id.clone(), run.name.clone());
            self.push(Step::Stop { id, name, grace, why, renew });
        }
        alive.is_empty()
    }

    fn left(&self, until: Timestamp) -> Duration {
        Duration::try_from(until.duration_since(self.now)).unwrap_or_default()
    }

    /// Somebody wants the pod to end sooner than when its containers were asked to stop: a second deletion, or an eviction.
    fn hurry(&mut self, run: &str, grace: Duration) {
        let sooner = |at: &Timestamp| after(self.now, grace + HASTE) < *at;
        if self.memory.busy.contains(&Task::Stop(run.to_owned()))
            && self.memory.killed_at.get(run).is_some_and(sooner)
        {
            self.push(Step::Hurry { id: run.to_owned(), grace });
        }
    }

    fn stop_sandboxes(&mut self, which: impl Fn(&Sandbox) -> bool) -> bool {
        let mut all = true;
        for sandbox in self.observed.sandboxes.iter().filter(|s| which(s)) {
            if !self.memory.stopped.contains(&sandbox.id) || sandbox.ready {
                all = false;
                self.push(Step::StopSandbox { id: sandbox.id.clone() });
            }
        }
        all
    }

    fn remove_stopped_sandboxes(&mut self) {
        for sandbox in &self.observed.sandboxes {
            if self.memory.stopped.contains(&sandbox.id) && !sandbox.ready {
                self.push(Step::RemoveSandbox { id: sandbox.id.clone() });
            }
        }
    }

    /// Containers whose sandbox is gone: the runtime does not delete them with it.
    fn remove_strays(&mut self) {
        for run in &self.observed.instances {
            if !self.observed.sandboxes.iter().any(|s| s.id == run.sandbox) {
                self.push(Step::RemoveContainer { id: run.id.clone() });
            }
        }
    }

    fn run(&mut self, pod: &Pod, spec: &PodSpec) {
        let volumes = &self.memory.volumes;
        match volumes.renew_at {
            _ if volumes.written != Some(volumes.wanted) => self.push(Step::PrepareVolumes),
            Some(at) if at <= self.now => self.push(Step::PrepareVolumes),
            Some(at) => self.wake(at),
            None => {}
        }
        let Some(sandbox) = self.observed.sandbox() else { return self.replace_sandbox(spec) };
        let current = sandbox.id.as_str();
        self.stop_sandboxes(|s| s.ready && s.id != current);
        for added in spec.ephemeral_containers.iter().flatten() {
            self.look_into(&added.name, current);
        }
        if self.initialize(pod, spec, current) {
            for container in &spec.containers {
                self.container(container, Policy::of(spec), current, grace_of(pod));
            }
        }
        self.collect_garbage(current);
    }

    /// Runs an ephemeral container: once, whatever becomes of it, and whatever the others do.
    fn look_into(&mut self, name: &str, sandbox: &str) {
        let Some(run) = self.observed.newest(name) else {
            return self.start(name, sandbox, 0, Duration::ZERO);
        };
        match run.state {
            State::Created if !self.memory.busy.contains(&Task::Start(name.to_owned())) => {
                self.push(Step::RemoveContainer { id: run.id.clone() });
            }
            State::Running { .. } | State::Unknown if run.sandbox != sandbox => {
                let why = format!("Container {name} is in an old sandbox");
                let (id, name) = (run.id.clone(), name.to_owned());
                self.push(Step::Stop { id, name, grace: LOST_GRACE, why, renew: false });
            }
            _ => {}
        }
    }

    /// There is no sandbox that works: what is left of an old one is ended first.
    fn replace_sandbox(&mut self, spec: &PodSpec) {
        // Whatever ran there was not done.
        let renew = Policy::of(spec) != Policy::Never;
        if !self.stop_all(LOST_GRACE, None, &[], "its sandbox is gone", renew)
            || !self.stop_sandboxes(|_| true)
        {
            return;
        }
        if self.memory.volumes.written.is_some() {
            let last = self.observed.sandboxes.iter().map(|s| s.attempt).max();
            // A failed attempt may have left its name behind.
            let failed = self.memory.failures.get(&Task::RunSandbox).map_or(0, |f| f.count);
            let attempt = last.map_or(0, |a| a + 1).saturating_add(failed);
            self.push(Step::RunSandbox { attempt });
        }
    }

    /// Runs init containers one after the other. True when the ordinary ones may run.
    fn initialize(&mut self, pod: &Pod, spec: &PodSpec, sandbox: &str) -> bool {
        let begun =
            spec.containers.iter().any(|c| self.observed.newest_in(&c.name, sandbox).is_some());
        for init in spec.init_containers.iter().flatten() {
            if is_sidecar(init) {
                self.container(init, Policy::Always, sandbox, grace_of(pod));
                if !begun && !self.is_started(init, sandbox) {
                    return false;
                }
            } else if !begun && !self.init_is_done(init, spec, sandbox, grace_of(pod)) {
                return false;
            }
        }
        true
    }

    fn init_is_done(
        &mut self,
        init: &Container,
        spec: &PodSpec,
        sandbox: &str,
        grace: Duration,
    ) -> bool {
        match self.observed.newest(&init.name) {
            Some(run) if run.sandbox == sandbox && run.exit().is_some_and(|e| e.code == 0) => true,
            // Another image is for its next run, if it needs one.
            Some(run) if run.sandbox == sandbox && run.is_running() => false,
            // A new sandbox is a new start: files of the old one may be gone.
            Some(run) if run.sandbox != sandbox && !is_alive(run) => {
                self.start(&init.name, sandbox, run.attempt + 1, Duration::ZERO);
                false
            }
            _ => {
                self.container(init, Policy::of_init(spec), sandbox, grace);
                false
            }
        }
    }

    fn is_started(&self, container: &Container, sandbox: &str) -> bool {
        self.observed.newest_in(&container.name, sandbox).is_some_and(|run| {
            run.is_running() && self.memory.verdicts.get(&run.id).is_some_and(|v| v.started)
        })
    }

    /// Keeps one container as its policy says.
    fn container(&mut self, wanted: &Container, policy: Policy, sandbox: &str, grace: Duration) {
        let name = wanted.name.as_str();
        let Some(run) = self.observed.newest(name) else {
            return self.start(name, sandbox, 0, Duration::ZERO);
        };
        let stop = |grace, why: String, renew| Step::Stop {
            id: run.id.clone(),
            name: name.to_owned(),
            grace,
            why,
            renew,
        };
        let again = policy != Policy::Never;
        match &run.state {
            State::Created => {
                if !self.memory.busy.contains(&Task::Start(name.to_owned())) {
                    self.push(Step::RemoveContainer { id: run.id.clone() });
                }
            }
            State::Unknown => {
                let why = format!("Container {name} is in an unknown state");
                self.push(stop(LOST_GRACE, why, again));
            }
            State::Running { .. } if run.sandbox != sandbox => {
                let why = format!("Container {name} is in an old sandbox");
                self.push(stop(LOST_GRACE, why, again));
            }
            State::Running { .. } => {
                let verdicts = self.memory.verdicts.get(&run.id);
                let dead = verdicts.and_then(|v| Some((v.dead.clone()?, v.started)));
                if run.hash != spec_hash(wanted) {
                    let why = format!("Container {name} definition changed, will be restarted");
                    // Its policy is about its ends, and this one is not its own.
                    self.push(stop(grace, why, true));
                } else if let Some((why, started)) = dead {
                    let grace = grace_of_probe(wanted, started).unwrap_or(grace);
                    self.push(stop(grace, why, again));
                }
            }
            State::Exited(_) if run.sandbox != sandbox => {
                if self.memory.is_followed(run, policy) {
                    self.start(name, sandbox, run.attempt + 1, Duration::ZERO);
                }
            }
            State::Exited(_) => match fate(run, policy, wanted, self.memory) {
                Fate::Restart { at, delay } if at <= self.now => {
                    self.start(name, sandbox, run.attempt + 1, delay);
                }
                Fate::Restart { at, .. } => self.wake(at),
                Fate::Final => {}
            },
        }
    }

    fn start(&mut self, name: &str, sandbox: &str, attempt: u32, delay: Duration) {
        if self.memory.volumes.written.is_none() {
            return;
        }
        if let Some(failure) = self.memory.start_failure(name) {
            let turns = after(failure.at, FRESH_FAILURE);
            if turns > self.now {
                self.wake(turns);
            }
        }
        let (name, sandbox) = (name.to_owned(), sandbox.to_owned());
        self.push(Step::Start { name, sandbox, attempt, delay });
    }

    /// Keeps the newest run of each container and the last one that ended before it.
    fn collect_garbage(&mut self, current: &str) {
        let observed = self.observed;
        for run in observed.instances.iter().filter(|i| i.exit().is_some()) {
            let newer = observed.runs(&run.name).take_while(|other| other.id != run.id);
            if newer.skip(1).any(|other| other.exit().is_some()) {
                self.push(Step::RemoveContainer { id: run.id.clone() });
            }
        }
        for sandbox in observed.sandboxes.iter().filter(|s| !s.ready && s.id != current) {
            if observed.instances.iter().any(|i| i.sandbox == sandbox.id) {
                continue;
            }
            // The runtime refuses to delete a sandbox whose network it still holds.
            let id = sandbox.id.clone();
            let stopped = self.memory.stopped.contains(&id);
            self.push(if stopped { Step::RemoveSandbox { id } } else { Step::StopSandbox { id } });
        }
    }

    /// Adds a step unless it is under way or waits after a failure.
    fn push(&mut self, step: Step) {
        let Some(task) = step.task() else { return self.plan.steps.push(step) };
        if self.memory.busy.contains(&task) {
            return;
        }
        match self.memory.failures.get(&task) {
            Some(failure) if failure.until > self.now => self.wake(failure.until),
            _ if self.plan.steps.contains(&step) => {}
            _ => self.plan.steps.push(step),
        }
    }

    fn wake(&mut self, at: Timestamp) {
        self.plan.wake_at = Some(self.plan.wake_at.map_or(at, |earlier| earlier.min(at)));
    }
}

fn is_alive(run: &Instance) -> bool {
    matches!(run.state, State::Running { .. } | State::Unknown)
}

fn sidecars(spec: &PodSpec) -> Vec<&str> {
    let all = spec.init_containers.iter().flatten();
    all.filter(|c| is_sidecar(c)).map(|c| c.name.as_str()).collect()
}

/// What the probe that found the container dead leaves it: until it has started, that is the startup probe.
fn grace_of_probe(container: &Container, started: bool) -> Option<Duration> {
    let probe = if started { &container.liveness_probe } else { &container.startup_probe };
    probe.as_ref()?.termination_grace_period_seconds.map(seconds)
}

#[cfg(test)]
mod tests;
