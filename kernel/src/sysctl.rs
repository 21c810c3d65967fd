//! Sysctls of a network namespace: files below `/proc/sys`, resolved in the calling thread's namespace.

use std::io;
use std::path::PathBuf;

/// A sysctl could not be written.
#[derive(Debug, thiserror::Error)]
#[error("write {value:?} to {path}")]
pub struct SysctlError {
    /// The file.
    pub path: PathBuf,
    /// The value.
    pub value: String,
    /// The cause.
    #[source]
    pub source: io::Error,
}

/// Reads one, by its path below `/proc/sys`. Nothing when it does not exist (IPv6 may be off).
pub fn read(name: &str) -> Option<String> {
    std::fs::read_to_string(path(name)).ok().map(|text| text.trim().to_owned())
}

/// Writes one, by its path below `/proc/sys`.
///
/// # Errors
/// When the file does not exist or the kernel refuses the value.
pub fn write(name: &str, value: &str) -> Result<(), SysctlError> {
    let path = path(name);
    std::fs::write(&path, value).map_err(|source| SysctlError {
        path,
        value: value.to_owned(),
        source,
    })
}

/// Writes one unless it does not exist.
///
/// # Errors
/// When the kernel refuses the value.
pub fn write_if_present(name: &str, value: &str) -> Result<(), SysctlError> {
    match write(name, value) {
        Err(error) if error.source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn path(name: &str) -> PathBuf {
    PathBuf::from("/proc/sys").join(name)
}
