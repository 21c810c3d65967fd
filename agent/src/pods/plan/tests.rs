//! Plans are carried out on a runtime of plain values, so that whole lives of pods can be tried quickly.

use k8s_openapi::api::core::v1::EphemeralContainer;
use proptest::prelude::*;

use super::*;
use crate::pods::memory::Verdicts;
use crate::pods::observed::Exit;
use crate::pods::outcome::Cause;
use crate::pods::restart::after;

/// A runtime in which every step succeeds at once.
struct World {
    work: Option<PodWork>,
    observed: Observed,
    memory: Memory,
    now: Timestamp,
    next: u32,
    starts: Vec<String>,
    /// How containers end that are stopped.
    stop_code: i32,
}

fn pod(spec: serde_json::Value) -> PodWork {
    let mut spec = spec;
    for list in ["containers", "initContainers"] {
        for container in spec[list].as_array_mut().into_iter().flatten() {
            container["image"] = "image:1".into();
        }
    }
    let pod =
        serde_json::json!({"metadata": {"name": "p", "namespace": "d", "uid": "u"}, "spec": spec});
    PodWork {
        pod: serde_json::from_value(pod).unwrap(),
        config_maps: Default::default(),
        binary_keys: Default::default(),
        secrets: Default::default(),
        service_env: Default::default(),
        departure: None,
    }
}

impl World {
    fn new(spec: serde_json::Value) -> Self {
        Self {
            work: Some(pod(spec)),
            observed: Observed::default(),
            memory: Memory::default(),
            now: "2026-01-01T00:00:00Z".parse().unwrap(),
            next: 0,
            starts: Vec::new(),
            stop_code: 137,
        }
    }

    fn plan(&self) -> Plan {
        plan(self.work.as_ref(), &self.observed, &self.memory, self.now)
    }

    fn id(&mut self) -> String {
        self.next += 1;
        format!("id{}", self.next)
    }

    /// Carries out plans until there is nothing to do now.
    fn settle(&mut self) -> Plan {
        for _ in 0..200 {
            let plan = self.plan();
            if plan.steps.is_empty() {
                return plan;
            }
            for step in &plan.steps {
                self.apply(step);
            }
        }
        panic!("no end of steps: {:?}", self.plan());
    }

    fn apply(&mut self, step: &Step) {
        match step {
            Step::PrepareVolumes => self.memory.volumes.written = Some(self.memory.volumes.wanted),
            Step::RunSandbox { attempt } => {
                assert!(self.observed.sandbox().is_none(), "a second sandbox");
                let id = self.id();
                self.observed.sandboxes.push(Sandbox {
                    id,
                    attempt: *attempt,
                    ready: true,
                    created_at: self.now,
                    ips: Vec::new(),
                    grace_secs: Some(5),
                });
            }
            Step::StopSandbox { id } => {
                self.observed
                    .sandboxes
                    .iter_mut()
                    .filter(|s| s.id == *id)
                    .for_each(|s| s.ready = false);
                self.memory.stopped.insert(id.clone());
            }
            Step::RemoveSandbox { id } => {
                assert!(self.memory.stopped.contains(id), "it still has its network");
                self.observed.sandboxes.retain(|s| s.id != *id);
                self.observed.instances.retain(|i| i.sandbox != *id);
            }
            Step::Start { name, sandbox, attempt, delay } => {
                self.start(name, sandbox, *attempt, *delay)
            }
            Step::Stop { id, renew, .. } => {
                if *renew {
                    self.memory.renewed.insert(id.clone());
                }
                self.exit(id, self.stop_code);
            }
            Step::Hurry { id, .. } => self.exit(id, 137),
            Step::RemoveContainer { id } => {
                let run = self.observed.instances.iter().find(|i| i.id == *id).unwrap();
                assert!(!run.is_running(), "it runs");
                self.observed.instances.retain(|i| i.id != *id);
            }
            Step::Free => {
                assert!(self.observed.instances.iter().all(|i| !i.is_running()), "in use");
                self.memory.freed = true;
            }
            Step::Clean => self.memory.cleaned = true,
            Step::Confirm => {
                assert!(!self.memory.confirmed && self.observed.is_empty());
                self.memory.confirmed = true;
            }
            Step::CancelStart { .. } => {}
        }
        self.observed = Observed::new(
            std::mem::take(&mut self.observed.sandboxes),
            std::mem::take(&mut self.observed.instances),
        );
    }

