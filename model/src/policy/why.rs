//! Why a connection passes or not, from objects alone.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;

use super::{Decision, Flow, Side};
use crate::containers::have_ended;
use crate::snapshot::Protocol;
use crate::{NodeName, ObjectKey, Objects, compile};

/// One end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// A pod.
    Pod(ObjectKey),
    /// Anybody with that address.
    Address(IpAddr),
}

/// What the policies of one end say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opinion {
    /// Whether packets pass.
    pub passes: bool,
    /// Who decided, in words.
    pub reason: String,
}

/// The question cannot be answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WhyError {
    /// There is no such pod.
    #[error("no pod {0}")]
    NoPod(ObjectKey),
    /// The pod has ended. Its address may be somebody else's.
    #[error("pod {0} has ended")]
    Ended(ObjectKey),
    /// The pod has no address (of the other end's family).
    #[error("pod {0} has no address of that family yet")]
    NoAddress(ObjectKey),
}

/// What the sender's and the receiver's policies say to a new connection, as the nodes of both would compile them. All pods of
/// the cluster have to be in `objects.cluster_pods`.
///
/// # Errors
/// See [`WhyError`].
pub fn why(
    objects: &Objects,
    from: &End,
    to: &End,
    protocol: Option<Protocol>,
    port: u16,
) -> Result<[Opinion; 2], WhyError> {
    let (sender, receiver) = (find(objects, from)?, find(objects, to)?);
    if let (Some(sender), Some(receiver)) = (sender, receiver)
        && std::ptr::eq(sender, receiver)
    {
        let reason = "a pod reaches itself without leaving its network: no policy applies";
        return Ok([(); 2].map(|()| Opinion { passes: true, reason: reason.to_owned() }));
    }
    let all = [addresses(from, sender), addresses(to, receiver)];
    let pair = all[0].iter().find_map(|source| {
        let same = |other: &&IpAddr| other.is_ipv4() == source.is_ipv4();
        Some((*source, *all[1].iter().find(same)?))
    });
    let Some((source, destination)) = pair else {
        let ends = [from, to].into_iter().zip(all.iter().map(Vec::is_empty));
        let pods = ends.filter_map(|(end, empty)| Some((pod_of(end)?, empty)));
        let worst = pods.max_by_key(|(_, empty)| *empty).map(|(pod, _)| pod.clone());
        return Err(WhyError::NoAddress(worst.unwrap_or_else(|| ObjectKey::new("", ""))));
    };
    let flow = Flow { source, destination, protocol, port };
    let ask = |pod, side| opinion(objects, pod, side, &flow);
    Ok([ask(sender, Side::Sender), ask(receiver, Side::Receiver)])
}

fn pod_of(end: &End) -> Option<&ObjectKey> {
    match end {
        End::Pod(key) => Some(key),
        End::Address(_) => None,
    }
}

/// The pod of an end; an address may be a pod's, too. As where policies are compiled, it is that of the pod that was made last
/// of those that have not ended.
fn find<'a>(objects: &'a Objects, end: &End) -> Result<Option<&'a Pod>, WhyError> {
    let mut pods = objects.cluster_pods.iter().map(|pod| &**pod);
    match end {
        End::Pod(key) => {
            let named = |pod: &&Pod| {
                pod.metadata.namespace.as_deref() == Some(&key.namespace)
                    && pod.metadata.name.as_deref() == Some(&key.name)
            };
            let pod = pods.find(named).ok_or_else(|| WhyError::NoPod(key.clone()))?;
            if have_ended(pod) { Err(WhyError::Ended(key.clone())) } else { Ok(Some(pod)) }
        }
        End::Address(address) => {
            let all = pods.filter(|pod| {
                let host = pod.spec.as_ref().and_then(|spec| spec.host_network) == Some(true);
                !host && !have_ended(pod) && pod_addresses(pod).contains(address)
            });
            Ok(all.max_by_key(|pod| {
                let metadata = &pod.metadata;
                (&metadata.creation_timestamp, &metadata.namespace, &metadata.name)
            }))
        }
    }
}

fn addresses(end: &End, pod: Option<&Pod>) -> Vec<IpAddr> {
    match end {
        End::Address(address) => vec![*address],
        End::Pod(_) => pod.map(pod_addresses).unwrap_or_default(),
    }
}

fn pod_addresses(pod: &Pod) -> Vec<IpAddr> {
    let status = pod.status.as_ref();
    let all = status.and_then(|s| s.pod_ips.as_ref()).into_iter().flatten().map(|ip| &ip.ip);
    let first = status.and_then(|s| s.pod_ip.as_ref());
    all.chain(first).filter_map(|text| text.parse().ok()).collect()
}

