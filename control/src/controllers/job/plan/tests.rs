use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::pod::{TRACKING, new_pod};
use super::super::verdict::condition;
use super::*;

const NOW: &str = "2026-01-01T00:10:00Z";

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn job(spec: Value, status: Value) -> Job {
    let mut base = json!({
        "metadata": {"namespace": "d", "name": "j", "uid": "job"},
        "spec": {"parallelism": 1, "completions": 1, "backoffLimit": 6, "completionMode": "NonIndexed",
            "podReplacementPolicy": "TerminatingOrFailed", "selector": {"matchLabels": {"u": "job"}},
            "template": {"metadata": {"labels": {"u": "job"}}, "spec": {"restartPolicy": "Never", "containers": [{"name": "c"}]}}},
        "status": {"startTime": "2026-01-01T00:00:00Z"},
    });
    json_patch::merge(&mut base["spec"], &spec);
    json_patch::merge(&mut base["status"], &status);
    serde_json::from_value(base).unwrap()
}

fn indexed(spec: Value, status: Value) -> Job {
    let mut base = json!({"completionMode": "Indexed", "completions": 4, "parallelism": 2});
    json_patch::merge(&mut base, &spec);
    job(base, status)
}

/// A pod of the Job that runs, tracked.
fn pod(name: &str, patch: Value) -> Arc<Pod> {
    let mut base = json!({
        "metadata": {"namespace": "d", "name": name, "uid": name, "labels": {"u": "job"}, "finalizers": [TRACKING],
            "creationTimestamp": "2026-01-01T00:00:00Z", "ownerReferences": [
            {"apiVersion": "batch/v1", "kind": "Job", "name": "j", "uid": "job", "controller": true}]},
        "spec": {"nodeName": "n", "containers": []},
        "status": {"phase": "Running"},
    });
    json_patch::merge(&mut base, &patch);
    Arc::new(serde_json::from_value(base).unwrap())
}

fn ended(name: &str, phase: &str, finished: &str) -> Arc<Pod> {
    let code = i32::from(phase == "Failed");
    let state = json!({"terminated": {"exitCode": code, "finishedAt": finished}});
    pod(
        name,
        json!({"status": {"phase": phase, "containerStatuses": [{"name": "c", "ready": false, "restartCount": 0,
        "image": "", "imageID": "", "state": state}]}}),
    )
}

fn with_index(pod: &Arc<Pod>, index: u32) -> Arc<Pod> {
    let mut pod = (**pod).clone();
    let text = index.to_string();
    pod.metadata
        .annotations
        .get_or_insert_default()
        .insert(super::super::pod::INDEX.to_owned(), text);
    Arc::new(pod)
}

fn released(pod: &Arc<Pod>) -> Arc<Pod> {
    let mut pod = (**pod).clone();
    pod.metadata.finalizers = None;
    Arc::new(pod)
}

fn going(name: &str, grace: i64) -> Arc<Pod> {
    pod(name, json!({"metadata": {"deletionTimestamp": NOW, "deletionGracePeriodSeconds": grace}}))
}

fn make(job: &Job, pods: &[Arc<Pod>]) -> Plan {
    plan(job, pods, at(NOW))
}

fn has(plan: &Plan, type_: &str) -> Option<String> {
    let found = condition(&plan.status, type_).filter(|found| found.status == "True")?;
    found.reason.clone()
}

fn of_indexes(indexes: &[u32]) -> Step {
    Step::Create(indexes.iter().map(|index| at_index(*index)).collect())
}

fn create(count: usize) -> Vec<Step> {
    vec![Step::Create(vec![Attempt::default(); count])]
}

#[test]
fn as_many_pods_run_as_are_wanted_and_missing() {
    let none = json!({});
    for (spec, pods, steps) in [
        (json!({"parallelism": 3, "completions": 5}), vec![], create(3)),
        (json!({"parallelism": 3, "completions": 2}), vec![], create(2)),
        (json!({"parallelism": 0, "completions": 2}), vec![], vec![]),
        (json!({"parallelism": 3, "completions": null}), vec![pod("a", none.clone())], create(2)),
        (
            json!({"parallelism": 2, "completions": 5}),
            vec![pod("a", none.clone()), pod("b", none.clone())],
            vec![],
        ),
        (
            json!({"parallelism": 1, "completions": 5}),
            vec![pod("a", none.clone()), pod("b", none.clone())],
            vec![Step::Discard("a".into())],
        ),
        (
            json!({"parallelism": 1, "suspend": true}),
            vec![pod("a", none.clone())],
            vec![Step::Discard("a".into())],
        ),
    ] {
        let text = spec.to_string();
        assert_eq!(make(&job(spec, none.clone()), &pods).steps, steps, "{text}");
    }
}

