//! The running service: store, registry, certificates, listener, controllers.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mesh_model::cluster::node_overlay_address;
use mesh_model::{ClusterConfig, wellknown};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::api::{Agents, Api, Keys};
use crate::error::ApiError;
use crate::pki::{Authority, PkiError};
use crate::preshared::Issuer;
use crate::registry::Registry;
use crate::store::{OpenError, RedbStore};
use crate::tokens::Signer;
use crate::{bootstrap, controllers};

mod config;
mod listener;
mod renewal;
mod tls;

pub use config::ConfigError;
use renewal::Renewal;

/// How often the cluster's own objects are looked after.
const UPKEEP_EVERY: Duration = Duration::from_secs(15);

/// After so much silence the other side of a connection is asked whether it is still there.
const SILENCE: Duration = Duration::from_secs(30);

/// What the service needs to know.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where everything is kept.
    pub data_dir: PathBuf,
    /// Where to listen.
    pub listen: SocketAddr,
    /// Addresses at which others reach this service; found out when empty.
    pub advertise: Vec<IpAddr>,
    /// A file with the cluster's address plan, for the first start.
    pub cluster_config: Option<PathBuf>,
    /// How often the keys that pairs of nodes share are replaced.
    pub preshared_key_rotation: Duration,
    /// For how long certificates are made.
    pub certificate_lifetime: Duration,
}

/// The service cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data folder.
    #[error("make the data folder {path}")]
    DataDir {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// The address plan.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Certificates and keys.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// TLS.
    #[error("set up TLS")]
    Tls(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The listener.
    #[error("listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The objects that every cluster has.
    #[error("make the cluster's own objects")]
    Bootstrap(#[source] ApiError),
    /// The stored objects cannot be read.
    #[error("read the stored objects")]
    Objects(#[source] ApiError),
}

/// A running service.
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    /// The objects.
    pub registry: Registry,
    stopping: CancellationToken,
    listener: JoinHandle<()>,
    renewal: JoinHandle<()>,
    upkeep: JoinHandle<()>,
    controllers: controllers::Handle,
}

impl Server {
    /// Starts everything; ready to answer when it returns.
    pub async fn start(options: Options) -> Result<Self, StartError> {
        make_dir(&options.data_dir)?;
        let store = Arc::new(RedbStore::open(&options.data_dir.join("store.redb"))?);
        let cluster = config::settle(&*store, options.cluster_config.as_deref())?;
        let authority = Arc::new(Authority::open(&options.data_dir, options.certificate_lifetime)?);
        let registry = Registry::new(store, cluster.clone()).map_err(StartError::Objects)?;
        let socket = bind(options.listen)
            .map_err(|source| StartError::Listen { address: options.listen, source })?;
        let address = socket.local_addr().unwrap_or(options.listen);
        let advertised = advertised(&options, address);
        bootstrap::run(&registry, &advertised, address.port())
            .await
            .map_err(StartError::Bootstrap)?;
        let token = authority.join_token()?;
        let names = Names::new(&advertised, address, &cluster);
        let tls = tls::Tls::new(&authority, &names.addresses, &names.dns)?;
        let agents = Agents::new(&authority).map_err(|e| StartError::Tls(Box::new(e)))?;
        let seed = options.data_dir.join("preshared-seed");
        let preshared = Issuer::open(seed, options.preshared_key_rotation);
        let stopping = CancellationToken::new();
        let signer = Signer::open(&options.data_dir, &cluster.domain)?;
        let keys =
            Keys { authority: Arc::clone(&authority), secret: token.secret, preshared, signer };
        let api = Api::new(registry.clone(), keys, agents.clone(), stopping.clone());
        let wants = controllers::Options {
            ca_pem: authority.certificate_pem().into(),
            ..controllers::Options::default()
        };
        let controllers = controllers::start_with(registry.clone(), cluster, wants);
        let upkeep = tokio::spawn(keep_up(registry.clone(), advertised.clone(), address.port()));
        let listener = tokio::spawn(listener::serve(socket, tls.clone(), api, stopping.clone()));
        let url = url(&advertised, address);
        // Last: who sees the file finds the service answering.
        authority.admin_kubeconfig(&url)?;
        let renewal = Renewal { authority, tls, names, agents, url: url.clone() };
        let renewal = tokio::spawn(renewal.run(options.certificate_lifetime));
        tracing::info!(%address, url, data_dir = %options.data_dir.display(), "serving");
        Ok(Self { address, registry, stopping, listener, renewal, upkeep, controllers })
    }

    /// Ends watches, lets other requests finish for a while, stops the controllers, closes the store.
    pub async fn stop(self) {
        self.stopping.cancel();
        for task in [self.renewal, self.upkeep] {
            task.abort();
            // Aborted on purpose: only its end matters.
            let _ = task.await;
        }
        self.controllers.stop().await;
        if let Err(error) = self.listener.await {
            tracing::error!(%error, "the listener failed");
        }
        self.registry.close().await;
        tracing::info!(revision = self.registry.revision(), "stopped");
    }
}

/// Makes the cluster's own objects again when somebody deletes them.
async fn keep_up(registry: Registry, advertised: Vec<IpAddr>, port: u16) {
    loop {
        tokio::time::sleep(UPKEEP_EVERY).await;
        if let Err(error) = bootstrap::run(&registry, &advertised, port).await {
            tracing::warn!(%error, "making the cluster's own objects failed; will retry");
        }
    }
}

/// What the serving certificate is good for.
#[derive(Debug, Clone)]
struct Names {
    addresses: Vec<IpAddr>,
    dns: Vec<String>,
}

impl Names {
    fn new(advertised: &[IpAddr], listen: SocketAddr, cluster: &ClusterConfig) -> Self {
        let mut addresses = advertised.to_vec();
        addresses.push(listen.ip());
        addresses.extend([IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()]);
        addresses.extend(cluster.service_cidrs.iter().map(node_overlay_address));
        addresses.retain(|a| !a.is_unspecified());
        addresses.sort();
        addresses.dedup();
        let service = "kubernetes.default.svc";
        let mut dns: Vec<String> =
            ["localhost", "kubernetes", "kubernetes.default", service].map(str::to_owned).to_vec();
        dns.push(format!("{service}.{}", cluster.domain));
        if let Some(host) = host_name().filter(|host| mesh_model::names::is_subdomain(host)) {
            dns.push(host);
        }
        Self { addresses, dns }
    }
}

fn host_name() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    Some(name.trim().to_ascii_lowercase())
}

fn make_dir(path: &Path) -> Result<(), StartError> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| StartError::DataDir { path: path.to_owned(), source })
}

