//! The operating system below the engine: TUN devices and UDP sockets. The only `unsafe` of this crate.

pub(crate) mod clock;
pub(crate) mod memory;
pub(crate) mod poll;
pub(crate) mod tun;
pub(crate) mod udp;
