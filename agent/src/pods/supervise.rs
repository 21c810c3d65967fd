//! Keeps one worker for each pod that is wanted or that the runtime has something of.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mesh_model::snapshot::PodWork;
use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, JoinError, JoinSet};

use super::observe::survey;
use super::observed::PodRef;
use super::ops::Context;
use super::statics::is_static;
use super::volumes;
use super::worker::{Wanted, Worker};

/// How often the runtime is asked for what changed. containerd 1.6 has no events over CRI.
const SURVEY: Duration = Duration::from_secs(1);

/// All wanted pods.
pub(crate) type Desired = BTreeMap<PodRef, Arc<PodWork>>;

/// What there is to be.
#[derive(Debug, Clone, Default)]
pub(crate) struct Goal {
    pub(crate) pods: Desired,
    /// These are all: what else runs has to go.
    pub(crate) complete: bool,
}

/// The new set, with the old entries of pods that did not change: their workers see no difference.
pub(crate) fn merge(before: Option<Desired>, pods: Vec<Arc<PodWork>>) -> Desired {
    let mut before = before.unwrap_or_default();
    let mut all = Desired::new();
    for work in pods {
        let Some(pod) = PodRef::of(&work.pod) else { continue };
        let same = before.remove(&pod).filter(|old| Arc::ptr_eq(old, &work) || **old == *work);
        all.insert(pod, same.unwrap_or(work));
    }
    all
}

struct Handle {
    wanted: watch::Sender<Wanted>,
    changed: Arc<Notify>,
    task: AbortHandle,
    /// Only the node's own files decide whether it runs.
    is_static: bool,
}

impl Handle {
    fn is_leaving(&self) -> bool {
        matches!(*self.wanted.borrow(), Wanted::Gone)
    }
}

