//! A running pod, as a place to run commands in.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::cluster::Cluster;
use crate::command::output;
use crate::containerd::{NAMESPACE, ctr};
use crate::containers::SHARED;
use crate::node::Node;

/// One pod.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// The node that runs it.
    pub node: Node,
    /// Its addresses, IPv4 first.
    pub ips: Vec<String>,
    container: String,
}

impl Pod {
    /// Reads what the API says about a pod that runs.
    pub fn from_json(cluster: &Cluster, pod: &Value) -> Result<Self> {
        let name = pod["metadata"]["name"].as_str().context("a pod has a name")?.to_owned();
        let node = pod["spec"]["nodeName"].as_str().context("the pod is not scheduled")?;
        let node = cluster.nodes().into_iter().find(|n| n.name() == node);
        let ips = pod["status"]["podIPs"].as_array().into_iter().flatten();
        let container = pod["status"]["containerStatuses"][0]["containerID"].as_str();
        let container = container.and_then(|id| id.strip_prefix("containerd://"));
        Ok(Self {
            node: node.context("the pod's node is not one of the cluster's")?,
            ips: ips.filter_map(|ip| ip["ip"].as_str().map(str::to_owned)).collect(),
            container: container.context("the pod's container has no id")?.to_owned(),
            name,
        })
    }

    /// A command in the pod's first container. Not by `ctr tasks exec`, which may end before it has passed on all output.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("runc");
        command.arg("--root").arg(Path::new(SHARED).join("runc").join(NAMESPACE));
        command.args(["exec", &self.container]).args(words);
        command
    }

    /// A program of this machine in the pod's network, with the services of its node.
    pub fn network_command(&self, words: &[&str]) -> Result<Command> {
        let list = output(ctr(self.node.layout()).args(["tasks", "list"]))?;
        let row = list.lines().find(|l| l.starts_with(&self.container));
        let pid =
            row.and_then(|l| l.split_whitespace().nth(1)).context("the container runs no task")?;
        let mut launch = self.node.launch(words.iter().copied());
        launch.netns = Some(format!("/proc/{pid}/ns/net").into());
        Ok(launch.command())
    }

    /// Runs a command in the pod and returns what it prints.
    pub fn exec(&self, words: &[&str]) -> Result<String> {
        output(&mut self.command(words)).with_context(|| format!("in pod {}", self.name))
    }

    /// `mesh-hello get URL` in the pod.
    pub fn get(&self, url: &str) -> Result<String> {
        self.exec(&["/bin/mesh-hello", "get", url])
    }

    /// The pod's IPv4 address.
    pub fn v4(&self) -> Result<&str> {
        let v4 = self.ips.iter().find(|ip| ip.contains('.'));
        v4.map(String::as_str).with_context(|| format!("{} has no IPv4 address", self.name))
    }

    /// The pod's IPv6 address.
    pub fn v6(&self) -> Result<&str> {
        let v6 = self.ips.iter().find(|ip| ip.contains(':'));
        v6.map(String::as_str).with_context(|| format!("{} has no IPv6 address", self.name))
    }
}
