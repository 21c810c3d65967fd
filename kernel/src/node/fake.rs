//! A node's network in memory, for tests of those who use it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{NodeNetwork, Observed, Plan, RouteKind, Step};
use crate::IfName;
use crate::steps::{Applied, StepError};

/// A [`NodeNetwork`] without a kernel.
#[derive(Debug, Default)]
pub struct FakeNodeNetwork {
    state: Mutex<Observed>,
}

impl FakeNodeNetwork {
    /// A node with nothing on it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Changes the node behind the user's back: the overlay device appears, somebody deletes a route.
    pub fn tamper(&self, change: impl FnOnce(&mut Observed)) {
        change(&mut self.lock());
    }

    fn lock(&self) -> MutexGuard<'_, Observed> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NodeNetwork for FakeNodeNetwork {
    fn observe(&self, _: &IfName) -> Result<Observed, StepError> {
        Ok(self.lock().clone())
    }

    fn apply(&self, plan: &Plan) -> Applied<Step> {
        let mut state = self.lock();
        plan.steps.iter().for_each(|step| apply(&mut state, step));
        Applied { done: plan.steps.len(), failed: Vec::new() }
    }
}

/// Carries out one step.
pub(super) fn apply(state: &mut Observed, step: &Step) {
    match step {
        Step::SetSysctl { name, value } => drop(state.sysctls.insert(name.clone(), value.clone())),
        Step::AddLocalAddress(address) => drop(state.local_addresses.insert(*address)),
        Step::DeleteLocalAddress(address) => drop(state.local_addresses.remove(address)),
        Step::SetOverlayIfindex(ifindex) => state.overlay_ifindex = *ifindex,
        Step::PutRoute(route) => {
            let refuse = route.kind == RouteKind::Refuse;
            state.routes.retain(|old| {
                old.destination != route.destination || (old.kind == RouteKind::Refuse) != refuse
            });
            state.routes.insert(*route);
        }
        Step::DeleteRoute(route) => drop(state.routes.remove(route)),
        Step::PutRemoteBlock(block) => drop(state.remote_blocks.insert(*block)),
        Step::DeleteRemoteBlock(block) => drop(state.remote_blocks.remove(block)),
        Step::SetMasquerade(masquerade) => {
            state.masquerade = Some(masquerade.clone());
            state.table_exists = true;
        }
        Step::DeleteMasquerade => {
            state.masquerade = None;
            state.table_exists = false;
        }
        Step::SetOverlay { .. }
        | Step::AddOverlayAddress { .. }
        | Step::DeleteOverlayAddress { .. }
        | Step::AttachOverlay { .. } => apply_to_overlay(state, step),
    }
}

fn apply_to_overlay(state: &mut Observed, step: &Step) {
    let Some(device) = &mut state.overlay else { return };
    match step {
        Step::SetOverlay { mtu, .. } => {
            device.up = true;
            device.mtu = *mtu;
        }
        Step::AddOverlayAddress { address, .. } => drop(device.addresses.insert(*address)),
        Step::DeleteOverlayAddress { address, .. } => drop(device.addresses.remove(address)),
        Step::AttachOverlay { .. } => device.program = true,
        _ => {}
    }
}
