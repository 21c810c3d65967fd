//! What the API serves, as clients ask for it before anything else (Kubernetes API concepts, "Discovery API").

use mesh_model::kinds::{KINDS, Kind};
use serde_json::{Value, json};

use crate::api::{access, metrics, tokens};

const VERBS: &[&str] =
    &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];

/// The verbs of a kind, and of each of its subresources.
pub(crate) fn verbs(kind: &Kind) -> Vec<(Option<&'static str>, &'static [&'static str])> {
    let subresources = subresources(kind).into_iter().map(|sub| (Some(sub.name), sub.verbs));
    std::iter::once((None, VERBS)).chain(subresources).collect()
}

/// What is measured, and not stored.
const MEASURED: &[Unstored] = &[
    Unstored { name: "nodes", kind: "NodeMetrics", namespaced: false, verbs: &["get", "list"] },
    Unstored { name: "pods", kind: "PodMetrics", namespaced: true, verbs: &["get", "list"] },
];

struct Unstored {
    name: &'static str,
    kind: &'static str,
    namespaced: bool,
    verbs: &'static [&'static str],
}

/// What a group serves and does not store; nothing for groups of stored kinds.
fn unstored(group: &str, version: &str) -> Vec<Unstored> {
    let copy = |u: &Unstored| Unstored { ..*u };
    let review = |&(name, kind): &(&'static str, &'static str)| Unstored {
        name,
        kind,
        namespaced: false,
        verbs: &["create"],
    };
    match (group, version) {
        (metrics::GROUP, metrics::VERSION) => MEASURED.iter().map(copy).collect(),
        (tokens::GROUP, tokens::VERSION) => tokens::REVIEWS.iter().map(review).collect(),
        (access::GROUP, access::VERSION) => access::REVIEWS.iter().map(review).collect(),
        _ => Vec::new(),
    }
}

/// `/version`.
pub fn version() -> Value {
    json!({
        "major": "1",
        "minor": "36",
        "gitVersion": concat!("v1.36.0+mesh-", env!("CARGO_PKG_VERSION")),
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "",
        "compiler": "rustc",
        "platform": concat!("linux/", "amd64"),
    })
}

/// `/api`: the versions of the core group.
pub fn versions() -> Value {
    json!({
        "kind": "APIVersions",
        "versions": ["v1"],
        "serverAddressByClientCIDRs": [],
    })
}

/// `/apis`: the named groups.
pub fn groups() -> Value {
    let groups: Vec<Value> = named_groups().into_iter().map(|(g, v)| group_entry(g, v)).collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// `/apis/GROUP`; none when the group is not served.
pub fn group(name: &str) -> Option<Value> {
    let (name, version) = named_groups().into_iter().find(|(g, _)| *g == name)?;
    let mut entry = group_entry(name, version);
    entry["kind"] = json!("APIGroup");
    entry["apiVersion"] = json!("v1");
    Some(entry)
}

fn group_entry(name: &str, version: &str) -> Value {
    let version = json!({"groupVersion": format!("{name}/{version}"), "version": version});
    json!({"name": name, "versions": [version], "preferredVersion": version})
}

/// Groups with a name, each with its version, in the order of the kinds.
fn named_groups() -> Vec<(&'static str, &'static str)> {
    let mut groups = Vec::new();
    for kind in KINDS.iter().filter(|k| !k.group.is_empty()) {
        if !groups.contains(&(kind.group, kind.version)) {
            groups.push((kind.group, kind.version));
        }
    }
    groups.push((tokens::GROUP, tokens::VERSION));
    groups.push((access::GROUP, access::VERSION));
    groups.push((metrics::GROUP, metrics::VERSION));
    groups
}

/// `/api/v1` and `/apis/GROUP/VERSION`: the resources of a group; none when it is not served.
pub fn resources(group: &str, version: &str) -> Option<Value> {
    let unstored = unstored(group, version);
    if !unstored.is_empty() {
        let entry = |u: &Unstored| json!({"name": u.name, "singularName": "", "namespaced": u.namespaced, "kind": u.kind, "verbs": u.verbs});
        let resources: Vec<Value> = unstored.iter().map(entry).collect();
        return Some(json!({
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": format!("{group}/{version}"),
            "resources": resources,
        }));
    }
    let kinds: Vec<&Kind> = of(group, version).collect();
    let first = kinds.first()?;
    let resources: Vec<Value> = kinds.iter().flat_map(|kind| legacy_resources(kind)).collect();
    Some(json!({
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": first.api_version(),
        "resources": resources,
    }))
}

fn of<'a>(group: &'a str, version: &'a str) -> impl Iterator<Item = &'static Kind> + 'a {
    KINDS.iter().filter(move |k| k.group == group && k.version == version)
}

