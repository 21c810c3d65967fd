//! Jobs run to their end, and count what happened once, whoever is stopped in between.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::api::batch::v1::{CronJob, Job, JobStatus};
use k8s_openapi::api::core::v1::{Event, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, Time};
use k8s_openapi::jiff::Timestamp;
use mesh_control::error::ApiError;
use mesh_control::registry::{Part, Registry, WriteOptions};
use serde_json::{Value, json};

use super::harness::{Cluster, object};

const TRACKING: &str = "batch.kubernetes.io/job-tracking";

fn job(name: &str, spec: Value) -> Job {
    let mut job = json!({"metadata": {"namespace": "default", "name": name}, "spec": {"template": {
        "spec": {"restartPolicy": "Never", "containers": [{"name": "main", "image": "one"}]}}}});
    json_patch::merge(&mut job["spec"], &spec);
    object(job)
}

fn status(cluster: &Cluster, name: &str) -> JobStatus {
    cluster.get::<Job>(name).and_then(|job| job.status).unwrap_or_default()
}

fn has(cluster: &Cluster, name: &str, type_: &str) -> bool {
    let conditions = status(cluster, name).conditions.unwrap_or_default();
    conditions.iter().any(|c| c.type_ == type_ && c.status == "True")
}

fn running(registry: &Registry) -> Vec<Pod> {
    let mut pods = registry.list::<Pod>(None).unwrap().items;
    pods.retain(|pod| {
        let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
        phase == Some("Running") && pod.metadata.deletion_timestamp.is_none()
    });
    pods
}

/// Ends a pod as its node would report it. Whether it was still there, and not being deleted.
async fn end(registry: &Registry, pod: &Pod, code: i32) -> bool {
    let name = pod.metadata.name.as_deref().unwrap();
    let state = json!([{"name": "main", "ready": false, "restartCount": 0, "image": "", "imageID": "",
        "state": {"terminated": {"exitCode": code, "finishedAt": "2026-01-01T00:00:00Z"}}}]);
    let options = WriteOptions::default();
    let ended = |old: &Pod| {
        let mut new = old.clone();
        if old.metadata.deletion_timestamp.is_none() {
            let status = new.status.get_or_insert_default();
            status.phase = Some(if code == 0 { "Succeeded" } else { "Failed" }.to_owned());
            status.container_statuses = serde_json::from_value(state.clone()).unwrap();
        }
        Ok(new)
    };
    match registry.modify(Some("default"), name, Part::Status, &options, ended).await {
        Ok(pod) => pod.metadata.deletion_timestamp.is_none(),
        Err(ApiError::NotFound { .. }) => false,
        Err(error) => panic!("{error}"),
    }
}

async fn end_all(cluster: &Cluster, code: i32) {
    for pod in running(&cluster.registry) {
        end(&cluster.registry, &pod, code).await;
    }
}

