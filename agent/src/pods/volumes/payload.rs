//! Writes a set of files so that a reader sees either all of the old ones or all of the new ones.
//!
//! The files are in a directory of their own; `..data` is a symbolic link to it, and each visible name links through
//! `..data`. Replacing `..data` by a rename switches all of them at once. Programs in containers know this form.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::Path;

use super::content::{File, Files};

const DATA: &str = "..data";
const NEXT: &str = "..data_next";

/// Makes `directory` show exactly these files. Does nothing when it does already.
pub(crate) fn write(directory: &Path, files: &Files, group: Option<u32>) -> io::Result<()> {
    std::fs::create_dir_all(directory)?;
    std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o755))?;
    let files = &with_group(files, group);
    if read(&directory.join(DATA)).is_ok_and(|present| are_same(&present, files)) {
        return link_names(directory, files);
    }
    let name = fresh_name(directory);
    let fresh = directory.join(&name);
    std::fs::create_dir(&fresh)?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o755))?;
    for (path, file) in files {
        write_one(&fresh.join(path), file, group)?;
    }
    let next = directory.join(NEXT);
    remove_if_there(&next)?;
    symlink(&name, &next)?;
    std::fs::rename(&next, directory.join(DATA))?;
    link_names(directory, files)?;
    remove_old(directory, &name)
}

fn fresh_name(directory: &Path) -> String {
    let mut number = 0u64;
    loop {
        let name = format!("..version_{number}");
        if !directory.join(&name).exists() {
            return name;
        }
        number += 1;
    }
}

fn write_one(path: &Path, file: &File, group: Option<u32>) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::write(path, &file.bytes)?;
    chown(path, file.user, group)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(file.mode))
}

/// The group that the pod asked for must be able to read, whatever the modes say.
fn with_group(files: &Files, group: Option<u32>) -> Files {
    let mut files = files.clone();
    if group.is_some() {
        files.values_mut().for_each(|file| file.mode |= 0o440);
    }
    files
}

/// Whether those that are there are those that are wanted; not every file has to be somebody's.
fn are_same(present: &Files, wanted: &Files) -> bool {
    let is_same = |(path, file): (&String, &File)| {
        present.get(path).is_some_and(|there| {
            let user = file.user.or(there.user);
            *there == File { user, ..file.clone() }
        })
    };
    present.len() == wanted.len() && wanted.iter().all(is_same)
}

/// The files below a directory, with their modes and owners.
fn read(directory: &Path) -> io::Result<Files> {
    let mut files = Files::new();
    let mut pending = vec![(directory.to_owned(), String::new())];
    while let Some((path, prefix)) = pending.pop() {
        for entry in std::fs::read_dir(&path)? {
            let entry = entry?;
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            let metadata = entry.metadata()?;
            if metadata.is_dir() {
                pending.push((entry.path(), format!("{name}/")));
            } else {
                let mode = metadata.permissions().mode() & 0o777;
                let user = Some(metadata.uid());
                files.insert(name, File { bytes: std::fs::read(entry.path())?, mode, user });
            }
        }
    }
    Ok(files)
}

/// Links each visible name through `..data`, and removes names that have no file any more. What is no link was made for a `subPath`
/// that names no file; it goes when there is one.
fn link_names(directory: &Path, files: &Files) -> io::Result<()> {
    let wanted: BTreeSet<&str> =
        files.keys().map(|path| path.split('/').next().unwrap_or(path)).collect();
    for name in &wanted {
        let link = directory.join(name);
        let target = Path::new(DATA).join(name);
        if std::fs::read_link(&link).is_ok_and(|present| present == target) {
            continue;
        }
        remove_if_there(&link)?;
        symlink(&target, &link)?;
    }
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let is_link = entry.file_type()?.is_symlink();
        if is_link && !name.starts_with("..") && !wanted.contains(name.as_ref()) {
            remove_if_there(&directory.join(name.as_ref()))?;
        }
    }
    Ok(())
}

fn remove_old(directory: &Path, current: &str) -> io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("..version_") && name != current {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::IsADirectory => std::fs::remove_dir(path),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
