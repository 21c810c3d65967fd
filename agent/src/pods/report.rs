//! Telling the API what happens to pods: the trait, and its implementation over a Kubernetes client.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{
    Event, EventSource, Node, ObjectReference, Pod, PodStatus, ServiceAccount,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Client};
use serde_json::{Value, json};

use super::observed::PodRef;
use super::status::is_ours;
use super::tokens::{Token, TokenWanted};

/// A report did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The pod is no longer in the API, or another one has its name.
    #[error("the pod is gone")]
    Gone,
    /// Somebody else wrote at the same time.
    #[error("conflict: {0}")]
    Conflict(String),
    /// The API refuses it, and would again.
    #[error("refused: {0}")]
    Refused(String),
    /// The API cannot be reached, or cannot answer now.
    #[error("the API does not answer: {0}")]
    Unavailable(String),
}

/// Something that happened to a pod.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PodEvent {
    /// The pod.
    pub pod: PodRef,
    /// The field that it concerns, such as `spec.containers{web}`; empty for the whole pod.
    pub field: String,
    /// Something is wrong.
    pub warning: bool,
    /// As the kubelet calls it, such as `Started`.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

/// Who takes the reports of the runner. Each call is tried again by the caller when it fails with
/// [`ReportError::Unavailable`] or [`ReportError::Conflict`]; none of them is cancelled half-way except when the agent ends.
#[async_trait]
pub trait StatusReporter: Send + Sync + 'static {
    /// Makes this the pod's status.
    async fn status(&self, pod: &PodRef, status: &PodStatus) -> Result<(), ReportError>;
    /// Records an event.
    async fn event(&self, event: &PodEvent) -> Result<(), ReportError>;
    /// Deletes the pod from the API: nothing of it is left on the node.
    async fn deleted(&self, pod: &PodRef) -> Result<(), ReportError>;
    /// Stores the mirror of a static pod.
    async fn mirror(&self, pod: &Pod) -> Result<(), ReportError>;
    /// Asks for a token of the account that a pod runs as.
    async fn token(&self, wanted: &TokenWanted) -> Result<Token, ReportError>;
}

/// Reports through the Kubernetes API.
pub struct KubeReporter {
    client: Client,
    node: String,
    /// What was recorded lately, to count a repetition instead of recording it again.
    recent: Mutex<HashMap<PodEvent, Recorded>>,
}

#[derive(Debug, Clone)]
struct Recorded {
    name: String,
    count: i32,
    sent_at: Timestamp,
}

/// The same event is written at most this often.
const REPEAT: Duration = Duration::from_secs(10);
/// How many events are remembered.
const RECENT: usize = 2000;
/// The name under which events and changes are recorded.
const COMPONENT: &str = "mesh-agent";

impl KubeReporter {
    /// A reporter for the node of that name.
    pub fn new(client: Client, node: impl Into<String>) -> Self {
        Self { client, node: node.into(), recent: Mutex::default() }
    }

