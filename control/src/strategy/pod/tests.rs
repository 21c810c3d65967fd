use serde_json::{Value, json};

use super::*;

fn pod(spec: Value) -> Pod {
    let value = json!({"metadata": {"name": "p", "namespace": "n"}, "spec": spec});
    let mut pod: Pod = serde_json::from_value(value).unwrap();
    pod.set_defaults();
    pod
}

fn causes(spec: Value) -> Vec<String> {
    let mut causes = Causes::default();
    pod(spec).validate(&mut causes);
    causes.into_vec().into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect()
}

#[test]
fn defaults_are_those_of_kubernetes_and_stay_when_set_again() {
    let mut pod = pod(json!({"containers": [{"name": "c", "image": "i",
        "ports": [{"containerPort": 80}], "resources": {"limits": {"cpu": 1}},
        "readinessProbe": {"httpGet": {"port": 80}}}],
        "volumes": [{"name": "v", "configMap": {"name": "m"}}]}));
    let spec = serde_json::to_value(pod.spec.as_ref().unwrap()).unwrap();
    assert_eq!(spec["restartPolicy"], "Always");
    assert_eq!(spec["terminationGracePeriodSeconds"], 30);
    let container = &spec["containers"][0];
    assert_eq!(container["imagePullPolicy"], "Always");
    assert_eq!(container["ports"][0]["protocol"], "TCP");
    assert_eq!(container["resources"]["requests"]["cpu"], "1");
    assert_eq!(container["readinessProbe"]["failureThreshold"], 3);
    assert_eq!(container["readinessProbe"]["httpGet"]["scheme"], "HTTP");
    assert_eq!(spec["volumes"][0]["configMap"]["defaultMode"], 420);
    let once = pod.clone();
    pod.set_defaults();
    assert_eq!(pod, once);
}

#[test]
fn each_wrong_field_is_named() {
    let good = json!({"name": "c", "image": "i"});
    for (spec, cause) in [
        (json!({"containers": []}), "spec.containers: Required value"),
        (json!({"containers": [{"name": "c"}]}), "spec.containers[0].image: Required value"),
        (json!({"containers": [good, good]}), "spec.containers[1].name: Duplicate value: \"c\""),
        (
            json!({"containers": [{"name": "c", "image": "i", "ports": [{"containerPort": 70000}]}]}),
            "spec.containers[0].ports[0].containerPort: Invalid value: 70000: must be between 1 and 65535, inclusive",
        ),
        (
            json!({"containers": [good], "restartPolicy": "Sometimes"}),
            "spec.restartPolicy: Unsupported value: \"Sometimes\": supported values: \"Always\", \"Never\", \"OnFailure\"",
        ),
        (
            json!({"containers": [{"name": "c", "image": "i", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}]}),
            "spec.containers[0].volumeMounts[0].name: Not found: \"v\"",
        ),
        (
            json!({"containers": [good], "volumes": [{"name": "v"}]}),
            "spec.volumes[0]: Required value: must specify a volume type",
        ),
        (
            json!({"containers": [{"name": "c", "image": "i", "livenessProbe": {"periodSeconds": 1}}]}),
            "spec.containers[0].livenessProbe: Required value: must specify a handler type",
        ),
        (
            json!({"containers": [{"name": "c", "image": "i", "env": [{"name": "a=b"}]}]}),
            "spec.containers[0].env[0].name: Invalid value: \"a=b\"",
        ),
        (
            json!({"containers": [{"name": "c", "image": "i", "resources":
                {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}}]}),
            "spec.containers[0].resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1",
        ),
        (
            json!({"containers": [{"name": "c", "image": "i", "resources": {"requests": {"cpu": "lots"}}}]}),
            "spec.containers[0].resources.requests[cpu]: Invalid value: \"lots\"",
        ),
        (
            json!({"containers": [good], "tolerations": [{"key": "k", "effect": "Never"}]}),
            "spec.tolerations[0].effect: Unsupported value: \"Never\"",
        ),
    ] {
        let found = causes(spec);
        assert!(found.iter().any(|f| f.starts_with(cause)), "{cause}\n{found:?}");
    }
    assert_eq!(causes(json!({"containers": [good]})), Vec::<String>::new());
}

