//! The bound of the stamps of initiations, on disk: no stamp of the processes before was above it.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use crate::protocol::Stamps;

/// The stamps of a new process: right after the `last` one of the process that handed over, or above the bound. Of that nothing is given
/// before a higher bound is there for the next one, which may come at once.
pub(super) fn begin(path: &Path, last: Option<Duration>) -> Stamps {
    let bound = load(path);
    let stamps = Stamps::new(Instant::now(), SystemTime::now(), bound);
    match last {
        Some(last) => stamps.after(last),
        None => {
            // Not synced: it has to outlive this process only, and the next store follows within a moment.
            if let Err(error) = replace(path, bound + Stamps::AHEAD, false) {
                tracing::warn!(path = %path.display(), %error, "the bound of handshakes could not be raised");
            }
            stamps
        }
    }
}

/// Seconds beyond which no clock is right: a file that says more is damaged.
const LATEST: u64 = 1 << 40;

/// Reads the bound; zero when there is none, or none that makes sense: then only the clock counts.
fn load(path: &Path) -> Duration {
    match fs::read_to_string(path) {
        Ok(text) => {
            let seconds = text.trim().parse().ok().filter(|seconds| *seconds < LATEST);
            seconds.map(Duration::from_secs).unwrap_or_else(|| {
                tracing::warn!(path = %path.display(), "no number of seconds; the clock alone dates handshakes");
                Duration::ZERO
            })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Duration::ZERO,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "unreadable; the clock alone dates handshakes");
            Duration::ZERO
        }
    }
}

/// Stores a bound, rounded up to a second. On failure the one before stays, and handshakes go on. Cancel safe.
pub(super) async fn store(path: &Path, bound: Duration) {
    let target = path.to_owned();
    let stored = tokio::task::spawn_blocking(move || replace(&target, bound, true)).await;
    if let Ok(Err(error)) = stored {
        tracing::warn!(path = %path.display(), %error, "the bound of handshakes could not be stored");
    }
}

fn replace(path: &Path, bound: Duration, sync: bool) -> io::Result<()> {
    let fresh: PathBuf = path.with_extension("stamp.new");
    let mut file = File::create(&fresh)?;
    writeln!(file, "{}", bound.as_secs() + 1)?;
    if sync {
        file.sync_all()?;
    }
    fs::rename(&fresh, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_killed_at_once_leaves_its_stamps_to_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("overlay.stamp");
        // The clock has been set back since.
        let ahead =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap() + Stamps::AHEAD * 100;
        replace(&path, ahead, true).unwrap();
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

    #[tokio::test]
    async fn what_is_stored_is_read_and_nonsense_is_zero() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("overlay.stamp");
        assert_eq!(load(&path), Duration::ZERO);
        store(&path, Duration::from_millis(1_700_000_000_400)).await;
        assert_eq!(load(&path), Duration::from_secs(1_700_000_001));
        store(Path::new("/nowhere/at/all"), Duration::ZERO).await; // only warned of
        for damaged in ["torn\0", "", "-1", "18446744073709551615"] {
            fs::write(&path, damaged).unwrap();
            assert_eq!(begin(&path, None).last(), Duration::ZERO, "{damaged:?}");
        }
    }
}
