//! Replacing the node's own key on the overlay without losing a packet.
//!
//! ```text
//!   asked for, or due
//!     -> the next key is on disk -> the engine has it -> it is published -> every peer has proved to know it
//!     -> it becomes the present one, on disk -> the engine drops the one before -> that is published
//! ```
//!
//! Each arrow waits for what is before it, and an agent that starts goes on from disk. Without the control service, or with a peer
//! that is off, both keys stay in use for as long as it takes. Whoever was told of the next key keeps that on disk before it
//! answers to it, so that the key before may go as soon as all have.
//!
//! The kernel's device has one key: the next one is published and not in it, peers prove to know it by what their agents say
//! ([`proof`]), and it is exchanged in one step. Until all peers have been heard by the new one, the one before stays published.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use mesh_model::report::KeysReport;
use mesh_model::snapshot::WgKey;
use mesh_model::{NodeName, Snapshot};
use mesh_overlay::keys::{KeyError, NodeKeys};
use mesh_overlay::{Kind, NodeKey, Overlay, Status};
use tokio::sync::watch;

use crate::board::Board;
use crate::errors::chain;
use crate::observe::Desired;

mod proof;

pub(crate) use proof::Proofs;

/// Name of this part on the board.
const NAME: &str = "key";
/// How often it is looked at while a key is being replaced.
const STEP: Duration = Duration::from_millis(500);
/// The same while nothing is to be done: a key that was due a minute ago is due.
const IDLE: Duration = Duration::from_secs(60);

/// After the exchange of the kernel's key, a peer that was not heard by then is not waited for: it will find out by itself.
const SETTLES: Duration = Duration::from_secs(10);

/// What the parts of the agent know of the replacement; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Rotation {
    kind: Kind,
    proofs: Proofs,
    /// What the engine is to have.
    wanted: watch::Sender<Vec<WgKey>>,
    /// What the others are to know; nothing new before the engine was asked what it has.
    published: watch::Sender<Option<Vec<WgKey>>>,
    report: watch::Sender<KeysReport>,
    asked: watch::Sender<bool>,
}

impl Rotation {
    /// From the files beside the node's key.
    pub(crate) fn new(kind: Kind, file: &Path) -> Result<Self, KeyError> {
        let keys = NodeKeys::load_or_create(file)?.public();
        let report = KeysReport { public: keys.clone(), ..KeysReport::default() };
        Ok(Self {
            kind,
            proofs: Proofs::default(),
            wanted: watch::Sender::new(in_engine(kind, &keys)),
            published: watch::Sender::new(None),
            report: watch::Sender::new(report),
            asked: watch::Sender::new(false),
        })
    }

    /// What the engine is to have.
    pub(crate) fn wanted(&self) -> watch::Receiver<Vec<WgKey>> {
        self.wanted.subscribe()
    }

    /// What the others are to know.
    pub(crate) fn published(&self) -> watch::Receiver<Option<Vec<WgKey>>> {
        self.published.subscribe()
    }

    /// Who knows the next key.
    pub(crate) fn proofs(&self) -> Proofs {
        self.proofs.clone()
    }

    /// Begins a replacement; one that is under way goes on.
    pub(crate) fn ask(&self) {
        self.asked.send_replace(true);
        self.report.send_modify(|report| report.replacing = true);
    }

    /// Whether somebody asked since this was called last. Wakes nobody.
    fn take_asked(&self) -> bool {
        let mut taken = false;
        self.asked.send_if_modified(|asked| {
            taken = std::mem::take(asked);
            false
        });
        taken
    }

    /// How far it is.
    pub(crate) fn report(&self) -> KeysReport {
        self.report.borrow().clone()
    }
}

/// What carries it out.
pub(crate) struct Keeper {
    pub(crate) rotation: Rotation,
    pub(crate) overlay: Arc<Overlay>,
    pub(crate) desired: watch::Sender<Option<Desired>>,
    /// The node's key; the next one lies beside it.
    pub(crate) file: PathBuf,
    /// The age at which a key is replaced without being asked.
    pub(crate) every: Option<Duration>,
    pub(crate) board: Board,
    /// When the kernel's key was exchanged, until the one before is withdrawn.
    pub(crate) exchanged: Option<Instant>,
}

