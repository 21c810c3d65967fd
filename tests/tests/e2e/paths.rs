//! Nodes that go away, and nodes that lose each other.
//!
//! ```text
//!   node-1 --+
//!   node-2 --+-- bridge      a cable is pulled at the bridge, or two nodes drop what comes from each other
//!   node-3 --+
//! ```

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::Node;
use mesh_tests::command::{run, wait_until};
use mesh_tests::pod::Pod;
use serde_json::Value;

use crate::faults::wait_agent;
use crate::tests;
use crate::world::{PATIENCE, REPLICAS, WEB, World, expect};

tests![
    node_cut_off,
    underlay_blocked_one_way,
    underlay_blocked_both_ways,
    agent_death_is_no_node_death
];

/// A change is seen or the test fails; how long it took is printed.
const SOON: Duration = Duration::from_secs(15);

/// Pulls a node's cable; plugs it in again when dropped.
pub(crate) struct Unplugged<'a>(&'a Node);

impl<'a> Unplugged<'a> {
    pub(crate) fn new(node: &'a Node) -> Result<Self> {
        run("ip", &["link", "set", &node.layout().port, "down"])?;
        Ok(Self(node))
    }
}

impl Drop for Unplugged<'_> {
    fn drop(&mut self) {
        if let Err(error) = run("ip", &["link", "set", &self.0.layout().port, "up"]) {
            eprintln!("the cable of {} stays out: {error:#}", self.0.name());
        }
    }
}

/// One node drops what it gets from another, and with `both` also what it sends there. Ends when dropped.
struct Blocked<'a>(&'a Node);

const TABLE: &str = "inet mesh-e2e-blocked";

impl<'a> Blocked<'a> {
    fn new(node: &'a Node, other: &Node, both: bool) -> Result<Self> {
        let (v4, v6) = other.addresses();
        let chain = |hook: &str, way: &str| {
            format!(
                "chain {hook} {{ type filter hook {hook} priority -300; ip {way} {v4} drop; ip6 {way} {v6} drop; }};"
            )
        };
        let out = if both { chain("output", "daddr") } else { String::new() };
        let rules = format!("table {TABLE} {{ {} {out} }}", chain("input", "saddr"));
        node.exec(&["nft", &rules])?;
        Ok(Self(node))
    }
}

impl Drop for Blocked<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.exec(&["nft", &format!("delete table {TABLE}")]) {
            eprintln!("{} stays blocked: {error:#}", self.0.name());
        }
    }
}

/// Asks a node's agent.
fn ask(node: &Node, path: &str) -> Result<Value> {
    let socket = node.layout().agent_run().join("agent.sock").display().to_string();
    let url = format!("http://agent/mesh/v1/{path}");
    let text = run("curl", &["-fsS", "-m", "5", "--unix-socket", &socket, &url])?;
    serde_json::from_str(&text).with_context(|| format!("understand {text:?}"))
}

/// How many backends of the workload on `node` the tables of `at` have, and how many frontends have none at all.
fn backends(at: &Node, node: &Node) -> Result<(usize, usize)> {
    let services = ask(at, "services")?;
    let of_web =
        services.as_array().into_iter().flatten().filter(|f| f["service"] == "default/web");
    let lists: Vec<&Vec<Value>> = of_web.filter_map(|f| f["backends"].as_array()).collect();
    ensure!(!lists.is_empty(), "{} has no frontend of the workload", at.name());
    let there = lists.iter().flat_map(|list| list.iter()).filter(|b| b["node"] == node.name());
    Ok((there.count(), lists.iter().filter(|list| list.is_empty()).count()))
}

/// A peer, as `meshctl peers` has it.
fn peer(at: &Node, of: &Node) -> Result<Value> {
    let peers = ask(at, "peers")?;
    let mut peers = peers.as_array().into_iter().flatten();
    peers.find(|peer| peer["node"] == of.name()).cloned().context("no such peer")
}

