//! The columns of each kind.

use jiff::Timestamp;
use mesh_model::kinds::Kind;
use serde_json::{Value, json};

use super::{pods, sets};

mod batch;

/// A column: its heading, its type, whether it is for `-o wide` only (priority 1), and how its cells are made.
pub(super) struct Column {
    pub(super) name: &'static str,
    pub(super) kind: &'static str,
    pub(super) priority: u8,
    pub(super) cell: fn(&Value, Timestamp) -> Value,
}

const fn text(name: &'static str, cell: fn(&Value, Timestamp) -> Value) -> Column {
    Column { name, kind: "string", priority: 0, cell }
}

const fn number(name: &'static str, cell: fn(&Value, Timestamp) -> Value) -> Column {
    Column { name, kind: "integer", priority: 0, cell }
}

const fn wide(name: &'static str, cell: fn(&Value, Timestamp) -> Value) -> Column {
    Column { name, kind: "string", priority: 1, cell }
}

const NAME: Column = text("Name", |o, _| o["metadata"]["name"].clone());
const AGE: Column = text("Age", |o, now| json!(age(&o["metadata"]["creationTimestamp"], now)));

/// The columns of a kind, the name first.
pub(super) fn columns(kind: &Kind) -> Vec<Column> {
    let mut columns = vec![NAME];
    columns.extend(match kind.kind {
        "Pod" => pods::columns(),
        "Node" => node(),
        "Service" => service(),
        "ControllerRevision" => sets::revision(),
        "DaemonSet" => sets::daemon_set(),
        "Deployment" => deployment(),
        "ReplicaSet" => replica_set(),
        "StatefulSet" => sets::stateful_set(),
        "CronJob" => batch::cron_job(),
        "Job" => batch::job(),
        "Ingress" => ingress(),
        "Event" => return event(),
        "EndpointSlice" => endpoint_slice(),
        "Endpoints" => vec![text("Endpoints", |o, _| places(o)), AGE],
        "Namespace" => vec![text("Status", |o, _| or_none(&o["status"]["phase"])), AGE],
        "ConfigMap" => {
            vec![number("Data", |o, _| json!(size(&o["data"]) + size(&o["binaryData"]))), AGE]
        }
        "Secret" => vec![
            text("Type", |o, _| o["type"].clone()),
            number("Data", |o, _| json!(size(&o["data"]))),
            AGE,
        ],
        "Lease" => vec![text("Holder", |o, _| or_none(&o["spec"]["holderIdentity"])), AGE],
        "IngressClass" => vec![text("Controller", |o, _| or_none(&o["spec"]["controller"])), AGE],
        "NetworkPolicy" => {
            vec![text("Pod-Selector", |o, _| selector(&o["spec"]["podSelector"])), AGE]
        }
        "PodDisruptionBudget" => {
            fn amount(value: &Value) -> Value {
                if value.is_null() {
                    json!("N/A")
                } else {
                    json!(value.to_string().trim_matches('"'))
                }
            }
            vec![
                text("Min Available", |o, _| amount(&o["spec"]["minAvailable"])),
                text("Max Unavailable", |o, _| amount(&o["spec"]["maxUnavailable"])),
                number("Allowed Disruptions", |o, _| {
                    json!(o["status"]["disruptionsAllowed"].as_i64().unwrap_or(0))
                }),
                AGE,
            ]
        }
        _ => vec![AGE],
    });
    columns
}

/// A label selector as kubectl writes it: `a=b,c in (d,e),!f`.
fn selector(selector: &Value) -> Value {
    let equal = selector["matchLabels"].as_object().into_iter().flatten();
    let mut parts: Vec<String> =
        equal.map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default())).collect();
    for requirement in selector["matchExpressions"].as_array().into_iter().flatten() {
        let key = requirement["key"].as_str().unwrap_or_default();
        let values = strings(&requirement["values"], |value| value).join(",");
        parts.push(match requirement["operator"].as_str() {
            Some("In") => format!("{key} in ({values})"),
            Some("NotIn") => format!("{key} notin ({values})"),
            Some("DoesNotExist") => format!("!{key}"),
            _ => key.to_owned(),
        });
    }
    json!(if parts.is_empty() { "<none>".to_owned() } else { parts.join(",") })
}

