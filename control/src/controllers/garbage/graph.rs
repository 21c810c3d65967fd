//! Who belongs to whom, by unique id; and what that means for one object. Pure.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use mesh_model::kinds::{self, Kind};

use crate::objects;

/// Finalizer: go after the dependents that block, and take them along.
pub(super) const FOREGROUND: &str = "foregroundDeletion";
/// Finalizer: let the dependents live on without an owner.
pub(super) const ORPHAN: &str = "orphan";

/// What the graph keeps of an object.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Item {
    pub(super) kind: &'static Kind,
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) uid: String,
    pub(super) owners: Vec<OwnerReference>,
    pub(super) foreground: bool,
    pub(super) orphan: bool,
    pub(super) terminating: bool,
}

impl Item {
    pub(super) fn new(kind: &'static Kind, meta: &ObjectMeta) -> Self {
        let held = |finalizer: &str| meta.finalizers.iter().flatten().any(|f| f == finalizer);
        Self {
            kind,
            namespace: objects::namespace(meta).to_owned(),
            name: objects::name(meta).to_owned(),
            uid: objects::uid(meta).to_owned(),
            owners: meta.owner_references.clone().unwrap_or_default(),
            foreground: held(FOREGROUND),
            orphan: held(ORPHAN),
            terminating: objects::is_terminating(meta),
        }
    }

    /// Whether the object matters for collection at all: most do not, and are not kept.
    pub(super) fn is_relevant(&self) -> bool {
        !self.owners.is_empty() || self.foreground || self.orphan
    }
}

/// One step of the collection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Delete the object; its dependents follow when it is gone, or before it (`foreground`).
    Delete {
        /// The object's unique id.
        uid: String,
        /// Take the dependents along first.
        foreground: bool,
    },
    /// Take these owners (unique ids) out of the object's list.
    Disown {
        /// The object's unique id.
        uid: String,
        /// The owners' unique ids.
        owners: BTreeSet<String>,
    },
    /// Everything that the finalizer waits for is done.
    Unhold {
        /// The object's unique id.
        uid: String,
        /// The finalizer.
        finalizer: &'static str,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Delete { uid, foreground: false } => write!(f, "delete {uid}"),
            Self::Delete { uid, foreground: true } => {
                write!(f, "delete {uid} after its dependents")
            }
            Self::Disown { uid, owners } => {
                write!(f, "take {} owners off {uid}", owners.len())
            }
            Self::Unhold { uid, finalizer } => write!(f, "remove finalizer {finalizer} of {uid}"),
        }
    }
}

/// What is known of an owner that an object names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// It exists under that name with that unique id.
    Present,
    /// It does not.
    Absent,
    /// Nobody can tell: a kind that is not served.
    Unknown,
}

/// The objects that own or are owned.
#[derive(Debug, Default)]
pub(super) struct Graph {
    items: HashMap<String, Item>,
    dependents: HashMap<String, BTreeSet<String>>,
}

impl Graph {
    /// Takes in a new or changed object. Returns whom to look at.
    pub(super) fn set(&mut self, item: Item) -> Vec<String> {
        let uid = item.uid.clone();
        self.unlink(&uid);
        if !item.is_relevant() {
            self.items.remove(&uid);
            return if item.terminating { self.dependents_of(&uid) } else { Vec::new() };
        }
        for owner in &item.owners {
            self.dependents.entry(owner.uid.clone()).or_default().insert(uid.clone());
        }
        let mut look = vec![uid.clone()];
        // A dependent that stopped blocking may free its owner.
        look.extend(item.owners.iter().map(|owner| owner.uid.clone()));
        if item.terminating {
            look.extend(self.dependents_of(&uid));
        }
        self.items.insert(uid, item);
        look
    }

    /// Takes in that an object is gone. Returns whom to look at: its dependents, and its owners that wait.
    pub(super) fn remove(&mut self, uid: &str) -> Vec<String> {
        let mut look = self.dependents_of(uid);
        if let Some(item) = self.items.get(uid) {
            look.extend(item.owners.iter().map(|owner| owner.uid.clone()));
        }
        self.unlink(uid);
        self.items.remove(uid);
        look
    }

    /// The object of a unique id, if it owns or is owned.
    pub(super) fn item(&self, uid: &str) -> Option<&Item> {
        self.items.get(uid)
    }

    /// Unique ids of all objects in the graph.
    pub(super) fn all(&self) -> Vec<String> {
        self.items.keys().cloned().collect()
    }

    /// Forgets what is not in `present`; returns whom to look at.
    pub(super) fn retain(&mut self, kind: &Kind, present: &HashSet<String>) -> Vec<String> {
        let gone: Vec<String> = self
            .items
            .values()
            .filter(|item| item.kind == kind && !present.contains(&item.uid))
            .map(|item| item.uid.clone())
            .collect();
        gone.iter().flat_map(|uid| self.remove(uid)).collect()
    }

