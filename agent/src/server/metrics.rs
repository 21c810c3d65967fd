//! Figures in the Prometheus text format.

use std::fmt::{Display, Write as _};

use axum::extract::State;
use mesh_overlay::PeerStatus;
use mesh_overlay::paths::PathView;

use super::{Reports, Sources};

/// `GET /metrics`.
pub(super) async fn text(State(reports): State<Reports>) -> String {
    let mut page = Page::default();
    node(&reports.0, &mut page);
    overlay(&reports.0, &mut page).await;
    paths(&reports.0, &mut page);
    programs(&reports.0, &mut page).await;
    flows(&reports.0, &mut page);
    workers(&reports.0, &mut page).await;
    page.0
}

#[derive(Default)]
struct Page(String);

impl Page {
    fn put(&mut self, kind: &str, name: &str, help: &str, values: Vec<(String, f64)>) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in values {
            let _ = writeln!(self.0, "{name}{labels} {value}");
        }
    }

    fn gauge(&mut self, name: &str, help: &str, values: Vec<(String, f64)>) {
        self.put("gauge", name, help, values);
    }

    fn counter(&mut self, name: &str, help: &str, values: Vec<(String, f64)>) {
        self.put("counter", name, help, values);
    }
}

fn label(name: &str, value: impl Display) -> String {
    format!("{{{name}=\"{value}\"}}")
}

fn one(value: f64) -> Vec<(String, f64)> {
    vec![(String::new(), value)]
}

fn count(value: usize) -> Vec<(String, f64)> {
    one(value as f64)
}

fn node(sources: &Sources, page: &mut Page) {
    let standings = sources.board.subscribe().borrow().clone();
    let healthy = standings.iter().map(|(concern, standing)| {
        (label("concern", concern), f64::from(u8::from(standing.failures.is_empty())))
    });
    let help = "Whether a concern of the node is as desired";
    page.gauge("mesh_concern_healthy", help, healthy.collect());
    let Some(desired) = sources.desired.borrow().clone() else { return };
    let snapshot = &desired.snapshot;
    page.gauge(
        "mesh_synced",
        "Whether the API was listed completely",
        count(desired.synced.into()),
    );
    page.gauge("mesh_peers", "Other nodes on the overlay", count(snapshot.peers.len()));
    page.gauge("mesh_frontends", "Service addresses and ports", count(snapshot.frontends.len()));
    page.gauge("mesh_ingress_routes", "Ingress routes", count(snapshot.l7.routes.len()));
    page.gauge("mesh_pods", "Pods of this node", count(snapshot.pods.len()));
}

async fn overlay(sources: &Sources, page: &mut Page) {
    let Ok(status) = sources.overlay.status().await else { return };
    let by_peer = |value: &dyn Fn(&PeerStatus) -> Option<f64>| {
        let values = status.peers.iter().filter_map(|peer| {
            value(peer).map(|value| (label("public_key", peer.public_key), value))
        });
        values.collect::<Vec<_>>()
    };
    let age = by_peer(&|peer| peer.handshake_age().map(|age| age.as_secs_f64()));
    page.gauge("mesh_peer_handshake_age_seconds", "Age of the session with a peer", age);
    let received = by_peer(&|peer| Some(peer.received_bytes as f64));
    page.counter("mesh_peer_received_bytes_total", "Bytes from a peer inside the tunnel", received);
    let sent = by_peer(&|peer| Some(peer.sent_bytes as f64));
    page.counter("mesh_peer_sent_bytes_total", "Bytes to a peer inside the tunnel", sent);
    let drops =
        status.drops.iter().map(|(reason, n)| (label("reason", format!("{reason:?}")), *n as f64));
    let help = "Packets that the user-space engine dropped";
    page.counter("mesh_overlay_drops_total", help, drops.collect());
}

