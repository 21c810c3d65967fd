//! What the worker reports about itself.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

/// The answer to `get` on the control socket.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Process id.
    pub pid: u32,
    /// Seconds since the start.
    pub uptime_secs: u64,
    /// How many configurations were applied since the start.
    pub generation: u64,
    /// Addresses for plain HTTP.
    pub http: Vec<SocketAddr>,
    /// Addresses for TLS.
    pub https: Vec<SocketAddr>,
    /// Routes in force.
    pub routes: usize,
    /// Certificates in force.
    pub certificates: usize,
    /// Parts of the configuration that are not in force, and why.
    pub problems: Vec<Problem>,
    /// Traffic since the start.
    pub counts: Counts,
    /// The backends of all routes.
    pub backends: BackendCounts,
}

/// A part of the configuration that the proxy left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    /// The object: `ingress NAMESPACE/NAME` or `secret NAMESPACE/NAME`.
    pub object: String,
    /// What is wrong with it.
    pub reason: String,
}

/// The backends of all routes, summed up.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendCounts {
    /// Different addresses.
    pub known: usize,
    /// Those left out at present, because they could not be reached.
    pub ejected: Vec<SocketAddr>,
    /// Connections kept for later requests.
    pub idle_connections: usize,
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Traffic of all threads since the start.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "camelCase")]
        pub struct Counts { $($(#[$doc])* pub $name: u64,)* }

        /// Traffic of one thread; no other thread writes here.
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub(crate) struct Counters { $(pub(crate) $name: Counter,)* }

        impl Counters {
            /// Adds the present figures to `sum`.
            pub(crate) fn add_to(&self, sum: &mut Counts) {
                $(sum.$name = sum.$name.wrapping_add(self.$name.0.load(Relaxed));)*
            }
        }
    };
}

counters! {
    /// Client connections accepted.
    connections,
    /// Client connections open now.
    connections_open,
    /// TLS handshakes that failed.
    tls_failures,
    /// Requests read, whatever became of them.
    requests,
    /// Requests in progress now.
    requests_open,
    /// Answers with status 100 to 199 (101 only).
    responses_1xx,
    /// Answers with status 200 to 299.
    responses_2xx,
    /// Answers with status 300 to 399.
    responses_3xx,
    /// Answers with status 400 to 499, by backends or by the proxy.
    responses_4xx,
    /// Answers with status 500 to 599, by backends or by the proxy.
    responses_5xx,
    /// Answers that the proxy made itself.
    own_answers,
    /// Requests refused as malformed before routing.
    malformed,
    /// Exchanges cut off after their answer had begun.
    aborted,
    /// Connections made to backends.
    backend_connects,
    /// Connections to backends that failed.
    backend_connect_failures,
    /// Requests sent on a connection that had served others.
    backend_reuses,
    /// Requests sent a second time.
    retries,
}

/// A figure that one thread writes and others read.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    pub(crate) fn sub(&self) {
        self.0.fetch_sub(1, Relaxed);
    }

    pub(crate) fn present(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

impl Counters {
    /// The counter of answers of a class.
    pub(crate) fn answered(&self, status: u16) -> &Counter {
        match status {
            ..200 => &self.responses_1xx,
            200..300 => &self.responses_2xx,
            300..400 => &self.responses_3xx,
            400..500 => &self.responses_4xx,
            500.. => &self.responses_5xx,
        }
    }
}
