//! What the node and its pods use, for `kubectl top`.
//!
//! Nothing is measured unless somebody asks. CPU use is the mean since the last answer when that was a moment ago, and
//! of one second otherwise.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use jiff::Timestamp;
use mesh_cri::{CallError, Client, v1};
use mesh_model::report::{PodUsage, Usage, UsageReport};
use tokio::sync::Mutex;

use super::observed::{LABEL_CONTAINER, PodRef, owned};

/// A shorter time says nothing about CPU use.
const SHORTEST: Duration = Duration::from_secs(1);
/// What was used longer ago is of no interest.
const LONGEST: Duration = Duration::from_secs(60);
/// `USER_HZ`, the unit of /proc/stat: part of Linux's ABI, the same on all architectures that we run on.
const TICKS_PER_SECOND: u64 = 100;

/// The route of the report.
pub(super) fn router(meter: Meter) -> Router {
    Router::new().route("/mesh/v1/usage", get(report)).with_state(meter)
}

async fn report(State(meter): State<Meter>) -> Result<Json<UsageReport>, Response> {
    let failed =
        |error: MeterError| (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response();
    meter.measure().await.map(Json).map_err(failed)
}

/// Something could not be measured.
#[derive(Debug, thiserror::Error)]
pub(super) enum MeterError {
    #[error("containers: {0}")]
    Runtime(#[from] CallError),
    #[error("read what the node uses: {0}")]
    Node(#[from] std::io::Error),
}

/// Measures. Clones share what was measured last.
#[derive(Clone)]
pub(super) struct Meter(Arc<(Client, Mutex<Option<Sample>>)>);

impl Meter {
    pub(super) fn new(client: Client) -> Self {
        Self(Arc::new((client, Mutex::default())))
    }

    async fn measure(&self) -> Result<UsageReport, MeterError> {
        let (client, last) = &*self.0;
        // Those who ask at the same time wait here, and then share the sample before.
        let mut last = last.lock().await;
        let useful = |sample: &Sample| sample.at.elapsed() < LONGEST;
        let before = match last.take().filter(useful) {
            Some(sample) => sample,
            None => sample(client).await?,
        };
        tokio::time::sleep(SHORTEST.saturating_sub(before.at.elapsed())).await;
        let now = sample(client).await?;
        let report = between(&before, &now);
        *last = Some(now);
        Ok(report)
    }
}

/// What had been used at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sample {
    at: Instant,
    time: Timestamp,
    /// Nanoseconds of CPU since the start, and memory now.
    node: Usage,
    containers: BTreeMap<String, Used>,
}

/// The same of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Used {
    pod: PodRef,
    name: String,
    usage: Usage,
}

async fn sample(client: &Client) -> Result<Sample, MeterError> {
    let stats = client.container_stats(owned()).await?;
    let read = |path: &str| std::fs::read_to_string(Path::new("/proc").join(path));
    let node = Usage {
        cpu_nano_cores: busy_nanos(&read("stat")?),
        memory_bytes: used_memory(&read("meminfo")?),
    };
    let containers = stats.into_iter().filter_map(used).collect();
    Ok(Sample { at: Instant::now(), time: Timestamp::now(), node, containers })
}

/// A container that has ended has no numbers.
fn used(stats: v1::ContainerStats) -> Option<(String, Used)> {
    let attributes = stats.attributes?;
    let usage = Usage {
        cpu_nano_cores: stats.cpu?.usage_core_nano_seconds?.value,
        memory_bytes: stats.memory?.working_set_bytes?.value,
    };
    let pod = PodRef::from_labels(&attributes.labels)?;
    let name = attributes.labels.get(LABEL_CONTAINER)?.clone();
    Some((attributes.id, Used { pod, name, usage }))
}

fn between(before: &Sample, now: &Sample) -> UsageReport {
    let window = now.at.saturating_duration_since(before.at);
    let rate = |before: u64, now: u64| {
        let nanos = u128::from(now.saturating_sub(before)) * 1_000_000_000;
        u64::try_from(nanos / window.as_nanos().max(1)).unwrap_or(u64::MAX)
    };
    let usage = |before: u64, now: Usage| Usage {
        cpu_nano_cores: rate(before, now.cpu_nano_cores),
        memory_bytes: now.memory_bytes,
    };
    let mut pods: BTreeMap<&PodRef, BTreeMap<String, Usage>> = BTreeMap::new();
    for (id, container) in &now.containers {
        // One that was not there before has used all that it has used since then.
        let earlier = before.containers.get(id).map_or(0, |used| used.usage.cpu_nano_cores);
        let usage = usage(earlier, container.usage);
        pods.entry(&container.pod).or_default().insert(container.name.clone(), usage);
    }
    let pod = |(pod, containers): (&PodRef, _)| PodUsage {
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        containers,
    };
    UsageReport {
        timestamp: Timestamp::from_second(now.time.as_second()).unwrap_or(now.time).to_string(),
        window_ms: u64::try_from(window.as_millis()).unwrap_or(u64::MAX),
        node: usage(before.node.cpu_nano_cores, now.node),
        pods: pods.into_iter().map(pod).collect(),
    }
}

/// CPU time of all cores that was not idle, from /proc/stat (proc(5)).
fn busy_nanos(stat: &str) -> u64 {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "));
    let fields: Vec<u64> =
        line.unwrap_or_default().split_whitespace().filter_map(|f| f.parse().ok()).collect();
    // user, nice, system, idle, iowait, irq, softirq, steal; guests are part of user and nice.
    let busy = fields.iter().take(8).enumerate().filter(|(i, _)| !matches!(i, 3 | 4));
    let busy: u64 = busy.map(|(_, ticks)| ticks).sum();
    busy.saturating_mul(1_000_000_000 / TICKS_PER_SECOND)
}

/// Memory that could not be given to others, from /proc/meminfo.
fn used_memory(meminfo: &str) -> u64 {
    let field = |name: &str| {
        let rest = meminfo.lines().find_map(|line| line.strip_prefix(name));
        rest.and_then(|r| r.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
    };
    field("MemTotal:").saturating_sub(field("MemAvailable:")).saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(cpu_nano_cores: u64, memory_bytes: u64) -> Usage {
        Usage { cpu_nano_cores, memory_bytes }
    }

    fn sample(at: Instant, node: u64, containers: &[(&str, u64)]) -> Sample {
        let pod = PodRef { namespace: "d".into(), name: "p".into(), uid: "u".into() };
        let used = |cpu| Used { pod: pod.clone(), name: "c".into(), usage: usage(cpu, 7) };
        let containers = containers.iter().map(|(id, cpu)| ((*id).to_owned(), used(*cpu)));
        let time = Timestamp::from_second(1_800_000_000).unwrap();
        Sample { at, time, node: usage(node, 9), containers: containers.collect() }
    }

    #[test]
    fn use_is_what_was_added_per_time() {
        let start = Instant::now();
        let second = Duration::from_secs(2);
        let before = sample(start, 1_000_000_000, &[("a", 5_000_000_000)]);
        let now = sample(start + second, 4_000_000_000, &[("a", 6_000_000_000)]);
        let report = between(&before, &now);
        assert_eq!((report.window_ms, report.node), (2000, usage(1_500_000_000, 9)));
        assert_eq!(report.timestamp, "2027-01-15T08:00:00Z");
        assert_eq!(report.pods[0].containers["c"], usage(500_000_000, 7));
        let restarted = sample(start + second, 0, &[("b", 1_000_000)]);
        assert_eq!(between(&before, &restarted).pods[0].containers["c"], usage(500_000, 7));
        assert_eq!(between(&before, &restarted).node.cpu_nano_cores, 0, "no clock goes back");
    }

    #[test]
    fn the_kernels_files_are_understood() {
        let stat = "cpu  10 1 4 1000 50 2 3 1 99 99\ncpu0 1 1 1 1 1 1 1 1 1 1\n";
        assert_eq!(busy_nanos(stat), 21 * 10_000_000);
        assert_eq!(used_memory("MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable: 40 kB\n"), 61_440);
        assert_eq!((busy_nanos(""), used_memory("")), (0, 0));
    }
}
