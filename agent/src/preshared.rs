//! The keys that this node shares with each other node: fetched, kept, replaced without losing a peer.
//!
//! Two nodes learn of a new key at different times, and one of them may be cut off from the control service for long.
//! So the last key that both are known to have used is kept, on disk too, until a newer one has been used.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mesh_model::Snapshot;
use mesh_model::preshared::{PRESHARED_KEYS_PATH, PresharedKey, PresharedKeys};
use mesh_model::snapshot::{Peer, WgKey};
use mesh_overlay::{Overlay, PeerConfig, PeerStatus};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::errors::chain;
use crate::join::write_private;
use crate::observe::Desired;

/// How often it is looked at which keys are in use.
const LOOK: Duration = Duration::from_secs(5);
/// Nodes ask a little after the new epoch has begun, spread over this time.
const SPREAD: Duration = Duration::from_millis(500);
/// Keys that are to be used at once have to be good for longer.
const SOON: Duration = Duration::from_secs(2);
/// A slow machine takes seconds to make its first connection.
const RENEWED_WITHIN: Duration = Duration::from_secs(10);
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(10);
/// A control service that hands out no keys may do so after an upgrade.
const UNSERVED_RETRY: Duration = Duration::from_secs(60);

/// The keys, by the other node's public key.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Keyring {
    /// Of the newest keys.
    epoch: u64,
    newest: BTreeMap<WgKey, PresharedKey>,
    /// The last key of each peer with which a handshake has succeeded.
    agreed: BTreeMap<WgKey, PresharedKey>,
    /// The control service has no such keys.
    #[serde(skip)]
    unserved: bool,
}

impl Keyring {
    /// Takes over the keys of an epoch. Of a peer that is gone nothing is kept.
    fn learn(&mut self, keys: PresharedKeys) {
        self.unserved = false;
        self.agreed.retain(|peer, _| keys.keys.contains_key(peer));
        (self.epoch, self.newest) = (keys.epoch, keys.keys);
    }

    /// Takes note of the keys that are in use; returns whether that is news.
    fn note(&mut self, peers: &[PeerStatus]) -> bool {
        let mut changed = false;
        for peer in peers.iter().filter(|peer| peer.preshared_agreed) {
            if let Some(newest) = self.newest.get(&peer.public_key) {
                changed |= self.agreed.insert(peer.public_key, *newest) != Some(*newest);
            }
        }
        changed
    }

    /// Whether the peer may be spoken to.
    fn covers(&self, peer: &WgKey) -> bool {
        self.unserved || self.newest.contains_key(peer) || self.agreed.contains_key(peer)
    }

    /// The peer as the overlay is to have it; nothing before there is a key for it, because nothing may be sent to it
    /// that a later computer could read.
    pub(crate) fn peer(&self, peer: &Peer) -> Option<PeerConfig> {
        let key = &peer.public_key;
        let agreed = self.agreed.get(key).copied();
        let newest = self.newest.get(key).copied().or(agreed);
        self.covers(key).then(|| PeerConfig {
            preshared_key: newest,
            former_preshared_key: agreed.filter(|agreed| newest != Some(*agreed)),
            ..PeerConfig::from(peer)
        })
    }

    fn lacks(&self, snapshot: &Snapshot) -> bool {
        !self.unserved && snapshot.peers.iter().any(|p| !self.newest.contains_key(&p.public_key))
    }
}

/// The keys of an earlier run; none when they cannot be read.
pub(crate) fn saved(file: &std::path::Path) -> Keyring {
    let Ok(bytes) = std::fs::read(file) else { return Keyring::default() };
    serde_json::from_slice(&bytes).unwrap_or_else(|error| {
        tracing::warn!(path = %file.display(), %error, "saved pre-shared keys malformed, asking for new ones");
        Keyring::default()
    })
}

/// Keeps the keys of [`Desired`] up to date.
pub(crate) struct Keeper {
    pub(crate) client: kube::Client,
    pub(crate) overlay: Arc<Overlay>,
    pub(crate) desired: watch::Sender<Option<Desired>>,
    pub(crate) ring: Keyring,
    /// Where the keys are kept.
    pub(crate) file: PathBuf,
}

impl Keeper {
    /// Takes over the keys of today, to be used at once; returns whether it has them. Of an epoch that is about to end the keys are not
    /// taken: others may go on to the next ones meanwhile.
    pub(crate) async fn renew(&mut self) -> bool {
        let renewed = async {
            loop {
                let pause = match self.ask().await {
                    Ok(left) if left > SOON => return,
                    // All others have asked by then.
                    Ok(left) => left + SPREAD,
                    Err(_) => FIRST_RETRY,
                };
                tokio::time::sleep(pause).await;
            }
        };
        let renewed = tokio::time::timeout(RENEWED_WITHIN, renewed).await.is_ok();
        if !renewed {
            tracing::warn!(
                "no pre-shared keys from the control service, going on with those of an earlier run"
            );
        }
        renewed
    }

