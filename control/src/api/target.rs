//! What a path means.

use mesh_model::kinds::{self, KINDS, Kind};

use crate::error::ApiError;

/// Objects, an object, or a part of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// The kind.
    pub(crate) kind: &'static Kind,
    /// The namespace; none for cluster-wide kinds, and for all namespaces.
    pub(crate) ns: Option<String>,
    /// The name; none for a collection.
    pub(crate) name: Option<String>,
    /// The subresource.
    pub(crate) sub: Option<String>,
    /// What follows the subresource, for `proxy`.
    pub(crate) rest: String,
}

/// Parses what follows `/api/v1/` or `/apis/GROUP/VERSION/`.
pub(crate) fn parse(group: &str, version: &str, path: &str) -> Result<Target, ApiError> {
    let mut parts = path.split('/').map(decode);
    let mut next = || parts.next().filter(|part| !part.is_empty());
    let first = next().unwrap_or_default();
    let (ns, plural) = if first == "namespaces" && group.is_empty() {
        let ns = next();
        match next() {
            // namespaces/NAME/pods, but namespaces/NAME/status
            Some(part) if !matches!(part.as_str(), "status" | "finalize") => (ns, part),
            sub => {
                let kind = find(group, version, "namespaces")?;
                return checked(Target { kind, ns: None, name: ns, sub, rest: String::new() });
            }
        }
    } else if first == "namespaces" {
        (next(), next().unwrap_or_default())
    } else {
        (None, first)
    };
    let kind = find(group, version, &plural)?;
    if ns.is_some() && !kind.namespaced {
        return Err(not_served(&format!("{plural} do not belong to a namespace")));
    }
    let (name, sub) = (next(), next());
    let rest = parts.collect::<Vec<_>>().join("/");
    checked(Target { kind, ns, name, sub, rest })
}

fn checked(target: Target) -> Result<Target, ApiError> {
    let kind = target.kind;
    let known = match target.sub.as_deref() {
        None => true,
        Some("status") => kind.status,
        Some("scale") => kind.scale,
        Some("finalize") => kind.kind == "Namespace",
        Some(
            "log"
            | "binding"
            | "ephemeralcontainers"
            | "eviction"
            | "exec"
            | "attach"
            | "portforward",
        ) => kind.kind == "Pod",
        Some("proxy") => kind.kind == "Node",
        Some("token") => kind.kind == "ServiceAccount",
        Some(_) => false,
    };
    if !known {
        let sub = target.sub.unwrap_or_default();
        return Err(not_served(&format!("{} have no subresource {sub:?} here", kind.plural)));
    }
    if !target.rest.is_empty() && target.sub.as_deref() != Some("proxy") {
        return Err(not_served("the path has more parts than any that is served"));
    }
    if target.name.is_some() && kind.namespaced && target.ns.is_none() {
        return Err(not_served(&format!(
            "one of the {} is found at namespaces/NAMESPACE/{}/NAME",
            kind.plural, kind.plural
        )));
    }
    Ok(target)
}

fn find(group: &str, version: &str, plural: &str) -> Result<&'static Kind, ApiError> {
    let group_name = if group.is_empty() { "the core group" } else { group };
    kinds::by_plural(group, version, plural).ok_or_else(|| {
        not_served(&format!("no resource {plural:?} in version {version:?} of {group_name}"))
    })
}

/// Nothing is there; says what is served.
pub(crate) fn not_served(what: &str) -> ApiError {
    let mut groups: Vec<(String, Vec<&str>)> = Vec::new();
    for kind in KINDS {
        let version = kind.api_version();
        match groups.last_mut() {
            Some((last, names)) if *last == version => names.push(kind.kind),
            _ => groups.push((version, vec![kind.kind])),
        }
    }
    let served: Vec<_> =
        groups.iter().map(|(version, names)| format!("{version} {}", names.join(" "))).collect();
    ApiError::NotServed(format!(
        "the server could not find the requested resource: {what}; served kinds: {}",
        served.join("; ")
    ))
}

/// Percent-decoding of one path segment; a segment that is not UTF-8 then matches nothing.
fn decode(part: &str) -> String {
    if !part.contains('%') {
        return part.to_owned();
    }
    let bytes = part.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let hex = |at: usize| bytes.get(at).and_then(|b| char::from(*b).to_digit(16));
        match (bytes[i], hex(i + 1), hex(i + 2)) {
            (b'%', Some(high), Some(low)) => {
                out.push(u8::try_from(high * 16 + low).expect("two hex digits fit a byte"));
                i += 3;
            }
            (byte, ..) => {
                out.push(byte);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show(group: &str, path: &str) -> String {
        match parse(group, "v1", path) {
            Ok(t) => format!(
                "{} {} {} {} {}",
                t.kind.kind,
                t.ns.as_deref().unwrap_or("-"),
                t.name.as_deref().unwrap_or("-"),
                t.sub.as_deref().unwrap_or("-"),
                t.rest
            ),
            Err(error) => error.code().0.to_string(),
        }
    }

    #[test]
    fn paths_mean_what_kubernetes_says() {
        for (path, meaning) in [
            ("namespaces", "Namespace - - - "),
            ("namespaces/x", "Namespace - x - "),
            ("namespaces/x/status", "Namespace - x status "),
            ("namespaces/x/pods", "Pod x - - "),
            ("namespaces/x/pods/p/log", "Pod x p log "),
            ("pods", "Pod - - - "),
            ("nodes/n/proxy/mesh/v1/peers", "Node - n proxy mesh/v1/peers"),
            ("pods/p", "404"),
            ("namespaces/x/nodes", "404"),
            ("namespaces/x/pods/p/exec", "Pod x p exec "),
            ("nodes/n/exec", "404"),
            ("namespaces/x/pods/p/log/more", "404"),
            ("frobs", "404"),
            ("", "404"),
        ] {
            assert_eq!(show("", path), meaning, "{path}");
        }
        assert_eq!(show("apps", "namespaces/x/deployments/d/scale"), "Deployment x d scale ");
        assert_eq!(show("apps", "namespaces/x"), "404");
        assert_eq!(decode("a%2Fb%"), "a/b%");
    }

    #[test]
    fn an_unknown_kind_is_named_with_those_that_are_served() {
        let text = parse("batch", "v1", "namespaces/x/frobs").unwrap_err().to_string();
        assert!(
            text.contains("\"frobs\"") && text.contains("apps/v1 ControllerRevision DaemonSet"),
            "{text}"
        );
    }
}
