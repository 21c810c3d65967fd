//! Network policy in the maps of the TC programs.
//!
//! Two write here: the concern, whenever the desired policy changes, and every new pod, which gets its own entry before it is
//! reachable. They share one lock. A pod waits until the newest desired policy is in force, so that it never starts under an
//! older one; a pod without an entry is denied everything where any policy is enforced.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mesh_kernel::PodNetwork;
use mesh_kernel::bpf::MapError;
use mesh_kernel::pods::{Guard, PodPort};
use mesh_kernel::policy::{
    Outcome, Place, PolicyReconciler, PolicyTable, Step, Tables, Touched, pod_policy,
};
use mesh_model::policy::PolicySet;
use mesh_model::snapshot::Protocol;
use mesh_model::wellknown::{AGENT_PORT, DRAIN_PORT, PATHS_PORT};
use mesh_model::{ObjectKey, Snapshot};
use tokio::sync::watch;

use super::{Concern, Failures};
use crate::board::{Board, FullMaps};
use crate::cni::owner;
use crate::errors::chain;
use crate::observe::Desired;

/// Longest time that a new pod waits for the newest policy; then it starts with what is there, denied what is not.
const PATIENCE: Duration = Duration::from_secs(2);
/// Relays listen on this many ports behind that of the overlay.
const RELAY_PORTS: u16 = 16;
/// Most failures that a report names.
const NAMED: usize = 5;
const NAME: &str = "policy";

/// The policy tables of a node; cheap to clone.
pub(crate) struct Policies<T>(Arc<Shared<T>>);

impl<T> Clone for Policies<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

struct Shared<T> {
    state: Mutex<State<T>>,
    applied: Condvar,
    desired: watch::Receiver<Option<Desired>>,
    board: Board,
}

struct State<T> {
    reconciler: PolicyReconciler<T>,
    /// What the tables follow from.
    snapshot: Option<Arc<Snapshot>>,
    /// Where pods were then, when that round was complete.
    places: Option<BTreeMap<u32, Place>>,
    /// Addresses of pods that came since.
    placed: Vec<IpAddr>,
}

