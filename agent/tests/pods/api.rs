//! The part of the API that the runner sees: pods whose status it sets, events, confirmed deletions.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodStatus};
use mesh_agent::pods::{PodEvent, PodRef, ReportError, StatusReporter, Token, TokenWanted};
use mesh_model::snapshot::{Departure, PodWork};

/// Values of ConfigMaps by name and key.
pub(crate) type Values = BTreeMap<String, BTreeMap<String, Vec<u8>>>;

#[derive(Default)]
pub(crate) struct State {
    pub(crate) pods: BTreeMap<String, Pod>,
    pub(crate) config_maps: Values,
    pub(crate) secrets: Values,
    pub(crate) events: Vec<PodEvent>,
    /// How many tokens were issued.
    pub(crate) tokens: u32,
    /// How long the next ones live.
    pub(crate) token_secs: i64,
    pub(crate) tokens_are_refused: bool,
    pub(crate) deleted: Vec<String>,
    /// Grows with each change, as a resourceVersion does.
    pub(crate) version: u64,
    /// Each status that was reported, by pod.
    pub(crate) history: Vec<(String, PodStatus)>,
}

/// A small API in memory. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct Api(Arc<Mutex<State>>);

impl Api {
    pub(crate) fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.0.lock().unwrap();
        state.version += 1;
        act(&mut state)
    }

    pub(crate) fn read<T>(&self, act: impl FnOnce(&State) -> T) -> T {
        act(&self.0.lock().unwrap())
    }

    /// Stores a pod of that name in the namespace "test"; its uid is made from the name.
    pub(crate) fn apply(&self, name: &str, spec: serde_json::Value) {
        let pod = serde_json::json!({
            "metadata": {"name": name, "namespace": "test", "uid": format!("uid-{name}"), "labels": {"app": name}},
            "spec": spec,
        });
        let pod = serde_json::from_value(pod).unwrap();
        self.with(|state| state.pods.insert(name.to_owned(), pod));
    }

    pub(crate) fn config_map(&self, name: &str, values: &[(&str, &str)]) {
        let values = values.iter().map(|(k, v)| ((*k).to_owned(), v.as_bytes().to_vec())).collect();
        self.with(|state| state.config_maps.insert(name.to_owned(), values));
    }

    /// What `kubectl delete pod` does.
    pub(crate) fn delete(&self, name: &str) {
        let spec = self.read(|state| state.pods[name].spec.clone());
        self.delete_within(name, spec.and_then(|s| s.termination_grace_period_seconds));
    }

    /// The same with `--grace-period`.
    pub(crate) fn delete_within(&self, name: &str, grace: Option<i64>) {
        self.with(|state| {
            let pod = state.pods.get_mut(name).unwrap();
            let now = k8s_openapi::jiff::Timestamp::now();
            pod.metadata.deletion_timestamp =
                Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now));
            pod.metadata.deletion_grace_period_seconds = grace;
        });
    }

    pub(crate) fn work(&self) -> Vec<Arc<PodWork>> {
        self.read(|state| {
            let work = |pod: &Pod| PodWork {
                pod: pod.clone(),
                config_maps: state.config_maps.clone(),
                binary_keys: Default::default(),
                secrets: state.secrets.clone(),
                service_env: [("WEB_SERVICE_HOST".to_owned(), "10.96.0.9".to_owned())].into(),
                departure: pod.metadata.deletion_timestamp.as_ref().map(|_| Departure::Unlisted),
            };
            state.pods.values().map(work).map(Arc::new).collect()
        })
    }

    pub(crate) fn status(&self, name: &str) -> PodStatus {
        self.read(|state| {
            state.pods.get(name).and_then(|pod| pod.status.clone()).unwrap_or_default()
        })
    }

    /// The pod's first container.
    pub(crate) fn container(&self, name: &str) -> Option<ContainerStatus> {
        self.status(name).container_statuses?.into_iter().next()
    }

    pub(crate) fn phase(&self, name: &str) -> String {
        self.status(name).phase.unwrap_or_default()
    }

    pub(crate) fn is_ready(&self, name: &str) -> bool {
        is_ready(&self.status(name))
    }

    /// Why the first container waits.
    pub(crate) fn waiting(&self, name: &str) -> String {
        let state = self.container(name).and_then(|c| c.state);
        state.and_then(|s| s.waiting).and_then(|w| w.reason).unwrap_or_default()
    }

    /// How the first container ended; see [`Api::ended_of`].
    pub(crate) fn ended(&self, name: &str) -> Option<(String, i32, String)> {
        self.ended_of(name, 0)
    }

    /// How a container ended: reason, code and message; of its last run when it runs again.
    pub(crate) fn ended_of(&self, name: &str, index: usize) -> Option<(String, i32, String)> {
        let container = self.status(name).container_statuses?.into_iter().nth(index)?;
        let state = container.state.and_then(|s| s.terminated);
        let ended = state.or(container.last_state.and_then(|s| s.terminated))?;
        Some((ended.reason.unwrap_or_default(), ended.exit_code, ended.message.unwrap_or_default()))
    }

    /// The reasons of a pod's events, in order.
    pub(crate) fn reasons(&self, name: &str) -> Vec<&'static str> {
        self.read(|state| {
            state.events.iter().filter(|e| e.pod.name == name).map(|e| e.reason).collect()
        })
    }
}

pub(crate) fn is_ready(status: &PodStatus) -> bool {
    status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True")
}

/// Another pod may have the name by now.
fn is_same(stored: &Pod, pod: &PodRef) -> bool {
    stored.metadata.uid.as_deref() == Some(&pod.uid)
}

#[async_trait]
impl StatusReporter for Api {
    async fn status(&self, pod: &PodRef, status: &PodStatus) -> Result<(), ReportError> {
        self.with(|state| {
            let stored = state.pods.get_mut(&pod.name).filter(|stored| is_same(stored, pod));
            let stored = stored.ok_or(ReportError::Gone)?;
            stored.status = Some(status.clone());
            state.history.push((pod.name.clone(), status.clone()));
            Ok(())
        })
    }

    async fn event(&self, event: &PodEvent) -> Result<(), ReportError> {
        self.with(|state| state.events.push(event.clone()));
        Ok(())
    }

    async fn deleted(&self, pod: &PodRef) -> Result<(), ReportError> {
        self.with(|state| {
            state
                .pods
                .get(&pod.name)
                .filter(|stored| is_same(stored, pod))
                .ok_or(ReportError::Gone)?;
            state.pods.remove(&pod.name);
            state.deleted.push(pod.name.clone());
            Ok(())
        })
    }

    async fn mirror(&self, pod: &Pod) -> Result<(), ReportError> {
        let mut pod = pod.clone();
        let name = pod.metadata.name.clone().unwrap();
        pod.metadata.uid = Some(format!("mirror-of-{name}"));
        self.with(|state| state.pods.insert(name, pod));
        Ok(())
    }

    /// Each token has a number, and lives as long as the test says.
    async fn token(&self, wanted: &TokenWanted) -> Result<Token, ReportError> {
        self.with(|state| {
            if state.tokens_are_refused {
                return Err(ReportError::Unavailable("the API is away".to_owned()));
            }
            state.tokens += 1;
            let life = k8s_openapi::jiff::SignedDuration::from_secs(state.token_secs);
            let expires_at = k8s_openapi::jiff::Timestamp::now().checked_add(life).unwrap();
            let text = format!("{}/{}/{}", wanted.account, wanted.pod.name, state.tokens);
            Ok(Token { text, expires_at })
        })
    }
}
