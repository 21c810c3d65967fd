//! Which nodes can be reached, and how: failure detection and the choice of relays. Pure: messages and a time in,
//! actions out.
//!
//! The unit of evidence is an *echo*: a probe through the tunnel that the other node's kernel answers. It proves both
//! directions at once, so that a path that works one way only counts as none, and it needs no process of the other
//! node but the overlay itself: a node whose agent was killed is as alive as its data path.
//!
//! Who probes whom follows from the set of members alone ([`rings`]): each node is watched by at most
//! [`WATCHERS`] others, so that the cost per node does not grow with the cluster. A watcher that misses echoes asks
//! others to try ([`Message::Ask`]): if one of them gets an answer the node is *unreachable* from here and a relay is
//! looked for; if none does it is *down*. Watchers tell everybody what they found ([`votes`]); what a node has
//! measured itself always outweighs what it was told. This is SWIM (Das, Gupta, Motivala 2002) with the fixed
//! observers of Rapid (Suresh and others, 2018), and without incarnations: the kernel's echo refutes.
//!
//! A relay forwards sealed datagrams between two nodes that cannot reach each other, and holds no keys of theirs
//! ([`leases`]). It takes only pairs of which it hears both sides directly, and forwards to the overlay port only, never
//! to another relay: no path is longer than one relay, so that none can be a loop.

pub mod core;
pub mod echo;
pub mod leases;
mod member;
pub mod message;
mod nat;
pub mod rings;
pub mod votes;

use std::net::SocketAddr;
use std::time::Duration;

pub use self::core::{Action, Core, Past, PathView};
pub use self::leases::{Pair, SLOTS};
pub use self::member::{Standing, Via};
pub use self::message::Message;

/// Whether a node that listens on `listen_port` may have to do with a relay there, and not with a peer's own endpoint.
pub fn is_relay_port(listen_port: u16, endpoint: SocketAddr) -> bool {
    let above = endpoint.port().checked_sub(listen_port);
    above.is_some_and(|slot| (1..=SLOTS.into()).contains(&slot))
}

/// How often [`Core::tick`] wants to be called.
pub const TICK: Duration = Duration::from_millis(50);
/// Nodes that watch one node, and nodes that one node watches, at most.
pub const WATCHERS: usize = 6;
/// Pause between probes of a watched node.
pub const PROBE_EVERY: Duration = Duration::from_millis(150);
/// The same while echoes are missing.
pub const PROBE_SUSPECT_EVERY: Duration = Duration::from_millis(50);
/// The same for a node that has been down for [`LONG_DOWN`].
pub const PROBE_DOWN_EVERY: Duration = Duration::from_millis(500);
/// Pause between probes of the nodes that nobody told us to watch, taken in turn.
pub const PROBE_OTHERS_EVERY: Duration = Duration::from_millis(200);
/// Silence, beyond twice the round trip, after which others are asked.
pub const SUSPECT_AFTER: Duration = Duration::from_millis(300);
/// Silence, beyond three times the round trip, after which a node counts as gone.
pub const GONE_AFTER: Duration = Duration::from_millis(500);
/// No round trip is taken to be longer: a path that slow is of no use to a service.
pub const LONGEST_ROUND_TRIP: Duration = Duration::from_secs(1);
/// Nodes that are asked at a time.
pub const HELPERS: usize = 4;
/// What another node saw counts for so long.
pub const SIGHTING_LASTS: Duration = Duration::from_secs(1);
/// Pause between questions about a node that is gone.
pub const ASK_AGAIN: Duration = Duration::from_millis(500);
/// Longest such pause, for one that has been gone for long.
pub const ASK_AGAIN_LONGEST: Duration = Duration::from_secs(10);
/// A helper tries for so long.
pub const HELP_LASTS: Duration = Duration::from_millis(200);
/// Echoes in a row that bring a node back; doubled with each relapse.
pub const BACK_AFTER: u32 = 3;
/// Doublings at most.
pub const RELAPSES_COUNTED: u32 = 4;
/// A node that stayed up for so long has no past.
pub const RELAPSE_WITHIN: Duration = Duration::from_secs(60);
/// After that a node that is down is probed less often.
pub const LONG_DOWN: Duration = Duration::from_secs(30);
/// A node that nobody watches is watched for so long when something about it is odd.
pub const HOT_FOR: Duration = Duration::from_secs(10);
/// Each vote is sent so often, because datagrams get lost.
pub const VOTE_REPEATS: u32 = 3;
/// Pause between repetitions.
pub const VOTE_REPEAT_EVERY: Duration = Duration::from_millis(100);
/// Pause between exchanges of all that is known to be down.
pub const GOSSIP_EVERY: Duration = Duration::from_secs(5);
/// Votes of different watchers that outweigh the assumption that an unprobed node is up.
pub const QUORUM: usize = 2;
/// A relay is asked again so often; it forgets after [`LEASE_LASTS`].
pub const LEASE_REFRESH: Duration = Duration::from_secs(2);
/// A relay forwards for so long without being asked again.
pub const LEASE_LASTS: Duration = Duration::from_secs(10);
/// A relay that failed for a pair is not asked again before.
pub const RELAY_BARRED: Duration = Duration::from_secs(3);
/// The node with the larger key leaves the choice of the relay to the other for so long.
pub const RELAY_DEFER: Duration = Duration::from_millis(300);
/// After that the other side has heard that the direct path works, and uses no relay either.
pub const RELAY_OVER_WITHIN: Duration = Duration::from_secs(5);
/// Times that it is told so, and the pause between them.
pub const RELAY_OVER_REPEATS: u32 = 5;
/// See [`RELAY_OVER_REPEATS`].
pub const RELAY_OVER_EVERY: Duration = Duration::from_millis(200);
/// Pause between keepalives of a node behind NAT to those that it is behind NAT for: shorter than any NAT forgets.
pub const NAT_KEEPALIVE: Duration = Duration::from_secs(25);
/// Answers past the relay that bring a path back to direct; doubled with each relapse.
pub const DIRECT_PROOFS: u32 = 1;
