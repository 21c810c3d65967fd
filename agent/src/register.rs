//! The node's own objects: its Node, and the Lease that says it is alive.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, Patch, PatchParams, PostParams};
use mesh_model::snapshot::WgKey;
use mesh_model::{NodeName, wellknown};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::errors::chain;

mod facts;
mod lease;

use facts::Facts;

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
    pub(crate) overlay: &'static str,
    pub(crate) overlay_port: u16,
    /// How long the first report waits for the node to be ready.
    pub(crate) patience: Duration,
    /// Name and version of the container runtime, once it has answered.
    pub(crate) container_runtime: Arc<OnceLock<String>>,
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
    let facts = Facts::read();
    let mut transition = Timestamp::now();
    let mut reported: Option<bool> = None;
    let mut away = false;
    loop {
        let now = readiness.borrow_and_update().clone();
        registration.keys.mark_unchanged();
        if reported != Some(now.ready) {
            transition = Timestamp::now();
        }
        let pause = match report(&nodes, &registration, &facts, &now, transition).await {
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
        }
    }
}

async fn report(
    nodes: &Api<Node>,
    registration: &Registration,
    facts: &Facts,
    readiness: &Readiness,
    transition: Timestamp,
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
    let status = status(registration, facts, readiness, transition);
    nodes.patch_status(name, &params, &Patch::Merge(&status)).await.map(drop)
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

fn status(
    registration: &Registration,
    facts: &Facts,
    readiness: &Readiness,
    transition: Timestamp,
) -> Value {
    let mut addresses: Vec<Value> = registration
        .addresses
        .iter()
        .map(|a| json!({"type": "InternalIP", "address": a}))
        .collect();
    addresses.push(json!({"type": "Hostname", "address": registration.node}));
    let resources = facts.resources();
    json!({"status": {
        "addresses": addresses,
        "capacity": resources,
        "allocatable": resources,
        "conditions": [{
            "type": "Ready",
            "status": if readiness.ready { "True" } else { "False" },
            "reason": readiness.reason,
            "message": readiness.message,
            "lastHeartbeatTime": lease::seconds(Timestamp::now()),
            "lastTransitionTime": lease::seconds(transition),
        }],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": wellknown::AGENT_PORT}},
        "nodeInfo": facts.node_info(registration.container_runtime.get().map_or(UNKNOWN_RUNTIME, String::as_str)),
    }})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_says_how_to_reach_it() {
        let registration = Registration {
            node: "node-1".parse().unwrap(),
            addresses: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
            public_key: WgKey([7; 32]),
            keys: watch::channel(Some(vec![WgKey([7; 32])])).1,
            overlay: "user",
            overlay_port: 51_900,
            patience: Duration::ZERO,
            container_runtime: Arc::default(),
        };
        let mut object = metadata(&registration);
        let endpoints = &object["metadata"]["annotations"][wellknown::ANNOTATION_ENDPOINTS];
        assert_eq!(endpoints, "192.0.2.1:51900,[2001:db8::1]:51900");
        let keys = wellknown::ANNOTATION_WIREGUARD_KEYS;
        assert!(object["metadata"]["annotations"][keys].is_null(), "its name says it all");
        let two = vec![WgKey([8; 32]), WgKey([9; 32])];
        let replacing = Registration { keys: watch::channel(Some(two)).1, ..registration.clone() };
        let announced = metadata(&replacing)["metadata"]["annotations"][keys].clone();
        let expected = format!("{},{}", WgKey([8; 32]), WgKey([9; 32]));
        assert_eq!(announced, expected);
        object["metadata"]["annotations"][keys] = announced;
        let status =
            status(&registration, &Facts::read(), &Readiness::starting(), Timestamp::UNIX_EPOCH);
        object["status"] = status["status"].clone();
        let node: Node = serde_json::from_value(object).unwrap();
        let status = node.status.unwrap();
        assert_eq!(status.conditions.unwrap()[0].status, "False");
        let capacity = status.capacity.unwrap();
        assert!(capacity["memory"].0.ends_with("Ki") && capacity["cpu"].0 != "0");
    }
}
