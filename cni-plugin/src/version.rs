//! Versions of the specification.

use std::fmt;

use crate::wire::{Code, Failure};

/// A version that this plugin speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// 0.3.1
    V031,
    /// 0.4.0: CHECK.
    V040,
    /// 1.0.0: no `version` in `ips`.
    V100,
    /// 1.1.0: GC and STATUS.
    V110,
}

/// All of them, the newest first.
pub const SUPPORTED: [Version; 4] = [Version::V110, Version::V100, Version::V040, Version::V031];

/// What a configuration without `cniVersion` means (specification, section 1).
const ABSENT: &str = "0.1.0";

impl Version {
    /// As written in a configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V031 => "0.3.1",
            Self::V040 => "0.4.0",
            Self::V100 => "1.0.0",
            Self::V110 => "1.1.0",
        }
    }

    /// The version that a configuration names.
    pub fn parse(text: Option<&str>) -> Result<Self, Failure> {
        let text = text.unwrap_or(ABSENT);
        SUPPORTED.into_iter().find(|v| v.as_str() == text).ok_or_else(|| {
            Failure::new(
                Code::Version,
                format!("cniVersion {text:?} is not supported"),
                format!("supported: {}", SUPPORTED.map(Self::as_str).join(", ")),
            )
        })
    }

    /// Refuses `command` when this version does not have it yet.
    pub fn require(self, least: Self, command: &str) -> Result<(), Failure> {
        if self >= least {
            return Ok(());
        }
        Err(Failure::new(
            Code::Version,
            format!("{command} does not exist in cniVersion {self}"),
            format!("it needs {least} or later"),
        ))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_version_is_an_old_one_and_refused() {
        let failure = Version::parse(None).unwrap_err();
        assert_eq!(failure.code, 1);
        assert!(failure.msg.contains("0.1.0"));
        assert!(failure.details.contains("1.1.0, 1.0.0, 0.4.0, 0.3.1"));
        assert_eq!(Version::parse(Some("0.4.0")), Ok(Version::V040));
    }
}