fn node() -> Vec<Column> {
    fn address(node: &Value, kind: &str) -> Value {
        let addresses = node["status"]["addresses"].as_array().into_iter().flatten();
        let mut found = addresses.filter(|a| a["type"] == kind).map(|a| a["address"].clone());
        found.next().unwrap_or_else(|| json!("<none>"))
    }
    vec![
        text("Status", |o, _| {
            let conditions = o["status"]["conditions"].as_array().into_iter().flatten();
            let ready =
                conditions.clone().find(|c| c["type"] == "Ready").map(|c| c["status"].clone());
            let mut status = match ready.as_ref().and_then(Value::as_str) {
                Some("True") => "Ready".to_owned(),
                Some(_) => "NotReady".to_owned(),
                None => "Unknown".to_owned(),
            };
            if o["spec"]["unschedulable"] == true {
                status.push_str(",SchedulingDisabled");
            }
            json!(status)
        }),
        text("Roles", |o, _| {
            let labels = o["metadata"]["labels"].as_object().into_iter().flatten();
            let roles: Vec<&str> =
                labels.filter_map(|(k, _)| k.strip_prefix("node-role.kubernetes.io/")).collect();
            json!(if roles.is_empty() { "<none>".to_owned() } else { roles.join(",") })
        }),
        AGE,
        text("Version", |o, _| o["status"]["nodeInfo"]["kubeletVersion"].clone()),
        wide("Internal-IP", |o, _| address(o, "InternalIP")),
        wide("External-IP", |o, _| address(o, "ExternalIP")),
        wide("OS-Image", |o, _| or_none(&o["status"]["nodeInfo"]["osImage"])),
        wide("Kernel-Version", |o, _| or_none(&o["status"]["nodeInfo"]["kernelVersion"])),
        wide("Container-Runtime", |o, _| {
            or_none(&o["status"]["nodeInfo"]["containerRuntimeVersion"])
        }),
    ]
}

fn service() -> Vec<Column> {
    vec![
        text("Type", |o, _| o["spec"]["type"].clone()),
        text("Cluster-IP", |o, _| or_none(&o["spec"]["clusterIP"])),
        text("External-IP", |o, _| {
            if o["spec"]["type"] == "ExternalName" {
                return or_none(&o["spec"]["externalName"]);
            }
            let given = |i: &Value| i["ip"].as_str().or(i["hostname"].as_str()).map(str::to_owned);
            let points = o["status"]["loadBalancer"]["ingress"].as_array().into_iter().flatten();
            let mut found: Vec<String> = points.filter_map(given).collect();
            found.extend(strings(&o["spec"]["externalIPs"], |ip| ip));
            match (found.is_empty(), o["spec"]["type"] == "LoadBalancer") {
                (true, true) => json!("<pending>"),
                (true, false) => json!("<none>"),
                (false, _) => json!(found.join(",")),
            }
        }),
        text("Port(s)", |o, _| {
            let ports = o["spec"]["ports"].as_array().into_iter().flatten();
            let ports: Vec<String> = ports
                .map(|p| {
                    let protocol = p["protocol"].as_str().unwrap_or("TCP");
                    match p["nodePort"].as_u64() {
                        Some(node) if node > 0 => format!("{}:{node}/{protocol}", p["port"]),
                        _ => format!("{}/{protocol}", p["port"]),
                    }
                })
                .collect();
            json!(if ports.is_empty() { "<none>".to_owned() } else { ports.join(",") })
        }),
        AGE,
        wide("Selector", |o, _| json!(pairs(&o["spec"]["selector"]))),
    ]
}

fn deployment() -> Vec<Column> {
    vec![
        text("Ready", |o, _| {
            json!(format!(
                "{}/{}",
                count(&o["status"]["readyReplicas"]),
                count(&o["spec"]["replicas"])
            ))
        }),
        number("Up-to-date", |o, _| json!(count(&o["status"]["updatedReplicas"]))),
        number("Available", |o, _| json!(count(&o["status"]["availableReplicas"]))),
        AGE,
        wide("Containers", |o, _| containers(o, "name")),
        wide("Images", |o, _| containers(o, "image")),
        wide("Selector", |o, _| json!(pairs(&o["spec"]["selector"]["matchLabels"]))),
    ]
}

fn replica_set() -> Vec<Column> {
    vec![
        number("Desired", |o, _| json!(count(&o["spec"]["replicas"]))),
        number("Current", |o, _| json!(count(&o["status"]["replicas"]))),
        number("Ready", |o, _| json!(count(&o["status"]["readyReplicas"]))),
        AGE,
        wide("Containers", |o, _| containers(o, "name")),
        wide("Images", |o, _| containers(o, "image")),
        wide("Selector", |o, _| json!(pairs(&o["spec"]["selector"]["matchLabels"]))),
    ]
}

fn ingress() -> Vec<Column> {
    vec![
        text("Class", |o, _| or_none(&o["spec"]["ingressClassName"])),
        text("Hosts", |o, _| {
            let rules = o["spec"]["rules"].as_array().into_iter().flatten();
            let hosts: Vec<&str> = rules.map(|r| r["host"].as_str().unwrap_or("*")).collect();
            json!(if hosts.is_empty() { "*".to_owned() } else { hosts.join(",") })
        }),
        text("Address", |o, _| {
            json!(strings(&o["status"]["loadBalancer"]["ingress"], |i| &i["ip"]).join(","))
        }),
        text("Ports", |o, _| json!(if size(&o["spec"]["tls"]) > 0 { "80, 443" } else { "80" })),
        AGE,
    ]
}

