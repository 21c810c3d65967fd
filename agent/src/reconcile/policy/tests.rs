use mesh_kernel::pods::FakePodNetwork;
use mesh_kernel::policy::{FakePolicyTable, PodPolicy};
use mesh_model::{Objects, compile};
use serde_json::json;

use super::*;

fn snapshot(with_policy: bool) -> Arc<Snapshot> {
    let mut objects = Objects::default();
    let pod = json!({
        "metadata": {"namespace": "x", "name": "a"},
        "spec": {"nodeName": "node-1", "containers": []},
    });
    objects.pods.push(Arc::new(serde_json::from_value(pod).unwrap()));
    if with_policy {
        let policy =
            json!({"metadata": {"namespace": "x", "name": "deny"}, "spec": {"podSelector": {}}});
        objects.network_policies.push(Arc::new(serde_json::from_value(policy).unwrap()));
    }
    Arc::new(compile(&objects, &"node-1".parse().unwrap()))
}

fn desired(snapshot: &Arc<Snapshot>) -> Option<Desired> {
    let snapshot = Arc::clone(snapshot);
    Some(Desired {
        snapshot,
        outlook: Default::default(),
        synced: true,
        preshared: Default::default(),
    })
}

fn port(pod: &str) -> PodPort {
    PodPort {
        netns: "/proc/self/ns/net".into(),
        interface: "eth0".parse().unwrap(),
        host_interface: mesh_kernel::IfName::for_pod("abc", "eth0"),
        owner: format!("abc/eth0 10.244.1.5 - {pod}").trim_end().to_owned(),
        v4: Some([10, 244, 1, 5].into()),
        v6: None,
        mtu: 1420,
        mac: None,
        ports: vec![],
        bandwidth: Default::default(),
    }
}

fn tables(policies: &Policies<FakePolicyTable>) -> Tables {
    policies.lock().reconciler.table().tables()
}

#[test]
fn a_pod_has_its_policies_before_it_is_listed() {
    let snapshot = snapshot(true);
    let (_sender, receiver) = watch::channel(desired(&snapshot));
    let policies = Policies::new(FakePolicyTable::new(), receiver, Board::default());
    let pods = FakePodNetwork::new();
    policies.round(&snapshot, &pods, false).unwrap();
    let expected = snapshot.policy.pods[&ObjectKey::new("x", "a")];
    assert_ne!(expected.ingress, 0);
    policies.place(&port("x/a"), 7).unwrap();
    assert_eq!(tables(&policies).pods[&7], PodPolicy { ingress: expected.ingress, egress: 0 });
    assert!(tables(&policies).identities.values().any(|who| *who == expected.identity));
    // One that the API does not know is denied; one without a name is no pod that could be selected.
    policies.place(&port("x/unknown"), 8).unwrap();
    assert_eq!(tables(&policies).pods[&8], PodPolicy::PENDING);
    policies.place(&port(""), 9).unwrap();
    assert_eq!(tables(&policies).pods[&9], PodPolicy::OPEN);
    // Listed, it keeps them; those that are gone lose theirs.
    let attached = pods.attach(&port("x/a")).unwrap();
    policies.round(&snapshot, &pods, false).unwrap();
    let left = tables(&policies).pods;
    assert_eq!(left.len(), 1);
    assert_eq!(left[&attached.host_ifindex].ingress, expected.ingress);
}

#[test]
fn a_pod_waits_for_the_newest_policy() {
    let (open, closed) = (snapshot(false), snapshot(true));
    let (sender, receiver) = watch::channel(desired(&open));
    let policies = Policies::new(FakePolicyTable::new(), receiver, Board::default());
    policies.round(&open, &FakePodNetwork::new(), false).unwrap();
    sender.send_replace(desired(&closed));
    let started = Instant::now();
    let later = policies.clone();
    let waiting = std::thread::spawn(move || later.place(&port("x/a"), 7));
    policies.round(&closed, &FakePodNetwork::new(), false).unwrap();
    waiting.join().unwrap().unwrap();
    assert!(started.elapsed() < PATIENCE, "it waited in vain");
    let tables = tables(&policies);
    assert!(tables.active && tables.pods[&7].ingress != 0);
}