fn paths(sources: &Sources, page: &mut Page) {
    let seen = sources.seen.borrow().clone();
    let serves = |path: &PathView| f64::from(u8::from(path.standing.serves()));
    let by_peer = |value: &dyn Fn(&PathView) -> Option<f64>| {
        let values = seen.paths.iter();
        values.filter_map(|path| Some((label("public_key", path.key), value(path)?))).collect()
    };
    let help = "Whether a peer can be reached, directly or by a relay";
    page.gauge("mesh_path_up", help, by_peer(&|path| Some(serves(path))));
    let relayed = |path: &PathView| Some(f64::from(u8::from(path.via.is_some())));
    page.gauge("mesh_path_relayed", "Whether a peer is reached by a relay", by_peer(&relayed));
    let rtt = |path: &PathView| path.rtt.map(|rtt| rtt.as_secs_f64());
    page.gauge("mesh_path_rtt_seconds", "Smoothed round trip to a peer", by_peer(&rtt));
    let loss = |path: &PathView| Some(f64::from(path.loss_permille) / 1000.0);
    page.gauge(
        "mesh_path_loss_ratio",
        "Echoes of the last seconds without an answer",
        by_peer(&loss),
    );
    let isolated = count(usize::from(seen.isolated));
    page.gauge("mesh_isolated", "Whether no other node is heard at all", isolated);
    let help = "Messages about paths that were malformed or not from an agent";
    page.counter("mesh_path_messages_refused_total", help, one(seen.refused as f64));
}

async fn programs(sources: &Sources, page: &mut Page) {
    let Some(programs) = sources.programs.get().cloned() else { return };
    let read = tokio::task::spawn_blocking(move || {
        (programs.counters(), programs.edge_counters(), programs.pressure())
    });
    let Ok((counters, edge, pressure)) = read.await else { return };
    if let Ok(edge) = edge {
        let packets = edge
            .iter()
            .map(|(reason, counter)| (label("reason", reason.name()), counter.packets as f64));
        let help = "Packets between clients outside and services, by what became of them";
        page.counter("mesh_edge_packets_total", help, packets.collect());
    }
    if let Ok(counters) = counters {
        let packets = counters.iter().map(|(reason, counter)| {
            (label("reason", format!("{reason:?}")), counter.packets as f64)
        });
        let help = "Packets that the eBPF programs counted, by reason";
        page.counter("mesh_program_packets_total", help, packets.collect());
    }
    if let Ok(pressure) = pressure {
        let used = pressure.iter().map(|(map, (used, _))| (label("map", map), *used as f64));
        page.gauge("mesh_map_entries", "Entries of an eBPF map", used.collect());
        let room = pressure.iter().map(|(map, (_, room))| (label("map", map), f64::from(*room)));
        page.gauge("mesh_map_capacity", "Capacity of an eBPF map", room.collect());
    }
}

fn flows(sources: &Sources, page: &mut Page) {
    let tally = sources.flows.tally();
    let all = [("told", tally.told), ("lost", tally.lost), ("limited", tally.limited)];
    let values = all.map(|(outcome, count)| (label("outcome", outcome), count as f64));
    let help =
        "Events of connections and drops: told, lost because they came too fast, or only counted";
    page.counter("mesh_flow_events_total", help, values.to_vec());
}

async fn workers(sources: &Sources, page: &mut Page) {
    if let Ok(status) = sources.dns.get::<mesh_dns::DnsStatus>().await {
        let answers = [
            ("zone", status.zone_answers),
            ("forwarded", status.forwarded),
            ("refused", status.refused),
            ("failed", status.failed),
        ];
        let answers = answers.map(|(kind, n)| (label("kind", kind), n as f64)).to_vec();
        let help = "Questions answered since the DNS worker started";
        page.counter("mesh_dns_answers_total", help, answers);
    }
    if let Ok(status) = sources.ingress.get::<mesh_ingress::Status>().await {
        let uptime = one(status.uptime_secs as f64);
        page.gauge("mesh_ingress_uptime_seconds", "Age of the ingress worker", uptime);
        let backends = count(status.backends.known);
        page.gauge("mesh_ingress_backends", "Backends of all ingress routes", backends);
        let connections = one(status.counts.connections as f64);
        page.counter("mesh_ingress_connections_total", "Client connections accepted", connections);
    }
}
