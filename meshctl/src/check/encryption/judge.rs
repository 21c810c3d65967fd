//! What was seen, and what follows from it. Pure.

use std::collections::BTreeSet;

use mesh_model::encryption::{Bare, Findings, Readable, Sent, Tag, Watching};
use serde::Serialize;

use super::Said;
use super::plan::{Family, Flow, Plan};
use crate::source::NodeState;

/// What the nodes said.
pub(super) struct Evidence {
    pub(super) watching: Said<Watching>,
    pub(super) sent: Said<Sent>,
    pub(super) findings: Said<Findings>,
}

/// What can be said of a pair of nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Outcome {
    /// All canaries arrived, and nobody could read one.
    Ok,
    /// Something could be read.
    Plaintext,
    /// Nothing was read, but the check is not whole.
    Unknown,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::Plaintext => "PLAINTEXT",
            Self::Unknown => "could not tell",
        })
    }
}

/// One direction between two nodes, in one family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Verdict {
    pub(super) from: String,
    pub(super) to: String,
    pub(super) family: Family,
    pub(super) outcome: Outcome,
    /// Canaries that were to be sent, and those that arrived.
    pub(super) canaries: usize,
    pub(super) arrived: usize,
    pub(super) detail: String,
}

/// A verdict for each pair and family.
pub(super) fn judge(nodes: &[NodeState], plan: &Plan, evidence: &Evidence) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for from in nodes {
        for to in nodes.iter().filter(|to| plan.has(&from.name, &to.name)) {
            for family in Family::ALL {
                let pair = Pair::new(&from.name, &to.name, family, plan, evidence);
                verdicts.extend(pair.verdict());
            }
        }
    }
    verdicts
}

struct Pair<'e> {
    from: &'e str,
    to: &'e str,
    family: Family,
    flows: Vec<&'e Flow>,
    plan: &'e Plan,
    evidence: &'e Evidence,
}

impl<'e> Pair<'e> {
    fn new(
        from: &'e str,
        to: &'e str,
        family: Family,
        plan: &'e Plan,
        evidence: &'e Evidence,
    ) -> Self {
        let is_ours = |f: &&Flow| f.from == from && f.to == to && f.family == family;
        let flows = plan.flows.iter().filter(is_ours).collect();
        Self { from, to, family, flows, plan, evidence }
    }

    /// Nothing when the nodes have no addresses of this family.
    fn verdict(&self) -> Option<Verdict> {
        let able = [self.from, self.to].map(|node| self.watching(node).is_some());
        let (outcome, detail) = match self.readable().or_else(|| self.bare()) {
            Some(detail) => (Outcome::Plaintext, detail),
            None if self.flows.is_empty() && able == [true, true] => return None,
            None => match self.doubt() {
                Some(why) => (Outcome::Unknown, why),
                None => (Outcome::Ok, self.summary()),
            },
        };
        Some(Verdict {
            from: self.from.to_owned(),
            to: self.to.to_owned(),
            family: self.family,
            outcome,
            canaries: self.flows.len(),
            arrived: self.flows.iter().filter(|f| self.arrived(f.canary.tag)).count(),
            detail,
        })
    }

    fn watching(&self, node: &str) -> Option<&Watching> {
        self.evidence.watching.get(node)?.as_ref().ok()
    }

    fn findings(&self, node: &str) -> Option<&Findings> {
        self.evidence.findings.get(node)?.as_ref().ok()
    }

    fn all_findings(&self) -> impl Iterator<Item = (&String, &Findings)> {
        self.evidence.findings.iter().filter_map(|(node, said)| Some((node, said.as_ref().ok()?)))
    }

    fn arrived(&self, tag: Tag) -> bool {
        self.findings(self.to).is_some_and(|findings| findings.arrived.contains(&tag))
    }

