//! Pods that take more than they may.

use crate::image::BUSYBOX;
use crate::machine;

#[test]
fn a_volume_above_its_limit_ends_its_pod_and_is_deleted() {
    machine::run("evictions::a_volume_above_its_limit_ends_its_pod_and_is_deleted", async |rig| {
        let spec = |size: &str, script: &str| {
            serde_json::json!({"terminationGracePeriodSeconds": 30,
                "volumes": [{"name": "v", "emptyDir": {"sizeLimit": size}}],
                "containers": [{"name": "c", "image": BUSYBOX, "command": ["sh", "-c", script],
                    "volumeMounts": [{"name": "v", "mountPath": "/v"}]}]})
        };
        let fill = "echo filling; head -c 3000000 /dev/zero > /v/file; exec sleep 1000";
        rig.api.apply("modest", spec("10Mi", fill));
        rig.api.apply("greedy", spec("1Mi", fill));
        let runner = rig.runner();
        rig.until(&runner, "it is evicted", |api| api.phase("greedy") == "Failed").await;
        let status = rig.api.read(|state| state.pods["greedy"].status.clone().unwrap());
        assert_eq!(status.reason.as_deref(), Some("Evicted"));
        let why = status.message.unwrap();
        let no_fault = status.conditions.iter().flatten().find(|c| c.type_ == "DisruptionTarget");
        assert_eq!(no_fault.and_then(|c| c.message.as_deref()), Some(why.as_str()));
        assert_eq!(why, "Usage of EmptyDir volume \"v\" exceeds the limit \"1Mi\".");
        rig.until(&runner, "it is told", |api| {
            api.read(|s| s.events.iter().any(|e| e.reason == "Evicted" && e.message == why))
        })
        .await;
        // It takes its grace to end, and then its container is not shown as if it ran on.
        rig.until(&runner, "its container has ended", |api| {
            api.ended("greedy").is_some_and(|(reason, code, _)| reason == "Error" && code == 137)
        })
        .await;
        let status = rig.api.status("greedy");
        assert_eq!(status.message.as_deref(), Some(why.as_str()), "the rest of it stays");
        assert!(status.pod_ip.is_some(), "{status:?}");
        let uid = rig.api.read(|state| state.pods["greedy"].metadata.uid.clone().unwrap());
        let volumes = rig.path("agent/pods").join(uid).join("volumes");
        rig.until(&runner, "its volume is gone", |_| !volumes.exists()).await;
        assert_eq!(rig.logs(&runner, "greedy/c").await, (200, "filling\n".to_owned()));
        assert!(rig.api.is_ready("modest"), "the other one stays");
    });
}
