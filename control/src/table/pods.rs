//! The columns of pods: one word for a state that is spread over many fields.

use serde_json::{Value, json};

use super::cells::{Column, age, age_column, count, or_none, text_column, wide_column};

pub(super) fn columns() -> Vec<Column> {
    vec![
        text_column("Ready", |pod, _| {
            let ready = statuses(pod, "containerStatuses").filter(|c| c["ready"] == true).count();
            let all = pod["spec"]["containers"].as_array().map_or(0, Vec::len);
            json!(format!("{ready}/{all}"))
        }),
        text_column("Status", |pod, _| json!(status(pod))),
        text_column("Restarts", |pod, now| {
            let all = statuses(pod, "containerStatuses");
            let restarts: i64 = all.clone().map(|c| count(&c["restartCount"])).sum();
            let last =
                all.filter_map(|c| c["lastState"]["terminated"]["finishedAt"].as_str()).max();
            match last {
                Some(last) if restarts > 0 => {
                    json!(format!("{restarts} ({} ago)", age(&json!(last), now)))
                }
                _ => json!(restarts.to_string()),
            }
        }),
        age_column(),
        wide_column("IP", |pod, _| or_none(&pod["status"]["podIP"])),
        wide_column("Node", |pod, _| or_none(&pod["spec"]["nodeName"])),
        wide_column("Nominated Node", |pod, _| or_none(&pod["status"]["nominatedNodeName"])),
        wide_column("Readiness Gates", |_, _| json!("<none>")),
    ]
}

fn statuses<'a>(pod: &'a Value, field: &str) -> impl Iterator<Item = &'a Value> + Clone {
    pod["status"][field].as_array().into_iter().flatten()
}

fn status(pod: &Value) -> String {
    if pod["metadata"]["deletionTimestamp"].is_string() {
        let lost = pod["status"]["reason"] == "NodeLost";
        return if lost { "Unknown" } else { "Terminating" }.to_owned();
    }
    if let Some(init) = init_status(pod) {
        return init;
    }
    // The last container that is not simply running speaks for the pod.
    let said = statuses(pod, "containerStatuses").filter_map(|c| trouble(&c["state"])).last();
    let phase = pod["status"]["phase"].as_str().unwrap_or("Unknown");
    let reason = pod["status"]["reason"].as_str().filter(|r| !r.is_empty());
    let word = said.unwrap_or_else(|| reason.unwrap_or(phase).to_owned());
    let any_running = statuses(pod, "containerStatuses").any(|c| c["state"]["running"].is_object());
    if word == "Completed" && any_running { "Running".to_owned() } else { word }
}

fn init_status(pod: &Value) -> Option<String> {
    let total = pod["spec"]["initContainers"].as_array().map_or(0, Vec::len);
    for (index, container) in statuses(pod, "initContainerStatuses").enumerate() {
        let state = &container["state"];
        if state["terminated"]["exitCode"] == 0 || container["started"] == true {
            continue;
        }
        return Some(match trouble(state) {
            Some(word) if word != "PodInitializing" => format!("Init:{word}"),
            _ => format!("Init:{index}/{total}"),
        });
    }
    None
}

/// Why a container does not run, in one word.
fn trouble(state: &Value) -> Option<String> {
    if let Some(reason) = state["waiting"]["reason"].as_str().filter(|r| !r.is_empty()) {
        return Some(reason.to_owned());
    }
    let terminated = state.get("terminated").filter(|t| t.is_object())?;
    if let Some(reason) = terminated["reason"].as_str().filter(|r| !r.is_empty()) {
        return Some(reason.to_owned());
    }
    Some(match count(&terminated["signal"]) {
        0 => format!("ExitCode:{}", count(&terminated["exitCode"])),
        signal => format!("Signal:{signal}"),
    })
}
