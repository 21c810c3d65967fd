//! The columns of Jobs and CronJobs.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{AGE, Column, age, containers, count, number, or_none, selector, text, wide};

pub(super) fn job() -> Vec<Column> {
    vec![
        text("Status", |o, _| json!(state(o))),
        text("Completions", |o, _| json!(completions(o))),
        text("Duration", |o, now| json!(duration(o, now))),
        AGE,
        wide("Containers", |o, _| containers(o, "name")),
        wide("Images", |o, _| containers(o, "image")),
        wide("Selector", |o, _| selector(&o["spec"]["selector"])),
    ]
}

pub(super) fn cron_job() -> Vec<Column> {
    vec![
        text("Schedule", |o, _| o["spec"]["schedule"].clone()),
        text("Timezone", |o, _| or_none(&o["spec"]["timeZone"])),
        text("Suspend", |o, _| json!(if o["spec"]["suspend"] == true { "True" } else { "False" })),
        number("Active", |o, _| json!(o["status"]["active"].as_array().map_or(0, Vec::len))),
        text("Last Schedule", |o, now| match &o["status"]["lastScheduleTime"] {
            Value::Null => json!("<none>"),
            at => json!(age(at, now)),
        }),
        AGE,
        wide("Containers", |o, _| containers(&o["spec"]["jobTemplate"], "name")),
        wide("Images", |o, _| containers(&o["spec"]["jobTemplate"], "image")),
        wide("Selector", |o, _| selector(&o["spec"]["jobTemplate"]["spec"]["selector"])),
    ]
}

fn state(job: &Value) -> &'static str {
    let is = |type_: &str| {
        let conditions = job["status"]["conditions"].as_array().into_iter().flatten();
        conditions.into_iter().any(|c| c["type"] == type_ && c["status"] == "True")
    };
    if let Some(end) = ["Complete", "Failed"].into_iter().find(|type_| is(type_)) {
        return end;
    }
    if job["metadata"]["deletionTimestamp"].is_string() {
        return "Terminating";
    }
    let found =
        ["Suspended", "FailureTarget", "SuccessCriteriaMet"].into_iter().find(|type_| is(type_));
    found.unwrap_or("Running")
}

fn completions(job: &Value) -> String {
    let succeeded = count(&job["status"]["succeeded"]);
    match (&job["spec"]["completions"], count(&job["spec"]["parallelism"])) {
        (Value::Null, 0 | 1) => format!("{succeeded}/1"),
        (Value::Null, parallelism) => format!("{succeeded}/1 of {parallelism}"),
        (completions, _) => format!("{succeeded}/{completions}"),
    }
}

fn duration(job: &Value, now: Timestamp) -> String {
    let (begun, ended) = (&job["status"]["startTime"], &job["status"]["completionTime"]);
    if begun.is_null() {
        return String::new();
    }
    let end = ended.as_str().and_then(|text| text.parse().ok()).unwrap_or(now);
    age(begun, end)
}
