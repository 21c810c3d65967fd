//! Flows as lines.

use std::collections::BTreeMap;
use std::io::Write as _;

use mesh_model::NodeName;
use mesh_model::flow::{Flow, FlowLosses, FlowParty, FlowSide, FlowVerdict};

use super::describe_losses;
use crate::cli::Output;
use crate::output::bytes;

/// Prints one line for each flow; losses go to stderr.
pub(super) struct Printer {
    output: Output,
    losses: BTreeMap<NodeName, FlowLosses>,
    begun: bool,
}

impl Printer {
    pub(super) fn new(output: Output) -> Self {
        Self { output, losses: BTreeMap::new(), begun: false }
    }

    pub(super) fn losses(&mut self, losses: &FlowLosses) {
        for text in describe_losses(self.losses.get(&losses.node), losses) {
            eprintln!("meshctl: {text}");
        }
        self.losses.insert(losses.node.clone(), losses.clone());
    }

    pub(super) fn flow(&mut self, flow: &Flow) -> anyhow::Result<()> {
        let mut stdout = std::io::stdout().lock();
        if self.output == Output::Json {
            writeln!(stdout, "{}", serde_json::to_string(flow)?)?;
            return Ok(());
        }
        if !self.begun {
            self.begun = true;
            writeln!(stdout, "{:<15} {:<12} {:<9} {:<5} FLOW", "TIME", "NODE", "VERDICT", "PROTO")?;
        }
        writeln!(stdout, "{}", text(flow, self.output == Output::Wide))?;
        stdout.flush()?;
        Ok(())
    }
}

/// `12:00:00.000001 node-1      opened    tcp   default/client:40000 -> default/web-1:8080 (default/web)`
pub(crate) fn text(flow: &Flow, wide: bool) -> String {
    let mut text = format!(
        "{:<15} {:<12} {:<9} {:<5} {} {} {}",
        time_of_day(flow.time_us),
        flow.node.to_string(),
        flow.verdict,
        flow.protocol,
        party(&flow.source, wide),
        arrow(flow.side),
        party(&flow.destination, wide),
    );
    if let Some(service) = &flow.service {
        let name = service.name.as_ref().filter(|_| !wide).map(ToString::to_string);
        text += &format!(" (service {})", name.unwrap_or_else(|| service.address.to_string()));
    }
    if let Some(reason) = &flow.reason
        && !(flow.verdict == FlowVerdict::Closed && reason == "finished")
    {
        text += &format!(": {reason}");
    }
    if let Some(stats) = &flow.stats {
        let (sent, received) = (bytes(stats.sent_bytes), bytes(stats.received_bytes));
        let (lasted, rtt) = (millis(stats.duration_us), millis(stats.rtt_us));
        text += &format!(", sent {sent}, received {received} in {lasted}, rtt {rtt}");
        if stats.retransmits > 0 {
            text += &format!(", {} sent again", stats.retransmits);
        }
    }
    if flow.unreported > 0 {
        text += &format!(", and {} more", flow.unreported);
    }
    text
}

/// Who tells it stands where the arrow begins or ends.
fn arrow(side: FlowSide) -> &'static str {
    match side {
        FlowSide::Egress => "->",
        FlowSide::Ingress => "=>",
        FlowSide::Forward => "~>",
    }
}

fn party(party: &FlowParty, wide: bool) -> String {
    let address = || match party.address {
        std::net::IpAddr::V6(v6) if party.port.is_some() => format!("[{v6}]"),
        other => other.to_string(),
    };
    let identity = |identity| format!(" (identity {identity})");
    let name = match &party.pod {
        Some(pod) if wide => {
            format!("{pod}{} {}", party.identity.map_or_else(String::new, identity), address())
        }
        Some(pod) => pod.to_string(),
        None => address(),
    };
    party.port.map_or_else(|| name.clone(), |port| format!("{name}:{port}"))
}

fn millis(micros: u64) -> String {
    format!("{}.{:03} ms", micros / 1000, micros % 1000)
}

/// Of UTC.
pub(crate) fn time_of_day(time_us: u64) -> String {
    let secs = time_us / 1_000_000 % 86_400;
    let (hours, minutes) = (secs / 3600, secs / 60 % 60);
    format!("{hours:02}:{minutes:02}:{:02}.{:06}", secs % 60, time_us % 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_model::ObjectKey;
    use mesh_model::flow::{FlowService, FlowStats};

    fn flow() -> Flow {
        let party = |address: &str, port, pod: Option<&str>| FlowParty {
            address: address.parse().unwrap(),
            port,
            pod: pod.map(|name| ObjectKey::new("default", name)),
            node: None,
            identity: None,
        };
        Flow {
            time_us: 86_400_000_000 + 3_723_000_004,
            node: "node-1".parse().unwrap(),
            verdict: FlowVerdict::Closed,
            side: FlowSide::Egress,
            protocol: "tcp".to_owned(),
            source: party("10.244.1.5", Some(40000), Some("client")),
            destination: party("fd10:244::7", Some(8080), None),
            service: Some(FlowService {
                address: "10.96.0.1:80".parse().unwrap(),
                name: Some(ObjectKey::new("default", "web")),
            }),
            reason: Some("reset".to_owned()),
            stats: Some(FlowStats {
                sent_bytes: 10,
                received_bytes: 2048,
                duration_us: 1500,
                rtt_us: 40,
                retransmits: 2,
            }),
            unreported: 0,
        }
    }

    #[test]
    fn an_ended_connection_in_one_line() {
        let expected = "01:02:03.000004 node-1       closed    tcp   default/client:40000 -> \
             [fd10:244::7]:8080 (service default/web): reset, sent 10 B, received 2.0 KiB in \
             1.500 ms, rtt 0.040 ms, 2 sent again";
        assert_eq!(text(&flow(), false), expected);
        assert!(text(&flow(), true).contains("default/client 10.244.1.5:40000"));
    }

    #[test]
    fn a_dropped_packet_says_why_and_how_many_more() {
        let dropped = Flow {
            verdict: FlowVerdict::Dropped,
            side: FlowSide::Forward,
            service: None,
            stats: None,
            reason: Some("kernel: no_socket".to_owned()),
            unreported: 7,
            ..flow()
        };
        let text = text(&dropped, false);
        assert!(text.ends_with("~> [fd10:244::7]:8080: kernel: no_socket, and 7 more"), "{text}");
    }
}
