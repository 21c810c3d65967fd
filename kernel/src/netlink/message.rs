//! The few netlink messages that we send, in one place.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute,
    LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::Request;
use crate::ifname::MacAddress;

/// A request to the routing family.
pub(crate) type RouteRequest = Request<RouteNetlinkMessage>;

const CREATE: u16 = NLM_F_CREATE | NLM_F_EXCL;
const PUT: u16 = NLM_F_CREATE | NLM_F_REPLACE;

pub(crate) fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// Prefix length of a single address.
pub(crate) fn host_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// One end of a veth pair.
#[derive(Debug, Clone, Copy)]
pub(crate) struct VethEnd<'a> {
    pub(crate) name: &'a str,
    pub(crate) mac: MacAddress,
    pub(crate) mtu: u32,
}

impl VethEnd<'_> {
    fn attributes(&self) -> Vec<LinkAttribute> {
        vec![
            LinkAttribute::IfName(self.name.to_owned()),
            LinkAttribute::Address(self.mac.0.to_vec()),
            LinkAttribute::Mtu(self.mtu),
        ]
    }
}

/// Creates a veth pair, both ends down, with the peer in another namespace from the start.
pub(crate) fn create_veth(
    host: VethEnd<'_>,
    peer: VethEnd<'_>,
    namespace: BorrowedFd<'_>,
) -> RouteRequest {
    let mut other = LinkMessage::default();
    other.attributes = peer.attributes();
    other.attributes.push(LinkAttribute::NetNsFd(namespace.as_raw_fd()));
    let mut message = LinkMessage::default();
    message.attributes = host.attributes();
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(other))),
    ]));
    Request { message: RouteNetlinkMessage::NewLink(message), flags: CREATE }
}

/// Creates a device of a kind that needs no parameters.
pub(crate) fn create_link(name: &str, kind: InfoKind) -> RouteRequest {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]));
    Request { message: RouteNetlinkMessage::NewLink(message), flags: CREATE }
}

/// Asks for one device.
pub(crate) fn link_by_name(name: &str) -> RouteRequest {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    Request { message: RouteNetlinkMessage::GetLink(message), flags: 0 }
}

/// Marks a device as ours and keeps IPv6 from making a link-local address on it.
pub(crate) fn mark_link(name: &str, alias: &str) -> RouteRequest {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::IfAlias(alias.to_owned()),
        LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
            In6AddrGenMode::None,
        )])]),
    ];
    Request { message: RouteNetlinkMessage::SetLink(message), flags: 0 }
}

/// Sets a device up, and its MTU when one is given.
pub(crate) fn set_up(ifindex: u32, mtu: Option<u32>) -> RouteRequest {
    let mut message = LinkMessage::default();
    message.header.index = ifindex;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message.attributes.extend(mtu.map(LinkAttribute::Mtu));
    Request { message: RouteNetlinkMessage::SetLink(message), flags: 0 }
}

/// Sets a device down.
pub(crate) fn set_down(ifindex: u32) -> RouteRequest {
    let mut message = LinkMessage::default();
    message.header.index = ifindex;
    message.header.change_mask = LinkFlags::Up;
    Request { message: RouteNetlinkMessage::SetLink(message), flags: 0 }
}

/// Gives a device that is down another name, mark and group.
pub(crate) fn put_aside(ifindex: u32, name: &str, alias: &str, group: u32) -> RouteRequest {
    let mut message = LinkMessage::default();
    message.header.index = ifindex;
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::IfAlias(alias.to_owned()),
        LinkAttribute::Group(group),
    ];
    Request { message: RouteNetlinkMessage::SetLink(message), flags: 0 }
}

/// Deletes all devices of a group: the kernel waits once for all of them.
pub(crate) fn delete_group(group: u32) -> RouteRequest {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::Group(group));
    Request { message: RouteNetlinkMessage::DelLink(message), flags: 0 }
}

/// Deletes a device.
pub(crate) fn delete_link(ifindex: u32) -> RouteRequest {
    let mut message = LinkMessage::default();
    message.header.index = ifindex;
    Request { message: RouteNetlinkMessage::DelLink(message), flags: 0 }
}

fn address_message(ifindex: u32, address: IpAddr) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address);
    message.header.prefix_len = host_prefix(address);
    message.header.index = ifindex;
    message.header.scope = AddressScope::Universe;
    message.attributes.push(AddressAttribute::Local(address));
    message.attributes.push(AddressAttribute::Address(address));
    message
}

