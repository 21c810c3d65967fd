use std::collections::BTreeSet;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::controllers::daemonset::eligibility::new_pod;

fn now() -> Timestamp {
    "2026-01-01T00:01:00Z".parse().unwrap()
}

fn set(strategy: Value) -> DaemonSet {
    serde_json::from_value(json!({
        "metadata": {"namespace": "ns", "name": "logs", "uid": "ds", "generation": 3},
        "spec": {"selector": {"matchLabels": {"app": "logs"}}, "updateStrategy": strategy,
            "template": {"metadata": {"labels": {"app": "logs"}}, "spec": {"containers": []}}}}))
    .unwrap()
}

fn rolling(unavailable: Value, surge: Value) -> DaemonSet {
    set(json!({"type": "RollingUpdate",
        "rollingUpdate": {"maxUnavailable": unavailable, "maxSurge": surge}}))
}

fn node(name: &str) -> Arc<Node> {
    tainted(name, json!(null))
}

fn tainted(name: &str, taints: Value) -> Arc<Node> {
    Arc::new(
        serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"taints": taints}}))
            .unwrap(),
    )
}

/// A pod that serves on `node`, of a revision.
fn pod(name: &str, node: &str, revision: &str, patch: Value) -> Arc<Pod> {
    let mut pod = json!({
        "metadata": {"namespace": "ns", "name": name, "uid": name,
            "labels": {"app": "logs", POD_REVISION: revision},
            "creationTimestamp": "2026-01-01T00:00:00Z", "ownerReferences": [
            {"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "logs", "uid": "ds", "controller": true}]},
        "spec": {"nodeName": node, "containers": []},
        "status": {"phase": "Running", "conditions": [
            {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:30Z"}]},
    });
    json_patch::merge(&mut pod, &patch);
    Arc::new(serde_json::from_value(pod).unwrap())
}

fn unready() -> Value {
    json!({"status": {"conditions": null}})
}

fn going() -> Value {
    json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:50Z"}})
}

fn with(set: &DaemonSet, nodes: &[Arc<Node>], pods: &[Arc<Pod>], backoff: &Backoff) -> Plan {
    let lost = LostNodes::from(["lost".to_owned()]);
    plan(set, &Seen { nodes, pods, revision: "new", lost: &lost, backoff, now: now() })
}

fn steps(set: &DaemonSet, nodes: &[Arc<Node>], pods: &[Arc<Pod>]) -> Vec<String> {
    let plan = with(set, nodes, pods, &Backoff::default());
    plan.steps.iter().map(ToString::to_string).collect()
}

fn nodes(names: &[&str]) -> Vec<Arc<Node>> {
    names.iter().map(|name| node(name)).collect()
}

#[test]
fn each_node_gets_one_pod_and_keeps_the_first_of_several() {
    let set = set(json!(null));
    assert_eq!(steps(&set, &nodes(&["a", "b"]), &[]), ["create a pod for a", "create a pod for b"]);
    let younger = json!({"metadata": {"creationTimestamp": "2026-01-01T00:00:20Z"}});
    let unbound = json!({"spec": {"nodeName": null, "affinity": {"nodeAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchFields": [
            {"key": "metadata.name", "operator": "In", "values": ["a"]}]}]}}}}});
    let pods = [
        pod("unbound", "", "new", unbound.clone()),
        pod("younger", "a", "new", younger),
        pod("first", "a", "new", json!({})),
    ];
    assert_eq!(steps(&set, &nodes(&["a"]), &pods), ["delete pod unbound", "delete pod younger"]);
    assert_eq!(steps(&set, &nodes(&["a"]), &pods[..1]), [""; 0], "it is on its way");
    assert_eq!(
        steps(&set, &nodes(&["b"]), &pods[..1]),
        ["delete pod unbound", "create a pod for b"]
    );
    assert_eq!(steps(&set, &[], &pods[2..]), [""; 0], "whoever removes the node removes it");
    let terminating = [pod("p", "a", "new", going())];
    assert_eq!(steps(&set, &nodes(&["a"]), &terminating), [""; 0], "two would share the node");
    let mut both = going();
    json_patch::merge(&mut both, &json!({"status": {"phase": "Failed"}}));
    let over = [pod("p", "a", "new", both)];
    assert_eq!(steps(&set, &nodes(&["a"]), &over), ["create a pod for a"]);
}

#[test]
fn nodes_that_do_not_fit_lose_their_pods_or_get_none() {
    let set = set(json!(null));
    let nodes = [
        tainted("keeps", json!([{"key": "k", "effect": "NoSchedule"}])),
        tainted("lacks", json!([{"key": "k", "effect": "NoExecute"}])),
        node("runs"),
    ];
    assert_eq!(steps(&set, &nodes, &[]), ["create a pod for runs"]);
    let pods = ["keeps", "lacks", "runs"].map(|name| pod(name, name, "new", json!({})));
    let plan = with(&set, &nodes, &pods, &Backoff::default());
    assert_eq!(plan.steps, [Step::Delete("lacks".into())]);
    let status = plan.status;
    assert_eq!((status.desired_number_scheduled, status.current_number_scheduled), (1, 1));
    assert_eq!((status.number_misscheduled, status.number_ready), (2, 1));
}

#[test]
fn a_pod_that_ended_is_made_again_after_a_while() {
    let set = set(json!(null));
    let pods = [pod("p", "a", "new", json!({"status": {"phase": "Failed"}}))];
    let nodes = nodes(&["a"]);
    assert_eq!(steps(&set, &nodes, &pods), ["delete pod p, which ended on a"]);
    let mut backoff = Backoff::default();
    backoff.note("a", now());
    let plan = with(&set, &nodes, &pods, &backoff);
    assert_eq!(plan.steps, []);
    assert_eq!(plan.look_again, Some("2026-01-01T00:01:01Z".parse().unwrap()));
}

#[test]
fn orphans_are_adopted_strays_released_and_a_set_that_goes_does_nothing() {
    let mut going = set(json!(null));
    let nodes = nodes(&["a", "b"]);
    let pods = [
        pod("orphan", "a", "new", json!({"metadata": {"ownerReferences": null}})),
        pod("stray", "b", "new", json!({"metadata": {"labels": {"app": "other"}}})),
    ];
    let expected = ["adopt pod orphan", "release pod stray", "create a pod for b"];
    assert_eq!(steps(&going, &nodes, &pods), expected);
    going.metadata.deletion_timestamp =
        Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now()));
    assert_eq!(steps(&going, &nodes, &pods), [""; 0]);
}

