//! Service frontends and their backends, as the socket hooks see them.
//!
//! [`Observed`] is what the maps hold, [`plan`] turns it into what a list of
//! [`Frontend`](mesh_model::snapshot::Frontend)s asks for, [`ServiceTable`] reads and writes.
//! [`ServiceReconciler`] keeps a mirror, so that one change costs a few map operations and not a dump.

mod fake;
mod plan;
mod reconcile;
mod table;
mod weights;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use mesh_model::ObjectKey;
use mesh_model::snapshot::Protocol;

use crate::bpf::MapError;

pub use fake::FakeServiceTable;
pub use plan::{plan, plan_within};
pub use reconcile::{Outcome, ServiceReconciler};
pub use table::BpfServiceTable;

/// What identifies a frontend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendKey {
    /// The address that clients use.
    pub vip: IpAddr,
    /// Its transport protocol.
    pub protocol: Protocol,
    /// The port that clients use.
    pub port: u16,
}

/// A frontend's entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Number under which its backends are filed.
    pub id: u32,
    /// Number of backends.
    pub count: u32,
    /// Session affinity in seconds; 0 is none.
    pub affinity_secs: u32,
}

/// What a service knows of a backend, apart from its places.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Member {
    /// It has no places: it finishes what it has.
    pub leaving: bool,
    /// Its pod is being deleted.
    pub terminating: bool,
}

/// What the maps hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// Frontends.
    pub entries: BTreeMap<FrontendKey, Entry>,
    /// Backends by service number and place; one with a weight has several.
    pub slots: BTreeMap<(u32, u32), SocketAddr>,
    /// Backends by service number.
    pub members: BTreeMap<(u32, SocketAddr), Member>,
}

impl Observed {
    /// Backends of a frontend, ordered; nothing when there is no such frontend.
    pub fn backends(&self, key: &FrontendKey) -> Option<BTreeSet<SocketAddr>> {
        let entry = self.entries.get(key)?;
        Some((0..entry.count).filter_map(|i| self.slots.get(&(entry.id, i)).copied()).collect())
    }

    /// Whether a backend belongs to a frontend, be it as one that is leaving. By a node's address a node port is meant.
    pub fn has(&self, frontend: &FrontendKey, backend: SocketAddr) -> bool {
        let any_node: IpAddr = match frontend.vip {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let by_node = || self.entries.get(&FrontendKey { vip: any_node, ..*frontend });
        let entry = self.entries.get(frontend).or_else(by_node);
        entry.is_some_and(|entry| self.members.contains_key(&(entry.id, backend)))
    }

    /// Carries out steps.
    fn apply_all(&mut self, steps: &[Step]) {
        let (members, slots) = beginning(steps);
        let (first, rest) = steps.split_at(members);
        let put = first.iter().filter_map(|step| match *step {
            Step::PutMember { service, backend, member } => Some(((service, backend), member)),
            _ => None,
        });
        add(&mut self.members, put, members);
        let (second, rest) = rest.split_at(slots);
        let put = second.iter().filter_map(|step| match *step {
            Step::PutSlot { service, slot, backend } => Some(((service, slot), backend)),
            _ => None,
        });
        add(&mut self.slots, put, slots);
        rest.iter().for_each(|step| self.apply(step));
    }

    /// Carries out one step.
    pub fn apply(&mut self, step: &Step) {
        match *step {
            Step::PutMember { service, backend, member } => {
                self.members.insert((service, backend), member);
            }
            Step::PutSlot { service, slot, backend } => {
                self.slots.insert((service, slot), backend);
            }
            Step::PutEntry { key, entry } => {
                self.entries.insert(key, entry);
            }
            Step::DeleteEntry { key, .. } => {
                self.entries.remove(&key);
            }
            Step::DeleteSlot { service, slot } => {
                self.slots.remove(&(service, slot));
            }
            Step::DeleteMember { service, backend } => {
                self.members.remove(&(service, backend));
            }
        }
    }
}

/// How many steps at the start of these make members known, and how many behind them fill places.
fn beginning(steps: &[Step]) -> (usize, usize) {
    let members = steps.iter().take_while(|step| matches!(step, Step::PutMember { .. })).count();
    let slots = steps[members..].iter();
    (members, slots.take_while(|step| matches!(step, Step::PutSlot { .. })).count())
}

/// Adds entries. Many to few are put together anew, which takes a fraction of adding them one by one.
fn add<K: Ord, V>(map: &mut BTreeMap<K, V>, entries: impl Iterator<Item = (K, V)>, count: usize) {
    if count < map.len() {
        map.extend(entries);
    } else {
        map.append(&mut entries.collect());
    }
}

/// One map operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Make a backend known, or known to be leaving: sockets that stick to it choose again.
    PutMember {
        /// Service number.
        service: u32,
        /// The backend.
        backend: SocketAddr,
        /// What is known of it.
        member: Member,
    },
    /// Put a backend in a place, over another one or at the end.
    PutSlot {
        /// Service number.
        service: u32,
        /// The place.
        slot: u32,
        /// The backend.
        backend: SocketAddr,
    },
    /// Create or switch a frontend.
    PutEntry {
        /// The frontend.
        key: FrontendKey,
        /// Its entry.
        entry: Entry,
    },
    /// Remove a frontend.
    DeleteEntry {
        /// The frontend.
        key: FrontendKey,
        /// Its service number.
        service: u32,
    },
    /// Remove a place behind the end.
    DeleteSlot {
        /// Service number.
        service: u32,
        /// The place.
        slot: u32,
    },
    /// Forget a backend that is gone.
    DeleteMember {
        /// Service number.
        service: u32,
        /// The backend.
        backend: SocketAddr,
    },
}

