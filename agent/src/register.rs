//! The node's own objects: its Node, and the Lease that says it is alive.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, Patch, PatchParams, PostParams};
use mesh_model::shortage::Shortages;
use mesh_model::snapshot::WgKey;
use mesh_model::{NodeName, wellknown};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::errors::chain;
use crate::pods::Pressures;

mod facts;
mod lease;

use facts::Facts;
pub(crate) use facts::storage_kib;

/// The form is the API's; nobody parses it.
const UNKNOWN_RUNTIME: &str = "unknown://unknown";
/// Between two reports of an unchanged status.
const HEARTBEAT: Duration = Duration::from_secs(60);
/// After a report that did not get through.
const RETRY: Duration = Duration::from_secs(2);

/// What the node says about itself, apart from what it measures.
#[derive(Debug, Clone)]
pub(crate) struct Registration {
    pub(crate) node: NodeName,
    pub(crate) addresses: Vec<IpAddr>,
    /// The key that the node had first.
    pub(crate) public_key: WgKey,
    /// Those in use, once they are known to be.
    pub(crate) keys: watch::Receiver<Option<Vec<WgKey>>>,
    /// How many pod blocks of each family it asks for; nothing to leave that as it is.
    pub(crate) blocks_wanted: watch::Receiver<Option<usize>>,
    pub(crate) overlay: &'static str,
    pub(crate) overlay_port: u16,
    /// How long the first report waits for the node to be ready.
    pub(crate) patience: Duration,
    /// Name and version of the container runtime, once it has answered.
    pub(crate) container_runtime: Arc<OnceLock<String>>,
    /// A directory on the disk that pods write to.
    pub(crate) disk: PathBuf,
    /// What the node runs out of; absent where somebody else runs the pods.
    pub(crate) pressures: Option<watch::Receiver<Pressures>>,
    /// Which maps are full, once that is known.
    pub(crate) maps_full: watch::Receiver<Option<Shortages>>,
}

/// Whether pods can be started here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Readiness {
    /// Ready or not.
    pub(crate) ready: bool,
    /// One word in CamelCase.
    pub(crate) reason: &'static str,
    /// A sentence.
    pub(crate) message: String,
}

impl Readiness {
    /// The state before the first reconciliation.
    pub(crate) fn starting() -> Self {
        Self { ready: false, reason: "Starting", message: "the agent is starting".to_owned() }
    }
}

