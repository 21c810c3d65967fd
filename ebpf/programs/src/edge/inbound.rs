//! From a client to a backend.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::TcContext;
use mesh_abi::{
    Address, EdgeBackend, EdgeReason, EdgeService, EdgeSource, Flow, FlowKey, HostPort, LocalPod,
    Reason, ServiceKey,
};

use super::packet::{self, Packet, Part, TCP, has_ports};
use super::translate::{Side, clamp, put_port, rewrite};
use super::{Scratch, choose, count, drop, flow, icmp, is_own, refuse, scratch, stray, tunnel};
use crate::deliver::{local_pod, to_pod};
use crate::maps::{EDGE_SERVICES, EDGE_SOURCES, HOST_PORTS, REMOTE_BLOCKS};
use crate::packet::{ETH_HLEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, NEXT, ifindex};
use crate::policy::{self, Ends};
use crate::{host, trace};

/// How many ports are tried for a client whose own is taken, and from where on they are looked for: above those that machines
/// give to their own connections.
const CLIENT_PORTS: u32 = 8;
const FIRST_CLIENT_PORT: u16 = 0xf000;

/// A packet that came in by an uplink.
#[inline(always)]
pub fn from_client(ctx: &TcContext, v4: bool) -> i32 {
    let Some(Scratch { packet, flow }) = scratch() else { return NEXT };
    if !packet::parse(ctx, v4, packet) {
        return NEXT;
    }
    // The stack takes these for its own where somebody has turned on `route_localnet`.
    if host::is_loopback(&packet.destination) || host::is_loopback(&packet.source) {
        return drop(ctx, EdgeReason::Loopback);
    }
    if icmp::is_error(ctx, packet) {
        return error(ctx, packet, flow);
    }
    if !has_ports(packet.protocol) {
        return stray::answer(ctx, packet);
    }
    // A later piece of something that did not go to a service is none of ours.
    if !packet.recall_ports() {
        return NEXT;
    }
    let Some(service) = service(packet) else {
        forget_way_back(packet);
        return stray::answer(ctx, packet);
    };
    packet.remember_ports();
    if service.flags & EdgeService::RESTRICTED != 0 && !is_allowed(&service, &packet.source) {
        return drop(ctx, EdgeReason::NotAllowed);
    }
    if !backend_of(ctx, &service, packet, flow) {
        if service.flags & EdgeService::LOCAL_ONLY != 0 {
            return drop(ctx, EdgeReason::NotHere);
        }
        return refuse::unreachable(ctx, packet);
    }
    deliver(ctx, packet, flow)
}

/// An error about what a backend sent, on its way to the backend. Left to the stack when it is about something else.
#[inline(always)]
fn error(ctx: &TcContext, packet: &Packet, flow: &mut Flow) -> i32 {
    if !icmp::find(ctx, packet, FlowKey::INBOUND, flow) {
        return NEXT;
    }
    if !icmp::rewrite(ctx, packet, Side::Destination, flow) {
        return drop(ctx, EdgeReason::NoRoom);
    }
    onward(ctx, packet.v4, &flow.address, &flow.via)
}

#[inline(always)]
fn service(packet: &Packet) -> Option<EdgeService> {
    let key = ServiceKey {
        address: packet.destination,
        port_be: packet.destination_port_be,
        protocol: packet.protocol,
        pad: 0,
    };
    // SAFETY: the value is copied; user space replaces it as a whole.
    unsafe { EDGE_SERVICES.get(&key) }.copied()
}

#[inline(never)]
fn is_allowed(service: &EdgeService, client: &Address) -> bool {
    let wanted = EdgeSource { service: service.id, address: *client };
    EDGE_SOURCES.get(Key::new(160, wanted)).is_some()
}

/// Where the connection goes: where it went, or a choice. Both directions are remembered. False when there is no backend.
#[inline(never)]
fn backend_of(ctx: &TcContext, service: &EdgeService, packet: &Packet, found: &mut Flow) -> bool {
    let (key, now) = (flow::inbound_key(packet), flow::now());
    if let Some(known) = flow::find(&key, now).filter(|known| holds(service, packet, known)) {
        let state = flow::next_state(known.state, packet);
        if !flow::is_due(&known, state, now) {
            *found = known;
            return true;
        }
        *found = Flow { seen_ns: now, state, ..known };
    } else {
        let Some((index, backend)) = choose::choose(service, packet) else { return false };
        let EdgeBackend { address, via, port_be, .. } = backend;
        let state = flow::next_state(Flow::NEW, packet);
        let ifindex = ifindex(ctx);
        let (service, seen_ns, client_port_be) = (service.id, now, 0);
        *found = Flow {
            seen_ns,
            address,
            via,
            port_be,
            state,
            pad: 0,
            ifindex,
            service,
            index,
            client_port_be,
        };
        found.client_port_be = client_port(packet, found);
        count(ctx, EdgeReason::Chosen);
        trace::chosen(&found.address, port_be);
    }
    flow::put(&key, found);
    remember_way_back(packet, found);
    true
}

