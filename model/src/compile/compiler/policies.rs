//! Policies that were remembered against policies that are made from nothing.

use std::sync::Arc;

use k8s_openapi::Metadata;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{Compiler, policy};
use crate::compile::Objects;
use crate::parts::Parts;
use crate::policy::PolicySet;
use crate::{NodeName, ObjectKey};

/// One object gets another form, or goes. What it is like follows from the bits of `form`: few words and addresses, so that
/// objects meet.
#[derive(Debug, Clone, Copy)]
struct Change {
    kind: u8,
    which: u8,
    form: u32,
    there: bool,
}

fn change() -> impl Strategy<Value = Change> {
    let kind = prop_oneof![4 => Just(0_u8), 3 => Just(1), 3 => Just(2), 1 => Just(3), 1 => Just(4)];
    (kind, 0..8_u8, any::<u32>(), proptest::bool::weighted(0.85))
        .prop_map(|(kind, which, form, there)| Change { kind, which, form, there })
}

/// Takes choices out of a number.
struct Form(u32);

impl Form {
    fn of<T: Clone>(&mut self, choices: &[T]) -> T {
        let count = u32::try_from(choices.len()).unwrap();
        let choice = choices[(self.0 % count) as usize].clone();
        self.0 /= count;
        choice
    }
}

fn put<T>(list: &mut Vec<Arc<T>>, object: Value, there: bool)
where
    T: Metadata<Ty = ObjectMeta> + DeserializeOwned,
{
    let object: T = serde_json::from_value(object).unwrap();
    let name = |object: &T| (object.metadata().namespace.clone(), object.metadata().name.clone());
    list.retain(|one| name(one) != name(&object));
    if there {
        list.insert(list.len() / 2, Arc::new(object));
    }
}

fn carry_out(change: Change, objects: &mut Objects) {
    let Change { kind, which, form, there } = change;
    let mut form = Form(form);
    let namespace = ["x", "y"][usize::from(which % 2)];
    match kind {
        0 => {
            let pod = pod(namespace, which / 2, &mut form);
            // The lists of the node's own pods and of all pods are not always of one time.
            let (node, cluster) =
                form.of(&[(true, true), (true, true), (true, false), (false, true)]);
            if node {
                let mine = pod["spec"]["nodeName"] == "n0";
                put(&mut objects.pods, pod.clone(), there && mine);
            }
            if cluster {
                put(&mut objects.cluster_pods, pod, there);
            }
        }
        1 => put(&mut objects.network_policies, policy(namespace, which / 2, &mut form), there),
        2 => {
            let labels = form.of(&[
                json!({}),
                json!({"team": "red"}),
                json!({"team": "blue"}),
                json!({"team": "red", "mesh.dev/isolation": "namespace"}),
            ]);
            put(
                &mut objects.namespaces,
                json!({"metadata": {"name": namespace, "labels": labels}}),
                there,
            );
        }
        3 => {
            let name = format!("n{}", which % 2);
            let node = json!({"metadata": {"name": name}, "spec": {"podCIDRs": ["10.244.9.0/24"]},
                "status": {"addresses": [{"type": "InternalIP", "address": address(&mut form)}]}});
            put(&mut objects.nodes, node, there);
        }
        // Other objects: policies have nothing to do with them.
        _ => {
            let service = json!({"metadata": {"namespace": namespace, "name": "s"}, "spec": {"clusterIP": "10.96.0.9"}});
            put(&mut objects.services, service, there);
        }
    }
}

fn address(form: &mut Form) -> String {
    form.of(&["10.244.0.1", "10.244.0.2", "10.244.0.3", "10.244.1.1", "10.244.1.2", "fd10:244::1"])
        .to_owned()
}