    fn start(&mut self, name: &str, sandbox: &str, attempt: u32, delay: Duration) {
        assert!(self.observed.runs(name).all(|i| !i.is_running()), "two runs of {name}");
        assert!(
            self.observed.runs(name).all(|i| i.attempt < attempt),
            "attempt {attempt} of {name} is taken"
        );
        assert!(self.observed.sandbox().is_some_and(|s| s.id == sandbox));
        let spec = self.work.as_ref().and_then(|w| w.pod.spec.clone()).unwrap();
        let hash = spec_hash(&crate::pods::ops::find_container(&spec, name).unwrap());
        let id = self.id();
        self.memory
            .verdicts
            .insert(id.clone(), Verdicts { started: true, ready: true, dead: None });
        self.starts.push(name.to_owned());
        self.observed.instances.push(Instance {
            id,
            sandbox: sandbox.to_owned(),
            name: name.to_owned(),
            attempt,
            created_at: self.now,
            state: State::Running { started_at: self.now },
            image_id: String::new(),
            hash,
            delay_secs: delay.as_secs(),
        });
    }

    fn exit(&mut self, id: &str, code: i32) {
        let now = self.now;
        for run in self.observed.instances.iter_mut().filter(|i| i.id == id) {
            if let State::Running { started_at } = run.state {
                let (reason, message) = (String::new(), String::new());
                run.state =
                    State::Exited(Exit { started_at, finished_at: now, code, reason, message });
            }
        }
    }

    fn exit_named(&mut self, name: &str, code: i32) {
        let id = self.observed.newest(name).map(|i| i.id.clone());
        self.exit(&id.unwrap_or_default(), code);
    }

    fn lose_sandbox(&mut self) {
        self.observed.sandboxes.iter_mut().for_each(|s| s.ready = false);
        let ids: Vec<String> = self.observed.instances.iter().map(|i| i.id.clone()).collect();
        ids.iter().for_each(|id| self.exit(id, 255));
    }

    fn pass(&mut self, time: Duration) {
        self.now = after(self.now, time);
    }

    fn change_image(&mut self, name: &str) {
        let spec = self.work.as_mut().and_then(|w| w.pod.spec.as_mut()).unwrap();
        let all = spec.containers.iter_mut().chain(spec.init_containers.iter_mut().flatten());
        for container in all.filter(|c| c.name == name) {
            container.image = Some("image:2".to_owned());
        }
    }

    fn delete(&mut self) {
        let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(self.now);
        if let Some(work) = &mut self.work {
            work.pod.metadata.deletion_timestamp = Some(now);
        }
    }

    fn running(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self
            .observed
            .instances
            .iter()
            .filter(|i| i.is_running())
            .map(|i| i.name.as_str())
            .collect();
        names.sort_unstable();
        names
    }
}

fn two() -> serde_json::Value {
    serde_json::json!({"containers": [{"name": "a"}, {"name": "b"}]})
}

#[test]
fn steps_come_in_order() {
    let mut world = World::new(two());
    assert_eq!(world.plan().steps, [Step::PrepareVolumes]);
    world.apply(&Step::PrepareVolumes);
    assert_eq!(world.plan().steps, [Step::RunSandbox { attempt: 0 }]);
    world.apply(&Step::RunSandbox { attempt: 0 });
    let starts = world.plan().steps;
    assert!(
        matches!(&starts[..], [Step::Start { name: a, .. }, Step::Start { name: b, .. }] if a == "a" && b == "b")
    );
    world.settle();
    assert_eq!(world.running(), ["a", "b"]);
    assert_eq!(world.plan(), Plan::default(), "all is as wanted");
}

#[test]
fn what_is_under_way_is_not_begun_twice() {
    let mut world = World::new(two());
    world.memory.busy.insert(Task::Volumes);
    assert_eq!(world.plan(), Plan::default());
    world.memory.busy.clear();
    world.apply(&Step::PrepareVolumes);
    world.memory.busy.insert(Task::RunSandbox);
    assert_eq!(world.plan(), Plan::default());
    world.memory.busy.clear();
    world.apply(&Step::RunSandbox { attempt: 0 });
    world.memory.busy.insert(Task::Start("a".to_owned()));
    assert_eq!(world.plan().steps.len(), 1);
}

