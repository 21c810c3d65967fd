//! watch: a stream of events, one JSON object per line.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream;
use http::StatusCode;
use jiff::Timestamp;
use mesh_model::kinds::Kind;
use rand::Rng as _;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::body;
use super::query::Query;
use super::respond::{self, Form};
use super::selector::Selector;
use super::target::Target;
use crate::error::ApiError;
use crate::registry::{Changes, Registry, object_json};
use crate::store::{Change, Compacted, Range, Record};
use crate::table;

const BOOKMARK_EVERY: Duration = Duration::from_secs(30);
/// Without a wish, watches end after so many seconds, spread so that clients do not come back all at once.
const DEFAULT_SECS: std::ops::Range<u64> = 1800..3600;
const LONGEST_SECS: u64 = 86_400;
/// The position of a watch that has nothing to wait for.
const NOWHERE: u64 = u64::MAX;
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

/// One watch under way.
struct Watching {
    watch: Changes,
    view: View,
    bookmarks: bool,
    next_bookmark: Instant,
    deadline: Instant,
    stopping: CancellationToken,
    pending: Option<Vec<u8>>,
    ended: bool,
}

/// Which objects a watcher sees, and how.
struct View {
    kind: &'static Kind,
    /// Start of the keys of its namespace, or of the kind.
    prefix: String,
    selector: Selector,
    form: Form,
}

/// Starts a watch as the query says.
pub(crate) fn start(
    registry: &Registry,
    target: &Target,
    query: &Query,
    form: Form,
    stopping: CancellationToken,
) -> Result<Response, ApiError> {
    let mut selector = Selector::of(target.kind, query)?;
    if let Some(name) = &target.name {
        selector = Selector::named(name);
    }
    let prefix = crate::registry::key(target.kind, target.ns.as_deref(), "");
    let prefix = if target.ns.is_some() { prefix } else { String::new() };
    let view = View { kind: target.kind, prefix, selector, form };
    let secs = query.number("timeoutSeconds")?.filter(|s| *s > 0);
    let secs = secs.unwrap_or_else(|| rand::rng().random_range(DEFAULT_SECS)).min(LONGEST_SECS);
    let bookmarks = query.flag("allowWatchBookmarks")?;
    let (position, initial) = initial(registry, target, query, &view, bookmarks)?;
    let now = Instant::now();
    let watching = Watching {
        watch: registry.shown_changes(target.kind, target.ns.as_deref(), position),
        view,
        bookmarks,
        next_bookmark: now + BOOKMARK_EVERY,
        deadline: now + Duration::from_secs(secs),
        stopping,
        pending: Some(initial),
        ended: position == NOWHERE,
    };
    let lines = stream::unfold(watching, async |mut watching| {
        let bytes = watching.next().await?;
        Some((Ok::<_, std::convert::Infallible>(Bytes::from(bytes)), watching))
    });
    Ok(respond::raw(StatusCode::OK, Body::from_stream(lines)))
}

/// The revision to watch from, and the events that come first.
fn initial(
    registry: &Registry,
    target: &Target,
    query: &Query,
    view: &View,
    bookmarks: bool,
) -> Result<(u64, Vec<u8>), ApiError> {
    let version = query.number("resourceVersion")?.unwrap_or(0);
    let send =
        query.has("sendInitialEvents").then(|| query.flag("sendInitialEvents")).transpose()?;
    if send.is_some() && query.value("resourceVersionMatch") != Some("NotOlderThan") {
        return Err(ApiError::BadRequest(
            "resourceVersionMatch: Forbidden: sendInitialEvents requires setting \
             resourceVersionMatch to NotOlderThan"
                .to_owned(),
        ));
    }
    if version > registry.revision() {
        let expired = Compacted { asked: version, oldest: registry.revision() };
        return Ok((NOWHERE, view.error(&expired.into())));
    }
    let everything = send.unwrap_or(version == 0);
    if !everything {
        let position = if version == 0 { registry.revision() } else { version };
        return Ok((position, Vec::new()));
    }
    let page = registry.shown_page(target.kind, target.ns.as_deref(), Range::default())?;
    let mut out = Vec::new();
    for record in &page.records {
        view.put(&mut out, "ADDED", record, record.revision);
    }
    if send == Some(true) && bookmarks {
        view.bookmark(&mut out, page.revision, true);
    }
    Ok((page.revision, out))
}