#[test]
fn an_end_is_noted_then_released_then_a_number() {
    let spec = json!({"parallelism": 2, "completions": 3});
    let (good, bad) =
        (ended("good", "Succeeded", NOW), ended("bad", "Failed", "2026-01-01T00:00:00Z"));
    let first = make(&job(spec.clone(), json!({})), &[good.clone(), bad.clone()]);
    let noted = first.status.uncounted_terminated_pods.clone().unwrap();
    assert_eq!(
        (noted.succeeded, noted.failed),
        (Some(vec!["good".into()]), Some(vec!["bad".into()]))
    );
    assert_eq!((first.status.succeeded, first.status.failed), (None, None));
    let release = [Step::Release("good".into()), Step::Release("bad".into())];
    assert_eq!(first.steps[..2], release);
    assert_eq!(first.steps[2..], create(2), "two successes are missing");

    // Killed before anything was released: the same again, and nothing twice.
    let stored = |plan: &Plan| job(spec.clone(), serde_json::to_value(&plan.status).unwrap());
    let second = make(&stored(&first), &[good.clone(), bad.clone()]);
    assert_eq!(second, first);
    // One is gone, one is there without the finalizer.
    let third = make(&stored(&first), &[released(&good)]);
    assert_eq!((third.status.succeeded, third.status.failed), (Some(1), Some(1)));
    assert_eq!(third.status.uncounted_terminated_pods, None);
    let fourth = make(&stored(&third), &[released(&good)]);
    assert_eq!(fourth.status, third.status);
}

#[test]
fn a_pod_that_is_being_deleted_is_replaced_at_once_or_when_it_has_ended() {
    let at_once = job(json!({}), json!({}));
    let plan = make(&at_once, &[going("a", 30)]);
    assert_eq!(plan.steps, [vec![Step::Release("a".into())], create(1)].concat());
    assert_eq!(plan.status.terminating, Some(1));
    let later = job(json!({"podReplacementPolicy": "Failed"}), json!({}));
    assert_eq!(make(&later, &[going("a", 30)]).steps, []);
    let plan = make(&later, &[going("a", 0)]);
    assert_eq!(plan.steps, [vec![Step::Release("a".into())], create(1)].concat());
    assert_eq!(plan.status.uncounted_terminated_pods.unwrap().failed, Some(vec!["a".into()]));
}

#[test]
fn failures_hold_the_next_pod_back_longer_and_longer_until_one_succeeds() {
    let wait = |pods: &[Arc<Pod>]| {
        let plan = make(&job(json!({"completions": 9, "backoffLimit": 99}), json!({})), pods);
        let creates = plan.steps.iter().any(|step| matches!(step, Step::Create(_)));
        (creates, plan.look_again.map(|at| at.to_string()))
    };
    let failed = |name: &str, at: &str| ended(name, "Failed", at);
    assert_eq!(
        wait(&[failed("a", "2026-01-01T00:09:55Z")]),
        (false, Some("2026-01-01T00:10:05Z".into()))
    );
    assert_eq!(wait(&[failed("a", "2026-01-01T00:09:50Z")]), (true, None), "the time is up");
    assert_eq!(wait(&[failed("a", "2026-01-01T03:00:00Z")]), (true, None), "a clock is wrong");
    let two = [failed("a", "2026-01-01T00:09:00Z"), failed("b", "2026-01-01T00:09:55Z")];
    assert_eq!(wait(&two), (false, Some("2026-01-01T00:10:15Z".into())));
    let many: Vec<_> = (0..12).map(|n| failed(&n.to_string(), "2026-01-01T00:09:00Z")).collect();
    assert_eq!(wait(&many), (false, Some("2026-01-01T00:15:00Z".into())), "six minutes at most");
    let mut healed = many;
    healed.push(ended("good", "Succeeded", "2026-01-01T00:09:30Z"));
    assert_eq!(wait(&healed), (true, None));
}

