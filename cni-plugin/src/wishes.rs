//! What a runtime wants beyond an interface: capability arguments (`runtimeConfig`), `args.cni`, and `CNI_ARGS`, in this order
//! of precedence (CNI conventions).

use serde_json::{Map, Value, json};

use crate::config::NetworkConfig;
use crate::input::{self, Arguments};
use crate::wire::{Bandwidth, Code, Failure, PortMapping, Transport, Wishes};

/// All that is wanted.
pub fn wishes(config: &NetworkConfig, arguments: Arguments) -> Result<Wishes, Failure> {
    let (runtime, args) = (config.object("runtimeConfig")?, config.args()?);
    let mut wishes = Wishes {
        network: config.name.clone(),
        addresses: arguments.addresses,
        mac: arguments.mac,
        ports: runtime.get("portMappings").map_or(Ok(vec![]), ports)?,
        bandwidth: runtime.get("bandwidth").map_or(Ok(Bandwidth::default()), bandwidth)?,
    };
    for source in [args, runtime] {
        if let Some(ips) = source.get("ips").filter(|ips| !ips.is_null()) {
            wishes.addresses = addresses(ips)?;
        }
        if let Some(mac) = source.get("mac").filter(|mac| !mac.is_null()) {
            let text = mac.as_str().ok_or_else(|| wrong("mac", mac))?;
            wishes.mac = Some(input::mac(text).map_err(|_| wrong("mac", mac))?);
        }
    }
    let families = |v4: bool| wishes.addresses.iter().filter(|a| a.is_ipv4() == v4).count();
    if families(true) > 1 || families(false) > 1 {
        return Err(invalid(format!("more than one address of a family: {:?}", wishes.addresses)));
    }
    Ok(wishes)
}

/// The DNS part of a result: what the runtime asks for, in the names of the result.
pub fn dns(config: &NetworkConfig) -> Result<Value, Failure> {
    let runtime = config.object("runtimeConfig")?;
    let asked = runtime.get("dns").map(folded).unwrap_or_default();
    let mut dns = Map::new();
    for (from, to) in [
        ("servers", "nameservers"),
        ("nameservers", "nameservers"),
        ("searches", "search"),
        ("search", "search"),
        ("options", "options"),
        ("domain", "domain"),
    ] {
        let empty = |value: &Value| value.is_null() || value.as_array().is_some_and(Vec::is_empty);
        if let Some(value) = asked.get(from).filter(|value| !empty(value)) {
            dns.insert(to.to_owned(), value.clone());
        }
    }
    Ok(dns.into())
}

fn addresses(ips: &Value) -> Result<Vec<std::net::IpAddr>, Failure> {
    let list = ips.as_array().ok_or_else(|| wrong("ips", ips))?;
    let one = |ip: &Value| input::address(ip.as_str()?);
    list.iter().map(|ip| one(ip).ok_or_else(|| wrong("ips", ip))).collect()
}

fn ports(list: &Value) -> Result<Vec<PortMapping>, Failure> {
    if list.is_null() {
        return Ok(vec![]);
    }
    let list = list.as_array().ok_or_else(|| wrong("portMappings", list))?;
    let published = list.iter().filter(|entry| folded(entry).get("hostport") != Some(&json!(0)));
    published.map(|entry| port(entry).ok_or_else(|| wrong("portMappings", entry))).collect()
}

/// An object with its keys in lower case; nothing of what is none. containerd writes `HostPort` and `IngressRate`, because the libraries
/// of the reference plugins do not distinguish them.
fn folded(value: &Value) -> Map<String, Value> {
    let entries = value.as_object().into_iter().flatten();
    entries.map(|(key, value)| (key.to_ascii_lowercase(), value.clone())).collect()
}

fn port(entry: &Value) -> Option<PortMapping> {
    let entry = folded(entry);
    let number = |key| u16::try_from(entry.get(key)?.as_u64()?).ok().filter(|port| *port > 0);
    let text = |key| match entry.get(key) {
        None | Some(Value::Null) => Some(""),
        Some(value) => value.as_str(),
    };
    let protocol = match text("protocol")?.to_ascii_lowercase().as_str() {
        "" | "tcp" => Transport::Tcp,
        "udp" => Transport::Udp,
        "sctp" => Transport::Sctp,
        _ => return None,
    };
    let host_ip = match text("hostip")? {
        "" => None,
        address => Some(address.parse().ok()?),
    };
    let (host_port, container_port) = (number("hostport")?, number("containerport")?);
    Some(PortMapping { host_port, container_port, protocol, host_ip })
}

