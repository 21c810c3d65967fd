//! Pods that a file of the node makes run.

use std::path::Path;

use crate::image::BUSYBOX;
use crate::machine;

fn manifest(word: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: web, namespace: test, labels: {{app: web}}}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: {BUSYBOX}
    command: [sh, -c, 'echo {word}; exec sleep 1000']
"
    )
}

#[test]
fn a_file_runs_a_pod_that_the_api_shows() {
    machine::run("statics::a_file_runs_a_pod_that_the_api_shows", async |rig| {
        let directory = rig.path("static");
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("web.yaml"), manifest("one")).unwrap();
        // Nobody has told this runner what the API has: the control service is away.
        let runner = rig.runner_without_api();
        rig.until_running("web-node-1", 1).await;
        drop(runner);
        let before = rig.everything().await;

        let runner = rig.runner();
        rig.until(&runner, "the API shows it", |api| api.is_ready("web-node-1")).await;
        assert_eq!(rig.everything().await, before, "another agent restarts nothing");
        let mirror = rig.api.read(|state| state.pods["web-node-1"].clone());
        assert!(mirror.metadata.annotations.unwrap().contains_key("kubernetes.io/config.mirror"));
        assert_eq!(mirror.metadata.uid.as_deref(), Some("mirror-of-web-node-1"));
        rig.until_said(&runner, "web-node-1/c", "one\n").await;

        rig.api.delete("web-node-1");
        let back = |api: &crate::api::Api| {
            let deleted = api.read(|s| s.deleted.iter().any(|name| name == "web-node-1"));
            deleted && api.is_ready("web-node-1")
        };
        rig.until(&runner, "a deleted mirror comes back", back).await;
        assert_eq!(rig.everything().await, before, "and is only a mirror");

        std::fs::write(directory.join("web.yaml"), manifest("another")).unwrap();
        rig.until(&runner, "the new version runs", |api| {
            api.container("web-node-1").is_some_and(|c| {
                let id = c.container_id.unwrap_or_default();
                !before.iter().any(|old| id.ends_with(old.as_str())) && c.ready
            })
        })
        .await;
        std::fs::remove_file(directory.join("web.yaml")).unwrap();
        rig.until(&runner, "its mirror is gone", |api| api.read(|s| s.pods.is_empty())).await;
        rig.nothing_is_left().await;
    });
}

/// A pod that takes three seconds to end, and writes down when it begins and ends.
fn slow(word: &str, shared: &Path) -> String {
    let script = format!(
        "echo {word} began >> /v/log; trap 'sleep 3; echo {word} ended >> /v/log; exit 0' TERM; sleep 1000 & wait"
    );
    serde_json::json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "namespace": "test"},
        "spec": {"terminationGracePeriodSeconds": 30,
            "volumes": [{"name": "v", "hostPath": {"path": shared}}],
            "containers": [{"name": "c", "image": BUSYBOX, "command": ["sh", "-c", script],
                "volumeMounts": [{"name": "v", "mountPath": "/v"}]}]}})
    .to_string()
}

#[test]
fn a_file_that_changes_or_comes_back_waits_for_the_end_of_its_pod() {
    machine::run(
        "statics::a_file_that_changes_or_comes_back_waits_for_the_end_of_its_pod",
        async |rig| {
            let (directory, shared) = (rig.path("static"), rig.path("shared"));
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::create_dir_all(&shared).unwrap();
            let file = directory.join("web.json");
            let said = || std::fs::read_to_string(shared.join("log")).unwrap_or_default();
            std::fs::write(&file, slow("one", &shared)).unwrap();
            let runner = rig.runner();
            rig.until(&runner, "it runs", |_| said() == "one began\n").await;

            std::fs::write(&file, slow("two", &shared)).unwrap();
            rig.until(&runner, "the new version runs", |_| said().contains("two began")).await;
            assert_eq!(said(), "one began\none ended\ntwo began\n");
            rig.until(&runner, "the API shows it", |api| api.is_ready("web-node-1")).await;

            std::fs::remove_file(&file).unwrap();
            rig.until(&runner, "its mirror is gone", |api| api.read(|s| s.pods.is_empty())).await;
            std::fs::write(&file, slow("two", &shared)).unwrap();
            let again = "one began\none ended\ntwo began\ntwo ended\ntwo began\n";
            rig.until(&runner, "it runs anew", |_| said() == again).await;
            rig.until(&runner, "the API shows it", |api| api.is_ready("web-node-1")).await;
            let container = rig.api.container("web-node-1").unwrap();
            assert_eq!(container.restart_count, 0, "it is not the pod that was being taken down");

            // A runner that starts after a change finds the old version running.
            drop(runner);
            std::fs::write(&file, slow("three", &shared)).unwrap();
            let runner = rig.runner();
            rig.until(&runner, "the newest runs", |_| said().ends_with("three began\n")).await;
            assert_eq!(said(), format!("{again}two ended\nthree began\n"));
            std::fs::remove_file(&file).unwrap();
            rig.until(&runner, "its mirror is gone", |api| api.read(|s| s.pods.is_empty())).await;
            rig.nothing_is_left().await;
        },
    );
}

#[test]
fn without_a_control_service_the_pod_of_a_file_ends_with_it() {
    machine::run(
        "statics::without_a_control_service_the_pod_of_a_file_ends_with_it",
        async |rig| {
            let directory = rig.path("static");
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(directory.join("web.yaml"), manifest("one")).unwrap();
            let _runner = rig.runner_without_api();
            rig.until_running("web-node-1", 1).await;
            std::fs::remove_file(directory.join("web.yaml")).unwrap();
            rig.nothing_is_left().await;
        },
    );
}
