//! Deletion: at once, or marked and left to those who hold a finalizer or run the pod.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, Time};

use super::codec::encode;
use super::write::{busy, name_of, revision_of};
use super::{Object, Registry, key, meta};
use crate::error::ApiError;
use crate::store::{Expect, Op, TxnError};

const ATTEMPTS: usize = 16;
const FOREGROUND: &str = "foregroundDeletion";
const ORPHAN: &str = "orphan";

/// How far a deletion got.
#[derive(Debug, Clone, PartialEq)]
pub enum Deleted<K> {
    /// The object is gone; this is what it was last.
    Removed(K),
    /// The object is marked; somebody has work to do before it goes.
    Terminating(K),
}

impl<K> Deleted<K> {
    /// The object as it is, or was last.
    pub fn into_object(self) -> K {
        match self {
            Self::Removed(object) | Self::Terminating(object) => object,
        }
    }
}

impl Registry {
    /// Deletes an object: finalizers, preconditions, propagation and the grace period of pods are honoured.
    pub async fn delete<K: Object>(
        &self,
        ns: Option<&str>,
        name: &str,
        options: &DeleteOptions,
    ) -> Result<Deleted<K>, ApiError> {
        for _ in 0..ATTEMPTS {
            let old: K = self.get(ns, name)?;
            preconditions(&old, options)?;
            if let Some(detail) = old.undeletable() {
                return Err(ApiError::Forbidden { kind: K::kind(), name: name.to_owned(), detail });
            }
            let marked = marked(&old, options)?;
            let dry = options.dry_run.as_ref().is_some_and(|d| !d.is_empty());
            if marked.is_finished() {
                if dry || self.remove(&marked, &old).await? {
                    return Ok(Deleted::Removed(old));
                }
            } else if dry || marked == old {
                return Ok(Deleted::Terminating(marked));
            } else if let Some(marked) = self.mark(marked, &old).await? {
                return Ok(Deleted::Terminating(marked));
            }
        }
        Err(busy(K::kind(), name))
    }

    /// Whether it happened: not when somebody else was faster.
    pub(super) async fn remove<K: Object>(&self, new: &K, old: &K) -> Result<bool, ApiError> {
        let key = key(K::kind(), old.metadata().namespace.as_deref(), name_of(old));
        let delete = Op::Delete { key, expect: Expect::Revision(revision_of(old)) };
        match self.0.store.txn(vec![delete]).await {
            Ok(_) => {
                self.release(new);
                Ok(true)
            }
            Err(TxnError::Conflict { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    async fn mark<K: Object>(&self, mut marked: K, old: &K) -> Result<Option<K>, ApiError> {
        let key = key(K::kind(), old.metadata().namespace.as_deref(), name_of(old));
        let value = encode(&marked)?;
        let put = Op::Put { key, value, expect: Expect::Revision(revision_of(old)) };
        match self.0.store.txn(vec![put]).await {
            Ok(revision) => {
                marked.metadata_mut().resource_version = Some(revision.to_string());
                Ok(Some(marked))
            }
            Err(TxnError::Conflict { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

fn preconditions<K: Object>(object: &K, options: &DeleteOptions) -> Result<(), ApiError> {
    let Some(wanted) = &options.preconditions else { return Ok(()) };
    let meta = object.metadata();
    let differs = [
        ("UID", &wanted.uid, &meta.uid),
        ("ResourceVersion", &wanted.resource_version, &meta.resource_version),
    ]
    .into_iter()
    .find(|(_, wanted, actual)| wanted.is_some() && wanted != actual);
    let Some((what, wanted, actual)) = differs else { return Ok(()) };
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    Err(ApiError::Conflict {
        kind: K::kind(),
        name: name_of(object).to_owned(),
        detail: format!(
            "Precondition failed: {what} in precondition: {}, {what} in object meta: {}",
            text(wanted),
            text(actual)
        ),
    })
}

/// The object with all the marks that the deletion puts on it. Equal to `old` when it has them already.
fn marked<K: Object>(old: &K, options: &DeleteOptions) -> Result<K, ApiError> {
    let mut new = old.clone();
    propagate(&mut new, options)?;
    let grace = old.grace_period_secs(options.grace_period_seconds).unwrap_or(0).max(0);
    let meta = new.metadata_mut();
    let shorter = meta.deletion_grace_period_seconds.is_none_or(|before| grace < before);
    if meta.deletion_timestamp.is_none() || shorter {
        let now = meta::now();
        let at = now.0.as_second().saturating_add(grace);
        let at = k8s_openapi::jiff::Timestamp::from_second(at).map_or(now, Time);
        meta.deletion_timestamp = Some(at);
        meta.deletion_grace_period_seconds = Some(grace);
        if K::GENERATION {
            meta.generation = Some(meta.generation.unwrap_or(0) + 1);
        }
    }
    new.mark_terminating();
    Ok(new)
}

fn propagate<K: Object>(object: &mut K, options: &DeleteOptions) -> Result<(), ApiError> {
    #[allow(deprecated)]
    let orphan = options.orphan_dependents;
    let policy = match (options.propagation_policy.as_deref(), orphan) {
        (Some(_), Some(_)) => {
            let text = "orphanDependents and propagationPolicy cannot be both set".to_owned();
            return Err(ApiError::BadRequest(text));
        }
        (Some(policy), None) => Some(policy),
        (None, Some(true)) => Some("Orphan"),
        (None, Some(false)) => Some("Background"),
        (None, None) => None,
    };
    let (add, drop) = match policy {
        None => return Ok(()),
        Some("Background") => (None, [FOREGROUND, ORPHAN].as_slice()),
        Some("Foreground") => (Some(FOREGROUND), [ORPHAN].as_slice()),
        Some("Orphan") => (Some(ORPHAN), [FOREGROUND].as_slice()),
        Some(other) => {
            return Err(ApiError::BadRequest(format!(
                "invalid propagationPolicy {other:?}: supported values: Foreground, Background, Orphan"
            )));
        }
    };
    let meta = object.metadata_mut();
    let mut finalizers = meta.finalizers.take().unwrap_or_default();
    finalizers.retain(|f| !drop.contains(&f.as_str()));
    if let Some(add) = add
        && !finalizers.iter().any(|f| f == add)
    {
        finalizers.push(add.to_owned());
    }
    meta.finalizers = Some(finalizers).filter(|f| !f.is_empty());
    Ok(())
}
