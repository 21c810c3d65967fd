//! The files of volumes that are made from API objects: pure.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use k8s_openapi::api::core::v1::{
    DownwardAPIVolumeFile, KeyToPath, ServiceAccountTokenProjection, Volume, VolumeProjection,
};
use mesh_model::snapshot::PodWork;

use super::VolumeError;
use crate::pods::facts::{self, Facts};
use crate::pods::{security, tokens};

const DEFAULT_MODE: i32 = 0o644;
/// The mode of a token whose readers are known, whatever the volume's is.
const OWN_MODE: i32 = 0o600;

/// A file of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct File {
    pub(crate) bytes: Vec<u8>,
    pub(crate) mode: u32,
    /// Whose it is, when it matters.
    pub(crate) user: Option<u32>,
}

/// Files by relative path.
pub(crate) type Files = BTreeMap<String, File>;

/// Whether the volume holds a Secret or a token and must not reach a disk.
pub(crate) fn has_secret(volume: &Volume) -> bool {
    let projected = volume.projected.as_ref().and_then(|p| p.sources.as_ref());
    let is_secret = |s: &VolumeProjection| s.secret.is_some() || s.service_account_token.is_some();
    volume.secret.is_some() || projected.is_some_and(|all| all.iter().any(is_secret))
}

/// The files of a volume. None when it is not made of files, such as an emptyDir.
pub(crate) fn files(
    volume: &Volume,
    work: &PodWork,
    facts: &Facts,
) -> Result<Option<Files>, VolumeError> {
    let mut maker =
        Maker { volume: &volume.name, work, facts, mode: DEFAULT_MODE, files: Files::new() };
    if let Some(source) = &volume.config_map {
        maker.mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        maker.config_map(&source.name, source.items.as_deref(), source.optional)?;
    } else if let Some(source) = &volume.secret {
        maker.mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        let name = source.secret_name.as_deref().unwrap_or_default();
        maker.secret(name, source.items.as_deref(), source.optional)?;
    } else if let Some(source) = &volume.downward_api {
        maker.mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        maker.downward(source.items.iter().flatten())?;
    } else if let Some(source) = &volume.projected {
        maker.mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        for part in source.sources.iter().flatten() {
            if let Some(part) = &part.config_map {
                maker.config_map(&part.name, part.items.as_deref(), part.optional)?;
            } else if let Some(part) = &part.secret {
                maker.secret(&part.name, part.items.as_deref(), part.optional)?;
            } else if let Some(part) = &part.downward_api {
                maker.downward(part.items.iter().flatten())?;
            } else if let Some(part) = &part.service_account_token {
                maker.token(part)?;
            } else {
                return Err(VolumeError::NotServed { volume: volume.name.clone() });
            }
        }
    } else {
        return Ok(None);
    }
    Ok(Some(maker.files))
}

struct Maker<'a> {
    volume: &'a str,
    work: &'a PodWork,
    facts: &'a Facts,
    mode: i32,
    files: Files,
}

impl Maker<'_> {
    fn config_map(
        &mut self,
        name: &str,
        items: Option<&[KeyToPath]>,
        optional: Option<bool>,
    ) -> Result<(), VolumeError> {
        let values = self.work.config_maps.get(name);
        self.object("ConfigMap", name, values, items, optional)
    }

    fn secret(
        &mut self,
        name: &str,
        items: Option<&[KeyToPath]>,
        optional: Option<bool>,
    ) -> Result<(), VolumeError> {
        let values = self.work.secrets.get(name);
        self.object("Secret", name, values, items, optional)
    }

    fn object(
        &mut self,
        kind: &'static str,
        name: &str,
        values: Option<&BTreeMap<String, Vec<u8>>>,
        items: Option<&[KeyToPath]>,
        optional: Option<bool>,
    ) -> Result<(), VolumeError> {
        let optional = optional == Some(true);
        let (volume, named) = (self.volume.to_owned(), name.to_owned());
        let Some(values) = values else {
            let missing = VolumeError::NoObject { volume, kind, name: named };
            return if optional { Ok(()) } else { Err(missing) };
        };
        let Some(items) = items.filter(|items| !items.is_empty()) else {
            for (key, value) in values {
                self.put(key, value.clone(), None)?;
            }
            return Ok(());
        };
        for item in items {
            match values.get(&item.key) {
                Some(value) => self.put(&item.path, value.clone(), item.mode)?,
                None if optional => {}
                None => {
                    let key = item.key.clone();
                    return Err(VolumeError::NoKey { volume, kind, name: named, key });
                }
            }
        }
        Ok(())
    }

    fn downward<'b>(
        &mut self,
        items: impl Iterator<Item = &'b DownwardAPIVolumeFile>,
    ) -> Result<(), VolumeError> {
        for item in items {
            let value = if let Some(selector) = &item.field_ref {
                facts::field(&self.work.pod, self.facts, selector)
            } else if let Some(selector) = &item.resource_field_ref {
                let name = selector.container_name.as_deref().unwrap_or_default();
                facts::container(&self.work.pod, name)
                    .and_then(|container| facts::resource(container, self.facts, selector))
            } else {
                Ok(String::new())
            };
            let value = value
                .map_err(|cause| VolumeError::Fact { volume: self.volume.to_owned(), cause })?;
            self.put(&item.path, value.into_bytes(), item.mode)?;
        }
        Ok(())
    }

    /// A token is for the pod alone. Where all of the pod runs as one user, it is that user's; with `fsGroup`, it is the group's, too.
    fn token(&mut self, source: &ServiceAccountTokenProjection) -> Result<(), VolumeError> {
        let text = match self.facts.tokens.get(&tokens::kind(source)) {
            Some(text) => text.clone(),
            None => Err(format!("there is no token for {:?}", source.path)),
        };
        let text =
            text.map_err(|cause| VolumeError::Token { volume: self.volume.to_owned(), cause })?;
        let spec = self.work.pod.spec.as_ref();
        let user = spec.and_then(security::only_user);
        let is_known = user.is_some() || spec.and_then(security::fs_group).is_some();
        self.put(&source.path, text.into_bytes(), is_known.then_some(OWN_MODE))?;
        if let Some(file) = self.files.get_mut(&source.path) {
            file.user = user;
        }
        Ok(())
    }

    fn put(&mut self, path: &str, bytes: Vec<u8>, mode: Option<i32>) -> Result<(), VolumeError> {
        let mut parts = Path::new(path).components();
        // A first part that starts with ".." would collide with the names that the atomic writer uses.
        if path.is_empty()
            || path.starts_with("..")
            || !parts.all(|part| matches!(part, Component::Normal(_)))
        {
            let (volume, path) = (self.volume.to_owned(), path.to_owned());
            return Err(VolumeError::BadPath { volume, path });
        }
        let mode = u32::try_from(mode.unwrap_or(self.mode)).unwrap_or(0o644) & 0o777;
        self.files.insert(path.to_owned(), File { bytes, mode, user: None });
        Ok(())
    }
}
