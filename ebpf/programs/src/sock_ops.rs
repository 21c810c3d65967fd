//! The life of TCP sockets: established, ended, or never established.
//!
//! Two sockets of this node that speak to each other are one connection, and who opened it tells all that there is to tell. The
//! other one finds out by the opener's place in `FLOW_SLOTS`, which both can name; it asks for no more calls then.

mod slot;

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
use slot::Ends;

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
    match field!(ctx, op) {
        BPF_SOCK_OPS_TCP_CONNECT_CB if is_wanted() => watch(ctx, &ends(ctx), true),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB if is_wanted() => opened(ctx, &ends(ctx), true),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB if is_wanted() => accepted(ctx),
        // Only the way into the last state counts.
        BPF_SOCK_OPS_STATE_CB if field!(ctx, __bindgen_anon_1.args[1]) == CLOSE => closed(ctx),
        _ => {}
    }
}

#[inline(always)]
fn is_wanted() -> bool {
    wanted(FlowConfig::CONNECTIONS).is_some()
}

/// Asks to be called when the state of the socket changes, and remembers who opened it, and when.
#[inline(always)]
fn watch(ctx: &SockOpsContext, ends: &Ends, active: bool) {
    // SAFETY: a valid context. On failure its end is not told.
    let _ = unsafe { bpf_sock_ops_cb_flags_set(ctx.ops, BPF_SOCK_OPS_STATE_CB_FLAG as i32) };
    let since_ns = now_ns();
    if slot::take(ends, active, since_ns) {
        return;
    }
    let mut first = FlowSocket { since_ns, active: active.into(), ..FlowSocket::default() };
    if let Some(stored) = storage(ctx, from_ref(&FLOW_SOCKETS), Some(&mut first)) {
        // SAFETY: the storage belongs to the socket of this call, which is locked.
        unsafe { *stored = first };
    }
}

#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    let ends = ends(ctx);
    if !slot::is_told_by_opener(&ends) {
        watch(ctx, &ends, false);
        opened(ctx, &ends, false);
    }
}

#[inline(always)]
fn opened(ctx: &SockOpsContext, ends: &Ends, active: bool) {
    tell(|event| {
        describe(ctx, ends, FlowKind::Opened, active, event);
        add_service(ctx, event);
    });
}

/// What is remembered of a connection until its end.
struct Watched {
    since_ns: u64,
    active: bool,
    /// Room for a word, of this socket alone.
    room: *mut u64,
}

#[inline(always)]
fn closed(ctx: &SockOpsContext) {
    let ends = ends(ctx);
    if let Some(stored) = storage::<_, FlowSocket>(ctx, from_ref(&FLOW_SOCKETS), None) {
        // SAFETY: the storage belongs to the socket of this call, which is locked.
        let stored = unsafe { &mut *stored };
        if stored.since_ns != 0 {
            let (since_ns, active) = (stored.since_ns, stored.active != 0);
            ended(ctx, &ends, &Watched { since_ns, active, room: &raw mut stored.kernel_address });
            // The socket may be connected again.
            stored.since_ns = 0;
            return;
        }
    }
    let Some(slot) = slot::find(&ends) else { return };
    // SAFETY: a place of the map that this socket has taken, aligned.
    let watched = unsafe {
        let room = &raw mut (*slot).since_ns;
        Watched { since_ns: room.read_volatile(), active: slot::is_active(slot), room }
    };
    ended(ctx, &ends, &watched);
    slot::free(slot);
}

