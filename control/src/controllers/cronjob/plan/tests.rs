use serde_json::{Value, json};

use super::*;

/// Ten and a half minutes past ten.
const NOW: &str = "2026-01-01T10:10:30Z";

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn cron(spec: Value, status: Value) -> CronJob {
    let mut base = json!({
        "metadata": {"namespace": "d", "name": "c", "uid": "cron", "creationTimestamp": "2026-01-01T09:55:00Z"},
        "spec": {"schedule": "*/5 * * * *", "concurrencyPolicy": "Allow", "suspend": false,
            "successfulJobsHistoryLimit": 3, "failedJobsHistoryLimit": 1,
            "jobTemplate": {"metadata": {"labels": {"a": "b"}, "annotations": {"x": "y"}},
                "spec": {"template": {"spec": {"containers": []}}}}},
        "status": status,
    });
    json_patch::merge(&mut base["spec"], &spec);
    serde_json::from_value(base).unwrap()
}

fn job(name: &str, end: Option<&str>) -> Arc<Job> {
    let conditions: Vec<_> = end
        .iter()
        .map(|type_| json!({"type": type_, "status": "True", "lastTransitionTime": "2026-01-01T10:06:00Z"}))
        .collect();
    let mut status = json!({"conditions": conditions, "startTime": format!("2026-01-01T10:0{}:00Z", &name[1..])});
    if end == Some("Complete") {
        status["completionTime"] = json!(format!("2026-01-01T10:0{}:30Z", &name[1..]));
    }
    Arc::new(
        serde_json::from_value(
            json!({"metadata": {"namespace": "d", "name": name, "uid": name, "annotations": {DUE_AT: ""}}, "status": status}),
        )
        .unwrap(),
    )
}

fn last(text: &str) -> Value {
    json!({"lastScheduleTime": text})
}

fn make(cron: &CronJob, jobs: &[Arc<Job>]) -> Plan {
    plan(cron, jobs, at(NOW))
}

fn due(plan: &Plan) -> Vec<String> {
    let starts = plan.steps.iter().filter_map(|step| match step {
        Step::Start(at, _) => Some(at.to_string()),
        _ => None,
    });
    starts.collect()
}

fn reasons(plan: &Plan) -> Vec<&str> {
    plan.notes.iter().map(|note| note.reason).collect()
}

#[test]
fn only_the_latest_of_what_was_missed_is_started() {
    let plan = make(&cron(json!({}), json!({})), &[]);
    assert_eq!(due(&plan), ["2026-01-01T10:10:00Z"]);
    assert_eq!(plan.look_again, Some(at("2026-01-01T10:11:30Z")), "the clock may step");
    let done = make(&cron(json!({}), last("2026-01-01T10:10:00Z")), &[]);
    assert_eq!((due(&done), reasons(&done)), (vec![], vec![]));
    let soon = plan_at(&cron(json!({}), last("2026-01-01T10:10:00Z")), "2026-01-01T10:14:50Z");
    assert_eq!(soon.look_again, Some(at("2026-01-01T10:15:00Z")));
    let many = make(&cron(json!({}), last("2026-01-01T01:00:00Z")), &[]);
    assert_eq!(
        (due(&many), reasons(&many)),
        (vec!["2026-01-01T10:10:00Z".to_owned()], vec!["TooManyMissedTimes"])
    );
    let paused = make(&cron(json!({"suspend": true}), json!({})), &[]);
    assert_eq!((due(&paused), paused.look_again), (vec![], None));
}

fn plan_at(cron: &CronJob, now: &str) -> Plan {
    plan(cron, &[], at(now))
}

#[test]
fn what_is_too_late_is_not_started() {
    let of =
        |secs: i64| due(&make(&cron(json!({"startingDeadlineSeconds": secs}), json!({})), &[]));
    assert_eq!((of(20), of(31)), (vec![], vec!["2026-01-01T10:10:00Z".to_owned()]));
    let quiet = cron(json!({"startingDeadlineSeconds": 200}), last("2026-01-01T01:00:00Z"));
    assert_eq!(reasons(&make(&quiet, &[])), [""; 0]);
}

#[test]
fn a_clock_that_was_ahead_holds_nothing_up() {
    let ahead = cron(json!({}), last("2027-01-01T00:00:00Z"));
    let plan = make(&ahead, &[]);
    assert_eq!((due(&plan), plan.look_again), (vec![], Some(at("2026-01-01T10:11:30Z"))));
    let right = cron(json!({}), serde_json::to_value(plan.status).unwrap());
    assert_eq!(due(&plan_at(&right, "2026-01-01T10:15:00Z")), ["2026-01-01T10:15:00Z"]);
    // A little: it has been started.
    let little = cron(json!({}), last("2026-01-01T10:10:00Z"));
    let plan = plan_at(&little, "2026-01-01T10:09:59Z");
    assert_eq!(plan.status.last_schedule_time, Some(Time(at("2026-01-01T10:10:00Z"))));
    assert_eq!(due(&plan_at(&little, "2026-01-01T10:10:00Z")), [""; 0]);
}

