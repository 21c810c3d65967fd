//! AppArmor: the profile that a container is to run under, and pods that ask a node for more than it can enforce.

use k8s_openapi::api::core::v1::{AppArmorProfile, Container, Pod, PodSpec};
use mesh_cri::v1;
use mesh_cri::v1::security_profile::ProfileType;
use mesh_model::ephemeral::as_container;

/// How profiles were named before they had a field, with the container's name behind it.
const ANNOTATION: &str = "container.apparmor.security.beta.kubernetes.io/";
/// Where the kernel says whether it enforces profiles.
const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";

/// Whether this node enforces profiles.
pub(crate) fn is_enabled() -> bool {
    std::fs::read(ENABLED).is_ok_and(|text| text.first() == Some(&b'Y'))
}

/// Why a node must not run the pod.
pub(crate) fn refusal(pod: &Pod, is_enabled: bool) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let main = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let added = spec.ephemeral_containers.iter().flatten().map(as_container);
    let asked = main.filter_map(|c| profile(pod, spec, c));
    let asked: Vec<_> = asked.chain(added.filter_map(|c| profile(pod, spec, &c))).collect();
    let needed = |p: &v1::SecurityProfile| p.profile_type() != ProfileType::Unconfined;
    let nameless = |p: &v1::SecurityProfile| {
        p.profile_type() == ProfileType::Localhost && p.localhost_ref.trim().is_empty()
    };
    let why = if !asked.iter().any(needed) {
        return None;
    } else if !is_enabled {
        "AppArmor is not enabled on the host"
    } else if asked.iter().any(nameless) {
        "invalid empty AppArmor profile name"
    } else {
        return None;
    };
    Some(format!("Cannot enforce AppArmor: {why}"))
}

/// The profile that a container asks for: by its own field, by an annotation of its pod, or by the pod's field. Without one the
/// runtime's default applies.
pub(crate) fn profile(
    pod: &Pod,
    spec: &PodSpec,
    container: &Container,
) -> Option<v1::SecurityProfile> {
    let own = container.security_context.as_ref().and_then(|c| c.app_armor_profile.as_ref());
    let annotated = || {
        let annotations = pod.metadata.annotations.as_ref()?;
        of_annotation(annotations.get(&format!("{ANNOTATION}{}", container.name))?)
    };
    let pods = || spec.security_context.as_ref()?.app_armor_profile.as_ref().and_then(of_field);
    own.and_then(of_field).or_else(annotated).or_else(pods)
}

fn of_field(profile: &AppArmorProfile) -> Option<v1::SecurityProfile> {
    let name = profile.localhost_profile.as_deref().unwrap_or_default();
    match profile.type_.as_str() {
        "RuntimeDefault" => Some(security_profile(ProfileType::RuntimeDefault, "")),
        "Unconfined" => Some(security_profile(ProfileType::Unconfined, "")),
        "Localhost" => Some(security_profile(ProfileType::Localhost, name)),
        _ => None,
    }
}

fn of_annotation(text: &str) -> Option<v1::SecurityProfile> {
    match text {
        "runtime/default" => Some(security_profile(ProfileType::RuntimeDefault, "")),
        "unconfined" => Some(security_profile(ProfileType::Unconfined, "")),
        _ => text.strip_prefix("localhost/").map(|n| security_profile(ProfileType::Localhost, n)),
    }
}

fn security_profile(kind: ProfileType, name: &str) -> v1::SecurityProfile {
    v1::SecurityProfile { profile_type: kind.into(), localhost_ref: name.to_owned() }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(annotations: Value, of_pod: Value, of_container: Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p", "annotations": annotations},
            "spec": {"securityContext": {"appArmorProfile": of_pod},
                "containers": [{"name": "c", "securityContext": {"appArmorProfile": of_container}}]}}))
        .unwrap()
    }

    fn annotated(text: &str) -> Value {
        json!({"container.apparmor.security.beta.kubernetes.io/c": text})
    }

    #[test]
    fn the_nearest_profile_counts() {
        let of = |annotations, of_pod, of_container| {
            let pod = pod(annotations, of_pod, of_container);
            let spec = pod.spec.as_ref().unwrap();
            profile(&pod, spec, &spec.containers[0]).map(|p| (p.profile_type(), p.localhost_ref))
        };
        let local = |name: &str| Some((ProfileType::Localhost, name.to_owned()));
        let own = json!({"type": "Localhost", "localhostProfile": "own"});
        let pods = json!({"type": "RuntimeDefault"});
        assert_eq!(of(annotated("localhost/old"), pods.clone(), own), local("own"));
        assert_eq!(of(annotated("localhost/old"), pods.clone(), Value::Null), local("old"));
        let default = Some((ProfileType::RuntimeDefault, String::new()));
        assert_eq!(of(json!({}), pods.clone(), Value::Null), default);
        assert_eq!(of(annotated("nonsense"), pods, Value::Null), default);
        assert_eq!(of(annotated("runtime/default"), Value::Null, Value::Null), default);
        let none = Some((ProfileType::Unconfined, String::new()));
        assert_eq!(of(annotated("unconfined"), Value::Null, Value::Null), none);
        assert_eq!(of(json!({}), Value::Null, Value::Null), None);
    }

    #[test]
    fn a_node_without_apparmor_refuses_who_needs_it() {
        let of = |kind: &str, name: Value, is_enabled| {
            let profile = json!({"type": kind, "localhostProfile": name});
            refusal(&pod(json!({}), Value::Null, profile), is_enabled)
        };
        let disabled = Some("Cannot enforce AppArmor: AppArmor is not enabled on the host");
        for (kind, name) in [("RuntimeDefault", Value::Null), ("Localhost", json!("web"))] {
            assert_eq!(of(kind, name.clone(), false).as_deref(), disabled);
            assert_eq!(of(kind, name, true), None);
        }
        assert_eq!(of("Unconfined", Value::Null, false), None);
        assert_eq!(refusal(&pod(json!({}), Value::Null, Value::Null), false), None);
        let old = pod(annotated("runtime/default"), Value::Null, Value::Null);
        assert_eq!(refusal(&old, false).as_deref(), disabled);
        let nameless = Some("Cannot enforce AppArmor: invalid empty AppArmor profile name");
        assert_eq!(of("Localhost", json!(" "), true).as_deref(), nameless);
    }
}
