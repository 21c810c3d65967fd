//! Which pods count as ready and available.
//!
//! A pod on a node that nobody hears from does not count, whatever its last report says: it leaves the
//! rotation as soon as the node is lost, and is back as soon as the node is, without a write to any pod.

use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;

use crate::objects;

/// Names of the nodes that nobody hears from.
pub(super) type LostNodes = BTreeSet<String>;

/// How far a pod got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Availability {
    /// Not ready, or lost.
    NotReady,
    /// Ready, and available from then on.
    ReadyUntil(Timestamp),
    /// Ready for long enough.
    Available,
}

impl Availability {
    pub(super) fn is_ready(self) -> bool {
        self != Self::NotReady
    }
}

/// Since when the pod can serve; `None` when it cannot.
pub(super) fn serving_since(pod: &Pod, lost: &LostNodes) -> Option<Timestamp> {
    if objects::node_of(pod).is_some_and(|node| lost.contains(node)) {
        return None;
    }
    objects::ready_since(pod)
}

/// How far the pod got at `now`, when it must be ready for `min_ready_secs` to count as available.
pub(super) fn of(pod: &Pod, lost: &LostNodes, min_ready_secs: i32, now: Timestamp) -> Availability {
    let Some(since) = serving_since(pod, lost) else {
        return Availability::NotReady;
    };
    let wait = Duration::from_secs(u64::try_from(min_ready_secs).unwrap_or(0));
    match since.checked_add(wait) {
        Ok(until) if until > now => Availability::ReadyUntil(until),
        _ => Availability::Available,
    }
}