    /// Canaries of this pair that somebody could read, and where the first of them was seen.
    fn readable(&self) -> Option<String> {
        let all = self.all_findings().flat_map(|(node, findings)| {
            findings.readable.iter().filter_map(move |seen| {
                let flow = self.flows.iter().find(|f| f.canary.tag == seen.tag)?;
                Some((flow.describe(), node, seen))
            })
        });
        let all: Vec<(String, &String, &Readable)> = all.collect();
        let (_, node, Readable { link, from, to, .. }) = all.first()?;
        let flows: BTreeSet<&str> = all.iter().map(|(flow, ..)| flow.as_str()).collect();
        let flows: Vec<&str> = flows.into_iter().collect();
        Some(format!("readable: {}; at {node} on {link}, {from} to {to}", flows.join(", ")))
    }

    /// Packets between pods of this pair, whoever sent them.
    fn bare(&self) -> Option<String> {
        let (from, to) = (self.watching(self.from)?, self.watching(self.to)?);
        self.all_findings().find_map(|(node, findings)| {
            let is_ours = |bare: &&Bare| {
                from.blocks.iter().any(|block| block.contains(&bare.from))
                    && to.blocks.iter().any(|block| block.contains(&bare.to))
                    && self.family.holds(bare.to)
            };
            let Bare { link, from, to, packets } = findings.bare.iter().find(is_ours)?;
            Some(format!(
                "{packets} packets outside the tunnel at {node} on {link}, {from} to {to}"
            ))
        })
    }

    /// Why one cannot be sure.
    fn doubt(&self) -> Option<String> {
        self.silence()
            .or_else(|| self.blindness(self.from, self.to))
            .or_else(|| self.blindness(self.to, self.from))
            .or_else(|| self.missing())
            .or_else(|| self.plan.no_service.clone())
    }

    /// A node that did not answer.
    fn silence(&self) -> Option<String> {
        let evidence = self.evidence;
        for node in [self.from, self.to] {
            let watching = evidence.watching.get(node).map(|said| said.as_ref().err());
            let findings = evidence.findings.get(node).map(|said| said.as_ref().err());
            match (watching, findings) {
                (Some(Some(why)), _) | (_, Some(Some(why))) => return Some(why.clone()),
                (None, _) | (_, None) => return Some(format!("{node} was not asked")),
                _ => {}
            }
        }
        evidence.sent.get(self.from)?.as_ref().err().cloned()
    }

    /// Why a node may have overlooked something.
    fn blindness(&self, node: &str, other: &str) -> Option<String> {
        let findings = self.findings(node)?;
        let mut plain = self.plan.plain.iter().filter(|p| p.from == node && p.to == other);
        let proof = |tag| findings.readable.iter().any(|seen| seen.tag == tag && seen.outgoing);
        if !plain.any(|flow| proof(flow.plain.tag)) {
            return Some(format!(
                "the capture at {node} does not work: it did not see what was sent to {other} beside the tunnel"
            ));
        }
        if findings.lost_packets > 0 {
            return Some(format!(
                "{} packets passed unseen at {node}: try again",
                findings.lost_packets
            ));
        }
        findings.failures.first().map(|failure| format!("the capture at {node} failed: {failure}"))
    }

    /// A canary that did not arrive.
    fn missing(&self) -> Option<String> {
        let flow = self.flows.iter().find(|f| !self.arrived(f.canary.tag))?;
        let sent = self.evidence.sent.get(self.from).and_then(|said| said.as_ref().ok());
        let error = sent.and_then(|sent| sent.failures.get(&flow.canary.tag));
        let why = error.map_or(String::new(), |error| format!(" ({error})"));
        Some(format!("{} did not arrive{why}", flow.describe()))
    }

    fn summary(&self) -> String {
        let traffic = self.findings(self.from).and_then(|findings| {
            findings.traffic.iter().find(|traffic| traffic.node.as_str() == self.to)
        });
        let counts = traffic.map_or(String::new(), |t| {
            format!(
                "; both families: {} sealed, {} handshakes, {} others",
                t.sealed, t.handshakes, t.others
            )
        });
        format!("{} canaries arrived{counts}", self.flows.len())
    }
}

#[cfg(test)]
mod tests;
