//! From what is to what should be, one map operation per change.

use std::borrow::Borrow;
use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use mesh_abi::maps;
use mesh_model::ObjectKey;
use mesh_model::snapshot::Frontend;

use super::weights::places;
use super::{Entry, FrontendKey, Gone, Member, Observed, Plan, Room, Step, Unfit};

/// What the maps need to become `frontends`.
///
/// Total over the union of keys: what is not asked for is removed. A frontend that is listed twice counts once (the one
/// of the first service by name); backends of the other address family are left out, because a socket
/// cannot reach them. At every point of the plan each list is without holes and holds only old or new backends.
pub fn plan<F: Borrow<Frontend>>(frontends: &[F], observed: &Observed) -> Plan {
    plan_within(frontends, observed, Room::UNLIMITED)
}

/// The same for maps of limited room. A frontend that would need more is not begun: it loses what is not wanted any more, and what
/// it has not is named by [`Plan::unfit`]. So one that is too large takes nothing from others, and none keeps a backend that is gone.
/// What the plan deletes is room for the next one only.
pub fn plan_within<F: Borrow<Frontend>>(frontends: &[F], observed: &Observed, room: Room) -> Plan {
    let desired = desired(frontends);
    let mut planner = Planner::new(observed, next_id(observed), room);
    for (key, wanted) in &desired {
        planner.frontend(*key, wanted);
    }
    planner.leftovers(&desired);
    planner.finish()
}

/// The same where only some frontends have changed since `observed` was as desired: costs what changed, not what is there.
/// `next_id` is a service number that nothing in the maps carries, nor any above it.
pub(super) fn plan_changes<F: Borrow<Frontend>>(
    changed: &[F],
    removed: &[FrontendKey],
    observed: &Observed,
    next_id: u32,
    room: Room,
) -> Plan {
    let desired = desired(changed);
    let mut planner = Planner::new(observed, next_id, room);
    for (key, wanted) in &desired {
        planner.frontend(*key, wanted);
    }
    for key in removed {
        if let Some(entry) = observed.entries.get(key).filter(|_| !desired.contains_key(key)) {
            planner.remove(*key, entry.id);
        }
    }
    planner.finish()
}

/// A frontend as it should be. Both lists are ordered.
struct Wanted<'a> {
    service: &'a ObjectKey,
    affinity_secs: u32,
    /// How many places each backend has.
    places: Vec<(SocketAddr, u32)>,
    members: Vec<(SocketAddr, Member)>,
}

impl<'a> Wanted<'a> {
    fn new(frontend: &'a Frontend) -> Self {
        let family = |address: IpAddr| address.is_ipv4() == frontend.vip.is_ipv4();
        let backends = frontend.backends.iter().filter(|backend| family(backend.address));
        let mut backends: Vec<(SocketAddr, u16)> =
            backends.map(|b| (SocketAddr::new(b.address, b.port), b.weight)).collect();
        backends.sort_by_key(|(address, _)| *address);
        backends.dedup_by_key(|(address, _)| *address);
        let weights: Vec<u16> = backends.iter().map(|(_, weight)| *weight).collect();
        let mut members: Vec<(SocketAddr, Member)> =
            backends.iter().map(|(address, _)| (*address, Member::default())).collect();
        for leaving in frontend.leaving.iter().filter(|one| family(one.address.ip())) {
            let member = Member { leaving: true, terminating: leaving.terminating };
            match find(&members, &leaving.address) {
                Ok(place) if members[place].1.leaving => members[place].1 = member,
                Ok(_) => {}
                Err(place) => members.insert(place, (leaving.address, member)),
            }
        }
        let addresses = backends.into_iter().map(|(address, _)| address);
        Self {
            service: &frontend.service,
            affinity_secs: frontend.affinity_secs.unwrap_or(0),
            places: addresses.zip(places(&weights)).collect(),
            members,
        }
    }

    fn count(&self) -> u32 {
        self.places.iter().map(|(_, places)| places).sum()
    }

    /// The part that needs no more than so many places, one for each backend, of those backends alone.
    fn part(&self, backends: impl Fn(&SocketAddr) -> bool, places: usize) -> Self {
        let placed = self.places.iter().filter(|(backend, _)| backends(backend)).take(places);
        let members = self.members.iter().filter(|(backend, _)| backends(backend));
        Self {
            service: self.service,
            affinity_secs: self.affinity_secs,
            places: placed.map(|(backend, _)| (*backend, 1)).collect(),
            members: members.copied().collect(),
        }
    }
}

fn find<T>(list: &[(SocketAddr, T)], backend: &SocketAddr) -> Result<usize, usize> {
    list.binary_search_by(|(address, _)| address.cmp(backend))
}

fn key(frontend: &Frontend) -> FrontendKey {
    FrontendKey { vip: frontend.vip, protocol: frontend.protocol, port: frontend.port }
}

