//! The pods at both ends of a probe, as the API has them.

use std::net::IpAddr;

use mesh_model::ObjectKey;
use serde_json::Value;

use crate::connect::Api;
use crate::source::NodeState;

/// A pod as the API has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PodState {
    pub(super) name: ObjectKey,
    pub(super) node: String,
    pub(super) ready: bool,
    pub(super) terminating: bool,
    pub(super) node_ready: bool,
}

/// Where a pod is.
pub(super) struct Place {
    /// Nothing while it is on no node.
    pub(super) node: Option<String>,
    pub(super) addresses: Vec<IpAddr>,
    /// `Pending`, `Running`, ...
    pub(super) phase: String,
}

/// Where the pod is.
pub(super) async fn place(api: &Api, pod: &ObjectKey) -> anyhow::Result<Place> {
    let path = format!("/api/v1/namespaces/{}/pods/{}", pod.namespace, pod.name);
    let object = api.read(&path).await?;
    let node = object["spec"]["nodeName"].as_str().filter(|node| !node.is_empty());
    Ok(Place {
        node: node.map(str::to_owned),
        addresses: addresses(&object).collect(),
        phase: object["status"]["phase"].as_str().unwrap_or("Pending").to_owned(),
    })
}

fn addresses(pod: &Value) -> impl Iterator<Item = IpAddr> + '_ {
    let all = pod["status"]["podIPs"].as_array().into_iter().flatten();
    all.filter_map(|ip| ip["ip"].as_str()?.parse().ok())
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    conditions.into_iter().flatten().any(|c| c["type"] == "Ready" && c["status"] == "True")
}

fn name_of(pod: &Value) -> ObjectKey {
    let part = |name: &str| pod["metadata"][name].as_str().unwrap_or_default().to_owned();
    ObjectKey::new(part("namespace"), part("name"))
}

/// The pod that has the address now.
pub(super) fn with_address(pods: &Value, address: IpAddr, nodes: &[NodeState]) -> Option<PodState> {
    let has = |pod: &&Value| {
        let over = matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
        !over && addresses(pod).any(|ip| ip == address)
    };
    let pod = pods["items"].as_array()?.iter().find(has)?;
    let node = pod["spec"]["nodeName"].as_str().unwrap_or_default().to_owned();
    let node_ready = nodes.iter().any(|n| n.name == node && n.ready);
    let terminating = pod["metadata"]["deletionTimestamp"].is_string();
    Some(PodState { name: name_of(pod), node, ready: is_ready(pod), terminating, node_ready })
}

/// Why a service has no backend.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Selected {
    /// Pods that it selects and that are not ready.
    pub(super) unready: Vec<ObjectKey>,
    /// Those of them that are about to go.
    pub(super) terminating: Vec<ObjectKey>,
    /// Nodes of those that are ready.
    pub(super) ready_on: Vec<String>,
    /// Whether it is to use pods of the client's node only.
    pub(super) local_only: bool,
}

/// The pods that the service selects.
pub(super) async fn selected(api: &Api, pods: &Value, service: &ObjectKey) -> Selected {
    let path = format!("/api/v1/namespaces/{}/services/{}", service.namespace, service.name);
    let Ok(object) = api.read(&path).await else { return Selected::default() };
    select(&object, pods, service)
}

fn select(service: &Value, pods: &Value, name: &ObjectKey) -> Selected {
    let local_only = service["spec"]["internalTrafficPolicy"] == "Local";
    let mut found = Selected { local_only, ..Selected::default() };
    let Some(selector) = service["spec"]["selector"].as_object() else { return found };
    let is_selected = |pod: &&Value| {
        pod["metadata"]["namespace"] == name.namespace.as_str()
            && selector.iter().all(|(key, value)| pod["metadata"]["labels"][key] == *value)
    };
    for pod in pods["items"].as_array().into_iter().flatten().filter(is_selected) {
        if pod["metadata"]["deletionTimestamp"].is_string() {
            found.terminating.push(name_of(pod));
        } else if is_ready(pod) {
            let node = pod["spec"]["nodeName"].as_str().unwrap_or_default();
            found.ready_on.push(node.to_owned());
        } else {
            found.unready.push(name_of(pod));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, phase: &str, ready: &str) -> Value {
        json!({
            "metadata": { "namespace": "default", "name": name, "labels": { "app": "web" } },
            "spec": { "nodeName": "b" },
            "status": { "phase": phase, "podIPs": [{ "ip": "10.244.2.7" }],
                        "conditions": [{ "type": "Ready", "status": ready }] }
        })
    }

    #[test]
    fn pods_are_found_by_address_and_by_what_they_are() {
        let pods =
            json!({ "items": [pod("gone", "Failed", "True"), pod("web-1", "Running", "True")] });
        let nodes = [NodeState { name: "b".to_owned(), ready: false }];
        let found = with_address(&pods, "10.244.2.7".parse().unwrap(), &nodes).unwrap();
        assert_eq!(found.name, ObjectKey::new("default", "web-1"));
        assert!(found.ready && !found.node_ready && !found.terminating);
        assert_eq!(with_address(&pods, "10.244.2.8".parse().unwrap(), &nodes), None);
    }

    #[test]
    fn a_service_knows_why_it_has_no_backend() {
        let mut leaving = pod("leaving", "Running", "True");
        leaving["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        let pods = json!({ "items": [
            pod("here", "Running", "True"), pod("starting", "Running", "False"), leaving
        ]});
        let service = json!({ "spec": { "selector": { "app": "web" },
                                        "internalTrafficPolicy": "Local" } });
        let found = select(&service, &pods, &ObjectKey::new("default", "web"));
        assert_eq!(found.unready, [ObjectKey::new("default", "starting")]);
        assert_eq!(found.terminating, [ObjectKey::new("default", "leaving")]);
        assert_eq!((found.ready_on, found.local_only), (vec!["b".to_owned()], true));
        let other = select(&service, &pods, &ObjectKey::new("shop", "web"));
        assert_eq!(other, Selected { local_only: true, ..Selected::default() });
    }
}
