//! Reading our routes back.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteType,
};

use super::{Foreign, NODE_ROUTE_PROTOCOL, REFUSE_METRIC, Route, RouteKind};
use crate::netlink::message::{self, RouteSpec, Via};
use crate::netlink::{NetlinkError, RouteSocket};
use crate::pods::POD_ROUTE_PROTOCOL;

/// All routes with our protocol number, and what others lead to that do not end at one of `own` devices.
pub(super) fn observe(
    socket: &mut RouteSocket,
    own: Option<u32>,
) -> Result<(BTreeSet<Route>, BTreeSet<Foreign>), NetlinkError> {
    let (mut routes, mut foreign) = (BTreeSet::new(), BTreeSet::new());
    let families: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
    for family in families {
        let mut query = RouteMessage::default();
        query.header.address_family = message::family(family);
        for answer in socket.dump(RouteNetlinkMessage::GetRoute(query))? {
            if let RouteNetlinkMessage::NewRoute(route) = answer {
                routes.extend(parse(&route, family));
                foreign.extend(parse_foreign(&route, family, own));
            }
        }
    }
    Ok((routes, foreign))
}

fn parse_foreign(route: &RouteMessage, family: IpAddr, own: Option<u32>) -> Option<Foreign> {
    let protocol = u8::from(route.header.protocol);
    let is_ours = [NODE_ROUTE_PROTOCOL, POD_ROUTE_PROTOCOL].contains(&protocol);
    let is_main = route.header.table == RouteHeader::RT_TABLE_MAIN;
    if is_ours || !is_main || route.header.kind != RouteType::Unicast {
        return None;
    }
    let (mut to, mut on_link) = (family, true);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(address) => to = ip(address)?,
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_) => {
                on_link = false;
            }
            RouteAttribute::Oif(index) if Some(*index) == own => return None,
            _ => {}
        }
    }
    let destination = IpNet::new(to, route.header.destination_prefix_length).ok()?;
    (destination.prefix_len() > 0).then_some(Foreign { destination, on_link })
}

fn parse(route: &RouteMessage, family: IpAddr) -> Option<Route> {
    if u8::from(route.header.protocol) != NODE_ROUTE_PROTOCOL {
        return None;
    }
    let (mut to, mut ifindex, mut source, mut mtu) = (family, None, None, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(address) => to = ip(address)?,
            RouteAttribute::Oif(index) => ifindex = Some(*index),
            RouteAttribute::PrefSource(address) => source = ip(address),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    let destination = IpNet::new(to, route.header.destination_prefix_length).ok()?;
    let kind = match route.header.kind {
        RouteType::Unreachable => RouteKind::Refuse,
        _ => RouteKind::Device { ifindex: ifindex?, source, mtu },
    };
    Some(Route { destination, kind })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

/// The route as netlink wants it.
pub(super) fn spec(route: &Route) -> RouteSpec {
    match route.kind {
        RouteKind::Device { ifindex, source, mtu } => {
            let via = Via::Device(ifindex);
            RouteSpec { source, mtu, ..RouteSpec::new(route.destination, NODE_ROUTE_PROTOCOL, via) }
        }
        RouteKind::Refuse => RouteSpec {
            metric: Some(REFUSE_METRIC),
            ..RouteSpec::new(route.destination, NODE_ROUTE_PROTOCOL, Via::Refuse)
        },
    }
}