/// Keeps the Node and its Lease up to date; never returns. Failures are retried: the node works without them.
pub(crate) async fn run(
    client: kube::Client,
    mut registration: Registration,
    mut readiness: watch::Receiver<Readiness>,
) {
    tokio::spawn(lease::renew(client.clone(), registration.node.clone()));
    // A node that was ready a moment ago, and whose pods run, is not to be called unready because its agent restarts.
    let ready = readiness.wait_for(|readiness| readiness.ready);
    let _ = tokio::time::timeout(registration.patience, ready).await;
    let nodes: Api<Node> = Api::all(client);
    let facts = Facts::read(&registration.disk);
    let mut transition = Timestamp::now();
    let mut since = Since::default();
    let mut reported: Option<bool> = None;
    let mut away = false;
    loop {
        let now = readiness.borrow_and_update().clone();
        registration.keys.mark_unchanged();
        registration.blocks_wanted.mark_unchanged();
        if reported != Some(now.ready) {
            transition = Timestamp::now();
        }
        since.note(registration.pressures.as_mut(), Timestamp::now());
        since.note_maps(&mut registration.maps_full, Timestamp::now());
        let conditions = conditions(&now, transition, &since);
        let pause = match report(&nodes, &registration, &facts, conditions).await {
            Ok(()) => {
                away = false;
                if reported != Some(now.ready) {
                    tracing::info!(ready = now.ready, reason = now.reason, "node status reported");
                }
                reported = Some(now.ready);
                HEARTBEAT
            }
            Err(error) => {
                if std::mem::replace(&mut away, true) {
                    tracing::debug!(error = chain(&error), "node status still not reported");
                } else {
                    tracing::warn!(error = chain(&error), "node status not reported, trying again");
                }
                RETRY
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            changed = readiness.changed() => if changed.is_err() { return },
            // Of an agent that ends; until then there is nothing to miss.
            Ok(()) = registration.keys.changed() => {}
            Ok(()) = changed(registration.pressures.as_mut()) => {}
            Ok(()) = registration.maps_full.changed() => {}
            Ok(()) = registration.blocks_wanted.changed() => {}
        }
    }
}

async fn report(
    nodes: &Api<Node>,
    registration: &Registration,
    facts: &Facts,
    conditions: Vec<Value>,
) -> Result<(), kube::Error> {
    let name = registration.node.as_str();
    let metadata = metadata(registration);
    let params = PatchParams::default();
    match nodes.patch(name, &params, &Patch::Merge(&metadata)).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.code == 404 => {
            let mut object = metadata;
            object["metadata"]["name"] = json!(name);
            // What a patch removes is not there.
            if let Some(annotations) = object["metadata"]["annotations"].as_object_mut() {
                annotations.retain(|_, value| !value.is_null());
            }
            object["spec"] = json!({});
            let node: Node = serde_json::from_value(object).map_err(kube::Error::SerdeError)?;
            nodes.create(&PostParams::default(), &node).await?;
        }
        Err(error) => return Err(error),
    }
    let status = status_patch(registration, facts, conditions);
    nodes.patch_status(name, &params, &Patch::Strategic(&status)).await.map(drop)
}

fn metadata(registration: &Registration) -> Value {
    let endpoints: Vec<String> = registration
        .addresses
        .iter()
        .map(|a| SocketAddr::new(*a, registration.overlay_port).to_string())
        .collect();
    let mut annotations = BTreeMap::from([
        (wellknown::ANNOTATION_WIREGUARD_KEY, Some(registration.public_key.to_string())),
        (wellknown::ANNOTATION_ENDPOINTS, Some(endpoints.join(","))),
        (wellknown::ANNOTATION_OVERLAY, Some(registration.overlay.to_owned())),
    ]);
    // What was published is not taken back before it is known to be out of date.
    if let Some(keys) = &*registration.keys.borrow() {
        let keys = (*keys != [registration.public_key]).then(|| {
            let keys: Vec<String> = keys.iter().map(ToString::to_string).collect();
            keys.join(",")
        });
        annotations.insert(wellknown::ANNOTATION_WIREGUARD_KEYS, keys);
    }
    if let Some(full) = &*registration.maps_full.borrow() {
        annotations.insert(wellknown::ANNOTATION_MAPS_FULL, full.annotation());
    }
    if let Some(wanted) = *registration.blocks_wanted.borrow() {
        annotations.insert(wellknown::ANNOTATION_BLOCKS_WANTED, Some(wanted.to_string()));
    }
    let labels = BTreeMap::from([
        (wellknown::LABEL_HOSTNAME, registration.node.as_str()),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", facts::architecture()),
    ]);
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"labels": labels, "annotations": annotations},
    })
}

/// What the node runs out of, and since when that is so.
#[derive(Debug, Default)]
struct Since {
    pressures: [Option<(bool, Timestamp)>; 3],
    /// With the words for it.
    maps: Option<(bool, Timestamp, String)>,
}

impl Since {
    fn note_maps(&mut self, full: &mut watch::Receiver<Option<Shortages>>, now: Timestamp) {
        let Some(full) = &*full.borrow_and_update() else { return };
        let lacking = !full.0.is_empty();
        let before = self.maps.take().filter(|(before, ..)| *before == lacking);
        let since = before.map_or(now, |(_, since, _)| since);
        self.maps = Some((lacking, since, full.message()));
    }

