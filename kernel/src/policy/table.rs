//! The policy tables in the eBPF maps.

use std::collections::BTreeMap;
use std::io;

use mesh_abi as abi;

use super::{PolicyTable, Step, Tables};
use crate::bpf::{Map, MapError};

/// A [`PolicyTable`] in the kernel. Comes from [`Programs::policy`](crate::Programs::policy).
#[derive(Debug, Clone)]
pub struct BpfPolicyTable {
    pub(crate) state: Map<u32, abi::PolicyState>,
    pub(crate) pods: Map<u32, abi::PodPolicy>,
    pub(crate) identities: Map<abi::Address, u32>,
    pub(crate) blocks: Map<abi::BlockKey, u32>,
    pub(crate) rules: Map<abi::RuleKey, abi::PolicyRule>,
    pub(crate) host_ports: Map<abi::HostPort, u32>,
}

impl BpfPolicyTable {
    /// Number of entries and capacity by map.
    pub(crate) fn pressure(&self) -> io::Result<BTreeMap<&'static str, (usize, u32)>> {
        Ok(BTreeMap::from([
            (self.pods.name(), self.pods.pressure()?),
            (self.identities.name(), self.identities.pressure()?),
            (self.blocks.name(), self.blocks.pressure()?),
            (self.rules.name(), self.rules.pressure()?),
            (self.host_ports.name(), self.host_ports.pressure()?),
        ]))
    }

    fn state(&self) -> io::Result<abi::PolicyState> {
        Ok(self.state.lookup(&0)?.unwrap_or_default())
    }

    /// Makes this generation and all before it those of others, whose verdicts connections may carry.
    pub(crate) fn go_on_after(&self, generation: u32) -> io::Result<()> {
        let state = self.state()?;
        if state.generation > generation || generation == 0 {
            return Ok(());
        }
        self.state.put(&0, &abi::PolicyState { generation: next(generation), ..state })
    }

    /// Enforcement never goes on under the generation that it had before a pause: connections were not watched meanwhile.
    fn set_active(&self, active: bool) -> io::Result<()> {
        let generation = next(self.state()?.generation);
        self.state.put(&0, &abi::PolicyState { active: u32::from(active), generation })
    }

    fn next_generation(&self) -> io::Result<()> {
        let state = self.state()?;
        self.state.put(&0, &abi::PolicyState { generation: next(state.generation), ..state })
    }
}

/// The generation after that one; 0 means never asked.
fn next(generation: u32) -> u32 {
    generation.wrapping_add(1).max(1)
}

impl PolicyTable for BpfPolicyTable {
    fn observe(&self) -> Result<Tables, MapError> {
        let state = self.state().map_err(MapError::of(self.state.name()))?;
        let pods = self.pods.entries().map_err(MapError::of(self.pods.name()))?;
        let identities = self.identities.entries().map_err(MapError::of(self.identities.name()))?;
        let blocks = self.blocks.entries().map_err(MapError::of(self.blocks.name()))?;
        let rules = self.rules.entries().map_err(MapError::of(self.rules.name()))?;
        let host_ports = self.host_ports.entries().map_err(MapError::of(self.host_ports.name()))?;
        Ok(Tables {
            active: state.active != 0,
            pods: pods.into_iter().collect(),
            identities: identities.into_iter().collect(),
            blocks: blocks.into_iter().collect(),
            rules: rules.into_iter().map(|(key, rule)| (key, rule.number)).collect(),
            host_ports: host_ports.into_iter().map(|(port, _)| port).collect(),
        })
    }

    /// Entries of pods go with their interfaces, too: they are few, and listed.
    fn holds(&self, tables: &Tables) {
        self.identities.holds(tables.identities.len());
        self.blocks.holds(tables.blocks.len());
        self.rules.holds(tables.rules.len());
    }

    fn apply(&self, step: &Step) -> Result<(), MapError> {
        let (map, result) = match *step {
            Step::PutHostPort(port) => (self.host_ports.name(), self.host_ports.put(&port, &1)),
            Step::PutRule(key, number) => {
                (self.rules.name(), self.rules.put(&key, &abi::PolicyRule { number }))
            }
            Step::PutIdentity(address, who) => {
                (self.identities.name(), self.identities.put(&address, &who))
            }
            Step::PutBlock(key, who) => (self.blocks.name(), self.blocks.put(&key, &who)),
            Step::PutPod(place, policy) => (self.pods.name(), self.pods.put(&place, &policy)),
            Step::SetActive(active) => (self.state.name(), self.set_active(active)),
            Step::DeletePod(place) => (self.pods.name(), self.pods.delete(&place).map(drop)),
            Step::DeleteRule(key) => (self.rules.name(), self.rules.delete(&key).map(drop)),
            Step::DeleteBlock(key) => (self.blocks.name(), self.blocks.delete(&key).map(drop)),
            Step::DeleteIdentity(address) => {
                (self.identities.name(), self.identities.delete(&address).map(drop))
            }
            Step::DeleteHostPort(port) => {
                (self.host_ports.name(), self.host_ports.delete(&port).map(drop))
            }
            Step::NextGeneration => (self.state.name(), self.next_generation()),
        };
        result.map_err(MapError::of(map))
    }
}
