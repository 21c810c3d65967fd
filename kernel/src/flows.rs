//! Events of connections and drops, as the programs tell them.
//!
//! [`FlowReader`] switches them on and takes them out of the ring buffer. While there is none, the programs tell nothing and
//! cost a look at one word. There can be one at a time: a ring buffer has one place that it is read to.
//!
//! To be woken for each event would cost more than the event. So a reader looks as often as suits it, and [`FlowReader::wait`]
//! ends early when the ring fills, or somebody rings its [`Bell`].

mod btf;
mod wait;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use aya::maps::{Map as AyaMap, MapData, MapError as RingError, RingBuf};
use mesh_abi as abi;
use mesh_abi::{FlowConfig, FlowCounter, FlowEvent};

pub use wait::Bell;

pub use mesh_abi::{FlowDirection as Direction, FlowEnd as End, FlowKind as Kind, Reason};

use crate::bpf::{Map, MapError};
use crate::{NetNs, Programs, convert};
use btf::Btf;
use wait::Waiting;

/// What is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Connections and datagrams.
    pub connections: bool,
    /// Packets that are denied or dropped.
    pub drops: bool,
    /// Dropped packets of one reason and device that are told in a second; the others are counted.
    pub rate_per_sec: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self { connections: true, drops: true, rate_per_sec: 20 }
    }
}

/// One event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// When, by the monotonic clock.
    pub at: Duration,
    /// What happened.
    pub kind: Kind,
    /// From whose side it was seen.
    pub direction: Direction,
    /// IANA protocol number; 0 when the packet could not be read.
    pub protocol: u8,
    /// Who opened the connection or sent the packet. Port 0 where there is none, or none yet.
    pub source: SocketAddr,
    /// To whom, after the choice of a backend.
    pub destination: SocketAddr,
    /// What the application asked for, where that was a service.
    pub service: Option<SocketAddr>,
    /// Cookie of the network namespace; 0 when not known.
    pub netns: u64,
    /// Cookie of the socket; 0 for packets.
    pub socket: u64,
    /// How a connection ended.
    pub end: End,
    /// Bytes that this side sent and the other acknowledged.
    pub sent_bytes: u64,
    /// Bytes that this side received.
    pub received_bytes: u64,
    /// From opening to end.
    pub duration: Duration,
    /// Smoothed round trip time.
    pub rtt: Duration,
    /// Segments that were sent again.
    pub retransmits: u32,
    /// Dropped: a [`Reason`]. Dropped by the kernel: its number of the reason.
    pub reason: u32,
    /// Index of the device that a packet came in by; 0 when not known.
    pub ifindex: u32,
    /// Like events that were held back since the last one.
    pub unreported: u32,
}

/// Events by what became of them, since the maps were made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Told.
    pub told: u64,
    /// Lost, because nobody read fast enough.
    pub lost: u64,
    /// Held back by the rate limit.
    pub limited: u64,
}

/// Events cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum FlowError {
    /// The ring buffer cannot be opened.
    #[error("open the ring buffer of events")]
    Ring(#[source] Box<RingError>),
    /// Nothing to wait with can be made, or waiting fails.
    #[error("wait for events")]
    Wait(#[source] io::Error),
    /// A map cannot be read or written.
    #[error(transparent)]
    Map(#[from] MapError),
}

/// The clock of [`Event::at`].
pub fn monotonic() -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the value outlives the call. This clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let secs = u64::try_from(now.tv_sec).unwrap_or_default();
    Duration::new(secs, u32::try_from(now.tv_nsec).unwrap_or_default())
}

/// Takes events out of the ring buffer. Dropped, it switches them off.
pub struct FlowReader {
    ring: RingBuf<MapData>,
    waiting: Waiting,
    config: Map<u32, FlowConfig>,
    counters: Map<u32, u64>,
    reasons: BTreeMap<u32, String>,
    lacking: Vec<String>,
    /// The attached tracepoint: it ends with this process, since nobody else reads what it tells.
    _kernel_drops: Option<OwnedFd>,
}

impl std::fmt::Debug for FlowReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FlowReader").field("lacking", &self.lacking).finish_non_exhaustive()
    }
}

