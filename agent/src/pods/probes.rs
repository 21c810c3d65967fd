//! Probes: when a container is asked how it is, and what follows from the answers.
//!
//! [`Counter`] is the state of one probe, without clock or I/O. [`Probers`] runs the probes of one pod's containers and
//! sends each change of a verdict as a [`Finding`].

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Probe};
use mesh_cri::Client;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

pub(crate) mod action;
mod grpc;
mod http;
mod insecure;
mod redirect;

use action::{Action, Trouble};

/// How long after the first question a container that has not answered well yet is asked again; then after twice that, and so on.
const FIRST_LOOK: Duration = Duration::from_millis(20);

/// What a probe is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Until it passes, the others wait; when it fails, the container is restarted.
    Startup,
    /// Whether the pod gets traffic.
    Readiness,
    /// When it fails, the container is restarted.
    Liveness,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Startup, Self::Readiness, Self::Liveness];

    fn of(self, container: &Container) -> Option<&Probe> {
        match self {
            Self::Startup => container.startup_probe.as_ref(),
            Self::Readiness => container.readiness_probe.as_ref(),
            Self::Liveness => container.liveness_probe.as_ref(),
        }
    }

    /// As events and messages call it.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Readiness => "Readiness",
            Self::Liveness => "Liveness",
        }
    }
}

/// When to probe, and how many answers count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Timing {
    pub(crate) initial_delay: Duration,
    pub(crate) period: Duration,
    pub(crate) timeout: Duration,
    pub(crate) success_threshold: u32,
    pub(crate) failure_threshold: u32,
}

impl Timing {
    /// The timing of a probe, with the defaults of the API.
    pub(crate) fn of(probe: &Probe) -> Self {
        let number = |value: Option<i32>, default: u32, least: u32| {
            value.and_then(|v| u32::try_from(v).ok()).unwrap_or(default).max(least)
        };
        let seconds =
            |value, default, least| Duration::from_secs(number(value, default, least).into());
        Self {
            initial_delay: seconds(probe.initial_delay_seconds, 0, 0),
            period: seconds(probe.period_seconds, 10, 1),
            timeout: seconds(probe.timeout_seconds, 1, 1),
            success_threshold: number(probe.success_threshold, 1, 1),
            failure_threshold: number(probe.failure_threshold, 3, 1),
        }
    }
}

/// Counts answers until they make a verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Counter {
    timing: Timing,
    successes: u32,
    failures: u32,
    verdict: Option<bool>,
}

impl Counter {
    /// A probe with this verdict so far.
    pub(crate) fn new(timing: Timing, verdict: Option<bool>) -> Self {
        Self { timing, successes: 0, failures: 0, verdict }
    }

    /// Takes an answer; the verdict when it changed.
    pub(crate) fn record(&mut self, passed: bool) -> Option<bool> {
        let (count, threshold) = if passed {
            self.failures = 0;
            self.successes = self.successes.saturating_add(1);
            (self.successes, self.timing.success_threshold)
        } else {
            self.successes = 0;
            self.failures = self.failures.saturating_add(1);
            (self.failures, self.timing.failure_threshold)
        };
        if count < threshold || self.verdict == Some(passed) {
            return None;
        }
        self.verdict = Some(passed);
        Some(passed)
    }
}

/// What a probe has to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    /// The run of the container.
    pub(crate) run: String,
    /// The container's name.
    pub(crate) container: String,
    pub(crate) kind: Kind,
    /// The verdict, when it changed.
    pub(crate) verdict: Option<bool>,
    /// Why this answer was a failure.
    pub(crate) failure: Option<String>,
    /// What people should know although it was none.
    pub(crate) warning: Option<String>,
}

/// What a container says: that all is well, perhaps with a warning, or what is wrong.
type Answer = Result<Option<String>, String>;

/// A container to probe.
#[derive(Debug, Clone)]
pub(crate) struct Subject {
    pub(crate) run: String,
    pub(crate) container: Container,
    pub(crate) address: Option<IpAddr>,
    pub(crate) started_at: Timestamp,
    /// The startup probe has passed already, or there is none.
    pub(crate) started: bool,
    /// The verdict on readiness so far.
    pub(crate) ready: bool,
}

/// The probes of one pod. Dropping it ends them.
pub(crate) struct Probers {
    client: Client,
    findings: mpsc::Sender<Finding>,
    running: BTreeMap<String, Prober>,
}

struct Prober {
    started: watch::Sender<bool>,
    _readiness: JoinSet<()>,
    /// What may restart the container.
    health: JoinSet<()>,
}

impl Probers {
    pub(crate) fn new(client: Client, findings: mpsc::Sender<Finding>) -> Self {
        Self { client, findings, running: BTreeMap::new() }
    }

    /// Whether that run is being probed.
    pub(crate) fn knows(&self, run: &str) -> bool {
        self.running.contains_key(run)
    }