    fn pods(&self, pod: &PodRef) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &pod.namespace)
    }

    /// A conflict means that another pod has the name, or that somebody wrote at the same time.
    async fn conflict(&self, pod: &PodRef, why: String) -> ReportError {
        match self.pods(pod).get_metadata(&pod.name).await.map_err(report_error) {
            Ok(found) if found.metadata.uid.as_deref() == Some(&pod.uid) => {
                ReportError::Conflict(why)
            }
            Ok(_) => ReportError::Gone,
            Err(error) => error,
        }
    }

    /// Counts the event. None when it was written a moment ago.
    fn count(&self, event: &PodEvent, now: Timestamp) -> Option<Recorded> {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if recent.len() >= RECENT {
            let old = now.checked_sub(jiff::SignedDuration::from_mins(10)).unwrap_or(now);
            recent.retain(|_, recorded| recorded.sent_at > old);
            if recent.len() >= RECENT {
                recent.clear();
            }
        }
        let entry = recent.entry(event.clone()).or_insert_with(|| Recorded {
            name: format!("{}.{:x}", event.pod.name, now.as_nanosecond()),
            count: 0,
            sent_at: Timestamp::MIN,
        });
        entry.count = entry.count.saturating_add(1);
        if entry.count > 1 && super::restart::after(entry.sent_at, REPEAT) > now {
            return None;
        }
        entry.sent_at = now;
        Some(entry.clone())
    }

    fn forget(&self, event: &PodEvent) {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner).remove(event);
    }

    fn object(&self, event: &PodEvent, recorded: &Recorded, now: Timestamp) -> Event {
        let now = Some(Time(now));
        Event {
            metadata: ObjectMeta {
                name: Some(recorded.name.clone()),
                namespace: Some(event.pod.namespace.clone()),
                ..Default::default()
            },
            involved_object: ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                namespace: Some(event.pod.namespace.clone()),
                name: Some(event.pod.name.clone()),
                uid: Some(event.pod.uid.clone()),
                field_path: Some(event.field.clone()).filter(|f| !f.is_empty()),
                resource_version: None,
            },
            reason: Some(event.reason.to_owned()),
            message: Some(event.message.clone()),
            type_: Some(if event.warning { "Warning" } else { "Normal" }.to_owned()),
            count: Some(recorded.count),
            first_timestamp: now.clone(),
            last_timestamp: now,
            source: Some(EventSource {
                component: Some(COMPONENT.to_owned()),
                host: Some(self.node.clone()),
            }),
            reporting_component: Some(COMPONENT.to_owned()),
            reporting_instance: Some(self.node.clone()),
            ..Default::default()
        }
    }
}

#[async_trait]
impl StatusReporter for KubeReporter {
    async fn status(&self, pod: &PodRef, status: &PodStatus) -> Result<(), ReportError> {
        let patch = Patch::Strategic(status_patch(pod, status));
        let params =
            PatchParams { field_manager: Some(COMPONENT.to_owned()), ..Default::default() };
        let patched = self.pods(pod).patch_status(&pod.name, &params, &patch).await;
        match patched.map_err(report_error) {
            Err(ReportError::Conflict(why)) => Err(self.conflict(pod, why).await),
            other => other.map(drop),
        }
    }

    async fn event(&self, event: &PodEvent) -> Result<(), ReportError> {
        let now = Timestamp::now();
        let Some(recorded) = self.count(event, now) else { return Ok(()) };
        let events: Api<Event> = Api::namespaced(self.client.clone(), &event.pod.namespace);
        if recorded.count > 1 {
            let patch = json!({"count": recorded.count, "lastTimestamp": Time(now)});
            let patched =
                events.patch(&recorded.name, &PatchParams::default(), &Patch::Merge(patch)).await;
            return match patched.map_err(report_error) {
                // It has expired: the next one starts a new count.
                Err(ReportError::Gone) => {
                    self.forget(event);
                    Ok(())
                }
                other => other.map(drop),
            };
        }
        let object = self.object(event, &recorded, now);
        let created = events.create(&PostParams::default(), &object).await;
        if created.is_err() {
            self.forget(event);
        }
        created.map(drop).map_err(report_error)
    }

    async fn deleted(&self, pod: &PodRef) -> Result<(), ReportError> {
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions {
                uid: Some(pod.uid.clone()),
                resource_version: None,
            }),
            ..Default::default()
        };
        match self.pods(pod).delete(&pod.name, &params).await.map_err(report_error) {
            Err(ReportError::Conflict(why)) => Err(self.conflict(pod, why).await),
            other => other.map(drop),
        }
    }

    async fn mirror(&self, pod: &Pod) -> Result<(), ReportError> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let node = nodes.get_metadata(&self.node).await.map_err(report_error)?;
        let mut pod = pod.clone();
        // It goes with its node.
        pod.metadata.owner_references = Some(vec![OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name: self.node.clone(),
            uid: node.metadata.uid.unwrap_or_default(),
            controller: Some(true),
            block_owner_deletion: None,
        }]);
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &namespace);
        pods.create(&PostParams::default(), &pod).await.map(drop).map_err(report_error)
    }

    async fn token(&self, wanted: &TokenWanted) -> Result<Token, ReportError> {
        let accounts: Api<ServiceAccount> =
            Api::namespaced(self.client.clone(), &wanted.pod.namespace);
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: wanted.kind.audience.clone().map(|audience| vec![audience]),
                expiration_seconds: Some(wanted.kind.secs),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: Some(wanted.pod.name.clone()),
                    uid: Some(wanted.pod.uid.clone()),
                }),
            }),
            ..TokenRequest::default()
        };
        let refused = |why: &str| ReportError::Refused(why.to_owned());
        let params = PostParams::default();
        let asked = accounts.create_subresource("token", &wanted.account, &params, &request).await;
        let answer: TokenRequest = asked.map_err(|error| match error {
            // The account is missing: it may be made yet.
            kube::Error::Api(status) if status.code == 404 => refused(&status.message),
            other => report_error(other),
        })?;
        let status = answer.status.ok_or_else(|| refused("the answer has no token"))?;
        match (status.token, status.expiration_timestamp) {
            (Some(text), Some(Time(expires_at))) => Ok(Token { text, expires_at }),
            _ => Err(refused("the answer has no token")),
        }
    }
}