fn pod(namespace: &str, which: u8, form: &mut Form) -> Value {
    let mut labels = json!({"app": form.of(&["a", "b"])});
    if form.of(&[true, false]) {
        labels["tier"] = json!(form.of(&["front", "back"]));
    }
    let made = form.of(&[1, 2]);
    let port = form.of(&[
        json!([]),
        json!([{"name": "web", "containerPort": 80}]),
        json!([{"name": "web", "containerPort": 81}]),
    ]);
    let status = match form.of(&[true, true, true, false]) {
        true => json!({"podIP": address(form), "podIPs": [{"ip": address(form)}]}),
        false => json!({}),
    };
    json!({
        "metadata": {"namespace": namespace, "name": format!("p{which}"), "labels": labels,
                     "creationTimestamp": format!("2026-01-0{made}T00:00:00Z")},
        "spec": {"nodeName": form.of(&["n0", "n0", "n1"]), "hostNetwork": form.of(&[false, false, false, true]),
                 "containers": [{"name": "c", "ports": port}]},
        "status": status,
    })
}

fn selector(form: &mut Form) -> Value {
    form.of(&[
        json!({}),
        json!({"matchLabels": {"app": "a"}}),
        json!({"matchLabels": {"tier": "front"}}),
        json!({"matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}]}),
    ])
}

fn peer(form: &mut Form) -> Value {
    let team = json!({"matchLabels": {"team": "red"}});
    match form.of(&[0, 1, 2, 3, 4]) {
        0 => json!({"podSelector": selector(form)}),
        1 => json!({"namespaceSelector": team}),
        2 => json!({"podSelector": selector(form), "namespaceSelector": team}),
        3 => json!({"podSelector": selector(form), "namespaceSelector": {}}),
        _ => {
            let except = form.of(&[json!([]), json!(["10.244.0.2/31"]), json!(["10.244.1.0/24"])]);
            json!({"ipBlock": {"cidr": form.of(&["10.244.0.0/16", "10.244.0.0/24", "0.0.0.0/0"]), "except": except}})
        }
    }
}

fn policy(namespace: &str, which: u8, form: &mut Form) -> Value {
    let selector = selector(form);
    let ports = form.of(&[
        json!([]),
        json!([{"port": 80}]),
        json!([{"port": "web"}, {"port": 80, "endPort": 83}]),
    ]);
    let peers = match form.of(&[0, 1, 1, 2]) {
        0 => json!([]),
        1 => json!([peer(form)]),
        _ => json!([peer(form), peer(form)]),
    };
    let spec = match form.of(&[true, false]) {
        true => json!({"podSelector": selector, "ingress": [{"from": peers, "ports": ports}]}),
        false => {
            json!({"podSelector": selector, "policyTypes": ["Egress"], "egress": [{"to": peers, "ports": ports}]})
        }
    };
    json!({"metadata": {"namespace": namespace, "name": format!("l{which}")}, "spec": spec})
}

fn local() -> NodeName {
    "n0".parse().unwrap()
}

/// A compiler under which almost all numbers meet, or one as everybody's.
fn compiler(poor: bool) -> Compiler {
    let policy = if poor { policy::Memory::with_poor_numbers() } else { policy::Memory::default() };
    Compiler { policy, ..Compiler::new(local()) }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever changes in whatever order, one by one or together: what was remembered is what would be made.
    #[test]
    fn remembered_policies_are_those_that_would_be_made(
        changes in proptest::collection::vec(proptest::collection::vec(change(), 1..4), 1..40),
        poor: bool,
    ) {
        let mut objects = Objects::default();
        let mut remembering = compiler(poor);
        for changes in changes {
            changes.iter().for_each(|change| carry_out(*change, &mut objects));
            let remembered = remembering.compile(&objects).policy;
            let made = compiler(poor).compile(&objects).policy;
            prop_assert_eq!(remembered, made, "after {:?}", changes);
        }
    }
}

/// Fifty own pods with a policy each, and five hundred elsewhere, ten to a kind and sixty to an address range.
fn many() -> Objects {
    let mut objects = Objects::default();
    let pod = |namespace: &str, name: String, node: &str, ip: String| {
        json!({"metadata": {"namespace": namespace, "name": name, "labels": {"app": name}},
            "spec": {"nodeName": node, "containers": []}, "status": {"podIP": ip}})
    };
    put(&mut objects.namespaces, json!({"metadata": {"name": "x"}}), true);
    put(&mut objects.namespaces, json!({"metadata": {"name": "y"}}), true);
    for n in 0..50 {
        let own = pod("x", format!("own{n}"), "n0", format!("10.244.0.{n}"));
        put(&mut objects.pods, own.clone(), true);
        put(&mut objects.cluster_pods, own, true);
        put(&mut objects.network_policies, allow(n, &format!("a{n}")), true);
    }
    for n in 0..500 {
        let mut other =
            pod("y", format!("o{n}"), "n1", format!("10.244.{}.{}", 1 + n / 60, n % 60));
        other["metadata"]["labels"]["app"] = json!(format!("a{}", n / 10));
        put(&mut objects.cluster_pods, other, true);
    }
    objects
}

/// One of the pods may hear those with that label.
fn allow(n: usize, app: &str) -> Value {
    json!({"metadata": {"namespace": "x", "name": format!("l{n}")}, "spec": {
        "podSelector": {"matchLabels": {"app": format!("own{n}")}},
        "ingress": [{"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": app}}}]}]}})
}