/// A stream to a pod may be silent for hours; one whose other side is gone must not last as long.
pub(crate) fn keep_alive(stream: &TcpStream) {
    let settings = TcpKeepalive::new().with_time(SILENCE).with_interval(SILENCE / 3);
    if let Err(error) = SockRef::from(stream).set_tcp_keepalive(&settings) {
        tracing::debug!(%error, "SO_KEEPALIVE");
    }
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv6() {
        tokio::net::TcpSocket::new_v6()
    } else {
        tokio::net::TcpSocket::new_v4()
    }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(1024)
}

/// The addresses to tell others: those that were given, the one that is listened on, or the one that leads out.
fn advertised(options: &Options, listening: SocketAddr) -> Vec<IpAddr> {
    if !options.advertise.is_empty() {
        return options.advertise.clone();
    }
    if !listening.ip().is_unspecified() {
        return vec![listening.ip()];
    }
    let outward = || {
        // Connecting a datagram socket sends nothing: it only asks the routing table. RFC 5737 address.
        let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
        socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
        socket.local_addr().ok().map(|a| a.ip())
    };
    vec![outward().unwrap_or(Ipv4Addr::LOCALHOST.into())]
}

fn url(advertised: &[IpAddr], listening: SocketAddr) -> String {
    let ip = advertised.first().copied().unwrap_or(listening.ip());
    format!("https://{}", SocketAddr::new(ip, listening.port()))
}

/// The port that people expect.
pub const DEFAULT_LISTEN: SocketAddr =
    SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), wellknown::API_PORT);