#[test]
fn an_update_leaves_no_more_nodes_without_a_pod_than_it_may() {
    let names = ["a", "b", "c", "d"];
    let old = |patch: &dyn Fn(&str) -> Value| names.map(|n| pod(n, n, "old", patch(n)));
    let all_serve = old(&|_| json!({}));
    for (amount, expected) in [
        (json!(1), vec!["delete pod a"]),
        (json!(3), vec!["delete pod a", "delete pod b", "delete pod c"]),
        (json!("30%"), vec!["delete pod a", "delete pod b"]),
        (json!(0), vec!["delete pod a"]),
    ] {
        assert_eq!(steps(&rolling(amount, json!(0)), &nodes(&names), &all_serve), expected);
    }
    let one_at_a_time = rolling(json!(1), json!(0));
    let broken = old(&|name| if name == "c" { unready() } else { json!({}) });
    assert_eq!(
        steps(&one_at_a_time, &nodes(&names), &broken),
        ["delete pod c"],
        "nobody misses it"
    );
    let leaving = old(&|name| if name == "c" { going() } else { json!({}) });
    assert_eq!(steps(&one_at_a_time, &nodes(&names), &leaving), [""; 0]);
    let mut done = old(&|_| json!({}));
    done[0] = pod("a", "a", "new", unready());
    assert_eq!(steps(&one_at_a_time, &nodes(&names), &done), [""; 0], "the new one does not serve");
    done[0] = pod("a", "a", "new", json!({}));
    assert_eq!(steps(&one_at_a_time, &nodes(&names), &done), ["delete pod b"]);
    let mut patient = one_at_a_time.clone();
    patient.spec.as_mut().unwrap().min_ready_seconds = Some(60);
    let plan = with(&patient, &nodes(&names), &done, &Backoff::default());
    assert_eq!(plan.steps, [], "the new one may still fail, and the others serve");
    assert_eq!(plan.look_again, Some("2026-01-01T00:01:30Z".parse().unwrap()));
    let by_hand = set(json!({"type": "OnDelete"}));
    assert_eq!(steps(&by_hand, &nodes(&names), &all_serve), [""; 0]);
}

#[test]
fn a_node_that_is_away_holds_up_no_update() {
    let unreachable = json!([{"key": "node.kubernetes.io/unreachable", "effect": "NoSchedule"}]);
    let nodes = [node("a"), tainted("lost", unreachable)];
    let pods = ["a", "lost"].map(|name| pod(name, name, "old", json!({})));
    let plan = with(&rolling(json!(1), json!(0)), &nodes, &pods, &Backoff::default());
    assert_eq!(plan.steps, [Step::Delete("a".into())]);
}

