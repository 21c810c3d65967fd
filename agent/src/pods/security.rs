//! Security contexts: what the pod's and the container's settings together mean to the runtime.

use std::path::{Component, Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, PodSpec, SELinuxOptions, SeccompProfile};
use mesh_cri::v1;
use mesh_model::ephemeral::as_container;

/// Kernel interfaces that a container does not see.
const MASKED: [&str; 12] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
/// Kernel interfaces that a container cannot change.
const READ_ONLY: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// The security context of a pod's sandbox.
/// `profiles` is the directory of the node's own seccomp profiles.
pub(crate) fn of_sandbox(spec: &PodSpec, profiles: &Path) -> v1::LinuxSandboxSecurityContext {
    let pod = spec.security_context.as_ref();
    let mut added = spec.ephemeral_containers.iter().flatten().map(as_container);
    let privileged = containers(spec).any(is_privileged) || added.any(|c| is_privileged(&c));
    let run_as_user = pod.and_then(|p| p.run_as_user);
    v1::LinuxSandboxSecurityContext {
        namespace_options: Some(namespaces(spec)),
        selinux_options: pod.and_then(|p| p.se_linux_options.as_ref()).map(selinux),
        run_as_user: run_as_user.map(number),
        run_as_group: run_as_user.and(pod.and_then(|p| p.run_as_group)).map(number),
        readonly_rootfs: false,
        supplemental_groups: groups(spec),
        privileged,
        seccomp: Some(seccomp(pod.and_then(|p| p.seccomp_profile.as_ref()), privileged, profiles)),
    }
}

/// The security context of a container: its own settings, else those of the pod.
pub(crate) fn of_container(
    spec: &PodSpec,
    container: &Container,
    profiles: &Path,
) -> v1::LinuxContainerSecurityContext {
    let own = container.security_context.as_ref();
    let pod = spec.security_context.as_ref();
    let privileged = is_privileged(container);
    let user = user(spec, container);
    let group = own.and_then(|c| c.run_as_group).or(pod.and_then(|p| p.run_as_group));
    let profile = own
        .and_then(|c| c.seccomp_profile.as_ref())
        .or(pod.and_then(|p| p.seccomp_profile.as_ref()));
    let unmasked = privileged || own.and_then(|c| c.proc_mount.as_deref()) == Some("Unmasked");
    let paths = |list: &[&str]| {
        if unmasked { Vec::new() } else { list.iter().map(|p| (*p).to_owned()).collect() }
    };
    v1::LinuxContainerSecurityContext {
        capabilities: own.and_then(|c| c.capabilities.clone()).map(|c| v1::Capability {
            add_capabilities: c.add.unwrap_or_default(),
            drop_capabilities: c.drop.unwrap_or_default(),
        }),
        privileged,
        namespace_options: Some(namespaces(spec)),
        selinux_options: own
            .and_then(|c| c.se_linux_options.as_ref())
            .or(pod.and_then(|p| p.se_linux_options.as_ref()))
            .map(selinux),
        run_as_user: user.map(number),
        // The runtime refuses a group without a user.
        run_as_group: group.map(number),
        run_as_username: String::new(),
        readonly_rootfs: own.and_then(|c| c.read_only_root_filesystem).unwrap_or(false),
        supplemental_groups: groups(spec),
        no_new_privs: own.and_then(|c| c.allow_privilege_escalation) == Some(false),
        masked_paths: paths(&MASKED),
        readonly_paths: paths(&READ_ONLY),
        seccomp: Some(seccomp(profile, privileged, profiles)),
        apparmor: None,
    }
}

/// The user that all containers of the pod run as, when the manifest says so of each; ephemeral ones apart.
pub(crate) fn only_user(spec: &PodSpec) -> Option<u32> {
    let mut users = containers(spec).map(|container| user(spec, container));
    let first = users.next()??;
    users.all(|user| user == Some(first)).then(|| u32::try_from(first).ok())?
}

/// The group that the files of the pod's volumes belong to.
pub(crate) fn fs_group(spec: &PodSpec) -> Option<u32> {
    let group = spec.security_context.as_ref().and_then(|pod| pod.fs_group);
    group.and_then(|group| u32::try_from(group).ok())
}

/// The user that a container runs as, when the manifest says so.
fn user(spec: &PodSpec, container: &Container) -> Option<i64> {
    let own = container.security_context.as_ref().and_then(|c| c.run_as_user);
    own.or_else(|| spec.security_context.as_ref().and_then(|p| p.run_as_user))
}

/// Whether the container must not run as user 0.
pub(crate) fn must_not_be_root(spec: &PodSpec, container: &Container) -> bool {
    let own = container.security_context.as_ref().and_then(|c| c.run_as_non_root);
    let pod = spec.security_context.as_ref().and_then(|p| p.run_as_non_root);
    own.or(pod) == Some(true)
}

fn containers(spec: &PodSpec) -> impl Iterator<Item = &Container> {
    spec.containers.iter().chain(spec.init_containers.iter().flatten())
}

fn is_privileged(container: &Container) -> bool {
    container.security_context.as_ref().and_then(|c| c.privileged) == Some(true)
}

fn number(value: i64) -> v1::Int64Value {
    v1::Int64Value { value }
}

fn selinux(options: &SELinuxOptions) -> v1::SeLinuxOption {
    v1::SeLinuxOption {
        user: options.user.clone().unwrap_or_default(),
        role: options.role.clone().unwrap_or_default(),
        r#type: options.type_.clone().unwrap_or_default(),
        level: options.level.clone().unwrap_or_default(),
    }
}

