//! Reports on their way to the API. They are kept and tried again while the API is away; of each pod only the newest
//! status is kept, and of events the newest thousand.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::PodStatus;
use tokio::sync::Notify;

use super::observed::PodRef;
use super::report::{PodEvent, ReportError, StatusReporter};

const EVENTS: usize = 1000;
/// Reports that are under way at the same time.
const PARALLEL: usize = 8;
/// One report may take so long.
const LIMIT: Duration = Duration::from_secs(15);
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(15);

#[derive(Debug, Default)]
struct Report {
    status: Option<PodStatus>,
    deleted: bool,
}

#[derive(Debug, Default)]
struct Queue {
    reports: BTreeMap<PodRef, Report>,
    events: VecDeque<PodEvent>,
}

/// Where reports are put. Clones share one queue.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outbox(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    filled: Notify,
}

impl Outbox {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Entries are replaced whole: a panic elsewhere leaves the queue usable.
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pod's status from now on.
    pub(crate) fn status(&self, pod: &PodRef, status: PodStatus) {
        self.queue().reports.entry(pod.clone()).or_default().status = Some(status);
        self.0.filled.notify_one();
    }

    /// Nothing of the pod is left on this node.
    pub(crate) fn deleted(&self, pod: &PodRef) {
        self.queue().reports.entry(pod.clone()).or_default().deleted = true;
        self.0.filled.notify_one();
    }

    /// Something happened.
    pub(crate) fn event(&self, event: PodEvent) {
        let mut queue = self.queue();
        if queue.events.len() >= EVENTS {
            queue.events.pop_front();
        }
        queue.events.push_back(event);
        drop(queue);
        self.0.filled.notify_one();
    }

    /// Sends what is put in, until it is cancelled.
    pub(crate) async fn deliver(self, reporter: Arc<dyn StatusReporter>) {
        let mut retry = FIRST_RETRY;
        loop {
            let batch = std::mem::take(&mut *self.queue());
            if batch.reports.is_empty() && batch.events.is_empty() {
                self.0.filled.notified().await;
                continue;
            }
            let left = send(batch, reporter.as_ref()).await;
            if left.reports.is_empty() && left.events.is_empty() {
                retry = FIRST_RETRY;
                continue;
            }
            self.put_back(left);
            tokio::time::sleep(retry).await;
            retry = (retry * 2).min(LAST_RETRY);
        }
    }

    /// What did not arrive goes back, behind what is newer.
    fn put_back(&self, left: Queue) {
        let mut queue = self.queue();
        for (pod, old) in left.reports {
            let entry = queue.reports.entry(pod).or_default();
            entry.status = entry.status.take().or(old.status);
            entry.deleted |= old.deleted;
        }
        for event in left.events.into_iter().rev() {
            if queue.events.len() < EVENTS {
                queue.events.push_front(event);
            }
        }
    }
}

