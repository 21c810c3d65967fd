//! The `ephemeralcontainers` subresource: containers that are added to a pod while it lives, to look into it.

use k8s_openapi::api::core::v1::Pod;

use super::{Patch, Writing, Written, patched, to_value};
use crate::api::body;
use crate::error::{ApiError, Cause};
use crate::registry::{Object as _, Part};
use http::StatusCode;

/// PUT.
pub(super) async fn update(writing: &Writing<'_>, name: &str) -> Result<Written, ApiError> {
    let validation = writing.query.field_validation()?;
    let (asked, warnings) = body::typed::<Pod>(writing.raw.value()?, validation)?;
    write(writing, name, warnings, |old| added(old, asked.clone())).await
}

/// PATCH.
pub(super) async fn patch(
    writing: &Writing<'_>,
    name: &str,
    patch: &Patch,
) -> Result<Written, ApiError> {
    let validation = writing.query.field_validation()?;
    let change = |old: &Pod| {
        added(old, patched::<Pod>(Pod::kind(), old, patch, validation).map(|(new, _)| new)?)
    };
    write(writing, name, Vec::new(), change).await
}

async fn write(
    writing: &Writing<'_>,
    name: &str,
    warnings: Vec<String>,
    change: impl Fn(&Pod) -> Result<Pod, ApiError>,
) -> Result<Written, ApiError> {
    let (ns, options) = (writing.target.ns.as_deref(), writing.options()?);
    let stored = writing.registry.modify(ns, name, Part::Ephemeral, &options, change).await?;
    Ok(Written { status: StatusCode::OK, object: to_value(&stored)?, warnings })
}

/// The pod with what was asked to be added to it; all else stays as it is.
fn added(old: &Pod, asked: Pod) -> Result<Pod, ApiError> {
    let mut new = old.clone();
    new.metadata.resource_version = asked.metadata.resource_version;
    new.metadata.uid = asked.metadata.uid;
    let wanted = asked.spec.and_then(|spec| spec.ephemeral_containers).unwrap_or_default();
    let spec = new.spec.get_or_insert_default();
    let refused = |message: String| ApiError::Invalid {
        kind: Pod::kind(),
        name: old.metadata.name.clone().unwrap_or_default(),
        causes: vec![Cause { field: "spec.ephemeralContainers".to_owned(), message }],
    };
    for present in spec.ephemeral_containers.iter().flatten() {
        let name = &present.name;
        match wanted.iter().find(|container| container.name == *name) {
            Some(same) if same == present => {}
            Some(_) => {
                let text =
                    format!("Forbidden: existing ephemeral container {name:?} may not be changed");
                return Err(refused(text));
            }
            None => {
                let text =
                    format!("Forbidden: existing ephemeral container {name:?} may not be removed");
                return Err(refused(text));
            }
        }
    }
    let annotations = old.metadata.annotations.as_ref();
    if annotations.is_some_and(|all| all.contains_key("kubernetes.io/config.mirror")) {
        return Err(refused(
            "Forbidden: static pods do not support ephemeral containers".to_owned(),
        ));
    }
    spec.ephemeral_containers = Some(wanted).filter(|all| !all.is_empty());
    Ok(new)
}