#[test]
fn a_job_is_over_when_none_of_its_pods_is_left() {
    let limited = json!({"parallelism": 3, "completions": 3, "backoffLimit": 0});
    let pods = [ended("a", "Failed", NOW), pod("b", json!({}))];
    let first = make(&job(limited.clone(), json!({})), &pods);
    assert_eq!(has(&first, "FailureTarget").as_deref(), Some("BackoffLimitExceeded"));
    assert_eq!(has(&first, "Failed"), None);
    assert_eq!(first.steps, [Step::Release("a".into()), Step::Delete("b".into())]);
    let stored = |plan: &Plan| job(limited.clone(), serde_json::to_value(&plan.status).unwrap());
    let second = make(&stored(&first), &[released(&pods[0]), going("b", 30)]);
    assert_eq!((has(&second, "Failed"), second.status.terminating), (None, Some(1)));
    assert_eq!(second.steps, [Step::Release("b".into())]);
    let third = make(&stored(&second), &[released(&pods[0])]);
    assert_eq!(has(&third, "Failed").as_deref(), Some("BackoffLimitExceeded"));
    assert_eq!((third.status.failed, third.status.active), (Some(2), None));
    assert_eq!(third.status.completion_time, None);
    assert_eq!(make(&stored(&third), &[]).status, third.status);
}

#[test]
fn enough_successes_complete_a_job() {
    let stored = |spec: Value, pods: &[Arc<Pod>]| {
        let mut status = json!({});
        for _ in 0..3 {
            let plan = make(&job(spec.clone(), status), pods);
            status = serde_json::to_value(plan.status).unwrap();
        }
        status
    };
    let good = released(&ended("good", "Succeeded", NOW));
    let told = stored(json!({}), &[ended("good", "Succeeded", NOW)]);
    assert!(told["completionTime"].is_null(), "it is not counted yet: {told}");
    let counted = make(
        &job(json!({}), json!({"uncountedTerminatedPods": {"succeeded": ["good"]}})),
        std::slice::from_ref(&good),
    );
    assert_eq!(has(&counted, "Complete").as_deref(), Some("CompletionsReached"));
    assert_eq!(has(&counted, "SuccessCriteriaMet").as_deref(), Some("CompletionsReached"));
    assert_eq!(counted.status.completion_time, Some(Time(at(NOW))));
    assert_eq!(
        has(&make(&job(json!({"completions": 0}), json!({})), &[]), "Complete").as_deref(),
        Some("CompletionsReached")
    );

    // A work queue is done when one succeeded and the others have ended.
    let queue = json!({"completions": null, "parallelism": 2});
    let busy = make(&job(queue.clone(), json!({"succeeded": 1})), &[pod("b", json!({}))]);
    assert_eq!((has(&busy, "SuccessCriteriaMet"), busy.steps), (None, vec![]));
    assert!(has(&make(&job(queue, json!({"succeeded": 1})), &[]), "Complete").is_some());
}

#[test]
fn time_ends_a_job_and_what_is_left_of_it() {
    let slow = job(json!({"activeDeadlineSeconds": 600}), json!({}));
    let plan = make(&slow, &[pod("a", json!({}))]);
    assert_eq!(has(&plan, "FailureTarget").as_deref(), Some("DeadlineExceeded"));
    assert_eq!(plan.steps, [Step::Delete("a".into())]);
    let soon = make(&job(json!({"activeDeadlineSeconds": 601}), json!({})), &[pod("a", json!({}))]);
    assert_eq!(soon.look_again, Some(at("2026-01-01T00:10:01Z")));
    let paused = json!({"activeDeadlineSeconds": 1, "suspend": true});
    assert_eq!(has(&make(&job(paused, json!({})), &[]), "FailureTarget"), None);

    let over = json!({"conditions": [{"type": "Failed", "status": "True", "lastTransitionTime": "2026-01-01T00:09:00Z"}]});
    let kept = |ttl: Value| make(&job(json!({"ttlSecondsAfterFinished": ttl}), over.clone()), &[]);
    assert_eq!(kept(json!(60)).steps, [Step::Remove]);
    assert_eq!(kept(json!(61)).look_again, Some(at("2026-01-01T00:10:01Z")));
    assert_eq!((kept(json!(null)).steps, kept(json!(null)).look_again), (vec![], None));
}

