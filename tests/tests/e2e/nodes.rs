//! What people do with nodes: take one out of use, see what it uses, let it run pods of its own.

use std::fs;

use anyhow::{Result, ensure};
use mesh_tests::command::{run, wait_until};

use crate::tests;
use crate::world::{PATIENCE, World, expect};

tests![a_node_is_drained, top_shows_what_is_used, a_static_pod_is_shown];

const LEAVING: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: leaving}
spec:
  replicas: 2
  selector: {matchLabels: {app: leaving}}
  template:
    metadata: {labels: {app: leaving}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: hello, image: 'mesh.local/hello:1'}]
";

fn a_node_is_drained(world: &World) -> Result<()> {
    let kubectl = &world.kubectl;
    world.clean(&["deployment/leaving"])?;
    kubectl.apply(LEAVING)?;
    let before = kubectl.wait_ready("app=leaving", 2, PATIENCE)?;
    let node = before[0]["spec"]["nodeName"].as_str().unwrap_or_default().to_owned();
    // Others' pods stay: they are other tests'.
    let drain = ["drain", &node, "--pod-selector=app=leaving", "--timeout=60s"];
    let drained = kubectl.run(&drain);
    let (there, cordoned) =
        (kubectl.wait_ready("app=leaving", 2, PATIENCE), { kubectl.run(&["get", "node", &node]) });
    let program = world.artifacts.meshctl.display().to_string();
    let config = world.cluster.kubeconfig().display().to_string();
    let freed =
        run(&program, &["--kubeconfig", config.as_str(), "node", "uncordon", node.as_str()]);
    expect("drain", &drained?, "drained")?;
    expect("the drained node", &cordoned?, "SchedulingDisabled")?;
    expect("uncordon", &freed?, "uncordoned")?;
    ensure!(
        there?.iter().all(|pod| pod["spec"]["nodeName"] != node.as_str()),
        "one is still there"
    );
    let shown = kubectl.run(&["get", "node", &node])?;
    ensure!(!shown.contains("SchedulingDisabled"), "{shown}");
    world.clean(&["deployment/leaving"])
}

fn top_shows_what_is_used(world: &World) -> Result<()> {
    let nodes = world.kubectl.run(&["top", "nodes"])?;
    for part in ["CPU(cores)", "node-1", "node-2", "node-3", "Mi"] {
        expect("top nodes", &nodes, part)?;
    }
    let pods = world.kubectl.run(&["top", "pods", "--containers"])?;
    for part in ["web-", "MEMORY(bytes)", "Mi"] {
        expect("top pods", &pods, part)?;
    }
    Ok(())
}

fn a_static_pod_is_shown(world: &World) -> Result<()> {
    let node = world.cluster.node(2);
    let folder = node.layout().state.join("static-pods");
    fs::create_dir_all(&folder)?;
    let file = folder.join("own.yaml");
    fs::write(
        &file,
        "
apiVersion: v1
kind: Pod
metadata: {name: own, labels: {app: own}}
spec: {terminationGracePeriodSeconds: 1, containers: [{name: hello, image: 'mesh.local/hello:1'}]}
",
    )?;
    let pods = world.kubectl.wait_ready("app=own", 1, PATIENCE)?;
    let name = format!("own-{}", node.name());
    ensure!(pods[0]["metadata"]["name"] == name.as_str(), "{}", pods[0]["metadata"]);
    expect("logs", &world.kubectl.run(&["logs", &name])?, "serves version 1")?;
    fs::remove_file(file)?;
    wait_until("its mirror is gone", PATIENCE, || {
        let left = world.kubectl.pods("app=own")?;
        ensure!(left.is_empty(), "{} are left", left.len());
        Ok(())
    })
}
