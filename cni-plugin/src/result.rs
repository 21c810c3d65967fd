//! Results in the version that was asked for (specification, section "Success").

use std::net::IpAddr;

use serde_json::{Map, Value, json};

use crate::version::Version;
use crate::wire::{Attachment, Failure};

/// The result of an ADD. `dns` is what the runtime asked for.
pub fn success(attachment: &Attachment, version: Version, dns: Value) -> Value {
    let host = json!({ "name": attachment.host_interface, "mac": attachment.host_mac });
    let mut pod = json!({
        "name": attachment.interface,
        "mac": attachment.mac,
        "sandbox": attachment.netns,
    });
    if version >= Version::V110 {
        pod["mtu"] = attachment.mtu.into();
    }
    let ips: Vec<Value> = attachment
        .addresses
        .iter()
        .map(|a| {
            let mut ip = Map::new();
            if version < Version::V100 {
                ip.insert("version".into(), if a.address.is_ipv4() { "4" } else { "6" }.into());
            }
            ip.insert("address".into(), host_prefix(a.address).into());
            ip.insert("gateway".into(), a.gateway.to_string().into());
            ip.insert("interface".into(), 1.into());
            ip.into()
        })
        .collect();
    let routes: Vec<Value> = attachment
        .addresses
        .iter()
        .map(|a| {
            let all = if a.address.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
            json!({ "dst": all, "gw": a.gateway.to_string() })
        })
        .collect();
    json!({
        "cniVersion": version.as_str(),
        "interfaces": [host, pod],
        "ips": ips,
        "routes": routes,
        "dns": dns,
    })
}

/// A result in a chain: what the plugins before have made comes first, and indices follow.
pub fn after(previous: Option<&Map<String, Value>>, mut own: Value) -> Value {
    let Some(previous) = previous else { return own };
    let list = |key| previous.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
    let shift = list("interfaces").len();
    for ip in own["ips"].as_array_mut().into_iter().flatten() {
        if let Some(index) = ip["interface"].as_u64() {
            ip["interface"] = (index + shift as u64).into();
        }
    }
    for key in ["interfaces", "ips", "routes"] {
        let mut all = list(key);
        all.extend(own[key].as_array().cloned().unwrap_or_default());
        own[key] = all.into();
    }
    if own["dns"].as_object().is_none_or(Map::is_empty) {
        own["dns"] = previous.get("dns").cloned().unwrap_or_else(|| json!({}));
    }
    own
}

/// An error, in the version of the configuration or, before that is known, in `version`.
pub fn error(failure: &Failure, version: &str) -> Value {
    let mut out = json!({ "cniVersion": version, "code": failure.code, "msg": failure.msg });
    if !failure.details.is_empty() {
        out["details"] = failure.details.as_str().into();
    }
    out
}

/// The answer to VERSION by somebody who speaks `asked`.
pub fn versions(asked: Version) -> Value {
    json!({
        "cniVersion": asked.as_str(),
        "supportedVersions": crate::version::SUPPORTED.map(Version::as_str),
    })
}

fn host_prefix(address: IpAddr) -> String {
    format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Address;

    fn attachment() -> Attachment {
        let address =
            |a: &str, g: &str| Address { address: a.parse().unwrap(), gateway: g.parse().unwrap() };
        Attachment {
            host_interface: "mv1".into(),
            host_mac: "02:00:00:00:00:01".into(),
            interface: "eth0".into(),
            mac: "02:00:00:00:00:02".into(),
            netns: "/run/netns/x".into(),
            mtu: 1420,
            addresses: vec![address("10.244.1.5", "169.254.1.1"), address("fd10::5", "fe80::1")],
        }
    }

    #[test]
    fn each_version_gets_its_own_shape() {
        let new = success(&attachment(), Version::V110, json!({}));
        assert_eq!(new["interfaces"][1]["mtu"], 1420);
        assert_eq!(new["ips"][0]["address"], "10.244.1.5/32");
        assert_eq!(new["ips"][1]["interface"], 1);
        assert_eq!(new["routes"][1]["dst"], "::/0");
        let stable = success(&attachment(), Version::V100, json!({}));
        assert!(stable["interfaces"][1].get("mtu").is_none());
        assert!(stable["ips"][0].get("version").is_none());
        let old = success(&attachment(), Version::V031, json!({}));
        assert_eq!(old["ips"][0]["version"], "4");
        assert_eq!(old["ips"][1]["version"], "6");
        assert_eq!(old["cniVersion"], "0.3.1");
    }

    #[test]
    fn in_a_chain_the_earlier_results_come_first() {
        let before = json!({
            "interfaces": [{"name": "lo"}],
            "ips": [{"address": "127.0.0.1/8", "interface": 0}],
            "dns": {"nameservers": ["192.0.2.53"]},
        });
        let own = success(&attachment(), Version::V100, json!({}));
        let both = after(before.as_object(), own.clone());
        assert_eq!(both["interfaces"][2]["name"], "eth0");
        assert_eq!(both["ips"][1]["interface"], 2);
        assert_eq!(both["routes"].as_array().unwrap().len(), 2);
        assert_eq!(both["dns"]["nameservers"][0], "192.0.2.53");
        assert_eq!(after(None, own.clone()), own);
    }
}
