//! The operating system below the engine: TUN devices, UDP sockets and echoes. The only `unsafe` of this crate.

pub(crate) mod clock;
pub(crate) mod echo;
pub(crate) mod lately;
pub(crate) mod memory;
pub(crate) mod poll;
pub(crate) mod spread;
pub(crate) mod tun;
pub(crate) mod udp;