impl<T: PolicyTable> Policies<T> {
    /// `board` hears of what there is no room for.
    pub(crate) fn new(table: T, desired: watch::Receiver<Option<Desired>>, board: Board) -> Self {
        let state = State {
            reconciler: PolicyReconciler::new(table),
            snapshot: None,
            places: None,
            placed: vec![],
        };
        Self(Arc::new(Shared { state: Mutex::new(state), applied: Condvar::new(), desired, board }))
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the tables follow from the snapshot.
    fn round(
        &self,
        snapshot: &Arc<Snapshot>,
        pods: &dyn PodNetwork,
        heal: bool,
    ) -> Result<(), Failures> {
        let mut state = self.lock();
        // Only under the lock: a pod that is listed or not has its own turn before or after.
        let places = places(snapshot, pods).map_err(|error| vec![error])?;
        let failed = |error| vec![chain(&error)];
        if heal && state.reconciler.refresh().map_err(failed)? {
            tracing::warn!("somebody else changed the policy maps, repairing");
        }
        let outcome = state.follow(&snapshot.policy, &places, &host_ports(snapshot), heal);
        let outcome = outcome.map_err(failed)?;
        if outcome.operations > 0 {
            tracing::debug!(operations = outcome.operations, "policy maps updated");
        }
        self.0.board.found_full(NAME, full(&outcome, &snapshot.policy));
        let result = failures(&outcome);
        state.snapshot = Some(Arc::clone(snapshot));
        if result.is_ok() {
            state.places = Some(places);
            state.placed.clear();
        }
        self.0.applied.notify_all();
        result
    }

    /// The newest desired policy, once it is in force.
    fn newest(&self) -> (MutexGuard<'_, State<T>>, Option<Arc<Snapshot>>) {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.lock();
        loop {
            let newest = self.0.desired.borrow().as_ref().map(|d| Arc::clone(&d.snapshot));
            let same =
                |a: &Arc<Snapshot>, b: &Arc<Snapshot>| Arc::ptr_eq(a, b) || a.policy == b.policy;
            let current = match (&newest, &state.snapshot) {
                (Some(newest), Some(applied)) => same(newest, applied),
                (newest, _) => newest.is_none(),
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if current || left.is_zero() {
                return (state, newest);
            }
            let waited = self.0.applied.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl<T: PolicyTable> State<T> {
    /// Compares what may differ since the last complete round; without one, everything.
    fn follow(
        &mut self,
        set: &PolicySet,
        places: &BTreeMap<u32, Place>,
        host_ports: &[(Protocol, u16)],
        heal: bool,
    ) -> Result<Outcome, MapError> {
        let before = self.snapshot.as_ref().map(|snapshot| Arc::clone(&snapshot.policy));
        match before.zip(self.places.take()) {
            Some((before, were)) if !heal && before.active == set.active => {
                let mut touched = Touched::between(&before, set);
                let all = were.values().chain(places.values());
                touched.add_addresses(all.flat_map(|place| &place.addresses).chain(&self.placed));
                self.reconciler.reconcile_touched(&touched, set, places, host_ports)
            }
            _ => self.reconciler.reconcile(&Tables::wanted(set, places, host_ports)),
        }
    }
}

impl<T: PolicyTable> Guard for Policies<T> {
    fn place(&self, port: &PodPort, ifindex: u32) -> io::Result<()> {
        let (mut state, newest) = self.newest();
        let Some(snapshot) = newest.filter(|snapshot| snapshot.policy.active) else {
            return Ok(());
        };
        let place = place(&snapshot, &port.owner, port.addresses().collect());
        state.placed.extend(&place.addresses);
        let mut steps = vec![Step::PutPod(ifindex, pod_policy(&snapshot.policy, &place))];
        let known = place.pod.as_ref().and_then(|pod| snapshot.policy.pods.get(pod));
        match known {
            // An address that somebody else had is somebody else's no more, whatever the API says yet.
            Some(policy) => steps.extend(Step::identities(&place.addresses, policy.identity)),
            None => tracing::debug!(owner = port.owner, "a pod that the API does not know yet"),
        }
        steps.push(Step::NextGeneration);
        match failures(&state.reconciler.carry_out(steps)) {
            Ok(()) => Ok(()),
            Err(failures) => Err(io::Error::other(failures.join("; "))),
        }
    }
}

/// The maps that lack room, and the policies that therefore allow less than they say.
fn full(outcome: &Outcome, set: &PolicySet) -> FullMaps {
    let mut full = FullMaps::new();
    for (step, error) in &outcome.failed {
        let Some(map) = error.full() else { continue };
        let lacking = full.entry(map).or_default();
        if let Step::PutRule(_, number) = step {
            lacking.policies.extend(set.policy_of(*number));
        }
    }
    full
}

fn failures(outcome: &Outcome) -> Result<(), Failures> {
    let failed = outcome.failed.iter().map(|(step, error)| format!("{step:?}: {}", chain(error)));
    let mut failures: Failures = failed.take(NAMED).collect();
    if outcome.failed.len() > NAMED {
        failures.push(format!("and {} more", outcome.failed.len() - NAMED));
    }
    if failures.is_empty() { Ok(()) } else { Err(failures) }
}

/// Ports of Mesh itself, on every node: pods have no business there.
fn host_ports(snapshot: &Snapshot) -> Vec<(Protocol, u16)> {
    let overlay = snapshot.cluster.overlay_port;
    let tunnels = (overlay..=overlay.saturating_add(RELAY_PORTS)).chain([PATHS_PORT, DRAIN_PORT]);
    let tunnels = tunnels.map(|port| (Protocol::Udp, port));
    [(Protocol::Tcp, AGENT_PORT)].into_iter().chain(tunnels).collect()
}

/// Where pods are on this node.
fn places(snapshot: &Snapshot, pods: &dyn PodNetwork) -> Result<BTreeMap<u32, Place>, String> {
    let ports = pods.list().map_err(|error| chain(&error))?;
    let places = ports.into_iter().filter_map(|port| {
        let (_, lease) = owner::parse(&port.owner)?;
        Some((port.ifindex, place(snapshot, &port.owner, lease.addresses)))
    });
    Ok(places.collect())
}

/// Whose place it is. A name that was too long for the interface is known by its address, once the API has that.
fn place(snapshot: &Snapshot, text: &str, addresses: Vec<IpAddr>) -> Place {
    let named = owner::pod(text);
    let known = |pod: &ObjectKey| snapshot.policy.pods.contains_key(pod);
    let pod = match named {
        Some(pod) if !known(&pod) => Some(by_address(snapshot, &addresses).unwrap_or(pod)),
        other => other,
    };
    Place { pod, addresses }
}

fn by_address(snapshot: &Snapshot, addresses: &[IpAddr]) -> Option<ObjectKey> {
    let found = snapshot.pods.iter().find(|work| {
        let status = work.pod.status.as_ref();
        let own = status.and_then(|status| status.pod_ip.as_ref());
        own.and_then(|text| text.parse().ok()).is_some_and(|ip: IpAddr| addresses.contains(&ip))
    })?;
    let metadata = &found.pod.metadata;
    Some(ObjectKey::new(metadata.namespace.clone()?, metadata.name.clone()?))
}

/// Keeps the policy tables as the snapshot says.
pub(crate) struct Policy<T> {
    pub(crate) policies: Policies<T>,
    pub(crate) pods: Arc<dyn PodNetwork>,
}

/// The snapshot, compared by its policy.
pub(crate) struct Wanted(Arc<Snapshot>);

impl PartialEq for Wanted {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
            || self.0.policy == other.0.policy
                && self.0.cluster.overlay_port == other.0.cluster.overlay_port
    }
}

impl<T: PolicyTable + 'static> Concern for Policy<T> {
    const NAME: &'static str = NAME;
    type Slice = Wanted;

    fn slice(&self, desired: &Desired) -> Option<Wanted> {
        Some(Wanted(Arc::clone(&desired.snapshot)))
    }

    async fn apply(&mut self, slice: &Wanted, heal: bool) -> Result<(), Failures> {
        let (policies, pods) = (self.policies.clone(), Arc::clone(&self.pods));
        let snapshot = Arc::clone(&slice.0);
        let round = tokio::task::spawn_blocking(move || policies.round(&snapshot, &*pods, heal));
        round.await.unwrap_or_else(|panic| Err(vec![panic.to_string()]))
    }
}

#[cfg(test)]
mod tests;
