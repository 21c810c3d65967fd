//! When a container that ended is started again.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, PodSpec};
use mesh_model::containers::is_sidecar;

use super::container::spec_hash;
use super::memory::Memory;
use super::observed::Instance;

/// The first wait.
const FIRST: Duration = Duration::from_secs(10);
/// The longest wait.
const LONGEST: Duration = Duration::from_secs(300);
/// A container that ran this long is healthy: its next end is a first one.
const HEALTHY: Duration = Duration::from_secs(600);

/// `spec.restartPolicy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Policy {
    Always,
    OnFailure,
    Never,
}

impl Policy {
    /// The policy of a pod's ordinary containers.
    pub(crate) fn of(spec: &PodSpec) -> Self {
        match spec.restart_policy.as_deref() {
            Some("Never") => Self::Never,
            Some("OnFailure") => Self::OnFailure,
            _ => Self::Always,
        }
    }

    /// The policy of its init containers: to succeed once is enough.
    pub(crate) fn of_init(spec: &PodSpec) -> Self {
        match Self::of(spec) {
            Self::Never => Self::Never,
            _ => Self::OnFailure,
        }
    }

    /// All containers of a pod with their policies, init containers first.
    pub(crate) fn of_all(spec: &PodSpec) -> impl Iterator<Item = (&Container, Self)> {
        let init = spec.init_containers.iter().flatten();
        let init =
            init.map(|c| (c, if is_sidecar(c) { Self::Always } else { Self::of_init(spec) }));
        init.chain(spec.containers.iter().map(|c| (c, Self::of(spec))))
    }

    /// Whether a container that ended with this code runs again.
    pub(crate) fn restarts(self, code: i32) -> bool {
        match self {
            Self::Always => true,
            Self::OnFailure => code != 0,
            Self::Never => false,
        }
    }
}

/// What becomes of a container that ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It stays as it is.
    Final,
    /// It is started again, not before this time, after a wait of so many seconds.
    Restart { at: Timestamp, delay: Duration },
}

/// The fate of the newest run of a container. It must have ended; one whose state is unknown counts as failed. `wanted` is the container
/// as it is to be now: what it was before may have failed for reasons that it no longer has, and makes nobody wait.
pub(crate) fn fate(run: &Instance, policy: Policy, wanted: &Container, memory: &Memory) -> Fate {
    let Some(exit) = run.exit() else {
        return Fate::Restart { at: run.created_at, delay: Duration::ZERO };
    };
    if !memory.is_followed(run, policy) {
        return Fate::Final;
    }
    if run.hash != spec_hash(wanted) {
        return Fate::Restart { at: exit.finished_at, delay: Duration::ZERO };
    }
    let delay = next_delay(Duration::from_secs(run.delay_secs), run.attempt, exit.ran());
    Fate::Restart { at: after(exit.finished_at, delay), delay }
}

/// The wait after a run: none after the first, then 10 s, doubled each time up to 5 minutes.
pub(crate) fn next_delay(previous: Duration, attempt: u32, ran: Duration) -> Duration {
    if ran >= HEALTHY || attempt == 0 {
        Duration::ZERO
    } else if previous.is_zero() {
        FIRST
    } else {
        (previous * 2).min(LONGEST)
    }
}

/// The wait after so many failures in a row of something that is tried again, such as fetching an image.
pub(crate) fn retry_delay(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(5);
    (FIRST * 2u32.pow(doublings)).min(LONGEST)
}

/// `time` + `wait`, at the end of time at the latest.
pub(crate) fn after(time: Timestamp, wait: Duration) -> Timestamp {
    let wait = SignedDuration::try_from(wait).unwrap_or(SignedDuration::MAX);
    time.saturating_add(wait).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pods::observed::Exit;

    #[test]
    fn waits_double_up_to_five_minutes_and_start_over() {
        let short = Duration::from_secs(1);
        let mut delay = Duration::ZERO;
        let mut seen = Vec::new();
        for attempt in 0..9 {
            delay = next_delay(delay, attempt, short);
            seen.push(delay.as_secs());
        }
        assert_eq!(seen, [0, 10, 20, 40, 80, 160, 300, 300, 300]);
        assert_eq!(next_delay(delay, 9, HEALTHY), Duration::ZERO);
        assert_eq!(next_delay(Duration::ZERO, 10, short), FIRST);
    }

    #[test]
    fn what_could_not_be_started_has_not_run_since_1970() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let ran = |started_at| Exit {
            started_at,
            finished_at: now,
            code: 128,
            reason: "StartError".to_owned(),
            message: String::new(),
        };
        assert_eq!(ran(Timestamp::UNIX_EPOCH).ran(), Duration::ZERO);
        assert_eq!(next_delay(Duration::ZERO, 1, ran(Timestamp::UNIX_EPOCH).ran()), FIRST);
        assert_eq!(ran(after(now, Duration::ZERO)).ran(), Duration::ZERO);
        assert!(ran(now.checked_sub(SignedDuration::from_hours(1)).unwrap()).ran() >= HEALTHY);
    }

    #[test]
    fn retries_double_up_to_five_minutes() {
        let seen: Vec<u64> = (0..8).map(|n| retry_delay(n).as_secs()).collect();
        assert_eq!(seen, [10, 10, 20, 40, 80, 160, 300, 300]);
    }

    proptest! {
        #[test]
        fn a_wait_is_never_longer_than_five_minutes(
            previous in 0u64..100_000, attempt in any::<u32>(), ran in any::<u32>(), failures in any::<u32>()
        ) {
            let ran = Duration::from_secs(ran.into());
            prop_assert!(next_delay(Duration::from_secs(previous), attempt, ran) <= LONGEST);
            prop_assert!(retry_delay(failures) <= LONGEST);
        }

        #[test]
        fn policies_agree_with_their_names(code in any::<i32>()) {
            prop_assert!(Policy::Always.restarts(code));
            prop_assert!(!Policy::Never.restarts(code));
            prop_assert_eq!(Policy::OnFailure.restarts(code), code != 0);
        }
    }
}
