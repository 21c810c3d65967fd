//! kubectl 1.37 works as its users know it.

use std::fs;

use anyhow::{Result, bail, ensure};
use mesh_tests::command::wait_until;

use crate::tests;
use crate::world::{PATIENCE, World, expect};

tests![
    kubectl_shows,
    endpoints_by_hand_lead_where_they_say,
    kubectl_changes,
    kubectl_applies_on_the_server,
    meshctl_shows,
    config_reaches_pods
];

fn kubectl_shows(world: &World) -> Result<()> {
    let kubectl = &world.kubectl;
    let nodes = kubectl.run(&["get", "nodes", "-o", "wide"])?;
    ensure!(nodes.matches(" Ready ").count() == 3, "{nodes}");
    let pods = kubectl.run(&["get", "pods", "-A", "-o", "wide"])?;
    for part in ["NAMESPACE", "NODE", "1/1", "Running", "10.244.", "node-"] {
        expect("get pods -A -o wide", &pods, part)?;
    }
    let all = kubectl.run(&["get", "all"])?;
    for part in ["pod/web-", "service/web", "deployment.apps/web", "replicaset.apps/web-"] {
        expect("get all", &all, part)?;
    }
    let pod = world.pods()?.remove(0);
    expect("get endpoints", &kubectl.run(&["get", "endpoints", "web", "-o", "yaml"])?, pod.v4()?)?;
    expect("describe pod", &kubectl.run(&["describe", "pod", &pod.name])?, "Started")?;
    expect("describe node", &kubectl.run(&["describe", "node", "node-1"])?, "PodCIDR")?;
    expect("describe service", &kubectl.run(&["describe", "service", "web"])?, "Endpoints")?;
    expect("describe deployment", &kubectl.run(&["describe", "deploy", "web"])?, "NewReplicaSet")?;
    expect("describe ingress", &kubectl.run(&["describe", "ingress", "web"])?, "web.test")?;
    expect("logs", &kubectl.run(&["logs", &pod.name])?, "serves version 1")?;
    expect("logs by label", &kubectl.run(&["logs", "-l", "app=web", "--tail=5"])?, "serves")?;
    expect("logs of a deployment", &kubectl.run(&["logs", "deploy/web"])?, "serves")?;
    let resources = kubectl.run(&["api-resources"])?;
    for part in ["deployments", "endpointslices", "ingresses", "leases"] {
        expect("api-resources", &resources, part)?;
    }
    expect("explain", &kubectl.run(&["explain", "pod.spec.containers"])?, "FIELDS")?;
    let jsonpath = "jsonpath={.items[*].status.podIP}";
    expect("jsonpath", &kubectl.run(&["get", "pods", "-o", jsonpath])?, "10.244.")?;
    expect("events", &kubectl.run(&["get", "events"])?, "Scheduled")
}

/// A Service without a selector, and Endpoints beside it.
fn endpoints_by_hand_lead_where_they_say(world: &World) -> Result<()> {
    let both = ["service/outside-db", "endpoints/outside-db"];
    world.clean(&both)?;
    let (from, to) = world.two_pods()?;
    world.kubectl.apply(&format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: outside-db}}
spec: {{ports: [{{port: 80}}]}}
---
apiVersion: v1
kind: Endpoints
metadata: {{name: outside-db}}
subsets: [{{addresses: [{{ip: {}}}], ports: [{{port: 8080}}]}}]
",
        to.v4()?
    ))?;
    wait_until("it answers", PATIENCE, || {
        expect("the Service", &from.get("http://outside-db/")?, &to.name)
    })?;
    world.clean(&both[1..])?;
    wait_until("it leads nowhere", PATIENCE, || {
        ensure!(from.get("http://outside-db/").is_err(), "it still answers");
        Ok(())
    })?;
    world.clean(&both)
}

fn kubectl_changes(world: &World) -> Result<()> {
    let kubectl = &world.kubectl;
    world.clean(&["deployment/short", "configmap/short"])?;
    kubectl.apply(
        "
apiVersion: apps/v1
kind: Deployment
metadata: {name: short}
spec:
  replicas: 1
  selector: {matchLabels: {app: short}}
  template:
    metadata: {labels: {app: short}}
    spec: {containers: [{name: hello, image: 'mesh.local/hello:1'}]}
",
    )?;
    kubectl.run(&["rollout", "status", "deployment/short", "--timeout=60s"])?;
    kubectl.run(&["scale", "deployment/short", "--replicas=2"])?;
    kubectl.wait_ready("app=short", 2, PATIENCE)?;
    kubectl.run(&["set", "image", "deployment/short", "hello=mesh.local/hello:2"])?;
    kubectl.run(&["rollout", "status", "deployment/short", "--timeout=60s"])?;
    kubectl.run(&["label", "deployment", "short", "tier=test"])?;
    kubectl.run(&["annotate", "deployment", "short", "note=here"])?;
    let patch = r#"{"spec":{"template":{"metadata":{"labels":{"extra":"yes"}}}}}"#;
    kubectl.run(&["patch", "deployment", "short", "-p", patch])?;
    kubectl.run(&["rollout", "status", "deployment/short", "--timeout=60s"])?;
    kubectl.wait_ready("extra=yes", 2, PATIENCE)?;
    let file = world.scratch("kubectl")?.join("config.yaml");
    fs::write(
        &file,
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: short}\ndata: {a: \"1\"}\n",
    )?;
    let path = file.display().to_string();
    expect("apply", &kubectl.run(&["apply", "-f", &path])?, "created")?;
    expect("apply again", &kubectl.run(&["apply", "-f", &path])?, "unchanged")?;
    expect("diff", &kubectl.run(&["diff", "-f", &path]).map(|d| format!("same{d}"))?, "same")?;
    expect("delete", &kubectl.run(&["delete", "-f", &path])?, "deleted")?;
    kubectl.run(&["delete", "deployment", "short", "--timeout=60s"])?;
    wait_until("its pods are gone", PATIENCE, || {
        let left = kubectl.pods("app=short")?;
        ensure!(left.is_empty(), "{} pods are left", left.len());
        Ok(())
    })
}