#[test]
fn what_no_node_would_do_is_refused_by_name() {
    let with = |part: &str, value: Value| {
        let mut spec = json!({"containers": [{"name": "c", "image": "i"}]});
        let (parents, last) = part.rsplit_once('.').unwrap_or(("", part));
        let mut place = &mut spec;
        for parent in parents.split('.').filter(|parent| !parent.is_empty()) {
            place = match parent.parse::<usize>() {
                Ok(index) => &mut place[index],
                Err(_) => &mut place[parent],
            };
        }
        place[last] = value;
        spec
    };
    for (part, value, field) in [
        ("runtimeClassName", json!("kata"), "runtimeClassName"),
        ("hostUsers", json!(false), "hostUsers"),
        ("hostnameOverride", json!("other"), "hostnameOverride"),
        ("os", json!({"name": "windows"}), "os"),
        ("resourceClaims", json!([{"name": "gpu"}]), "resourceClaims"),
        ("resources", json!({"limits": {"cpu": "1"}}), "resources"),
        (
            "securityContext",
            json!({"supplementalGroupsPolicy": "Strict"}),
            "securityContext.supplementalGroupsPolicy",
        ),
        ("containers.0.restartPolicy", json!("Always"), "containers[0].restartPolicy"),
        (
            "containers.0.restartPolicyRules",
            json!([{"action": "Restart"}]),
            "containers[0].restartPolicyRules",
        ),
        (
            "containers.0.volumeDevices",
            json!([{"name": "v", "devicePath": "/dev/x"}]),
            "containers[0].volumeDevices",
        ),
        (
            "containers.0.env",
            json!([{"name": "X", "valueFrom": {"fileKeyRef": {"volumeName": "v", "path": "p", "key": "k"}}}]),
            "containers[0].env[0].valueFrom.fileKeyRef",
        ),
        (
            "containers.0.lifecycle",
            json!({"stopSignal": "SIGUSR1"}),
            "containers[0].lifecycle.stopSignal",
        ),
    ] {
        let found = causes(with(part, value));
        let expected = format!("spec.{field}: Forbidden: ");
        assert!(found.iter().any(|cause| cause.starts_with(&expected)), "{expected}\n{found:?}");
    }
    for (part, value) in [
        ("runtimeClassName", json!("")),
        ("hostUsers", json!(true)),
        ("os", json!({"name": "linux"})),
        ("securityContext", json!({"supplementalGroupsPolicy": "Merge"})),
    ] {
        assert_eq!(causes(with(part, value)), Vec::<String>::new(), "{part}");
    }
    let mount = |more: Value| {
        let mut mount = json!({"name": "v", "mountPath": "/v"});
        mount.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        causes(json!({"volumes": [{"name": "v", "emptyDir": {}}],
            "containers": [{"name": "c", "image": "i", "volumeMounts": [mount]}]}))
    };
    let recursive = mount(json!({"readOnly": true, "recursiveReadOnly": "Enabled"}));
    assert!(recursive[0].contains("volumeMounts[0].recursiveReadOnly: Forbidden"), "{recursive:?}");
    assert!(mount(json!({"readOnly": true, "recursiveReadOnly": "IfPossible"})).is_empty());
    let volume = |source: Value| {
        let mut volume = json!({"name": "v"});
        volume.as_object_mut().unwrap().extend(source.as_object().unwrap().clone());
        causes(json!({"containers": [{"name": "c", "image": "i"}], "volumes": [volume]}))
    };
    for (source, field) in [
        (json!({"nfs": {"server": "s", "path": "/"}}), "nfs"),
        (json!({"persistentVolumeClaim": {"claimName": "c"}}), "persistentVolumeClaim"),
        (json!({"emptyDir": {"medium": "HugePages-2Mi"}}), "emptyDir.medium"),
        (
            json!({"projected": {"sources": [{"clusterTrustBundle": {"path": "p"}}]}}),
            "projected.sources[0].clusterTrustBundle",
        ),
    ] {
        let expected = format!("spec.volumes[0].{field}: Forbidden: not served here");
        assert_eq!(volume(source), [expected]);
    }
    assert!(volume(json!({"emptyDir": {"medium": "Memory"}})).is_empty());
    let both = mount(json!({"subPath": "a", "subPathExpr": "$(B)"}));
    assert!(both[0].contains("mutually exclusive"), "{both:?}");
}

