//! Releases that wait for an agent that is down: one file each, named after its owner.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use crate::wire::Owner;

/// The queue's place below the agent's state directory.
pub fn directory(state: &Path) -> PathBuf {
    state.join("cni").join("queue")
}

/// Writes a release durably: when this returns, it survives a power failure.
///
/// Fails when the state directory does not exist: then no agent will ever look.
pub fn push(state: &Path, owner: &Owner) -> io::Result<()> {
    if !state.is_dir() {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!("no state directory {}", state.display()),
        ));
    }
    let directory = directory(state);
    fs::create_dir_all(&directory)?;
    let fresh = directory.join(format!(".{}.{}", std::process::id(), name(owner)));
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
    file.write_all(&serde_json::to_vec(owner)?)?;
    file.sync_all()?;
    fs::rename(&fresh, directory.join(name(owner)))?;
    File::open(&directory)?.sync_all()
}

/// All releases that wait, with their files, which the reader deletes when it is done.
///
/// A file that does not hold one is not returned, but stays for people to see.
pub fn list(state: &Path) -> io::Result<Vec<(PathBuf, Owner)>> {
    let entries = match fs::read_dir(directory(state)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        Err(error) => return Err(error),
    };
    let mut found = vec![];
    for entry in entries {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if let Ok(owner) = serde_json::from_slice(&fs::read(entry.path())?) {
            found.push((entry.path(), owner));
        }
    }
    Ok(found)
}

/// A file name that no two owners share, and that cannot leave the directory.
fn name(owner: &Owner) -> String {
    let interface: String = owner.interface.bytes().map(|b| format!("{b:02x}")).collect();
    format!("{}+{interface}", owner.container)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_pushed_is_listed_once() {
        let state = std::env::temp_dir().join(format!("mesh-cni-queue-{}", std::process::id()));
        fs::create_dir_all(&state).unwrap();
        let owner = Owner::new("abc", "eth0").unwrap();
        push(&state, &owner).unwrap();
        push(&state, &owner).unwrap();
        push(&state, &Owner::new("abc", "eth1").unwrap()).unwrap();
        let listed = list(&state).unwrap();
        assert_eq!(listed.len(), 2);
        assert!(listed.iter().any(|(_, o)| *o == owner));
        fs::remove_dir_all(&state).unwrap();
        assert!(push(&state, &owner).is_err(), "without an agent's directory nobody would look");
    }
}
