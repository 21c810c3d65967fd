//! The environment (specification, section "Parameters").

use std::ffi::OsString;
use std::net::IpAddr;
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

/// What `CNI_ARGS` says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Arguments {
    /// The pod, where both its names are given.
    pub pod: Option<PodName>,
    /// `IP`: addresses to use.
    pub addresses: Vec<IpAddr>,
    /// `MAC`: the address of the interface inside.
    pub mac: Option<String>,
}

/// What `CNI_ARGS` says. Keys that nobody declared are an error unless `IgnoreUnknown` is set.
pub fn arguments(environment: Environment<'_>) -> Result<Arguments, Failure> {
    let text = variable(environment, "CNI_ARGS")?.unwrap_or_default();
    let (mut namespace, mut name, mut unknown, mut ignore) = (None, None, None, false);
    let mut arguments = Arguments::default();
    for pair in text.split(';').filter(|_| !text.is_empty()) {
        let (key, value) = pair
            .split_once('=')
            .filter(|(key, _)| !key.is_empty())
            .ok_or_else(|| wrong(format!("CNI_ARGS: {pair:?} is not KEY=VALUE")))?;
        match key {
            "K8S_POD_NAMESPACE" => namespace = Some(value.to_owned()),
            "K8S_POD_NAME" => name = Some(value.to_owned()),
            "K8S_POD_INFRA_CONTAINER_ID" | "K8S_POD_UID" => {}
            "IP" => {
                for text in value.split(',') {
                    let address = address(text)
                        .ok_or_else(|| wrong(format!("CNI_ARGS: IP {text:?} is no address")))?;
                    arguments.addresses.push(address);
                }
            }
            "MAC" => {
                let why = |why| wrong(format!("CNI_ARGS: {why}"));
                arguments.mac = Some(mac(value).map_err(why)?);
            }
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
    arguments.pod = namespace.zip(name).map(|(namespace, name)| PodName { namespace, name });
    Ok(arguments)
}

/// An address, whose prefix length, if it has one, says nothing: pods' addresses are single ones.
pub(crate) fn address(text: &str) -> Option<IpAddr> {
    text.split('/').next()?.parse().ok()
}

/// A unicast Ethernet address in its usual form; the text says what is wrong with another.
pub(crate) fn mac(text: &str) -> Result<String, String> {
    let parts: Vec<Option<u8>> = text
        .split([':', '-'])
        .map(|p| u8::from_str_radix(p, 16).ok().filter(|_| p.len() == 2 && !p.starts_with('+')))
        .collect();
    let bytes: Option<Vec<u8>> = parts.into_iter().collect();
    match bytes {
        Some(bytes) if bytes.len() == 6 && bytes[0] & 1 == 0 && bytes.iter().any(|b| *b != 0) => {
            let parts: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
            Ok(parts.join(":"))
        }
        _ => Err(format!("MAC {text:?} is not the address of one interface")),
    }
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
        let found = with(&[("CNI_ARGS", containerd)], arguments).unwrap().pod.unwrap();
        assert_eq!((found.namespace.as_str(), found.name.as_str()), ("default", "web"));
        assert_eq!(with(&[("CNI_ARGS", "")], arguments), Ok(Arguments::default()));
        let special =
            with(&[("CNI_ARGS", "IP=10.0.0.7/24,fd00::7;MAC=02-00-00-00-00-AB")], arguments);
        let special = special.unwrap();
        assert_eq!(special.addresses.len(), 2);
        assert_eq!(special.mac.as_deref(), Some("02:00:00:00:00:ab"));
        for bad in [
            "X=y",
            "K8S_POD_NAME",
            "=1",
            "IgnoreUnknown=maybe",
            ";",
            "IP=10.0.0",
            "IP=",
            "MAC=1",
            "MAC=01:00:00:00:00:01",
            "MAC=00:00:00:00:00:00",
            "MAC=+2:00:00:00:00:01",
        ] {
            assert_eq!(with(&[("CNI_ARGS", bad)], arguments).unwrap_err().code, 4, "{bad}");
        }
    }
}
