//! Containers that reach their memory limit.

use crate::image::BUSYBOX;
use crate::machine;

/// Takes far more than it may, at once.
const EAT: &str = "exec dd if=/dev/zero of=/dev/null bs=200M";

fn container(name: &str, script: &str) -> serde_json::Value {
    serde_json::json!({"name": name, "image": BUSYBOX, "command": ["sh", "-c", script],
        "resources": {"limits": {"memory": "24Mi"}}})
}

#[test]
fn a_kill_for_memory_is_told_from_a_failure() {
    machine::run("memory::a_kill_for_memory_is_told_from_a_failure", async |rig| {
        let api = rig.api.clone();
        let names: Vec<String> = (0..4).map(|n| format!("pair-{n}")).collect();
        for name in &names {
            // The same code from both; only the kernel knows the difference.
            let containers = [container("eater", EAT), container("liar", "exit 137")];
            api.apply(
                name,
                serde_json::json!({"restartPolicy": "Never", "containers": containers}),
            );
        }
        let mut later = serde_json::json!({"restartPolicy": "Never", "containers": [
            container("c", &format!("until test -e /v/go; do sleep 0.05; done; {EAT}"))]});
        later["volumes"] = serde_json::json!([{"name": "v", "emptyDir": {}}]);
        later["containers"][0]["volumeMounts"] =
            serde_json::json!([{"name": "v", "mountPath": "/v"}]);
        api.apply("later", later);
        let runner = rig.runner();
        rig.until(&runner, "all pairs have ended", |api| {
            names.iter().all(|name| api.phase(name) == "Failed")
        })
        .await;
        let killed =
            Some(("OOMKilled".to_owned(), 137, "killed at its memory limit of 24Mi".to_owned()));
        let failed = Some(("Error".to_owned(), 137, String::new()));
        for name in &names {
            assert_eq!(
                [api.ended_of(name, 0), api.ended_of(name, 1)],
                [killed.clone(), failed.clone()]
            );
        }

        // An agent that did not start the container hears of its end, too.
        rig.until(&runner, "the last pod runs", |api| api.phase("later") == "Running").await;
        drop(runner);
        let runner = rig.runner();
        while rig.logs(&runner, "later/c").await.0 != 200 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        std::fs::write(rig.path("agent/pods/uid-later/volumes/v/go"), "").unwrap();
        rig.until(&runner, "it has ended", |api| api.phase("later") == "Failed").await;
        assert_eq!(api.ended("later"), killed);
    });
}
