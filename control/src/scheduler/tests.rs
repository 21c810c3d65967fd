use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Node, Pod};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::ClusterState;

fn merge(into: &mut Value, patch: Value) {
    match (into, patch) {
        (Value::Object(into), Value::Object(patch)) => {
            for (key, value) in patch {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, patch) => *into = patch,
    }
}

fn node(name: &str, patch: Value) -> Node {
    let mut node = json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "spec": {},
        "status": {
            "allocatable": {"cpu": "2", "memory": "4Gi", "pods": "110"},
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    });
    merge(&mut node, patch);
    serde_json::from_value(node).unwrap()
}

fn pod(name: &str, patch: Value) -> Pod {
    let mut pod = json!({
        "metadata": {"namespace": "default", "name": name, "uid": format!("uid-{name}"), "labels": {"app": "web"}},
        "spec": {"containers": [{"name": "main"}]},
    });
    merge(&mut pod, patch);
    serde_json::from_value(pod).unwrap()
}

fn cpu(amount: &str) -> Value {
    json!({"spec": {"containers": [{"name": "main", "resources": {"requests": {"cpu": amount}}}]}})
}

fn owned(owner: &str) -> Value {
    json!({"metadata": {"ownerReferences": [{
        "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": owner, "uid": owner, "controller": true}]}})
}

fn cluster(nodes: &[Node]) -> ClusterState {
    let mut state = ClusterState::default();
    for node in nodes {
        state.set_node(node);
    }
    state
}

/// Places and counts the pod.
fn run(state: &mut ClusterState, pod: &Pod) -> Result<String, String> {
    let node = state.place(pod).map_err(|e| e.message)?;
    state.assume(pod, &node);
    Ok(node)
}

#[test]
fn pods_of_one_controller_go_to_different_nodes_first() {
    let mut state = cluster(&[node("a", json!({})), node("b", json!({})), node("c", json!({}))]);
    let mut heavy = pod("heavy", cpu("1900m"));
    heavy.metadata.name = Some("heavy".to_owned());
    state.assume(&heavy, "c");
    let placed: Vec<_> =
        (0..3).map(|i| run(&mut state, &pod(&format!("p{i}"), owned("rs"))).unwrap()).collect();
    assert_eq!(placed.iter().collect::<BTreeSet<_>>().len(), 3, "{placed:?}");
    assert_eq!(placed[2], "c", "the busy node comes last");
}

#[test]
fn requests_are_counted_and_freed() {
    let mut state = cluster(&[node("a", json!({}))]);
    run(&mut state, &pod("p1", cpu("1500m"))).unwrap();
    let message = run(&mut state, &pod("p2", cpu("600m"))).unwrap_err();
    assert_eq!(message, "0/1 nodes are available: 1 Insufficient cpu.");
    run(&mut state, &pod("p3", cpu("500m"))).unwrap();
    state.forget("uid-p1");
    run(&mut state, &pod("p2", cpu("600m"))).unwrap();
}

#[test]
fn reasons_are_counted_per_node() {
    let tainted =
        json!({"spec": {"taints": [{"key": "gpu", "value": "yes", "effect": "NoSchedule"}]}});
    let mut state = cluster(&[
        node("a", json!({"spec": {"unschedulable": true}})),
        node("b", tainted),
        node("c", json!({"status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}})),
        node("d", json!({"status": {"allocatable": {"cpu": "1", "memory": "1Mi"}}})),
        node("e", json!({"status": {"allocatable": {"cpu": "1"}}})),
    ]);
    let request = json!({"spec": {"containers": [
        {"name": "m", "resources": {"requests": {"cpu": "1500m", "memory": "2Mi"}}}]}});
    assert_eq!(
        run(&mut state, &pod("p", request)).unwrap_err(),
        "0/5 nodes are available: 1 Insufficient memory, 1 node(s) had untolerated taint {gpu: yes}, \
         1 node(s) were not ready, 1 node(s) were unschedulable, 2 Insufficient cpu."
    );
    assert!(run(&mut cluster(&[]), &pod("p", json!({}))).unwrap_err().starts_with("0/0 nodes"));
}

#[test]
fn selectors_and_affinity_choose_nodes() {
    let ssd = |name: &str| node(name, json!({"metadata": {"labels": {"disk": "ssd"}}}));
    let mut state = cluster(&[node("a", json!({})), ssd("b"), ssd("c")]);
    let selector = pod("p1", json!({"spec": {"nodeSelector": {"disk": "ssd"}}}));
    assert_eq!(run(&mut state, &selector).unwrap(), "b");
    let required = |values: Value| {
        json!({"spec": {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
            {"nodeSelectorTerms": [{"matchFields": [
                {"key": "metadata.name", "operator": "In", "values": values}]}]}}}}})
    };
    assert_eq!(run(&mut state, &pod("p2", required(json!(["c"])))).unwrap(), "c");
    assert_eq!(
        run(&mut state, &pod("p3", required(json!(["x"])))).unwrap_err(),
        "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector."
    );
    let preferred = json!({"spec": {"affinity": {"nodeAffinity":
        {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "preference":
            {"matchExpressions": [{"key": "disk", "operator": "DoesNotExist"}]}}]}}}});
    assert_eq!(run(&mut state, &pod("p4", preferred.clone())).unwrap(), "a");
    assert_eq!(run(&mut state, &pod("p5", preferred)).unwrap(), "a");
}

