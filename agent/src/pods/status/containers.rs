//! State of each container.

use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated,
    ContainerStateWaiting, ContainerStatus, EphemeralContainer, PodSpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use mesh_model::containers::is_sidecar;
use mesh_model::ephemeral::as_container;

use super::{View, whole_second};
use crate::pods::memory::{Failure, RUN_FAILED, Task};
use crate::pods::observed::{Instance, State};
use crate::pods::plan::{FRESH_FAILURE, is_deleting};
use crate::pods::restart::{Fate, Policy, after, fate};

/// The exit code of a process that was ended by SIGKILL.
const KILLED: i32 = 137;

/// Statuses of the init containers, in the order of the manifest.
pub(super) fn init_statuses(view: &View<'_>, spec: &PodSpec, ended: bool) -> Vec<ContainerStatus> {
    let one = |container: &Container| {
        let sidecar = is_sidecar(container);
        let policy = if sidecar { Policy::Always } else { Policy::of_init(spec) };
        let mut status = one(view, container, policy, "PodInitializing", ended);
        if !sidecar {
            let state = status.state.as_ref();
            status.ready =
                state.and_then(|s| s.terminated.as_ref()).is_some_and(|t| t.exit_code == 0);
        }
        status
    };
    spec.init_containers.iter().flatten().map(one).collect()
}

/// Statuses of the ordinary containers, in the order of the manifest.
pub(super) fn statuses(view: &View<'_>, spec: &PodSpec, ended: bool) -> Vec<ContainerStatus> {
    let waits_for_init = spec.init_containers.as_ref().is_some_and(|all| !all.is_empty());
    let reason = if waits_for_init { "PodInitializing" } else { "ContainerCreating" };
    let policy = Policy::of(spec);
    spec.containers.iter().map(|container| one(view, container, policy, reason, ended)).collect()
}

/// Statuses of the ephemeral containers, in the order of the manifest.
pub(super) fn ephemeral_statuses(view: &View<'_>, spec: &PodSpec) -> Vec<ContainerStatus> {
    let one = |container: &EphemeralContainer| {
        let container = as_container(container);
        let status = one(view, &container, Policy::Never, "ContainerCreating", false);
        // The pod does not depend on it.
        ContainerStatus { ready: false, ..status }
    };
    spec.ephemeral_containers.iter().flatten().map(one).collect()
}

/// What was told of containers, with the ends that are known now. One that was running and of which nothing is left has ended, too.
pub(super) fn with_ends(
    told: Option<Vec<ContainerStatus>>,
    now: Option<Vec<ContainerStatus>>,
) -> Option<Vec<ContainerStatus>> {
    let now = now.unwrap_or_default();
    let update = |told: ContainerStatus| {
        let state = |status: &ContainerStatus| status.state.clone().unwrap_or_default();
        let was = state(&told);
        if was.terminated.is_some() {
            return told;
        }
        match now.iter().find(|status| status.name == told.name) {
            Some(status) if state(status).terminated.is_some() => status.clone(),
            Some(status) if state(status).running.is_some() => told,
            _ if was.running.is_some() => lost(told),
            _ => told,
        }
    };
    told.map(|all| all.into_iter().map(update).collect())
}

/// A container that was running, and that the runtime does not have any more.
fn lost(told: ContainerStatus) -> ContainerStatus {
    let terminated = ContainerStateTerminated {
        container_id: told.container_id.clone(),
        exit_code: KILLED,
        reason: Some("ContainerStatusUnknown".to_owned()),
        message: Some("nothing was left of the container when its pod had ended".to_owned()),
        ..Default::default()
    };
    ContainerStatus {
        ready: false,
        started: Some(false),
        state: Some(ContainerState { terminated: Some(terminated), ..Default::default() }),
        ..told
    }
}

