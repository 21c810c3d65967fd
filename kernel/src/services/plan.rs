//! From what is to what should be, one map operation per change.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::SocketAddr;

use mesh_model::snapshot::Frontend;

use super::{Entry, FrontendKey, Observed, Plan, Step};

/// What the maps need to become `frontends`.
///
/// Total over the union of keys: what is not asked for is removed. A frontend that is listed twice counts once (the one
/// of the first service by name); backends of the other address family are left out, because a socket
/// cannot reach them. At every point of the plan each list is without holes and holds only old or new backends.
pub fn plan<F: Borrow<Frontend>>(frontends: &[F], observed: &Observed) -> Plan {
    let desired = desired(frontends);
    let mut planner = Planner::new(observed);
    for (key, wanted) in &desired {
        planner.frontend(*key, wanted);
    }
    planner.leftovers(&desired);
    planner.finish()
}

/// A frontend as it should be.
struct Wanted {
    affinity_secs: u32,
    backends: BTreeSet<SocketAddr>,
}

fn desired<F: Borrow<Frontend>>(frontends: &[F]) -> BTreeMap<FrontendKey, Wanted> {
    let mut sorted: Vec<&Frontend> = frontends.iter().map(Borrow::borrow).collect();
    sorted.sort_by(|a, b| (&a.service, &a.port_name).cmp(&(&b.service, &b.port_name)));
    let mut desired = BTreeMap::new();
    for frontend in sorted {
        let key =
            FrontendKey { vip: frontend.vip, protocol: frontend.protocol, port: frontend.port };
        let same_family =
            frontend.backends.iter().filter(|b| b.address.is_ipv4() == key.vip.is_ipv4());
        desired.entry(key).or_insert_with(|| Wanted {
            affinity_secs: frontend.affinity_secs.unwrap_or(0),
            backends: same_family.map(|b| SocketAddr::new(b.address, b.port)).collect(),
        });
    }
    desired
}

struct Planner<'a> {
    observed: &'a Observed,
    /// Service numbers that a desired frontend has taken.
    taken: HashSet<u32>,
    next_id: u32,
    add: Vec<Step>,
    switch: Vec<Step>,
    delete: Vec<Step>,
}

impl<'a> Planner<'a> {
    fn new(observed: &'a Observed) -> Self {
        Self {
            observed,
            taken: HashSet::new(),
            next_id: 1,
            add: Vec::new(),
            switch: Vec::new(),
            delete: Vec::new(),
        }
    }

    fn finish(self) -> Plan {
        let Self { mut add, switch, delete, .. } = self;
        add.extend(switch);
        add.extend(delete);
        Plan { steps: add }
    }

    fn frontend(&mut self, key: FrontendKey, wanted: &Wanted) {
        let current = self.observed.entries.get(&key).filter(|e| e.id != 0).copied();
        let current = current.filter(|entry| self.taken.insert(entry.id));
        let entry =
            current.unwrap_or_else(|| Entry { id: self.fresh_id(), count: 0, affinity_secs: 0 });
        let count = u32::try_from(wanted.backends.len()).expect("a list in memory is shorter");
        self.members(entry.id, &wanted.backends);
        self.slots(entry, count, &wanted.backends);
        let new = Entry { id: entry.id, count, affinity_secs: wanted.affinity_secs };
        if current != Some(new) {
            self.switch.push(Step::PutEntry { key, entry: new });
        }
    }

    fn members(&mut self, id: u32, wanted: &BTreeSet<SocketAddr>) {
        let known: BTreeSet<SocketAddr> = members_of(self.observed, id).collect();
        for &backend in wanted.difference(&known) {
            self.add.push(Step::PutMember { service: id, backend });
        }
        for &backend in known.difference(wanted) {
            self.delete.push(Step::DeleteMember { service: id, backend });
        }
    }

    /// Keeps each wanted backend where it is if that place remains, puts the others into the free places, then
    /// behind the end.
    fn slots(&mut self, entry: Entry, count: u32, wanted: &BTreeSet<SocketAddr>) {
        let service = entry.id;
        let mut open: BTreeSet<SocketAddr> = wanted.clone();
        let mut free = Vec::new();
        for slot in 0..count {
            let backend = self.observed.slots.get(&(service, slot));
            if !backend.is_some_and(|backend| open.remove(backend)) {
                free.push(slot);
            }
        }
        for (slot, backend) in free.into_iter().zip(open) {
            let step = Step::PutSlot { service, slot, backend };
            if slot < entry.count { self.switch.push(step) } else { self.add.push(step) }
        }
        for (&(_, slot), _) in self.observed.slots.range((service, count)..=(service, u32::MAX)) {
            self.delete.push(Step::DeleteSlot { service, slot });
        }
    }

    /// Frontends that nobody wants any more, then everything that no frontend refers to.
    fn leftovers(&mut self, desired: &BTreeMap<FrontendKey, Wanted>) {
        let mut entries = Vec::new();
        for (&key, entry) in &self.observed.entries {
            if !desired.contains_key(&key) {
                entries.push(Step::DeleteEntry { key, service: entry.id });
            }
        }
        self.delete.splice(0..0, entries);
        for &(service, slot) in self.observed.slots.keys() {
            if !self.taken.contains(&service) {
                self.delete.push(Step::DeleteSlot { service, slot });
            }
        }
        for &(service, backend) in &self.observed.members {
            if !self.taken.contains(&service) {
                self.delete.push(Step::DeleteMember { service, backend });
            }
        }
    }

    /// A number that nothing in the maps carries: not even what is deleted later in the same plan.
    fn fresh_id(&mut self) -> u32 {
        if self.next_id == 1 {
            let entries = self.observed.entries.values().map(|entry| entry.id);
            let slots = self.observed.slots.keys().map(|(id, _)| *id);
            let members = self.observed.members.iter().map(|(id, _)| *id);
            let highest = entries.chain(slots).chain(members).max().unwrap_or(0);
            self.next_id = highest.checked_add(1).expect("fewer than 2^32 services were made");
        }
        let id = self.next_id;
        self.next_id += 1;
        self.taken.insert(id);
        id
    }
}

fn members_of(observed: &Observed, id: u32) -> impl Iterator<Item = SocketAddr> + '_ {
    let from = observed.members.range((id, FIRST)..);
    from.take_while(move |(service, _)| *service == id).map(|(_, backend)| *backend)
}

/// The least socket address in the order of the standard library.
const FIRST: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0);
