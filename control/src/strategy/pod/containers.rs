//! Rules for containers.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{
    Container, ContainerPort, EnvVar, HTTPGetAction, Lifecycle, LifecycleHandler, Probe,
    ResourceRequirements,
};

use super::super::rules::{
    at_least, duplicate, forbidden, invalid, not_negative, one_of, port, port_name, port_or_name,
    protocol, quantities, required,
};
use super::super::{Causes, names};
use super::{security, unserved};
use crate::scheduler::quantity;

/// Names that are defined once per pod.
#[derive(Default)]
pub(super) struct Seen<'a> {
    pub(super) containers: BTreeSet<&'a str>,
    pub(super) volumes: BTreeSet<&'a str>,
    host_ports: BTreeSet<(&'a str, &'a str, i32)>,
}

pub(super) fn container<'a>(
    field: &str,
    container: &'a Container,
    init: bool,
    seen: &mut Seen<'a>,
    causes: &mut Causes,
) {
    let at = |part: &str| format!("{field}.{part}");
    name(&at("name"), &container.name, seen, causes);
    image(&at("image"), container, causes);
    let pull = container.image_pull_policy.as_deref();
    one_of(&at("imagePullPolicy"), pull, &["Always", "IfNotPresent", "Never"], causes);
    let message = container.termination_message_policy.as_deref();
    let policies = ["FallbackToLogsOnError", "File"];
    one_of(&at("terminationMessagePolicy"), message, &policies, causes);
    let sidecar = container.restart_policy.as_deref();
    if init {
        one_of(&at("restartPolicy"), sidecar, &["Always"], causes);
    } else if sidecar.is_some() {
        forbidden(at("restartPolicy"), "may not be set for non-init containers", causes);
    }
    ports(&at("ports"), container.ports.as_deref().unwrap_or_default(), seen, causes);
    env(&at("env"), container.env.as_deref().unwrap_or_default(), causes);
    env_from(&at("envFrom"), container, causes);
    mounts(&at("volumeMounts"), container, seen, causes);
    if let Some(resources) = &container.resources {
        requirements(&at("resources"), resources, causes);
    }
    probes(field, container, init && sidecar != Some("Always"), causes);
    security::container(&at("securityContext"), container.security_context.as_ref(), causes);
    unserved::container(field, container, causes);
}

fn image(field: &str, container: &Container, causes: &mut Causes) {
    match container.image.as_deref() {
        None | Some("") => required(field, causes),
        Some(image) if image.trim() != image => {
            invalid(field, image, "must not have leading or trailing whitespace", causes);
        }
        Some(_) => {}
    }
}

/// A container that is added to a running pod: only what it may have is looked at.
pub(super) fn debugging<'a>(
    field: &str,
    own_name: &'a str,
    container: &Container,
    seen: &mut Seen<'a>,
    causes: &mut Causes,
) {
    let at = |part: &str| format!("{field}.{part}");
    name(&at("name"), own_name, seen, causes);
    image(&at("image"), container, causes);
    env(&at("env"), container.env.as_deref().unwrap_or_default(), causes);
    env_from(&at("envFrom"), container, causes);
    security::container(&at("securityContext"), container.security_context.as_ref(), causes);
    mounts(&at("volumeMounts"), container, seen, causes);
    for (i, mount) in container.volume_mounts.iter().flatten().enumerate() {
        if mount.sub_path.is_some() || mount.sub_path_expr.is_some() {
            let field = at(&format!("volumeMounts[{i}].subPath"));
            forbidden(field, "cannot be set for an Ephemeral Container", causes);
        }
    }
}

fn name<'a>(field: &str, name: &'a str, seen: &mut Seen<'a>, causes: &mut Causes) {
    if name.is_empty() {
        required(field, causes);
        return;
    }
    names::label(field, name, causes);
    if !seen.containers.insert(name) {
        duplicate(field, name, causes);
    }
}

fn ports<'a>(field: &str, ports: &'a [ContainerPort], seen: &mut Seen<'a>, causes: &mut Causes) {
    let mut port_names = BTreeSet::new();
    for (i, p) in ports.iter().enumerate() {
        let at = |part: &str| format!("{field}[{i}].{part}");
        if p.container_port == 0 {
            required(at("containerPort"), causes);
        } else {
            port(&at("containerPort"), p.container_port, causes);
        }
        if let Some(name) = p.name.as_deref().filter(|n| !n.is_empty()) {
            port_name(&at("name"), name, causes);
            if !port_names.insert(name) {
                duplicate(at("name"), name, causes);
            }
        }
        protocol(&at("protocol"), p.protocol.as_deref(), causes);
        if let Some(number) = p.host_port.filter(|n| *n != 0) {
            port(&at("hostPort"), number, causes);
            let protocol = p.protocol.as_deref().unwrap_or("TCP");
            let address = p.host_ip.as_deref().unwrap_or_default();
            if !seen.host_ports.insert((address, protocol, number)) {
                duplicate(at("hostPort"), format!("{address}/{protocol}/{number}"), causes);
            }
        }
    }
}

