//! What a pod may ask for in Kubernetes, and no node here would do. It is refused by name: a pod that believes to be alone in a
//! user namespace, or in a virtual machine, must not run without it.

use k8s_openapi::api::core::v1::{Container, PodSpec, Volume};

use super::super::Causes;
use super::super::rules::forbidden;

const RULE: &str = "not served here";
/// Where the files of a volume may come from.
const VOLUMES: [&str; 6] =
    ["emptyDir", "configMap", "secret", "downwardAPI", "hostPath", "projected"];

pub(super) fn pod(field: &str, spec: &PodSpec, causes: &mut Causes) {
    let security = spec.security_context.as_ref();
    let groups = security.and_then(|s| s.supplemental_groups_policy.as_deref());
    let limits = spec.resources.as_ref();
    let limits = limits.is_some_and(|r| r.limits.is_some() || r.requests.is_some());
    let windows = spec.os.as_ref().is_some_and(|os| os.name != "linux");
    for (part, asked) in [
        ("runtimeClassName", is_text(spec.runtime_class_name.as_deref())),
        ("hostUsers", spec.host_users == Some(false)),
        ("hostnameOverride", is_text(spec.hostname_override.as_deref())),
        ("os", windows),
        ("resourceClaims", is_list(spec.resource_claims.as_deref())),
        ("resources", limits),
        ("securityContext.supplementalGroupsPolicy", groups == Some("Strict")),
    ] {
        refuse(asked, &format!("{field}.{part}"), causes);
    }
}

pub(super) fn container(field: &str, container: &Container, causes: &mut Causes) {
    let signal = container.lifecycle.as_ref().and_then(|l| l.stop_signal.as_deref());
    for (part, asked) in [
        ("restartPolicyRules", is_list(container.restart_policy_rules.as_deref())),
        ("volumeDevices", is_list(container.volume_devices.as_deref())),
        ("lifecycle.stopSignal", is_text(signal)),
    ] {
        refuse(asked, &format!("{field}.{part}"), causes);
    }
    for (i, variable) in container.env.iter().flatten().enumerate() {
        let asked = variable.value_from.as_ref().is_some_and(|from| from.file_key_ref.is_some());
        refuse(asked, &format!("{field}.env[{i}].valueFrom.fileKeyRef"), causes);
    }
    for (i, mount) in container.volume_mounts.iter().flatten().enumerate() {
        let asked = mount.recursive_read_only.as_deref() == Some("Enabled");
        refuse(asked, &format!("{field}.volumeMounts[{i}].recursiveReadOnly"), causes);
    }
}

/// A volume with this one source.
pub(super) fn volume(field: &str, source: &str, volume: &Volume, causes: &mut Causes) {
    refuse(!VOLUMES.contains(&source), &format!("{field}.{source}"), causes);
    let medium = volume.empty_dir.as_ref().and_then(|empty| empty.medium.as_deref());
    let huge = medium.is_some_and(|medium| medium.starts_with("HugePages"));
    refuse(huge, &format!("{field}.emptyDir.medium"), causes);
    let projected = volume.projected.iter().flat_map(|p| p.sources.iter().flatten());
    for (i, part) in projected.enumerate() {
        for (name, asked) in [
            ("clusterTrustBundle", part.cluster_trust_bundle.is_some()),
            ("podCertificate", part.pod_certificate.is_some()),
        ] {
            refuse(asked, &format!("{field}.projected.sources[{i}].{name}"), causes);
        }
    }
}

fn refuse(asked: bool, field: &str, causes: &mut Causes) {
    if asked {
        forbidden(field, RULE, causes);
    }
}

fn is_text(value: Option<&str>) -> bool {
    value.is_some_and(|text| !text.is_empty())
}

fn is_list<T>(value: Option<&[T]>) -> bool {
    value.is_some_and(|list| !list.is_empty())
}
