//! What no stamp of an initiation has exceeded, on disk: the next process begins above it ([`Kept`]).

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use crate::os::clock;
use crate::protocol::{Clock, Kept, Stamps};

/// The stamps of a new process: right after the `last` one of the process that handed over, or above all that were ever given.
pub(super) fn begin(path: &Path, last: Option<Duration>) -> Stamps {
    let before = load(path);
    let clock = SystemTime::now();
    let now = Instant::now();
    let mut stamps = Stamps::new(now, clock, before);
    if let Some(last) = last {
        stamps = stamps.after(now, last);
    }
    if stamps.kept() != before {
        // Not synced: it has to outlive this process only, and the next store follows within a moment.
        if let Err(error) = replace(path, stamps.kept(), false) {
            tracing::warn!(path = %path.display(), %error, "the bound of handshakes could not be raised");
        }
    }
    stamps
}

/// How far ahead of the clock calls in the name of this key have been dated. So long do peers take those for replays that are
/// dated by the clock alone, as the kernel's device does it. Zero where a clock has never been set back.
pub fn dated_ahead(private_key: &Path) -> Duration {
    let kept = load(&private_key.with_extension("stamp"));
    let surely_given = kept.bound.saturating_sub(Stamps::AHEAD + ROUNDED);
    let given = kept.limit.map_or(surely_given, |limit| limit.shown(Instant::now()));
    given.saturating_sub(
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default(),
    )
}

/// The bound is written up to so much higher.
const ROUNDED: Duration = Duration::from_secs(1);

/// What the file says.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    Now(Text),
    /// Seconds, as versions wrote that knew no limit.
    Bound(u64),
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Text {
    bound_secs: u64,
    /// Which start of the machine the limit is of.
    boot: String,
    /// What the limit shows at a time by the clock that all processes share.
    at: Duration,
    limit: Duration,
}

/// Seconds beyond which no clock is right: a file that says more is damaged.
const LATEST: u64 = 1 << 40;

/// Reads it; nothing when there is none, or none that makes sense: then only the clock counts.
fn load(path: &Path) -> Kept {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Kept::default(),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "unreadable; the clock alone dates handshakes");
            return Kept::default();
        }
    };
    let kept = serde_json::from_slice(&bytes).ok().and_then(understood);
    kept.unwrap_or_else(|| {
        tracing::warn!(path = %path.display(), "damaged; the clock alone dates handshakes");
        Kept::default()
    })
}

fn understood(written: Written) -> Option<Kept> {
    let bound = |secs| (secs < LATEST).then(|| Duration::from_secs(secs));
    let text = match written {
        Written::Bound(secs) => return Some(Kept { bound: bound(secs)?, limit: None }),
        Written::Now(text) => text,
    };
    let shows = (text.limit.as_secs() < LATEST).then_some(text.limit)?;
    // In this order a moment between the two makes the limit higher, here and where it is written.
    let now = Instant::now();
    let ago = clock::monotonic().checked_sub(text.at);
    let limit = ago
        .filter(|_| boot().is_some_and(|boot| boot == text.boot))
        .map(|ago| Clock { at: now, shows: shows + ago });
    Some(Kept { bound: bound(text.bound_secs)?, limit })
}

/// Stores it, the bound rounded up to a second. On failure what was there stays, and handshakes go on. Cancel safe.
pub(super) async fn store(path: &Path, kept: Kept) {
    let target = path.to_owned();
    let stored = tokio::task::spawn_blocking(move || replace(&target, kept, true)).await;
    if let Ok(Err(error)) = stored {
        tracing::warn!(path = %path.display(), %error, "the bound of handshakes could not be stored");
    }
}

fn replace(path: &Path, kept: Kept, sync: bool) -> io::Result<()> {
    let fresh: PathBuf = path.with_extension("stamp.new");
    let mut file = File::create(&fresh)?;
    writeln!(file, "{}", serde_json::to_string(&written(kept))?)?;
    if sync {
        file.sync_all()?;
    }
    fs::rename(&fresh, path)
}

fn written(kept: Kept) -> Written {
    let bound_secs = (kept.bound + ROUNDED).as_secs();
    let (Some(limit), Some(boot)) = (kept.limit, boot()) else { return Written::Bound(bound_secs) };
    let at = clock::monotonic();
    Written::Now(Text { bound_secs, boot, at, limit: limit.shown(Instant::now()) })
}

