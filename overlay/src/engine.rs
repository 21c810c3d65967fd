//! The threads that carry packets: a lane of them per device queue and per socket, and a slow clock beside them.
//!
//! A thread owns its buffers. It waits for others of its lane only, to read and to hand over in turn ([`lane`]).

mod capacity;
mod failure;
mod inward;
mod lane;
mod outward;
mod shrink;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use mesh_model::snapshot::WgKey;

use crate::config::{InvalidConfig, OverlayConfig};
use crate::counters::Counters;
use crate::facade::Kind;
use crate::keys::NodeKey;
use crate::os::poll::Stop;
use crate::os::tun::{self, Queue, TunError};
use crate::os::udp::{self, Sockets};
use crate::protocol::{Core, Outbox, Stamps};
use crate::status::{DropReason, Status};

pub use self::failure::EngineFailure;
use self::failure::Failure;
use self::lane::Lane;
use self::shrink::Shrink;

/// Most queues, and sockets that share the port: each is a lane of its own.
const MAX_LANES: usize = 4;

/// Most threads of a lane: the first part of its work, reading, and the last, handing over, is done by one at a time, and
/// what is between is not more than this much longer.
const MAX_THREADS: usize = 4;

/// A running engine. Dropping it stops the threads; the device stays.
pub(crate) struct Engine {
    shared: Arc<Shared>,
    /// One configuration at a time, and what receives for the present one.
    applied: Mutex<Applied>,
    stop: Stop,
}

/// What all threads see.
struct Shared {
    core: Core,
    counters: Arc<Counters>,
    queues: Vec<Queue>,
    sockets: ArcSwapOption<Sockets>,
    mtu: ArcSwap<u16>,
    device: String,
    failure: Failure,
    /// What the device had dropped before the engine started: it is older than the process.
    dropped_before: usize,
}

#[derive(Default)]
struct Applied {
    listen_port: u16,
    /// What the sockets of earlier ports had dropped.
    overflowed: usize,
    /// As configured; the device may have a smaller one.
    mtu: u16,
    shrink: Shrink,
    receivers: Option<Stop>,
}

