//! Hooks, in real containers.

use crate::image::BUSYBOX;
use crate::machine;

fn pod(container: serde_json::Value) -> serde_json::Value {
    let mut container = container;
    container["name"] = "c".into();
    container["image"] = BUSYBOX.into();
    serde_json::json!({"terminationGracePeriodSeconds": 20, "containers": [container],
        "volumes": [{"name": "v", "hostPath": {"path": "/run/rig/notes", "type": "DirectoryOrCreate"}}]})
}

fn shell(script: &str) -> serde_json::Value {
    serde_json::json!({"exec": {"command": ["sh", "-c", script]}})
}

fn container(script: &str) -> serde_json::Value {
    serde_json::json!({"command": ["sh", "-c", script],
        "volumeMounts": [{"name": "v", "mountPath": "/notes"}]})
}

#[test]
fn hooks_run_at_their_time() {
    machine::run("hooks::hooks_run_at_their_time", async |rig| {
        let api = rig.api.clone();
        let mut good = container(
            "trap 'echo term >> /notes/good; exit 0' TERM; echo main >> /notes/good; while true; do sleep 0.1; done",
        );
        good["lifecycle"] = serde_json::json!({"postStart": shell("sleep 0.5; echo begun >> /notes/good"),
            "preStop": shell("echo leaving >> /notes/good; sleep 0.5")});
        api.apply("good", pod(good));
        let mut bad = container("sleep 1000");
        bad["lifecycle"] = serde_json::json!({"postStart": shell("exit 9"),
            "preStop": shell("echo leaving >> /notes/bad")});
        api.apply("bad", pod(bad));
        let mut slow =
            container("trap 'touch /notes/slow-end; exit 0' TERM; while true; do sleep 0.1; done");
        slow["lifecycle"] = serde_json::json!({"preStop": {"sleep": {"seconds": 2}}});
        api.apply("slow", pod(slow));
        let runner = rig.runner();
        rig.until(&runner, "good and slow run", |api| api.is_ready("good") && api.is_ready("slow"))
            .await;
        rig.until(&runner, "the failed hook is told, and its container runs again", |api| {
            api.reasons("bad").contains(&"FailedPostStartHook")
                && api.container("bad").is_some_and(|c| c.restart_count > 0)
        })
        .await;
        let notes =
            |name: &str| std::fs::read_to_string(rig.path("notes").join(name)).unwrap_or_default();
        assert!(notes("bad").starts_with("leaving\n"), "whoever ends, it is asked first");
        let asked = std::time::SystemTime::now();
        for name in ["good", "bad", "slow"] {
            api.delete(name);
        }
        rig.until(&runner, "all are gone", |api| api.read(|s| s.pods.is_empty())).await;
        assert_eq!(notes("good"), "main\nbegun\nleaving\nterm\n");
        let ended = std::fs::metadata(rig.path("notes/slow-end")).unwrap().modified().unwrap();
        let waited = ended.duration_since(asked).unwrap();
        assert!(waited.as_secs() >= 2, "the signal comes after the sleep: {waited:?}");
        rig.nothing_is_left().await;
    });
}