fn bandwidth(asked: &Value) -> Result<Bandwidth, Failure> {
    if !asked.is_object() && !asked.is_null() {
        return Err(wrong("bandwidth", asked));
    }
    let keys = folded(asked);
    let amount = |key: &str| match keys.get(key) {
        None | Some(Value::Null) => Ok(0),
        Some(value) => value.as_u64().ok_or_else(|| wrong("bandwidth", asked)),
    };
    Ok(Bandwidth {
        ingress_rate: amount("ingressrate")?,
        ingress_burst: amount("ingressburst")?,
        egress_rate: amount("egressrate")?,
        egress_burst: amount("egressburst")?,
    })
}

fn wrong(key: &str, value: &Value) -> Failure {
    invalid(format!("{key}: {value} makes no sense"))
}

fn invalid(why: String) -> Failure {
    Failure::new(Code::Config, "invalid network configuration", why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    fn with(keys: &str) -> Result<Wishes, Failure> {
        let text = format!(r#"{{"cniVersion":"1.1.0","name":"m",{keys}}}"#);
        let config = config::parse(text.as_bytes()).and_then(NetworkConfig::new)?;
        let arguments = Arguments { mac: Some("02:00:00:00:00:01".into()), ..Arguments::default() };
        wishes(&config, arguments)
    }

    #[test]
    fn the_runtime_comes_before_arguments() {
        let all = r#""args":{"cni":{"mac":"02:00:00:00:00:02","ips":["10.0.0.9"]}}"#;
        let args = with(all).unwrap();
        assert_eq!(args.mac.as_deref(), Some("02:00:00:00:00:02"));
        assert_eq!(args.addresses[0].to_string(), "10.0.0.9");
        let runtime = with(&format!(
            r#"{all},"runtimeConfig":{{"mac":"02:00:00:00:00:03","ips":["10.0.0.8/24","fd00::8/64"]}}"#
        ));
        let runtime = runtime.unwrap();
        assert_eq!(runtime.mac.as_deref(), Some("02:00:00:00:00:03"));
        assert_eq!(runtime.addresses.len(), 2);
    }

    #[test]
    fn ports_and_limits_are_read_as_runtimes_write_them() {
        let conventional = r#""runtimeConfig":{"portMappings":[
                {"hostPort":8080,"containerPort":80,"protocol":"tcp","hostIP":""},
                {"hostPort":53,"containerPort":53,"protocol":"UDP","hostIP":"192.0.2.1"},
                {"hostPort":0,"containerPort":80,"protocol":"tcp"}],
              "bandwidth":{"ingressRate":1000000,"ingressBurst":4294967295}}"#;
        let containerd = r#""runtimeConfig":{"portMappings":[
                {"HostPort":8080,"ContainerPort":80,"Protocol":"tcp","HostIP":""},
                {"HostPort":53,"ContainerPort":53,"Protocol":"udp","HostIP":"192.0.2.1"},
                {"HostPort":0,"ContainerPort":80,"Protocol":"tcp","HostIP":""}],
              "bandwidth":{"IngressRate":1000000,"IngressBurst":4294967295,"EgressRate":0,"EgressBurst":0}}"#;
        for text in [conventional, containerd] {
            let some = with(text).unwrap();
            assert_eq!(some.ports.len(), 2);
            assert_eq!(some.ports[1].protocol, Transport::Udp);
            assert_eq!(some.ports[1].host_ip, Some("192.0.2.1".parse().unwrap()));
            let limits = (some.bandwidth.ingress_rate, some.bandwidth.ingress_burst);
            assert_eq!((limits, some.bandwidth.egress_rate), ((1_000_000, 4_294_967_295), 0));
        }
        for bad in [
            r#""portMappings":[{"hostPort":70000,"containerPort":80}]"#,
            r#""portMappings":[{"hostPort":80}]"#,
            r#""portMappings":[{"hostPort":80,"containerPort":80,"protocol":"icmp"}]"#,
            r#""portMappings":[{"hostPort":80,"containerPort":80,"hostIP":"x"}]"#,
            r#""portMappings":7"#,
            r#""bandwidth":{"ingressRate":-1}"#,
            r#""bandwidth":{"EgressBurst":"1"}"#,
            r#""bandwidth":7"#,
            r#""ips":["x"]"#,
            r#""ips":["10.0.0.1","10.0.0.2"]"#,
            r#""mac":"ff:ff:ff:ff:ff:ff""#,
        ] {
            let failure = with(&format!(r#""runtimeConfig":{{{bad}}}"#)).unwrap_err();
            assert_eq!(failure.code, 7, "{bad}");
        }
    }
}
