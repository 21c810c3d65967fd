//! Figures of the local cluster, and of tunnels, services and interfaces without one. What is compared is measured in turns, and the median is printed:
//! on a small machine only the ratios of one run mean something.

mod cni;
mod lb;
mod overlay;
mod start;

use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use mesh_tests::command::output;
use mesh_tests::load::Load;
use mesh_tests::pod::Pod;
use mesh_tests::process::resident_kib;
use mesh_tests::{Artifacts, Cluster};
use nix::unistd::Pid;
use serde_json::Value;

use crate::{BenchArgs, local, say, tools};
pub(crate) use lb::LbArgs;

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// Our engine beside other tunnels, between two nodes of its own; needs no cluster
    Overlay,
    /// The same over a link that carries packets of its MTU only, as a cable does; only when named
    OverlayWire,
    /// Two pods of the cluster through the tunnel, to two nodes without it
    Pods,
    /// Services by our programs, nftables, iptables and haproxy; node ports; events and policies on and off; needs no cluster
    Lb,
    /// ADD and DEL of the plugin, as containerd sees them, beside the reference plugins; needs no cluster
    Cni,
    /// Pods from their manifest to being ready, on the first node, beside `ctr run` of the same image
    Start,
    /// Resident memory of each program
    Memory,
    /// From a changed object to the maps of one node, with thousands of services and policies; needs no cluster
    Scale,
}

/// Measures and prints one line per figure; those of the tunnels also go to a file.
pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    let (parts, secs, out) = (&args.what, args.secs, args.out.as_deref());
    let wants = |part| parts.is_empty() || parts.contains(&part);
    let rounds = args.rounds.unwrap_or(3).clamp(1, 20);
    if wants(Part::Overlay) {
        overlay::run(overlay::Link::Passing, rounds, secs, out)?;
    }
    if parts.contains(&Part::OverlayWire) {
        overlay::run(overlay::Link::Cutting, rounds, secs, out)?;
    }
    if wants(Part::Cni) {
        cni::measure(rounds, args.against.as_deref())?;
    }
    if wants(Part::Lb) {
        lb::run(args.rounds, &args.lb)?;
    }
    if parts.contains(&Part::Scale) {
        scale(secs)?;
    }
    let alone = |part: &Part| !matches!(part, Part::Pods | Part::Start | Part::Memory);
    if !parts.is_empty() && parts.iter().all(alone) {
        return Ok(());
    }
    let cluster = local::running()?;
    if wants(Part::Pods) {
        pods(&cluster, rounds, secs)?;
    }
    if wants(Part::Start) {
        start::measure(&cluster, rounds)?;
    }
    if wants(Part::Memory) {
        memory(&cluster);
    }
    Ok(())
}

/// The agent's own measurement: it feeds its caches by hand, so that neither network nor control service is part of the figures.
fn scale(secs: u64) -> Result<()> {
    let status = Command::new("cargo")
        .args(["test", "--release", "-p", "mesh-agent", "--lib", "--"])
        .args(["observe::scale::figures", "observe::scale::policies::figures"])
        .arg("observe::scale::pushes::figures")
        .args(["--exact", "--ignored", "--nocapture", "--test-threads", "1"])
        .env("MESH_SCALE_SECS", secs.to_string())
        .status()
        .context("run cargo")?;
    ensure!(status.success(), "the measurement failed: {status}");
    Ok(())
}

