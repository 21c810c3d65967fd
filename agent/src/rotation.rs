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

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_model::report::KeysReport;
use mesh_model::snapshot::WgKey;
use mesh_model::{NodeName, Snapshot};
use mesh_overlay::keys::{KeyError, NodeKeys};
use mesh_overlay::{Kind, Overlay, Status};
use tokio::sync::watch;

use crate::board::Board;
use crate::errors::chain;
use crate::observe::Desired;

/// Name of this part on the board.
const NAME: &str = "key";
/// How often it is looked at while a key is being replaced.
const STEP: Duration = Duration::from_millis(500);
/// The same while nothing is to be done: a key that was due a minute ago is due.
const IDLE: Duration = Duration::from_secs(60);

/// A replacement that cannot be begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    #[error(
        "the kernel's WireGuard device has one key at a time: start the agent with --overlay user to replace it"
    )]
    Kernel,
}

/// What the parts of the agent know of the replacement; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Rotation {
    kind: Kind,
    /// What the engine is to have; empty where it has one key only.
    wanted: watch::Sender<Vec<WgKey>>,
    /// What the others are to know: never more than the engine has, and nothing new before it was asked.
    published: watch::Sender<Option<Vec<WgKey>>>,
    report: watch::Sender<KeysReport>,
    asked: watch::Sender<bool>,
}

impl Rotation {
    /// From the files beside the node's key.
    pub(crate) fn new(kind: Kind, file: &Path) -> Result<Self, KeyError> {
        let keys = NodeKeys::load_or_create(file)?.public();
        let wanted = if kind == Kind::User { keys.clone() } else { vec![] };
        let published = (kind == Kind::Kernel).then(|| keys.iter().take(1).copied().collect());
        let report = KeysReport { public: keys, ..KeysReport::default() };
        Ok(Self {
            kind,
            wanted: watch::Sender::new(wanted),
            published: watch::Sender::new(published),
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

    /// Begins a replacement; one that is under way goes on.
    pub(crate) fn ask(&self) -> Result<(), Refused> {
        if self.kind == Kind::Kernel {
            return Err(Refused::Kernel);
        }
        self.asked.send_replace(true);
        self.report.send_modify(|report| report.replacing = true);
        Ok(())
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
}

/// Keeps the key as young as it should be; never returns.
pub(crate) async fn keep(keeper: Keeper) {
    if keeper.rotation.kind == Kind::Kernel {
        return;
    }
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
    async fn step(&self) -> Result<bool, KeyError> {
        let mut keys = NodeKeys::load_or_create(&self.file)?;
        // Taken before it is looked at: whoever asks from now on asks for the next round.
        let asked = self.rotation.take_asked();
        if keys.next.is_none() && (asked || self.is_due()) {
            if let Err(error) = NodeKeys::prepare_next(&self.file) {
                self.rotation.asked.send_if_modified(|again| {
                    *again |= asked;
                    false
                });
                return Err(error);
            }
            keys = NodeKeys::load_or_create(&self.file)?;
            tracing::info!(keys = ?keys.public(), "the node's key is being replaced");
        }
        let public = keys.public();
        self.want(&public);
        let Ok(status) = self.overlay.status().await else { return Ok(true) };
        if status.own_keys != public {
            return Ok(true);
        }
        self.rotation.published.send_if_modified(|published| {
            let changed = published.as_ref() != Some(&public);
            *published = Some(public.clone());
            changed
        });
        let waiting_for = self.ignorant(&status);
        let all_know = waiting_for.as_ref().is_some_and(Vec::is_empty);
        if keys.next.is_some() && all_know {
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

    /// The nodes that have not proved to know the next key; nothing before all nodes are known.
    fn ignorant(&self, status: &Status) -> Option<Vec<NodeName>> {
        let desired = self.desired.borrow();
        let desired = desired.as_ref().filter(|desired| desired.synced)?;
        Some(ignorant(&desired.snapshot, status))
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

fn ignorant(snapshot: &Snapshot, status: &Status) -> Vec<NodeName> {
    let knows = |key: &WgKey| status.peers.iter().any(|p| p.public_key == *key && p.knows_next_key);
    let peers = snapshot.peers.iter().filter(|peer| !knows(&peer.public_key));
    peers.map(|peer| peer.node.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_device_keeps_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("overlay.key");
        let kernel = Rotation::new(Kind::Kernel, &file).unwrap();
        assert_eq!(kernel.ask(), Err(Refused::Kernel));
        assert!(kernel.wanted().borrow().is_empty());
        let user = Rotation::new(Kind::User, &file).unwrap();
        assert_eq!((user.ask(), user.report().replacing), (Ok(()), true));
        assert_eq!([(); 2].map(|()| user.take_asked()), [true, false]);
    }

    #[test]
    fn a_start_in_the_middle_publishes_nothing_that_the_engine_may_not_have() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("overlay.key");
        let name = NodeKeys::name(&file).unwrap();
        let next = NodeKeys::prepare_next(&file).unwrap().public();
        let rotation = Rotation::new(Kind::User, &file).unwrap();
        assert_eq!(*rotation.wanted().borrow(), [name, next]);
        assert_eq!(*rotation.published().borrow(), None, "what was published stays");
        let kernel = Rotation::new(Kind::Kernel, &file).unwrap();
        assert_eq!(*kernel.published().borrow(), Some(vec![name]));
    }
}
