//! From what the node has to what it should have.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::{Desired, Observed, ObservedOverlay, Plan, Route, RouteKind, Step};

/// Sysctls by name below `/proc/sys`. Forwarding makes the node a router; loose reverse path filtering lets answers come back
/// another way than the stack would send. What listens on loopback addresses is for the node alone.
pub(super) fn sysctls(overlay: Option<&str>) -> BTreeMap<String, &'static str> {
    let mut all = BTreeMap::from([
        ("net/ipv4/ip_forward".to_owned(), "1"),
        ("net/ipv6/conf/all/forwarding".to_owned(), "1"),
        ("net/ipv4/conf/all/route_localnet".to_owned(), "0"),
    ]);
    all.extend(overlay.map(|name| (format!("net/ipv4/conf/{name}/rp_filter"), "2")));
    all
}

/// What has to be done. Total over the union of what is and what should be; sysctls that do not exist are left out.
pub fn plan(desired: &Desired, observed: &Observed) -> Plan {
    let mut steps = Vec::new();
    let overlay = observed.overlay.as_ref();
    for (name, value) in sysctls(overlay.map(|_| desired.overlay.as_str())) {
        if observed.sysctls.get(&name).is_some_and(|now| now != value) {
            steps.push(Step::SetSysctl { name, value: value.to_owned() });
        }
    }
    let local = desired.local_addresses.difference(&observed.local_addresses);
    steps.extend(local.copied().map(Step::AddLocalAddress));
    if let Some(device) = overlay {
        overlay_steps(desired, device, &mut steps);
    }
    let ifindex = overlay.map_or(0, |device| device.ifindex);
    let routes = desired_routes(desired, ifindex);
    steps.extend(routes.difference(&observed.routes).copied().map(Step::PutRoute));
    let blocks = desired.remote_blocks.difference(&observed.remote_blocks);
    steps.extend(blocks.copied().map(Step::PutRemoteBlock));
    // Only now may packets take the short way.
    if observed.overlay_ifindex != ifindex {
        steps.push(Step::SetOverlayIfindex(ifindex));
    }
    if let Some(masquerade) = &desired.masquerade
        && observed.masquerade.as_ref() != Some(masquerade)
    {
        steps.push(Step::SetMasquerade(masquerade.clone()));
    }
    deletions(desired, observed, &routes, &mut steps);
    Plan { steps }
}

/// Steps that take everything of ours away.
pub(super) fn removal(observed: &Observed) -> Plan {
    let mut steps = Vec::new();
    if observed.overlay_ifindex != 0 {
        steps.push(Step::SetOverlayIfindex(0));
    }
    steps.extend(observed.remote_blocks.iter().copied().map(Step::DeleteRemoteBlock));
    steps.extend(observed.routes.iter().copied().map(Step::DeleteRoute));
    steps.extend(observed.local_addresses.iter().copied().map(Step::DeleteLocalAddress));
    if observed.table_exists {
        steps.push(Step::DeleteMasquerade);
    }
    Plan { steps }
}

fn overlay_steps(desired: &Desired, device: &ObservedOverlay, steps: &mut Vec<Step>) {
    let ifindex = device.ifindex;
    if !device.up || device.mtu != desired.overlay_mtu {
        steps.push(Step::SetOverlay { ifindex, mtu: desired.overlay_mtu });
    }
    for &address in desired.overlay_addresses.difference(&device.addresses) {
        steps.push(Step::AddOverlayAddress { ifindex, address });
    }
    if !device.program {
        steps.push(Step::AttachOverlay { ifindex, name: desired.overlay.clone() });
    }
}

fn desired_routes(desired: &Desired, ifindex: u32) -> BTreeSet<Route> {
    let refused =
        desired.refused.iter().map(|&destination| Route { destination, kind: RouteKind::Refuse });
    let through = desired.remote_blocks.iter().filter(|_| ifindex != 0).map(|&destination| {
        let source = source_for(desired, destination.addr());
        let mtu = desired.block_mtus.get(&destination).copied();
        Route { destination, kind: RouteKind::Device { ifindex, source, mtu } }
    });
    refused.chain(through).collect()
}

/// The node's own overlay address of the same family: the only one that other nodes accept from it.
fn source_for(desired: &Desired, destination: IpAddr) -> Option<IpAddr> {
    let same = |address: &&IpAddr| address.is_ipv4() == destination.is_ipv4();
    desired.overlay_addresses.iter().find(same).copied()
}

fn deletions(
    desired: &Desired,
    observed: &Observed,
    routes: &BTreeSet<Route>,
    steps: &mut Vec<Step>,
) {
    let blocks = observed.remote_blocks.difference(&desired.remote_blocks);
    steps.extend(blocks.copied().map(Step::DeleteRemoteBlock));
    for old in observed.routes.difference(routes) {
        // A changed route was replaced, not added beside the old one.
        let replaced = |new: &Route| {
            new.destination == old.destination
                && (new.kind == RouteKind::Refuse) == (old.kind == RouteKind::Refuse)
        };
        if !routes.iter().any(replaced) {
            steps.push(Step::DeleteRoute(*old));
        }
    }
    if let Some(device) = &observed.overlay {
        for &address in device.addresses.difference(&desired.overlay_addresses) {
            steps.push(Step::DeleteOverlayAddress { ifindex: device.ifindex, address });
        }
    }
    let local = observed.local_addresses.difference(&desired.local_addresses);
    steps.extend(local.copied().map(Step::DeleteLocalAddress));
    if desired.masquerade.is_none() && observed.table_exists {
        steps.push(Step::DeleteMasquerade);
    }
}

#[cfg(test)]
mod tests;
