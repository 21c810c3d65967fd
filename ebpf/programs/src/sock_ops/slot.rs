//! Where connections are remembered while they last: at places that follow from their two ends.

use mesh_abi::{Address, FlowSlot};

use crate::atomic;
use crate::maps::FLOW_SLOTS;

/// An address, and a port in network order.
type End = (Address, u16);

/// The ends of a connection, as one of its sockets has them.
pub struct Ends {
    pub local: End,
    pub remote: End,
}

/// Takes the place for a socket. Not when another connection has it.
#[inline(always)]
pub fn take(ends: &Ends, active: bool, since_ns: u64) -> bool {
    let hash = hash(&ends.local, &ends.remote);
    let Some(slot) = place(hash) else { return false };
    // SAFETY: a value of the map, aligned; who has taken it is alone with the rest of it.
    unsafe {
        let taken = atomic::claim(&raw mut (*slot).owner, owner(hash, active));
        if taken {
            (&raw mut (*slot).since_ns).write_volatile(since_ns);
        }
        taken
    }
}

/// Whether the other end is a socket of this node that has opened the connection and tells of it.
#[inline(always)]
pub fn is_told_by_opener(ends: &Ends) -> bool {
    let hash = hash(&ends.remote, &ends.local);
    // SAFETY: a value of the map, aligned.
    place(hash).is_some_and(|slot| unsafe { owner_of(slot) } == owner(hash, true))
}

/// The place that a socket has taken.
#[inline(always)]
pub fn find(ends: &Ends) -> Option<*mut FlowSlot> {
    let hash = hash(&ends.local, &ends.remote);
    // SAFETY: a value of the map, aligned.
    let is_own =
        |slot: &*mut FlowSlot| unsafe { owner_of(*slot) } | FlowSlot::ACTIVE == owner(hash, true);
    place(hash).filter(is_own)
}

/// Whether the socket has opened the connection.
///
/// # Safety
/// A place of the map.
#[inline(always)]
pub unsafe fn is_active(slot: *mut FlowSlot) -> bool {
    // SAFETY: the caller's place.
    unsafe { owner_of(slot) & FlowSlot::ACTIVE != 0 }
}

/// Leaves the place to others.
#[inline(always)]
pub fn free(slot: *mut FlowSlot) {
    // SAFETY: what `find` has found: the owner writes one word, after which it looks at it no more.
    unsafe { (&raw mut (*slot).owner).write_volatile(0) }
}

/// # Safety
/// A place of the map.
#[inline(always)]
unsafe fn owner_of(slot: *mut FlowSlot) -> u64 {
    // SAFETY: the caller's place.
    unsafe { (&raw const (*slot).owner).read_volatile() }
}

#[inline(always)]
fn owner(hash: u64, active: bool) -> u64 {
    let role = if active { FlowSlot::ACTIVE } else { 0 };
    hash & !FlowSlot::ACTIVE | FlowSlot::TAKEN | role
}

#[inline(always)]
fn place(hash: u64) -> Option<*mut FlowSlot> {
    FLOW_SLOTS.get_ptr_mut((hash >> 32) as u32 & (FlowSlot::COUNT - 1))
}

/// Not one that withstands an enemy: who makes connections meet at one place costs them a little time, and nothing else.
#[inline(always)]
fn hash(from: &End, to: &End) -> u64 {
    let ports = u64::from(from.1) << 16 | u64::from(to.1);
    let mut hash = ports;
    for words in [from.0.words, to.0.words] {
        hash = mix(hash, u64::from(words[0]) << 32 | u64::from(words[1]));
        hash = mix(hash, u64::from(words[2]) << 32 | u64::from(words[3]));
    }
    mix(hash, ports)
}

#[inline(always)]
fn mix(hash: u64, word: u64) -> u64 {
    let product = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    product ^ product >> 32
}
