//! Nothing between nodes is readable, now or later: not while programs die, and not by who records it for a day when
//! the nodes' own keys are no secret any more.

use std::fs;
use std::io::Read as _;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::Node;
use mesh_tests::capture::{Capture, contains};
use mesh_tests::command::{output, wait_until};
use mesh_tests::load::{Load, Report};
use nix::sys::signal::{Signal, kill};
use serde::Deserialize;

use crate::tests;
use crate::world::{PATIENCE, World};

tests![
    preshared_keys_change_under_load,
    a_node_cut_off_keeps_its_peers,
    node_keys_are_replaced_without_loss,
    nothing_is_readable_while_programs_die,
    encryption_is_proved,
    encryption_is_proved_while_tunnels_die,
    encryption_is_proved_while_a_node_joins,
    a_route_beside_the_tunnel_is_found,
    a_copy_beside_the_tunnel_is_found,
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
    let mut meshctl = Command::new(&world.artifacts.meshctl);
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

fn rotate_key(world: &World, node: &Node, wait: &str) -> Result<serde_json::Value> {
    let mut meshctl = Command::new(&world.artifacts.meshctl);
    meshctl.args(["node", "rotate-key", node.name(), "--wait", wait, "-o", "json"]);
    let answer = meshctl.env("KUBECONFIG", world.cluster.kubeconfig()).output()?;
    let text = String::from_utf8_lossy(&answer.stdout).into_owned();
    serde_json::from_str(&text).with_context(|| format!("{text}: {answer:?}"))
}

/// What a node's object says of its keys: the name, and those in use.
fn announced(world: &World, node: &Node) -> Result<(String, Option<String>)> {
    let object = world.kubectl.json(&["node", node.name()])?;
    let annotation = |name: &str| {
        object["metadata"]["annotations"][format!("mesh.dev/{name}")].as_str().map(str::to_owned)
    };
    let name = annotation("wireguard-public-key").context("a node has a key")?;
    Ok((name, annotation("wireguard-public-keys")))
}

/// Every node gets another key under load; then once more while one of the others cannot hear of it.
fn node_keys_are_replaced_without_loss(world: &World) -> Result<()> {
    wait_agreed(world)?;
    let (a, b) = world.two_pods()?;
    let udp = ["--secs", "300", "--rate", "100", "--workers", "2"];
    let udp = world.pod_load(&a, &format!("udp://{}:9001/x", b.v4()?), &udp)?;
    let (http, stream, here, there) = across_nodes(world)?;
    for node in world.cluster.nodes() {
        let (name, before) = announced(world, &node)?;
        let keys = rotate_key(world, &node, "60")?;
        ensure!(keys["replacing"] == false, "{keys}");
        let new = keys["public"][0].as_str().context("a key")?.to_owned();
        ensure!(new != name && Some(&new) != before.as_ref(), "still {new}");
        wait_until("the new key is published alone", PATIENCE, || {
            ensure!(announced(world, &node)? == (name.clone(), Some(new.clone())), "not yet");
            Ok(())
        })?;
    }
    finish("udp", udp)?;
    // A node that cannot hear of the next key is waited for, and talked to all the time, also by new sessions.
    let cut = CutOff::new(world, &there)?;
    // What is on its way to it would still arrive; an agent that starts now has what is on disk.
    there.agent().kill()?;
    world.cluster.restart_agent(&there, &world.artifacts)?;
    let keys = rotate_key(world, &here, "5")?;
    ensure!(keys["public"].as_array().map(Vec::len) == Some(2), "{keys}");
    ensure!(
        keys["waitingFor"].as_array().is_some_and(|w| w.iter().any(|n| n == there.name())),
        "{keys}"
    );
    for node in [&here, &there] {
        if let Some(worker) = node.worker("overlay") {
            kill(worker, Signal::SIGKILL).context("kill -9")?;
        }
        thread::sleep(Duration::from_secs(3));
    }
    here.agent().kill()?;
    world.cluster.restart_agent(&here, &world.artifacts)?;
    drop(cut);
    wait_until("the last node knows it", PATIENCE, || {
        let keys = rotate_key_status(&here)?;
        ensure!(keys["public"].as_array().map(Vec::len) == Some(1), "{keys}");
        Ok(())
    })?;
    wait_agreed(world)?;
    finish("http", http)?;
    finish("stream", stream).map(drop)
}

fn rotate_key_status(node: &Node) -> Result<serde_json::Value> {
    let socket = node.layout().agent_run().join("agent.sock").display().to_string();
    let url = "http://agent/mesh/v1/status";
    let text =
        mesh_tests::command::run("curl", &["-fsS", "-m", "2", "--unix-socket", &socket, url])?;
    let status: serde_json::Value = serde_json::from_str(&text)?;
    Ok(status["keys"].clone())
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

/// `meshctl check encryption`, running.
struct Check(std::process::Child);

impl Check {
    fn start(world: &World, arguments: &[&str]) -> Result<Self> {
        let mut meshctl = Command::new(&world.artifacts.meshctl);
        meshctl.args(["check", "encryption", "-o", "json"]).args(arguments);
        meshctl.env("KUBECONFIG", world.cluster.kubeconfig());
        meshctl.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        meshctl.spawn().map(Self).context("start meshctl")
    }

    /// Its exit code, and its verdicts.
    fn finish(mut self) -> Result<(Option<i32>, Vec<Verdict>)> {
        let (mut text, mut said) = (String::new(), String::new());
        self.0.stdout.take().context("a pipe")?.read_to_string(&mut text)?;
        self.0.stderr.take().context("a pipe")?.read_to_string(&mut said)?;
        let code = self.0.wait()?.code();
        let verdicts = serde_json::from_str(&text);
        Ok((code, verdicts.with_context(|| format!("it printed {text:?}, and said {said}"))?))
    }
}

impl Drop for Check {
    fn drop(&mut self) {
        // Both fail when it has ended before, which is fine.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[derive(Debug, Deserialize)]
struct Verdict {
    from: String,
    to: String,
    family: String,
    outcome: String,
    canaries: usize,
    arrived: usize,
    detail: String,
}

/// No canary was readable, and whatever one cannot tell has a reason that contains `excuse`.
fn none_readable(verdicts: &[Verdict], excuse: Option<&str>) -> Result<()> {
    for verdict in verdicts {
        let excused = excuse.is_some_and(|excuse| verdict.detail.contains(excuse));
        let fine = verdict.outcome == "ok" || verdict.outcome == "unknown" && excused;
        ensure!(fine, "{verdict:?}");
    }
    Ok(())
}

/// All pairs are ok. A busy machine may take longer for a connection than the check gives it.
fn prove(world: &World) -> Result<Vec<Verdict>> {
    let nodes = world.cluster.nodes().len();
    for attempt in 1.. {
        let (code, verdicts) = Check::start(world, &[])?.finish()?;
        ensure!(verdicts.len() == nodes * (nodes - 1) * 2, "{verdicts:?}");
        ensure!(verdicts.iter().all(|v| v.outcome != "plaintext"), "{verdicts:?}");
        match none_readable(&verdicts, None) {
            Ok(()) => {
                ensure!(code == Some(0), "exit code {code:?}");
                return Ok(verdicts);
            }
            Err(why) if attempt == 5 => return Err(why),
            Err(why) => println!("  once more: {why:#}"),
        }
    }
    unreachable!("it has returned")
}

/// Packet sockets on a node; of the agent's, there are some only while it looks.
fn packet_sockets(node: &Node) -> Result<usize> {
    Ok(node.exec(&["cat", "/proc/net/packet"])?.lines().count() - 1)
}

fn encryption_is_proved(world: &World) -> Result<()> {
    wait_agreed(world)?;
    let check = Check::start(world, &[])?;
    let nodes = world.cluster.nodes();
    wait_until("a node looks", PATIENCE, || {
        ensure!(packet_sockets(&nodes[0])? > 0, "no packet socket");
        Ok(())
    })?;
    check.finish()?;
    let verdicts = prove(world)?;
    for verdict in &verdicts {
        ensure!(verdict.canaries >= 4 && verdict.arrived == verdict.canaries, "{verdict:?}");
        ensure!(verdict.detail.contains("sealed"), "{verdict:?}");
    }
    println!("  {} canaries arrived", verdicts.iter().map(|v| v.arrived).sum::<usize>());
    for node in &nodes {
        ensure!(packet_sockets(node)? == 0, "{} still looks", node.name());
    }
    let left = world.kubectl.run(&[
        "get",
        "services,endpointslices",
        "-n",
        "kube-system",
        "-l",
        "mesh.dev/check",
        "-o",
        "name",
    ])?;
    ensure!(left.trim().is_empty(), "left behind: {left}");
    Ok(())
}

fn encryption_is_proved_while_tunnels_die(world: &World) -> Result<()> {
    wait_agreed(world)?;
    let check = Check::start(world, &["--secs", "12"])?;
    for _ in 0..4 {
        for node in world.cluster.nodes() {
            thread::sleep(Duration::from_millis(800));
            // With the kernel's device there is none to kill.
            if let Some(worker) = node.worker("overlay") {
                kill(worker, Signal::SIGKILL).context("kill -9")?;
            }
        }
    }
    let (_, verdicts) = check.finish()?;
    none_readable(&verdicts, Some("did not arrive"))?;
    let arrived = verdicts.iter().map(|v| v.arrived).sum::<usize>();
    let all = verdicts.iter().map(|v| v.canaries).sum::<usize>();
    println!("  {arrived} of {all} canaries arrived");
    ensure!(arrived * 2 > all, "{verdicts:?}");
    prove(world).map(drop)
}

/// A node has to begin from nothing while canaries go to and from it: no device, no configuration, no keys of pairs.
fn encryption_is_proved_while_a_node_joins(world: &World) -> Result<()> {
    wait_agreed(world)?;
    let node = world.two_pods()?.1.node;
    let check = Check::start(world, &["--secs", "15"])?;
    thread::sleep(Duration::from_secs(2));
    node.agent().kill()?;
    if let Some(worker) = node.worker("overlay") {
        kill(worker, Signal::SIGKILL).context("kill -9")?;
    }
    // The device ends with the worker, unless it is the kernel's.
    let _ = node.exec(&["ip", "link", "del", "mesh-wg"]);
    for file in ["snapshot.json", "preshared.json", "overlay.json"] {
        let _ = fs::remove_file(node.layout().agent_state().join(file));
    }
    thread::sleep(Duration::from_secs(2));
    world.cluster.restart_agent(&node, &world.artifacts)?;
    let (_, verdicts) = check.finish()?;
    ensure!(verdicts.iter().all(|v| v.outcome != "plaintext"), "{verdicts:?}");
    // The agent that looked there is gone, and knows nothing; the others have looked all the time.
    let others = |v: &&Verdict| v.from != node.name() && v.to != node.name();
    for verdict in verdicts.iter().filter(others) {
        ensure!(verdict.outcome == "ok", "{verdict:?}");
    }
    ensure!(verdicts.iter().any(|v| others(&v)), "{verdicts:?}");
    world.cluster.wait_ready(&world.artifacts)?;
    wait_agreed(world)?;
    prove(world).map(drop)
}

/// Something on a node that is undone on drop.
struct Broken {
    node: Node,
    undo: Vec<Vec<String>>,
}

impl Broken {
    fn new(node: &Node) -> Self {
        Self { node: node.clone(), undo: vec![] }
    }

    fn run(&mut self, change: &str, undo: &str) -> Result<()> {
        self.undo.push(undo.split(' ').map(str::to_owned).collect());
        self.node.exec(&change.split(' ').collect::<Vec<_>>()).map(drop)
    }
}

impl Drop for Broken {
    fn drop(&mut self) {
        for undo in &self.undo {
            // What was not done cannot be undone.
            let _ = self.node.exec(&undo.iter().map(String::as_str).collect::<Vec<_>>());
        }
    }
}

/// The traffic of the node itself takes the route; that of its pods does not get out even then.
fn a_route_beside_the_tunnel_is_found(world: &World) -> Result<()> {
    prove(world)?;
    let (a, b) = world.two_pods()?;
    let (from, to) = (a.node.name(), b.node.name());
    let mut broken = Broken::new(&a.node);
    let route = format!("{}/32 via {} dev eth0", b.v4()?, b.node.addresses().0);
    broken.run(&format!("ip route add {route}"), &format!("ip route del {route}"))?;
    // The pod that receives is the node's first; the workload's is one of a few.
    let block = b.v4()?.rsplit_once('.').context("an address")?.0.to_owned();
    for half in [0, 128] {
        let route = format!("{block}.{half}/25 via {} dev eth0", b.node.addresses().0);
        broken.run(&format!("ip route add {route}"), &format!("ip route del {route}"))?;
    }
    let (code, verdicts) = Check::start(world, &[])?.finish()?;
    ensure!(code == Some(1), "exit code {code:?}: {verdicts:?}");
    for verdict in &verdicts {
        let is_broken = verdict.from == from && verdict.to == to && verdict.family == "IPv4";
        ensure!((verdict.outcome == "plaintext") == is_broken, "{verdict:?}");
        if is_broken {
            println!("  {}", verdict.detail);
            ensure!(verdict.detail.contains("udp from node"), "{verdict:?}");
            ensure!(!verdict.detail.contains("from pod"), "{verdict:?}");
        }
    }
    drop(broken);
    prove(world).map(drop)
}

/// Everything that goes into the tunnel leaves the node in the clear, too.
fn a_copy_beside_the_tunnel_is_found(world: &World) -> Result<()> {
    prove(world)?;
    let node = world.two_pods()?.0.node;
    let mut broken = Broken::new(&node);
    // There is one where programs are attached by filters.
    let _ = node.exec(&["tc", "qdisc", "add", "dev", "mesh-wg", "clsact"]);
    broken.run(
        "tc filter add dev mesh-wg egress pref 77 protocol all u32 match u32 0 0 action mirred egress mirror dev eth0",
        "tc filter del dev mesh-wg egress pref 77",
    )?;
    let (code, verdicts) = Check::start(world, &[])?.finish()?;
    ensure!(code == Some(1), "exit code {code:?}: {verdicts:?}");
    for verdict in &verdicts {
        ensure!((verdict.outcome == "plaintext") == (verdict.from == node.name()), "{verdict:?}");
    }
    let first = verdicts.iter().find(|v| v.outcome == "plaintext").context("none is readable")?;
    println!("  {}", first.detail);
    for part in ["udp from pod", "tcp from pod", "udp from node", "tcp from node"] {
        ensure!(first.detail.contains(part), "{part}: {first:?}");
    }
    drop(broken);
    prove(world).map(drop)
}
