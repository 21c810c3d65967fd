//! Tokens of service accounts, as a program in a pod finds them.

use std::time::{Duration, Instant};

use crate::image::BUSYBOX;
use crate::machine;

const MOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

fn client() -> serde_json::Value {
    serde_json::json!({
        "serviceAccountName": "web", "terminationGracePeriodSeconds": 0,
        "containers": [{
            "name": "c", "image": BUSYBOX,
            "command": ["sh", "-c", format!("while true; do cat {MOUNT}/token {MOUNT}/namespace; echo; sleep 0.1; done")],
            "volumeMounts": [{"name": "api", "mountPath": MOUNT, "readOnly": true}]}],
        "volumes": [{"name": "api", "projected": {"sources": [
            {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
            {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}}]}}]
    })
}

#[test]
fn a_pod_finds_its_token_and_gets_a_new_one_in_time() {
    machine::run("accounts::a_pod_finds_its_token_and_gets_a_new_one_in_time", async |mut rig| {
        let api = rig.api.clone();
        api.with(|state| state.token_secs = 5);
        api.apply("p", client());
        let mut runner = rig.runner();
        rig.until(&runner, "the pod runs", |api| api.is_ready("p")).await;
        let begun = Instant::now();
        let seen = async |rig: &crate::rig::Rig, runner: &_, text: &str| loop {
            let (_, log) = rig.logs(runner, "p/c?tailLines=5").await;
            if log.contains(text) {
                return;
            }
            assert!(begun.elapsed() < Duration::from_secs(90), "{text} is not in {log}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        seen(&rig, &runner, "web/p/1test").await;
        // At four fifths of its life the file changes under the running container.
        seen(&rig, &runner, "web/p/2test").await;
        assert_eq!(api.container("p").map(|c| c.restart_count), Some(0));

        // The control service is away, the token has ended, the machine is switched off and on: the pod comes back.
        api.with(|state| (state.tokens_are_refused, state.token_secs) = (true, 3600));
        let before = rig.everything().await;
        drop(runner);
        rig.reboot().await;
        runner = rig.runner();
        rig.until(&runner, "the pod runs again", |api| {
            let id = api.container("p").and_then(|c| c.container_id).unwrap_or_default();
            api.is_ready("p") && !before.iter().any(|old| id.ends_with(old.as_str()))
        })
        .await;
        drop(runner);

        // An agent that finds the API again renews what is over.
        let issued = api.read(|state| state.tokens);
        api.with(|state| state.tokens_are_refused = false);
        let runner = rig.runner();
        seen(&rig, &runner, &format!("web/p/{}test", issued + 1)).await;
        assert!(!rig.path("agent/pods/uid-p/volumes").join("api").exists(), "not on disk");
        api.delete("p");
        rig.until(&runner, "nothing is left", |api| api.read(|s| s.pods.is_empty())).await;
        assert!(!rig.path("agent/pods/uid-p").exists());
    });
}
