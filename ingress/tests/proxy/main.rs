//! The proxy over real sockets: clients and backends in this process, everything on loopback.

#![allow(unreachable_pub, clippy::unwrap_used)]

mod http1;
mod http2;
mod lifecycle;
mod strict;
mod support;
mod tls;
mod upgrade;