#[test]
fn security_contexts_do_not_contradict_themselves() {
    let with = |pod: Value, container: Value| {
        let mut spec =
            json!({"containers": [{"name": "c", "image": "i", "securityContext": container}]});
        spec.as_object_mut().unwrap().extend(pod.as_object().unwrap().clone());
        causes(spec)
    };
    let own = |context: Value| with(json!({}), context);
    let pods = |context: Value| with(json!({"securityContext": context}), Value::Null);
    let own_field = "spec.containers[0].securityContext";
    for (found, expected) in [
        (
            own(json!({"appArmorProfile": {"type": "Enforce"}})),
            format!("{own_field}.appArmorProfile.type: Unsupported value: \"Enforce\""),
        ),
        (
            own(json!({"appArmorProfile": {"type": "Localhost", "localhostProfile": " "}})),
            format!("{own_field}.appArmorProfile.localhostProfile: Required value: must be set when AppArmor type is Localhost"),
        ),
        (
            pods(json!({"appArmorProfile": {"type": "Unconfined", "localhostProfile": "x"}})),
            "spec.securityContext.appArmorProfile.localhostProfile: Invalid value: \"x\": can only be set".to_owned(),
        ),
        (
            own(json!({"seccompProfile": {"type": "Localhost", "localhostProfile": "../x"}})),
            format!("{own_field}.seccompProfile.localhostProfile: Invalid value: \"../x\""),
        ),
        (
            own(json!({"privileged": true, "allowPrivilegeEscalation": false})),
            format!("{own_field}: Invalid value"),
        ),
        (own(json!({"runAsUser": -1})), format!("{own_field}.runAsUser: Invalid value: -1")),
        (pods(json!({"fsGroup": 1_i64 << 31})), "spec.securityContext.fsGroup: Invalid".to_owned()),
        (
            pods(json!({"fsGroupChangePolicy": "Never"})),
            "spec.securityContext.fsGroupChangePolicy: Unsupported".to_owned(),
        ),
        (
            with(json!({"hostPID": true, "shareProcessNamespace": true}), Value::Null),
            "spec.shareProcessNamespace: Invalid value".to_owned(),
        ),
        (
            with(
                json!({"hostNetwork": true, "securityContext": {"sysctls": [{"name": "net/core/somaxconn", "value": "1"}]}}),
                Value::Null,
            ),
            "spec.securityContext.sysctls[0].name: Forbidden: may not be specified when 'hostNetwork'".to_owned(),
        ),
        (
            pods(json!({"sysctls": [{"name": "kernel.sem", "value": "1"}, {"name": "kernel/sem", "value": "2"}]})),
            "spec.securityContext.sysctls[1].name: Duplicate value".to_owned(),
        ),
        (
            pods(json!({"sysctls": [{"name": "net.ipv4.*", "value": "1"}]})),
            "spec.securityContext.sysctls[0].name: Invalid value: \"net.ipv4.*\": must have at most 253 characters".to_owned(),
        ),
    ] {
        assert_eq!(found.len(), 1, "{expected}\n{found:?}");
        assert!(found[0].starts_with(&expected), "{expected}\n{found:?}");
    }
    let good = json!({"appArmorProfile": {"type": "Localhost", "localhostProfile": "web"}, "runAsUser": 0,
        "seccompProfile": {"type": "RuntimeDefault"}, "seLinuxOptions": {"level": "s0:c1,c2"}});
    assert_eq!(with(json!({"securityContext": good}), good.clone()), Vec::<String>::new());
}

