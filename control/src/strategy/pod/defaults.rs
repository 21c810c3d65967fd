//! What a pod has when the user does not say it.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Container, HTTPGetAction, LifecycleHandler, PodSecurityContext, PodSpec, Probe,
    ResourceRequirements, Volume,
};
use mesh_model::ephemeral::as_container;

const GRACE_SECS: i64 = 30;
/// 0644
const FILE_MODE: i32 = 420;
const TOKEN_SECS: i64 = 3600;

fn text(field: &mut Option<String>, value: &str) {
    if field.as_deref().unwrap_or_default().is_empty() {
        *field = Some(value.to_owned());
    }
}

pub(in crate::strategy) fn pod_spec(spec: &mut PodSpec) {
    text(&mut spec.restart_policy, "Always");
    text(&mut spec.dns_policy, "ClusterFirst");
    text(&mut spec.scheduler_name, "default-scheduler");
    spec.termination_grace_period_seconds.get_or_insert(GRACE_SECS);
    spec.enable_service_links.get_or_insert(true);
    spec.security_context.get_or_insert_with(PodSecurityContext::default);
    let account = spec.service_account_name.clone().or_else(|| spec.service_account.clone());
    if let Some(account) = account.filter(|a| !a.is_empty()) {
        spec.service_account_name = Some(account.clone());
        spec.service_account = Some(account);
    }
    // An empty name or list means the same as none.
    spec.node_name = spec.node_name.take().filter(|n| !n.is_empty());
    let host_network = spec.host_network == Some(true);
    for c in spec.init_containers.iter_mut().flatten().chain(&mut spec.containers) {
        container(c, host_network);
    }
    for ephemeral in spec.ephemeral_containers.iter_mut().flatten() {
        let mut complete = as_container(ephemeral);
        container(&mut complete, host_network);
        ephemeral.env = complete.env;
        ephemeral.image_pull_policy = complete.image_pull_policy;
        ephemeral.resources = complete.resources;
        ephemeral.termination_message_path = complete.termination_message_path;
        ephemeral.termination_message_policy = complete.termination_message_policy;
    }
    spec.volumes.iter_mut().flatten().for_each(volume);
}

fn container(container: &mut Container, host_network: bool) {
    let pull = if pulls_always(container.image.as_deref()) { "Always" } else { "IfNotPresent" };
    text(&mut container.image_pull_policy, pull);
    text(&mut container.termination_message_path, "/dev/termination-log");
    text(&mut container.termination_message_policy, "File");
    resources(container.resources.get_or_insert_with(ResourceRequirements::default));
    for port in container.ports.iter_mut().flatten() {
        text(&mut port.protocol, "TCP");
        if host_network && port.host_port.unwrap_or(0) == 0 {
            port.host_port = Some(port.container_port);
        }
    }
    for env in container.env.iter_mut().flatten() {
        let field = env.value_from.as_mut().and_then(|from| from.field_ref.as_mut());
        if let Some(field) = field {
            text(&mut field.api_version, "v1");
        }
    }
    let probes = [
        &mut container.liveness_probe,
        &mut container.readiness_probe,
        &mut container.startup_probe,
    ];
    probes.into_iter().flatten().for_each(probe);
    if let Some(lifecycle) = &mut container.lifecycle {
        let hooks = [&mut lifecycle.post_start, &mut lifecycle.pre_stop];
        let gets =
            hooks.into_iter().flatten().filter_map(|h: &mut LifecycleHandler| h.http_get.as_mut());
        gets.for_each(http_get);
    }
}

/// An image without a tag, or with the tag `latest`, may change behind its name.
fn pulls_always(image: Option<&str>) -> bool {
    let image = image.unwrap_or_default();
    let name = image.rsplit('/').next().unwrap_or_default();
    if image.contains('@') {
        return false;
    }
    name.split_once(':').is_none_or(|(_, tag)| tag == "latest")
}

/// A limit without a request is its own request.
fn resources(resources: &mut ResourceRequirements) {
    let Some(limits) = resources.limits.clone().filter(|l| !l.is_empty()) else { return };
    let requests = resources.requests.get_or_insert_with(BTreeMap::new);
    for (name, amount) in limits {
        requests.entry(name).or_insert(amount);
    }
}

fn probe(probe: &mut Probe) {
    let number = |field: &mut Option<i32>, value: i32| {
        if field.unwrap_or(0) == 0 {
            *field = Some(value);
        }
    };
    number(&mut probe.timeout_seconds, 1);
    number(&mut probe.period_seconds, 10);
    number(&mut probe.success_threshold, 1);
    number(&mut probe.failure_threshold, 3);
    if let Some(get) = &mut probe.http_get {
        http_get(get);
    }
    if let Some(grpc) = &mut probe.grpc {
        grpc.service.get_or_insert_default();
    }
}

fn http_get(get: &mut HTTPGetAction) {
    text(&mut get.path, "/");
    text(&mut get.scheme, "HTTP");
}

fn volume(volume: &mut Volume) {
    if let Some(source) = &mut volume.config_map {
        source.default_mode.get_or_insert(FILE_MODE);
    }
    if let Some(source) = &mut volume.secret {
        source.default_mode.get_or_insert(FILE_MODE);
    }
    if let Some(source) = &mut volume.projected {
        source.default_mode.get_or_insert(FILE_MODE);
        for part in source.sources.iter_mut().flatten() {
            if let Some(token) = &mut part.service_account_token {
                token.expiration_seconds.get_or_insert(TOKEN_SECS);
            }
        }
    }
    if let Some(source) = &mut volume.downward_api {
        source.default_mode.get_or_insert(FILE_MODE);
        for item in source.items.iter_mut().flatten() {
            if let Some(field) = &mut item.field_ref {
                text(&mut field.api_version, "v1");
            }
        }
    }
    if let Some(source) = &mut volume.host_path {
        source.type_.get_or_insert_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_images_that_can_change_are_pulled_always() {
        for image in ["nginx", "nginx:latest", "r.example:5000/a/nginx"] {
            assert!(pulls_always(Some(image)), "{image}");
        }
        for image in
            ["nginx:1.27", "r.example:5000/nginx:1", "nginx@sha256:00", "n:latest@sha256:00"]
        {
            assert!(!pulls_always(Some(image)), "{image}");
        }
    }
}