#[test]
fn a_crash_is_restarted_at_once_and_then_later_and_later() {
    let mut world = World::new(serde_json::json!({"containers": [{"name": "a"}]}));
    world.settle();
    let mut waits = Vec::new();
    for _ in 0..6 {
        world.exit_named("a", 1);
        let wait = match world.plan().wake_at {
            None => 0,
            Some(at) => at.duration_since(world.now).as_secs(),
        };
        waits.push(wait);
        if wait > 0 {
            assert!(world.plan().steps.iter().all(|s| !matches!(s, Step::Start { .. })));
            world.pass(Duration::from_secs(u64::try_from(wait).unwrap()));
        }
        world.settle();
        assert_eq!(world.running(), ["a"]);
    }
    assert_eq!(waits, [0, 10, 20, 40, 80, 160]);
    world.pass(Duration::from_secs(600));
    world.exit_named("a", 1);
    world.settle();
    assert_eq!(world.running(), ["a"], "ten good minutes make up for the past");
    assert_eq!(world.observed.newest("a").map(|i| i.attempt), Some(7));
    assert_eq!(world.observed.instances.len(), 2, "the last run is kept, older ones are not");
}

#[test]
fn init_containers_run_one_after_the_other() {
    let mut world = World::new(serde_json::json!({
        "initContainers": [{"name": "i"}, {"name": "s", "restartPolicy": "Always"}, {"name": "j"}],
        "containers": [{"name": "a"}]}));
    world.settle();
    assert_eq!(world.running(), ["i"]);
    world.exit_named("i", 1);
    world.settle();
    assert_eq!(world.running(), ["i"], "it failed and runs again");
    world.exit_named("i", 0);
    world.settle();
    assert_eq!(world.running(), ["j", "s"], "the sidecar keeps running");
    world.exit_named("j", 0);
    world.settle();
    assert_eq!(world.running(), ["a", "s"]);
    world.exit_named("s", 0);
    world.settle();
    assert_eq!(world.running(), ["a", "s"]);
    world.delete();
    let stops = |world: &World| -> Vec<String> {
        let steps = world.plan().steps;
        steps
            .iter()
            .filter_map(|s| if let Step::Stop { name, .. } = s { Some(name.clone()) } else { None })
            .collect()
    };
    assert_eq!(stops(&world), ["a"]);
    world.exit_named("a", 0);
    assert_eq!(stops(&world), ["s"], "sidecars last");
}

#[test]
fn sidecars_end_in_what_is_left_of_the_grace_period() {
    let sidecar = |name: &str| serde_json::json!({"name": name, "restartPolicy": "Always"});
    let mut world = World::new(serde_json::json!({"terminationGracePeriodSeconds": 30,
        "initContainers": [sidecar("s"), sidecar("t")], "containers": [{"name": "a"}]}));
    world.settle();
    world.delete();
    world.memory.deleting_since = Some(world.now);
    world.memory.left_at = Some(world.now);
    let stops = |world: &World| -> Vec<(String, u64)> {
        let stop = |step: &Step| match step {
            Step::Stop { name, grace, .. } => Some((name.clone(), grace.as_secs())),
            _ => None,
        };
        world.plan().steps.iter().filter_map(stop).collect()
    };
    assert_eq!(stops(&world), [("a".to_owned(), 30)]);
    world.pass(Duration::from_secs(25));
    assert_eq!(stops(&world), [("a".to_owned(), 30)], "that is counted from its own stop");
    world.exit_named("a", 0);
    assert_eq!(stops(&world), [("t".to_owned(), 5)]);
    world.pass(Duration::from_secs(5));
    world.exit_named("t", 137);
    assert_eq!(stops(&world), [("s".to_owned(), 2)], "a moment for each all the same");
    world.work.as_mut().unwrap().pod.metadata.deletion_grace_period_seconds = Some(1);
    assert_eq!(stops(&world), [("s".to_owned(), 1)]);
}