/// How many parts of each table are other ones.
fn moved(before: &PolicySet, after: &PolicySet) -> [usize; 2] {
    fn of<T: crate::parts::Element>(before: &Parts<T>, after: &Parts<T>) -> usize {
        after.parts().filter(|(name, part)| !std::ptr::eq(before.part(*name), *part)).count()
    }
    [of(&before.identities, &after.identities), of(&before.rules, &after.rules)]
}

#[test]
fn a_change_touches_what_depends_on_it() {
    let mut objects = many();
    let mut compiler = compiler(false);
    let first = compiler.compile(&objects).policy;
    assert_eq!((first.rules.parts().count(), first.identities.len()), (50, 552));
    let mut follow = |change: &dyn Fn(&mut Objects)| {
        let before = compiler.compile(&objects).policy;
        change(&mut objects);
        let after = compiler.compile(&objects).policy;
        (moved(&before, &after), after)
    };
    // A policy that allows others now: its own entries.
    let (parts, after) =
        follow(&|objects| put(&mut objects.network_policies, allow(7, "a8"), true));
    assert_eq!(parts, [0, 1]);
    let policy =
        |set: &PolicySet, n: usize| set.pods[&ObjectKey::new("x", format!("own{n}"))].ingress;
    let heard = |set: &PolicySet, n| set.rules.part(policy(set, n)).to_vec();
    assert_eq!(heard(&after, 7)[0].identity, heard(&after, 8)[0].identity);
    // A pod elsewhere that is like others now: its address.
    let relabel = |objects: &mut Objects, app: &str| {
        let mut pod = serde_json::to_value(
            &**objects
                .cluster_pods
                .iter()
                .find(|pod| pod.metadata.name.as_deref() == Some("o77"))
                .unwrap(),
        )
        .unwrap();
        pod["metadata"]["labels"]["app"] = json!(app);
        put(&mut objects.cluster_pods, pod, true);
    };
    assert_eq!(follow(&|objects| relabel(objects, "a20")).0, [1, 0]);
    // Like none before, and nobody may hear it.
    assert_eq!(follow(&|objects| relabel(objects, "nobody")).0, [1, 0]);
    // Somebody may.
    let (parts, after) =
        follow(&|objects| put(&mut objects.network_policies, allow(9, "nobody"), true));
    assert_eq!((parts, heard(&after, 9).len()), ([0, 1], 1));
    // A pod of ours without a change that policies see.
    let quiet = |objects: &mut Objects| {
        let mut pod = serde_json::to_value(&*objects.pods[0]).unwrap();
        pod["status"]["conditions"] = json!([{"type": "Ready", "status": "True"}]);
        put(&mut objects.pods, pod, true);
    };
    let before = after;
    let (parts, after) = follow(&quiet);
    assert_eq!(parts, [0, 0]);
    assert!(Arc::ptr_eq(&before, &after));
}
