//! The pure core: peers, sessions, routing by key. Takes bytes and the time, leaves datagrams in an [`Outbox`].
//!
//! No I/O, no threads, no randomness but that of the handshake itself. One exception is known: boringtun reads
//! the boot-time clock inside; the simulation test moves that clock together with `now`.

pub mod allowed_ips;
pub mod core;
pub mod noise;
pub mod outbox;
pub mod packet;
pub mod peer;
pub mod table;

pub use self::core::{Core, Sink};
pub use allowed_ips::AllowedIps;
pub use outbox::Outbox;
pub use peer::Peer;
pub use table::Table;
