//! Services that some node's maps have no room for: a condition on each, of what the nodes report in annotations of their own Nodes.
//!
//! A node may write nothing of a Service. What it reports goes with its Node, and with it its part of the conditions.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use mesh_model::ObjectKey;
use mesh_model::shortage::{Shortages, cure};
use mesh_model::wellknown::{ANNOTATION_MAPS_FULL, CONDITION_MAP_FULL};

use super::queue::WorkQueue;
use super::recorder::Recorder;
use super::runtime::{Context, Reconcile, key};
use crate::error::ApiError;
use crate::objects;

/// What many nodes report at about the same time is one write.
const PAUSE: Duration = Duration::from_millis(500);
/// Names of nodes in a message.
const NAMED: usize = 5;

pub(super) struct Controller {
    context: Arc<Context>,
    recorder: Recorder,
    reports: Arc<Mutex<Reports>>,
}

impl Controller {
    pub(super) fn new(context: Arc<Context>) -> (Arc<Self>, Arc<WorkQueue<ObjectKey>>) {
        let queue = WorkQueue::new();
        let reports = Arc::new(Mutex::new(Reports::default()));
        let (sink, heard) = (queue.clone(), reports.clone());
        context.nodes.listen(move |old, new| {
            let said = |node: Option<&Arc<Node>>| node.and_then(|node| annotation(node).cloned());
            let (before, now) = (said(old), said(new));
            let Some(node) = new.or(old).filter(|_| before != now) else { return };
            let report = now.and_then(|text| Shortages::read(&text)).unwrap_or_default();
            let changed = lock(&heard).hear(objects::name(&node.metadata), &report);
            changed.into_iter().for_each(|service| sink.add_after(service, PAUSE));
        });
        let (sink, heard) = (queue.clone(), reports.clone());
        context.services.listen(move |_, new| {
            let Some(service) = new else { return };
            let key = key(&**service);
            if condition(service).is_some() || lock(&heard).services.contains_key(&key) {
                sink.add_after(key, PAUSE);
            }
        });
        let recorder = context.recorder.of("capacity-controller");
        (Arc::new(Self { context, recorder, reports }), queue)
    }
}

#[async_trait]
impl Reconcile for Controller {
    type Key = ObjectKey;
    const NAME: &'static str = "capacity";

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, ApiError> {
        let Some(service) = self.context.services.get(&key.namespace, &key.name) else {
            return Ok(None);
        };
        let message = lock(&self.reports).message(key);
        let present = condition(&service);
        if present.map(|condition| &condition.message) == message.as_ref() {
            return Ok(None);
        }
        let new = judged(&service, message.clone(), Timestamp::now());
        self.context.services.wrote(self.context.registry.update_status(&new).await?);
        match (present, message) {
            (None, Some(message)) => self.recorder.warning(&new, "MapFull", message),
            (Some(_), None) => {
                let message = "the maps of all nodes have room for it again".to_owned();
                self.recorder.normal(&new, "MapFits", message);
            }
            _ => {}
        }
        Ok(None)
    }

    fn all(&self) -> Vec<ObjectKey> {
        let services = self.context.services.all();
        let marked = services.iter().filter(|service| condition(service).is_some());
        let mut all: BTreeSet<ObjectKey> = marked.map(|service| key(&**service)).collect();
        all.extend(lock(&self.reports).services.keys().cloned());
        all.into_iter().collect()
    }
}

fn lock(reports: &Mutex<Reports>) -> MutexGuard<'_, Reports> {
    reports.lock().unwrap_or_else(PoisonError::into_inner)
}

fn annotation(node: &Node) -> Option<&String> {
    node.metadata.annotations.as_ref()?.get(ANNOTATION_MAPS_FULL)
}

fn condition(service: &Service) -> Option<&Condition> {
    let mut conditions = service.status.as_ref()?.conditions.iter().flatten();
    conditions.find(|condition| condition.type_ == CONDITION_MAP_FULL)
}

/// The Service with the condition, or without it. Those of others stay as they are.
fn judged(service: &Service, message: Option<String>, now: Timestamp) -> Service {
    let since = condition(service).map_or(Time(now), |known| known.last_transition_time.clone());
    let mut new = service.clone();
    let status = new.status.get_or_insert_default();
    let mut conditions = status.conditions.take().unwrap_or_default();
    conditions.retain(|condition| condition.type_ != CONDITION_MAP_FULL);
    conditions.extend(message.map(|message| Condition {
        type_: CONDITION_MAP_FULL.to_owned(),
        status: "True".to_owned(),
        reason: "MapFull".to_owned(),
        message,
        observed_generation: service.metadata.generation,
        last_transition_time: since,
    }));
    status.conditions = Some(conditions).filter(|conditions| !conditions.is_empty());
    new
}

/// Full maps by name, and the nodes that have them with their capacities.
type Full = BTreeMap<String, BTreeMap<String, u32>>;

/// What the nodes have reported.
#[derive(Default)]
struct Reports {
    nodes: BTreeMap<String, BTreeSet<(ObjectKey, String)>>,
    services: BTreeMap<ObjectKey, Full>,
}

