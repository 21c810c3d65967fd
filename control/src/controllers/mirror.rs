//! A copy of all objects of one kind in memory, shared by the controllers.
//!
//! It follows the registry's watch, and what a controller writes goes in at once: so a controller always sees
//! its own writes and never does the same thing twice.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use futures_util::StreamExt as _;

use crate::objects;
use crate::registry::{Deleted, Event, Object, Registry};

/// Called for each change, in order: the object before and after. Must be quick and must not write.
type Listener<K> = Box<dyn Fn(Option<&Arc<K>>, Option<&Arc<K>>) + Send + Sync>;

/// The objects of kind `K`, by namespace and name.
pub(crate) struct Mirror<K> {
    state: RwLock<State<K>>,
    /// Held while a change is applied and told, so that listeners see changes in order.
    telling: Mutex<Vec<Listener<K>>>,
}

struct State<K> {
    objects: BTreeMap<String, BTreeMap<String, Arc<K>>>,
    /// Unique ids of objects that we removed, and whose watch events are still to come.
    removed: HashSet<String>,
    /// Unique ids of the objects that the watch removed last. What we wrote may be gone before we get to say that we wrote it.
    gone: VecDeque<String>,
}

/// More deletions than happen between a write and its being told.
const REMEMBERED: usize = 1024;

impl<K: Object> Mirror<K> {
    pub(crate) fn new() -> Arc<Self> {
        let state = State {
            objects: BTreeMap::new(),
            removed: HashSet::new(),
            gone: VecDeque::with_capacity(REMEMBERED),
        };
        Arc::new(Self { state: RwLock::new(state), telling: Mutex::new(Vec::new()) })
    }

    /// The object of that name; `ns` is empty for cluster-wide kinds.
    pub(crate) fn get(&self, ns: &str, name: &str) -> Option<Arc<K>> {
        self.read(|state| state.objects.get(ns)?.get(name).cloned())
    }

    /// The objects of a namespace, by name.
    pub(crate) fn in_namespace(&self, ns: &str) -> Vec<Arc<K>> {
        self.read(|state| {
            state.objects.get(ns).into_iter().flat_map(BTreeMap::values).cloned().collect()
        })
    }

    /// All objects, by namespace and name.
    pub(crate) fn all(&self) -> Vec<Arc<K>> {
        self.read(|state| state.objects.values().flat_map(BTreeMap::values).cloned().collect())
    }

    /// Has `listener` called for each change from now on, and now for each object that is there.
    pub(crate) fn listen(
        &self,
        listener: impl Fn(Option<&Arc<K>>, Option<&Arc<K>>) + Send + Sync + 'static,
    ) {
        let mut telling = self.telling.lock().unwrap_or_else(PoisonError::into_inner);
        for object in self.all() {
            listener(None, Some(&object));
        }
        telling.push(Box::new(listener));
    }

    /// Takes in what a write returned.
    pub(crate) fn wrote(&self, object: K) {
        self.put(object);
    }

    /// Takes in what a deletion returned.
    pub(crate) fn deleted(&self, deleted: Deleted<K>) {
        match deleted {
            Deleted::Terminating(object) => self.put(object),
            Deleted::Removed(object) => self.remove(&object, true),
        }
    }

