//! The node's L7 proxy: HTTP/1.1 and HTTP/2, plain and over TLS, to pods by the routes of Ingress objects.
//!
//! Owns: the route table, the certificates, the clients' connections and those to backends. It runs as a
//! worker process of its own ([`run`]), which outlives the agent that configures it, or inside another program
//! ([`Proxy`]).
//!
//! Never does: speak to the API, resolve names, follow redirects, buffer a body, change a body or a path. No
//! connection belongs to a configuration: tables are immutable and swapped under open connections.
//!
//! HTTP/1 is read and written here, on both sides (RFC 9110, RFC 9112), strictly: what two programs could
//! understand differently is refused before a backend hears of it. HTTP/2 (RFC 9113) towards clients is the `h2` crate's.
//!
//! Known gaps: backends are reached by HTTP/1.1 only; a client that closes only its sending side is taken as gone.
#![forbid(unsafe_code)]

mod access;
mod answer;
mod authority;
mod backend;
mod batch;
mod body;
mod buffer;
mod field;
mod http1;
mod http2;
mod listen;
mod options;
mod path;
mod proxy;
mod pump;
mod request;
mod response;
mod rewind;
mod route;
mod shard;
mod status;
mod table;
mod timer;
mod tls;
mod tunnel;
mod upstream;
mod worker;

pub use listen::{BindError, Listeners, sockets};
pub use options::{Limits, ProxyOptions, Timeouts, WorkerOptions};
pub use path::InvalidPath;
pub use proxy::{Proxy, StartError};
pub use route::{InvalidRule, RouteTable, Rule};
pub use status::{BackendCounts, Counts, Problem, Status};
pub use tls::TlsError;
pub use worker::{RunError, run};
