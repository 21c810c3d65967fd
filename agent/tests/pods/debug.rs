//! Containers that are added to a running pod.

use crate::image::BUSYBOX;
use crate::machine;

#[test]
fn an_added_container_sees_the_processes_of_its_target() {
    machine::run("debug::an_added_container_sees_the_processes_of_its_target", async |rig| {
        let api = rig.api.clone();
        api.apply(
            "p",
            serde_json::json!({"terminationGracePeriodSeconds": 0, "containers": [
                {"name": "c", "image": BUSYBOX, "command": ["sleep", "4242"]},
                {"name": "other", "image": BUSYBOX, "command": ["sleep", "2323"]}]}),
        );
        let runner = rig.runner();
        rig.until(&runner, "the pod runs", |api| api.is_ready("p")).await;
        let before = rig.everything().await;
        let added = |name: &str, target: Option<&str>, script: &str| {
            let container = serde_json::json!({"name": name, "image": BUSYBOX,
                "targetContainerName": target, "command": ["sh", "-c", script]});
            let container = serde_json::from_value(container).unwrap();
            api.with(|state| {
                let spec = state.pods.get_mut("p").unwrap().spec.as_mut().unwrap();
                spec.ephemeral_containers.get_or_insert_default().push(container);
            });
        };
        let state_of = |name: &str| {
            let all = api.status("p").ephemeral_container_statuses.unwrap_or_default();
            all.into_iter().find(|c| c.name == name)
        };
        let ended = |name: &str| state_of(name)?.state?.terminated.map(|t| t.exit_code);
        added("near", Some("c"), "ps; ip -o addr show dev eth0; exit 3");
        rig.until(&runner, "it has ended", |_| ended("near") == Some(3)).await;
        let (code, log) = rig.logs(&runner, "p/near").await;
        assert_eq!(code, 200, "{log}");
        assert!(log.contains("sleep 4242") && !log.contains("sleep 2323"), "{log}");
        let ip = api.status("p").pod_ip.unwrap();
        assert!(log.contains(&ip), "the pod's network: {log}");

        added("apart", None, "ps; sleep 1000");
        rig.until(&runner, "it runs", |_| {
            state_of("apart").is_some_and(|c| c.state.is_some_and(|s| s.running.is_some()))
        })
        .await;
        let (_, log) = rig.logs(&runner, "p/apart").await;
        assert!(!log.contains("sleep 4242"), "{log}");
        added("lost", Some("nobody"), "true");
        rig.until(&runner, "it says what is missing", |_| {
            let waiting = state_of("lost").and_then(|c| c.state).and_then(|s| s.waiting);
            waiting.is_some_and(|w| w.message.unwrap_or_default().contains("\"nobody\""))
        })
        .await;

        // The pod is what it was, and nothing runs twice, also under another agent.
        let status = api.status("p");
        assert!(crate::api::is_ready(&status) && status.phase.as_deref() == Some("Running"));
        assert!(status.container_statuses.unwrap().iter().all(|c| c.restart_count == 0));
        drop(runner);
        let with_two: Vec<String> = rig.everything().await;
        assert_eq!(with_two.len(), before.len() + 2);
        let runner = rig.runner();
        api.apply("q", serde_json::json!({"restartPolicy": "Never", "containers": [{"name": "c", "image": BUSYBOX, "command": ["true"]}]}));
        rig.until(&runner, "the new agent works", |api| api.phase("q") == "Succeeded").await;
        let now = rig.everything().await;
        assert!(with_two.iter().all(|id| now.contains(id)), "nothing was made again");
        assert_eq!(ended("near"), Some(3));
        api.delete("p");
        api.delete("q");
        rig.until(&runner, "all is gone", |api| api.read(|s| s.pods.is_empty())).await;
        rig.nothing_is_left().await;
    });
}
