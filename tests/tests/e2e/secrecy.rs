//! Nothing between nodes is readable, now or later: not while programs die, and not by who records it for a day when
//! the nodes' own keys are no secret any more.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::Node;
use mesh_tests::capture::{Capture, contains};
use mesh_tests::command::{output, wait_until};
use mesh_tests::load::{Load, Report};
use nix::sys::signal::{Signal, kill};

use crate::tests;
use crate::world::{PATIENCE, World};

tests![
    preshared_keys_change_under_load,
    a_node_cut_off_keeps_its_peers,
    nothing_is_readable_while_programs_die,
];

/// Time for two rotations, on a busy machine.
const TWO_ROTATIONS: Duration = Duration::from_secs(60);

/// The epoch of the keys that a node has.
fn epoch(node: &Node) -> Result<u64> {
    let file = node.layout().agent_state().join("preshared.json");
    let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    let saved: serde_json::Value = serde_json::from_str(&text)?;
    saved["epoch"].as_u64().context("no epoch")
}

/// Waits until the node has got keys twice.
fn wait_two_rotations(node: &Node) -> Result<()> {
    for _ in 0..2 {
        let before = epoch(node)?;
        wait_until("keys are replaced", TWO_ROTATIONS / 2, || {
            ensure!(epoch(node)? > before, "epoch {before} still");
            Ok(())
        })?;
    }
    Ok(())
}

/// What `meshctl peers` says of the pre-shared keys of all pairs.
fn key_states(world: &World) -> Result<Vec<String>> {
    let mut meshctl = std::process::Command::new(&world.artifacts.meshctl);
    meshctl.args(["peers", "-o", "json"]).env("KUBECONFIG", world.cluster.kubeconfig());
    let nodes: serde_json::Value = serde_json::from_str(&output(&mut meshctl)?)?;
    let peers = nodes.as_array().into_iter().flatten().flat_map(|n| n["peers"].as_array());
    let state = |p: &serde_json::Value| p["presharedKey"].as_str().unwrap_or("?").to_owned();
    Ok(peers.flatten().map(state).collect())
}

fn wait_agreed(world: &World) -> Result<()> {
    let pairs = world.cluster.nodes().len() * (world.cluster.nodes().len() - 1);
    // A glance may fall between two epochs.
    wait_until("all pairs use their newest keys", PATIENCE, || {
        let states = key_states(world)?;
        let agreed = states.iter().filter(|state| *state == "agreed").count();
        ensure!(states.len() == pairs && agreed == pairs, "{states:?}");
        Ok(())
    })
}

fn across_nodes(world: &World) -> Result<(Load, Load, Node, Node)> {
    let (a, b) = world.two_pods()?;
    let steady = ["--secs", "300", "--rate", "50", "--workers", "2"];
    let http = world.pod_load(&a, &format!("http://{}:8080/", b.v4()?), &steady)?;
    let stream = world.pod_load(&a, &format!("stream://{}:9000", b.v4()?), &steady)?;
    Ok((http, stream, a.node, b.node))
}

fn finish(what: &str, load: Load) -> Result<Report> {
    let report = load.stop()?;
    println!("  {what:<8} {}", report.line());
    report.none_failed().with_context(|| what.to_owned())?;
    Ok(report)
}

fn preshared_keys_change_under_load(world: &World) -> Result<()> {
    wait_agreed(world)?;
    let (http, stream, ..) = across_nodes(world)?;
    for node in world.cluster.nodes() {
        wait_two_rotations(&node)?;
    }
    wait_agreed(world)?;
    finish("http", http)?;
    finish("stream", stream).map(drop)
}

/// No way from a node to the control service.
struct CutOff {
    node: Node,
    control: String,
}

impl CutOff {
    fn new(world: &World, node: &Node) -> Result<Self> {
        let control = format!("{}/32", world.cluster.subnet().control().0);
        node.exec(&["ip", "route", "add", "blackhole", &control])?;
        Ok(Self { node: node.clone(), control })
    }
}

impl Drop for CutOff {
    fn drop(&mut self) {
        // The test has failed already, or the cluster goes.
        let _ = self.node.exec(&["ip", "route", "del", "blackhole", &self.control]);
    }
}

/// One node gets new keys, the other does not; then a new session is needed.
fn a_node_cut_off_keeps_its_peers(world: &World) -> Result<()> {
    wait_agreed(world)?;
    let (http, stream, here, there) = across_nodes(world)?;
    let cut = CutOff::new(world, &there)?;
    let before = epoch(&there)?;
    wait_two_rotations(&here)?;
    ensure!(epoch(&there)? == before, "{} is not cut off", there.name());
    if let Some(worker) = here.worker("overlay") {
        kill(worker, Signal::SIGKILL).context("kill -9")?;
    }
    thread::sleep(Duration::from_secs(3));
    finish("http", http)?;
    finish("stream", stream)?;
    drop(cut);
    wait_agreed(world)
}

fn nothing_is_readable_while_programs_die(world: &World) -> Result<()> {
    const CANARY: &str = "canary-51c09be7a2d84f36";
    const PLAIN: &str = "control-51c09be7a2d84f36";
    let folder = world.scratch("secrecy")?;
    let (a, b) = world.two_pods()?;
    let ports = world.cluster.nodes().iter().map(|n| n.layout().port.clone()).collect::<Vec<_>>();
    let captures: Result<Vec<Capture>> =
        ports.iter().map(|port| Capture::start(port, &folder)).collect();
    let steady = ["--secs", "120", "--rate", "100", "--workers", "4"];
    let loads =
        [format!("http://{}:8080/{CANARY}", b.v4()?), format!("udp://{}:9001/{CANARY}", b.v4()?)];
    let loads: Result<Vec<Load>> =
        loads.iter().map(|url| world.pod_load(&a, url, &steady)).collect();
    thread::sleep(Duration::from_millis(500));
    for node in [&a.node, &b.node] {
        for (_, worker) in node.workers() {
            kill(worker, Signal::SIGKILL).context("kill -9")?;
        }
        node.agent().kill()?;
        thread::sleep(Duration::from_millis(500));
        world.cluster.restart_agent(node, &world.artifacts)?;
    }
    thread::sleep(Duration::from_secs(2));
    for load in loads? {
        ensure!(load.stop()?.ok > 0, "nothing was sent");
    }
    // What is sent in the clear from node to node must be seen, or the captures prove nothing.
    let hello = world.artifacts.hello.display().to_string();
    for node in world.cluster.nodes() {
        let plain = format!("udp://{}:9/{PLAIN}", world.cluster.subnet().control().0);
        let _ = node.exec(&[&hello, "get", &plain]);
    }
    thread::sleep(Duration::from_millis(300));
    for (capture, port) in captures?.into_iter().zip(ports) {
        let seen = capture.finish()?;
        ensure!(
            contains(&seen, PLAIN.as_bytes()),
            "the capture of {port} does not see the underlay"
        );
        ensure!(!contains(&seen, CANARY.as_bytes()), "a payload is readable on {port}");
    }
    // What is killed together takes a moment to be whole again.
    wait_agreed(world)
}
