//! Bad input is refused with a reason, nothing is stored, and nothing falls over.

use anyhow::{Context as _, Result, ensure};
use mesh_tests::command::{at_once, run, wait_until};

use crate::tests;
use crate::world::{PATIENCE, World, expect};

tests![
    bad_manifests_are_refused,
    a_missing_image_is_told,
    a_crashing_container_backs_off,
    garbage_ends_no_process,
];

/// A manifest and what the refusal must name.
const REFUSED: &[(&str, &str)] = &[
    ("{\"apiVersion\": \"v1\", \"kind\": \"Pod\", ", ""),
    ("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: Bad_Name}", "metadata.name"),
    (
        "apiVersion: v1\nkind: Service\nmetadata: {name: bad}\nspec: {ports: [{port: 70000}]}",
        "spec.ports[0].port",
    ),
    (
        "apiVersion: v1\nkind: Service\nmetadata: {name: bad}\nspec: {clusterIP: 1.2.3.4, ports: [{port: 80}]}",
        "clusterIP",
    ),
    ("apiVersion: v1\nkind: Pod\nmetadata: {name: bad}\nspec: {containers: []}", "spec.containers"),
    (
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: bad}\nspec: {replicas: -1, \
         selector: {matchLabels: {a: b}}, template: {metadata: {labels: {a: b}}, \
         spec: {containers: [{name: c, image: i}]}}}",
        "spec.replicas",
    ),
    (
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: bad}\nspec: {\
         selector: {matchLabels: {a: b}}, template: {metadata: {labels: {a: c}}, \
         spec: {containers: [{name: c, image: i}]}}}",
        "selector",
    ),
    ("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: bad, namespace: nowhere}", "nowhere"),
    ("apiVersion: apps/v1\nkind: StatefulSet\nmetadata: {name: bad}", "StatefulSet"),
];

fn bad_manifests_are_refused(world: &World) -> Result<()> {
    for (manifest, named) in REFUSED {
        let mut create = world.kubectl.command();
        create.args(["create", "--validate=false", "-f", "-"]);
        let outcome = mesh_tests::command::output_with_input(&mut create, manifest.as_bytes());
        let Err(e) = outcome else { anyhow::bail!("accepted: {manifest}") };
        let said = e.to_string();
        expect(&format!("the refusal of {manifest:?}"), &said, named)?;
        ensure!(!said.contains("InternalError"), "{manifest:?}: {said}");
    }
    for kind in ["configmaps", "services", "pods", "deployments"] {
        let list = world.kubectl.run(&["get", kind, "-A", "-o", "name"])?;
        ensure!(!list.contains("/bad"), "something was stored: {list}");
    }
    Ok(())
}

fn a_missing_image_is_told(world: &World) -> Result<()> {
    world.clean(&["pod/noimage"])?;
    world.kubectl.run(&["run", "noimage", "--image=mesh.local/none:1", "--restart=Always"])?;
    let waiting = || -> Result<String> {
        let pod = world.kubectl.json(&["pod", "noimage"])?;
        let reason = pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"].as_str();
        Ok(reason.context("the container does not wait")?.to_owned())
    };
    for reason in ["ErrImagePull", "ImagePullBackOff"] {
        wait_until(&format!("state {reason}"), PATIENCE, || {
            let seen = waiting()?;
            ensure!(seen == reason, "{seen}");
            Ok(())
        })?;
    }
    let events =
        world.kubectl.run(&["get", "events", "--field-selector=involvedObject.name=noimage"])?;
    expect("event", &events, "mesh.local/none:1")?;
    world.clean(&["pod/noimage"])
}

fn a_crashing_container_backs_off(world: &World) -> Result<()> {
    world.clean(&["pod/crash"])?;
    world.kubectl.run(&[
        "run",
        "crash",
        "--image=mesh.local/busybox:1",
        "--",
        "/bin/sh",
        "-c",
        "exit 3",
    ])?;
    wait_until("CrashLoopBackOff with its exit code", PATIENCE, || {
        let pod = world.kubectl.json(&["pod", "crash"])?;
        let status = &pod["status"]["containerStatuses"][0];
        ensure!(status["state"]["waiting"]["reason"] == "CrashLoopBackOff", "{status}");
        ensure!(status["restartCount"].as_u64() > Some(0), "{status}");
        ensure!(status["lastState"]["terminated"]["exitCode"] == 3, "{status}");
        Ok(())
    })?;
    world.clean(&["pod/crash"])
}

/// Bytes that are no message of any protocol, and heads of messages that go on wrongly.
const GARBAGE: &[&str] = &[
    "x",
    "\u{1}\u{2}\u{3}\u{4}\u{5}\u{6}\u{7}\u{8}\u{9}\u{b}\u{c}\u{e}\u{f}\u{10}",
    "GET / HTTP/9.9\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: web.test\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nnonsense",
    "{\"set\": 7}\n",
];

fn garbage_ends_no_process(world: &World) -> Result<()> {
    let (pod, _) = world.two_pods()?;
    let node = &pod.node;
    let processes = || (node.agent().pid(), node.workers(), world.cluster.control().pid());
    let before = processes();
    let hello = world.artifacts.hello.display().to_string();
    let own = node.addresses().0;
    let api = world.cluster.subnet().control().0;
    let outside = [
        format!("tcp://{own}:80"),
        format!("tcp://{own}:443"),
        format!("tcp://{own}:10250"),
        format!("udp://{own}:51900"),
        format!("tcp://{api}:6443"),
    ];
    // An answer, a refusal and silence are all fine. Silence lasts seconds, so all are asked at once.
    at_once(GARBAGE, |bytes| {
        for target in ["udp://10.96.0.10:53", "tcp://10.96.0.10:53"] {
            let _ = pod.exec(&["/bin/mesh-hello", "get", &format!("{target}/{bytes}")]);
        }
        at_once(&outside, |target| {
            let _ = run(&hello, &["get", &format!("{target}/{bytes}")]);
            Ok(())
        })
    })?;
    ensure!(before == processes(), "before: {before:?}, after: {:?}", processes());
    world.curl(node, "/", &[])?;
    pod.get("http://web.default.svc.cluster.local/").map(drop)
}
