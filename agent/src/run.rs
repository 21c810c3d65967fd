//! The agent itself: starts everything, then waits to be told to end.
//!
//! Nothing that runs afterwards ends with it: workers, programs, devices and pods stay for the next agent.

use std::fs::{self, File, TryLockError};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context as _, bail};
use axum::Router;
use mesh_kernel::Programs;
use mesh_kernel::node::LinuxNodeNetwork;
use mesh_model::Snapshot;
use mesh_model::snapshot::WgKey;
use mesh_overlay::Overlay;
use mesh_overlay::keys::NodeKeys;
use mesh_worker::{Client, supervise};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, watch};

use crate::board::Board;
use crate::encryption::Checks;
use crate::flows::Flows;
use crate::observe::Desired;
use crate::paths::forward::Forwarder;
use crate::paths::outlook::Legacy;
use crate::paths::{self, Seen};
use crate::reconcile::dns::Dns;
use crate::reconcile::ingress::Ingress;
use crate::reconcile::overlay::Peers;
use crate::reconcile::{Concern, drive};
use crate::rotation::{self, Rotation};
use crate::saved::Saved;
use crate::server::{self, Sources};
use crate::settings::Options;
use crate::switch::{self, Whereabouts};
use crate::trace::Marks;
use crate::workers::{self, Paths};
use crate::{cni, link, memory, preshared, readiness, register};

mod change;
mod kernel;
mod member;

use self::kernel::overlay_device;

const LONGEST_RETRY: Duration = Duration::from_secs(10);

/// The pause after the next failure.
fn longer(pause: Duration) -> Duration {
    (pause * 2).min(LONGEST_RETRY)
}

/// What the parts of the agent share.
struct Agent {
    options: Options,
    paths: Paths,
    board: Board,
    /// The key that the node had first: its name on the overlay.
    name_key: WgKey,
    rotation: Rotation,
    overlay: Arc<Overlay>,
    programs: Arc<OnceLock<Arc<Programs>>>,
    network: OnceLock<Arc<LinuxNodeNetwork>>,
    pod_routes: Arc<OnceLock<Router>>,
    runtime_version: Arc<OnceLock<String>>,
    mtu: u16,
    /// Told when the overlay device has been made.
    overlay_made: Arc<Notify>,
    desired: watch::Sender<Option<Desired>>,
    plugin: watch::Sender<cni::Readiness>,
    node: watch::Sender<register::Readiness>,
    /// How many pod blocks of each family the node asks for, once it does.
    blocks_wanted: watch::Sender<Option<usize>>,
    seen: watch::Sender<Seen>,
    checks: Arc<Checks>,
    flows: Flows,
    marks: Marks,
}

/// Runs until SIGTERM or SIGINT.
pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let paths = Paths::new(&options);
    make_directories(&paths, &options.cgroup)?;
    let _alone = lock(&paths.state().join("agent.lock"))?;
    let name_key = NodeKeys::name(&paths.node_key())?;
    let overlay = choose_overlay(&options, &paths)?;
    let rotation = Rotation::new(overlay.kind(), &paths.node_key())?;
    let (snapshot, saved) = Saved::load(paths.snapshot());
    let agent = Arc::new(Agent {
        mtu: device_mtu(overlay.kind(), &options.addresses),
        overlay: Arc::new(overlay),
        overlay_made: Arc::default(),
        desired: watch::Sender::new(snapshot.map(|snapshot| initial(&paths, snapshot))),
        plugin: watch::Sender::new(cni::Readiness::starting("the agent is starting")),
        node: watch::Sender::new(register::Readiness::starting()),
        blocks_wanted: watch::Sender::new(None),
        seen: watch::Sender::new(Seen::default()),
        checks: Arc::default(),
        flows: Flows::new(options.node.clone(), options.flow_history),
        marks: Marks::default(),
        board: Board::default(),
        programs: Arc::default(),
        network: OnceLock::new(),
        pod_routes: Arc::default(),
        runtime_version: Arc::default(),
        name_key,
        rotation,
        paths,
        options,
    });
    let program = std::env::current_exe().context("find the agent's own program")?;
    let engine_started = agent.start_engine(&program);
    let switched = agent.switch().await?;
    let is_switched = switched.is_some();
    agent.drive_overlay(engine_started, switched.unwrap_or_default());
    tokio::spawn(Arc::clone(&agent).kernel(is_switched));
    if is_switched {
        match agent.carries_again().await {
            true => tracing::info!("the overlay carries packets again"),
            false => tracing::warn!("the overlay does not carry packets yet, going on"),
        }
    }
    agent.start_workers(&program);
    agent.watch_paths(&program);
    tokio::spawn(rotation::keep(rotation::Keeper {
        rotation: agent.rotation.clone(),
        overlay: Arc::clone(&agent.overlay),
        desired: agent.desired.clone(),
        file: agent.paths.node_key(),
        every: agent.options.rotate_key_every,
        board: agent.board.clone(),
        exchanged: None,
    }));
    let overlay = Arc::clone(&agent.overlay);
    tokio::spawn(async move { tokio::join!(overlay.follow(), overlay.measure()) });
    tokio::spawn(readiness::judge(
        agent.desired.subscribe(),
        agent.board.clone(),
        agent.mtu,
        agent.plugin.clone(),
        agent.node.clone(),
    ));
    agent.serve_admin()?;
    tokio::spawn(memory::keep_small());
    tracing::info!(node = %agent.options.node, mtu = agent.mtu, overlay = %agent.overlay.kind(), "agent runs");

    let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("wait for SIGINT")?;
    let member = Arc::clone(&agent).member(saved);
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
pub(crate) fn lock(path: &Path) -> anyhow::Result<File> {
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
    let ahead = mesh_overlay::worker::dated_ahead(&paths.node_key());
    match switch::kind(options.overlay, mesh_overlay::Kind::detect, ahead) {
        mesh_overlay::Kind::User => Ok(Overlay::user(paths.worker_socket(workers::OVERLAY))),
        mesh_overlay::Kind::Kernel => {
            Overlay::kernel(overlay_device(), paths.node_key()).context("the overlay's key")
        }
    }
}

