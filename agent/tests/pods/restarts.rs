//! Agents that are killed at any moment, nodes that lose power, and many pods at once.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::api::is_ready;
use crate::image::BUSYBOX;
use crate::machine;
use crate::rig::Rig;

const SERVE: &str = "trap 'exit 0' TERM; while true; do sleep 0.1; done";

fn server() -> serde_json::Value {
    serde_json::json!({"terminationGracePeriodSeconds": 5, "containers": [
        {"name": "c", "image": BUSYBOX, "command": ["sh", "-c", SERVE]}]})
}

fn names(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("pod-{n}")).collect()
}

async fn all_run(rig: &Rig, runner: &mesh_agent::pods::Runner, names: &[String]) {
    rig.until(runner, "all pods are ready", |api| names.iter().all(|n| api.is_ready(n))).await;
}

/// Running containers of each pod.
async fn running(rig: &Rig) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for container in rig.client.list_containers(Default::default()).await.unwrap() {
        if container.state() == mesh_cri::v1::ContainerState::Running {
            *counts.entry(container.labels["io.kubernetes.pod.name"].clone()).or_default() += 1;
        }
    }
    counts
}

#[test]
fn an_agent_may_die_at_any_moment() {
    machine::run("restarts::an_agent_may_die_at_any_moment", async |rig| {
        let names = names(4);
        for name in &names {
            rig.api.apply(name, server());
        }
        // Each agent gets a little further than the one before.
        for moment in 0..12 {
            let runner = rig.runner();
            tokio::time::sleep(Duration::from_millis(60 * moment)).await;
            drop(runner);
        }
        let runner = rig.runner();
        all_run(&rig, &runner, &names).await;
        let counts = running(&rig).await;
        assert!(names.iter().all(|n| counts.get(n) == Some(&1)), "{counts:?}");
        // An agent that lived on would not hear of the deletions, and would start the pods again.
        drop(runner);
        for name in &names {
            rig.api.delete(name);
        }
        for moment in 0..8 {
            let runner = rig.runner();
            tokio::time::sleep(Duration::from_millis(60 * moment)).await;
            drop(runner);
        }
        let runner = rig.runner();
        rig.until(&runner, "all are gone", |api| api.read(|s| s.pods.is_empty())).await;
        rig.nothing_is_left().await;
    });
}

#[test]
fn pods_come_back_after_a_power_failure() {
    machine::run("restarts::pods_come_back_after_a_power_failure", async |mut rig| {
        let names = names(3);
        for name in &names {
            rig.api.apply(name, server());
        }
        let job = serde_json::json!({"restartPolicy": "Never", "containers": [
            {"name": "c", "image": BUSYBOX, "command": ["sh", "-c", "echo once"]}]});
        rig.api.apply("job", job);
        let runner = rig.runner();
        all_run(&rig, &runner, &names).await;
        rig.until(&runner, "the job has ended", |api| api.phase("job") == "Succeeded").await;
        let before: Vec<_> =
            names.iter().map(|n| rig.api.container(n).unwrap().container_id).collect();
        drop(runner);
        rig.reboot().await;

        // The new agent has only what was saved: the pods as they were known before.
        let runner = rig.runner();
        rig.until(&runner, "all pods run again", |api| {
            names
                .iter()
                .all(|n| api.is_ready(n) && api.container(n).is_some_and(|c| c.restart_count == 1))
        })
        .await;
        let after: Vec<_> =
            names.iter().map(|n| rig.api.container(n).unwrap().container_id).collect();
        assert!(before.iter().zip(&after).all(|(a, b)| a != b));
        assert_eq!(rig.api.phase("job"), "Succeeded");
        assert_eq!(rig.logs(&runner, "job/c").await, (200, "once\n".to_owned()));
        rig.until(&runner, "old networks are given back", |_| rig.addresses() == names.len()).await;
    });
}

#[test]
fn a_runtime_that_is_away_fails_no_probe() {
    machine::run("restarts::a_runtime_that_is_away_fails_no_probe", async |mut rig| {
        let api = rig.api.clone();
        let probe = serde_json::json!({"exec": {"command": ["true"]}, "periodSeconds": 1, "failureThreshold": 1,
            "timeoutSeconds": 30});
        let mut asked = server();
        asked["containers"][0]["readinessProbe"] = probe.clone();
        asked["containers"][0]["livenessProbe"] = probe;
        api.apply("asked", asked);
        let runner = rig.runner();
        rig.until(&runner, "it is ready", |api| api.is_ready("asked")).await;
        let reports = api.read(|state| state.history.len());
        rig.kill_containerd();
        // Some questions that nobody passes on.
        tokio::time::sleep(Duration::from_secs(3)).await;
        rig.start_containerd().await;
        // The runner knows the new one.
        api.apply("other", server());
        rig.until(&runner, "another pod is ready", |api| api.is_ready("other")).await;
        assert_eq!(api.container("asked").map(|c| (c.ready, c.restart_count)), Some((true, 0)));
        let unready = api.read(|state| {
            let later = state.history[reports..].iter();
            later.filter(|(name, status)| name == "asked" && !is_ready(status)).count()
        });
        assert_eq!((unready, api.reasons("asked").contains(&"Unhealthy")), (0, false));
    });
}

#[test]
fn many_pods_leave_nothing() {
    machine::run("restarts::many_pods_leave_nothing", async |rig| {
        let names = names(20);
        let runner = rig.runner();
        for name in &names {
            rig.api.apply(name, server());
        }
        let begun = Instant::now();
        all_run(&rig, &runner, &names).await;
        eprintln!("{} pods ready after {:?}", names.len(), begun.elapsed());
        for name in &names {
            rig.api.delete(name);
        }
        let begun = Instant::now();
        rig.until(&runner, "all are gone", |api| api.read(|s| s.pods.is_empty())).await;
        eprintln!("{} pods deleted after {:?}", names.len(), begun.elapsed());
        rig.nothing_is_left().await;
        for folder in ["log", "agent/pods", "run/pods"] {
            let left: Vec<_> = std::fs::read_dir(rig.path(folder)).unwrap().flatten().collect();
            assert!(left.is_empty(), "{left:?}");
        }
    });
}

#[test]
fn a_node_that_leaves_keeps_nothing_of_its_pods() {
    machine::run("restarts::a_node_that_leaves_keeps_nothing_of_its_pods", async |rig| {
        let names = names(3);
        for name in &names {
            let mut pod = server();
            pod["volumes"] = serde_json::json!([{"name": "m", "emptyDir": {"medium": "Memory"}}]);
            pod["containers"][0]["volumeMounts"] =
                serde_json::json!([{"name": "m", "mountPath": "/m"}]);
            rig.api.apply(name, pod);
        }
        let runner = rig.runner();
        all_run(&rig, &runner, &names).await;
        drop(runner);
        assert_eq!(rig.removal().run().await, (names.len(), vec![]));
        assert_eq!((rig.everything().await, rig.addresses()), (vec![], 0));
        assert!(!rig.path("agent/pods").exists() && !rig.path("run/pods").exists());
        assert_eq!(std::fs::read_dir(rig.path("log")).unwrap().count(), 0);
        assert!(!rig.path("containers").exists(), "links to logs");
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let ours = |line: &&str| line.contains("/run/rig/agent") || line.contains("/run/rig/run");
        assert_eq!(mounts.lines().filter(ours).count(), 0, "{mounts}");
        assert_eq!(rig.removal().run().await, (0, vec![]), "once more");
    });
}
