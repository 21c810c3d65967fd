//! What one worker leaves to the next, on its way from process to process.
//!
//! A file in memory with a version before everything else. A successor that does not know the version takes nothing, and
//! calls all peers as if its predecessor had been killed.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::os::{clock, memory};
use crate::protocol::Estate;

/// Of the format. To be raised by every change that a worker with the former one would misunderstand.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Letter {
    version: u32,
    /// By a clock that all processes share.
    left: Duration,
    estate: Estate,
}

/// What is understood of every version.
#[derive(Deserialize)]
struct Envelope {
    version: u32,
}

/// What a worker left, and when.
pub(crate) struct Legacy {
    pub(crate) estate: Estate,
    pub(crate) left: Instant,
}

/// A successor goes on without what was left.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LegacyError {
    #[error("read what the worker before left")]
    Read(#[from] io::Error),
    #[error("understand what the worker before left")]
    Malformed(#[from] serde_json::Error),
    #[error("the worker before left it in format {0}")]
    Version(u32),
}

/// Writes down an estate that was left just now.
pub(crate) fn write(estate: Estate) -> io::Result<OwnedFd> {
    let letter = Letter { version: VERSION, left: clock::monotonic(), estate };
    let mut writer = memory::Writer::new()?;
    serde_json::to_writer(&mut writer, &letter)?;
    writer.finish()
}

/// Takes what was written, and leaves nothing.
pub(crate) fn take(file: OwnedFd) -> Result<Legacy, LegacyError> {
    let bytes = memory::take(file)?;
    let Envelope { version } = serde_json::from_slice(&bytes)?;
    if version != VERSION {
        return Err(LegacyError::Version(version));
    }
    let letter: Letter = serde_json::from_slice(&bytes)?;
    let ago = clock::monotonic().saturating_sub(letter.left);
    let now = Instant::now();
    Ok(Legacy { estate: letter.estate, left: now.checked_sub(ago).unwrap_or(now) })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn estate() -> Estate {
        Estate { last_stamp: Duration::from_secs(7), peers: vec![] }
    }

    #[test]
    fn an_estate_is_taken_once_and_knows_when_it_was_left() {
        let before = Instant::now();
        let file = write(estate()).unwrap();
        let again = file.try_clone().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let legacy = take(file).unwrap();
        assert_eq!(legacy.estate.last_stamp, Duration::from_secs(7));
        let slack = Duration::from_millis(5);
        assert!(legacy.left + slack >= before && legacy.left + slack * 4 <= Instant::now() + slack);
        assert!(matches!(take(again), Err(LegacyError::Malformed(_))), "nothing is left");
    }

    #[test]
    fn another_format_is_not_guessed_at() {
        let mut writer = memory::Writer::new().unwrap();
        writer.write_all(br#"{"version": 2, "left": "in another way"}"#).unwrap();
        assert!(matches!(take(writer.finish().unwrap()), Err(LegacyError::Version(2))));
    }
}
