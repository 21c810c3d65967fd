//! Is that path the network namespace of a container?

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use mesh_cni::wire::{Code, Failure};
use nix::sys::statfs::{FsType, fstatfs};

/// `NSFS_MAGIC` of `linux/magic.h`.
const NSFS: FsType = FsType(0x6e73_6673);

/// Refuses what cannot be a container's namespace, before an address is spent on it.
pub(super) fn check(path: &Path) -> Result<(), Failure> {
    let refuse = |why: String| {
        let message = format!("CNI_NETNS {} is not the namespace of a container", path.display());
        Err(Failure::new(Code::Namespace, message, why))
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) => return refuse(error.to_string()),
    };
    match fstatfs(&file) {
        Ok(fs) if fs.filesystem_type() == NSFS => {}
        Ok(_) => return refuse("it is not a namespace".to_owned()),
        Err(error) => return refuse(error.to_string()),
    }
    let identity = |m: std::io::Result<std::fs::Metadata>| m.map(|m| (m.dev(), m.ino()));
    match (identity(file.metadata()), identity(std::fs::metadata("/proc/self/ns/net"))) {
        (Ok(given), Ok(own)) if given != own => Ok(()),
        (Ok(_), Ok(_)) => refuse("it is the node's own".to_owned()),
        (Err(error), _) | (_, Err(error)) => refuse(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_the_own_namespace_are_refused_by_name() {
        for path in ["/nonexistent/ns", "/etc/hostname", "/proc/self/ns/net", "/"] {
            let failure = check(Path::new(path)).unwrap_err();
            assert_eq!(failure.code, 8);
            assert!(failure.msg.contains(path));
        }
        assert!(check(Path::new("/proc/self/ns/uts")).is_ok(), "the kind shows when it is entered");
    }
}
