//! The objects of the cluster, typed: what REST handlers, controllers and the scheduler read and write.
//!
//! Owns: the rules that hold for every object (names, revisions, generations, finalizers, namespaces, the
//! addresses of Services), whoever writes it. Never does: HTTP, and knowing who asks.

use std::any::Any;
use std::sync::Arc;

use futures_util::Stream;
use k8s_openapi::api::core::v1::Service;
use mesh_model::ClusterConfig;
use mesh_model::kinds::Kind;

use crate::error::ApiError;
use crate::ipam::ServiceAddresses;
use crate::store::{Page, Range, Record, Store, Watch};

mod admission;
mod codec;
mod delete;
mod endpoints;
mod meta;
mod namespaces;
mod watch;
mod write;

pub use crate::strategy::Object;
pub use codec::{decode, object_json, to_value};
pub use delete::Deleted;
pub(crate) use endpoints::Changes;
pub use watch::Event;
pub use write::{Part, WriteOptions};

/// Objects of one kind, and the revision that they are a snapshot of.
#[derive(Debug, Clone)]
pub struct Listed<K> {
    /// The objects, by namespace and name.
    pub items: Vec<K>,
    /// Watch from here to learn what happens next.
    pub revision: u64,
}

/// The objects of the cluster. Cheap to clone.
#[derive(Clone)]
pub struct Registry(Arc<Inner>);

struct Inner {
    store: Arc<dyn Store>,
    addresses: ServiceAddresses,
    cluster: ClusterConfig,
}

impl Registry {
    /// The objects in `store`, with the address plan `cluster`.
    pub fn new(store: Arc<dyn Store>, cluster: ClusterConfig) -> Result<Self, ApiError> {
        let addresses = ServiceAddresses::new(&cluster);
        let registry = Self(Arc::new(Inner { store, addresses, cluster }));
        let services = registry.list::<Service>(None)?;
        registry.0.addresses.load(&services.items);
        Ok(registry)
    }

    /// The address plan.
    pub fn cluster(&self) -> &ClusterConfig {
        &self.0.cluster
    }

    /// The newest revision.
    pub fn revision(&self) -> u64 {
        self.0.store.revision()
    }

    /// An object by name; `ns` is `None` for cluster-wide kinds.
    pub fn get<K: Object>(&self, ns: Option<&str>, name: &str) -> Result<K, ApiError> {
        decode(&*self.record(K::kind(), ns, name)?)
    }

    /// All objects of a kind, or those of one namespace.
    pub fn list<K: Object>(&self, ns: Option<&str>) -> Result<Listed<K>, ApiError> {
        let page = self.page(K::kind(), ns, Range::default())?;
        let items = page.records.iter().map(|r| decode(r)).collect::<Result<_, _>>()?;
        Ok(Listed { items, revision: page.revision })
    }

    /// What happens to objects of a kind after `from_revision`, in all namespaces. Ends after [`Event::Gone`].
    pub fn watch<K: Object>(
        &self,
        from_revision: u64,
    ) -> impl Stream<Item = Event<K>> + Send + Unpin + use<K> {
        watch::typed(self.changes(K::kind(), from_revision))
    }

    /// The stored form of an object.
    pub fn record(
        &self,
        kind: &'static Kind,
        ns: Option<&str>,
        name: &str,
    ) -> Result<Arc<Record>, ApiError> {
        let record = self.0.store.get(&key(kind, ns, name));
        record.ok_or_else(|| ApiError::NotFound { kind, name: name.to_owned() })
    }

    /// Stored objects of a kind; the prefix of `range` is set here.
    pub fn page(&self, kind: &Kind, ns: Option<&str>, range: Range<'_>) -> Result<Page, ApiError> {
        let prefix = prefix(kind, ns);
        Ok(self.0.store.range(Range { prefix: &prefix, ..range })?)
    }

    /// The raw changes of a kind after a revision.
    pub fn changes(&self, kind: &Kind, after: u64) -> Watch {
        self.0.store.watch(&prefix(kind, None), after)
    }

    /// Finishes the writes under way and closes the store; later writes fail.
    pub async fn close(&self) {
        self.0.store.close().await;
    }

    /// Forgets the history up to a revision: older watches and pages fail with `Expired`.
    pub fn compact(&self, revision: u64) {
        self.0.store.compact(revision);
    }

    /// Takes the addresses that a Service asks for; `None` for every other kind.
    fn reserve<K: Object>(
        &self,
        object: &mut K,
        old: Option<&K>,
    ) -> Result<Option<crate::ipam::Reservation>, crate::ipam::FieldError> {
        let Some(service) = (object as &mut dyn Any).downcast_mut::<Service>() else {
            return Ok(None);
        };
        let old = old.and_then(|old| (old as &dyn Any).downcast_ref::<Service>());
        self.0.addresses.assign(service, old).map(Some)
    }

    fn release<K: Object>(&self, object: &K) {
        if let Some(service) = (object as &dyn Any).downcast_ref::<Service>() {
            self.0.addresses.release(service);
        }
    }
}

fn prefix(kind: &Kind, ns: Option<&str>) -> String {
    let group = if kind.group.is_empty() { "core" } else { kind.group };
    match ns {
        Some(ns) => format!("{group}/{}/{ns}/", kind.plural),
        None => format!("{group}/{}/", kind.plural),
    }
}

/// The store's key of an object.
pub(crate) fn key(kind: &Kind, ns: Option<&str>, name: &str) -> String {
    prefix(kind, Some(ns.unwrap_or_default())) + name
}

#[cfg(test)]
mod tests;
