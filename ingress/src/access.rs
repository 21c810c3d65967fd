//! The access log: one event of the tracing target `access` for each request. Off unless asked for.

use std::net::SocketAddr;
use std::time::Instant;

use crate::request::Peer;
use crate::shard::Shard;
use crate::table::Route;

/// A request that will be logged.
pub(crate) struct Entry {
    begun: Instant,
    client: String,
    line: String,
    host: String,
    ingress: String,
    backend: Option<SocketAddr>,
}

impl Entry {
    /// Notes a request by its head, if requests are logged.
    pub(crate) fn begin_http1(shard: &Shard, peer: &Peer, head: &[u8]) -> Option<Self> {
        if !shard.core.options.access_log {
            return None;
        }
        let mut lines = head.split(|b| *b == b'\n').map(<[u8]>::trim_ascii_end);
        let line = text(lines.next().unwrap_or_default());
        let host = lines.find_map(|line| {
            let (name, value) = line.split_at_checked(5)?;
            name.eq_ignore_ascii_case(b"host:").then(|| text(value.trim_ascii()))
        });
        Some(Self::new(peer, line, host.unwrap_or_default()))
    }

    /// Notes a request of HTTP/2, if requests are logged.
    pub(crate) fn begin_http2(
        shard: &Shard,
        peer: &Peer,
        head: &http::request::Parts,
    ) -> Option<Self> {
        if !shard.core.options.access_log {
            return None;
        }
        let target = head.uri.path_and_query().map_or("*", |target| target.as_str());
        let host = head.uri.authority().map(|host| host.to_string()).unwrap_or_default();
        Some(Self::new(peer, format!("{} {target} HTTP/2", head.method), host))
    }

    fn new(peer: &Peer, line: String, host: String) -> Self {
        let client = peer.address().to_owned();
        Self { begun: Instant::now(), client, line, host, ingress: String::new(), backend: None }
    }

    /// Notes where the request goes.
    pub(crate) fn sent_to(&mut self, route: &Route, backend: SocketAddr) {
        self.ingress = route.ingress.to_string();
        self.backend = Some(backend);
    }

    /// Writes the event. `bytes` counts the answer, its head included.
    pub(crate) fn finish(self, status: u16, bytes: u64) {
        let millis = self.begun.elapsed().as_secs_f64() * 1000.0;
        tracing::info!(
            target: "access",
            client = self.client,
            request = self.line,
            host = self.host,
            status,
            bytes,
            millis,
            ingress = self.ingress,
            backend = self.backend.map(tracing::field::display),
            "request"
        );
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
