//! Network policy in the kernel: the tables that the TC programs ask, kept equal to a model's [`PolicySet`].
//!
//! [`Tables`] wanted -> [`plan`] with the [`Tables`] that are there -> [`PolicyTable::apply`]. The order of a plan is such that
//! nothing is open meanwhile that is closed before and after: first what allows more, then what pods refer to, then what allowed.
//! When something may have been taken away, the generation rises last, and the programs judge each connection again.
//!
//! After a change only what is [`Touched`] by it is compared: it costs what changed, and not what is there.

mod fake;
mod plan;
mod reconcile;
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use mesh_abi as abi;
use mesh_model::ObjectKey;
use mesh_model::parts::Element as _;
use mesh_model::policy::{PolicySet, Rule};
use mesh_model::snapshot::Protocol;

use crate::bpf::MapError;
use crate::convert;

pub use abi::PodPolicy;
pub use fake::FakePolicyTable;
pub use plan::{Step, plan};
pub use reconcile::{Outcome, PolicyReconciler};
pub use table::BpfPolicyTable;

/// A pod's interface on this node, and whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The pod. Nothing when the runtime did not say: such a sandbox is no pod that a policy could select.
    pub pod: Option<ObjectKey>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// What the tables hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tables {
    /// Whether anything is enforced.
    pub active: bool,
    /// Policies of pods, by the index of the host-side veth.
    pub pods: BTreeMap<u32, abi::PodPolicy>,
    /// Identities by address.
    pub identities: BTreeMap<abi::Address, u32>,
    /// Identities by range.
    pub blocks: BTreeMap<abi::BlockKey, u32>,
    /// Numbers of rules.
    pub rules: BTreeMap<abi::RuleKey, u32>,
    /// Ports of the nodes that pods may not speak to.
    pub host_ports: BTreeSet<abi::HostPort>,
}

impl Tables {
    /// What a policy set asks for, given where pods are on this node and which ports are the node's own affair.
    pub fn wanted(
        set: &PolicySet,
        places: &BTreeMap<u32, Place>,
        host_ports: &[(Protocol, u16)],
    ) -> Self {
        let mut identities: BTreeMap<abi::Address, u32> =
            set.identities.iter().map(|(ip, who)| (convert::address(*ip), *who)).collect();
        let host_port = |&(protocol, port): &(Protocol, u16)| abi::HostPort {
            port_be: port.to_be(),
            protocol: protocol.number(),
            pad: 0,
        };
        let host_ports = host_ports.iter().map(host_port).collect();
        if !set.active {
            return Self { identities, host_ports, ..Self::default() };
        }
        for place in places.values() {
            // Here a pod is known before the API says where it is.
            if let Some(policy) = place.pod.as_ref().and_then(|pod| set.pods.get(pod)) {
                let own = place.addresses.iter().map(|ip| (convert::address(*ip), policy.identity));
                identities.extend(own);
            }
        }
        Self {
            active: true,
            pods: places.iter().map(|(at, place)| (*at, pod_policy(set, place))).collect(),
            identities,
            blocks: blocks(set),
            rules: set.rules.iter().map(|rule| (convert::rule(rule), rule.number)).collect(),
            host_ports,
        }
    }
}

/// Entries that may differ from the tables as they followed from another policy set. Small tables are compared whole.
#[derive(Debug, Clone, Default)]
pub struct Touched {
    identities: BTreeSet<IpAddr>,
    rules: Vec<Rule>,
}

impl Touched {
    /// What two sets do not share.
    pub fn between(before: &PolicySet, now: &PolicySet) -> Self {
        let identities = now.identities.differences(&before.identities);
        let identities = identities.gone.into_iter().chain(identities.put);
        let rules = now.rules.differences(&before.rules);
        Self {
            identities: identities.map(|(address, _)| address).collect(),
            rules: rules.gone.into_iter().chain(rules.put).collect(),
        }
    }

    /// These addresses, too.
    pub fn add_addresses<'a>(&mut self, addresses: impl IntoIterator<Item = &'a IpAddr>) {
        self.identities.extend(addresses);
    }

    /// Those entries of the tables, and the small tables.
    fn of(&self, tables: &Tables) -> Tables {
        let identities = self.identities.iter().map(|address| convert::address(*address));
        let rules = self.rules.iter().map(convert::rule);
        Tables {
            identities: identities
                .filter_map(|key| Some((key, *tables.identities.get(&key)?)))
                .collect(),
            rules: rules.filter_map(|key| Some((key, *tables.rules.get(&key)?))).collect(),
            active: tables.active,
            pods: tables.pods.clone(),
            blocks: tables.blocks.clone(),
            host_ports: tables.host_ports.clone(),
        }
    }

    /// The part of a set with those entries, and all that is small.
    fn part(&self, set: &PolicySet) -> PolicySet {
        let identities = self.identities.iter().filter_map(|ip| set.identities.get(ip));
        let rules = self.rules.iter().filter_map(|rule| set.rules.get(&rule.key()));
        PolicySet {
            active: set.active,
            pods: set.pods.clone(),
            identities: identities.copied().collect(),
            blocks: set.blocks.clone(),
            rules: rules.copied().collect(),
            names: BTreeMap::new(),
        }
    }
}

/// The policies of the pod at that place. One that the set does not know yet may wait.
pub fn pod_policy(set: &PolicySet, place: &Place) -> abi::PodPolicy {
    match &place.pod {
        None => abi::PodPolicy::OPEN,
        Some(pod) => set.pods.get(pod).map_or(abi::PodPolicy::PENDING, |policy| abi::PodPolicy {
            ingress: policy.ingress,
            egress: policy.egress,
        }),
    }
}

/// IPv4 addresses lie inside of `::/0` here: a range for all of them keeps IPv6 ranges off.
fn blocks(set: &PolicySet) -> BTreeMap<abi::BlockKey, u32> {
    let mut blocks: BTreeMap<abi::BlockKey, u32> =
        set.blocks.iter().map(|(net, who)| (convert::policy_block(net), *who)).collect();
    if !blocks.is_empty() {
        let all = ipnet::Ipv4Net::default().into();
        blocks.entry(convert::policy_block(&all)).or_insert(abi::policy::ANYBODY);
    }
    blocks
}

/// Where the tables are.
pub trait PolicyTable: Send + Sync {
    /// Reads everything.
    ///
    /// # Errors
    /// When a map cannot be read.
    fn observe(&self) -> Result<Tables, MapError>;

    /// Hears what the tables hold, whenever whoever writes them knows that anew.
    fn holds(&self, _tables: &Tables) {}

    /// Carries out one step.
    ///
    /// # Errors
    /// When a map cannot be written.
    fn apply(&self, step: &Step) -> Result<(), MapError>;
}
