//! Telling user space what happens to connections and packets.
//!
//! Packets are told at a limited rate, so that whoever sends what is forbidden buys nothing; counters stay exact. Nothing here
//! changes a verdict, and a full ring costs events only.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{
    __sk_buff, BPF_NOEXIST, BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP,
};
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_ns};
use aya_ebpf::programs::{SockAddrContext, TcContext};
use mesh_abi::flow::WAKE_BYTES;
use mesh_abi::{
    Address, DatagramKey, FlowConfig, FlowCounter, FlowDirection, FlowEvent, FlowKind, FlowLimit,
    FlowLimitKey, FlowSocket, Reason,
};

use crate::atomic;
use crate::maps::{DATAGRAMS, FLOW_CONFIG, FLOW_COUNTERS, FLOW_LIMITS, FLOW_SOCKETS, FLOWS};
use crate::packet::{IPPROTO_UDP, Ipv4, Ipv6, has_ports, ifindex};

/// After so long without a change of destination, the same one is told again when the socket comes back to it.
const FORGET_NS: u64 = 60 * SECOND_NS;
const SECOND_NS: u64 = 1_000_000_000;
/// What may be put into the ring at the same time by others while one looks how full it is.
const AT_ONCE_BYTES: u64 = 4096;

/// Tells that one of our programs drops the packet, whose IP header begins at `network` if it has one.
#[inline(always)]
pub fn dropped(ctx: &TcContext, network: usize, reason: Reason) {
    // Every pod sends that, and nobody misses it.
    if reason as u32 == Reason::Noise as u32 {
        return;
    }
    if wanted(FlowConfig::DROPS).is_some() {
        let kind = kind_and_direction(FlowKind::Dropped, FlowDirection::Forward);
        packet(ctx.skb.skb, network as u32, kind, reason as u32);
    }
}

/// A service address, with its port in network order.
pub type Asked = Option<(Address, u16)>;

/// As [`datagram`], when a datagram socket is connected. What becomes of a stream `sock_ops` tells.
#[inline(always)]
pub fn connected(
    ctx: &SockAddrContext,
    protocol: u8,
    destination: Address,
    port_be: u16,
    asked: Asked,
) {
    if protocol == IPPROTO_UDP {
        datagram(ctx, destination, port_be, asked);
    }
}

/// Tells the first datagram of a socket to a destination. One that stays with its destination costs two look-ups.
#[inline(always)]
pub fn datagram(ctx: &SockAddrContext, destination: Address, port_be: u16, asked: Asked) {
    if wanted(FlowConfig::CONNECTIONS).is_none() {
        return;
    }
    let mut first = FlowSocket::default();
    // SAFETY: the storage belongs to the socket of this call. Threads that send on one socket at the same time may tell twice.
    let known = unsafe { FLOW_SOCKETS.get_or_insert_ptr_mut(ctx, Some(&mut first)) };
    if known.is_null() {
        return;
    }
    // SAFETY: not null, and valid while the program runs.
    let known = unsafe { &mut *known };
    if known.port_be == port_be && known.address == destination {
        return;
    }
    known.address = destination;
    known.port_be = port_be;
    let time_ns = now_ns();
    // SAFETY: a valid context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let key = DatagramKey { cookie, address: destination, port_be, pad: [0; 3] };
    // SAFETY: the value is copied.
    let last = unsafe { DATAGRAMS.get(&key) }.copied();
    if last.is_some_and(|last| time_ns.wrapping_sub(last) < FORGET_NS) {
        return;
    }
    let _ = DATAGRAMS.insert(&key, &time_ns, 0);
    let mut event = from_socket(ctx, FlowKind::Datagram, IPPROTO_UDP, destination, port_be);
    if let Some((service, service_port_be)) = asked {
        event.service = service;
        event.service_port_be = service_port_be;
    }
    tell_within_rate(&mut event, cookie as u32);
}

/// Tells that a service has no backend.
#[inline(always)]
pub fn refused(ctx: &SockAddrContext, protocol: u8, service: Address, port_be: u16) {
    if wanted(FlowConfig::CONNECTIONS).is_none() {
        return;
    }
    let mut event = from_socket(ctx, FlowKind::Refused, protocol, service, port_be);
    event.service = service;
    event.service_port_be = port_be;
    tell_within_rate(&mut event, 0);
}

#[inline(always)]
fn from_socket(
    ctx: &SockAddrContext,
    kind: FlowKind,
    protocol: u8,
    destination: Address,
    port_be: u16,
) -> FlowEvent {
    // SAFETY: a valid context.
    let (socket, netns) =
        unsafe { (bpf_get_socket_cookie(ctx.as_ptr()), bpf_get_netns_cookie(ctx.as_ptr())) };
    FlowEvent {
        time_ns: now_ns(),
        netns,
        socket,
        destination,
        destination_port_be: port_be,
        protocol,
        kind: kind as u8,
        direction: FlowDirection::Egress as u8,
        ..FlowEvent::default()
    }
}

#[inline(always)]
fn tell_within_rate(event: &mut FlowEvent, of: u32) {
    let Some(config) = FLOW_CONFIG.get(0) else { return };
    let (kind, netns) = (u32::from(event.kind), event.netns);
    let key = FlowLimitKey { kind, reason: 0, netns, ifindex: of, pad: 0 };
    if let Some(unreported) = within_rate(&key, event.time_ns, config.rate_per_sec) {
        event.unreported = unreported;
        tell(|told| *told = *event);
    }
}