#[test]
fn without_policies_only_nodes_and_their_ports_are_written() {
    let snapshot = snapshot(false);
    let (_sender, receiver) = watch::channel(desired(&snapshot));
    let policies = Policies::new(FakePolicyTable::new(), receiver, Board::default());
    policies.round(&snapshot, &FakePodNetwork::new(), false).unwrap();
    policies.place(&port("x/a"), 7).unwrap();
    let tables = tables(&policies);
    assert!(!tables.active && tables.pods.is_empty() && tables.rules.is_empty());
    assert_eq!(tables.host_ports.len(), 1 + 17 + 2);
    assert_eq!(tables.identities.len(), 2, "the DNS addresses");
}

#[test]
fn a_name_that_was_cut_is_found_by_its_address() {
    let pod = json!({
        "metadata": {"namespace": "x", "name": "a-long-name"},
        "spec": {"nodeName": "node-1", "containers": []},
        "status": {"podIP": "10.244.1.5"},
    });
    let policy =
        json!({"metadata": {"namespace": "x", "name": "deny"}, "spec": {"podSelector": {}}});
    let objects = Objects {
        pods: vec![Arc::new(serde_json::from_value(pod).unwrap())],
        network_policies: vec![Arc::new(serde_json::from_value(policy).unwrap())],
        ..Objects::default()
    };
    let snapshot = compile(&objects, &"node-1".parse().unwrap());
    let found = place(&snapshot, "abc/eth0 10.244.1.5 - x/a-lo", vec![[10, 244, 1, 5].into()]);
    assert_eq!(found.pod, Some(ObjectKey::new("x", "a-long-name")));
}

/// The same pod under a policy that lets in pods with that label, and so many more elsewhere.
fn restricted(app: &str, others: u8) -> Arc<Snapshot> {
    let parse = |value| Arc::new(serde_json::from_value(value).unwrap());
    let pod = |name: String, node: &str, app: &str, ip: [u8; 4]| {
        parse(json!({
            "metadata": {"namespace": "x", "name": name, "labels": {"app": app}},
            "spec": {"nodeName": node, "containers": []},
            "status": {"podIP": std::net::Ipv4Addr::from(ip)},
        }))
    };
    let own = pod("a".to_owned(), "node-1", "own", [10, 244, 1, 5]);
    let other = |n| {
        pod(format!("o{n}"), "node-2", if n % 2 == 0 { "even" } else { "odd" }, [10, 244, 2, n])
    };
    let policy = json!({"metadata": {"namespace": "x", "name": "some"},
        "spec": {"podSelector": {}, "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": app}}}]}]}});
    let objects = Objects {
        pods: vec![Arc::clone(&own)],
        cluster_pods: (0..others).map(other).chain([own]).collect(),
        network_policies: vec![Arc::new(serde_json::from_value(policy).unwrap())],
        ..Objects::default()
    };
    Arc::new(compile(&objects, &"node-1".parse().unwrap()))
}

#[test]
fn a_change_costs_what_changed_and_forgets_nothing() {
    let first = restricted("even", 200);
    let (_sender, receiver) = watch::channel(desired(&first));
    let policies = Policies::new(FakePolicyTable::new(), receiver, Board::default());
    let pods = FakePodNetwork::new();
    let attached = pods.attach(&port("x/a")).unwrap();
    let steps = || policies.lock().reconciler.table().steps();
    policies.round(&first, &pods, false).unwrap();
    assert!(steps().len() > 200);
    // Others are let in, and those that were are not; nobody's address has to be written for that.
    let other = restricted("odd", 200);
    policies.round(&other, &pods, false).unwrap();
    let few = steps();
    assert!(
        matches!(few[..], [Step::PutRule(..), Step::DeleteRule(_), Step::NextGeneration]),
        "{few:?}"
    );
    // A new pod has an address that somebody else had; it goes again before anybody hears of it.
    let fleeting = PodPort { v4: Some([10, 244, 2, 7].into()), ..port("x/a") };
    policies.place(&fleeting, attached.host_ifindex + 1).unwrap();
    policies.round(&other, &pods, false).unwrap();
    let wanted = |snapshot: &Arc<Snapshot>| {
        let places = places(snapshot, &pods).unwrap();
        Tables::wanted(&snapshot.policy, &places, &host_ports(snapshot))
    };
    assert_eq!(tables(&policies), wanted(&other));
    // One that fails leaves the next round to look at everything.
    policies.lock().reconciler.table().limit_rules(0);
    let last = restricted("even", 201);
    assert!(policies.round(&last, &pods, false).is_err());
    policies.lock().reconciler.table().limit_rules(usize::MAX);
    policies.round(&last, &pods, false).unwrap();
    assert_eq!(tables(&policies), wanted(&last));
}
