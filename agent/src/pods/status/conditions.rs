//! Pod conditions.

use k8s_openapi::api::core::v1::{ContainerStatus, PodCondition, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use mesh_model::containers::is_sidecar;

use super::{View, has_begun, whole_second};
use crate::pods::outcome::Cause;

/// The conditions that follow from the pod's containers; all others are kept as they are.
const OURS: [&str; 4] = ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady"];

const SCHEDULED: &str = "PodScheduled";

/// The pod has to go though it did nothing wrong (Kubernetes, "Pod disruption conditions"): others may say so, too.
const DISRUPTED: &str = "DisruptionTarget";
/// As the kubelet calls it that the node could not keep the pod.
const BY_THE_NODE: &str = "TerminationByKubelet";

/// Whether a condition is the runner's to set.
pub(crate) fn is_ours(condition: &PodCondition) -> bool {
    let type_ = condition.type_.as_str();
    let by_the_node = condition.reason.as_deref() == Some(BY_THE_NODE);
    type_ == SCHEDULED || OURS.contains(&type_) || type_ == DISRUPTED && by_the_node
}

struct Verdict {
    ok: bool,
    reason: Option<&'static str>,
    message: Option<String>,
}

impl Verdict {
    fn of(ok: bool, reason: &'static str, message: String) -> Self {
        if ok {
            return Self { ok, reason: None, message: None };
        }
        Self { ok, reason: Some(reason), message: Some(message).filter(|m| !m.is_empty()) }
    }
}

/// All conditions of the pod, those of others first.
pub(super) fn conditions(
    view: &View<'_>,
    spec: &PodSpec,
    phase: &str,
    init: &[ContainerStatus],
    main: &[ContainerStatus],
    cause: Option<&Cause>,
) -> Vec<PodCondition> {
    let current = view.pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    let foreign = current.into_iter().flatten().filter(|c| !OURS.contains(&c.type_.as_str()));
    let mut all: Vec<PodCondition> = foreign.cloned().collect();
    // Nobody scheduled a pod that names its node itself.
    if all.iter().all(|c| c.type_ != SCHEDULED) {
        let here = Verdict { ok: true, reason: None, message: None };
        all.push(condition(view, SCHEDULED, here));
    }
    if let Some(cause) = cause.filter(|cause| cause.is_eviction()) {
        all.retain(|c| c.type_ != DISRUPTED);
        let message = Some(cause.message.clone());
        let evicted = Verdict { ok: true, reason: Some(BY_THE_NODE), message };
        all.push(condition(view, DISRUPTED, evicted));
    }
    let initialized = initialized(spec, phase, init, main);
    let containers = containers_ready(spec, phase, init, main);
    let ready = ready(spec, &containers, &all);
    let sandbox = Verdict { ok: view.observed.sandbox().is_some(), reason: None, message: None };
    let verdicts = [sandbox, initialized, ready, containers];
    for (name, verdict) in OURS.into_iter().zip(verdicts) {
        all.push(condition(view, name, verdict));
    }
    all
}

fn condition(view: &View<'_>, name: &str, verdict: Verdict) -> PodCondition {
    let status = if verdict.ok { "True" } else { "False" };
    let before = view.previous.conditions.iter().flatten().find(|c| c.type_ == name);
    let since = before.filter(|c| c.status == status).and_then(|c| c.last_transition_time.clone());
    PodCondition {
        type_: name.to_owned(),
        status: status.to_owned(),
        reason: verdict.reason.map(str::to_owned),
        message: verdict.message,
        last_transition_time: Some(since.unwrap_or(Time(whole_second(view.now)))),
        last_probe_time: None,
        observed_generation: None,
    }
}

fn initialized(
    spec: &PodSpec,
    phase: &str,
    init: &[ContainerStatus],
    main: &[ContainerStatus],
) -> Verdict {
    let missing: Vec<&str> = spec
        .init_containers
        .iter()
        .flatten()
        .zip(init)
        .filter(|(c, s)| if is_sidecar(c) { s.started != Some(true) } else { !s.ready })
        .map(|(c, _)| c.name.as_str())
        .collect();
    if phase == "Succeeded" {
        return Verdict { ok: true, reason: Some("PodCompleted"), message: None };
    }
    let message = format!("containers with incomplete status: {}", names(&missing));
    // Sidecars that crash later, or end with the pod, do not undo the initialisation.
    let is_done = missing.is_empty() || main.iter().any(has_begun);
    Verdict::of(is_done, "ContainersNotInitialized", message)
}

fn containers_ready(
    spec: &PodSpec,
    phase: &str,
    init: &[ContainerStatus],
    main: &[ContainerStatus],
) -> Verdict {
    match phase {
        "Succeeded" => return Verdict { ok: false, reason: Some("PodCompleted"), message: None },
        "Failed" => return Verdict { ok: false, reason: Some("PodFailed"), message: None },
        _ => {}
    }
    let sidecars = spec.init_containers.iter().flatten().zip(init).filter(|(c, _)| is_sidecar(c));
    let unready: Vec<&str> = sidecars
        .map(|(_, status)| status)
        .chain(main)
        .filter(|s| !s.ready)
        .map(|s| s.name.as_str())
        .collect();
    let message = format!("containers with unready status: {}", names(&unready));
    Verdict::of(unready.is_empty(), "ContainersNotReady", message)
}

fn ready(spec: &PodSpec, containers: &Verdict, foreign: &[PodCondition]) -> Verdict {
    if !containers.ok {
        return Verdict {
            ok: false,
            reason: containers.reason,
            message: containers.message.clone(),
        };
    }
    let gates = spec.readiness_gates.iter().flatten().map(|g| g.condition_type.as_str());
    let open = |gate: &&str| !foreign.iter().any(|c| c.type_ == *gate && c.status == "True");
    let missing: Vec<&str> = gates.filter(open).collect();
    let message = format!("readiness gates without status True: {}", names(&missing));
    Verdict::of(missing.is_empty(), "ReadinessGatesNotReady", message)
}

fn names(all: &[&str]) -> String {
    format!("[{}]", all.join(" "))
}
