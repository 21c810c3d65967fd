//! Pods that cannot start or do not stay up.

use crate::image::BUSYBOX;
use crate::machine;

fn one(container: serde_json::Value) -> serde_json::Value {
    let mut container = container;
    container["name"] = "c".into();
    if container.get("image").is_none() {
        container["image"] = BUSYBOX.into();
    }
    serde_json::json!({"containers": [container], "terminationGracePeriodSeconds": 1})
}

#[test]
fn failures_are_named_and_tried_again() {
    machine::run("failures::failures_are_named_and_tried_again", async |rig| {
        let api = rig.api.clone();
        api.apply("crash", one(serde_json::json!({"command": ["sh", "-c", "echo run; exit 3"]})));
        api.apply("no-image", one(serde_json::json!({"image": "localhost:1/nope:1"})));
        api.apply("typo", one(serde_json::json!({"image": "mesh.test/Nope:1"})));
        api.apply(
            "never",
            one(serde_json::json!({"image": "mesh.test/nope:1", "imagePullPolicy": "Never"})),
        );
        api.apply(
            "no-config",
            one(serde_json::json!({"command": ["sleep", "1000"],
            "envFrom": [{"configMapRef": {"name": "late"}}]})),
        );
        api.apply("no-volume", {
            let mut spec = one(serde_json::json!({"command": ["sleep", "1000"]}));
            spec["volumes"] = serde_json::json!([{"name": "v", "configMap": {"name": "late"}}]);
            spec
        });
        api.apply("no-command", one(serde_json::json!({"command": ["/no/such/program"]})));
        api.apply("root", one(serde_json::json!({"securityContext": {"runAsNonRoot": true}})));
        api.apply("sick", one(serde_json::json!({
            "command": ["sh", "-c", "touch /tmp/ok; sleep 2; rm /tmp/ok; sleep 1000"],
            "livenessProbe": {"exec": {"command": ["test", "-e", "/tmp/ok"]}, "periodSeconds": 1, "failureThreshold": 2}})));
        api.apply("unprepared", {
            let mut spec = one(serde_json::json!({"command": ["sleep", "1000"]}));
            spec["initContainers"] = serde_json::json!([
                {"name": "prepare", "image": BUSYBOX, "command": ["sh", "-c", "exit 4"]}]);
            spec
        });
        let runner = rig.runner();

        rig.until(&runner, "crash loops", |api| api.waiting("crash") == "CrashLoopBackOff").await;
        assert_eq!(
            api.ended("crash").map(|(reason, code, _)| (reason, code)),
            Some(("Error".to_owned(), 3))
        );
        assert_eq!(api.phase("crash"), "Running");
        assert!(api.container("crash").is_some_and(|c| c.restart_count >= 1));
        rig.until(&runner, "the back-off has an event", |api| {
            api.reasons("crash").contains(&"BackOff")
        })
        .await;
        assert_eq!(rig.logs(&runner, "crash/c?previous=true").await, (200, "run\n".to_owned()));

        rig.until(&runner, "the image is missed", |api| {
            api.waiting("no-image") == "ImagePullBackOff"
        })
        .await;
        let was_named = api.read(|state| {
            let reason = |s: &k8s_openapi::api::core::v1::PodStatus| {
                s.container_statuses
                    .as_ref()?
                    .first()?
                    .state
                    .as_ref()?
                    .waiting
                    .as_ref()?
                    .reason
                    .clone()
            };
            state
                .history
                .iter()
                .any(|(name, s)| name == "no-image" && reason(s).as_deref() == Some("ErrImagePull"))
        });
        assert!(was_named);
        assert_eq!(api.phase("no-image"), "Pending");
        for reason in ["Pulling", "Failed", "BackOff"] {
            assert!(api.reasons("no-image").contains(&reason), "{:?}", api.reasons("no-image"));
        }
        let (code, message) = rig.logs(&runner, "no-image/c").await;
        assert_eq!(code, 400, "{message}");
        rig.until(&runner, "never pulled", |api| api.waiting("never") == "ErrImageNeverPull").await;
        rig.until(&runner, "no image", |api| api.waiting("typo") == "InvalidImageName").await;
        rig.until(&runner, "the variable is missed", |api| {
            api.waiting("no-config") == "CreateContainerConfigError"
        })
        .await;
        rig.until(&runner, "root is refused", |api| {
            api.waiting("root") == "CreateContainerConfigError"
        })
        .await;
        rig.until(&runner, "the volume is missed", |api| {
            api.reasons("no-volume").contains(&"FailedMount")
        })
        .await;
        rig.until(&runner, "the program is missed", |api| {
            api.waiting("no-command") == "CrashLoopBackOff"
        })
        .await;

        rig.until(&runner, "the failed preparation has an event", |api| {
            api.reasons("unprepared").contains(&"BackOff")
        })
        .await;
        assert_eq!(api.phase("unprepared"), "Pending");
        assert_eq!(api.waiting("unprepared"), "PodInitializing");

        // What was missing appears: no back-off is waited for.
        api.config_map("late", &[("KEY", "value")]);
        rig.until(&runner, "both run", |api| {
            api.phase("no-config") == "Running" && api.phase("no-volume") == "Running"
        })
        .await;

        rig.until(&runner, "sick is restarted", |api| {
            api.container("sick").is_some_and(|c| c.restart_count >= 1 && c.ready)
        })
        .await;
        assert!(
            api.reasons("sick").contains(&"Unhealthy") && api.reasons("sick").contains(&"Killing")
        );

        // A pod whose image never came can still be deleted.
        for name in ["no-image", "crash", "sick"] {
            api.delete(name);
        }
        rig.until(&runner, "all are deleted", |api| api.read(|s| s.deleted.len() == 3)).await;
    });
}