/// Another one each time that the machine starts.
fn boot() -> Option<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned()).filter(|id| !id.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn since_epoch() -> Duration {
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap()
    }

    fn limit(kept: Kept) -> Duration {
        kept.limit.expect("of this start of the machine").shown(Instant::now())
    }

    #[test]
    fn a_process_that_is_killed_at_once_leaves_its_stamps_to_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("overlay.stamp");
        // The clock has been set back since, or has not.
        for ahead in [Stamps::AHEAD * 100, Duration::ZERO] {
            let limit = Clock { at: Instant::now(), shows: since_epoch() + ahead };
            replace(&path, Kept { bound: limit.shows, limit: Some(limit) }, true).unwrap();
            let mut last = None;
            for _ in 0..3 {
                let stamps = begin(&path, None);
                let given = stamps.next(Instant::now());
                assert!(Some(given) > last, "each process gives newer ones");
                last = Some(given);
                let text = fs::read_to_string(&path).unwrap();
                let successor = begin(&path, Some(stamps.last()));
                assert_eq!(successor.last(), stamps.last());
                assert_eq!(
                    fs::read_to_string(&path).unwrap(),
                    text,
                    "what was handed over is below it"
                );
            }
        }
    }

    #[test]
    fn a_process_that_is_killed_leaves_nobody_ahead_of_the_clock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("overlay.stamp");
        for _ in 0..50 {
            let stamps = begin(&path, None);
            stamps.next(Instant::now());
            if let Some(kept) = stamps.to_store() {
                replace(&path, kept, false).unwrap();
            }
        }
        // Had each moved ahead of the one before by so much as a tenth of a second, it would be more.
        let ahead = begin(&path, None).last().saturating_sub(since_epoch());
        assert!(ahead < Duration::from_secs(5), "{ahead:?} ahead of the clock");
    }

    #[tokio::test]
    async fn what_is_stored_is_read_and_nonsense_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("overlay.stamp");
        assert_eq!(load(&path), Kept::default());
        let bound = Duration::from_millis(1_700_000_000_400);
        let shows = Duration::from_secs(1_600_000_000);
        let now = Instant::now();
        store(&path, Kept { bound, limit: Some(Clock { at: now, shows }) }).await;
        let read = load(&path);
        assert_eq!(read.bound, Duration::from_secs(1_700_000_001));
        let (least, found) = (shows + now.elapsed(), limit(read));
        assert!(found >= least && found < shows + Stamps::AHEAD);
        store(Path::new("/nowhere/at/all"), Kept::default()).await; // only warned of
        for damaged in ["torn\0", "", "-1", "18446744073709551615", "{\"boundSecs\": 7}"] {
            fs::write(&path, damaged).unwrap();
            assert_eq!(load(&path), Kept::default(), "{damaged:?}");
        }
    }

    #[test]
    fn calls_are_dated_ahead_of_a_clock_that_was_set_back_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("overlay.key");
        let path = key.with_extension("stamp");
        assert_eq!(dated_ahead(&key), Duration::ZERO);
        for (ahead, same_boot) in [(0, true), (0, false), (3600, true), (3600, false)] {
            let shows = since_epoch() + Duration::from_secs(ahead);
            let limit = same_boot.then(|| Clock { at: Instant::now(), shows });
            replace(&path, Kept { bound: shows + Stamps::AHEAD, limit }, false).unwrap();
            let found = dated_ahead(&key).as_secs();
            assert!(found.abs_diff(ahead) < 60, "{found} s instead of {ahead}, {same_boot}");
            assert!(ahead > 0 || found == 0);
        }
    }

    #[test]
    fn after_another_start_of_the_machine_the_bound_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("overlay.stamp");
        let shows = since_epoch();
        let kept = Kept { bound: shows, limit: Some(Clock { at: Instant::now(), shows }) };
        replace(&path, kept, true).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace(&boot().unwrap(), "another one")).unwrap();
        let read = load(&path);
        assert_eq!((read.bound.as_secs(), read.limit), (shows.as_secs() + 1, None));
        // As earlier versions wrote it.
        fs::write(&path, format!("{}\n", shows.as_secs() + 1)).unwrap();
        assert_eq!(load(&path), read);
    }
}
