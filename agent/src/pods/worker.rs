//! One task per pod: observe, plan, report, act, wait; again.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, PodStatus};
use mesh_model::snapshot::{Departure, PodWork};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{AbortHandle, Id, JoinSet};

use super::evict::Evictions;
use super::memory::{Memory, Task, Verdicts};
use super::observe::{observe, pod_ips};
use super::observed::{Instance, Observed, PodRef, State};
use super::ops::{Context, Job, OpError, field_of, find_container};
use super::outcome::Cause;
use super::plan::{Plan, SETTLE, Step, is_deleting, plan};
use super::probes::{Finding, Kind, Probers, Subject};
use super::registry::{Containers, Found};
use super::report::PodEvent;
use super::restart::{Fate, Policy, fate};
use super::statics::shown_as;
use super::status::View;

/// How long to wait before looking again when the runtime does not answer.
const RUNTIME_RETRY: Duration = Duration::from_secs(1);
/// The API's copy is compared with what was reported this long after the report.
const SETTLED: Duration = Duration::from_secs(15);

/// What is wanted of a pod.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Wanted {
    /// It is as the API says; it may be deleting.
    Known(Arc<PodWork>),
    /// The API does not know it: nothing of it may stay.
    Gone,
}

pub(crate) struct Worker {
    context: Arc<Context>,
    pod: PodRef,
    wanted: watch::Receiver<Wanted>,
    changed: Arc<Notify>,
    evictions: watch::Receiver<Evictions>,
    /// What the other nodes have confirmed.
    confirmed: watch::Receiver<u64>,
    /// The pod as it was known last.
    work: Option<Arc<PodWork>>,
    observed: Observed,
    memory: Memory,
    probers: Probers,
    findings: mpsc::Receiver<Finding>,
    tasks: JoinSet<Result<(), OpError>>,
    under_way: HashMap<Id, (Task, AbortHandle)>,
    /// The version of the volumes that is being written.
    volumes_begun: u64,
    reported: PodStatus,
    reported_at: Timestamp,
    /// Another object of the API shows the pod now, and has not been told anything yet.
    untold: bool,
    /// Runs whose back-off was announced.
    announced: std::collections::BTreeSet<String>,
    /// The last status was sent: what follows is only tearing down.
    frozen: bool,
}

impl Worker {
    pub(crate) fn new(
        context: Arc<Context>,
        pod: PodRef,
        wanted: watch::Receiver<Wanted>,
        changed: Arc<Notify>,
    ) -> Self {
        let (sender, findings) = mpsc::channel(64);
        let probers = Probers::new(context.client.clone(), sender);
        let evictions = context.evictions.subscribe();
        Self {
            confirmed: context.drain.confirmations(),
            context,
            pod,
            wanted,
            changed,
            evictions,
            work: None,
            observed: Observed::default(),
            memory: Memory::default(),
            probers,
            findings,
            tasks: JoinSet::new(),
            under_way: HashMap::new(),
            volumes_begun: 0,
            reported: PodStatus::default(),
            reported_at: Timestamp::MIN,
            untold: false,
            announced: std::collections::BTreeSet::new(),
            frozen: false,
        }
    }

    /// Works until nothing of the pod is left and nothing is wanted, or until it is cancelled. Cancelling leaves all
    /// containers as they are.
    pub(crate) async fn run(mut self) {
        loop {
            let wanted = self.wanted.borrow_and_update().clone();
            let known = match wanted {
                Wanted::Known(work) => {
                    self.take(work);
                    true
                }
                Wanted::Gone => false,
            };
            let plan = match self.look().await {
                Ok(()) => self.decide(known),
                Err(error) => {
                    tracing::debug!(pod = %self.pod, %error, "pod not observed, will retry");
                    let later = super::restart::after(Timestamp::now(), RUNTIME_RETRY);
                    Plan { wake_at: Some(later), ..Plan::default() }
                }
            };
            if plan.done {
                break;
            }
            for step in plan.steps {
                self.launch(step);
            }
            self.wait(plan.wake_at).await;
        }
        self.context.registry.remove(&self.pod);
        tracing::info!(pod = %self.pod, "nothing is left of the pod");
    }