    /// Never ends. Failures are retried: sessions go on with the keys that they have.
    pub(crate) async fn run(mut self) {
        let mut desired = self.desired.subscribe();
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut ask_at, mut retry) = (Instant::now(), FIRST_RETRY);
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(ask_at) => {
                    let pause = match self.ask().await {
                        Ok(pause) => {
                            retry = FIRST_RETRY;
                            pause
                        }
                        Err(error) => {
                            if retry == LAST_RETRY {
                                tracing::warn!(error = chain(&error), "no pre-shared keys, trying again");
                            }
                            let pause = retry;
                            retry = (retry * 2).min(LAST_RETRY);
                            pause
                        }
                    };
                    ask_at = Instant::now() + pause;
                }
                _ = look.tick() => self.look().await,
                changed = desired.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let lacking = |d: &Desired| d.synced && self.ring.lacks(&d.snapshot);
                    if desired.borrow_and_update().as_ref().is_some_and(lacking) && retry == FIRST_RETRY {
                        ask_at = Instant::now();
                    }
                    self.publish();
                }
            }
        }
    }

    /// Asks for keys; returns when to ask again.
    async fn ask(&mut self) -> Result<Duration, kube::Error> {
        let request = http::Request::get(PRESHARED_KEYS_PATH).body(Vec::new());
        let request = request.map_err(kube::Error::HttpError)?;
        let pause = match self.client.request::<PresharedKeys>(request).await {
            Ok(keys) => {
                let next = Duration::from_millis(keys.renew_after_ms) + spread();
                let changed = keys.keys != self.ring.newest;
                self.ring.learn(keys);
                if changed {
                    self.save();
                }
                next
            }
            Err(kube::Error::Api(status)) if status.code == 404 => {
                self.ring.unserved = true;
                UNSERVED_RETRY
            }
            Err(error) => return Err(error),
        };
        self.publish();
        Ok(pause)
    }

    async fn look(&mut self) {
        // The reconciler reports an overlay that does not answer.
        if self.overlay.tend().await.is_err() {
            return;
        }
        let Ok(status) = self.overlay.status().await else { return };
        if self.ring.note(&status.peers) {
            self.save();
            self.publish();
        }
    }

    /// Before they are used: after a restart a peer must not be left with a key that only it still has.
    fn save(&self) {
        let saved = serde_json::to_vec(&self.ring).map_err(std::io::Error::from);
        if let Err(error) = saved.and_then(|bytes| write_private(&self.file, &bytes)) {
            tracing::warn!(path = %self.file.display(), %error, "pre-shared keys not saved");
        }
    }

    fn publish(&self) {
        self.desired.send_if_modified(|desired| match desired {
            Some(desired) if *desired.preshared != self.ring => {
                desired.preshared = Arc::new(self.ring.clone());
                true
            }
            _ => false,
        });
    }
}

