//! Tells at once when somebody changes a sysctl that the node's network rests on.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

use super::plan::sysctls;
use crate::{IfName, NetNs, sysctl};

/// Multicast groups of the messages that a namespace's configuration has changed (rtnetlink(7), RTM_NEWNETCONF): of forwarding and
/// of reverse path filters, by which process ever. The kernel says nothing of `route_localnet`.
const GROUPS: [u32; 2] = [libc::RTNLGRP_IPV4_NETCONF, libc::RTNLGRP_IPV6_NETCONF];

/// Hears of every change from when it is opened on.
#[derive(Debug)]
pub struct SysctlWatch {
    socket: OwnedFd,
    node: NetNs,
    overlay: IfName,
}

impl SysctlWatch {
    /// Listens in the namespace from now on.
    ///
    /// # Errors
    /// When the namespace cannot be entered or the socket not be made.
    pub fn open(node: NetNs, overlay: IfName) -> io::Result<Self> {
        let socket = node.run(listen)??;
        Ok(Self { socket, node, overlay })
    }

    /// Blocks until somebody has changed sysctls that are now not as they have to be, and returns those.
    ///
    /// # Errors
    /// When the socket fails or the namespace cannot be entered.
    pub fn wait(&self) -> io::Result<Vec<String>> {
        loop {
            let mut waiting = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut waiting, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            let names = self.disturbed()?;
            if !names.is_empty() {
                return Ok(names);
            }
        }
    }

    /// Takes the messages that have come, and returns the sysctls that are not as they have to be. Most messages are about
    /// devices that come and go.
    fn disturbed(&self) -> io::Result<Vec<String>> {
        let mut buffer = [0; 4096];
        loop {
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                // Lost messages do not matter: all sysctls are looked at.
                Ok(_) | Err(Errno::EINTR | Errno::ENOBUFS) => {}
                Err(Errno::EAGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        let wrong = |(name, value): (String, &str)| {
            sysctl::read(&name).is_some_and(|now| now != value).then_some(name)
        };
        self.node
            .run(|| sysctls(Some(self.overlay.as_str())).into_iter().filter_map(wrong).collect())
    }
}

fn listen() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let protocol = SockProtocol::NetlinkRoute;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
    let groups = GROUPS.iter().fold(0, |mask, group| mask | 1 << (group - 1));
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(socket)
}
