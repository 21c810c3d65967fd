//! Keys that pairs of nodes share, new ones every two minutes.
//!
//! All keys of an epoch follow from one random seed, so that handing them out costs no memory and both nodes of a pair get
//! the same, whoever asks first. Only the present seed is kept: who finds the data folder later learns no earlier key.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hmac::{Hmac, Mac as _};
use mesh_model::preshared::{PresharedKey, PresharedKeys};
use mesh_model::snapshot::WgKey;
use rand::Rng as _;
use serde::{Deserialize, Serialize};
use sha2::Sha256;

/// Keeps these keys apart from whatever else may be derived from a seed one day.
const LABEL: &[u8] = b"mesh preshared key 1";

/// How long an epoch is: as long as a WireGuard session stays in use (WG section 6.1, Rekey-After-Time).
pub const DEFAULT_ROTATION: Duration = Duration::from_secs(120);

/// Makes the keys.
pub struct Issuer {
    file: PathBuf,
    rotation: Duration,
    epoch: Mutex<Epoch>,
}

/// What all keys of a time follow from.
#[derive(Clone, Serialize, Deserialize)]
struct Epoch {
    number: u64,
    seed: [u8; 32],
    /// Milliseconds since 1970.
    began_ms: u64,
}

impl Issuer {
    /// Goes on with the epoch in `file`, so that a restart changes no key; begins one when there is none.
    pub fn open(file: PathBuf, rotation: Duration) -> Self {
        let read = fs::read(&file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let epoch = read.unwrap_or_else(|| Epoch::begin(0, now_ms()));
        Self { file, rotation, epoch: Mutex::new(epoch) }
    }

    /// The keys that the node with the key `own` shares with `others`.
    pub fn issue(&self, own: WgKey, others: &BTreeSet<WgKey>) -> PresharedKeys {
        self.issue_at(now_ms(), own, others)
    }

    fn issue_at(&self, now_ms: u64, own: WgKey, others: &BTreeSet<WgKey>) -> PresharedKeys {
        let rotation = u64::try_from(self.rotation.as_millis()).unwrap_or(u64::MAX);
        let mut epoch = self.lock();
        // A clock that was set back must not stop the rotation.
        let age = now_ms.checked_sub(epoch.began_ms).unwrap_or(rotation);
        if age >= rotation {
            *epoch = Epoch::begin(epoch.number, now_ms);
        }
        if age >= rotation || !self.file.exists() {
            // Without the file a restart begins an epoch early. Nothing is lost by that.
            if let Err(error) = keep(&self.file, &epoch) {
                tracing::warn!(path = %self.file.display(), %error, "the seed of pre-shared keys is not kept");
            }
        }
        PresharedKeys {
            epoch: epoch.number,
            renew_after_ms: rotation.saturating_sub(now_ms.saturating_sub(epoch.began_ms)),
            keys: others.iter().map(|other| (*other, epoch.key(own, *other))).collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Epoch> {
        self.epoch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Epoch {
    fn begin(after: u64, now_ms: u64) -> Self {
        // Also later than any epoch of a file that was lost.
        let number = (after + 1).max(now_ms / 1000);
        Self { number, seed: rand::rng().random(), began_ms: now_ms }
    }

    /// The same whichever of the two asks.
    fn key(&self, a: WgKey, b: WgKey) -> PresharedKey {
        let (low, high) = if a < b { (a, b) } else { (b, a) };
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.seed)
            .expect("HMAC takes a key of any length (RFC 2104)");
        for part in [LABEL, &low.0, &high.0] {
            mac.update(part);
        }
        PresharedKey(WgKey(mac.finalize().into_bytes().into()))
    }
}

/// Replaces the file at once; the old seed goes with it.
fn keep(path: &Path, epoch: &Epoch) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(&serde_json::to_vec(epoch)?)?;
    fs::rename(&new, path)
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: WgKey = WgKey([1; 32]);
    const B: WgKey = WgKey([2; 32]);
    const C: WgKey = WgKey([3; 32]);
    const PERIOD: Duration = Duration::from_secs(2);

    fn with(all: &[WgKey]) -> BTreeSet<WgKey> {
        all.iter().copied().collect()
    }

    #[test]
    fn a_pair_shares_a_key_that_no_other_pair_has() {
        let dir = tempfile::tempdir().unwrap();
        let issuer = Issuer::open(dir.path().join("seed"), PERIOD);
        let start = issuer.lock().began_ms;
        let a = issuer.issue_at(start, A, &with(&[B, C]));
        let b = issuer.issue_at(start + 1999, B, &with(&[A, C]));
        assert_eq!((a.epoch, a.keys[&B]), (b.epoch, b.keys[&A]));
        assert!(a.keys[&B] != a.keys[&C] && a.keys[&C] != b.keys[&C]);
        assert_eq!((a.renew_after_ms, b.renew_after_ms), (2000, 1));
    }

    #[test]
    fn keys_change_with_the_epoch_and_survive_a_restart_within_it() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("seed");
        let issuer = Issuer::open(file.clone(), PERIOD);
        let start = issuer.lock().began_ms;
        let first = issuer.issue_at(start + 10, A, &with(&[B]));
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        let again = Issuer::open(file.clone(), PERIOD);
        assert_eq!(again.issue_at(start + 20, A, &with(&[B])).keys, first.keys);
        let later = again.issue_at(start + 2000, A, &with(&[B]));
        assert!(later.epoch > first.epoch && later.keys != first.keys);
        // An hour back, then on.
        let back = again.issue_at(start - 3_600_000, A, &with(&[B]));
        assert!(back.epoch > later.epoch && back.renew_after_ms <= 2000);
        fs::write(&file, b"{torn").unwrap();
        assert!(Issuer::open(file, PERIOD).issue(A, &with(&[B])).keys[&B] != back.keys[&B]);
    }
}