#[test]
fn tolerations_and_soft_taints() {
    let taint = |effect: &str| json!({"spec": {"taints": [{"key": "k", "effect": effect}]}});
    let mut state = cluster(&[node("a", taint("PreferNoSchedule")), node("b", json!({}))]);
    assert_eq!(run(&mut state, &pod("p1", cpu("1500m"))).unwrap(), "b");
    assert_eq!(run(&mut state, &pod("p2", cpu("400m"))).unwrap(), "b", "avoided while possible");
    assert_eq!(run(&mut state, &pod("p3", cpu("400m"))).unwrap(), "a");
    let mut state = cluster(&[node("a", taint("NoExecute"))]);
    assert!(run(&mut state, &pod("p1", json!({}))).is_err());
    let tolerating = pod("p2", json!({"spec": {"tolerations": [{"operator": "Exists"}]}}));
    assert_eq!(run(&mut state, &tolerating).unwrap(), "a");
}

#[test]
fn a_node_that_is_not_ready_takes_pods_that_bear_with_it() {
    let mut state = cluster(&[node(
        "a",
        json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}}),
    )]);
    let message = run(&mut state, &pod("p1", json!({}))).unwrap_err();
    assert_eq!(message, "0/1 nodes are available: 1 node(s) were not ready.");
    let bears = json!({"spec": {"tolerations": [
        {"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoSchedule"}]}});
    assert_eq!(run(&mut state, &pod("p2", bears.clone())).unwrap(), "a");
    state.set_node(&node(
        "a",
        json!({"status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}}),
    ));
    assert!(run(&mut state, &pod("p3", bears)).is_err(), "nobody hears from it");
}

#[test]
fn host_ports_do_not_collide() {
    let port = |ip: &str, protocol: &str| {
        json!({"spec": {"containers": [{"name": "m", "ports": [
            {"containerPort": 80, "hostPort": 8080, "hostIP": ip, "protocol": protocol}]}]}})
    };
    let mut state = cluster(&[node("a", json!({}))]);
    run(&mut state, &pod("p1", port("10.0.0.1", "TCP"))).unwrap();
    run(&mut state, &pod("p2", port("10.0.0.2", "TCP"))).unwrap();
    run(&mut state, &pod("p3", port("", "UDP"))).unwrap();
    for (name, ip) in [("p4", "0.0.0.0"), ("p5", ""), ("p6", "10.0.0.1")] {
        let message = run(&mut state, &pod(name, port(ip, "TCP"))).unwrap_err();
        assert!(message.contains("didn't have free ports"), "{message}");
    }
}

#[test]
fn the_number_of_pods_is_limited() {
    let mut state = cluster(&[node("a", json!({"status": {"allocatable": {"pods": "1"}}}))]);
    run(&mut state, &pod("p1", json!({}))).unwrap();
    let message = run(&mut state, &pod("p2", json!({}))).unwrap_err();
    assert_eq!(message, "0/1 nodes are available: 1 Too many pods.");
}

fn zone(name: &str, zone: &str) -> Node {
    node(name, json!({"metadata": {"labels": {"zone": zone}}}))
}

#[test]
fn hard_spread_constraints_limit_the_skew() {
    let mut state =
        cluster(&[zone("a", "1"), zone("b", "1"), zone("c", "2"), node("d", json!({}))]);
    let constraint = |when: &str| {
        json!({"spec": {"topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone",
            "whenUnsatisfiable": when, "labelSelector": {"matchLabels": {"app": "web"}}}]}})
    };
    let mut zones: BTreeMap<String, usize> = BTreeMap::new();
    for i in 0..6 {
        let node = run(&mut state, &pod(&format!("p{i}"), constraint("DoNotSchedule"))).unwrap();
        *zones.entry(if node == "c" { "2".into() } else { "1".into() }).or_default() += 1;
        let (one, two) = (zones.get("1").unwrap_or(&0), zones.get("2").unwrap_or(&0));
        assert!(one.abs_diff(*two) <= 1, "{zones:?}");
        assert_ne!(node, "d", "no zone label");
    }
    state.set_node(&node(
        "c",
        json!({"spec": {"unschedulable": true}, "metadata": {"labels": {"zone": "2"}}}),
    ));
    run(&mut state, &pod("p7", constraint("DoNotSchedule"))).unwrap();
    let message = run(&mut state, &pod("p8", constraint("DoNotSchedule"))).unwrap_err();
    assert!(
        message.contains("2 node(s) didn't match pod topology spread constraints"),
        "{message}"
    );
    run(&mut state, &pod("p9", constraint("ScheduleAnyway"))).unwrap();
}