fn legacy_resources(kind: &Kind) -> Vec<Value> {
    let mut main = json!({
        "name": kind.plural,
        "singularName": kind.singular,
        "namespaced": kind.namespaced,
        "kind": kind.kind,
        "verbs": VERBS,
    });
    if !kind.short_names.is_empty() {
        main["shortNames"] = json!(kind.short_names);
    }
    if !kind.categories.is_empty() {
        main["categories"] = json!(kind.categories);
    }
    let mut all = vec![main];
    all.extend(subresources(kind).into_iter().map(|sub| {
        let mut entry = json!({
            "name": format!("{}/{}", kind.plural, sub.name),
            "singularName": "",
            "namespaced": kind.namespaced,
            "kind": sub.kind,
            "verbs": sub.verbs,
        });
        if let Some((group, version)) = sub.group_version {
            entry["group"] = json!(group);
            entry["version"] = json!(version);
        }
        entry
    }));
    all
}

struct Subresource {
    name: &'static str,
    kind: &'static str,
    /// Group and version of the kind, where they are not those of the resource.
    group_version: Option<(&'static str, &'static str)>,
    verbs: &'static [&'static str],
}

fn subresources(kind: &Kind) -> Vec<Subresource> {
    let own = |name, kind, verbs| Subresource { name, kind, group_version: None, verbs };
    let mut all = Vec::new();
    if kind.status {
        all.push(own("status", kind.kind, &["get", "patch", "update"]));
    }
    if kind.scale {
        all.push(Subresource {
            group_version: Some(("autoscaling", "v1")),
            ..own("scale", "Scale", &["get", "patch", "update"])
        });
    }
    match kind.kind {
        "Pod" => {
            all.push(own("log", "Pod", &["get"]));
            all.push(own("binding", "Binding", &["create"]));
            all.push(own("ephemeralcontainers", "Pod", &["get", "patch", "update"]));
            all.push(Subresource {
                group_version: Some(("policy", "v1")),
                ..own("eviction", "Eviction", &["create"])
            });
            all.push(own("exec", "PodExecOptions", &["create", "get"]));
            all.push(own("attach", "PodAttachOptions", &["create", "get"]));
            all.push(own("portforward", "PodPortForwardOptions", &["create", "get"]));
        }
        "Node" => {
            all.push(own("proxy", "NodeProxyOptions", &["create", "get"]));
        }
        "ServiceAccount" => all.push(Subresource {
            group_version: Some((tokens::GROUP, tokens::VERSION)),
            ..own("token", "TokenRequest", &["create"])
        }),
        "Namespace" => all.push(own("finalize", "Namespace", &["update"])),
        _ => {}
    }
    all
}

