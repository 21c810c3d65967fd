//! `why`: whether network policy lets one pod speak to another, and which rule says so.
//!
//! Asks no node: the policies are compiled here, as an agent compiles them, from what the API has.

use std::net::IpAddr;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::Service;
use mesh_model::policy::{End, Opinion, why as judge};
use mesh_model::snapshot::Protocol;
use mesh_model::{ObjectKey, Objects};
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::cli::{Global, Output, WhyArgs};
use crate::connect::Api;
use crate::output;

/// Exit status when policy denies it.
const DENIED: u8 = 3;

/// `meshctl why`.
pub(crate) async fn why(global: &Global, args: WhyArgs) -> anyhow::Result<ExitCode> {
    let api = Api::connect(global).await?;
    let namespace = api.namespace(args.namespace.as_deref()).to_owned();
    let (from, none) = end(&args.from, &namespace)?;
    if none.is_some() {
        bail!("{:?}: the port belongs to the destination", args.from);
    }
    let (to, port) = end(&args.to, &namespace)?;
    let protocol = match (&args.protocol, port) {
        (None, None) => None,
        (given, Some(_)) => Some(protocol(given.as_deref())?),
        (Some(given), None) => bail!("{given} needs a port: give DST:PORT"),
    };
    if let End::Address(address) = to
        && let Some(service) = service_at(&list(&api, "/api/v1/services").await?, address)
    {
        bail!(
            "{address} is an address of Service {service}: policies are asked about the pod that a connection goes to; name one of them"
        );
    }
    let objects = objects(&api).await?;
    let answer = judge(&objects, &from, &to, protocol, port.unwrap_or(0))?;
    let passes = answer.iter().all(|opinion| opinion.passes);
    print(global.output, &answer, passes)?;
    Ok(if passes { ExitCode::SUCCESS } else { ExitCode::from(DENIED) })
}

fn print(output: Output, answer: &[Opinion; 2], passes: bool) -> anyhow::Result<()> {
    let [egress, ingress] = answer;
    let one = |opinion: &Opinion| json!({"passes": opinion.passes, "reason": opinion.reason});
    let value = json!({"passes": passes, "egress": one(egress), "ingress": one(ingress)});
    output::report(output, &value, || {
        let word = |passes| if passes { "passes" } else { "denied" };
        println!("{}", word(passes));
        for (side, opinion) in [("egress", egress), ("ingress", ingress)] {
            println!("  {side}: {}: {}", word(opinion.passes), opinion.reason);
        }
    })
}

async fn objects(api: &Api) -> anyhow::Result<Objects> {
    Ok(Objects {
        nodes: list(api, "/api/v1/nodes").await?,
        namespaces: list(api, "/api/v1/namespaces").await?,
        cluster_pods: list(api, "/api/v1/pods").await?,
        network_policies: list(api, "/apis/networking.k8s.io/v1/networkpolicies").await?,
        ..Objects::default()
    })
}

/// The Service that a client means by an address. It never gets to a policy: the connection goes to a backend before.
fn service_at(services: &[Arc<Service>], address: IpAddr) -> Option<ObjectKey> {
    let has = |service: &&Arc<Service>| {
        let given = service.spec.iter().flat_map(|spec| spec.cluster_ips.iter().flatten());
        let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
        let balanced = balancer.iter().flat_map(|b| b.ingress.iter().flatten());
        let balanced = balanced.filter_map(|ingress| ingress.ip.as_ref());
        given.chain(balanced).any(|text| text.parse() == Ok(address))
    };
    let found = &services.iter().find(has)?.metadata;
    Some(ObjectKey::new(found.namespace.clone()?, found.name.clone()?))
}

async fn list<T: DeserializeOwned>(api: &Api, path: &str) -> anyhow::Result<Vec<Arc<T>>> {
    let mut answer = api.read(path).await?;
    let items = answer["items"].as_array_mut().map(std::mem::take).unwrap_or_default();
    let parse = |item| serde_json::from_value(item).map(Arc::new);
    items.into_iter().map(parse).collect::<Result<_, _>>().with_context(|| format!("decode {path}"))
}

fn protocol(text: Option<&str>) -> anyhow::Result<Protocol> {
    let upper = text.map(str::to_uppercase);
    Protocol::parse(upper.as_deref()).context("--protocol is TCP, UDP or SCTP")
}

/// `POD`, `NAMESPACE/POD` or an address, each perhaps with `:PORT`; IPv6 with a port in brackets.
fn end(text: &str, namespace: &str) -> anyhow::Result<(End, Option<u16>)> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok((End::Address(address), None));
    }
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) => {
            let port = port.parse().with_context(|| format!("{text:?}: not a port: {port:?}"))?;
            (name, Some(port))
        }
        None => (text, None),
    };
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    if let Ok(address) = bare.parse::<IpAddr>() {
        return Ok((End::Address(address), port));
    }
    let (namespace, name) = name.split_once('/').unwrap_or((namespace, name));
    if name.is_empty() || namespace.is_empty() {
        bail!("{text:?} is neither a pod nor an address");
    }
    Ok((End::Pod(ObjectKey::new(namespace, name)), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_services_are_known() {
        let web = json!({"metadata": {"namespace": "shop", "name": "web"},
            "spec": {"clusterIPs": ["10.96.0.7", "fd10:96::7"]},
            "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.200"}, {"hostname": "a.example"}]}}});
        let headless = json!({"metadata": {"namespace": "shop", "name": "db"}, "spec": {"clusterIPs": ["None"]}});
        let all = [headless, web].map(|value| Arc::new(serde_json::from_value(value).unwrap()));
        let at = |text: &str| service_at(&all, text.parse().unwrap()).map(|key| key.to_string());
        for address in ["10.96.0.7", "fd10:96::7", "192.0.2.200"] {
            assert_eq!(at(address).as_deref(), Some("shop/web"), "{address}");
        }
        assert_eq!(at("10.96.0.8"), None);
    }

    #[test]
    fn ends_are_pods_or_addresses() {
        let pod = |namespace, name| End::Pod(ObjectKey::new(namespace, name));
        let address = |text: &str| End::Address(text.parse().unwrap());
        for (text, expected) in [
            ("web", (pod("default", "web"), None)),
            ("shop/web:80", (pod("shop", "web"), Some(80))),
            ("10.244.1.5:53", (address("10.244.1.5"), Some(53))),
            ("fd10::5", (address("fd10::5"), None)),
            ("[fd10::5]:443", (address("fd10::5"), Some(443))),
        ] {
            assert_eq!(end(text, "default").unwrap(), expected, "{text}");
        }
        for bad in ["web:http", "", "/web", "shop/"] {
            assert!(end(bad, "default").is_err(), "{bad}");
        }
        assert_eq!(protocol(Some("udp")).unwrap(), Protocol::Udp);
        assert!(protocol(Some("icmp")).is_err());
    }
}
