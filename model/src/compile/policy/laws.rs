//! What namespaces and policies say, prepared for look-ups.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::api::networking::v1::NetworkPolicy;

use super::super::changes::Changes;
use super::words::Vocabulary;
use super::{Labels, is_isolated};
use crate::ObjectKey;
use crate::wellknown::LABEL_NAMESPACE_NAME;

#[derive(Default)]
pub(super) struct Laws {
    namespaces: BTreeMap<String, Territory>,
    /// By namespace and name.
    policies: BTreeMap<String, BTreeMap<String, Arc<NetworkPolicy>>>,
}

#[derive(PartialEq, Eq)]
struct Territory {
    /// With the name as every namespace has it.
    labels: Labels,
    isolated: bool,
}

/// Namespaces that changed.
#[derive(Default)]
pub(super) struct Redistricted {
    /// Selectors may mean them that did not, or the other way round.
    pub(super) relabelled: BTreeSet<String>,
    /// They are isolated and were not, or the other way round.
    pub(super) isolation: BTreeSet<String>,
}

impl Laws {
    pub(super) fn labels(&self, namespace: &str) -> Option<&Labels> {
        self.namespaces.get(namespace).map(|territory| &territory.labels)
    }

    pub(super) fn is_isolated(&self, namespace: &str) -> bool {
        self.namespaces.get(namespace).is_some_and(|territory| territory.isolated)
    }

    /// The policies of a namespace, by name.
    pub(super) fn policies(
        &self,
        namespace: &str,
    ) -> impl Iterator<Item = (&String, &Arc<NetworkPolicy>)> {
        self.policies.get(namespace).into_iter().flatten()
    }

    pub(super) fn policy(&self, namespace: &str, name: &str) -> Option<&Arc<NetworkPolicy>> {
        self.policies.get(namespace)?.get(name)
    }

    pub(super) fn follow_namespaces(&mut self, changes: &Changes<Namespace>) -> Redistricted {
        let mut before = BTreeMap::new();
        let name = |namespace: &Namespace| namespace.metadata.name.clone();
        for name in changes.gone.iter().filter_map(|one| name(one)) {
            let territory = self.namespaces.remove(&name);
            before.entry(name).or_insert(territory);
        }
        for namespace in &changes.come {
            let Some(name) = name(namespace) else { continue };
            let mut labels = namespace.metadata.labels.clone().unwrap_or_default();
            labels.insert(LABEL_NAMESPACE_NAME.to_owned(), name.clone());
            let territory = Territory { labels, isolated: is_isolated(namespace) };
            let old = self.namespaces.insert(name.clone(), territory);
            before.entry(name).or_insert(old);
        }
        let mut changed = Redistricted::default();
        for (name, old) in before {
            let new = self.namespaces.get(&name);
            let isolated = |one: Option<&Territory>| one.is_some_and(|one| one.isolated);
            if isolated(old.as_ref()) != isolated(new) {
                changed.isolation.insert(name.clone());
            }
            if old.as_ref() != new {
                changed.relabelled.insert(name);
            }
        }
        changed
    }

    /// Returns the policies that changed.
    pub(super) fn follow_policies(
        &mut self,
        changes: &Changes<NetworkPolicy>,
        words: &mut Vocabulary,
    ) -> BTreeSet<ObjectKey> {
        let mut touched = BTreeSet::new();
        for policy in &changes.gone {
            let Some(key) = key(policy) else { continue };
            self.remove(&key, words);
            touched.insert(key);
        }
        for policy in &changes.come {
            let Some(key) = key(policy) else { continue };
            self.remove(&key, words);
            words.add(policy);
            let namespace = self.policies.entry(key.namespace.clone()).or_default();
            namespace.insert(key.name.clone(), Arc::clone(policy));
            touched.insert(key);
        }
        touched
    }

    fn remove(&mut self, key: &ObjectKey, words: &mut Vocabulary) {
        let Some(policies) = self.policies.get_mut(&key.namespace) else { return };
        if let Some(old) = policies.remove(&key.name) {
            words.remove(&old);
        }
        if policies.is_empty() {
            self.policies.remove(&key.namespace);
        }
    }
}

fn key(policy: &NetworkPolicy) -> Option<ObjectKey> {
    Some(ObjectKey::new(policy.metadata.namespace.clone()?, policy.metadata.name.clone()?))
}