/// The path from one node to another.
fn path(from: &Node, to: &Node) -> Result<Value> {
    Ok(peer(from, to)?["path"].clone())
}

fn is_in_state(from: &Node, to: &Node, state: &str) -> Result<()> {
    let path = path(from, to)?;
    ensure!(path["state"] == state, "{} to {}: {path}", from.name(), to.name());
    Ok(())
}

fn both_are(a: &Node, b: &Node, state: &str) -> Result<()> {
    is_in_state(a, b, state)?;
    is_in_state(b, a, state)
}

fn others(world: &World, than: &Node) -> Vec<Node> {
    world.cluster.nodes().into_iter().filter(|node| node.name() != than.name()).collect()
}

/// All paths are direct and all backends in place: where each of these tests starts and ends.
fn all_is_well(world: &World) -> Result<()> {
    let nodes = world.cluster.nodes();
    wait_until("all paths are direct and all backends in place", PATIENCE, || {
        for at in &nodes {
            for to in others(world, at) {
                is_in_state(at, &to, "direct")?;
                let endpoint = peer(at, &to)?["endpoint"].to_string();
                let (v4, v6) = to.addresses();
                let own = [format!("\"{v4}:"), format!("\"[{v6}]:")];
                let there = own.iter().any(|own| endpoint.starts_with(own));
                ensure!(there, "{} sends to {endpoint} for {}", at.name(), to.name());
            }
        }
        for pod in world.pods()? {
            for at in &nodes {
                ensure!(backends(at, &pod.node)?.0 > 0, "{} lacks {}", at.name(), pod.name);
            }
        }
        Ok(())
    })
}

/// Numbers of restarts, by pod.
fn restarts(world: &World) -> Result<Vec<(String, String)>> {
    let pods = world.kubectl.wait_ready(WEB, REPLICAS, PATIENCE)?;
    let count = |pod: &Value| {
        let status = &pod["status"]["containerStatuses"][0];
        (pod["metadata"]["name"].to_string(), status["restartCount"].to_string())
    };
    Ok(pods.iter().map(count).collect())
}

fn node_cut_off(world: &World) -> Result<()> {
    all_is_well(world)?;
    let (client, away) = world.two_pods()?;
    let ((vip, _), before) = (world.vips()?, restarts(world)?);
    // Nobody but the nodes themselves may be needed for this.
    world.cluster.control().kill()?;
    let gone = cut_off(world, &client, &away, &vip);
    world.cluster.restart_control(&world.artifacts)?;
    gone?;
    all_is_well(world)?;
    ensure!(before == restarts(world)?, "pods were restarted or replaced");
    Ok(())
}

fn cut_off(world: &World, client: &Pod, away: &Pod, vip: &str) -> Result<()> {
    let start = Instant::now();
    let cut = Unplugged::new(&away.node)?;
    for at in others(world, &away.node) {
        wait_until("its backends are out of the tables", SOON, || {
            ensure!(backends(&at, &away.node)? == (0, 0), "{} still has them", at.name());
            Ok(())
        })?;
        println!("  out of the tables of {} after {} ms", at.name(), start.elapsed().as_millis());
    }
    for _ in 0..30 {
        client.get(&format!("http://{vip}/"))?;
    }
    // The one that is cut off keeps what it can still reach, and no service of it is empty.
    let (own, empty) = backends(&away.node, &away.node)?;
    ensure!(own > 0 && empty == 0, "the isolated node has {own} backends, {empty} empty frontends");
    drop(cut);
    let start = Instant::now();
    for at in others(world, &away.node) {
        wait_until("its backends are back", SOON, || {
            ensure!(backends(&at, &away.node)?.0 > 0, "{} lacks them", at.name());
            Ok(())
        })?;
    }
    println!("  back everywhere after {} ms", start.elapsed().as_millis());
    Ok(())
}

fn underlay_blocked_one_way(world: &World) -> Result<()> {
    underlay_blocked(world, false)
}

