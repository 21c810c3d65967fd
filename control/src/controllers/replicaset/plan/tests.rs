use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn now() -> Timestamp {
    "2026-01-01T00:01:00Z".parse().unwrap()
}

fn set(replicas: i32, patch: Value) -> ReplicaSet {
    let mut set = json!({
        "metadata": {"namespace": "default", "name": "web", "uid": "rs", "generation": 3},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": {"app": "web", "v": "1"}}, "spec": {"containers": []}}},
    });
    json_patch::merge(&mut set, &patch);
    serde_json::from_value(set).unwrap()
}

fn pod(name: &str, patch: Value) -> Arc<Pod> {
    let mut pod = json!({
        "metadata": {"namespace": "default", "name": name, "uid": name, "labels": {"app": "web", "v": "1"},
            "creationTimestamp": "2026-01-01T00:00:00Z", "ownerReferences": [
            {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "rs", "controller": true}]},
        "spec": {"nodeName": "n", "containers": []},
        "status": {"phase": "Running", "conditions": [
            {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:30Z"}]},
    });
    json_patch::merge(&mut pod, &patch);
    Arc::new(serde_json::from_value(pod).unwrap())
}

fn make(set: &ReplicaSet, pods: &[Arc<Pod>]) -> Plan {
    plan(set, pods, &LostNodes::new(), None, now())
}

#[test]
fn missing_pods_are_created_and_surplus_deleted() {
    assert_eq!(make(&set(3, json!({})), &[]).steps, [Step::Create(3)]);
    let many = make(&set(i32::MAX, json!({})), &[]).steps;
    assert_eq!(many, [Step::Create(BURST)], "the rest when those are there");
    let pods = [pod("a", json!({})), pod("b", json!({"status": {"conditions": null}}))];
    assert_eq!(make(&set(1, json!({})), &pods).steps, [Step::Delete("b".into())]);
    assert_eq!(make(&set(2, json!({})), &pods).steps, []);
    let going = [pod("a", json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}))];
    assert_eq!(
        make(&set(1, json!({})), &going).steps,
        [Step::Create(1)],
        "going ones do not count"
    );
    let failed = [pod("a", json!({"status": {"phase": "Failed"}}))];
    assert_eq!(make(&set(1, json!({})), &failed).steps, [Step::Create(1)]);
    let deleted = set(3, json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}));
    assert_eq!(make(&deleted, &[]).steps, []);
}

#[test]
fn pods_that_nodes_refuse_are_replaced_less_and_less_often() {
    let refused = |created: &str| {
        pod(
            created,
            json!({"metadata": {"creationTimestamp": created},
            "status": {"phase": "Failed", "reason": "AppArmor"}}),
        )
    };
    let of = |wanted: i32, pods: &[Arc<Pod>]| {
        let plan = make(&set(wanted, json!({})), pods);
        (plan.steps, plan.look_again.map(|at| at.to_string()))
    };
    let (long_ago, old) = (refused("2025-12-31T22:00:00Z"), refused("2026-01-01T00:00:50Z"));
    let (recent, newest) = (refused("2026-01-01T00:00:58Z"), refused("2026-01-01T00:00:59Z"));
    let create = |count| (vec![Step::Create(count)], None);
    let hold = |until: &str| (vec![], Some(until.to_owned()));
    assert_eq!(of(1, std::slice::from_ref(&old)), create(1));
    let twice = [old.clone(), recent.clone()];
    assert_eq!(of(1, &twice), create(1), "two seconds are over");
    let often = [long_ago, old, recent, newest];
    assert_eq!(of(1, &often), hold("2026-01-01T00:01:03Z"));
    assert_eq!(of(3, &often), create(3), "each of three was refused once");
    let evicted = json!({"metadata": {"creationTimestamp": "2026-01-01T00:00:59Z"},
        "status": {"phase": "Failed", "reason": "Evicted"}});
    assert_eq!(of(1, &[pod("a", evicted.clone()), pod("b", evicted)]), create(1), "those ran");
}

#[test]
fn orphans_are_adopted_and_strays_released() {
    let orphan = pod("a", json!({"metadata": {"ownerReferences": null}}));
    let stray = pod("b", json!({"metadata": {"labels": {"app": "other"}}}));
    let foreign = pod(
        "c",
        json!({"metadata": {"ownerReferences": [
        {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "x", "uid": "x", "controller": true}]}}),
    );
    let plan = make(&set(1, json!({})), &[orphan, stray, foreign]);
    assert_eq!(plan.steps, [Step::Adopt("a".into()), Step::Release("b".into())]);
}

