//! Objects as rows, for people: what `kubectl get` prints (Kubernetes API concepts, "Receiving resources as Tables").

use jiff::Timestamp;
use mesh_model::kinds::Kind;
use serde_json::{Value, json};

mod cells;
mod pods;
mod sets;

use cells::{Column, columns};

/// How much of each object comes with its row (`includeObject`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Include {
    /// Only the metadata, as `PartialObjectMetadata`.
    Metadata,
    /// The whole object.
    Object,
    /// Nothing.
    None,
}

impl Include {
    /// The value of the `includeObject` query parameter; metadata when absent or unknown.
    pub fn parse(text: Option<&str>) -> Self {
        match text {
            Some("Object") => Self::Object,
            Some("None") => Self::None,
            _ => Self::Metadata,
        }
    }
}

/// A `meta.k8s.io/v1` Table. `metadata` is that of the list, or holds the object's resource version.
pub fn table(
    kind: &Kind,
    items: &[&Value],
    metadata: Value,
    include: Include,
    now: Timestamp,
) -> Value {
    let columns = columns(kind);
    let rows: Vec<Value> = items
        .iter()
        .map(|item| {
            let cells: Vec<Value> = columns.iter().map(|c| (c.cell)(item, now)).collect();
            json!({"cells": cells, "object": carried(item, include)})
        })
        .collect();
    json!({
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": metadata,
        "columnDefinitions": columns.iter().map(definition).collect::<Vec<_>>(),
        "rows": rows,
    })
}

fn definition(column: &Column) -> Value {
    json!({
        "name": column.name,
        "type": column.kind,
        "format": if column.name == "Name" { "name" } else { "" },
        "description": "",
        "priority": column.priority,
    })
}

fn carried(item: &Value, include: Include) -> Value {
    match include {
        Include::Object => item.clone(),
        Include::None => Value::Null,
        Include::Metadata => json!({
            "kind": "PartialObjectMetadata",
            "apiVersion": "meta.k8s.io/v1",
            "metadata": item["metadata"],
        }),
    }
}

#[cfg(test)]
mod tests {
    use mesh_model::kinds::{KINDS, by_any_name};

    use super::*;

    fn now() -> Timestamp {
        "2026-01-02T00:00:00Z".parse().unwrap()
    }

    fn row(kind: &str, item: &Value) -> Vec<(String, String)> {
        let kind = by_any_name(kind).unwrap();
        let table = table(kind, &[item], json!({}), Include::Metadata, now());
        let names = table["columnDefinitions"].as_array().unwrap();
        let cells = table["rows"][0]["cells"].as_array().unwrap();
        let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
        names.iter().zip(cells).map(|(n, c)| (text(&n["name"]), text(c))).collect()
    }

    fn cell(kind: &str, item: &Value, column: &str) -> String {
        row(kind, item).into_iter().find(|(name, _)| name == column).unwrap().1
    }

    #[test]
    fn every_kind_has_rows_even_of_an_empty_object() {
        for kind in KINDS {
            let table = table(kind, &[&json!({})], json!({}), Include::Object, now());
            let cells = table["rows"][0]["cells"].as_array().unwrap();
            assert_eq!(cells.len(), table["columnDefinitions"].as_array().unwrap().len());
            assert!(cells.len() >= 2, "{}", kind.kind);
        }
    }

