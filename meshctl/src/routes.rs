//! `routes`, `services` and `peers`: where a packet or a request goes, as the nodes have it.

use http::Method;
use mesh_model::report::{KeyState, PeerReport, RoutesReport};
use mesh_model::snapshot::{Frontend, HttpRoute, PathMatch};
use serde::Serialize;

use crate::cli::{Global, NodeFilter, Output, Part, PeersArgs, RoutesArgs};
use crate::output::{self, age, bytes};
use crate::source::Source;

/// `meshctl routes`.
pub(crate) async fn routes(global: &Global, args: RoutesArgs) -> anyhow::Result<()> {
    let source = Source::open(global).await?;
    let node = source.one_node(args.filter.node.as_deref()).await?;
    let mut report: RoutesReport = source.ask(&node, Method::GET, "/mesh/v1/routes").await?;
    filter(&mut report, &args);
    let part = args.part;
    let shown = |p: Part| part.is_none_or(|only| only == p);
    output::report(global.output, &report, || {
        let mut blank = "";
        if shown(Part::Ingress) {
            print!("{blank}");
            ingress_table(&report.ingress, global.output);
            blank = "\n";
        }
        if shown(Part::Services) {
            print!("{blank}");
            service_table(&report.services, global.output);
            blank = "\n";
        }
        if shown(Part::Overlay) {
            print!("{blank}");
            overlay_table(&report.overlay);
        }
    })
}

fn filter(report: &mut RoutesReport, args: &RoutesArgs) {
    if let Some(namespace) = &args.filter.namespace {
        report.ingress.retain(|r| r.ingress.namespace == *namespace);
        report.services.retain(|f| f.service.namespace == *namespace);
    }
    if let Some(host) = &args.host {
        report.ingress.retain(|r| applies(r.host.as_deref(), host));
    }
    let only = args.part.or(args.host.as_ref().map(|_| Part::Ingress));
    if only.is_some_and(|p| p != Part::Ingress) {
        report.ingress.clear();
    }
    if only.is_some_and(|p| p != Part::Services) {
        report.services.clear();
    }
    if only.is_some_and(|p| p != Part::Overlay) {
        report.overlay.clear();
    }
}

/// Whether a route's host covers `host` (`*.suffix` stands for one more label).
fn applies(route: Option<&str>, host: &str) -> bool {
    match route {
        None => true,
        Some(exact) if exact.eq_ignore_ascii_case(host) => true,
        Some(wildcard) => wildcard.strip_prefix("*.").is_some_and(|suffix| {
            host.split_once('.').is_some_and(|(_, rest)| rest.eq_ignore_ascii_case(suffix))
        }),
    }
}

fn ingress_table(routes: &[HttpRoute], output: Output) {
    let rows: Vec<Vec<String>> = routes
        .iter()
        .map(|r| {
            let (kind, path) = match &r.path {
                PathMatch::Exact(path) => ("exact", path),
                PathMatch::Prefix(path) => ("prefix", path),
            };
            vec![
                r.host.clone().unwrap_or_else(|| "*".to_owned()),
                format!("{path} ({kind})"),
                format!("{}:{}", r.service, r.port),
                list(r.backends.iter().map(ToString::to_string), output),
                r.ingress.to_string(),
            ]
        })
        .collect();
    output::table(&["HOST", "PATH", "SERVICE", "BACKENDS", "INGRESS"], &rows);
}

fn service_table(frontends: &[Frontend], output: Output) {
    let rows: Vec<Vec<String>> = frontends
        .iter()
        .map(|f| {
            let backends = f.backends.iter().map(|b| std::net::SocketAddr::new(b.address, b.port));
            vec![
                std::net::SocketAddr::new(f.vip, f.port).to_string(),
                f.protocol.to_string(),
                format!("{:?}", f.kind),
                f.service.to_string(),
                list(backends.map(|b| b.to_string()), output),
            ]
        })
        .collect();
    output::table(&["ADDRESS", "PROTOCOL", "KIND", "SERVICE", "BACKENDS"], &rows);
}

fn overlay_table(peers: &[PeerReport]) {
    let rows: Vec<Vec<String>> = peers
        .iter()
        .flat_map(|peer| {
            peer.allowed_ips.iter().map(|block| {
                let node = peer.node.as_ref().map_or("<unknown>".to_owned(), ToString::to_string);
                let mtu = peer.path.mtu.map_or("-".to_owned(), |mtu| mtu.to_string());
                vec![block.to_string(), node, endpoint(peer), path(peer), mtu, nat(peer).to_owned()]
            })
        })
        .collect();
    output::table(&["DESTINATION", "NODE", "ENDPOINT", "PATH", "MTU", "NAT"], &rows);
}

/// Three entries are enough to recognise a list; `-o wide` shows all.
fn list(items: impl Iterator<Item = String>, output: Output) -> String {
    let all: Vec<String> = items.collect();
    match all.len() {
        0 => "<none>".to_owned(),
        n if n > 3 && output != Output::Wide => format!("{} + {} more", all[..3].join(","), n - 3),
        _ => all.join(","),
    }
}

fn endpoint(peer: &PeerReport) -> String {
    peer.endpoint.map_or("<none>".to_owned(), |e| e.to_string())
}

/// `direct`, `relayed via node-3`, `down`, ...
fn path(peer: &PeerReport) -> String {
    match &peer.path.via {
        Some(via) => format!("{} via {via}", peer.path.state),
        None => peer.path.state.to_string(),
    }
}