/// Runs until it is cancelled; workers end with it.
pub(crate) async fn run(context: Arc<Context>, mut desired: watch::Receiver<Option<Goal>>) {
    if desired.wait_for(Option::is_some).await.is_err() {
        return;
    }
    let mut supervisor = Supervisor {
        context,
        workers: BTreeMap::new(),
        tasks: JoinSet::new(),
        seen: BTreeMap::new(),
        is_surveyed: false,
        swept: false,
    };
    let mut ticks = tokio::time::interval(SURVEY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut reachable = true;
    loop {
        tokio::select! {
            changed = desired.changed() => if changed.is_err() { return },
            // Its place may be wanted.
            Some(ended) = supervisor.tasks.join_next() => log_panic(ended),
            _ = ticks.tick() => match survey(&supervisor.context.client).await {
                Ok(seen) => {
                    reachable = true;
                    supervisor.surveyed(seen);
                }
                Err(error) => {
                    if std::mem::replace(&mut reachable, false) {
                        tracing::warn!(%error, "the container runtime does not answer, will retry");
                    }
                    continue;
                }
            },
        }
        let goal = desired.borrow_and_update().clone().unwrap_or_default();
        supervisor.reconcile(&goal);
        if goal.complete && supervisor.sweep_is_due() {
            supervisor.sweep(&goal.pods).await;
        }
    }
}

struct Supervisor {
    context: Arc<Context>,
    workers: BTreeMap<PodRef, Handle>,
    tasks: JoinSet<()>,
    seen: BTreeMap<PodRef, Vec<(String, i32)>>,
    is_surveyed: bool,
    /// Directories of pods that nobody knows have been deleted.
    swept: bool,
}

impl Supervisor {
    /// Wakes the workers of pods that changed.
    fn surveyed(&mut self, seen: BTreeMap<PodRef, Vec<(String, i32)>>) {
        for (pod, handle) in &self.workers {
            if seen.get(pod) != self.seen.get(pod) {
                handle.changed.notify_one();
            }
        }
        self.seen = seen;
        self.is_surveyed = true;
    }

    fn reconcile(&mut self, goal: &Goal) {
        while let Some(ended) = self.tasks.try_join_next() {
            log_panic(ended);
        }
        let finished = self.workers.extract_if(.., |_, handle| handle.task.is_finished());
        for (pod, _) in finished {
            // A worker ends when nothing is left. Where that is not so the next survey tells.
            self.seen.remove(&pod);
        }
        // First those that have to go: whether a place is free depends on them.
        for pod in self.unwanted(goal) {
            self.want(&pod, Wanted::Gone);
        }
        for (pod, work) in &goal.pods {
            if !is_static(&work.pod) || self.has_place(pod, &goal.pods) {
                self.want(pod, Wanted::Known(Arc::clone(work)));
            }
        }
    }

    /// What is there and has to go. Before everything that is wanted is known, that is only what the node's own files made run.
    fn unwanted(&self, goal: &Goal) -> Vec<PodRef> {
        let gone = |pod: &&PodRef| !goal.pods.contains_key(*pod);
        let known = self.workers.iter().filter(|(_, handle)| goal.complete || handle.is_static);
        let seen = self.seen.keys().filter(|_| goal.complete);
        known.map(|(pod, _)| pod).chain(seen).filter(gone).cloned().collect()
    }

    /// Whether a static pod may run: not beside an earlier version of itself, and, when its file came back, not before what the
    /// missing file ended is over.
    fn has_place(&self, pod: &PodRef, desired: &Desired) -> bool {
        let is_earlier = |other: &PodRef| {
            let same_name = (&other.namespace, &other.name) == (&pod.namespace, &pod.name);
            same_name && other.uid != pod.uid && !desired.contains_key(other)
        };
        if let Some(handle) = self.workers.get(pod) {
            return !handle.is_leaving();
        }
        self.is_surveyed && !self.workers.keys().chain(self.seen.keys()).any(is_earlier)
    }

    fn want(&mut self, pod: &PodRef, wanted: Wanted) {
        let is_static = matches!(&wanted, Wanted::Known(work) if is_static(&work.pod));
        if let Some(handle) = self.workers.get_mut(pod) {
            handle.is_static |= is_static;
            handle.wanted.send_if_modified(|now| {
                let changed = !same(now, &wanted);
                if changed {
                    *now = wanted;
                }
                changed
            });
            return;
        }
        let (sender, receiver) = watch::channel(wanted);
        let changed = Arc::new(Notify::new());
        let worker =
            Worker::new(Arc::clone(&self.context), pod.clone(), receiver, Arc::clone(&changed));
        let task = self.tasks.spawn(worker.run());
        self.workers.insert(pod.clone(), Handle { wanted: sender, changed, task, is_static });
    }

    fn sweep_is_due(&mut self) -> bool {
        // Before the first survey, a directory may belong to containers that are not known yet.
        self.is_surveyed && !std::mem::replace(&mut self.swept, true)
    }

    /// Deletes directories and control groups of pods that are neither wanted nor running: left by an agent that was killed in the middle.
    async fn sweep(&self, desired: &Desired) {
        let known: Vec<&str> =
            desired.keys().chain(self.workers.keys()).map(|pod| pod.uid.as_str()).collect();
        self.context.oom.sweep(&known);
        let orphans = self.context.layout.left_overs(&known);
        if orphans.is_empty() {
            return;
        }
        let swept = tokio::task::spawn_blocking(move || {
            for path in orphans {
                if let Err(error) = volumes::clean(&path) {
                    let path = path.display();
                    tracing::warn!(%path, %error, "left-over directory of a pod not deleted");
                }
            }
        });
        let _ = swept.await;
    }
}

fn log_panic(ended: Result<(), JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a pod's worker panicked, it is started again");
    }
}

fn same(a: &Wanted, b: &Wanted) -> bool {
    match (a, b) {
        (Wanted::Known(a), Wanted::Known(b)) => Arc::ptr_eq(a, b),
        (Wanted::Gone, Wanted::Gone) => true,
        _ => false,
    }
}