    /// What to do about one object. `exists` answers for an owner that is named in a namespace.
    pub(super) fn plan(
        &self,
        uid: &str,
        exists: impl Fn(&OwnerReference, &str) -> Owner,
    ) -> Vec<Step> {
        let Some(item) = self.items.get(uid) else {
            return Vec::new();
        };
        if item.terminating {
            return self.plan_terminating(item);
        }
        if item.owners.is_empty() {
            return Vec::new();
        }
        let mut useless = BTreeSet::new();
        let mut waiting = false;
        let mut solid = false;
        for owner in &item.owners {
            let waits = self.items.get(&owner.uid).is_some_and(|o| o.terminating && o.foreground);
            if waits {
                waiting = true;
                useless.insert(owner.uid.clone());
            } else if exists(owner, &item.namespace) == Owner::Absent {
                useless.insert(owner.uid.clone());
            } else {
                solid = true;
            }
        }
        let uid = uid.to_owned();
        match (solid, useless.is_empty()) {
            (true, true) => Vec::new(),
            (true, false) => vec![Step::Disown { uid, owners: useless }],
            // Its owner waits for it, so those that it owns go first too.
            (false, _) => {
                let foreground = waiting && !self.dependents_of(&uid).is_empty();
                vec![Step::Delete { uid, foreground }]
            }
        }
    }

    fn plan_terminating(&self, item: &Item) -> Vec<Step> {
        let dependents = self.dependents_of(&item.uid);
        let mut steps = Vec::new();
        if item.orphan {
            for uid in dependents {
                steps.push(Step::Disown { uid, owners: BTreeSet::from([item.uid.clone()]) });
            }
            steps.push(Step::Unhold { uid: item.uid.clone(), finalizer: ORPHAN });
        } else if item.foreground {
            let blocks = |uid: &String| {
                self.items.get(uid).is_some_and(|dependent| {
                    dependent
                        .owners
                        .iter()
                        .any(|o| o.uid == item.uid && o.block_owner_deletion == Some(true))
                })
            };
            if !dependents.iter().any(blocks) {
                steps.push(Step::Unhold { uid: item.uid.clone(), finalizer: FOREGROUND });
            }
        }
        steps
    }

    fn dependents_of(&self, uid: &str) -> Vec<String> {
        self.dependents.get(uid).into_iter().flatten().cloned().collect()
    }

    fn unlink(&mut self, uid: &str) {
        let owners = self.items.get(uid).map(|item| item.owners.clone()).unwrap_or_default();
        for owner in owners {
            if let Some(set) = self.dependents.get_mut(&owner.uid) {
                set.remove(uid);
                if set.is_empty() {
                    self.dependents.remove(&owner.uid);
                }
            }
        }
    }
}