/// The configuration, if somebody wants such events.
#[inline(always)]
pub fn wanted(flag: u32) -> Option<&'static FlowConfig> {
    FLOW_CONFIG.get(0).filter(|config| config.flags & flag != 0)
}

#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_ktime_get_ns() }
}

/// Puts an event into the ring, written where it stays: it is zero before.
#[inline(always)]
pub fn tell(write: impl FnOnce(&mut FlowEvent)) {
    let Some(mut entry) = FLOWS.reserve::<FlowEvent>(0) else { return count(FlowCounter::Lost) };
    let event = entry.as_mut_ptr();
    // SAFETY: room for one event, which is filled as a whole before anything is read of it.
    let event = unsafe {
        *event = FlowEvent::default();
        &mut *event
    };
    write(event);
    entry.submit(urgency());
    count(FlowCounter::Told);
}

/// The reader comes by its own clock. To wake it costs more than the event, so that is done only when the ring fills, and once
/// for many events: by those alone that pass the mark.
#[inline(always)]
fn urgency() -> u64 {
    let waiting = FLOWS.query(BPF_RB_AVAIL_DATA.into());
    if waiting.wrapping_sub(WAKE_BYTES.into()) < AT_ONCE_BYTES {
        return BPF_RB_FORCE_WAKEUP.into();
    }
    BPF_RB_NO_WAKEUP.into()
}

#[inline(always)]
fn count(counter: FlowCounter) {
    if let Some(counter) = FLOW_COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: a value of the map, aligned, and changed by such additions only: a program that interrupts this one on its CPU
        // costs no count.
        unsafe { atomic::increment(counter) };
    }
}

/// How many like it were held back since the last one that was told; nothing when this one is held back too.
#[inline(always)]
pub fn within_rate(key: &FlowLimitKey, now_ns: u64, rate_per_sec: u32) -> Option<u32> {
    let Some(limit) = FLOW_LIMITS.get_ptr_mut(key) else {
        let first = FlowLimit { since_ns: now_ns, told: 1, unreported: 0 };
        // Not in the place of what another CPU has begun.
        let _ = FLOW_LIMITS.insert(key, &first, BPF_NOEXIST.into());
        return Some(0);
    };
    // SAFETY: the value stays valid while the program runs. CPUs that race may tell a few more; what they hold back is added and
    // taken in one step each, so that none is counted twice or not at all.
    unsafe {
        let unreported = &raw mut (*limit).unreported;
        if now_ns.wrapping_sub((*limit).since_ns) >= SECOND_NS {
            (*limit).since_ns = now_ns;
            (*limit).told = 0;
        }
        if (*limit).told >= rate_per_sec {
            atomic::increment_word(unreported);
            count(FlowCounter::Limited);
            return None;
        }
        (*limit).told += 1;
        Some(if unreported.read_volatile() == 0 { 0 } else { atomic::take_word(unreported) })
    }
}

/// A program's functions take five words at most.
const fn kind_and_direction(kind: FlowKind, direction: FlowDirection) -> u32 {
    (kind as u32) << 8 | direction as u32
}

/// One function for all callers: the verifier looks at it apart from each of them.
#[inline(never)]
fn packet(skb: *mut __sk_buff, network: u32, kind_and_direction: u32, reason: u32) {
    let ctx = TcContext::new(skb);
    let Some(config) = FLOW_CONFIG.get(0) else { return };
    let kind = kind_and_direction >> 8;
    let ifindex = ifindex(&ctx);
    let time_ns = now_ns();
    let key = FlowLimitKey { kind, reason, netns: 0, ifindex, pad: 0 };
    let Some(unreported) = within_rate(&key, time_ns, config.rate_per_sec) else { return };
    tell(|event| {
        event.time_ns = time_ns;
        event.kind = kind as u8;
        event.direction = kind_and_direction as u8;
        event.reason = reason;
        event.ifindex = ifindex;
        event.unreported = unreported;
        read_headers(&ctx, network as usize, event);
    });
}

/// Addresses, protocol and ports, as far as they can be read.
#[inline(always)]
fn read_headers(ctx: &TcContext, network: usize, event: &mut FlowEvent) {
    let Ok(first) = ctx.load::<u8>(network) else { return };
    let transport = match first >> 4 {
        4 => {
            let Ok(header) = ctx.load::<Ipv4>(network) else { return };
            event.source = Address::v4(header.source);
            event.destination = Address::v4(header.destination);
            event.protocol = header.protocol;
            let Some(bytes) = header.header_bytes() else { return };
            if !header.has_transport_header() {
                return;
            }
            network + bytes
        }
        6 => {
            let Ok(header) = ctx.load::<Ipv6>(network) else { return };
            event.source = header.source;
            event.destination = header.destination;
            event.protocol = header.next;
            network + 40
        }
        _ => return,
    };
    if has_ports(event.protocol)
        && let Ok([source, destination]) = ctx.load::<[u16; 2]>(transport)
    {
        event.source_port_be = source;
        event.destination_port_be = destination;
    }
}
