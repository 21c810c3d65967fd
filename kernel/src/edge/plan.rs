//! From what is to what should be.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::{IpNet, Ipv4Net};
use mesh_abi::{EdgeService, maps};

use super::{Desired, Entry, Observed, Plan, Room, Service, Step, Unfit, maglev};
use crate::services::FrontendKey;

/// What has to be done. Total over the union of what is and what should be. A backend keeps its index for as long as it is
/// there; a table never names an index without a backend.
pub fn plan(desired: &Desired, observed: &Observed) -> Plan {
    plan_within(desired, observed, Room::UNLIMITED)
}

/// The same for maps of limited room. A service that would need more loses what is not wanted any more, gets nothing new, and is named
/// by [`Plan::unfit`]: so one that is too large takes nothing from others, and none keeps a backend that is gone. What the plan
/// deletes is room for the next one only.
pub fn plan_within(desired: &Desired, observed: &Observed, room: Room) -> Plan {
    let mut planner = Planner::new(observed, room);
    planner.nodes(desired);
    for (key, service) in &desired.services {
        planner.service(*key, service);
    }
    planner.leftovers(desired);
    planner.uplinks();
    planner.processes(desired, desired.services.values());
    planner.owned(desired);
    planner.finish()
}

/// The same where, since `observed` was as desired, only these services are others or gone, and the devices are the same: costs what
/// changed, not what is there.
pub fn plan_changes(
    desired: &Desired,
    changed: &[FrontendKey],
    observed: &Observed,
    room: Room,
) -> Plan {
    let mut planner = Planner::new(observed, room);
    planner.nodes(desired);
    let service = |key: &FrontendKey| desired.services.get(key);
    for key in changed {
        match (service(key), observed.entries.get(key)) {
            (Some(service), _) => planner.service(*key, service),
            (None, Some(entry)) => planner.remove(*key, entry.id),
            (None, None) => {}
        }
    }
    planner.uplinks();
    planner.processes(desired, changed.iter().filter_map(service));
    planner.owned(desired);
    planner.finish()
}

#[derive(Default)]
struct Steps {
    add: Vec<Step>,
    switch: Vec<Step>,
    /// The last ways to what is deleted.
    close: Vec<Step>,
    delete: Vec<Step>,
}

struct Planner<'a> {
    observed: &'a Observed,
    /// Service numbers that have been looked at.
    taken: BTreeSet<u32>,
    /// The number of the next service that is new, once there was one.
    next_id: Option<u32>,
    /// How many entries may be added yet.
    left: Room,
    steps: Steps,
    unfit: Vec<Unfit>,
}

type Backends = BTreeMap<SocketAddr, Option<IpAddr>>;

impl<'a> Planner<'a> {
    fn new(observed: &'a Observed, room: Room) -> Self {
        let left = Room {
            entries: room.entries.saturating_sub(observed.entries.len()),
            tables: room.tables.saturating_sub(observed.tables.len()),
            backends: room.backends.saturating_sub(observed.backends.len()),
            sources: room.sources.saturating_sub(observed.sources.len()),
        };
        let (taken, steps) = (BTreeSet::new(), Steps::default());
        Self { observed, taken, next_id: None, left, steps, unfit: Vec::new() }
    }

    fn finish(self) -> Plan {
        let Steps { add: mut steps, switch, close, delete } = self.steps;
        steps.extend(switch);
        steps.extend(close);
        steps.extend(delete);
        Plan { steps, unfit: self.unfit }
    }

    fn nodes(&mut self, desired: &Desired) {
        for (&address, &mtu) in &desired.nodes {
            if self.observed.nodes.get(&address) != Some(&mtu) {
                self.steps.add.push(Step::PutNode(address, mtu));
            }
        }
        if desired.own != self.observed.own {
            self.steps.add.push(Step::SetOwn(desired.own.clone()));
        }
        let gone = self.observed.nodes.keys().filter(|a| !desired.nodes.contains_key(a));
        self.steps.delete.extend(gone.copied().map(Step::DeleteNode));
    }

    fn service(&mut self, key: FrontendKey, service: &Service) {
        let current = self.observed.entries.get(&key).filter(|entry| entry.id != 0).copied();
        let current = current.filter(|entry| self.taken.insert(entry.id));
        let Err(map) = self.take(key, current, service) else {
            return self.put(key, current, service);
        };
        self.unfit.push(Unfit { frontend: key, map });
        // One that is not there is refused, as whatever nobody serves.
        if let Some(entry) = current {
            let part = self.part(entry.id, service);
            self.put(key, current, &part);
        }
    }

