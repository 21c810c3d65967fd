//! What clients see happen to objects.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Endpoints, Service};

use super::{Slices, family, is_slice_of, place, record, slice_of};
use crate::objects;
use crate::registry::{Object as _, Registry, key, prefix};
use crate::store::{Change, Compacted, Record, Watch};

/// The changes of a kind as clients see them, those of Endpoints that are made of slices among them.
pub(crate) struct Changes {
    registry: Registry,
    own: Watch,
    parts: Option<Parts>,
}

/// What Endpoints are made of.
struct Parts {
    watch: Watch,
    /// Keys of other slices do not matter.
    prefix: String,
    /// Changes that are known, and newer than what is known of all.
    held: Vec<Arc<Change>>,
    /// Up to here everything was told.
    position: u64,
}

/// What happened under one name.
#[derive(Default)]
struct Affected {
    slices: Vec<Arc<Change>>,
    stored: Vec<Arc<Change>>,
}

impl Changes {
    pub(super) fn new(registry: Registry, own: Watch, parts: Option<(Watch, String)>) -> Self {
        let parts = parts.map(|(watch, prefix)| {
            let position = watch.position();
            Parts { watch, prefix, held: Vec::new(), position }
        });
        Self { registry, own, parts }
    }

    /// The changes since the last call, at least one. Cancel safe: nothing is lost when the call is dropped.
    pub(crate) async fn changes(&mut self) -> Result<Vec<Arc<Change>>, Compacted> {
        loop {
            let Some(parts) = &mut self.parts else { return self.own.changes().await };
            if parts.held.is_empty() {
                let first = tokio::select! {
                    changes = self.own.changes() => changes?,
                    changes = parts.watch.changes() => changes?,
                };
                parts.held.extend(first);
            }
            let told = self.ready()?;
            if !told.is_empty() {
                return Ok(told);
            }
        }
    }

    /// The changes since the last call, without waiting.
    pub(crate) fn ready(&mut self) -> Result<Vec<Arc<Change>>, Compacted> {
        let Some(parts) = &mut self.parts else { return self.own.ready() };
        parts.held.extend(parts.watch.ready()?);
        let until = parts.watch.position();
        // Asked later, so all up to there is known of them, too.
        parts.held.extend(self.own.ready()?);
        let (mut known, held): (Vec<_>, Vec<_>) =
            std::mem::take(&mut parts.held).into_iter().partition(|c| c.revision <= until);
        parts.held = held;
        parts.position = until;
        known.sort_by_key(|change| change.revision);
        let affected = affected(known, &parts.prefix);
        let mut told = Vec::new();
        for (place, affected) in affected {
            told.extend(self.told(&place, affected, until)?);
        }
        told.sort_by_key(|change| change.revision);
        Ok(told)
    }

    /// All changes up to this revision have been returned.
    pub(crate) fn position(&self) -> u64 {
        self.parts.as_ref().map_or_else(|| self.own.position(), |parts| parts.position)
    }

    /// What a client sees of it. Several changes of what is made are one.
    fn told(
        &self,
        (ns, name): &(String, String),
        affected: Affected,
        until: u64,
    ) -> Result<Vec<Arc<Change>>, Compacted> {
        let Affected { slices, stored } = affected;
        let service = self.registry.get::<Service>(Some(ns), name).ok();
        // One that is gone leaves slices behind for a moment: they were made for it.
        let selects = service.as_ref().is_none_or(objects::selects_pods);
        let family = service.as_ref().map_or("IPv4", family);
        let (after, before) = if selects {
            let after = self.registry.slices_of(ns, name, until)?;
            let before = undone(after.clone(), &slices, name);
            (after, before)
        } else {
            (Slices::new(), Slices::new())
        };
        let (after, before) = (record(after.values(), family), record(before.values(), family));
        if after.is_none() && before.is_none() {
            return Ok(stored);
        }
        let key: Arc<str> = key(Endpoints::kind(), Some(ns), name).into();
        let newest = slices.iter().chain(&stored).map(|change| change.revision).max();
        let underneath = self.underneath(&key, &stored);
        let change = Change {
            revision: newest.unwrap_or(until),
            key,
            record: after.or(underneath.1),
            previous: before.or(underneath.0),
        };
        Ok(if change.record == change.previous { vec![] } else { vec![Arc::new(change)] })
    }

    /// What was stored before and after these changes.
    fn underneath(
        &self,
        key: &str,
        stored: &[Arc<Change>],
    ) -> (Option<Arc<Record>>, Option<Arc<Record>>) {
        match (stored.first(), stored.last()) {
            (Some(first), Some(last)) => (first.previous.clone(), last.record.clone()),
            _ => {
                let now = self.registry.0.store.get(key);
                (now.clone(), now)
            }
        }
    }
}

/// The changes by namespace and name of the Endpoints that they are about.
fn affected(changes: Vec<Arc<Change>>, slices: &str) -> BTreeMap<(String, String), Affected> {
    let own = prefix(Endpoints::kind(), None);
    let mut all: BTreeMap<(String, String), Affected> = BTreeMap::new();
    for change in changes {
        let (ns, name) = place(&change.key);
        if change.key.starts_with(&own) {
            all.entry((ns.to_owned(), name.to_owned())).or_default().stored.push(change.clone());
        } else if change.key.starts_with(slices) {
            let mut services: Vec<String> = [&change.previous, &change.record]
                .into_iter()
                .flatten()
                .filter_map(|r| slice_of(r))
                .collect();
            services.dedup();
            for service in services {
                let entry = all.entry((ns.to_owned(), service)).or_default();
                entry.slices.push(change.clone());
            }
        }
    }
    all
}

/// The slices of a Service as they were before these changes.
fn undone(mut slices: Slices, changes: &[Arc<Change>], service: &str) -> Slices {
    for change in changes.iter().rev() {
        match &change.previous {
            Some(previous) if is_slice_of(previous, service) => {
                slices.insert(change.key.clone(), previous.clone());
            }
            _ => drop(slices.remove(&change.key)),
        }
    }
    slices
}