/// The port that a new connection's client has on the backend's side: 0 for its own, or another one where the same port has
/// come to the same backend by another frontend. Its answers could not be told from the other's.
#[inline(never)]
fn client_port(packet: &Packet, flow: &Flow) -> u16 {
    let mut key = way_back(packet, flow);
    let mut seed = choose::mix(packet.destination.words[3], u32::from(packet.destination_port_be));
    for tried in 0..CLIENT_PORTS {
        let taken = flow::find(&key, flow.seen_ns).is_some_and(|other| {
            other.address != packet.destination
                || other.port_be != packet.destination_port_be
                || own_port(&other, &key) != packet.source_port_be
        });
        if !taken {
            return if tried == 0 { 0 } else { key.client_port_be };
        }
        seed = choose::mix(seed, tried);
        key.client_port_be = (FIRST_CLIENT_PORT | seed as u16).to_be();
    }
    // So many at once nobody has; the last one wins, as if there was no memory.
    0
}

/// The port that the client itself has in the connection of an outbound entry.
#[inline(always)]
fn own_port(flow: &Flow, key: &FlowKey) -> u16 {
    if flow.client_port_be == 0 { key.client_port_be } else { flow.client_port_be }
}

/// Whether a connection stays where it is. TCP does, even to a backend that is about to go; what has no connections goes
/// to one that is still there.
#[inline(always)]
fn holds(service: &EdgeService, packet: &Packet, known: &Flow) -> bool {
    if known.service != service.id {
        return false;
    }
    if packet.protocol == TCP && !flow::opens(packet) {
        return true;
    }
    if packet.protocol == TCP && known.state == Flow::CLOSING {
        return false;
    }
    let backend = choose::backend(known.service, known.index);
    backend.is_some_and(|b| b.address == known.address && b.port_be == known.port_be)
}

/// What the backend answers is found by this entry.
#[inline(never)]
fn remember_way_back(packet: &Packet, flow: &Flow) {
    let key = way_back(packet, flow);
    let other = flow.client_port_be != 0;
    let back = Flow {
        address: packet.destination,
        port_be: packet.destination_port_be,
        via: Address::UNSPECIFIED,
        client_port_be: if other { packet.source_port_be } else { 0 },
        ..*flow
    };
    flow::put(&key, &back);
}

/// A client that begins a connection with a process here, not with a service: the port may be one from which it has reached the same
/// process as a service's, and answers would go on coming from there.
#[inline(always)]
fn forget_way_back(packet: &Packet) {
    if flow::opens(packet) && is_own(&packet.destination) {
        flow::forget(&FlowKey { direction: FlowKey::OUTBOUND, ..flow::inbound_key(packet) });
    }
}

#[inline(always)]
fn way_back(packet: &Packet, flow: &Flow) -> FlowKey {
    let other = flow.client_port_be != 0;
    FlowKey {
        client: packet.source,
        other: flow.address,
        client_port_be: if other { flow.client_port_be } else { packet.source_port_be },
        other_port_be: flow.port_be,
        protocol: packet.protocol,
        direction: FlowKey::OUTBOUND,
        pad: 0,
    }
}

#[inline(always)]
fn deliver(ctx: &TcContext, packet: &Packet, flow: &Flow) -> i32 {
    let away = flow.via != Address::UNSPECIFIED;
    if away {
        // A node that is no more takes its backends along.
        let Some(room) = tunnel::room(&flow.via, packet.v4) else {
            return refuse::unreachable(ctx, packet);
        };
        if refuse::is_too_big(ctx, room) {
            return refuse::too_big(ctx, packet, room, 0);
        }
        clamp(ctx, packet, room);
    } else if local_pod(&flow.address).is_none() && !is_own(&flow.address) {
        return refuse::unreachable(ctx, packet);
    }
    if !rewrite(ctx, packet, Side::Destination, &flow.address, flow.port_be)
        || !put_port(ctx, packet, Side::Source, flow.client_port_be)
    {
        return drop(ctx, EdgeReason::NoRoom);
    }
    onward(ctx, packet.v4, &flow.address, &flow.via)
}

