//! Load in the background, and its report.

use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;

use crate::command::show;

/// What `mesh-hello load` prints.
#[derive(Debug, Clone, Deserialize)]
pub struct Report {
    /// Requests.
    pub sent: u64,
    /// Answers that were right.
    pub ok: u64,
    /// The rest.
    pub failed: u64,
    /// The rest, by kind.
    pub errors: BTreeMap<String, u64>,
    /// When the first ones came, and what they were.
    pub first_errors: Vec<String>,
    /// Longest time without a right answer.
    pub max_gap_ms: u64,
    /// Median latency.
    pub p50_us: u64,
    /// 99th percentile of the latency.
    pub p99_us: u64,
    /// How long it ran.
    pub secs: f64,
    /// Answers by backend.
    pub hosts: BTreeMap<String, u64>,
    /// Answers by the backend's version.
    pub versions: BTreeMap<String, u64>,
}

impl Report {
    /// Fails when a request failed.
    pub fn none_failed(&self) -> Result<()> {
        self.at_most_failed(0)
    }

    /// Fails when more than `limit` requests failed, or none was answered.
    pub fn at_most_failed(&self, limit: u64) -> Result<()> {
        if self.failed > limit || self.ok == 0 {
            bail!("{}; first: {:?}", self.line(), self.first_errors);
        }
        Ok(())
    }

    /// One line for people.
    pub fn line(&self) -> String {
        format!(
            "{} of {} failed {:?}, longest gap {} ms, p50 {} us, p99 {} us",
            self.failed, self.sent, self.errors, self.max_gap_ms, self.p50_us, self.p99_us
        )
    }
}

/// A load that runs.
#[derive(Debug)]
pub struct Load {
    child: Child,
    shown: String,
}

impl Load {
    /// Starts a command that runs `mesh-hello load`.
    pub fn start(mut command: Command) -> Result<Self> {
        let shown = show(&command);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .with_context(|| format!("start {shown}"))?;
        Ok(Self { child, shown })
    }

    /// Ends it now and returns its report.
    pub fn stop(self) -> Result<Report> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM)
            .with_context(|| format!("end {}", self.shown))?;
        self.wait()
    }

    /// Waits until its time is over and returns its report.
    pub fn wait(mut self) -> Result<Report> {
        let stdout = self.child.stdout.take().context("a piped standard output exists")?;
        let text = std::io::read_to_string(stdout).context("read the load's report")?;
        let status = self.child.wait().context("wait for the load")?;
        if !status.success() {
            bail!("{}: {status}: {text}", self.shown);
        }
        serde_json::from_str(&text).with_context(|| format!("understand the report {text:?}"))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // Both fail when it has ended before, which is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
