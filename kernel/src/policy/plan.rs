//! From the tables that are there to those that should be.

use std::collections::BTreeMap;
use std::net::IpAddr;

use mesh_abi as abi;

use super::Tables;
use crate::convert;

/// One map operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Protects a port of the nodes.
    PutHostPort(abi::HostPort),
    /// Allows something.
    PutRule(abi::RuleKey, u32),
    /// Says who an address is.
    PutIdentity(abi::Address, u32),
    /// Says which ranges an address is in.
    PutBlock(abi::BlockKey, u32),
    /// Says which policies a pod has.
    PutPod(u32, abi::PodPolicy),
    /// Enforces, or does no longer.
    SetActive(bool),
    /// Forgets a pod's policies.
    DeletePod(u32),
    /// Allows something no longer.
    DeleteRule(abi::RuleKey),
    /// Forgets a range.
    DeleteBlock(abi::BlockKey),
    /// Forgets who an address is.
    DeleteIdentity(abi::Address),
    /// Opens a port of the nodes.
    DeleteHostPort(abi::HostPort),
    /// Has every connection judged again.
    NextGeneration,
}

impl Step {
    /// Says who addresses are.
    pub fn identities(addresses: &[IpAddr], who: u32) -> impl Iterator<Item = Self> {
        addresses.iter().map(move |ip| Self::PutIdentity(convert::address(*ip), who))
    }
}

/// What has to be done, in that order. Total over the union of both sides; costs what differs, but for the comparison.
pub fn plan(wanted: &Tables, present: &Tables) -> Vec<Step> {
    let mut steps = Vec::new();
    if !wanted.active && present.active {
        steps.push(Step::SetActive(false));
    }
    put(&mut steps, &wanted.rules, &present.rules, Step::PutRule);
    put(&mut steps, &wanted.identities, &present.identities, Step::PutIdentity);
    let ranges = steps.len();
    put(&mut steps, &wanted.blocks, &present.blocks, Step::PutBlock);
    // Narrow ranges first: what is an exception in a wider one is not left out where there is no room for all.
    steps[ranges..].reverse();
    // Only now: agents of other nodes are let through by who they are.
    let host_ports = wanted.host_ports.difference(&present.host_ports);
    steps.extend(host_ports.copied().map(Step::PutHostPort));
    put(&mut steps, &wanted.pods, &present.pods, Step::PutPod);
    if wanted.active && !present.active {
        steps.push(Step::SetActive(true));
    }
    delete(&mut steps, &wanted.rules, &present.rules, Step::DeleteRule);
    delete(&mut steps, &wanted.blocks, &present.blocks, Step::DeleteBlock);
    delete(&mut steps, &wanted.identities, &present.identities, Step::DeleteIdentity);
    delete(&mut steps, &wanted.pods, &present.pods, Step::DeletePod);
    let host_ports = present.host_ports.difference(&wanted.host_ports);
    steps.extend(host_ports.copied().map(Step::DeleteHostPort));
    if wanted.active && steps.iter().any(|step| may_forbid(step, present)) {
        steps.push(Step::NextGeneration);
    }
    steps
}

/// Whether a connection that was allowed may not be any more. A new rule, a new name for an unnamed address and a new pod
/// allow more or concern nobody yet; what was denied is not remembered.
fn may_forbid(step: &Step, present: &Tables) -> bool {
    match step {
        Step::PutIdentity(address, _) => present.identities.contains_key(address),
        Step::PutPod(place, _) => present.pods.contains_key(place),
        Step::PutRule(..) | Step::PutHostPort(_) | Step::DeleteHostPort(_) | Step::DeletePod(_) => {
            false
        }
        _ => true,
    }
}

fn put<K: Copy + Ord, V: Copy + PartialEq>(
    steps: &mut Vec<Step>,
    wanted: &BTreeMap<K, V>,
    present: &BTreeMap<K, V>,
    step: impl Fn(K, V) -> Step,
) {
    let missing = wanted.iter().filter(|(key, value)| present.get(key) != Some(value));
    steps.extend(missing.map(|(key, value)| step(*key, *value)));
}

fn delete<K: Copy + Ord, V>(
    steps: &mut Vec<Step>,
    wanted: &BTreeMap<K, V>,
    present: &BTreeMap<K, V>,
    step: impl Fn(K) -> Step,
) {
    steps.extend(present.keys().filter(|key| !wanted.contains_key(key)).map(|key| step(*key)));
}

