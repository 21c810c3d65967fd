//! The overlay device: a persistent multi-queue TUN with segmentation offload.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use mesh_worker::Descriptors;

use crate::offload::vnet::VNET_HEADER_BYTES;

/// `TUN_F_*` of linux/if_tun.h: checksums; TCP trains over IPv4 and IPv6, with ECN; UDP trains (Linux 6.2).
const OFFLOAD_CHECKSUM: libc::c_uint = 0x01;
const OFFLOAD_TSO4: libc::c_uint = 0x02;
const OFFLOAD_TSO6: libc::c_uint = 0x04;
const OFFLOAD_TSO_ECN: libc::c_uint = 0x08;
const OFFLOAD_USO4: libc::c_uint = 0x20;
const OFFLOAD_USO6: libc::c_uint = 0x40;

const FLAGS: libc::c_int =
    libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;

/// One queue of the device. Reads and writes do not block.
#[derive(Debug)]
pub(crate) struct Queue {
    file: File,
    udp_trains: bool,
}

/// The device could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// The name is empty, longer than 15 bytes, or has a zero in it.
    #[error("{name:?} is no interface name")]
    Name {
        /// The name.
        name: String,
    },
    /// The name belongs to a device of another kind.
    #[error("{name} exists and is no multi-queue TUN device (delete it with: ip link del {name})")]
    OtherKind {
        /// The name.
        name: String,
    },
    /// A step failed.
    #[error("{step} the TUN device {name}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// The device.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Opens `queues` queues of the device, creating it when it does not exist; those that were inherited are all among them,
/// also when that makes more: somebody has to read what the kernel puts there.
///
/// The device stays when this process ends, with its addresses, routes and programs.
pub(crate) fn open(
    name: &str,
    queues: usize,
    inherited: &mut Descriptors,
) -> Result<Vec<Queue>, TunError> {
    let request = request(name)?;
    let mut all: Vec<Queue> = (0..)
        .map_while(|place| inherited.take(&inherited_name(name, place)))
        .map(Queue::from)
        .collect();
    if !all.iter().all(|queue| queue.belongs_to(request)) {
        // Somebody has deleted the device since.
        tracing::info!(name, "the queues that were inherited lead nowhere, opening new ones");
        all.clear();
    }
    for queue in &mut all {
        queue.set_up(name)?;
    }
    while all.len() < queues.max(1) {
        all.push(Queue::open(name, request)?);
    }
    Ok(all)
}

/// Hands a duplicate of each queue to the next worker.
pub(crate) fn bequeath(name: &str, queues: &[Queue], to: &mut Descriptors) -> io::Result<()> {
    for (place, queue) in queues.iter().enumerate() {
        to.insert(inherited_name(name, place), queue.file.try_clone()?.into());
    }
    Ok(())
}

fn inherited_name(device: &str, place: usize) -> String {
    format!("tun/{device}/{place}")
}

fn request(name: &str) -> Result<libc::ifreq, TunError> {
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains('\0') {
        return Err(TunError::Name { name: name.to_owned() });
    }
    // SAFETY: ifreq is plain data for which all zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    Ok(request)
}

impl Queue {
    fn open(name: &str, mut request: libc::ifreq) -> Result<Self, TunError> {
        let step = |step| move |source| TunError::Step { step, name: name.to_owned(), source };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(step("open /dev/net/tun for"))?;
        request.ifr_ifru.ifru_flags = FLAGS as libc::c_short;
        let fd = file.as_raw_fd();
        // SAFETY: TUNSETIFF reads and writes an ifreq that lives here.
        check(unsafe { libc::ioctl(fd, libc::TUNSETIFF, &raw mut request) }).map_err(|source| {
            match source.raw_os_error() {
                Some(libc::EINVAL) => TunError::OtherKind { name: name.to_owned() },
                _ => step("attach to")(source),
            }
        })?;
        let mut queue = Self { file, udp_trains: false };
        queue.set_up(name)?;
        Ok(queue)
    }