    fn note(&mut self, pressures: Option<&mut watch::Receiver<Pressures>>, now: Timestamp) {
        let Some(pressures) = pressures else { return };
        let told = *pressures.borrow_and_update();
        for (entry, told) in self.pressures.iter_mut().zip([told.memory, told.disk, told.pids]) {
            if entry.is_none_or(|(before, _)| before != told) {
                *entry = Some((told, now));
            }
        }
    }
}

async fn changed(
    pressures: Option<&mut watch::Receiver<Pressures>>,
) -> Result<(), watch::error::RecvError> {
    match pressures {
        Some(pressures) => pressures.changed().await,
        None => std::future::pending().await,
    }
}

/// Type, reasons of both states, and what runs out.
const PRESSURES: [(&str, &str, &str, &str); 3] = [
    ("MemoryPressure", "HasInsufficientMemory", "HasSufficientMemory", "memory"),
    ("DiskPressure", "HasDiskPressure", "HasNoDiskPressure", "disk space"),
    ("PIDPressure", "HasInsufficientPID", "HasSufficientPID", "process identifiers"),
];

fn conditions(readiness: &Readiness, transition: Timestamp, since: &Since) -> Vec<Value> {
    let one = |kind: &str, status: bool, reason: &str, message: &str, since| {
        json!({
            "type": kind,
            "status": if status { "True" } else { "False" },
            "reason": reason,
            "message": message,
            "lastHeartbeatTime": lease::seconds(Timestamp::now()),
            "lastTransitionTime": lease::seconds(since),
        })
    };
    let pressures = PRESSURES.iter().zip(since.pressures).filter_map(|(names, told)| {
        let ((kind, bad, good, what), (under, since)) = (*names, told?);
        let (reason, words) = if under { (bad, "is short of") } else { (good, "has enough") };
        Some(one(kind, under, reason, &format!("the node {words} {what}"), since))
    });
    let maps = since.maps.iter().map(|(full, since, message)| {
        let reason = if *full { "MapsFull" } else { "MapsFit" };
        one(wellknown::CONDITION_MAPS_FULL, *full, reason, message, *since)
    });
    let (ready, reason) = (readiness.ready, readiness.reason);
    pressures
        .chain(maps)
        .chain([one("Ready", ready, reason, &readiness.message, transition)])
        .collect()
}

