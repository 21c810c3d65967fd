//! What `meshctl flows` and `meshctl trace` tell of connections between pods.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::command::{output, wait_until};
use serde_json::Value;

use crate::tests;
use crate::world::World;

tests![flows_tell_connections_and_drops, flows_and_facts_name_what_is_wrong];

/// How soon a node has told, and the API knows a pod's address.
const TOLD: Duration = Duration::from_secs(20);

fn flows(world: &World, arguments: &[&str]) -> Result<Vec<Value>> {
    let mut meshctl = Command::new(&world.artifacts.meshctl);
    meshctl.args(["flows", "--tail", "4096", "-o", "json"]).args(arguments);
    let text = output(meshctl.env("KUBECONFIG", world.cluster.kubeconfig()))?;
    text.lines().map(|line| serde_json::from_str(line).context("a line of JSON")).collect()
}

fn flows_tell_connections_and_drops(world: &World) -> Result<()> {
    let (a, b) = world.two_pods()?;
    let (vip, _) = world.vips()?;
    a.get(&format!("http://{vip}/"))?;
    a.get(&format!("http://{}:8080/", b.v4()?))?;
    a.get(&format!("udp://{vip}:9001/whoami"))?;
    ensure!(a.get(&format!("tcp://{}:9999", b.v4()?)).is_err(), "nobody listens there");
    let a_name = format!("default/{}", a.name);
    let from_a = |flow: &&Value| flow["source"]["pod"] == a_name.as_str();
    let through = |arguments: &[&str]| -> Result<Value> {
        let all = flows(world, arguments)?;
        all.iter().find(from_a).cloned().with_context(|| format!("none of {} in {all:#?}", a.name))
    };

    wait_until("an ended connection to a service, told by its opener", TOLD, || {
        let closed = through(&["--service", "web", "--verdict", "closed", "--protocol", "tcp"])?;
        ensure!(closed["service"]["name"] == "default/web", "{closed:#}");
        ensure!(closed["service"]["address"] == format!("{vip}:80").as_str(), "{closed:#}");
        ensure!(closed["node"] == a.node.name() && closed["side"] == "egress", "{closed:#}");
        let target = &closed["destination"]["pod"];
        ensure!(target.as_str().is_some_and(|p| p.starts_with("default/web-")), "{closed:#}");
        Ok(())
    })?;
    wait_until("an ended connection between nodes, told by both", TOLD, || {
        let all = flows(world, &["--pod", &b.name, "--verdict", "closed", "--port", "8080"])?;
        let told = |side: &'static str, node: &str| -> Vec<&Value> {
            let is_it = |flow: &&Value| flow["side"] == side && flow["node"] == node;
            all.iter().filter(from_a).filter(is_it).collect()
        };
        // Earlier connections may be told by one side only: the other one's agent has been killed since.
        let ours = told("egress", a.node.name());
        let theirs = told("ingress", b.node.name());
        let same = |ours: &&Value, theirs: &Value| {
            theirs["source"]["port"] == ours["source"]["port"]
                && theirs["stats"]["sentBytes"] == ours["stats"]["receivedBytes"]
                && ours["stats"]["receivedBytes"].as_u64() > Some(0)
        };
        let both = ours.iter().any(|ours| theirs.iter().any(|theirs| same(ours, theirs)));
        ensure!(both, "no two of {ours:#?} and {theirs:#?} are of one connection");
        Ok(())
    })?;
    wait_until("a datagram, with its service", TOLD, || {
        let datagram = through(&["--service", "web", "--verdict", "datagram", "--port", "9001"])?;
        ensure!(datagram["service"]["name"] == "default/web", "{datagram:#}");
        Ok(())
    })?;
    wait_until("a refused connection", TOLD, || {
        let failed = through(&["--verdict", "failed", "--port", "9999"])?;
        ensure!(failed["reason"] == "refused", "{failed:#}");
        ensure!(
            failed["destination"]["pod"] == format!("default/{}", b.name).as_str(),
            "{failed:#}"
        );
        Ok(())
    })?;
    // The kernel of the other node says why. An SYN to a closed port is such a drop.
    wait_until("a drop of the kernel", TOLD, || {
        let dropped =
            through(&["--verdict", "dropped", "--port", "9999", "--node", b.node.name()])?;
        ensure!(dropped["reason"] == "kernel: no_socket", "{dropped:#}");
        Ok(())
    })
}

/// `meshctl trace`, and whether it found that all is well.
fn trace(world: &World, from: &str, to: &str) -> Result<Value> {
    let mut meshctl = Command::new(&world.artifacts.meshctl);
    meshctl.args(["trace", "-o", "json", from, to]);
    let answer = meshctl.env("KUBECONFIG", world.cluster.kubeconfig()).output()?;
    let error = String::from_utf8_lossy(&answer.stderr);
    let trace: Value = serde_json::from_slice(&answer.stdout)
        .with_context(|| format!("trace {from} {to}: {error}"))?;
    let ok = trace["verdict"]["ok"].as_bool().context("a verdict")?;
    ensure!(ok == answer.status.success(), "exit status {} of {trace:#}", answer.status);
    Ok(trace)
}

fn flows_and_facts_name_what_is_wrong(world: &World) -> Result<()> {
    let (a, b) = world.two_pods()?;
    world.kubectl.apply(
        "{apiVersion: v1, kind: Service, metadata: {name: empty}, spec: {selector: {app: nobody}, ports: [{port: 80}]}}",
    )?;
    let listening = format!("pod/{}:8080", b.name);
    let closed = format!("pod/{}:9999", b.name);
    let rows = [
        ("web:80", "none"),
        (listening.as_str(), "none"),
        ("web:81", "noSuchServicePort"),
        ("nobody:80", "nameNotFound"),
        ("empty:80", "noEndpoints"),
        (closed.as_str(), "notListening"),
    ];
    for (to, fault) in rows {
        wait_until(&format!("trace to {to} says {fault}"), TOLD, || {
            let trace = trace(world, &a.name, to)?;
            ensure!(trace["verdict"]["fault"] == fault, "{trace:#}");
            Ok(())
        })?;
    }
    let seen = trace(world, &a.name, &closed)?;
    let told =
        |flow: &Value| flow["node"] == b.node.name() && flow["reason"] == "kernel: no_socket";
    let flows = seen["flows"].as_array().context("a timeline")?;
    ensure!(flows.iter().any(told), "the other node saw the drop: {seen:#}");
    world.clean(&["service/empty"])
}