    /// Whether it is one of that device.
    fn belongs_to(&self, wanted: libc::ifreq) -> bool {
        // SAFETY: ifreq is plain data for which all zeros are valid.
        let mut actual: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: TUNGETIFF writes an ifreq that lives here.
        let result =
            unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNGETIFF, &raw mut actual) };
        result == 0 && actual.ifr_name == wanted.ifr_name
    }

    fn set_up(&mut self, name: &str) -> Result<(), TunError> {
        let step = |step| move |source| TunError::Step { step, name: name.to_owned(), source };
        let fd = self.file.as_raw_fd();
        let header = VNET_HEADER_BYTES as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int that lives here.
        check(unsafe { libc::ioctl(fd, libc::TUNSETVNETHDRSZ, &raw const header) })
            .map_err(step("set the header size of"))?;
        let tcp = OFFLOAD_CHECKSUM | OFFLOAD_TSO4 | OFFLOAD_TSO6 | OFFLOAD_TSO_ECN;
        let offload = |bits: libc::c_uint| {
            // SAFETY: TUNSETOFFLOAD takes an integer argument.
            check(unsafe { libc::ioctl(fd, libc::TUNSETOFFLOAD, libc::c_ulong::from(bits)) })
        };
        let udp_trains = offload(tcp | OFFLOAD_USO4 | OFFLOAD_USO6).is_ok();
        if !udp_trains {
            offload(tcp).map_err(step("turn on offloads of"))?;
        }
        // SAFETY: TUNSETPERSIST takes an integer argument.
        check(unsafe { libc::ioctl(fd, libc::TUNSETPERSIST, 1) })
            .map_err(step("make persistent"))?;
        self.udp_trains = udp_trains;
        Ok(())
    }

    /// Reads a [`VnetHeader`](crate::offload::vnet::VnetHeader) and a packet.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }

    /// Writes a header and a packet, in pieces.
    pub(crate) fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        (&self.file).write_vectored(pieces).map(drop)
    }

    /// Whether the kernel takes and gives trains of UDP datagrams.
    pub(crate) fn udp_trains(&self) -> bool {
        self.udp_trains
    }
}

impl From<OwnedFd> for Queue {
    fn from(fd: OwnedFd) -> Self {
        Self { file: fd.into(), udp_trains: false }
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Sets the MTU of a device and brings it up.
pub(crate) fn bring_up(name: &str, mtu: u16) -> Result<(), TunError> {
    let step = |step| move |source| TunError::Step { step, name: name.to_owned(), source };
    let mut request = request(name)?;
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)
        .map_err(step("open a socket to configure"))?;
    let fd = socket.as_raw_fd();
    request.ifr_ifru.ifru_mtu = mtu.into();
    // SAFETY: SIOCSIFMTU reads an ifreq that lives here.
    check(unsafe { libc::ioctl(fd, libc::SIOCSIFMTU, &raw const request) })
        .map_err(step("set the MTU of"))?;
    // SAFETY: SIOCGIFFLAGS writes the flags of an ifreq that lives here.
    check(unsafe { libc::ioctl(fd, libc::SIOCGIFFLAGS, &raw mut request) })
        .map_err(step("read the flags of"))?;
    // SAFETY: the call before filled in this member of the union.
    unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
    // SAFETY: SIOCSIFFLAGS reads an ifreq that lives here.
    check(unsafe { libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw const request) })
        .map_err(step("bring up"))
}

/// Packets that the system dropped since the device was made, because nobody had read those before. Zero where it does not
/// say.
pub(crate) fn overflowed(name: &str) -> usize {
    let table = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
    dropped(&table, name).unwrap_or(0)
}

/// The twelfth number of a device: eight of what it received, then bytes, packets, errors and drops of what it sent.
fn dropped(table: &str, name: &str) -> Option<usize> {
    let row =
        table.lines().find_map(|line| line.trim_start().strip_prefix(name)?.strip_prefix(':'))?;
    row.split_whitespace().nth(11)?.parse().ok()
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_is_found_by_its_whole_name() {
        let table = "Inter-| Receive |  Transmit\n face |bytes packets errs drop\n\
             mesh-wg0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n\
            \x20 mesh-wg: 1 2 3 4 5 6 7 8 9 10 11 77 13 14 15 16\n";
        assert_eq!(dropped(table, "mesh-wg"), Some(77));
        assert_eq!(dropped(table, "mesh"), None);
        assert_eq!(overflowed("lo"), 0);
    }
}