#[test]
fn a_failed_init_container_ends_a_pod_that_never_restarts() {
    let mut world = World::new(serde_json::json!({"restartPolicy": "Never",
        "initContainers": [{"name": "i"}], "containers": [{"name": "a"}]}));
    world.settle();
    world.exit_named("i", 1);
    world.settle();
    assert_eq!(world.starts, ["i"]);
    assert!(world.observed.sandbox().is_none(), "the network is given back");
    assert_eq!(world.observed.instances.len(), 1, "its log is kept");
}

#[test]
fn ended_pods_rest() {
    for (policy, code, starts) in [("Never", 1, 1), ("OnFailure", 0, 1), ("Always", 0, 2)] {
        let mut world =
            World::new(serde_json::json!({"restartPolicy": policy, "containers": [{"name": "a"}]}));
        world.settle();
        world.exit_named("a", code);
        world.settle();
        assert_eq!(world.starts.len(), starts, "{policy}");
        assert_eq!(world.observed.sandbox().is_none(), starts == 1);
    }
}

#[test]
fn a_pod_that_the_node_cannot_keep_ends_soon_and_gives_back_its_disk() {
    let mut world = World::new(
        serde_json::json!({"terminationGracePeriodSeconds": 60, "containers": [{"name": "a"}]}),
    );
    world.settle();
    world.memory.ended_by = Some(Cause::evicted("low on resource".to_owned()));
    let plan = world.plan();
    let grace = plan.steps.iter().find_map(|step| match step {
        Step::Stop { grace, .. } => Some(*grace),
        _ => None,
    });
    assert_eq!(grace, Some(Duration::from_secs(1)), "what it uses is needed");
    world.settle();
    assert!(world.memory.freed && world.observed.sandbox().is_none());
    assert_eq!(world.observed.instances.len(), 1, "its log can be read");
    let outcome =
        outcome(&world.work.as_ref().unwrap().pod, &world.observed, &world.memory, world.now);
    let Outcome::Ended { succeeded: false, cause: Some(cause) } = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!((cause.reason, cause.message.as_str()), ("Evicted", "low on resource"));
}

#[test]
fn an_ended_pod_gives_back_its_network_after_a_reboot() {
    let mut world =
        World::new(serde_json::json!({"restartPolicy": "Never", "containers": [{"name": "a"}]}));
    world.settle();
    world.exit_named("a", 0);
    world.lose_sandbox();
    let steps = world.plan().steps;
    assert!(matches!(steps[..], [Step::StopSandbox { .. }]), "{steps:?}");
    world.settle();
    assert_eq!(world.plan(), Plan::default());
}

#[test]
fn an_added_container_runs_once_and_decides_nothing() {
    let mut world = World::new(two());
    world.settle();
    let added: EphemeralContainer =
        serde_json::from_value(serde_json::json!({"name": "debug", "image": "image:1"})).unwrap();
    let spec = world.work.as_mut().unwrap().pod.spec.as_mut().unwrap();
    spec.ephemeral_containers = Some(vec![added]);
    world.starts.clear();
    world.settle();
    assert_eq!(world.starts, ["debug"]);
    world.exit_named("debug", 1);
    world.pass(Duration::from_secs(3600));
    world.settle();
    assert_eq!(world.starts, ["debug"]);
    assert!(world.running().contains(&"a"), "{:?}", world.running());
    world.delete();
    world.settle();
    assert!(world.observed.is_empty());
}

#[test]
fn volumes_are_written_again_when_a_token_is_due() {
    let mut world = World::new(two());
    world.settle();
    let due = after(world.now, Duration::from_secs(60));
    world.memory.volumes.renew_at = Some(due);
    let plan = world.settle();
    assert_eq!(plan.wake_at, Some(due));
    world.pass(Duration::from_secs(60));
    assert!(world.plan().steps.contains(&Step::PrepareVolumes));
}

#[test]
fn a_lost_sandbox_is_replaced() {
    let mut world = World::new(two());
    world.settle();
    world.lose_sandbox();
    let first = world.plan().steps;
    assert!(
        matches!(first[..], [Step::StopSandbox { .. }]),
        "its network is given back first: {first:?}"
    );
    world.settle();
    assert_eq!(world.running(), ["a", "b"]);
    assert_eq!(world.observed.sandbox().map(|s| s.attempt), Some(1));
}

