//! The threads that carry packets: lanes of them for the queues of the device and for the sockets, and a slow clock beside them.
//!
//! A thread owns its buffers. It waits for others of its lane only, to read and to hand over in turn ([`lane`]).

pub(crate) mod capacity;
mod crew;
mod failure;
mod inward;
mod lane;
mod outward;
mod queues;

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use mesh_model::snapshot::WgKey;
use mesh_worker::Descriptors;

use self::crew::Crew;
use crate::config::{InvalidConfig, OverlayConfig};
use crate::counters::Counters;
use crate::facade::Kind;
use crate::handover::Legacy;
use crate::keys::{NodeKey, NodeKeys};
use crate::mtu::tunnel_mtu;
use crate::os::poll::{Stop, Watch};
use crate::os::tun::{self, Queue, TunError};
use crate::os::udp::{self, Sockets, Udp};
use crate::protocol::{Core, Estate, Kept, Outbox, Stamps};
use crate::status::{DropReason, Status};

pub use self::failure::EngineFailure;
pub(crate) use self::failure::Failure;
use self::lane::Lane;

/// Most lanes in each direction: each has queues of the device, and sockets that share the port.
const MAX_LANES: usize = 4;

/// Most threads of a lane: the first part of its work, reading, and the last, handing over, is done by one at a time, and
/// what is between is not more than this much longer.
const MAX_THREADS: usize = 4;

/// How long a device of another kind is waited for that may be about to go: the kernel's, when the overlay changes its kind. A
/// worker that is there already is ready as soon as it is gone.
const MAKES_WAY_WITHIN: Duration = Duration::from_secs(15);
const LOOKS_EVERY: Duration = Duration::from_millis(5);

/// How often the system is asked about the ways that packets take.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// What an engine starts from.
pub(crate) struct Beginning {
    /// Stamps above all that were ever given.
    pub(crate) stamps: Stamps,
    /// [`capacity::handshakes`], which takes a moment to measure.
    pub(crate) affords: u32,
    /// The [`descriptors`](Engine::descriptors) of the worker before.
    pub(crate) inherited: Descriptors,
    /// What that one left.
    pub(crate) legacy: Option<Legacy>,
}

/// A running engine. Dropping it stops the threads; the device stays.
pub(crate) struct Engine {
    shared: Arc<Shared>,
    /// One configuration at a time, and what receives for the present one.
    applied: Mutex<Applied>,
    stop: Stop,
    crew: Crew,
}

/// What all threads see.
struct Shared {
    core: Core,
    counters: Arc<Counters>,
    queues: Vec<Queue>,
    sockets: ArcSwapOption<Sockets>,
    mtu: ArcSwap<u16>,
    device: String,
    failure: Arc<Failure>,
    /// What the device had dropped before the engine started: it is older than the process.
    dropped_before: usize,
}

#[derive(Default)]
struct Applied {
    listen_port: u16,
    /// What the sockets of earlier ports had dropped.
    overflowed: usize,
    mtu: u16,
    /// When the system was last asked what it has heard about ways.
    asked: Option<Instant>,
    receivers: Option<Stop>,
    /// Whether the device is read from.
    reading: bool,
    /// Sockets of the worker before this one, until there is a port to receive at.
    inherited: Descriptors,
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
    /// Opens the device. Packets wait in it until there is a configuration.
    pub(crate) fn start(
        device: &str,
        key: &NodeKey,
        beginning: Beginning,
    ) -> Result<Self, StartError> {
        let Beginning { stamps, affords, mut inherited, legacy } = beginning;
        let queues = open_when_free(device, &mut inherited)?;
        let counters = Arc::new(Counters::default());
        let core = match legacy {
            Some(Legacy { estate, left }) => {
                Core::resume(left, key, stamps, Arc::clone(&counters), estate)
            }
            None => Core::new(Instant::now(), key, stamps, Arc::clone(&counters)),
        };
        let shared = Arc::new(Shared {
            core: core.affording(affords),
            counters,
            queues,
            sockets: ArcSwapOption::empty(),
            mtu: ArcSwap::from_pointee(crate::mtu::FLOOR),
            device: device.to_owned(),
            failure: Arc::default(),
            dropped_before: tun::overflowed(device),
        });
        let stop = Stop::new().map_err(StartError::Thread)?;
        let applied = Mutex::new(Applied { inherited, ..Applied::default() });
        Ok(Self { shared, applied, stop, crew: Crew::default() })
    }