fn figure(name: &str, values: &mut [f64], unit: &str, reference: Option<f64>) -> f64 {
    let middle = median(values);
    let ratio = reference.map(|r| format!("  {:.2} x", middle / r)).unwrap_or_default();
    println!("{name:<52} {middle:>10.2} {unit}{ratio}");
    middle
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

/// Two of the example's pods, on two nodes.
fn two_pods(cluster: &Cluster) -> Result<(Pod, Pod)> {
    let kubectl = cluster.kubectl(&Artifacts::locate(false));
    let pods: Result<Vec<Pod>> =
        kubectl.pods("app=hello")?.iter().map(|p| Pod::from_json(cluster, p)).collect();
    let pods = pods?;
    let first = pods.first().context("the example is not applied: run `cargo xtask up`")?.clone();
    let other = pods.iter().find(|p| p.node.name() != first.node.name());
    Ok((first, other.context("the example's pods are all on one node")?.clone()))
}

fn pods(cluster: &Cluster, rounds: usize, secs: u64) -> Result<()> {
    tools::apt_install(&["iperf3"])?;
    let (a, b) = two_pods(cluster)?;
    let (pod, node) = (b.v4()?.to_owned(), b.node.addresses().0.to_string());
    let _servers = [
        Server::start(b.network_command(&["iperf3", "-s", "-p", "5999"])?)?,
        Server::start(b.node.command(["iperf3", "-s", "-p", "5998"]))?,
    ];
    thread::sleep(Duration::from_millis(500));
    for streams in ["1", "8"] {
        let (mut plain, mut tunnel) = (Vec::new(), Vec::new());
        for round in 1..=rounds {
            say::step(&format!("TCP, {streams} streams, round {round}"));
            let time = secs.to_string();
            let flags = ["-P", streams, "-t", &time, "-J"];
            let call = |to: &str, port: &str| {
                let mut words: Vec<String> =
                    ["iperf3", "-c", to, "-p", port].map(str::to_owned).to_vec();
                words.extend(flags.map(str::to_owned));
                words
            };
            plain.push(gigabits(&mut a.node.command(call(&node, "5998")))?);
            let words = call(&pod, "5999");
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            tunnel.push(gigabits(&mut a.network_command(&words)?)?);
        }
        let reference = figure(
            &format!("TCP {streams} streams, node to node, plain"),
            &mut plain,
            "Gbit/s",
            None,
        );
        let name = format!("TCP {streams} streams, pod to pod, through the tunnel");
        figure(&name, &mut tunnel, "Gbit/s", Some(reference));
    }
    round_trips(&a, &b, rounds, secs)
}

/// One line there and back over a TCP connection, to the server in the pod and to the same one on its node.
fn round_trips(a: &Pod, b: &Pod, rounds: usize, secs: u64) -> Result<()> {
    let hello = Artifacts::locate(false).hello.display().to_string();
    let serve = [hello.as_str(), "serve", "--http", "0", "--udp", "0", "--tcp", "5997"];
    let _server = Server::start(b.node.command(serve))?;
    thread::sleep(Duration::from_millis(300));
    let time = secs.to_string();
    let settings = ["--secs", &time, "--workers", "1", "--rate", "1000000"];
    let (mut plain, mut tunnel) = (Vec::new(), Vec::new());
    for round in 1..=rounds {
        say::step(&format!("round-trip times, round {round}"));
        for (url, from_pod, times) in [
            (format!("stream://{}:5997", b.node.addresses().0), false, &mut plain),
            (format!("stream://{}:9000", b.v4()?), true, &mut tunnel),
        ] {
            let mut words = vec![hello.as_str(), "load", &url];
            words.extend(settings);
            let command = if from_pod { a.network_command(&words)? } else { a.node.command(words) };
            let report = Load::start(command)?.wait()?;
            #[allow(clippy::cast_precision_loss, reason = "microseconds of a short run")]
            times.push(report.p50_us as f64);
        }
    }
    let reference = figure("round trip, node to node, plain, p50", &mut plain, "us", None);
    figure("round trip, pod to pod, through the tunnel, p50", &mut tunnel, "us", Some(reference));
    Ok(())
}

fn gigabits(command: &mut Command) -> Result<f64> {
    let report: Value = serde_json::from_str(&output(command)?).context("understand iperf3")?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.context("iperf3 reports no rate")? / 1e9)
}

fn memory(cluster: &Cluster) {
    let show = |place: &str, program: &str, pid: Option<Pid>| {
        let Some(kib) = pid.and_then(resident_kib) else { return };
        #[allow(clippy::cast_precision_loss, reason = "shown with two digits")]
        figure(&format!("memory, {place} {program}"), &mut [kib as f64 / 1024.0], "MiB", None);
    };
    show("root", "mesh-control", cluster.control().pid());
    for node in cluster.nodes() {
        show(node.name(), "agent", node.agent().pid());
        for (name, pid) in node.workers() {
            show(node.name(), &name, Some(pid));
        }
    }
}

/// A program that runs as long as this lives.
struct Server(std::process::Child);

impl Server {
    fn start(mut command: Command) -> Result<Self> {
        let null = std::process::Stdio::null;
        let child = command.stdin(null()).stdout(null()).spawn().context("start a server")?;
        Ok(Self(child))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail when it has ended before, which is fine.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert!((median(&mut [3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!((median(&mut [4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < f64::EPSILON);
        assert!(median(&mut []).is_nan());
    }
}
