//! Pods as policies see them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;

use super::Labels;
use super::words::Vocabulary;
use crate::snapshot::Protocol;
use crate::{NodeName, ObjectKey, containers};

static NO_LABELS: Labels = BTreeMap::new();

/// Ports by name and protocol.
pub(super) type NamedPorts = BTreeMap<(String, Protocol), u16>;

/// A pod with a network of its own.
#[derive(PartialEq, Eq)]
pub(super) struct Endpoint<'a> {
    pub(super) key: ObjectKey,
    pub(super) labels: &'a Labels,
    /// Ports of its containers and sidecars that have a name; the first of a name counts.
    pub(super) named_ports: BTreeMap<(&'a str, Protocol), u16>,
}

/// Who a pod is, as far as any policy can tell: all pods of a kind are one.
pub(super) struct Kind {
    /// What tells it from others.
    pub(super) text: String,
    pub(super) namespace: String,
    /// Labels and ports that policies speak of.
    pub(super) labels: Labels,
    pub(super) named_ports: NamedPorts,
}

impl<'a> Endpoint<'a> {
    /// A pod that speaks for itself: not in the node's network, and not over.
    pub(super) fn of(pod: &'a Pod) -> Option<Self> {
        let spec = pod.spec.as_ref()?;
        if spec.host_network == Some(true) || containers::have_ended(pod) {
            return None;
        }
        let mut named_ports = BTreeMap::new();
        for port in containers::lasting(spec).flat_map(|c| c.ports.iter().flatten()) {
            let (Some(name), Some(protocol), Ok(number)) = (
                port.name.as_deref(),
                Protocol::parse(port.protocol.as_deref()),
                u16::try_from(port.container_port),
            ) else {
                continue;
            };
            named_ports.entry((name, protocol)).or_insert(number);
        }
        Some(Self {
            key: key(pod)?,
            labels: pod.metadata.labels.as_ref().unwrap_or(&NO_LABELS),
            named_ports,
        })
    }

    /// The same, of this node.
    pub(super) fn on_node(pod: &'a Pod, node: &NodeName) -> Option<Self> {
        let bound = pod.spec.as_ref()?.node_name.as_deref() == Some(node.as_str());
        bound.then(|| Self::of(pod)).flatten()
    }

    pub(super) fn kind(&self, vocabulary: &Vocabulary) -> Kind {
        let labels = self.labels.iter().filter(|(key, _)| vocabulary.has_label(key));
        let ports = self.named_ports.iter().filter(|((name, _), _)| vocabulary.has_port(name));
        let owned = |(&(name, protocol), port): (&(&str, Protocol), &u16)| {
            ((name.to_owned(), protocol), *port)
        };
        let mut kind = Kind {
            text: format!("pods of {}", self.key.namespace),
            namespace: self.key.namespace.clone(),
            labels: labels.map(|(key, value)| (key.clone(), value.clone())).collect(),
            named_ports: ports.map(owned).collect(),
        };
        for (key, value) in &kind.labels {
            let _ = write!(kind.text, " {key}={value}");
        }
        for ((name, protocol), port) in &kind.named_ports {
            let _ = write!(kind.text, " {name}:{port}/{protocol}");
        }
        kind
    }
}

pub(super) fn key(pod: &Pod) -> Option<ObjectKey> {
    Some(ObjectKey::new(pod.metadata.namespace.clone()?, pod.metadata.name.clone()?))
}

/// A pod's addresses, ordered.
pub(super) fn addresses(pod: &Pod) -> Vec<IpAddr> {
    let status = pod.status.as_ref();
    let all = status.and_then(|s| s.pod_ips.as_ref()).into_iter().flatten().map(|ip| &ip.ip);
    let first = status.and_then(|s| s.pod_ip.as_ref());
    let mut addresses: Vec<IpAddr> = all.chain(first).filter_map(|ip| ip.parse().ok()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_of_sidecars_have_names_too() {
        let ports =
            |name: &str, number: u16| serde_json::json!([{"name": name, "containerPort": number}]);
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"namespace": "n", "name": "p"},
            "spec": {
                "containers": [{"name": "c", "ports": ports("web", 80)}],
                "initContainers": [
                    {"name": "i", "ports": ports("once", 1)},
                    {"name": "s", "restartPolicy": "Always", "ports": ports("metrics", 9090)},
                    {"name": "t", "restartPolicy": "Always", "ports": ports("web", 81)}]}}))
        .unwrap();
        let found = Endpoint::of(&pod).unwrap().named_ports;
        let port = |name| found.get(&(name, Protocol::Tcp)).copied();
        assert_eq!((port("web"), port("metrics"), port("once")), (Some(80), Some(9090), None));
    }
}