    /// What the next worker needs, so that packets and datagrams wait for it: all queues of the device, and all sockets.
    /// Exactly those, because the kernel spreads flows over all that are open, whether anybody reads or not.
    pub(crate) fn descriptors(&self) -> io::Result<Descriptors> {
        let applied = self.lock();
        let mut all = Descriptors::default();
        tun::bequeath(&self.shared.device, &self.shared.queues, &mut all)?;
        if let Some(sockets) = &*self.shared.sockets.load() {
            sockets.bequeath(applied.listen_port, &mut all)?;
        }
        for (name, fd) in applied.inherited.iter() {
            all.insert(name, fd.try_clone_to_owned()?);
        }
        Ok(all)
    }

    /// How its threads say that they cannot go on.
    pub(crate) fn failure(&self) -> Arc<Failure> {
        Arc::clone(&self.shared.failure)
    }

    /// Stops for good, and returns what a successor needs to go on: every thread has finished what it had read, and nothing
    /// is left that could read or seal. None when they did not finish in time; then they may still be at work.
    pub(crate) fn leave(self) -> Option<Estate> {
        self.give_stop();
        if !self.crew.finish() {
            return None;
        }
        let shared = Arc::clone(&self.shared);
        drop(self);
        Some(Arc::into_inner(shared)?.core.leave(Instant::now()))
    }

    /// Puts a configuration in force. On failure the one before stays.
    ///
    /// Returns whether [`descriptors`](Self::descriptors) have changed.
    pub(crate) fn configure(&self, config: &OverlayConfig) -> Result<bool, ApplyError> {
        config.validate(&self.shared.core.public_keys())?;
        let mut applied = self.lock();
        let moved = applied.listen_port != config.listen_port;
        let opened = if moved { Some(self.open(config.listen_port, &mut applied)?) } else { None };
        if applied.mtu != config.mtu {
            tun::bring_up(&self.shared.device, config.mtu)?;
            self.shared.mtu.store(Arc::new(config.mtu));
            applied.mtu = config.mtu;
        }
        let mut outbox = Outbox::default();
        let mut fresh = rand::random::<u32>;
        let now = Instant::now();
        self.shared.core.configure(now, config, &mut fresh, &mut outbox)?;
        // Nothing is received, nor read, before the peers are known that it may come from.
        if let Some((sockets, stop)) = opened {
            self.receive(sockets, stop, &mut applied).map_err(ApplyError::Thread)?;
            applied.listen_port = config.listen_port;
            // The peers would go on sending to the old port until they hear from the new one.
            self.shared.core.announce(now, &mut outbox);
        }
        if let Some(sockets) = &*self.shared.sockets.load() {
            sockets.spread(self.shared.core.endpoints());
        }
        self.shared.send_now(&mut outbox);
        if !applied.reading {
            self.read_device().map_err(ApplyError::Thread)?;
            applied.reading = true;
        }
        Ok(moved)
    }

    fn read_device(&self) -> io::Result<()> {
        for number in 0..self.shared.lanes() {
            let queues = self.shared.queues_of(number);
            let watch = Watch::new(queues.iter().map(|queue| queue.as_fd()), &self.stop)?;
            let lane = Arc::new(Lane::new(threads(), watch));
            for _ in 0..lane.threads() {
                let (body, lane, stop) =
                    (Arc::clone(&self.shared), Arc::clone(&lane), self.stop.clone());
                let run = move || outward::run(&body, &body.queues_of(number), &lane, &stop);
                self.crew.spawn(&self.shared.failure, format!("overlay-out{number}"), run)?;
            }
        }
        Ok(())
    }

    /// This node's public keys, the one that all peers know first.
    pub(crate) fn public_keys(&self) -> Vec<WgKey> {
        self.shared.core.public_keys()
    }

    /// From now on the node has these keys.
    pub(crate) fn identify(&self, keys: NodeKeys) {
        self.shared.core.identify(keys);
    }

