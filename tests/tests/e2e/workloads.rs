//! Jobs, CronJobs, DaemonSets and StatefulSets, as kubectl sees them.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use mesh_tests::command::wait_until;

use crate::tests;
use crate::world::{PATIENCE, World, expect};

tests![
    jobs_run_to_their_end_though_the_control_service_is_killed,
    a_job_is_made_from_a_cron_job,
    a_daemon_set_has_a_pod_on_each_node,
    a_stateful_set_gives_names_that_stay,
];

const PARTS: [&str; 6] = ["part 0", "part 1", "part 2", "part 3", "part 4", "part 5"];
const INDEXED: &str = "
apiVersion: batch/v1
kind: Job
metadata: {name: parts}
spec:
  completions: 6
  parallelism: 2
  completionMode: Indexed
  template:
    spec:
      restartPolicy: Never
      containers:
      - name: part
        image: 'mesh.local/busybox:1'
        command: [/bin/sh, -c, 'echo part $JOB_COMPLETION_INDEX; sleep 1']
---
apiVersion: batch/v1
kind: Job
metadata: {name: broken}
spec:
  backoffLimit: 0
  template:
    spec:
      restartPolicy: Never
      containers: [{name: c, image: 'mesh.local/busybox:1', command: [/bin/sh, -c, 'exit 3']}]
";

fn jobs_run_to_their_end_though_the_control_service_is_killed(world: &World) -> Result<()> {
    let kubectl = &world.kubectl;
    world.clean(&["job/parts", "job/broken"])?;
    kubectl.apply(INDEXED)?;
    wait_until("the first parts are done", PATIENCE, || {
        let done = kubectl.json(&["job", "parts"])?["status"]["succeeded"].as_i64();
        ensure!(done.is_some_and(|done| done >= 1), "{done:?}");
        Ok(())
    })?;
    world.cluster.control().kill()?;
    world.cluster.restart_control(&world.artifacts)?;
    kubectl.run(&["wait", "--for=condition=complete", "job/parts", "--timeout=60s"])?;
    let status = &kubectl.json(&["job", "parts"])?["status"];
    ensure!(status["succeeded"] == 6 && status["failed"].is_null(), "{status}");
    ensure!(status["completedIndexes"] == "0-5", "{status}");
    let said = kubectl.run(&["logs", "-l", "job-name=parts"])?;
    let parts: BTreeSet<&str> = said.lines().collect();
    ensure!(parts == PARTS.into(), "{said}");
    kubectl.run(&["wait", "--for=condition=failed", "job/broken", "--timeout=60s"])?;
    let describe = kubectl.run(&["describe", "job", "broken"])?;
    expect("describe", &describe, "BackoffLimitExceeded")?;
    // Its pods have a finalizer until their ends are counted, and go with it.
    world.clean(&["job/parts", "job/broken"])?;
    wait_until("their pods are gone", PATIENCE, || {
        let left = kubectl.pods("job-name in (parts,broken)")?;
        ensure!(left.is_empty(), "{} are left", left.len());
        Ok(())
    })
}

fn a_job_is_made_from_a_cron_job(world: &World) -> Result<()> {
    let kubectl = &world.kubectl;
    world.clean(&["cronjob/yearly", "job/now"])?;
    let image = "--image=mesh.local/busybox:1";
    kubectl.run(&["create", "cronjob", "yearly", image, "--schedule=@yearly", "--", "true"])?;
    kubectl.run(&["create", "job", "now", "--from=cronjob/yearly"])?;
    kubectl.run(&["wait", "--for=condition=complete", "job/now", "--timeout=60s"])?;
    world.clean(&["cronjob/yearly"])?;
    wait_until("its Job goes with it", PATIENCE, || {
        let left = kubectl.run(&["get", "jobs", "-o", "name"])?;
        ensure!(!left.contains("job.batch/now"), "{left}");
        Ok(())
    })
}

const DAEMONS: &str = "
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: watcher}
spec:
  selector: {matchLabels: {app: watcher}}
  template:
    metadata: {labels: {app: watcher}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: c, image: 'mesh.local/hello:1'}]
";

fn a_daemon_set_has_a_pod_on_each_node(world: &World) -> Result<()> {
    let kubectl = &world.kubectl;
    world.clean(&["daemonset/watcher"])?;
    kubectl.apply(DAEMONS)?;
    let rolled_out =
        || kubectl.run(&["rollout", "status", "daemonset/watcher", "--timeout=60s"]).map(drop);
    rolled_out()?;
    let seen = || -> Result<(usize, BTreeSet<String>, String)> {
        let pods = kubectl.wait_ready("app=watcher", world.cluster.nodes().len(), PATIENCE)?;
        let node = |pod: &serde_json::Value| pod["spec"]["nodeName"].as_str().map(str::to_owned);
        let image = pods[0]["spec"]["containers"][0]["image"].as_str().unwrap_or_default();
        Ok((pods.len(), pods.iter().filter_map(node).collect(), image.to_owned()))
    };
    let (count, nodes, _) = seen()?;
    ensure!(count == world.cluster.nodes().len() && nodes.len() == count, "{nodes:?}");
    kubectl.run(&["set", "image", "daemonset/watcher", "c=mesh.local/hello:2"])?;
    rolled_out()?;
    ensure!(seen()?.2.ends_with(":2"));
    kubectl.run(&["rollout", "undo", "daemonset/watcher"])?;
    rolled_out()?;
    ensure!(seen()?.2.ends_with(":1"));
    world.clean(&["daemonset/watcher"])
}

const NAMED: &str = "
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {clusterIP: None, selector: {app: db}, ports: [{port: 8080}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec:
  serviceName: db
  replicas: 2
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: c, image: 'mesh.local/hello:1'}]
";

fn a_stateful_set_gives_names_that_stay(world: &World) -> Result<()> {
    let kubectl = &world.kubectl;
    world.clean(&["statefulset/db", "service/db"])?;
    kubectl.apply(NAMED)?;
    kubectl.run(&["rollout", "status", "statefulset/db", "--timeout=60s"])?;
    let client = world.pods()?.remove(0);
    let is_found = || {
        let pod = kubectl.json(&["pod", "db-1"])?;
        let address = pod["status"]["podIP"].as_str().unwrap_or_default().to_owned();
        ensure!(!address.is_empty(), "it has no address");
        let name = "db-1.db.default.svc.cluster.local";
        expect("its name", &client.exec(&["/bin/nslookup", name])?, &address)?;
        Ok(pod["metadata"]["uid"].clone())
    };
    let before = wait_until("db-1 has its name", PATIENCE, is_found)?;
    kubectl.run(&["delete", "pod", "db-1"])?;
    wait_until("another db-1 has it", PATIENCE, || {
        let now = is_found()?;
        ensure!(now != before, "it is the same pod");
        Ok(())
    })?;
    kubectl.run(&["scale", "statefulset/db", "--replicas=1"])?;
    wait_until("the last one goes", PATIENCE, || {
        let left = kubectl.run(&["get", "pods", "-l", "app=db", "-o", "name"])?;
        ensure!(left.trim() == "pod/db-0", "{left}");
        Ok(())
    })?;
    world.clean(&["statefulset/db", "service/db"])
}
