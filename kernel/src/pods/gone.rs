//! What is left of a pod's interface when nobody needs it any more.
//!
//! Deleting a device takes the kernel 20 ms: it waits until no processor can know the device, part of that time with the lock that
//! every change of a device needs. It waits once for all devices of one request. So an interface is first put aside
//! (down, no name, no mark, a group of its own: 0.2 ms), and all that were are deleted together when nobody waits.

use super::{GONE_ALIAS, GONE_GROUP};
use crate::netlink::device::Device;
use crate::netlink::{NetlinkError, RouteSocket, message};

/// Takes a device out of use. Its addresses and routes go with its being up.
pub(super) fn put_aside(socket: &mut RouteSocket, ifindex: u32) -> Result<(), NetlinkError> {
    // By its index: no two have one, and no pod's name begins so.
    let name = format!("mx{ifindex}");
    // Two requests: before Linux 6.2 only a device that is down can be renamed.
    let requests = vec![
        message::set_down(ifindex),
        message::put_aside(ifindex, &name, GONE_ALIAS, GONE_GROUP),
    ];
    socket.batch(requests)?.into_iter().try_for_each(|answer| answer.map(drop))
}

/// Deletes all devices that were put aside. Returns how many there were.
pub(super) fn bury(socket: &mut RouteSocket) -> Result<usize, NetlinkError> {
    let devices = Device::all(socket)?;
    let gone: Vec<u32> = devices.iter().filter(|d| d.is_put_aside()).map(|d| d.ifindex).collect();
    if gone.is_empty() {
        return Ok(0);
    }
    // A number is no proof: somebody else's device in our group must not go with ours.
    let alone = devices.iter().all(|d| d.is_put_aside() == (d.group == GONE_GROUP));
    let requests = if alone {
        vec![message::delete_group(GONE_GROUP)]
    } else {
        gone.iter().copied().map(message::delete_link).collect()
    };
    for answer in socket.batch(requests)? {
        match answer {
            // Namespaces that vanish take their devices along.
            Err(error) if !error.is_missing() => return Err(error),
            _ => {}
        }
    }
    Ok(gone.len())
}
