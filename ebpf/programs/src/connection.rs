//! Which connection a packet belongs to, and what is remembered about it.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::{bpf_ktime_get_coarse_ns, bpf_skb_load_bytes};
use aya_ebpf::maps::LruHashMap;
use aya_ebpf::programs::TcContext;
use mesh_abi::policy::THIS_NODE;
use mesh_abi::{Address, Connection, ConnectionKey, ConnectionState, LocalPod, PieceKey, TraceKey};

use crate::maps::{BEGINNINGS, CONNECTIONS, FRAGMENTS, IDENTITIES, SCRATCH};
use crate::packet::{
    ETHERTYPE_IPV4, ETHERTYPE_IPV6, IPPROTO_FRAGMENT, IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_SCTP,
    IPPROTO_TCP, IPPROTO_UDP, Ipv4, Ipv6,
};
use crate::policy::{Permission, Question};

/// Begins a connection: TCP's SYN, SCTP's INIT.
pub const SYN: u32 = 1;
/// Answers the beginning: TCP's SYN with ACK, SCTP's INIT ACK.
pub const SYN_ACK: u32 = 2;
/// This side is done: TCP's FIN, SCTP's SHUTDOWN and its ACK.
pub const FIN: u32 = 4;
/// Over: TCP's RST, SCTP's ABORT and SHUTDOWN COMPLETE.
pub const RST: u32 = 8;
/// ICMP: says that something about another packet is wrong.
pub const ICMP_ERROR: u32 = 16;
/// Has a transport header, and more fragments follow.
pub const FIRST_FRAGMENT: u32 = 32;
/// Has no transport header.
pub const LATER_FRAGMENT: u32 = 64;
/// ICMP: answers an echo request.
pub const ECHO_REPLY: u32 = 128;

/// Longest time between the fragments of one packet, in seconds.
const FRAGMENT_SECS: u32 = 30;
/// Ports that clients are given begin here on Linux (`net.ipv4.ip_local_port_range`).
const FIRST_EPHEMERAL: u16 = 32_768;

/// What the headers of a packet say. It lies in a map: what the verifier does not know, it need not tell apart.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Packet {
    /// As if this packet were the first of its connection.
    pub key: ConnectionKey,
    /// Any of the constants above.
    pub flags: u32,
    /// Where the transport header is.
    pub transport: u32,
    /// Identification of a fragment.
    pub fragment: u32,
    /// Zero.
    pub pad: u32,
    /// Its IP header as it was found, in the one form or the other: too large for what is left of the stack here.
    header_v4: Ipv4,
    header_v6: Ipv6,
}

/// Room for one packet; of the CPU's own.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Scratch {
    /// The packet.
    pub packet: Packet,
    /// The packet that an ICMP error quotes.
    pub quoted: Packet,
    /// The connection, as the side would have begun it that did not send this packet.
    pub reversed: ConnectionKey,
    /// The connection, as it was begun.
    pub key: ConnectionKey,
    /// What is remembered about it.
    pub entry: Connection,
    /// The fragment.
    pub fragment: PieceKey,
    /// Where a pod's packet goes.
    pub destination: Address,
    /// The pod of this node that gets it; device 0 when none does.
    pub receiver: LocalPod,
    /// What a policy is asked now, and what it allows.
    pub question: Question,
    /// What is remembered of the answer.
    pub permission: Permission,
    /// What the policies were asked, and which rules answered.
    pub asked: Asked,
    /// The packet that is traced.
    pub traced: Traced,
}

/// What the policies were asked.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Asked {
    /// The policy for what the side sends that began.
    pub egress: u32,
    /// The policy for what the other side receives.
    pub ingress: u32,
    /// The rule that let it out; 0 when it was not asked.
    pub egress_rule: u32,
    /// The rule that let it in; 0 when it was not asked.
    pub ingress_rule: u32,
}