/// `meshctl services`.
pub(crate) async fn services(global: &Global, args: NodeFilter) -> anyhow::Result<()> {
    let source = Source::open(global).await?;
    let node = source.one_node(args.node.as_deref()).await?;
    let mut services: Vec<Frontend> = source.ask(&node, Method::GET, "/mesh/v1/services").await?;
    if let Some(namespace) = &args.namespace {
        services.retain(|f| f.service.namespace == *namespace);
    }
    output::report(global.output, &services, || service_table(&services, global.output))
}

/// The tunnels of one node.
#[derive(Serialize)]
struct NodePeers {
    node: String,
    peers: Vec<PeerReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// `meshctl peers`. A node that does not answer is a row, not the end of the command.
pub(crate) async fn peers(global: &Global, args: PeersArgs) -> anyhow::Result<()> {
    let source = Source::open(global).await?;
    let mut all = Vec::new();
    for node in source.nodes(args.node.as_deref()).await? {
        let (peers, error) = match source.ask(&node, Method::GET, "/mesh/v1/peers").await {
            Ok(peers) => (peers, None),
            Err(error) => (vec![], Some(format!("{error:#}"))),
        };
        all.push(NodePeers { node: node.name, peers, error });
    }
    output::report(global.output, &all, || {
        let wide = global.output == Output::Wide;
        let rows: Vec<Vec<String>> = all.iter().flat_map(|node| peer_rows(node, wide)).collect();
        let mut headings = vec!["NODE", "PEER", "PATH", "SINCE", "RTT", "LOSS", "ENDPOINT"];
        if wide {
            let wide = [
                "MTU",
                "NAT",
                "KEEPALIVE",
                "HANDSHAKE",
                "RECEIVED",
                "SENT",
                "PSK",
                "KEY",
                "OUR NEXT KEY",
            ];
            headings.extend(wide);
        }
        output::table(&headings, &rows);
    })
}

fn peer_rows(node: &NodePeers, wide: bool) -> Vec<Vec<String>> {
    if let Some(error) = &node.error {
        return vec![vec![node.node.clone(), format!("<no answer: {error}>")]];
    }
    let row = |peer: &PeerReport| {
        let mut row = vec![
            node.node.clone(),
            peer.node.as_ref().map_or("<unknown>".to_owned(), ToString::to_string),
            path(peer),
            age(peer.path.since_secs),
            peer.path.rtt_us.map_or("-".to_owned(), |us| format!("{:.1}ms", us as f64 / 1000.0)),
            format!("{:.1}%", f64::from(peer.path.loss_permille) / 10.0),
            endpoint(peer),
        ];
        if wide {
            let handshake = peer.handshake_age_secs;
            row.extend([
                peer.path.mtu.map_or("-".to_owned(), |mtu| mtu.to_string()),
                nat(peer).to_owned(),
                peer.path.keepalive_secs.map_or("no".to_owned(), |secs| format!("{secs}s")),
                handshake.map_or("never".to_owned(), |s| format!("{} ago", age(s))),
                bytes(peer.received_bytes),
                bytes(peer.sent_bytes),
                key_state(peer.preshared_key).to_owned(),
                keys(peer),
                if peer.knows_next_key { "known" } else { "-" }.to_owned(),
            ]);
        }
        row
    };
    node.peers.iter().map(row).collect()
}

/// Which of the two is behind NAT.
fn nat(peer: &PeerReport) -> &'static str {
    match (peer.path.outside.is_some(), peer.path.translated) {
        (false, false) => "no",
        (true, false) => "node",
        (false, true) => "peer",
        (true, true) => "both",
    }
}

/// The key in use; with the one that takes over behind an arrow.
fn keys(peer: &PeerReport) -> String {
    let keys: Vec<String> = peer.keys.iter().map(ToString::to_string).collect();
    if keys.is_empty() { peer.public_key.to_string() } else { keys.join("->") }
}

fn key_state(state: KeyState) -> &'static str {
    match state {
        KeyState::None => "none",
        KeyState::Pending => "pending",
        KeyState::Agreed => "agreed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_shown_with_its_path() {
        let peer: PeerReport = serde_json::from_value(serde_json::json!({
            "node": "node-2", "publicKey": "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=",
            "endpoint": "192.0.2.3:51901", "allowedIps": [], "handshakeAgeSecs": 7, "receivedBytes": 1, "sentBytes": 2,
            "path": {"state": "relayed", "via": "node-3", "rttUs": 1240, "lossPermille": 5, "sinceSecs": 130,
                "mtu": 1340, "outside": "198.51.100.7:4711", "keepaliveSecs": 25},
        }))
        .unwrap();
        let node = NodePeers { node: "node-1".to_owned(), peers: vec![peer], error: None };
        let rows = peer_rows(&node, false);
        let shown =
            ["node-1", "node-2", "relayed via node-3", "2m", "1.2ms", "0.5%", "192.0.2.3:51901"];
        assert_eq!(rows, [shown]);
        let wide = peer_rows(&node, true);
        assert_eq!(wide[0][7..11], ["1340", "node", "25s", "7s ago"]);
        assert_eq!(wide[0].len(), 16);
    }

    #[test]
    fn a_wildcard_covers_one_label() {
        assert!(applies(None, "a.test"));
        assert!(applies(Some("A.test"), "a.test"));
        assert!(applies(Some("*.test"), "a.test"));
        assert!(!applies(Some("*.test"), "b.a.test"));
        assert!(!applies(Some("*.test"), "test"));
    }
}