/// A strategic merge patch: conditions that others set stay. Addresses would be merged by their type, of which a node has two alike.
fn status_patch(registration: &Registration, facts: &Facts, conditions: Vec<Value>) -> Value {
    let own = registration.addresses.iter().map(|a| json!({"type": "InternalIP", "address": a}));
    let mut addresses: Vec<Value> = [json!({"$patch": "replace"})].into_iter().chain(own).collect();
    addresses.push(json!({"type": "Hostname", "address": registration.node}));
    let resources = facts.resources();
    json!({"status": {
        "addresses": addresses,
        "capacity": resources,
        "allocatable": resources,
        "conditions": conditions,
        "daemonEndpoints": {"kubeletEndpoint": {"Port": wellknown::AGENT_PORT}},
        "nodeInfo": facts.node_info(registration.container_runtime.get().map_or(UNKNOWN_RUNTIME, String::as_str)),
    }})
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::NodeCondition;

    use super::*;

    #[test]
    fn full_maps_are_told_from_when_they_are_known_to_when_they_are_known_to_fit() {
        let at = |secs| Timestamp::from_second(secs).unwrap();
        let mut since = Since::default();
        let (full, mut heard) = watch::channel(None);
        let told = |since: &Since| {
            let all = conditions(&Readiness::starting(), at(0), since);
            let mut maps = all.into_iter().filter(|c| c["type"] == "MeshMapsFull");
            maps.next().map(|c| (c["status"].clone(), c["lastTransitionTime"].clone()))
        };
        since.note_maps(&mut heard, at(1));
        assert_eq!(told(&since), None, "an agent that starts takes nothing back");
        let one = |capacity| {
            let map = mesh_model::shortage::Shortage { capacity, ..Default::default() };
            Some(Shortages([("SLOTS".to_owned(), map)].into()))
        };
        for (secs, now, status, from) in [
            (2, one(64), "True", 2),
            (3, one(65), "True", 2),
            (4, Some(Shortages::default()), "False", 4),
        ] {
            full.send_replace(now);
            since.note_maps(&mut heard, at(secs));
            assert_eq!(told(&since), Some((json!(status), json!(lease::seconds(at(from))))));
        }
    }

    #[test]
    fn the_node_says_how_to_reach_it() {
        let registration = Registration {
            node: "node-1".parse().unwrap(),
            addresses: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
            public_key: WgKey([7; 32]),
            keys: watch::channel(Some(vec![WgKey([7; 32])])).1,
            blocks_wanted: watch::channel(Some(2)).1,
            overlay: "user",
            overlay_port: 51_900,
            patience: Duration::ZERO,
            container_runtime: Arc::default(),
            disk: "/".into(),
            pressures: Some(watch::channel(Pressures { disk: true, ..Pressures::default() }).1),
            maps_full: watch::channel(Some(Shortages::default())).1,
        };
        let mut object = metadata(&registration);
        let endpoints = &object["metadata"]["annotations"][wellknown::ANNOTATION_ENDPOINTS];
        assert_eq!(endpoints, "192.0.2.1:51900,[2001:db8::1]:51900");
        let wanted = wellknown::ANNOTATION_BLOCKS_WANTED;
        assert_eq!(object["metadata"]["annotations"][wanted], "2");
        let keys = wellknown::ANNOTATION_WIREGUARD_KEYS;
        assert!(object["metadata"]["annotations"][keys].is_null(), "its name says it all");
        let two = vec![WgKey([8; 32]), WgKey([9; 32])];
        let replacing = Registration { keys: watch::channel(Some(two)).1, ..registration.clone() };
        let announced = metadata(&replacing)["metadata"]["annotations"][keys].clone();
        let expected = format!("{},{}", WgKey([8; 32]), WgKey([9; 32]));
        assert_eq!(announced, expected);
        object["metadata"]["annotations"][keys] = announced;
        let annotations = object["metadata"]["annotations"].as_object_mut().unwrap();
        let full = annotations.remove(wellknown::ANNOTATION_MAPS_FULL);
        assert_eq!(full, Some(Value::Null), "what an agent before said is over");
        let mut since = Since::default();
        let mut pressures = registration.pressures.clone();
        since.note(pressures.as_mut(), Timestamp::UNIX_EPOCH);
        since.note(pressures.as_mut(), Timestamp::now());
        since.note_maps(&mut registration.maps_full.clone(), Timestamp::now());
        let conditions = conditions(&Readiness::starting(), Timestamp::UNIX_EPOCH, &since);
        let mut status = status_patch(&registration, &Facts::read(&registration.disk), conditions);
        let addresses = status["status"]["addresses"].as_array_mut().unwrap();
        assert_eq!(addresses.remove(0), json!({"$patch": "replace"}), "there may be fewer");
        object["status"] = status["status"].clone();
        let node: Node = serde_json::from_value(object).unwrap();
        let status = node.status.unwrap();
        let conditions = status.conditions.unwrap();
        let told: Vec<_> = conditions.iter().map(|c| (&c.type_[..], &c.status[..])).collect();
        let expected = [
            ("MemoryPressure", "False"),
            ("DiskPressure", "True"),
            ("PIDPressure", "False"),
            ("MeshMapsFull", "False"),
            ("Ready", "False"),
        ];
        assert_eq!(told, expected);
        let since = |c: &NodeCondition| c.last_transition_time.as_ref().map(|t| t.0);
        assert_eq!(since(&conditions[1]), Some(Timestamp::UNIX_EPOCH), "not with each report");
        let capacity = status.capacity.unwrap();
        assert!(capacity["ephemeral-storage"].0 != "0Ki");
        assert!(capacity["memory"].0.ends_with("Ki") && capacity["cpu"].0 != "0");
    }
}