    /// Lists once; then follows the watch for ever. Lists again when it falls behind.
    pub(crate) async fn follow(self: Arc<Self>, registry: Registry, mut from: u64) {
        loop {
            let mut events = registry.watch::<K>(from);
            while let Some(event) = events.next().await {
                match event {
                    Event::Added(object) | Event::Modified(object) => self.put(object),
                    Event::Deleted(object) => self.remove(&object, false),
                    Event::Gone => break,
                }
            }
            from = loop {
                match self.load(&registry) {
                    Ok(revision) => break revision,
                    Err(error) => {
                        tracing::error!(kind = K::KIND, %error, "cannot list; will retry");
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                }
            };
        }
    }

    /// Makes the mirror equal to the registry. Returns the revision to watch from.
    pub(crate) fn load(&self, registry: &Registry) -> Result<u64, crate::error::ApiError> {
        let listed = registry.list::<K>(None)?;
        let present: HashSet<String> =
            listed.items.iter().map(|o| objects::uid(o.metadata()).to_owned()).collect();
        for object in self.all() {
            if !present.contains(objects::uid(object.metadata()))
                && revision(&*object) <= listed.revision
            {
                self.remove(&object, false);
            }
        }
        self.write(|state| state.removed.retain(|uid| present.contains(uid)));
        for object in listed.items {
            self.put(object);
        }
        Ok(listed.revision)
    }

    fn put(&self, object: K) {
        let telling = self.telling.lock().unwrap_or_else(PoisonError::into_inner);
        let object = Arc::new(object);
        let old = self.write(|state| {
            let meta = object.metadata();
            let uid = objects::uid(meta);
            if state.removed.contains(uid) {
                return None;
            }
            let (ns, name) = (objects::namespace(meta), objects::name(meta));
            let old = state.objects.get(ns).and_then(|names| names.get(name)).cloned();
            let known = old.as_ref().is_some_and(|old| objects::uid(old.metadata()) == uid);
            if !known && state.gone.iter().any(|gone| gone == uid) {
                return None;
            }
            if old.as_ref().is_some_and(|old| revision(&**old) >= revision(&*object)) {
                return None;
            }
            let names = state.objects.entry(ns.to_owned()).or_default();
            names.insert(name.to_owned(), object.clone());
            Some(old)
        });
        if let Some(old) = old {
            for listener in telling.iter() {
                listener(old.as_ref(), Some(&object));
            }
        }
    }

    /// `ours`: we deleted it ourselves, and the watch will tell once more.
    fn remove(&self, object: &K, ours: bool) {
        let telling = self.telling.lock().unwrap_or_else(PoisonError::into_inner);
        let meta = object.metadata();
        let uid = objects::uid(meta);
        let old = self.write(|state| {
            if !ours {
                state.removed.remove(uid);
                if state.gone.len() == REMEMBERED {
                    state.gone.pop_front();
                }
                state.gone.push_back(uid.to_owned());
            }
            let names = state.objects.get_mut(objects::namespace(meta))?;
            if names.get(objects::name(meta)).is_none_or(|o| objects::uid(o.metadata()) != uid) {
                return None;
            }
            let old = names.remove(objects::name(meta));
            if names.is_empty() {
                state.objects.remove(objects::namespace(meta));
            }
            if ours {
                state.removed.insert(uid.to_owned());
            }
            old
        });
        if let Some(old) = old {
            for listener in telling.iter() {
                listener(Some(&old), None);
            }
        }
    }

    fn read<T>(&self, f: impl FnOnce(&State<K>) -> T) -> T {
        f(&self.state.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write<T>(&self, f: impl FnOnce(&mut State<K>) -> T) -> T {
        f(&mut self.state.write().unwrap_or_else(PoisonError::into_inner))
    }
}

fn revision<K: Object>(object: &K) -> u64 {
    object.metadata().resource_version.as_deref().and_then(|v| v.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;

    use super::*;

    fn object(name: &str, uid: &str, revision: u64) -> ConfigMap {
        let mut object = ConfigMap::default();
        object.metadata.name = Some(name.to_owned());
        object.metadata.namespace = Some("ns".to_owned());
        object.metadata.uid = Some(uid.to_owned());
        object.metadata.resource_version = Some(revision.to_string());
        object
    }

    type Log = Arc<Mutex<Vec<(Option<u64>, Option<u64>)>>>;

    fn log(mirror: &Mirror<ConfigMap>) -> Log {
        let log = Arc::new(Mutex::new(Vec::new()));
        let sink = log.clone();
        mirror.listen(move |old, new| {
            let at = |o: Option<&Arc<ConfigMap>>| o.map(|o| revision(&**o));
            sink.lock().unwrap().push((at(old), at(new)));
        });
        log
    }

    #[test]
    fn own_writes_count_once_and_late_events_change_nothing() {
        let mirror = Mirror::new();
        mirror.put(object("a", "1", 5));
        let log = log(&mirror);
        mirror.wrote(object("a", "1", 7));
        mirror.put(object("a", "1", 6));
        mirror.put(object("a", "1", 7));
        assert_eq!(*log.lock().unwrap(), [(None, Some(5)), (Some(5), Some(7))]);
    }

    #[test]
    fn what_is_gone_before_we_say_that_we_wrote_it_does_not_come_back() {
        let mirror = Mirror::new();
        mirror.put(object("a", "1", 5));
        mirror.remove(&object("a", "1", 6), false);
        mirror.wrote(object("a", "1", 5));
        assert!(mirror.get("ns", "a").is_none());
        mirror.put(object("a", "2", 7));
        assert!(mirror.get("ns", "a").is_some(), "another object of the same name");
    }

    #[test]
    fn what_we_removed_does_not_come_back() {
        let mirror = Mirror::new();
        mirror.put(object("a", "1", 5));
        mirror.deleted(Deleted::Removed(object("a", "1", 5)));
        mirror.put(object("a", "1", 6));
        assert!(mirror.get("ns", "a").is_none());
        mirror.remove(&object("a", "1", 8), false);
        mirror.put(object("a", "2", 9));
        mirror.remove(&object("a", "1", 8), false);
        assert_eq!(mirror.all().len(), 1, "another object of the same name stays");
    }
}