fn env(field: &str, variables: &[EnvVar], causes: &mut Causes) {
    for (i, variable) in variables.iter().enumerate() {
        let at = |part: &str| format!("{field}[{i}].{part}");
        let name = &variable.name;
        if name.is_empty() {
            required(at("name"), causes);
        } else if name.contains('=') || name.bytes().any(|b| !(0x20..0x7f).contains(&b)) {
            let rule = "a valid environment variable name must consist only of printable ASCII characters other than '='";
            invalid(at("name"), name, rule, causes);
        }
        let Some(from) = &variable.value_from else { continue };
        let sources = [
            from.config_map_key_ref.as_ref().map(|s| ("configMapKeyRef", &s.name, &s.key)),
            from.secret_key_ref.as_ref().map(|s| ("secretKeyRef", &s.name, &s.key)),
        ];
        let count = sources.iter().flatten().count()
            + usize::from(from.field_ref.is_some())
            + usize::from(from.resource_field_ref.is_some())
            + usize::from(from.file_key_ref.is_some());
        if variable.value.as_ref().is_some_and(|v| !v.is_empty()) {
            invalid(at("valueFrom"), "", "may not be specified when `value` is not empty", causes);
        } else if count == 0 {
            invalid(
                at("valueFrom"),
                "",
                "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef` or `secretKeyRef`",
                causes,
            );
        } else if count > 1 {
            invalid(
                at("valueFrom"),
                "",
                "may not have more than one field specified at a time",
                causes,
            );
        }
        for (source, name, key) in sources.into_iter().flatten() {
            if name.is_empty() {
                required(at(&format!("valueFrom.{source}.name")), causes);
            }
            if key.is_empty() {
                required(at(&format!("valueFrom.{source}.key")), causes);
            }
        }
        if from.field_ref.as_ref().is_some_and(|f| f.field_path.is_empty()) {
            required(at("valueFrom.fieldRef.fieldPath"), causes);
        }
    }
}

fn env_from(field: &str, container: &Container, causes: &mut Causes) {
    for (i, source) in container.env_from.iter().flatten().enumerate() {
        let field = format!("{field}[{i}]");
        match (&source.config_map_ref, &source.secret_ref) {
            (None, None) => {
                invalid(field, "", "must specify one of: `configMapRef` or `secretRef`", causes);
            }
            (Some(_), Some(_)) => {
                invalid(field, "", "may not have more than one field specified at a time", causes);
            }
            (Some(map), None) if map.name.is_empty() => {
                required(format!("{field}.configMapRef.name"), causes);
            }
            (None, Some(secret)) if secret.name.is_empty() => {
                required(format!("{field}.secretRef.name"), causes);
            }
            _ => {}
        }
    }
}

fn mounts(field: &str, container: &Container, seen: &Seen<'_>, causes: &mut Causes) {
    let mut paths = BTreeSet::new();
    for (i, mount) in container.volume_mounts.iter().flatten().enumerate() {
        let at = |part: &str| format!("{field}[{i}].{part}");
        if mount.name.is_empty() {
            required(at("name"), causes);
        } else if !seen.volumes.contains(mount.name.as_str()) {
            causes.add(at("name"), format!("Not found: {:?}", mount.name));
        }
        if mount.mount_path.is_empty() {
            required(at("mountPath"), causes);
        } else if !paths.insert(&mount.mount_path) {
            invalid(at("mountPath"), &mount.mount_path, "must be unique", causes);
        }
        let is_set = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        if is_set(&mount.sub_path) && is_set(&mount.sub_path_expr) {
            let both = mount.sub_path_expr.as_deref().unwrap_or_default();
            invalid(
                at("subPathExpr"),
                both,
                "subPathExpr and subPath are mutually exclusive",
                causes,
            );
        }
        let inside = mount.sub_path.as_deref().unwrap_or_default();
        if inside.starts_with('/') {
            invalid(at("subPath"), inside, "must be a relative path", causes);
        } else if inside.split('/').any(|part| part == "..") {
            invalid(at("subPath"), inside, "must not contain '..'", causes);
        }
    }
}

