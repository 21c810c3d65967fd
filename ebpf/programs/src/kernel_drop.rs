//! Packets that the kernel itself drops, where they are ours: in a pod's namespace, or on the node to or from a pod.
//!
//! The tracepoint is one for the whole machine, and for every packet that somebody frees: so the reasons that are no drops end
//! at one comparison. The kernel's structures are read at offsets that user space has found in the kernel's own description.

use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::RawTracePointContext;
use mesh_abi::{Address, FlowConfig, FlowDirection, FlowEvent, FlowKind, FlowLimitKey};

use crate::deliver::local_pod;
use crate::flow::{now_ns, tell, wanted, within_rate};
use crate::maps::{NAMESPACES, REMOTE_BLOCKS};
use crate::packet::{Ipv4, Ipv6, has_ports};
use crate::trace;

pub fn run(ctx: &RawTracePointContext) {
    let _ = look(ctx);
}

#[inline(always)]
fn look(ctx: &RawTracePointContext) -> Option<()> {
    let reason: u32 = ctx.arg(2);
    let config = wanted(FlowConfig::DROPS)?;
    if reason == config.consumed || reason == config.not_specified || reason == config.tc_ingress {
        return None;
    }
    let skb: u64 = ctx.arg(0);
    let (netns, ifindex) = place(config, skb)?;
    // SAFETY: the value is copied.
    let pod = unsafe { NAMESPACES.get(&netns) }.copied()?;
    let time_ns = now_ns();
    let mut event = FlowEvent {
        time_ns,
        netns,
        kind: FlowKind::KernelDropped as u8,
        direction: FlowDirection::Forward as u8,
        reason,
        ifindex,
        ..FlowEvent::default()
    };
    read_headers(config, skb, &mut event)?;
    trace::kernel_dropped(&event);
    if multicast(&event.destination) || (pod == 0 && !ours(&event)) {
        return None;
    }
    let kind = u32::from(event.kind);
    let key = FlowLimitKey { kind, reason, netns, ifindex, pad: 0 };
    event.unreported = within_rate(&key, time_ns, config.rate_per_sec)?;
    tell(|told| *told = event);
    Some(())
}

/// Reads from the kernel's memory; nothing when it cannot be read.
#[inline(always)]
fn read<T>(base: u64, offset: u32) -> Option<T> {
    // SAFETY: the helper checks the address.
    unsafe { bpf_probe_read_kernel((base + u64::from(offset)) as *const T) }.ok()
}

/// Cookie of the network namespace, and index of the device if it is still known.
#[inline(always)]
fn place(config: &FlowConfig, skb: u64) -> Option<(u64, u32)> {
    let device: u64 = read(skb, config.skb_dev)?;
    let (net, ifindex) = if device != 0 {
        (read::<u64>(device, config.device_net)?, read(device, config.device_ifindex)?)
    } else {
        // What has reached a socket, or has not left it yet, has no device.
        let socket: u64 = read(skb, config.skb_sk)?;
        if socket == 0 {
            return None;
        }
        (read(socket, config.sock_net)?, 0)
    };
    Some((read(net, config.net_cookie)?, ifindex))
}

#[inline(always)]
fn read_headers(config: &FlowConfig, skb: u64, event: &mut FlowEvent) -> Option<()> {
    let head: u64 = read(skb, config.skb_head)?;
    let network: u16 = read(skb, config.skb_network_header)?;
    let packet = head + u64::from(network);
    let first: u8 = read(packet, 0)?;
    let transport = match first >> 4 {
        4 => {
            let header: Ipv4 = read(packet, 0)?;
            event.source = Address::v4(header.source);
            event.destination = Address::v4(header.destination);
            event.protocol = header.protocol;
            if !header.has_transport_header() {
                return Some(());
            }
            header.header_bytes()? as u32
        }
        6 => {
            let header: Ipv6 = read(packet, 0)?;
            event.source = header.source;
            event.destination = header.destination;
            event.protocol = header.next;
            40
        }
        _ => return None,
    };
    if has_ports(event.protocol)
        && let Some([source, destination]) = read::<[u16; 2]>(packet, transport)
    {
        event.source_port_be = source;
        event.destination_port_be = destination;
    }
    Some(())
}

/// To everybody: neighbour discovery and the like, which is dropped all day.
#[inline(always)]
fn multicast(address: &Address) -> bool {
    if address.is_v4() {
        return u32::from_be(address.words[3]) >> 28 >= 14;
    }
    u32::from_be(address.words[0]) >> 24 == 0xff
}

/// Whether a pod, of this node or of another one, is on either side.
#[inline(always)]
fn ours(event: &FlowEvent) -> bool {
    let pod = |address: &Address| {
        local_pod(address).is_some() || REMOTE_BLOCKS.get(Key::new(128, *address)).is_some()
    };
    pod(&event.source) || pod(&event.destination)
}
