//! Names of a cluster's containers, and what the runtime keeps of them where all containerds of a machine meet.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::containerd::NAMESPACE;
use crate::layout::{Layout, MAX_NODES, NodeLayout};

/// Where shims and runc keep their state, whatever a containerd's configuration says.
pub const SHARED: &str = "/run/containerd";

/// Every container that a node's containerd ever had: it names each in its log, and has a folder for those that run.
pub fn ids(cluster: &Layout, node: &NodeLayout) -> BTreeSet<String> {
    let log = fs::read(cluster.logs().join(format!("{}-containerd.log", node.name)));
    let mut found = names_in(&log.unwrap_or_default());
    let running = bundles(node)
        .into_iter()
        .filter_map(|bundle| bundle.file_name()?.to_str().map(str::to_owned));
    found.extend(running);
    found
}

/// Folders of the containers that run, named by their ids.
pub fn bundles(node: &NodeLayout) -> Vec<PathBuf> {
    let folder = node.containerd_run().join("io.containerd.runtime.v2.task").join(NAMESPACE);
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// What is kept of the cluster's containers in the shared folder, if the runtime has not removed it.
pub fn shared_files(cluster: &Layout) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for node in (1..=MAX_NODES).map(|number| cluster.node(number)) {
        for id in ids(cluster, &node) {
            found.push(Path::new(SHARED).join("runc").join(NAMESPACE).join(&id));
            found.push(Path::new(SHARED).join("s").join(socket(&node, &id)));
        }
    }
    found
}

/// Name of the socket of a container's shim: the digest of containerd's address, the namespace and the container.
pub fn socket(node: &NodeLayout, id: &str) -> String {
    let address = node.containerd_socket().join(NAMESPACE).join(id);
    hex::encode(Sha256::digest(address.as_os_str().as_encoded_bytes()))
}

/// Words of 64 hexadecimal digits. Digests of images look the same; nothing is called by them.
fn names_in(log: &[u8]) -> BTreeSet<String> {
    let words = log.split(|byte| !byte.is_ascii_alphanumeric());
    let names = words.filter(|word| word.len() == 64 && word.iter().all(u8::is_ascii_hexdigit));
    names.map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_are_known_from_the_log() {
        let id = "5e".repeat(32);
        let log = format!(
            "msg=\"RunPodSandbox returns sandbox id \\\"{id}\\\"\" path=/x/{id} pid=5e5e\n{id}5e\n"
        );
        assert_eq!(names_in(log.as_bytes()), [id].into());
    }

    #[test]
    fn the_sockets_of_shims_are_where_containerd_makes_them() {
        let node = Layout::new("t1").unwrap().node(1);
        let text = "/run/mesh-dev/t1/node-1/containerd.sock/k8s.io/web";
        assert_eq!(socket(&node, "web"), hex::encode(Sha256::digest(text)));
    }
}
