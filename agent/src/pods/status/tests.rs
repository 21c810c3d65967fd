use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, PodCondition};

use super::*;
use crate::pods::container::spec_hash;
use crate::pods::memory::{Task, Verdicts};
use crate::pods::observed::{Exit, Instance, Sandbox, State};
use crate::pods::outcome::Cause;
use crate::pods::registry::Found;
use crate::pods::restart::after;

const NOW: &str = "2026-01-01T00:10:00Z";

fn now() -> Timestamp {
    NOW.parse().unwrap()
}

fn pod(spec: serde_json::Value) -> Pod {
    serde_json::from_value(serde_json::json!({
        "metadata": {"name": "p", "namespace": "d", "uid": "u"}, "spec": spec,
        "status": {"conditions": [{"type": "PodScheduled", "status": "True"}]}}))
    .unwrap()
}

/// A run of a container of that name, as [`one`] has it.
fn run(name: &str, attempt: u32, state: State) -> Instance {
    let container =
        Container { name: name.to_owned(), image: Some("i:1".to_owned()), ..Container::default() };
    Instance {
        id: format!("{name}-{attempt}"),
        sandbox: "s".to_owned(),
        name: name.to_owned(),
        attempt,
        created_at: now(),
        state,
        image_id: "sha256:1".to_owned(),
        hash: spec_hash(&container),
        delay_secs: 0,
    }
}

fn running() -> State {
    State::Running { started_at: now() }
}

fn exited(code: i32) -> State {
    let reason = if code == 0 { "Completed" } else { "Error" }.to_owned();
    let message = String::new();
    State::Exited(Exit { started_at: now(), finished_at: now(), code, reason, message })
}

fn observed(instances: Vec<Instance>) -> Observed {
    let sandbox = Sandbox {
        id: "s".to_owned(),
        attempt: 0,
        ready: true,
        created_at: now(),
        ips: Vec::new(),
        grace_secs: None,
    };
    Observed::new(vec![sandbox], instances)
}

struct Case {
    pod: Pod,
    observed: Observed,
    memory: Memory,
    previous: PodStatus,
    now: Timestamp,
}

impl Case {
    fn new(spec: serde_json::Value, instances: Vec<Instance>) -> Self {
        let observed = observed(instances);
        let ready = Verdicts { started: true, ready: true, dead: None };
        let verdicts = observed.instances.iter().map(|i| (i.id.clone(), ready.clone())).collect();
        let memory = Memory { verdicts, ..Memory::default() };
        Self { pod: pod(spec), observed, memory, previous: PodStatus::default(), now: now() }
    }

