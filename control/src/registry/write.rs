//! Create and update: prepare, check, reserve addresses, store; again when somebody else was faster.

use k8s_openapi::api::core::v1::{Binding, Pod};
use mesh_model::kinds::Kind;

use super::codec::{encode, to_value};
use super::{Object, Registry, key, meta};
use crate::error::{ApiError, Cause};
use crate::fields::Author;
use crate::fields::owners::{self, State};
use crate::ipam::{FieldError, Reservation};
use crate::store::{Expect, Op, TxnError};
use crate::strategy::Causes;

/// How often a write is tried again after another one of the same object came first.
const ATTEMPTS: usize = 16;

/// Which part of an object a write is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// All but the status.
    Main,
    /// The status.
    Status,
    /// The node that a pod is bound to.
    Binding,
    /// The finalizers in the spec of a namespace.
    Finalize,
    /// The ephemeral containers of a pod.
    Ephemeral,
}

impl Part {
    /// The part as owners of fields know it; none for the object itself.
    pub fn subresource(self) -> Option<&'static str> {
        (self == Self::Status).then_some("status")
    }
}

/// How to write.
#[derive(Debug, Clone, Default)]
pub struct WriteOptions {
    /// Do everything but store.
    pub dry_run: bool,
    /// Who writes.
    pub author: Author,
    /// Whether a node writes, which may not decide all of what it may write.
    pub by_node: bool,
}

impl Registry {
    /// Stores a new object and returns it as stored.
    pub async fn create<K: Object>(&self, object: &K) -> Result<K, ApiError> {
        let ns = object.metadata().namespace.clone();
        self.create_in(ns.as_deref(), object.clone(), &WriteOptions::default()).await
    }

    /// Replaces all but the status. [`ApiError::Conflict`] when `metadata.resourceVersion` is set and stale.
    pub async fn update<K: Object>(&self, object: &K) -> Result<K, ApiError> {
        self.replace(object, Part::Main).await
    }

    /// Replaces the status. [`ApiError::Conflict`] when `metadata.resourceVersion` is set and stale.
    pub async fn update_status<K: Object>(&self, object: &K) -> Result<K, ApiError> {
        self.replace(object, Part::Status).await
    }

    /// Binds a pod to a node: once, and only while it is not being deleted.
    pub async fn bind(&self, ns: &str, name: &str, node: &str) -> Result<Pod, ApiError> {
        let binding = Binding {
            target: k8s_openapi::api::core::v1::ObjectReference {
                name: Some(node.to_owned()),
                ..Default::default()
            },
            ..Binding::default()
        };
        self.bind_as(ns, name, &binding, &WriteOptions::default()).await
    }

    /// Binds a pod as a `Binding` says.
    pub async fn bind_as(
        &self,
        ns: &str,
        name: &str,
        binding: &Binding,
        options: &WriteOptions,
    ) -> Result<Pod, ApiError> {
        self.modify(Some(ns), name, Part::Binding, options, |pod| {
            crate::strategy::pod::bound(pod, binding)
        })
        .await
    }

    /// Stores a new object in `ns`, or in the namespace that it names.
    pub async fn create_in<K: Object>(
        &self,
        ns: Option<&str>,
        mut object: K,
        options: &WriteOptions,
    ) -> Result<K, ApiError> {
        meta::settle_namespace(K::kind(), object.metadata_mut(), ns)?;
        meta::prepare_create(object.metadata_mut(), K::GENERATION);
        object.prepare_create();
        object.set_defaults();
        permit(&object, None, options)?;
        self.admit(&mut object)?;
        object.metadata_mut().managed_fields =
            owners::of_new(&K::kind().api_version(), &options.author, meta::now());
        let base = object.metadata().generate_name.clone().filter(|base| !base.is_empty());
        let named = object.metadata().name.as_ref().is_some_and(|name| !name.is_empty());
        for attempt in 0..ATTEMPTS {
            let mut object = object.clone();
            if !named && let Some(base) = &base {
                object.metadata_mut().name = Some(meta::generate_name(base));
            }
            object.settle_name();
            match self.try_create(&object, options).await {
                Err(ApiError::AlreadyExists { .. }) if !named && attempt + 1 < ATTEMPTS => {}
                Ok(None) => {}
                Ok(Some(created)) => return Ok(created),
                Err(error) => return Err(error),
            }
        }
        Err(busy(K::kind(), name_of(&object)))
    }

