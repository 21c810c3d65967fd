//! A probe from a client outside: it comes in to one node as if the client had sent it, and goes on for real.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, ensure};
use mesh_model::snapshot::Protocol;
use mesh_model::trace::{Entered, OUTSIDE_PATH, OutsideQuery, OutsideReport, TraceMark, TraceStep};
use serde_json::Value;

use super::gather::Gatherer;
use super::judge::{Verdict, fault};
use super::order::{enters, leaves, order};
use super::{ANSWER, TOLD, Trace, key, some_port};
use crate::cli::TraceArgs;
use crate::connect::Api;
use crate::source::Source;

/// Sends it and tells what became of it.
pub(super) async fn run(
    source: &Source,
    api: &Api,
    args: &TraceArgs,
    client: IpAddr,
) -> anyhow::Result<Trace> {
    ensure!(args.bytes == 0, "--bytes is for probes from a pod");
    let entry = source.one_node(args.via.as_deref()).await?;
    let destination = destination(api, args, client, &entry.name).await?;
    let nodes = source.nodes(None).await?;
    let own = SocketAddr::new(client, some_port());
    let mark = TraceMark { ends: vec![own], protocol: args.protocol() };
    let gatherer = Gatherer { source, nodes: &nodes, mark: &mark };
    let silent = gatherer.mark().await;
    let query = OutsideQuery { source: own, destination, protocol: args.protocol() };
    let asked = source.tell(&entry, OUTSIDE_PATH, &query);
    let report: OutsideReport =
        tokio::time::timeout(ANSWER, asked).await.context("the agent does not answer")??;
    tokio::time::sleep(TOLD).await;
    let timeline = order(&gatherer.collect(None).await);
    let verdict = judge(&report, destination, &timeline, &silent);
    let reached = timeline.iter().find_map(|step| step.chosen);
    let (report, outside, flows) = (None, Some(report), vec![]);
    Ok(Trace { report, outside, timeline, flows, reached, silent, verdict })
}

/// An address and port, or what clients outside use of a service: `web:80`, `svc/web`, `shop/web:80`.
async fn destination(
    api: &Api,
    args: &TraceArgs,
    client: IpAddr,
    entry: &str,
) -> anyhow::Result<SocketAddr> {
    let text = &args.destination;
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) => {
            let port = port.parse().with_context(|| format!("{port:?} is no port"))?;
            (name, Some(port))
        }
        None => (text.as_str(), None),
    };
    let name = key(api, args, name.strip_prefix("svc/").unwrap_or(name));
    let path = format!("/api/v1/namespaces/{}/services/{}", name.namespace, name.name);
    let service = api.read(&path).await?;
    let node = api.read(&format!("/api/v1/nodes/{entry}")).await?;
    let found = frontend(&service, &node, client, port, args.protocol());
    found.with_context(|| {
        format!("service {name} has no address for {client} on {entry}: is it of type ClusterIP?")
    })
}

/// The load balancer's or an external address, or the port on the node.
fn frontend(
    service: &Value,
    node: &Value,
    client: IpAddr,
    port: Option<u16>,
    protocol: Protocol,
) -> Option<SocketAddr> {
    let spec = &service["spec"];
    let wanted = |entry: &&Value| {
        let same = entry["protocol"].as_str().unwrap_or("TCP") == protocol.to_string();
        same && port.is_none_or(|port| entry["port"] == port)
    };
    let entry = spec["ports"].as_array()?.iter().find(wanted)?;
    let number = |name: &str| u16::try_from(entry[name].as_u64()?).ok();
    let fits = |text: &str| {
        let address: IpAddr = text.parse().ok()?;
        (address.is_ipv4() == client.is_ipv4()).then_some(address)
    };
    let given = service["status"]["loadBalancer"]["ingress"].as_array().into_iter().flatten();
    let given = given.filter_map(|point| point["ip"].as_str());
    let external = spec["externalIPs"].as_array().into_iter().flatten().filter_map(Value::as_str);
    if let Some(address) = given.chain(external).find_map(fits) {
        return Some(SocketAddr::new(address, number("port")?));
    }
    let own = node["status"]["addresses"].as_array()?.iter();
    let internal = own.filter(|address| address["type"] == "InternalIP");
    let address = internal.filter_map(|address| address["address"].as_str()).find_map(fits)?;
    Some(SocketAddr::new(address, number("nodePort")?))
}

/// Decisions by which an answer is on its way to the client.
const ANSWERED: [&str; 3] = ["edge_pod_to_client", "edge_host_to_client", "edge_node_to_client"];
/// Decisions by which it is where it was to go.
const DELIVERED: [&str; 4] =
    ["edge_client_to_pod", "edge_node_to_pod", "edge_client_to_host", "edge_node_to_host"];

/// The first fault on the way, or that there is none.
fn judge(
    report: &OutsideReport,
    destination: SocketAddr,
    timeline: &[TraceStep],
    silent: &[String],
) -> Verdict {
    let node = &report.node;
    let made = |words: &[&str], forth: bool| {
        let is_it =
            |step: &&TraceStep| step.forth == forth && words.contains(&step.decision.as_str());
        timeline.iter().find(is_it)
    };
    if let Some(step) = made(&ANSWERED, false) {
        let detail = format!("{} sent the answer to the client", step.node);
        return Verdict { ok: true, fault: "none", detail };
    }
    if let Some(step) = timeline.iter().find(|step| step.dropped) {
        return ended(step, destination);
    }
    if report.service.is_none() && report.entered == Entered::ToStack {
        let text = format!("no service has {destination} on {node}: the node itself got it");
        return fault("noService", text);
    }
    let came = |step: &TraceStep| step.forth && leaves(step);
    if timeline.iter().any(|step| step.forth && enters(step)) && !timeline.iter().any(came) {
        let text = match silent {
            [] => format!("it left {node} for another node and did not come out there"),
            silent => format!("it left {node}; the agents of {} do not answer", silent.join(", ")),
        };
        return fault("lostBetween", text);
    }
    match made(&DELIVERED, true) {
        Some(step) => fault("lost", format!("{} delivered it, and no answer came", step.node)),
        None if timeline.is_empty() => {
            fault("agentSilent", format!("{node} told nothing about it"))
        }
        None => fault("lost", "nobody dropped it, and nobody delivered it"),
    }
}

