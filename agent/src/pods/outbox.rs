//! Reports on their way to the API. They are kept and tried again while the API is away; of each pod only the newest
//! status is kept, and of events the newest thousand.
//!
//! Statuses and events do not wait for each other: traffic waits for a pod that is ready, and only people read events. Nor does a
//! pod's status wait for those of others, but for its turn.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
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

/// Where reports are put. Clones share one queue.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outbox(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    reports: Mutex<BTreeMap<PodRef, Report>>,
    reported: Notify,
    events: Mutex<VecDeque<PodEvent>>,
    happened: Notify,
}

/// Entries are replaced whole: a panic elsewhere leaves a queue usable.
fn lock<T>(queue: &Mutex<T>) -> MutexGuard<'_, T> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Outbox {
    /// The pod's status from now on.
    pub(crate) fn status(&self, pod: &PodRef, status: PodStatus) {
        lock(&self.0.reports).entry(pod.clone()).or_default().status = Some(status);
        self.0.reported.notify_one();
    }

    /// Nothing of the pod is left on this node.
    pub(crate) fn deleted(&self, pod: &PodRef) {
        lock(&self.0.reports).entry(pod.clone()).or_default().deleted = true;
        self.0.reported.notify_one();
    }

    /// Something happened.
    pub(crate) fn event(&self, event: PodEvent) {
        let mut events = lock(&self.0.events);
        if events.len() >= EVENTS {
            events.pop_front();
        }
        events.push_back(event);
        drop(events);
        self.0.happened.notify_one();
    }

    /// Sends what is put in, until it is cancelled.
    pub(crate) async fn deliver(self, reporter: Arc<dyn StatusReporter>) {
        tokio::join!(self.deliver_reports(&*reporter), self.deliver_events(&*reporter));
    }

    async fn deliver_reports(&self, reporter: &dyn StatusReporter) {
        let mut under_way = FuturesUnordered::new();
        let mut busy = BTreeSet::new();
        let mut patience = Patience::default();
        loop {
            while !patience.is_out() && under_way.len() < PARALLEL {
                let Some((pod, mut report)) = self.next_report(&busy) else { break };
                busy.insert(pod.clone());
                under_way.push(async move {
                    let sent = send_one(&pod, &mut report, reporter).await;
                    (pod, report, sent)
                });
            }
            tokio::select! {
                Some((pod, report, sent)) = under_way.next() => {
                    busy.remove(&pod);
                    if !sent {
                        self.put_back(pod, report);
                    }
                    patience.after(sent);
                }
                () = self.0.reported.notified(), if !patience.is_out() => {}
                () = patience.recover(), if patience.is_out() => {}
            }
        }
    }

    /// A report of a pod of which none is under way.
    fn next_report(&self, busy: &BTreeSet<PodRef>) -> Option<(PodRef, Report)> {
        let mut reports = lock(&self.0.reports);
        let next = reports.keys().find(|pod| !busy.contains(*pod))?.clone();
        reports.remove_entry(&next)
    }

    /// What did not arrive goes back, behind what is newer.
    fn put_back(&self, pod: PodRef, old: Report) {
        let mut reports = lock(&self.0.reports);
        let entry = reports.entry(pod).or_default();
        entry.status = entry.status.take().or(old.status);
        entry.deleted |= old.deleted;
    }

    fn put_event_back(&self, event: PodEvent) {
        let mut events = lock(&self.0.events);
        if events.len() < EVENTS {
            events.push_front(event);
        }
    }

    /// In order: "Created" is read before "Started".
    async fn deliver_events(&self, reporter: &dyn StatusReporter) {
        let mut patience = Patience::default();
        loop {
            let next = lock(&self.0.events).pop_front();
            let Some(event) = next else {
                self.0.happened.notified().await;
                continue;
            };
            match limited(reporter.event(&event)).await {
                Err(ReportError::Unavailable(_)) => {
                    self.put_event_back(event);
                    patience.after(false);
                    patience.recover().await;
                    continue;
                }
                Err(error) => {
                    tracing::warn!(pod = %event.pod, reason = event.reason, %error, "event not recorded");
                }
                Ok(()) => {}
            }
            patience.after(true);
        }
    }
}

/// When to try again after a failure: later after each.
#[derive(Debug)]
struct Patience {
    next: Duration,
    until: Option<tokio::time::Instant>,
}

impl Default for Patience {
    fn default() -> Self {
        Self { next: FIRST_RETRY, until: None }
    }
}

impl Patience {
    fn is_out(&self) -> bool {
        self.until.is_some()
    }

    fn after(&mut self, sent: bool) {
        if sent {
            *self = Self { until: self.until, ..Self::default() };
        } else if self.until.is_none() {
            self.until = Some(tokio::time::Instant::now() + self.next);
            self.next = (self.next * 2).min(LAST_RETRY);
        }
    }

    /// Waits until it is time to try again.
    async fn recover(&mut self) {
        if let Some(until) = self.until {
            tokio::time::sleep_until(until).await;
            self.until = None;
        }
    }
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
        let mut seen = reporter.seen.lock().unwrap().clone();
        seen.retain(|what| what != "Started");
        assert_eq!(seen, ["p Running", "p deleted"]);
        assert_eq!(reporter.seen.lock().unwrap().len(), 3, "the event, too, once");
        task.abort();
    }

    /// Takes no event ever.
    #[derive(Default)]
    struct Deaf(Flaky);

    #[async_trait]
    impl StatusReporter for Deaf {
        async fn status(&self, pod: &PodRef, status: &PodStatus) -> Result<(), ReportError> {
            self.0.status(pod, status).await
        }
        async fn event(&self, _: &PodEvent) -> Result<(), ReportError> {
            std::future::pending().await
        }
        async fn deleted(&self, pod: &PodRef) -> Result<(), ReportError> {
            self.0.deleted(pod).await
        }
        async fn mirror(&self, _: &k8s_openapi::api::core::v1::Pod) -> Result<(), ReportError> {
            Ok(())
        }
        async fn token(&self, wanted: &TokenWanted) -> Result<Token, ReportError> {
            self.0.token(wanted).await
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_status_does_not_wait_for_events() {
        let reporter = Arc::new(Deaf::default());
        let outbox = Outbox::default();
        let task = tokio::spawn(outbox.clone().deliver(reporter.clone()));
        for reason in ["Created", "Started"] {
            outbox.event(PodEvent {
                pod: pod(),
                field: String::new(),
                warning: false,
                reason,
                message: String::new(),
            });
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        outbox
            .status(&pod(), PodStatus { phase: Some("Running".to_owned()), ..Default::default() });
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert_eq!(*reporter.0.seen.lock().unwrap(), ["p Running"]);
        task.abort();
    }
}
