//! What pods may reach on the nodes themselves.

use aya_ebpf::bindings::{__sk_buff, BPF_FIB_LKUP_RET_NOT_FWDED, bpf_fib_lookup as FibQuery};
use aya_ebpf::helpers::generated::bpf_fib_lookup;
use aya_ebpf::programs::TcContext;
use mesh_abi::policy::{OTHER_NODE, THIS_NODE};
use mesh_abi::{Address, ConnectionKey, HostPort};

use crate::connection;
use crate::maps::{HOST_PORTS, IDENTITIES};
use crate::packet::ifindex;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Whether a packet that the node's stack is about to get may not reach it: loopback addresses, and ports of Mesh itself on
/// any node. `network` is the place of its IP header.
#[inline(always)]
pub fn is_protected(ctx: &TcContext, network: usize, ethertype: u16) -> bool {
    let Some(scratch) = connection::scratch() else { return false };
    if !connection::parse(ctx, &mut scratch.packet, network as u32, ethertype) {
        return false;
    }
    let packet = &scratch.packet;
    let destination = packet.key.destination;
    if is_loopback(&destination) {
        return true;
    }
    let port_be = packet.key.destination_port_be;
    let key = HostPort { port_be, protocol: packet.key.protocol, pad: 0 };
    // SAFETY: only its presence matters.
    if packet.flags & connection::LATER_FRAGMENT != 0 || unsafe { HOST_PORTS.get(&key) }.is_none() {
        return false;
    }
    is_node(&packet.key.destination) || is_local(ctx.skb.skb, &packet.key) != 0
}

/// Whether the other end of the packet is a node: nodes speak to each other as they like.
#[inline(always)]
pub fn is_node(address: &Address) -> bool {
    // SAFETY: the value is copied.
    matches!(unsafe { IDENTITIES.get(address) }.copied(), Some(THIS_NODE | OTHER_NODE))
}

/// `127.0.0.0/8` and `::1`.
#[inline(always)]
pub fn is_loopback(address: &Address) -> bool {
    let last = u32::from_be(address.words[3]);
    if address.is_v4() {
        return last >> 24 == 127;
    }
    address.words[..3] == [0; 3] && last == 1
}

/// Whether the kernel would keep a packet between these: the second address is the node's, known to us or not.
#[inline(always)]
pub fn is_at_home(ctx: &TcContext, source: &Address, destination: &Address) -> bool {
    let Some(scratch) = connection::scratch() else { return true };
    (scratch.key.source, scratch.key.destination) = (*source, *destination);
    is_local(ctx.skb.skb, &scratch.key) != 0
}

/// Whether the kernel would keep a packet to this address: it is one of the node's, known to us or not. A function of its
/// own: what it keeps on the stack is not there for others.
#[inline(never)]
fn is_local(skb: *mut __sk_buff, key: &ConnectionKey) -> u32 {
    // SAFETY: integers and unions of integers.
    let mut query: FibQuery = unsafe { core::mem::zeroed() };
    query.ifindex = ifindex(&TcContext::new(skb));
    if key.destination.is_v4() {
        query.family = AF_INET;
        query.__bindgen_anon_3.ipv4_src = key.source.words[3];
        query.__bindgen_anon_4.ipv4_dst = key.destination.words[3];
    } else {
        query.family = AF_INET6;
        query.__bindgen_anon_3.ipv6_src = key.source.words;
        query.__bindgen_anon_4.ipv6_dst = key.destination.words;
    }
    let size = core::mem::size_of::<FibQuery>() as i32;
    // SAFETY: a valid context, and a query of the size that is said.
    let answer = unsafe { bpf_fib_lookup(skb.cast(), &raw mut query, size, 0) };
    u32::from(answer == i64::from(BPF_FIB_LKUP_RET_NOT_FWDED))
}
