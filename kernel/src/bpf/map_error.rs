//! Why a map could not be used.

use std::io;

/// A map could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// There is no room for another entry: raise its capacity.
    #[error("map {map} is full")]
    Full {
        /// The map.
        map: &'static str,
    },
    /// The kernel refused.
    #[error("use map {map}")]
    Refused {
        /// The map.
        map: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl MapError {
    /// What a failure of this map means.
    pub(crate) fn of(map: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| match source.raw_os_error() {
            Some(libc::E2BIG | libc::ENOSPC) => Self::Full { map },
            _ => Self::Refused { map, source },
        }
    }

    /// The map, where it is full.
    pub fn full(&self) -> Option<&'static str> {
        match self {
            Self::Full { map } => Some(map),
            Self::Refused { .. } => None,
        }
    }
}
