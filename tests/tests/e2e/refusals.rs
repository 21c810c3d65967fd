//! Bad input is refused with a reason, nothing is stored, and nothing falls over.

use anyhow::{Context as _, Result, ensure};
use mesh_tests::command::wait_until;

use crate::tests;
use crate::world::{PATIENCE, World, expect};

tests![bad_manifests_are_refused, a_missing_image_is_told, a_crashing_container_backs_off];

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
