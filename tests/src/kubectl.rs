//! kubectl against a cluster.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::command::{output, output_with_input, wait_until};

/// A kubectl binary and the kubeconfig to use with it.
#[derive(Debug, Clone)]
pub struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
}

impl Kubectl {
    /// Uses `program` with `kubeconfig`.
    pub fn new(program: PathBuf, kubeconfig: PathBuf) -> Self {
        Self { program, kubeconfig }
    }

    /// A command without arguments yet. Its discovery cache lies beside the kubeconfig.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        let cache = self.kubeconfig.with_file_name("kubectl-cache");
        command.arg("--kubeconfig").arg(&self.kubeconfig).arg("--cache-dir").arg(cache);
        command
    }

    /// Runs it and returns what it prints.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        output(self.command().args(args))
    }

    /// `apply -f -` with `manifest`.
    pub fn apply(&self, manifest: &str) -> Result<String> {
        output_with_input(self.command().args(["apply", "-f", "-"]), manifest.as_bytes())
    }

    /// `get ARGS -o json`.
    pub fn json(&self, args: &[&str]) -> Result<Value> {
        let mut get = self.command();
        let text = output(get.args(["get", "--request-timeout=20s", "-o", "json"]).args(args))?;
        serde_json::from_str(&text).context("understand kubectl's JSON")
    }

    /// Pods with these labels (`app=hello`) in the default namespace.
    pub fn pods(&self, selector: &str) -> Result<Vec<Value>> {
        let list = self.json(&["pods", "-l", selector])?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    /// Waits until exactly `count` pods with these labels exist, all ready.
    pub fn wait_ready(&self, selector: &str, count: usize, limit: Duration) -> Result<Vec<Value>> {
        wait_until(&format!("{count} ready pods with {selector}"), limit, || {
            let mut pods = self.pods(selector)?;
            // One that was evicted stays in the list, beside the one in its place.
            pods.retain(|pod| !has_ended(pod) || pod["metadata"]["deletionTimestamp"].is_string());
            let ready = pods.iter().filter(|p| is_ready(p)).count();
            if pods.len() == count && ready == count {
                return Ok(pods);
            }
            let states: Vec<String> = pods.iter().map(describe).collect();
            bail!("{ready} of {} are ready: {}", pods.len(), states.join("; "))
        })
    }
}

/// Whether a Pod's Ready condition is true.
pub fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    conditions.is_some_and(|c| c.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"))
        && pod["metadata"]["deletionTimestamp"].is_null()
}

fn has_ended(pod: &Value) -> bool {
    ["Failed", "Succeeded"].map(Value::from).contains(&pod["status"]["phase"])
}

/// One line about a pod, for messages.
fn describe(pod: &Value) -> String {
    let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
    format!(
        "{} on {} {} {} {}",
        pod["metadata"]["name"].as_str().unwrap_or("?"),
        pod["spec"]["nodeName"].as_str().unwrap_or("no node"),
        pod["status"]["phase"].as_str().unwrap_or("no phase"),
        waiting["reason"].as_str().unwrap_or_default(),
        waiting["message"].as_str().unwrap_or_default(),
    )
}
