//! The volumes of a pod on the node's disk, and their mounts in containers.

use std::io;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{
    Container, EmptyDirVolumeSource, HostPathVolumeSource, Pod, PodSpec, Volume, VolumeMount,
};
use mesh_cri::v1;
use mesh_model::snapshot::PodWork;

use super::env::Environment;
use super::expand::expand;
use super::facts::{FactError, Facts};
use super::layout::Layout;
use super::resources::memory_limit;
use super::{quantity, security};

mod content;
mod mounts;
mod part;
mod payload;

pub(crate) use mounts::clean;

use part::Part;

/// A volume cannot be made. Shown to people as the event `FailedMount`.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VolumeError {
    #[error("volume {volume:?}: {kind} {name:?} not found")]
    NoObject { volume: String, kind: &'static str, name: String },
    #[error("volume {volume:?}: {kind} {name:?} has no key {key:?}")]
    NoKey { volume: String, kind: &'static str, name: String, key: String },
    #[error("volume {volume:?}: file path {path:?} must be relative and must not contain \"..\"")]
    BadPath { volume: String, path: String },
    #[error("volume {volume:?}: {cause}")]
    Fact { volume: String, cause: FactError },
    #[error("volume {volume:?}: {cause}")]
    Token { volume: String, cause: String },
    #[error("volume {volume:?}: its type is not served by this node")]
    NotServed { volume: String },
    #[error("volume {volume:?}: host path {path:?} is not a {kind}")]
    HostPath { volume: String, path: String, kind: String },
    #[error("volume {volume:?}: size limit is not a quantity")]
    SizeLimit { volume: String },
    #[error("volume {volume:?}: {action}: {cause}")]
    Io { volume: String, action: &'static str, cause: io::Error },
}

/// A volume cannot be mounted into a container.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MountError {
    #[error("volume {0:?} of a mount does not exist in the pod")]
    NoVolume(String),
    #[error("subPath {0:?} must be relative and stay inside its volume")]
    SubPath(String),
    #[error("subPathExpr {expression:?}: missing value for {}", .missing.join(", "))]
    SubPathExpr { expression: String, missing: Vec<String> },
    #[error("subPath {path:?}: {cause}")]
    Io { path: String, cause: io::Error },
}

/// Writes all volumes of the pod, or brings them up to date; also those after one that cannot be. Blocks.
pub(crate) fn prepare(
    work: &PodWork,
    uid: &str,
    facts: &Facts,
    layout: &Layout,
) -> Result<(), VolumeError> {
    let Some(spec) = work.pod.spec.as_ref() else { return Ok(()) };
    for directory in layout.pod(uid) {
        private_directory(&directory).map_err(io_error("", "make the pod's directory"))?;
    }
    let group = security::fs_group(spec);
    let mut all = Ok(());
    for volume in spec.volumes.iter().flatten() {
        let path = layout.volume(uid, &volume.name, content::has_secret(volume));
        // A token has to be renewed although somebody deleted a ConfigMap.
        all = all.and(prepare_one(volume, &path, work, facts, group));
    }
    all
}

fn prepare_one(
    volume: &Volume,
    path: &Path,
    work: &PodWork,
    facts: &Facts,
    group: Option<u32>,
) -> Result<(), VolumeError> {
    if let Some(files) = content::files(volume, work, facts)? {
        payload::write(path, &files, group).map_err(io_error(&volume.name, "write its files"))
    } else if let Some(empty) = &volume.empty_dir {
        let most = most_memory(&work.pod, facts);
        empty_dir(&volume.name, path, empty, group, most)
    } else if let Some(host) = &volume.host_path {
        host_path(&volume.name, host)
    } else {
        Err(VolumeError::NotServed { volume: volume.name.clone() })
    }
}

/// A directory that only root can look into.
pub(crate) fn private_directory(path: &Path) -> io::Result<()> {
    std::fs::create_dir_all(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))
}

fn io_error(volume: &str, action: &'static str) -> impl FnOnce(io::Error) -> VolumeError {
    let volume = volume.to_owned();
    move |cause| VolumeError::Io { volume, action, cause }
}

/// What a pod can have of the node's memory, in whatever form; nothing where that is not known.
fn most_memory(pod: &Pod, facts: &Facts) -> Option<i64> {
    // Containers with an unreadable limit are not started.
    let of_pod = pod.spec.as_ref().and_then(|spec| memory_limit(spec).ok().flatten());
    least([of_pod, Some(facts.memory_bytes)])
}

/// The least of these limits; zero is none.
fn least(limits: [Option<i64>; 2]) -> Option<i64> {
    limits.into_iter().flatten().filter(|bytes| *bytes > 0).min()
}

fn empty_dir(
    name: &str,
    path: &Path,
    empty: &EmptyDirVolumeSource,
    group: Option<u32>,
    most_memory: Option<i64>,
) -> Result<(), VolumeError> {
    // Everybody may write, as in /tmp of an image; with fsGroup, files keep the group.
    let mode = if group.is_some() { 0o2777 } else { 0o777 };
    if !path.exists() {
        open_directory(path, mode, group).map_err(io_error(name, "make its directory"))?;
    }
    if empty.medium.as_deref() == Some("Memory") {
        let size = empty.size_limit.as_ref().map(quantity::bytes).transpose();
        let size = size.map_err(|_| VolumeError::SizeLimit { volume: name.to_owned() })?;
        let size = least([size, most_memory]);
        mounts::memory(path, mode, group, size).map_err(io_error(name, "mount it in memory"))?;
    }
    Ok(())
}

