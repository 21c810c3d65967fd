//! Services for clients outside, in the maps of the programs on the uplinks; and who answers for their addresses.

mod wanted;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use mesh_kernel::LinuxEdge;
use mesh_kernel::edge::{Desired as Wanted, Observed, Step, Unfit, plan_changes, plan_within};
use mesh_kernel::services::FrontendKey;
use mesh_kernel::steps::Applied;
use mesh_model::Snapshot;

use super::{Concern, Failures};
use crate::announce::Announcer;
use crate::board::{Board, FullMaps};
use crate::errors::chain;
use crate::observe::Desired;
use crate::paths::outlook::Outlook;
use wanted::{key, wanted_since};

const NAME: &str = "edge";
/// Most failures that a report names.
const NAMED: usize = 5;
/// How often a round is planned again because what it deleted has made room for more of it.
const AGAIN: usize = 2;

/// Keeps the edge as the snapshot says.
pub(crate) struct Edge {
    kernel: Arc<Kernel>,
    announcer: Announcer,
    mtu: u16,
}

/// The kernel's side, and what is known of it.
struct Kernel {
    edge: LinuxEdge,
    known: Mutex<Option<Known>>,
    board: Board,
}

/// What the last round left, when nothing of it failed.
struct Known {
    observed: Observed,
    /// What it was made from, unless something lacked room.
    done: Option<(Outside, Wanted)>,
}

impl Edge {
    /// `board` hears of what there is no room for.
    pub(crate) fn new(edge: LinuxEdge, mtu: u16, board: Board) -> Self {
        let kernel = Arc::new(Kernel { edge, known: Mutex::default(), board });
        Self { kernel, announcer: Announcer::start(), mtu }
    }
}

/// The snapshot and the paths, compared by what of them the edge follows from.
#[derive(Clone)]
pub(crate) struct Outside(Arc<Snapshot>, Arc<Outlook>);

impl PartialEq for Outside {
    fn eq(&self, other: &Self) -> bool {
        self.0.edge == other.0.edge && self.1.mtus == other.1.mtus && self.same_places(other)
    }
}

impl Outside {
    /// Whether the same backends are at the same nodes.
    fn same_places(&self, other: &Self) -> bool {
        self.0.peers == other.0.peers
            && self.0.node_addresses == other.0.node_addresses
            && self.0.node == other.0.node
            && self.1.away == other.1.away
    }
}

impl Concern for Edge {
    const NAME: &'static str = NAME;
    // Devices come and go, and with them our program.
    const HEAL: std::time::Duration = std::time::Duration::from_secs(15);
    type Slice = Outside;

    fn slice(&self, desired: &Desired) -> Option<Outside> {
        Some(Outside(Arc::clone(&desired.snapshot), Arc::clone(&desired.outlook)))
    }

    async fn apply(&mut self, slice: &Outside, heal: bool) -> Result<(), Failures> {
        let (kernel, mtu) = (Arc::clone(&self.kernel), self.mtu);
        let slice = slice.clone();
        let round = tokio::task::spawn_blocking(move || kernel.round(slice, mtu, heal));
        let (owned, uplinks) = round.await.unwrap_or_else(|panic| Err(vec![panic.to_string()]))?;
        self.announcer.announce(owned, uplinks);
        Ok(())
    }
}

/// Devices by which clients come in: index and MAC address.
pub(crate) type Uplinks = BTreeMap<u32, [u8; 6]>;

impl Kernel {
    /// Returns the addresses that this node answers for, and where.
    fn round(
        &self,
        slice: Outside,
        mtu: u16,
        heal: bool,
    ) -> Result<(BTreeSet<IpAddr>, Uplinks), Failures> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (seen, done) = match known.take().filter(|_| !heal) {
            Some(Known { observed, done }) => (Some(observed), done),
            None => (None, None),
        };
        let (wanted, changed) = wanted_since(done, &slice, mtu);
        let uplinks = seen.as_ref().map(|seen| seen.uplinks.clone());
        let observed = match seen {
            Some(seen) => self.edge.observe_again(&wanted, seen),
            None => self.edge.observe(&wanted),
        };
        let mut observed = observed.map_err(|error| vec![chain(&error)])?;
        let changed = changed.filter(|_| uplinks.as_ref() == Some(&observed.uplinks));
        let (unfit, applied) = self.make(&wanted, changed.as_deref(), &mut observed, heal);
        self.board.found_full(NAME, full(&slice.0, &unfit, &applied));
        if applied.failed.is_empty() {
            let owned = wanted.owned.clone();
            let uplinks = observed.uplinks.values().map(|u| (u.ifindex, u.mac)).collect();
            // Who lacks room is known only when all are looked at.
            let done = unfit.is_empty().then_some((slice, wanted));
            *known = Some(Known { observed, done });
            return Ok((owned, uplinks));
        }
        let failed =
            applied.failed.iter().map(|(step, error)| format!("{step:?}: {}", chain(error)));
        let mut failures: Failures = failed.take(NAMED).collect();
        if applied.failed.len() > NAMED {
            failures.push(format!("and {} more", applied.failed.len() - NAMED));
        }
        Err(failures)
    }

    /// Makes it so, as far as there is room. `changed` are the services that differ from what was made before, when that is known.
    fn make(
        &self,
        wanted: &Wanted,
        changed: Option<&[FrontendKey]>,
        observed: &mut Observed,
        heal: bool,
    ) -> (Vec<Unfit>, Applied<Step>) {
        let room = self.edge.room();
        let changes = changed.map(|changed| plan_changes(wanted, changed, observed, room));
        let mut plan = match changes.filter(|changes| changes.unfit.is_empty()) {
            Some(changes) => changes,
            None => plan_within(wanted, observed, room),
        };
        if heal && !plan.steps.is_empty() {
            tracing::warn!(steps = plan.steps.len(), "somebody else changed the edge, repairing");
        }
        let mut left = AGAIN;
        loop {
            let applied = self.edge.apply(&plan, observed);
            if left == 0 || plan.unfit.is_empty() || !plan.frees() || !applied.failed.is_empty() {
                return (plan.unfit, applied);
            }
            left -= 1;
            plan = plan_within(wanted, observed, room);
        }
    }
}

/// The maps that lack room, and for which Services.
fn full(snapshot: &Snapshot, unfit: &[Unfit], applied: &Applied<Step>) -> FullMaps {
    let mut full = FullMaps::new();
    for map in applied.full_maps() {
        full.entry(map).or_default();
    }
    if unfit.is_empty() {
        return full;
    }
    let services = snapshot.edge.services.iter();
    let names: BTreeMap<FrontendKey, _> = services.map(|s| (key(s), &s.service)).collect();
    for Unfit { frontend, map } in unfit {
        let services = &mut full.entry(*map).or_default().services;
        services.extend(names.get(frontend).map(|name| (*name).clone()));
    }
    full
}