/// A packet of a marked probe.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Traced {
    /// As the program found it.
    pub packet: Packet,
    /// One of its ends.
    pub key: TraceKey,
    /// The backend that was chosen for it.
    pub chosen: Address,
    /// Port of the backend, network order.
    pub chosen_port_be: u32,
    /// Identity of its source; 0 for none.
    pub sender: u32,
    /// Identity of its destination; 0 for none.
    pub receiver: u32,
    /// Its length, as the program found it.
    pub bytes: u32,
    /// What was decided: kinds in the upper 8 bits, decisions below.
    pub decided: [u32; Traced::DECISIONS as usize],
    /// How many of them there are.
    pub count: u32,
    /// The program; 0 when the packet is none of a probe.
    pub hook: u32,
}

impl Traced {
    /// Most decisions of one program about one packet; a power of two.
    pub const DECISIONS: u32 = 8;
}

/// The CPU's own room. Programs of this kind do not interrupt each other.
#[inline(always)]
pub fn scratch() -> Option<&'static mut Scratch> {
    // SAFETY: a value of a per-CPU map, which stays, and nobody else uses it while the program runs.
    SCRATCH.get_ptr_mut(0).map(|scratch| unsafe { &mut *scratch })
}

/// Reads the headers; returns whether they are whole. `network` is the place of the IP header.
#[inline(always)]
pub fn parse(ctx: &TcContext, packet: &mut Packet, network: u32, ethertype: u16) -> bool {
    read(ctx.skb.skb, packet, network, u32::from(ethertype)) != 0
}

/// A function of its own, so that the programs have it once; with plain numbers, for the same reason.
#[inline(never)]
fn read(skb: *mut __sk_buff, packet: &mut Packet, network: u32, ethertype: u32) -> u32 {
    let ctx = TcContext::new(skb);
    let whole = match ethertype as u16 {
        ETHERTYPE_IPV4 => ipv4(&ctx, packet, network),
        ETHERTYPE_IPV6 => ipv6(&ctx, packet, network),
        _ => None,
    };
    if whole.is_none() {
        return 0;
    }
    if packet.flags & LATER_FRAGMENT != 0 {
        return 1;
    }
    u32::from(transport(&ctx, packet).is_some())
}

/// What both forms of header have in common, field by field: a whole key would have to be on the stack for a moment.
#[inline(always)]
fn begin(packet: &mut Packet, protocol: u8, transport: u32) {
    (packet.key.source_port_be, packet.key.destination_port_be) = (0, 0);
    (packet.key.protocol, packet.key.pad) = (protocol, [0; 3]);
    (packet.flags, packet.transport, packet.fragment) = (0, transport, 0);
}

/// Reads a header to where it stays.
#[inline(always)]
fn load<T>(ctx: &TcContext, at: u32, header: &mut T) -> Option<()> {
    let (skb, room) = (ctx.skb.skb.cast_const().cast(), (&raw mut *header).cast());
    // SAFETY: as many bytes as the header has, all of which may be anything.
    let failed = unsafe { bpf_skb_load_bytes(skb, at, room, size_of::<T>() as u32) };
    (failed == 0).then_some(())
}

#[inline(always)]
fn ipv4(ctx: &TcContext, packet: &mut Packet, network: u32) -> Option<()> {
    load(ctx, network, &mut packet.header_v4)?;
    let transport = network + packet.header_v4.header_bytes()? as u32;
    begin(packet, packet.header_v4.protocol, transport);
    packet.key.source = Address::v4(packet.header_v4.source);
    packet.key.destination = Address::v4(packet.header_v4.destination);
    packet.fragment = u32::from(packet.header_v4.id_be);
    if !packet.header_v4.has_transport_header() {
        packet.flags = LATER_FRAGMENT;
    } else if packet.header_v4.fragment_be & 0x2000_u16.to_be() != 0 {
        packet.flags = FIRST_FRAGMENT;
    }
    Some(())
}

