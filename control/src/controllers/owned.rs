//! The objects of one kind by who controls them: a change of one costs its owner a look at its own, and not at all there are.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use mesh_model::ObjectKey;

use super::mirror::Mirror;
use crate::objects;
use crate::registry::Object;

/// Namespace of the objects, kind and name of who controls them; the latter are empty where nobody does.
type Owner = (String, String, String);

/// Filled from a mirror, in order with its other listeners.
pub(super) struct Owned<K>(Mutex<HashMap<Owner, BTreeMap<String, Arc<K>>>>);

impl<K: Object> Owned<K> {
    /// Follows the mirror.
    pub(super) fn of(mirror: &Mirror<K>) -> Arc<Self> {
        let index = Arc::new(Self(Mutex::default()));
        let follower = index.clone();
        mirror.listen(move |old, new| follower.change(old, new));
        index
    }

    /// Those that name an owner of that kind and name, by their names. A former owner may have had the name: its unique id tells.
    pub(super) fn by<O: Object>(&self, owner: &ObjectKey) -> Vec<Arc<K>> {
        self.get(&(owner.namespace.clone(), O::KIND.to_owned(), owner.name.clone()))
    }

    /// Those of a namespace that nobody controls.
    pub(super) fn by_nobody(&self, ns: &str) -> Vec<Arc<K>> {
        self.get(&(ns.to_owned(), String::new(), String::new()))
    }

    /// Those that an owner may have to do with: its own, and those of its namespace that nobody controls.
    pub(super) fn around<O: Object>(&self, owner: &O) -> Vec<Arc<K>> {
        let key = super::key(owner);
        let mut all = self.by::<O>(&key);
        all.extend(self.by_nobody(&key.namespace));
        all
    }

    fn get(&self, owner: &Owner) -> Vec<Arc<K>> {
        let index = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        index.get(owner).into_iter().flat_map(BTreeMap::values).cloned().collect()
    }

    fn change(&self, old: Option<&Arc<K>>, new: Option<&Arc<K>>) {
        let mut index = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = old {
            let owner = owner_of(old.metadata());
            if let Some(objects) = index.get_mut(&owner) {
                objects.remove(objects::name(old.metadata()));
                if objects.is_empty() {
                    index.remove(&owner);
                }
            }
        }
        if let Some(new) = new {
            let name = objects::name(new.metadata()).to_owned();
            index.entry(owner_of(new.metadata())).or_default().insert(name, new.clone());
        }
    }
}

fn owner_of(meta: &ObjectMeta) -> Owner {
    let (kind, name) = objects::controller_of(meta)
        .map(|owner| (owner.kind.clone(), owner.name.clone()))
        .unwrap_or_default();
    (objects::namespace(meta).to_owned(), kind, name)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::apps::v1::ReplicaSet;
    use k8s_openapi::api::batch::v1::Job;
    use k8s_openapi::api::core::v1::Pod;
    use serde_json::{Value, json};

    use super::*;

    fn pod(name: &str, revision: u64, owner: Option<(&str, &str)>) -> Pod {
        let owners: Vec<Value> = owner
            .iter()
            .map(|(kind, name)| json!({"apiVersion": "v1", "kind": kind, "name": name, "uid": "u", "controller": true}))
            .collect();
        serde_json::from_value(json!({"metadata": {"namespace": "ns", "name": name, "uid": name,
            "resourceVersion": revision.to_string(), "ownerReferences": owners}}))
        .unwrap()
    }

    #[test]
    fn an_owner_finds_its_own_objects_and_those_of_nobody() {
        let mirror = Mirror::new();
        let index = Owned::of(&mirror);
        let sets = [pod("a", 1, Some(("ReplicaSet", "x"))), pod("b", 2, Some(("ReplicaSet", "y")))];
        for made in sets.into_iter().chain([pod("c", 3, None), pod("d", 4, Some(("Job", "x")))]) {
            mirror.wrote(made);
        }
        let names = |pods: Vec<Arc<Pod>>| -> Vec<String> {
            pods.iter().map(|pod| objects::name(&pod.metadata).to_owned()).collect()
        };
        let around = |name: &str| {
            let metadata = ObjectMeta {
                namespace: Some("ns".to_owned()),
                name: Some(name.to_owned()),
                ..ObjectMeta::default()
            };
            names(index.around(&ReplicaSet { metadata, ..ReplicaSet::default() }))
        };
        assert_eq!(
            (around("x"), around("y")),
            (vec!["a".into(), "c".into()], vec!["b".into(), "c".into()])
        );
        assert_eq!(names(index.by::<Job>(&ObjectKey::new("ns", "x"))), ["d"]);
        mirror.wrote(pod("c", 5, Some(("ReplicaSet", "y"))));
        mirror.wrote(pod("b", 6, None));
        assert_eq!(
            (around("x"), around("y")),
            (vec!["a".into(), "b".into()], vec!["c".into(), "b".into()])
        );
        mirror.deleted(crate::registry::Deleted::Removed(pod("b", 7, None)));
        assert_eq!((around("x"), around("z")), (vec!["a".to_owned()], vec![]));
        assert_eq!(index.0.lock().unwrap().len(), 3, "nothing is kept of those that are gone");
    }
}
