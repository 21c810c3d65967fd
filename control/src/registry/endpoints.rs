//! Endpoints of Services that select pods. They are stored nowhere: who reads them gets what the Service's EndpointSlices say, so that
//! an endpoint that changes costs no second write, as large as all endpoints of its Service.
//!
//! Other Endpoints are stored like any object. What is made hides what is stored under the same name.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Endpoints, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use mesh_model::kinds::Kind;
use mesh_model::wellknown::{LABEL_MANAGED_BY, LABEL_SERVICE_NAME};

use super::codec::{decode, encode};
use super::{Object, Registry, key, meta, prefix};
use crate::error::ApiError;
use crate::objects;
use crate::store::{Compacted, Page, Range, Record};

mod changes;
mod made;

pub(crate) use changes::Changes;

impl Registry {
    /// The object of that name as clients see it.
    pub(crate) fn shown(
        &self,
        kind: &'static Kind,
        ns: Option<&str>,
        name: &str,
    ) -> Result<Arc<Record>, ApiError> {
        match self.made(kind, ns, name) {
            Some(made) => Ok(made),
            None => self.record(kind, ns, name),
        }
    }

    /// Whether reading that object gives what nobody has stored.
    pub(crate) fn is_made(&self, kind: &'static Kind, ns: Option<&str>, name: &str) -> bool {
        self.made(kind, ns, name).is_some()
    }

    /// As [`page`](Self::page), of the objects that clients see.
    pub(crate) fn shown_page(
        &self,
        kind: &'static Kind,
        ns: Option<&str>,
        range: Range<'_>,
    ) -> Result<Page, ApiError> {
        if kind != Endpoints::kind() {
            return self.page(kind, ns, range);
        }
        let revision = range.revision.unwrap_or_else(|| self.revision());
        let all = Range { revision: Some(revision), ..Range::default() };
        let mut found: BTreeMap<String, Found> = BTreeMap::new();
        for record in self.page(kind, ns, all)?.records {
            let at = record.key.to_string();
            found.entry(at).or_default().stored = Some(record);
        }
        for record in self.page(Service::kind(), ns, all)?.records {
            let (ns, name) = place(&record.key);
            let at = key(kind, Some(ns), name);
            found.entry(at).or_default().service = Some(record);
        }
        let limit = range.limit.unwrap_or(usize::MAX);
        let mut rest = found
            .into_iter()
            .filter(|(key, _)| range.after.is_none_or(|after| key.as_str() > after));
        let mut records = Vec::new();
        while records.len() < limit
            && let Some((_, Found { stored, service })) = rest.next()
        {
            let made = match service {
                Some(service) => self.made_of(&service, revision)?,
                None => None,
            };
            records.extend(made.or(stored));
        }
        Ok(Page { records, revision, remaining: rest.count() })
    }

    /// The changes of a kind after a revision, of the objects that clients see; in all namespaces, or in one.
    pub(crate) fn shown_changes(
        &self,
        kind: &'static Kind,
        ns: Option<&str>,
        after: u64,
    ) -> Changes {
        let parts = (kind == Endpoints::kind()).then(|| {
            let slices = EndpointSlice::kind();
            (self.changes(slices, after), prefix(slices, ns))
        });
        Changes::new(self.clone(), self.changes(kind, after), parts)
    }

    fn made(&self, kind: &'static Kind, ns: Option<&str>, name: &str) -> Option<Arc<Record>> {
        if kind != Endpoints::kind() {
            return None;
        }
        let service = self.record(Service::kind(), ns, name).ok()?;
        self.made_of(&service, self.revision()).ok()?
    }

    /// The Endpoints of a Service, if it selects pods and somebody has looked for them.
    fn made_of(&self, service: &Record, revision: u64) -> Result<Option<Arc<Record>>, Compacted> {
        let Some(service) = selecting(service) else { return Ok(None) };
        let meta = &service.metadata;
        let slices = self.slices_of(objects::namespace(meta), objects::name(meta), revision)?;
        Ok(record(slices.values(), family(&service)))
    }

    /// The slices of a Service that the controller keeps, as of a revision.
    fn slices_of(&self, ns: &str, service: &str, revision: u64) -> Result<Slices, Compacted> {
        let start = meta::generated_start(&format!("{service}-"));
        let prefix = key(EndpointSlice::kind(), Some(ns), &start);
        let range = Range { prefix: &prefix, revision: Some(revision), ..Range::default() };
        let records = self.0.store.range(range)?.records.into_iter();
        Ok(records
            .filter(|record| is_slice_of(record, service))
            .map(|r| (r.key.clone(), r))
            .collect())
    }
}

type Slices = BTreeMap<Arc<str>, Arc<Record>>;

/// What there is under one name.
#[derive(Default)]
struct Found {
    stored: Option<Arc<Record>>,
    service: Option<Arc<Record>>,
}

/// Namespace and name of a key.
fn place(key: &str) -> (&str, &str) {
    let mut parts = key.splitn(4, '/').skip(2);
    (parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
}

/// The Service, if its endpoints are pods.
fn selecting(record: &Record) -> Option<Service> {
    // Spares reading the others.
    memchr::memmem::find(&record.value, b"\"selector\":")?;
    decode::<Service>(record).ok().filter(objects::selects_pods)
}

/// The family that Endpoints are of: they know one only.
fn family(service: &Service) -> &str {
    let families = service.spec.as_ref().and_then(|spec| spec.ip_families.as_deref());
    families.and_then(|families| families.first()).map_or("IPv4", String::as_str)
}

fn is_slice_of(record: &Record, service: &str) -> bool {
    slice_of(record).is_some_and(|name| name == service)
}

/// The Service whose slice the controller keeps there.
fn slice_of(record: &Record) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Bare {
        metadata: k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
    }
    memchr::memmem::find(&record.value, objects::SLICE_MANAGER.as_bytes())?;
    let bare: Bare = serde_json::from_slice(&record.value).ok()?;
    let mut labels = bare.metadata.labels?;
    let is_ours = labels.get(LABEL_MANAGED_BY).is_some_and(|name| name == objects::SLICE_MANAGER);
    labels.remove(LABEL_SERVICE_NAME).filter(|_| is_ours)
}

/// The object that these slices make, in the form of a stored one.
fn record<'a>(
    slices: impl Iterator<Item = &'a Arc<Record>> + Clone,
    family: &str,
) -> Option<Arc<Record>> {
    let revision = slices.clone().map(|record| record.revision).max()?;
    let slices: Vec<EndpointSlice> = slices.filter_map(|record| decode(record).ok()).collect();
    let object = made::made(&slices, family)?;
    let meta = &object.metadata;
    let key = key(Endpoints::kind(), meta.namespace.as_deref(), objects::name(meta));
    Some(Arc::new(Record { key: key.into(), revision, value: encode(&object).ok()? }))
}

#[cfg(test)]
mod tests;