/// Known gap: of the extension headers only that of a fragment is read. Behind another one there are no ports to be
/// seen, and only rules for all ports match.
#[inline(always)]
fn ipv6(ctx: &TcContext, packet: &mut Packet, network: u32) -> Option<()> {
    load(ctx, network, &mut packet.header_v6)?;
    begin(packet, packet.header_v6.next, network + 40);
    packet.key.source = packet.header_v6.source;
    packet.key.destination = packet.header_v6.destination;
    if packet.key.protocol == IPPROTO_FRAGMENT {
        let words = ctx.load::<[u32; 2]>(network as usize + 40).ok()?;
        let first = u32::from_be(words[0]);
        packet.key.protocol = (first >> 24) as u8;
        packet.transport = network + 48;
        packet.fragment = words[1];
        if first & 0xfff8 != 0 {
            packet.flags = LATER_FRAGMENT;
        } else if first & 1 != 0 {
            packet.flags = FIRST_FRAGMENT;
        }
    }
    Some(())
}

#[inline(always)]
fn transport(ctx: &TcContext, packet: &mut Packet) -> Option<()> {
    match packet.key.protocol {
        IPPROTO_TCP => {
            let tcp = ctx.load::<Tcp>(packet.transport as usize).ok()?;
            [packet.key.source_port_be, packet.key.destination_port_be] = tcp.ports_be;
            packet.flags |= tcp_flags(tcp.flags);
        }
        IPPROTO_SCTP => {
            let sctp = ctx.load::<Sctp>(packet.transport as usize).ok()?;
            [packet.key.source_port_be, packet.key.destination_port_be] = sctp.ports_be;
            packet.flags |= sctp_flags(sctp.first_chunk);
        }
        IPPROTO_UDP => ports(ctx, packet)?,
        IPPROTO_ICMP | IPPROTO_ICMPV6 => icmp(ctx, packet)?,
        _ => {}
    }
    Some(())
}

/// An SCTP header and the type of the chunk behind it. What begins or ends an association stands first, mostly alone (RFC 9260,
/// section 6.10).
#[repr(C)]
struct Sctp {
    ports_be: [u16; 2],
    _tag_and_checksum: [u8; 8],
    first_chunk: u8,
    _chunk_flags: u8,
}

#[inline(always)]
fn sctp_flags(chunk: u8) -> u32 {
    match chunk {
        1 => SYN,
        2 => SYN_ACK,
        6 | 14 => RST,
        7 | 8 => FIN,
        _ => 0,
    }
}

/// A TCP header up to its flags: one read of the packet instead of two.
#[repr(C)]
struct Tcp {
    ports_be: [u16; 2],
    _numbers_and_length: [u8; 9],
    flags: u8,
}

#[inline(always)]
fn ports(ctx: &TcContext, packet: &mut Packet) -> Option<()> {
    let ports = ctx.load::<[u16; 2]>(packet.transport as usize).ok()?;
    [packet.key.source_port_be, packet.key.destination_port_be] = ports;
    Some(())
}

#[inline(always)]
fn tcp_flags(bits: u8) -> u32 {
    let bits = u32::from(bits);
    // FIN and RST are bits 0 and 2 there; SYN without ACK and with it are bits 1 and 4.
    let begins = u32::from(bits & 0x12 == 0x02) * SYN + u32::from(bits & 0x12 == 0x12) * SYN_ACK;
    begins | (bits & 0x01) * FIN | (bits >> 2 & 0x01) * RST
}

/// An echo request has its identifier as source port, the reply as destination port: so one is the other reversed.
#[inline(always)]
fn icmp(ctx: &TcContext, packet: &mut Packet) -> Option<()> {
    let [kind, _, _, _, high, low] = ctx.load::<[u8; 6]>(packet.transport as usize).ok()?;
    let identifier = u16::from_ne_bytes([high, low]);
    match (packet.key.protocol, kind) {
        (IPPROTO_ICMP, 8) | (IPPROTO_ICMPV6, 128) => packet.key.source_port_be = identifier,
        (IPPROTO_ICMP, 0) | (IPPROTO_ICMPV6, 129) => {
            packet.key.destination_port_be = identifier;
            packet.flags |= ECHO_REPLY;
        }
        (IPPROTO_ICMP, 3 | 11 | 12) | (IPPROTO_ICMPV6, 1..=4) => packet.flags |= ICMP_ERROR,
        _ => {}
    }
    Some(())
}

