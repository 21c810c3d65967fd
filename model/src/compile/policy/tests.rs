//! The compiled form against the text of the specification, read literally.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, Namespace, Node, Pod};
use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::policy::{Decision, Flow, PolicySet, Side, matches};
use crate::snapshot::Protocol;
use crate::{NodeName, ObjectKey, Objects, compile};

const NODES: [&str; 2] = ["node-1", "node-2"];
const NAMESPACES: [&str; 3] = ["x", "y", "z"];
const PODS: [&str; 3] = ["a", "b", "c"];

fn parse<T: serde::de::DeserializeOwned>(value: Value) -> Arc<T> {
    Arc::new(serde_json::from_value(value).unwrap())
}

/// Nine pods on two nodes; pod `c` calls port 81 what the others call port 80, and pod `b` has its ports in a sidecar.
fn cluster() -> Objects {
    let mut objects = Objects::default();
    for (index, name) in NODES.iter().enumerate() {
        objects.nodes.push(parse::<Node>(json!({
            "metadata": {"name": name},
            "spec": {"podCIDRs": [format!("10.244.{index}.0/24")]},
            "status": {"addresses": [{"type": "InternalIP", "address": format!("192.0.2.{index}")}]},
        })));
    }
    for (n, namespace) in NAMESPACES.iter().enumerate() {
        objects.namespaces.push(parse::<Namespace>(json!({
            "metadata": {"name": namespace, "labels": {"ns": namespace}},
        })));
        for (p, pod) in PODS.iter().enumerate() {
            let node = (n + p) % 2;
            let port = if *pod == "c" { 81 } else { 80 };
            let ports = |port| {
                json!([{"name": "serve", "containerPort": port, "protocol": "TCP"},
                       {"name": "serve", "containerPort": port, "protocol": "UDP"}])
            };
            // What an init container had is closed when the pod runs.
            let over = json!({"name": "i", "ports": ports(82)});
            let (init, main) = match *pod {
                "b" => (
                    json!([over, {"name": "s", "restartPolicy": "Always", "ports": ports(port)}]),
                    json!([]),
                ),
                _ => (json!([over]), ports(port)),
            };
            objects.cluster_pods.push(parse::<Pod>(json!({
                "metadata": {"namespace": namespace, "name": pod, "labels": {"pod": pod, "tier": format!("t{}", p % 2)}},
                "spec": {"nodeName": NODES[node], "initContainers": init, "containers": [{"name": "c", "ports": main}]},
                "status": {"phase": "Running", "podIP": format!("10.244.{node}.{}", 10 + 3 * n + p)},
            })));
        }
    }
    objects
}

/// The policies of each node, as its agent compiles them.
fn sets(objects: &Objects) -> BTreeMap<&'static str, PolicySet> {
    let one = |name: &'static str| {
        let node: NodeName = name.parse().unwrap();
        let mine = |pod: &&Arc<Pod>| node_of(pod) == name;
        let pods = objects.cluster_pods.iter().filter(mine).cloned().collect();
        let objects = Objects { pods, ..objects.clone() };
        (name, Arc::unwrap_or_clone(compile(&objects, &node).policy))
    };
    NODES.into_iter().map(one).collect()
}

fn node_of(pod: &Pod) -> &str {
    pod.spec.as_ref().unwrap().node_name.as_deref().unwrap()
}

fn key(pod: &Pod) -> ObjectKey {
    ObjectKey::new(pod.metadata.namespace.clone().unwrap(), pod.metadata.name.clone().unwrap())
}

fn ip(pod: &Pod) -> std::net::IpAddr {
    pod.status.as_ref().unwrap().pod_ip.as_ref().unwrap().parse().unwrap()
}

fn labels(pod: &Pod) -> &BTreeMap<String, String> {
    pod.metadata.labels.as_ref().unwrap()
}

/// What both ends' nodes say.
fn compiled(
    sets: &BTreeMap<&str, PolicySet>,
    from: &Pod,
    to: &Pod,
    protocol: Option<Protocol>,
    port: u16,
) -> bool {
    let flow = Flow { source: ip(from), destination: ip(to), protocol, port };
    let ask = |pod: &Pod, side| {
        let set = &sets[node_of(pod)];
        let policy = set.pods.get(&key(pod)).copied().unwrap_or_default();
        set.decide(&policy, side, &flow).passes()
    };
    ask(from, Side::Sender) && ask(to, Side::Receiver)
}

