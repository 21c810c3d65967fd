//! A marked probe: each program tells what it decides about the probe's packets.
//!
//! A packet is the probe's when one of its ends is in `TRACES`; a socket when its cookie is. While nobody traces, a program reads
//! one word for each of its decisions. What is needed of a traced packet lies in the CPU's room, not on the stack, and events are
//! written where they stay: the ring buffer.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::bpf_get_socket_cookie;
use aya_ebpf::programs::{SockAddrContext, TcContext};
use mesh_abi::{
    Address, FlowEvent, Reason, Service, Slot, TraceEvent, TraceHook, TraceKey, TraceKind,
};

use crate::connection::{self, Asked, Traced};
use crate::flow::now_ns;
use crate::maps::{IDENTITIES, TRACE, TRACE_EVENTS, TRACES};
use crate::packet::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, ifindex};

/// Whether anybody traces.
#[inline(always)]
pub fn active() -> bool {
    TRACE.get(0).is_some_and(|state| state.active != 0)
}

/// At the beginning of a program: whether the packet is traced. `network` is the place of its IP header.
#[inline(always)]
pub fn enter(ctx: &TcContext, network: usize, hook: TraceHook) {
    if active() {
        look(ctx.skb.skb, network as u32, hook as u32);
    }
}

#[inline(never)]
fn look(skb: *mut __sk_buff, network: u32, hook: u32) {
    let ctx = TcContext::new(skb);
    let Some(scratch) = connection::scratch() else { return };
    let traced = &mut scratch.traced;
    traced.hook = 0;
    let ethertype = match ctx.load::<u8>(network as usize).map(|first| first >> 4) {
        Ok(4) => ETHERTYPE_IPV4,
        Ok(6) => ETHERTYPE_IPV6,
        _ => return,
    };
    if !connection::parse(&ctx, &mut traced.packet, network, ethertype) || !is_marked(traced) {
        return;
    }
    traced.hook = hook;
    traced.bytes = ctx.len();
    traced.sender = identity(&traced.packet.key.source);
    traced.receiver = identity(&traced.packet.key.destination);
    traced.chosen = Address::UNSPECIFIED;
    traced.chosen_port_be = 0;
    traced.decided[0] = (TraceKind::Seen as u32) << 24;
    traced.count = 1;
    scratch.asked = Asked { egress: 0, ingress: 0, egress_rule: 0, ingress_rule: 0 };
}

#[inline(always)]
fn is_marked(traced: &mut Traced) -> bool {
    let ends = traced.packet.key;
    traced.key = TraceKey::end(ends.source, ends.source_port_be, ends.protocol);
    if is_known(&traced.key) {
        return true;
    }
    traced.key = TraceKey::end(ends.destination, ends.destination_port_be, ends.protocol);
    is_known(&traced.key)
}

#[inline(always)]
fn is_known(key: &TraceKey) -> bool {
    // SAFETY: only its presence matters.
    unsafe { TRACES.get(key) }.is_some()
}

#[inline(always)]
fn identity(address: &Address) -> u32 {
    // SAFETY: the value is copied.
    unsafe { IDENTITIES.get(address) }.copied().unwrap_or_default()
}

/// Notes a decision about the packet that the program has begun with. It is told when the program ends: so the verifier, which
/// follows every way to every decision, has little to follow from there.
#[inline(always)]
pub fn decided(kind: TraceKind, decision: u32) {
    if active() {
        note((kind as u32) << 24 | decision);
    }
}

#[inline(never)]
fn note(decision: u32) {
    let Some(scratch) = connection::scratch() else { return };
    let traced = &mut scratch.traced;
    // One too many takes the place of an early one: less to verify than a comparison.
    let place = traced.count;
    traced.decided[(place & (Traced::DECISIONS - 1)) as usize] = decision;
    traced.count = place + 1;
}

/// What policies have answered.
#[inline(always)]
pub fn after_policy(verdict: Result<(), Reason>) {
    decided(
        TraceKind::Policy,
        match verdict {
            Ok(()) => TraceKind::ALLOWED,
            Err(reason) => reason as u32,
        },
    );
}

/// Which backend a client outside was given.
#[inline(always)]
pub fn chosen(backend: &Address, port_be: u16) {
    if active()
        && let Some(scratch) = connection::scratch()
    {
        scratch.traced.chosen = *backend;
        scratch.traced.chosen_port_be = u32::from(port_be);
        note((TraceKind::Chosen as u32) << 24);
    }
}

/// At the end of a program: tells what it has decided.
#[inline(always)]
pub fn leave(ctx: &TcContext) {
    if active() {
        tell(ctx.skb.skb);
    }
}