impl Tables {
    /// What the tables hold after a step.
    pub fn apply(&mut self, step: &Step) {
        match *step {
            Step::PutHostPort(port) => drop(self.host_ports.insert(port)),
            Step::PutRule(key, number) => drop(self.rules.insert(key, number)),
            Step::PutIdentity(address, who) => drop(self.identities.insert(address, who)),
            Step::PutBlock(key, who) => drop(self.blocks.insert(key, who)),
            Step::PutPod(place, policy) => drop(self.pods.insert(place, policy)),
            Step::SetActive(active) => self.active = active,
            Step::DeletePod(place) => drop(self.pods.remove(&place)),
            Step::DeleteRule(key) => drop(self.rules.remove(&key)),
            Step::DeleteBlock(key) => drop(self.blocks.remove(&key)),
            Step::DeleteIdentity(address) => drop(self.identities.remove(&address)),
            Step::DeleteHostPort(port) => drop(self.host_ports.remove(&port)),
            Step::NextGeneration => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn map<K: Ord, V>(
        key: impl Fn(u32) -> K,
        value: impl Fn(u32) -> V,
        entries: Vec<(u32, u32)>,
    ) -> BTreeMap<K, V> {
        entries.into_iter().map(|(k, v)| (key(k), value(v))).collect()
    }

    fn tables() -> impl Strategy<Value = Tables> {
        let entries = || proptest::collection::vec((0..6_u32, 0..3_u32), 0..6);
        (any::<bool>(), entries(), entries(), entries(), entries()).prop_map(
            |(active, pods, identities, blocks, rules)| Tables {
                active,
                pods: map(|k| k, |v| abi::PodPolicy { ingress: v, egress: 0 }, pods),
                identities: map(abi::Address::v4, |v| v, identities),
                blocks: map(
                    |k| abi::BlockKey { prefix_len: 128 - k, address: abi::Address::v4(0) },
                    |v| v,
                    blocks,
                ),
                rules: map(
                    |k| abi::RuleKey { prefix_len: 64 + k, ..abi::RuleKey::default() },
                    |v| v,
                    rules,
                ),
                host_ports: Default::default(),
            },
        )
    }

    proptest! {
        #[test]
        fn a_plan_leads_there_and_then_there_is_nothing_to_do(wanted in tables(), mut present in tables()) {
            for step in plan(&wanted, &present) {
                present.apply(&step);
            }
            prop_assert_eq!(&wanted, &present);
            prop_assert_eq!(plan(&wanted, &wanted), vec![]);
        }

        /// No range is there without those inside it, which may be exceptions.
        #[test]
        fn exceptions_come_before_their_range_and_go_after_it(wanted in tables(), present in tables()) {
            let steps = plan(&wanted, &present);
            let put = |step: &Step| match step {
                Step::PutBlock(key, _) => Some(key.prefix_len),
                _ => None,
            };
            let deleted = |step: &Step| match step {
                Step::DeleteBlock(key) => Some(key.prefix_len),
                _ => None,
            };
            let put: Vec<u32> = steps.iter().filter_map(put).collect();
            let deleted: Vec<u32> = steps.iter().filter_map(deleted).collect();
            prop_assert!(put.is_sorted_by(|wider, narrower| wider >= narrower), "{:?}", put);
            prop_assert!(deleted.is_sorted(), "{:?}", deleted);
        }

        /// No pod refers to a policy before its rules are there, and none loses rules while it refers to them.
        #[test]
        fn what_pods_refer_to_comes_first_and_goes_last(wanted in tables(), present in tables()) {
            let steps = plan(&wanted, &present);
            let place = |test: fn(&Step) -> bool| steps.iter().position(test);
            let last = |test: fn(&Step) -> bool| steps.iter().rposition(test);
            let pod = place(|s| matches!(s, Step::PutPod(..)));
            let rule = last(|s| matches!(s, Step::PutRule(..)));
            prop_assert!(pod.is_none() || rule.is_none() || rule < pod);
            let pod = last(|s| matches!(s, Step::PutPod(..)));
            let gone = place(|s| matches!(s, Step::DeleteRule(_)));
            prop_assert!(pod.is_none() || gone.is_none() || pod < gone);
            let next = place(|s| matches!(s, Step::NextGeneration));
            prop_assert!(next.is_none() || next == Some(steps.len() - 1));
            if wanted.active && gone.is_some() {
                prop_assert!(next.is_some());
            }
        }
    }
}
