//! The node's part in watching the paths to all others: sockets, clock and names around the core in `mesh-overlay`.
//!
//! Nothing here carries traffic. When the agent is away, traffic, relays and the service tables stay as they were, and
//! this node's kernel goes on answering the others' echoes.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher as _, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_model::cluster::node_overlay_address;
use mesh_model::snapshot::WgKey;
use mesh_model::{NodeName, Snapshot};
use mesh_overlay::paths::message::MAX_BYTES;
use mesh_overlay::paths::{Action, Core, Message, Pair, Past, PathView, TICK};
use mesh_overlay::relay::RelayedPair;
use mesh_overlay::{Overlay, Status};
use tokio::sync::{mpsc, watch};

use self::sockets::Sockets;
use crate::board::Board;
use crate::errors::chain;
use crate::link;
use crate::observe::Desired;
use crate::rotation::Proofs;

pub(crate) mod forward;
pub(crate) mod outlook;
mod sockets;
mod traffic;

use self::forward::Forwarder;
use self::outlook::{Legacy, Outlook};
use self::traffic::Traffic;

/// Name of this part on the board.
const NAME: &str = "paths";
/// Pause before the sockets are opened again: the overlay device may not be there yet.
const REOPEN: Duration = Duration::from_secs(1);
/// When nobody is heard for so long, new sockets are tried: the device may have been made anew.
const REOPEN_ISOLATED: Duration = Duration::from_secs(5);
/// How often the overlay is asked for its counters where nothing hangs on them.
const STATUS_IDLE: Duration = Duration::from_secs(5);
/// The same where something does: a relay in use, or peers that nobody here watches.
const STATUS_BUSY: Duration = Duration::from_secs(1);
/// How soon the overlay has followed the other side to a relay, or off it.
const FOLLOWS: Duration = Duration::from_millis(200);
/// How old what reports show may be.
const SEEN_FOR: Duration = Duration::from_secs(1);

/// What reports show.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    /// When it was so.
    pub(crate) at: Instant,
    /// Whether nobody at all is heard.
    pub(crate) isolated: bool,
    /// All paths, ordered by key.
    pub(crate) paths: Vec<PathView>,
    /// Messages that were refused: malformed, or not from the agent of a known node.
    pub(crate) refused: u64,
}

impl Default for Seen {
    fn default() -> Self {
        Self { at: Instant::now(), isolated: false, paths: vec![], refused: 0 }
    }
}

/// What the watcher needs.
pub(crate) struct Settings {
    pub(crate) key: WgKey,
    pub(crate) desired: watch::Sender<Option<Desired>>,
    pub(crate) overlay: Arc<Overlay>,
    pub(crate) seen: watch::Sender<Seen>,
    pub(crate) board: Board,
    pub(crate) forwarder: Forwarder,
    /// Who knows this node's next key, and whose keys this node knows.
    pub(crate) proofs: Proofs,
    /// Where the next agent finds what this one knew.
    pub(crate) file: PathBuf,
}

