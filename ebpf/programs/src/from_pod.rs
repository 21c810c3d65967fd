//! What comes out of a pod: first whether it may say who it says it is, then where it goes.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT};
use aya_ebpf::programs::TcContext;
use mesh_abi::{Address, PodPort, Reason, TraceHook};

use crate::connection;
use crate::deliver::{local_pod, to_overlay, to_pod};
use crate::maps::POD_PORTS;
use crate::packet::{
    Arp, ETH_HLEN, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, IPPROTO_HOPOPTS,
    IPPROTO_ICMPV6, IPPROTO_UDP, Ipv4, Ipv6, drop, ifindex, pass,
};
use crate::policy::{self, Ends};
use crate::{edge, host, trace};

const DHCP_SERVER: u16 = 67_u16.to_be();
const DHCPV6_SERVER: u16 = 547_u16.to_be();
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;

/// No verdict yet.
const ONWARD: i32 = 0x100;

/// Three functions one after the other, not inside each other: what each keeps on the stack is not there for the next, and
/// the verifier looks at each once.
pub fn run(ctx: &TcContext) -> i32 {
    trace::enter(ctx, ETH_HLEN, TraceHook::FromPod);
    let verdict = steps(ctx);
    trace::leave(ctx);
    verdict
}

#[inline(always)]
fn steps(ctx: &TcContext) -> i32 {
    for step in [check, ask] {
        let verdict = step(ctx.skb.skb) as i32;
        if verdict != ONWARD {
            return verdict;
        }
    }
    deliver(ctx.skb.skb) as i32
}

/// Whether the pod may say that; leaves where the packet goes in the CPU's room.
#[inline(never)]
fn check(skb: *mut __sk_buff) -> u32 {
    let ctx = &TcContext::new(skb);
    let verdict = match checked(ctx) {
        Ok(Some(destination)) => match connection::scratch() {
            Some(scratch) => {
                scratch.destination = destination;
                ONWARD
            }
            None => TC_ACT_SHOT,
        },
        Ok(None) => pass(ctx, Reason::PodToStack),
        Err(reason) => drop(ctx, reason),
    };
    verdict as u32
}

#[inline(always)]
fn checked(ctx: &TcContext) -> Checked {
    let ethernet = ctx.load::<Ethernet>(0).map_err(|_| Reason::Malformed)?;
    // SAFETY: the value is only read; user space writes it before the program is attached.
    let port = unsafe { POD_PORTS.get(&ifindex(ctx)) }.ok_or(Reason::UnknownPort)?;
    if ethernet.source != port.mac {
        return Err(Reason::SpoofedMac);
    }
    match u16::from_be(ethernet.ethertype_be) {
        ETHERTYPE_IPV4 => ipv4(ctx, port),
        ETHERTYPE_IPV6 => ipv6(ctx, port),
        ETHERTYPE_ARP => arp(ctx, port),
        _ => Err(Reason::UnknownProtocol),
    }
}

/// Whether the policies of both ends allow it; leaves the pod that gets it in the CPU's room.
#[inline(never)]
fn ask(skb: *mut __sk_buff) -> u32 {
    let ctx = &TcContext::new(skb);
    let (Some(scratch), Some(ethertype)) = (connection::scratch(), ethertype(ctx)) else {
        return TC_ACT_SHOT as u32;
    };
    scratch.receiver = local_pod(&scratch.destination).unwrap_or_default();
    let receiver = scratch.receiver.device();
    let ends = Ends { sender: ifindex(ctx), receiver, trusted: false, unproven: false };
    let verdict = match policy::admit(ctx, ETH_HLEN, ethertype, ends) {
        Ok(()) => ONWARD,
        Err(reason) => drop(ctx, reason),
    };
    verdict as u32
}

#[inline(never)]
fn deliver(skb: *mut __sk_buff) -> u32 {
    let ctx = &TcContext::new(skb);
    let (Some(scratch), Some(ethertype)) = (connection::scratch(), ethertype(ctx)) else {
        return TC_ACT_SHOT as u32;
    };
    let verdict = if scratch.receiver.device() != 0 {
        to_pod(ctx, &scratch.receiver, ethertype.to_be(), Reason::PodToPod)
            .unwrap_or_else(|| drop(ctx, Reason::NoRoom))
    } else if let Some(verdict) = to_overlay(ctx, scratch.destination) {
        verdict
    } else if let Some(verdict) = edge::outbound::from_pod(ctx, ethertype) {
        verdict
    } else if host::is_protected(ctx, ETH_HLEN, ethertype) {
        drop(ctx, Reason::HostProtected)
    } else {
        pass(ctx, Reason::PodToStack)
    };
    verdict as u32
}