#[test]
fn a_job_pauses_and_begins_anew() {
    let paused = make(&job(json!({"suspend": true}), json!({"startTime": null})), &[]);
    assert_eq!(has(&paused, "Suspended").as_deref(), Some("JobSuspended"));
    assert_eq!((paused.status.start_time.clone(), paused.steps), (None, vec![]));
    let resumed = make(&job(json!({}), serde_json::to_value(paused.status).unwrap()), &[]);
    assert_eq!(has(&resumed, "Suspended"), None);
    assert_eq!(resumed.status.start_time, Some(Time(at(NOW))));
    assert_eq!(resumed.steps, create(1));
}

#[test]
fn an_indexed_job_works_on_each_index_once() {
    let running = |name: &str, index| with_index(&pod(name, json!({})), index);
    let done = |name: &str, index| with_index(&ended(name, "Succeeded", NOW), index);
    let fresh = make(&indexed(json!({}), json!({})), &[]);
    assert_eq!(fresh.steps, [of_indexes(&[0, 1])]);
    let pods = [done("a", 0), running("b", 1)];
    let next = make(&indexed(json!({}), json!({})), &pods);
    assert_eq!(next.status.completed_indexes.as_deref(), Some("0"));
    assert_eq!(next.status.succeeded, Some(1), "the index is its own note");
    assert_eq!(next.steps, [Step::Release("a".into()), of_indexes(&[2])]);
    // The same index twice, one that is done and one that there is not.
    let odd = [running("b", 1), running("c", 1), running("d", 0), running("e", 7), running("f", 3)];
    let status = json!({"completedIndexes": "0", "succeeded": 1});
    let plan = make(&indexed(json!({}), status), &odd);
    let discarded = ["c", "d", "e"].map(|pod| Step::Discard(pod.to_owned()));
    assert_eq!(plan.steps, discarded);
    // Smaller: what was done beyond does not count.
    let smaller = json!({"completions": 2, "parallelism": 2});
    let plan = make(&indexed(smaller, json!({"completedIndexes": "1,3"})), &[]);
    assert_eq!(plan.status.completed_indexes.as_deref(), Some("1"));
    assert_eq!(plan.steps, [of_indexes(&[0])]);
    let all = make(&indexed(json!({}), json!({"completedIndexes": "0-3"})), &[]);
    assert_eq!(has(&all, "Complete").as_deref(), Some("CompletionsReached"));
    let waits = indexed(json!({"podReplacementPolicy": "Failed"}), json!({}));
    assert_eq!(make(&waits, &[with_index(&going("a", 30), 0)]).steps, [of_indexes(&[1])]);
}

fn at_index(index: u32) -> Attempt {
    Attempt { index: Some(index), ..Attempt::default() }
}

#[test]
fn pods_of_an_index_know_it() {
    let job = indexed(json!({}), json!({}));
    let pod = new_pod(&job, at_index(3));
    assert_eq!(pod.metadata.generate_name.as_deref(), Some("j-3-"));
    let index = "batch.kubernetes.io/job-completion-index";
    assert_eq!(pod.metadata.labels.unwrap()[index], "3");
    assert_eq!(pod.metadata.annotations.unwrap()[index], "3");
    assert_eq!(pod.metadata.finalizers.unwrap(), [TRACKING]);
    let spec = pod.spec.unwrap();
    assert_eq!(spec.hostname.as_deref(), Some("j-3"));
    let variable = spec.containers[0].env.as_ref().unwrap()[0].clone();
    assert_eq!(variable.name, "JOB_COMPLETION_INDEX");
    let path = variable.value_from.unwrap().field_ref.unwrap().field_path;
    assert_eq!(path, "metadata.labels['batch.kubernetes.io/job-completion-index']");
    let mut long = job.clone();
    long.metadata.name = Some("x".repeat(63));
    let base = new_pod(&long, at_index(12)).metadata.generate_name.unwrap();
    assert!(base.len() == 58 && base.ends_with("x-12-"), "{base}");
    long.metadata.name = Some("x".repeat(56) + ".y");
    let base = new_pod(&long, Attempt::default()).metadata.generate_name.unwrap();
    assert_eq!(base, "x".repeat(56) + "-", "cut at the dot");
    assert_eq!(new_pod(&job, Attempt::default()).spec.unwrap().hostname, None);
}