/// Our engine measures the way to each peer, so that the device carries what the widest link does. The kernel's does not.
fn device_mtu(kind: mesh_overlay::Kind, addresses: &[IpAddr]) -> u16 {
    let links = link::mtus(addresses);
    let link = match kind {
        mesh_overlay::Kind::User => links.into_iter().max(),
        mesh_overlay::Kind::Kernel => links.into_iter().min(),
    };
    mesh_overlay::mtu::device_mtu(link)
}

/// What an earlier agent wanted. It was saved before it was put in force, so that nothing newer can be undone by it.
fn initial(paths: &Paths, snapshot: Arc<Snapshot>) -> Desired {
    tracing::info!(peers = snapshot.peers.len(), "going on with the saved snapshot");
    // Also what was away then: traffic is not to be sent there again because this process starts.
    let outlook = Arc::new(Legacy::load(&paths.paths()).outlook());
    let preshared = Arc::new(preshared::saved(&paths.preshared()));
    Desired { snapshot, outlook, synced: false, preshared }
}

impl Agent {
    /// Starts our engine where it is to carry the packets: before the kernel's device makes way, so that it is ready by then. Returns
    /// what is told whenever there is another one.
    fn start_engine(&self, program: &Path) -> Arc<Notify> {
        let worker = workers::overlay(&self.paths, program);
        let started = Arc::clone(&worker.started);
        if self.overlay.kind() == mesh_overlay::Kind::User {
            tokio::spawn(supervise::keep(worker));
        }
        started
    }

    /// Starts all other workers, and whatever needs nothing of this process but a socket to one of them.
    fn start_workers(&self, program: &Path) {
        let dns = workers::dns(&self.paths, program);
        let upstreams = self.options.dns_upstreams.clone();
        let (worker, restarted) = (self.worker(workers::DNS), Arc::clone(&dns.started));
        self.drive(Dns { worker, restarted, upstreams });
        tokio::spawn(supervise::keep(dns));
        if let Some(ingress) = workers::ingress(&self.paths, program, &self.options) {
            let (worker, restarted) = (self.worker(workers::INGRESS), Arc::clone(&ingress.started));
            self.drive(Ingress { worker, restarted });
            tokio::spawn(supervise::keep(ingress));
        }
    }

    fn drive_overlay(&self, engine: Arc<Notify>, whereabouts: Whereabouts) {
        let overlay = Arc::clone(&self.overlay);
        let (mtu, own_keys) = (self.mtu, self.rotation.wanted());
        let (proofs, made) = (self.rotation.proofs(), Arc::clone(&self.overlay_made));
        self.drive(Peers {
            overlay,
            mtu,
            restarted: engine,
            whereabouts,
            own_keys,
            made,
            there: false,
            proofs,
        });
    }

    fn watch_paths(&self, program: &Path) {
        let relay = workers::relay(&self.paths, program);
        tokio::spawn(paths::watch(paths::Settings {
            key: self.name_key,
            desired: self.desired.clone(),
            overlay: Arc::clone(&self.overlay),
            seen: self.seen.clone(),
            board: self.board.clone(),
            forwarder: Forwarder::start(relay, self.worker(workers::RELAY)),
            file: self.paths.paths(),
            proofs: self.rotation.proofs(),
        }));
    }

    fn drive<C: Concern>(&self, concern: C) {
        tokio::spawn(drive(concern, self.desired.subscribe(), self.board.clone()));
    }

    fn worker(&self, name: &str) -> Client {
        Client::new(self.paths.worker_socket(name))
    }

    fn sources(&self) -> Sources {
        Sources {
            node: self.options.node.clone(),
            desired: self.desired.subscribe(),
            overlay: Arc::clone(&self.overlay),
            seen: self.seen.subscribe(),
            board: self.board.clone(),
            programs: Arc::clone(&self.programs),
            pods: Arc::clone(&self.pod_routes),
            dns: self.worker(workers::DNS),
            ingress: self.worker(workers::INGRESS),
            ingress_listeners: self
                .options
                .http_port
                .map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
                .into_iter()
                .collect(),
            checks: Arc::clone(&self.checks),
            flows: self.flows.clone(),
            marks: self.marks.clone(),
            rotation: self.rotation.clone(),
        }
    }

    fn serve_admin(&self) -> anyhow::Result<()> {
        let path = self.paths.admin_socket();
        let listener = cni::bind(&path).with_context(|| format!("listen on {}", path.display()))?;
        let router = server::router(self.sources());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(())
    }
}
