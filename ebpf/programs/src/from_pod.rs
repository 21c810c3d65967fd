//! What comes out of a pod: first whether it may say who it says it is, then where it goes.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT};
use aya_ebpf::programs::TcContext;
use mesh_abi::{Address, PodPort, Reason};

use crate::connection;
use crate::deliver::{local_pod, to_overlay, to_pod};
use crate::maps::POD_PORTS;
use crate::packet::{
    Arp, ETH_HLEN, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, IPPROTO_HOPOPTS,
    IPPROTO_ICMPV6, IPPROTO_UDP, Ipv4, Ipv6, drop, ifindex, pass,
};
use crate::policy::{self, Ends};
use crate::{edge, host};

const DHCP_SERVER: u16 = 67_u16.to_be();
const DHCPV6_SERVER: u16 = 547_u16.to_be();
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;

pub fn run(ctx: &TcContext) -> i32 {
    let Ok(ethernet) = ctx.load::<Ethernet>(0) else { return drop(ctx, Reason::Malformed) };
    // SAFETY: the value is only read; user space writes it before the program is attached.
    let Some(port) = (unsafe { POD_PORTS.get(&ifindex(ctx)) }) else {
        return drop(ctx, Reason::UnknownPort);
    };
    if ethernet.source != port.mac {
        return drop(ctx, Reason::SpoofedMac);
    }
    let checked = match u16::from_be(ethernet.ethertype_be) {
        ETHERTYPE_IPV4 => ipv4(ctx, port),
        ETHERTYPE_IPV6 => ipv6(ctx, port),
        ETHERTYPE_ARP => arp(ctx, port),
        _ => Err(Reason::UnknownProtocol),
    };
    match checked {
        Ok(Some(destination)) => {
            forward(ctx.skb.skb, &destination, u32::from(ethernet.ethertype_be)) as i32
        }
        Ok(None) => pass(ctx, Reason::PodToStack),
        Err(reason) => drop(ctx, reason),
    }
}

/// A function of its own, so that the verifier looks at it once and not for each way that leads here.
#[inline(never)]
fn forward(skb: *mut __sk_buff, destination: &Address, ethertype_be: u32) -> u32 {
    // What is known about the address depends on the way here, and is of no use: a value of a map is just any.
    let Some(scratch) = connection::scratch() else { return TC_ACT_SHOT as u32 };
    scratch.destination = *destination;
    (deliver(&TcContext::new(skb), &scratch.destination, ethertype_be as u16)) as u32
}

#[inline(always)]
fn deliver(ctx: &TcContext, destination: &Address, ethertype_be: u16) -> i32 {
    let local = local_pod(destination);
    let receiver = local.as_ref().map_or(0, |pod| pod.ifindex);
    let ends = Ends { sender: ifindex(ctx), receiver, trusted: false };
    let ethertype = u16::from_be(ethertype_be);
    if let Err(reason) = policy::admit(ctx, ETH_HLEN, ethertype, ends) {
        return drop(ctx, reason);
    }
    if let Some(pod) = local {
        return to_pod(ctx, &pod, ethertype_be, Reason::PodToPod)
            .unwrap_or_else(|| drop(ctx, Reason::NoRoom));
    }
    if let Some(verdict) = to_overlay(ctx, *destination) {
        return verdict;
    }
    if let Some(verdict) = edge::outbound::from_pod(ctx, u16::from_be(ethertype_be)) {
        return verdict;
    }
    if host::is_protected(ctx, ETH_HLEN, ethertype) {
        return drop(ctx, Reason::HostProtected);
    }
    pass(ctx, Reason::PodToStack)
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