#[test]
fn rules_say_what_a_failure_means() {
    let rules = json!([
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": "c", "operator": "In", "values": [42]}},
        {"action": "Count", "onExitCodes": {"operator": "NotIn", "values": [42]}}]);
    let strict = json!({"podFailurePolicy": {"rules": rules}, "podReplacementPolicy": "Failed"});
    let exited = |code: i32| {
        pod(
            "a",
            json!({"status": {"phase": "Failed", "containerStatuses": [{"name": "c", "ready": false, "restartCount": 0,
            "image": "", "imageID": "", "state": {"terminated": {"exitCode": code, "finishedAt": "2026-01-01T00:00:00Z"}}}]}}),
        )
    };
    let evicted = pod(
        "a",
        json!({"status": {"phase": "Failed", "conditions": [{"type": "DisruptionTarget", "status": "True"}]}}),
    );
    let job = job(strict, json!({}));
    let ignored = make(&job, &[evicted]);
    assert_eq!(ignored.status.uncounted_terminated_pods, None);
    assert_eq!(ignored.steps[0], Step::Release("a".into()));
    let fatal = make(&job, &[exited(42)]);
    let target = condition(&fatal.status, "FailureTarget").unwrap();
    assert_eq!(target.reason.as_deref(), Some("PodFailurePolicy"));
    let message =
        "Container c for pod d/a failed with exit code 42 matching FailJob rule at index 1";
    assert_eq!(target.message.as_deref(), Some(message));
    let counted = make(&job, &[exited(1)]);
    assert_eq!(has(&counted, "FailureTarget"), None);
    assert_eq!(counted.status.uncounted_terminated_pods.unwrap().failed, Some(vec!["a".into()]));
}

#[test]
fn some_indexes_may_be_enough() {
    let reached = |rule: Value, done: &str| {
        let spec = json!({"successPolicy": {"rules": [rule]}});
        let plan = make(
            &indexed(spec, json!({"completedIndexes": done})),
            &[with_index(&pod("a", json!({})), 3)],
        );
        (has(&plan, "SuccessCriteriaMet"), plan.steps.contains(&Step::Delete("a".into())))
    };
    let yes = (Some("SuccessPolicy".to_owned()), true);
    for (rule, done, enough) in [
        (json!({"succeededCount": 2}), "0,2", true),
        (json!({"succeededCount": 2}), "0", false),
        (json!({"succeededIndexes": "1,2"}), "1,2", true),
        (json!({"succeededIndexes": "1,2"}), "0,2", false),
        (json!({"succeededIndexes": "0-2", "succeededCount": 1}), "2", true),
        (json!({"succeededIndexes": "1,2", "succeededCount": 1}), "0", false),
    ] {
        assert_eq!(reached(rule.clone(), done) == yes, enough, "{rule} {done}");
    }
}

/// A pod of an index that failed so often before.
fn tried(pod: &Arc<Pod>, index: u32, failures: u32) -> Arc<Pod> {
    let mut pod = (*with_index(pod, index)).clone();
    let key = "batch.kubernetes.io/job-index-failure-count".to_owned();
    pod.metadata.annotations.get_or_insert_default().insert(key, failures.to_string());
    Arc::new(pod)
}

