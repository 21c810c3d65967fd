use serde_json::json;

use super::*;
use mesh_model::snapshot::PodWork;

fn pods(specs: &[(&str, serde_json::Value)]) -> Desired {
    let work = |(name, spec): &(&str, serde_json::Value)| {
        let mut spec = spec.clone();
        if spec["containers"].is_null() {
            spec["containers"] = json!([{"name": "c"}]);
        }
        let pod = json!({"metadata": {"namespace": "d", "name": name, "uid": name}, "spec": spec});
        PodWork {
            pod: serde_json::from_value(pod).unwrap(),
            config_maps: Default::default(),
            binary_keys: Default::default(),
            secrets: Default::default(),
            service_env: Default::default(),
            departure: None,
        }
    };
    crate::pods::supervise::merge(None, specs.iter().map(work).map(Arc::new).collect())
}

fn named(name: &str) -> PodRef {
    PodRef { namespace: "d".to_owned(), name: name.to_owned(), uid: name.to_owned() }
}

fn memory(use_of: &[(&str, u64)]) -> Vec<(PodRef, Measured)> {
    let one = |(name, memory): &(&str, u64)| {
        (named(name), Measured { memory: *memory, ..Measured::default() })
    };
    use_of.iter().map(one).collect()
}

fn requests(amount: &str) -> serde_json::Value {
    json!({"containers": [{"name": "c", "resources": {"requests": {"memory": amount}}}]})
}

#[test]
fn who_uses_more_than_it_asked_for_goes_first() {
    let all = pods(&[
        ("modest", requests("10Mi")),
        ("greedy", requests("1Mi")),
        ("important", json!({"priority": 5})),
        ("system", json!({"priorityClassName": "system-node-critical"})),
    ]);
    let of = |used: &[(&str, u64)]| victim(&all, &memory(used), Resource::Memory);
    let everybody = [("modest", 9 << 20), ("greedy", 2 << 20), ("important", 99), ("system", 999)];
    let (pod, why) = of(&everybody).unwrap();
    assert_eq!(pod.name, "greedy", "of those above their requests the least important");
    assert_eq!(
        why,
        "The node was low on resource: memory. The pod was using 2048Ki, request is 1024Ki."
    );
    assert_eq!(of(&[everybody[0], everybody[2]]).unwrap().0.name, "important");
    assert_eq!(of(&everybody[..1]).unwrap().0.name, "modest", "in the end everybody");
    assert_eq!(of(&everybody[3..]), None, "but those that the node needs");
    assert_eq!(of(&[("stranger", 1)]), None);
}

#[test]
fn sidecars_ask_for_what_they_use() {
    let with = |main: serde_json::Value, sidecar: serde_json::Value| {
        json!({"containers": [{"name": "c", "resources": main}],
            "initContainers": [{"name": "s", "restartPolicy": "Always", "resources": sidecar},
                {"name": "i", "resources": {"requests": {"memory": "1Gi"}}}]})
    };
    let asks = |amount: &str| json!({"requests": {"memory": amount}});
    let all = pods(&[("proxied", with(asks("1Mi"), asks("9Mi"))), ("plain", requests("1Mi"))]);
    let used = memory(&[("proxied", 9 << 20), ("plain", 2 << 20)]);
    assert_eq!(victim(&all, &used, Resource::Memory).unwrap().0.name, "plain");

    let limit = |amount: &str| json!({"limits": {"ephemeral-storage": amount}});
    let of = |sidecar: serde_json::Value, used: [(&str, u64); 2]| {
        let all = pods(&[("proxied", with(limit("1Ki"), sidecar))]);
        assert!(limits::limited(&all));
        let containers = used.map(|(name, bytes)| (name.to_owned(), bytes)).into();
        let measured = Measured { containers, ..Measured::default() };
        limits::exceeded(&all, &[(named("proxied"), measured)]).pop().map(|(_, why)| why)
    };
    assert_eq!(of(limit("2Ki"), [("c", 1000), ("s", 2000)]), None);
    let why = of(limit("2Ki"), [("c", 1), ("s", 2049)]).unwrap();
    assert!(why.starts_with("Container s exceeded"), "{why}");
    let why = of(json!({}), [("c", 1), ("s", 1024)]).unwrap();
    assert!(why.starts_with("Pod ephemeral local storage usage exceeds"), "{why}");
}

#[test]
fn limits_on_disk_are_kept() {
    let limit = |amount: &str| json!({"limits": {"ephemeral-storage": amount}});
    let all = pods(&[
        (
            "scratch",
            json!({"volumes": [
            {"name": "disk", "emptyDir": {"sizeLimit": "1Ki"}},
            {"name": "memory", "emptyDir": {"sizeLimit": "1", "medium": "Memory"}}]}),
        ),
        (
            "system",
            json!({"priorityClassName": "system-node-critical",
            "volumes": [{"name": "disk", "emptyDir": {"sizeLimit": "1Ki"}}]}),
        ),
        (
            "two",
            json!({"containers": [
            {"name": "a", "resources": limit("1Ki")}, {"name": "b", "resources": limit("1Ki")}]}),
        ),
    ]);
    assert!(limits::limited(&all) && !limits::limited(&pods(&[("x", json!({}))])));
    let of = |name: &str, containers: &[(&str, u64)], volumes: &[(&str, u64)]| {
        let map = |pairs: &[(&str, u64)]| {
            pairs.iter().map(|(name, bytes)| ((*name).to_owned(), *bytes)).collect()
        };
        let measured = Measured { memory: 0, containers: map(containers), volumes: map(volumes) };
        let found = limits::exceeded(&all, &[(named(name), measured)]);
        found.into_iter().map(|(_, why)| why).next().unwrap_or_default()
    };
    assert_eq!(of("scratch", &[("c", 5000)], &[("disk", 1024)]), "");
    let why = of("scratch", &[], &[("disk", 1025)]);
    assert_eq!(why, "Usage of EmptyDir volume \"disk\" exceeds the limit \"1Ki\".");
    assert_eq!(of("system", &[], &[("disk", 1025)]), "", "the node needs it");
    assert_eq!(of("two", &[("a", 1024), ("b", 1024)], &[]), "");
    assert!(of("two", &[("a", 1), ("b", 1025)], &[]).starts_with("Container b exceeded"));
    assert!(of("two", &[("a", 1024), ("b", 1024)], &[("v", 1)]).starts_with("Pod ephemeral"));
}
