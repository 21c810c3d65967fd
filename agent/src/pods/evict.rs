//! Pods that the node cannot keep: it runs out of something, or they take more than they may.
//!
//! One at a time, until there is enough again: first those that use more than they requested, of these the least
//! important, of these the one that is furthest above. Before a pod has to go because of a disk, unused images do.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Container, Pod};
use mesh_cri::v1;
use mesh_model::containers::lasting;
use tokio::sync::watch;

use super::images::Images;
use super::observed::{LABEL_CONTAINER, PodRef, owned};
use super::ops::Context;
use super::pressure::{History, Pressures, Readings, Resource, short_of};
use super::quantity;
use super::report::PodEvent;
use super::statics::is_static;
use super::supervise::{Desired, Goal};

mod limits;
mod measure;

use measure::Measured;

/// How often the node is looked at.
const PERIOD: Duration = Duration::from_secs(10);
/// How often the disk of images is looked at when it is not full.
const IMAGES: Duration = Duration::from_secs(300);
/// Pods of this priority and above keep the node itself at work.
const CRITICAL: i32 = 2_000_000_000;

/// Why pods, by uid, cannot stay.
pub(crate) type Evictions = BTreeMap<String, String>;

/// Looks after the node until it is cancelled.
pub(crate) async fn run(
    context: Arc<Context>,
    goal: watch::Receiver<Option<Goal>>,
    pressures: watch::Sender<Pressures>,
) {
    let mut evictor =
        Evictor { context, images: Images::default(), history: History::default(), looked: None };
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let pods = goal.borrow().as_ref().map(|goal| goal.pods.clone()).unwrap_or_default();
        evictor.round(&pods, &pressures).await;
    }
}

struct Evictor {
    context: Arc<Context>,
    images: Images,
    history: History,
    /// When images were looked at.
    looked: Option<Instant>,
}

impl Evictor {
    async fn round(&mut self, pods: &Desired, told: &watch::Sender<Pressures>) {
        let short = self.measure().await;
        let now = self.history.note(&short, Instant::now());
        told.send_if_modified(|before| std::mem::replace(before, now) != now);
        self.forget(pods);
        let limited = limits::limited(pods);
        if short.is_empty() && !limited {
            return;
        }
        let Ok(stats) = self.context.client.container_stats(owned()).await else { return };
        let layout = self.context.layout.clone();
        let copy = pods.clone();
        // Sizes of directories are only needed where something depends on them.
        let disk = limited || short.contains(&Resource::Disk);
        let measured =
            tokio::task::spawn_blocking(move || measure::measure(&copy, &stats, &layout, disk));
        let Ok(measured) = measured.await else { return };
        for (pod, why) in limits::exceeded(pods, &measured) {
            self.evict(&pod, why);
        }
        // One that is on its way out has to be out first: it may be enough.
        let leaving = self.context.evictions.borrow().clone();
        if measured.iter().any(|(pod, _)| leaving.contains_key(&pod.uid)) {
            return;
        }
        if let Some(resource) = short.first()
            && let Some((pod, why)) = victim(pods, &measured, *resource)
        {
            self.evict(&pod, why);
        }
    }

    /// What the node is short of, after unused images have gone.
    async fn measure(&mut self) -> Vec<Resource> {
        if self.context.options.eviction.is_empty() {
            return Vec::new();
        }
        let points = self.context.client.image_file_systems().await.unwrap_or_default();
        let (state, thresholds) =
            (self.context.options.state_dir.clone(), self.context.options.eviction.clone());
        let read = || Readings::read(&state, points.first());
        let readings = read();
        let full = short_of(&thresholds, &readings).contains(&Resource::Disk);
        let due = self.looked.is_none_or(|at| at.elapsed() >= IMAGES);
        if !full && !due {
            return short_of(&thresholds, &readings);
        }
        self.looked = Some(Instant::now());
        let disk = readings.images.bytes;
        match self.images.collect(&self.context.client, disk, full).await {
            Ok(0) => short_of(&thresholds, &readings),
            Ok(_) => short_of(&thresholds, &read()),
            Err(error) => {
                tracing::warn!(%error, "unused images not deleted, will retry");
                short_of(&thresholds, &readings)
            }
        }
    }

    fn forget(&self, pods: &Desired) {
        self.context.evictions.send_if_modified(|evictions| {
            let before = evictions.len();
            evictions.retain(|uid, _| pods.keys().any(|pod| pod.uid == *uid));
            evictions.len() != before
        });
    }

    fn evict(&self, pod: &PodRef, why: String) {
        let news = self.context.evictions.send_if_modified(|evictions| {
            let news = !evictions.contains_key(&pod.uid);
            if news {
                evictions.insert(pod.uid.clone(), why.clone());
            }
            news
        });
        if news {
            tracing::warn!(%pod, why, "pod evicted");
            self.context.outbox.event(PodEvent {
                pod: pod.clone(),
                field: String::new(),
                warning: true,
                reason: "Evicted",
                message: why,
            });
        }
    }
}

fn priority(pod: &Pod) -> i32 {
    // What the node itself is told to run is part of the node.
    if is_static(pod) {
        return CRITICAL;
    }
    let spec = pod.spec.as_ref();
    let class = spec.and_then(|s| s.priority_class_name.as_deref()).unwrap_or_default();
    match class {
        "system-node-critical" | "system-cluster-critical" => CRITICAL,
        _ => spec.and_then(|s| s.priority).unwrap_or(0),
    }
}

/// Requests of all containers, sidecars included: what they use counts, too.
fn requested(pod: &Pod, resource: Resource) -> u64 {
    let amount = |container: &Container| {
        let requests = container.resources.as_ref()?.requests.as_ref()?;
        u64::try_from(quantity::bytes(requests.get(resource.name())?).ok()?).ok()
    };
    pod.spec.iter().flat_map(lasting).filter_map(amount).sum()
}

/// The pod that has to go, and why.
fn victim(
    pods: &Desired,
    measured: &[(PodRef, Measured)],
    resource: Resource,
) -> Option<(PodRef, String)> {
    let candidates = measured.iter().filter_map(|(pod, measured)| {
        let object = &pods.get(pod)?.pod;
        let priority = priority(object);
        let (used, requested) = (measured.of(resource), requested(object, resource));
        (priority < CRITICAL).then_some((pod, priority, used, requested))
    });
    let (pod, _, used, requested) = candidates.max_by_key(|(pod, priority, used, requested)| {
        let above = i128::from(*used) - i128::from(*requested);
        // For identifiers of processes nothing is requested: only importance counts.
        (above > 0, std::cmp::Reverse(*priority), above, std::cmp::Reverse(*pod))
    })?;
    let name = resource.name();
    let detail = match resource {
        Resource::Pids => String::new(),
        _ => format!(" The pod was using {}Ki, request is {}Ki.", used / 1024, requested / 1024),
    };
    Some((pod.clone(), format!("The node was low on resource: {name}.{detail}")))
}

#[cfg(test)]
mod tests;
