//! One timeline from what several nodes tell, whose clocks differ.

use std::collections::BTreeMap;

use mesh_model::trace::{NodeTrace, StepHook, TraceStep};

/// Puts the steps of all nodes in order: each node's own order stays, and what comes out of the tunnel comes after it went in.
/// Only between steps that do not depend on each other the clocks decide.
pub(super) fn order(nodes: &[NodeTrace]) -> Vec<TraceStep> {
    let mut queues: Vec<&[TraceStep]> = nodes.iter().map(|node| &node.steps[..]).collect();
    let mut crossings = Crossings::default();
    let mut ordered = Vec::new();
    loop {
        let heads = || queues.iter().enumerate().filter_map(|(i, queue)| Some((i, queue.first()?)));
        let clock = |(_, step): &(usize, &TraceStep)| step.time_us;
        let possible = heads().filter(|(_, step)| crossings.allow(step)).min_by_key(clock);
        // An event that was lost must not hold up the rest.
        let Some((place, step)) = possible.or_else(|| heads().min_by_key(clock)) else {
            return ordered;
        };
        crossings.count(step);
        ordered.push(step.clone());
        queues[place] = &queues[place][1..];
    }
}

/// Packets that went into the tunnel and came out, by their direction.
#[derive(Default)]
struct Crossings(BTreeMap<bool, (usize, usize)>);

impl Crossings {
    fn allow(&self, step: &TraceStep) -> bool {
        let (entered, left) = self.0.get(&step.forth).copied().unwrap_or_default();
        !leaves(step) || left < entered
    }

    fn count(&mut self, step: &TraceStep) {
        let (entered, left) = self.0.entry(step.forth).or_default();
        *entered += usize::from(enters(step));
        *left += usize::from(leaves(step));
    }
}

/// Whether the step gives the packet to the tunnel.
pub(super) fn enters(step: &TraceStep) -> bool {
    matches!(
        step.decision.as_str(),
        "pod_to_overlay" | "edge_client_to_node" | "edge_pod_to_node" | "edge_host_to_node"
    )
}

/// Whether the step takes the packet out of the tunnel.
pub(super) fn leaves(step: &TraceStep) -> bool {
    step.hook == StepHook::FromOverlay && step.decision == "seen"
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::trace) fn step(
        node: &str,
        time_us: u64,
        hook: StepHook,
        forth: bool,
        decision: &str,
    ) -> TraceStep {
        TraceStep {
            time_us,
            node: node.parse().unwrap(),
            hook,
            forth,
            source: Some("10.244.1.5:40000".parse().unwrap()),
            destination: "10.244.2.7:8080".parse().unwrap(),
            chosen: None,
            bytes: 74,
            decision: decision.to_owned(),
            dropped: false,
            detail: String::new(),
            identities: [0; 2],
        }
    }

    pub(in crate::trace) fn node(name: &str, steps: Vec<TraceStep>) -> NodeTrace {
        NodeTrace {
            node: name.parse().unwrap(),
            steps,
            target: None,
            failures: vec![],
            silent_workers: vec![],
            sysctls: vec![],
        }
    }

    /// There and back, with the other node's clock behind or ahead by so much.
    fn there_and_back(behind: u64, ahead: u64) -> Vec<NodeTrace> {
        let a = |time, hook, forth, decision| step("a", time, hook, forth, decision);
        let b =
            |time, hook, forth, decision| step("b", time - behind + ahead, hook, forth, decision);
        use StepHook::{FromOverlay, FromPod, Socket};
        vec![
            node(
                "b",
                vec![
                    b(1_000_200, FromOverlay, true, "seen"),
                    b(1_000_201, FromOverlay, true, "overlay_to_pod"),
                    b(1_000_210, FromPod, false, "seen"),
                    b(1_000_211, FromPod, false, "pod_to_overlay"),
                ],
            ),
            node(
                "a",
                vec![
                    a(1_000_100, Socket, true, "chosen"),
                    a(1_000_110, FromPod, true, "seen"),
                    a(1_000_111, FromPod, true, "pod_to_overlay"),
                    a(1_000_300, FromOverlay, false, "seen"),
                    a(1_000_301, FromOverlay, false, "overlay_to_pod"),
                ],
            ),
        ]
    }

    fn nodes_of(steps: &[TraceStep]) -> String {
        steps.iter().map(|step| step.node.to_string()).collect()
    }

    #[test]
    fn cause_comes_before_effect_whatever_the_clocks_say() {
        for (behind, ahead) in [(0, 0), (900_000, 0), (0, 900_000)] {
            let ordered = order(&there_and_back(behind, ahead));
            assert_eq!(nodes_of(&ordered), "aaabbbbaa", "{behind} behind, {ahead} ahead");
        }
    }

    #[test]
    fn an_event_that_was_lost_holds_up_nothing() {
        let mut nodes = there_and_back(0, 0);
        nodes[1].steps.remove(2);
        let ordered = order(&nodes);
        assert_eq!(ordered.len(), 8);
        let times: Vec<u64> = ordered.iter().map(|step| step.time_us).collect();
        assert!(times.is_sorted(), "by the clocks then: {times:?}");
    }
}