/// Sends a batch; what the API could not take now.
async fn send(batch: Queue, reporter: &dyn StatusReporter) -> Queue {
    let left = Mutex::new(Queue::default());
    let left_queue = || left.lock().unwrap_or_else(PoisonError::into_inner);
    let reports = futures_util::stream::iter(batch.reports);
    reports
        .for_each_concurrent(PARALLEL, async |(pod, mut report)| {
            if !send_one(&pod, &mut report, reporter).await {
                left_queue().reports.insert(pod, report);
            }
        })
        .await;
    // In order: "Created" is read before "Started".
    let mut events = batch.events;
    while let Some(event) = events.pop_front() {
        match limited(reporter.event(&event)).await {
            Err(ReportError::Unavailable(_)) => {
                events.push_front(event);
                left_queue().events = events;
                break;
            }
            Err(error) => {
                tracing::warn!(pod = %event.pod, reason = event.reason, %error, "event not recorded")
            }
            Ok(()) => {}
        }
    }
    left.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Whether nothing is left to be sent of a pod's report.
async fn send_one(pod: &PodRef, report: &mut Report, reporter: &dyn StatusReporter) -> bool {
    if let Some(status) = &report.status {
        match limited(reporter.status(pod, status)).await {
            Err(ReportError::Unavailable(error) | ReportError::Conflict(error)) => {
                tracing::debug!(%pod, error, "status not reported, will retry");
                return false;
            }
            Err(ReportError::Refused(error)) => {
                tracing::warn!(%pod, error, "the API refuses the pod's status");
            }
            Ok(()) | Err(ReportError::Gone) => {}
        }
        report.status = None;
    }
    if report.deleted {
        match limited(reporter.deleted(pod)).await {
            Err(ReportError::Unavailable(error) | ReportError::Conflict(error)) => {
                tracing::debug!(%pod, error, "deletion not confirmed, will retry");
                return false;
            }
            Err(ReportError::Refused(error)) => {
                tracing::warn!(%pod, error, "the API refuses to delete the pod");
            }
            Ok(()) | Err(ReportError::Gone) => {}
        }
    }
    true
}

async fn limited(call: impl Future<Output = Result<(), ReportError>>) -> Result<(), ReportError> {
    let late = |_| Err(ReportError::Unavailable(format!("no answer within {} s", LIMIT.as_secs())));
    tokio::time::timeout(LIMIT, call).await.unwrap_or_else(late)
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;

    use super::*;
    use crate::pods::tokens::{Token, TokenWanted};

    /// Is away for its first calls, then notes what arrives.
    #[derive(Default)]
    struct Flaky {
        away: Mutex<u32>,
        seen: Mutex<Vec<String>>,
    }

    impl Flaky {
        fn take(&self, what: String) -> Result<(), ReportError> {
            let mut away = self.away.lock().unwrap();
            if *away > 0 {
                *away -= 1;
                return Err(ReportError::Unavailable("away".to_owned()));
            }
            self.seen.lock().unwrap().push(what);
            Ok(())
        }
    }

    #[async_trait]
    impl StatusReporter for Flaky {
        async fn status(&self, pod: &PodRef, status: &PodStatus) -> Result<(), ReportError> {
            self.take(format!("{} {}", pod.name, status.phase.as_deref().unwrap_or_default()))
        }
        async fn event(&self, event: &PodEvent) -> Result<(), ReportError> {
            self.take(event.reason.to_owned())
        }
        async fn deleted(&self, pod: &PodRef) -> Result<(), ReportError> {
            self.take(format!("{} deleted", pod.name))
        }
        async fn mirror(&self, _: &k8s_openapi::api::core::v1::Pod) -> Result<(), ReportError> {
            self.take("mirror".to_owned())
        }
        async fn token(&self, _: &TokenWanted) -> Result<Token, ReportError> {
            Err(ReportError::Unavailable("no tokens here".to_owned()))
        }
    }

    fn pod() -> PodRef {
        PodRef { namespace: "d".to_owned(), name: "p".to_owned(), uid: "u".to_owned() }
    }

    #[tokio::test(start_paused = true)]
    async fn the_newest_status_arrives_when_the_api_is_back() {
        let reporter = Arc::new(Flaky::default());
        *reporter.away.lock().unwrap() = 6;
        let outbox = Outbox::default();
        let task = tokio::spawn(outbox.clone().deliver(reporter.clone()));
        let phase = |phase: &str| PodStatus { phase: Some(phase.to_owned()), ..Default::default() };
        outbox.status(&pod(), phase("Pending"));
        outbox.event(PodEvent {
            pod: pod(),
            field: String::new(),
            warning: false,
            reason: "Started",
            message: String::new(),
        });
        tokio::time::sleep(Duration::from_millis(1500)).await;
        outbox.status(&pod(), phase("Running"));
        outbox.deleted(&pod());
        tokio::time::sleep(Duration::from_secs(60)).await;
        let seen = reporter.seen.lock().unwrap().clone();
        assert_eq!(seen, ["p Running", "p deleted", "Started"]);
        task.abort();
    }
}
