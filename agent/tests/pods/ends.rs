//! How long a pod that is deleted may take to end.

use crate::image::BUSYBOX;
use crate::machine;

/// Longer than any test waits.
const LONG_SECS: u64 = 600;

fn deaf(lifecycle: serde_json::Value) -> serde_json::Value {
    serde_json::json!({"terminationGracePeriodSeconds": LONG_SECS, "containers": [
        {"name": "c", "image": BUSYBOX, "command": ["sleep", "1000"], "lifecycle": lifecycle}]})
}

#[test]
fn a_pod_that_does_not_end_is_ended_by_a_second_deletion() {
    machine::run("ends::a_pod_that_does_not_end_is_ended_by_a_second_deletion", async |rig| {
        let api = rig.api.clone();
        // Process 1 of a container does not hear signals that it has no handler for.
        api.apply("deaf", deaf(serde_json::json!({})));
        let sleep = serde_json::json!({"sleep": {"seconds": LONG_SECS}});
        api.apply("busy", deaf(serde_json::json!({"preStop": sleep})));
        let runner = rig.runner();
        let pods = ["deaf", "busy"];
        rig.until(&runner, "both run", |api| pods.iter().all(|pod| api.is_ready(pod))).await;
        pods.iter().for_each(|pod| api.delete(pod));
        rig.until(&runner, "both are asked to stop", |api| {
            pods.iter().all(|pod| api.reasons(pod).contains(&"Killing"))
        })
        .await;
        pods.iter().for_each(|pod| api.delete_within(pod, Some(1)));
        rig.until(&runner, "both are gone", |api| api.read(|state| state.pods.is_empty())).await;
        rig.nothing_is_left().await;
    });
}
