//! Pods and the API: service accounts, containers that are added, budgets, logs in all their forms.

use std::path::Path;
use std::process::Stdio;

use anyhow::{Result, bail, ensure};
use mesh_tests::command::wait_until;

use crate::tests;
use crate::world::{PATIENCE, World, expect};

tests![
    a_client_in_a_pod_finds_the_api,
    a_container_is_added_with_kubectl_debug,
    a_budget_holds_up_a_drain,
    logs_are_read_in_all_forms,
];

/// What kubectl says when it fails.
fn fails(world: &World, args: &[&str]) -> Result<String> {
    let out = world.kubectl.command().args(args).stdin(Stdio::null()).output()?;
    if out.status.success() {
        bail!("kubectl {args:?} did not fail: {}", String::from_utf8_lossy(&out.stdout));
    }
    Ok(String::from_utf8_lossy(&out.stderr).into_owned())
}

/// A call of kubectl's in the pod.
fn inside<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [&["exec", "client", "--", "/kubectl"], args].concat()
}

/// kubectl itself is the client: where it is given nothing, it looks for what is mounted, as all client libraries do.
fn a_client_in_a_pod_finds_the_api(world: &World) -> Result<()> {
    let kubectl = &world.kubectl;
    world.clean(&["pod/client", "serviceaccount/reader"])?;
    kubectl.run(&["create", "serviceaccount", "reader"])?;
    let plain = kubectl.command();
    let program = Path::new(plain.get_program()).canonicalize()?;
    kubectl.apply(&format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: client, labels: {{app: client}}}}
spec:
  serviceAccountName: reader
  terminationGracePeriodSeconds: 1
  volumes: [{{name: tool, hostPath: {{path: '{}', type: File}}}}]
  containers:
  - name: c
    image: mesh.local/busybox:1
    command: [/bin/mesh-hello, pause]
    volumeMounts: [{{name: tool, mountPath: /kubectl}}]
",
        program.display()
    ))?;
    kubectl.wait_ready("app=client", 1, PATIENCE)?;
    let name = "jsonpath={.status.userInfo.username}";
    let who = kubectl.run(&inside(&["auth", "whoami", "-o", name]))?;
    ensure!(who == "system:serviceaccount:default:reader", "{who}");
    expect("without a role", &fails(world, &inside(&["get", "pods"]))?, "Forbidden")?;
    kubectl.run(&["annotate", "serviceaccount", "reader", "mesh.dev/role=view"])?;
    expect("pods", &kubectl.run(&inside(&["get", "pods"]))?, "client")?;
    expect("secrets", &fails(world, &inside(&["get", "secrets"]))?, "Forbidden")?;
    expect("nodes", &fails(world, &inside(&["get", "nodes"]))?, "Forbidden")?;
    expect(
        "a watch",
        &kubectl.run(&inside(&["wait", "pod/client", "--for=condition=Ready"]))?,
        "met",
    )?;
    let token = kubectl.run(&["create", "token", "reader", "--duration=10m"])?;
    ensure!(token.split('.').count() == 3, "{token}");
    let describe = kubectl.run(&["describe", "pod", "client"])?;
    expect("describe", &describe, "kube-api-access-")?;
    world.clean(&["pod/client", "serviceaccount/reader"])
}

fn a_container_is_added_with_kubectl_debug(world: &World) -> Result<()> {
    let kubectl = &world.kubectl;
    let pod = world.pods()?.remove(0).name;
    kubectl.run(&[
        "debug",
        &pod,
        "--image=mesh.local/busybox:1",
        "--image-pull-policy=IfNotPresent",
        "--target=web",
        "-c",
        "look",
        "--",
        "/bin/sh",
        "-c",
        "ls -l /proc/[0-9]*/exe; echo looked",
    ])?;
    let log = wait_until("the added container has ended", PATIENCE, || {
        let log = kubectl.run(&["logs", &pod, "-c", "look"])?;
        ensure!(log.contains("looked"), "{log}");
        Ok(log)
    })?;
    expect("the target's processes", &log, "mesh-hello")?;
    expect("describe", &kubectl.run(&["describe", "pod", &pod])?, "Ephemeral Containers")
}

const GUARDED: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: guarded}
spec:
  replicas: 2
  selector: {matchLabels: {app: guarded}}
  template:
    metadata: {labels: {app: guarded}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: hello, image: 'mesh.local/hello:1'}]
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: guarded}
spec: {minAvailable: 2, selector: {matchLabels: {app: guarded}}}
";