impl Reports {
    /// Takes in what a node reports now. Returns the Services of which it reports something else than before.
    fn hear(&mut self, node: &str, report: &Shortages) -> BTreeSet<ObjectKey> {
        let before = self.nodes.remove(node).unwrap_or_default();
        let mut now = BTreeSet::new();
        let mut changed = BTreeSet::new();
        for (map, shortage) in &report.0 {
            for service in &shortage.services {
                now.insert((service.clone(), map.clone()));
                let nodes = self.services.entry(service.clone()).or_default();
                let nodes = nodes.entry(map.clone()).or_default();
                if nodes.insert(node.to_owned(), shortage.capacity) != Some(shortage.capacity) {
                    changed.insert(service.clone());
                }
            }
        }
        for (service, map) in before.difference(&now) {
            self.forget(node, service, map);
            changed.insert(service.clone());
        }
        if !now.is_empty() {
            self.nodes.insert(node.to_owned(), now);
        }
        changed
    }

    fn forget(&mut self, node: &str, service: &ObjectKey, map: &str) {
        let Some(full) = self.services.get_mut(service) else { return };
        if let Some(nodes) = full.get_mut(map) {
            nodes.remove(node);
        }
        full.retain(|_, nodes| !nodes.is_empty());
        if full.is_empty() {
            self.services.remove(service);
        }
    }

    /// What people read about a Service; nothing when all nodes have room for it.
    fn message(&self, service: &ObjectKey) -> Option<String> {
        let full = self.services.get(service)?.iter();
        let sentences = full.map(|(map, nodes)| {
            format!(
                "map {map} is full on {}: clients there do not reach all of the Service; {}",
                list(nodes),
                cure(map)
            )
        });
        Some(sentences.collect::<Vec<_>>().join(". "))
    }
}

fn list(nodes: &BTreeMap<String, u32>) -> String {
    let named = nodes.iter().take(NAMED);
    let named: Vec<_> =
        named.map(|(node, capacity)| format!("node {node} ({capacity} entries)")).collect();
    match nodes.len() - named.len() {
        0 => named.join(", "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use mesh_model::shortage::Shortage;
    use serde_json::json;

    use super::*;

    fn report(map: &str, capacity: u32, services: &[&str]) -> Shortages {
        let services = services.iter().map(|name| ObjectKey::new("x", *name)).collect();
        let shortage = Shortage { capacity, services, ..Shortage::default() };
        Shortages(BTreeMap::from([(map.to_owned(), shortage)]))
    }

    fn names(keys: BTreeSet<ObjectKey>) -> Vec<String> {
        keys.into_iter().map(|key| key.name).collect()
    }

    #[test]
    fn a_service_hears_of_all_nodes_and_only_of_what_changes() {
        let mut reports = Reports::default();
        assert_eq!(names(reports.hear("n1", &report("SLOTS", 64, &["a", "b"]))), ["a", "b"]);
        assert_eq!(names(reports.hear("n1", &report("SLOTS", 64, &["a", "b"]))), [""; 0]);
        assert_eq!(names(reports.hear("n2", &report("SLOTS", 64, &["b"]))), ["b"]);
        assert_eq!(names(reports.hear("n1", &report("SLOTS", 128, &["b", "c"]))), ["a", "b", "c"]);
        assert_eq!(reports.message(&ObjectKey::new("x", "a")), None);
        assert_eq!(
            reports.message(&ObjectKey::new("x", "b")).unwrap(),
            "map SLOTS is full on node n1 (128 entries), node n2 (64 entries): clients there do not reach all of \
             the Service; raise --max-backends of mesh-agent and boot or reset the node"
        );
        assert_eq!(names(reports.hear("n1", &report("EDGE_SOURCES", 64, &["b"]))), ["b", "c"]);
        let both = reports.message(&ObjectKey::new("x", "b")).unwrap();
        assert!(both.contains("map EDGE_SOURCES is full on node n1") && both.contains("node n2"));
        for (node, left) in [("n2", 1), ("n1", 0)] {
            assert_eq!(names(reports.hear(node, &Shortages::default())), ["b"]);
            assert_eq!(reports.services.len(), left);
        }
        assert!(reports.nodes.is_empty());
    }

    #[test]
    fn many_nodes_are_counted() {
        let mut reports = Reports::default();
        for n in 0..9 {
            reports.hear(&format!("n{n}"), &report("SLOTS", 64, &["a"]));
        }
        let message = reports.message(&ObjectKey::new("x", "a")).unwrap();
        assert!(message.contains("node n4 (64 entries) and 4 more: "), "{message}");
    }

    #[test]
    fn conditions_of_others_stay_and_ours_keeps_its_time() {
        let at = |secs| Timestamp::from_second(secs).unwrap();
        let other = json!({"type": "example.com/Ready", "status": "True", "reason": "R", "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z"});
        let service: Service = serde_json::from_value(json!({"metadata": {"name": "s"},
            "status": {"conditions": [other], "loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}}))
        .unwrap();
        let first = judged(&service, Some("one".to_owned()), at(1));
        let second = judged(&first, Some("two".to_owned()), at(2));
        let ours = condition(&second).unwrap();
        assert_eq!((ours.message.as_str(), ours.last_transition_time.0), ("two", at(1)));
        assert_eq!(second.status.as_ref().unwrap().conditions.as_ref().unwrap().len(), 2);
        assert_eq!(judged(&second, None, at(3)), service);
    }
}
