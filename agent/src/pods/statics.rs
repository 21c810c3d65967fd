//! Static pods: manifests in a directory of the node. They run without the control service; it shows a mirror of each.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use k8s_openapi::api::core::v1::{Pod, Toleration};
use mesh_model::NodeName;
use sha2::{Digest as _, Sha256};

mod mirror;

pub(crate) use mirror::{Mirrored, Mirrors, Uids, is_mirror, keep};

/// Where a pod comes from, as the kubelet notes it.
const ANNOTATION_SOURCE: &str = "kubernetes.io/config.source";
/// Tells one version of a manifest from another.
const ANNOTATION_HASH: &str = "kubernetes.io/config.hash";
/// The uid of its mirror. Another mirror has to be told all that is known of the pod.
pub(crate) const ANNOTATION_SHOWN_AS: &str = "mesh.dev/mirror";
/// A manifest is written by a person.
const LARGEST_BYTES: u64 = 1 << 20;

/// A file is not the manifest of a pod.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ManifestError {
    #[error("read it: {0}")]
    Read(#[from] io::Error),
    #[error("it is not a pod: {0}")]
    Yaml(#[from] Box<serde_saphyr::Error>),
    #[error("it is not a pod: {0}")]
    Json(#[from] serde_json::Error),
    #[error("it is not a pod of version v1 with a name and containers")]
    NotAPod,
    #[error("it has more than {LARGEST_BYTES} bytes")]
    TooLarge,
}

/// Whether the pod was read from a file of this node.
pub(crate) fn is_static(pod: &Pod) -> bool {
    annotation(pod, ANNOTATION_SOURCE) == Some("file")
}

/// The mirror that the API shows of a static pod.
pub(crate) fn shown_as(pod: &Pod) -> Option<&str> {
    annotation(pod, ANNOTATION_SHOWN_AS)
}

fn annotation<'a>(pod: &'a Pod, name: &str) -> Option<&'a str> {
    pod.metadata.annotations.as_ref()?.get(name).map(String::as_str)
}

/// The pod of a manifest. The same text on the same node is the same pod, also for the next agent.
fn pod(text: &str, node: &NodeName) -> Result<Pod, ManifestError> {
    let value: serde_json::Value = serde_saphyr::from_str(text).map_err(Box::new)?;
    if value["kind"] != "Pod" || value["apiVersion"] != "v1" {
        return Err(ManifestError::NotAPod);
    }
    let mut pod: Pod = serde_json::from_value(value)?;
    let name = pod.metadata.name.as_deref().filter(|name| !name.is_empty());
    let name = name.ok_or(ManifestError::NotAPod)?;
    let spec = pod.spec.as_mut().filter(|spec| !spec.containers.is_empty());
    let spec = spec.ok_or(ManifestError::NotAPod)?;
    pod.metadata.name = Some(format!("{name}-{node}"));
    pod.metadata.namespace.get_or_insert_with(|| "default".to_owned());
    let uid = uid(text, node);
    let annotations = pod.metadata.annotations.get_or_insert_default();
    annotations.insert(ANNOTATION_SOURCE.to_owned(), "file".to_owned());
    annotations.insert(ANNOTATION_HASH.to_owned(), uid.clone());
    pod.metadata.uid = Some(uid);
    spec.node_name = Some(node.to_string());
    // Nothing but its file decides whether it runs.
    spec.tolerations.get_or_insert_default().push(Toleration {
        operator: Some("Exists".to_owned()),
        effect: Some("NoExecute".to_owned()),
        ..Toleration::default()
    });
    pod.status = None;
    Ok(pod)
}

fn uid(text: &str, node: &NodeName) -> String {
    let mut hash = Sha256::new();
    hash.update(node.as_str());
    hash.update([0]);
    hash.update(text);
    let text = hex::encode(&hash.finalize()[..16]);
    format!("{}-{}-{}-{}-{}", &text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..])
}

/// What tells that a file has changed.
type Stamp = (SystemTime, u64);

/// The directory, and what was read of it last.
#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
    node: NodeName,
    files: BTreeMap<PathBuf, (Stamp, Option<Pod>)>,
}

impl Directory {
    /// Nothing is read yet.
    pub(crate) fn new(path: PathBuf, node: NodeName) -> Self {
        Self { path, node, files: BTreeMap::new() }
    }

