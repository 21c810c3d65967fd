//! What programs of one ABI version go on with that another version began: the memory of connections.
//!
//! For a while both versions run, each on a part of a connection's way: a client's packets meet the one, the answers the other. So
//! this memory is not copied, it is the same map under both directories. Verdicts in it are not shared: they hold for
//! one generation of the policy tables, and no two versions have the same.

use std::os::fd::AsFd;

use mesh_abi as abi;

use super::bpffs::{BpffsError, Pins};
use super::map::Map;
use super::sys;

/// Lets this version share the memory of the others, as far as it has none yet. Returns the last generation of their policy tables.
pub(super) fn share_memory(pins: &Pins) -> Result<Option<u32>, BpffsError> {
    let mut last = None;
    for other in pins.others()? {
        let generation = generation(&other);
        for (name, key, value) in abi::maps::ALL {
            // Without the generation nobody could tell whose verdicts these are.
            let is_told = generation.is_some() || *name != abi::maps::CONNECTIONS;
            if abi::maps::MEMORY.contains(name) && is_told {
                share(pins, &other, name, (*key, *value))?;
            }
        }
        last = last.max(generation);
    }
    Ok(last)
}

fn generation(pins: &Pins) -> Option<u32> {
    let state: Map<u32, abi::PolicyState> = Map::open(pins, abi::maps::POLICY_STATE).ok()?;
    state.lookup(&0).ok()?.map(|state| state.generation)
}

/// Nothing where the other version has no such map, or one of another layout.
fn share(pins: &Pins, other: &Pins, name: &str, sizes: (usize, usize)) -> Result<(), BpffsError> {
    let Ok(map) = sys::open_pinned(&other.map(name)) else { return Ok(()) };
    let Ok(info) = sys::info::<sys::MapInfo>(map.as_fd()) else { return Ok(()) };
    if (info.key_size as usize, info.value_size as usize) == sizes {
        pins.share(name, map.as_fd())?;
    }
    Ok(())
}