/// "By default, a pod is non-isolated for egress; all outbound connections are allowed. A pod is isolated for egress if there
/// is any NetworkPolicy that both selects the pod and has "Egress" in its policyTypes [...]. When a pod is isolated for egress,
/// the only allowed connections from the pod are those allowed by the egress list of some NetworkPolicy that applies to
/// the pod for egress." Ingress likewise.
struct Naive<'a>(&'a Objects);

impl Naive<'_> {
    fn allows(&self, from: &Pod, to: &Pod, protocol: Option<Protocol>, port: u16) -> bool {
        self.side(from, to, true, protocol, port) && self.side(from, to, false, protocol, port)
    }

    fn side(
        &self,
        from: &Pod,
        to: &Pod,
        egress: bool,
        protocol: Option<Protocol>,
        port: u16,
    ) -> bool {
        let (subject, other) = if egress { (from, to) } else { (to, from) };
        let policies: Vec<&NetworkPolicy> = self
            .0
            .network_policies
            .iter()
            .map(|policy| &**policy)
            .filter(|policy| policy.metadata.namespace == subject.metadata.namespace)
            .filter(|policy| {
                let selector = policy.spec.as_ref().unwrap().pod_selector.as_ref();
                matches(&selector.cloned().unwrap_or_default(), labels(subject))
            })
            .filter(|policy| types(policy).contains(&if egress { "Egress" } else { "Ingress" }))
            .collect();
        let port_allowed = |ports: Option<&Vec<NetworkPolicyPort>>| {
            ports.is_none_or(|ports| {
                ports.is_empty() || ports.iter().any(|one| is_port(one, to, protocol, port))
            })
        };
        policies.is_empty()
            || policies.iter().any(|policy| {
                let (spec, ns) = (policy.spec.as_ref().unwrap(), &policy.metadata.namespace);
                let peers = |list: Option<&Vec<NetworkPolicyPeer>>,
                             ports: Option<&Vec<NetworkPolicyPort>>| {
                    list.is_none_or(|list| {
                        list.is_empty()
                            || list.iter().any(|peer| {
                                // A named port is a port of a pod that selectors mean.
                                let by_name = |p: &NetworkPolicyPort| {
                                    matches!(p.port, Some(IntOrString::String(_)))
                                };
                                let ports: Option<Vec<_>> =
                                    ports.filter(|p| !p.is_empty()).map(|ports| {
                                        let keep = |p: &&NetworkPolicyPort| {
                                            !egress || peer.ip_block.is_none() || !by_name(p)
                                        };
                                        ports.iter().filter(keep).cloned().collect()
                                    });
                                self.is_peer(peer, ns.as_deref().unwrap(), other)
                                    && ports.is_none_or(|p| {
                                        p.iter().any(|one| is_port(one, to, protocol, port))
                                    })
                            })
                    })
                };
                if egress {
                    spec.egress.iter().flatten().any(|rule| {
                        port_allowed(rule.ports.as_ref())
                            && peers(rule.to.as_ref(), rule.ports.as_ref())
                    })
                } else {
                    spec.ingress.iter().flatten().any(|rule| {
                        port_allowed(rule.ports.as_ref())
                            && peers(rule.from.as_ref(), rule.ports.as_ref())
                    })
                }
            })
    }

    fn is_peer(&self, peer: &NetworkPolicyPeer, namespace: &str, pod: &Pod) -> bool {
        if let Some(block) = &peer.ip_block {
            let inside = |text: &String| text.parse::<ipnet::IpNet>().unwrap().contains(&ip(pod));
            return inside(&block.cidr) && !block.except.iter().flatten().any(inside);
        }
        let own = pod.metadata.namespace.as_deref().unwrap();
        let in_namespace = match &peer.namespace_selector {
            None => own == namespace,
            Some(selector) => {
                let all = self.0.namespaces.iter();
                let mut found = all.filter(|ns| ns.metadata.name.as_deref() == Some(own));
                let mut labels = found.next().unwrap().metadata.labels.clone().unwrap();
                labels.insert("kubernetes.io/metadata.name".to_owned(), own.to_owned());
                matches(selector, &labels)
            }
        };
        in_namespace && peer.pod_selector.as_ref().is_none_or(|s| matches(s, labels(pod)))
    }
}