#[test]
fn with_surge_the_old_pod_goes_when_the_new_one_serves() {
    let surge = rolling(json!(0), json!(1));
    let nodes = nodes(&["a", "b"]);
    let old = ["a", "b"].map(|name| pod(name, name, "old", json!({})));
    assert_eq!(steps(&surge, &nodes, &old), ["create a pod for a"]);
    let beside = |patch: Value| {
        let mut pods = old.to_vec();
        pods.push(pod("a2", "a", "new", patch));
        pods
    };
    assert_eq!(steps(&surge, &nodes, &beside(unready())), [""; 0]);
    let expected = ["delete pod a", "create a pod for b"];
    assert_eq!(steps(&surge, &nodes, &beside(json!({}))), expected);
    let mut broken = beside(unready());
    broken[0] = pod("a", "a", "old", unready());
    assert_eq!(steps(&surge, &nodes, &broken), ["delete pod a", "create a pod for b"]);
    let kept = [tainted("a", json!([{"key": "k", "effect": "NoSchedule"}]))];
    assert_eq!(steps(&surge, &kept, &old), [""; 0]);
    assert_eq!(steps(&surge, &kept, &beside(json!({}))), ["delete pod a"]);
    let mut backoff = Backoff::default();
    backoff.note("a", now());
    let failed = beside(json!({"status": {"phase": "Failed"}}));
    assert_eq!(with(&surge, &nodes, &failed, &backoff).steps, [], "none beside it before its time");
    let status = with(&surge, &nodes, &beside(unready()), &Backoff::default()).status;
    assert_eq!((status.number_available, status.updated_number_scheduled), (Some(2), Some(0)));
}

#[test]
fn status_counts_nodes() {
    let nodes = nodes(&["a", "b", "c", "d"]);
    let pods = [
        pod("a", "a", "new", json!({})),
        pod("b", "b", "old", json!({})),
        pod("c", "c", "new", unready()),
    ];
    let set = set(json!({"type": "OnDelete"}));
    let status = with(&set, &nodes, &pods, &Backoff::default()).status;
    let expected = DaemonSetStatus {
        current_number_scheduled: 3,
        desired_number_scheduled: 4,
        number_available: Some(2),
        number_ready: 2,
        number_unavailable: Some(2),
        observed_generation: Some(3),
        updated_number_scheduled: Some(2),
        ..DaemonSetStatus::default()
    };
    assert_eq!(status, expected);
}

/// Takes all steps; new pods serve at once, and deleted ones are gone.
fn take(set: &DaemonSet, steps: Vec<Step>, pods: &mut Vec<Arc<Pod>>, made: &mut usize) {
    for step in steps {
        match step {
            Step::Delete(pod) | Step::Renew { pod, .. } => pods.retain(|p| name(p) != pod),
            Step::Create(node) => {
                *made += 1;
                let mut new = new_pod(set, &node, "new");
                new.metadata.name = Some(format!("made-{made}"));
                new.spec.as_mut().unwrap().node_name = Some(node);
                let served = pod("x", "x", "new", json!({}));
                new.metadata.creation_timestamp = served.metadata.creation_timestamp.clone();
                new.status = served.status.clone();
                pods.push(Arc::new(new));
            }
            Step::Adopt(_) | Step::Release(_) => panic!("nothing is to be taken or left"),
        }
    }
}

proptest! {
    #[test]
    fn every_update_ends_with_one_new_pod_on_each_node(
        present in proptest::collection::vec((0_usize..6, 0_usize..3), 0..10),
        surges in any::<bool>(),
        amount in 1_i32..3,
    ) {
        let set = if surges { rolling(json!(0), json!(amount)) } else { rolling(json!(amount), json!(0)) };
        let names: Vec<String> = (0..6).map(|n| format!("n{n}")).collect();
        let nodes: Vec<Arc<Node>> = names.iter().map(|name| node(name)).collect();
        let kinds = [("old", json!({})), ("old", unready()), ("new", json!({}))];
        let mut pods: Vec<Arc<Pod>> = present.iter().enumerate().map(|(i, (node, kind))| {
            let (revision, patch) = &kinds[*kind];
            pod(&format!("p{i}"), &names[*node], revision, patch.clone())
        }).collect();
        let mut made = 0;
        for _ in 0..40 {
            let steps = with(&set, &nodes, &pods, &Backoff::default()).steps;
            if steps.is_empty() {
                break;
            }
            take(&set, steps, &mut pods, &mut made);
        }
        let status = with(&set, &nodes, &pods, &Backoff::default()).status;
        prop_assert_eq!(status.updated_number_scheduled, Some(6));
        prop_assert_eq!(status.number_available, Some(6));
        let used: BTreeSet<_> = pods.iter().filter_map(|pod| target(pod)).collect();
        prop_assert_eq!((pods.len(), used.len()), (6, 6));
    }
}
