//! The agent itself: starts everything, then waits to be told to end.
//!
//! Nothing that runs afterwards ends with it: workers, programs, devices and pods stay for the next agent.

use std::convert::Infallible;
use std::fs::{self, File, TryLockError};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context as _, bail};
use mesh_kernel::node::LinuxNodeNetwork;
use mesh_kernel::pods::{LinuxPodNetwork, PodNetwork};
use mesh_kernel::{LoadOptions, NetNs, Programs};
use mesh_model::wellknown::{AGENT_PORT, OVERLAY_DEVICE};
use mesh_overlay::{NodeKey, Overlay};
use mesh_worker::{Client, supervise};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::board::Board;
use crate::cli::{Options, OverlayChoice};
use crate::cni::ledger::{Ledger, LedgerHandle};
use crate::cni::{self, Cni, journal};
use crate::errors::chain;
use crate::join::{Identity, JoinError, Joining};
use crate::observe::{self, Desired, Observer};
use crate::reconcile::conflist::Conflist;
use crate::reconcile::dns::Dns;
use crate::reconcile::ingress::Ingress;
use crate::reconcile::node::Node;
use crate::reconcile::overlay::Peers;
use crate::reconcile::services::Services;
use crate::reconcile::{Concern, drive};
use crate::register::{self, Registration};
use crate::server::{self, Sources};
use crate::workers::{self, Paths};
use crate::{api, link, readiness};

const LONGEST_RETRY: Duration = Duration::from_secs(10);

/// What the parts of the agent share.
struct Agent {
    options: Options,
    paths: Paths,
    board: Board,
    key: NodeKey,
    overlay: Arc<Overlay>,
    programs: Arc<OnceLock<Arc<Programs>>>,
    mtu: u16,
    desired: watch::Sender<Option<Desired>>,
    plugin: watch::Sender<cni::Readiness>,
    node: watch::Sender<register::Readiness>,
}

/// Runs until SIGTERM or SIGINT.
pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let paths = Paths::new(&options);
    make_directories(&paths, &options.cgroup)?;
    let _alone = lock(&paths.state().join("agent.lock"))?;
    let key = NodeKey::load_or_create(&paths.node_key())?;
    let agent = Arc::new(Agent {
        overlay: Arc::new(choose_overlay(&options, &paths)?),
        mtu: mesh_overlay::mtu::device_mtu([link::smallest_mtu(&options.addresses)]),
        desired: watch::Sender::new(initial(&paths)),
        plugin: watch::Sender::new(cni::Readiness::starting("the agent is starting")),
        node: watch::Sender::new(register::Readiness::starting()),
        board: Board::default(),
        programs: Arc::default(),
        key,
        paths,
        options,
    });
    agent.start_workers()?;
    agent.drive_workers();
    tokio::spawn(Arc::clone(&agent).kernel());
    tokio::spawn(readiness::judge(
        agent.desired.subscribe(),
        agent.board.clone(),
        agent.mtu,
        agent.plugin.clone(),
        agent.node.clone(),
    ));
    agent.serve_admin()?;
    tracing::info!(node = %agent.options.node, mtu = agent.mtu, overlay = %agent.overlay.kind(), "agent runs");

    let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("wait for SIGINT")?;
    let member = Arc::clone(&agent).member();
    tokio::select! {
        failed = member => failed?,
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("agent ends; workers, programs and pods stay");
    Ok(())
}

fn make_directories(paths: &Paths, cgroup: &Path) -> anyhow::Result<()> {
    let journal = paths.journal();
    let journal = journal.parent().context("the journal has a directory")?;
    for directory in [paths.run(), paths.state(), journal] {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .with_context(|| format!("make {}", directory.display()))?;
    }
    fs::create_dir_all(cgroup).with_context(|| format!("make --cgroup {}", cgroup.display()))
}

/// Two agents with one state would give out addresses twice.
fn lock(path: &Path) -> anyhow::Result<File> {
    let file = File::options().write(true).create(true).truncate(false).mode(0o600).open(path);
    let file = file.with_context(|| format!("open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!("another agent holds {}", path.display()),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("lock {}", path.display()))
        }
    }
}

fn choose_overlay(options: &Options, paths: &Paths) -> anyhow::Result<Overlay> {
    let kind = match options.overlay {
        OverlayChoice::Auto => mesh_overlay::Kind::detect(),
        OverlayChoice::User => mesh_overlay::Kind::User,
        OverlayChoice::Kernel => mesh_overlay::Kind::Kernel,
    };
    match kind {
        mesh_overlay::Kind::User => Ok(Overlay::user(paths.worker_socket(workers::OVERLAY))),
        mesh_overlay::Kind::Kernel => {
            let key = NodeKey::load_or_create(&paths.node_key()).context("the overlay's key")?;
            Ok(Overlay::kernel(OVERLAY_DEVICE.parse().context("the overlay's device")?, key))
        }
    }
}

