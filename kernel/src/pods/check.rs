//! CNI CHECK: what a pod's interface lacks.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mesh_abi::{maps, programs};
use mesh_model::wellknown::POD_GATEWAY;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};

use super::linux::LinuxPodNetwork;
use super::{ListError, Missing, POD_GATEWAY_V6, PodPort};
use crate::bpf::MapError;
use crate::ifname::MacAddress;
use crate::netlink::device::Device;
use crate::netlink::{NetlinkError, RouteSocket, message, tc};
use crate::{NetNs, convert};

/// `0.0.0.0/0` or `::/0`, by the family of an address.
pub(super) fn default_route(family: IpAddr) -> IpNet {
    match family {
        IpAddr::V4(_) => Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0).into(),
        IpAddr::V6(_) => Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

pub(super) fn check(network: &LinuxPodNetwork, port: &PodPort) -> Result<Vec<Missing>, ListError> {
    let mut socket = network.socket().map_err(ListError::NodeNamespace)?;
    let Some(host) = Device::find(&mut socket, port.host_interface.as_str())? else {
        return Ok(vec![Missing::HostInterface(port.host_interface.clone())]);
    };
    if !host.is_of_pod() {
        return Ok(vec![Missing::ForeignInterface(port.host_interface.clone())]);
    }
    let mut missing = Vec::new();
    if !host.up {
        missing.push(Missing::Down(port.host_interface.clone()));
    }
    host_side(&mut socket, port, host.ifindex, &mut missing)?;
    let guards = [(tc::Hook::Ingress, programs::FROM_POD), (tc::Hook::Egress, programs::TO_POD)];
    let mut guarded = true;
    for (hook, name) in guards {
        guarded &= tc::is_attached(&mut socket, host.ifindex, hook, (name, None))?;
    }
    if !guarded {
        missing.push(Missing::Program(port.host_interface.clone()));
    }
    bpf_side(network, port, host.ifindex, &mut missing)?;
    pod_side(port, &mut missing)?;
    Ok(missing)
}

fn host_side(
    socket: &mut RouteSocket,
    port: &PodPort,
    ifindex: u32,
    missing: &mut Vec<Missing>,
) -> Result<(), ListError> {
    let routes = routes(socket, ifindex)?;
    let neighbours = permanent_neighbours(socket, ifindex)?;
    for address in port.addresses() {
        let interface = port.host_interface.clone();
        if !routes.iter().any(|route| route.to == IpNet::from(address)) {
            missing.push(Missing::HostRoute { address, interface: interface.clone() });
        }
        if !neighbours.contains_key(&address) {
            missing.push(Missing::HostNeighbour { address, interface });
        }
    }
    Ok(())
}

fn bpf_side(
    network: &LinuxPodNetwork,
    port: &PodPort,
    ifindex: u32,
    missing: &mut Vec<Missing>,
) -> Result<(), ListError> {
    let programs = &network.programs;
    let entry = programs.pod_ports.lookup(&ifindex).map_err(MapError::of(maps::POD_PORTS))?;
    let mut wrong = Vec::new();
    if entry != Some(convert::pod_port(port)) {
        wrong.push(maps::POD_PORTS);
    }
    for address in port.addresses() {
        let key = convert::address(address);
        let entry = programs.local_pods.lookup(&key).map_err(MapError::of(maps::LOCAL_PODS))?;
        if entry != Some(convert::local_pod(port, ifindex)) {
            wrong.push(maps::LOCAL_PODS);
        }
    }
    let interface = &port.host_interface;
    missing.extend(
        wrong.into_iter().map(|map| Missing::MapEntry { map, interface: interface.clone() }),
    );
    Ok(())
}

fn pod_side(port: &PodPort, missing: &mut Vec<Missing>) -> Result<(), ListError> {
    let socket = NetNs::open(&port.netns).and_then(|pod| RouteSocket::open_in(&pod));
    let Ok(mut socket) = socket else {
        missing.push(Missing::Namespace(port.netns.clone()));
        return Ok(());
    };
    let Some(device) = Device::find(&mut socket, port.interface.as_str())? else {
        missing.push(Missing::PodInterface(port.interface.clone()));
        return Ok(());
    };
    if !device.up {
        missing.push(Missing::Down(port.interface.clone()));
    }
    let present = addresses(&mut socket, device.ifindex)?;
    let routes = routes(&mut socket, device.ifindex)?;
    for address in port.addresses() {
        if !present.contains(&address) {
            missing.push(Missing::PodAddress(address));
        }
        let gateway: IpAddr = match address {
            IpAddr::V4(_) => POD_GATEWAY.into(),
            IpAddr::V6(_) => POD_GATEWAY_V6.into(),
        };
        let wanted = Seen { to: default_route(gateway), via: Some(gateway) };
        if !routes.contains(&wanted) {
            missing.push(Missing::PodRoute(gateway));
        }
    }
    Ok(())
}

/// A route as it was read.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    to: IpNet,
    via: Option<IpAddr>,
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

/// Routes through a device.
fn routes(socket: &mut RouteSocket, ifindex: u32) -> Result<Vec<Seen>, NetlinkError> {
    let mut seen = Vec::new();
    for family in [IpAddr::from([0; 4]), IpAddr::from([0_u8; 16])] {
        let mut query = RouteMessage::default();
        query.header.address_family = message::family(family);
        for answer in socket.dump(RouteNetlinkMessage::GetRoute(query))? {
            let RouteNetlinkMessage::NewRoute(route) = answer else { continue };
            let (mut to, mut via, mut device) = (family, None, None);
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Destination(address) => to = ip(address).unwrap_or(to),
                    RouteAttribute::Gateway(address) => via = ip(address),
                    RouteAttribute::Oif(index) => device = Some(*index),
                    _ => {}
                }
            }
            let to = IpNet::new(to, route.header.destination_prefix_length).ok();
            if let Some(to) = to.filter(|_| device == Some(ifindex)) {
                seen.push(Seen { to, via });
            }
        }
    }
    Ok(seen)
}

/// Neighbours that were written down for a device, with their MAC addresses.
pub(super) fn permanent_neighbours(
    socket: &mut RouteSocket,
    ifindex: u32,
) -> Result<BTreeMap<IpAddr, Option<MacAddress>>, NetlinkError> {
    let all = socket.dump(RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()))?;
    let mut neighbours = BTreeMap::new();
    for answer in all {
        let RouteNetlinkMessage::NewNeighbour(n) = answer else { continue };
        if n.header.ifindex != ifindex || n.header.state != NeighbourState::Permanent {
            continue;
        }
        let (mut address, mut mac) = (None, None);
        for attribute in n.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                    address = Some(v4.into());
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                    address = Some(v6.into());
                }
                NeighbourAttribute::LinkLayerAddress(bytes) => {
                    mac = bytes.try_into().ok().map(MacAddress);
                }
                _ => {}
            }
        }
        neighbours.extend(address.map(|address: IpAddr| (address, mac)));
    }
    Ok(neighbours)
}

/// Addresses of a device.
pub(crate) fn addresses(
    socket: &mut RouteSocket,
    ifindex: u32,
) -> Result<Vec<IpAddr>, NetlinkError> {
    let all = socket.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    let addresses = all.into_iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewAddress(a) if a.header.index == ifindex => {
            let local = a.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(address) => Some(*address),
                _ => None,
            });
            let any = a.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            });
            local.or(any)
        }
        _ => None,
    });
    Ok(addresses.collect())
}
