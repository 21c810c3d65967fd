//! The configuration of a container.

use std::collections::HashMap;
use std::path::Path;

use k8s_openapi::api::core::v1::{Container, PodSpec};
use mesh_cri::v1;
use sha2::{Digest, Sha256};

use super::env::{EnvError, Environment, environment};
use super::expand::expand;
use super::facts::Facts;
use super::observed::{
    ANNOTATION_DELAY, ANNOTATION_HASH, ANNOTATION_RESTARTS, LABEL_CONTAINER, PodRef,
};
use super::quantity::InvalidQuantity;
use super::volumes::MountError;
use super::{resources, security};

/// Why a container cannot be configured. Shown to people as `CreateContainerConfigError`.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error(transparent)]
    Env(#[from] EnvError),
    #[error(transparent)]
    Resources(#[from] InvalidQuantity),
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error("container has runAsNonRoot and image will run as root")]
    Root,
    #[error(
        "container has runAsNonRoot and image has non-numeric user ({0}), cannot verify user is non-root"
    )]
    NamedUser(String),
}

/// What tells that a running container is not the one that is wanted any more. Only the image of a pod's container
/// can be changed.
pub(crate) fn spec_hash(container: &Container) -> String {
    let mut hash = Sha256::new();
    hash.update(container.name.as_bytes());
    hash.update([0]);
    hash.update(container.image.as_deref().unwrap_or_default().as_bytes());
    hex::encode(&hash.finalize()[..8])
}

/// What the configuration is made of, beside the manifest.
pub(crate) struct Parts<'a> {
    pub(crate) identity: &'a PodRef,
    pub(crate) spec: &'a PodSpec,
    pub(crate) container: &'a Container,
    pub(crate) facts: &'a Facts,
    pub(crate) environment: &'a Environment,
    pub(crate) image: &'a v1::Image,
    pub(crate) mounts: Vec<v1::Mount>,
    pub(crate) attempt: u32,
    pub(crate) delay_secs: u64,
    /// The run of another container whose processes it shares.
    pub(crate) target: Option<String>,
    /// The directory of the node's own seccomp profiles.
    pub(crate) seccomp_profiles: &'a Path,
    /// The profile of AppArmor that it asks for.
    pub(crate) apparmor: Option<v1::SecurityProfile>,
    /// Settings of its control group beyond its resources.
    pub(crate) unified: HashMap<String, String>,
}

/// The environment of a container; separate, because mounts depend on it (`subPathExpr`).
pub(crate) fn container_environment(
    work: &mesh_model::snapshot::PodWork,
    container: &Container,
    facts: &Facts,
) -> Result<Environment, ConfigError> {
    Ok(environment(work, container, facts)?)
}

/// The configuration of one run of a container.
pub(crate) fn container_config(mut parts: Parts<'_>) -> Result<v1::ContainerConfig, ConfigError> {
    let mounts = std::mem::take(&mut parts.mounts);
    let unified = std::mem::take(&mut parts.unified);
    let Parts { spec, container, environment, .. } = &parts;
    let expanded = |words: &Option<Vec<String>>| -> Vec<String> {
        words.iter().flatten().map(|word| expand(word, |name| environment.value(name))).collect()
    };
    let security_context = security_context(&parts)?;
    let resources = resources::resources(spec, container, parts.facts.memory_bytes)?;
    let mut labels = parts.identity.labels();
    labels.insert(LABEL_CONTAINER.to_owned(), container.name.clone());
    let annotations = [
        (ANNOTATION_RESTARTS, parts.attempt.to_string()),
        (ANNOTATION_HASH, spec_hash(container)),
        (ANNOTATION_DELAY, parts.delay_secs.to_string()),
    ];
    Ok(v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata {
            name: container.name.clone(),
            attempt: parts.attempt,
        }),
        image: Some(v1::ImageSpec {
            image: parts.image.id.clone(),
            user_specified_image: container.image.clone().unwrap_or_default(),
            ..Default::default()
        }),
        command: expanded(&container.command),
        args: expanded(&container.args),
        working_dir: container.working_dir.clone().unwrap_or_default(),
        envs: environment
            .pairs()
            .map(|(key, value)| v1::KeyValue { key: key.to_owned(), value: value.to_owned() })
            .collect(),
        mounts,
        labels,
        annotations: annotations.map(|(k, v)| (k.to_owned(), v)).into(),
        log_path: format!("{}/{}.log", container.name, parts.attempt),
        stdin: container.stdin == Some(true),
        stdin_once: container.stdin_once == Some(true),
        tty: container.tty == Some(true),
        linux: Some(v1::LinuxContainerConfig {
            resources: Some(v1::LinuxContainerResources { unified, ..resources }),
            security_context: Some(security_context),
        }),
    })
}

fn security_context(parts: &Parts<'_>) -> Result<v1::LinuxContainerSecurityContext, ConfigError> {
    let Parts { spec, container, image, .. } = parts;
    let mut context = security::of_container(spec, container, parts.seccomp_profiles);
    context.apparmor.clone_from(&parts.apparmor);
    if let Some(target) = &parts.target {
        let namespaces = context.namespace_options.get_or_insert_default();
        namespaces.pid = v1::NamespaceMode::Target.into();
        namespaces.target_id.clone_from(target);
    }
    if context.run_as_user.is_none() {
        // The image's own user; the runtime wants it said when a group is given.
        context.run_as_user = image.uid;
        if context.run_as_user.is_none() {
            context.run_as_username = image.username.clone();
        }
    }
    if security::must_not_be_root(spec, container) {
        match &context.run_as_user {
            Some(user) if user.value != 0 => {}
            None if !context.run_as_username.is_empty() => {
                return Err(ConfigError::NamedUser(context.run_as_username));
            }
            _ => return Err(ConfigError::Root),
        }
    }
    if context.run_as_group.is_some()
        && context.run_as_user.is_none()
        && context.run_as_username.is_empty()
    {
        context.run_as_user = Some(v1::Int64Value { value: 0 });
    }
    Ok(context)
}