/// Ends whatever runs until `done`.
async fn work_until(cluster: &Cluster, code: i32, done: impl Fn() -> bool) {
    let begun = std::time::Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{:#?}", cluster.list::<Job>());
        end_all(cluster, code).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn is_tracked(pod: &Pod) -> bool {
    pod.metadata.finalizers.iter().flatten().any(|finalizer| finalizer == TRACKING)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_completes_and_takes_its_pods_along() {
    let cluster = Cluster::start().await;
    let _nodes = cluster.nodes(2).await;
    let three = json!({"completions": 3, "parallelism": 2});
    cluster.registry.create(&job("sum", three.clone())).await.unwrap();
    cluster.eventually("two pods run", || running(&cluster.registry).len() == 2).await;
    cluster.eventually("it says so", || status(&cluster, "sum").ready == Some(2)).await;
    assert!(cluster.list::<Pod>().iter().all(is_tracked));
    assert!(status(&cluster, "sum").start_time.is_some());
    work_until(&cluster, 0, || has(&cluster, "sum", "Complete")).await;
    let told = status(&cluster, "sum");
    assert_eq!((told.succeeded, told.failed, told.active), (Some(3), None, None));
    assert!(told.completion_time.is_some() && told.uncounted_terminated_pods.is_none());
    assert_eq!(cluster.list::<Pod>().len(), 3, "ended pods stay for their logs");
    assert!(!cluster.list::<Pod>().iter().any(is_tracked));
    let reasons =
        || cluster.list::<Event>().into_iter().filter_map(|e| e.reason).collect::<BTreeSet<_>>();
    for expected in ["SuccessfulCreate", "Completed"] {
        cluster.eventually(expected, || reasons().contains(expected)).await;
    }
    cluster.delete::<Job>("sum", "Background").await;
    cluster.eventually("its pods go", || cluster.list::<Pod>().is_empty()).await;

    // In the middle of its work: nothing holds the pods.
    for policy in ["Background", "Foreground"] {
        cluster.registry.create(&job("sum", three.clone())).await.unwrap();
        cluster.eventually("two pods run", || running(&cluster.registry).len() == 2).await;
        cluster.delete::<Job>("sum", policy).await;
        cluster
            .eventually("all gone", || {
                cluster.list::<Pod>().is_empty() && cluster.get::<Job>("sum").is_none()
            })
            .await;
    }
    cluster.registry.create(&job("sum", three)).await.unwrap();
    cluster.eventually("two pods run", || running(&cluster.registry).len() == 2).await;
    cluster.delete::<Job>("sum", "Orphan").await;
    cluster.eventually("it is gone", || cluster.get::<Job>("sum").is_none()).await;
    let free = |pod: &Pod| pod.metadata.owner_references.is_none() && !is_tracked(pod);
    cluster.eventually("pods live on, free", || cluster.list::<Pod>().iter().all(free)).await;
    assert_eq!(running(&cluster.registry).len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_fails_and_stops_what_is_left() {
    let cluster = Cluster::start().await;
    let _nodes = cluster.nodes(2).await;
    let strict = json!({"completions": 3, "parallelism": 3, "backoffLimit": 0});
    cluster.registry.create(&job("bad", strict)).await.unwrap();
    cluster.eventually("three pods run", || running(&cluster.registry).len() == 3).await;
    assert!(end(&cluster.registry, &running(&cluster.registry)[0], 1).await);
    cluster.eventually("it failed", || has(&cluster, "bad", "Failed")).await;
    let told = status(&cluster, "bad");
    assert_eq!((told.failed, told.terminating, told.active), (Some(3), Some(0), None));
    let failed = told.conditions.unwrap().into_iter().find(|c| c.type_ == "Failed").unwrap();
    assert_eq!(failed.reason.as_deref(), Some("BackoffLimitExceeded"));
    assert_eq!(cluster.list::<Pod>().len(), 1, "the one that failed tells why");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ends_that_nobody_saw_count() {
    let mut cluster = Cluster::start().await;
    let _nodes = cluster.nodes(1).await;
    let two = json!({"completions": 2, "parallelism": 2, "backoffLimit": 9});
    cluster.registry.create(&job("sum", two)).await.unwrap();
    cluster.eventually("two pods run", || running(&cluster.registry).len() == 2).await;
    cluster.stop_controllers().await;
    let pods = running(&cluster.registry);
    assert!(end(&cluster.registry, &pods[0], 0).await);
    for pod in &pods {
        // One has succeeded, the other one still runs.
        let name = pod.metadata.name.as_deref().unwrap();
        let options = DeleteOptions::default();
        cluster.registry.delete::<Pod>(Some("default"), name, &options).await.unwrap();
    }
    assert_eq!(cluster.list::<Pod>().len(), 2, "held until they are counted");
    cluster.start_controllers();
    cluster
        .eventually("both counted", || {
            let told = status(&cluster, "sum");
            (told.succeeded, told.failed) == (Some(1), Some(1))
        })
        .await;
    work_until(&cluster, 0, || has(&cluster, "sum", "Complete")).await;
    assert_eq!(status(&cluster, "sum").succeeded, Some(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarts_in_the_middle_count_nothing_twice() {
    let mut cluster = Cluster::start().await;
    let _nodes = cluster.nodes(3).await;
    let many = json!({"completions": 40, "parallelism": 8, "backoffLimit": 1000});
    cluster.registry.create(&job("sum", many)).await.unwrap();
    let registry = cluster.registry.clone();
    let worker = tokio::spawn(async move {
        let mut ended = BTreeMap::from([(0, 0), (1, 0)]);
        let mut turn = 0;
        loop {
            for pod in running(&registry) {
                turn += 1;
                // Failures would hold the Job back: the first ones only.
                let code = i32::from(turn <= 3);
                if end(&registry, &pod, code).await {
                    *ended.get_mut(&code).unwrap() += 1;
                }
            }
            let job: Job = registry.get(Some("default"), "sum").unwrap();
            if job.status.is_some_and(|status| status.completion_time.is_some()) {
                return ended;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_millis(60)).await;
        cluster.stop_controllers().await;
        cluster.start_controllers();
    }
    cluster.eventually("complete", || has(&cluster, "sum", "Complete")).await;
    let ended = worker.await.unwrap();
    let told = status(&cluster, "sum");
    assert_eq!((told.succeeded, told.failed), (Some(40), Some(3)));
    assert_eq!((ended[&0], ended[&1]), (40, 3), "no pod more than was needed");
    assert_eq!(cluster.list::<Pod>().len(), 43);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_job_has_no_pods_and_goes_on_later() {
    let cluster = Cluster::start().await;
    let _nodes = cluster.nodes(1).await;
    let two = json!({"completions": 2, "parallelism": 2, "suspend": true});
    cluster.registry.create(&job("sum", two)).await.unwrap();
    cluster.eventually("paused", || has(&cluster, "sum", "Suspended")).await;
    assert!(cluster.list::<Pod>().is_empty() && status(&cluster, "sum").start_time.is_none());
    let pause = |is: bool| move |job: &mut Job| job.spec.as_mut().unwrap().suspend = Some(is);
    cluster.edit::<Job>("sum", pause(false)).await;
    cluster.eventually("two pods run", || running(&cluster.registry).len() == 2).await;
    cluster.edit::<Job>("sum", pause(true)).await;
    cluster.eventually("no pods", || cluster.list::<Pod>().is_empty()).await;
    assert_eq!(status(&cluster, "sum").failed, None, "they failed nobody");
    cluster.edit::<Job>("sum", pause(false)).await;
    work_until(&cluster, 0, || has(&cluster, "sum", "Complete")).await;
    assert_eq!(status(&cluster, "sum").succeeded, Some(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_index_succeeds_once_and_an_old_job_goes_by_itself() {
    let cluster = Cluster::start().await;
    let _nodes = cluster.nodes(2).await;
    let each = json!({"completionMode": "Indexed", "completions": 5, "parallelism": 2});
    cluster.registry.create(&job("each", each)).await.unwrap();
    work_until(&cluster, 0, || has(&cluster, "each", "Complete")).await;
    assert_eq!(status(&cluster, "each").completed_indexes.as_deref(), Some("0-4"));
    let hosts: Vec<_> =
        cluster.list::<Pod>().into_iter().filter_map(|pod| pod.spec?.hostname).collect();
    assert_eq!(hosts.len(), 5);
    assert_eq!(hosts.into_iter().collect::<BTreeSet<_>>().len(), 5);
    cluster
        .edit::<Job>("each", |job| {
            job.spec.as_mut().unwrap().ttl_seconds_after_finished = Some(0);
        })
        .await;
    let gone = || cluster.get::<Job>("each").is_none() && cluster.list::<Pod>().is_empty();
    cluster.eventually("its time is up", gone).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_with_a_selector_of_its_own_adopts_what_it_selects() {
    let cluster = Cluster::start().await;
    let _nodes = cluster.nodes(1).await;
    let free = |name: &str, app: &str| {
        object::<Pod>(
            json!({"metadata": {"namespace": "default", "name": name, "labels": {"app": app}, "finalizers": [TRACKING]},
            "spec": {"restartPolicy": "Never", "containers": [{"name": "main", "image": "one"}]}}),
        )
    };
    let by_hand = json!({"manualSelector": true, "selector": {"matchLabels": {"app": "sum"}}, "suspend": true,
        "template": {"metadata": {"labels": {"app": "sum"}}}});
    cluster.registry.create(&job("sum", by_hand)).await.unwrap();
    cluster.eventually("paused", || has(&cluster, "sum", "Suspended")).await;
    cluster.edit::<Job>("sum", |job| job.spec.as_mut().unwrap().suspend = Some(false)).await;
    cluster.eventually("its pod", || running(&cluster.registry).len() == 1).await;
    cluster.registry.create(&free("stranger", "other")).await.unwrap();
    let tracked = |name: &str| cluster.get::<Pod>(name).is_some_and(|pod| is_tracked(&pod));
    cluster.eventually("nobody counts it", || !tracked("stranger")).await;
    cluster.registry.create(&free("found", "sum")).await.unwrap();
    // One pod is enough: the younger one goes.
    cluster.eventually("one pod again", || cluster.list::<Pod>().len() == 2).await;
    work_until(&cluster, 0, || has(&cluster, "sum", "Complete")).await;
    assert_eq!(status(&cluster, "sum").succeeded, Some(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cron_job_starts_each_job_once_and_takes_all_along() {
    let mut cluster = Cluster::start().await;
    let _nodes = cluster.nodes(1).await;
    cluster.stop_controllers().await;
    let template = job("unused", json!({})).spec.unwrap();
    let cron: CronJob = object(json!({"metadata": {"namespace": "default", "name": "tick"},
        "spec": {"schedule": "* * * * *", "jobTemplate": {"spec": template}}}));
    let mut cron = cluster.registry.create(&cron).await.unwrap();
    let begun = Timestamp::now();
    let hour_ago = begun.checked_sub(Duration::from_secs(3600)).unwrap();
    cron.status.get_or_insert_default().last_schedule_time = Some(Time(hour_ago));
    cluster.registry.update_status(&cron).await.unwrap();
    cluster.start_controllers();
    cluster.eventually("one that was missed", || !cluster.list::<Job>().is_empty()).await;
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(40)).await;
        cluster.stop_controllers().await;
        cluster.start_controllers();
    }
    let minutes = |at: Timestamp| at.as_second().div_euclid(60);
    let possible: Vec<String> =
        (minutes(begun)..=minutes(Timestamp::now())).map(|n| format!("tick-{n}")).collect();
    let jobs = cluster.list::<Job>();
    assert!(jobs.len() <= possible.len(), "{possible:?} {}", jobs.len());
    for job in &jobs {
        assert!(possible.contains(job.metadata.name.as_ref().unwrap()), "{possible:?}");
    }
    let told = || cluster.get::<CronJob>("tick").and_then(|cron| cron.status).unwrap_or_default();
    cluster.eventually("it says so", || told().active.is_some_and(|a| a.len() == jobs.len())).await;
    work_until(&cluster, 0, || told().last_successful_time.is_some()).await;
    cluster.delete::<CronJob>("tick", "Background").await;
    let gone = || cluster.list::<Job>().is_empty() && cluster.list::<Pod>().is_empty();
    cluster.eventually("all gone", gone).await;
}
