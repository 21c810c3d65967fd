//! Changes as typed events.

use std::collections::VecDeque;
use std::sync::Arc;

use futures_util::{Stream, StreamExt as _, stream};

use super::Object;
use super::codec::{decode, decode_at};
use crate::store::{Change, Watch};

/// What happened to an object.
#[derive(Debug, Clone, PartialEq)]
pub enum Event<K> {
    /// It is new.
    Added(K),
    /// It is as it is now.
    Modified(K),
    /// It is gone; this is what it was last, with the revision of its deletion.
    Deleted(K),
    /// The revision is no longer known, or the watcher fell behind: list again. Nothing follows.
    Gone,
}

struct State {
    watch: Watch,
    queue: VecDeque<Arc<Change>>,
    done: bool,
}

pub(super) fn typed<K: Object>(watch: Watch) -> impl Stream<Item = Event<K>> + Send + Unpin {
    let state = State { watch, queue: VecDeque::new(), done: false };
    stream::unfold(state, async |mut state| {
        loop {
            if state.done {
                return None;
            }
            while let Some(change) = state.queue.pop_front() {
                if let Some(event) = event(&change) {
                    return Some((event, state));
                }
            }
            match state.watch.changes().await {
                Ok(changes) => state.queue.extend(changes),
                Err(_) => {
                    state.done = true;
                    return Some((Event::Gone, state));
                }
            }
        }
    })
    .boxed()
}

fn event<K: Object>(change: &Change) -> Option<Event<K>> {
    let event = match (&change.record, &change.previous) {
        (Some(record), None) => decode(record).map(Event::Added),
        (Some(record), Some(_)) => decode(record).map(Event::Modified),
        (None, Some(previous)) => decode_at(previous, change.revision).map(Event::Deleted),
        (None, None) => return None,
    };
    event.inspect_err(|error| tracing::error!(%error, "left out of a watch")).ok()
}