    fn lock(&self) -> MutexGuard<'_, Applied> {
        self.applied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets time pass; to be called every 100 ms or so.
    pub(crate) fn tick(&self, outbox: &mut Outbox) {
        let clock = SystemTime::now();
        let now = Instant::now();
        self.shared.core.follow_clock(now, clock);
        self.shared.core.tick(now, outbox);
        self.shared.send_now(outbox);
        self.follow_links(now);
    }

    /// What the system knows about the ways to peers: what it refused to send, and what routers told it.
    fn follow_links(&self, now: Instant) {
        let Some(sockets) = &*self.shared.sockets.load() else { return };
        let fits = |to: SocketAddr| Some(tunnel_mtu(udp::path_mtu(to)?, to.ip()));
        for to in sockets.take_refused() {
            if let Some(fits) = fits(to) {
                tracing::debug!(%to, fits, "a link carries less than was sent");
                self.shared.core.limit_mtu(now, to, fits);
            }
        }
        let mut applied = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
        let due = |at| now.saturating_duration_since(at) >= ASK_EVERY;
        if applied.asked.is_none_or(due) {
            applied.asked = Some(now);
            sockets.spread(self.shared.core.endpoints());
            for to in self.shared.core.busy_ways(now, ASK_EVERY * 2) {
                if let Some(fits) = fits(to) {
                    self.shared.core.hint_mtu(now, to, fits);
                }
            }
        }
    }

    /// See [`Core::stamps_to_store`].
    pub(crate) fn stamps_to_store(&self) -> Option<Kept> {
        self.shared.core.stamps_to_store()
    }

    /// The engine as it is now.
    pub(crate) fn status(&self) -> Status {
        let applied = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
        self.shared.count_overflows(applied.overflowed);
        Status {
            kind: Kind::User,
            device: self.shared.device.clone(),
            public_key: self.public_key(),
            own_keys: self.public_keys(),
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

    /// Opens a port, beside the one in use.
    fn open(&self, port: u16, applied: &mut Applied) -> Result<(Arc<Sockets>, Stop), ApplyError> {
        let counters = Arc::clone(&self.shared.counters);
        let sockets = Sockets::open(port, udp::EACH_FAMILY, &mut applied.inherited, counters)
            .map_err(|source| ApplyError::Listen { port, source })?;
        Ok((Arc::new(sockets), Stop::new().map_err(ApplyError::Thread)?))
    }

    /// Receives at an open port, and no longer at the one before.
    fn receive(&self, sockets: Arc<Sockets>, stop: Stop, applied: &mut Applied) -> io::Result<()> {
        let lanes = self.shared.lanes();
        for number in 0..lanes {
            let watch = Watch::new(sockets.of_lane(number, lanes).map(Udp::as_fd), &stop)?;
            let lane = Arc::new(Lane::new(threads(), watch));
            for _ in 0..lane.threads() {
                let (shared, sockets) = (Arc::clone(&self.shared), Arc::clone(&sockets));
                let (lane, stop) = (Arc::clone(&lane), stop.clone());
                let run = move || inward::run(&shared, (&sockets, number), &lane, &stop);
                let name = format!("overlay-in{number}");
                self.crew.spawn(&self.shared.failure, name, run)?;
            }
        }
        let before = self.shared.sockets.swap(Some(sockets));
        applied.overflowed += before.map_or(0, |sockets| sockets.overflowed());
        if let Some(old) = applied.receivers.replace(stop) {
            old.give();
        }
        // What is left of other ports is of no use any more.
        applied.inherited = Descriptors::default();
        Ok(())
    }

    fn give_stop(&self) {
        self.stop.give();
        if let Some(receivers) = &self.lock().receivers {
            receivers.give();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.give_stop();
    }
}

impl Shared {
    /// No more than there are queues, of which the worker before may have left few.
    fn lanes(&self) -> usize {
        lanes().min(self.queues.len()).max(1)
    }

    fn queues_of(&self, lane: usize) -> Vec<&Queue> {
        queues::of(&self.queues, lane, self.lanes())
    }

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

fn open_when_free(device: &str, inherited: &mut Descriptors) -> Result<Vec<Queue>, TunError> {
    let end = Instant::now() + MAKES_WAY_WITHIN;
    loop {
        match tun::open(device, lanes() * queues::EACH, inherited) {
            Err(TunError::OtherKind { .. }) if Instant::now() < end => thread::sleep(LOOKS_EVERY),
            result => return result,
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
