//! What pods use, measured by the runtime.

use axum::body::Body;
use axum::http::Request;
use http_body_util::BodyExt as _;
use mesh_model::report::UsageReport;
use tower::ServiceExt as _;

use crate::image::BUSYBOX;
use crate::machine;

#[test]
fn a_busy_container_is_seen_to_be_busy() {
    machine::run("usage::a_busy_container_is_seen_to_be_busy", async |rig| {
        let spec = serde_json::json!({"terminationGracePeriodSeconds": 0, "containers": [
            {"name": "busy", "image": BUSYBOX, "command": ["sh", "-c", "while true; do :; done"],
                "resources": {"limits": {"cpu": "200m"}}},
            {"name": "idle", "image": BUSYBOX, "command": ["sleep", "1000"]}]});
        rig.api.apply("p", spec);
        let runner = rig.runner();
        rig.until(&runner, "it runs", |api| api.is_ready("p")).await;
        let request = Request::get("/mesh/v1/usage").body(Body::empty()).unwrap();
        let answer = runner.router().oneshot(request).await.unwrap();
        assert_eq!(answer.status(), 200);
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        let report: UsageReport = serde_json::from_slice(&body).unwrap();
        assert!(report.window_ms >= 1000 && report.node.memory_bytes > 1 << 20, "{report:?}");
        let [pod] = report.pods.as_slice() else { panic!("{report:?}") };
        assert_eq!((pod.namespace.as_str(), pod.name.as_str()), ("test", "p"));
        let (busy, idle) = (pod.containers["busy"], pod.containers["idle"]);
        assert!(busy.cpu_nano_cores > 10_000_000, "{busy:?}");
        assert!(busy.cpu_nano_cores > 5 * idle.cpu_nano_cores, "{busy:?} {idle:?}");
        assert!(busy.memory_bytes > 0 && idle.memory_bytes > 0, "{busy:?} {idle:?}");
    });
}