#[test]
fn the_one_before_may_forbid_the_next_or_go_for_it() {
    let of = |policy: &str, jobs: &[Arc<Job>]| {
        make(&cron(json!({"concurrencyPolicy": policy}), json!({})), jobs)
    };
    let (busy, done) = ([job("j5", None)], [job("j5", Some("Complete"))]);
    assert_eq!(due(&of("Allow", &busy)).len(), 1);
    let forbidden = of("Forbid", &busy);
    assert_eq!((due(&forbidden).len(), reasons(&forbidden)), (0, vec!["JobAlreadyActive"]));
    assert_eq!(due(&of("Forbid", &done)).len(), 1);
    let replaced = of("Replace", &busy);
    assert_eq!((replaced.steps[0].clone(), due(&replaced).len()), (Step::Replace("j5".into()), 1));
    // People made it, and it runs beside the others.
    let by_hand = Arc::new({
        let mut job = (*busy[0]).clone();
        job.metadata.annotations = None;
        job
    });
    for policy in ["Forbid", "Replace"] {
        let plan = of(policy, std::slice::from_ref(&by_hand));
        assert_eq!((plan.steps.len(), due(&plan).len(), plan.status.active), (1, 1, None));
    }
    // It was started, and that was not noted: it does not forbid itself.
    let again = Arc::new({
        let mut job = (*busy[0]).clone();
        job.metadata.name = Some("c-29454370".to_owned());
        job
    });
    for policy in ["Forbid", "Replace"] {
        let plan = of(policy, std::slice::from_ref(&again));
        assert_eq!((plan.steps.len(), due(&plan).len()), (1, 1), "{policy}");
    }
}

#[test]
fn jobs_are_named_after_when_they_were_due() {
    let plan = make(&cron(json!({"timeZone": "UTC"}), json!({})), &[]);
    let Step::Start(_, job) = &plan.steps[0] else { panic!("{plan:?}") };
    let meta = &job.metadata;
    let minutes = at("2026-01-01T10:10:00Z").as_second() / 60;
    assert_eq!(meta.name, Some(format!("c-{minutes}")));
    assert_eq!(minutes, 29_454_370);
    let annotations = meta.annotations.as_ref().unwrap();
    assert_eq!(
        (annotations["x"].as_str(), annotations[DUE_AT].as_str()),
        ("y", "2026-01-01T10:10:00Z")
    );
    assert_eq!(meta.labels.as_ref().unwrap()["a"], "b");
    let owner = objects::controller_of(meta).unwrap();
    assert_eq!((owner.kind.as_str(), owner.uid.as_str()), ("CronJob", "cron"));
    let zone = TimeZone::fixed(jiff::tz::offset(2));
    let local = job_of(&cron(json!({}), json!({})), at("2026-01-01T10:10:00Z"), &zone);
    assert_eq!(local.metadata.annotations.unwrap()[DUE_AT], "2026-01-01T12:10:00+02:00");
}

#[test]
fn what_is_over_is_kept_for_a_while() {
    let names = ["j1", "j2", "j3", "j4"];
    let mut jobs: Vec<_> = names.iter().map(|name| job(name, Some("Complete"))).collect();
    jobs.extend(["j5", "j6"].map(|name| job(name, Some("Failed"))));
    jobs.push(job("j7", None));
    let plan = make(&cron(json!({"suspend": true}), json!({})), &jobs);
    assert_eq!(plan.steps, [Step::Forget("j1".into()), Step::Forget("j5".into())]);
    let active: Vec<_> = plan.status.active.unwrap().into_iter().filter_map(|r| r.name).collect();
    assert_eq!(active, ["j7"]);
    assert_eq!(plan.status.last_successful_time, Some(Time(at("2026-01-01T10:04:30Z"))));
    let later = cron(json!({}), json!({"lastSuccessfulTime": "2026-01-01T10:09:00Z"}));
    assert_eq!(
        make(&later, &jobs).status.last_successful_time,
        Some(Time(at("2026-01-01T10:09:00Z")))
    );
}

#[test]
fn who_cannot_tell_the_time_is_told_so() {
    for (spec, reason) in [
        (json!({"timeZone": "Mars/Base"}), "UnknownTimeZone"),
        (json!({"schedule": "now"}), "UnparseableSchedule"),
    ] {
        let plan = make(&cron(spec, json!({})), &[]);
        assert_eq!((reasons(&plan), due(&plan)), (vec![reason], vec![]));
    }
}