/// "If this field is not specified, it will default based on the existence of ingress or egress rules."
fn types(policy: &NetworkPolicy) -> Vec<&str> {
    let spec = policy.spec.as_ref().unwrap();
    match &spec.policy_types {
        Some(types) if !types.is_empty() => types.iter().map(String::as_str).collect(),
        _ if spec.egress.iter().flatten().next().is_some() => vec!["Ingress", "Egress"],
        _ => vec!["Ingress"],
    }
}

/// "The port on the given protocol. This can either be a numerical or named port on a pod."
fn is_port(wanted: &NetworkPolicyPort, to: &Pod, protocol: Option<Protocol>, port: u16) -> bool {
    if protocol.is_none() || Protocol::parse(wanted.protocol.as_deref()) != protocol {
        return false;
    }
    match &wanted.port {
        None => true,
        Some(IntOrString::Int(first)) => {
            (*first..=wanted.end_port.unwrap_or(*first)).contains(&i32::from(port))
        }
        Some(IntOrString::String(name)) => {
            let spec = to.spec.as_ref().unwrap();
            let stays = |c: &&Container| c.restart_policy.is_some();
            let sidecars = spec.init_containers.iter().flatten().filter(stays);
            spec.containers.iter().chain(sidecars).flat_map(|c| c.ports.iter().flatten()).any(
                |one| {
                    one.name.as_ref() == Some(name)
                        && Protocol::parse(one.protocol.as_deref()) == protocol
                        && one.container_port == i32::from(port)
                },
            )
        }
    }
}

fn selector(key: &'static str, values: &'static [&'static str]) -> impl Strategy<Value = Value> {
    let value = || proptest::sample::select(values);
    prop_oneof![
        Just(json!({})),
        value().prop_map(move |value| json!({"matchLabels": {key: value}})),
        (
            proptest::sample::select(&["In", "NotIn"][..]),
            proptest::sample::subsequence(values, 1..=2)
        )
            .prop_map(move |(operator, values)| {
                json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]})
            }),
        proptest::sample::select(&["Exists", "DoesNotExist"][..]).prop_map(
            move |operator| json!({"matchExpressions": [{"key": "tier", "operator": operator}]})
        ),
    ]
}

fn pods() -> impl Strategy<Value = Value> {
    selector("pod", &PODS)
}

fn namespaces() -> impl Strategy<Value = Value> {
    prop_oneof![selector("ns", &NAMESPACES), selector("kubernetes.io/metadata.name", &NAMESPACES)]
}

fn peer() -> impl Strategy<Value = Value> {
    let block = (
        proptest::sample::select(
            &["10.244.0.0/16", "10.244.0.0/28", "0.0.0.0/0", "10.244.1.12/32"][..],
        ),
        proptest::sample::subsequence(
            &["10.244.0.8/29", "10.244.1.0/24", "10.244.0.10/32"][..],
            0..=2,
        ),
    );
    prop_oneof![
        pods().prop_map(|pods| json!({"podSelector": pods})),
        namespaces().prop_map(|ns| json!({"namespaceSelector": ns})),
        (pods(), namespaces())
            .prop_map(|(pods, ns)| json!({"podSelector": pods, "namespaceSelector": ns})),
        block.prop_map(|(cidr, except)| json!({"ipBlock": {"cidr": cidr, "except": except}})),
    ]
}

fn port() -> impl Strategy<Value = Value> {
    let protocol = || proptest::sample::select(&["TCP", "UDP", "SCTP"][..]);
    prop_oneof![
        protocol().prop_map(|protocol| json!({"protocol": protocol})),
        (protocol(), 80..=81).prop_map(|(protocol, port)| json!({"protocol": protocol, "port": port})),
        (protocol(), 70..=81, 0..10)
            .prop_map(|(protocol, port, more)| json!({"protocol": protocol, "port": port, "endPort": port + more})),
        protocol().prop_map(|protocol| json!({"protocol": protocol, "port": "serve"})),
        Just(json!({"port": "nobody-has-it"})),
    ]
}

