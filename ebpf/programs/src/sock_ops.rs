//! The life of TCP sockets: established, ended, or never established.

use core::ptr::from_ref;

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{
    BPF_SK_STORAGE_GET_F_CREATE, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB,
    BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
    BPF_SOCK_OPS_TCP_CONNECT_CB, bpf_sock,
};
use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::helpers::generated::{
    bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sk_storage_get, bpf_sock_ops_cb_flags_set,
};
use aya_ebpf::programs::SockOpsContext;
use mesh_abi::{
    Address, FlowConfig, FlowDirection, FlowEnd, FlowEvent, FlowKind, FlowSocket, Peer,
};

use crate::flow::{now_ns, tell, wanted};
use crate::maps::{FLOW_SOCKETS, PEERS};
use crate::packet::IPPROTO_TCP;

const AF_INET: u32 = 2;

// States of a socket, linux/tcp_states.h.
const SYN_SENT: u32 = 2;
const FIN_WAIT2: u32 = 5;
const TIME_WAIT: u32 = 6;
const CLOSE: u32 = 7;
const CLOSE_WAIT: u32 = 8;
const LAST_ACK: u32 = 9;
const CLOSING: u32 = 11;

/// Flag of a socket whose other side has ended its stream, net/sock.h.
const SOCK_DONE: u64 = 1 << 1;

/// A field of the context. The verifier takes loads of whole fields only, and the compiler would merge them.
macro_rules! field {
    ($ctx:expr, $($name:tt)+) => {
        // SAFETY: the kernel hands a valid context to the program.
        unsafe { (&raw const (*$ctx.ops).$($name)+).read_volatile() }
    };
}

pub fn run(ctx: &SockOpsContext) {
    let op = field!(ctx, op);
    let known = [
        BPF_SOCK_OPS_TCP_CONNECT_CB,
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB,
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
        BPF_SOCK_OPS_STATE_CB,
    ];
    if !known.contains(&op) {
        return;
    }
    let Some(config) = wanted(FlowConfig::CONNECTIONS) else { return };
    match op {
        BPF_SOCK_OPS_TCP_CONNECT_CB => watch(ctx, true),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => opened(ctx, true),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => {
            watch(ctx, false);
            opened(ctx, false);
        }
        _ => changed(ctx, config),
    }
}

/// Asks to be called when the state of the socket changes, and remembers who opened it, and when.
#[inline(always)]
fn watch(ctx: &SockOpsContext, active: bool) {
    // SAFETY: a valid context. On failure its end is not told.
    let _ = unsafe { bpf_sock_ops_cb_flags_set(ctx.ops, BPF_SOCK_OPS_STATE_CB_FLAG as i32) };
    let mut first =
        FlowSocket { since_ns: now_ns(), active: active.into(), ..FlowSocket::default() };
    if let Some(stored) = storage(ctx, from_ref(&FLOW_SOCKETS), Some(&mut first)) {
        // SAFETY: the storage belongs to the socket of this call, which is locked.
        unsafe { *stored = first };
    }
}

#[inline(always)]
fn opened(ctx: &SockOpsContext, active: bool) {
    let mut event = event(ctx, FlowKind::Opened, active);
    add_service(ctx, &mut event);
    tell(&event);
}

/// Only the way into the last state counts.
#[inline(always)]
fn changed(ctx: &SockOpsContext, config: &FlowConfig) {
    let before = field!(ctx, __bindgen_anon_1.args[0]);
    let after = field!(ctx, __bindgen_anon_1.args[1]);
    if after != CLOSE {
        return;
    }
    let Some(stored) = storage::<_, FlowSocket>(ctx, from_ref(&FLOW_SOCKETS), None) else { return };
    // SAFETY: the storage belongs to the socket of this call, which is locked.
    let stored = unsafe { &mut *stored };
    let kind = if before == SYN_SENT { FlowKind::Failed } else { FlowKind::Closed };
    let mut event = event(ctx, kind, stored.active != 0);
    let hidden = hidden(ctx, config, before, stored);
    event.end = end(before, hidden.error) as u8;
    event.duration_ns = event.time_ns.wrapping_sub(stored.since_ns);
    // The kernel counts the beginning and the end of a stream as a byte each.
    let beginning = u64::from(stored.active);
    let end = u64::from(matches!(before, FIN_WAIT2 | TIME_WAIT | LAST_ACK | CLOSING));
    event.sent_bytes = field!(ctx, bytes_acked).saturating_sub(beginning + end);
    event.received_bytes = field!(ctx, bytes_received).saturating_sub(hidden.their_end.into());
    // The kernel keeps it in eighths.
    event.rtt_us = field!(ctx, srtt_us) >> 3;
    event.retransmits = field!(ctx, total_retrans);
    add_service(ctx, &mut event);
    tell(&event);
}

