//! The socket hooks, once for both families.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval};
use aya_ebpf::programs::SockAddrContext;
use mesh_abi::{Address, Peer, Reverse, ReverseKey, Service, ServiceKey, Slot, Sticky, StickyKey};

use crate::host::is_loopback;
use crate::maps::{NAMESPACES, NODE_ADDRESSES, PEERS, REVERSE, SERVICES, STICKY};
use crate::service::{choose, is_member};
use crate::{flow, trace};

/// Let the call go on.
const PROCEED: i32 = 1;
/// Let the call fail.
const FAIL: i32 = 0;
const ECONNREFUSED: i32 = 111;
const UDP: u8 = 17;

/// How a family's address lies in the context. Every access is volatile: the verifier takes single words only, and the
/// compiler would merge them.
pub trait Family {
    fn address(sa: *const bpf_sock_addr) -> Address;
    fn set_address(sa: *mut bpf_sock_addr, address: Address);
}

pub struct V4;
pub struct V6;

impl Family for V4 {
    #[inline(always)]
    fn address(sa: *const bpf_sock_addr) -> Address {
        // SAFETY: the kernel hands a valid context to the program.
        Address::v4(unsafe { (&raw const (*sa).user_ip4).read_volatile() })
    }

    #[inline(always)]
    fn set_address(sa: *mut bpf_sock_addr, address: Address) {
        // SAFETY: as above; user_ip4 is writable in all hooks used here.
        unsafe { (&raw mut (*sa).user_ip4).write_volatile(address.words[3]) }
    }
}

impl Family for V6 {
    #[inline(always)]
    fn address(sa: *const bpf_sock_addr) -> Address {
        // SAFETY: as above; the array has four words.
        unsafe {
            let words = (&raw const (*sa).user_ip6).cast::<u32>();
            Address {
                words: [
                    words.read_volatile(),
                    words.add(1).read_volatile(),
                    words.add(2).read_volatile(),
                    words.add(3).read_volatile(),
                ],
            }
        }
    }

    #[inline(always)]
    fn set_address(sa: *mut bpf_sock_addr, address: Address) {
        // SAFETY: as above.
        unsafe {
            let words = (&raw mut (*sa).user_ip6).cast::<u32>();
            words.write_volatile(address.words[0]);
            words.add(1).write_volatile(address.words[1]);
            words.add(2).write_volatile(address.words[2]);
            words.add(3).write_volatile(address.words[3]);
        }
    }
}

#[inline(always)]
fn port_be(ctx: &SockAddrContext) -> u16 {
    // SAFETY: a valid context.
    unsafe { (&raw const (*ctx.sock_addr).user_port).read_volatile() as u16 }
}

#[inline(always)]
fn protocol(ctx: &SockAddrContext) -> u8 {
    // SAFETY: a valid context.
    unsafe { (&raw const (*ctx.sock_addr).protocol).read_volatile() as u8 }
}

#[inline(always)]
fn redirect<F: Family>(ctx: &SockAddrContext, address: Address, port_be: u16) {
    F::set_address(ctx.sock_addr, address);
    // SAFETY: a valid context; the port is writable as a whole word.
    unsafe { (&raw mut (*ctx.sock_addr).user_port).write_volatile(u32::from(port_be)) }
}

#[inline(always)]
fn refuse(ctx: &SockAddrContext, vip: Address, vip_port_be: u16) -> i32 {
    flow::refused(ctx, protocol(ctx), vip, vip_port_be);
    // SAFETY: takes an integer.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    FAIL
}

#[inline(always)]
fn slot(address: Address, port_be: u16) -> Slot {
    Slot { address, port_be, pad: 0 }
}

#[inline(always)]
fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: a valid context.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

#[inline(always)]
fn frontend(ctx: &SockAddrContext, address: Address, port_be: u16) -> Option<Service> {
    let mut key = ServiceKey { address, port_be, protocol: protocol(ctx), pad: 0 };
    // SAFETY: the value is copied; user space replaces it as a whole.
    if let Some(service) = unsafe { SERVICES.get(&key) } {
        return Some(*service);
    }
    // SAFETY: only its presence matters.
    if unsafe { NODE_ADDRESSES.get(&address) }.is_none() && !is_nodes_loopback(ctx, &address) {
        return None;
    }
    key.address = if address.is_v4() { ServiceKey::ANY_NODE_V4 } else { ServiceKey::ANY_NODE_V6 };
    // SAFETY: as above.
    unsafe { SERVICES.get(&key) }.copied()
}

/// Whether the node is meant by a loopback address. Only processes in the node's own network mean it by that; a pod means itself.
#[inline(always)]
fn is_nodes_loopback(ctx: &SockAddrContext, address: &Address) -> bool {
    if !is_loopback(address) {
        return false;
    }
    // SAFETY: a valid context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: the value is copied.
    unsafe { NAMESPACES.get(&netns) }.copied() == Some(0)
}

