//! Marked probes: what each program decided about their packets.
//!
//! [`Traces`] puts the ends of probes into a small map, and takes what the programs tell about them out of a ring buffer. There can
//! be one at a time. What an earlier one left is removed by the next: until then it costs the programs a look at a map.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd as _};
use std::time::Duration;

use aya::maps::{MapData, RingBuf};
use mesh_abi as abi;
use mesh_abi::{TraceEvent, TraceKey, TraceState};

pub use mesh_abi::{EdgeReason, TraceHook as Hook, TraceKind as Kind};

use crate::bpf::{Map, MapError};
use crate::flows::{self, FlowError};
use crate::{Programs, convert};

/// By what a probe is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mark {
    /// Its own address and port, and the IANA number of its protocol: on every node, whatever is translated on the way.
    End(SocketAddr, u8),
    /// Cookie of its socket: at the hooks of the node that it leaves.
    Socket(u64),
}

impl Mark {
    fn key(self) -> TraceKey {
        match self {
            Self::End(end, protocol) => {
                TraceKey::end(convert::address(end.ip()), end.port().to_be(), protocol)
            }
            Self::Socket(cookie) => TraceKey::socket(cookie),
        }
    }
}

/// One decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// When, by the monotonic clock.
    pub at: Duration,
    /// Which program.
    pub hook: Hook,
    /// What kind of decision.
    pub kind: Kind,
    /// The decision: see [`Kind`].
    pub decision: u32,
    /// Cookie of the socket; 0 for packets.
    pub socket: u64,
    /// IANA protocol number.
    pub protocol: u8,
    /// Who sent the packet, as the program found it; unspecified for a socket.
    pub source: SocketAddr,
    /// To whom, as the program found it.
    pub destination: SocketAddr,
    /// The backend that was chosen.
    pub chosen: Option<SocketAddr>,
    /// Index of the device.
    pub ifindex: u32,
    /// Bytes of the packet, with the link's header where the device has one.
    pub bytes: u32,
    /// Policy asked for what is sent; of a choice, how many backends there were.
    pub egress: u32,
    /// Policy asked for what is received; of a choice, for how many seconds it is kept.
    pub ingress: u32,
    /// The rule that let it out.
    pub egress_rule: u32,
    /// The rule that let it in.
    pub ingress_rule: u32,
    /// Identity of the source.
    pub sender: u32,
    /// Identity of the destination.
    pub receiver: u32,
}

impl Event {
    /// By what the probe may have been marked: either end, or its socket.
    pub fn marks(&self) -> [Mark; 3] {
        let end = |end| Mark::End(end, self.protocol);
        [end(self.source), end(self.destination), Mark::Socket(self.socket)]
    }
}

/// Marks probes. Dropped, it takes all marks away.
pub struct Traces {
    state: Map<u32, TraceState>,
    marks: Map<TraceKey, u32>,
    ring: RingBuf<MapData>,
}

impl std::fmt::Debug for Traces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Traces").field("marks", &self.marks).finish_non_exhaustive()
    }
}

impl Traces {
    /// Begins without any mark.
    ///
    /// # Errors
    /// When the maps cannot be used.
    pub fn open(programs: &Programs) -> Result<Self, FlowError> {
        let ring = flows::open_ring(programs, abi::maps::TRACE_EVENTS)?;
        let (state, marks) = (programs.trace.clone(), programs.traces.clone());
        let this = Self { state, marks, ring };
        let entries = this.marks.entries().map_err(MapError::of(abi::maps::TRACES))?;
        for (key, _) in entries {
            this.marks.delete(&key).map_err(MapError::of(abi::maps::TRACES))?;
        }
        this.switch(false)?;
        Ok(this)
    }

    fn switch(&self, active: bool) -> Result<(), FlowError> {
        let state = TraceState { active: active.into(), pad: 0 };
        Ok(self.state.put(&0, &state).map_err(MapError::of(abi::maps::TRACE))?)
    }

    /// From now on the programs tell about it.
    ///
    /// # Errors
    /// When a map cannot be written: it is full when there are too many marks.
    pub fn mark(&self, mark: Mark) -> Result<(), FlowError> {
        self.marks.put(&mark.key(), &1).map_err(MapError::of(abi::maps::TRACES))?;
        self.switch(true)
    }

    /// The programs tell nothing about it any more.
    ///
    /// # Errors
    /// When a map cannot be written.
    pub fn unmark(&self, mark: Mark) -> Result<(), FlowError> {
        let failed = MapError::of(abi::maps::TRACES);
        self.marks.delete(&mark.key()).map_err(&failed)?;
        let left = self.marks.entries().map_err(&failed)?;
        if left.is_empty() { self.switch(false) } else { Ok(()) }
    }

    /// The next event, if there is one. Never waits.
    pub fn next_event(&mut self) -> Option<Event> {
        loop {
            let item = self.ring.next()?;
            if let Some(event) = read(&item) {
                return Some(event);
            }
        }
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        // The next one does it again.
        let _ = self.switch(false);
    }
}

/// Nothing for what is not an event of this version.
fn read(bytes: &[u8]) -> Option<Event> {
    let event: TraceEvent = convert::plain(bytes)?;
    let end = |address, port_be| SocketAddr::new(convert::ip(address), u16::from_be(port_be));
    let chosen = event.chosen != abi::Address::UNSPECIFIED;
    Some(Event {
        at: Duration::from_nanos(event.time_ns),
        hook: Hook::from_number(event.hook)?,
        kind: Kind::from_number(event.kind)?,
        decision: event.decision,
        socket: event.socket,
        protocol: event.protocol,
        source: end(event.source, event.source_port_be),
        destination: end(event.destination, event.destination_port_be),
        chosen: chosen.then(|| end(event.chosen, event.chosen_port_be)),
        ifindex: event.ifindex,
        bytes: event.bytes,
        egress: event.egress,
        ingress: event.ingress,
        egress_rule: event.egress_rule,
        ingress_rule: event.ingress_rule,
        sender: event.sender,
        receiver: event.receiver,
    })
}

/// Identities as the programs have them.
///
/// # Errors
/// When the map cannot be read.
pub fn identity(programs: &Programs, address: IpAddr) -> io::Result<Option<u32>> {
    programs.policy.identities.lookup(&convert::address(address))
}

/// The kernel's number for a socket, which is never used again.
///
/// # Errors
/// When it is no socket.
pub fn socket_cookie(socket: &impl AsFd) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of::<u64>()).expect("a small size");
    // SAFETY: the value is as long as said and outlives the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_event_is_skipped() {
        assert_eq!(read(&[0; size_of::<TraceEvent>()]), None, "no hook");
        assert_eq!(read(&[1; 7]), None, "too short");
    }

    #[test]
    fn a_socket_is_known_by_a_number_of_its_own() {
        let sockets = [(); 2].map(|()| std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
        let [one, other] = sockets.map(|socket| socket_cookie(&socket).unwrap());
        assert!(one != 0 && one != other);
    }
}
