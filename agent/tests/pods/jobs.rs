//! Pods that end, and what containers are allowed.

use crate::image::BUSYBOX;
use crate::machine;

fn job(container: serde_json::Value) -> serde_json::Value {
    let mut container = container;
    container["name"] = "c".into();
    container["image"] = BUSYBOX.into();
    serde_json::json!({"restartPolicy": "Never", "containers": [container]})
}

fn shell(script: &str) -> serde_json::Value {
    serde_json::json!({"command": ["sh", "-c", script]})
}

#[test]
fn ended_pods_keep_their_outcome() {
    machine::run("jobs::ended_pods_keep_their_outcome", async |rig| {
        let api = rig.api.clone();
        api.apply("good", job(shell("echo done; echo last words > /dev/termination-log")));
        let mut bad = shell("echo why >&2; exit 7");
        bad["terminationMessagePolicy"] = "FallbackToLogsOnError".into();
        api.apply("bad", job(bad));
        let mut slow = job(shell("sleep 1000"));
        slow["activeDeadlineSeconds"] = 2.into();
        slow["terminationGracePeriodSeconds"] = 0.into();
        api.apply("slow", slow);
        let mut retry = job(shell("test -e /v/x && exit 0; touch /v/x; exit 1"));
        retry["restartPolicy"] = "OnFailure".into();
        retry["volumes"] = serde_json::json!([{"name": "v", "emptyDir": {}}]);
        retry["containers"][0]["volumeMounts"] =
            serde_json::json!([{"name": "v", "mountPath": "/v", "subPath": "deep/er"}]);
        api.apply("retry", retry);
        let mut locked = shell(
            "id -u; id -g; grep CapEff /proc/self/status; grep -E 'NoNewPrivs|Seccomp:' /proc/self/status; touch /x 2>/dev/null || echo read-only; cat /v/token; hostname",
        );
        locked["securityContext"] = serde_json::json!({"runAsUser": 1000, "runAsGroup": 3000, "readOnlyRootFilesystem": true,
            "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}});
        locked["volumeMounts"] = serde_json::json!([{"name": "v", "mountPath": "/v"}]);
        let mut locked = job(locked);
        locked["hostname"] = "inside".into();
        locked["volumes"] = serde_json::json!([{"name": "v", "secret": {"secretName": "keys"}}]);
        api.with(|state| {
            state
                .secrets
                .insert("keys".to_owned(), [("token".to_owned(), b"s3cret\n".to_vec())].into())
        });
        api.apply("locked", locked);
        api.apply("host", {
            let mut spec = job(shell("ip -o addr show dev lo | head -n 1; hostname"));
            spec["hostNetwork"] = true.into();
            spec
        });
        let runner = rig.runner();

        for (name, phase) in [
            ("good", "Succeeded"),
            ("bad", "Failed"),
            ("slow", "Failed"),
            ("retry", "Succeeded"),
            ("locked", "Succeeded"),
            ("host", "Succeeded"),
        ] {
            rig.until(&runner, &format!("{name} is {phase}"), |api| api.phase(name) == phase).await;
        }
        let ended = |name: &str| api.ended(name).unwrap_or_default();
        assert_eq!(ended("good"), ("Completed".to_owned(), 0, "last words\n".to_owned()));
        assert_eq!(ended("bad"), ("Error".to_owned(), 7, "why\n".to_owned()));
        assert_eq!(api.status("slow").reason.as_deref(), Some("DeadlineExceeded"));
        assert_eq!(api.container("retry").map(|c| c.restart_count), Some(1));
        assert_eq!(api.container("good").map(|c| c.restart_count), Some(0));

        let (_, log) = rig.logs(&runner, "locked/c").await;
        let lines: Vec<String> = log.lines().map(|l| l.replace('\t', " ")).collect();
        let identity = ["1000", "3000", "CapEff: 0000000000000000", "NoNewPrivs: 1", "Seccomp: 2"];
        assert_eq!(lines[..5], identity, "{log}");
        assert_eq!(lines[5..], ["read-only", "s3cret", "inside"], "{log}");
        let volume = |folder: &str| rig.path(folder).join("pods/uid-locked/volumes/v");
        assert!(!volume("agent").exists(), "Secrets are never on disk");
        rig.until(&runner, "volumes of ended pods are gone", |_| !volume("run").exists()).await;
        let (_, log) = rig.logs(&runner, "host/c").await;
        assert!(log.contains("127.0.0.1/8"), "{log}");
        assert_eq!(api.status("host").pod_ip.as_deref(), Some("127.0.0.1"));

        // Ended pods give their network back and keep their logs, also under the next agent.
        rig.until(&runner, "networks are given back", |_| rig.addresses() == 0).await;
        let started = api.read(|s| s.events.iter().filter(|e| e.reason == "Started").count());
        drop(runner);
        let runner = rig.runner();
        api.apply("later", job(shell("true")));
        rig.until(&runner, "the new agent works", |api| api.phase("later") == "Succeeded").await;
        let now = api.read(|s| s.events.iter().filter(|e| e.reason == "Started").count());
        assert_eq!(now, started + 1, "nothing that has ended runs again");
        assert_eq!(rig.logs(&runner, "good/c").await, (200, "done\n".to_owned()));
    });
}