fn one(
    view: &View<'_>,
    container: &Container,
    policy: Policy,
    waiting: &str,
    ended: bool,
) -> ContainerStatus {
    let runs: Vec<&Instance> = view.observed.runs(&container.name).collect();
    // A run that was created and not started says nothing yet.
    let current = runs.iter().find(|run| run.state != State::Created).copied();
    let before = runs.iter().filter(|run| Some(run.id.as_str()) != current.map(|c| c.id.as_str()));
    let before = before.filter_map(|run| terminated(run)).next();
    let mut last = before;
    let state = match current {
        None => wait(view, container, waiting),
        Some(run) => match &run.state {
            State::Running { started_at } => running(*started_at),
            State::Exited(_) => match pause(view, container, run, policy, ended) {
                Some(pause) => {
                    last = terminated(run);
                    pause
                }
                None => ContainerState { terminated: terminated(run), ..Default::default() },
            },
            State::Created | State::Unknown => wait(view, container, "ContainerStatusUnknown"),
        },
    };
    let verdicts = current.and_then(|run| view.memory.verdicts.get(&run.id));
    let is_running = state.running.is_some();
    ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        image_id: current.map(|run| run.image_id.clone()).unwrap_or_default(),
        container_id: current.map(|run| format!("containerd://{}", run.id)),
        restart_count: current.map_or(0, |run| i32::try_from(run.attempt).unwrap_or(i32::MAX)),
        started: Some(is_running && verdicts.is_some_and(|v| v.started)),
        ready: is_running && verdicts.is_some_and(|v| v.started && v.ready),
        last_state: last.map(|t| ContainerState { terminated: Some(t), ..Default::default() }),
        state: Some(state),
        ..Default::default()
    }
}

/// Why a container that ended is not running again yet. None when it stays ended.
fn pause(
    view: &View<'_>,
    container: &Container,
    run: &Instance,
    policy: Policy,
    ended: bool,
) -> Option<ContainerState> {
    if ended || is_deleting(view.pod) || !view.memory.is_followed(run, policy) {
        return None;
    }
    let failure = view.memory.start_failure(&container.name);
    // A run that could not be started is a run all the same, and waits as one that crashed.
    if let Some(failure) = failure.filter(|failure| failure.reason != RUN_FAILED) {
        return Some(failed(view, container, failure));
    }
    match fate(run, policy, container, view.memory) {
        Fate::Restart { at, delay } if at > view.now => {
            let name = view.pod.metadata.name.as_deref().unwrap_or_default();
            let namespace = view.pod.metadata.namespace.as_deref().unwrap_or_default();
            let uid = view.pod.metadata.uid.as_deref().unwrap_or_default();
            Some(waiting(
                "CrashLoopBackOff",
                Some(format!(
                    "back-off {}s restarting failed container={} pod={name}_{namespace}({uid})",
                    delay.as_secs(),
                    container.name
                )),
            ))
        }
        _ => failure.map(|failure| failed(view, container, failure)),
    }
}

fn wait(view: &View<'_>, container: &Container, reason: &str) -> ContainerState {
    if let Some(failure) = view.memory.start_failure(&container.name) {
        return failed(view, container, failure);
    }
    let blocked = [Task::Volumes, Task::RunSandbox];
    let blocked = blocked.iter().find_map(|task| view.memory.failures.get(task));
    waiting(reason, blocked.map(|failure| failure.message.clone()))
}

/// A failure is shown by its own name first, and then, while it waits, as a back-off.
fn failed(view: &View<'_>, container: &Container, failure: &Failure) -> ContainerState {
    let image = container.image.as_deref().unwrap_or_default();
    if failure.reason == "ErrImagePull" && after(failure.at, FRESH_FAILURE) <= view.now {
        let message = format!("Back-off pulling image \"{image}\": {}", failure.message);
        return waiting("ImagePullBackOff", Some(message));
    }
    waiting(failure.reason, Some(failure.message.clone()))
}

fn waiting(reason: &str, message: Option<String>) -> ContainerState {
    let waiting = ContainerStateWaiting { reason: Some(reason.to_owned()), message };
    ContainerState { waiting: Some(waiting), ..Default::default() }
}

fn running(started_at: jiff::Timestamp) -> ContainerState {
    let running = ContainerStateRunning { started_at: Some(Time(whole_second(started_at))) };
    ContainerState { running: Some(running), ..Default::default() }
}

fn terminated(run: &Instance) -> Option<ContainerStateTerminated> {
    let exit = run.exit()?;
    Some(ContainerStateTerminated {
        container_id: Some(format!("containerd://{}", run.id)),
        exit_code: exit.code,
        reason: Some(exit.reason.clone()),
        message: Some(exit.message.clone()).filter(|m| !m.is_empty()),
        started_at: Some(Time(whole_second(exit.started_at))),
        finished_at: Some(Time(whole_second(exit.finished_at))),
        signal: None,
    })
}