/// Why it ended there.
fn ended(step: &TraceStep, destination: SocketAddr) -> Verdict {
    let (node, detail) = (&step.node, &step.detail);
    match step.decision.as_str() {
        "edge_no_backend" => {
            fault("noEndpoints", format!("{node} refused it: nobody serves {destination}"))
        }
        "edge_not_here" => {
            let text = format!("{node} has no backend, and traffic is to stay on the node");
            fault("noLocalEndpoints", text)
        }
        "edge_not_allowed" => {
            let text = format!("the client is in none of the service's ranges, on {node}");
            fault("clientNotAllowed", text)
        }
        "policy_ingress" => {
            fault("policyIngress", format!("a policy lets it not in, on {node}: {detail}"))
        }
        "kernel: no_socket" => {
            let port = step.destination.port();
            fault("notListening", format!("nobody listens on port {port}, on {node}"))
        }
        "kernel: netfilter_drop" => {
            fault("hostFirewall", format!("a firewall rule of {node} dropped it"))
        }
        other => fault("dropped", format!("{node} dropped it in {}: {other}", step.hook.name())),
    }
}

#[cfg(test)]
mod tests {
    use mesh_model::ObjectKey;
    use mesh_model::trace::StepHook;
    use serde_json::json;

    use super::super::order::tests::step;
    use super::*;

    fn found(service: &Value, client: &str, port: Option<u16>) -> Option<String> {
        let addresses =
            [("Hostname", "n1"), ("InternalIP", "192.0.2.1"), ("InternalIP", "2001:db8::1")];
        let addresses = addresses.map(|(kind, address)| json!({"type": kind, "address": address}));
        let node = json!({"status": {"addresses": addresses}});
        let client = client.parse().unwrap();
        frontend(service, &node, client, port, Protocol::Tcp).map(|f| f.to_string())
    }

    #[test]
    fn a_client_uses_the_load_balancers_address_or_the_nodes() {
        let ports = json!([{"port": 53, "protocol": "UDP", "nodePort": 30053},
                           {"port": 80, "nodePort": 30080}, {"port": 443, "nodePort": 30443}]);
        let mut service = json!({"spec": {"ports": ports}});
        assert_eq!(found(&service, "192.0.2.7", None).unwrap(), "192.0.2.1:30080");
        assert_eq!(found(&service, "2001:db8::7", Some(443)).unwrap(), "[2001:db8::1]:30443");
        assert_eq!(found(&service, "192.0.2.7", Some(53)), None, "that is of UDP");
        service["status"] = json!({"loadBalancer": {"ingress": [{"ip": "203.0.113.7"}]}});
        assert_eq!(found(&service, "192.0.2.7", None).unwrap(), "203.0.113.7:80");
        assert_eq!(found(&service, "2001:db8::7", None).unwrap(), "[2001:db8::1]:30080");
        service["spec"]["ports"] = json!([{"port": 80}]);
        assert_eq!(found(&service, "2001:db8::7", None), None, "there is no node port");
    }

    fn word(entered: Entered, steps: &[TraceStep]) -> &'static str {
        let service = (entered != Entered::ToStack).then(|| ObjectKey::new("default", "web"));
        let node = "a".parse().unwrap();
        let report = OutsideReport { node, service, backends: vec![], entered };
        let verdict = judge(&report, "192.0.2.1:30080".parse().unwrap(), steps, &[]);
        assert_eq!(verdict.ok, verdict.fault == "none");
        verdict.fault
    }

    #[test]
    fn the_first_fault_on_the_way_is_named() {
        use StepHook::{FromOverlay, FromPod, FromUplink};
        let seen = step("a", 1, FromUplink, true, "seen");
        let over = step("a", 2, FromUplink, true, "edge_client_to_node");
        let came = step("b", 3, FromOverlay, true, "seen");
        let there = step("b", 4, FromOverlay, true, "edge_node_to_pod");
        let back = step("b", 5, FromPod, false, "edge_pod_to_node");
        let out = step("a", 6, FromOverlay, false, "edge_node_to_client");
        let all = [seen.clone(), over, came, there, back, out];
        assert_eq!(word(Entered::ToNode, &all), "none");
        assert_eq!(word(Entered::ToNode, &all[..4]), "lost");
        assert_eq!(word(Entered::ToNode, &all[..2]), "lostBetween");
        assert_eq!(word(Entered::ToStack, &all[..1]), "noService");
        assert_eq!(word(Entered::Ended, &[]), "agentSilent");
        for (decision, fault) in [
            ("edge_no_backend", "noEndpoints"),
            ("edge_not_here", "noLocalEndpoints"),
            ("edge_not_allowed", "clientNotAllowed"),
            ("policy_ingress", "policyIngress"),
            ("kernel: no_socket", "notListening"),
            ("edge_loopback", "dropped"),
        ] {
            let mut end = step("a", 2, FromUplink, true, decision);
            end.dropped = true;
            assert_eq!(word(Entered::Ended, &[seen.clone(), end]), fault);
        }
    }
}
