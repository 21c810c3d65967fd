//! Probes of every kind, in real containers: each is answered by the existence of a file.

use serde_json::{Value, json};

use crate::answers::{self, KINDS};
use crate::machine;

/// What a probe may be for, in the order of the ports of TCP servers.
const PURPOSES: [(&str, &str); 3] =
    [("startupProbe", "started"), ("readinessProbe", "ready"), ("livenessProbe", "alive")];

/// How a container of that kind is asked whether there is a file.
fn probe(kind: &str, file: &str, port: u16) -> Value {
    let path = format!("/{file}");
    match kind {
        "exec" => {
            json!({"exec": {"command": ["test", "-e", format!("{}/{kind}-{file}", answers::NOTES_INSIDE)]}})
        }
        "http" => json!({"httpGet": {"port": answers::PORT, "path": path}}),
        "https" => json!({"httpGet": {"port": answers::PORT, "path": path, "scheme": "HTTPS"}}),
        "grpc" => json!({"grpc": {"port": answers::PORT, "service": file}}),
        _ => json!({"tcpSocket": {"port": port}}),
    }
}

fn pod(kind: &str) -> Value {
    let mut container = answers::container(kind);
    for ((purpose, file), port) in PURPOSES.into_iter().zip(answers::PORT..) {
        let mut probe = probe(kind, file, port);
        probe["periodSeconds"] = 1.into();
        // Only the answer counts here, however busy the machine is.
        probe["timeoutSeconds"] = 30.into();
        probe["failureThreshold"] = if purpose == "startupProbe" { 1000 } else { 1 }.into();
        container[purpose] = probe;
    }
    json!({"terminationGracePeriodSeconds": 0, "containers": [container],
        "volumes": [{"name": "host", "hostPath": {"path": "/"}}]})
}

#[test]
fn probes_of_every_kind_decide() {
    machine::run("probes::probes_of_every_kind_decide", async |rig| {
        let api = rig.api.clone();
        std::fs::create_dir_all(answers::NOTES).unwrap();
        let note = |kind: &str, file: &str| format!("{}/{kind}-{file}", answers::NOTES);
        let answer = |file: &str| {
            KINDS.iter().for_each(|kind| std::fs::write(note(kind, file), "").unwrap());
        };
        let refuse = |file: &str| {
            KINDS.iter().for_each(|kind| std::fs::remove_file(note(kind, file)).unwrap());
        };
        for kind in KINDS {
            api.apply(kind, pod(kind));
        }
        let runner = rig.runner();
        let state = |api: &crate::api::Api, kind: &str| {
            api.container(kind).map(|c| (c.started == Some(true), c.ready, c.restart_count))
        };
        let all = async |what: &str, expected: (bool, bool)| {
            for kind in KINDS {
                rig.until(&runner, &format!("{kind}: {what}"), |api| {
                    state(api, kind).is_some_and(|(started, ready, _)| (started, ready) == expected)
                })
                .await;
                assert_eq!(state(&api, kind).unwrap().2, 0, "{kind}: it runs on");
            }
        };
        for kind in KINDS {
            rig.until(&runner, &format!("{kind}: its start is waited for"), |api| {
                api.phase(kind) == "Running" && api.reasons(kind).contains(&"Unhealthy")
            })
            .await;
        }
        all("the others wait for the startup probe", (false, false)).await;
        answer("alive");
        answer("started");
        all("it has started", (true, false)).await;
        answer("ready");
        all("it is ready", (true, true)).await;
        refuse("ready");
        all("it is not ready", (true, false)).await;
        refuse("alive");
        for kind in KINDS {
            rig.until(&runner, &format!("{kind}: it runs again"), |api| {
                state(api, kind).is_some_and(|s| s.2 > 0)
            })
            .await;
            assert!(api.reasons(kind).contains(&"Killing"), "{:?}", api.reasons(kind));
        }
        let said = |kind: &str| {
            api.read(|s| {
                let unhealthy =
                    s.events.iter().filter(|e| e.pod.name == kind && e.reason == "Unhealthy");
                unhealthy.map(|e| e.message.clone()).collect::<Vec<_>>().join("\n")
            })
        };
        for (kind, why) in [
            ("http", "Readiness probe failed: HTTP probe failed with statuscode: 503"),
            ("https", "Readiness probe failed: HTTP probe failed with statuscode: 503"),
            ("grpc", "Readiness probe failed: gRPC: service is not serving (status 2)"),
            ("tcp", "Readiness probe failed: "),
        ] {
            assert!(said(kind).contains(why), "{kind}: {}", said(kind));
        }
    });
}