impl FlowReader {
    /// Switches events on, for the node whose network namespace is `node`.
    ///
    /// What the kernel does not offer is left out and said by [`lacking`](Self::lacking).
    ///
    /// # Errors
    /// When the maps cannot be used.
    pub fn open(programs: &Programs, node: &NetNs, settings: Settings) -> Result<Self, FlowError> {
        let ring = open_ring(programs, abi::maps::FLOWS)?;
        let waiting = Waiting::new(&ring).map_err(FlowError::Wait)?;
        let mut lacking = programs.lacking().to_vec();
        let btf = Btf::of_kernel().map_err(|error| lacking.push(error.to_string())).ok();
        let mut config = btf.as_ref().map(offsets).unwrap_or_default();
        let kernel_drops = match (&btf, settings.drops) {
            (Some(_), true) if has_offsets(&config) => programs
                .attach_kernel_drop()
                .map_err(|error| lacking.push(format!("drops of the kernel: {error}")))
                .ok(),
            (_, false) => None,
            _ => {
                lacking.push("drops of the kernel: its structures are not known".to_owned());
                None
            }
        };
        config.rate_per_sec = settings.rate_per_sec;
        config.flags = u32::from(settings.connections) * FlowConfig::CONNECTIONS
            + u32::from(settings.drops) * FlowConfig::DROPS;
        let cookie = node.cookie().map_err(MapError::of(abi::maps::NAMESPACES))?;
        programs.namespaces.put(&cookie, &0).map_err(MapError::of(abi::maps::NAMESPACES))?;
        programs.flow_config.put(&0, &config).map_err(MapError::of(abi::maps::FLOW_CONFIG))?;
        let reasons = btf.map(|btf| btf.enumerators("skb_drop_reason")).unwrap_or_default();
        Ok(Self {
            ring,
            waiting,
            config: programs.flow_config.clone(),
            counters: programs.flow_counters.clone(),
            reasons: reasons.into_iter().map(|(name, number)| (number, short(&name))).collect(),
            lacking,
            _kernel_drops: kernel_drops,
        })
    }

    /// What this kernel does not let us tell; empty when all is told.
    pub fn lacking(&self) -> &[String] {
        &self.lacking
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

    /// Sleeps for that long; less when a good part of the ring is full, somebody rings, or a signal comes. Returns whether it was
    /// less.
    ///
    /// # Errors
    /// When the kernel refuses to wait.
    pub fn wait(&self, time: Duration) -> Result<bool, FlowError> {
        self.waiting.sleep(time).map_err(FlowError::Wait)
    }

    /// What ends [`wait`](Self::wait), for other threads.
    pub fn bell(&self) -> Bell {
        self.waiting.bell()
    }

    /// The kernel's names of its reasons to drop a packet, such as `no_socket`, by number.
    pub fn kernel_reasons(&self) -> &BTreeMap<u32, String> {
        &self.reasons
    }

    /// The kernel's name of one of its reasons to drop a packet, such as `no_socket`.
    pub fn kernel_reason(&self, number: u32) -> Option<&str> {
        self.reasons.get(&number).map(String::as_str)
    }

    /// How many events there were.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn tally(&self) -> Result<Tally, FlowError> {
        let sum = |counter: FlowCounter| {
            let all = self.counters.per_cpu(&(counter as u32));
            all.map(|all| all.iter().sum()).map_err(MapError::of(abi::maps::FLOW_COUNTERS))
        };
        Ok(Tally {
            told: sum(FlowCounter::Told)?,
            lost: sum(FlowCounter::Lost)?,
            limited: sum(FlowCounter::Limited)?,
        })
    }
}

impl Drop for FlowReader {
    fn drop(&mut self) {
        // The next reader writes it anew; a failure costs the programs' time only.
        let _ = self.config.put(&0, &FlowConfig::default());
    }
}