fn opinion(objects: &Objects, pod: Option<&Pod>, side: Side, flow: &Flow) -> Opinion {
    let free = |reason: &str| Opinion { passes: true, reason: reason.to_owned() };
    let Some(pod) = pod else { return free("not a pod: no policy applies") };
    let spec = pod.spec.as_ref();
    if spec.and_then(|spec| spec.host_network) == Some(true) {
        return free("in the node's network: no policy applies");
    }
    let node: Option<NodeName> =
        spec.and_then(|spec| spec.node_name.as_deref()).and_then(|name| name.parse().ok());
    let key = pod.metadata.namespace.clone().zip(pod.metadata.name.clone());
    let (Some(node), Some((namespace, name))) = (node, key) else {
        return free("on no node yet");
    };
    let objects = Objects { pods: objects.cluster_pods.clone(), ..objects.clone() };
    let set = compile(&objects, &node).policy;
    let policy = set.pods.get(&ObjectKey::new(namespace, name)).copied().unwrap_or_default();
    let decision = set.decide(&policy, side, flow);
    let reason = match decision {
        Decision::Unrestricted => "no policy selects the pod in this direction".to_owned(),
        Decision::Node => "the pod's own node is always allowed".to_owned(),
        Decision::Allowed(rule) => format!("allowed by {}", set.name(rule)),
        Decision::Denied(policy) => format!("no rule allows it in the {}", set.name(policy)),
    };
    Opinion { passes: decision.passes(), reason }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::{Value, json};

    use super::*;

    fn objects() -> Objects {
        let pod = |namespace: &str, ip: &str, host: bool| {
            json!({
                "metadata": {"namespace": namespace, "name": "a", "labels": {"app": namespace}},
                "spec": {"nodeName": "node-1", "hostNetwork": host, "containers": []},
                "status": {"phase": "Running", "podIP": ip},
            })
        };
        let parse = |value: Value| Arc::new(serde_json::from_value(value).unwrap());
        Objects {
            cluster_pods: vec![
                parse(pod("x", "10.244.0.5", false)),
                parse(pod("y", "10.244.0.6", false)),
                parse(pod("host", "192.0.2.1", true)),
            ],
            namespaces: ["x", "y", "host"]
                .map(|name| {
                    Arc::new(serde_json::from_value(json!({"metadata": {"name": name}})).unwrap())
                })
                .into(),
            network_policies: vec![Arc::new(
                serde_json::from_value(json!({
                    "metadata": {"namespace": "y", "name": "web"},
                    "spec": {"podSelector": {}, "ingress": [
                        {"from": [{"namespaceSelector": {}}], "ports": [{"port": 80}]},
                    ]},
                }))
                .unwrap(),
            )],
            ..Objects::default()
        }
    }

    fn pod(namespace: &str) -> End {
        End::Pod(ObjectKey::new(namespace, "a"))
    }

    #[test]
    fn the_deciding_rule_is_named() {
        let ask = |to: &End, port| {
            let answer = why(&objects(), &pod("x"), to, Some(Protocol::Tcp), port).unwrap();
            answer.map(|opinion| (opinion.passes, opinion.reason))
        };
        let unrestricted = (true, "no policy selects the pod in this direction".to_owned());
        let allowed = (true, "allowed by NetworkPolicy y/web ingress[0]".to_owned());
        assert_eq!(ask(&pod("y"), 80), [unrestricted.clone(), allowed.clone()]);
        assert_eq!(ask(&End::Address("10.244.0.6".parse().unwrap()), 80)[1], allowed);
        let denied = (false, "no rule allows it in the ingress policies: y/web".to_owned());
        assert_eq!(ask(&pod("y"), 81)[1], denied);
        assert_eq!(ask(&pod("host"), 81)[1].1, "in the node's network: no policy applies");
        let world = End::Address("198.51.100.1".parse().unwrap());
        assert_eq!(ask(&world, 443)[1].1, "not a pod: no policy applies");
    }

    #[test]
    fn a_pod_reaches_itself_whatever_its_policies_say() {
        for to in [pod("y"), End::Address("10.244.0.6".parse().unwrap())] {
            let answer = why(&objects(), &pod("y"), &to, Some(Protocol::Tcp), 81).unwrap();
            assert!(answer.iter().all(|opinion| opinion.passes), "{answer:?}");
        }
    }

    #[test]
    fn an_address_is_that_of_the_pod_that_has_it_now() {
        let mut objects = objects();
        let former = |name: &str, phase: &str| {
            let mut pod = (*objects.cluster_pods[1]).clone();
            pod.metadata.namespace = Some("host".to_owned());
            pod.metadata.name = Some(name.to_owned());
            pod.status.as_mut().unwrap().phase = Some(phase.to_owned());
            Arc::new(pod)
        };
        // A finished job keeps its address in its status. Another pod is about to be deleted, and was made before.
        let mut all = vec![former("job", "Succeeded"), former("before", "Running")];
        Arc::make_mut(&mut objects.cluster_pods[1]).metadata.creation_timestamp =
            Some(serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap());
        all.append(&mut objects.cluster_pods);
        objects.cluster_pods = all;
        let to = End::Address("10.244.0.6".parse().unwrap());
        let [_, ingress] = why(&objects, &pod("x"), &to, Some(Protocol::Tcp), 81).unwrap();
        assert_eq!(ingress.reason, "no rule allows it in the ingress policies: y/web");
        let job = ObjectKey::new("host", "job");
        let error = why(&objects, &pod("x"), &End::Pod(job.clone()), None, 0).unwrap_err();
        assert_eq!(error, WhyError::Ended(job));
    }

    #[test]
    fn what_is_missing_is_named() {
        let missing = ObjectKey::new("x", "nobody");
        let ask = |to: End| why(&objects(), &pod("x"), &to, None, 0).unwrap_err();
        assert_eq!(ask(End::Pod(missing.clone())), WhyError::NoPod(missing));
        let six = End::Address("2001:db8::1".parse().unwrap());
        assert_eq!(ask(six), WhyError::NoAddress(ObjectKey::new("x", "a")));
    }
}