    /// Reads what is new; whether anything changed. A file that makes no sense is as it was before. Blocks.
    pub(crate) fn read(&mut self) -> bool {
        let found = match list(&self.path) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => {
                let path = self.path.display();
                tracing::warn!(%path, %error, "static pods not read, they stay as they are");
                return false;
            }
        };
        let before = self.files.len();
        self.files.retain(|path, _| found.contains_key(path));
        let mut changed = self.files.len() != before;
        for (path, stamp) in found {
            let known = self.files.get(&path);
            if known.is_some_and(|(known, _)| *known == stamp) {
                continue;
            }
            let read = read(&path, stamp).and_then(|text| pod(&text, &self.node));
            let pod = read.map(Some).unwrap_or_else(|error| {
                let path = path.display();
                tracing::error!(%path, %error, "not the manifest of a static pod");
                known.and_then(|(_, pod)| pod.clone())
            });
            changed |= known.and_then(|(_, pod)| pod.as_ref()) != pod.as_ref();
            self.files.insert(path, (stamp, pod));
        }
        changed
    }

    /// The pods; of two that have one name, that of the first file.
    pub(crate) fn pods(&self) -> Vec<Pod> {
        let mut pods = BTreeMap::new();
        for pod in self.files.values().filter_map(|(_, pod)| pod.as_ref()) {
            let name = (pod.metadata.namespace.clone(), pod.metadata.name.clone());
            pods.entry(name).or_insert_with(|| pod.clone());
        }
        pods.into_values().collect()
    }
}

fn list(directory: &Path) -> io::Result<BTreeMap<PathBuf, Stamp>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let hidden = path.file_name().is_none_or(|n| n.to_string_lossy().starts_with('.'));
        // A file that went away meanwhile is not there.
        if let Some(metadata) = std::fs::metadata(&path).ok().filter(|m| m.is_file() && !hidden) {
            found.insert(path, (metadata.modified()?, metadata.len()));
        }
    }
    Ok(found)
}

fn read(path: &Path, (_, length): Stamp) -> Result<String, ManifestError> {
    if length > LARGEST_BYTES {
        return Err(ManifestError::TooLarge);
    }
    Ok(std::fs::read_to_string(path)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEB: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec: {containers: [{name: c, image: i:1}]}\n";

    fn node() -> NodeName {
        "node-1".parse().unwrap()
    }

    #[test]
    fn a_manifest_is_a_pod_of_this_node() {
        let first = pod(WEB, &node()).unwrap();
        assert_eq!(first.metadata.name.as_deref(), Some("web-node-1"));
        assert_eq!(first.metadata.namespace.as_deref(), Some("default"));
        assert!(is_static(&first) && !is_mirror(&first));
        assert_eq!(first.spec.as_ref().unwrap().node_name.as_deref(), Some("node-1"));
        assert_eq!(pod(WEB, &node()).unwrap(), first, "the next agent knows it");
        let other = pod(&WEB.replace("i:1", "i:2"), &node()).unwrap();
        assert_ne!(other.metadata.uid, first.metadata.uid);
        for wrong in ["", "kind: Pod", "apiVersion: v1\nkind: Node\nmetadata: {name: n}", "a: [b"] {
            assert!(pod(wrong, &node()).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn files_come_change_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pods");
        let mut directory = Directory::new(path.clone(), node());
        assert!(!directory.read(), "no directory, no pods");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("web.yaml"), WEB).unwrap();
        std::fs::write(path.join(".web.yaml.swp"), "x").unwrap();
        assert!(directory.read() && !directory.read());
        let uid = |directory: &Directory| directory.pods()[0].metadata.uid.clone();
        let before = uid(&directory);
        std::fs::write(path.join("web.yaml"), WEB.replace("i:1", "image:2")).unwrap();
        assert!(directory.read());
        assert_ne!(uid(&directory), before);
        let good = uid(&directory);
        std::fs::write(path.join("web.yaml"), "half a man").unwrap();
        assert!(!directory.read(), "somebody is writing it");
        assert_eq!(uid(&directory), good);
        std::fs::write(path.join("a.yaml"), WEB).unwrap();
        assert!(directory.read());
        assert_eq!(directory.pods().len(), 1, "one name, one pod");
        std::fs::remove_dir_all(&path).unwrap();
        assert!(directory.read() && directory.pods().is_empty());
    }
}
