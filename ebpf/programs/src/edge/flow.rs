//! Memory of connections.
//!
//! Two entries for each: what the client sends is found by the frontend, what it gets by the backend. The table
//! evicts what was used longest ago, so inserting never fails for want of room; an evicted entry of a living connection
//! is made anew by the next packet from the client, with the same backend for as long as the list of backends is the same.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use mesh_abi::{Flow, FlowKey};

use super::packet::{ACK, FIN, Packet, RST, SYN, TCP};
use crate::maps::EDGE_FLOWS;

const SECOND: u64 = 1_000_000_000;

/// Now, in nanoseconds since the start of the system.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_ktime_get_ns() }
}

/// How long an entry is believed without a packet.
#[inline(always)]
fn lifetime_ns(protocol: u8, state: u8) -> u64 {
    let seconds = match (protocol, state) {
        (TCP, Flow::OPEN) => 86_400,
        (TCP, _) => 60,
        _ => 180,
    };
    seconds * SECOND
}

/// The entry, if it is not too old.
#[inline(always)]
pub fn find(key: &FlowKey, now: u64) -> Option<Flow> {
    // SAFETY: the value is copied. A torn read mixes two backends of one connection at worst, for one packet.
    let flow = unsafe { EDGE_FLOWS.get(key) }.copied()?;
    (now.wrapping_sub(flow.seen_ns) < lifetime_ns(key.protocol, flow.state)).then_some(flow)
}

/// The state after a packet.
#[inline(always)]
pub fn next_state(state: u8, packet: &Packet) -> u8 {
    if packet.protocol != TCP {
        return state;
    }
    if packet.tcp_flags & (FIN | RST) != 0 {
        Flow::CLOSING
    } else if state == Flow::NEW && packet.tcp_flags & SYN == 0 {
        Flow::OPEN
    } else {
        state
    }
}

/// Whether the packet opens a connection.
#[inline(always)]
pub fn opens(packet: &Packet) -> bool {
    packet.protocol == TCP && packet.tcp_flags & (SYN | ACK) == SYN
}

/// Whether an entry that was found has to be written again: once a second is enough to keep it.
#[inline(always)]
pub fn is_due(flow: &Flow, state: u8, now: u64) -> bool {
    flow.state != state || now.wrapping_sub(flow.seen_ns) > SECOND
}

/// Writes an entry. A failure costs the memory of the connection, not the packet.
#[inline(always)]
pub fn put(key: &FlowKey, flow: &Flow) {
    if let Some(known) = EDGE_FLOWS.get_ptr_mut(key) {
        // SAFETY: a value of the map, which stays in place while the program runs.
        let known = unsafe { &mut *known };
        // A new entry for each state would cost several times as much. Where it leads changes by a new entry only: no other CPU
        // sees half of one backend and half of another.
        if leads_the_same_way(known, flow) {
            known.seen_ns = flow.seen_ns;
            known.state = flow.state;
            return;
        }
    }
    let _ = EDGE_FLOWS.insert(key, flow, 0);
}

/// Forgets an entry, if there is one.
#[inline(always)]
pub fn forget(key: &FlowKey) {
    let _ = EDGE_FLOWS.remove(key);
}

#[inline(always)]
fn leads_the_same_way(one: &Flow, other: &Flow) -> bool {
    one.address == other.address
        && one.via == other.via
        && one.port_be == other.port_be
        && one.ifindex == other.ifindex
        && one.service == other.service
        && one.index == other.index
}

/// What the client sends.
#[inline(always)]
pub fn inbound_key(packet: &Packet) -> FlowKey {
    FlowKey {
        client: packet.source,
        other: packet.destination,
        client_port_be: packet.source_port_be,
        other_port_be: packet.destination_port_be,
        protocol: packet.protocol,
        direction: FlowKey::INBOUND,
        pad: 0,
    }
}

/// What the client gets.
#[inline(always)]
pub fn outbound_key(packet: &Packet) -> FlowKey {
    FlowKey {
        client: packet.destination,
        other: packet.source,
        client_port_be: packet.destination_port_be,
        other_port_be: packet.source_port_be,
        protocol: packet.protocol,
        direction: FlowKey::OUTBOUND,
        pad: 0,
    }
}
