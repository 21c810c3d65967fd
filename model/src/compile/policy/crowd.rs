//! Who has which address, in the whole cluster. An address that several pods claim belongs to the one that was made last.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, Time};

use super::super::changes::Changes;
use super::endpoint::{self, Endpoint, Kind};
use super::words::{Vocabulary, Words};
use crate::ObjectKey;

/// Which list a pod is in. One that is in both counts as the list of the whole cluster has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Source {
    Node,
    Cluster,
}

/// A pod with a network of its own.
struct Resident {
    pod: Arc<Pod>,
    source: Source,
    kind: Arc<Kind>,
    addresses: Vec<IpAddr>,
}

impl Resident {
    /// The highest wins.
    fn rank(&self) -> (Option<&Time>, Option<&str>, Option<&str>, Source) {
        let metadata = &self.pod.metadata;
        let made = metadata.creation_timestamp.as_ref();
        (made, metadata.namespace.as_deref(), metadata.name.as_deref(), self.source)
    }
}

/// All pods that claim an address.
#[derive(Default)]
struct Claims {
    residents: Vec<Arc<Resident>>,
    /// The kind of the one who has it, as was said when it was last asked.
    told: Option<Arc<Kind>>,
}

/// Kinds of pods that have addresses.
#[derive(Default)]
struct Kinds {
    /// By namespace.
    held: BTreeMap<String, Residence>,
    /// Whether it was there when it was last asked, of those that may have come or gone since.
    touched: BTreeMap<String, (Arc<Kind>, bool)>,
}

/// The kinds of one namespace.
#[derive(Default)]
struct Residence {
    /// By text, with the number of addresses.
    kinds: BTreeMap<String, (Arc<Kind>, usize)>,
    /// By key and value of each of their labels.
    labelled: BTreeMap<String, BTreeMap<String, Vec<Arc<Kind>>>>,
}

#[derive(Default)]
pub(super) struct Crowd {
    pods: BTreeMap<(ObjectKey, Source), Arc<Resident>>,
    claims: BTreeMap<IpAddr, Claims>,
    /// Addresses that may have changed hands.
    touched: BTreeSet<IpAddr>,
    kinds: Kinds,
}

/// What changed.
pub(super) struct Moves {
    /// Addresses that another kind of pod has now, or nobody.
    pub(super) addresses: BTreeSet<IpAddr>,
    pub(super) come: Vec<Arc<Kind>>,
    pub(super) gone: Vec<Arc<Kind>>,
}

impl Crowd {
    /// Follows one of the lists.
    pub(super) fn follow(&mut self, source: Source, pods: &Changes<Pod>, words: &Vocabulary) {
        for pod in &pods.gone {
            if let Some(key) = endpoint::key(pod) {
                self.remove(&(key, source), |known| Arc::ptr_eq(known, pod));
            }
        }
        for pod in &pods.come {
            self.insert(Arc::clone(pod), source, words);
        }
    }

    /// Makes kinds anew that these words may have changed. Looks at every pod, when there is such a word.
    pub(super) fn respell(&mut self, changed: &Words, words: &Vocabulary) {
        if changed.is_empty() {
            return;
        }
        let concerned = |one: &&Arc<Resident>| {
            Endpoint::of(&one.pod).is_some_and(|endpoint| changed.concern(&endpoint))
        };
        let all: Vec<Arc<Resident>> = self.pods.values().filter(concerned).cloned().collect();
        for one in all {
            self.insert(Arc::clone(&one.pod), one.source, words);
        }
    }

    fn insert(&mut self, pod: Arc<Pod>, source: Source, words: &Vocabulary) {
        let Some(endpoint) = Endpoint::of(&pod) else { return };
        let kind = self.kinds.shared(endpoint.kind(words));
        let key = (endpoint.key, source);
        let addresses = endpoint::addresses(&pod);
        self.remove(&key, |_| true);
        let resident = Arc::new(Resident { pod, source, kind, addresses });
        for address in &resident.addresses {
            self.claims.entry(*address).or_default().residents.push(Arc::clone(&resident));
            self.touched.insert(*address);
        }
        self.pods.insert(key, resident);
    }

    fn remove(&mut self, key: &(ObjectKey, Source), meant: impl Fn(&Arc<Pod>) -> bool) {
        if !self.pods.get(key).is_some_and(|known| meant(&known.pod)) {
            return;
        }
        let Some(resident) = self.pods.remove(key) else { return };
        for address in &resident.addresses {
            if let Some(claims) = self.claims.get_mut(address) {
                claims.residents.retain(|one| !Arc::ptr_eq(one, &resident));
            }
            self.touched.insert(*address);
        }
    }

    /// What changed since the last time.
    pub(super) fn settle(&mut self) -> Moves {
        let mut moved = BTreeSet::new();
        for address in std::mem::take(&mut self.touched) {
            let Some(claims) = self.claims.get_mut(&address) else { continue };
            let holder = claims.residents.iter().max_by(|a, b| a.rank().cmp(&b.rank()));
            let kind = holder.map(|holder| Arc::clone(&holder.kind));
            let same = match (&kind, &claims.told) {
                (Some(now), Some(told)) => now.text == told.text,
                (now, told) => now.is_none() && told.is_none(),
            };
            if !same {
                moved.insert(address);
                if let Some(old) = &claims.told {
                    self.kinds.remove(old);
                }
                if let Some(new) = &kind {
                    self.kinds.add(new);
                }
                claims.told = kind;
            }
            if claims.residents.is_empty() {
                self.claims.remove(&address);
            }
        }
        let (come, gone) = self.kinds.settle();
        Moves { addresses: moved, come, gone }
    }

