//! Names of the rest of the world: asked upstream, answers and refusals cached.

use std::net::SocketAddr;
use std::time::Duration;

use hickory_net::runtime::TokioRuntimeProvider;
use hickory_net::{DnsError, NetError};
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::{Name, RecordType};
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{
    ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts,
    ServerOrderingStrategy,
};

use crate::answer::Answered;

/// A client gives up after 5 s (resolv.conf, `timeout`): all upstream servers share that time.
const CLIENT_PATIENCE: Duration = Duration::from_secs(5);
const CACHED_ANSWERS: u64 = 4096;

/// A caching forwarder to fixed upstream servers.
pub(crate) struct Forwarder {
    resolver: Option<TokioResolver>,
}

/// The upstream servers make no usable set.
#[derive(Debug, thiserror::Error)]
#[error("set up the forwarder for {servers} upstream servers")]
pub(crate) struct ForwarderError {
    servers: usize,
    #[source]
    source: NetError,
}

impl Forwarder {
    /// Without servers every question is refused.
    pub(crate) fn new(upstreams: &[SocketAddr]) -> Result<Self, ForwarderError> {
        if upstreams.is_empty() {
            return Ok(Self { resolver: None });
        }
        let servers = upstreams.iter().map(|upstream| {
            let on_port = |mut connection: ConnectionConfig| {
                connection.port = upstream.port();
                connection
            };
            let ways = vec![on_port(ConnectionConfig::udp()), on_port(ConnectionConfig::tcp())];
            NameServerConfig::new(upstream.ip(), true, ways)
        });
        let config = ResolverConfig::from_parts(None, vec![], servers.collect());
        let share = CLIENT_PATIENCE / u32::try_from(upstreams.len() + 1).unwrap_or(u32::MAX);
        let mut options = ResolverOpts::default();
        options.timeout = share.max(Duration::from_millis(200));
        options.attempts = 1;
        options.num_concurrent_reqs = 1;
        options.cache_size = CACHED_ANSWERS;
        options.use_hosts_file = ResolveHosts::Never;
        options.preserve_intermediates = true;
        options.try_tcp_on_error = true;
        options.server_ordering_strategy = ServerOrderingStrategy::UserProvidedOrder;
        options.negative_max_ttl = Some(Duration::from_secs(30));
        let resolver = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
            .with_options(options)
            .build()
            .map_err(|source| ForwarderError { servers: upstreams.len(), source })?;
        Ok(Self { resolver: Some(resolver) })
    }

    /// Asks upstream. Failure of all servers is SERVFAIL, an absence is passed on as such.
    pub(crate) async fn ask(&self, name: &Name, kind: RecordType) -> Answered {
        let Some(resolver) = &self.resolver else {
            return Answered { code: ResponseCode::Refused, ..Answered::default() };
        };
        let mut name = name.clone();
        name.set_fqdn(true);
        match resolver.lookup(name, kind).await {
            Ok(found) => Answered { answers: found.answers().to_vec(), ..Answered::default() },
            Err(NetError::Dns(DnsError::NoRecordsFound(none))) => Answered {
                code: none.response_code,
                soa: none.soa.map(|soa| soa.into_record_of_rdata()),
                ..Answered::default()
            },
            Err(error) => {
                tracing::debug!(%error, "no upstream server answered");
                Answered { code: ResponseCode::ServFail, ..Answered::default() }
            }
        }
    }
}
