//! Reading network devices back.

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};

use super::{NetlinkError, RouteSocket, message};
use crate::ifname::MacAddress;
use crate::pods::{ALIAS_PREFIX, GONE_ALIAS};

/// A device as far as it matters here.
#[derive(Debug, Clone)]
pub(crate) struct Device {
    pub(crate) ifindex: u32,
    /// Index of the other end of a veth pair, in its own namespace.
    pub(crate) peer_ifindex: Option<u32>,
    pub(crate) name: String,
    pub(crate) mtu: u32,
    pub(crate) up: bool,
    /// Whether it is WireGuard's.
    pub(crate) wireguard: bool,
    /// The group that it is in; 0 unless somebody put it into another.
    pub(crate) group: u32,
    alias: String,
    mac: Vec<u8>,
}

impl Device {
    fn from_message(message: &LinkMessage) -> Self {
        let mut device = Self {
            ifindex: message.header.index,
            peer_ifindex: None,
            name: String::new(),
            mtu: 0,
            up: message.header.flags.contains(LinkFlags::Up),
            wireguard: false,
            group: 0,
            alias: String::new(),
            mac: Vec::new(),
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => device.name.clone_from(name),
                LinkAttribute::IfAlias(alias) => device.alias.clone_from(alias),
                LinkAttribute::Address(mac) => device.mac.clone_from(mac),
                LinkAttribute::Link(index) => device.peer_ifindex = Some(*index),
                LinkAttribute::Group(group) => device.group = *group,
                LinkAttribute::Mtu(mtu) => device.mtu = *mtu,
                LinkAttribute::LinkInfo(info) => {
                    device.wireguard = info.contains(&LinkInfo::Kind(InfoKind::Wireguard));
                }
                _ => {}
            }
        }
        device
    }

    /// The device in an answer to [`message::link_by_name`].
    pub(crate) fn in_answer(answer: &[RouteNetlinkMessage]) -> Option<Self> {
        answer.iter().find_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => Some(Self::from_message(link)),
            _ => None,
        })
    }

    /// The device with this name.
    pub(crate) fn find(socket: &mut RouteSocket, name: &str) -> Result<Option<Self>, NetlinkError> {
        let request = message::link_by_name(name);
        match socket.request(request.message, request.flags) {
            Ok(answer) => Ok(Self::in_answer(&answer)),
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All devices of the namespace.
    pub(crate) fn all(socket: &mut RouteSocket) -> Result<Vec<Self>, NetlinkError> {
        let links = socket.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
        let devices = links.iter().filter_map(|link| Self::in_answer(std::slice::from_ref(link)));
        Ok(devices.collect())
    }

    /// All host-side interfaces of pods.
    pub(crate) fn of_pods(socket: &mut RouteSocket) -> Result<Vec<Self>, NetlinkError> {
        Ok(Self::all(socket)?.into_iter().filter(Self::is_of_pod).collect())
    }

    /// Its MAC address; nothing for a device without one.
    pub(crate) fn mac(&self) -> Option<[u8; 6]> {
        self.mac.as_slice().try_into().ok()
    }

    /// Whether it was a pod's, and waits to be deleted.
    pub(crate) fn is_put_aside(&self) -> bool {
        self.alias.starts_with(GONE_ALIAS)
    }

    /// A pod's by its alias, or, when its maker died before it could set that, by the address that only we would give it.
    pub(crate) fn is_of_pod(&self) -> bool {
        self.alias.starts_with(ALIAS_PREFIX)
            || MacAddress::derived(&["host", &self.name]).0.as_slice() == self.mac
    }

    /// Who it was made for.
    pub(crate) fn owner(&self) -> &str {
        self.alias.strip_prefix(ALIAS_PREFIX).unwrap_or_default()
    }
}