    /// Takes the pod as it is wanted now.
    fn take(&mut self, work: Arc<PodWork>) {
        match &self.work {
            None => self.reported = work.pod.status.clone().unwrap_or_default(),
            Some(before) if Arc::ptr_eq(before, &work) => return,
            Some(before) => {
                let values = before.config_maps != work.config_maps
                    || before.binary_keys != work.binary_keys
                    || before.secrets != work.secrets;
                let spec = before.pod.spec != work.pod.spec;
                self.untold |= shown_as(&before.pod) != shown_as(&work.pod);
                let (a, b) = (&before.pod.metadata, &work.pod.metadata);
                if values || spec || a.labels != b.labels || a.annotations != b.annotations {
                    self.memory.volumes.wanted += 1;
                    self.memory.failures.remove(&Task::Volumes);
                }
                if values || spec {
                    // What was missing may be there now; a registry is not asked again because of that.
                    self.memory.failures.retain(|task, failure| {
                        !matches!(task, Task::Start(_))
                            || !spec && failure.reason != "CreateContainerConfigError"
                    });
                }
            }
        }
        self.work = Some(work);
    }

    async fn look(&mut self) -> Result<(), mesh_cri::CallError> {
        let spec = self.work.as_ref().and_then(|w| w.pod.spec.as_ref());
        self.observed = observe(&self.context, &self.pod, &self.observed, spec).await?;
        let exists = |id: &str| self.observed.sandboxes.iter().any(|s| s.id == id);
        self.memory.stopped.retain(|id| exists(id));
        self.memory.killed_at.retain(|run, _| self.observed.has(run));
        self.memory.renewed.retain(|run| self.observed.has(run));
        Ok(())
    }

    fn decide(&mut self, known: bool) -> Plan {
        let now = Timestamp::now();
        self.follow_probes();
        let work = self.work.clone().filter(|_| known);
        if work.as_ref().is_some_and(|w| is_deleting(&w.pod)) {
            self.memory.deleting_since.get_or_insert(now);
            self.probers.leave();
        }
        self.memory.ended_by = self.ended_by(work.as_deref());
        if let Some(departure) = work.as_ref().and_then(|w| w.departure) {
            self.depart(departure, now);
        }
        let plan = plan(work.as_deref(), &self.observed, &self.memory, now);
        if let Some(work) = work {
            self.announce_back_off(&work);
            self.report(&work, now);
        }
        plan
    }

    /// Why the node does not run the pod.
    fn ended_by(&mut self, work: Option<&PodWork>) -> Option<Cause> {
        if let Some(why) = self.evictions.borrow_and_update().get(&self.pod.uid) {
            return Some(Cause::evicted(why.clone()));
        }
        // What an earlier version started goes on.
        let runs = self.observed.instances.iter().any(Instance::is_running);
        let work = work.filter(|_| !runs)?;
        let (reason, why) = self.context.refusal(&work.pod)?;
        let phase = work.pod.status.as_ref().and_then(|s| s.phase.as_deref());
        if self.memory.ended_by.is_none() && phase != Some("Failed") {
            tracing::warn!(pod = %self.pod, reason, why, "pod refused");
            self.event(true, "", reason, why.clone());
        }
        Some(Cause::rejected(reason, &why))
    }

    /// Follows what the other nodes know of the pod's deletion.
    fn depart(&mut self, departure: Departure, now: Timestamp) {
        if self.memory.left_at.is_some() {
            return;
        }
        self.memory.left_at = match departure {
            Departure::Listed => None,
            Departure::Unlisted => Some(now),
            Departure::Told(revision) => {
                let revision = *self.memory.told.get_or_insert(revision);
                let confirmed = self.context.drain.is_confirmed(revision);
                confirmed.then(|| super::restart::after(now, SETTLE))
            }
        };
        if self.memory.left_at.is_some() {
            let since = self.memory.deleting_since.unwrap_or(now);
            let took = Duration::try_from(now.duration_since(since)).unwrap_or_default();
            tracing::debug!(pod = %self.pod, ?departure, ?took, "nobody sends to the pod any more");
        }
    }

    fn ips(&self) -> Vec<std::net::IpAddr> {
        let spec = self.work.as_ref().and_then(|w| w.pod.spec.as_ref());
        let host_network = spec.is_some_and(|s| s.host_network == Some(true));
        pod_ips(self.observed.sandbox(), host_network, &self.context.options.node_addresses)
    }