/// The same in one document (`apidiscovery.k8s.io/v2`), for `/api` with `core`, for `/apis` without.
pub fn aggregated(core: bool) -> Value {
    let groups: Vec<(&str, &str)> = if core { vec![("", "v1")] } else { named_groups() };
    let items: Vec<Value> = groups
        .into_iter()
        .map(|(group, version)| {
            let asked = unstored(group, version);
            let asked = asked.iter().map(|u| unstored_resource(group, version, u));
            let resources: Vec<Value> =
                of(group, version).map(aggregated_resource).chain(asked).collect();
            json!({
                "metadata": {"name": group, "creationTimestamp": null},
                "versions": [{"version": version, "resources": resources, "freshness": "Current"}],
            })
        })
        .collect();
    json!({
        "kind": "APIGroupDiscoveryList",
        "apiVersion": "apidiscovery.k8s.io/v2",
        "metadata": {},
        "items": items,
    })
}

fn unstored_resource(group: &str, version: &str, unstored: &Unstored) -> Value {
    json!({
        "resource": unstored.name,
        "responseKind": {"group": group, "version": version, "kind": unstored.kind},
        "scope": if unstored.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": "",
        "verbs": unstored.verbs,
    })
}

fn aggregated_resource(kind: &Kind) -> Value {
    let response = |group: &str, version: &str, kind: &str| json!({"group": group, "version": version, "kind": kind});
    let mut entry = json!({
        "resource": kind.plural,
        "responseKind": response(kind.group, kind.version, kind.kind),
        "scope": if kind.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": kind.singular,
        "verbs": VERBS,
    });
    if !kind.short_names.is_empty() {
        entry["shortNames"] = json!(kind.short_names);
    }
    if !kind.categories.is_empty() {
        entry["categories"] = json!(kind.categories);
    }
    let subresources: Vec<Value> = subresources(kind)
        .into_iter()
        .map(|sub| {
            let (group, version) = sub.group_version.unwrap_or((kind.group, kind.version));
            json!({
                "subresource": sub.name,
                "responseKind": response(group, version, sub.kind),
                "verbs": sub.verbs,
            })
        })
        .collect();
    if !subresources.is_empty() {
        entry["subresources"] = json!(subresources);
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_found_in_both_forms() {
        for kind in KINDS {
            let list = resources(kind.group, kind.version).unwrap();
            let found = list["resources"].as_array().unwrap();
            assert!(found.iter().any(|r| r["name"] == kind.plural && r["kind"] == kind.kind));
            let all = aggregated(kind.group.is_empty());
            let text = all.to_string();
            assert!(text.contains(&format!("\"resource\":\"{}\"", kind.plural)), "{}", kind.plural);
        }
        for sub in ["exec", "attach", "portforward"] {
            let core = resources("", "v1").unwrap();
            let all = core["resources"].as_array().unwrap();
            let found = all.iter().find(|r| r["name"] == format!("pods/{sub}")).unwrap();
            assert_eq!(found["verbs"], json!(["create", "get"]));
        }
        assert_eq!(resources("autoscaling", "v1"), None);
        assert_eq!(group("apps").unwrap()["preferredVersion"]["groupVersion"], "apps/v1");
        assert_eq!(group("autoscaling"), None);
    }

    /// Rows of the first table of docs/API.md: group and version, kinds.
    #[test]
    fn the_kinds_that_are_documented_are_those_that_are_served() {
        let text = include_str!("../../docs/API.md");
        let table = text.split("| Group | Kinds |").nth(1).unwrap().trim_start();
        let rows = table.lines().skip(1).take_while(|line| line.starts_with('|'));
        let cells = rows.map(|row| row.split('|').map(str::trim).collect::<Vec<_>>());
        let mut documented: Vec<(String, &str)> = Vec::new();
        for cells in cells {
            let version = cells[1].trim_start_matches("core ").trim_matches('`').to_owned();
            documented.extend(cells[2].split(", ").map(|kind| (version.clone(), kind)));
        }
        let mut served: Vec<_> = KINDS.iter().map(|kind| (kind.api_version(), kind.kind)).collect();
        documented.sort();
        served.sort();
        assert_eq!(documented, served);
        let count = format!("discovery; {} kinds;", served.len());
        assert!(include_str!("../../README.md").contains(&count), "README: {count}");
    }
}