fn underlay_blocked_both_ways(world: &World) -> Result<()> {
    underlay_blocked(world, true)
}

fn underlay_blocked(world: &World, both: bool) -> Result<()> {
    all_is_well(world)?;
    let (a, b) = world.two_pods()?;
    let third = world.cluster.nodes();
    let third = third
        .iter()
        .find(|n| ![a.node.name(), b.node.name()].contains(&n.name()))
        .context("three nodes")?;
    let steady = ["--secs", "120", "--rate", "50", "--workers", "1"];
    let stream = world.pod_load(&a, &format!("stream://{}:9000", b.v4()?), &steady)?;
    thread::sleep(Duration::from_millis(500));

    let start = Instant::now();
    let block = Blocked::new(&a.node, &b.node, both)?;
    wait_until("a relay is in use", SOON, || both_are(&a.node, &b.node, "relayed"))?;
    println!("  relayed after {} ms", start.elapsed().as_millis());
    ensure!(path(&a.node, &b.node)?["via"] == third.name(), "{}", path(&a.node, &b.node)?);
    a.get(&format!("http://{}:8080/", b.v4()?))?;
    b.get(&format!("http://{}:8080/", a.v4()?))?;
    let (meshctl, kubeconfig) = (&world.artifacts.meshctl, world.cluster.kubeconfig());
    let words = [
        meshctl.display().to_string(),
        "--kubeconfig".to_owned(),
        kubeconfig.display().to_string(),
    ];
    for command in ["peers", "routes"] {
        let mut shown = std::process::Command::new(&words[0]);
        shown.args(&words[1..]).args([command, "--node", a.node.name()]);
        let shown = mesh_tests::command::output(&mut shown)?;
        expect(command, &shown, &format!("relayed via {}", third.name()))?;
    }
    // The relay outlives its agent.
    third.agent().kill()?;
    thread::sleep(Duration::from_secs(3));
    both_are(&a.node, &b.node, "relayed")?;
    world.cluster.restart_agent(third, &world.artifacts)?;
    wait_agent(third)?;
    thread::sleep(Duration::from_secs(3));
    both_are(&a.node, &b.node, "relayed").context("after the relay's agent came back")?;
    // And an agent that is started anew goes on with the relay of the one before.
    a.node.agent().kill()?;
    world.cluster.restart_agent(&a.node, &world.artifacts)?;
    wait_agent(&a.node)?;
    thread::sleep(Duration::from_secs(2));
    both_are(&a.node, &b.node, "relayed").context("after the agent of one end came back")?;

    let start = Instant::now();
    drop(block);
    wait_until("the path is direct again", Duration::from_secs(60), || {
        both_are(&a.node, &b.node, "direct")
    })?;
    println!("  direct again after {} ms", start.elapsed().as_millis());
    a.get(&format!("http://{}:8080/", b.v4()?))?;
    let report = stream.stop()?;
    println!("  stream   {}", report.line());
    report.none_failed()?;
    all_is_well(world)
}

fn agent_death_is_no_node_death(world: &World) -> Result<()> {
    all_is_well(world)?;
    let (a, _) = world.two_pods()?;
    let at = others(world, &a.node);
    let whole: Vec<_> = at.iter().map(|at| backends(at, &a.node)).collect::<Result<_>>()?;
    a.node.agent().kill()?;
    let watched = watch(&at, &a.node, &whole, Duration::from_secs(4));
    world.cluster.restart_agent(&a.node, &world.artifacts)?;
    wait_agent(&a.node)?;
    watched?;
    watch(&at, &a.node, &whole, Duration::from_secs(2)).context("as the agent came back")?;
    all_is_well(world)
}

/// Nothing about `node` changes in the tables of the others for so long.
fn watch(at: &[Node], node: &Node, whole: &[(usize, usize)], time: Duration) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < time {
        for (at, whole) in at.iter().zip(whole) {
            if backends(at, node)? != *whole {
                bail!("{} changed its tables after {:?}", at.name(), start.elapsed());
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