#[test]
fn pods_attract_and_repel_each_other() {
    let mut state = cluster(&[zone("a", "1"), zone("b", "1"), zone("c", "2")]);
    let term = |app: &str, key: &str| json!([{"topologyKey": key, "labelSelector": {"matchLabels": {"app": app}}}]);
    let rule = |kind: &str, app: &str, key: &str, own: &str| {
        json!({"metadata": {"labels": {"app": own}}, "spec": {"affinity": {kind:
            {"requiredDuringSchedulingIgnoredDuringExecution": term(app, key)}}}})
    };
    let host = "kubernetes.io/hostname";
    for i in 0..3 {
        run(&mut state, &pod(&format!("db{i}"), rule("podAntiAffinity", "db", host, "db")))
            .unwrap();
    }
    let message =
        run(&mut state, &pod("db3", rule("podAntiAffinity", "db", host, "db"))).unwrap_err();
    assert_eq!(message, "0/3 nodes are available: 3 node(s) didn't match pod anti-affinity rules.");
    let plain = pod("db4", json!({"metadata": {"labels": {"app": "db"}}}));
    let message = run(&mut state, &plain).unwrap_err();
    assert!(
        message.contains("3 node(s) didn't satisfy existing pods anti-affinity rules"),
        "{message}"
    );

    let first = pod("c0", rule("podAffinity", "cache", "zone", "cache"));
    let first_node = run(&mut state, &first).unwrap();
    for i in 1..5 {
        let node =
            run(&mut state, &pod(&format!("c{i}"), rule("podAffinity", "cache", "zone", "cache")))
                .unwrap();
        assert_eq!(node == "c", first_node == "c");
    }
    let message =
        run(&mut state, &pod("n", rule("podAffinity", "nobody", "zone", "x"))).unwrap_err();
    assert!(message.contains("3 node(s) didn't match pod affinity rules"), "{message}");
}

#[test]
fn a_thousand_placements_look_at_each_node_once_per_pod() {
    let nodes: Vec<_> = (0..50).map(|i| node(&format!("n{i:02}"), json!({}))).collect();
    let mut state = cluster(&nodes);
    let mut per_node: BTreeMap<String, usize> = BTreeMap::new();
    let before = state.work;
    for i in 0..1000 {
        let node = run(&mut state, &pod(&format!("p{i}"), owned("rs"))).unwrap();
        *per_node.entry(node).or_default() += 1;
    }
    assert!(per_node.values().all(|n| *n == 20), "{per_node:?}");
    // 50 nodes looked at and one usage updated per pod: nothing is summed up anew.
    assert_eq!(state.work - before, 1000 * 51);
}

#[test]
fn an_assumed_pod_survives_a_late_event_of_its_unbound_self() {
    let mut state = cluster(&[node("a", json!({}))]);
    let unbound = pod("p", cpu("1500m"));
    run(&mut state, &unbound).unwrap();
    assert!(!state.set_pod(&unbound));
    assert!(run(&mut state, &pod("q", cpu("1"))).is_err());
    let bound = pod("p", json!({"spec": {"nodeName": "a"}}));
    state.set_pod(&bound);
    state.forget("uid-p");
    let finished = pod("p", json!({"spec": {"nodeName": "a"}, "status": {"phase": "Succeeded"}}));
    assert!(state.set_pod(&finished), "frees its place");
    run(&mut state, &pod("q", cpu("1"))).unwrap();
}

proptest! {
    /// Whatever happens in which order, incremental usage equals the sum over the placed pods.
    #[test]
    fn usage_never_drifts(ops in prop::collection::vec((0u8..4, 0u8..8, 0u16..900), 0..80)) {
        let nodes = [node("a", json!({})), node("b", json!({}))];
        let mut state = cluster(&nodes);
        let mut model: BTreeMap<String, (String, Pod)> = BTreeMap::new();
        for (op, id, milli) in ops {
            let name = format!("p{id}");
            let uid = format!("uid-{name}");
            match op {
                0 if !model.contains_key(&uid) => {
                    let p = pod(&name, cpu(&format!("{milli}m")));
                    if let Ok(node) = run(&mut state, &p) {
                        model.insert(uid, (node, p));
                    }
                }
                1 => if let Some((node, p)) = model.get(&uid) {
                    let mut bound = p.clone();
                    bound.spec.as_mut().unwrap().node_name = Some(node.clone());
                    state.set_pod(&bound);
                },
                2 => { state.remove_pod(&uid); model.remove(&uid); }
                _ => { state.set_node(&nodes[usize::from(id % 2)]); }
            }
        }
        for node in ["a", "b"] {
            let here: Vec<_> = model.values().filter(|(n, _)| n == node).collect();
            let sum: i64 = here.iter().map(|(_, p)| super::resources::Resources::requested(p).of("cpu")).sum();
            let used = state.usage.get(node).map_or(0, |u| u.requested.of("cpu"));
            prop_assert_eq!(used, sum);
            prop_assert_eq!(state.usage.get(node).map_or(0, |u| u.pods), here.len() as i64);
            prop_assert!(sum <= 2000);
        }
    }
}