/// Watches for ever.
pub(crate) async fn watch(settings: Settings) {
    let mut desired = settings.desired.subscribe();
    let mut watcher = Watcher::new(settings);
    loop {
        let own = desired.borrow_and_update().as_ref().and_then(|d| own_address(&d.snapshot));
        let Some(own) = own else {
            if desired.changed().await.is_err() {
                return;
            }
            continue;
        };
        let served = match Sockets::open(own, watcher.secret) {
            Ok(sockets) => {
                watcher.settings.board.done(NAME);
                watcher.serve(&sockets, own, &mut desired).await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = served {
            let failure = format!("open the sockets for probes on {own}: {error}");
            watcher.settings.board.failed(NAME, vec![failure]);
            tokio::time::sleep(REOPEN).await;
        }
    }
}

/// The node's own address in its first block.
fn own_address(snapshot: &Snapshot) -> Option<IpAddr> {
    snapshot.node.blocks.first().map(node_overlay_address)
}

struct Watcher {
    settings: Settings,
    core: Core,
    secret: u64,
    past: Past,
    /// Addresses and names of the other nodes.
    directory: Directory,
    traffic: Traffic,
    /// See [`Outlook::mtus`].
    mtus: BTreeMap<WgKey, u16>,
    pairs: Vec<Pair>,
    outlook: Arc<Outlook>,
    legacy: watch::Sender<Legacy>,
    published: Option<u64>,
    refused: u64,
    out: Vec<Action>,
    statuses: (mpsc::Sender<Status>, mpsc::Receiver<Status>),
    next_status: Instant,
}

/// Who is who.
#[derive(Debug, Default)]
struct Directory {
    snapshot: Option<Arc<Snapshot>>,
    by_address: BTreeMap<IpAddr, WgKey>,
    addresses: BTreeMap<WgKey, IpAddr>,
    names: BTreeMap<WgKey, NodeName>,
}

impl Directory {
    /// The other nodes of a snapshot, by their addresses of the same family as `own`.
    fn new(snapshot: &Arc<Snapshot>, own: IpAddr) -> Self {
        let mut directory = Self { snapshot: Some(Arc::clone(snapshot)), ..Self::default() };
        for peer in snapshot.peers.iter() {
            directory.names.insert(peer.public_key, peer.node.clone());
            let mut addresses = peer.allowed_ips.iter().map(node_overlay_address);
            if let Some(address) = addresses.find(|address| address.is_ipv4() == own.is_ipv4()) {
                directory.by_address.insert(address, peer.public_key);
                directory.addresses.insert(peer.public_key, address);
            }
        }
        directory
    }

    fn name(&self, key: &WgKey) -> String {
        self.names.get(key).map_or_else(|| key.to_string(), ToString::to_string)
    }

    /// Where a node may be reached on the underlay, before anything was heard of it.
    fn endpoints(&self, key: &WgKey) -> &[SocketAddr] {
        let mut peers = self.snapshot.iter().flat_map(|snapshot| snapshot.peers.iter());
        peers.find(|peer| peer.public_key == *key).map_or(&[], |peer| &peer.endpoints)
    }
}

impl Watcher {
    fn new(settings: Settings) -> Self {
        let now = Instant::now();
        let legacy = Legacy::load(&settings.file);
        let number = jiff::Timestamp::now().as_millisecond().unsigned_abs();
        let random = || RandomState::new().hash_one(());
        let mut core = Core::new(now, settings.key, number, random());
        core.adopt_leases(now, &legacy.leases);
        let routes = legacy.routes.iter().map(|(key, (via, _))| (*key, *via)).collect();
        let (save, saved) = watch::channel(legacy.clone());
        tokio::spawn(keep_saved(settings.file.clone(), saved));
        Self {
            settings,
            core,
            secret: random(),
            past: Past { down: legacy.down.clone(), routes, outside: legacy.outside.clone() },
            directory: Directory::default(),
            traffic: Traffic::default(),
            mtus: legacy.mtus.clone(),
            outlook: Arc::new(legacy.outlook()),
            pairs: legacy.leases,
            legacy: save,
            published: None,
            refused: 0,
            out: vec![],
            statuses: mpsc::channel(1),
            next_status: now,
        }
    }

    /// Serves until the sockets are of no use any more.
    async fn serve(
        &mut self,
        sockets: &Sockets,
        own: IpAddr,
        desired: &mut watch::Receiver<Option<Desired>>,
    ) -> std::io::Result<()> {
        self.members(own);
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut alone_since = None;
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    self.receive(sockets);
                    let now = Instant::now();
                    self.core.tick(now, &mut self.out);
                    self.ask_overlay(now);
                    let names = self.directory.addresses.keys().copied();
                    let questions = self.settings.proofs.questions(now, names).into_iter();
                    self.out.extend(questions.map(|(to, message)| Action::Send { to, message }));
                    alone_since = self.core.isolated().then(|| alone_since.unwrap_or(now));
                    if alone_since.is_some_and(|since| now - since > REOPEN_ISOLATED) {
                        return Ok(());
                    }
                }
                ready = sockets.readable() => {
                    ready?;
                    self.receive(sockets);
                }
                changed = desired.changed() => {
                    let known = desired.borrow_and_update().as_ref().map(|d| Arc::clone(&d.snapshot));
                    if changed.is_err() || known.as_deref().and_then(own_address) != Some(own) {
                        return Ok(());
                    }
                    self.members(own);
                }
                Some(status) = self.statuses.1.recv() => self.learn(&status),
                Some(pairs) = self.settings.forwarder.confirmed() => {
                    self.core.forwards(&pairs, &mut self.out);
                }
            }
            self.act(sockets)?;
            self.publish();
        }
    }

    /// Takes over who the other nodes are.
    fn members(&mut self, own: IpAddr) {
        let desired = self.settings.desired.borrow();
        let Some(snapshot) = desired.as_ref().map(|d| Arc::clone(&d.snapshot)) else { return };
        drop(desired);
        if self.directory.snapshot.as_ref().is_some_and(|old| Arc::ptr_eq(old, &snapshot)) {
            return;
        }
        self.directory = Directory::new(&snapshot, own);
        let keys: Vec<WgKey> = self.directory.addresses.keys().copied().collect();
        self.core.set_members(Instant::now(), &keys, &self.past);
        if snapshot.peers.is_empty() {
            return;
        }
        // Whoever joins from now on is new.
        self.past = Past::default();
        self.forward();
    }

    /// Takes everything that has arrived.
    fn receive(&mut self, sockets: &Sockets) {
        let now = Instant::now();
        // One byte more than the longest message: what is longer is not cut to look like one.
        let mut buffer = [0; MAX_BYTES + 1];
        while let Some((from, token)) = sockets.next_echo(&mut buffer) {
            if let Some(key) = self.directory.by_address.get(&from) {
                self.core.echoed(now, *key, token, &mut self.out);
            }
        }
        while let Some((from, len)) = sockets.next_message(&mut buffer) {
            let agent = from.port() == mesh_model::wellknown::PATHS_PORT;
            let key = self.directory.by_address.get(&from.ip()).filter(|_| agent);
            match (key, Message::decode(&buffer[..len])) {
                (Some(key), Ok(message)) => {
                    if matches!(message, Message::RelayGrant { .. }) {
                        // The other side uses a relay: see whether the overlay has followed.
                        self.next_status = self.next_status.min(now + FOLLOWS);
                    }
                    let answer = self.settings.proofs.heard(key, &message);
                    self.out.extend(answer.map(|message| Action::Send { to: *key, message }));
                    self.core.received(now, *key, message, &mut self.out);
                }
                _ => self.refused += 1,
            }
        }
    }

    /// Carries out what the core wants.
    fn act(&mut self, sockets: &Sockets) -> std::io::Result<()> {
        let mut result = Ok(());
        for action in std::mem::take(&mut self.out) {
            let address = |key: &WgKey| self.directory.addresses.get(key).copied();
            let sent = match action {
                Action::Echo { to, token } => address(&to).map(|to| sockets.echo(to, token)),
                Action::Send { to, message } => {
                    address(&to).map(|to| sockets.send(to, &message.encode()))
                }
                Action::Forward(pairs) => {
                    self.pairs = pairs;
                    self.forward();
                    // The next agent has to know.
                    self.published = None;
                    None
                }
            };
            result = result.and(sent.unwrap_or(Ok(())));
        }
        result
    }

    /// Asks the overlay for its counters now and then, without waiting for them.
    fn ask_overlay(&mut self, now: Instant) {
        if now < self.next_status {
            return;
        }
        let many = self.directory.addresses.len() > mesh_overlay::paths::WATCHERS;
        let busy = many || !self.outlook.relays.is_empty() || !self.pairs.is_empty();
        let pause = match self.core.just_left_relay(now, self.directory.names.keys()) {
            true => FOLLOWS,
            false if busy => STATUS_BUSY,
            false => STATUS_IDLE,
        };
        self.next_status = now + pause;
        // While the last answer has not been taken there is no room for another question.
        if let Ok(room) = self.statuses.0.clone().try_reserve_owned() {
            let overlay = Arc::clone(&self.settings.overlay);
            tokio::spawn(async move {
                match overlay.status().await {
                    Ok(status) => drop(room.send(status)),
                    Err(error) => tracing::debug!(error = chain(&error), "no overlay status"),
                }
            });
        }
    }

    /// What the counters say about paths.
    fn learn(&mut self, status: &Status) {
        let now = Instant::now();
        let news = self.traffic.update(now, status);
        for key in news.unanswered {
            self.core.unanswered(now, key);
        }
        for (key, times) in &news.direct {
            self.core.answered_directly(now, *key, *times);
        }
        if let Some(snapshot) = &self.directory.snapshot {
            // One that has just answered directly was behind it when the counters were read.
            let answered = |key: &&WgKey| news.direct.iter().any(|(direct, _)| direct == *key);
            let mut astray = false;
            for key in self.directory.names.keys().filter(|key| !answered(key)) {
                if let Some(via) = self.traffic.behind(key, snapshot) {
                    astray |= self.core.just_left_relay(now, std::iter::once(key));
                    self.core.found_behind(now, *key, via);
                }
            }
            if astray {
                self.leave_relays();
            }
        }
        if self.mtus != news.mtus {
            self.mtus = news.mtus;
            // The routes follow.
            self.published = None;
        }
        self.place(now);
        self.forward();
    }

    /// Each side takes the other's last packets through a relay for a reason to stay there: somebody has to insist.
    fn leave_relays(&self) {
        let overlay = Arc::clone(&self.settings.overlay);
        tokio::spawn(async move {
            if let Err(error) = overlay.leave_relays().await {
                tracing::debug!(error = chain(&error), "the overlay stays at a relay");
            }
        });
    }

    /// Who appears where.
    fn place(&mut self, now: Instant) {
        let Some(snapshot) = &self.directory.snapshot else { return };
        let port = snapshot.cluster.overlay_port;
        let own = link::own_addresses().into_iter().map(|ip| SocketAddr::new(ip, port));
        self.core.set_own_endpoints(own.collect());
        for peer in snapshot.peers.iter() {
            if let Some(at) = self.traffic.heard_at(&peer.public_key, snapshot) {
                self.core.appears(now, peer.public_key, at, !peer.endpoints.contains(&at));
            }
        }
    }

    /// Tells the relay worker where the pairs are now.
    fn forward(&mut self) {
        let Some(snapshot) = &self.directory.snapshot else { return };
        let place = |key: &WgKey| self.traffic.own_endpoint(key, snapshot);
        // Its first key is its name; it may be called by others by now.
        let keys = |name: &WgKey| {
            let peer = snapshot.peers.iter().find(|peer| peer.public_key == *name);
            let keys = peer.map_or(&[][..], |peer| &peer.keys);
            (keys.first().copied().unwrap_or(*name), keys.get(1).copied())
        };
        // Two that are not told apart yet would make the whole configuration void.
        let mut taken = BTreeSet::new();
        let pairs = self.pairs.iter().filter_map(|pair| {
            let (a, b) = (place(&pair.a)?, place(&pair.b)?);
            if !taken.insert((pair.slot, a)) || !taken.insert((pair.slot, b)) {
                return None;
            }
            let ((a_key, a_next_key), (b_key, b_next_key)) = (keys(&pair.a), keys(&pair.b));
            let slot = pair.slot;
            Some((*pair, RelayedPair { slot, a, a_key, a_next_key, b, b_key, b_next_key }))
        });
        let first_port = snapshot.cluster.overlay_port.saturating_add(1);
        self.settings.forwarder.set(first_port, pairs.collect());
    }

    /// Tells everybody else, when something has changed or what they know is old.
    fn publish(&mut self) {
        let now = Instant::now();
        let revision = self.core.revision();
        let news = self.published != Some(revision);
        let old = now.saturating_duration_since(self.settings.seen.borrow().at) >= SEEN_FOR;
        if !news && !old {
            return self.hand_on();
        }
        let paths = self.core.view(now);
        if news {
            self.published = Some(revision);
            self.log(&paths);
            self.look(&paths);
        }
        let isolated = self.core.isolated();
        self.settings.seen.send_replace(Seen { at: now, isolated, paths, refused: self.refused });
        self.hand_on();
    }

    /// What an operator would ask about.
    fn log(&self, paths: &[PathView]) {
        let seen = self.settings.seen.borrow();
        let way = |path: &PathView| (path.standing.serves(), path.via, path.outside);
        let before: BTreeMap<_, _> = seen.paths.iter().map(|p| (p.key, way(p))).collect();
        for path in paths.iter().filter(|p| before.get(&p.key).is_some_and(|b| *b != way(p))) {
            let via = path.via.map(|via| self.directory.name(&via.relay));
            let peer = self.directory.name(&path.key);
            let outside = path.outside.map(tracing::field::display);
            tracing::info!(peer, via, outside, standing = ?path.standing, "path changed");
        }
        if seen.isolated != self.core.isolated() {
            tracing::warn!(isolated = self.core.isolated(), "whether any other node is heard");
        }
    }

    /// What follows from the paths.
    fn look(&mut self, paths: &[PathView]) {
        let gone = paths.iter().filter(|path| !path.standing.serves());
        let away: BTreeSet<NodeName> =
            gone.clone().filter_map(|path| self.directory.names.get(&path.key).cloned()).collect();
        let routes: BTreeMap<_, _> = paths
            .iter()
            .filter_map(|path| Some((path.key, (path.via?, self.relay_endpoint(path)?))))
            .collect();
        let legacy = Legacy {
            down: gone.map(|path| path.key).collect(),
            away,
            routes,
            leases: self.pairs.clone(),
            outside: paths.iter().filter_map(|path| Some((path.key, path.outside?))).collect(),
            mtus: self.mtus.clone(),
        };
        self.outlook = Arc::new(legacy.outlook());
        self.legacy.send_if_modified(|old| {
            let changed = *old != legacy;
            *old = legacy;
            changed
        });
    }

    fn relay_endpoint(&self, path: &PathView) -> Option<SocketAddr> {
        let (via, snapshot) = (path.via?, self.directory.snapshot.as_ref()?);
        let place = self.traffic.own_endpoint(&via.relay, snapshot);
        let host = place.or_else(|| self.directory.endpoints(&via.relay).first().copied())?.ip();
        let port = snapshot.cluster.overlay_port.checked_add(1 + u16::from(via.slot))?;
        Some(SocketAddr::new(host, port))
    }

    /// The snapshot may have been replaced meanwhile, so this is compared each time.
    fn hand_on(&self) {
        self.settings.desired.send_if_modified(|desired| match desired {
            Some(desired) if desired.outlook != self.outlook => {
                desired.outlook = Arc::clone(&self.outlook);
                true
            }
            _ => false,
        });
    }
}

/// Writes down the latest, one after the other.
async fn keep_saved(file: PathBuf, mut legacy: watch::Receiver<Legacy>) {
    while legacy.changed().await.is_ok() {
        let (file, latest) = (file.clone(), legacy.borrow_and_update().clone());
        let written = tokio::task::spawn_blocking(move || latest.save(&file)).await;
        if let Ok(Err(error)) = written {
            tracing::warn!(%error, "what is known about paths was not saved for the next agent");
        }
    }
}
