//! The environment (specification, section "Parameters").

use std::ffi::OsString;
use std::path::PathBuf;

use crate::wire::{Code, Failure, Owner, PodName, check_container, check_interface};

/// Looks up a variable.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// What the plugin is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Make an interface.
    Add,
    /// Remove it.
    Del,
    /// Verify it.
    Check,
    /// Remove what is not listed.
    Gc,
    /// Say whether ADD would work.
    Status,
    /// List the versions.
    Version,
}

impl Command {
    /// The command in `CNI_COMMAND`; nothing when the variable is absent.
    pub fn from_environment(environment: Environment<'_>) -> Result<Option<Self>, Failure> {
        let Some(text) = variable(environment, "CNI_COMMAND")? else { return Ok(None) };
        Ok(Some(match text.as_str() {
            "ADD" => Self::Add,
            "DEL" => Self::Del,
            "CHECK" => Self::Check,
            "GC" => Self::Gc,
            "STATUS" => Self::Status,
            "VERSION" => Self::Version,
            _ => {
                return Err(wrong(format!(
                    "CNI_COMMAND {text:?} is none of ADD, DEL, CHECK, GC, STATUS, VERSION"
                )));
            }
        }))
    }
}

/// The interface and, where the command needs it, the namespace.
pub fn attachment(
    environment: Environment<'_>,
    needs_netns: bool,
) -> Result<(Owner, Option<PathBuf>), Failure> {
    let container = variable(environment, "CNI_CONTAINERID")?;
    let interface = variable(environment, "CNI_IFNAME")?;
    let netns = variable(environment, "CNI_NETNS")?.filter(|path| !path.is_empty());
    let mut missing = vec![];
    for (name, absent) in [
        ("CNI_CONTAINERID", container.is_none()),
        ("CNI_NETNS", needs_netns && netns.is_none()),
        ("CNI_IFNAME", interface.is_none()),
    ] {
        if absent {
            missing.push(name);
        }
    }
    let (Some(container), Some(interface), true) = (container, interface, missing.is_empty())
    else {
        return Err(wrong(format!("missing: {}", missing.join(", "))));
    };
    check_container(&container).map_err(|why| wrong(format!("CNI_CONTAINERID: {why}")))?;
    check_interface(&interface).map_err(|why| wrong(format!("CNI_IFNAME: {why}")))?;
    Ok((Owner { container, interface }, netns.map(PathBuf::from)))
}

/// The pod in `CNI_ARGS`. Keys that nobody declared are an error unless `IgnoreUnknown` is set.
pub fn pod(environment: Environment<'_>) -> Result<Option<PodName>, Failure> {
    let text = variable(environment, "CNI_ARGS")?.unwrap_or_default();
    let (mut namespace, mut name, mut unknown, mut ignore) = (None, None, None, false);
    for pair in text.split(';').filter(|_| !text.is_empty()) {
        let (key, value) = pair
            .split_once('=')
            .filter(|(key, _)| !key.is_empty())
            .ok_or_else(|| wrong(format!("CNI_ARGS: {pair:?} is not KEY=VALUE")))?;
        match key {
            "K8S_POD_NAMESPACE" => namespace = Some(value.to_owned()),
            "K8S_POD_NAME" => name = Some(value.to_owned()),
            "K8S_POD_INFRA_CONTAINER_ID" | "K8S_POD_UID" => {}
            "IgnoreUnknown" => {
                ignore = match value {
                    "1" | "t" | "T" | "true" | "TRUE" | "True" => true,
                    "0" | "f" | "F" | "false" | "FALSE" | "False" => false,
                    _ => return Err(wrong(format!("CNI_ARGS: IgnoreUnknown is {value:?}"))),
                }
            }
            _ => unknown = Some(key),
        }
    }
    if let Some(key) = unknown.filter(|_| !ignore) {
        return Err(wrong(format!("CNI_ARGS: unknown key {key:?} without IgnoreUnknown=1")));
    }
    Ok(namespace.zip(name).map(|(namespace, name)| PodName { namespace, name }))
}

fn variable(environment: Environment<'_>, name: &str) -> Result<Option<String>, Failure> {
    environment(name)
        .map(|value| value.into_string().map_err(|_| wrong(format!("{name} is not UTF-8"))))
        .transpose()
}

fn wrong(details: String) -> Failure {
    Failure::new(Code::Environment, "invalid environment", details)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with<T>(pairs: &[(&str, &str)], read: impl Fn(Environment<'_>) -> T) -> T {
        read(&|name| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| OsString::from(v)))
    }

    #[test]
    fn all_missing_variables_are_named_at_once() {
        let failure = with(&[], |e| attachment(e, true)).unwrap_err();
        assert_eq!(failure.code, 4);
        for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
            assert!(failure.details.contains(name));
        }
        assert!(
            with(&[("CNI_CONTAINERID", "a"), ("CNI_IFNAME", "b")], |e| attachment(e, false))
                .is_ok()
        );
    }

    #[test]
    fn arguments_are_pairs_and_known() {
        let containerd = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;\
                          K8S_POD_INFRA_CONTAINER_ID=abc;X=y";
        let found = with(&[("CNI_ARGS", containerd)], pod).unwrap().unwrap();
        assert_eq!((found.namespace.as_str(), found.name.as_str()), ("default", "web"));
        assert_eq!(with(&[("CNI_ARGS", "")], pod), Ok(None));
        for bad in ["X=y", "K8S_POD_NAME", "=1", "IgnoreUnknown=maybe", ";"] {
            assert_eq!(with(&[("CNI_ARGS", bad)], pod).unwrap_err().code, 4, "{bad}");
        }
    }
}
