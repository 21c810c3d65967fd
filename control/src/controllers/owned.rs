//! Which objects of one kind name which owner of another: so that a change of one costs what its owner has, and not what is there.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use mesh_model::ObjectKey;

use crate::objects;

/// By owner: the names of its objects, and the unique id that each of them says that the owner has.
pub(super) struct Owned {
    owner_kind: &'static str,
    by_owner: Mutex<HashMap<ObjectKey, BTreeMap<String, String>>>,
}

impl Owned {
    /// Nobody owns anything yet.
    pub(super) fn by(owner_kind: &'static str) -> Arc<Self> {
        Arc::new(Self { owner_kind, by_owner: Mutex::default() })
    }

    /// Takes in a change of an object. Returns whose objects changed.
    pub(super) fn note(
        &self,
        old: Option<&ObjectMeta>,
        new: Option<&ObjectMeta>,
    ) -> Vec<ObjectKey> {
        let before = old.and_then(|meta| self.owner_of(meta));
        let after = new.and_then(|meta| self.owner_of(meta));
        let mut all = self.by_owner.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(meta), Some((owner, _))) = (old, &before)
            && let Some(names) = all.get_mut(owner)
        {
            names.remove(objects::name(meta));
            if names.is_empty() {
                all.remove(owner);
            }
        }
        if let (Some(meta), Some((owner, uid))) = (new, &after) {
            let names = all.entry(owner.clone()).or_default();
            names.insert(objects::name(meta).to_owned(), uid.clone());
        }
        let mut changed: Vec<ObjectKey> = before.into_iter().chain(after).map(|o| o.0).collect();
        changed.dedup();
        changed
    }

    /// Names of the objects of an owner, each with the owner's unique id as the object has it.
    pub(super) fn of(&self, owner: &ObjectKey) -> Vec<(String, String)> {
        let all = self.by_owner.lock().unwrap_or_else(PoisonError::into_inner);
        let names = all.get(owner).into_iter().flatten();
        names.map(|(name, uid)| (name.clone(), uid.clone())).collect()
    }

    fn owner_of(&self, meta: &ObjectMeta) -> Option<(ObjectKey, String)> {
        let owner = objects::controller_of(meta).filter(|owner| owner.kind == self.owner_kind)?;
        Some((ObjectKey::new(objects::namespace(meta), &owner.name), owner.uid.clone()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(name: &str, owner: Option<(&str, &str, &str)>) -> ObjectMeta {
        let owners: Vec<_> = owner
            .iter()
            .map(|(kind, name, uid)| json!({"apiVersion": "v1", "kind": kind, "name": name, "uid": uid, "controller": true}))
            .collect();
        serde_json::from_value(json!({"namespace": "d", "name": name, "ownerReferences": owners}))
            .unwrap()
    }

    #[test]
    fn an_object_is_found_at_its_present_owner_only() {
        let owned = Owned::by("Job");
        let (job, other) = (ObjectKey::new("d", "job"), ObjectKey::new("d", "other"));
        let first = object("p", Some(("Job", "job", "1")));
        assert_eq!(owned.note(None, Some(&first)), [job.clone()]);
        assert_eq!(owned.of(&job), [("p".to_owned(), "1".to_owned())]);
        assert_eq!(owned.note(Some(&first), Some(&first)), [job.clone()]);
        let second = object("p", Some(("Job", "other", "2")));
        assert_eq!(owned.note(Some(&first), Some(&second)), [job.clone(), other.clone()]);
        assert!(owned.of(&job).is_empty() && owned.of(&other).len() == 1);
        assert_eq!(owned.note(Some(&second), None), [other.clone()]);
        assert!(owned.of(&other).is_empty());
        for stranger in [object("p", None), object("p", Some(("ReplicaSet", "job", "1")))] {
            assert_eq!(owned.note(None, Some(&stranger)), []);
        }
        assert!(owned.of(&job).is_empty());
    }
}