/// The ring buffer of events that is pinned under that name.
pub(crate) fn open_ring(
    programs: &Programs,
    map: &'static str,
) -> Result<RingBuf<MapData>, FlowError> {
    let ring = MapData::from_pin(programs.map_path(map)).and_then(AyaMap::from_map_data);
    ring.and_then(RingBuf::try_from).map_err(|error| FlowError::Ring(Box::new(error)))
}

/// Nothing for what is not an event of this version.
fn read(bytes: &[u8]) -> Option<Event> {
    let event: FlowEvent = convert::plain(bytes)?;
    let socket = |address, port_be| SocketAddr::new(convert::ip(address), u16::from_be(port_be));
    let asked = event.service != abi::Address::UNSPECIFIED;
    Some(Event {
        at: Duration::from_nanos(event.time_ns),
        kind: Kind::from_number(event.kind)?,
        direction: Direction::from_number(event.direction)?,
        protocol: event.protocol,
        source: socket(event.source, event.source_port_be),
        destination: socket(event.destination, event.destination_port_be),
        service: asked.then(|| socket(event.service, event.service_port_be)),
        netns: event.netns,
        socket: event.socket,
        end: End::from_number(event.end)?,
        sent_bytes: event.sent_bytes,
        received_bytes: event.received_bytes,
        duration: Duration::from_nanos(event.duration_ns),
        rtt: Duration::from_micros(event.rtt_us.into()),
        retransmits: event.retransmits,
        reason: event.reason,
        ifindex: event.ifindex,
        unreported: event.unreported,
    })
}

/// Where the running kernel keeps what the programs read; 0 for what it does not have.
fn offsets(btf: &Btf) -> FlowConfig {
    let at = |of, member| btf.offset_bytes(of, member).unwrap_or_default();
    let reasons: BTreeMap<String, u32> = btf.enumerators("skb_drop_reason").into_iter().collect();
    // A reason that the kernel does not have gets a number that it never uses.
    let reason = |name: &str| reasons.get(name).copied().unwrap_or(u32::MAX);
    FlowConfig {
        consumed: reason("SKB_CONSUMED"),
        not_specified: reason("SKB_DROP_REASON_NOT_SPECIFIED"),
        tc_ingress: reason("SKB_DROP_REASON_TC_INGRESS"),
        skb_dev: at("sk_buff", "dev"),
        skb_head: at("sk_buff", "head"),
        skb_network_header: at("sk_buff", "network_header"),
        skb_sk: at("sk_buff", "sk"),
        device_net: at("net_device", "nd_net"),
        device_ifindex: at("net_device", "ifindex"),
        net_cookie: at("net", "net_cookie"),
        sock_err: at("sock", "sk_err"),
        sock_flags: at("sock_common", "skc_flags"),
        sock_net: at("sock_common", "skc_net"),
        ..FlowConfig::default()
    }
}

/// Whether all that `kernel_drop` reads is known. None of it stands at the beginning of its structure.
fn has_offsets(config: &FlowConfig) -> bool {
    let needed = [
        config.skb_dev,
        config.skb_head,
        config.skb_network_header,
        config.skb_sk,
        config.device_net,
        config.device_ifindex,
        config.net_cookie,
        config.sock_net,
    ];
    needed.into_iter().all(|offset| offset != 0) && config.not_specified != u32::MAX
}

/// `SKB_DROP_REASON_NO_SOCKET` as people write it.
fn short(name: &str) -> String {
    name.strip_prefix("SKB_DROP_REASON_").unwrap_or(name).to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_event_is_skipped() {
        assert_eq!(read(&[0; 128]), None, "no kind");
        assert_eq!(read(&[1; 7]), None, "too short");
    }

    #[test]
    fn reasons_lose_what_they_have_in_common() {
        assert_eq!(short("SKB_DROP_REASON_NO_SOCKET"), "no_socket");
        assert_eq!(short("SKB_CONSUMED"), "skb_consumed");
    }
}