/// Index of the loopback device in every network namespace.
pub(crate) const LOOPBACK: u32 = 1;

/// Puts a single address on a device, without duplicate address detection. Nothing happens when it is there.
pub(crate) fn put_address(ifindex: u32, address: IpAddr) -> RouteRequest {
    let mut message = address_message(ifindex, address);
    if address.is_ipv6() {
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    Request { message: RouteNetlinkMessage::NewAddress(message), flags: PUT }
}

/// Puts an address on the loopback device that only this node uses: the kernel never picks it as the source of packets to others.
pub(crate) fn put_node_local(address: IpAddr) -> RouteRequest {
    let mut request = put_address(LOOPBACK, address);
    if let RouteNetlinkMessage::NewAddress(message) = &mut request.message {
        message.header.scope = AddressScope::Host;
    }
    request
}

/// Takes a single address from a device.
pub(crate) fn delete_address(ifindex: u32, address: IpAddr) -> RouteRequest {
    let message = address_message(ifindex, address);
    Request { message: RouteNetlinkMessage::DelAddress(message), flags: 0 }
}

/// A permanent neighbour entry.
pub(crate) fn put_neighbour(ifindex: u32, address: IpAddr, mac: MacAddress) -> RouteRequest {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = ifindex;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![
        NeighbourAttribute::Destination(match address {
            IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
            IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
        }),
        NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
    ];
    Request { message: RouteNetlinkMessage::NewNeighbour(message), flags: PUT }
}

/// Asks which route an address takes.
pub(crate) fn route_to(address: IpAddr) -> RouteRequest {
    let mut message = RouteMessage::default();
    message.header.address_family = family(address);
    message.header.destination_prefix_length = host_prefix(address);
    message.attributes.push(RouteAttribute::Destination(RouteAddress::from(address)));
    Request { message: RouteNetlinkMessage::GetRoute(message), flags: 0 }
}

/// A route in the main table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RouteSpec {
    pub(crate) destination: IpNet,
    pub(crate) protocol: u8,
    pub(crate) via: Via,
    pub(crate) source: Option<IpAddr>,
    pub(crate) metric: Option<u32>,
    pub(crate) mtu: Option<u32>,
}

/// Where a route leads.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Via {
    /// Straight out of a device.
    Device(u32),
    /// Through a gateway that need not be on a connected network.
    OnLink { ifindex: u32, gateway: IpAddr },
    /// Answered with "unreachable".
    Refuse,
}

impl RouteSpec {
    pub(crate) fn new(destination: IpNet, protocol: u8, via: Via) -> Self {
        Self { destination, protocol, via, source: None, metric: None, mtu: None }
    }

    fn message(&self) -> RouteMessage {
        let destination = self.destination.network();
        let mut message = RouteMessage::default();
        message.header.address_family = family(destination);
        message.header.destination_prefix_length = self.destination.prefix_len();
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::from(self.protocol);
        message.header.scope = RouteScope::Universe;
        message.header.kind = RouteType::Unicast;
        if self.destination.prefix_len() > 0 {
            message.attributes.push(RouteAttribute::Destination(RouteAddress::from(destination)));
        }
        match self.via {
            Via::Device(ifindex) => {
                message.attributes.push(RouteAttribute::Oif(ifindex));
                if destination.is_ipv4() {
                    message.header.scope = RouteScope::Link;
                }
            }
            Via::OnLink { ifindex, gateway } => {
                message.attributes.push(RouteAttribute::Oif(ifindex));
                message.attributes.push(RouteAttribute::Gateway(RouteAddress::from(gateway)));
                message.header.flags = RouteFlags::Onlink;
            }
            Via::Refuse => message.header.kind = RouteType::Unreachable,
        }
        message.attributes.extend(self.source.map(|s| RouteAttribute::PrefSource(s.into())));
        message.attributes.extend(self.metric.map(RouteAttribute::Priority));
        let metrics = self.mtu.map(|mtu| RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]));
        message.attributes.extend(metrics);
        message
    }

    /// Adds or replaces it.
    pub(crate) fn put(&self) -> RouteRequest {
        Request { message: RouteNetlinkMessage::NewRoute(self.message()), flags: PUT }
    }

    /// Deletes it, and only it: protocol and metric have to match.
    pub(crate) fn delete(&self) -> RouteRequest {
        Request { message: RouteNetlinkMessage::DelRoute(self.message()), flags: 0 }
    }
}
