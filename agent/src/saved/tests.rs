use std::sync::Arc;

use mesh_model::{Compiler, Objects};
use serde_json::{Value, json};

use super::*;

fn object<T: serde::de::DeserializeOwned>(value: Value) -> Arc<T> {
    Arc::new(serde_json::from_value(value).unwrap())
}

/// The cluster after so many changes: each of them in another part of the snapshot.
fn objects(step: u8) -> Objects {
    let node = |n: u8, address: u8| {
        let key = mesh_model::snapshot::WgKey([n; 32]).to_string();
        object(json!({
            "metadata": {"name": format!("n{n}"), "annotations": {"mesh.dev/wireguard-public-key": key}},
            "spec": {"podCIDR": format!("10.244.{n}.0/24")},
            "status": {"addresses": [{"type": "InternalIP", "address": format!("192.0.2.{address}")}]}}))
    };
    let service = |name: &str, spec: Value| {
        object(json!({"metadata": {"namespace": "default", "name": name}, "spec": spec,
            "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.200"}]}}}))
    };
    let ports = json!([{"name": "http", "port": 80}]);
    let slice = |service: &str, host: u8| {
        object(json!({
            "metadata": {"namespace": "default", "name": format!("{service}-a"), "resourceVersion": format!("{}", 10 + step),
                         "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4", "ports": [{"name": "http", "port": 8080}],
            "endpoints": [{"addresses": [format!("10.244.1.{host}")], "nodeName": "n1"}]}))
    };
    let after = |n: u8| u8::from(step >= n);
    let mut objects = Objects {
        nodes: vec![node(1, 1), node(2, 2 + after(1))],
        services: vec![
            service(
                "web",
                json!({"type": "LoadBalancer", "clusterIP": "10.96.0.1", "ports": ports}),
            ),
            service("db", json!({"clusterIP": "None", "ports": ports})),
        ],
        endpoint_slices: vec![slice("web", 10 + after(2)), slice("db", 20 + after(3))],
        pods: vec![object(json!({
            "metadata": {"namespace": "default", "name": "p", "uid": "u", "labels": {"step": after(4).to_string()}},
            "spec": {"nodeName": "n1", "containers": []}, "status": {"podIP": "10.244.1.9"}}))],
        network_policies: vec![object(json!({
            "metadata": {"namespace": "default", "name": "p"}, "spec": {"podSelector": {}, "ingress": [{"ports": [{"port": 80 + after(5)}],
                "from": [{"ipBlock": {"cidr": format!("10.{}.0.0/16", after(6))}}]}]}}))],
        ..Objects::default()
    };
    if step >= 7 {
        objects.services.push(service("new", json!({"clusterIP": "10.96.0.0", "ports": ports})));
    }
    if step >= 8 {
        objects.services.remove(0);
        objects.pods.clear();
    }
    objects.cluster.domain = if step >= 9 { "b.test" } else { "a.test" }.to_owned();
    objects
}

fn snapshots() -> Vec<Arc<Snapshot>> {
    let mut compiler = Compiler::new("n1".parse().unwrap());
    let all: Vec<_> = (0..=9).map(|step| Arc::new(compiler.compile(&objects(step)))).collect();
    assert!(all.windows(2).all(|two| two[0] != two[1]), "each step changes something");
    all
}

fn loaded(path: &Path) -> Option<Arc<Snapshot>> {
    Saved::load(path.to_owned()).0
}

#[test]
fn wherever_the_agent_is_killed_a_snapshot_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snapshot.json");
    assert_eq!(loaded(&path), None);
    let (_, mut saved) = Saved::load(path.clone());
    let mut lengths = vec![];
    let snapshots = snapshots();
    for snapshot in &snapshots {
        saved.save(snapshot).unwrap();
        assert_eq!(loaded(&path).as_ref(), Some(snapshot));
        lengths.push(std::fs::metadata(&path).unwrap().len());
    }
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes.iter().filter(|b| **b == b'\n').count(), snapshots.len());
    let torn = dir.path().join("torn.json");
    for end in lengths[0]..=bytes.len() as u64 {
        std::fs::write(&torn, &bytes[..usize::try_from(end).unwrap()]).unwrap();
        // The line's end is not part of what it says.
        let complete = lengths.iter().filter(|length| **length <= end + 1).count();
        assert_eq!(loaded(&torn).as_ref(), Some(&snapshots[complete - 1]), "at {end}");
    }
    std::fs::write(&torn, &bytes[..usize::try_from(lengths[0]).unwrap() - 2]).unwrap();
    assert_eq!(loaded(&torn), None, "a whole one is renamed when it is complete");
}

#[test]
fn the_next_agent_goes_on_behind_what_makes_sense() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snapshot.json");
    let snapshots = snapshots();
    let (_, mut first) = Saved::load(path.clone());
    first.save(&snapshots[0]).unwrap();
    first.save(&snapshots[1]).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.extend(br#"{"revision":99,"frontends":{"gone":[],"put":["#);
    std::fs::write(&path, &bytes).unwrap();
    let (found, mut next) = Saved::load(path.clone());
    assert_eq!(found.as_ref(), Some(&snapshots[1]));
    for snapshot in &snapshots[2..] {
        next.save(snapshot).unwrap();
        assert_eq!(loaded(&path).as_ref(), Some(snapshot));
    }
    let length = std::fs::metadata(&path).unwrap().len();
    next.save(&snapshots[9]).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), length, "nothing changed");
}

#[test]
fn a_change_costs_what_changed_and_a_long_file_becomes_short() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snapshot.json");
    let length = || std::fs::metadata(&path).unwrap().len();
    let (_, mut saved) = Saved::load(path.clone());
    let snapshots = snapshots();
    saved.save(&snapshots[0]).unwrap();
    let whole = length();
    let mut longest = 0;
    for n in 0..4000_usize {
        // Only endpoints of one service are others.
        let before = length();
        saved.save(&snapshots[1 + n % 2]).unwrap();
        longest = longest.max(length() - before);
        saved.tidy().unwrap();
    }
    assert!(longest < whole, "{longest} of {whole}");
    assert!(length() <= whole + LEAST_APPENDED + 2 * longest, "{} of {whole}", length());
    assert_eq!(loaded(&path).as_ref(), Some(&snapshots[2]));
}
