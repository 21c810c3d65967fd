//! Rules for the spec of a pod, wherever it stands.

use k8s_openapi::api::core::v1::{EphemeralContainer, PodSpec, Toleration};
use mesh_model::ephemeral::as_container;

use super::super::rules::{at_least, forbidden, invalid, not_negative, one_of, required, selector};
use super::super::{Causes, names};
use super::containers::{self, Seen, container};
use super::volumes::volumes;
use super::{security, unserved};

const DNS_POLICIES: [&str; 4] = ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"];
const EFFECTS: [&str; 3] = ["NoExecute", "NoSchedule", "PreferNoSchedule"];
const OPERATORS: [&str; 6] = ["DoesNotExist", "Exists", "Gt", "In", "Lt", "NotIn"];

pub(in crate::strategy) fn pod_spec(field: &str, spec: &PodSpec, causes: &mut Causes) {
    let at = |part: &str| format!("{field}.{part}");
    let mut seen = Seen::default();
    volumes(&at("volumes"), spec.volumes.as_deref().unwrap_or_default(), &mut seen, causes);
    if spec.containers.is_empty() {
        required(at("containers"), causes);
    }
    for (i, c) in spec.containers.iter().enumerate() {
        container(&at(&format!("containers[{i}]")), c, false, &mut seen, causes);
    }
    for (i, c) in spec.init_containers.iter().flatten().enumerate() {
        container(&at(&format!("initContainers[{i}]")), c, true, &mut seen, causes);
    }
    for (i, c) in spec.ephemeral_containers.iter().flatten().enumerate() {
        ephemeral(&at(&format!("ephemeralContainers[{i}]")), spec, c, &mut seen, causes);
    }
    let restart = spec.restart_policy.as_deref();
    one_of(&at("restartPolicy"), restart, &["Always", "Never", "OnFailure"], causes);
    one_of(&at("dnsPolicy"), spec.dns_policy.as_deref(), &DNS_POLICIES, causes);
    if spec.dns_policy.as_deref() == Some("None")
        && spec
            .dns_config
            .as_ref()
            .is_none_or(|c| c.nameservers.as_ref().is_none_or(|n| n.is_empty()))
    {
        let text =
            "Required value: must provide at least one DNS nameserver when `dnsPolicy` is None";
        causes.add(at("dnsConfig.nameservers"), text);
    }
    let grace = spec.termination_grace_period_seconds;
    not_negative(&at("terminationGracePeriodSeconds"), grace, causes);
    at_least(&at("activeDeadlineSeconds"), spec.active_deadline_seconds, 1, causes);
    names::labels(&at("nodeSelector"), spec.node_selector.as_ref(), causes);
    if let Some(node) = spec.node_name.as_deref() {
        names::subdomain(&at("nodeName"), node, causes);
    }
    for (part, name) in [("hostname", &spec.hostname), ("subdomain", &spec.subdomain)] {
        if let Some(name) = name.as_deref().filter(|n| !n.is_empty()) {
            names::label(&at(part), name, causes);
        }
    }
    tolerations(&at("tolerations"), spec.tolerations.as_deref().unwrap_or_default(), causes);
    placement(field, spec, causes);
    security::pod(field, spec, causes);
    unserved::pod(field, spec, causes);
}

/// It has no say in how the pod lives.
fn ephemeral<'a>(
    field: &str,
    spec: &PodSpec,
    ephemeral: &'a EphemeralContainer,
    seen: &mut Seen<'a>,
    causes: &mut Causes,
) {
    let at = |part: &str| format!("{field}.{part}");
    let container = as_container(ephemeral);
    let probes = [&container.liveness_probe, &container.readiness_probe, &container.startup_probe];
    let limits = container.resources.as_ref();
    let limits = limits.is_some_and(|r| r.limits.is_some() || r.requests.is_some());
    for (part, given) in [
        ("ports", container.ports.as_ref().is_some_and(|ports| !ports.is_empty())),
        ("lifecycle", container.lifecycle.is_some()),
        ("resources", limits),
        ("restartPolicy", container.restart_policy.is_some()),
        ("livenessProbe", probes[0].is_some()),
        ("readinessProbe", probes[1].is_some()),
        ("startupProbe", probes[2].is_some()),
    ] {
        if given {
            forbidden(at(part), "cannot be set for an Ephemeral Container", causes);
        }
    }
    let target = ephemeral.target_container_name.as_deref().filter(|name| !name.is_empty());
    let mut others = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    if let Some(target) = target.filter(|target| others.all(|c| c.name != **target)) {
        causes.add(at("targetContainerName"), format!("Not found: {target:?}"));
    }
    containers::debugging(field, &ephemeral.name, &container, seen, causes);
}

fn tolerations(field: &str, tolerations: &[Toleration], causes: &mut Causes) {
    for (i, t) in tolerations.iter().enumerate() {
        let at = |part: &str| format!("{field}[{i}].{part}");
        let effect = t.effect.as_deref().filter(|e| !e.is_empty());
        one_of(&at("effect"), effect, &EFFECTS, causes);
        let operator = t.operator.as_deref().filter(|o| !o.is_empty());
        one_of(&at("operator"), operator, &["Equal", "Exists"], causes);
        let key = t.key.as_deref().unwrap_or_default();
        if key.is_empty() && operator != Some("Exists") {
            let rule = "operator must be Exists when `key` is empty, which means \"match all values and all keys\"";
            invalid(at("operator"), operator.unwrap_or_default(), rule, causes);
        } else if !key.is_empty() && !names::is_qualified(key) {
            invalid(at("key"), key, "must be a label key", causes);
        }
        if operator == Some("Exists") && t.value.as_ref().is_some_and(|v| !v.is_empty()) {
            let value = t.value.as_deref().unwrap_or_default();
            invalid(
                at("operator"),
                value,
                "value must be empty when `operator` is 'Exists'",
                causes,
            );
        }
        if t.toleration_seconds.is_some() && effect != Some("NoExecute") {
            let rule = "effect must be 'NoExecute' when `tolerationSeconds` is set";
            invalid(at("effect"), effect.unwrap_or_default(), rule, causes);
        }
    }
}

fn placement(field: &str, spec: &PodSpec, causes: &mut Causes) {
    for (i, c) in spec.topology_spread_constraints.iter().flatten().enumerate() {
        let at = |part: &str| format!("{field}.topologySpreadConstraints[{i}].{part}");
        at_least(&at("maxSkew"), Some(c.max_skew.into()), 1, causes);
        if c.topology_key.is_empty() {
            required(at("topologyKey"), causes);
        }
        let when = Some(c.when_unsatisfiable.as_str());
        one_of(&at("whenUnsatisfiable"), when, &["DoNotSchedule", "ScheduleAnyway"], causes);
        if let Some(chosen) = &c.label_selector {
            selector(&at("labelSelector"), chosen, causes);
        }
    }
    let node = spec.affinity.as_ref().and_then(|a| a.node_affinity.as_ref());
    let required_terms = node
        .and_then(|n| n.required_during_scheduling_ignored_during_execution.as_ref())
        .map(|r| r.node_selector_terms.as_slice());
    let base = format!(
        "{field}.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms"
    );
    if required_terms.is_some_and(<[_]>::is_empty) {
        causes.add(&base, "Required value: must have at least one node selector term");
    }
    for (i, term) in required_terms.into_iter().flatten().enumerate() {
        for (j, e) in term.match_expressions.iter().flatten().enumerate() {
            let field = format!("{base}[{i}].matchExpressions[{j}].operator");
            one_of(&field, Some(&e.operator), &OPERATORS, causes);
        }
    }
}