#[test]
fn each_index_may_have_its_own_limit() {
    let per_index = json!({"backoffLimit": i32::MAX, "backoffLimitPerIndex": 1, "parallelism": 4, "completions": 2});
    let of = |status: Value, pods: &[Arc<Pod>]| make(&indexed(per_index.clone(), status), pods);
    let failed =
        |name: &str, failures| tried(&ended(name, "Failed", "2026-01-01T00:09:55Z"), 0, failures);
    let other = with_index(&pod("other", json!({})), 1);
    // The first failure is known to the next pod, which waits; until then its pod stays.
    let first = of(json!({}), &[failed("a", 0), other.clone()]);
    assert_eq!((first.steps.clone(), first.look_again), (vec![], Some(at("2026-01-01T00:10:05Z"))));
    let stored = serde_json::to_value(&first.status).unwrap();
    let long_ago = tried(&ended("a", "Failed", "2026-01-01T00:09:00Z"), 0, 0);
    let again = of(stored.clone(), &[long_ago.clone(), other.clone()]);
    assert_eq!(
        again.steps,
        [Step::Create(vec![Attempt { index: Some(0), failures: 1, ignored: 0 }])]
    );
    let next = tried(&pod("b", json!({})), 0, 1);
    let replaced = of(stored, &[long_ago, next, other.clone()]);
    assert_eq!(replaced.steps, [Step::Release("a".into())]);
    // The second one is the end of the index, not of the Job.
    let second = of(json!({}), &[failed("b", 1), other.clone()]);
    assert_eq!(second.status.failed_indexes.as_deref(), Some("0"));
    assert_eq!(second.steps, [Step::Release("b".into())]);
    assert_eq!(has(&second, "FailureTarget"), None);
    let over = of(json!({"failedIndexes": "0", "completedIndexes": "1"}), &[]);
    assert_eq!(has(&over, "Failed").as_deref(), Some("FailedIndexes"));
    let rules = json!({"successPolicy": {"rules": [{"succeededIndexes": "1"}]}, "backoffLimitPerIndex": 1, "completions": 2});
    let both = json!({"failedIndexes": "0", "completedIndexes": "1"});
    let plan = make(&indexed(rules, both), &[]);
    assert_eq!(has(&plan, "Failed").as_deref(), Some("FailedIndexes"), "as in Kubernetes");
    // One that was discarded is no failure, whatever its node says of it.
    let discarded = |grace: i64| {
        let mut pod = (*failed("a", 0)).clone();
        pod.metadata.finalizers = None;
        pod.metadata.deletion_timestamp = Some(Time(at(NOW)));
        pod.metadata.deletion_grace_period_seconds = Some(grace);
        Arc::new(pod)
    };
    let fresh = [Step::Create(vec![at_index(0)])];
    assert_eq!(of(json!({}), &[discarded(30), other.clone()]).steps, fresh);
    let plain = make(&job(json!({}), json!({})), &[discarded(30)]);
    assert_eq!(plain.steps, [Step::Create(vec![Attempt::default()])]);
    let strict = json!({"maxFailedIndexes": 0, "backoffLimitPerIndex": 0});
    let plan = make(&indexed(strict, json!({})), &[failed("a", 0), other.clone()]);
    assert_eq!(has(&plan, "FailureTarget").as_deref(), Some("MaxFailedIndexesExceeded"));
    assert_eq!(plan.steps, [Step::Release("a".into()), Step::Delete("other".into())]);
    // When the Job ends, nobody has to learn anything.
    let decided =
        json!({"conditions": [{"type": "FailureTarget", "status": "True", "reason": "X"}]});
    assert_eq!(of(decided, &[failed("a", 0)]).steps, [Step::Release("a".into())]);
    let rules = json!([{"action": "FailIndex", "onExitCodes": {"operator": "In", "values": [1]}}]);
    let fatal = json!({"backoffLimitPerIndex": 5, "podFailurePolicy": {"rules": rules}});
    let plan = make(&indexed(fatal, json!({})), &[failed("a", 0)]);
    assert_eq!(plan.status.failed_indexes.as_deref(), Some("0"));
    let pod =
        new_pod(&indexed(per_index.clone(), json!({})), Attempt { failures: 1, ..at_index(0) });
    assert_eq!(Attempt::of(&pod), Attempt { index: Some(0), failures: 1, ignored: 0 });
}

#[test]
fn restarts_within_a_pod_count_where_they_are_how_to_try_again() {
    let restarted = |count: i32| {
        pod(
            "a",
            json!({"status": {"containerStatuses": [{"name": "c", "ready": true, "restartCount": count, "image": "", "imageID": ""}]}}),
        )
    };
    let tries = json!({"backoffLimit": 3, "template": {"spec": {"restartPolicy": "OnFailure"}}});
    let of =
        |count| has(&make(&job(tries.clone(), json!({})), &[restarted(count)]), "FailureTarget");
    assert_eq!((of(2), of(3).as_deref()), (None, Some("BackoffLimitExceeded")));
}

#[test]
fn only_its_own_pods_matter() {
    let strange = pod("a", json!({"metadata": {"labels": {"u": "other"}}}));
    let plan = make(&job(json!({}), json!({})), &[strange]);
    assert_eq!(plan.steps, [create(1), vec![Step::Disown("a".into())]].concat());
    let free = pod("a", json!({"metadata": {"ownerReferences": null}}));
    let plan = make(&job(json!({}), json!({})), &[free]);
    assert_eq!(plan.steps, [create(1), vec![Step::Adopt("a".into())]].concat());
    let deleted: Job = {
        let mut job = job(json!({}), json!({}));
        job.metadata.deletion_timestamp = Some(Time(at(NOW)));
        job
    };
    assert_eq!(make(&deleted, &[pod("a", json!({}))]).steps, [Step::Release("a".into())]);
}