    #[test]
    fn pods_show_their_state_as_kubectl_users_know_it() {
        let mut pod = json!({
            "metadata": {"name": "p", "creationTimestamp": "2026-01-01T23:00:00Z"},
            "spec": {"containers": [{"name": "a"}, {"name": "b"}], "nodeName": "n1"},
            "status": {"phase": "Running", "podIP": "10.244.0.2", "containerStatuses": [
                {"name": "a", "ready": true, "restartCount": 2, "state": {"running": {}}},
                {"name": "b", "ready": false, "restartCount": 1,
                 "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}
        });
        assert_eq!(cell("pods", &pod, "Ready"), "1/2");
        assert_eq!(cell("pods", &pod, "Status"), "CrashLoopBackOff");
        assert_eq!(cell("pods", &pod, "Restarts"), "3");
        assert_eq!(cell("pods", &pod, "Age"), "60m");
        assert_eq!(cell("pods", &pod, "Node"), "n1");
        pod["metadata"]["deletionTimestamp"] = json!("2026-01-02T00:00:00Z");
        assert_eq!(cell("pods", &pod, "Status"), "Terminating");
    }

    #[test]
    fn services_and_deployments() {
        let service = json!({
            "metadata": {"name": "s"},
            "spec": {"type": "NodePort", "clusterIP": "10.96.0.1",
                     "ports": [{"port": 80, "nodePort": 30080, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}]}
        });
        assert_eq!(cell("svc", &service, "Port(s)"), "80:30080/TCP,53/UDP");
        assert_eq!(cell("svc", &service, "External-IP"), "<none>");
        for (service, shown) in [
            (json!({"type": "ClusterIP", "externalName": ""}), "<none>"),
            (json!({"type": "ExternalName", "externalName": "a.example"}), "a.example"),
            (json!({"type": "LoadBalancer"}), "<pending>"),
        ] {
            assert_eq!(cell("svc", &json!({"spec": service}), "External-IP"), shown);
        }
        let points = json!({"ingress": [{"hostname": "lb.example"}, {"ip": "192.0.2.7"}]});
        let given = json!({"spec": {"type": "LoadBalancer"}, "status": {"loadBalancer": points}});
        assert_eq!(cell("svc", &given, "External-IP"), "lb.example,192.0.2.7");
        let deployment = json!({"metadata": {"name": "d"}, "spec": {"replicas": 3},
            "status": {"readyReplicas": 1, "updatedReplicas": 2, "availableReplicas": 1}});
        assert_eq!(cell("deploy", &deployment, "Ready"), "1/3");
        assert_eq!(cell("deploy", &deployment, "Up-to-date"), "2");
    }

    #[test]
    fn sets_of_nodes_and_of_names_and_their_revisions() {
        let daemons = json!({"spec": {"template": {"spec": {"nodeSelector": {"disk": "ssd"}}}},
            "status": {"desiredNumberScheduled": 3, "currentNumberScheduled": 2, "numberReady": 1,
                "updatedNumberScheduled": 2, "numberAvailable": 1}});
        let shown: Vec<String> = row("ds", &daemons).into_iter().map(|(_, cell)| cell).collect();
        assert_eq!(shown[1..7], ["3", "2", "1", "2", "1", "disk=ssd"]);
        let named = json!({"spec": {"replicas": 3}, "status": {"readyReplicas": 2}});
        assert_eq!(cell("sts", &named, "Ready"), "2/3");
        let owned = json!({"revision": 4, "metadata": {"ownerReferences": [
            {"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "logs", "controller": true}]}});
        assert_eq!(cell("controllerrevisions", &owned, "Controller"), "daemonset.apps/logs");
        assert_eq!(cell("controllerrevisions", &owned, "Revision"), "4");
        assert_eq!(cell("controllerrevisions", &json!({}), "Controller"), "<none>");
    }

    #[test]
    fn endpoints_show_ready_addresses_with_each_port() {
        let shown = |subsets: Value| cell("ep", &json!({"subsets": subsets}), "Endpoints");
        let ips = |ips: &[&str]| json!(ips.iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>());
        let two = json!([{"name": "a", "port": 80}, {"name": "b", "port": 81}]);
        let subset = json!({"addresses": ips(&["192.0.2.1", "192.0.2.2"]), "ports": two});
        let last = json!({"addresses": ips(&["2001:db8::1"]), "ports": [{"port": 53}]});
        assert_eq!(shown(json!([last])), "[2001:db8::1]:53");
        assert_eq!(
            shown(json!([subset, last])),
            "192.0.2.1:80,192.0.2.2:80,192.0.2.1:81 + 2 more..."
        );
        assert_eq!(shown(json!([{"addresses": ips(&["192.0.2.1"])}])), "192.0.2.1");
        assert_eq!(shown(json!([{"notReadyAddresses": ips(&["192.0.2.1"])}])), "");
        assert_eq!(shown(json!(null)), "<none>");
    }

    #[test]
    fn jobs_show_how_far_they_got() {
        let told = |conditions: Value| json!({"conditions": conditions, "succeeded": 1, "startTime": "2026-01-01T23:58:00Z"});
        let is = |type_: &str| json!([{"type": "Failed", "status": "False"}, {"type": type_, "status": "True"}]);
        let job = |spec: Value, status: Value| json!({"metadata": {"name": "j"}, "spec": spec, "status": status});
        for (type_, shown) in [
            ("Complete", "Complete"),
            ("Failed", "Failed"),
            ("Suspended", "Suspended"),
            ("FailureTarget", "FailureTarget"),
            ("Other", "Running"),
        ] {
            assert_eq!(cell("jobs", &job(json!({}), told(is(type_))), "Status"), shown);
        }
        let mut going = job(json!({}), told(json!([])));
        going["metadata"]["deletionTimestamp"] = json!("2026-01-02T00:00:00Z");
        assert_eq!(cell("jobs", &going, "Status"), "Terminating");
        for (spec, shown) in [
            (json!({"completions": 3, "parallelism": 2}), "1/3"),
            (json!({"parallelism": 1}), "1/1"),
            (json!({"parallelism": 4}), "1/1 of 4"),
        ] {
            assert_eq!(cell("jobs", &job(spec, told(json!([]))), "Completions"), shown);
        }
        let mut done = job(json!({}), told(json!([])));
        assert_eq!(cell("jobs", &done, "Duration"), "2m");
        done["status"]["completionTime"] = json!("2026-01-01T23:58:07Z");
        assert_eq!(cell("jobs", &done, "Duration"), "7s");
        assert_eq!(cell("jobs", &job(json!({}), json!({})), "Duration"), "");
    }

    #[test]
    fn cron_jobs_show_when_they_ran() {
        let mut cron = json!({"metadata": {"name": "c"}, "spec": {"schedule": "@hourly", "suspend": false,
            "jobTemplate": {"spec": {"template": {"spec": {"containers": [{"name": "a", "image": "i"}]}}}}}});
        for (column, shown) in [
            ("Schedule", "@hourly"),
            ("Timezone", "<none>"),
            ("Suspend", "False"),
            ("Active", "0"),
            ("Last Schedule", "<none>"),
            ("Images", "i"),
            ("Selector", "<none>"),
        ] {
            assert_eq!(cell("cj", &cron, column), shown, "{column}");
        }
        cron["spec"]["timeZone"] = json!("Europe/Berlin");
        cron["status"] =
            json!({"active": [{"name": "c-1"}], "lastScheduleTime": "2026-01-01T23:59:00Z"});
        for (column, shown) in
            [("Timezone", "Europe/Berlin"), ("Active", "1"), ("Last Schedule", "60s")]
        {
            assert_eq!(cell("cj", &cron, column), shown, "{column}");
        }
    }

    #[test]
    fn network_policies_show_whom_they_select() {
        let policy = |selector: Value| json!({"spec": {"podSelector": selector}});
        let some = json!({"matchLabels": {"a": "b"}, "matchExpressions": [
            {"key": "c", "operator": "In", "values": ["d", "e"]}, {"key": "f", "operator": "DoesNotExist"}]});
        assert_eq!(cell("netpol", &policy(some), "Pod-Selector"), "a=b,c in (d,e),!f");
        assert_eq!(cell("netpol", &policy(json!({})), "Pod-Selector"), "<none>");
    }
}
