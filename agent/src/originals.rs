//! What the node's sysctls were before the agent changed them, kept on disk until `mesh-agent reset` gives them back.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use crate::files::write_atomically;

/// The file.
#[derive(Debug, Clone)]
pub(crate) struct Originals(PathBuf);

/// The values cannot be kept, so nothing may be changed.
#[derive(Debug, thiserror::Error)]
#[error("keep what sysctls were in {path}")]
pub(crate) struct NotKept {
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl Originals {
    /// Kept at `path`.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// Adds values that are not known yet. What was first noted stays: a second change starts from one of ours.
    pub(crate) fn note(&self, values: BTreeMap<String, String>) -> Result<(), NotKept> {
        let mut known = self.read();
        let fresh: Vec<_> =
            values.into_iter().filter(|(name, _)| !known.contains_key(name)).collect();
        if fresh.is_empty() {
            return Ok(());
        }
        known.extend(fresh);
        let kept = serde_json::to_vec_pretty(&known).map_err(io::Error::other);
        kept.and_then(|text| write_atomically(&self.0, &text))
            .map_err(|source| NotKept { path: self.0.clone(), source })
    }

    /// All of them; nothing where there is no file, or a damaged one.
    pub(crate) fn read(&self) -> BTreeMap<String, String> {
        let text = std::fs::read(&self.0).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// Forgets them: they are given back.
    pub(crate) fn forget(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_first_is_kept_until_it_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let originals = Originals::new(dir.path().join("sysctls.json"));
        let values = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
        };
        assert_eq!(originals.read(), values(&[]));
        originals.note(values(&[("a", "0")])).unwrap();
        originals.note(values(&[("a", "1"), ("b", "2")])).unwrap();
        assert_eq!(originals.read(), values(&[("a", "0"), ("b", "2")]));
        originals.forget().unwrap();
        originals.forget().unwrap();
        assert_eq!(originals.read(), values(&[]));
        let nowhere = Originals::new(dir.path().join("no/x"));
        assert!(nowhere.note(values(&[("a", "0")])).is_err(), "then nothing is changed");
    }
}