/// The kind that an owner reference names, if it is served.
pub(super) fn kind_of(owner: &OwnerReference) -> Option<&'static Kind> {
    let (group, version) = owner.api_version.split_once('/').unwrap_or(("", &owner.api_version));
    kinds::by_kind(group, version, &owner.kind)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn owner(uid: &str, block: bool) -> OwnerReference {
        OwnerReference {
            api_version: "apps/v1".to_owned(),
            kind: "ReplicaSet".to_owned(),
            name: uid.to_owned(),
            uid: uid.to_owned(),
            block_owner_deletion: Some(block),
            controller: Some(true),
        }
    }

    fn item(uid: &str, owners: &[OwnerReference]) -> Item {
        Item {
            kind: kinds::by_kind("", "v1", "Pod").unwrap(),
            namespace: "ns".to_owned(),
            name: uid.to_owned(),
            uid: uid.to_owned(),
            owners: owners.to_vec(),
            foreground: false,
            orphan: false,
            terminating: false,
        }
    }

    fn delete(uid: &str, foreground: bool) -> Step {
        Step::Delete { uid: uid.to_owned(), foreground }
    }

    fn disown(uid: &str, owner: &str) -> Step {
        Step::Disown { uid: uid.to_owned(), owners: BTreeSet::from([owner.to_owned()]) }
    }

    #[test]
    fn an_object_goes_when_its_last_owner_is_gone() {
        let mut graph = Graph::default();
        graph.set(item("pod", &[owner("a", true), owner("b", true)]));
        let with = |present: &'static [&str]| {
            move |o: &OwnerReference, _: &str| {
                if present.contains(&o.uid.as_str()) { Owner::Present } else { Owner::Absent }
            }
        };
        assert_eq!(graph.plan("pod", with(&["a", "b"])), []);
        assert_eq!(graph.plan("pod", with(&["a"])), [disown("pod", "b")]);
        assert_eq!(graph.plan("pod", with(&[])), [delete("pod", false)]);
        assert_eq!(graph.plan("pod", |_, _| Owner::Unknown), [], "a kind that is not served");
    }

    #[test]
    fn foreground_deletion_waits_for_those_that_block() {
        let mut graph = Graph::default();
        graph.set(item("set", &[owner("deployment", true)]));
        graph.set(item("pod", &[owner("set", true)]));
        graph.set(item("loose", &[owner("set", false)]));
        let mut root = item("deployment", &[]);
        root.foreground = true;
        root.terminating = true;
        let look = graph.set(root);
        assert!(look.contains(&"set".to_owned()) && look.contains(&"deployment".to_owned()));
        let present = |_: &OwnerReference, _: &str| Owner::Present;
        assert_eq!(graph.plan("deployment", present), []);
        assert_eq!(graph.plan("set", present), [delete("set", true)]);
        let mut set = item("set", &[owner("deployment", true)]);
        set.foreground = true;
        set.terminating = true;
        graph.set(set);
        assert_eq!(graph.plan("pod", present), [delete("pod", false)]);
        let look = graph.remove("pod");
        assert_eq!(look, ["set"]);
        let unhold = |uid: &str| Step::Unhold { uid: uid.to_owned(), finalizer: FOREGROUND };
        assert_eq!(graph.plan("set", present), [unhold("set")], "the loose one does not block");
        let look = graph.remove("set");
        assert!(look.contains(&"deployment".to_owned()) && look.contains(&"loose".to_owned()));
        assert_eq!(graph.plan("deployment", present), [unhold("deployment")]);
    }

    #[test]
    fn orphaning_lets_dependents_live() {
        let mut graph = Graph::default();
        graph.set(item("pod", &[owner("set", true)]));
        let mut set = item("set", &[]);
        set.orphan = true;
        set.terminating = true;
        graph.set(set);
        let present = |_: &OwnerReference, _: &str| Owner::Present;
        assert_eq!(graph.plan("pod", present), []);
        assert_eq!(
            graph.plan("set", present),
            [disown("pod", "set"), Step::Unhold { uid: "set".to_owned(), finalizer: ORPHAN }]
        );
    }

    #[test]
    fn a_relist_forgets_what_vanished_meanwhile() {
        let mut graph = Graph::default();
        graph.set(item("a", &[owner("x", true)]));
        graph.set(item("b", &[owner("a", true)]));
        let kind = kinds::by_kind("", "v1", "Pod").unwrap();
        let look = graph.retain(kind, &HashSet::from(["b".to_owned()]));
        assert!(look.contains(&"b".to_owned()));
        assert_eq!(graph.all(), ["b"]);
    }

    proptest! {
        /// Deleting roots collects exactly what has no other root, whatever the order of events.
        #[test]
        fn exactly_the_unreachable_go(
            edges in prop::collection::vec((1usize..10, 0usize..9), 0..20),
            dead in prop::collection::btree_set(0usize..10, 0..4),
        ) {
            let mut owners: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
            for (child, parent) in edges {
                if parent < child {
                    owners.entry(child).or_default().insert(parent);
                }
            }
            let uid = |n: &usize| n.to_string();
            let mut graph = Graph::default();
            let mut alive: BTreeSet<usize> = (0..10).collect();
            let mut queue = Vec::new();
            for (child, parents) in &owners {
                let refs: Vec<_> = parents.iter().map(|p| owner(&uid(p), true)).collect();
                queue.extend(graph.set(item(&uid(child), &refs)));
            }
            for n in &dead {
                alive.remove(n);
                queue.extend(graph.remove(&uid(n)));
            }
            while let Some(next) = queue.pop() {
                let steps = graph.plan(&next, |o, _| {
                    let present = alive.contains(&o.uid.parse().unwrap());
                    if present { Owner::Present } else { Owner::Absent }
                });
                for step in steps {
                    match step {
                        Step::Delete { uid, .. } => {
                            alive.remove(&uid.parse().unwrap());
                            queue.extend(graph.remove(&uid));
                        }
                        Step::Disown { uid, owners } => {
                            let mut item = graph.item(&uid).unwrap().clone();
                            item.owners.retain(|o| !owners.contains(&o.uid));
                            queue.extend(graph.set(item));
                        }
                        Step::Unhold { .. } => {}
                    }
                }
            }
            // Numbers grow from owner to dependent, so one pass decides.
            let mut expected: BTreeSet<usize> = BTreeSet::new();
            for n in 0..10 {
                let kept = owners.get(&n).is_none_or(|p| p.iter().any(|p| expected.contains(p)));
                if kept && !dead.contains(&n) {
                    expected.insert(n);
                }
            }
            prop_assert_eq!(alive, expected);
        }
    }
}
