//! Events: what people see under `kubectl describe`.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use tokio::sync::mpsc;

use crate::objects;
use crate::registry::{Object, Registry};

/// Events that wait to be written; more are dropped, and counted in the log.
const BACKLOG: usize = 1024;
/// Recent events that a repetition is counted on.
const REMEMBERED: usize = 1024;

/// Writes Events without making its callers wait. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Recorder {
    component: &'static str,
    sender: mpsc::Sender<Note>,
}

struct Note {
    about: ObjectReference,
    component: &'static str,
    warning: bool,
    reason: &'static str,
    message: String,
}

impl Recorder {
    /// A recorder and the task that writes for it.
    pub(crate) fn new(registry: Registry) -> (Self, impl Future<Output = ()> + Send) {
        let (sender, receiver) = mpsc::channel(BACKLOG);
        (Self { component: "mesh-control", sender }, write(registry, receiver))
    }

    /// The same recorder, speaking for one component.
    pub(crate) fn of(&self, component: &'static str) -> Self {
        Self { component, sender: self.sender.clone() }
    }

    /// Something happened as it should.
    pub(crate) fn normal<K: Object>(&self, about: &K, reason: &'static str, message: String) {
        self.send(about, false, reason, message);
    }

    /// Something went wrong.
    pub(crate) fn warning<K: Object>(&self, about: &K, reason: &'static str, message: String) {
        self.send(about, true, reason, message);
    }

    fn send<K: Object>(&self, about: &K, warning: bool, reason: &'static str, message: String) {
        let meta = about.metadata();
        let about = ObjectReference {
            api_version: Some(K::API_VERSION.to_owned()),
            kind: Some(K::KIND.to_owned()),
            name: meta.name.clone(),
            namespace: meta.namespace.clone(),
            uid: meta.uid.clone(),
            resource_version: meta.resource_version.clone(),
            field_path: None,
        };
        let note = Note { about, component: self.component, warning, reason, message };
        if let Err(error) = self.sender.try_send(note) {
            tracing::warn!(reason, %error, "event dropped");
        }
    }
}

type Key = (Option<String>, &'static str, String);

async fn write(registry: Registry, mut receiver: mpsc::Receiver<Note>) {
    let mut recent: HashMap<Key, (String, String)> = HashMap::new();
    let mut order: VecDeque<Key> = VecDeque::new();
    while let Some(note) = receiver.recv().await {
        let key = (note.about.uid.clone(), note.reason, note.message.clone());
        if let Some((ns, name)) = recent.get(&key)
            && repeat(&registry, ns, name).await
        {
            continue;
        }
        let event = event(note);
        match registry.create(&event).await {
            Ok(event) => {
                let place = (
                    objects::namespace(&event.metadata).to_owned(),
                    objects::name(&event.metadata).to_owned(),
                );
                if recent.insert(key.clone(), place).is_none() {
                    order.push_back(key);
                }
                if order.len() > REMEMBERED
                    && let Some(oldest) = order.pop_front()
                {
                    recent.remove(&oldest);
                }
            }
            // A namespace that is being deleted takes no events.
            Err(error) => tracing::debug!(%error, "event not written"),
        }
    }
}

/// Counts one more on an event. Whether it still existed.
async fn repeat(registry: &Registry, ns: &str, name: &str) -> bool {
    let Ok(mut event) = registry.get::<Event>(Some(ns), name) else {
        return false;
    };
    event.count = Some(event.count.unwrap_or(1).saturating_add(1));
    event.last_timestamp = Some(Time(Timestamp::now()));
    registry.update(&event).await.is_ok()
}

fn event(note: Note) -> Event {
    let now = Time(Timestamp::now());
    let ns = note.about.namespace.clone().unwrap_or_else(|| "default".to_owned());
    let name = note.about.name.as_deref().unwrap_or_default();
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{name}.{:x}", rand::random::<u64>())),
            namespace: Some(ns),
            ..ObjectMeta::default()
        },
        type_: Some(if note.warning { "Warning" } else { "Normal" }.to_owned()),
        reason: Some(note.reason.to_owned()),
        message: Some(note.message),
        count: Some(1),
        first_timestamp: Some(now.clone()),
        last_timestamp: Some(now),
        source: Some(EventSource { component: Some(note.component.to_owned()), host: None }),
        reporting_component: Some(note.component.to_owned()),
        reporting_instance: Some(String::new()),
        involved_object: note.about,
        ..Event::default()
    }
}

/// Deletes events that are older than `ttl`, for ever.
pub(super) async fn expire(registry: Registry, ttl: Duration) {
    let pause = (ttl / 10).clamp(Duration::from_millis(100), Duration::from_secs(300));
    loop {
        tokio::time::sleep(pause).await;
        let events = match registry.list::<Event>(None) {
            Ok(listed) => listed.items,
            Err(error) => {
                tracing::warn!(%error, "cannot list events; will retry");
                continue;
            }
        };
        let now = Timestamp::now();
        for event in events.iter().filter(|event| is_older(event, ttl, now)) {
            let meta = &event.metadata;
            let gone = registry
                .delete::<Event>(
                    meta.namespace.as_deref(),
                    objects::name(meta),
                    &DeleteOptions::default(),
                )
                .await;
            if let Err(error) = gone {
                tracing::debug!(%error, "old event not deleted");
            }
        }
    }
}

fn is_older(event: &Event, ttl: Duration, now: Timestamp) -> bool {
    let series = event.series.as_ref().and_then(|s| s.last_observed_time.as_ref()).map(|t| t.0);
    let last = event
        .last_timestamp
        .as_ref()
        .map(|t| t.0)
        .or(series)
        .or(event.event_time.as_ref().map(|t| t.0))
        .unwrap_or_else(|| objects::created(&event.metadata));
    last.checked_add(ttl).is_ok_and(|end| end <= now)
}
