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
/// How long between two looks.
const PAUSE: Duration = Duration::from_micros(200);

/// Waits until the device can send and the addresses are local. Since Linux 6.8 asking for a device runs the link watch for it,
/// so that there the first look finds it ready.
pub(super) fn wait(
    socket: &mut RouteSocket,
    device: &str,
    local: &[IpAddr],
) -> Result<(), NetlinkError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut requests: Vec<RouteRequest> = vec![message::link_by_name(device)];
        requests.extend(local.iter().map(|address| message::route_to(*address)));
        let answers = socket.batch(requests)?;
        let ready = answers.iter().all(|answer| match answer {
            Ok(messages) => messages.iter().any(works),
            Err(_) => false,
        });
        if ready {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(NetlinkError::Incomplete("a device that is up and has its local routes"));
        }
        std::thread::sleep(PAUSE);
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
