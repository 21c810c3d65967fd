//! Rules for volumes.

use k8s_openapi::api::core::v1::{KeyToPath, Volume};

use super::super::rules::{duplicate, forbidden, invalid, required};
use super::super::{Causes, names};
use super::containers::Seen;
use super::unserved;

pub(super) fn volumes<'a>(
    field: &str,
    volumes: &'a [Volume],
    seen: &mut Seen<'a>,
    causes: &mut Causes,
) {
    for (i, volume) in volumes.iter().enumerate() {
        let field = format!("{field}[{i}]");
        if volume.name.is_empty() {
            required(format!("{field}.name"), causes);
        } else {
            names::label(&format!("{field}.name"), &volume.name, causes);
            if !seen.volumes.insert(&volume.name) {
                duplicate(format!("{field}.name"), &volume.name, causes);
            }
        }
        let sources = sources(volume);
        match sources.len() {
            0 => causes.add(&field, "Required value: must specify a volume type"),
            1 => unserved::volume(&field, &sources[0], volume, causes),
            _ => forbidden(&field, "may not specify more than 1 volume type", causes),
        }
        content(&field, volume, causes);
    }
}

/// The sources that are set: every field of a volume but its name is one.
fn sources(volume: &Volume) -> Vec<String> {
    let value = serde_json::to_value(volume).unwrap_or_default();
    let fields = value.as_object().into_iter().flatten().map(|(field, _)| field.clone());
    fields.filter(|field| field != "name").collect()
}

fn content(field: &str, volume: &Volume, causes: &mut Causes) {
    if let Some(source) = &volume.config_map {
        if source.name.is_empty() {
            required(format!("{field}.configMap.name"), causes);
        }
        items(&format!("{field}.configMap.items"), source.items.as_deref(), causes);
        mode(&format!("{field}.configMap.defaultMode"), source.default_mode, causes);
    }
    if let Some(source) = &volume.secret {
        if source.secret_name.as_deref().unwrap_or_default().is_empty() {
            required(format!("{field}.secret.secretName"), causes);
        }
        items(&format!("{field}.secret.items"), source.items.as_deref(), causes);
        mode(&format!("{field}.secret.defaultMode"), source.default_mode, causes);
    }
    if let Some(source) = &volume.host_path {
        let path = &source.path;
        if path.is_empty() {
            required(format!("{field}.hostPath.path"), causes);
        } else if path.split('/').any(|part| part == "..") {
            invalid(format!("{field}.hostPath.path"), path, "must not contain '..'", causes);
        }
    }
    let projected = volume.projected.iter().flat_map(|p| p.sources.iter().flatten());
    for (i, source) in projected.enumerate() {
        let Some(token) = &source.service_account_token else { continue };
        let at = |part: &str| format!("{field}.projected.sources[{i}].serviceAccountToken.{part}");
        if token.path.is_empty() {
            required(at("path"), causes);
        } else if token.path.starts_with('/') || token.path.split('/').any(|part| part == "..") {
            invalid(at("path"), &token.path, "must be a relative path without '..'", causes);
        }
        if let Some(secs) = token.expiration_seconds.filter(|s| !(600..=1 << 32).contains(s)) {
            invalid(at("expirationSeconds"), secs, "must be from 600 to 2^32", causes);
        }
    }
}

fn items(field: &str, items: Option<&[KeyToPath]>, causes: &mut Causes) {
    for (i, item) in items.into_iter().flatten().enumerate() {
        if item.key.is_empty() {
            required(format!("{field}[{i}].key"), causes);
        }
        let path = &item.path;
        let field_path = format!("{field}[{i}].path");
        if path.is_empty() {
            required(field_path, causes);
        } else if path.starts_with('/') {
            invalid(field_path, path, "must be a relative path", causes);
        } else if path.split('/').any(|part| part == "..") {
            invalid(field_path, path, "must not contain '..'", causes);
        }
        mode(&format!("{field}[{i}].mode"), item.mode, causes);
    }
}

fn mode(field: &str, mode: Option<i32>, causes: &mut Causes) {
    if let Some(mode) = mode.filter(|m| !(0..=0o777).contains(m)) {
        let rule = "must be a number between 0 and 0777 (octal), both inclusive";
        invalid(field, mode, rule, causes);
    }
}