/// A strategic merge patch: what the status no longer has is removed, but for conditions of others, who may be writing them at the same
/// time. The uid is a condition: a new pod of the same name must not get the status of the old one.
fn status_patch(pod: &PodRef, status: &PodStatus) -> Value {
    let mut status = status.clone();
    status.conditions.iter_mut().for_each(|all| all.retain(is_ours));
    let mut patch = json!({"metadata": {"uid": pod.uid}, "status": status});
    let Some(fields) = patch["status"].as_object_mut() else { return patch };
    let conditions = fields.get_mut("conditions").and_then(Value::as_array_mut);
    for condition in conditions.into_iter().flatten().filter_map(Value::as_object_mut) {
        for name in ["reason", "message"] {
            condition.entry(name).or_insert(Value::Null);
        }
    }
    // Without that, addresses would be added to those that were there before.
    for name in ["podIPs", "hostIPs"] {
        if let Some(all) = fields.get_mut(name).and_then(Value::as_array_mut) {
            all.insert(0, json!({"$patch": "replace"}));
        }
    }
    let owned = [
        "ephemeralContainerStatuses",
        "initContainerStatuses",
        "podIP",
        "podIPs",
        "hostIP",
        "hostIPs",
        "reason",
        "message",
    ];
    for name in owned {
        fields.entry(name).or_insert(Value::Null);
    }
    patch
}

/// One table: answers of the API -> what they mean here.
fn report_error(error: kube::Error) -> ReportError {
    match error {
        kube::Error::Api(status) => match status.code {
            404 | 410 => ReportError::Gone,
            409 => ReportError::Conflict(status.message.clone()),
            429 | 500.. => ReportError::Unavailable(status.message.clone()),
            _ => ReportError::Refused(status.message.clone()),
        },
        other => ReportError::Unavailable(crate::errors::chain(&other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_removes_what_is_not_true_any_more() {
        let pod = PodRef { namespace: "d".to_owned(), name: "p".to_owned(), uid: "u".to_owned() };
        let status = PodStatus { phase: Some("Pending".to_owned()), ..Default::default() };
        let patch = status_patch(&pod, &status);
        assert_eq!(patch["metadata"]["uid"], "u");
        assert_eq!(patch["status"]["phase"], "Pending");
        assert_eq!(patch["status"].get("podIPs"), Some(&Value::Null));
        assert_eq!(patch["status"].get("conditions"), None);
    }

    #[test]
    fn a_patch_leaves_conditions_of_others_alone() {
        let pod = PodRef { namespace: "d".to_owned(), name: "p".to_owned(), uid: "u".to_owned() };
        let status = json!({"podIPs": [{"ip": "10.244.1.5"}], "conditions": [
            {"type": "example.org/gate", "status": "False"}, {"type": "PodScheduled", "status": "True"},
            {"type": "Ready", "status": "True"}]});
        let patch = status_patch(&pod, &serde_json::from_value(status).unwrap());
        let sent = patch["status"]["conditions"].as_array().unwrap();
        let types: Vec<_> = sent.iter().map(|c| c["type"].as_str().unwrap()).collect();
        assert_eq!(types, ["PodScheduled", "Ready"]);
        let ready = sent[1].as_object().unwrap();
        assert!(ready["reason"].is_null() && ready["message"].is_null(), "those of before go");
        let ips = json!([{"$patch": "replace"}, {"ip": "10.244.1.5"}]);
        assert_eq!(patch["status"]["podIPs"], ips);
    }
}