#[inline(never)]
fn tell(skb: *mut __sk_buff) {
    let ifindex = ifindex(&TcContext::new(skb));
    let Some(scratch) = connection::scratch() else { return };
    let (traced, asked) = (&scratch.traced, &scratch.asked);
    if traced.hook == 0 {
        return;
    }
    let time_ns = now_ns();
    let ends = &traced.packet.key;
    for place in 0..Traced::DECISIONS {
        if place >= traced.count {
            return;
        }
        let decided = traced.decided[place as usize];
        let Some(mut entry) = TRACE_EVENTS.reserve::<TraceEvent>(0) else { return };
        let event = entry.as_mut_ptr();
        // SAFETY: room for one event, which is filled as a whole before it is read.
        unsafe {
            *event = TraceEvent::default();
            (*event).time_ns = time_ns;
            (*event).source = ends.source;
            (*event).destination = ends.destination;
            (*event).chosen = traced.chosen;
            (*event).source_port_be = ends.source_port_be;
            (*event).destination_port_be = ends.destination_port_be;
            (*event).chosen_port_be = traced.chosen_port_be as u16;
            (*event).protocol = ends.protocol;
            (*event).hook = traced.hook as u8;
            (*event).kind = decided >> 24;
            (*event).decision = decided & 0x00ff_ffff;
            (*event).ifindex = ifindex;
            (*event).bytes = traced.bytes;
            (*event).egress = asked.egress;
            (*event).ingress = asked.ingress;
            (*event).egress_rule = asked.egress_rule;
            (*event).ingress_rule = asked.ingress_rule;
            (*event).sender = traced.sender;
            (*event).receiver = traced.receiver;
        }
        entry.submit(0);
    }
}

/// Tells what the socket hook has made of an address: of a service and the backend that it chose, if it has one.
#[inline(always)]
pub fn hooked(
    ctx: &SockAddrContext,
    protocol: u8,
    asked: &Slot,
    service: &Service,
    backend: Option<&Slot>,
) {
    if active() {
        let none = Slot::default();
        let (kind, chosen) = match backend {
            Some(backend) => (TraceKind::Chosen, backend),
            None => (TraceKind::Refused, &none),
        };
        socket(ctx, kind as u32 | u32::from(protocol) << 16, asked, chosen, service);
    }
}

/// Tells that the address is none of a service.
#[inline(always)]
pub fn straight(ctx: &SockAddrContext, protocol: u8, asked: &Slot) {
    if active() {
        let kind = TraceKind::Straight as u32 | u32::from(protocol) << 16;
        socket(ctx, kind, asked, &Slot::default(), &Service::default());
    }
}

#[inline(never)]
fn socket(
    ctx: &SockAddrContext,
    kind_and_protocol: u32,
    asked: &Slot,
    chosen: &Slot,
    service: &Service,
) -> u32 {
    // SAFETY: a valid context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    if !is_known(&TraceKey::socket(cookie)) {
        return 0;
    }
    let Some(mut entry) = TRACE_EVENTS.reserve::<TraceEvent>(0) else { return 0 };
    let event = entry.as_mut_ptr();
    // SAFETY: as in `tell`.
    unsafe {
        *event = TraceEvent::default();
        (*event).time_ns = now_ns();
        (*event).socket = cookie;
        (*event).destination = asked.address;
        (*event).destination_port_be = asked.port_be;
        (*event).chosen = chosen.address;
        (*event).chosen_port_be = chosen.port_be;
        (*event).protocol = (kind_and_protocol >> 16) as u8;
        (*event).hook = TraceHook::Socket as u8;
        (*event).kind = kind_and_protocol & 0xffff;
        (*event).egress = service.count;
        (*event).ingress = service.affinity_secs;
    }
    entry.submit(0);
    1
}

/// Tells that the kernel drops a packet, if it is a traced one: whatever the rate of others.
#[inline(always)]
pub fn kernel_dropped(flow: &FlowEvent) {
    if active() {
        dropped(flow);
    }
}

#[inline(never)]
fn dropped(flow: &FlowEvent) -> u32 {
    let key = TraceKey::end(flow.source, flow.source_port_be, flow.protocol);
    let back = TraceKey::end(flow.destination, flow.destination_port_be, flow.protocol);
    if !is_known(&key) && !is_known(&back) {
        return 0;
    }
    let Some(mut entry) = TRACE_EVENTS.reserve::<TraceEvent>(0) else { return 0 };
    let event = entry.as_mut_ptr();
    // SAFETY: as in `tell`.
    unsafe {
        *event = TraceEvent::default();
        (*event).time_ns = flow.time_ns;
        (*event).source = flow.source;
        (*event).destination = flow.destination;
        (*event).source_port_be = flow.source_port_be;
        (*event).destination_port_be = flow.destination_port_be;
        (*event).protocol = flow.protocol;
        (*event).hook = TraceHook::Kernel as u8;
        (*event).kind = TraceKind::KernelDrop as u32;
        (*event).decision = flow.reason;
        (*event).ifindex = flow.ifindex;
        (*event).sender = identity(&flow.source);
        (*event).receiver = identity(&flow.destination);
    }
    entry.submit(0);
    1
}