/// `connect`: to a frontend becomes to one of its backends; the socket remembers both.
#[inline(always)]
pub fn connect<F: Family>(ctx: &SockAddrContext) -> i32 {
    let (vip, vip_port_be) = (F::address(ctx.sock_addr), port_be(ctx));
    let Some(service) = frontend(ctx, vip, vip_port_be) else {
        forget_peer(ctx);
        trace::straight(ctx, protocol(ctx), &slot(vip, vip_port_be));
        flow::connected(ctx, protocol(ctx), vip, vip_port_be, None);
        return PROCEED;
    };
    let chosen = choose(ctx, &service);
    trace::hooked(ctx, protocol(ctx), &slot(vip, vip_port_be), &service, chosen.as_ref());
    let Some(backend) = chosen else { return refuse(ctx, vip, vip_port_be) };
    let mut peer =
        Peer { vip, backend: backend.address, vip_port_be, backend_port_be: backend.port_be };
    // SAFETY: the storage belongs to the socket of this call, which is locked or not yet shared.
    unsafe {
        let stored = PEERS.get_or_insert_ptr_mut(ctx, Some(&mut peer));
        if !stored.is_null() {
            *stored = peer;
        }
    }
    if protocol(ctx) == UDP {
        // So that user space knows which sockets have to choose again when this backend is gone.
        remember_reverse(cookie(ctx), backend, vip, vip_port_be);
    }
    redirect::<F>(ctx, backend.address, backend.port_be);
    let asked = Some((vip, vip_port_be));
    flow::connected(ctx, protocol(ctx), backend.address, backend.port_be, asked);
    PROCEED
}

/// A datagram socket that was connected to a frontend before and is now connected to something else.
#[inline(always)]
fn forget_peer(ctx: &SockAddrContext) {
    // SAFETY: as in `connect`.
    unsafe {
        let stored = PEERS.get_ptr_mut(ctx);
        if !stored.is_null() {
            *stored = Peer::default();
        }
    }
}

/// `sendmsg` with an address: the socket keeps the backend of each frontend for as long as that is a member.
#[inline(always)]
pub fn sendmsg<F: Family>(ctx: &SockAddrContext) -> i32 {
    let (vip, vip_port_be) = (F::address(ctx.sock_addr), port_be(ctx));
    let Some(service) = frontend(ctx, vip, vip_port_be) else {
        flow::datagram(ctx, vip, vip_port_be, None);
        return PROCEED;
    };
    let cookie = cookie(ctx);
    let key = StickyKey { cookie, address: vip, port_be: vip_port_be, pad: [0; 3] };
    let Some(backend) = stuck(&key, &service).or_else(|| choose_and_stick(ctx, &key, &service))
    else {
        return refuse(ctx, vip, vip_port_be);
    };
    remember_reverse(cookie, backend, vip, vip_port_be);
    redirect::<F>(ctx, backend.address, backend.port_be);
    flow::datagram(ctx, backend.address, backend.port_be, Some((vip, vip_port_be)));
    PROCEED
}

#[inline(always)]
fn stuck(key: &StickyKey, service: &Service) -> Option<Slot> {
    // SAFETY: the value is copied; a torn read gives a backend that is no member.
    let backend = unsafe { STICKY.get(key) }?.backend;
    is_member(service.id, backend).then_some(backend)
}

#[inline(always)]
fn choose_and_stick(ctx: &SockAddrContext, key: &StickyKey, service: &Service) -> Option<Slot> {
    let backend = choose(ctx, service)?;
    // A failed insert only means that the next datagram chooses again.
    let _ = STICKY.insert(key, &Sticky { backend }, 0);
    Some(backend)
}

#[inline(always)]
fn remember_reverse(cookie: u64, backend: Slot, vip: Address, vip_port_be: u16) {
    let key =
        ReverseKey { cookie, address: backend.address, port_be: backend.port_be, pad: [0; 3] };
    // SAFETY: only compared.
    let known = unsafe { REVERSE.get(&key) };
    if known.is_some_and(|known| known.address == vip && known.port_be == vip_port_be) {
        return;
    }
    let _ = REVERSE.insert(&key, &Reverse { address: vip, port_be: vip_port_be, pad: 0 }, 0);
}

/// `recvmsg`: what comes from a backend comes from the frontend that this socket sent to.
#[inline(always)]
pub fn recvmsg<F: Family>(ctx: &SockAddrContext) -> i32 {
    if translate_peer::<F>(ctx) {
        return PROCEED;
    }
    let (address, port_be) = (F::address(ctx.sock_addr), port_be(ctx));
    let key = ReverseKey { cookie: cookie(ctx), address, port_be, pad: [0; 3] };
    // SAFETY: the value is copied.
    if let Some(vip) = unsafe { REVERSE.get(&key) }.copied() {
        redirect::<F>(ctx, vip.address, vip.port_be);
    }
    PROCEED
}

/// `getpeername`: a connected socket's peer is what the application connected to.
#[inline(always)]
pub fn getpeername<F: Family>(ctx: &SockAddrContext) -> i32 {
    translate_peer::<F>(ctx);
    PROCEED
}

/// Whether the address was that of the backend which this connected socket reached through a frontend.
#[inline(always)]
fn translate_peer<F: Family>(ctx: &SockAddrContext) -> bool {
    // SAFETY: the storage belongs to the socket of this call; the value is copied.
    let peer = unsafe {
        let stored = PEERS.get_ptr_mut(ctx);
        if stored.is_null() {
            return false;
        }
        *stored
    };
    if peer.backend_port_be != port_be(ctx) || peer.backend != F::address(ctx.sock_addr) {
        return false;
    }
    redirect::<F>(ctx, peer.vip, peer.vip_port_be);
    true
}