fn requirements(field: &str, resources: &ResourceRequirements, causes: &mut Causes) {
    quantities(&format!("{field}.limits"), resources.limits.as_ref(), causes);
    quantities(&format!("{field}.requests"), resources.requests.as_ref(), causes);
    for (name, request) in resources.requests.iter().flatten() {
        let limit = resources.limits.as_ref().and_then(|limits| limits.get(name));
        let Some(limit) = limit else { continue };
        let amount = |q: &str| quantity::thousandths(q);
        if let (Some(asked), Some(most)) = (amount(&request.0), amount(&limit.0))
            && asked > most
        {
            let rule = format!("must be less than or equal to {name} limit of {}", limit.0);
            invalid(format!("{field}.requests"), &request.0, &rule, causes);
        }
    }
}

fn probes(field: &str, container: &Container, ends: bool, causes: &mut Causes) {
    let named = [
        ("livenessProbe", &container.liveness_probe),
        ("readinessProbe", &container.readiness_probe),
        ("startupProbe", &container.startup_probe),
    ];
    for (name, found) in named {
        let Some(found) = found else { continue };
        let field = format!("{field}.{name}");
        if ends {
            forbidden(
                &field,
                "may not be set for init containers without restartPolicy=Always",
                causes,
            );
        }
        probe(&field, found, causes);
        if name != "readinessProbe" && found.success_threshold.is_some_and(|n| n != 1) {
            let n = found.success_threshold.unwrap_or_default();
            invalid(format!("{field}.successThreshold"), n, "must be 1", causes);
        }
    }
    if let Some(lifecycle) = &container.lifecycle {
        hooks(&format!("{field}.lifecycle"), lifecycle, causes);
    }
}

fn probe(field: &str, probe: &Probe, causes: &mut Causes) {
    let kinds = [
        probe.exec.is_some(),
        probe.http_get.is_some(),
        probe.tcp_socket.is_some(),
        probe.grpc.is_some(),
    ];
    handlers(field, &kinds, causes);
    for (name, value) in [
        ("initialDelaySeconds", probe.initial_delay_seconds),
        ("timeoutSeconds", probe.timeout_seconds),
        ("periodSeconds", probe.period_seconds),
        ("successThreshold", probe.success_threshold),
        ("failureThreshold", probe.failure_threshold),
    ] {
        not_negative(&format!("{field}.{name}"), value.map(i64::from), causes);
    }
    let grace = probe.termination_grace_period_seconds;
    at_least(&format!("{field}.terminationGracePeriodSeconds"), grace, 1, causes);
    if let Some(exec) = &probe.exec
        && exec.command.as_ref().is_none_or(|c| c.is_empty())
    {
        required(format!("{field}.exec.command"), causes);
    }
    if let Some(get) = &probe.http_get {
        http_get(&format!("{field}.httpGet"), get, causes);
    }
    if let Some(tcp) = &probe.tcp_socket {
        port_or_name(&format!("{field}.tcpSocket.port"), &tcp.port, causes);
    }
    if let Some(grpc) = &probe.grpc {
        port(&format!("{field}.grpc.port"), grpc.port, causes);
    }
}

fn handlers(field: &str, kinds: &[bool], causes: &mut Causes) {
    match kinds.iter().filter(|set| **set).count() {
        0 => causes.add(field, "Required value: must specify a handler type"),
        1 => {}
        _ => forbidden(field, "may not specify more than 1 handler type", causes),
    }
}

fn http_get(field: &str, get: &HTTPGetAction, causes: &mut Causes) {
    port_or_name(&format!("{field}.port"), &get.port, causes);
    one_of(&format!("{field}.scheme"), get.scheme.as_deref(), &["HTTP", "HTTPS"], causes);
    for (i, header) in get.http_headers.iter().flatten().enumerate() {
        if http::HeaderName::from_bytes(header.name.as_bytes()).is_err() {
            let field = format!("{field}.httpHeaders[{i}].name");
            invalid(
                field,
                &header.name,
                "a valid HTTP header must consist of alphanumeric characters or '-'",
                causes,
            );
        }
    }
}

fn hooks(field: &str, lifecycle: &Lifecycle, causes: &mut Causes) {
    let named = [("postStart", &lifecycle.post_start), ("preStop", &lifecycle.pre_stop)];
    for (name, hook) in named {
        let Some(hook): &Option<LifecycleHandler> = hook else { continue };
        let field = format!("{field}.{name}");
        let kinds = [
            hook.exec.is_some(),
            hook.http_get.is_some(),
            hook.tcp_socket.is_some(),
            hook.sleep.is_some(),
        ];
        handlers(&field, &kinds, causes);
        if let Some(get) = &hook.http_get {
            http_get(&format!("{field}.httpGet"), get, causes);
        }
        not_negative(
            &format!("{field}.sleep.seconds"),
            hook.sleep.as_ref().map(|s| s.seconds),
            causes,
        );
    }
}