impl Step {
    /// The service that the step belongs to.
    pub fn service(&self) -> u32 {
        match self {
            Self::PutMember { service, .. }
            | Self::PutSlot { service, .. }
            | Self::DeleteEntry { service, .. }
            | Self::DeleteSlot { service, .. }
            | Self::DeleteMember { service, .. } => *service,
            Self::PutEntry { entry, .. } => entry.id,
        }
    }
}

/// Addresses and ports are so much fewer than backends, in a table that is full of both.
const BACKENDS_PER_FRONTEND: u32 = 8;

/// Capacities of the maps of services for so many places for backends, inside and for clients outside, for
/// [`LoadOptions`](crate::LoadOptions).
pub fn map_capacities(backends: u32) -> BTreeMap<&'static str, u32> {
    use mesh_abi::maps;
    let frontends = (backends / BACKENDS_PER_FRONTEND).max(1024);
    let of = |size: u32| move |name| (name, size);
    let by_frontend = [maps::SERVICES, maps::EDGE_SERVICES, maps::EDGE_TABLES];
    let by_backend = [maps::SLOTS, maps::MEMBERS, maps::EDGE_BACKENDS];
    by_frontend.map(of(frontends)).into_iter().chain(by_backend.map(of(backends))).collect()
}

/// How many entries the maps take at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Frontends.
    pub entries: usize,
    /// Places of all frontends.
    pub slots: usize,
    /// Backends of all frontends.
    pub members: usize,
}

impl Room {
    /// No limits.
    pub const UNLIMITED: Self =
        Self { entries: usize::MAX, slots: usize::MAX, members: usize::MAX };
}

/// A frontend that a map has no room for, as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit {
    /// The frontend.
    pub frontend: FrontendKey,
    /// The Service that it belongs to.
    pub service: ObjectKey,
    /// The map.
    pub map: &'static str,
}

/// What has to be done, in order: additions, then switches, then deletions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The steps.
    pub steps: Vec<Step>,
    /// Backends that are gone by it.
    pub gone: Vec<Gone>,
    /// Frontends that it leaves incomplete, because there is no room for all that they should have.
    pub unfit: Vec<Unfit>,
}

impl Plan {
    /// Whether there is more room after it.
    fn frees(&self) -> bool {
        let frees = |step: &Step| {
            matches!(
                step,
                Step::DeleteEntry { .. } | Step::DeleteSlot { .. } | Step::DeleteMember { .. }
            )
        };
        self.steps.iter().any(frees)
    }
}

/// A backend that a frontend had and has no more, not even as one that is leaving.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gone {
    /// What it stood for.
    pub frontend: FrontendKey,
    /// Where it was.
    pub backend: SocketAddr,
    /// Whether its pod was being deleted: then nobody answers there any more.
    pub terminating: bool,
}

/// What came of a plan.
#[derive(Debug, Default)]
pub struct Applied {
    /// Steps that were carried out, in order.
    pub done: Vec<Step>,
    /// Steps that failed, or were left out because an earlier step of the same service had failed.
    pub failed: Vec<(Step, StepError)>,
}

/// Why a step was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// A map could not be used.
    #[error(transparent)]
    Map(#[from] MapError),
    /// An earlier step of the same service failed.
    #[error("left out after a failed step of the same service")]
    Skipped,
}

/// The kernel's table of frontends and backends.
pub trait ServiceTable: Send + Sync {
    /// Reads everything back. Costs time in proportion to the table.
    ///
    /// # Errors
    /// When a map cannot be read.
    fn observe(&self) -> Result<Observed, MapError>;

    /// Makes these the addresses by which a node port of any node is meant. Returns the number of operations.
    ///
    /// # Errors
    /// When the map cannot be read or written.
    fn set_node_addresses(&self, addresses: &BTreeSet<IpAddr>) -> Result<usize, MapError>;

    /// The frontend through which a datagram socket, known by its cookie, got to a backend. Nothing also when that was so long
    /// ago that it is forgotten.
    fn reached_by(&self, cookie: u64, backend: SocketAddr) -> Option<SocketAddr>;

    /// How much fits.
    fn room(&self) -> Room {
        Room::UNLIMITED
    }

    /// Hears what the table holds, whenever whoever writes it knows that anew.
    fn holds(&self, _observed: &Observed) {}

    /// Carries out the steps in order. A failed step holds back the later ones of the same service only, so that
    /// a reader never sees a list with a hole.
    fn apply(&self, plan: &Plan) -> Applied;
}

/// Carries out steps one by one; after a failed step the service's later ones are left out.
fn apply_each<'a>(
    steps: impl IntoIterator<Item = &'a Step>,
    mut carry_out: impl FnMut(&Step) -> Result<(), StepError>,
) -> Applied {
    let mut applied = Applied::default();
    let mut broken = BTreeSet::new();
    for step in steps {
        if broken.contains(&step.service()) {
            applied.failed.push((*step, StepError::Skipped));
            continue;
        }
        match carry_out(step) {
            Ok(()) => applied.done.push(*step),
            Err(error) => {
                broken.insert(step.service());
                applied.failed.push((*step, error));
            }
        }
    }
    applied
}

#[cfg(test)]
mod tests;