/// Whether an ICMP error is about a connection that is remembered. The packet that it quotes was sent by whom it goes to.
#[inline(never)]
fn is_related(skb: *mut __sk_buff, scratch: &mut Scratch, now: u32) -> u32 {
    let ctx = TcContext::new(skb);
    let quoted = &mut scratch.quoted;
    let network = scratch.packet.transport.wrapping_add(8);
    let read = match scratch.packet.key.protocol {
        IPPROTO_ICMP => ipv4(&ctx, quoted, network),
        _ => ipv6(&ctx, quoted, network),
    };
    if read.is_none()
        || quoted.key.source != scratch.packet.key.destination
        || quoted.flags & LATER_FRAGMENT != 0
    {
        return 0;
    }
    // Eight bytes behind the header are all that has to be quoted: enough for ports, not for TCP's flags.
    let read = match quoted.key.protocol {
        IPPROTO_TCP | IPPROTO_UDP | IPPROTO_SCTP => ports(&ctx, quoted),
        IPPROTO_ICMP | IPPROTO_ICMPV6 => icmp(&ctx, quoted),
        _ => Some(()),
    };
    if read.is_none() {
        return 0;
    }
    reverse(&quoted.key, &mut scratch.key);
    let related = find(&CONNECTIONS, &quoted.key, now).is_some()
        || find(&CONNECTIONS, &scratch.key, now).is_some();
    scratch.key = scratch.packet.key;
    u32::from(related)
}

/// The key of the answers to `key`, field by field: a whole one would have to be on the stack for a moment.
#[inline(always)]
fn reverse(key: &ConnectionKey, answers: &mut ConnectionKey) {
    (answers.source, answers.destination) = (key.destination, key.source);
    (answers.source_port_be, answers.destination_port_be) =
        (key.destination_port_be, key.source_port_be);
    (answers.protocol, answers.pad) = (key.protocol, [0; 3]);
}

type Memory = LruHashMap<ConnectionKey, Connection>;

/// What is remembered, unless that was too long ago.
#[inline(always)]
pub fn find(memory: &Memory, key: &ConnectionKey, now: u32) -> Option<*mut Connection> {
    let connection = memory.get_ptr_mut(key)?;
    // SAFETY: a value of the map, which stays in place while the program runs. Others may write it at the same time: each
    // field is meaningful alone.
    let (seen, state) = unsafe { ((*connection).seen_secs, (*connection).state) };
    let lifetime = ConnectionState::lifetime_secs(state, key.protocol);
    // Another CPU may have been here a moment later than `now`.
    (now.saturating_sub(seen) <= lifetime).then_some(connection)
}

/// An ICMP error about a connection that is remembered.
pub const RELATED: u32 = 0;
/// The sender of the packet began the connection.
pub const SENDER: u32 = 1;
/// The receiver of the packet did.
pub const RECEIVER: u32 = 2;
/// One of them did: the connection is older than the policy, or was forgotten.
pub const EITHER: u32 = 3;

/// Finds the connection of the packet, and who began it. `key` and `entry` are filled then, with an entry that was never
/// asked about where nothing is remembered.
#[inline(never)]
pub fn locate(skb: *mut __sk_buff, scratch: &mut Scratch, now: u32) -> u32 {
    scratch.key = scratch.packet.key;
    reverse(&scratch.packet.key, &mut scratch.reversed);
    let flags = scratch.packet.flags;
    // The first packet of a connection is never an answer, whatever was there before.
    if flags & SYN == 0 {
        // What looks like an answer is looked for as one first: that saves most answers a look-up.
        let answers = looks_like_answer(&scratch.packet);
        if answers && is_answer(scratch, now) {
            return RECEIVER;
        }
        if let Some(found) = find(&CONNECTIONS, &scratch.key, now) {
            // SAFETY: a value of the map; see `find`.
            scratch.entry = unsafe { *found };
            return SENDER;
        }
        if !answers && is_answer(scratch, now) {
            return RECEIVER;
        }
        if flags & ICMP_ERROR != 0 && is_related(skb, scratch, now) != 0 {
            return RELATED;
        }
    }
    scratch.entry = Connection { egress: 0, ingress: 0, seen_secs: 0, state: 0 };
    let origin = match noted(scratch, now) {
        0 => guess(&scratch.packet),
        noted => noted,
    };
    if origin == RECEIVER {
        scratch.key = scratch.reversed;
    }
    origin
}

