//! The node's WireGuard key: made on the node, never leaves it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mesh_model::snapshot::WgKey;
use rand::TryRngCore as _;
use x25519_dalek::{PublicKey, StaticSecret};

/// A node's private key, and the public key that belongs to it.
///
/// The private half is wiped from memory on drop and not shown by `Debug`.
#[derive(Clone)]
pub struct NodeKey {
    secret: StaticSecret,
    public: WgKey,
}

/// The keys of a node: the one that its peers know it by and, while that is being replaced, the next one.
///
/// Peers may call it by either. Nobody is called by the next one who is not known to have learned of it.
#[derive(Debug, Clone)]
pub struct NodeKeys {
    /// In use.
    pub present: NodeKey,
    /// Published, and taking over.
    pub next: Option<NodeKey>,
}

/// The node's key could not be read or made.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file exists and cannot be read.
    #[error("read the node's key from {path}")]
    Read {
        /// The key file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file holds something else. It is left as it is: a new key would cut the node off from its peers.
    #[error("{path} does not hold a WireGuard private key (32 bytes in base64)")]
    Malformed {
        /// The key file.
        path: PathBuf,
    },
    /// Others than the owner may read the file.
    #[error("{path} is open to others (mode {mode:o}, expected 600)")]
    Exposed {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A new key could not be stored.
    #[error("store a new node key in {path}")]
    Write {
        /// The key file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl NodeKey {
    /// A new key from the system's random source.
    pub fn generate() -> io::Result<Self> {
        let mut bytes = [0; 32];
        rand::rngs::OsRng.try_fill_bytes(&mut bytes).map_err(io::Error::other)?;
        Ok(Self::from_bytes(bytes))
    }

    /// The key with these 32 bytes, clamped as Curve25519 demands (RFC 7748, section 5).
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        let secret = StaticSecret::from(bytes);
        let public = WgKey(PublicKey::from(&secret).to_bytes());
        Self { secret, public }
    }

    /// Reads the key from a file in the format of `wg genkey`.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        let failed = |source| KeyError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let mode = file.metadata().map_err(failed)?.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Exposed { path: path.to_owned(), mode });
        }
        let mut text = String::new();
        // A key takes 45 bytes; whatever is longer is not one.
        file.take(64).read_to_string(&mut text).map_err(failed)?;
        let malformed = || KeyError::Malformed { path: path.to_owned() };
        let bytes = STANDARD.decode(text.trim()).map_err(|_| malformed())?;
        Ok(Self::from_bytes(bytes.try_into().map_err(|_| malformed())?))
    }

    /// Reads the key, or makes one and stores it with mode 0600 when the file does not exist.
    ///
    /// Two processes that do this at once get the same key. What is returned is on disk.
    pub fn load_or_create(path: &Path) -> Result<Self, KeyError> {
        match Self::load(path) {
            Err(KeyError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                let failed = |source| KeyError::Write { path: path.to_owned(), source };
                Self::generate().and_then(|key| key.store_new(path)).map_err(failed)?;
                Self::load(path)
            }
            result => result,
        }
    }

    /// The public half.
    pub fn public(&self) -> WgKey {
        self.public
    }

    /// The private half, for handshakes and for the kernel's device.
    pub fn private_bytes(&self) -> [u8; 32] {
        self.secret.to_bytes()
    }

    fn store_new(&self, path: &Path) -> io::Result<()> {
        write_new(path, &STANDARD.encode(self.secret.as_bytes()))
    }
}

/// Writes a line beside the final path, then links: an existing file is never replaced.
fn write_new(path: &Path, line: &str) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(format!(".{}.new", std::process::id()));
    let fresh = PathBuf::from(fresh);
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
    writeln!(file, "{line}")?;
    file.sync_all()?;
    let linked = fs::hard_link(&fresh, path);
    fs::remove_file(&fresh)?;
    match linked {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    File::open(directory)?.sync_all()
}

impl From<NodeKey> for NodeKeys {
    fn from(present: NodeKey) -> Self {
        Self { present, next: None }
    }
}

impl NodeKeys {
    /// File of the next key, beside that of the present one.
    pub fn next_path(path: &Path) -> PathBuf {
        path.with_extension("key.next")
    }