#[inline(always)]
fn ended(ctx: &SockOpsContext, ends: &Ends, watched: &Watched) {
    let Some(config) = wanted(FlowConfig::CONNECTIONS) else { return };
    let before = field!(ctx, __bindgen_anon_1.args[0]);
    let kind = if before == SYN_SENT { FlowKind::Failed } else { FlowKind::Closed };
    let hidden = hidden(ctx, config, before, watched.room);
    // The kernel counts the beginning and the end of a stream as a byte each.
    let beginning = u64::from(watched.active);
    let end = u64::from(matches!(before, FIN_WAIT2 | TIME_WAIT | LAST_ACK | CLOSING));
    tell(|event| {
        describe(ctx, ends, kind, watched.active, event);
        event.end = self::end(before, hidden.error) as u8;
        event.duration_ns = event.time_ns.wrapping_sub(watched.since_ns);
        event.sent_bytes = field!(ctx, bytes_acked).saturating_sub(beginning + end);
        event.received_bytes = field!(ctx, bytes_received).saturating_sub(hidden.their_end.into());
        // The kernel keeps it in eighths.
        event.rtt_us = field!(ctx, srtt_us) >> 3;
        event.retransmits = field!(ctx, total_retrans);
        add_service(ctx, event);
    });
}

#[inline(always)]
fn describe(
    ctx: &SockOpsContext,
    ends: &Ends,
    kind: FlowKind,
    active: bool,
    event: &mut FlowEvent,
) {
    event.time_ns = now_ns();
    // SAFETY: a valid context.
    (event.socket, event.netns) =
        unsafe { (bpf_get_socket_cookie(ctx.as_ptr()), bpf_get_netns_cookie(ctx.as_ptr())) };
    let (direction, source, destination) = if active {
        (FlowDirection::Egress, &ends.local, &ends.remote)
    } else {
        (FlowDirection::Ingress, &ends.remote, &ends.local)
    };
    (event.source, event.source_port_be) = *source;
    (event.destination, event.destination_port_be) = *destination;
    (event.protocol, event.kind, event.direction) = (IPPROTO_TCP, kind as u8, direction as u8);
}

#[inline(always)]
fn ends(ctx: &SockOpsContext) -> Ends {
    let (local, remote) = addresses(ctx);
    let local_port_be = (field!(ctx, local_port) as u16).to_be();
    // The kernel gives it in network order, in the upper half of the word.
    let remote_port_be = (field!(ctx, remote_port) >> 16) as u16;
    Ends { local: (local, local_port_be), remote: (remote, remote_port_be) }
}

/// Reads those of both families, whichever it is: of branches that differ in the field only, the compiler makes one with an address
/// that it calculates, which the verifier refuses.
#[inline(always)]
fn addresses(ctx: &SockOpsContext) -> (Address, Address) {
    let (local_v4, remote_v4) = (field!(ctx, local_ip4), field!(ctx, remote_ip4));
    let local_v6 = [
        field!(ctx, local_ip6[0]),
        field!(ctx, local_ip6[1]),
        field!(ctx, local_ip6[2]),
        field!(ctx, local_ip6[3]),
    ];
    let remote_v6 = [
        field!(ctx, remote_ip6[0]),
        field!(ctx, remote_ip6[1]),
        field!(ctx, remote_ip6[2]),
        field!(ctx, remote_ip6[3]),
    ];
    if field!(ctx, family) == AF_INET {
        (Address::v4(local_v4), Address::v4(remote_v4))
    } else {
        (Address { words: local_v6 }, Address { words: remote_v6 })
    }
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
fn hidden(ctx: &SockOpsContext, config: &FlowConfig, before: u32, room: *mut u64) -> Hidden {
    let guessed = matches!(before, TIME_WAIT | CLOSE_WAIT | LAST_ACK | CLOSING);
    if config.sock_err == 0 || config.sock_flags == 0 {
        return Hidden { error: None, their_end: guessed };
    }
    let socket = field!(ctx, __bindgen_anon_2.sk);
    // SAFETY: the address goes through memory, because the verifier forbids to calculate with a pointer to a socket. What is
    // read by it is checked by the helper.
    unsafe {
        room.cast::<*mut bpf_sock>().write_volatile(socket);
        let socket = room.read_volatile();
        room.write_volatile(0);
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
