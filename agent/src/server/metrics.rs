//! Figures in the Prometheus text format.

use std::fmt::Write as _;

use axum::extract::State;

use super::Reports;

/// `GET /metrics`.
pub(super) async fn text(State(reports): State<Reports>) -> String {
    let sources = &reports.0;
    let mut out = String::new();
    let mut gauge = |name: &str, help: &str, values: Vec<(String, f64)>| {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} gauge");
        for (labels, value) in values {
            let _ = writeln!(out, "{name}{labels} {value}");
        }
    };
    let standings = sources.board.subscribe().borrow().clone();
    let concerns = standings.iter().map(|(concern, standing)| {
        let healthy = f64::from(u8::from(standing.failures.is_empty()));
        (format!("{{concern=\"{concern}\"}}"), healthy)
    });
    gauge(
        "mesh_concern_healthy",
        "Whether a concern of the node is as desired",
        concerns.collect(),
    );
    let desired = sources.desired.borrow().clone();
    if let Some(desired) = &desired {
        let snapshot = &desired.snapshot;
        let one = |value: usize| vec![(String::new(), value as f64)];
        gauge(
            "mesh_synced",
            "Whether the API has been listed completely",
            one(desired.synced.into()),
        );
        gauge("mesh_peers", "Other nodes on the overlay", one(snapshot.peers.len()));
        gauge("mesh_frontends", "Service addresses and ports", one(snapshot.frontends.len()));
        gauge("mesh_ingress_routes", "Ingress routes", one(snapshot.l7.routes.len()));
        gauge("mesh_pods", "Pods of this node", one(snapshot.pods.len()));
    }
    if let Ok(status) = sources.overlay.status().await {
        let by_peer = |value: &dyn Fn(&mesh_overlay::PeerStatus) -> Option<f64>| {
            let peers = status.peers.iter();
            peers
                .filter_map(|peer| {
                    let value = value(peer)?;
                    Some((format!("{{public_key=\"{}\"}}", peer.public_key), value))
                })
                .collect::<Vec<_>>()
        };
        let handshake = by_peer(&|peer| peer.handshake_age().map(|age| age.as_secs_f64()));
        gauge("mesh_peer_handshake_age_seconds", "Age of the session with a peer", handshake);
        let received = by_peer(&|peer| Some(peer.received_bytes as f64));
        gauge("mesh_peer_received_bytes", "Bytes from a peer inside the tunnel", received);
        let sent = by_peer(&|peer| Some(peer.sent_bytes as f64));
        gauge("mesh_peer_sent_bytes", "Bytes to a peer inside the tunnel", sent);
    }
    if let Ok(status) = sources.dns.get::<mesh_dns::DnsStatus>().await {
        let answers = [
            ("zone", status.zone_answers),
            ("forwarded", status.forwarded),
            ("refused", status.refused),
            ("failed", status.failed),
        ];
        let answers = answers.map(|(kind, n)| (format!("{{kind=\"{kind}\"}}"), n as f64)).to_vec();
        gauge("mesh_dns_answers", "Questions answered since the DNS worker started", answers);
    }
    if let Ok(status) = sources.ingress.get::<mesh_ingress::Status>().await {
        let uptime = vec![(String::new(), status.uptime_secs as f64)];
        gauge("mesh_ingress_uptime_seconds", "Age of the ingress worker", uptime);
        let backends = vec![(String::new(), status.backends.known as f64)];
        gauge("mesh_ingress_backends", "Backends of all ingress routes", backends);
    }
    out
}
