//! The status of a pod as the API shows it: a pure function of the pod, of what the runtime has, and of the time.

use std::net::IpAddr;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, HostIP, Pod, PodIP, PodSpec, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use mesh_model::containers::is_sidecar;

use super::memory::Memory;
use super::observed::{Instance, Observed};
use super::outcome::{Outcome, outcome};
use super::plan::is_deleting;

mod conditions;
mod containers;
mod qos;

pub(crate) use conditions::is_ours;
pub(crate) use qos::{Qos, qos};

/// All that a status is made of.
pub(crate) struct View<'a> {
    pub(crate) pod: &'a Pod,
    pub(crate) observed: &'a Observed,
    pub(crate) memory: &'a Memory,
    /// What was reported last, or else what the API had when the pod was first seen.
    pub(crate) previous: &'a PodStatus,
    pub(crate) host_ips: &'a [IpAddr],
    pub(crate) pod_ips: &'a [IpAddr],
    pub(crate) now: Timestamp,
}

impl View<'_> {
    /// The status that is true now.
    pub(crate) fn status(&self) -> PodStatus {
        let Some(spec) = self.pod.spec.as_ref() else { return self.previous.clone() };
        let outcome = outcome(self.pod, self.observed, self.memory, self.now);
        let ended = matches!(outcome, Outcome::Ended { .. });
        let init = containers::init_statuses(self, spec, ended);
        let main = containers::statuses(self, spec, ended);
        let added = containers::ephemeral_statuses(self, spec);
        let phase = self.taken_down(&main).unwrap_or_else(|| phase(spec, &outcome, &init, &main));
        let cause = match outcome {
            Outcome::Ended { cause, .. } => cause,
            Outcome::Open { .. } => None,
        };
        // A container that was never made has no state; "creating" would not be true any more.
        let told = cause.is_none() || !self.never_began();
        let conditions = conditions::conditions(self, spec, phase, &init, &main, cause.as_ref());
        let (reason, message) = match cause {
            Some(cause) => (Some(cause.reason.to_owned()), Some(cause.message)),
            None => (self.previous.reason.clone(), self.previous.message.clone()),
        };
        PodStatus {
            conditions: Some(conditions),
            container_statuses: Some(if told { main } else { Vec::new() }),
            ephemeral_container_statuses: Some(added).filter(|all| !all.is_empty()),
            init_container_statuses: Some(init).filter(|all| told && !all.is_empty()),
            host_ip: self.host_ips.first().map(IpAddr::to_string),
            host_ips: ips(self.host_ips, |ip| HostIP { ip }),
            pod_ip: self.pod_ips.first().map(IpAddr::to_string),
            pod_ips: ips(self.pod_ips, |ip| PodIP { ip }),
            phase: Some(phase.to_owned()),
            qos_class: Some(qos(spec).as_str().to_owned()),
            reason,
            message,
            start_time: Some(
                self.previous.start_time.clone().unwrap_or(Time(whole_second(self.now))),
            ),
            ..Default::default()
        }
    }
}

impl View<'_> {
    /// The status of a pod that was told to have ended: as it was told, with the ends of containers that were still running
    /// then. `now` is what [`status`](Self::status) says.
    pub(crate) fn after_end(&self, now: PodStatus) -> PodStatus {
        let told = self.previous.clone();
        let ends = containers::with_ends;
        PodStatus {
            container_statuses: ends(told.container_statuses, now.container_statuses),
            ephemeral_container_statuses: ends(
                told.ephemeral_container_statuses,
                now.ephemeral_container_statuses,
            ),
            init_container_statuses: ends(
                told.init_container_statuses,
                now.init_container_statuses,
            ),
            ..told
        }
    }

    /// None of its containers was ever made.
    fn never_began(&self) -> bool {
        let init = self.previous.init_container_statuses.iter().flatten();
        let mut told = init.chain(self.previous.container_statuses.iter().flatten());
        self.observed.instances.is_empty() && told.all(|c| c.container_id.is_none())
    }

    /// The phase of a deleted pod whose containers have all ended. It is never Running, whatever its restart policy.
    fn taken_down(&self, main: &[ContainerStatus]) -> Option<&'static str> {
        if !is_deleting(self.pod) || self.observed.instances.iter().any(Instance::is_running) {
            return None;
        }
        let code = |c: &ContainerStatus| Some(c.state.as_ref()?.terminated.as_ref()?.exit_code);
        let codes: Option<Vec<i32>> = main.iter().map(code).collect();
        Some(if codes?.iter().all(|code| *code == 0) { "Succeeded" } else { "Failed" })
    }
}

fn ips<T>(ips: &[IpAddr], make: impl Fn(String) -> T) -> Option<Vec<T>> {
    (!ips.is_empty()).then(|| ips.iter().map(|ip| make(ip.to_string())).collect())
}

/// The API keeps whole seconds: more would make every comparison fail.
pub(crate) fn whole_second(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

/// Pod phase (Kubernetes, "Pod Lifecycle").
fn phase(
    spec: &PodSpec,
    outcome: &Outcome,
    init: &[ContainerStatus],
    main: &[ContainerStatus],
) -> &'static str {
    if let Outcome::Ended { succeeded, .. } = outcome {
        return if *succeeded { "Succeeded" } else { "Failed" };
    }
    let initialized = spec.init_containers.iter().flatten().zip(init).all(|(container, status)| {
        if is_sidecar(container) { status.started == Some(true) } else { status.ready }
    });
    // Once containers have begun, a crashed sidecar does not take the pod back to its start.
    let all_begun = main.iter().all(has_begun);
    if all_begun && (initialized || main.iter().any(has_begun)) { "Running" } else { "Pending" }
}

/// The container runs, or has run.
fn has_begun(status: &ContainerStatus) -> bool {
    let now = status.state.as_ref();
    now.is_some_and(|s| s.running.is_some() || s.terminated.is_some())
        || status.last_state.as_ref().is_some_and(|s| s.terminated.is_some())
}

#[cfg(test)]
mod tests;
