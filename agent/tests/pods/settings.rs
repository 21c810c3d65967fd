//! What a pod's manifest says about its surroundings, seen from inside.

use crate::image::BUSYBOX;
use crate::machine;

/// Every system call but one.
const NO_MKDIR: &str = r#"{"defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]}"#;

fn container(name: &str, script: &str) -> serde_json::Value {
    serde_json::json!({"name": name, "image": BUSYBOX, "command": ["sh", "-c", script]})
}

#[test]
fn a_container_finds_what_its_pod_asked_for() {
    machine::run("settings::a_container_finds_what_its_pod_asked_for", async |rig| {
        let api = rig.api.clone();
        let profiles = rig.path("agent/seccomp/web");
        std::fs::create_dir_all(&profiles).unwrap();
        std::fs::write(profiles.join("no-mkdir.json"), NO_MKDIR).unwrap();
        let mut asks = container(
            "c",
            "grep aliased /etc/hosts; hostname; hostname -f; cat /etc/resolv.conf; id -G; stat -c %g /v; \
             cat /proc/sys/net/ipv4/ping_group_range /proc/sys/net/core/somaxconn; echo cpu=$CPU mem=$MEM $PRE_color; \
             ps | grep -c 'sleep 77[7]'; mkdir /tmp/d 2>&1; echo bye > /last/words",
        );
        asks["env"] = serde_json::json!([
            {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1m"}}},
            {"name": "MEM", "valueFrom": {"resourceFieldRef": {"resource": "requests.memory", "divisor": "1Mi"}}}]);
        asks["envFrom"] =
            serde_json::json!([{"prefix": "PRE_", "configMapRef": {"name": "settings"}}]);
        asks["resources"] =
            serde_json::json!({"limits": {"cpu": "250m"}, "requests": {"memory": "8Mi"}});
        asks["volumeMounts"] = serde_json::json!([{"name": "v", "mountPath": "/v"}]);
        asks["terminationMessagePath"] = "/last/words".into();
        asks["securityContext"] = serde_json::json!({"seccompProfile": {"type": "Localhost", "localhostProfile": "web/no-mkdir.json"}});
        api.config_map("settings", &[("color", "green")]);
        api.apply(
            "p",
            serde_json::json!({
                "restartPolicy": "Never", "terminationGracePeriodSeconds": 0,
                "initContainers": [
                    {"name": "side", "image": BUSYBOX, "command": ["sleep", "777"], "restartPolicy": "Always"}],
                "containers": [asks],
                "shareProcessNamespace": true, "hostname": "inside", "subdomain": "web",
                "hostAliases": [{"ip": "192.0.2.7", "hostnames": ["aliased"]}],
                "dnsPolicy": "None",
                "dnsConfig": {"nameservers": ["192.0.2.53"], "searches": ["a.test"], "options": [{"name": "ndots", "value": "2"}]},
                "securityContext": {"fsGroup": 2000, "supplementalGroups": [3000],
                    "sysctls": [{"name": "net.ipv4.ping_group_range", "value": "0 7"},
                        {"name": "net/core/somaxconn", "value": "77"}]},
                "volumes": [{"name": "v", "emptyDir": {}}]
            }),
        );
        let runner = rig.runner();
        rig.until(&runner, "it has ended", |api| api.ended("p").is_some()).await;
        let (_, log) = rig.logs(&runner, "p/c").await;
        let lines: Vec<String> = log.lines().map(|l| l.replace('\t', " ")).collect();
        assert_eq!(
            lines[..3],
            ["192.0.2.7 aliased", "inside", "inside.web.test.svc.cluster.local"],
            "{log}"
        );
        assert_eq!(
            lines[3..6],
            ["search a.test", "nameserver 192.0.2.53", "options ndots:2"],
            "{log}"
        );
        let groups: Vec<&str> = lines[6].split(' ').collect();
        assert!(groups.contains(&"2000") && groups.contains(&"3000"), "{log}");
        assert_eq!(lines[7..11], ["2000", "0 7", "77", "cpu=250 mem=8 green"], "{log}");
        assert_eq!(lines[11], "1", "the other container's process is seen: {log}");
        assert!(lines[12].contains("Operation not permitted"), "{log}");
        assert_eq!(api.ended("p"), Some(("Completed".to_owned(), 0, "bye\n".to_owned())));
        assert_eq!(api.phase("p"), "Succeeded", "a sidecar does not keep a pod");

        // Who is not root writes where only a part of a volume is mounted, too.
        let mut user = container("c", "touch /part/f && stat -c '%u %g' /part/f");
        user["volumeMounts"] =
            serde_json::json!([{"name": "v", "mountPath": "/part", "subPath": "deep/part"}]);
        api.apply(
            "user",
            serde_json::json!({"restartPolicy": "Never", "containers": [user],
                "securityContext": {"runAsUser": 1000, "fsGroup": 2000},
                "volumes": [{"name": "v", "emptyDir": {}}]}),
        );
        rig.until(&runner, "it has ended, too", |api| api.ended("user").is_some()).await;
        assert_eq!(rig.logs(&runner, "user/c").await.1, "1000 2000\n");

        // A profile that is not there is said by name.
        let mut bad = container("c", "true");
        bad["securityContext"] = serde_json::json!({"seccompProfile": {"type": "Localhost", "localhostProfile": "none.json"}});
        api.apply("bad", serde_json::json!({"restartPolicy": "Never", "containers": [bad]}));
        rig.until(&runner, "it cannot be made", |api| api.waiting("bad") == "CreateContainerError")
            .await;
    });
}

#[test]
fn a_node_without_apparmor_refuses_who_needs_it() {
    machine::run("settings::a_node_without_apparmor_refuses_who_needs_it", async |rig| {
        let api = rig.api.clone();
        let asks = |kind: &str| {
            let mut asks = container("c", "exec sleep 1000");
            asks["securityContext"] = serde_json::json!({"appArmorProfile": {"type": kind},
                "seLinuxOptions": {"level": "s0:c1,c2"}});
            serde_json::json!({"terminationGracePeriodSeconds": 0, "containers": [asks]})
        };
        api.apply("free", asks("Unconfined"));
        api.apply("confined", asks("RuntimeDefault"));
        let runner = rig.runner();
        rig.until(&runner, "who needs none runs", |api| api.is_ready("free")).await;
        let enabled = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled");
        if enabled.is_ok_and(|text| text.starts_with('Y')) {
            // The runtime of this machine is told not to use it, and says so itself.
            let refused = |api: &crate::api::Api| api.waiting("confined") == "CreateContainerError";
            return rig.until(&runner, "the runtime refuses it", refused).await;
        }
        rig.until(&runner, "it has failed", |api| api.phase("confined") == "Failed").await;
        let status = api.status("confined");
        assert_eq!(status.reason.as_deref(), Some("AppArmor"));
        let why = "Pod was rejected: Cannot enforce AppArmor: AppArmor is not enabled on the host";
        assert_eq!(status.message.as_deref(), Some(why));
        assert_eq!(status.container_statuses, Some(vec![]));
        rig.until(&runner, "it is told", |api| api.reasons("confined") == ["AppArmor"]).await;
        drop(runner);
        let runner = rig.runner();
        rig.until(&runner, "another agent takes over", |api| api.is_ready("free")).await;
        api.delete("confined");
        let gone = |api: &crate::api::Api| api.read(|s| s.deleted == ["confined"]);
        rig.until(&runner, "it can be deleted", gone).await;
        assert_eq!(api.reasons("confined"), ["AppArmor"], "once, and nothing was made of it");
    });
}

#[test]
fn a_node_refuses_sysctls_that_others_would_feel() {
    machine::run("settings::a_node_refuses_sysctls_that_others_would_feel", async |rig| {
        let api = rig.api.clone();
        let sysctls = serde_json::json!([{"name": "net.ipv4.tcp_syncookies", "value": "1"},
            {"name": "kernel.msgmax", "value": "8192"}]);
        api.apply(
            "p",
            serde_json::json!({"terminationGracePeriodSeconds": 0,
                "securityContext": {"sysctls": sysctls},
                "containers": [container("c", "exec sleep 1000")]}),
        );
        let runner = rig.runner();
        rig.until(&runner, "it has failed", |api| api.phase("p") == "Failed").await;
        let status = api.status("p");
        assert_eq!(status.reason.as_deref(), Some("SysctlForbidden"));
        let why = "Pod was rejected: forbidden sysctl: \"kernel.msgmax\" not allowlisted";
        assert_eq!(status.message.as_deref(), Some(why));
        rig.until(&runner, "it is told", |api| api.reasons("p") == ["SysctlForbidden"]).await;
        api.delete("p");
        let gone = |api: &crate::api::Api| api.read(|s| s.deleted == ["p"]);
        rig.until(&runner, "it can be deleted", gone).await;
        assert_eq!(api.reasons("p"), ["SysctlForbidden"], "once, and nothing was made of it");
    });
}
