//! What a new pod gets from its service account: the account's name, its token where containers look for it, and the
//! secrets for registries (Kubernetes, "Configure Service Accounts for Pods").

use std::any::Any;

use k8s_openapi::api::core::v1::{
    ConfigMapProjection, DownwardAPIProjection, DownwardAPIVolumeFile, KeyToPath,
    ObjectFieldSelector, Pod, PodSpec, ProjectedVolumeSource, ServiceAccount,
    ServiceAccountTokenProjection, Volume, VolumeMount, VolumeProjection,
};
use mesh_model::wellknown::{CA_CONFIG_MAP, CA_KEY, DEFAULT_ACCOUNT};

use super::{Object, Registry, meta};
use crate::error::ApiError;

/// Where client libraries look for a token.
const MOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// As in Kubernetes, seven seconds more than an hour.
const TOKEN_SECS: i64 = 3607;
const FILE_MODE: i32 = 0o644;
const ANNOTATION_MIRROR: &str = "kubernetes.io/config.mirror";

impl Registry {
    /// Completes a new pod; any other object stays as it is.
    pub(super) fn admit<K: Object>(&self, object: &mut K) -> Result<(), ApiError> {
        let Some(pod) = (object as &mut dyn Any).downcast_mut::<Pod>() else { return Ok(()) };
        let annotations = pod.metadata.annotations.as_ref();
        // The pod of a file has no objects of the API.
        if annotations.is_some_and(|all| all.contains_key(ANNOTATION_MIRROR)) {
            return Ok(());
        }
        let ns = pod.metadata.namespace.clone();
        let name = pod.metadata.name.clone().unwrap_or_default();
        let Some(spec) = &mut pod.spec else { return Ok(()) };
        let wanted = spec.service_account_name.clone().filter(|name| !name.is_empty());
        let wanted = wanted.unwrap_or_else(|| DEFAULT_ACCOUNT.to_owned());
        let account = match self.get::<ServiceAccount>(ns.as_deref(), &wanted) {
            Ok(account) => account,
            // It is made with its namespace, a moment later.
            Err(ApiError::NotFound { .. }) if wanted == DEFAULT_ACCOUNT => Default::default(),
            Err(ApiError::NotFound { .. }) => {
                let ns = ns.unwrap_or_default();
                let detail = format!(
                    "error looking up service account {ns}/{wanted}: serviceaccount \"{wanted}\" not found"
                );
                return Err(ApiError::Forbidden { kind: Pod::kind(), name, detail });
            }
            Err(error) => return Err(error),
        };
        complete(spec, wanted, &account);
        Ok(())
    }
}

fn complete(spec: &mut PodSpec, name: String, account: &ServiceAccount) {
    spec.service_account_name = Some(name.clone());
    spec.service_account = Some(name);
    if spec.image_pull_secrets.as_ref().is_none_or(Vec::is_empty) {
        spec.image_pull_secrets.clone_from(&account.image_pull_secrets);
    }
    let mounts = spec.automount_service_account_token.or(account.automount_service_account_token);
    if mounts == Some(false) {
        return;
    }
    let volume = meta::generate_name("kube-api-access-");
    let mut mounted = false;
    for container in spec.init_containers.iter_mut().flatten().chain(&mut spec.containers) {
        let present = container.volume_mounts.get_or_insert_default();
        if present.iter().any(|mount| mount.mount_path == MOUNT) {
            continue;
        }
        present.push(VolumeMount {
            name: volume.clone(),
            mount_path: MOUNT.to_owned(),
            read_only: Some(true),
            ..VolumeMount::default()
        });
        mounted = true;
    }
    if mounted {
        spec.volumes.get_or_insert_default().push(token_volume(volume));
    }
}

fn token_volume(name: String) -> Volume {
    let token = VolumeProjection {
        service_account_token: Some(ServiceAccountTokenProjection {
            expiration_seconds: Some(TOKEN_SECS),
            path: "token".to_owned(),
            audience: None,
        }),
        ..VolumeProjection::default()
    };
    let ca = VolumeProjection {
        config_map: Some(ConfigMapProjection {
            name: CA_CONFIG_MAP.to_owned(),
            items: Some(vec![KeyToPath {
                key: CA_KEY.to_owned(),
                path: CA_KEY.to_owned(),
                mode: None,
            }]),
            optional: None,
        }),
        ..VolumeProjection::default()
    };
    let field = ObjectFieldSelector {
        api_version: Some("v1".to_owned()),
        field_path: "metadata.namespace".to_owned(),
    };
    let namespace = DownwardAPIVolumeFile {
        path: "namespace".to_owned(),
        field_ref: Some(field),
        ..DownwardAPIVolumeFile::default()
    };
    let namespace = VolumeProjection {
        downward_api: Some(DownwardAPIProjection { items: Some(vec![namespace]) }),
        ..VolumeProjection::default()
    };
    Volume {
        name,
        projected: Some(ProjectedVolumeSource {
            default_mode: Some(FILE_MODE),
            sources: Some(vec![token, ca, namespace]),
        }),
        ..Volume::default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn completed(spec: serde_json::Value, account: serde_json::Value) -> PodSpec {
        let mut spec: PodSpec = serde_json::from_value(spec).unwrap();
        complete(&mut spec, "default".to_owned(), &serde_json::from_value(account).unwrap());
        spec
    }

    fn mounts(spec: &PodSpec) -> Vec<usize> {
        let all = spec.init_containers.iter().flatten().chain(&spec.containers);
        all.map(|c| c.volume_mounts.iter().flatten().filter(|m| m.mount_path == MOUNT).count())
            .collect()
    }

    #[test]
    fn every_container_finds_the_token_unless_somebody_says_no() {
        let spec = json!({"initContainers": [{"name": "i"}], "containers": [{"name": "a"},
            {"name": "b", "volumeMounts": [{"name": "own", "mountPath": MOUNT}]}],
            "volumes": [{"name": "own", "emptyDir": {}}]});
        let full = completed(spec.clone(), json!({"metadata": {}}));
        assert_eq!(mounts(&full), [1, 1, 1]);
        let volumes = full.volumes.unwrap();
        assert_eq!(volumes.len(), 2);
        let sources = volumes[1].projected.as_ref().unwrap().sources.as_ref().unwrap();
        assert_eq!(
            sources[0].service_account_token.as_ref().unwrap().expiration_seconds,
            Some(3607)
        );
        let no = json!({"metadata": {}, "automountServiceAccountToken": false});
        assert_eq!(mounts(&completed(spec.clone(), no.clone())), [0, 0, 1]);
        let mut own = spec;
        own["automountServiceAccountToken"] = json!(true);
        assert_eq!(mounts(&completed(own.clone(), no)), [1, 1, 1], "the pod decides");
        own["automountServiceAccountToken"] = json!(false);
        assert_eq!(mounts(&completed(own, json!({"metadata": {}}))), [0, 0, 1]);
    }

    #[test]
    fn secrets_for_registries_are_those_of_the_account_unless_the_pod_has_its_own() {
        let account = json!({"metadata": {}, "imagePullSecrets": [{"name": "theirs"}]});
        let of =
            |spec| completed(spec, account.clone()).image_pull_secrets.unwrap()[0].name.clone();
        assert_eq!(of(json!({"containers": []})), "theirs");
        assert_eq!(of(json!({"containers": [], "imagePullSecrets": [{"name": "own"}]})), "own");
    }
}