/// Makes a directory that is there with its permissions or not at all: once it is there, they are the containers' to change.
fn open_directory(path: &Path, mode: u32, group: Option<u32>) -> io::Result<()> {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    let fresh = path.with_file_name(name);
    std::fs::create_dir_all(&fresh)?;
    chown(&fresh, None, group)?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(mode))?;
    std::fs::rename(fresh, path)
}

fn host_path(name: &str, host: &HostPathVolumeSource) -> Result<(), VolumeError> {
    use std::os::unix::fs::FileTypeExt as _;
    let path = Path::new(&host.path);
    let kind = host.type_.as_deref().unwrap_or_default();
    match kind {
        "DirectoryOrCreate" if !path.exists() => {
            std::fs::create_dir_all(path).map_err(io_error(name, "make its directory"))?;
        }
        "FileOrCreate" if !path.exists() => {
            std::fs::File::create(path).map_err(io_error(name, "make its file"))?;
        }
        _ => {}
    }
    let found = std::fs::metadata(path).ok().map(|m| m.file_type());
    let fits = match (kind, found) {
        // Not checked; the runtime makes a missing directory.
        ("", _) => true,
        (_, None) => false,
        ("Directory" | "DirectoryOrCreate", Some(f)) => f.is_dir(),
        ("File" | "FileOrCreate", Some(f)) => f.is_file(),
        ("Socket", Some(f)) => f.is_socket(),
        ("CharDevice", Some(f)) => f.is_char_device(),
        ("BlockDevice", Some(f)) => f.is_block_device(),
        _ => false,
    };
    if fits {
        return Ok(());
    }
    let (volume, path, kind) = (name.to_owned(), host.path.clone(), kind.to_owned());
    Err(VolumeError::HostPath { volume, path, kind })
}

/// The mounts of a container's volumes. Makes missing directories of sub-paths, and mounts those parts. Blocks.
pub(crate) fn container_mounts(
    spec: &PodSpec,
    container: &Container,
    uid: &str,
    environment: &Environment,
    layout: &Layout,
) -> Result<Vec<v1::Mount>, MountError> {
    let volumes: Vec<&Volume> = spec.volumes.iter().flatten().collect();
    let mut all = Vec::new();
    for (index, mount) in container.volume_mounts.iter().flatten().enumerate() {
        let volume = volumes.iter().find(|v| v.name == mount.name);
        let volume = volume.ok_or_else(|| MountError::NoVolume(mount.name.clone()))?;
        let (base, read_only) = source(volume, uid, layout);
        let host_path = match sub_path(mount, environment)? {
            None => base,
            Some(sub) => {
                let place = layout.part(uid, &container.name, index);
                let mounted = Part::open(&base, &sub)?.mount(&place);
                mounted.map_err(|cause| MountError::Io { path: sub, cause })?;
                place
            }
        };
        all.push(v1::Mount {
            container_path: absolute(&mount.mount_path),
            host_path: host_path.display().to_string(),
            readonly: read_only || mount.read_only == Some(true),
            // What is the node's own keeps its labels.
            selinux_relabel: volume.host_path.is_none(),
            propagation: match mount.mount_propagation.as_deref() {
                Some("HostToContainer") => v1::MountPropagation::HostToContainer,
                Some("Bidirectional") => v1::MountPropagation::Bidirectional,
                _ => v1::MountPropagation::Private,
            }
            .into(),
        });
    }
    Ok(all)
}

fn absolute(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

/// Where a volume is on the node, and whether containers may only read it.
fn source(volume: &Volume, uid: &str, layout: &Layout) -> (PathBuf, bool) {
    match &volume.host_path {
        Some(host) => (PathBuf::from(&host.path), false),
        None => {
            let path = layout.volume(uid, &volume.name, content::has_secret(volume));
            (path, volume.empty_dir.is_none())
        }
    }
}

/// The part of the volume that is mounted; nothing for the whole. A variable without a value is an error: the part would be one
/// that others share, or the whole volume.
fn sub_path(mount: &VolumeMount, environment: &Environment) -> Result<Option<String>, MountError> {
    let Some(expression) = mount.sub_path_expr.as_deref().filter(|text| !text.is_empty()) else {
        return Ok(mount.sub_path.clone().filter(|sub| !sub.is_empty()));
    };
    let mut missing = Vec::new();
    let expanded = expand(expression, |name| {
        let value = environment.value(name).filter(|value| !value.is_empty());
        if value.is_none() {
            missing.push(name.to_owned());
        }
        value
    });
    if missing.is_empty() {
        return Ok(Some(expanded));
    }
    Err(MountError::SubPathExpr { expression: expression.to_owned(), missing })
}

#[cfg(test)]
mod tests;