/// Whether the receiver of the packet began its connection; that is taken over then.
#[inline(always)]
fn is_answer(scratch: &mut Scratch, now: u32) -> bool {
    let Some(found) = find(&CONNECTIONS, &scratch.reversed, now) else { return false };
    // SAFETY: a value of the map; see `find`.
    scratch.entry = unsafe { *found };
    scratch.key = scratch.reversed;
    true
}

/// From the smaller port to the larger: clients are mostly given larger ones than servers have. Where that is wrong, another look-up
/// finds the connection.
#[inline(always)]
fn looks_like_answer(packet: &Packet) -> bool {
    u16::from_be(packet.key.source_port_be) < u16::from_be(packet.key.destination_port_be)
}

#[inline(always)]
fn is_ephemeral(port_be: u16) -> bool {
    u16::from_be(port_be) >= FIRST_EPHEMERAL
}

/// What a handshake begins tells by its first two packets; later ones by who has a port that clients are given. An echo reply is none
/// of a beginning, but of whose is not known any more. The rest begins anew.
#[inline(always)]
fn guess(packet: &Packet) -> u32 {
    if packet.flags & SYN_ACK != 0 {
        return RECEIVER;
    }
    if packet.flags & ECHO_REPLY != 0 {
        return EITHER;
    }
    let shakes_hands = matches!(packet.key.protocol, IPPROTO_TCP | IPPROTO_SCTP);
    if !shakes_hands || packet.flags & SYN != 0 {
        return SENDER;
    }
    match (is_ephemeral(packet.key.source_port_be), is_ephemeral(packet.key.destination_port_be)) {
        (true, false) => SENDER,
        (false, true) => RECEIVER,
        _ => EITHER,
    }
}

/// Whether packets in the middle of a flow do not say who began it: [`note`] remembers that before there is a policy.
#[inline(always)]
fn is_noted(protocol: u8) -> bool {
    !matches!(protocol, IPPROTO_TCP | IPPROTO_ICMP | IPPROTO_ICMPV6)
}

/// Who began a flow that no policy was asked about, as far as it was noted; else 0. The note stays for as long as somebody speaks: what
/// is denied now must not become a beginning because the other side goes on.
#[inline(always)]
fn noted(scratch: &Scratch, now: u32) -> u32 {
    if !is_noted(scratch.packet.key.protocol) || scratch.packet.flags & SYN != 0 {
        return 0;
    }
    if let Some(note) = find(&BEGINNINGS, &scratch.key, now) {
        touch(note, now);
        return SENDER;
    }
    if let Some(note) = find(&BEGINNINGS, &scratch.reversed, now) {
        touch(note, now);
        return RECEIVER;
    }
    0
}

/// Once a second at most: other CPUs read it, too.
#[inline(always)]
fn touch(connection: *mut Connection, now: u32) {
    // SAFETY: a value of a map; see `find`.
    unsafe {
        if (*connection).seen_secs != now {
            (*connection).seen_secs = now;
        }
    }
}

