//! The pods of a Job: how they are made, and what can be read off them. Pure.

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{
    Container, ContainerStatus, EnvVar, EnvVarSource, ObjectFieldSelector, Pod,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;

use crate::controllers::ownership::pod_of;
use crate::objects;

/// Finalizer of pods that were not counted yet: nobody's end is lost, whoever deletes the pod.
pub(in crate::controllers) const TRACKING: &str = "batch.kubernetes.io/job-tracking";
/// Annotation and label of the pods of an Indexed Job.
pub(super) const INDEX: &str = "batch.kubernetes.io/job-completion-index";
const INDEX_VARIABLE: &str = "JOB_COMPLETION_INDEX";
/// What names of pods begin with is cut to this length.
const MOST_BASE: usize = 58;

/// Annotations of pods whose Job limits the failures of each index: how many there were before, counted and not.
const FAILURES: &str = "batch.kubernetes.io/job-index-failure-count";
const IGNORED: &str = "batch.kubernetes.io/job-index-ignored-failure-count";

/// What a pod is to work on, and how often that failed before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::controllers) struct Attempt {
    pub(in crate::controllers) index: Option<u32>,
    pub(in crate::controllers) failures: u32,
    pub(in crate::controllers) ignored: u32,
}

impl Attempt {
    /// That of a pod.
    pub(super) fn of(pod: &Pod) -> Self {
        let annotations = pod.metadata.annotations.as_ref();
        let number =
            |key: &str| annotations.and_then(|all| all.get(key)?.parse().ok()).unwrap_or(0);
        Self { index: index_of(pod), failures: number(FAILURES), ignored: number(IGNORED) }
    }

    /// How many came before it.
    pub(super) fn tries(self) -> u32 {
        self.failures.saturating_add(self.ignored)
    }
}

/// Whether the end of the pod is still to be counted.
pub(in crate::controllers) fn is_tracked(meta: &ObjectMeta) -> bool {
    meta.finalizers.iter().flatten().any(|finalizer| finalizer == TRACKING)
}

/// The index that the pod works on.
pub(super) fn index_of(pod: &Pod) -> Option<u32> {
    pod.metadata.annotations.as_ref()?.get(INDEX)?.parse().ok()
}

/// Whether nobody wants to know any more how the pod ends: it was counted, or discarded.
pub(super) fn is_dismissed(pod: &Pod) -> bool {
    objects::is_terminating(&pod.metadata) && !is_tracked(&pod.metadata)
}

/// Whether nobody will report anything about the pod any more: it ended, or it is being deleted and its node has let it go.
pub(super) fn is_over(pod: &Pod) -> bool {
    let given_up = objects::is_terminating(&pod.metadata)
        && pod.metadata.deletion_grace_period_seconds.unwrap_or(0) == 0;
    objects::have_ended(pod) || given_up
}

/// When the last of its containers ended; when the pod was made, or was to be gone, if nobody knows.
pub(super) fn ended_at(pod: &Pod) -> Timestamp {
    let terminated = statuses(pod).filter_map(|status| status.state.as_ref()?.terminated.as_ref());
    let finished = terminated.filter_map(|terminated| Some(terminated.finished_at.as_ref()?.0));
    let deleted = || pod.metadata.deletion_timestamp.as_ref().map(|time| time.0);
    finished.max().or_else(deleted).unwrap_or_else(|| objects::created(&pod.metadata))
}

/// The state of all of its containers, in the order in which they were started.
pub(super) fn statuses(pod: &Pod) -> impl Iterator<Item = &ContainerStatus> {
    let status = pod.status.as_ref();
    let init = status.into_iter().flat_map(|s| s.init_container_statuses.iter().flatten());
    init.chain(status.into_iter().flat_map(|s| s.container_statuses.iter().flatten()))
}

/// What a pod of the Job is made of.
pub(super) fn new_pod(job: &Job, attempt: Attempt) -> Pod {
    let index = attempt.index;
    let template = job.spec.as_ref().map(|spec| spec.template.clone()).unwrap_or_default();
    let mut pod = pod_of(job, &template);
    pod.metadata.generate_name = Some(base_name(objects::name(&job.metadata), index));
    pod.metadata.finalizers.get_or_insert_default().push(TRACKING.to_owned());
    if let Some(index) = index {
        give_index(&mut pod, objects::name(&job.metadata), index);
        if job.spec.as_ref().is_some_and(|spec| spec.backoff_limit_per_index.is_some()) {
            let annotations = pod.metadata.annotations.get_or_insert_default();
            annotations.insert(FAILURES.to_owned(), attempt.failures.to_string());
            annotations.insert(IGNORED.to_owned(), attempt.ignored.to_string());
        }
    }
    pod
}

/// A long name of a Job is cut, its pod's index is not.
fn base_name(job: &str, index: Option<u32>) -> String {
    let end = index.map_or("-".to_owned(), |index| format!("-{index}-"));
    let start: String = job.chars().take(MOST_BASE - end.len()).collect();
    // A cut at a dot would leave no name.
    format!("{}{end}", start.trim_end_matches(['.', '-']))
}

fn give_index(pod: &mut Pod, job: &str, index: u32) {
    let meta = &mut pod.metadata;
    for map in [&mut meta.labels, &mut meta.annotations] {
        map.get_or_insert_default().insert(INDEX.to_owned(), index.to_string());
    }
    let Some(spec) = &mut pod.spec else { return };
    spec.hostname = Some(format!("{job}-{index}"));
    for container in spec.init_containers.iter_mut().flatten().chain(&mut spec.containers) {
        tell_index(container);
    }
}

fn tell_index(container: &mut Container) {
    let variables = container.env.get_or_insert_default();
    if variables.iter().any(|variable| variable.name == INDEX_VARIABLE) {
        return;
    }
    let field = ObjectFieldSelector {
        api_version: Some("v1".to_owned()),
        field_path: format!("metadata.labels['{INDEX}']"),
    };
    variables.push(EnvVar {
        name: INDEX_VARIABLE.to_owned(),
        value: None,
        value_from: Some(EnvVarSource { field_ref: Some(field), ..EnvVarSource::default() }),
    });
}
