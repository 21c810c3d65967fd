//! Answers for addresses of services on the local network: this node is where they are. No address is put on any device, so
//! nothing is left behind; and the answer does not need the agent.

use aya_ebpf::helpers::generated::{bpf_csum_diff, bpf_redirect, bpf_skb_change_tail};
use aya_ebpf::programs::TcContext;
use mesh_abi::{Address, EdgeReason, EdgeUplink};

use super::count;
use super::packet::ICMPV6;
use super::refuse::{added, ipv6_header, pseudo_sum};
use super::tunnel::fold;
use crate::maps::{EDGE_OWNED, EDGE_UPLINKS};
use crate::packet::{Arp, ETH_HLEN, ETHERTYPE_ARP, ETHERTYPE_IPV6, Ethernet, Ipv6, NEXT, ifindex};

const REQUEST: u16 = 1_u16.to_be();
const REPLY: u16 = 2_u16.to_be();
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// The target's link layer address, 8 bytes.
const TARGET_OPTION: [u8; 2] = [2, 1];
/// "Solicited" and "override" (RFC 4861, section 4.4).
const SOLICITED: u8 = 0x60;
const OVERRIDE: u8 = 0x20;

/// `ff02::1`
const ALL_NODES: Address = Address { words: [0xff02_0000_u32.to_be(), 0, 0, 1_u32.to_be()] };
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

/// Whether this node answers for the address.
#[inline(always)]
pub fn is_owned(address: &Address) -> bool {
    // SAFETY: only its presence matters.
    unsafe { EDGE_OWNED.get(address) }.is_some()
}

/// The uplink's own address, if this node answers for the wanted one there.
#[inline(always)]
fn answering(ctx: &TcContext, wanted: &Address) -> Option<EdgeUplink> {
    if !is_owned(wanted) {
        return None;
    }
    // SAFETY: the value is copied; user space replaces it as a whole.
    unsafe { EDGE_UPLINKS.get(&ifindex(ctx)) }.copied()
}

#[inline(always)]
fn send(ctx: &TcContext, header: &Ethernet) -> Option<i32> {
    ctx.store(0, header, 0).ok()?;
    count(ctx, EdgeReason::Answered);
    // SAFETY: takes integers.
    Some(unsafe { bpf_redirect(ifindex(ctx), 0) as i32 })
}

/// "Who has this address?"
#[inline(never)]
pub fn arp(ctx: &TcContext) -> i32 {
    answer_arp(ctx).unwrap_or(NEXT)
}

#[inline(always)]
fn answer_arp(ctx: &TcContext) -> Option<i32> {
    let question = ctx.load::<Arp>(ETH_HLEN).ok()?;
    let (operation, target, sender) = (question.operation_be, question.target, question.sender);
    // One who says that the address is his own asks nothing.
    if operation != REQUEST || sender == target {
        return None;
    }
    let uplink = answering(ctx, &Address::v4(target))?;
    let asker = question.sender_mac;
    let answer = Arp {
        operation_be: REPLY,
        sender_mac: uplink.mac,
        sender: target,
        target_mac: asker,
        target: sender,
        ..question
    };
    ctx.store(ETH_HLEN, &answer, 0).ok()?;
    let ethertype_be = ETHERTYPE_ARP.to_be();
    send(ctx, &Ethernet { destination: asker, source: uplink.mac, ethertype_be })
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Advertisement {
    kind: u8,
    code: u8,
    checksum_be: u16,
    flags: u8,
    reserved: [u8; 3],
    target: Address,
    option: [u8; 2],
    mac: [u8; 6],
}

const _: () = assert!(core::mem::size_of::<Advertisement>() == 32);

/// "Who has this address?" for IPv6. Left alone when it is no question, or not for us.
#[inline(never)]
pub fn neighbour(ctx: &TcContext) -> i32 {
    answer_neighbour(ctx).unwrap_or(NEXT)
}

#[inline(always)]
fn answer_neighbour(ctx: &TcContext) -> Option<i32> {
    let header = ctx.load::<Ipv6>(ETH_HLEN).ok()?;
    if header.next != ICMPV6 || header.hop_limit != 255 {
        return None;
    }
    if ctx.load::<u8>(ETH_HLEN + 40).ok()? != SOLICITATION {
        return None;
    }
    let target = ctx.load::<Address>(ETH_HLEN + 48).ok()?;
    let uplink = answering(ctx, &target)?;
    let asker = ctx.load::<Ethernet>(0).ok()?.source;
    // Somebody who is about to take the address for himself has none to be answered at.
    let probe = header.source == Address::UNSPECIFIED;
    let (to, to_mac, flags) = if probe {
        (ALL_NODES, ALL_NODES_MAC, OVERRIDE)
    } else {
        (header.source, asker, SOLICITED)
    };
    // SAFETY: a valid context.
    if unsafe { bpf_skb_change_tail(ctx.skb.skb, (ETH_HLEN + 40 + 32) as u32, 0) } != 0 {
        return None;
    }
    let outer = ipv6_header(32, target, to, 255);
    let mut answer = Advertisement {
        kind: ADVERTISEMENT,
        code: 0,
        checksum_be: 0,
        flags,
        reserved: [0; 3],
        target,
        option: TARGET_OPTION,
        mac: uplink.mac,
    };
    let bytes = (&raw mut answer).cast::<u32>();
    // SAFETY: the message is 32 bytes long.
    let sum = unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, bytes, 32, 0) } as u32;
    answer.checksum_be = fold(added(sum, pseudo_sum(&outer)));
    ctx.store(ETH_HLEN, &outer, 0).ok()?;
    ctx.store(ETH_HLEN + 40, &answer, 0).ok()?;
    let ethertype_be = ETHERTYPE_IPV6.to_be();
    send(ctx, &Ethernet { destination: to_mac, source: uplink.mac, ethertype_be })
}