#[inline(always)]
fn event(ctx: &SockOpsContext, kind: FlowKind, active: bool) -> FlowEvent {
    let (local, remote) = addresses(ctx);
    let local_port_be = (field!(ctx, local_port) as u16).to_be();
    // The kernel gives it in network order, in the upper half of the word.
    let remote_port_be = (field!(ctx, remote_port) >> 16) as u16;
    let (direction, source, destination) = if active {
        (FlowDirection::Egress, (local, local_port_be), (remote, remote_port_be))
    } else {
        (FlowDirection::Ingress, (remote, remote_port_be), (local, local_port_be))
    };
    // SAFETY: a valid context.
    let (socket, netns) =
        unsafe { (bpf_get_socket_cookie(ctx.as_ptr()), bpf_get_netns_cookie(ctx.as_ptr())) };
    FlowEvent {
        time_ns: now_ns(),
        netns,
        socket,
        source: source.0,
        source_port_be: source.1,
        destination: destination.0,
        destination_port_be: destination.1,
        protocol: IPPROTO_TCP,
        kind: kind as u8,
        direction: direction as u8,
        ..FlowEvent::default()
    }
}

#[inline(always)]
fn addresses(ctx: &SockOpsContext) -> (Address, Address) {
    if field!(ctx, family) == AF_INET {
        return (Address::v4(field!(ctx, local_ip4)), Address::v4(field!(ctx, remote_ip4)));
    }
    let local = [
        field!(ctx, local_ip6[0]),
        field!(ctx, local_ip6[1]),
        field!(ctx, local_ip6[2]),
        field!(ctx, local_ip6[3]),
    ];
    let remote = [
        field!(ctx, remote_ip6[0]),
        field!(ctx, remote_ip6[1]),
        field!(ctx, remote_ip6[2]),
        field!(ctx, remote_ip6[3]),
    ];
    (Address { words: local }, Address { words: remote })
}

/// The service that the connect hook has translated.
#[inline(always)]
fn add_service(ctx: &SockOpsContext, event: &mut FlowEvent) {
    if let Some(peer) = storage::<_, Peer>(ctx, from_ref(&PEERS), None) {
        // SAFETY: the storage belongs to the socket of this call, which is locked.
        let peer = unsafe { &*peer };
        if peer.backend == event.destination && peer.backend_port_be == event.destination_port_be {
            event.service = peer.vip;
            event.service_port_be = peer.vip_port_be;
        }
    }
}

/// A value in the storage of the socket; made when there is none and a first one is given.
#[inline(always)]
fn storage<M, T>(ctx: &SockOpsContext, map: *const M, first: Option<&mut T>) -> Option<*mut T> {
    let (value, flags) = match first {
        Some(first) => ((&raw mut *first).cast(), u64::from(BPF_SK_STORAGE_GET_F_CREATE)),
        None => (core::ptr::null_mut(), 0),
    };
    let socket = field!(ctx, __bindgen_anon_2.sk);
    if socket.is_null() {
        return None;
    }
    // SAFETY: a socket that the kernel gave, a map of socket storage with values of type T, and null or such a value.
    let stored = unsafe { bpf_sk_storage_get(map.cast_mut().cast(), socket.cast(), value, flags) };
    (!stored.is_null()).then_some(stored.cast())
}

/// What no field of the context tells.
struct Hidden {
    /// What the kernel tells the application: an errno, 0 for none.
    error: Option<i32>,
    /// Whether the other side has said that it sends nothing more.
    their_end: bool,
}

#[inline(always)]
fn hidden(
    ctx: &SockOpsContext,
    config: &FlowConfig,
    before: u32,
    stored: &mut FlowSocket,
) -> Hidden {
    let guessed = matches!(before, TIME_WAIT | CLOSE_WAIT | LAST_ACK | CLOSING);
    if config.sock_err == 0 || config.sock_flags == 0 {
        return Hidden { error: None, their_end: guessed };
    }
    let socket = field!(ctx, __bindgen_anon_2.sk);
    let place = &raw mut stored.kernel_address;
    // SAFETY: the address goes through memory, because the verifier forbids to calculate with a pointer to a socket. What is
    // read by it is checked by the helper.
    unsafe {
        place.cast::<*mut bpf_sock>().write_volatile(socket);
        let socket = place.read_volatile();
        place.write_volatile(0);
        let flags = bpf_probe_read_kernel((socket + u64::from(config.sock_flags)) as *const u64);
        Hidden {
            error: bpf_probe_read_kernel((socket + u64::from(config.sock_err)) as *const i32).ok(),
            their_end: flags.map_or(guessed, |flags| flags & SOCK_DONE != 0),
        }
    }
}

const fn end(before: u32, error: Option<i32>) -> FlowEnd {
    match error {
        Some(104 | 32) => FlowEnd::Reset,
        Some(111) => FlowEnd::Refused,
        Some(110) => FlowEnd::TimedOut,
        Some(100 | 101 | 112 | 113) => FlowEnd::Unreachable,
        // Both sides have said that they are done, or the kernel waits for the rest without this socket.
        Some(0) | None if matches!(before, FIN_WAIT2 | TIME_WAIT | LAST_ACK | CLOSING) => {
            FlowEnd::Finished
        }
        Some(0) => FlowEnd::Aborted,
        _ => FlowEnd::Unknown,
    }
}
