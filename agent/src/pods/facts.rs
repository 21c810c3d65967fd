//! What a container may learn about its pod and node: the downward API.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, ObjectFieldSelector, Pod, ResourceFieldSelector};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::quantity;

/// Facts that are not in the pod's manifest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    /// The node's name.
    pub(crate) node_name: String,
    /// The node's addresses.
    pub(crate) host_ips: Vec<IpAddr>,
    /// The pod's addresses.
    pub(crate) pod_ips: Vec<IpAddr>,
    /// The node's CPU in thousandths of a core.
    pub(crate) cpu_millis: i64,
    /// The node's memory.
    pub(crate) memory_bytes: i64,
    /// The disk that the node's pods write to.
    pub(crate) storage_bytes: i64,
    /// Tokens of its service account, for volumes that hold some; or why there is none.
    pub(crate) tokens: super::tokens::Texts,
}

/// A field or resource cannot be shown to a container.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FactError {
    #[error("fieldPath {0:?} is not served")]
    Field(String),
    #[error("resource {0:?} is not served")]
    Resource(String),
    #[error("containerName {0:?} does not exist")]
    Container(String),
    #[error("resource of the container")]
    Quantity(#[source] quantity::InvalidQuantity),
}

/// The value of a `fieldRef`.
pub(crate) fn field(
    pod: &Pod,
    facts: &Facts,
    selector: &ObjectFieldSelector,
) -> Result<String, FactError> {
    let path = selector.field_path.as_str();
    let (meta, spec) = (&pod.metadata, pod.spec.as_ref());
    if let Some((base, key)) = subscript(path) {
        let map = match base {
            "metadata.labels" => &meta.labels,
            "metadata.annotations" => &meta.annotations,
            _ => return Err(FactError::Field(path.to_owned())),
        };
        return Ok(map.as_ref().and_then(|m| m.get(key)).cloned().unwrap_or_default());
    }
    Ok(match path {
        "metadata.name" => meta.name.clone().unwrap_or_default(),
        "metadata.namespace" => meta.namespace.clone().unwrap_or_default(),
        "metadata.uid" => meta.uid.clone().unwrap_or_default(),
        "metadata.labels" => pairs(meta.labels.as_ref()),
        "metadata.annotations" => pairs(meta.annotations.as_ref()),
        "spec.nodeName" => facts.node_name.clone(),
        "spec.serviceAccountName" => spec
            .and_then(|s| s.service_account_name.clone())
            .unwrap_or_else(|| "default".to_owned()),
        "status.hostIP" => first(&facts.host_ips),
        "status.hostIPs" => all(&facts.host_ips),
        "status.podIP" => first(&facts.pod_ips),
        "status.podIPs" => all(&facts.pod_ips),
        _ => return Err(FactError::Field(path.to_owned())),
    })
}

/// `metadata.labels['key']` -> base and key.
fn subscript(path: &str) -> Option<(&str, &str)> {
    let (base, rest) = path.split_once("['")?;
    Some((base, rest.strip_suffix("']")?))
}

fn pairs(map: Option<&BTreeMap<String, String>>) -> String {
    let line = |(key, value): (&String, &String)| format!("{key}={}", quoted(value));
    map.into_iter().flatten().map(line).collect::<Vec<_>>().join("\n")
}

/// As the kubelet quotes a value: in Go's notation, which is what programs read.
fn quoted(value: &str) -> String {
    let mut text = String::from('"');
    for c in value.chars() {
        match c {
            '"' | '\\' => text.extend(['\\', c]),
            '\x07' => text.push_str("\\a"),
            '\x08' => text.push_str("\\b"),
            '\t' => text.push_str("\\t"),
            '\n' => text.push_str("\\n"),
            '\x0b' => text.push_str("\\v"),
            '\x0c' => text.push_str("\\f"),
            '\r' => text.push_str("\\r"),
            _ if is_printable(c) => text.push(c),
            _ => text.push_str(&match u32::from(c) {
                code @ 0..0x80 => format!("\\x{code:02x}"),
                code @ 0x80..0x1_0000 => format!("\\u{code:04x}"),
                code => format!("\\U{code:08x}"),
            }),
        }
    }
    text.push('"');
    text
}

fn is_printable(c: char) -> bool {
    // Marks, such as accents, are only shown as they are behind something else.
    let behind: String = ['a', c].into_iter().collect();
    c == '\'' || behind.escape_debug().count() == 2
}

fn first(ips: &[IpAddr]) -> String {
    ips.first().map(IpAddr::to_string).unwrap_or_default()
}

fn all(ips: &[IpAddr]) -> String {
    ips.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(",")
}

/// The value of a `resourceFieldRef`; a limit that is not set, or zero, is what the node has.
pub(crate) fn resource(
    container: &Container,
    facts: &Facts,
    selector: &ResourceFieldSelector,
) -> Result<String, FactError> {
    let unknown = || FactError::Resource(selector.resource.clone());
    let (side, name) = selector.resource.split_once('.').ok_or_else(unknown)?;
    let resources = container.resources.as_ref();
    let requests = resources.and_then(|r| r.requests.as_ref());
    let limits = resources.and_then(|r| r.limits.as_ref());
    let quantity = match side {
        "limits" => limits.and_then(|l| l.get(name)),
        "requests" => requests.and_then(|r| r.get(name)).or(limits.and_then(|l| l.get(name))),
        _ => return Err(unknown()),
    };
    let divisor = selector.divisor.as_ref().filter(|d| !d.0.is_empty() && d.0 != "0");
    let one = Quantity("1".to_owned());
    let divisor = divisor.unwrap_or(&one);
    let read = if name == "cpu" { quantity::millis } else { quantity::bytes };
    let node = match name {
        "cpu" => facts.cpu_millis,
        "memory" => facts.memory_bytes,
        "ephemeral-storage" => facts.storage_bytes,
        // Nobody gets huge pages without asking.
        _ if name.starts_with("hugepages-") => 0,
        _ => return Err(unknown()),
    };
    let value = quantity.map(read).transpose().map_err(FactError::Quantity)?;
    let value = if side == "limits" { value.filter(|v| *v != 0).or(Some(node)) } else { value };
    let value = value.unwrap_or(0);
    let divisor = read(divisor).map_err(FactError::Quantity)?.max(1);
    Ok((value.div_euclid(divisor) + i64::from(value.rem_euclid(divisor) != 0)).to_string())
}

