//! Waiting until a new interface really works.
//!
//! Two things happen in the kernel's own time after the requests were acknowledged: a device whose carrier came up after it was
//! opened gets its transmit queue from the link watch, and until then drops what it should send; and an IPv6
//! address gets its local route from a work queue, even without duplicate address detection. Both take microseconds
//! on an idle machine and longer on a busy one; packets that are lost meanwhile cost their senders a second and more.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, State};
use netlink_packet_route::route::RouteType;

use crate::netlink::message::{self, RouteRequest};
use crate::netlink::{NetlinkError, RouteSocket};

/// How long at most.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long between the first two looks; then twice that, and so on.
const PAUSE: Duration = Duration::from_micros(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(1);

/// One end of a pair of devices.
pub(super) struct Side<'a> {
    /// In its namespace.
    pub(super) socket: &'a mut RouteSocket,
    /// Its name.
    pub(super) device: &'a str,
    /// Addresses that are to be local there.
    pub(super) local: &'a [IpAddr],
}

/// Waits until the devices can send and the addresses are local. Since Linux 6.8 asking for a device runs the link watch for it,
/// so that there the first look finds it ready.
pub(super) fn wait(sides: [Side<'_>; 2]) -> Result<(), NetlinkError> {
    let deadline = Instant::now() + PATIENCE;
    let mut pause = PAUSE;
    for mut side in sides {
        while !side.is_ready()? {
            if Instant::now() >= deadline {
                let what = "a device that is up and has its local routes";
                return Err(NetlinkError::Incomplete(what));
            }
            std::thread::sleep(pause);
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }
    Ok(())
}

impl Side<'_> {
    fn is_ready(&mut self) -> Result<bool, NetlinkError> {
        let mut requests: Vec<RouteRequest> = vec![message::link_by_name(self.device)];
        requests.extend(self.local.iter().map(|address| message::route_to(*address)));
        let answers = self.socket.batch(requests)?;
        Ok(answers.iter().all(|answer| match answer {
            Ok(messages) => messages.iter().any(works),
            Err(_) => false,
        }))
    }
}

fn works(message: &RouteNetlinkMessage) -> bool {
    match message {
        RouteNetlinkMessage::NewLink(link) => {
            link.attributes.iter().any(|a| matches!(a, LinkAttribute::OperState(State::Up)))
        }
        RouteNetlinkMessage::NewRoute(route) => route.header.kind == RouteType::Local,
        _ => false,
    }
}