/// What an earlier agent wanted. It was saved before it was put in force, so that nothing newer can be undone by it.
fn initial(paths: &Paths) -> Option<Desired> {
    let snapshot = observe::saved(&paths.snapshot())?;
    tracing::info!(peers = snapshot.peers.len(), "going on with the saved snapshot");
    Some(Desired { snapshot: Arc::new(snapshot), synced: false })
}

impl Agent {
    fn start_workers(&self) -> anyhow::Result<()> {
        let program = std::env::current_exe().context("find the agent's own program")?;
        let dns = workers::dns(&self.paths, &program);
        let ingress = workers::ingress(&self.paths, &program, &self.options);
        let overlay = (self.overlay.kind() == mesh_overlay::Kind::User)
            .then(|| workers::overlay(&self.paths, &program));
        for spec in [Some(dns), ingress, overlay].into_iter().flatten() {
            tokio::spawn(supervise::keep(spec));
        }
        Ok(())
    }

    fn drive<C: Concern>(&self, concern: C) {
        tokio::spawn(drive(concern, self.desired.subscribe(), self.board.clone()));
    }

    /// What needs nothing of this process but a socket to a worker.
    fn drive_workers(&self) {
        self.drive(Peers { overlay: Arc::clone(&self.overlay), mtu: self.mtu });
        let upstreams = self.options.dns_upstreams.clone();
        self.drive(Dns { worker: self.worker(workers::DNS), upstreams });
        if self.options.http_port.or(self.options.https_port).is_some() {
            self.drive(Ingress { worker: self.worker(workers::INGRESS) });
        }
    }

    fn worker(&self, name: &str) -> Client {
        Client::new(self.paths.worker_socket(name))
    }