fn desired<F: Borrow<Frontend>>(frontends: &[F]) -> BTreeMap<FrontendKey, Wanted<'_>> {
    let mut sorted: Vec<&Frontend> = frontends.iter().map(Borrow::borrow).collect();
    sorted.sort_by(|a, b| (&a.service, &a.port_name).cmp(&(&b.service, &b.port_name)));
    let mut desired = BTreeMap::new();
    for frontend in sorted {
        desired.entry(key(frontend)).or_insert_with(|| Wanted::new(frontend));
    }
    desired
}

struct Planner<'a> {
    observed: &'a Observed,
    /// Service numbers that a desired frontend has taken.
    taken: HashSet<u32>,
    next_id: u32,
    /// How many entries may be added yet.
    left: Room,
    members: Vec<Step>,
    slots: Vec<Step>,
    switch: Vec<Step>,
    delete: Vec<Step>,
    gone: Vec<Gone>,
    unfit: Vec<Unfit>,
}

impl<'a> Planner<'a> {
    fn new(observed: &'a Observed, next_id: u32, room: Room) -> Self {
        Self {
            observed,
            taken: HashSet::new(),
            next_id,
            left: Room {
                entries: room.entries.saturating_sub(observed.entries.len()),
                slots: room.slots.saturating_sub(observed.slots.len()),
                members: room.members.saturating_sub(observed.members.len()),
            },
            members: Vec::new(),
            slots: Vec::new(),
            switch: Vec::new(),
            delete: Vec::new(),
            gone: Vec::new(),
            unfit: Vec::new(),
        }
    }

    /// Steps of one kind lie together, so that many can be written at once.
    fn finish(self) -> Plan {
        let Self { members: mut steps, slots, switch, delete, mut gone, unfit, .. } = self;
        steps.extend(slots);
        steps.extend(switch);
        steps.extend(delete);
        gone.sort();
        Plan { steps, gone, unfit }
    }

    fn frontend(&mut self, key: FrontendKey, wanted: &Wanted<'_>) {
        let current = self.observed.entries.get(&key).filter(|e| e.id != 0).copied();
        let current = current.filter(|entry| self.taken.insert(entry.id));
        let Err(map) = self.take(key, current, wanted) else {
            return self.put(key, current, wanted);
        };
        self.unfit.push(Unfit { frontend: key, service: wanted.service.clone(), map });
        let known: Vec<(SocketAddr, Member)> =
            current.iter().flat_map(|entry| members_of(self.observed, entry.id)).collect();
        let there = current.map_or(0, |entry| self.places_of(entry.id));
        let is_known = |backend: &SocketAddr| find(&known, backend).is_ok();
        let first = wanted.places.first().map(|(backend, _)| *backend);
        let kept = wanted.part(is_known, there);
        // One backend serves all; without any, connecting fails at once.
        let one = wanted.part(|backend| is_known(backend) || Some(*backend) == first, 1);
        let part = if kept.places.is_empty() && self.take(key, current, &one).is_ok() {
            one
        } else if self.take(key, current, &kept).is_ok() {
            kept
        } else {
            return;
        };
        self.put(key, current, &part);
    }

