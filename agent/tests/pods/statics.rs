//! Pods that a file of the node makes run.

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
        assert_eq!(rig.logs(&runner, "web-node-1/c").await, (200, "one\n".to_owned()));

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