#[inline(always)]
fn ethertype(ctx: &TcContext) -> Option<u16> {
    ctx.load::<u16>(12).ok().map(u16::from_be)
}

/// The address that the packet may go to; nothing for what is the stack's business alone.
type Checked = Result<Option<Address>, Reason>;

#[inline(always)]
fn ipv4(ctx: &TcContext, port: &PodPort) -> Checked {
    let header = ctx.load::<Ipv4>(ETH_HLEN).map_err(|_| Reason::Malformed)?;
    let header_bytes = header.header_bytes().ok_or(Reason::Malformed)?;
    if Address::v4(header.source) != port.v4 {
        return Err(Reason::SpoofedAddress);
    }
    if header.protocol == IPPROTO_UDP && header.has_transport_header() {
        not_to_port(ctx, ETH_HLEN + header_bytes, DHCP_SERVER)?;
    }
    Ok(Some(Address::v4(header.destination)))
}

#[inline(always)]
fn ipv6(ctx: &TcContext, port: &PodPort) -> Checked {
    let header = ctx.load::<Ipv6>(ETH_HLEN).map_err(|_| Reason::Malformed)?;
    if u32::from_be(header.version_class_flow) >> 28 != 6 {
        return Err(Reason::Malformed);
    }
    let own = header.source == port.v6 && port.v6 != Address::UNSPECIFIED;
    match header.next {
        IPPROTO_ICMPV6 => return icmpv6(ctx, port, &header, own),
        IPPROTO_UDP => not_to_port(ctx, ETH_HLEN + 40, DHCPV6_SERVER)?,
        // Multicast listener reports of the pod's stack, from its link-local or no address.
        IPPROTO_HOPOPTS if !own && local_scope(&header.source) => return Err(Reason::Noise),
        _ => {}
    }
    if own { Ok(Some(header.destination)) } else { Err(Reason::SpoofedAddress) }
}

/// Neighbour discovery is for the stack, router messages are for nobody, the rest is traffic.
#[inline(always)]
fn icmpv6(ctx: &TcContext, port: &PodPort, header: &Ipv6, own: bool) -> Checked {
    let kind = ctx.load::<u8>(ETH_HLEN + 40).map_err(|_| Reason::Malformed)?;
    match kind {
        ROUTER_ADVERTISEMENT | REDIRECT => Err(Reason::Forbidden),
        // There is no router to find: the pod's routes are given.
        ROUTER_SOLICITATION => Err(Reason::Noise),
        NEIGHBOUR_SOLICITATION if own || local_scope(&header.source) => Ok(None),
        NEIGHBOUR_ADVERTISEMENT if own || link_local(&header.source) => {
            let target = ctx.load::<Address>(ETH_HLEN + 48).map_err(|_| Reason::Malformed)?;
            // A pod may say where it is, and nothing about anybody else.
            if target == port.v6 || (link_local(&target) && target == header.source) {
                Ok(None)
            } else {
                Err(Reason::SpoofedAddress)
            }
        }
        _ if own => Ok(Some(header.destination)),
        _ => Err(Reason::SpoofedAddress),
    }
}

/// `fe80::/10`.
#[inline(always)]
fn link_local(address: &Address) -> bool {
    u32::from_be(address.words[0]) & 0xffc0_0000 == 0xfe80_0000
}

/// Link-local or unspecified: what a host uses before it has an address.
#[inline(always)]
fn local_scope(address: &Address) -> bool {
    link_local(address) || *address == Address::UNSPECIFIED
}

#[inline(always)]
fn not_to_port(ctx: &TcContext, transport: usize, forbidden_be: u16) -> Result<(), Reason> {
    let port_be = ctx.load::<u16>(transport + 2).map_err(|_| Reason::Malformed)?;
    if port_be == forbidden_be { Err(Reason::Forbidden) } else { Ok(()) }
}

/// A pod may ask for anybody and answer for itself; probes (sender 0) ask too.
#[inline(always)]
fn arp(ctx: &TcContext, port: &PodPort) -> Checked {
    let arp = ctx.load::<Arp>(ETH_HLEN).map_err(|_| Reason::Malformed)?;
    let (mac, sender) = (arp.sender_mac, Address::v4(arp.sender));
    if mac != port.mac {
        return Err(Reason::SpoofedMac);
    }
    if sender == port.v4 || sender == Address::v4(0) {
        Ok(None)
    } else {
        Err(Reason::SpoofedAddress)
    }
}