#[test]
fn a_living_pod_keeps_its_spec() {
    let old = pod(json!({"containers": [{"name": "c", "image": "i:1"}]}));
    let check = |new: &Pod| {
        let mut causes = Causes::default();
        new.validate_update(&old, &mut causes);
        causes.into_vec().len()
    };
    let mut new = old.clone();
    new.spec.as_mut().unwrap().containers[0].image = Some("i:2".to_owned());
    assert_eq!(check(&new), 0);
    new.spec.as_mut().unwrap().containers[0].command = Some(vec!["x".to_owned()]);
    assert_eq!(check(&new), 1);
    let mut new = old.clone();
    new.spec.as_mut().unwrap().node_name = Some("n".to_owned());
    assert_eq!(check(&new), 1, "only a binding chooses the node");
}

#[test]
fn a_pod_is_gone_at_once_where_nothing_of_it_runs() {
    let of = |status: Value, requested: Option<i64>| {
        let mut pod = pod(json!({"nodeName": "n", "containers": [{"name": "c", "image": "i"}]}));
        pod.status = Some(serde_json::from_value(status).unwrap());
        pod.grace_period_secs(requested)
    };
    let with = |phase: &str, state: Value| {
        json!({"phase": phase, "containerStatuses": [{"name": "c", "image": "", "imageID": "",
            "ready": false, "restartCount": 0, "state": state}]})
    };
    let ended = json!({"terminated": {"exitCode": 1}});
    assert_eq!(of(with("Running", json!({"running": {}})), None), Some(30));
    assert_eq!(of(with("Failed", ended), None), Some(0));
    // Its node has evicted it, and its containers have not ended yet: its name is not free.
    let evicted = || with("Failed", json!({"running": {}}));
    assert_eq!((of(evicted(), None), of(evicted(), Some(0))), (Some(30), Some(0)));
}

#[test]
fn gates_hold_a_pod_back_until_they_are_removed() {
    let gated = json!([{"name": "example.org/a"}, {"name": "example.org/b"}]);
    let with = |gates: Value| {
        let good = json!({"name": "c", "image": "i"});
        pod(json!({"containers": [good], "schedulingGates": gates}))
    };
    let mut old = with(gated);
    old.prepare_create();
    let condition = |pod: &Pod| {
        let all = pod.status.as_ref().unwrap().conditions.iter().flatten();
        all.map(|c| (c.status.clone(), c.reason.clone())).collect::<Vec<_>>()
    };
    assert_eq!(condition(&old), [("False".to_owned(), Some("SchedulingGated".to_owned()))]);
    let refused = |new: &Pod| {
        let mut causes = Causes::default();
        new.validate_update(&old, &mut causes);
        !causes.into_vec().is_empty()
    };
    assert!(refused(&with(json!([{"name": "example.org/a"}, {"name": "example.org/c"}]))));
    assert!(!refused(&with(json!([{"name": "example.org/b"}]))));
    assert!(!refused(&with(json!([]))) && !refused(&with(Value::Null)));
    let node = json!({"metadata": {"name": "p"}, "target": {"kind": "Node", "name": "n1"}});
    let node: Binding = serde_json::from_value(node).unwrap();
    assert!(bound(&old, &node).unwrap_err().to_string().contains("schedulingGates"));
    let mut free = with(json!([]));
    free.prepare_create();
    assert_eq!(condition(&free), []);
    assert_eq!(condition(&bound(&free, &node).unwrap()), [("True".to_owned(), None)]);
}
