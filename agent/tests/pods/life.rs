//! A pod's life: start, readiness, logs, another agent, another containerd, the end.

use crate::api::is_ready;
use crate::image::BUSYBOX;
use crate::machine;

fn web() -> serde_json::Value {
    serde_json::json!({
        "terminationGracePeriodSeconds": 20,
        "initContainers": [
            {"name": "prepare", "image": BUSYBOX, "command": ["sh", "-c", "echo prepared > /shared/note"],
             "volumeMounts": [{"name": "shared", "mountPath": "/shared"}]},
            {"name": "side", "image": BUSYBOX, "restartPolicy": "Always",
             "command": ["sh", "-c", "trap 'exit 0' TERM; echo side; while true; do sleep 0.1; done"]}
        ],
        "containers": [{
            "name": "web", "image": BUSYBOX,
            "command": ["sh", "-c"],
            "args": ["trap 'echo bye; exit 0' TERM; echo $(GREETING) $WEB_SERVICE_HOST; cat /shared/note; grep $POD_IP /etc/hosts; cat /etc/resolv.conf; httpd -p 8080 -h /www; while true; do sleep 0.1; done"],
            "env": [
                {"name": "COLOR", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "color"}}},
                {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "GREETING", "value": "hello $(COLOR)"}
            ],
            "ports": [{"name": "http", "containerPort": 8080}],
            "volumeMounts": [{"name": "shared", "mountPath": "/shared"}, {"name": "www", "mountPath": "/www"}],
            "readinessProbe": {"httpGet": {"path": "/healthz", "port": "http"}, "periodSeconds": 1, "failureThreshold": 1},
            "livenessProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1, "initialDelaySeconds": 1}
        }],
        "volumes": [{"name": "shared", "emptyDir": {"medium": "Memory"}}, {"name": "www", "configMap": {"name": "site"}}]
    })
}

#[test]
fn a_pod_lives_through_restarts_of_agent_and_runtime() {
    machine::run("life::a_pod_lives_through_restarts_of_agent_and_runtime", async |mut rig| {
        let api = rig.api.clone();
        api.config_map("settings", &[("color", "green")]);
        api.config_map("site", &[("index.html", "hi")]);
        api.apply("web", web());
        let runner = rig.runner();
        rig.until(&runner, "web runs", |api| api.phase("web") == "Running").await;
        let status = api.status("web");
        assert!(!is_ready(&status), "there is no /healthz yet");
        assert!(
            status.pod_ip.as_deref().is_some_and(|ip| ip.starts_with("10.88.0.")),
            "{status:?}"
        );
        assert_eq!(status.qos_class.as_deref(), Some("BestEffort"));

        rig.until(&runner, "the probe failed once", |api| {
            api.reasons("web").contains(&"Unhealthy")
        })
        .await;

        // The file appears in the running container, all at once, and the probe sees it.
        api.config_map("site", &[("index.html", "hi"), ("healthz", "ok")]);
        rig.until(&runner, "web is ready", |api| api.is_ready("web")).await;

        let (code, log) = rig.logs(&runner, "web/web").await;
        let lines: Vec<&str> = log.lines().collect();
        let ip = status.pod_ip.unwrap();
        assert_eq!(code, 200);
        assert_eq!(lines[..2], ["hello green 10.96.0.9", "prepared"], "{log}");
        assert!(lines[2].starts_with(&ip) && lines[2].ends_with("web"), "{log}");
        assert!(
            log.contains("nameserver 10.96.0.10")
                && log.contains("search test.svc.cluster.local svc.cluster.local cluster.local"),
            "{log}"
        );
        assert!(log.contains("options ndots:5"), "{log}");
        let (_, tail) = rig.logs(&runner, "web/web?tailLines=1&timestamps=true").await;
        assert!(tail.starts_with("20") && tail.ends_with("options ndots:5\n"), "{tail}");
        assert_eq!(rig.logs(&runner, "web/nope").await.0, 400);
        assert_eq!(rig.logs(&runner, "nope/nope").await.0, 404);
        assert_eq!(rig.logs(&runner, "web/web?previous=true").await.0, 400);

        // Another agent takes over: nothing restarts, nothing becomes unready.
        let before = rig.everything().await;
        let reports = api.read(|state| state.history.len());
        let started = || api.reasons("web").iter().filter(|r| **r == "Started").count();
        let starts = started();
        drop(runner);
        let runner = rig.runner();
        api.apply(
            "other",
            serde_json::json!({"restartPolicy": "Never", "containers": [
            {"name": "c", "image": BUSYBOX, "command": ["true"]}]}),
        );
        rig.until(&runner, "the new agent works", |api| api.phase("other") == "Succeeded").await;
        let now = rig.everything().await;
        assert!(before.iter().all(|id| now.contains(id)), "{before:?} {now:?}");
        assert_eq!(started(), starts);

        // So does another containerd.
        rig.kill_containerd();
        rig.start_containerd().await;
        api.apply(
            "third",
            serde_json::json!({"restartPolicy": "Never", "containers": [
            {"name": "c", "image": BUSYBOX, "command": ["true"]}]}),
        );
        rig.until(&runner, "the new containerd works", |api| api.phase("third") == "Succeeded")
            .await;
        let now = rig.everything().await;
        assert!(before.iter().all(|id| now.contains(id)), "{before:?} {now:?}");
        assert_eq!(started(), starts);
        let unready = api.read(|state| {
            state.history[reports..]
                .iter()
                .filter(|(name, s)| name == "web" && !is_ready(s))
                .count()
        });
        assert_eq!(unready, 0, "web was reported unready during the restarts");

        // A graceful end, confirmed when nothing is left. A follower of the log reads the last word.
        let follow = rig.logs(&runner, "web/web?follow=true&tailLines=0");
        api.delete("web");
        let gone = rig.until(&runner, "web is gone", |api| {
            api.read(|s| s.deleted.contains(&"web".to_owned()))
        });
        let ((code, last), ()) = tokio::join!(follow, gone);
        assert_eq!((code, last.as_str()), (200, "bye\n"));
        let last = api.read(|state| {
            state.history.iter().rev().find(|(name, _)| name == "web").map(|(_, s)| s.clone())
        });
        let last = last.unwrap();
        assert_eq!(last.phase.as_deref(), Some("Succeeded"));
        let ended = last.container_statuses.unwrap()[0].state.clone().unwrap().terminated;
        assert_eq!(ended.map(|t| (t.exit_code, t.reason)), Some((0, Some("Completed".to_owned()))));
        for path in ["agent/pods/uid-web", "run/pods/uid-web", "log/test_web_uid-web"] {
            assert!(!rig.path(path).exists(), "{path}");
        }

        // What the API forgot is removed as well.
        api.with(|state| state.pods.clear());
        runner.set_desired(api.work());
        rig.nothing_is_left().await;
    });
}