#[test]
fn a_changed_image_and_a_bad_probe_restart_a_container() {
    let mut world = World::new(two());
    world.settle();
    world.change_image("a");
    let steps = world.plan().steps;
    assert!(matches!(&steps[..], [Step::Stop { name, .. }] if name == "a"), "{steps:?}");
    world.settle();
    assert_eq!(world.starts, ["a", "b", "a"]);
    let run = world.observed.newest("b").map(|i| i.id.clone()).unwrap();
    world.memory.verdicts.get_mut(&run).unwrap().dead = Some("sick".to_owned());
    let steps = world.plan().steps;
    assert!(
        matches!(&steps[..], [Step::Stop { name, why, .. }] if name == "b" && why == "sick"),
        "{steps:?}"
    );
}

#[test]
fn a_changed_image_does_not_wait_for_the_failures_of_the_one_before() {
    let mut world = World::new(serde_json::json!({"containers": [{"name": "a"}]}));
    world.settle();
    for _ in 0..4 {
        world.exit_named("a", 1);
        world.pass(Duration::from_secs(40));
        world.settle();
    }
    world.exit_named("a", 1);
    world.settle();
    assert_eq!(world.running(), [""; 0], "it waits");
    world.change_image("a");
    world.settle();
    assert_eq!(world.running(), ["a"]);
    assert_eq!(world.observed.newest("a").map(|run| run.attempt), Some(5));
}

#[test]
fn what_is_stopped_to_run_anew_does_so_whatever_it_says_at_its_end() {
    for policy in ["Always", "OnFailure", "Never"] {
        let running_after = |happens: fn(&mut World)| {
            let mut world = World::new(
                serde_json::json!({"restartPolicy": policy, "containers": [{"name": "a"}]}),
            );
            // As a good program does at SIGTERM.
            world.stop_code = 0;
            world.settle();
            happens(&mut world);
            world.settle();
            world.running().len()
        };
        assert_eq!(running_after(|world| world.change_image("a")), 1, "{policy}: another image");
        let sick = running_after(|world| {
            let run = world.observed.newest("a").map(|i| i.id.clone()).unwrap();
            world.memory.verdicts.get_mut(&run).unwrap().dead = Some("sick".to_owned());
        });
        let lost = running_after(|world| world.observed.sandboxes[0].ready = false);
        let expected = usize::from(policy != "Never");
        assert_eq!((sick, lost), (expected, expected), "{policy}: a bad probe, a lost sandbox");
    }
}

#[test]
fn another_image_does_not_start_what_has_done_its_work() {
    let mut spec = two();
    spec["restartPolicy"] = "OnFailure".into();
    let mut world = World::new(spec);
    world.settle();
    world.exit_named("a", 0);
    world.change_image("a");
    world.settle();
    assert_eq!(world.starts, ["a", "b"]);
}

#[test]
fn another_image_leaves_an_init_container_to_its_work() {
    let mut world = World::new(
        serde_json::json!({"initContainers": [{"name": "i"}], "containers": [{"name": "a"}]}),
    );
    world.settle();
    world.change_image("i");
    assert_eq!(world.plan(), Plan::default());
    world.exit_named("i", 1);
    world.settle();
    assert_eq!(world.running(), ["i"], "its next run has it");
    world.exit_named("i", 0);
    world.settle();
    assert_eq!(world.running(), ["a"]);
}

#[test]
fn the_probe_that_fails_says_how_long_the_container_may_take_to_end() {
    let probe = |secs: u64| serde_json::json!({"tcpSocket": {"port": 80}, "terminationGracePeriodSeconds": secs});
    let mut world =
        World::new(serde_json::json!({"terminationGracePeriodSeconds": 60, "containers": [
        {"name": "a", "livenessProbe": probe(10), "startupProbe": probe(20)},
        {"name": "b", "livenessProbe": probe(10)}]}));
    world.settle();
    let mut grace = |name: &str, started: bool| {
        let run = world.observed.newest(name).map(|i| i.id.clone()).unwrap();
        let dead = Some("sick".to_owned());
        world.memory.verdicts.insert(run, Verdicts { started, ready: false, dead });
        let stop = |step: &Step| match step {
            Step::Stop { name: stopped, grace, .. } if stopped == name => Some(grace.as_secs()),
            _ => None,
        };
        world.plan().steps.iter().find_map(stop)
    };
    assert_eq!(grace("a", false), Some(20));
    assert_eq!(grace("a", true), Some(10));
    assert_eq!(grace("b", false), Some(60));
}