    fn view<T>(&self, look: impl FnOnce(View<'_>) -> T) -> T {
        let ips = ["10.244.1.5".parse().unwrap(), "fd10::5".parse().unwrap()];
        look(View {
            pod: &self.pod,
            observed: &self.observed,
            memory: &self.memory,
            previous: &self.previous,
            host_ips: &["192.0.2.1".parse().unwrap()],
            pod_ips: &ips,
            now: self.now,
        })
    }

    fn status(&self) -> PodStatus {
        self.view(|view| view.status())
    }

    /// Phase, then the conditions that are true, then each container's state.
    fn summary(&self) -> (String, String, String) {
        let status = self.status();
        let conditions = status.conditions.iter().flatten().filter(|c| c.status == "True");
        let conditions: Vec<&str> = conditions.map(|c| c.type_.as_str()).collect();
        let state = |c: &ContainerStatus| {
            let state = c.state.clone().unwrap_or_default();
            let text = state
                .waiting
                .and_then(|w| w.reason)
                .or(state.running.map(|_| "running".to_owned()))
                .or(state.terminated.map(|t| format!("exit {}", t.exit_code)));
            text.unwrap_or_default()
        };
        let all = status.container_statuses.iter().flatten();
        let states: Vec<String> = all.map(state).collect();
        (status.phase.unwrap_or_default(), conditions.join(" "), states.join(", "))
    }
}

fn one(policy: &str) -> serde_json::Value {
    serde_json::json!({"restartPolicy": policy, "containers": [{"name": "a", "image": "i:1"}]})
}

fn check(case: &Case, phase: &str, conditions: &str, states: &str) {
    let expected = (phase.to_owned(), conditions.to_owned(), states.to_owned());
    assert_eq!(case.summary(), expected);
}

const BASE: &str = "PodScheduled PodReadyToStartContainers Initialized";
const ALL: &str = "PodScheduled PodReadyToStartContainers Initialized Ready ContainersReady";

#[test]
fn phases_and_states() {
    check(&Case::new(one("Always"), vec![]), "Pending", BASE, "ContainerCreating");
    check(&Case::new(one("Always"), vec![run("a", 0, running())]), "Running", ALL, "running");
    check(&Case::new(one("Always"), vec![run("a", 0, exited(1))]), "Running", BASE, "exit 1");
    let ended = Case::new(one("Never"), vec![run("a", 0, exited(1))]);
    check(&ended, "Failed", BASE, "exit 1");
    let ended = Case::new(one("OnFailure"), vec![run("a", 0, exited(0))]);
    check(&ended, "Succeeded", BASE, "exit 0");
    let looping = Case::new(one("Always"), vec![run("a", 0, exited(1)), run("a", 1, exited(2))]);
    check(&looping, "Running", BASE, "CrashLoopBackOff");
    let container = looping.status().container_statuses.unwrap().remove(0);
    assert_eq!(container.restart_count, 1);
    assert_eq!(container.last_state.unwrap().terminated.unwrap().exit_code, 2);
}

#[test]
fn a_pod_that_names_its_node_is_scheduled() {
    let mut case = Case::new(one("Always"), vec![run("a", 0, running())]);
    case.pod.status = None;
    check(&case, "Running", ALL, "running");
    case.previous = case.status();
    case.now = after(case.now, Duration::from_secs(60));
    let conditions = case.status().conditions.unwrap();
    assert_eq!(conditions[0].last_transition_time, Some(Time(now())), "since then");
}

#[test]
fn a_pod_that_the_node_refuses_has_no_containers() {
    let mut case = Case::new(one("Always"), vec![]);
    case.memory.ended_by = Some(Cause::rejected("AppArmor", "Cannot enforce AppArmor: no"));
    let status = case.status();
    assert_eq!(status.phase.as_deref(), Some("Failed"));
    assert_eq!(status.reason.as_deref(), Some("AppArmor"));
    let message = status.message.as_deref();
    assert_eq!(message, Some("Pod was rejected: Cannot enforce AppArmor: no"));
    assert_eq!(status.container_statuses, Some(vec![]), "none is being created");
    // One that ran and of which nothing is left is not forgotten.
    case.previous = Case::new(one("Always"), vec![run("a", 0, running())]).status();
    assert_eq!(case.status().container_statuses.unwrap().len(), 1);
}

#[test]
fn the_previous_log_is_that_of_the_last_end_that_is_shown() {
    let found = |case: &Case| {
        let status = case.status().container_statuses.unwrap().remove(0);
        Found::of(&status, &case.observed)
    };
    let of = |attempt, previous, running| Found::Run { attempt, previous, running };
    let (first, second) = (run("a", 0, exited(1)), run("a", 1, exited(2)));
    let alone = Case::new(one("Always"), vec![run("a", 0, running())]);
    assert_eq!(found(&alone), of(0, None, true));
    let again = Case::new(one("Always"), vec![first.clone(), run("a", 1, running())]);
    assert_eq!(found(&again), of(1, Some(0), true));
    let looping = Case::new(one("Always"), vec![first.clone(), second]);
    assert_eq!(found(&looping), of(1, Some(1), false), "the crash that people look for");
    let mut stuck = Case::new(one("Always"), vec![first]);
    assert_eq!(found(&stuck), of(0, None, false), "it runs again at once");
    let start = Task::Start("a".to_owned());
    stuck.memory.fail(start, "ErrImagePull", "gone".to_owned(), now());
    assert_eq!(found(&stuck), of(0, Some(0), false));
}

#[test]
fn a_command_that_does_not_exist_is_a_crash_loop() {
    let mut case = Case::new(one("Always"), vec![run("a", 0, exited(128))]);
    let start = Task::Start("a".to_owned());
    case.memory.fail(start, "RunContainerError", "no such file".to_owned(), now());
    check(&case, "Running", BASE, "RunContainerError");
    case.observed = observed(vec![run("a", 0, exited(128)), run("a", 1, exited(128))]);
    check(&case, "Running", BASE, "CrashLoopBackOff");
    let container = case.status().container_statuses.unwrap().remove(0);
    assert_eq!(container.last_state.unwrap().terminated.unwrap().exit_code, 128);
}

#[test]
fn a_container_with_another_image_is_no_crash_loop() {
    let crashes = vec![run("a", 0, exited(1)), run("a", 1, exited(2))];
    let mut case = Case::new(one("Always"), crashes);
    check(&case, "Running", BASE, "CrashLoopBackOff");
    if let Some(spec) = &mut case.pod.spec {
        spec.containers[0].image = Some("i:2".to_owned());
    }
    check(&case, "Running", BASE, "exit 2");
}

#[test]
fn a_pod_whose_container_is_stopped_to_run_anew_has_not_succeeded() {
    let mut case = Case::new(one("OnFailure"), vec![run("a", 0, exited(0))]);
    assert_eq!(case.status().phase.as_deref(), Some("Succeeded"));
    case.memory.renewed.insert("a-0".to_owned());
    check(&case, "Running", BASE, "exit 0");
}

#[test]
fn a_deleted_pod_ends_with_its_last_container() {
    for (codes, phase) in [([0, 0], "Succeeded"), ([0, 143], "Failed")] {
        let spec = serde_json::json!({"containers": [{"name": "a"}, {"name": "b"}]});
        let last = vec![run("a", 0, exited(codes[0])), run("b", 0, exited(codes[1]))];
        let mut case = Case::new(spec, last);
        assert_eq!(case.status().phase.as_deref(), Some("Running"), "it would be restarted");
        case.pod.metadata.deletion_timestamp = Some(Time(now()));
        assert_eq!(case.status().phase.as_deref(), Some(phase));
        case.observed.instances[0].state = running();
        assert_eq!(case.status().phase.as_deref(), Some("Running"), "one still runs");
    }
}

#[test]
fn an_evicted_pod_says_that_it_was_no_fault_of_its_own() {
    let spec = serde_json::json!({"containers": [{"name": "a"}]});
    let mut case = Case::new(spec, vec![run("a", 0, running())]);
    let disrupted = |case: &Case| {
        let mut all = case.status().conditions.unwrap();
        all.retain(|c| c.type_ == "DisruptionTarget");
        let parts =
            |c: PodCondition| (c.status.clone(), c.reason.clone(), c.message.clone(), is_ours(&c));
        all.into_iter().map(parts).collect::<Vec<_>>()
    };
    let reason = |text: &str| Some(text.to_owned());
    assert_eq!(disrupted(&case), []);
    let drained = serde_json::json!({"conditions": [{"type": "DisruptionTarget", "status": "True",
        "reason": "EvictionByEvictionAPI", "message": "drained"}]});
    case.pod.status = Some(serde_json::from_value(drained).unwrap());
    let others = [("True".to_owned(), reason("EvictionByEvictionAPI"), reason("drained"), false)];
    assert_eq!(disrupted(&case), others);
    case.memory.ended_by = Some(Cause::rejected("AppArmor", "no"));
    assert_eq!(disrupted(&case), others);
    case.memory.ended_by = Some(Cause::evicted("no room".to_owned()));
    let evicted = ("True".to_owned(), reason("TerminationByKubelet"), reason("no room"), true);
    assert_eq!(disrupted(&case), [evicted]);
}

#[test]
fn containers_of_an_ended_pod_end_in_its_status() {
    let spec = serde_json::json!({"initContainers": [{"name": "s", "restartPolicy": "Always"}],
        "containers": [{"name": "a"}, {"name": "b"}, {"name": "c"}]});
    let begun = vec![run("s", 0, running()), run("a", 0, running()), run("b", 0, exited(3))];
    let mut case = Case::new(spec, begun);
    case.memory.ended_by = Some(Cause::evicted("no room".to_owned()));
    case.previous = case.status();
    case.pod.status = Some(case.previous.clone());
    let told = case.previous.clone();
    let told_now = |case: &Case| {
        let status = case.view(|view| view.after_end(view.status()));
        let all = status.init_container_statuses.iter().chain(&status.container_statuses);
        let ends = all.flatten().map(|c| {
            let end = c.state.clone().unwrap_or_default().terminated;
            end.map(|end| (end.exit_code, end.reason.unwrap_or_default(), c.ready))
        });
        (
            ends.collect::<Vec<_>>(),
            PodStatus {
                container_statuses: told.container_statuses.clone(),
                init_container_statuses: told.init_container_statuses.clone(),
                ..status
            },
        )
    };
    let end = |code: i32, reason: &str| Some((code, reason.to_owned(), false));
    assert_eq!(told_now(&case), (vec![None, None, end(3, "Error"), None], told.clone()));
    case.observed.instances.iter_mut().find(|run| run.name == "a").unwrap().state = exited(143);
    // Without a sandbox there is no address, which is not said of a pod that has ended.
    case.observed.sandboxes.clear();
    let (ends, rest) = told_now(&case);
    assert_eq!(ends, [None, end(143, "Error"), end(3, "Error"), None]);
    assert_eq!(rest, told, "the rest is as it was told");
    // After a power failure nothing may be left.
    case.observed.instances.clear();
    let lost = end(137, "ContainerStatusUnknown");
    assert_eq!(told_now(&case).0, [lost.clone(), lost, end(3, "Error"), None]);
}

#[test]
fn readiness_is_what_the_probe_says() {
    let mut case = Case::new(one("Always"), vec![run("a", 0, running())]);
    case.memory.verdicts.get_mut("a-0").unwrap().ready = false;
    check(&case, "Running", BASE, "running");
    let status = case.status();
    let ready = status.conditions.iter().flatten().find(|c| c.type_ == "Ready").unwrap();
    assert_eq!(ready.reason.as_deref(), Some("ContainersNotReady"));
    assert_eq!(ready.message.as_deref(), Some("containers with unready status: [a]"));
    case.memory.verdicts.get_mut("a-0").unwrap().ready = true;
    case.pod.spec.as_mut().unwrap().readiness_gates = Some(vec![
        serde_json::from_value(serde_json::json!({"conditionType": "example.org/lb"})).unwrap(),
    ]);
    let ready = |case: &Case| case.summary().1.contains(" Ready");
    assert!(!ready(&case));
    let gate = serde_json::json!({"type": "example.org/lb", "status": "True"});
    let conditions = case.pod.status.as_mut().unwrap().conditions.as_mut().unwrap();
    conditions.push(serde_json::from_value(gate).unwrap());
    assert!(ready(&case));
}

#[test]
fn failures_are_shown_by_name_and_then_as_a_back_off() {
    let mut case = Case::new(one("Always"), vec![]);
    case.memory.fail(Task::Start("a".to_owned()), "ErrImagePull", "not found".to_owned(), now());
    check(&case, "Pending", BASE, "ErrImagePull");
    case.now = after(now(), Duration::from_secs(4));
    check(&case, "Pending", BASE, "ImagePullBackOff");
    let mut case = Case::new(one("Always"), vec![run("a", 0, exited(1))]);
    let task = Task::Start("a".to_owned());
    case.memory.fail(
        task,
        "CreateContainerConfigError",
        "secret \"x\" not found".to_owned(),
        now(),
    );
    check(&case, "Running", BASE, "CreateContainerConfigError");
}

#[test]
fn init_containers_hold_up_the_pod() {
    let spec = serde_json::json!({
        "initContainers": [{"name": "i"}, {"name": "s", "restartPolicy": "Always"}], "containers": [{"name": "a"}]});
    let begun = "PodScheduled PodReadyToStartContainers";
    check(
        &Case::new(spec.clone(), vec![run("i", 0, running())]),
        "Pending",
        begun,
        "PodInitializing",
    );
    let both = vec![run("i", 0, exited(0)), run("s", 0, running()), run("a", 0, running())];
    check(&Case::new(spec.clone(), both), "Running", ALL, "running");
    // A sidecar that crashed takes readiness away, not the phase.
    let crashed = vec![run("i", 0, exited(0)), run("s", 0, exited(1)), run("a", 0, running())];
    check(&Case::new(spec.clone(), crashed), "Running", BASE, "running");
    let mut spec = spec;
    spec["restartPolicy"] = "Never".into();
    let ended = vec![run("i", 0, exited(0)), run("s", 0, exited(137)), run("a", 0, exited(1))];
    check(&Case::new(spec, ended), "Failed", BASE, "exit 1");
}

#[test]
fn transitions_keep_their_time() {
    let mut case = Case::new(one("Always"), vec![run("a", 0, running())]);
    case.previous = case.status();
    case.now = after(now(), Duration::from_secs(60));
    assert_eq!(case.status(), case.previous, "the same state is the same status");
    case.memory.verdicts.clear();
    let status = case.status();
    let time = |name: &str| {
        let all = status.conditions.iter().flatten();
        all.clone()
            .find(|c| c.type_ == name)
            .and_then(|c| c.last_transition_time.clone())
            .map(|t| t.0)
    };
    assert_eq!(time("Initialized"), Some(now()));
    assert_eq!(time("Ready"), Some(case.now));
    assert_eq!(status.start_time.map(|t| t.0), Some(now()));
}

#[test]
fn addresses_and_class_are_reported() {
    let status = Case::new(one("Always"), vec![run("a", 0, running())]).status();
    assert_eq!(status.pod_ip.as_deref(), Some("10.244.1.5"));
    assert_eq!(status.pod_ips.map(|ips| ips.len()), Some(2));
    assert_eq!(status.host_ip.as_deref(), Some("192.0.2.1"));
    assert_eq!(status.qos_class.as_deref(), Some("BestEffort"));
}
