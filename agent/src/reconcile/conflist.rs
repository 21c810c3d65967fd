//! The file by which containerd finds the plugin: there while the node can take pods.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use tokio::sync::watch;

use crate::board::Board;
use crate::cni::{DEFAULT_NETWORK, Readiness};
use crate::errors::chain;
use crate::files::write_atomically_with_mode;

const NAME: &str = "cni";
/// Sorts before what other networks leave behind.
const FILE: &str = "10-mesh.conflist";
/// The newest version that containerd 1.6 understands.
const VERSION: &str = "1.0.0";
const HEAL: Duration = Duration::from_secs(60);

/// What the file says.
#[derive(Debug, Clone)]
pub(crate) struct Conflist {
    pub(crate) directory: PathBuf,
    pub(crate) socket: PathBuf,
    pub(crate) state_dir: PathBuf,
}

impl Conflist {
    fn path(&self) -> PathBuf {
        self.directory.join(FILE)
    }

    fn content(&self) -> String {
        let list = json!({
            "cniVersion": VERSION,
            "name": DEFAULT_NETWORK,
            "plugins": [{
                "type": "mesh-cni",
                "socket": self.socket,
                "stateDir": self.state_dir,
                "capabilities": {
                    "portMappings": true,
                    "bandwidth": true,
                    "ips": true,
                    "mac": true,
                    "dns": true,
                },
            }],
        });
        format!("{list:#}\n")
    }

    /// Writes the file when the node is ready, again when somebody removed or changed it, and removes it when the node cannot
    /// take pods any more. What an earlier agent wrote stays while this one finds out.
    pub(crate) async fn keep(self, mut readiness: watch::Receiver<Readiness>, board: Board) {
        let mut was_ready = false;
        loop {
            let ready = readiness.borrow_and_update().unavailable.is_none();
            if ready || was_ready {
                let done = if ready { self.write() } else { remove(&self.directory) };
                was_ready = ready || done.is_err();
                match done {
                    Ok(()) => board.done(NAME),
                    Err(error) => {
                        let path = self.path();
                        board.failed(NAME, vec![format!("{}: {}", path.display(), chain(&error))]);
                    }
                }
            }
            tokio::select! {
                () = tokio::time::sleep(HEAL) => {}
                changed = readiness.changed() => if changed.is_err() { return },
            }
        }
    }

    fn write(&self) -> io::Result<()> {
        let (path, content) = (self.path(), self.content());
        if fs::read_to_string(&path).is_ok_and(|present| present == content) {
            return Ok(());
        }
        fs::create_dir_all(&self.directory)?;
        write_atomically_with_mode(&path, content.as_bytes(), 0o644)?;
        tracing::info!(path = %path.display(), "CNI configuration written");
        Ok(())
    }
}

/// Removes the file, if it is there.
pub(crate) fn remove(directory: &Path) -> io::Result<()> {
    match fs::remove_file(directory.join(FILE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_file_appears_when_the_node_is_ready_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let list = Conflist {
            directory: dir.path().join("net.d"),
            socket: "/run/mesh/cni.sock".into(),
            state_dir: "/var/lib/mesh".into(),
        };
        let path = list.path();
        let (sender, receiver) = watch::channel(Readiness::starting("test"));
        let keeping = tokio::spawn(list.keep(receiver, Board::default()));
        tokio::task::yield_now().await;
        assert!(!path.exists());
        sender.send_modify(|readiness| readiness.unavailable = None);
        for _ in 0..500 {
            if path.exists() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let text = fs::read_to_string(&path).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["plugins"][0]["socket"], "/run/mesh/cni.sock");
        assert_eq!(json["plugins"][0]["capabilities"]["portMappings"], true);
        sender.send_modify(|readiness| readiness.unavailable = Some("no blocks".to_owned()));
        for _ in 0..500 {
            if !path.exists() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(!path.exists(), "a node that cannot take pods does not say so");
        keeping.abort();
        remove(path.parent().unwrap()).unwrap();
    }
}