    /// `None` when the namespace changed in the meantime.
    async fn try_create<K: Object>(
        &self,
        object: &K,
        options: &WriteOptions,
    ) -> Result<Option<K>, ApiError> {
        let name = name_of(object).to_owned();
        let ns = object.metadata().namespace.clone();
        check(object, None)?;
        let open = self.open_namespace::<K>(ns.as_deref(), &name)?;
        let key = key(K::kind(), ns.as_deref(), &name);
        let is_there =
            self.0.store.get(&key).is_some() || self.is_made(K::kind(), ns.as_deref(), &name);
        if is_there {
            return Err(ApiError::AlreadyExists { kind: K::kind(), name });
        }
        let mut object = object.clone();
        let reservation =
            self.reserve(&mut object, None).map_err(|e| refused(K::kind(), &name, e))?;
        if options.dry_run {
            return Ok(Some(object));
        }
        let put = Op::Put { key: key.clone(), value: encode(&object)?, expect: Expect::Absent };
        match self.0.store.txn(open.into_iter().chain([put]).collect()).await {
            Ok(revision) => Ok(Some(stored(object, revision, reservation))),
            Err(TxnError::Conflict { key: at, .. }) if at == key => {
                Err(ApiError::AlreadyExists { kind: K::kind(), name })
            }
            Err(TxnError::Conflict { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn replace<K: Object>(&self, object: &K, part: Part) -> Result<K, ApiError> {
        let ns = object.metadata().namespace.clone();
        let name = name_of(object).to_owned();
        let options = WriteOptions::default();
        self.modify(ns.as_deref(), &name, part, &options, |_| Ok(object.clone())).await
    }

    /// Reads an object, changes it and stores it; again when somebody else was faster, unless what `change`
    /// returns names a resource version. No write happens when nothing changed.
    pub async fn modify<K: Object>(
        &self,
        ns: Option<&str>,
        name: &str,
        part: Part,
        options: &WriteOptions,
        change: impl Fn(&K) -> Result<K, ApiError>,
    ) -> Result<K, ApiError> {
        for _ in 0..ATTEMPTS {
            let old: K = self.get(ns, name)?;
            let mut asked = change(&old)?;
            expect_same(&mut asked, &old, ns)?;
            if let Some(done) = self.try_modify(asked, &old, part, options).await? {
                return Ok(done);
            }
        }
        Err(busy(K::kind(), name))
    }

    /// `None` when somebody else was faster.
    async fn try_modify<K: Object>(
        &self,
        asked: K,
        old: &K,
        part: Part,
        options: &WriteOptions,
    ) -> Result<Option<K>, ApiError> {
        let name = name_of(old);
        let mut new = merged(asked, old, part);
        new.set_defaults();
        permit(&new, Some(old), options)?;
        let generation = old.metadata().generation;
        if K::GENERATION && new.spec_differs(old) {
            new.metadata_mut().generation = Some(generation.unwrap_or(0) + 1);
        }
        settle_owners(old, &mut new, part, &options.author)?;
        let reservation = if part == Part::Main {
            self.reserve(&mut new, Some(old)).map_err(|e| refused(K::kind(), name, e))?
        } else {
            None
        };
        if new == *old {
            return Ok(Some(new));
        }
        check(&new, Some((old, part)))?;
        if options.dry_run {
            return Ok(Some(new));
        }
        if new.is_finished() {
            return Ok(self.remove(&new, old).await?.then_some(new));
        }
        let ns = old.metadata().namespace.as_deref();
        let key = key(K::kind(), ns, name);
        let put = Op::Put { key, value: encode(&new)?, expect: Expect::Revision(revision_of(old)) };
        match self.0.store.txn(vec![put]).await {
            Ok(revision) => Ok(Some(stored(new, revision, reservation))),
            Err(TxnError::Conflict { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// The new object: what `asked` may say about `part`, the rest from `old`.
fn merged<K: Object>(mut asked: K, old: &K, part: Part) -> K {
    meta::prepare_update(asked.metadata_mut(), old.metadata());
    match part {
        Part::Main => {
            asked.copy_status(old);
            asked.keep_reserved(old);
            asked.drop_superfluous(old);
            asked
        }
        Part::Status => {
            let mut new = old.clone();
            new.copy_status(&asked);
            if K::STATUS_CARRIES_LABELS {
                new.metadata_mut().labels = asked.metadata_mut().labels.take();
                new.metadata_mut().annotations = asked.metadata_mut().annotations.take();
            }
            new
        }
        Part::Binding | Part::Finalize | Part::Ephemeral => asked,
    }
}

/// Writes down who has which fields now, if that is kept of the object.
fn settle_owners<K: Object>(
    old: &K,
    new: &mut K,
    part: Part,
    author: &Author,
) -> Result<(), ApiError> {
    if old.metadata().managed_fields.is_none() && author.applies.is_none() {
        new.metadata_mut().managed_fields = None;
        return Ok(());
    }
    let (from, to) = (to_value(old)?, to_value(&*new)?);
    let from = State { meta: old.metadata(), object: &from };
    let to = State { meta: new.metadata(), object: &to };
    let version = K::kind().api_version();
    let settled = owners::settle(&version, from, to, author, part.subresource(), &meta::now());
    new.metadata_mut().managed_fields = settled.map_err(ApiError::ApplyConflict)?;
    Ok(())
}

/// Refuses an update of another object, or of another state of it, than the caller means.
fn expect_same<K: Object>(asked: &mut K, old: &K, ns: Option<&str>) -> Result<(), ApiError> {
    let (kind, name) = (K::kind(), name_of(old).to_owned());
    meta::settle_namespace(kind, asked.metadata_mut(), ns)?;
    let asked = asked.metadata();
    if asked.name.as_deref().is_some_and(|n| n != name) {
        return Err(ApiError::BadRequest(format!(
            "the name of the object ({}) does not match the name on the URL ({name})",
            asked.name.as_deref().unwrap_or_default()
        )));
    }
    let stale = asked
        .resource_version
        .as_deref()
        .is_some_and(|v| !v.is_empty() && Some(v) != old.metadata().resource_version.as_deref());
    if stale {
        let detail =
            "the object has been modified; please apply your changes to the latest version \
                      and try again"
                .to_owned();
        return Err(ApiError::Conflict { kind, name, detail });
    }
    let (uid, old_uid) = (asked.uid.as_deref().filter(|u| !u.is_empty()), &old.metadata().uid);
    if uid.is_some() && uid != old_uid.as_deref() {
        let detail = format!(
            "Precondition failed: UID in precondition: {}, UID in object meta: {}",
            uid.unwrap_or_default(),
            old_uid.as_deref().unwrap_or_default()
        );
        return Err(ApiError::Conflict { kind, name, detail });
    }
    Ok(())
}

/// Refuses what is not for nodes to decide.
fn permit<K: Object>(new: &K, old: Option<&K>, options: &WriteOptions) -> Result<(), ApiError> {
    match new.refused_to_nodes(old).filter(|_| options.by_node) {
        Some(detail) => {
            Err(ApiError::Forbidden { kind: K::kind(), name: name_of(new).to_owned(), detail })
        }
        None => Ok(()),
    }
}

fn check<K: Object>(new: &K, old: Option<(&K, Part)>) -> Result<(), ApiError> {
    let mut causes = Causes::default();
    meta::validate(K::kind(), new.metadata(), &mut causes);
    new.validate(&mut causes);
    if let Some((old, part)) = old {
        causes.without_those_of(old);
        meta::validate_update(new.metadata(), old.metadata(), &mut causes);
        if part == Part::Main {
            new.validate_update(old, &mut causes);
        }
    }
    let causes = causes.into_vec();
    if causes.is_empty() {
        return Ok(());
    }
    let name = new.metadata().name.clone().or_else(|| new.metadata().generate_name.clone());
    Err(ApiError::Invalid { kind: K::kind(), name: name.unwrap_or_default(), causes })
}

fn stored<K: Object>(mut object: K, revision: u64, reservation: Option<Reservation>) -> K {
    if let Some(reservation) = reservation {
        reservation.commit();
    }
    object.metadata_mut().resource_version = Some(revision.to_string());
    object
}

fn refused(kind: &'static Kind, name: &str, error: FieldError) -> ApiError {
    let causes = vec![Cause { field: error.field, message: error.message }];
    ApiError::Invalid { kind, name: name.to_owned(), causes }
}

pub(super) fn busy(kind: &'static Kind, name: &str) -> ApiError {
    let detail = "too many writers at the same time; please try again".to_owned();
    ApiError::Conflict { kind, name: name.to_owned(), detail }
}

pub(super) fn name_of<K: Object>(object: &K) -> &str {
    object.metadata().name.as_deref().unwrap_or_default()
}

/// The revision that a stored object was read at.
pub(super) fn revision_of<K: Object>(object: &K) -> u64 {
    let version = object.metadata().resource_version.as_deref();
    version.and_then(|v| v.parse().ok()).expect("decode sets the resource version")
}