fn groups(spec: &PodSpec) -> Vec<i64> {
    let Some(pod) = spec.security_context.as_ref() else { return Vec::new() };
    let mut all = pod.supplemental_groups.clone().unwrap_or_default();
    all.extend(pod.fs_group);
    all
}

fn namespaces(spec: &PodSpec) -> v1::NamespaceOption {
    let shared = |host: Option<bool>| {
        if host == Some(true) { v1::NamespaceMode::Node } else { v1::NamespaceMode::Pod }
    };
    let pid = if spec.host_pid == Some(true) {
        v1::NamespaceMode::Node
    } else if spec.share_process_namespace == Some(true) {
        v1::NamespaceMode::Pod
    } else {
        v1::NamespaceMode::Container
    };
    v1::NamespaceOption {
        network: shared(spec.host_network).into(),
        pid: pid.into(),
        ipc: shared(spec.host_ipc).into(),
        target_id: String::new(),
    }
}

/// The runtime's default profile unless something else is asked for: a container that needs more says so.
fn seccomp(
    profile: Option<&SeccompProfile>,
    privileged: bool,
    profiles: &Path,
) -> v1::SecurityProfile {
    use v1::security_profile::ProfileType;
    let (kind, path) = match profile {
        None if privileged => (ProfileType::Unconfined, None),
        None => (ProfileType::RuntimeDefault, None),
        Some(profile) => match profile.type_.as_str() {
            "Unconfined" => (ProfileType::Unconfined, None),
            "Localhost" => {
                let name = profile.localhost_profile.as_deref().unwrap_or_default();
                // Never a file outside the directory, whoever wrote the pod.
                let inside =
                    Path::new(name).components().filter(|c| matches!(c, Component::Normal(_)));
                let path = profiles.join(inside.collect::<PathBuf>());
                (ProfileType::Localhost, Some(path.display().to_string()))
            }
            _ => (ProfileType::RuntimeDefault, None),
        },
    };
    v1::SecurityProfile { profile_type: kind.into(), localhost_ref: path.unwrap_or_default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(value: serde_json::Value) -> PodSpec {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_container_overrides_its_pod() {
        let spec = spec(serde_json::json!({
        "securityContext": {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 2000, "runAsNonRoot": true},
        "containers": [
            {"name": "a"},
            {"name": "b", "securityContext": {"runAsUser": 7, "runAsNonRoot": false,
                "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}}},
            {"name": "c", "securityContext": {"privileged": true}}
        ]}));
        let of = |index: usize| of_container(&spec, &spec.containers[index], Path::new("/p"));
        let user = |c: &v1::LinuxContainerSecurityContext| c.run_as_user.as_ref().map(|v| v.value);
        assert_eq!(user(&of(0)), Some(1000));
        assert_eq!(user(&of(1)), Some(7));
        assert_eq!(of(0).supplemental_groups, [2000]);
        assert!(!of(0).no_new_privs && of(1).no_new_privs);
        assert!(of(1).readonly_rootfs);
        assert_eq!(of(1).capabilities.map(|c| c.drop_capabilities), Some(vec!["ALL".to_owned()]));
        assert!(
            of(2).privileged && of(2).masked_paths.is_empty() && !of(0).masked_paths.is_empty()
        );
        assert!(must_not_be_root(&spec, &spec.containers[0]));
        assert!(!must_not_be_root(&spec, &spec.containers[1]));
        assert!(of_sandbox(&spec, Path::new("/p")).privileged);
    }

    #[test]
    fn labels_of_selinux_are_the_containers_own_or_those_of_its_pod() {
        let spec = spec(serde_json::json!({
            "securityContext": {"seLinuxOptions": {"level": "s0:c1,c2", "user": "u"}},
            "containers": [{"name": "a"},
                {"name": "b", "securityContext": {"seLinuxOptions": {"type": "spc_t"}}}]}));
        let of = |index: usize| {
            let context = of_container(&spec, &spec.containers[index], Path::new("/p"));
            context.selinux_options.map(|o| (o.user, o.role, o.r#type, o.level)).unwrap()
        };
        let text = |parts: [&str; 4]| parts.map(str::to_owned).into();
        assert_eq!(of(0), text(["u", "", "", "s0:c1,c2"]));
        assert_eq!(of(1), text(["", "", "spc_t", ""]));
        let sandbox = of_sandbox(&spec, Path::new("/p")).selinux_options;
        assert_eq!(sandbox.map(|o| o.level).as_deref(), Some("s0:c1,c2"));
    }

    #[test]
    fn seccomp_is_on_unless_it_is_switched_off() {
        use v1::security_profile::ProfileType;
        let of = |value: serde_json::Value| {
            let spec =
                spec(serde_json::json!({"containers": [{"name": "a", "securityContext": value}]}));
            of_container(&spec, &spec.containers[0], Path::new("/p"))
                .seccomp
                .map(|s| (s.profile_type(), s.localhost_ref))
        };
        let plain = |kind| Some((kind, String::new()));
        assert_eq!(of(serde_json::json!({})), plain(ProfileType::RuntimeDefault));
        let off = serde_json::json!({"seccompProfile": {"type": "Unconfined"}});
        assert_eq!(of(off), plain(ProfileType::Unconfined));
        assert_eq!(of(serde_json::json!({"privileged": true})), plain(ProfileType::Unconfined));
        for name in ["web/strict.json", "../../web/strict.json", "/web/./strict.json"] {
            let own = serde_json::json!({"type": "Localhost", "localhostProfile": name});
            let found = of(serde_json::json!({"seccompProfile": own}));
            assert_eq!(found, Some((ProfileType::Localhost, "/p/web/strict.json".to_owned())));
        }
    }
}