    /// Starts and ends probes as containers come and go.
    fn follow_probes(&mut self) {
        let running: BTreeMap<String, Instance> = self
            .observed
            .instances
            .iter()
            .filter(|i| i.is_running() && !self.memory.busy.contains(&Task::Start(i.name.clone())))
            .map(|i| (i.id.clone(), i.clone()))
            .collect();
        self.probers.retain(|run| running.contains_key(run));
        self.memory.verdicts.retain(|run, _| running.contains_key(run));
        let Some(work) = self.work.clone() else { return };
        let Some(spec) = work.pod.spec.as_ref() else { return };
        let address = self.ips().first().copied();
        for (run, instance) in running {
            let State::Running { started_at } = instance.state else { continue };
            let Some(container) = find_container(spec, &instance.name) else { continue };
            if self.probers.knows(&run) {
                continue;
            }
            // A run that an earlier agent knew as ready stays ready until its probe says otherwise.
            let before = reported_run(&self.reported, &run);
            let started = container.startup_probe.is_none()
                || before.is_some_and(|c| c.started == Some(true));
            let ready = container.readiness_probe.is_none() || before.is_some_and(|c| c.ready);
            self.memory.verdicts.insert(run.clone(), Verdicts { started, ready, dead: None });
            let container = container.into_owned();
            self.probers.start(Subject { run, container, address, started_at, started, ready });
        }
    }

    fn found(&mut self, finding: Finding) {
        let Some(verdicts) = self.memory.verdicts.get_mut(&finding.run) else { return };
        match (finding.kind, finding.verdict) {
            (Kind::Startup, Some(true)) => {
                verdicts.started = true;
                self.probers.started(&finding.run);
            }
            (Kind::Readiness, Some(ready)) => verdicts.ready = ready,
            (Kind::Startup | Kind::Liveness, Some(false)) => {
                let kind = finding.kind.title().to_lowercase();
                let name = &finding.container;
                verdicts.dead =
                    Some(format!("Container {name} failed {kind} probe, will be restarted"));
            }
            _ => {}
        }
        if let Some(failure) = finding.failure {
            let message = format!("{} probe failed: {failure}", finding.kind.title());
            self.event(true, &finding.container, "Unhealthy", message);
        }
        if let Some(warning) = finding.warning {
            let message = format!("{} probe warning: {warning}", finding.kind.title());
            self.event(true, &finding.container, "ProbeWarning", message);
        }
    }

    fn event(&self, warning: bool, container: &str, reason: &'static str, message: String) {
        let spec = self.work.as_ref().and_then(|w| w.pod.spec.as_ref());
        let field = field_of(spec, container);
        self.context.outbox.event(PodEvent {
            pod: self.pod.clone(),
            field,
            warning,
            reason,
            message,
        });
    }

    fn announce_back_off(&mut self, work: &PodWork) {
        let Some(spec) = work.pod.spec.as_ref() else { return };
        let ids: Vec<&str> = self.observed.instances.iter().map(|i| i.id.as_str()).collect();
        self.announced.retain(|id| ids.contains(&id.as_str()));
        if is_deleting(&work.pod) {
            return;
        }
        for (container, policy) in Policy::of_all(spec) {
            let Some(run) = self.observed.newest(&container.name) else { continue };
            let fate = fate(run, policy, container, &self.memory);
            let waits = run.exit().is_some()
                && matches!(fate, Fate::Restart { delay, .. } if !delay.is_zero());
            if waits && self.announced.insert(run.id.clone()) {
                let message = format!(
                    "Back-off restarting failed container {} in pod {}",
                    container.name, self.pod
                );
                self.event(true, &container.name, "BackOff", message);
            }
        }
    }

    /// Reports the status when it changed, and keeps the registry for log readers up to date.
    fn report(&mut self, work: &PodWork, now: Timestamp) {
        let deleting = is_deleting(&work.pod);
        let phase = work.pod.status.as_ref().and_then(|s| s.phase.as_deref());
        let pod_ips = self.ips();
        let view = View {
            pod: &work.pod,
            observed: &self.observed,
            memory: &self.memory,
            previous: &self.reported,
            host_ips: &self.context.options.node_addresses,
            pod_ips: &pod_ips,
            now,
        };
        let status = view.status();
        self.register(&status);
        // A deleted pod keeps the status of its last containers.
        if self.frozen || deleting && self.observed.instances.is_empty() {
            return;
        }
        // An evicted pod ends before its containers do, and so does one with sidecars.
        let ended = matches!(phase, Some("Succeeded" | "Failed"));
        let status = if ended { view.after_end(status) } else { status };
        let settled = super::restart::after(self.reported_at, SETTLED) <= now;
        let lost = settled && phase != status.phase.as_deref();
        if status != self.reported || lost || std::mem::take(&mut self.untold) {
            self.context.outbox.status(&self.pod, status.clone());
            self.reported = status;
            self.reported_at = now;
        }
        let alive = self.observed.instances.iter().any(Instance::is_running);
        self.frozen = deleting && !alive && self.memory.busy.is_empty();
    }

