//! What namespaces mean for the objects in them.

use k8s_openapi::api::core::v1::Namespace;

use super::{Object, Part, Registry, WriteOptions, decode, key};
use crate::error::ApiError;
use crate::store::{Expect, Op};

/// The finalizer in `spec.finalizers` that keeps a namespace until its content is gone.
pub(super) const CONTENT: &str = "kubernetes";

impl Registry {
    /// A condition for a write: the namespace exists and takes new objects.
    pub(super) fn open_namespace<K: Object>(
        &self,
        ns: Option<&str>,
        name: &str,
    ) -> Result<Option<Op>, ApiError> {
        let Some(ns) = ns.filter(|_| K::kind().namespaced) else {
            return Ok(None);
        };
        let record = self.record(Namespace::kind(), None, ns)?;
        let namespace: Namespace = decode(&record)?;
        if namespace.metadata.deletion_timestamp.is_some() {
            let detail = format!(
                "unable to create new content in namespace {ns} because it is being terminated"
            );
            return Err(ApiError::Forbidden { kind: K::kind(), name: name.to_owned(), detail });
        }
        let key = key(Namespace::kind(), None, ns);
        Ok(Some(Op::Check { key, expect: Expect::Revision(record.revision) }))
    }

    /// Declares a terminating namespace empty: it goes away unless other finalizers hold it.
    pub async fn finalize_namespace(&self, name: &str) -> Result<(), ApiError> {
        let emptied = |old: &Namespace| {
            let mut new = old.clone();
            if let Some(finalizers) = new.spec.as_mut().and_then(|s| s.finalizers.as_mut()) {
                finalizers.retain(|f| f != CONTENT);
            }
            Ok(new)
        };
        self.modify(None, name, Part::Finalize, &WriteOptions::default(), emptied).await.map(drop)
    }
}
