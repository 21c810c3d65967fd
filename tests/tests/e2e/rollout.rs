//! Replicas come and go, and versions change, while requests go on.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::load::{Load, Report};
use mesh_tests::pod::Pod;
use nix::sys::signal::Signal;

use crate::tests;
use crate::world::{PATIENCE, REPLICAS, WEB, World, workload};

tests![
    scaling_under_load,
    rolling_update_under_load,
    rolling_update_under_heavy_load,
    deleted_pod_waits_for_all_nodes_that_answer,
];

/// A pod of its own to send from: the workload's pods go away in these tests.
fn client(world: &World) -> Result<Pod> {
    world.clean(&["pod/client"])?;
    world.kubectl.apply(
        "
apiVersion: v1
kind: Pod
metadata: {name: client, labels: {app: client}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: client, image: mesh.local/hello:1, args: [pause]}
",
    )?;
    let pods = world.kubectl.wait_ready("app=client", 1, PATIENCE)?;
    Pod::from_json(&world.cluster, &pods[0])
}

/// New connections to the service and to the ingress, and kept ones through the ingress, so many requests a second each.
fn loads(world: &World, client: &Pod, rates: [&str; 3]) -> Result<[(&'static str, Load); 3]> {
    let (vip, _) = world.vips()?;
    let url = format!("http://{vip}/");
    let settings = |rate| ["--secs", "240", "--workers", "8", "--rate", rate];
    let node = world.cluster.node(1);
    let kept = [&settings(rates[2])[..], &["--keep"]].concat();
    Ok([
        ("new connections to the service", world.pod_load(client, &url, &settings(rates[0]))?),
        ("new connections to the ingress", world.ingress_load(&node, &settings(rates[1]))?),
        ("kept connections to the ingress", world.ingress_load(&node, &kept)?),
    ])
}

const LIGHT: [&str; 3] = ["100", "100", "100"];
/// Two thousand in all; few enough new ones for the ports of one client.
const HEAVY: [&str; 3] = ["600", "200", "1200"];

fn finish(loads: [(&'static str, Load); 3]) -> Result<Vec<Report>> {
    let mut reports = Vec::new();
    for (what, load) in loads {
        let report = load.stop()?;
        println!("  {what}: {}", report.line());
        reports.push(report);
    }
    reports.iter().try_for_each(Report::none_failed)?;
    Ok(reports)
}

fn scaling_under_load(world: &World) -> Result<()> {
    let client = client(world)?;
    let scale = |n: usize| -> Result<()> {
        world.kubectl.run(&["scale", "deployment/web", &format!("--replicas={n}")])?;
        world.kubectl.wait_ready(WEB, n, PATIENCE).map(drop)
    };
    scale(1)?;
    let loads = loads(world, &client, LIGHT)?;
    scale(5)?;
    std::thread::sleep(std::time::Duration::from_secs(2));
    scale(2)?;
    let reports = finish(loads)?;
    ensure!(reports[0].hosts.len() == 5, "answered by {:?}", reports[0].hosts);
    scale(REPLICAS)?;
    world.clean(&["pod/client"])
}

fn rolling_update_under_load(world: &World) -> Result<()> {
    rolling_update(world, LIGHT)
}

/// Without a preStop hook: each node confirms that it has taken a pod out of its tables before that is told to end.
fn rolling_update_under_heavy_load(world: &World) -> Result<()> {
    rolling_update(world, HEAVY)
}

/// How long a pod waits for other nodes at most (half of its grace period would be longer).
const LONGEST_DRAIN: Duration = Duration::from_secs(5);

/// Faster than the bound, because all nodes confirm; and one whose agent hangs does not answer, which costs a second.
fn deleted_pod_waits_for_all_nodes_that_answer(world: &World) -> Result<()> {
    let pod = world.pods()?.remove(0);
    let took = delete(world, &pod)?;
    println!("  all nodes confirm: gone after {} ms", took.as_millis());
    ensure!(took < LONGEST_DRAIN, "gone after {took:?}: nobody has confirmed");
    world.kubectl.wait_ready(WEB, REPLICAS, PATIENCE)?;
    let pod = world.pods()?.remove(0);
    let mut others = world.cluster.nodes().into_iter().filter(|n| n.name() != pod.node.name());
    let hung = others.next_back().context("there are other nodes")?.agent();
    hung.signal(Signal::SIGSTOP)?;
    let took = delete(world, &pod);
    hung.signal(Signal::SIGCONT)?;
    let took = took?;
    println!("  one agent hangs: gone after {} ms", took.as_millis());
    let silent = Duration::from_secs(1);
    ensure!(silent < took && took < LONGEST_DRAIN, "gone after {took:?}");
    world.kubectl.wait_ready(WEB, REPLICAS, PATIENCE).map(drop)
}

/// Deletes a pod of the workload and waits until the API has forgotten it; another one takes its place.
fn delete(world: &World, pod: &Pod) -> Result<Duration> {
    let start = Instant::now();
    world.kubectl.run(&["delete", "pod", &pod.name, "--wait=true"])?;
    Ok(start.elapsed())
}

fn rolling_update(world: &World, rates: [&str; 3]) -> Result<()> {
    let client = client(world)?;
    let loads = loads(world, &client, rates)?;
    world.kubectl.apply(&workload(REPLICAS, 2))?;
    world.kubectl.run(&["rollout", "status", "deployment/web", "--timeout=90s"])?;
    world.kubectl.wait_ready(WEB, REPLICAS, PATIENCE)?;
    let reports = finish(loads)?;
    for version in ["1", "2"] {
        ensure!(reports[0].versions.contains_key(version), "{:?}", reports[0].versions);
    }
    for pod in world.pods()? {
        let answer = client.get(&format!("http://{}:8080/", pod.v4()?))?;
        ensure!(answer.contains("\"version\":\"2\""), "{answer}");
    }
    world.kubectl.apply(&workload(REPLICAS, 1))?;
    world.kubectl.run(&["rollout", "status", "deployment/web", "--timeout=90s"])?;
    world.kubectl.wait_ready(WEB, REPLICAS, PATIENCE)?;
    world.clean(&["pod/client"])
}