impl Watching {
    /// The next bytes; `None` at the end.
    async fn next(&mut self) -> Option<Vec<u8>> {
        if let Some(first) = self.pending.take().filter(|first| !first.is_empty()) {
            return Some(first);
        }
        while !self.ended {
            let wake =
                if self.bookmarks { self.next_bookmark.min(self.deadline) } else { self.deadline };
            tokio::select! {
                changes = self.watch.changes() => {
                    let out = self.events(changes);
                    if !out.is_empty() {
                        return Some(out);
                    }
                }
                () = self.stopping.cancelled() => self.ended = true,
                () = tokio::time::sleep_until(wake) => {
                    self.ended = wake == self.deadline;
                    self.next_bookmark = Instant::now() + BOOKMARK_EVERY;
                    let out = self.caught_up();
                    if !out.is_empty() {
                        return Some(out);
                    }
                }
            }
        }
        None
    }

    fn events(&mut self, changes: Result<Vec<Arc<Change>>, Compacted>) -> Vec<u8> {
        match changes {
            Ok(changes) => {
                let mut out = Vec::new();
                for change in changes {
                    self.view.change(&mut out, &change);
                }
                out
            }
            Err(expired) => {
                self.ended = true;
                self.view.error(&expired.into())
            }
        }
    }

    /// Whatever is left, and a bookmark that says so.
    fn caught_up(&mut self) -> Vec<u8> {
        let changes = self.watch.ready();
        let mut out = self.events(changes);
        if self.bookmarks {
            self.view.bookmark(&mut out, self.watch.position(), false);
        }
        out
    }
}

impl View {
    fn change(&self, out: &mut Vec<u8>, change: &Change) {
        if !change.key.starts_with(&self.prefix) {
            return;
        }
        let sees = |record: &Option<Arc<Record>>| record.as_ref().is_some_and(|r| self.selects(r));
        let (before, after) = (sees(&change.previous), sees(&change.record));
        match (&change.previous, &change.record) {
            (_, Some(record)) if after => {
                let type_ = if before { "MODIFIED" } else { "ADDED" };
                self.put(out, type_, record, change.revision);
            }
            (Some(previous), _) if before => self.put(out, "DELETED", previous, change.revision),
            _ => {}
        }
    }

    fn selects(&self, record: &Record) -> bool {
        self.selector.is_empty()
            || self.selector.may_match(&record.value)
                && super::read::value(record).is_ok_and(|value| self.selector.matches(&value))
    }

    fn put(&self, out: &mut Vec<u8>, type_: &str, record: &Record, revision: u64) {
        let bytes = object_json(record, revision);
        if self.form == Form::Plain {
            if type_ == "ADDED" && !self.selects(record) {
                return;
            }
            out.extend_from_slice(format!("{{\"type\":\"{type_}\",\"object\":").as_bytes());
            out.extend_from_slice(&bytes);
            out.extend_from_slice(b"}\n");
            return;
        }
        let Ok(value) = body::json(&bytes) else { return };
        if type_ != "ADDED" || self.selector.is_empty() || self.selector.matches(&value) {
            line(out, type_, self.form.object(self.kind, value));
        }
    }

    fn bookmark(&self, out: &mut Vec<u8>, revision: u64, initial_end: bool) {
        let mut metadata = json!({"resourceVersion": revision.to_string()});
        if initial_end {
            metadata["annotations"] = json!({INITIAL_EVENTS_END: "true"});
        }
        let mut object = json!({
            "kind": self.kind.kind,
            "apiVersion": self.kind.api_version(),
            "metadata": metadata,
        });
        match self.form {
            Form::Plain => {}
            Form::Metadata => object = respond::partial(&object),
            Form::Table(include) => {
                let metadata = object["metadata"].clone();
                object = table::table(self.kind, &[], metadata, include, Timestamp::now());
                if initial_end {
                    // A Table's own metadata has no annotations: they are on the object of a row.
                    let only = json!({"metadata": {"resourceVersion": revision.to_string(),
                        "annotations": {INITIAL_EVENTS_END: "true"}}});
                    object["rows"] = json!([{"cells": [], "object": respond::partial(&only)}]);
                }
            }
        }
        line(out, "BOOKMARK", object);
    }

    fn error(&self, error: &ApiError) -> Vec<u8> {
        let mut out = Vec::new();
        let status = serde_json::to_value(error.status()).unwrap_or_default();
        line(&mut out, "ERROR", status);
        out
    }
}

fn line(out: &mut Vec<u8>, type_: &str, object: Value) {
    let text = json!({"type": type_, "object": object}).to_string();
    out.extend_from_slice(text.as_bytes());
    out.push(b'\n');
}
