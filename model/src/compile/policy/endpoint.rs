//! Pods as policies see them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyPort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::Labels;
use super::rules;
use crate::policy::selector;
use crate::snapshot::Protocol;
use crate::{NodeName, ObjectKey};

static NO_LABELS: Labels = BTreeMap::new();

/// A pod with a network of its own.
#[derive(Clone)]
pub(super) struct Endpoint<'a> {
    pub(super) key: ObjectKey,
    pub(super) labels: &'a Labels,
    /// Ports of its containers that have a name; the first of a name counts.
    pub(super) named_ports: BTreeMap<(&'a str, Protocol), u16>,
}

impl<'a> Endpoint<'a> {
    /// A pod that speaks for itself: not in the node's network, and not over.
    pub(super) fn of(pod: &'a Pod) -> Option<Self> {
        let spec = pod.spec.as_ref()?;
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        if spec.host_network == Some(true) || matches!(phase, Some("Succeeded" | "Failed")) {
            return None;
        }
        let mut named_ports = BTreeMap::new();
        for port in spec.containers.iter().flat_map(|c| c.ports.iter().flatten()) {
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
            key: ObjectKey::new(pod.metadata.namespace.clone()?, pod.metadata.name.clone()?),
            labels: pod.metadata.labels.as_ref().unwrap_or(&NO_LABELS),
            named_ports,
        })
    }

    /// The same, of this node.
    pub(super) fn on_node(pod: &'a Pod, node: &NodeName) -> Option<Self> {
        let bound = pod.spec.as_ref()?.node_name.as_deref() == Some(node.as_str());
        bound.then(|| Self::of(pod)).flatten()
    }

    /// Who the pod is, as far as any policy can tell.
    pub(super) fn identity(&self, vocabulary: &Vocabulary<'_>) -> String {
        let mut text = format!("pods of {}", self.key.namespace);
        for (key, value) in self.labels {
            if vocabulary.labels.contains(key.as_str()) {
                let _ = write!(text, " {key}={value}");
            }
        }
        for ((name, protocol), port) in &self.named_ports {
            if vocabulary.ports.contains(name) {
                let _ = write!(text, " {name}:{port}/{protocol}");
            }
        }
        text
    }

    /// The named ports that ingress rules of these policies refer to, as this pod has them.
    pub(super) fn named_ports_of(
        &self,
        policies: &[(&str, &NetworkPolicy)],
    ) -> BTreeMap<(&'a str, Protocol), u16> {
        let names: BTreeSet<&str> = policies
            .iter()
            .flat_map(|(_, policy)| rules::ingress_ports(policy))
            .filter_map(name)
            .collect();
        let mut ports = self.named_ports.clone();
        ports.retain(|(name, _), _| names.contains(name));
        ports
    }
}

fn name(port: &NetworkPolicyPort) -> Option<&str> {
    match &port.port {
        Some(IntOrString::String(name)) => Some(name),
        _ => None,
    }
}

/// A pod's addresses.
pub(super) fn addresses(pod: &Pod) -> impl Iterator<Item = IpAddr> {
    let status = pod.status.as_ref();
    let all = status.and_then(|s| s.pod_ips.as_ref()).into_iter().flatten().map(|ip| &ip.ip);
    let first = status.and_then(|s| s.pod_ip.as_ref());
    all.chain(first).filter_map(|text| text.parse().ok())
}

/// The words that policies use: labels and ports that nobody speaks of make no difference.
pub(super) struct Vocabulary<'a> {
    labels: BTreeSet<&'a str>,
    ports: BTreeSet<&'a str>,
}

impl<'a> Vocabulary<'a> {
    pub(super) fn of(policies: impl Iterator<Item = &'a NetworkPolicy>) -> Self {
        let (mut labels, mut ports) = (BTreeSet::new(), BTreeSet::new());
        for policy in policies {
            let selectors = rules::peers(policy).filter_map(|peer| peer.pod_selector.as_ref());
            labels.extend(selectors.flat_map(selector::keys));
            ports.extend(rules::egress_ports(policy).filter_map(name));
        }
        Self { labels, ports }
    }
}