#[test]
fn a_failed_start_waits_and_does_not_hold_up_the_others() {
    let mut world = World::new(two());
    world.apply(&Step::PrepareVolumes);
    world.apply(&Step::RunSandbox { attempt: 0 });
    let task = Task::Start("a".to_owned());
    world.memory.fail(task.clone(), "ErrImagePull", "no".to_owned(), world.now);
    world.settle();
    assert_eq!(world.running(), ["b"]);
    assert_eq!(
        world.plan().wake_at,
        Some(after(world.now, FRESH_FAILURE)),
        "the reason changes then"
    );
    world.pass(FRESH_FAILURE);
    assert_eq!(world.plan().wake_at, Some(after(world.now, Duration::from_secs(7))));
    world.pass(Duration::from_secs(7));
    world.settle();
    assert_eq!(world.running(), ["a", "b"]);
}

#[test]
fn deletion_cancels_what_was_begun_and_is_confirmed_once() {
    let mut world = World::new(two());
    world.settle();
    world.exit_named("b", 1);
    world.memory.busy.insert(Task::Start("b".to_owned()));
    world.delete();
    let steps = world.plan().steps;
    assert!(steps.contains(&Step::CancelStart { name: "b".to_owned() }), "{steps:?}");
    world.memory.busy.clear();
    world.settle();
    assert!(world.observed.is_empty() && world.memory.cleaned && world.memory.confirmed);
    world.work = None;
    assert!(world.settle().done);
}

#[test]
fn a_deleted_pod_serves_on_until_others_have_heard_of_it() {
    let mut world = World::new(two());
    world.settle();
    world.delete();
    world.memory.deleting_since = Some(world.now);
    let plan = world.plan();
    assert!(plan.steps.is_empty(), "{:?}", plan.steps);
    assert_eq!(plan.wake_at, Some(after(world.now, LONGEST_DRAIN)));
    // They have: it ends a moment later.
    world.memory.left_at = Some(after(world.now, SETTLE));
    assert_eq!(world.plan().wake_at, world.memory.left_at);
    world.pass(SETTLE);
    world.settle();
    assert!(world.observed.is_empty() && world.memory.confirmed);
}

#[test]
fn a_deleted_pod_does_not_wait_for_others_for_ever() {
    let mut spec = two();
    spec["terminationGracePeriodSeconds"] = 4.into();
    let mut world = World::new(spec);
    world.settle();
    world.delete();
    world.memory.deleting_since = Some(world.now);
    let bound = Duration::from_secs(2);
    assert_eq!(world.plan().wake_at, Some(after(world.now, bound)), "half of its grace period");
    // Confirmed at the last moment, it gets no more than the bound.
    world.memory.left_at = Some(after(world.now, bound + SETTLE));
    world.pass(bound);
    world.settle();
    assert!(world.observed.is_empty() && world.memory.confirmed);
}

#[test]
fn a_second_deletion_may_leave_less_time() {
    let mut world = World::new(two());
    world.settle();
    world.delete();
    let runs: Vec<String> = world.observed.instances.iter().map(|run| run.id.clone()).collect();
    for run in &runs {
        world.memory.busy.insert(Task::Stop(run.clone()));
        let at = after(world.now, Duration::from_secs(30));
        world.memory.killed_at.insert(run.clone(), at);
    }
    assert_eq!(world.plan().steps, [], "they are being stopped");
    let ask = |world: &mut World, secs| {
        let metadata = &mut world.work.as_mut().unwrap().pod.metadata;
        metadata.deletion_grace_period_seconds = Some(secs);
    };
    ask(&mut world, 29);
    assert_eq!(world.plan().steps, [], "that is as good as the same");
    ask(&mut world, 1);
    let grace = Duration::from_secs(1);
    let hurry = |id: &String| Step::Hurry { id: id.clone(), grace };
    assert_eq!(world.plan().steps, runs.iter().map(hurry).collect::<Vec<_>>());
    for run in &runs {
        world.memory.killed_at.insert(run.clone(), after(world.now, grace));
    }
    assert_eq!(world.plan().steps, [], "once is enough");
}

