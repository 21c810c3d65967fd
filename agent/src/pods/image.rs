//! Getting a container's image onto the node.

use k8s_openapi::api::core::v1::Container;
use mesh_cri::{CallError, Client, v1};
use mesh_model::snapshot::PodWork;

mod credentials;

use credentials::credentials;

/// When an image is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PullPolicy {
    Always,
    IfNotPresent,
    Never,
}

impl PullPolicy {
    /// The policy of a container; without one, `latest` is fetched each time and all others once.
    pub(crate) fn of(container: &Container) -> Self {
        match container.image_pull_policy.as_deref() {
            Some("Always") => Self::Always,
            Some("Never") => Self::Never,
            Some("IfNotPresent") => Self::IfNotPresent,
            _ => {
                let image = container.image.as_deref().unwrap_or_default();
                let name = image.rsplit('/').next().unwrap_or_default();
                let floats = !name.contains(['@', ':']) || name.ends_with(":latest");
                if floats { Self::Always } else { Self::IfNotPresent }
            }
        }
    }
}

/// How every implementation of image references calls a name that is none.
const NO_REFERENCE: &str = "invalid reference format";

/// An image is not on the node and cannot be brought there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    #[error("Container image \"{0}\" is not present with pull policy of Never")]
    NeverPull(String),
    #[error("failed to pull image \"{image}\": {cause}")]
    Pull { image: String, cause: CallError },
    #[error("failed to inspect image \"{image}\": {cause}")]
    Inspect { image: String, cause: CallError },
}

impl ImageError {
    /// As Kubernetes calls it.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::NeverPull(_) => "ErrImageNeverPull",
            // The runtime parses it; no registry was asked.
            Self::Pull { cause, .. } if cause.message.contains(NO_REFERENCE) => "InvalidImageName",
            Self::Pull { .. } => "ErrImagePull",
            Self::Inspect { .. } => "ImageInspectError",
        }
    }
}

/// The image of a container, if it is on the node already and may be used as it is.
pub(crate) async fn present(
    client: &Client,
    container: &Container,
) -> Result<Option<v1::Image>, ImageError> {
    let image = container.image.clone().unwrap_or_default();
    let policy = PullPolicy::of(container);
    if policy == PullPolicy::Always {
        return Ok(None);
    }
    let found = client.image(&image).await;
    match found.map_err(|cause| ImageError::Inspect { image: image.clone(), cause })? {
        None if policy == PullPolicy::Never => Err(ImageError::NeverPull(image)),
        found => Ok(found),
    }
}

/// Fetches the image of a container, with each of the pod's credentials for its registry, and without.
pub(crate) async fn pull(
    client: &Client,
    container: &Container,
    work: &PodWork,
) -> Result<v1::Image, ImageError> {
    let image = container.image.clone().unwrap_or_default();
    let failed = |cause| ImageError::Pull { image: image.clone(), cause };
    let mut attempts: Vec<Option<v1::AuthConfig>> =
        credentials(work, &image).into_iter().map(Some).collect();
    attempts.push(None);
    let mut result = Err(None);
    for auth in attempts {
        match client.pull_image(&image, auth).await {
            Ok(id) => {
                result = Ok(id);
                break;
            }
            // The first failure is that of the credentials that were meant.
            Err(error) => result = Err(result.err().flatten().or(Some(error))),
        }
    }
    match result {
        Ok(id) => {
            let found = client.image(&id).await;
            let found =
                found.map_err(|cause| ImageError::Inspect { image: image.clone(), cause })?;
            Ok(found.unwrap_or(v1::Image { id, ..Default::default() }))
        }
        Err(Some(error)) => Err(failed(error)),
        Err(None) => Err(ImageError::NeverPull(image)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policy_follows_the_tag() {
        let of = |image: &str, policy: Option<&str>| {
            PullPolicy::of(&Container {
                image: Some(image.to_owned()),
                image_pull_policy: policy.map(str::to_owned),
                ..Default::default()
            })
        };
        assert_eq!(of("web", None), PullPolicy::Always);
        assert_eq!(of("host:5000/web", None), PullPolicy::Always);
        assert_eq!(of("web:latest", None), PullPolicy::Always);
        assert_eq!(of("host:5000/web:1", None), PullPolicy::IfNotPresent);
        assert_eq!(of("web@sha256:00", None), PullPolicy::IfNotPresent);
        assert_eq!(of("web:latest", Some("Never")), PullPolicy::Never);
    }
}
