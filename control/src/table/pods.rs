//! The columns of pods: one word for a state that is spread over many fields, as kubectl's users know it.

use serde_json::{Value, json};

use super::cells::{Column, age, age_column, count, or_none, text_column, wide_column};

pub(super) fn columns() -> Vec<Column> {
    vec![
        text_column("Ready", |pod, _| {
            let shown = Shown::of(pod);
            json!(format!("{}/{}", shown.ready, shown.containers))
        }),
        text_column("Status", |pod, _| json!(Shown::of(pod).word)),
        text_column("Restarts", |pod, now| {
            let shown = Shown::of(pod);
            match shown.last_restart {
                Some(last) if shown.restarts > 0 => {
                    json!(format!("{} ({} ago)", shown.restarts, age(&json!(last), now)))
                }
                _ => json!(shown.restarts.to_string()),
            }
        }),
        age_column(),
        wide_column("IP", |pod, _| or_none(&pod["status"]["podIP"])),
        wide_column("Node", |pod, _| or_none(&pod["spec"]["nodeName"])),
        wide_column("Nominated Node", |pod, _| or_none(&pod["status"]["nominatedNodeName"])),
        wide_column("Readiness Gates", |pod, _| {
            let gates = list(&pod["spec"]["readinessGates"]);
            let open = gates.clone().filter(|gate| is_true(pod, &gate["conditionType"])).count();
            match gates.count() {
                0 => json!("<none>"),
                all => json!(format!("{open}/{all}")),
            }
        }),
    ]
}

fn list(value: &Value) -> impl Iterator<Item = &Value> + Clone {
    value.as_array().into_iter().flatten()
}

fn is_true(pod: &Value, condition: &Value) -> bool {
    list(&pod["status"]["conditions"]).any(|c| c["type"] == *condition && c["status"] == "True")
}

fn is_sidecar(pod: &Value, name: &Value) -> bool {
    let found = list(&pod["spec"]["initContainers"]).find(|c| c["name"] == *name);
    found.is_some_and(|c| c["restartPolicy"] == "Always")
}

/// What a row says of a pod's containers.
#[derive(Default)]
struct Shown {
    ready: usize,
    /// Sidecars among them.
    containers: usize,
    word: String,
    restarts: i64,
    last_restart: Option<String>,
}

impl Shown {
    fn of(pod: &Value) -> Self {
        let sidecars = list(&pod["spec"]["initContainers"]);
        let sidecars = sidecars.filter(|c| c["restartPolicy"] == "Always").count();
        let mut shown = Self {
            containers: list(&pod["spec"]["containers"]).count() + sidecars,
            word: of_pod(pod),
            ..Self::default()
        };
        let initializes = shown.initialize(pod);
        if !initializes || is_true(pod, &json!("Initialized")) {
            shown.run(pod);
        }
        if pod["metadata"]["deletionTimestamp"].is_string() {
            let phase = &pod["status"]["phase"];
            if pod["status"]["reason"] == "NodeLost" {
                shown.word = "Unknown".to_owned();
            } else if phase != "Succeeded" && phase != "Failed" {
                shown.word = "Terminating".to_owned();
            }
        }
        shown
    }

    /// Init containers; true when one of them is not done, which then speaks for the pod.
    fn initialize(&mut self, pod: &Value) -> bool {
        for (index, container) in list(&pod["status"]["initContainerStatuses"]).enumerate() {
            self.count(container);
            let state = &container["state"];
            if state["terminated"]["exitCode"] == 0 {
                continue;
            }
            if is_sidecar(pod, &container["name"]) && container["started"] == true {
                self.ready += usize::from(container["ready"] == true);
                continue;
            }
            self.word = match trouble(state) {
                Some(word) if word != "PodInitializing" => format!("Init:{word}"),
                _ => format!("Init:{index}/{}", list(&pod["spec"]["initContainers"]).count()),
            };
            return true;
        }
        false
    }

    /// Ordinary containers; the first one that has something to say speaks for the pod. Restarts of what prepared the pod do not
    /// count any more.
    fn run(&mut self, pod: &Value) {
        (self.restarts, self.last_restart) = (0, None);
        let sidecars = list(&pod["status"]["initContainerStatuses"]);
        for sidecar in sidecars.filter(|c| is_sidecar(pod, &c["name"])) {
            self.count(sidecar);
        }
        let mut said = None;
        let mut any_ready = false;
        for container in list(&pod["status"]["containerStatuses"]) {
            self.count(container);
            let word = trouble(&container["state"]);
            if word.is_none() && container["ready"] == true {
                any_ready = true;
                self.ready += 1;
            }
            said = said.or(word);
        }
        self.word = match said {
            Some(word) if word != "Completed" || !any_ready => word,
            Some(_) if is_true(pod, &json!("Ready")) => "Running".to_owned(),
            Some(_) => "NotReady".to_owned(),
            None => return,
        };
    }

