//! OCI images made from local files: no registry is needed, and the bytes are the same each time.
//!
//! | Image | What it is |
//! |---|---|
//! | `mesh.local/hello:1`, `:2` | busybox and mesh-hello; `VERSION` is 1 or 2 |
//! | `mesh.local/busybox:1` | the same files, a shell as the command |
//! | `mesh.local/pause:1` | mesh-hello as the sandbox's first process |

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use crate::artifacts::Artifacts;
use crate::command;

/// Image of the pods' sandboxes.
pub const PAUSE: &str = "mesh.local/pause:1";

/// An image's name and the digest of its manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// Reference.
    pub name: String,
    /// `sha256:...` of the manifest.
    pub digest: String,
}

/// Writes one archive that holds all images, and tells their names and digests.
pub fn write_archive(artifacts: &Artifacts, path: &Path) -> Result<Vec<Named>> {
    let base = busybox_layer(&artifacts.busybox)?;
    let hello = hello_layer(&artifacts.hello)?;
    let both: [&[u8]; 2] = [&base, &hello];
    let pause_layer: [&[u8]; 1] = [&hello];
    let serve = json!({"Entrypoint": ["/bin/mesh-hello"], "Cmd": ["serve"]});
    let shell = json!({"Cmd": ["/bin/sh"]});
    let pause = json!({"Entrypoint": ["/bin/mesh-hello", "pause"]});
    let images: [(&str, &[&[u8]], &Value, &str); 4] = [
        ("mesh.local/hello:1", &both, &serve, "1"),
        ("mesh.local/hello:2", &both, &serve, "2"),
        ("mesh.local/busybox:1", &both, &shell, "1"),
        (PAUSE, &pause_layer, &pause, "1"),
    ];
    let mut blobs = Blobs::default();
    let mut named = Vec::new();
    let mut manifests = Vec::new();
    for (name, layers, config, version) in images {
        let mut descriptor = blobs.image(layers, config, version);
        named.push(Named { name: name.to_owned(), digest: text(&descriptor["digest"]) });
        descriptor["annotations"] = json!({
            "io.containerd.image.name": name,
            "org.opencontainers.image.ref.name": name,
        });
        manifests.push(descriptor);
    }
    let file = fs::File::create(path).with_context(|| format!("write {}", path.display()))?;
    blobs.write(file, &manifests)?;
    Ok(named)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[derive(Default)]
struct Blobs(Vec<(String, Vec<u8>)>);

impl Blobs {
    fn add(&mut self, media: &str, bytes: &[u8]) -> Value {
        let digest = hex::encode(Sha256::digest(bytes));
        if !self.0.iter().any(|(d, _)| *d == digest) {
            self.0.push((digest.clone(), bytes.to_owned()));
        }
        json!({"mediaType": media, "digest": format!("sha256:{digest}"), "size": bytes.len()})
    }

    fn image(&mut self, layers: &[&[u8]], process: &Value, version: &str) -> Value {
        let layers: Vec<Value> =
            layers.iter().map(|l| self.add("application/vnd.oci.image.layer.v1.tar", l)).collect();
        let diffs: Vec<&Value> = layers.iter().map(|l| &l["digest"]).collect();
        let mut process = process.clone();
        process["Env"] = json!(["PATH=/bin", format!("VERSION={version}")]);
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": process,
            "rootfs": {"type": "layers", "diff_ids": diffs},
        });
        let config =
            self.add("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
        let media = "application/vnd.oci.image.manifest.v1+json";
        let manifest =
            json!({"schemaVersion": 2, "mediaType": media, "config": config, "layers": layers});
        self.add(media, manifest.to_string().as_bytes())
    }

    fn write(self, out: impl Write, manifests: &[Value]) -> Result<()> {
        let mut tar = Builder::new(out);
        let index = json!({"schemaVersion": 2, "manifests": manifests});
        file(&mut tar, "oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        file(&mut tar, "index.json", 0o644, index.to_string().as_bytes())?;
        for (digest, bytes) in &self.0 {
            file(&mut tar, &format!("blobs/sha256/{digest}"), 0o644, bytes)?;
        }
        tar.finish().context("end the image archive")
    }
}

fn busybox_layer(busybox: &Path) -> Result<Vec<u8>> {
    let binary = fs::read(busybox).with_context(|| format!("read {}", busybox.display()))?;
    if !is_static(&binary) {
        bail!("{} is not static: install busybox-static", busybox.display());
    }
    let names = command::run(&busybox.display().to_string(), &["--list"])?;
    let mut tar = Builder::new(Vec::new());
    for folder in ["bin", "dev", "etc", "proc", "root", "run", "sys", "var"] {
        entry(&mut tar, folder, EntryType::Directory, 0o755, None)?;
    }
    entry(&mut tar, "tmp", EntryType::Directory, 0o1777, None)?;
    file(&mut tar, "bin/busybox", 0o755, &binary)?;
    for name in names.lines().filter(|n| *n != "busybox") {
        entry(&mut tar, &format!("bin/{name}"), EntryType::Symlink, 0o777, Some("busybox"))?;
    }
    file(&mut tar, "etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")?;
    file(&mut tar, "etc/group", 0o644, b"root:x:0:\n")?;
    file(&mut tar, "etc/nsswitch.conf", 0o644, b"hosts: files dns\n")?;
    tar.into_inner().context("end a layer")
}

fn hello_layer(hello: &Path) -> Result<Vec<u8>> {
    let binary = fs::read(hello).with_context(|| format!("read {}", hello.display()))?;
    let mut tar = Builder::new(Vec::new());
    entry(&mut tar, "bin", EntryType::Directory, 0o755, None)?;
    file(&mut tar, "bin/mesh-hello", 0o755, &binary)?;
    tar.into_inner().context("end a layer")
}

fn file(tar: &mut Builder<impl Write>, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
    let mut header = header(EntryType::Regular, mode);
    header.set_size(bytes.len() as u64);
    tar.append_data(&mut header, path, bytes).with_context(|| format!("archive {path}"))
}

fn entry(
    tar: &mut Builder<impl Write>,
    path: &str,
    kind: EntryType,
    mode: u32,
    link: Option<&str>,
) -> Result<()> {
    let mut header = header(kind, mode);
    header.set_size(0);
    let done = match link {
        Some(to) => tar.append_link(&mut header, path, to),
        None => tar.append_data(&mut header, path, std::io::empty()),
    };
    done.with_context(|| format!("archive {path}"))
}

/// No owner but root and no time: the same content has the same digest.
fn header(kind: EntryType, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

/// Whether an ELF file (64 bit, little endian) names no program interpreter.
fn is_static(elf: &[u8]) -> bool {
    let number = |at: usize, n: usize| {
        let bytes = elf.get(at..at + n)?;
        Some(bytes.iter().rev().fold(0usize, |sum, b| sum << 8 | usize::from(*b)))
    };
    let walk = || {
        let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        let kinds: Option<Vec<usize>> = (0..count).map(|i| number(table + i * size, 4)).collect();
        Some(!kinds?.contains(&3))
    };
    elf.starts_with(b"\x7fELF") && walk().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_files_make_the_same_images() {
        let dir = tempfile::tempdir().unwrap();
        let hello = dir.path().join("hello");
        fs::write(&hello, b"binary").unwrap();
        let layer = hello_layer(&hello).unwrap();
        assert_eq!(layer, hello_layer(&hello).unwrap());
        let mut blobs = Blobs::default();
        let one = blobs.image(&[&layer], &json!({"Cmd": ["a"]}), "1");
        let same = blobs.image(&[&layer], &json!({"Cmd": ["a"]}), "1");
        let two = blobs.image(&[&layer], &json!({"Cmd": ["a"]}), "2");
        assert_eq!(one, same);
        assert_ne!(one["digest"], two["digest"]);
        assert_eq!(blobs.0.len(), 5, "the layer is shared: 1 layer, 2 configs, 2 manifests");
    }

    #[test]
    fn dynamic_programs_are_told_from_static_ones() {
        let me = fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(!is_static(&me));
        assert!(!is_static(b"#!/bin/sh"));
        assert!(!is_static(b"\x7fELF"));
    }
}