    fn register(&self, status: &PodStatus) {
        let init = status.init_container_statuses.iter().flatten();
        let added = status.ephemeral_container_statuses.iter().flatten();
        let all = init.chain(status.container_statuses.iter().flatten()).chain(added);
        let entry = |c: &ContainerStatus| (c.name.clone(), Found::of(c, &self.observed));
        let found: BTreeMap<String, Found> = all.map(entry).collect();
        let spec = self.work.as_ref().and_then(|work| work.pod.spec.as_ref());
        let has_terminal = |name: &&String| {
            let container = spec.and_then(|spec| find_container(spec, name));
            container.is_some_and(|container| container.tty == Some(true))
        };
        let terminals = found.keys().filter(has_terminal).cloned().collect();
        self.context.registry.set(&self.pod, Containers { found, terminals });
    }

    fn launch(&mut self, step: Step) {
        if let Step::CancelStart { name } = &step {
            let task = Task::Start(name.clone());
            for (_, handle) in self.under_way.values().filter(|(under_way, _)| *under_way == task) {
                handle.abort();
            }
            return;
        }
        let Some(task) = step.task() else { return };
        tracing::debug!(pod = %self.pod, ?step, "step");
        let job = Job {
            context: Arc::clone(&self.context),
            pod: self.pod.clone(),
            work: self.work.clone(),
            pod_ips: self.ips(),
            sandbox_attempt: self.observed.sandbox().map_or(0, |s| s.attempt),
            step,
        };
        if let Step::Stop { id, grace, .. } | Step::Hurry { id, grace } = &job.step {
            let at = super::restart::after(Timestamp::now(), *grace);
            self.memory.killed_at.insert(id.clone(), at);
        }
        if let Step::Stop { id, renew: true, .. } = &job.step {
            self.memory.renewed.insert(id.clone());
        }
        self.memory.busy.insert(task.clone());
        if task == Task::Volumes {
            self.volumes_begun = self.memory.volumes.wanted;
        }
        let handle = self.tasks.spawn(job.run());
        self.under_way.insert(handle.id(), (task, handle));
    }

    async fn wait(&mut self, wake_at: Option<Timestamp>) {
        let until = wake_at
            .map(|at| Duration::try_from(at.duration_since(Timestamp::now())).unwrap_or_default());
        let timer = async {
            match until {
                // A little late rather than a little early: then the time has certainly come.
                Some(time) => tokio::time::sleep(time + Duration::from_millis(5)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // The runner is gone: it cancels this task.
            changed = self.wanted.changed() => if changed.is_err() { std::future::pending().await },
            () = self.changed.notified() => {}
            // The sender is in the context, which this holds.
            Ok(()) = self.evictions.changed() => {}
            Ok(()) = self.confirmed.changed(), if self.memory.told.is_some() => {}
            Some(finding) = self.findings.recv() => self.found(finding),
            Some(done) = self.tasks.join_next_with_id() => self.done(done),
            () = timer => {}
        }
        // Whatever else has ended meanwhile is planned for together.
        while let Some(done) = self.tasks.try_join_next_with_id() {
            self.done(done);
        }
        while let Ok(finding) = self.findings.try_recv() {
            self.found(finding);
        }
    }

    fn done(&mut self, done: Result<(Id, Result<(), OpError>), tokio::task::JoinError>) {
        let (id, result) = match done {
            Ok((id, result)) => (id, result),
            Err(error) if error.is_cancelled() => (error.id(), Ok(())),
            Err(error) => {
                let message = "a task of the agent panicked".to_owned();
                (error.id(), Err(OpError { reason: "Internal", message }))
            }
        };
        let Some((task, _)) = self.under_way.remove(&id) else { return };
        self.memory.busy.remove(&task);
        match result {
            Ok(()) => {
                self.memory.failures.remove(&task);
                match task {
                    Task::StopSandbox(id) => drop(self.memory.stopped.insert(id)),
                    Task::Free => self.memory.freed = true,
                    Task::Clean => self.memory.cleaned = true,
                    Task::Confirm => self.memory.confirmed = true,
                    Task::Volumes => {
                        self.memory.volumes.written = Some(self.volumes_begun);
                        self.memory.volumes.renew_at = self.context.tokens.due(&self.pod.uid);
                    }
                    _ => {}
                }
            }
            Err(error) => {
                tracing::warn!(pod = %self.pod, ?task, reason = error.reason, error = error.message, "step failed, will retry");
                self.memory.fail(task, error.reason, error.message, Timestamp::now());
            }
        }
    }
}

fn reported_run<'a>(status: &'a PodStatus, run: &str) -> Option<&'a ContainerStatus> {
    let init = status.init_container_statuses.iter().flatten();
    let mut all = init.chain(status.container_statuses.iter().flatten());
    all.find(|c| c.container_id.as_deref().is_some_and(|id| id.ends_with(run)))
}