    /// The kind of pod that has an address.
    pub(super) fn at(&self, address: &IpAddr) -> Option<&Kind> {
        self.claims.get(address)?.told.as_deref()
    }

    /// All addresses that pods have.
    pub(super) fn addresses(&self) -> impl Iterator<Item = (IpAddr, &Kind)> {
        self.claims.iter().filter_map(|(address, claims)| Some((*address, claims.told.as_deref()?)))
    }

    /// What kind of pod one of the node's own is, whether it has an address or not.
    pub(super) fn own(&self, key: &ObjectKey) -> Option<&Kind> {
        self.pods.get(&(key.clone(), Source::Node)).map(|one| &*one.kind)
    }

    /// Namespaces that have pods with addresses.
    pub(super) fn namespaces(&self) -> impl Iterator<Item = &str> {
        self.kinds.held.keys().map(String::as_str)
    }

    /// The kinds of pods of a namespace.
    pub(super) fn kinds(&self, namespace: &str) -> impl Iterator<Item = &Arc<Kind>> {
        let residence = self.kinds.held.get(namespace);
        residence.into_iter().flat_map(|all| all.kinds.values()).map(|one| &one.0)
    }

    /// Those of them that a selector may mean: all that have the rarest of the labels that it asks for.
    pub(super) fn candidates(
        &self,
        namespace: &str,
        selector: Option<&LabelSelector>,
    ) -> Vec<&Arc<Kind>> {
        let Some(residence) = self.kinds.held.get(namespace) else { return vec![] };
        let labels = selector.and_then(|selector| selector.match_labels.as_ref());
        let rarest =
            labels.into_iter().flatten().map(|(key, value)| residence.labelled(key, value));
        match rarest.min_by_key(|kinds| kinds.len()) {
            Some(kinds) => kinds.iter().collect(),
            None => residence.kinds.values().map(|(kind, _)| kind).collect(),
        }
    }
}

impl Residence {
    fn labelled(&self, key: &str, value: &str) -> &[Arc<Kind>] {
        let kinds = self.labelled.get(key).and_then(|values| values.get(value));
        kinds.map_or(&[], Vec::as_slice)
    }

    fn add(&mut self, kind: &Arc<Kind>) {
        self.kinds.insert(kind.text.clone(), (Arc::clone(kind), 1));
        for (key, value) in &kind.labels {
            let values = self.labelled.entry(key.clone()).or_default();
            values.entry(value.clone()).or_default().push(Arc::clone(kind));
        }
    }

    fn remove(&mut self, kind: &Kind) {
        self.kinds.remove(&kind.text);
        for (key, value) in &kind.labels {
            let Some(values) = self.labelled.get_mut(key) else { continue };
            if let Some(kinds) = values.get_mut(value) {
                kinds.retain(|one| one.text != kind.text);
            }
            if values.get(value).is_some_and(Vec::is_empty) {
                values.remove(value);
            }
            if values.is_empty() {
                self.labelled.remove(key);
            }
        }
    }
}

impl Kinds {
    /// Kinds are many, and mostly known.
    fn shared(&self, kind: Kind) -> Arc<Kind> {
        let known = self.held.get(&kind.namespace).and_then(|all| all.kinds.get(&kind.text));
        known.map_or_else(|| Arc::new(kind), |(known, _)| Arc::clone(known))
    }

    fn add(&mut self, kind: &Arc<Kind>) {
        let all = self.held.entry(kind.namespace.clone()).or_default();
        match all.kinds.get_mut(&kind.text) {
            Some((_, count)) => *count += 1,
            None => {
                all.add(kind);
                self.touched.entry(kind.text.clone()).or_insert((Arc::clone(kind), false));
            }
        }
    }

    fn remove(&mut self, kind: &Arc<Kind>) {
        let Some(all) = self.held.get_mut(&kind.namespace) else { return };
        match all.kinds.get_mut(&kind.text) {
            Some((_, count)) if *count > 1 => *count -= 1,
            _ => {
                all.remove(kind);
                self.touched.entry(kind.text.clone()).or_insert((Arc::clone(kind), true));
            }
        }
        if all.kinds.is_empty() {
            self.held.remove(&kind.namespace);
        }
    }

    fn settle(&mut self) -> (Vec<Arc<Kind>>, Vec<Arc<Kind>>) {
        let (mut come, mut gone) = (vec![], vec![]);
        for (text, (kind, before)) in std::mem::take(&mut self.touched) {
            let now =
                self.held.get(&kind.namespace).is_some_and(|all| all.kinds.contains_key(&text));
            match (before, now) {
                (false, true) => come.push(kind),
                (true, false) => gone.push(kind),
                _ => {}
            }
        }
        (come, gone)
    }
}