fn event() -> Vec<Column> {
    vec![
        text("Last Seen", |o, now| {
            let times = [&o["series"]["lastObservedTime"], &o["lastTimestamp"], &o["eventTime"]];
            let found = times.into_iter().find(|t| t.is_string());
            json!(age(found.unwrap_or(&o["metadata"]["creationTimestamp"]), now))
        }),
        text("Type", |o, _| o["type"].clone()),
        text("Reason", |o, _| o["reason"].clone()),
        text("Object", |o, _| {
            let object = &o["involvedObject"];
            let part = |field: &str| object[field].as_str().unwrap_or_default().to_owned();
            json!(format!("{}/{}", part("kind").to_lowercase(), part("name")))
        }),
        wide("Source", |o, _| o["source"]["component"].clone()),
        text("Message", |o, _| json!(o["message"].as_str().unwrap_or_default().trim())),
        wide("Count", |o, _| json!(count(&o["count"]))),
        wide("Name", |o, _| o["metadata"]["name"].clone()),
    ]
}

fn endpoint_slice() -> Vec<Column> {
    vec![
        text("AddressType", |o, _| o["addressType"].clone()),
        text("Ports", |o, _| {
            let ports = o["ports"].as_array().into_iter().flatten();
            let ports: Vec<String> = ports.map(|p| p["port"].to_string()).collect();
            json!(if ports.is_empty() { "<unset>".to_owned() } else { ports.join(",") })
        }),
        text("Endpoints", |o, _| {
            let endpoints = o["endpoints"].as_array().into_iter().flatten();
            let all: Vec<String> =
                endpoints.flat_map(|e| strings(&e["addresses"], |a| a)).collect();
            json!(if all.is_empty() { "<unset>".to_owned() } else { first_three(&all) })
        }),
        AGE,
    ]
}

/// Each ready address with each port of its subset, the first three of them.
fn places(endpoints: &Value) -> Value {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let subsets = list(&endpoints["subsets"]);
    if subsets.is_empty() {
        return json!("<none>");
    }
    let mut all = Vec::new();
    for subset in &subsets {
        let ips = strings(&subset["addresses"], |address| &address["ip"]);
        let ports = list(&subset["ports"]);
        if ports.is_empty() {
            all.extend(ips);
            continue;
        }
        for port in &ports {
            all.extend(ips.iter().map(|ip| {
                let host = if ip.contains(':') { format!("[{ip}]") } else { ip.clone() };
                format!("{host}:{}", port["port"])
            }));
        }
    }
    json!(first_three(&all))
}

fn first_three(all: &[String]) -> String {
    match all.len() {
        0..=3 => all.join(","),
        n => format!("{} + {} more...", all[..3].join(","), n - 3),
    }
}

pub(super) fn containers(object: &Value, field: &str) -> Value {
    json!(strings(&object["spec"]["template"]["spec"]["containers"], |c| &c[field]).join(","))
}

fn strings(list: &Value, pick: impl Fn(&Value) -> &Value) -> Vec<String> {
    let items = list.as_array().into_iter().flatten();
    items.filter_map(|item| pick(item).as_str().map(str::to_owned)).collect()
}

pub(super) fn pairs(labels: &Value) -> String {
    let labels = labels.as_object().into_iter().flatten();
    let pairs: Vec<String> =
        labels.map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default())).collect();
    if pairs.is_empty() { "<none>".to_owned() } else { pairs.join(",") }
}

pub(super) fn count(value: &Value) -> i64 {
    value.as_i64().unwrap_or(0)
}

fn size(value: &Value) -> usize {
    value.as_object().map_or(0, serde_json::Map::len) + value.as_array().map_or(0, Vec::len)
}

pub(super) fn or_none(value: &Value) -> Value {
    match value.as_str() {
        Some(text) if !text.is_empty() => json!(text),
        _ => json!("<none>"),
    }
}

pub(super) fn number_column(name: &'static str, cell: fn(&Value, Timestamp) -> Value) -> Column {
    number(name, cell)
}

/// The columns that pods share with other kinds.
pub(super) fn age_column() -> Column {
    AGE
}

pub(super) fn text_column(name: &'static str, cell: fn(&Value, Timestamp) -> Value) -> Column {
    text(name, cell)
}

pub(super) fn wide_column(name: &'static str, cell: fn(&Value, Timestamp) -> Value) -> Column {
    wide(name, cell)
}

/// A time span as kubectl writes it: two units at most, coarser as it grows.
pub(super) fn age(since: &Value, now: Timestamp) -> String {
    let Some(since) = since.as_str().and_then(|t| t.parse::<Timestamp>().ok()) else {
        return "<unknown>".to_owned();
    };
    let seconds = now.duration_since(since).as_secs().max(0);
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    let two = |a: i64, unit: char, b: i64, small: char| match b {
        0 => format!("{a}{unit}"),
        _ => format!("{a}{unit}{b}{small}"),
    };
    match seconds {
        0..120 => format!("{seconds}s"),
        120..600 => two(minutes, 'm', seconds % 60, 's'),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => two(hours, 'h', minutes % 60, 'm'),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => two(days, 'd', hours % 24, 'h'),
        691_200..63_072_000 => format!("{days}d"),
        _ => two(days / 365, 'y', days % 365, 'd'),
    }
}
