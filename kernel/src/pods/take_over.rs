//! A pod that another ABI version made: into these maps, and under these programs.
//!
//! What the maps say of a pod is made anew from what it was attached with, so that the layout of the other version does not matter.

use mesh_abi::maps;

use super::linux::{LinuxPodNetwork, map_error, netlink_error};
use super::{AttachError, PodPort, check};
use crate::convert;
use crate::netlink::RouteSocket;
use crate::netlink::device::Device;

/// Whether there was anything to do.
pub(super) fn take_over(network: &LinuxPodNetwork, port: &PodPort) -> Result<bool, AttachError> {
    let mut socket = network.socket().map_err(AttachError::NodeNamespace)?;
    let found = Device::find(&mut socket, port.host_interface.as_str())
        .map_err(|source| netlink_error("find the node's side", port, source))?;
    let Some(host) = found.filter(Device::is_of_pod) else { return Ok(false) };
    if is_known(network, port, host.ifindex)? {
        return Ok(false);
    }
    match switch(network, &mut socket, port, host.ifindex) {
        Err(AttachError::Netlink { source, .. }) if source.is_missing() => {
            // It has just gone. What was written is garbage, if it cannot be taken back.
            let _ = network.forget_port(&port.host_interface, host.ifindex);
            Ok(false)
        }
        other => other.map(|()| true),
    }
}

/// Whether the maps know the pod there. What they say of it beyond that is left as its attachment wrote it.
fn is_known(network: &LinuxPodNetwork, port: &PodPort, ifindex: u32) -> Result<bool, AttachError> {
    let programs = &network.programs;
    let entry = programs.pod_ports.lookup(&ifindex);
    let mut known = entry.map_err(|source| map_error(maps::POD_PORTS, port, source))?.is_some();
    for address in port.addresses() {
        let entry = programs.local_pods.lookup(&convert::address(address));
        let entry = entry.map_err(|source| map_error(maps::LOCAL_PODS, port, source))?;
        known &= entry.is_some_and(|pod| pod.device() == ifindex);
    }
    Ok(known)
}

/// A pod in the first map is switched by the next load, so its policy comes before. Until it is in the last map, by which it counts as
/// taken over, what is sent to it goes through the stack, and meets its policy where it leaves that.
fn switch(
    network: &LinuxPodNetwork,
    socket: &mut RouteSocket,
    port: &PodPort,
    ifindex: u32,
) -> Result<(), AttachError> {
    let failed = |what| move |source| netlink_error(what, port, source);
    let neighbours = check::permanent_neighbours(socket, ifindex)
        .map_err(failed("find the pod's MAC address"))?;
    // The interface is more to be believed: a journal that was lost does not know who wanted another address.
    let seen = port.addresses().find_map(|address| *neighbours.get(&address)?);
    let port = &PodPort { mac: seen.or(port.mac), ..port.clone() };
    network.place(port, ifindex)?;
    network.put_port(port, ifindex)?;
    network.put_guards(socket, ifindex, []).map_err(failed("switch the programs"))?;
    network.put_local(port, ifindex)
}
