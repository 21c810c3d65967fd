//! Which maps have a size that can be chosen, and what happens when one is full.

use std::collections::BTreeMap;

use mesh_abi::maps;

use super::bpffs::Pins;
use super::load::LoadError;
use super::map::capacity_of;

/// What a full map does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenFull {
    /// It takes nothing new: what it has no room for is not served, or denied.
    Refuses,
    /// It forgets what was used longest ago.
    Forgets,
}

/// Maps that user space fills.
const FILLED: [&str; 21] = [
    maps::SERVICES,
    maps::SLOTS,
    maps::MEMBERS,
    maps::NODE_ADDRESSES,
    maps::LOCAL_PODS,
    maps::POD_PORTS,
    maps::REMOTE_BLOCKS,
    maps::NAMESPACES,
    maps::EDGE_SERVICES,
    maps::EDGE_TABLES,
    maps::EDGE_BACKENDS,
    maps::EDGE_SOURCES,
    maps::EDGE_NODES,
    maps::EDGE_UPLINKS,
    maps::EDGE_OWNED,
    maps::EDGE_ADDRESSES,
    maps::POD_POLICIES,
    maps::IDENTITIES,
    maps::POLICY_BLOCKS,
    maps::POLICY_RULES,
    maps::HOST_PORTS,
];

/// Maps that the programs fill with what they remember of connections, sockets and clients.
const REMEMBERED: [&str; 10] = [
    maps::REVERSE,
    maps::STICKY,
    maps::AFFINITY,
    maps::FLOW_LIMITS,
    maps::DATAGRAMS,
    maps::EDGE_FLOWS,
    maps::EDGE_FRAGMENTS,
    maps::CONNECTIONS,
    maps::BEGINNINGS,
    maps::FRAGMENTS,
];

/// The maps whose capacity [`LoadOptions::capacities`](super::LoadOptions::capacities) may set, and what each does when it is full. All
/// others have the size of what they are for: one entry, one for each CPU, a ring.
pub fn sized_maps() -> impl Iterator<Item = (&'static str, WhenFull)> {
    let filled = FILLED.into_iter().map(|name| (name, WhenFull::Refuses));
    filled.chain(REMEMBERED.into_iter().map(|name| (name, WhenFull::Forgets)))
}

/// How many entries fit into those that are pinned.
pub(super) fn of_pinned(pins: &Pins) -> Result<BTreeMap<&'static str, u32>, LoadError> {
    let capacity = |(name, _)| {
        let capacity = capacity_of(pins, name);
        let capacity = capacity.map_err(|source| LoadError::OpenMap { name, source })?;
        Ok((name, capacity))
    };
    sized_maps().map(capacity).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Maps of one size: what they are for decides it.
    const FIXED: [&str; 13] = [
        maps::NODE,
        maps::COUNTERS,
        maps::EDGE_CONFIG,
        maps::EDGE_COUNTERS,
        maps::FLOW_CONFIG,
        maps::FLOW_COUNTERS,
        maps::FLOW_SLOTS,
        maps::FLOWS,
        maps::POLICY_STATE,
        maps::TRACE,
        // No more probes are traced at a time than fit.
        maps::TRACES,
        maps::TRACE_EVENTS,
        // A part of each socket.
        maps::PEERS,
    ];

    #[test]
    fn of_every_map_it_is_known_what_happens_when_it_is_full() {
        let sized = sized_maps().map(|(name, _)| name);
        let known: BTreeSet<&str> = sized.chain(FIXED).chain([maps::FLOW_SOCKETS]).collect();
        let all: BTreeSet<&str> = maps::ALL.iter().map(|(name, ..)| *name).collect();
        assert_eq!(known, all);
    }
}
