//! One OCI archive from the node's static busybox.

use std::io::Write;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

/// Image of the pods' sandboxes.
pub(crate) const PAUSE: &str = "mesh.test/pause:1";
/// A shell with the usual programs.
pub(crate) const BUSYBOX: &str = "mesh.test/busybox:1";
/// Media type of an image's manifest.
pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Both images, as blobs that know each other by their digests.
pub(crate) struct Images {
    /// By digest, without its algorithm.
    pub(crate) blobs: Vec<(String, Vec<u8>)>,
    /// A descriptor of each image's manifest; [`BUSYBOX`] is the first.
    pub(crate) manifests: Vec<Value>,
}

/// Makes both images.
pub(crate) fn images() -> Images {
    let layer = layer();
    let mut blobs: Vec<(String, Vec<u8>)> = Vec::new();
    let mut manifests = Vec::new();
    for (name, command) in
        [(BUSYBOX, json!(["/bin/sh"])), (PAUSE, json!(["/bin/sleep", "1000000000"]))]
    {
        let layer = blob(&mut blobs, "application/vnd.oci.image.layer.v1.tar", &layer);
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": {"Env": ["PATH=/bin"], "Cmd": command},
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
        });
        let config = config.to_string();
        let config =
            blob(&mut blobs, "application/vnd.oci.image.config.v1+json", config.as_bytes());
        let manifest =
            json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer]});
        let mut manifest = blob(&mut blobs, MANIFEST, manifest.to_string().as_bytes());
        manifest["annotations"] = json!({"io.containerd.image.name": name});
        manifests.push(manifest);
    }
    Images { blobs, manifests }
}

/// Writes both images to `path`.
pub(crate) fn write(path: &Path) {
    let Images { blobs, manifests } = images();
    let mut tar = Builder::new(std::fs::File::create(path).unwrap());
    file(&mut tar, "oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#);
    let index = json!({"schemaVersion": 2, "manifests": manifests}).to_string();
    file(&mut tar, "index.json", 0o644, index.as_bytes());
    for (digest, bytes) in &blobs {
        file(&mut tar, &format!("blobs/sha256/{digest}"), 0o644, bytes);
    }
    tar.finish().unwrap();
}

fn blob(blobs: &mut Vec<(String, Vec<u8>)>, media: &str, bytes: &[u8]) -> Value {
    let digest = hex::encode(Sha256::digest(bytes));
    if !blobs.iter().any(|(present, _)| *present == digest) {
        blobs.push((digest.clone(), bytes.to_owned()));
    }
    json!({"mediaType": media, "digest": format!("sha256:{digest}"), "size": bytes.len()})
}

fn layer() -> Vec<u8> {
    let binary = std::fs::read("/usr/bin/busybox").expect("install busybox-static");
    let names = Command::new("/usr/bin/busybox").arg("--list").output().unwrap().stdout;
    let mut tar = Builder::new(Vec::new());
    for folder in ["bin", "dev", "etc", "proc", "root", "sys"] {
        entry(&mut tar, folder, EntryType::Directory, 0o755, None);
    }
    entry(&mut tar, "tmp", EntryType::Directory, 0o1777, None);
    file(&mut tar, "bin/busybox", 0o755, &binary);
    for name in String::from_utf8(names).unwrap().lines().filter(|n| *n != "busybox") {
        entry(&mut tar, &format!("bin/{name}"), EntryType::Symlink, 0o777, Some("busybox"));
    }
    file(&mut tar, "etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n");
    tar.into_inner().unwrap()
}

fn file(tar: &mut Builder<impl Write>, path: &str, mode: u32, bytes: &[u8]) {
    let mut header = header(EntryType::Regular, mode);
    header.set_size(bytes.len() as u64);
    tar.append_data(&mut header, path, bytes).unwrap();
}

fn entry(
    tar: &mut Builder<impl Write>,
    path: &str,
    kind: EntryType,
    mode: u32,
    link: Option<&str>,
) {
    let mut header = header(kind, mode);
    header.set_size(0);
    match link {
        Some(target) => tar.append_link(&mut header, path, target).unwrap(),
        None => tar.append_data(&mut header, path, std::io::empty()).unwrap(),
    }
}

fn header(kind: EntryType, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}