/// Keeps the key as young as it should be; never returns.
pub(crate) async fn keep(mut keeper: Keeper) {
    let mut asked = keeper.rotation.asked.subscribe();
    loop {
        let pause = match keeper.step().await {
            Ok(true) => {
                keeper.board.done(NAME);
                STEP
            }
            Ok(false) => {
                keeper.board.done(NAME);
                IDLE
            }
            Err(error) => {
                keeper.board.failed(NAME, vec![chain(&error)]);
                STEP * 10
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            // The sender is part of the keeper.
            _ = asked.changed() => {}
        }
    }
}

impl Keeper {
    /// Goes on as far as is possible now; returns whether there is more to do.
    async fn step(&mut self) -> Result<bool, KeyError> {
        let keys = self.prepare()?;
        let (kind, public) = (self.rotation.kind, keys.public());
        let asked = (kind == Kind::Kernel).then(|| keys.next.as_ref().map(NodeKey::public));
        self.rotation.proofs.seek(asked.flatten());
        self.want(&in_engine(kind, &public));
        let Ok(status) = self.overlay.status().await else { return Ok(true) };
        if status.own_keys != in_engine(kind, &public) {
            return Ok(true);
        }
        if !self.settled(&status) {
            return Ok(true);
        }
        let announced = announced(kind, &public);
        self.rotation.published.send_if_modified(|published| {
            let changed = published.as_ref() != Some(&announced);
            *published = Some(announced);
            changed
        });
        let waiting_for = self.ignorant(&status);
        let all_know = waiting_for.as_ref().is_some_and(Vec::is_empty);
        if keys.next.is_some() && all_know {
            self.exchanged = (kind == Kind::Kernel).then(Instant::now);
            NodeKeys::promote(&self.file)?;
            let public = NodeKeys::load_or_create(&self.file)?.public();
            tracing::info!(key = ?public, "the node's key has been replaced");
            self.want(&public);
            self.report(&public, vec![]);
            return Ok(true);
        }
        let waiting_for = if keys.next.is_some() { waiting_for } else { None };
        self.report(&public, waiting_for.unwrap_or_default());
        Ok(keys.next.is_some())
    }

    /// The keys on disk, with a next one when it is due.
    fn prepare(&self) -> Result<NodeKeys, KeyError> {
        let keys = NodeKeys::load_or_create(&self.file)?;
        // Taken before it is looked at: whoever asks from now on asks for the next round.
        let asked = self.rotation.take_asked();
        if keys.next.is_some() || !(asked || self.is_due()) {
            return Ok(keys);
        }
        if let Err(error) = NodeKeys::prepare_next(&self.file) {
            self.rotation.asked.send_if_modified(|again| {
                *again |= asked;
                false
            });
            return Err(error);
        }
        let keys = NodeKeys::load_or_create(&self.file)?;
        tracing::info!(keys = ?keys.public(), "the node's key is being replaced");
        Ok(keys)
    }

    /// Whether the key before an exchange can be withdrawn: all peers have been heard by the new one, or had the time for it.
    fn settled(&mut self, status: &Status) -> bool {
        let Some(since) = self.exchanged.map(|at| at.elapsed()) else { return true };
        let heard = |key: &WgKey| {
            let mut peers = status.peers.iter().filter(|peer| peer.public_key == *key);
            peers.any(|peer| peer.handshake_age().is_some_and(|age| age < since))
        };
        let desired = self.desired.borrow();
        let mut peers = desired.iter().flat_map(|desired| desired.snapshot.peers.iter());
        if since < SETTLES && !peers.all(|peer| heard(&peer.public_key)) {
            return false;
        }
        self.exchanged = None;
        true
    }

    /// The nodes that have not proved to know the next key; nothing before all nodes are known.
    fn ignorant(&self, status: &Status) -> Option<Vec<NodeName>> {
        let desired = self.desired.borrow();
        let desired = desired.as_ref().filter(|desired| desired.synced)?;
        let proved = |key: &WgKey| match self.rotation.kind {
            Kind::Kernel => self.rotation.proofs.knows(key),
            Kind::User => status.peers.iter().any(|p| p.public_key == *key && p.knows_next_key),
        };
        Some(ignorant(&desired.snapshot, proved))
    }

    fn want(&self, keys: &[WgKey]) {
        let news = self.rotation.wanted.send_if_modified(|wanted| {
            let changed = wanted != keys;
            keys.clone_into(wanted);
            changed
        });
        if news {
            // The overlay's reconciler looks again.
            self.desired.send_modify(|_| {});
        }
    }

    fn report(&self, keys: &[WgKey], waiting_for: Vec<NodeName>) {
        let replacing = keys.len() > 1;
        let report = KeysReport { public: keys.to_vec(), replacing, waiting_for };
        self.rotation.report.send_replace(report);
    }

    fn is_due(&self) -> bool {
        let made = std::fs::metadata(&self.file).and_then(|file| file.modified());
        let age = made.ok().and_then(|made| SystemTime::now().duration_since(made).ok());
        self.every.zip(age).is_some_and(|(every, age)| age >= every)
    }
}

/// Which of the node's keys, the present one first, the engine has: the kernel's device has one.
fn in_engine(kind: Kind, public: &[WgKey]) -> Vec<WgKey> {
    public.iter().copied().take(if kind == Kind::Kernel { 1 } else { usize::MAX }).collect()
}

/// The node's keys as others are told, the one to call by last: our engine answers to both, and whoever calls it by the next
/// one proves to know it; the kernel's device answers to the present one only.
fn announced(kind: Kind, public: &[WgKey]) -> Vec<WgKey> {
    match kind {
        Kind::User => public.to_vec(),
        Kind::Kernel => public.iter().rev().copied().collect(),
    }
}

fn ignorant(snapshot: &Snapshot, proved: impl Fn(&WgKey) -> bool) -> Vec<NodeName> {
    let peers = snapshot.peers.iter().filter(|peer| !proved(&peer.public_key));
    peers.map(|peer| peer.node.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_asks_while_it_is_under_way_is_not_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let rotation = Rotation::new(Kind::Kernel, &dir.path().join("overlay.key")).unwrap();
        rotation.ask();
        assert!(rotation.report().replacing);
        assert_eq!([(); 2].map(|()| rotation.take_asked()), [true, false]);
    }

    #[test]
    fn a_start_in_the_middle_publishes_nothing_that_the_engine_may_not_have() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("overlay.key");
        let name = NodeKeys::name(&file).unwrap();
        let next = NodeKeys::prepare_next(&file).unwrap().public();
        for (kind, wanted, told) in
            [(Kind::User, vec![name, next], [name, next]), (Kind::Kernel, vec![name], [next, name])]
        {
            let rotation = Rotation::new(kind, &file).unwrap();
            assert_eq!(*rotation.wanted().borrow(), wanted);
            assert_eq!(*rotation.published().borrow(), None, "what was published stays");
            assert_eq!(announced(kind, &[name, next]), told);
        }
    }
}