/// The engine could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The device could not be opened.
    #[error("open the overlay device")]
    Device(#[from] TunError),
    /// A thread could not be started.
    #[error("start a thread of the engine")]
    Thread(#[source] io::Error),
}

/// A configuration could not be put in force.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApplyError {
    /// It contradicts itself.
    #[error(transparent)]
    Invalid(#[from] InvalidConfig),
    /// The port could not be opened.
    #[error("listen on UDP port {port}")]
    Listen {
        /// The port.
        port: u16,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The device refused its MTU.
    #[error("configure the overlay device")]
    Device(#[from] TunError),
    /// A thread could not be started.
    #[error("start a thread of the engine")]
    Thread(#[source] io::Error),
}

impl Engine {
    /// Opens the device and starts to read from it; without a configuration all packets are dropped.
    pub(crate) fn start(device: &str, key: &NodeKey, stamps: Stamps) -> Result<Self, StartError> {
        let queues = tun::open(device, lanes())?;
        let counters = Arc::new(Counters::default());
        let shared = Arc::new(Shared {
            core: Core::new(Instant::now(), key, stamps, Arc::clone(&counters))
                .affording(capacity::handshakes(key)),
            counters,
            queues,
            sockets: ArcSwapOption::empty(),
            mtu: ArcSwap::from_pointee(crate::mtu::FLOOR),
            device: device.to_owned(),
            failure: Failure::default(),
            dropped_before: tun::overflowed(device),
        });
        let stop = Stop::new().map_err(StartError::Thread)?;
        for queue in 0..shared.queues.len() {
            let lane = Arc::new(Lane::new(threads()));
            for _ in 0..lane.threads() {
                let (body, lane, stop) = (Arc::clone(&shared), Arc::clone(&lane), stop.clone());
                let run = move || outward::run(&body, queue, &lane, &stop);
                spawn(&shared, format!("overlay-out{queue}"), run).map_err(StartError::Thread)?;
            }
        }
        Ok(Self { shared, applied: Mutex::default(), stop })
    }

    /// Puts a configuration in force. On failure the one before stays.
    pub(crate) fn configure(&self, config: &OverlayConfig) -> Result<(), ApplyError> {
        config.validate(self.public_key())?;
        let mut applied = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
        let moved = applied.listen_port != config.listen_port;
        if moved {
            self.listen(config.listen_port, &mut applied)?;
        }
        if applied.mtu != config.mtu {
            tun::bring_up(&self.shared.device, config.mtu)?;
            self.shared.mtu.store(Arc::new(config.mtu));
            applied.mtu = config.mtu;
            applied.shrink.forget();
        }
        let mut outbox = Outbox::default();
        let mut fresh = rand::random::<u32>;
        let now = Instant::now();
        self.shared.core.configure(now, config, &mut fresh, &mut outbox)?;
        if moved {
            // The peers would go on sending to the old port until they hear from the new one.
            self.shared.core.announce(now, &mut outbox);
        }
        self.shared.send_now(&mut outbox);
        Ok(())
    }

    /// Lets time pass; to be called every 100 ms or so.
    pub(crate) fn tick(&self, outbox: &mut Outbox) {
        let now = Instant::now();
        self.shared.core.tick(now, outbox);
        self.shared.send_now(outbox);
        self.follow_links(now);
    }

    fn follow_links(&self, now: Instant) {
        let Some(sockets) = &*self.shared.sockets.load() else { return };
        let mut applied = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
        let (refused, configured) = (sockets.take_refused(), applied.mtu);
        if let Some(mtu) = applied.shrink.look(now, refused, configured, udp::path_mtu) {
            tracing::info!(mtu, configured, "the link carries another size; the device follows");
            match tun::bring_up(&self.shared.device, mtu) {
                Ok(()) => self.shared.mtu.store(Arc::new(mtu)),
                Err(error) => tracing::warn!(%error, "the device keeps its MTU"),
            }
        }
    }

    /// See [`Core::stamps_to_store`].
    pub(crate) fn stamps_to_store(&self) -> Option<Duration> {
        self.shared.core.stamps_to_store()
    }

    /// Waits until a thread had to give up: then the process has to start anew. Cancel safe.
    pub(crate) async fn failed(&self) -> EngineFailure {
        self.shared.failure.happened().await
    }

    /// The engine as it is now.
    pub(crate) fn status(&self) -> Status {
        let applied = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
        self.shared.count_overflows(applied.overflowed);
        Status {
            kind: Kind::User,
            device: self.shared.device.clone(),
            public_key: self.public_key(),
            listen_port: applied.listen_port,
            mtu: applied.mtu,
            peers: self.shared.core.peers(Instant::now()),
            traffic: self.shared.counters.traffic(),
            drops: self.shared.counters.drops(),
        }
    }

    fn public_key(&self) -> WgKey {
        self.shared.core.public_key()
    }

    /// Opens the new port before it closes the old one.
    fn listen(&self, port: u16, applied: &mut Applied) -> Result<(), ApplyError> {
        let counters = Arc::clone(&self.shared.counters);
        let sockets = Sockets::bind(port, lanes(), counters)
            .map_err(|source| ApplyError::Listen { port, source })?;
        let sockets = Arc::new(sockets);
        let stop = Stop::new().map_err(ApplyError::Thread)?;
        for place in 0..sockets.len() {
            let queue = place % self.shared.queues.len();
            let lane = Arc::new(Lane::new(threads()));
            for _ in 0..lane.threads() {
                let (shared, sockets) = (Arc::clone(&self.shared), Arc::clone(&sockets));
                let (lane, stop) = (Arc::clone(&lane), stop.clone());
                let run = move || inward::run(&shared, (&sockets, place), &lane, queue, &stop);
                spawn(&self.shared, format!("overlay-in{place}"), run)
                    .map_err(ApplyError::Thread)?;
            }
        }
        let before = self.shared.sockets.swap(Some(sockets));
        applied.overflowed += before.map_or(0, |sockets| sockets.overflowed());
        if let Some(old) = applied.receivers.replace(stop) {
            old.give();
        }
        applied.listen_port = port;
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop.give();
        let applied = self.applied.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(receivers) = &applied.receivers {
            receivers.give();
        }
    }
}

impl Shared {
    /// Asks the system what it dropped before the engine saw it.
    fn count_overflows(&self, earlier: usize) {
        let sockets = self.sockets.load().as_ref().map_or(0, |sockets| sockets.overflowed());
        self.counters.set_dropped(DropReason::SocketQueueFull, earlier + sockets);
        let device = tun::overflowed(&self.device).saturating_sub(self.dropped_before);
        self.counters.set_dropped(DropReason::DeviceQueueFull, device);
    }

    /// Sends without waiting: what does not fit is dropped, and counted.
    fn send_now(&self, outbox: &mut Outbox) {
        match &*self.sockets.load() {
            Some(sockets) => {
                while let Some(train) = outbox.take() {
                    sockets.send(&train, None);
                }
            }
            None => outbox.clear(),
        }
    }
}

fn lanes() -> usize {
    cores().min(MAX_LANES)
}

/// Half of the cores seal or open for one flow; the other half has to read, route and receive what they carry.
fn threads() -> usize {
    (cores() / 2).clamp(1, MAX_THREADS)
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Starts a thread that ends when told to; when it ends for another reason, the engine has failed.
fn spawn(
    shared: &Arc<Shared>,
    name: String,
    body: impl FnOnce() -> Result<(), EngineFailure> + Send + 'static,
) -> io::Result<()> {
    let shared = Arc::clone(shared);
    let thread = name.clone();
    let run = move || {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
        match result {
            Ok(Ok(())) => {}
            Ok(Err(failure)) => shared.failure.report(failure),
            Err(_) => shared.failure.report(EngineFailure::Panicked { thread }),
        }
    };
    // The stacks hold no buffers; the default of 2 MiB would only be address space.
    thread::Builder::new().name(name).stack_size(256 << 10).spawn(run).map(drop)
}