/// What may happen to a Job's pods between two looks.
#[derive(Debug, Clone, Copy)]
enum Turn {
    /// The controller looks, and does so many of its steps before it is killed.
    Look(usize),
    /// A pod ends.
    End(usize, bool),
    /// Somebody deletes a pod.
    Delete(usize),
}

fn turns() -> impl Strategy<Value = Vec<Turn>> {
    let one = prop_oneof![
        3 => (0..6_usize).prop_map(Turn::Look),
        2 => (0..8_usize, any::<bool>()).prop_map(|(pod, good)| Turn::End(pod, good)),
        1 => (0..8_usize).prop_map(Turn::Delete),
    ];
    proptest::collection::vec(one, 0..60)
}

/// The pods and the Job as they are stored, and how each pod truly ended.
struct World {
    job: Job,
    pods: Vec<Pod>,
    made: usize,
    ended: [i32; 2],
}

impl World {
    fn look(&mut self, most: usize) {
        let pods: Vec<_> = self.pods.iter().cloned().map(Arc::new).collect();
        // Long after: nothing is held back.
        let plan = plan(&self.job, &pods, at("2026-01-02T00:00:00Z"));
        self.job.status = Some(plan.status);
        for step in plan.steps.into_iter().take(most) {
            self.take(step);
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Release(name) => {
                if let Some(pod) = self.find(&name) {
                    pod.metadata.finalizers = None;
                }
            }
            Step::Discard(name) | Step::Delete(name) => {
                if let Some(pod) = self.find(&name) {
                    pod.metadata.deletion_timestamp = Some(Time(at(NOW)));
                }
            }
            Step::Create(pods) => {
                for _ in pods {
                    self.made += 1;
                    let name = format!("p{}", self.made);
                    self.pods.push((*pod(&name, json!({}))).clone());
                }
            }
            other => panic!("{other}"),
        }
        self.pods.retain(|pod| {
            pod.metadata.deletion_timestamp.is_none() || pod.metadata.finalizers.is_some()
        });
    }

    fn find(&mut self, name: &str) -> Option<&mut Pod> {
        self.pods.iter_mut().find(|pod| pod.metadata.name.as_deref() == Some(name))
    }

    fn end(&mut self, nth: usize, good: bool) {
        let alive = self.pods.iter_mut().filter(|pod| objects::is_active(pod));
        if let Some(pod) = alive.into_iter().nth(nth) {
            let phase = if good { "Succeeded" } else { "Failed" };
            pod.status.as_mut().unwrap().phase = Some(phase.to_owned());
            self.ended[usize::from(good)] += 1;
        }
    }

    /// Deleted by somebody: it is a failure if it had not ended.
    fn delete(&mut self, nth: usize) {
        if let Some(pod) = self.pods.get_mut(nth)
            && pod.metadata.deletion_timestamp.is_none()
        {
            pod.metadata.deletion_timestamp = Some(Time(at(NOW)));
            self.ended[0] += i32::from(!objects::have_ended(pod));
        }
        self.pods.retain(|pod| {
            pod.metadata.deletion_timestamp.is_none() || pod.metadata.finalizers.is_some()
        });
    }
}

proptest! {
    /// Whoever is killed whenever: each end is counted once, and never are there more pods than wanted.
    #[test]
    fn nothing_is_lost_and_nothing_counted_twice(turns in turns()) {
        let spec = json!({"parallelism": 3, "completions": 1000, "backoffLimit": 1000});
        let mut world = World { job: job(spec, json!({})), pods: Vec::new(), made: 0, ended: [0, 0] };
        for turn in turns {
            match turn {
                Turn::Look(most) => world.look(most),
                Turn::End(pod, good) => world.end(pod, good),
                Turn::Delete(pod) => world.delete(pod),
            }
            let active = world.pods.iter().filter(|pod| objects::is_active(pod)).count();
            prop_assert!(active <= 3, "{active}");
        }
        (0..4).for_each(|_| world.look(usize::MAX));
        let status = world.job.status.unwrap();
        prop_assert_eq!(status.uncounted_terminated_pods, None);
        prop_assert_eq!([status.failed.unwrap_or(0), status.succeeded.unwrap_or(0)], world.ended);
    }
}
