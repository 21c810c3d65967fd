//! What the nodes are told before the probe, and asked after it.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use http::Method;
use mesh_model::flow::{FLOWS_PATH, Flow, FlowFilter, FlowLine, FlowQuery};
use mesh_model::report::PeerReport;
use mesh_model::trace::{COLLECT_PATH, MARK_PATH, NodeTrace, TraceCollect, TraceMark, TraceReport};

use crate::flows::read_lines;
use crate::source::{NodeState, Source};

/// An agent that takes longer does not answer: what it is asked here takes it milliseconds.
const ANSWER: Duration = Duration::from_secs(4);
/// Clocks of nodes may differ that much.
const CLOCKS_US: u64 = 5_000_000;

/// The nodes, and the mark of the probe.
pub(super) struct Gatherer<'g> {
    pub(super) source: &'g Source,
    pub(super) nodes: &'g [NodeState],
    pub(super) mark: &'g TraceMark,
}

impl Gatherer<'_> {
    /// Tells all nodes of the probe. Returns those that do not answer.
    pub(super) async fn mark(&self) -> Vec<String> {
        let tell = self.nodes.iter().map(|node| async {
            let told = self.source.tell::<()>(node, MARK_PATH, self.mark);
            let told = tokio::time::timeout(ANSWER, told).await;
            (!matches!(told, Ok(Ok(())))).then(|| node.name.clone())
        });
        futures_util::future::join_all(tell).await.into_iter().flatten().collect()
    }

    /// What all nodes that answer have decided about the probe, and know of where it went.
    pub(super) async fn collect(&self, target: Option<IpAddr>) -> Vec<NodeTrace> {
        let asked = TraceCollect { mark: self.mark.clone(), target };
        let ask = self.nodes.iter().map(|node| async {
            let told = self.source.tell(node, COLLECT_PATH, &asked);
            tokio::time::timeout(ANSWER, told).await.ok()?.ok()
        });
        futures_util::future::join_all(ask).await.into_iter().flatten().collect()
    }

    /// What nodes tell of the connection. A node that does not answer has nothing to tell; that shows in the facts.
    pub(super) async fn flows(&self, report: &TraceReport) -> Vec<Flow> {
        let Some(own) = report.source else { return vec![] };
        let protocol = Some(self.mark.protocol.to_string());
        let query = FlowQuery {
            filter: FlowFilter { protocol, ..FlowFilter::default() },
            ..FlowQuery::default()
        };
        let ask = self.nodes.iter().map(|node| async {
            let told = async {
                let stream = self.source.stream(node, FLOWS_PATH, &query).await?;
                let mut flows = vec![];
                read_lines(stream, async |line| {
                    if let FlowLine::Flow(flow) = line {
                        flows.push(*flow);
                    }
                    true
                })
                .await?;
                Ok::<_, anyhow::Error>(flows)
            };
            tokio::time::timeout(ANSWER, told).await.ok()?.ok()
        });
        let answers = futures_util::future::join_all(ask).await;
        let all = answers.into_iter().flatten().flatten();
        let mut flows: Vec<Flow> = all.filter(|flow| is_of(flow, report, own)).collect();
        flows.sort_by_key(|flow| flow.time_us);
        flows
    }

    /// The tunnels of a node.
    pub(super) async fn peers(&self, node: &NodeState) -> Vec<PeerReport> {
        let asked = self.source.ask(node, Method::GET, "/mesh/v1/peers");
        tokio::time::timeout(ANSWER, asked).await.ok().and_then(Result::ok).unwrap_or_default()
    }
}

/// By the probe's own port, at its time; the answers' packets go the other way.
fn is_of(flow: &Flow, report: &TraceReport, own: SocketAddr) -> bool {
    let after = flow.time_us + CLOCKS_US >= report.begun_us;
    let here = flow.node == report.node;
    let on_time = if here { flow.time_us + 1000 >= report.begun_us } else { after };
    let ports = [flow.source.port, flow.destination.port];
    on_time && ports.contains(&Some(own.port()))
}
