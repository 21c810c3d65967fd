//! The words that policies use: labels and ports that nobody speaks of make no difference between pods.

use std::collections::BTreeSet;

use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyPort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::counted::{Counted, Turnover};
use super::endpoint::Endpoint;
use super::rules;
use crate::policy::selector;

/// All words in use.
#[derive(Default)]
pub(super) struct Vocabulary {
    labels: Counted<String>,
    ports: Counted<String>,
}

/// Words that came into use or are used no more.
pub(super) struct Words {
    labels: BTreeSet<String>,
    ports: BTreeSet<String>,
}

impl Vocabulary {
    pub(super) fn add(&mut self, policy: &NetworkPolicy) {
        labels(policy).for_each(|word| self.labels.add(word.to_owned()));
        ports(policy).for_each(|word| self.ports.add(word.to_owned()));
    }

    pub(super) fn remove(&mut self, policy: &NetworkPolicy) {
        labels(policy).for_each(|word| self.labels.remove(&word.to_owned()));
        ports(policy).for_each(|word| self.ports.remove(&word.to_owned()));
    }

    pub(super) fn has_label(&self, key: &str) -> bool {
        self.labels.has(key)
    }

    pub(super) fn has_port(&self, name: &str) -> bool {
        self.ports.has(name)
    }

    /// What changed since the last time.
    pub(super) fn settle(&mut self) -> Words {
        let all = |Turnover { come, gone }: Turnover<String>| come.into_iter().chain(gone);
        Words {
            labels: all(self.labels.settle()).collect(),
            ports: all(self.ports.settle()).collect(),
        }
    }
}

impl Words {
    pub(super) fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.ports.is_empty()
    }

    /// Whether the pod may be somebody else by them.
    pub(super) fn concern(&self, pod: &Endpoint<'_>) -> bool {
        self.labels.iter().any(|key| pod.labels.contains_key(key))
            || pod.named_ports.keys().any(|(name, _)| self.ports.contains(*name))
    }
}

fn labels(policy: &NetworkPolicy) -> impl Iterator<Item = &str> {
    let selectors = rules::peers(policy).filter_map(|peer| peer.pod_selector.as_ref());
    selectors.flat_map(selector::keys)
}

fn ports(policy: &NetworkPolicy) -> impl Iterator<Item = &str> {
    rules::ports(policy, rules::Direction::Egress).filter_map(name)
}

/// The name of a port that has one.
pub(super) fn name(port: &NetworkPolicyPort) -> Option<&str> {
    match &port.port {
        Some(IntOrString::String(name)) => Some(name),
        _ => None,
    }
}
