//! Who had which address when.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use mesh_model::policy::{PodPolicy, PolicySet};
use mesh_model::snapshot::Frontend;
use mesh_model::{NodeName, ObjectKey, Snapshot};

use crate::differences::{self, Differences};

/// Owners of one address that are remembered.
const OWNERS: usize = 4;

/// What the node knows of addresses. Times are of the monotonic clock.
#[derive(Debug, Default)]
pub(super) struct Names {
    /// Pods of this node by address, oldest first, each since when it was known.
    pods: BTreeMap<IpAddr, VecDeque<(Duration, ObjectKey)>>,
    services: BTreeMap<Place, ObjectKey>,
    /// Blocks of pods, of this node too.
    blocks: Vec<(IpNet, NodeName)>,
    nodes: BTreeMap<IpAddr, NodeName>,
    /// Names of the policies that pods of this node have, for what they send and for what they receive.
    policies: BTreeMap<ObjectKey, [Option<String>; 2]>,
    learned: Option<Arc<Snapshot>>,
}

/// Where a service is found: address, protocol number, port.
type Place = (IpAddr, u8, u16);

/// In the order of a snapshot's frontends.
fn key(frontend: &Frontend) -> Place {
    (frontend.vip, frontend.protocol.number(), frontend.port)
}

impl Names {
    /// Takes over what is known now, and costs what has changed. `owners` are the texts that the pods' interfaces carry.
    pub(super) fn learn(
        &mut self,
        now: Duration,
        snapshot: &Arc<Snapshot>,
        owners: impl Iterator<Item = String>,
    ) {
        for owner in owners {
            let Some((addresses, pod)) = owner_of(&owner) else { continue };
            for address in addresses {
                self.learn_pod(now, address, &pod);
            }
        }
        let before = self.learned.replace(Arc::clone(snapshot));
        let known: &[Arc<Frontend>] = before.as_ref().map_or(&[], |before| &before.frontends);
        let Differences { gone, put } = differences::of_lists(known, &snapshot.frontends, key);
        for key in gone {
            self.services.remove(&key);
        }
        self.services.extend(put.into_iter().map(|f| (key(f), f.service.clone())));
        let same =
            |before: &Arc<Snapshot>| before.peers == snapshot.peers && before.node == snapshot.node;
        if !before.as_ref().is_some_and(same) {
            self.learn_nodes(snapshot);
        }
        if before.is_none_or(|before| before.policy != snapshot.policy) {
            self.learn_policies(&snapshot.policy);
        }
    }

    /// Whether the interfaces of its pods have been looked at: they come and go with the pods.
    pub(super) fn knows_pods_of(&self, snapshot: &Snapshot) -> bool {
        self.learned.as_ref().is_some_and(|learned| learned.pods == snapshot.pods)
    }

    fn learn_nodes(&mut self, snapshot: &Snapshot) {
        let peers = || snapshot.peers.iter();
        self.blocks = peers()
            .flat_map(|peer| peer.allowed_ips.iter().map(|block| (*block, peer.node.clone())))
            .chain(snapshot.node.blocks.iter().map(|b| (*b, snapshot.node.name.clone())))
            .collect();
        let own = snapshot.node.addresses.iter().map(|a| (*a, snapshot.node.name.clone()));
        let endpoints =
            peers().flat_map(|peer| peer.endpoints.iter().map(|e| (e.ip(), peer.node.clone())));
        self.nodes = endpoints.chain(own).collect();
    }

    fn learn_policies(&mut self, policy: &PolicySet) {
        let name = |number| Some(policy.name(number)).filter(|n| !n.is_empty()).map(str::to_owned);
        let of = |pod: &PodPolicy| [name(pod.egress), name(pod.ingress)];
        self.policies = policy.pods.iter().map(|(key, pod)| (key.clone(), of(pod))).collect();
    }

    /// The policy for what the pod sends.
    pub(super) fn egress_policy(&self, pod: &ObjectKey) -> Option<&str> {
        self.policies.get(pod)?[0].as_deref()
    }

    /// The policy for what the pod receives.
    pub(super) fn ingress_policy(&self, pod: &ObjectKey) -> Option<&str> {
        self.policies.get(pod)?[1].as_deref()
    }

    fn learn_pod(&mut self, now: Duration, address: IpAddr, pod: &ObjectKey) {
        let owners = self.pods.entry(address).or_default();
        if owners.back().is_some_and(|(_, last)| last == pod) {
            return;
        }
        if owners.len() == OWNERS {
            owners.pop_front();
        }
        owners.push_back((now, pod.clone()));
    }

    /// The pod of this node that had the address at that time. What came before the first one that was known is most likely
    /// the first one's: a pod speaks before anybody hears of it.
    pub(super) fn pod(&self, address: IpAddr, at: Duration) -> Option<ObjectKey> {
        let owners = self.pods.get(&address)?;
        let known = owners.iter().rev().find(|(since, _)| *since <= at);
        known.or_else(|| owners.front()).map(|(_, pod)| pod.clone())
    }

    pub(super) fn service(&self, address: SocketAddr, protocol: u8) -> Option<ObjectKey> {
        self.services.get(&(address.ip(), protocol, address.port())).cloned()
    }

    /// The node that has the address, itself or for its pods.
    pub(super) fn node(&self, address: IpAddr) -> Option<NodeName> {
        let block = || self.blocks.iter().find(|(block, _)| block.contains(&address));
        self.nodes.get(&address).or_else(|| block().map(|(_, node)| node)).cloned()
    }
}

/// Addresses and pod of an interface's text; nothing for the interface of no pod.
fn owner_of(text: &str) -> Option<(Vec<IpAddr>, ObjectKey)> {
    let (_, lease) = crate::cni::owner::parse(text)?;
    let pod = text.split(' ').nth(3)?.to_owned();
    Some((lease.addresses, ObjectKey::try_from(pod).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_model::{Objects, compile};

    #[test]
    fn an_address_keeps_the_pod_that_it_had() {
        let snapshot = Arc::new(compile(&Objects::default(), &"a".parse().unwrap()));
        let mut names = Names::default();
        let address: IpAddr = "10.244.1.5".parse().unwrap();
        let secs = Duration::from_secs;
        let owner = |pod: &str| std::iter::once(format!("abc/eth0 10.244.1.5 - default/{pod}"));
        names.learn(secs(10), &snapshot, owner("one"));
        names.learn(secs(20), &snapshot, owner("one"));
        names.learn(secs(30), &snapshot, owner("two"));
        let pod = |at| names.pod(address, secs(at)).map(|pod| pod.name);
        assert_eq!(pod(5).as_deref(), Some("one"), "before anybody knew");
        assert_eq!((pod(29).as_deref(), pod(30).as_deref()), (Some("one"), Some("two")));
        assert_eq!(names.pod("10.244.1.6".parse().unwrap(), secs(30)), None);
        for i in 0..10 {
            names.learn(secs(40 + i), &snapshot, owner(&format!("pod-{i}")));
        }
        assert_eq!(names.pods[&address].len(), OWNERS);
    }

    #[test]
    fn an_interface_without_a_pod_has_no_name() {
        assert_eq!(owner_of("abc/eth0 10.244.1.5 -"), None);
        assert_eq!(owner_of("of somebody else"), None);
    }
}
