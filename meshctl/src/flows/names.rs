//! Names of pods on other nodes: a node knows its own only, the API knows all.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use mesh_model::ObjectKey;
use mesh_model::flow::{Flow, FlowParty};
use serde_json::Value;

use crate::source::Source;

/// Between two lists of all pods.
const REFRESH: Duration = Duration::from_secs(5);

/// Pods by address, as far as the API tells.
pub(super) struct PodNames<'s> {
    source: &'s Source,
    pods: BTreeMap<IpAddr, ObjectKey>,
    asked: Option<Instant>,
}

impl<'s> PodNames<'s> {
    pub(super) fn new(source: &'s Source) -> Self {
        Self { source, pods: BTreeMap::new(), asked: None }
    }

    /// Fills in pods that the node did not know.
    pub(super) async fn complete(&mut self, flow: &mut Flow) {
        let unknown = |party: &FlowParty| party.pod.is_none() && party.node.is_some();
        for party in [&mut flow.source, &mut flow.destination] {
            if unknown(party) && !self.pods.contains_key(&party.address) {
                self.refresh().await;
            }
            if unknown(party) {
                party.pod = self.pods.get(&party.address).cloned();
            }
        }
    }

    async fn refresh(&mut self) {
        let Source::Api(api) = self.source else { return };
        if self.asked.is_some_and(|asked| asked.elapsed() < REFRESH) {
            return;
        }
        // Without the list, addresses have to do.
        if let Ok(list) = api.read("/api/v1/pods").await {
            self.pods = pods(&list);
        }
        self.asked = Some(Instant::now());
    }
}

/// Pods that run, but for those on their node's own network.
fn pods(list: &Value) -> BTreeMap<IpAddr, ObjectKey> {
    let mut all = BTreeMap::new();
    for pod in list["items"].as_array().into_iter().flatten() {
        let meta = &pod["metadata"];
        let (Some(namespace), Some(name)) = (meta["namespace"].as_str(), meta["name"].as_str())
        else {
            continue;
        };
        let over = matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
        if over || pod["spec"]["hostNetwork"] == true {
            continue;
        }
        let addresses = pod["status"]["podIPs"].as_array().into_iter().flatten();
        for address in addresses.filter_map(|ip| ip["ip"].as_str()?.parse().ok()) {
            all.insert(address, ObjectKey::new(namespace, name));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_that_are_over_or_on_the_node_have_no_address() {
        let pod = |name: &str, ip: &str, phase: &str, host: bool| {
            serde_json::json!({
                "metadata": { "namespace": "default", "name": name },
                "spec": { "hostNetwork": host },
                "status": { "phase": phase, "podIPs": [{ "ip": ip }, { "ip": "fd00::1" }] }
            })
        };
        let list = serde_json::json!({ "items": [
            pod("old", "10.244.1.5", "Succeeded", false),
            pod("new", "10.244.1.5", "Running", false),
            pod("host", "192.0.2.1", "Running", true),
        ]});
        let all = pods(&list);
        let name = |ip: &str| all.get(&ip.parse::<IpAddr>().unwrap()).map(|k| k.name.as_str());
        assert_eq!((name("10.244.1.5"), name("fd00::1")), (Some("new"), Some("new")));
        assert_eq!(name("192.0.2.1"), None);
    }
}