    /// Counts what would be new in each map. Without room for all of it nothing is counted, and the map is the error.
    fn take(
        &mut self,
        key: FrontendKey,
        current: Option<Entry>,
        service: &Service,
    ) -> Result<(), &'static str> {
        let present = current.map(|entry| self.part(entry.id, service)).unwrap_or_default();
        let count = |sources: &Option<BTreeSet<_>>| sources.as_ref().map_or(0, BTreeSet::len);
        let has_table = current.is_some_and(|entry| self.observed.tables.contains(&entry.id));
        let after = |map, left: usize, new: usize| left.checked_sub(new).ok_or(map);
        let (left, entries) = (self.left, usize::from(!self.observed.entries.contains_key(&key)));
        let tables = usize::from(!has_table && !service.backends.is_empty());
        let backends = service.backends.len() - present.backends.len();
        let sources = count(&service.sources) - count(&present.sources);
        self.left = Room {
            entries: after(maps::EDGE_SERVICES, left.entries, entries)?,
            tables: after(maps::EDGE_TABLES, left.tables, tables)?,
            backends: after(maps::EDGE_BACKENDS, left.backends, backends)?,
            sources: after(maps::EDGE_SOURCES, left.sources, sources)?,
        };
        Ok(())
    }

    /// What of a service is filed under that number already.
    fn part(&self, id: u32, service: &Service) -> Service {
        let known = self.observed.backends.range((id, 0)..=(id, u32::MAX));
        let known: BTreeSet<SocketAddr> = known.map(|(_, (backend, _))| *backend).collect();
        let mut part = service.clone();
        part.backends.retain(|backend, _| known.contains(backend));
        if let Some(sources) = &mut part.sources {
            sources.retain(|net| self.observed.sources.contains(&(id, *net)));
        }
        part
    }

    fn put(&mut self, key: FrontendKey, current: Option<Entry>, service: &Service) {
        let id = current.map_or_else(|| self.fresh_id(), |entry| entry.id);
        self.sources(id, service);
        let count = u32::try_from(service.backends.len()).unwrap_or(u32::MAX);
        // The count is written behind the table: where it is another one, somebody was interrupted before either.
        let stale = current.is_some_and(|entry| entry.count != count);
        self.backends(id, &service.backends, stale);
        let entry = Entry { id, count, flags: flags(service) };
        if current != Some(entry) {
            self.steps.switch.push(Step::PutEntry(key, entry));
        }
    }

    fn fresh_id(&mut self) -> u32 {
        let id = self.next_id.unwrap_or_else(|| next_id(self.observed));
        self.next_id = Some(id.checked_add(1).expect("fewer than 2^32 services were made"));
        self.taken.insert(id);
        id
    }

    fn sources(&mut self, id: u32, service: &Service) {
        let known: BTreeSet<_> = sources_of(self.observed, id).collect();
        let wanted = service.sources.clone().unwrap_or_default();
        self.steps.add.extend(wanted.difference(&known).map(|net| Step::PutSource(id, *net)));
        let gone = known.difference(&wanted).map(|net| Step::DeleteSource(id, *net));
        self.steps.delete.extend(gone);
    }

    fn backends(&mut self, id: u32, wanted: &Backends, stale: bool) {
        let (mut places, mut open) = (BTreeMap::new(), wanted.clone());
        for (&(_, index), (backend, via)) in self.observed.backends.range((id, 0)..=(id, u32::MAX))
        {
            match open.remove(backend) {
                None => self.steps.delete.push(Step::DeleteBackend(id, index)),
                Some(wanted_via) => {
                    places.insert(*backend, index);
                    if wanted_via != *via {
                        let (service, backend, via) = (id, *backend, wanted_via);
                        self.steps.add.push(Step::PutBackend { service, index, backend, via });
                    }
                }
            }
        }
        let changed = stale || !open.is_empty() || places.len() != self.count(id);
        let used: BTreeSet<u32> =
            self.observed.backends.range((id, 0)..=(id, u32::MAX)).map(|((_, i), _)| *i).collect();
        let free = (0..=u32::from(u16::MAX)).filter(|index| !used.contains(index));
        for ((backend, via), index) in open.into_iter().zip(free) {
            places.insert(backend, index);
            self.steps.add.push(Step::PutBackend { service: id, index, backend, via });
        }
        self.table(id, &places, changed);
    }

    fn count(&self, id: u32) -> usize {
        self.observed.backends.range((id, 0)..=(id, u32::MAX)).count()
    }

    fn table(&mut self, id: u32, places: &BTreeMap<SocketAddr, u32>, changed: bool) {
        let exists = self.observed.tables.contains(&id);
        if places.is_empty() {
            if exists {
                self.steps.close.push(Step::DeleteTable(id));
            }
        } else if changed || !exists {
            let sorted: Vec<SocketAddr> = places.keys().copied().collect();
            let index = |number: usize| places[&sorted[number]] as u16;
            let slots = maglev::table(&sorted).into_iter().map(index).collect();
            self.steps.switch.push(Step::PutTable { service: id, slots });
        }
    }

    /// A service that nobody wants any more, with all that is filed under its number.
    fn remove(&mut self, key: FrontendKey, id: u32) {
        let Steps { close, delete, .. } = &mut self.steps;
        close.push(Step::DeleteEntry(key));
        if id == 0 || !self.taken.insert(id) {
            return;
        }
        let observed = self.observed;
        close.extend(observed.tables.contains(&id).then_some(Step::DeleteTable(id)));
        let backends = observed.backends.range((id, 0)..=(id, u32::MAX));
        delete.extend(backends.map(|((_, index), _)| Step::DeleteBackend(id, *index)));
        delete.extend(sources_of(observed, id).map(|net| Step::DeleteSource(id, net)));
    }

    /// Services that nobody wants any more, then everything that belongs to none.
    fn leftovers(&mut self, desired: &Desired) {
        for (key, entry) in &self.observed.entries {
            if !desired.services.contains_key(key) {
                self.remove(*key, entry.id);
            }
        }
        let Steps { close, delete, .. } = &mut self.steps;
        let orphan = |id: &u32| !self.taken.contains(id);
        let tables = self.observed.tables.iter().filter(|id| orphan(id));
        close.extend(tables.copied().map(Step::DeleteTable));
        let backends = self.observed.backends.keys().filter(|(id, _)| orphan(id));
        delete.extend(backends.map(|(id, index)| Step::DeleteBackend(*id, *index)));
        let sources = self.observed.sources.iter().filter(|(id, _)| orphan(id));
        delete.extend(sources.map(|(id, net)| Step::DeleteSource(*id, *net)));
    }

    fn uplinks(&mut self) {
        let Steps { add, switch, delete, .. } = &mut self.steps;
        for (name, uplink) in &self.observed.uplinks {
            let ifindex = uplink.ifindex;
            if self.observed.known_uplinks.get(&ifindex) != Some(&uplink.mac) {
                add.push(Step::PutUplink(ifindex, uplink.mac));
            }
            if !uplink.program {
                switch.push(Step::AttachUplink { ifindex, name: name.clone() });
            }
        }
        delete.extend(self.observed.stray.iter().cloned().map(Step::DetachUplink));
        let live: BTreeSet<u32> = self.observed.uplinks.values().map(|u| u.ifindex).collect();
        let gone = self.observed.known_uplinks.keys().filter(|ifindex| !live.contains(ifindex));
        delete.extend(gone.copied().map(Step::DeleteUplink));
    }

    /// What backends with an address of this node itself need. The program for their answers stays for as long as there are services:
    /// connections outlive the place in a table.
    fn processes<'s>(
        &mut self,
        desired: &Desired,
        mut services: impl Iterator<Item = &'s Service>,
    ) {
        let Steps { add, delete, .. } = &mut self.steps;
        let new = desired.addresses.difference(&self.observed.addresses);
        add.extend(new.copied().map(Step::PutAddress));
        let is_process = |(backend, via): (&SocketAddr, &Option<IpAddr>)| {
            via.is_none() && desired.addresses.contains(&backend.ip())
        };
        let here = services.any(|service| service.backends.iter().any(is_process));
        for (name, uplink) in &self.observed.uplinks {
            match (uplink.answers, here) {
                (false, true) => {
                    add.push(Step::AttachAnswers { ifindex: uplink.ifindex, name: name.clone() });
                }
                (true, false) if desired.services.is_empty() => {
                    delete.push(Step::DetachAnswers(name.clone()));
                }
                _ => {}
            }
        }
        let gone = self.observed.addresses.difference(&desired.addresses);
        delete.extend(gone.copied().map(Step::DeleteAddress));
    }

    fn owned(&mut self, desired: &Desired) {
        let new = desired.owned.difference(&self.observed.owned);
        self.steps.switch.extend(new.copied().map(Step::PutOwned));
        let gone = self.observed.owned.difference(&desired.owned);
        self.steps.delete.extend(gone.copied().map(Step::DeleteOwned));
    }
}

/// A number that nothing in the maps carries, nor any above it: not even what is deleted in the same plan.
fn next_id(observed: &Observed) -> u32 {
    let entries = observed.entries.values().map(|entry| entry.id);
    let backends = observed.backends.keys().next_back().map(|(id, _)| *id);
    let sources = observed.sources.last().map(|(id, _)| *id);
    let tables = observed.tables.last().copied();
    let highest = entries.chain(backends).chain(sources).chain(tables).max().unwrap_or(0);
    highest.checked_add(1).expect("fewer than 2^32 services were made")
}

fn sources_of(observed: &Observed, id: u32) -> impl Iterator<Item = IpNet> + '_ {
    let first = IpNet::from(Ipv4Net::default());
    let from = observed.sources.range((id, first)..);
    from.take_while(move |(service, _)| *service == id).map(|(_, net)| *net)
}

fn flags(service: &Service) -> u32 {
    [
        (service.affinity, EdgeService::AFFINITY),
        (service.sources.is_some(), EdgeService::RESTRICTED),
        (service.local_only, EdgeService::LOCAL_ONLY),
    ]
    .into_iter()
    .filter_map(|(set, bit)| set.then_some(bit))
    .sum()
}

#[cfg(test)]
mod tests;