fn rules(peers: &'static str) -> impl Strategy<Value = Value> {
    let list = || proptest::collection::vec(peer(), 0..3);
    let rule = (list(), proptest::collection::vec(port(), 0..3));
    let rule = rule.prop_map(move |(list, ports)| json!({peers: list, "ports": ports}));
    proptest::collection::vec(rule, 0..3).prop_map(Value::from)
}

fn policy() -> impl Strategy<Value = Value> {
    let types =
        proptest::option::of(proptest::sample::subsequence(&["Ingress", "Egress"][..], 1..=2));
    (proptest::sample::select(&NAMESPACES[..]), pods(), types, rules("from"), rules("to")).prop_map(
        |(namespace, pods, types, ingress, egress)| {
            let mut spec = json!({"podSelector": pods, "ingress": ingress, "egress": egress});
            if let Some(types) = types {
                spec["policyTypes"] = json!(types);
            }
            json!({"metadata": {"namespace": namespace}, "spec": spec})
        },
    )
}

fn with_policies(policies: Vec<Value>) -> Objects {
    let mut objects = cluster();
    for (index, mut policy) in policies.into_iter().enumerate() {
        policy["metadata"]["name"] = json!(format!("p{index}"));
        objects.network_policies.push(parse(policy));
    }
    objects
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// The truth table of nine pods and nine pods, two ports, three protocols, and a protocol without ports.
    #[test]
    fn the_compiled_form_means_what_the_policies_say(policies in proptest::collection::vec(policy(), 1..5)) {
        let objects = with_policies(policies);
        let (sets, naive) = (sets(&objects), Naive(&objects));
        for from in &objects.cluster_pods {
            for to in objects.cluster_pods.iter().filter(|to| !Arc::ptr_eq(to, from)) {
                for protocol in [Some(Protocol::Tcp), Some(Protocol::Udp), Some(Protocol::Sctp), None] {
                    for port in if protocol.is_some() { vec![80, 81, 82] } else { vec![0] } {
                        let expected = naive.allows(from, to, protocol, port);
                        let found = compiled(&sets, from, to, protocol, port);
                        prop_assert_eq!(found, expected, "{} -> {} {:?} {}", key(from), key(to), protocol, port);
                    }
                }
            }
        }
    }

    /// Numbers depend on meaning, not on order; and another policy changes no number of those that are there.
    #[test]
    fn order_does_not_matter(policies in proptest::collection::vec(policy(), 1..5)) {
        let objects = with_policies(policies);
        let mut other = objects.clone();
        other.network_policies.reverse();
        other.cluster_pods.reverse();
        other.namespaces.reverse();
        prop_assert_eq!(sets(&objects), sets(&other));
    }
}

fn find<'a>(objects: &'a Objects, namespace: &str, name: &str) -> &'a Pod {
    let wanted = ObjectKey::new(namespace, name);
    objects.cluster_pods.iter().find(|pod| key(pod) == wanted).unwrap()
}

#[test]
fn without_policies_nothing_is_enforced_and_only_nodes_are_known() {
    for set in sets(&cluster()).values() {
        assert!(!set.active && set.pods.is_empty() && set.rules.is_empty());
        assert_eq!(set.identities.len(), 2 + 2 + 2, "addresses, overlay addresses, DNS");
    }
}

