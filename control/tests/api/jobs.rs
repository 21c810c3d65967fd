use http::Method;
use serde_json::{Value, json};

use super::support::*;

const JOBS: &str = "/apis/batch/v1/namespaces/default/jobs";
const CRON_JOBS: &str = "/apis/batch/v1/namespaces/default/cronjobs";

fn spec() -> Value {
    json!({"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}})
}

async fn row(control: &Control, path: &str) -> Value {
    let table =
        send_accepting(&control.client, Method::GET, path, JSON, TABLE, Vec::new()).await.body;
    table["rows"][0]["cells"].clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_is_made_runs_and_is_shown() {
    let control = Control::start().await;
    let created =
        control.create(JOBS, json!({"metadata": {"generateName": "sum-"}, "spec": spec()})).await;
    let name = created["metadata"]["name"].as_str().unwrap();
    let labels = &created["spec"]["template"]["metadata"]["labels"];
    assert_eq!(labels["batch.kubernetes.io/job-name"], name, "the name was chosen by the service");
    assert_eq!(labels["controller-uid"], created["metadata"]["uid"]);
    let path = format!("{JOBS}/{name}");
    assert_eq!(row(&control, &path).await[1], "Running");

    let own = format!("{PODS}?labelSelector=job-name%3D{name}");
    let has_one = |list: &Answer| list.body["items"].as_array().unwrap().len() == 1;
    let pods = until(&control, &own, has_one).await;
    let mut pod = pods["items"][0].clone();
    assert_eq!(pod["metadata"]["finalizers"], json!(["batch.kubernetes.io/job-tracking"]));
    pod["status"] = json!({"phase": "Succeeded"});
    let pod_path = format!("{PODS}/{}", pod["metadata"]["name"].as_str().unwrap());
    pod["metadata"]["resourceVersion"] = Value::Null;
    assert_eq!(control.put(&format!("{pod_path}/status"), &pod).await.code, 200);
    until(&control, &path, |job| job.body["status"]["completionTime"].is_string()).await;
    let cells = row(&control, &path).await;
    assert_eq!((&cells[1], &cells[2]), (&json!("Complete"), &json!("1/1")));
    let succeeded = control.get(&format!("{JOBS}?fieldSelector=status.successful%3D1")).await.body;
    assert_eq!(succeeded["items"].as_array().unwrap().len(), 1);

    let changed = control.patch(&path, MERGE, json!({"spec": {"completions": 2}})).await;
    assert_eq!(changed.code, 422);
    assert!(
        changed.body["message"]
            .as_str()
            .unwrap()
            .contains("spec.completions: Invalid value: 2: field is immutable"),
        "{}",
        changed.body
    );
    let deleted = control.delete(&format!("{path}?propagationPolicy=Background")).await;
    assert_eq!(deleted.code, 200);
    until(&control, &own, |list| list.body["items"].as_array().unwrap().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_served_of_jobs_is_refused_by_name() {
    let control = Control::start().await;
    for (part, field) in [
        (json!({"managedBy": "a.example/b"}), "spec.managedBy: Forbidden"),
        (
            json!({"template": {"spec": {"restartPolicy": "Always"}}}),
            "spec.template.spec.restartPolicy: Required value",
        ),
    ] {
        let mut spec = spec();
        json_patch::merge(&mut spec, &part);
        let refused = control.post(JOBS, json!({"metadata": {"name": "j"}, "spec": spec})).await;
        assert_eq!(refused.code, 422);
        assert!(refused.body["message"].as_str().unwrap().contains(field), "{}", refused.body);
    }
    let cron = json!({"metadata": {"name": "c"}, "spec": {"schedule": "61 * * * *", "jobTemplate": {"spec": spec()}}});
    let refused = control.post(CRON_JOBS, cron).await;
    assert!(
        refused.body["message"].as_str().unwrap().contains("spec.schedule: Invalid value"),
        "{}",
        refused.body
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_is_made_from_a_cron_job() {
    let control = Control::start().await;
    let cron = json!({"metadata": {"name": "nightly"},
        "spec": {"schedule": "0 0 1 1 *", "timeZone": "UTC", "jobTemplate": {"spec": spec()}}});
    let cron = control.create(CRON_JOBS, cron).await;
    assert_eq!(cron["spec"]["concurrencyPolicy"], "Allow");
    let path = format!("{CRON_JOBS}/nightly");
    let cells = row(&control, &path).await;
    assert_eq!(
        (&cells[1], &cells[2], &cells[3]),
        (&json!("0 0 1 1 *"), &json!("UTC"), &json!("False"))
    );
    // As `kubectl create job now --from=cronjob/nightly` does.
    let owner = json!({"apiVersion": "batch/v1", "kind": "CronJob", "name": "nightly", "uid": cron["metadata"]["uid"],
        "controller": true, "blockOwnerDeletion": true});
    let job = json!({"metadata": {"name": "now", "annotations": {"cronjob.kubernetes.io/instantiate": "manual"},
        "ownerReferences": [owner]}, "spec": cron["spec"]["jobTemplate"]["spec"]});
    control.create(JOBS, job).await;
    let runs = |job: &Answer| job.body["status"]["active"] == 1;
    until(&control, &format!("{JOBS}/now"), runs).await;
    assert_eq!(row(&control, &path).await[4], 0, "the schedule did not make it");

    let group = control.get("/apis/batch/v1").await.body;
    let resources = group["resources"].as_array().unwrap();
    let named = |name: &str| resources.iter().find(|r| r["name"] == name).unwrap();
    assert_eq!(named("cronjobs")["shortNames"], json!(["cj"]));
    assert_eq!(named("jobs")["categories"], json!(["all"]));
    assert_eq!(named("jobs/status")["kind"], "Job");
    assert_eq!(control.delete(&path).await.code, 200);
    until(&control, JOBS, |list| list.body["items"].as_array().unwrap().is_empty()).await;
}
