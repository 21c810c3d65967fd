//! Rules for security contexts: what they say is possible, and does not contradict itself. Runtimes would fail with such a pod, or leave
//! out what they do not understand.

use k8s_openapi::api::core::v1::{
    AppArmorProfile, PodSecurityContext, PodSpec, SeccompProfile, SecurityContext,
};
use mesh_model::sysctl::{Namespace, is_name, namespace, normalized};

use super::super::Causes;
use super::super::rules::{duplicate, forbidden, invalid, one_of};

const PROFILES: [&str; 3] = ["Localhost", "RuntimeDefault", "Unconfined"];
const SYSCTL_NAME: &str = "must have at most 253 characters and match regex ^([a-z0-9]([-_a-z0-9]*[a-z0-9])?[\\./])*[a-z0-9]([-_a-z0-9]*[a-z0-9])?$";
const IDENTIFIER: &str = "must be between 0 and 2147483647, inclusive";

pub(super) fn pod(field: &str, spec: &PodSpec, causes: &mut Causes) {
    if spec.host_pid == Some(true) && spec.share_process_namespace == Some(true) {
        let rule = "ShareProcessNamespace and HostPID cannot both be enabled";
        invalid(format!("{field}.shareProcessNamespace"), true, rule, causes);
    }
    let Some(context) = &spec.security_context else { return };
    let at = |part: &str| format!("{field}.securityContext.{part}");
    for (part, id) in [
        ("runAsUser", context.run_as_user),
        ("runAsGroup", context.run_as_group),
        ("fsGroup", context.fs_group),
    ] {
        identifier(&at(part), id, causes);
    }
    for (i, group) in context.supplemental_groups.iter().flatten().enumerate() {
        identifier(&at(&format!("supplementalGroups[{i}]")), Some(*group), causes);
    }
    let policy = context.fs_group_change_policy.as_deref();
    one_of(&at("fsGroupChangePolicy"), policy, &["Always", "OnRootMismatch"], causes);
    seccomp(&at("seccompProfile"), context.seccomp_profile.as_ref(), causes);
    apparmor(&at("appArmorProfile"), context.app_armor_profile.as_ref(), causes);
    sysctls(&at("sysctls"), spec, context, causes);
}

pub(super) fn container(field: &str, context: Option<&SecurityContext>, causes: &mut Causes) {
    let Some(context) = context else { return };
    let at = |part: &str| format!("{field}.{part}");
    identifier(&at("runAsUser"), context.run_as_user, causes);
    identifier(&at("runAsGroup"), context.run_as_group, causes);
    one_of(&at("procMount"), context.proc_mount.as_deref(), &["Default", "Unmasked"], causes);
    seccomp(&at("seccompProfile"), context.seccomp_profile.as_ref(), causes);
    apparmor(&at("appArmorProfile"), context.app_armor_profile.as_ref(), causes);
    if context.privileged == Some(true) && context.allow_privilege_escalation == Some(false) {
        let rule = "cannot set `allowPrivilegeEscalation` to false and `privileged` to true";
        invalid(field, "", rule, causes);
    }
}

fn identifier(field: &str, value: Option<i64>, causes: &mut Causes) {
    if let Some(value) = value.filter(|v| !(0..=i64::from(i32::MAX)).contains(v)) {
        invalid(field, value, IDENTIFIER, causes);
    }
}

fn seccomp(field: &str, profile: Option<&SeccompProfile>, causes: &mut Causes) {
    let Some(profile) = profile else { return };
    let name = profile.localhost_profile.as_deref();
    localhost(field, "seccomp", &profile.type_, name, causes);
    if let Some(name) = name.filter(|n| n.starts_with('/') || n.split('/').any(|p| p == "..")) {
        let rule = "must be a relative path without '..'";
        invalid(format!("{field}.localhostProfile"), name, rule, causes);
    }
}

fn apparmor(field: &str, profile: Option<&AppArmorProfile>, causes: &mut Causes) {
    let Some(profile) = profile else { return };
    let name = profile.localhost_profile.as_deref();
    localhost(field, "AppArmor", &profile.type_, name, causes);
}

/// A profile of the node has a name, and no other one has.
fn localhost(field: &str, what: &str, kind: &str, name: Option<&str>, causes: &mut Causes) {
    one_of(&format!("{field}.type"), Some(kind), &PROFILES, causes);
    let field = format!("{field}.localhostProfile");
    let is_named = name.is_some_and(|name| !name.trim().is_empty());
    if kind == "Localhost" && !is_named {
        let text = format!("Required value: must be set when {what} type is Localhost");
        causes.add(field, text);
    } else if kind != "Localhost" && name.is_some() {
        let rule = format!("can only be set when {what} type is Localhost");
        invalid(field, name.unwrap_or_default(), &rule, causes);
    }
}

fn sysctls(field: &str, spec: &PodSpec, context: &PodSecurityContext, causes: &mut Causes) {
    let mut seen = std::collections::BTreeSet::new();
    for (i, sysctl) in context.sysctls.iter().flatten().enumerate() {
        let at = |part: &str| format!("{field}[{i}].{part}");
        if sysctl.name.is_empty() {
            causes.add(at("name"), "Required value");
            continue;
        }
        if !is_name(&sysctl.name) {
            invalid(at("name"), &sysctl.name, SYSCTL_NAME, causes);
            continue;
        }
        let name = normalized(&sysctl.name);
        let namespace = namespace(&name);
        if spec.host_network == Some(true) && namespace == Some(Namespace::Net) {
            forbidden(at("name"), "may not be specified when 'hostNetwork' is true", causes);
        }
        if spec.host_ipc == Some(true) && namespace == Some(Namespace::Ipc) {
            forbidden(at("name"), "may not be specified when 'hostIPC' is true", causes);
        }
        if !seen.insert(name) {
            duplicate(at("name"), &sysctl.name, causes);
        }
    }
}
