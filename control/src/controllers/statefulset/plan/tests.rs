use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::controllers::statefulset::identity::{new_pod, pod_name};

fn now() -> Timestamp {
    "2026-01-01T00:01:00Z".parse().unwrap()
}

fn set(replicas: i32, spec: Value) -> StatefulSet {
    let mut set = json!({
        "metadata": {"namespace": "ns", "name": "db", "uid": "sts", "generation": 3},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "db"}}, "serviceName": "db",
            "template": {"metadata": {"labels": {"app": "db"}}, "spec": {"containers": []}}}});
    json_patch::merge(&mut set["spec"], &spec);
    serde_json::from_value(set).unwrap()
}

fn parallel(replicas: i32) -> StatefulSet {
    set(replicas, json!({"podManagementPolicy": "Parallel"}))
}

fn rolling(replicas: i32, amounts: Value) -> StatefulSet {
    set(replicas, json!({"updateStrategy": {"type": "RollingUpdate", "rollingUpdate": amounts}}))
}

/// A pod that serves, of a revision.
fn pod(number: i32, revision: &str, patch: Value) -> Arc<Pod> {
    let set = set(1, json!({}));
    let template = set.spec.as_ref().unwrap().template.clone();
    let mut pod = serde_json::to_value(new_pod(&set, number, &template, revision)).unwrap();
    let status = json!({"spec": {"nodeName": "n"}, "status": {"phase": "Running", "conditions": [
        {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:30Z"}]}});
    json_patch::merge(&mut pod, &status);
    json_patch::merge(&mut pod, &patch);
    Arc::new(serde_json::from_value(pod).unwrap())
}

fn serving(numbers: &[i32], revision: &str) -> Vec<Arc<Pod>> {
    numbers.iter().map(|number| pod(*number, revision, json!({}))).collect()
}

fn unready() -> Value {
    json!({"status": {"conditions": null}})
}

fn going() -> Value {
    json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:50Z"}})
}

fn failed() -> Value {
    json!({"status": {"phase": "Failed"}})
}

fn with(set: &StatefulSet, pods: &[Arc<Pod>], backoff: &Backoff) -> Plan {
    let lost = LostNodes::from(["lost".to_owned()]);
    plan(set, &Seen { pods, current: "old", newest: "new", lost: &lost, backoff, now: now() })
}

fn steps(set: &StatefulSet, pods: &[Arc<Pod>]) -> Vec<String> {
    with(set, pods, &Backoff::default()).steps.iter().map(ToString::to_string).collect()
}

#[test]
fn pods_come_one_after_the_other_or_all_at_once() {
    assert_eq!(steps(&set(3, json!({})), &[]), ["create pod 0"]);
    let first = serving(&[0], "new");
    assert_eq!(steps(&set(3, json!({})), &first), ["create pod 1"]);
    assert_eq!(steps(&set(3, json!({})), &[pod(0, "new", unready())]), [""; 0], "0 first");
    let lost = [pod(0, "new", json!({"spec": {"nodeName": "lost"}}))];
    assert_eq!(steps(&set(3, json!({})), &lost), [""; 0], "nobody hears from it");
    assert_eq!(steps(&parallel(3), &[pod(1, "new", unready())]), ["create pod 0", "create pod 2"]);
    let later = set(2, json!({"ordinals": {"start": 5}, "podManagementPolicy": "Parallel"}));
    assert_eq!(steps(&later, &first), ["create pod 5", "create pod 6", "delete pod db-0"]);
    assert_eq!(steps(&parallel(i32::MAX), &[]).len(), BURST, "the rest when those are there");
}

#[test]
fn the_last_goes_first_and_alone() {
    let pods = serving(&[0, 1, 2, 3], "new");
    assert_eq!(steps(&set(2, json!({})), &pods), ["delete pod db-3"]);
    let mut leaving = pods.clone();
    leaving[3] = pod(3, "new", going());
    assert_eq!(steps(&set(2, json!({})), &leaving), [""; 0]);
    let mut broken = pods.clone();
    broken[0] = pod(0, "new", unready());
    assert_eq!(steps(&set(2, json!({})), &broken), [""; 0], "all before it have to serve");
    let mut last_broken = pods.clone();
    last_broken[3] = pod(3, "new", unready());
    assert_eq!(steps(&set(2, json!({})), &last_broken), ["delete pod db-3"]);
    last_broken[2] = pod(2, "new", unready());
    assert_eq!(steps(&set(2, json!({})), &last_broken), [""; 0]);
    assert_eq!(steps(&parallel(2), &broken), ["delete pod db-3", "delete pod db-2"]);
}

#[test]
fn a_name_is_given_again_only_when_its_pod_is_gone() {
    for set in [set(1, json!({})), parallel(1)] {
        assert_eq!(steps(&set, &[pod(0, "new", going())]), [""; 0]);
        let away = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:50Z"},
            "spec": {"nodeName": "lost"}});
        assert_eq!(steps(&set, &[pod(0, "new", away)]), [""; 0]);
        assert_eq!(steps(&set, &[pod(0, "new", failed())]), ["delete pod db-0, which ended"]);
        let evicted = json!({"status": {"phase": "Failed", "containerStatuses": [{"name": "c",
            "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": {"running": {}}}]}});
        assert_eq!(steps(&set, &[pod(0, "new", evicted)]), [""; 0], "its container still runs");
        let mut backoff = Backoff::default();
        backoff.note("db-0", now());
        let plan = with(&set, &[pod(0, "new", failed())], &backoff);
        assert_eq!(plan.steps, []);
        assert_eq!(plan.look_again, Some("2026-01-01T00:01:01Z".parse().unwrap()));
    }
}

#[test]
fn an_update_begins_at_the_end_and_waits_for_each_pod() {
    let set = rolling(3, json!({}));
    let mut pods = serving(&[0, 1, 2], "old");
    assert_eq!(steps(&set, &pods), ["delete pod db-2"]);
    pods[2] = pod(2, "old", going());
    assert_eq!(steps(&set, &pods), [""; 0]);
    assert_eq!(steps(&set, &pods[..2]), ["create pod 2"]);
    pods[2] = pod(2, "new", unready());
    assert_eq!(steps(&set, &pods), [""; 0]);
    pods[2] = pod(2, "new", json!({}));
    assert_eq!(steps(&set, &pods), ["delete pod db-1"]);
    let mut patient = set.clone();
    patient.spec.as_mut().unwrap().min_ready_seconds = Some(60);
    let plan = with(&patient, &pods, &Backoff::default());
    assert_eq!(plan.steps, []);
    assert_eq!(plan.look_again, Some("2026-01-01T00:01:30Z".parse().unwrap()));
    let by_hand = super::tests::set(3, json!({"updateStrategy": {"type": "OnDelete"}}));
    assert_eq!(steps(&by_hand, &pods), [""; 0]);
    assert_eq!(steps(&by_hand, &pods[..2]), ["create pod 2"], "of the newest template");
}

#[test]
fn a_partition_keeps_what_is_before_it() {
    let set = rolling(4, json!({"partition": 2}));
    assert_eq!(steps(&set, &serving(&[0, 1, 2, 3], "old")), ["delete pod db-3"]);
    let mut pods = serving(&[0, 1], "old");
    pods.extend(serving(&[2, 3], "new"));
    assert_eq!(steps(&set, &pods), [""; 0]);
    assert_eq!(steps(&set, &pods[1..]), ["create pod 0 of the template before"]);
    assert_eq!(steps(&set, &pods[..3]), ["create pod 3"]);
    let mut later = set.clone();
    later.spec.as_mut().unwrap().ordinals =
        Some(serde_json::from_value(json!({"start": 1})).unwrap());
    let made = |missing: i32| {
        let numbers: Vec<i32> = (1..5).filter(|number| *number != missing).collect();
        steps(&later, &serving(&numbers, "new"))
    };
    assert_eq!(made(2), ["create pod 2 of the template before"], "from the first ordinal on");
    assert_eq!(made(3), ["create pod 3"]);
}

#[test]
fn no_more_are_away_than_may_be() {
    let mut set = rolling(5, json!({"maxUnavailable": "40%"}));
    let mut pods = serving(&[0, 1, 2, 3, 4], "old");
    assert_eq!(steps(&set, &pods), ["delete pod db-4", "delete pod db-3"]);
    set.spec.as_mut().unwrap().pod_management_policy = Some("Parallel".to_owned());
    pods[0] = pod(0, "old", unready());
    assert_eq!(steps(&set, &pods), ["delete pod db-4", "delete pod db-0"], "nobody misses it");
    pods[4] = pod(4, "new", unready());
    assert_eq!(steps(&set, &pods), ["delete pod db-0"]);
    assert_eq!(steps(&set, &pods[..4]), ["create pod 4", "delete pod db-0"]);
    // Where nobody serves, nobody is missed, and still they do not all go at once.
    let silent: Vec<_> = (0..5).map(|number| pod(number, "old", unready())).collect();
    assert_eq!(steps(&set, &silent), ["delete pod db-4", "delete pod db-3"]);
    assert_eq!(steps(&set, &silent[..3]), ["create pod 3", "create pod 4"]);
}

#[test]
fn pods_of_nobody_that_have_its_names_are_taken_over() {
    let free = |name: &str| {
        pod(
            0,
            "new",
            json!({"metadata": {"name": name, "ownerReferences": null, "labels": {
            "apps.kubernetes.io/pod-index": null}}}),
        )
    };
    let found = steps(&set(2, json!({})), &[free("db-0"), free("db-x"), free("other-1")]);
    assert_eq!(found, ["adopt pod db-0", "label pod db-0 as number 0", "create pod 1"]);
    let stray = pod(1, "new", json!({"metadata": {"labels": {"app": "other"}}}));
    let found = steps(&set(1, json!({})), &[pod(0, "new", json!({})), stray]);
    assert_eq!(found, ["release pod db-1"]);
    let misnamed = pod(0, "new", json!({"metadata": {"name": "db-x"}}));
    let found = steps(&set(1, json!({})), &[pod(0, "new", json!({})), misnamed]);
    assert_eq!(found, ["release pod db-x"]);
    let mut ended = (*free("db-0")).clone();
    ended.status.get_or_insert_default().phase = Some("Failed".to_owned());
    let found = steps(&set(1, json!({})), &[Arc::new(ended)]);
    assert_eq!(found, ["adopt pod db-0", "delete pod db-0, which ended"], "its name is needed");
    let mut leaving = set(2, json!({}));
    leaving.metadata.deletion_timestamp =
        Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now()));
    assert_eq!(steps(&leaving, &[]), [""; 0]);
}

#[test]
fn status_tells_the_revisions_apart_until_an_update_is_done() {
    let set = rolling(3, json!({}));
    let mut pods = serving(&[0, 1], "old");
    pods.push(pod(2, "new", unready()));
    let status = |pods: &[Arc<Pod>]| with(&set, pods, &Backoff::default()).status;
    let expected = StatefulSetStatus {
        available_replicas: Some(2),
        current_replicas: Some(2),
        current_revision: Some("old".to_owned()),
        observed_generation: Some(3),
        ready_replicas: Some(2),
        replicas: 3,
        update_revision: Some("new".to_owned()),
        updated_replicas: Some(1),
        ..StatefulSetStatus::default()
    };
    assert_eq!(status(&pods), expected);
    let done = status(&serving(&[0, 1, 2], "new"));
    assert_eq!((done.current_revision.as_deref(), done.current_replicas), (Some("new"), Some(3)));
    let more = status(&serving(&[0, 1, 2, 3], "new"));
    assert_eq!(more.current_revision.as_deref(), Some("old"), "one is too much");
}

/// Takes the steps: a new pod serves at once, a deleted one is gone.
fn take(set: &StatefulSet, steps: Vec<Step>, pods: &mut Vec<Arc<Pod>>) {
    for step in steps {
        match step {
            Step::Create { ordinal, newest } => {
                assert!(pods.iter().all(|pod| name(pod) != pod_name(set, ordinal)), "twice");
                pods.push(pod(ordinal, if newest { "new" } else { "old" }, json!({})));
            }
            Step::Delete(gone) | Step::Renew(gone) => pods.retain(|pod| name(pod) != gone),
            Step::Adopt(_) | Step::Release(_) | Step::Identify(..) => panic!("{step}"),
        }
    }
}

proptest! {
    #[test]
    fn every_set_gets_what_it_asks_for(
        present in proptest::collection::btree_map(0_i32..8, 0_usize..3, 0..8),
        replicas in 0_i32..6,
        start in 0_i32..3,
        partition in 0_i32..4,
        in_parallel in any::<bool>(),
    ) {
        let policy = if in_parallel { "Parallel" } else { "OrderedReady" };
        let set = set(replicas, json!({"ordinals": {"start": start}, "podManagementPolicy": policy,
            "updateStrategy": {"rollingUpdate": {"partition": partition}}}));
        let mut pods: Vec<Arc<Pod>> = present.iter().map(|(number, kind)| match kind {
            0 => pod(*number, "old", json!({})),
            1 => pod(*number, "new", json!({})),
            _ => pod(*number, "old", failed()),
        }).collect();
        for _ in 0..60 {
            let steps = with(&set, &pods, &Backoff::default()).steps;
            if steps.is_empty() {
                break;
            }
            let serve = |pods: &[Arc<Pod>]| pods.iter().filter(|p| objects::is_active(p)).count();
            let before = serve(&pods);
            take(&set, steps, &mut pods);
            if !in_parallel {
                prop_assert!(serve(&pods) + 1 >= before, "one at a time");
            }
        }
        let mut found: Vec<(i32, bool)> = pods.iter()
            .map(|pod| (ordinal(&set, pod).unwrap(), revision(pod) == Some("new"))).collect();
        found.sort_unstable();
        let numbers: Vec<i32> = found.iter().map(|(number, _)| *number).collect();
        prop_assert_eq!(numbers, (start..start + replicas).collect::<Vec<_>>());
        for (number, newest) in found {
            prop_assert!(newest || number < start + partition, "{} is not updated", number);
        }
    }
}
