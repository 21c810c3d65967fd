//! Services and their endpoint slices, by name.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;

use super::changes::Changes;
use super::services::{Made, key};
use crate::{ObjectKey, wellknown};

/// A Service, the slices that carry its name, and what follows from them.
#[derive(Default)]
pub(super) struct Entry {
    /// Nothing where there are slices only.
    pub(super) service: Option<Arc<Service>>,
    /// By name.
    pub(super) slices: Vec<Arc<EndpointSlice>>,
    pub(super) made: Made,
}

/// All services and slices.
#[derive(Default)]
pub(super) struct Directory {
    entries: BTreeMap<ObjectKey, Entry>,
    /// How many slices have which revision.
    revisions: BTreeMap<u64, usize>,
}

impl Directory {
    pub(super) fn entry(&self, key: &ObjectKey) -> Option<&Entry> {
        self.entries.get(key)
    }

    pub(super) fn service(&self, key: &ObjectKey) -> Option<&Service> {
        self.entry(key)?.service.as_deref()
    }

    pub(super) fn slices(&self, key: &ObjectKey) -> &[Arc<EndpointSlice>] {
        self.entry(key).map_or(&[], |entry| &entry.slices)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &ObjectKey> {
        self.entries.keys()
    }

    pub(super) fn all(&self) -> impl Iterator<Item = (&ObjectKey, &Entry)> {
        self.entries.iter()
    }

    /// What is in a namespace.
    pub(super) fn of_namespace(&self, namespace: &str) -> impl Iterator<Item = &Entry> {
        let from = self.entries.range(ObjectKey::new(namespace, "")..);
        from.take_while(move |(key, _)| key.namespace == namespace).map(|(_, entry)| entry)
    }

    /// The newest slice (`resourceVersion`); 0 when there is none.
    pub(super) fn revision(&self) -> u64 {
        self.revisions.keys().next_back().copied().unwrap_or(0)
    }

    /// Takes changed objects over and returns whose entries they are.
    pub(super) fn follow(
        &mut self,
        services: &Changes<Service>,
        slices: &Changes<EndpointSlice>,
    ) -> BTreeSet<ObjectKey> {
        let mut changed = BTreeSet::new();
        for slice in &slices.gone {
            self.count(slice, -1);
            let Some(key) = owner(slice) else { continue };
            if let Some(entry) = self.entries.get_mut(&key) {
                entry.slices.retain(|one| !Arc::ptr_eq(one, slice));
            }
            changed.insert(key);
        }
        for slice in &slices.come {
            self.count(slice, 1);
            let Some(key) = owner(slice) else { continue };
            let all = &mut self.entries.entry(key.clone()).or_default().slices;
            let place = all.partition_point(|one| one.metadata.name < slice.metadata.name);
            all.insert(place, Arc::clone(slice));
            changed.insert(key);
        }
        for key in services.gone.iter().filter_map(|service| key(service)) {
            if let Some(entry) = self.entries.get_mut(&key) {
                entry.service = None;
            }
            changed.insert(key);
        }
        for service in &services.come {
            let Some(key) = key(service) else { continue };
            self.entries.entry(key.clone()).or_default().service = Some(Arc::clone(service));
            changed.insert(key);
        }
        changed
    }

    /// What follows from an entry now; returns what followed before. Nobody asks for one again that is empty.
    pub(super) fn remake(&mut self, key: &ObjectKey, make: impl FnOnce(&Entry) -> Made) -> Made {
        let Some(entry) = self.entries.get_mut(key) else { return Made::default() };
        let made = make(entry);
        if entry.service.is_none() && entry.slices.is_empty() {
            return self.entries.remove(key).map(|entry| entry.made).unwrap_or_default();
        }
        std::mem::replace(&mut entry.made, made)
    }

    fn count(&mut self, slice: &EndpointSlice, by: isize) {
        let Some(revision) = revision(slice) else { return };
        let count = self.revisions.entry(revision).or_default();
        *count = count.saturating_add_signed(by);
        if *count == 0 {
            self.revisions.remove(&revision);
        }
    }
}

/// The `resourceVersion` of a slice: they grow over all objects of a cluster, and are compared by number.
pub(super) fn revision(slice: &EndpointSlice) -> Option<u64> {
    slice.metadata.resource_version.as_deref()?.parse().ok()
}

/// The Service whose endpoints a slice lists.
fn owner(slice: &EndpointSlice) -> Option<ObjectKey> {
    let labels = slice.metadata.labels.as_ref();
    let name = labels.and_then(|labels| labels.get(wellknown::LABEL_SERVICE_NAME))?;
    Some(ObjectKey::new(slice.metadata.namespace.clone()?, name.clone()))
}