    /// Loads the programs, as often as it takes; then everything that needs them.
    async fn kernel(self: Arc<Self>) {
        let programs = self.load_programs().await;
        let _ = self.programs.set(Arc::clone(&programs));
        let device = OVERLAY_DEVICE.parse().expect("a constant and valid interface name");
        let network = LinuxNodeNetwork::new(NetNs::current(), Arc::clone(&programs), device);
        self.drive(Node { network: Arc::new(network), mtu: self.mtu });
        self.drive(Services::new(programs.services()));
        tokio::spawn(Arc::clone(&self).retire(Arc::clone(&programs)));
        let pods: Arc<dyn PodNetwork> = Arc::new(LinuxPodNetwork::new(NetNs::current(), programs));
        let mut pause = Duration::from_millis(100);
        loop {
            let Err(error) = self.serve_plugin(Arc::clone(&pods)).await;
            let error = chain(error.as_ref());
            tracing::error!(error, "CNI not served, trying again");
            self.board.failed("cni", vec![error]);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_RETRY);
        }
    }

    async fn load_programs(&self) -> Arc<Programs> {
        let mut pause = Duration::from_millis(500);
        loop {
            let options = LoadOptions::new(&self.options.bpf_dir, &self.options.cgroup);
            let load = tokio::task::spawn_blocking(move || Programs::open_or_load(&options));
            match load.await {
                Ok(Ok(programs)) => {
                    tracing::info!(dir = %self.options.bpf_dir.display(), "eBPF programs loaded and attached");
                    self.board.done("programs");
                    return Arc::new(programs);
                }
                Ok(Err(error)) => {
                    let error = chain(&error);
                    tracing::error!(error, "eBPF programs not loaded, trying again");
                    self.board.failed("programs", vec![error]);
                }
                Err(panic) => self.board.failed("programs", vec![panic.to_string()]),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_RETRY);
        }
    }

    /// Programs of an older ABI serve until the new maps are filled.
    async fn retire(self: Arc<Self>, programs: Arc<Programs>) {
        let mut standings = self.board.subscribe();
        let filled = |concern| self.board.standing(concern).ever;
        while !(filled("services") && filled("node")) {
            if standings.changed().await.is_err() {
                return;
            }
        }
        match tokio::task::spawn_blocking(move || programs.retire_old_versions()).await {
            Ok(Ok(true)) => tracing::info!("eBPF programs of another version retired"),
            Ok(Err(error)) => tracing::warn!(error = chain(&error), "old eBPF programs stay"),
            Ok(Ok(false)) | Err(_) => {}
        }
    }

    async fn serve_plugin(&self, network: Arc<dyn PodNetwork>) -> anyhow::Result<Infallible> {
        let boot = journal::boot_id().context("read the boot id")?;
        let storage = journal::FileStorage::new(self.paths.journal());
        let (ledger, damaged) = Ledger::open(Box::new(storage), &boot)
            .with_context(|| format!("open {}", self.paths.journal().display()))?;
        if damaged > 0 {
            tracing::warn!(damaged, "lines of the address journal made no sense");
        }
        let ledger = LedgerHandle::start(ledger).context("start the address ledger")?;
        let state = self.paths.state().to_owned();
        let cni = Cni::new(ledger, network, self.plugin.subscribe(), state);
        cni.recover().await?;
        tracing::info!(socket = %self.paths.cni_socket().display(), "serving CNI");
        let conflist = Conflist {
            directory: self.options.cni_conf_dir.clone(),
            socket: self.paths.cni_socket(),
            state_dir: self.paths.state().to_owned(),
        };
        let keep = conflist.keep(self.plugin.subscribe(), self.board.clone());
        let socket = self.paths.cni_socket();
        tokio::select! {
            () = keep => bail!("readiness ended"),
            ended = cni::serve(&socket, cni) => Ok(ended?),
        }
    }

    fn sources(&self) -> Sources {
        Sources {
            node: self.options.node.clone(),
            desired: self.desired.subscribe(),
            overlay: Arc::clone(&self.overlay),
            board: self.board.clone(),
            programs: Arc::clone(&self.programs),
            dns: self.worker(workers::DNS),
            ingress: self.worker(workers::INGRESS),
            ingress_listeners: self
                .options
                .http_port
                .map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
                .into_iter()
                .collect(),
        }
    }

    fn serve_admin(&self) -> anyhow::Result<()> {
        let path = self.paths.admin_socket();
        let listener = cni::bind(&path).with_context(|| format!("listen on {}", path.display()))?;
        let router = server::router(self.sources());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(())
    }

    /// Everything that needs the node to be a member of the cluster. Ends only when it can never become one.
    async fn member(self: Arc<Self>) -> anyhow::Result<()> {
        let identity = self.identity().await?;
        let client = api::client(&identity)?;
        let registration = Registration {
            node: self.options.node.clone(),
            addresses: self.options.addresses.clone(),
            public_key: self.key.public(),
            overlay: match self.overlay.kind() {
                mesh_overlay::Kind::Kernel => "kernel",
                mesh_overlay::Kind::User => "user",
            },
            overlay_port: identity.cluster.overlay_port,
            container_runtime: self.container_runtime().await,
        };
        tokio::spawn(register::run(client.clone(), registration, self.node.subscribe()));
        tokio::spawn(Arc::clone(&self).serve_https(identity.clone()));
        let observer = Observer {
            client,
            node: self.options.node.clone(),
            cluster: identity.cluster,
            file: self.paths.snapshot(),
        };
        observer.run(self.desired.clone()).await;
        Ok(())
    }

    async fn identity(&self) -> Result<Identity, JoinError> {
        let options = &self.options;
        let joining = Joining {
            node: &options.node,
            addresses: &options.addresses,
            server: options.server.as_deref(),
            token: options.token.as_deref(),
            token_file: options.token_file.as_deref(),
            state_dir: self.paths.state(),
        };
        let mut pause = Duration::from_millis(200);
        loop {
            match joining.identity().await {
                Err(
                    error @ (JoinError::Connect { .. }
                    | JoinError::TimedOut { .. }
                    | JoinError::Http { .. }
                    | JoinError::TokenFile { .. }),
                ) => {
                    tracing::warn!(error = chain(&error), "not joined yet, trying again");
                    self.board.failed("join", vec![chain(&error)]);
                }
                Ok(identity) => {
                    self.board.done("join");
                    return Ok(identity);
                }
                Err(error) => return Err(error),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_RETRY);
        }
    }

    async fn container_runtime(&self) -> String {
        let client = mesh_cri::Client::new(&self.options.containerd);
        match tokio::time::timeout(Duration::from_secs(2), client.version()).await {
            Ok(Ok(version)) => format!("{}://{}", version.runtime_name, version.runtime_version),
            _ => "containerd://unknown".to_owned(),
        }
    }

    async fn serve_https(self: Arc<Self>, identity: Identity) {
        let mut pause = Duration::from_millis(200);
        loop {
            let served = async {
                let listener = server::tls::listen(AGENT_PORT)?;
                self.board.done("https");
                server::tls::serve(&identity, listener, server::router(self.sources())).await
            };
            let Err(error) = served.await;
            tracing::error!(error = chain(&error), "HTTPS not served, trying again");
            self.board.failed("https", vec![chain(&error)]);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_RETRY);
        }
    }
}