    fn count(&mut self, container: &Value) {
        self.restarts += count(&container["restartCount"]);
        let ended = container["lastState"]["terminated"]["finishedAt"].as_str();
        self.last_restart = self.last_restart.take().max(ended.map(str::to_owned));
    }
}

/// What the pod says of itself.
fn of_pod(pod: &Value) -> String {
    const GATED: &str = "SchedulingGated";
    if list(&pod["status"]["conditions"])
        .any(|c| c["type"] == "PodScheduled" && c["reason"] == GATED)
    {
        return GATED.to_owned();
    }
    let text = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
    let reason = text(&pod["status"]["reason"]).or_else(|| text(&pod["status"]["phase"]));
    reason.unwrap_or_else(|| "Unknown".to_owned())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn running(name: &str, ready: bool) -> Value {
        json!({"name": name, "ready": ready, "started": true, "restartCount": 1, "state": {"running": {}},
            "lastState": {"terminated": {"finishedAt": "2026-01-01T00:00:00Z"}}})
    }

    fn waiting(name: &str, reason: &str) -> Value {
        json!({"name": name, "ready": false, "started": false, "restartCount": 4, "state": {"waiting": {"reason": reason}}})
    }

    fn ended(name: &str, code: i32, reason: &str) -> Value {
        json!({"name": name, "ready": code == 0, "restartCount": 2,
            "state": {"terminated": {"exitCode": code, "reason": reason}}})
    }

    /// A pod with an init container, a sidecar and two others, with these statuses and true conditions.
    fn pod(init: &[Value], main: &[Value], conditions: &[&str]) -> Value {
        let conditions: Vec<Value> =
            conditions.iter().map(|c| json!({"type": c, "status": "True"})).collect();
        json!({"metadata": {"name": "p"},
            "spec": {"initContainers": [{"name": "i"}, {"name": "s", "restartPolicy": "Always"}],
                "containers": [{"name": "a"}, {"name": "b"}]},
            "status": {"phase": "Running", "conditions": conditions,
                "initContainerStatuses": init, "containerStatuses": main}})
    }

    fn of(pod: &Value) -> (String, String, i64) {
        let shown = Shown::of(pod);
        (format!("{}/{}", shown.ready, shown.containers), shown.word, shown.restarts)
    }

    fn row(ready: &str, word: &str, restarts: i64) -> (String, String, i64) {
        (ready.to_owned(), word.to_owned(), restarts)
    }

    #[test]
    fn sidecars_count_and_what_prepared_the_pod_does_not() {
        let done = ended("i", 0, "Completed");
        let init = [done.clone(), running("s", true)];
        let main = [running("a", true), running("b", false)];
        assert_eq!(of(&pod(&init, &main, &["Initialized"])), row("2/3", "Running", 3));
        let begins = [waiting("a", "PodInitializing"), waiting("b", "PodInitializing")];
        let late = [done.clone(), running("s", true)].map(|mut status| {
            status["started"] = json!(false);
            status
        });
        assert_eq!(of(&pod(&late, &begins, &[])), row("0/3", "Init:1/2", 3));
        let failed = [ended("i", 3, "Error"), waiting("s", "PodInitializing")];
        assert_eq!(of(&pod(&failed, &begins, &[])), row("0/3", "Init:Error", 2));
        // With a sidecar that crashes later the others are counted all the same.
        let crashed = [done, waiting("s", "CrashLoopBackOff")];
        let main = [running("a", true), running("b", true)];
        let found = of(&pod(&crashed, &main, &["Initialized"]));
        assert_eq!(found, row("2/3", "Init:CrashLoopBackOff", 6));
    }

    #[test]
    fn the_first_container_in_trouble_speaks_for_the_pod() {
        let of = |main: [Value; 2], conditions: &[&str]| of(&pod(&[], &main, conditions)).1;
        let completed = || ended("b", 0, "Completed");
        assert_eq!(of([waiting("a", "CrashLoopBackOff"), completed()], &[]), "CrashLoopBackOff");
        assert_eq!(of([completed(), waiting("b", "ErrImagePull")], &[]), "Completed");
        assert_eq!(of([running("a", true), completed()], &[]), "NotReady");
        assert_eq!(of([running("a", true), completed()], &["Ready"]), "Running");
        assert_eq!(of([running("a", true), ended("b", 7, "")], &[]), "ExitCode:7");
    }

    #[test]
    fn pods_that_have_ended_are_not_terminating() {
        let mut pod = pod(&[], &[], &[]);
        pod["metadata"]["deletionTimestamp"] = json!("2026-01-02T00:00:00Z");
        assert_eq!(of(&pod).1, "Terminating");
        pod["status"]["phase"] = json!("Failed");
        pod["status"]["reason"] = json!("Evicted");
        assert_eq!(of(&pod).1, "Evicted");
        pod["status"]["reason"] = json!("NodeLost");
        assert_eq!(of(&pod).1, "Unknown");
        let gated = json!({"status": {"phase": "Pending", "conditions": [
            {"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}]}});
        assert_eq!(of(&gated).1, "SchedulingGated");
    }
}
