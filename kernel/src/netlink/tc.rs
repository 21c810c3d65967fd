//! Programs on a device by clsact and netlink: for pods, because a tcx link waits 4 to 15 ms for other CPUs while it holds the
//! lock that every netlink request needs, and this does not; and for the overlay device on kernels without tcx.
//!
//! The filter belongs to the device and goes with it, so nothing has to be pinned.

use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};

use super::message::RouteRequest;
use super::{NetlinkError, Request, RouteSocket};

/// The queueing discipline that carries filters.
const CLSACT: &str = "clsact";
/// The kind of filter that is a program.
const BPF: &str = "bpf";
const CLSACT_HANDLE: TcHandle = TcHandle { major: 0xffff, minor: 0 };
const CLSACT_PARENT: TcHandle = TcHandle { major: 0xffff, minor: 0xfff1 };

/// One of the two places of a device where programs run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hook {
    /// On what the device receives.
    Ingress,
    /// On what is sent through it.
    Egress,
}

impl Hook {
    fn parent(self) -> TcHandle {
        let minor = match self {
            Self::Ingress => 0xfff2,
            Self::Egress => 0xfff3,
        };
        TcHandle { major: 0xffff, minor }
    }
}

/// Our place on the hook: priority and handle.
const PRIORITY: u32 = 1;
const HANDLE: TcHandle = TcHandle { major: 0, minor: 1 };

fn message(ifindex: u32, handle: TcHandle, parent: TcHandle) -> TcMessage {
    let mut message = TcMessage::with_index(ifindex.cast_signed());
    message.header.handle = handle;
    message.header.parent = parent;
    message
}

/// Prepares a device for filters. The kernel refuses when it is prepared already.
pub(crate) fn prepare(ifindex: u32) -> RouteRequest {
    let mut message = message(ifindex, CLSACT_HANDLE, CLSACT_PARENT);
    message.attributes.push(TcAttribute::Kind(CLSACT.to_owned()));
    Request {
        message: RouteNetlinkMessage::NewQueueDiscipline(message),
        flags: NLM_F_CREATE | NLM_F_EXCL,
    }
}

/// Runs a program at a hook of a prepared device; replaces an earlier one in one step.
pub(crate) fn attach(
    ifindex: u32,
    hook: Hook,
    program: BorrowedFd<'_>,
    name: &str,
) -> RouteRequest {
    let mut message = message(ifindex, HANDLE, hook.parent());
    let all_protocols = u32::from(u16::to_be(libc::ETH_P_ALL.cast_unsigned() as u16));
    message.header.info = PRIORITY << 16 | all_protocols;
    message.attributes.push(TcAttribute::Kind(BPF.to_owned()));
    message.attributes.push(TcAttribute::Options(vec![
        TcOption::Bpf(TcFilterBpfOption::ProgFd(program.as_raw_fd().cast_unsigned())),
        TcOption::Bpf(TcFilterBpfOption::ProgName(name.to_owned())),
        TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
    ]));
    Request { message: RouteNetlinkMessage::NewTrafficFilter(message), flags: NLM_F_CREATE }
}

/// Whether a program of this name runs at that hook of the device; with `id` that very one, and not one that an earlier agent has
/// loaded, which has maps of its own.
pub(crate) fn is_attached(
    socket: &mut RouteSocket,
    ifindex: u32,
    hook: Hook,
    (name, id): (&str, Option<u32>),
) -> Result<bool, NetlinkError> {
    let query = message(ifindex, TcHandle::UNSPEC, hook.parent());
    let filters = match socket.dump(RouteNetlinkMessage::GetTrafficFilter(query)) {
        Ok(filters) => filters,
        // A device that was never prepared.
        Err(error) if error.errno() == Some(libc::EINVAL) || error.is_missing() => {
            return Ok(false);
        }
        Err(error) => return Err(error),
    };
    Ok(filters.iter().any(|filter| match filter {
        RouteNetlinkMessage::NewTrafficFilter(filter) => carries(filter, name, id),
        _ => false,
    }))
}

fn carries(filter: &TcMessage, wanted: &str, id: Option<u32>) -> bool {
    let options = filter.attributes.iter().filter_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    let options = || options.clone().flatten();
    let is_named = options().any(|option| {
        matches!(option, TcOption::Bpf(TcFilterBpfOption::ProgName(name)) if name == wanted)
    });
    let is_it = |option: &TcOption| matches!(option, TcOption::Bpf(TcFilterBpfOption::ProgId(n)) if Some(*n) == id);
    is_named && (id.is_none() || options().any(is_it))
}