    /// Counts what would be new in each map. Without room for all of it nothing is counted, and the map is the error.
    fn take(
        &mut self,
        key: FrontendKey,
        current: Option<Entry>,
        wanted: &Wanted<'_>,
    ) -> Result<(), &'static str> {
        let (mut members, mut slots) = (wanted.members.len(), wanted.count() as usize);
        if let Some(entry) = current {
            let known: Vec<(SocketAddr, Member)> = members_of(self.observed, entry.id).collect();
            members = wanted.members.iter().filter(|(b, _)| find(&known, b).is_err()).count();
            slots = slots.saturating_sub(self.places_of(entry.id));
        }
        let entries = usize::from(!self.observed.entries.contains_key(&key));
        let left = self.left;
        let after = |map, left: usize, new: usize| left.checked_sub(new).ok_or(map);
        self.left = Room {
            entries: after(maps::SERVICES, left.entries, entries)?,
            slots: after(maps::SLOTS, left.slots, slots)?,
            members: after(maps::MEMBERS, left.members, members)?,
        };
        Ok(())
    }

    /// How many places are filed under a service number.
    fn places_of(&self, service: u32) -> usize {
        self.observed.slots.range((service, 0)..=(service, u32::MAX)).count()
    }

    fn put(&mut self, key: FrontendKey, current: Option<Entry>, wanted: &Wanted<'_>) {
        let count = wanted.count();
        let id = match current {
            Some(entry) => {
                self.member_list(key, entry.id, &wanted.members);
                self.slot_list(entry, count, &wanted.places);
                entry.id
            }
            None => self.fresh(wanted),
        };
        let new = Entry { id, count, affinity_secs: wanted.affinity_secs };
        if current != Some(new) {
            self.switch.push(Step::PutEntry { key, entry: new });
        }
    }

    /// Members and places of a service that is new: under its number there is nothing yet.
    fn fresh(&mut self, wanted: &Wanted<'_>) -> u32 {
        let service = self.fresh_id();
        let member = |&(backend, member)| Step::PutMember { service, backend, member };
        self.members.extend(wanted.members.iter().map(member));
        let places = wanted.places.iter();
        let backends = places.flat_map(|(b, places)| std::iter::repeat_n(*b, *places as usize));
        let slot = |(slot, backend)| Step::PutSlot { service, slot, backend };
        self.slots.extend((0..).zip(backends).map(slot));
        service
    }

    fn member_list(
        &mut self,
        frontend: FrontendKey,
        service: u32,
        wanted: &[(SocketAddr, Member)],
    ) {
        let known: Vec<(SocketAddr, Member)> = members_of(self.observed, service).collect();
        for &(backend, member) in wanted {
            let step = Step::PutMember { service, backend, member };
            match find(&known, &backend).ok().map(|place| known[place].1) {
                Some(now) if now == member => {}
                // First it loses its places: what chooses meanwhile would stick to it in vain.
                Some(now) if member.leaving && !now.leaving => self.delete.push(step),
                _ => self.members.push(step),
            }
        }
        for (backend, member) in known {
            if find(wanted, &backend).is_err() {
                self.delete.push(Step::DeleteMember { service, backend });
                self.gone.push(Gone { frontend, backend, terminating: member.terminating });
            }
        }
    }

    /// Keeps each wanted backend where it is if that place remains, puts the others into the free places, then
    /// behind the end.
    fn slot_list(&mut self, entry: Entry, count: u32, wanted: &[(SocketAddr, u32)]) {
        let service = entry.id;
        let mut open = wanted.to_vec();
        let mut free = Vec::new();
        for slot in 0..count {
            let backend = self.observed.slots.get(&(service, slot));
            let place = backend.and_then(|backend| find(&open, backend).ok());
            match place.map(|place| &mut open[place].1) {
                Some(left) if *left > 0 => *left -= 1,
                _ => free.push(slot),
            }
        }
        let open = open.into_iter().flat_map(|(b, left)| std::iter::repeat_n(b, left as usize));
        for (slot, backend) in free.into_iter().zip(open) {
            let step = Step::PutSlot { service, slot, backend };
            if slot < entry.count { self.switch.push(step) } else { self.slots.push(step) }
        }
        for (&(_, slot), _) in self.observed.slots.range((service, count)..=(service, u32::MAX)) {
            self.delete.push(Step::DeleteSlot { service, slot });
        }
    }

    /// A frontend that nobody wants any more, with all that is filed under it.
    fn remove(&mut self, key: FrontendKey, service: u32) {
        self.delete.push(Step::DeleteEntry { key, service });
        if service == 0 || self.taken.contains(&service) {
            return;
        }
        self.taken.insert(service);
        for (&(_, slot), _) in self.observed.slots.range((service, 0)..=(service, u32::MAX)) {
            self.delete.push(Step::DeleteSlot { service, slot });
        }
        for (backend, member) in members_of(self.observed, service) {
            self.delete.push(Step::DeleteMember { service, backend });
            self.gone.push(Gone { frontend: key, backend, terminating: member.terminating });
        }
    }

    /// Frontends that nobody wants any more, then everything that no frontend refers to.
    fn leftovers(&mut self, desired: &BTreeMap<FrontendKey, Wanted<'_>>) {
        for (&key, entry) in &self.observed.entries {
            if !desired.contains_key(&key) {
                self.remove(key, entry.id);
            }
        }
        for &(service, slot) in self.observed.slots.keys() {
            if !self.taken.contains(&service) {
                self.delete.push(Step::DeleteSlot { service, slot });
            }
        }
        for &(service, backend) in self.observed.members.keys() {
            if !self.taken.contains(&service) {
                self.delete.push(Step::DeleteMember { service, backend });
            }
        }
    }

    fn fresh_id(&mut self) -> u32 {
        let id = self.next_id;
        self.next_id = id.checked_add(1).expect("fewer than 2^32 services were made");
        self.taken.insert(id);
        id
    }
}

/// A number that nothing in the maps carries, nor any above it: not even what is deleted in the same plan.
pub(super) fn next_id(observed: &Observed) -> u32 {
    let entries = observed.entries.values().map(|entry| entry.id);
    let slots = observed.slots.keys().next_back().map(|(id, _)| *id);
    let members = observed.members.keys().next_back().map(|(id, _)| *id);
    let highest = entries.chain(slots).chain(members).max().unwrap_or(0);
    highest.checked_add(1).expect("fewer than 2^32 services were made")
}

fn members_of(observed: &Observed, id: u32) -> impl Iterator<Item = (SocketAddr, Member)> + '_ {
    let from = observed.members.range((id, FIRST)..);
    from.take_while(move |((service, _), _)| *service == id)
        .map(|((_, backend), member)| (*backend, *member))
}

/// The least socket address in the order of the standard library.
const FIRST: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
