//! The plugin as a runtime sees it: a process started with a request, until it has ended with the answer.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use mesh_tests::command::{output_with_input, run};
use mesh_tests::containerd::{cni_bin, cni_conf};
use mesh_tests::{Cluster, Node};
use serde_json::Value;

use crate::say;

const TIMES: usize = 100;

/// Adds and removes pods' network interfaces one after the other.
pub(super) fn measure(cluster: &Cluster) -> Result<()> {
    let node = cluster.node(1);
    let config = configuration(&node)?;
    say::step(&format!("{TIMES} times ADD and DEL"));
    let (mut adds, mut deletes) = (Vec::new(), Vec::new());
    for number in 0..TIMES {
        let netns = format!("mesh-bench-{}-{number}", std::process::id());
        run("ip", &["netns", "add", &netns])?;
        let both = add_and_delete(&node, &config, &netns);
        run("ip", &["netns", "del", &netns])?;
        let (add, delete) = both?;
        adds.push(add);
        deletes.push(delete);
    }
    for (what, mut times) in [("ADD", adds), ("DEL", deletes)] {
        times.sort();
        for (name, at) in [("p50", times.len() / 2), ("p99", times.len() * 99 / 100)] {
            let ms = times[at.min(times.len() - 1)].as_secs_f64() * 1000.0;
            println!("{:<52} {ms:>10.2} ms", format!("CNI {what}, serial, {name}"));
        }
    }
    Ok(())
}

/// What containerd gives to the plugin: its entry of the list, with the list's name and version.
fn configuration(node: &Node) -> Result<String> {
    let folder = cni_conf(node.layout());
    let entries = std::fs::read_dir(&folder).context("list the CNI configuration")?;
    let file = entries
        .flatten()
        .map(|e| e.path())
        .find(|p| p.extension().is_some_and(|x| x == "conflist"));
    let file = file.with_context(|| format!("no list in {}", folder.display()))?;
    let list: Value = serde_json::from_str(&std::fs::read_to_string(file)?)?;
    let mut plugin = list["plugins"][0].clone();
    plugin["name"] = list["name"].clone();
    plugin["cniVersion"] = list["cniVersion"].clone();
    Ok(plugin.to_string())
}

fn add_and_delete(node: &Node, config: &str, netns: &str) -> Result<(Duration, Duration)> {
    let add = call(node, config, netns, "ADD")?;
    let delete = call(node, config, netns, "DEL")?;
    Ok((add, delete))
}

fn call(node: &Node, config: &str, netns: &str, verb: &str) -> Result<Duration> {
    let mut command = Command::new(cni_bin(node.layout()).join("mesh-cni"));
    command
        .env("CNI_COMMAND", verb)
        .env("CNI_CONTAINERID", netns)
        .env("CNI_NETNS", format!("/run/netns/{netns}"))
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", cni_bin(node.layout()));
    let start = Instant::now();
    output_with_input(&mut command, config.as_bytes())?;
    Ok(start.elapsed())
}