fn spread() -> Duration {
    use std::hash::{BuildHasher as _, RandomState};
    let random = RandomState::new().hash_one(()) % 1024;
    SPREAD * u32::try_from(random).unwrap_or(0) / 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    const B: WgKey = WgKey([2; 32]);

    fn epoch(epoch: u64, key: u8) -> PresharedKeys {
        let keys = [(B, PresharedKey(WgKey([key; 32])))].into();
        PresharedKeys { epoch, renew_after_ms: 1000, keys }
    }

    fn peer() -> Peer {
        Peer {
            node: "b".parse().unwrap(),
            keys: vec![],
            public_key: B,
            endpoints: vec![],
            allowed_ips: vec!["10.244.1.0/24".parse().unwrap()],
        }
    }

    fn used(agreed: bool) -> [PeerStatus; 1] {
        [PeerStatus {
            public_key: B,
            endpoint: None,
            allowed_ips: vec![],
            handshake_age_ms: Some(1),
            received_bytes: 0,
            sent_bytes: 0,
            unanswered: 0,
            preshared: true,
            preshared_agreed: agreed,
            relay: None,
            direct_answers: 0,
            keepalive_secs: None,
            mtu: None,
            knows_next_key: false,
        }]
    }

    fn numbers(ring: &Keyring) -> Option<(Option<u8>, Option<u8>)> {
        let number = |key: Option<PresharedKey>| key.map(|key| key.0.0[0]);
        let config = ring.peer(&peer())?;
        Some((number(config.preshared_key), number(config.former_preshared_key)))
    }

    #[test]
    fn a_peer_that_hears_nothing_of_new_keys_keeps_its_own() {
        let mut ring = Keyring::default();
        assert_eq!(numbers(&ring), None, "nothing goes out without a key");
        ring.learn(epoch(1, 1));
        assert_eq!(numbers(&ring), Some((Some(1), None)));
        assert!(ring.note(&used(true)) && !ring.note(&used(true)));
        for n in 2..9 {
            ring.learn(epoch(n.into(), n));
            assert!(!ring.note(&used(false)));
            assert_eq!(numbers(&ring), Some((Some(n), Some(1))));
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("preshared.json");
        write_private(&file, &serde_json::to_vec(&ring).unwrap()).unwrap();
        let mut ring = saved(&file);
        assert_eq!(numbers(&ring), Some((Some(8), Some(1))), "also over a restart");
        assert!(ring.note(&used(true)));
        assert_eq!(numbers(&ring), Some((Some(8), None)));
    }

    #[test]
    fn without_keys_in_the_cluster_peers_are_not_held_back() {
        let mut ring = Keyring { unserved: true, ..Keyring::default() };
        assert_eq!(numbers(&ring), Some((None, None)));
        ring.learn(PresharedKeys { epoch: 1, renew_after_ms: 1, keys: BTreeMap::new() });
        assert_eq!(numbers(&ring), None, "now there are some, but none for it yet");
    }

    #[test]
    fn what_is_forgotten_and_what_is_torn() {
        let mut ring = Keyring::default();
        ring.learn(epoch(1, 1));
        ring.note(&used(true));
        ring.learn(PresharedKeys { epoch: 2, renew_after_ms: 1, keys: BTreeMap::new() });
        assert!(ring.agreed.is_empty() && ring.newest.is_empty(), "the node has left");
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("preshared.json");
        std::fs::write(&file, "{torn").unwrap();
        assert_eq!(saved(&file), Keyring::default());
    }

    /// A control service that gives these answers, one after the other; none is a service that is away.
    fn control(answers: Vec<Option<PresharedKeys>>) -> kube::Client {
        let answers = std::sync::Mutex::new(answers.into_iter());
        let service = tower::service_fn(move |_: http::Request<kube::client::Body>| {
            let answer = answers.lock().unwrap().next().expect("asked no more often");
            let answer = answer.map(|keys| serde_json::to_vec(&keys).unwrap());
            let answer = answer.map(|body| http::Response::new(kube::client::Body::from(body)));
            std::future::ready(answer.ok_or(std::io::Error::other("away")))
        });
        kube::Client::new(service, "default")
    }

    fn keeper(client: kube::Client) -> (Keeper, tempfile::TempDir) {
        let snapshot = mesh_model::compile(&mesh_model::Objects::default(), &"a".parse().unwrap());
        let desired = Desired {
            snapshot: Arc::new(snapshot),
            outlook: Arc::default(),
            synced: false,
            preshared: Arc::default(),
        };
        let dir = tempfile::tempdir().unwrap();
        let keeper = Keeper {
            client,
            overlay: Arc::new(Overlay::user("/nonexistent")),
            desired: watch::Sender::new(Some(desired)),
            ring: Keyring::default(),
            file: dir.path().join("preshared.json"),
        };
        (keeper, dir)
    }

    #[tokio::test(start_paused = true)]
    async fn keys_that_are_used_at_once_are_those_of_today() {
        let today = PresharedKeys { renew_after_ms: 90_000, ..epoch(8, 8) };
        let (mut keeper, _dir) = keeper(control(vec![None, Some(epoch(7, 7)), Some(today)]));
        let start = Instant::now();
        assert!(keeper.renew().await);
        assert_eq!(keeper.desired.borrow().as_ref().unwrap().preshared.epoch, 8);
        assert_eq!(saved(&keeper.file).epoch, 8, "whoever asks on begins with them");
        let (least, most) = (Duration::from_millis(1000) + SPREAD, Duration::from_secs(4));
        assert!((least..most).contains(&start.elapsed()), "not before the epoch had ended");
    }

    #[tokio::test(start_paused = true)]
    async fn a_control_service_that_is_away_is_not_waited_for() {
        let (mut keeper, _dir) = keeper(control(vec![None; 100]));
        assert!(!keeper.renew().await);
        assert_eq!(*keeper.desired.borrow().as_ref().unwrap().preshared, Keyring::default());
    }
}
