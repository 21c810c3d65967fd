//! The pure core: peers, sessions, routing by key. Takes bytes and the time, leaves datagrams in an [`Outbox`].
//!
//! No I/O, no clock, no threads, no randomness but that of the handshake itself. All of it may be called from many threads
//! at once: packets meet no lock but that of a replay window ([`peer::link`]); handshakes and timers lock their peer.

pub mod allowed_ips;
pub mod core;
pub mod ecn;
pub mod estate;
pub mod gate;
pub mod narrow;
pub mod noise;
pub mod outbox;
pub mod packet;
pub mod peer;
pub mod probe;
pub mod table;

pub use self::core::{Arrival, Core, Sink};
pub use allowed_ips::AllowedIps;
pub use estate::Estate;
pub use gate::Gate;
pub use noise::{Clock, Kept, Stamps};
pub use outbox::{Outbox, Way};
pub use peer::Peer;
pub use table::Table;