    /// Ends the probes of all runs but these.
    pub(crate) fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.running.retain(|run, _| keep(run));
    }

    /// Starts the probes of a run.
    pub(crate) fn start(&mut self, subject: Subject) {
        let (started, _) = watch::channel(subject.started);
        let (mut readiness, mut health) = (JoinSet::new(), JoinSet::new());
        for kind in Kind::ALL {
            let Some(probe) = kind.of(&subject.container) else { continue };
            if kind == Kind::Startup && subject.started {
                continue;
            }
            let prober = One {
                client: self.client.clone(),
                findings: self.findings.clone(),
                subject: subject.clone(),
                kind,
                timing: Timing::of(probe),
                action: Action::of_probe(probe, &subject.container, subject.address),
                started: started.subscribe(),
            };
            let tasks = if kind == Kind::Readiness { &mut readiness } else { &mut health };
            tasks.spawn(prober.run());
        }
        let prober = Prober { started, _readiness: readiness, health };
        self.running.insert(subject.run, prober);
    }

    /// The pod is being deleted: its containers are not restarted any more, and what they say while they end is no complaint. Only readiness
    /// is asked for still.
    pub(crate) fn leave(&mut self) {
        self.running.values_mut().for_each(|prober| prober.health.abort_all());
    }

    /// The startup probe of that run has passed: the others may begin.
    pub(crate) fn started(&self, run: &str) {
        if let Some(prober) = self.running.get(run) {
            prober.started.send_replace(true);
        }
    }
}

struct One {
    client: Client,
    findings: mpsc::Sender<Finding>,
    subject: Subject,
    kind: Kind,
    timing: Timing,
    action: Result<Action, String>,
    started: watch::Receiver<bool>,
}

impl One {
    async fn run(mut self) {
        if self.kind != Kind::Startup && self.started.wait_for(|started| *started).await.is_err() {
            return;
        }
        let age = Timestamp::now().duration_since(self.subject.started_at);
        let age = Duration::try_from(age).unwrap_or_default();
        tokio::time::sleep(self.timing.initial_delay.saturating_sub(age)).await;
        let verdict = match self.kind {
            Kind::Startup => None,
            Kind::Readiness => Some(self.subject.ready),
            Kind::Liveness => Some(true),
        };
        let mut counter = Counter::new(self.timing, verdict);
        // To start a command is too much work for that.
        let is_cheap = matches!(&self.action, Ok(action) if !matches!(action, Action::Exec(_)));
        let mut early = (is_cheap && verdict != Some(true)).then_some(FIRST_LOOK);
        let mut ticks = tokio::time::interval(self.timing.period);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut told = None;
        loop {
            let answer = self.next_answer(&mut ticks, &mut early).await;
            let verdict = counter.record(answer.is_ok());
            // Startup ends with its first verdict, liveness with a bad one: a new run is probed anew.
            let last = match self.kind {
                Kind::Startup => verdict.is_some(),
                Kind::Readiness => false,
                Kind::Liveness => verdict == Some(false),
            };
            let (warning, failure) = match answer {
                // The same in each period is no news.
                Ok(warning) => {
                    (warning.filter(|w| told.replace(w.clone()).as_ref() != Some(w)), None)
                }
                Err(why) => (None, Some(why)),
            };
            if verdict.is_some() || failure.is_some() || warning.is_some() {
                let finding = Finding {
                    run: self.subject.run.clone(),
                    container: self.subject.container.name.clone(),
                    kind: self.kind,
                    verdict,
                    failure,
                    warning,
                };
                if self.findings.send(finding).await.is_err() {
                    return;
                }
            }
            if last {
                return;
            }
        }
    }

    /// The answer of the next period. What has just been started seldom answers the first question well: it is asked again in between, less and less often, and then only a good answer counts. A period in which the container
    /// could not be asked says nothing about it.
    async fn next_answer(
        &self,
        ticks: &mut tokio::time::Interval,
        early: &mut Option<Duration>,
    ) -> Answer {
        loop {
            let Some(pause) = *early else {
                ticks.tick().await;
                let Some(answer) = self.ask().await else { continue };
                return answer;
            };
            let counts = tokio::select! {
                biased;
                _ = ticks.tick() => true,
                () = tokio::time::sleep(pause) => false,
            };
            let Some(answer) = self.ask().await else { continue };
            // After two periods at most everything is as it was asked for.
            *early = Some(2 * pause).filter(|next| answer.is_err() && *next < self.timing.period);
            if counts || answer.is_ok() {
                return answer;
            }
        }
    }

    /// The container's answer; none when the runtime, which would ask it, is away.
    async fn ask(&self) -> Option<Answer> {
        let action = match &self.action {
            Ok(action) => action,
            Err(why) => return Some(Err(why.clone())),
        };
        match action.run(&self.client, &self.subject.run, self.timing.timeout).await {
            Ok(warning) => Some(Ok(warning)),
            Err(Trouble::Failed(why)) => Some(Err(why)),
            Err(Trouble::NotAsked(why)) => {
                let (kind, run) = (self.kind, &self.subject.run);
                tracing::debug!(?kind, run, why, "container not probed, will retry");
                None
            }
        }
    }
}

#[cfg(test)]
mod tests;