fn a_budget_holds_up_a_drain(world: &World) -> Result<()> {
    let kubectl = &world.kubectl;
    let all = ["deployment/guarded", "poddisruptionbudget/guarded"];
    world.clean(&all)?;
    kubectl.apply(GUARDED)?;
    let before = kubectl.wait_ready("app=guarded", 2, PATIENCE)?;
    wait_until("the budget is known", PATIENCE, || {
        expect(
            "get pdb",
            &kubectl.run(&["get", "pdb", "guarded"])?,
            "guarded   2               N/A               0",
        )
    })?;
    let node = before[0]["spec"]["nodeName"].as_str().unwrap_or_default().to_owned();
    let drain = |limit: &str| {
        let args = ["drain", &node, "--pod-selector=app=guarded", limit];
        world.kubectl.command().args(args).stdin(Stdio::null()).output()
    };
    let refused = drain("--timeout=7s");
    let there = kubectl.pods("app=guarded");
    kubectl.run(&[
        "patch",
        "pdb",
        "guarded",
        "--type=merge",
        "-p",
        "{\"spec\":{\"minAvailable\":1}}",
    ])?;
    let drained = drain("--timeout=60s");
    let freed = kubectl.run(&["uncordon", &node]);
    let refused = refused?;
    ensure!(!refused.status.success(), "drained although the budget was used up");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    expect("drain", &said, "violate the pod's disruption budget")?;
    let uids = |pods: &[serde_json::Value]| -> Vec<String> {
        pods.iter().map(|pod| pod["metadata"]["uid"].to_string()).collect()
    };
    ensure!(uids(&there?) == uids(&before), "a pod was evicted all the same");
    let drained = drained?;
    ensure!(drained.status.success(), "{}", String::from_utf8_lossy(&drained.stderr));
    freed?;
    world.clean(&all)
}

fn logs_are_read_in_all_forms(world: &World) -> Result<()> {
    let kubectl = &world.kubectl;
    world.clean(&["pod/talker"])?;
    kubectl.apply(
        "
apiVersion: v1
kind: Pod
metadata: {name: talker, labels: {app: talker}}
spec:
  terminationGracePeriodSeconds: 1
  initContainers:
  - {name: first, image: 'mesh.local/busybox:1', command: [/bin/sh, -c, 'echo from-first']}
  containers:
  - {name: one, image: 'mesh.local/busybox:1', command: [/bin/sh, -c, 'echo old; sleep 5; echo new; exec /bin/mesh-hello pause']}
  - {name: two, image: 'mesh.local/busybox:1', command: [/bin/sh, -c, 'echo from-two; echo why >&2; exec /bin/mesh-hello pause']}
",
    )?;
    kubectl.wait_ready("app=talker", 1, PATIENCE)?;
    let logs = |args: &[&str]| kubectl.run(&[&["logs"], args].concat());
    wait_until("both lines", PATIENCE, || expect("one", &logs(&["talker", "-c", "one"])?, "new"))?;
    let stamped = logs(&["talker", "-c", "one", "--timestamps"])?;
    let stamps: Vec<&str> = stamped.lines().filter_map(|l| l.split(' ').next()).collect();
    ensure!(stamps.len() == 2 && stamps.iter().all(|s| s.starts_with("20")), "{stamped}");
    let since = format!("--since-time={}", stamps[1]);
    for (args, wanted) in [
        (&["talker", "-c", "one", &since][..], "new\n"),
        (&["talker", "-c", "one", "--tail=1"], "new\n"),
        (&["talker", "-c", "one", "--limit-bytes=4"], "old\n"),
        (&["talker", "-c", "one", "--since=1h"], "old\nnew\n"),
        (&["talker", "-c", "first"], "from-first\n"),
    ] {
        let found = logs(args)?;
        ensure!(found == wanted, "{args:?}: {found:?}");
    }
    let all = logs(&["-l", "app=talker", "--all-containers", "--prefix", "--tail=-1"])?;
    for line in ["[pod/talker/first] from-first", "[pod/talker/one] old", "[pod/talker/two] why"] {
        expect("all containers", &all, line)?;
    }
    let why = fails(world, &["logs", "talker", "-c", "one", "--previous"])?;
    expect("previous", &why, "previous terminated container")?;
    world.clean(&["pod/talker"])
}
