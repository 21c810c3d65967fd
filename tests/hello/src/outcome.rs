//! What a load saw, and how it is printed.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

/// Counts of one worker; workers' counts are added up in the end.
#[derive(Default)]
pub(crate) struct Outcome {
    sent: u64,
    ok: u64,
    errors: BTreeMap<String, u64>,
    hosts: BTreeMap<String, u64>,
    versions: BTreeMap<String, u64>,
    latencies_us: Vec<u64>,
    successes: Vec<Instant>,
    first_errors: Vec<(Instant, String)>,
}

const MAX_SAMPLES: usize = 4_000_000;
const MAX_ERRORS_SHOWN: usize = 5;

impl Outcome {
    /// Records an answer: `host` and `version` as the backend said them, empty when it said none.
    pub(crate) fn ok(&mut self, took: Duration, host: &str, version: &str) {
        self.sent += 1;
        self.ok += 1;
        if !host.is_empty() {
            *self.hosts.entry(host.to_owned()).or_default() += 1;
        }
        if !version.is_empty() {
            *self.versions.entry(version.to_owned()).or_default() += 1;
        }
        if self.successes.len() < MAX_SAMPLES {
            self.latencies_us.push(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
            self.successes.push(Instant::now());
        }
    }

    /// Records a failure by its kind.
    pub(crate) fn failed(&mut self, kind: &str, detail: String) {
        self.sent += 1;
        *self.errors.entry(kind.to_owned()).or_default() += 1;
        if self.first_errors.len() < MAX_ERRORS_SHOWN {
            self.first_errors.push((Instant::now(), detail));
        }
    }

    /// Adds another worker's counts.
    pub(crate) fn merge(&mut self, other: Self) {
        self.sent += other.sent;
        self.ok += other.ok;
        for (mine, theirs) in [
            (&mut self.errors, other.errors),
            (&mut self.hosts, other.hosts),
            (&mut self.versions, other.versions),
        ] {
            for (key, n) in theirs {
                *mine.entry(key).or_default() += n;
            }
        }
        self.latencies_us.extend(other.latencies_us);
        self.successes.extend(other.successes);
        self.first_errors.extend(other.first_errors);
    }

    /// The report, one line of JSON. `start` and `end` bound the load: a silence at its edges is a gap too.
    pub(crate) fn report(mut self, start: Instant, end: Instant) -> String {
        self.latencies_us.sort_unstable();
        self.successes.sort_unstable();
        self.first_errors.sort();
        let errors: Vec<String> = self
            .first_errors
            .iter()
            .take(MAX_ERRORS_SHOWN)
            .map(|(at, e)| quote(&format!("{} ms: {e}", at.duration_since(start).as_millis())))
            .collect();
        let mut out = String::from("{");
        let _ = write!(out, "\"sent\":{},\"ok\":{},", self.sent, self.ok);
        let _ = write!(out, "\"failed\":{},", self.sent - self.ok);
        let _ = write!(out, "\"errors\":{},", object(&self.errors));
        let _ = write!(out, "\"first_errors\":[{}],", errors.join(","));
        let _ = write!(out, "\"max_gap_ms\":{},", self.max_gap(start, end).as_millis());
        for (name, share) in [("p50_us", 50), ("p99_us", 99), ("max_us", 100)] {
            let _ = write!(out, "\"{name}\":{},", percentile(&self.latencies_us, share));
        }
        let _ = write!(out, "\"secs\":{:.3},", end.duration_since(start).as_secs_f64());
        let _ = write!(out, "\"hosts\":{},", object(&self.hosts));
        let _ = write!(out, "\"versions\":{}}}", object(&self.versions));
        out
    }

    fn max_gap(&self, start: Instant, end: Instant) -> Duration {
        let mut last = start;
        let mut widest = Duration::ZERO;
        for at in self.successes.iter().copied().chain([end]) {
            widest = widest.max(at.saturating_duration_since(last));
            last = at;
        }
        widest
    }
}

fn percentile(sorted: &[u64], share: usize) -> u64 {
    let at = (sorted.len() * share).div_ceil(100).saturating_sub(1);
    sorted.get(at).copied().unwrap_or(0)
}

fn object(map: &BTreeMap<String, u64>) -> String {
    let fields: Vec<String> = map.iter().map(|(k, v)| format!("{}:{v}", quote(k))).collect();
    format!("{{{}}}", fields.join(","))
}

/// A JSON string.
pub(crate) fn quote(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if u32::from(c) < 0x20 => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_counts_gaps_at_the_edges() {
        let start = Instant::now();
        let mut outcome = Outcome::default();
        outcome.ok(Duration::from_micros(10), "a", "1");
        outcome.failed("refused", "connect: \"refused\"".into());
        let text = outcome.report(start, Instant::now() + Duration::from_secs(3));
        assert!(text.starts_with("{\"sent\":2,\"ok\":1,\"failed\":1,\"errors\":{\"refused\":1},"));
        assert!(text.contains("\\\"refused\\\""), "{text}");
        let gap = text.split("\"max_gap_ms\":").nth(1).unwrap().split(',').next().unwrap();
        assert!(gap.parse::<u64>().unwrap() >= 2900, "{text}");
    }

    #[test]
    fn percentiles_of_few_samples() {
        assert_eq!(percentile(&[], 50), 0);
        assert_eq!(percentile(&[7], 99), 7);
        assert_eq!(percentile(&[1, 2, 3, 4], 50), 2);
        assert_eq!(percentile(&[1, 2, 3, 4], 100), 4);
    }
}