/// The container that a volume's `resourceFieldRef` names.
pub(crate) fn container<'a>(pod: &'a Pod, name: &str) -> Result<&'a Container, FactError> {
    let spec = pod.spec.as_ref();
    let mut all = spec
        .into_iter()
        .flat_map(|s| s.containers.iter().chain(s.init_containers.iter().flatten()));
    all.find(|c| c.name == name).ok_or_else(|| FactError::Container(name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "web", "namespace": "shop", "uid": "u1", "labels": {"app": "web", "b": "x\"y"}},
            "spec": {"containers": [{"name": "c", "resources": {
                "requests": {"cpu": "250m", "hugepages-2Mi": "4Mi"}, "limits": {"memory": "64Mi"}}},
                {"name": "open", "resources": {"limits": {"cpu": "0", "memory": "0"}}}]}
        }))
        .unwrap()
    }

    fn facts() -> Facts {
        Facts {
            node_name: "node-1".to_owned(),
            host_ips: vec!["192.0.2.1".parse().unwrap()],
            pod_ips: vec!["10.244.1.5".parse().unwrap(), "fd10::5".parse().unwrap()],
            cpu_millis: 2000,
            memory_bytes: 1 << 30,
            storage_bytes: 5 << 30,
            tokens: Default::default(),
        }
    }

    #[test]
    fn fields_are_read_by_path() {
        for (path, expected) in [
            ("metadata.name", "web"),
            ("metadata.labels['app']", "web"),
            ("metadata.labels['none']", ""),
            ("metadata.labels", "app=\"web\"\nb=\"x\\\"y\""),
            ("spec.nodeName", "node-1"),
            ("spec.serviceAccountName", "default"),
            ("status.hostIP", "192.0.2.1"),
            ("status.podIP", "10.244.1.5"),
            ("status.podIPs", "10.244.1.5,fd10::5"),
        ] {
            let selector =
                ObjectFieldSelector { field_path: path.to_owned(), ..Default::default() };
            assert_eq!(field(&pod(), &facts(), &selector).as_deref(), Ok(expected), "{path}");
        }
        let selector =
            ObjectFieldSelector { field_path: "spec.secret".to_owned(), ..Default::default() };
        assert!(field(&pod(), &facts(), &selector).is_err());
    }

    #[test]
    fn values_are_quoted_as_go_reads_them() {
        for (value, expected) in [
            ("it's \"x\" \\", r#""it's \"x\" \\""#),
            ("a\tb\r\n", r#""a\tb\r\n""#),
            ("\x07\x08\x0b\x0c\0\x1b\x7f", r#""\a\b\v\f\x00\x1b\x7f""#),
            (
                "gr\u{fc}n e\u{301} \u{2764}\u{fe0f} \u{1f600}",
                "\"gr\u{fc}n e\u{301} \u{2764}\u{fe0f} \u{1f600}\"",
            ),
            ("\u{200b}\u{a0}\u{e000}\u{e0001}", r#""\u200b\u00a0\ue000\U000e0001""#),
        ] {
            assert_eq!(quoted(value), expected);
        }
    }

    #[test]
    fn resources_are_divided_and_rounded_up() {
        for (name, divisor, expected) in [
            ("requests.cpu", "1m", "250"),
            ("requests.cpu", "1", "1"),
            ("limits.cpu", "1m", "2000"),
            ("limits.memory", "1Mi", "64"),
            ("limits.memory", "", "67108864"),
            ("limits.memory", "1G", "1"),
            ("limits.memory", "0", "67108864"),
            ("requests.memory", "1", "67108864"),
            ("requests.ephemeral-storage", "1", "0"),
            ("requests.hugepages-2Mi", "2Mi", "2"),
        ] {
            assert_eq!(seen("c", name, divisor).as_deref(), Ok(expected), "{name}");
        }
        assert!(seen("c", "limits.pods", "1").is_err());
    }

    #[test]
    fn a_limit_that_is_not_set_is_what_the_node_has() {
        for (container, name, divisor, expected) in [
            ("c", "limits.cpu", "1", "2"),
            ("c", "limits.ephemeral-storage", "1Gi", "5"),
            ("open", "limits.cpu", "1", "2"),
            ("open", "limits.memory", "1Mi", "1024"),
            ("open", "requests.memory", "1Mi", "0"),
            ("open", "limits.hugepages-2Mi", "1", "0"),
        ] {
            assert_eq!(seen(container, name, divisor).as_deref(), Ok(expected), "{name}");
        }
    }

    fn seen(of: &str, name: &str, divisor: &str) -> Result<String, FactError> {
        let pod = pod();
        let selector = ResourceFieldSelector {
            resource: name.to_owned(),
            divisor: Some(Quantity(divisor.to_owned())),
            container_name: None,
        };
        resource(container(&pod, of).unwrap(), &facts(), &selector)
    }
}
