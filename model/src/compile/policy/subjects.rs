//! The node's own pods, and what applies to each.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;

use super::super::changes::Changes;
use super::endpoint::{self, Endpoint};
use super::laws::{Laws, Redistricted};
use super::rules::{self, Applied, Direction};
use crate::{NodeName, ObjectKey};

#[derive(Default)]
pub(super) struct Subjects {
    pods: BTreeMap<ObjectKey, Subject>,
    applied: BTreeMap<String, Held>,
    /// Texts that nobody may have any more.
    idle: BTreeSet<String>,
    /// What applied when that was last asked, of what may have changed since.
    before: BTreeMap<String, Option<Applied>>,
}

struct Subject {
    pod: Arc<Pod>,
    /// The policies that select it, by name.
    selecting: BTreeSet<String>,
    ingress: Option<String>,
    egress: Option<String>,
}

struct Held {
    applied: Applied,
    /// How many pods share it.
    pods: usize,
}

/// A pod, and what applies to it.
pub(super) struct Restricted<'a> {
    pub(super) key: &'a ObjectKey,
    pub(super) ingress: Option<&'a str>,
    pub(super) egress: Option<&'a str>,
}

impl Subjects {
    /// All own pods.
    pub(super) fn iter(&self) -> impl Iterator<Item = Restricted<'_>> {
        self.pods.iter().map(|(key, pod)| Restricted {
            key,
            ingress: pod.ingress.as_deref(),
            egress: pod.egress.as_deref(),
        })
    }

    /// All that applies to some pod, by its text.
    pub(super) fn applied(&self) -> impl Iterator<Item = &Applied> {
        self.applied.values().map(|held| &held.applied)
    }

    pub(super) fn get(&self, text: &str) -> Option<&Applied> {
        self.applied.get(text).map(|held| &held.applied)
    }

    /// Whether anything applies to anybody.
    pub(super) fn is_restricted(&self) -> bool {
        !self.applied.is_empty()
    }

    /// Follows the pods of the node, and those policies and namespaces that changed. Returns what applied before, of all that
    /// is there no more, is new, or means something else.
    pub(super) fn follow(
        &mut self,
        pods: &Changes<Pod>,
        (policies, namespaces): (&BTreeSet<ObjectKey>, &Redistricted),
        laws: &Laws,
        node: &NodeName,
    ) -> BTreeMap<String, Option<Applied>> {
        let mut affected = self.select_again(policies, laws);
        let isolation = |key: &&ObjectKey| namespaces.isolation.contains(&key.namespace);
        affected.extend(self.pods.keys().filter(isolation).cloned());
        affected.extend(self.follow_pods(pods, laws, node));
        for key in affected {
            self.apply(&key, laws);
        }
        for text in std::mem::take(&mut self.idle) {
            if self.applied.get(&text).is_some_and(|held| held.pods == 0) {
                let held = self.applied.remove(&text);
                self.before.entry(text).or_insert(held.map(|held| held.applied));
            }
        }
        std::mem::take(&mut self.before)
    }

    /// Asks the policies that changed whom they select. Returns the pods that they select or did.
    fn select_again(&mut self, policies: &BTreeSet<ObjectKey>, laws: &Laws) -> BTreeSet<ObjectKey> {
        let mut affected = BTreeSet::new();
        for policy in policies {
            let now = laws.policy(&policy.namespace, &policy.name);
            let first = ObjectKey::new(policy.namespace.as_str(), "");
            let same = self.pods.range_mut(first..);
            for (key, pod) in same.take_while(|(key, _)| key.namespace == policy.namespace) {
                let selected = pod.selecting.remove(&policy.name);
                let selects = now.is_some_and(|policy| {
                    Endpoint::of(&pod.pod).is_some_and(|one| rules::selects(policy, one.labels))
                });
                if selects {
                    pod.selecting.insert(policy.name.clone());
                }
                if selected || selects {
                    affected.insert(key.clone());
                }
            }
        }
        affected
    }

    /// Returns the pods that are new, or others in the eyes of policies.
    fn follow_pods(
        &mut self,
        pods: &Changes<Pod>,
        laws: &Laws,
        node: &NodeName,
    ) -> BTreeSet<ObjectKey> {
        let mut affected = BTreeSet::new();
        let here = pods.come.iter().filter_map(|pod| Some((pod, Endpoint::on_node(pod, node)?)));
        let here: BTreeMap<ObjectKey, &Arc<Pod>> =
            here.map(|(pod, endpoint)| (endpoint.key, pod)).collect();
        for pod in &pods.gone {
            let Some(key) = endpoint::key(pod).filter(|key| !here.contains_key(key)) else {
                continue;
            };
            if self.pods.get(&key).is_some_and(|known| Arc::ptr_eq(&known.pod, pod)) {
                self.remove(&key);
            }
        }
        for (key, pod) in here {
            let Some(endpoint) = Endpoint::of(pod) else { continue };
            match self.pods.get_mut(&key) {
                Some(known) if Endpoint::of(&known.pod).as_ref() == Some(&endpoint) => {
                    known.pod = Arc::clone(pod);
                    continue;
                }
                Some(known) => {
                    known.pod = Arc::clone(pod);
                    known.selecting = selecting(&endpoint, laws);
                }
                None => {
                    let selecting = selecting(&endpoint, laws);
                    let pod = Arc::clone(pod);
                    let subject = Subject { pod, selecting, ingress: None, egress: None };
                    self.pods.insert(key.clone(), subject);
                }
            }
            affected.insert(key);
        }
        affected
    }

    fn remove(&mut self, key: &ObjectKey) {
        let Some(pod) = self.pods.remove(key) else { return };
        for text in [pod.ingress, pod.egress].into_iter().flatten() {
            self.detach(text);
        }
    }

    fn apply(&mut self, key: &ObjectKey, laws: &Laws) {
        let Some(pod) = self.pods.get(key) else { return };
        let Some(endpoint) = Endpoint::of(&pod.pod) else { return };
        let [ingress, egress] = [Direction::Ingress, Direction::Egress]
            .map(|direction| Applied::to(&endpoint, &pod.selecting, direction, laws));
        let [ingress, egress] = [ingress, egress].map(|one| one.map(|one| self.attach(one)));
        let Some(pod) = self.pods.get_mut(key) else { return };
        let before = [
            std::mem::replace(&mut pod.ingress, ingress),
            std::mem::replace(&mut pod.egress, egress),
        ];
        for text in before.into_iter().flatten() {
            self.detach(text);
        }
    }

    fn attach(&mut self, applied: Applied) -> String {
        let text = applied.text.clone();
        match self.applied.get_mut(&text) {
            Some(held) => {
                held.pods += 1;
                if !held.applied.is_as(&applied) {
                    let old = std::mem::replace(&mut held.applied, applied);
                    self.before.entry(text.clone()).or_insert(Some(old));
                }
            }
            None => {
                self.before.entry(text.clone()).or_insert(None);
                self.applied.insert(text.clone(), Held { applied, pods: 1 });
            }
        }
        text
    }

    fn detach(&mut self, text: String) {
        let Some(held) = self.applied.get_mut(&text) else { return };
        held.pods -= 1;
        if held.pods == 0 {
            self.idle.insert(text);
        }
    }
}

fn selecting(pod: &Endpoint<'_>, laws: &Laws) -> BTreeSet<String> {
    let all = laws.policies(&pod.key.namespace);
    all.filter(|(_, policy)| rules::selects(policy, pod.labels))
        .map(|(name, _)| name.clone())
        .collect()
}
