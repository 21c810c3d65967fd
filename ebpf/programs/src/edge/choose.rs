//! Which backend a new connection goes to: a function of the client, the frontend and the list of backends, and of nothing
//! else. Every node gives the same answer.

use mesh_abi::edge::TABLE_SIZE;
use mesh_abi::{Address, EdgeBackend, EdgeBackendKey, EdgeService};

use super::packet::Packet;
use crate::maps::{EDGE_BACKENDS, EDGE_TABLES};

/// A backend and its index; nothing when the service has none.
#[inline(always)]
pub fn choose(service: &EdgeService, packet: &Packet) -> Option<(u16, EdgeBackend)> {
    let table = EDGE_TABLES.get_ptr(&service.id)?;
    let place = ((u64::from(hash(service, packet)) * TABLE_SIZE as u64) >> 32) as usize;
    if place >= TABLE_SIZE {
        return None;
    }
    // SAFETY: within the array; user space replaces the table as a whole.
    let index = unsafe { (&raw const (*table).slots).cast::<u16>().add(place).read() };
    Some((index, backend(service.id, index)?))
}

/// The backend with this index, if there is one.
#[inline(always)]
pub fn backend(service: u32, index: u16) -> Option<EdgeBackend> {
    let index = u32::from(index);
    // SAFETY: the value is copied; user space replaces it as a whole.
    unsafe { EDGE_BACKENDS.get(&EdgeBackendKey { service, index }) }.copied()
}

#[inline(always)]
fn hash(service: &EdgeService, packet: &Packet) -> u32 {
    let mut state = mix_address(0x6d65_7368, &packet.source);
    if service.flags & EdgeService::AFFINITY == 0 {
        state = mix_address(state, &packet.destination);
        state = mix(state, u32::from(packet.source_port_be) << 16 | u32::from(packet.protocol));
    }
    mix(state, u32::from(packet.destination_port_be))
}

#[inline(always)]
fn mix_address(state: u32, address: &Address) -> u32 {
    address.words.iter().fold(state, |state, word| mix(state, *word))
}

/// One round of a multiply-and-shift hash.
#[inline(always)]
pub fn mix(state: u32, word: u32) -> u32 {
    let mixed = (state ^ word).wrapping_mul(0x9e37_79b1);
    (mixed ^ mixed >> 15).wrapping_mul(0x85eb_ca77)
}