    /// Reads the present key, made when absent, and the next one, if there is one.
    pub fn load_or_create(path: &Path) -> Result<Self, KeyError> {
        let present = NodeKey::load_or_create(path)?;
        let next = match NodeKey::load(&Self::next_path(path)) {
            // Left by a replacement that was ended just after it became the present one.
            Ok(next) if next.public() == present.public() => None,
            Ok(next) => Some(next),
            Err(KeyError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        Ok(Self { present, next })
    }

    /// The public key that the node had first: its name on the overlay for good.
    pub fn name(path: &Path) -> Result<WgKey, KeyError> {
        let file = path.with_extension("name");
        match fs::read_to_string(&file) {
            Ok(text) => text.trim().parse().map_err(|_| KeyError::Malformed { path: file }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                NodeKey::load_or_create(path).map(|key| key.public())
            }
            Err(source) => Err(KeyError::Read { path: file, source }),
        }
    }

    /// Makes a next key, or returns the one that there is. What is returned is on disk, and so is the node's name.
    pub fn prepare_next(path: &Path) -> Result<NodeKey, KeyError> {
        let file = path.with_extension("name");
        if !file.exists() {
            let name = Self::name(path)?.to_string();
            let failed = |source| KeyError::Write { path: file.clone(), source };
            write_new(&file, &name).map_err(failed)?;
        }
        NodeKey::load_or_create(&Self::next_path(path))
    }

    /// The next key becomes the present one, which is gone for good. One step: a crash leaves either.
    pub fn promote(path: &Path) -> Result<(), KeyError> {
        let failed = |source| KeyError::Write { path: path.to_owned(), source };
        fs::rename(Self::next_path(path), path).map_err(failed)?;
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let directory = File::open(directory.unwrap_or(Path::new("."))).map_err(failed)?;
        directory.sync_all().map_err(failed)
    }

    /// Their public halves, the present one first.
    pub fn public(&self) -> Vec<WgKey> {
        [Some(&self.present), self.next.as_ref()]
            .into_iter()
            .flatten()
            .map(NodeKey::public)
            .collect()
    }
}

impl std::fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeKey").field("public", &self.public).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("overlay.key");
        let made = NodeKey::load_or_create(&path).unwrap();
        let again = NodeKey::load_or_create(&path).unwrap();
        assert_eq!(made.public(), again.public());
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
        assert!(!format!("{made:?}").contains(&STANDARD.encode(made.private_bytes())));
    }

    #[test]
    fn a_next_key_takes_over_in_one_step() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("overlay.key");
        let first = NodeKeys::load_or_create(&path).unwrap();
        assert!(first.next.is_none());
        let next = NodeKeys::prepare_next(&path).unwrap();
        assert_eq!(NodeKeys::prepare_next(&path).unwrap().public(), next.public(), "twice is once");
        let both = NodeKeys::load_or_create(&path).unwrap();
        assert_eq!(both.public(), [first.present.public(), next.public()]);
        NodeKeys::promote(&path).unwrap();
        let after = NodeKeys::load_or_create(&path).unwrap();
        assert_eq!(after.public(), [next.public()]);
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            2,
            "the old one is gone, its name is not"
        );
        assert_eq!(NodeKeys::name(&path).unwrap(), first.present.public());
        NodeKeys::prepare_next(&path).unwrap();
        assert_eq!(NodeKeys::name(&path).unwrap(), first.present.public(), "for good");
        fs::remove_file(NodeKeys::next_path(&path)).unwrap();
        assert!(NodeKeys::promote(&path).is_err(), "there is none to take over");
        assert_eq!(NodeKeys::load_or_create(&path).unwrap().public(), [next.public()]);
    }

    #[test]
    fn the_public_key_is_the_one_of_rfc_7748() {
        // Section 6.1, Alice.
        let private = [
            0x77, 0x07, 0x6d, 0x0a, 0x73, 0x18, 0xa5, 0x7d, 0x3c, 0x16, 0xc1, 0x72, 0x51, 0xb2,
            0x66, 0x45, 0xdf, 0x4c, 0x2f, 0x87, 0xeb, 0xc0, 0x99, 0x2a, 0xb1, 0x77, 0xfb, 0xa5,
            0x1d, 0xb9, 0x2c, 0x2a,
        ];
        let public = NodeKey::from_bytes(private).public();
        assert_eq!(public.0[..4], [0x85, 0x20, 0xf0, 0x09]);
        assert_eq!(public.0[28..], [0xaa, 0x9b, 0x4e, 0x6a]);
    }

    #[test]
    fn a_broken_or_exposed_file_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("overlay.key");
        fs::write(&path, "not a key").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(matches!(NodeKey::load_or_create(&path), Err(KeyError::Malformed { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "not a key");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(
            NodeKey::load_or_create(&path),
            Err(KeyError::Exposed { mode: 0o644, .. })
        ));
    }
}
