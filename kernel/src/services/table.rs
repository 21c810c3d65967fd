//! The service table in the eBPF maps.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};

use mesh_abi as abi;

use super::{Applied, Observed, Plan, Room, ServiceTable, Step, StepError, apply_each, beginning};
use crate::bpf::{Map, MapError};
use crate::convert;

/// From so many steps on they are written many at once.
const MANY: usize = 256;

/// A [`ServiceTable`] in the kernel. Comes from [`Programs::services`](crate::Programs::services).
#[derive(Debug, Clone)]
pub struct BpfServiceTable {
    services: Map<abi::ServiceKey, abi::Service>,
    slots: Map<abi::SlotKey, abi::Slot>,
    members: Map<abi::MemberKey, abi::Member>,
    nodes: Map<abi::Address, u32>,
    reverse: Map<abi::ReverseKey, abi::Reverse>,
}

impl BpfServiceTable {
    pub(crate) fn new(
        services: Map<abi::ServiceKey, abi::Service>,
        slots: Map<abi::SlotKey, abi::Slot>,
        members: Map<abi::MemberKey, abi::Member>,
        nodes: Map<abi::Address, u32>,
        reverse: Map<abi::ReverseKey, abi::Reverse>,
    ) -> Self {
        Self { services, slots, members, nodes, reverse }
    }

    /// Number of entries and capacity by map.
    pub(crate) fn pressure(&self) -> io::Result<BTreeMap<&'static str, (usize, u32)>> {
        Ok(BTreeMap::from([
            (self.services.name(), self.services.pressure()?),
            (self.slots.name(), self.slots.pressure()?),
            (self.members.name(), self.members.pressure()?),
            (self.nodes.name(), self.nodes.pressure()?),
        ]))
    }

    /// Writes members, and places that no list reaches yet: both at once, because nobody looks at either. Returns how many of
    /// each were written before one failed.
    fn write_many(&self, members: &[Step], slots: &[Step]) -> (usize, usize) {
        let members = members.iter().filter_map(|step| match step {
            Step::PutMember { service, backend, member } => Some((
                abi::MemberKey::new(*service, convert::slot(*backend)),
                convert::member_value(*member),
            )),
            _ => None,
        });
        let slots = slots.iter().filter_map(|step| match step {
            Step::PutSlot { service, slot, backend } => {
                Some((abi::SlotKey { service: *service, slot: *slot }, convert::slot(*backend)))
            }
            _ => None,
        });
        std::thread::scope(|scope| {
            let members = scope.spawn(|| self.members.put_many(members));
            let slots = self.slots.put_many(slots);
            (members.join().unwrap_or(0), slots)
        })
    }

    fn carry_out(&self, step: &Step) -> Result<(), StepError> {
        let (map, result) = match step {
            Step::PutMember { service, backend, member } => {
                let key = abi::MemberKey::new(*service, convert::slot(*backend));
                (self.members.name(), self.members.put(&key, &convert::member_value(*member)))
            }
            Step::PutSlot { service, slot, backend } => {
                let key = abi::SlotKey { service: *service, slot: *slot };
                (self.slots.name(), self.slots.put(&key, &convert::slot(*backend)))
            }
            Step::PutEntry { key, entry } => {
                let (key, entry) = (convert::service_key(key), convert::service(entry));
                (self.services.name(), self.services.put(&key, &entry))
            }
            Step::DeleteEntry { key, .. } => {
                let key = convert::service_key(key);
                (self.services.name(), self.services.delete(&key).map(drop))
            }
            Step::DeleteSlot { service, slot } => {
                let key = abi::SlotKey { service: *service, slot: *slot };
                (self.slots.name(), self.slots.delete(&key).map(drop))
            }
            Step::DeleteMember { service, backend } => {
                let key = abi::MemberKey::new(*service, convert::slot(*backend));
                (self.members.name(), self.members.delete(&key).map(drop))
            }
        };
        Ok(result.map_err(MapError::of(map))?)
    }
}

impl ServiceTable for BpfServiceTable {
    fn room(&self) -> Room {
        Room {
            entries: self.services.capacity(),
            slots: self.slots.capacity(),
            members: self.members.capacity(),
        }
    }

    fn observe(&self) -> Result<Observed, MapError> {
        let mut observed = Observed::default();
        for (key, value) in self.services.entries().map_err(MapError::of(self.services.name()))? {
            if let Some(key) = convert::frontend_key(&key) {
                observed.entries.insert(key, convert::entry(&value));
            }
        }
        for (key, value) in self.slots.entries().map_err(MapError::of(self.slots.name()))? {
            observed.slots.insert((key.service, key.slot), convert::backend(&value));
        }
        for (key, value) in self.members.entries().map_err(MapError::of(self.members.name()))? {
            let member = convert::member(value);
            observed.members.insert((key.service, convert::backend(&key.backend)), member);
        }
        Ok(observed)
    }

    fn set_node_addresses(&self, addresses: &BTreeSet<IpAddr>) -> Result<usize, MapError> {
        let map = self.nodes.name();
        let known = self.nodes.entries().map_err(MapError::of(map))?;
        let known: BTreeSet<abi::Address> = known.into_iter().map(|(address, _)| address).collect();
        let wanted: BTreeSet<abi::Address> =
            addresses.iter().map(|address| convert::address(*address)).collect();
        let mut operations = 0;
        for address in wanted.difference(&known) {
            self.nodes.put(address, &0).map_err(MapError::of(map))?;
            operations += 1;
        }
        for address in known.difference(&wanted) {
            self.nodes.delete(address).map_err(MapError::of(map))?;
            operations += 1;
        }
        Ok(operations)
    }

    fn holds(&self, observed: &Observed) {
        self.services.holds(observed.entries.len());
        self.slots.holds(observed.slots.len());
        self.members.holds(observed.members.len());
    }

    fn reached_by(&self, cookie: u64, backend: SocketAddr) -> Option<SocketAddr> {
        let slot = convert::slot(backend);
        let key =
            abi::ReverseKey { cookie, address: slot.address, port_be: slot.port_be, pad: [0; 3] };
        let vip = self.reverse.lookup(&key).ok()??;
        Some(convert::backend(&abi::Slot { address: vip.address, port_be: vip.port_be, pad: 0 }))
    }

    fn apply(&self, plan: &Plan) -> Applied {
        let (members, slots) = beginning(&plan.steps);
        if members + slots < MANY {
            return apply_each(&plan.steps, |step| self.carry_out(step));
        }
        let (first, rest) = plan.steps.split_at(members);
        let (second, rest) = rest.split_at(slots);
        let (written, filled) = self.write_many(first, second);
        let left = first[written..].iter().chain(&second[filled..]).chain(rest);
        let mut applied = apply_each(left, |step| self.carry_out(step));
        let written = first[..written].iter().chain(&second[..filled]);
        applied.done.splice(0..0, written.copied());
        applied
    }
}