fn kubectl_applies_on_the_server(world: &World) -> Result<()> {
    let kubectl = &world.kubectl;
    world.clean(&["configmap/shared"])?;
    let file = world.scratch("kubectl-server-side")?.join("config.yaml");
    let path = file.display().to_string();
    let write = |data: &str| {
        let head = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: shared}\n";
        fs::write(&file, format!("{head}data: {{{data}}}\n"))
    };
    let server_side = |more: &[&str]| {
        let mut all = vec!["apply", "--server-side", "-f", path.as_str()];
        all.extend(more);
        kubectl.run(&all)
    };
    let data = || Ok::<_, anyhow::Error>(kubectl.json(&["configmap", "shared"])?["data"].clone());

    // kubectl's own objects change over from one way of applying to the other, and lose what is no longer applied.
    write("a: '1', b: '2'")?;
    expect("apply", &kubectl.run(&["apply", "-f", &path])?, "created")?;
    write("a: '3'")?;
    expect("change over", &server_side(&[])?, "serverside-applied")?;
    ensure!(data()? == serde_json::json!({"a": "3"}), "{}", data()?);

    write("a: '4', c: '5'")?;
    let Err(refused) = server_side(&["--field-manager=other"]) else {
        bail!("a field of another manager was changed");
    };
    expect("conflict", &format!("{refused:#}"), "conflict with \"kubectl\": .data.a")?;
    server_side(&["--field-manager=other", "--force-conflicts"])?;
    write("c: '5'")?;
    server_side(&["--field-manager=other"])?;
    ensure!(data()? == serde_json::json!({"c": "5"}), "{}", data()?);
    let shown =
        kubectl.run(&["get", "configmap", "shared", "-o", "yaml", "--show-managed-fields"])?;
    expect("managers", &shown, "manager: other")?;
    expect("delete", &kubectl.run(&["delete", "-f", &path])?, "deleted")
}

fn meshctl_shows(world: &World) -> Result<()> {
    let program = world.artifacts.meshctl.display().to_string();
    let config = world.cluster.kubeconfig().display().to_string();
    let meshctl = |args: &[&str]| {
        let mut all = vec!["--kubeconfig", config.as_str()];
        all.extend(args);
        mesh_tests::command::run(&program, &all)
    };
    let routes = meshctl(&["routes"])?;
    for part in ["web.test", "10.244."] {
        expect("routes", &routes, part)?;
    }
    let json: serde_json::Value = serde_json::from_str(&meshctl(&["routes", "-o", "json"])?)?;
    ensure!(!json.is_null(), "routes -o json is empty");
    expect("services", &meshctl(&["services"])?, &world.vips()?.0)?;
    expect("peers", &meshctl(&["peers"])?, "node-2")?;
    expect("get", &meshctl(&["get", "pods", "-A"])?, "web-")?;
    meshctl(&["check"]).map(drop)
}

fn config_reaches_pods(world: &World) -> Result<()> {
    world.clean(&["pod/configured", "configmap/settings", "secret/settings"])?;
    let kubectl = &world.kubectl;
    kubectl.apply(
        "{apiVersion: v1, kind: ConfigMap, metadata: {name: settings}, data: {colour: green}}",
    )?;
    kubectl.apply(
        "{apiVersion: v1, kind: Secret, metadata: {name: settings}, stringData: {word: xyzzy}}",
    )?;
    kubectl.apply(
        "
apiVersion: v1
kind: Pod
metadata: {name: configured, labels: {app: configured}}
spec:
  containers:
  - name: shell
    image: mesh.local/busybox:1
    command: [/bin/sh, -c, 'echo it is $COLOUR $WORD on $NODE; exec /bin/mesh-hello pause']
    env:
    - {name: COLOUR, valueFrom: {configMapKeyRef: {name: settings, key: colour}}}
    - {name: WORD, valueFrom: {secretKeyRef: {name: settings, key: word}}}
    - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
    resources: {limits: {memory: 64Mi, cpu: 500m}}
",
    )?;
    kubectl.wait_ready("app=configured", 1, PATIENCE)?;
    let said = kubectl.run(&["logs", "configured"])?;
    expect("environment", &said, "it is green xyzzy on node-")?;
    world.clean(&["pod/configured", "configmap/settings", "secret/settings"])
}