#[test]
fn an_unknown_pod_is_taken_down_without_a_word() {
    let mut world = World::new(two());
    world.settle();
    world.work = None;
    let grace = |step: &Step| if let Step::Stop { grace, .. } = step { grace.as_secs() } else { 0 };
    assert!(world.plan().steps.iter().all(|s| grace(s) == 5), "{:?}", world.plan().steps);
    let plan = world.settle();
    assert!(plan.done && world.observed.is_empty() && !world.memory.confirmed);
}

#[derive(Debug, Clone)]
enum Happening {
    Exit(usize, i32),
    LoseSandbox,
    Pass(u16),
    Adopt,
    Unhealthy(usize),
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        4 => (0usize..5, prop_oneof![Just(0), Just(1)]).prop_map(|(i, code)| Happening::Exit(i, code)),
        1 => Just(Happening::LoseSandbox),
        3 => any::<u16>().prop_map(Happening::Pass),
        1 => Just(Happening::Adopt),
        1 => (0usize..5).prop_map(Happening::Unhealthy),
    ]
}

proptest! {
    /// Whatever happens: the steps end, one run of a container at a time (asserted by the world), a new agent starts
    /// nothing that runs, and in the end nothing is left.
    #[test]
    fn lives_of_pods(
        policy in prop_oneof![Just("Always"), Just("OnFailure"), Just("Never")],
        init in 0usize..3, sidecar in any::<bool>(), main in 1usize..3,
        happenings in proptest::collection::vec(happening(), 0..25), known in any::<bool>()
    ) {
        let mut inits: Vec<serde_json::Value> = (0..init).map(|n| serde_json::json!({"name": format!("i{n}")})).collect();
        if sidecar {
            inits.push(serde_json::json!({"name": "s", "restartPolicy": "Always"}));
        }
        let containers: Vec<serde_json::Value> = (0..main).map(|n| serde_json::json!({"name": format!("c{n}")})).collect();
        let mut world = World::new(serde_json::json!({"restartPolicy": policy, "initContainers": inits, "containers": containers}));
        world.settle();
        for happening in happenings {
            match happening {
                Happening::Exit(index, code) => {
                    let id = world.observed.instances.get(index).map(|i| i.id.clone());
                    world.exit(&id.unwrap_or_default(), code);
                }
                Happening::LoseSandbox => world.lose_sandbox(),
                Happening::Pass(seconds) => world.pass(Duration::from_secs(seconds.into())),
                Happening::Adopt => {
                    let running = world.running().len();
                    let verdicts = world.memory.verdicts.clone();
                    let wanted = Memory { verdicts, ..Memory::default() };
                    world.memory = wanted;
                    let steps = world.plan().steps;
                    let harmless = |s: &Step| !matches!(s, Step::Stop { .. });
                    prop_assert!(running == 0 || steps.iter().all(harmless), "{:?}", steps);
                }
                Happening::Unhealthy(index) => {
                    let id = world.observed.instances.get(index).filter(|i| i.is_running()).map(|i| i.id.clone());
                    if let Some(verdicts) = id.and_then(|id| world.memory.verdicts.get_mut(&id)) {
                        verdicts.dead = Some("sick".to_owned());
                    }
                }
            }
            world.settle();
            let kept = world.observed.instances.len();
            prop_assert!(kept <= 2 * (init + main + usize::from(sidecar)), "old runs pile up: {}", kept);
            let again = plan(world.work.as_ref(), &Observed::new(
                world.observed.sandboxes.iter().rev().cloned().collect(),
                world.observed.instances.iter().rev().cloned().collect(),
            ), &world.memory, world.now);
            prop_assert_eq!(again, world.plan(), "the order of a list does not matter");
        }
        if policy == "Never" {
            // Nothing but a lost sandbox gives a container that never restarts a second run.
            let lost = world.observed.sandboxes.iter().map(|s| s.attempt).max().unwrap_or(0);
            for name in &world.starts {
                let times = world.starts.iter().filter(|n| *n == name).count();
                prop_assert!(name == "s" || times <= 1 + usize::try_from(lost).unwrap_or(0), "{} ran {} times", name, times);
            }
        }
        if known { world.delete(); } else { world.work = None; }
        world.settle();
        prop_assert!(world.observed.is_empty() && world.memory.cleaned);
        prop_assert_eq!(world.memory.confirmed, known);
    }
}