/// Notes who began a flow of pods that nothing restricts, where its packets will not tell when a policy comes. What the node itself says
/// or hears is always allowed, and not noted.
#[inline(never)]
pub fn note(skb: *mut __sk_buff, network: u32, ethertype: u32) -> u32 {
    let ctx = TcContext::new(skb);
    let place = network + if ethertype as u16 == ETHERTYPE_IPV4 { 9 } else { 6 };
    if !ctx.load::<u8>(place as usize).is_ok_and(is_noted) {
        return 0;
    }
    let Some(scratch) = scratch() else { return 0 };
    if read(skb, &mut scratch.packet, network, ethertype) == 0
        || scratch.packet.flags & LATER_FRAGMENT != 0
        || !is_noted(scratch.packet.key.protocol)
    {
        return 0;
    }
    let now = now_secs();
    let forth = &scratch.packet.key;
    if let Some(note) = find(&BEGINNINGS, forth, now) {
        touch(note, now);
        return 1;
    }
    reverse(forth, &mut scratch.reversed);
    if let Some(note) = find(&BEGINNINGS, &scratch.reversed, now) {
        // SAFETY: a value of the map; see `find`.
        unsafe { (*note).state = ConnectionState::Established as u32 };
        touch(note, now);
        return 1;
    }
    // SAFETY: the value is copied.
    if unsafe { IDENTITIES.get(&forth.destination) }.copied() == Some(THIS_NODE) {
        return 0;
    }
    scratch.entry = Connection { egress: 0, ingress: 0, seen_secs: now, state: 0 };
    // There may have been a policy until now.
    let answers = find(&CONNECTIONS, &scratch.reversed, now).is_some();
    let begun = if answers { &scratch.reversed } else { forth };
    // Without room, whoever is seen first under a policy counts as the one who began.
    let _ = BEGINNINGS.insert(begun, &scratch.entry, 0);
    1
}

/// A connection whose packets are denied is remembered for as long as they come, so that none of them becomes a beginning.
#[inline(always)]
pub fn keep(scratch: &Scratch, now: u32) {
    // One that was not found was never seen.
    let seen = scratch.entry.seen_secs;
    if seen != 0
        && seen != now
        && let Some(known) = CONNECTIONS.get_ptr_mut(&scratch.key)
    {
        touch(known, now);
    }
}

/// The state after a packet of the side that began (`forth`) or of the other.
#[inline(always)]
pub fn advance(state: u32, flags: u32, forth: bool) -> u32 {
    if flags & RST != 0 {
        return ConnectionState::Closed as u32;
    }
    if flags & FIN != 0 {
        let (mine, others) = if forth {
            (ConnectionState::ClosingForth as u32, ConnectionState::ClosingBack as u32)
        } else {
            (ConnectionState::ClosingBack as u32, ConnectionState::ClosingForth as u32)
        };
        return if state == others || state == ConnectionState::Closed as u32 {
            ConnectionState::Closed as u32
        } else {
            mine
        };
    }
    if state == ConnectionState::Opening as u32 && !forth {
        return ConnectionState::Established as u32;
    }
    state
}

/// Remembers a connection: where it was, if it was known. When there is no room, its packets are judged one by one.
#[inline(always)]
pub fn remember(scratch: &Scratch) {
    if let Some(known) = CONNECTIONS.get_ptr_mut(&scratch.key) {
        // A new entry for each state would cost several times as much.
        // SAFETY: a value of the map; see `find`.
        unsafe { *known = scratch.entry };
        return;
    }
    let _ = CONNECTIONS.insert(&scratch.key, &scratch.entry, 0);
}

#[inline(always)]
fn name_fragment(scratch: &mut Scratch) {
    let Packet { key, fragment: id, .. } = scratch.packet;
    let ConnectionKey { source, destination, protocol, .. } = key;
    scratch.fragment = PieceKey { source, destination, id, protocol, pad: [0; 3] };
}

/// Lets the fragments pass that follow.
#[inline(always)]
pub fn remember_fragment(scratch: &mut Scratch, now: u32) {
    name_fragment(scratch);
    let _ = FRAGMENTS.insert(&scratch.fragment, &now, 0);
}

/// Whether the first fragment of this packet was allowed.
#[inline(always)]
pub fn follows_fragment(scratch: &mut Scratch, now: u32) -> bool {
    name_fragment(scratch);
    // SAFETY: the value is copied.
    let first = unsafe { FRAGMENTS.get(&scratch.fragment) }.copied();
    first.is_some_and(|seen| now.saturating_sub(seen) <= FRAGMENT_SECS)
}

/// Seconds of the monotonic clock, as of the last tick: to read the hardware for each packet costs several times as much.
#[inline(always)]
pub fn now_secs() -> u32 {
    // SAFETY: no arguments.
    (unsafe { bpf_ktime_get_coarse_ns() } / 1_000_000_000) as u32
}