#[test]
fn the_least_missed_pods_go_first() {
    let pods = [
        pod("old", json!({})),
        pod("unbound", json!({"spec": {"nodeName": null}, "status": {"phase": "Pending"}})),
        pod("pending", json!({"status": {"phase": "Pending", "conditions": null}})),
        pod("unready", json!({"status": {"conditions": null}})),
        pod("cheap", json!({"metadata": {"annotations": {DELETION_COST: "-1"}}})),
        pod("lost", json!({"spec": {"nodeName": "gone"}})),
        pod(
            "fresh",
            json!({"status": {"conditions": [
            {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:50Z"}]}}),
        ),
        pod("alone", json!({"spec": {"nodeName": "m"}})),
    ];
    let refs: Vec<&Pod> = pods.iter().map(|p| p.as_ref()).collect();
    let lost = LostNodes::from(["gone".to_owned()]);
    let order: Vec<_> = rank_for_deletion(&refs, &lost).into_iter().map(name).collect();
    assert_eq!(order, ["unbound", "pending", "unready", "lost", "cheap", "fresh", "old", "alone"]);
}

#[test]
fn status_counts_ready_and_available_pods() {
    let pods = [
        pod("a", json!({})),
        pod("b", json!({"metadata": {"labels": {"v": "2"}}, "status": {"conditions": null}})),
        pod("c", json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}})),
        pod("d", json!({"spec": {"nodeName": "gone"}})),
    ];
    let wait = set(3, json!({"spec": {"minReadySeconds": 40}}));
    let lost = LostNodes::from(["gone".to_owned()]);
    let result = plan(&wait, &pods, &lost, None, now());
    let s = &result.status;
    assert_eq!((s.replicas, s.fully_labeled_replicas), (3, Some(2)));
    assert_eq!((s.ready_replicas, s.available_replicas), (Some(1), Some(0)));
    assert_eq!((s.terminating_replicas, s.observed_generation), (Some(1), Some(3)));
    assert_eq!(result.look_again, Some("2026-01-01T00:01:10Z".parse().unwrap()));
    let later = plan(&wait, &pods, &lost, None, "2026-01-01T00:01:10Z".parse().unwrap());
    assert_eq!((later.status.available_replicas, later.look_again), (Some(1), None));
}

#[test]
fn a_failure_is_a_condition_until_it_is_over() {
    let failure = Failure { message: "quota".to_owned() };
    let mut owner = set(1, json!({}));
    owner.status = Some(plan(&owner, &[], &LostNodes::new(), Some(&failure), now()).status);
    let first = owner.status.clone().unwrap().conditions.unwrap();
    assert_eq!(first[0].reason.as_deref(), Some("FailedCreate"));
    let later = "2026-01-01T00:02:00Z".parse().unwrap();
    let again = plan(&owner, &[], &LostNodes::new(), Some(&failure), later).status.conditions;
    assert_eq!(again, Some(first), "the time of the first failure stays");
    assert_eq!(make(&owner, &[]).status.conditions, None);
}

proptest! {
    /// Applying the plan leads to the wanted number, and then there is nothing left to do.
    #[test]
    fn plans_converge(wanted in 0i32..6, kinds in prop::collection::vec(0u8..6, 0..10), seed in any::<u64>()) {
        let set = set(wanted, json!({}));
        let mut pods: Vec<_> = kinds.iter().enumerate().map(|(i, kind)| pod(&format!("p{i}"), match kind {
            0 => json!({}),
            1 => json!({"status": {"conditions": null}}),
            2 => json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}),
            3 => json!({"metadata": {"ownerReferences": null}}),
            4 => json!({"metadata": {"labels": {"app": "other"}}}),
            _ => json!({"status": {"phase": "Failed"}}),
        })).collect();
        let first = make(&set, &pods);
        let rotate = if pods.is_empty() { 0 } else { (seed as usize) % pods.len() };
        let mut shuffled = pods.clone();
        shuffled.rotate_left(rotate);
        let sorted = |mut steps: Vec<Step>| { steps.sort_by_key(ToString::to_string); steps };
        prop_assert_eq!(sorted(make(&set, &shuffled).steps), sorted(first.steps.clone()));
        for step in first.steps {
            match step {
                Step::Create(n) => for i in 0..n {
                    pods.push(pod(&format!("new{i}"), json!({})));
                },
                Step::Delete(name) => pods.retain(|p| objects::name(&p.metadata) != name),
                Step::Adopt(name) => for p in pods.iter_mut().filter(|p| objects::name(&p.metadata) == name) {
                    *p = pod(&name, json!({}));
                },
                Step::Release(name) => pods.retain(|p| objects::name(&p.metadata) != name),
            }
        }
        let second = make(&set, &pods);
        prop_assert_eq!(second.steps, vec![]);
        prop_assert_eq!(second.status.replicas, wanted);
    }
}
