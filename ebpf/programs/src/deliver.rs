//! Delivery to a pod on this node, and to other nodes.

use aya_ebpf::helpers::generated::{bpf_redirect, bpf_redirect_peer};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::TcContext;
use mesh_abi::{Address, LocalPod, Reason};

use crate::maps::{LOCAL_PODS, NODE, REMOTE_BLOCKS};
use crate::packet::{Ethernet, decide};

/// The pod on this node with this address.
#[inline(always)]
pub fn local_pod(destination: &Address) -> Option<LocalPod> {
    // SAFETY: the value is copied; user space replaces it as a whole.
    unsafe { LOCAL_PODS.get(destination) }.copied()
}

/// Hands the packet to the pod's own device, past the node's stack. The packet has an Ethernet header, maybe an old one.
///
/// The caller has asked the policies ([`crate::policy::admit`]): the egress hook of the host-side veth is not run on this way.
#[inline(always)]
pub fn to_pod(ctx: &TcContext, pod: &LocalPod, ethertype_be: u16, reason: Reason) -> Option<i32> {
    let header = Ethernet { destination: pod.pod_mac, source: pod.host_mac, ethertype_be };
    ctx.store(0, &header, 0).ok()?;
    decide(ctx, reason);
    if pod.ifindex & LocalPod::QUEUED != 0 {
        // SAFETY: takes integers.
        return Some(unsafe { bpf_redirect(pod.device(), 0) } as i32);
    }
    // SAFETY: takes integers. A device that is gone drops the packet, as the stack would.
    Some(unsafe { bpf_redirect_peer(pod.ifindex, 0) } as i32)
}

/// Hands the packet to the overlay device if another node has the address and the device is known. The kernel removes the
/// Ethernet header on the way to a device without one.
#[inline(always)]
pub fn to_overlay(ctx: &TcContext, destination: Address) -> Option<i32> {
    REMOTE_BLOCKS.get(Key::new(128, destination))?;
    let overlay = NODE.get(0)?.overlay_ifindex;
    if overlay == 0 {
        return None;
    }
    decide(ctx, Reason::PodToOverlay);
    // SAFETY: takes integers.
    Some(unsafe { bpf_redirect(overlay, 0) } as i32)
}