#[test]
fn an_isolated_namespace_hears_itself_and_nodes_and_whom_policies_allow() {
    let mut objects = with_policies(vec![json!({
        "metadata": {"namespace": "y"},
        "spec": {"podSelector": {"matchLabels": {"pod": "b"}}, "ingress": [
            {"from": [{"namespaceSelector": {"matchLabels": {"ns": "x"}}}], "ports": [{"port": 80}]},
        ]},
    })]);
    objects.namespaces.iter_mut().for_each(|ns| {
        if ns.metadata.name.as_deref() == Some("y") {
            let labels = Arc::make_mut(ns).metadata.labels.get_or_insert_default();
            labels.insert("mesh.dev/isolation".to_owned(), "namespace".to_owned());
        }
    });
    assert!(super::is_restricted(0, &objects.namespaces));
    let sets = sets(&objects);
    let ask = |from: (&str, &str), to: (&str, &str), port| {
        let (from, to) = (find(&objects, from.0, from.1), find(&objects, to.0, to.1));
        compiled(&sets, from, to, Some(Protocol::Tcp), port)
    };
    assert!(ask(("y", "a"), ("y", "c"), 80) && ask(("y", "c"), ("y", "b"), 81));
    assert!(!ask(("x", "a"), ("y", "a"), 80) && !ask(("z", "a"), ("y", "b"), 80));
    assert!(ask(("x", "a"), ("y", "b"), 80) && !ask(("x", "a"), ("y", "b"), 81));
    assert!(ask(("y", "a"), ("x", "a"), 80), "it may speak to anybody");
    let to = find(&objects, "y", "a");
    let set = &sets[node_of(to)];
    let from = |source: &str| {
        let source = source.parse().unwrap();
        let flow = Flow { source, destination: ip(to), protocol: Some(Protocol::Tcp), port: 80 };
        set.decide(&set.pods[&key(to)], Side::Receiver, &flow)
    };
    let own = NODES.iter().position(|name| *name == node_of(to)).unwrap();
    assert_eq!(from(&format!("10.244.{own}.1")), Decision::Node);
    let other = from(&format!("10.244.{}.1", 1 - own));
    let Decision::Allowed(rule) = other else { panic!("{other:?}") };
    assert_eq!(set.name(rule), "isolation of namespace y");
    let Decision::Denied(policy) = from("198.51.100.1") else { panic!("open to the world") };
    assert_eq!(set.name(policy), "ingress policies: isolation of namespace y");
}

/// The API refuses such; where there is one all the same, it is not taken for the whole range.
#[test]
fn a_block_with_an_exception_that_nobody_can_read_means_nobody() {
    for (except, passes) in [(json!([]), true), (json!(["10.244.0.0/33"]), false)] {
        let block = json!({"ipBlock": {"cidr": "10.244.0.0/16", "except": except}});
        let objects = with_policies(vec![json!({
            "metadata": {"namespace": "y"},
            "spec": {"podSelector": {}, "ingress": [{"from": [block]}]},
        })]);
        let (from, to) = (find(&objects, "x", "a"), find(&objects, "y", "a"));
        assert_eq!(compiled(&sets(&objects), from, to, Some(Protocol::Tcp), 80), passes);
    }
}

#[test]
fn pods_in_the_nodes_network_and_finished_ones_are_nobody() {
    let mut objects = with_policies(vec![json!({
        "metadata": {"namespace": "x"}, "spec": {"ingress": [{"from": [{"podSelector": {}}]}]},
    })]);
    let count = |objects: &Objects| sets(objects)["node-1"].identities.len();
    let before = count(&objects);
    let change = |objects: &mut Objects, index: usize, pointer: &str, value: Value| {
        let mut pod = serde_json::to_value(&*objects.cluster_pods[index]).unwrap();
        pod[pointer.split('/').next().unwrap()][pointer.split('/').nth(1).unwrap()] = value;
        objects.cluster_pods[index] = parse(pod);
    };
    change(&mut objects, 0, "spec/hostNetwork", json!(true));
    change(&mut objects, 1, "status/phase", json!("Succeeded"));
    assert_eq!(count(&objects), before - 2);
}

#[test]
fn a_change_elsewhere_changes_few_entries() {
    let allow = |pod: &str| {
        json!({
            "metadata": {"namespace": "x"},
            "spec": {"podSelector": {"matchLabels": {"pod": pod}}, "ingress": [{"from": [{"podSelector": {}}]}]},
        })
    };
    let (one, two) = (with_policies(vec![allow("a")]), with_policies(vec![allow("a"), allow("c")]));
    let (before, after) = (&sets(&one)["node-1"], &sets(&two)["node-1"]);
    assert_eq!(after.rules.differences(&before.rules).gone, []);
    assert_eq!(before.identities, after.identities);
}