/// Takes a translated packet to its backend.
#[inline(always)]
fn onward(ctx: &TcContext, v4: bool, backend: &Address, via: &Address) -> i32 {
    if *via != Address::UNSPECIFIED {
        return tunnel::enter(ctx, v4, via, EdgeReason::ClientToNode);
    }
    let Some(pod) = local_pod(backend) else {
        // For a process of the node; or an error about what a pod sent that is gone meanwhile.
        if is_own(backend) {
            count(ctx, EdgeReason::ClientToHost);
        }
        return NEXT;
    };
    hand_over(ctx.skb.skb, &pod, v4, EdgeReason::ClientToPod) as i32
}

/// Gives a packet to a pod that accepts it. A function of its own, so that the verifier looks at it once.
#[inline(never)]
fn hand_over(skb: *mut __sk_buff, pod: &LocalPod, v4: bool, reason: EdgeReason) -> u32 {
    let ctx = &TcContext::new(skb);
    let ethertype = if v4 { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 };
    let ends = Ends { sender: 0, receiver: pod.device(), trusted: false, unproven: true };
    if let Err(denied) = policy::admit(ctx, ETH_HLEN, ethertype, ends) {
        return crate::packet::drop(ctx, denied) as u32;
    }
    count(ctx, reason);
    to_pod(ctx, pod, ethertype.to_be(), Reason::OverlayToPod)
        .unwrap_or_else(|| drop(ctx, EdgeReason::NoRoom)) as u32
}

/// Whether it is the address of a pod here, or of one that another node may have.
#[inline(always)]
pub fn is_pods(address: &Address) -> bool {
    local_pod(address).is_some() || REMOTE_BLOCKS.get(Key::new(128, *address)).is_some()
}

/// A client's packet that another node has sent here: to a pod or process of this node, and the way back is remembered. For a pod that
/// is gone it is refused, back through that node: the client would wait for nothing.
#[inline(always)]
pub fn from_node(ctx: &TcContext, packet: &mut Packet, from: &Address) -> i32 {
    // No node can lend its clients the address of a pod.
    if is_pods(&packet.source) {
        return drop(ctx, EdgeReason::Forged);
    }
    let pod = local_pod(&packet.destination);
    if pod.is_none() && !is_own(&packet.destination) {
        return refuse::unreachable_by(ctx, packet, from);
    }
    if has_ports(packet.protocol) && packet.recall_ports() {
        packet.remember_ports();
        remember_node(packet, from);
    } else if packet.part == Part::Later {
        return drop(ctx, EdgeReason::LostFragment);
    }
    let Some(pod) = pod else { return to_host(ctx, packet) };
    hand_over(ctx.skb.skb, &pod, packet.v4, EdgeReason::NodeToPod) as i32
}

/// To a process of this node, but to none of Mesh: what is between nodes alone is for no node's clients.
#[inline(always)]
fn to_host(ctx: &TcContext, packet: &Packet) -> i32 {
    let (port_be, protocol) = (packet.destination_port_be, packet.protocol);
    // SAFETY: only its presence matters.
    if unsafe { HOST_PORTS.get(&HostPort { port_be, protocol, pad: 0 }) }.is_some() {
        return drop(ctx, EdgeReason::Forged);
    }
    count(ctx, EdgeReason::NodeToHost);
    NEXT
}

#[inline(never)]
fn remember_node(packet: &Packet, from: &Address) {
    let key = FlowKey {
        client: packet.source,
        other: packet.destination,
        client_port_be: packet.source_port_be,
        other_port_be: packet.destination_port_be,
        protocol: packet.protocol,
        direction: FlowKey::OUTBOUND,
        pad: 0,
    };
    let now = flow::now();
    let mut state = flow::next_state(Flow::NEW, packet);
    if let Some(known) = flow::find(&key, now)
        && known.via == *from
        && !flow::opens(packet)
    {
        state = flow::next_state(known.state, packet);
        if !flow::is_due(&known, state, now) {
            return;
        }
    }
    flow::put(&key, &Flow { seen_ns: now, via: *from, state, ..Flow::default() });
}
