//! Whether a node is alive, and what its object says about it. Pure: takes the time.

use std::collections::HashMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, NodeCondition, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use mesh_model::wellknown::CONDITION_MAPS_FULL;
use tokio::time::Instant;

use crate::objects;
use crate::scheduler::taints::{NOT_READY, PRESSURES, UNREACHABLE};

const LOST_REASON: &str = "NodeStatusUnknown";
const FOUND_REASON: &str = "LeaseRenewed";
const REPORTED_BY_AGENTS: [&str; 5] =
    ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure", CONDITION_MAPS_FULL];

/// What was last heard of each node, by this process's own clock: the nodes' clocks may be wrong.
#[derive(Debug, Default)]
pub(super) struct Monitor {
    heard: HashMap<String, Heard>,
}

#[derive(Debug)]
struct Heard {
    sign: Sign,
    at: Instant,
    /// The Ready condition's status before the node was lost.
    before: Option<String>,
}

/// A sign of life; any change of it counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sign {
    /// When the node says it renewed its lease.
    pub(super) renewed: Option<Timestamp>,
    /// When the node says it checked its Ready condition.
    pub(super) reported: Option<Timestamp>,
}

impl Monitor {
    /// Notes a sign of life and returns when the node will count as lost without another one.
    ///
    /// What is seen first counts as new: after a start of the control service, every node has the whole
    /// grace period to show that it lives.
    pub(super) fn deadline(
        &mut self,
        node: &str,
        sign: Sign,
        grace: Duration,
        now: Instant,
    ) -> Instant {
        let heard = self.heard.entry(node.to_owned()).or_insert_with(|| Heard {
            sign: sign.clone(),
            at: now,
            before: None,
        });
        if heard.sign != sign {
            (heard.sign, heard.at) = (sign, now);
        }
        heard.at + grace
    }

    /// Notes what the node said of itself before it was lost.
    pub(super) fn note(&mut self, node: &Node) {
        let status = objects::node_condition(node, "Ready").map(|c| c.status.clone());
        let heard = self.heard.get_mut(objects::name(&node.metadata));
        if let (Some(heard), Some(status)) = (heard, status.filter(|s| s != "Unknown")) {
            heard.before = Some(status);
        }
    }

    /// What the node said of itself before it was lost; unknown after a start of this program.
    pub(super) fn before(&self, node: &str) -> Option<String> {
        self.heard.get(node)?.before.clone()
    }

    /// Forgets a deleted node.
    pub(super) fn forget(&mut self, node: &str) {
        self.heard.remove(node);
    }
}

/// Whether a node lives, and what it said before it did not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life<'a> {
    Lost,
    /// With the status of the Ready condition to go back to; without one, the agent has to report it.
    Alive(Option<&'a str>),
}

/// The node as it should be: conditions Unknown while it is lost, taints that follow its Ready condition.
pub(super) fn judged(node: &Node, life: Life<'_>, now: Timestamp) -> Node {
    let mut node = node.clone();
    judge_conditions(&mut node, life, now);
    let wanted = wanted_taints(&node);
    let spec = node.spec.get_or_insert_default();
    let mut taints = spec.taints.take().unwrap_or_default();
    let same = |a: &Taint, key: &str, effect: &str| a.key == key && a.effect == effect;
    let ours = |t: &Taint| {
        matches!(t.key.as_str(), NOT_READY | UNREACHABLE)
            || PRESSURES.iter().any(|(_, key)| *key == t.key)
    };
    taints.retain(|t| !ours(t) || wanted.iter().any(|(key, effect)| same(t, key, effect)));
    for (key, effect) in wanted {
        if !taints.iter().any(|t| same(t, key, effect)) {
            taints.push(Taint {
                key: key.to_owned(),
                effect: effect.to_owned(),
                value: None,
                time_added: Some(Time(now)),
            });
        }
    }
    spec.taints = Some(taints).filter(|taints| !taints.is_empty());
    node
}

fn judge_conditions(node: &mut Node, life: Life<'_>, now: Timestamp) {
    let lost = life == Life::Lost;
    let conditions = node.status.get_or_insert_default().conditions.get_or_insert_default();
    if lost && !conditions.iter().any(|c| c.type_ == "Ready") {
        conditions.push(NodeCondition { type_: "Ready".to_owned(), ..NodeCondition::default() });
    }
    for condition in conditions {
        let ours = condition.reason.as_deref() == Some(LOST_REASON);
        if lost
            && REPORTED_BY_AGENTS.contains(&condition.type_.as_str())
            && condition.status != "Unknown"
        {
            condition.status = "Unknown".to_owned();
            condition.reason = Some(LOST_REASON.to_owned());
            condition.message = Some("Agent stopped renewing its lease.".to_owned());
            condition.last_transition_time = Some(Time(now));
        } else if let Life::Alive(Some(before)) = life
            && condition.type_ == "Ready"
            && condition.status == "Unknown"
            && ours
        {
            condition.status = before.to_owned();
            condition.reason = Some(FOUND_REASON.to_owned());
            condition.message = Some("Agent renews its lease again.".to_owned());
            condition.last_transition_time = Some(Time(now));
        }
    }
}

fn wanted_taints(node: &Node) -> Vec<(&'static str, &'static str)> {
    let status = |kind| objects::node_condition(node, kind).map(|c| c.status.as_str());
    let mut wanted = match status("Ready") {
        Some("True") => vec![],
        Some("Unknown") => vec![(UNREACHABLE, "NoSchedule"), (UNREACHABLE, "NoExecute")],
        Some(_) => vec![(NOT_READY, "NoSchedule"), (NOT_READY, "NoExecute")],
        None => vec![(NOT_READY, "NoSchedule")],
    };
    let short = PRESSURES.iter().filter(|(kind, _)| status(kind) == Some("True"));
    wanted.extend(short.map(|(_, key)| (*key, "NoSchedule")));
    wanted
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn node(ready: Option<&str>, taints: Value) -> Node {
        let conditions: Vec<Value> = ready
            .map(|status| json!({"type": "Ready", "status": status, "reason": "AgentReady"}))
            .into_iter()
            .collect();
        serde_json::from_value(json!({"metadata": {"name": "n"}, "spec": {"taints": taints},
            "status": {"conditions": conditions}}))
        .unwrap()
    }

    fn at(secs: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + secs).unwrap()
    }

    fn ready(node: &Node) -> String {
        objects::node_condition(node, "Ready").map(|c| c.status.clone()).unwrap_or_default()
    }

    fn taints(node: &Node) -> Vec<String> {
        let taints = node.spec.as_ref().unwrap().taints.iter().flatten();
        taints.map(|t| format!("{}:{}", t.key.rsplit('/').next().unwrap(), t.effect)).collect()
    }

    #[test]
    fn any_new_sign_moves_the_deadline_and_an_old_one_does_not() {
        let mut monitor = Monitor::default();
        let start = Instant::now();
        let grace = Duration::from_secs(40);
        let later = |secs| start + Duration::from_secs(secs);
        let sign = |n: i64| Sign { renewed: Some(at(n)), reported: None };
        assert_eq!(
            monitor.deadline("n", sign(-9999), grace, start),
            later(40),
            "first seen is new"
        );
        assert_eq!(monitor.deadline("n", sign(-9999), grace, later(30)), later(40));
        assert_eq!(monitor.deadline("n", sign(-9000), grace, later(35)), later(75));
        let reported = Sign { reported: Some(at(0)), ..sign(-9000) };
        assert_eq!(monitor.deadline("n", reported, grace, later(50)), later(90));
        monitor.forget("n");
        assert_eq!(monitor.deadline("n", sign(-9000), grace, later(60)), later(100));
    }

    #[test]
    fn a_lost_node_is_marked_once_and_comes_back() {
        let own = json!([{"key": "gpu", "effect": "NoSchedule"}]);
        let lost = judged(&node(Some("True"), own), Life::Lost, at(0));
        assert_eq!(ready(&lost), "Unknown");
        assert_eq!(
            taints(&lost),
            ["gpu:NoSchedule", "unreachable:NoSchedule", "unreachable:NoExecute"]
        );
        assert_eq!(judged(&lost, Life::Lost, at(60)), lost, "the time it was lost stays");
        assert_eq!(judged(&lost, Life::Alive(None), at(90)), lost, "the agent will report");
        let back = judged(&lost, Life::Alive(Some("True")), at(90));
        assert_eq!((ready(&back), taints(&back)), ("True".into(), vec!["gpu:NoSchedule".into()]));
        assert_eq!(judged(&back, Life::Alive(Some("True")), at(91)), back);
    }

    #[test]
    fn a_node_that_runs_out_of_something_gets_no_new_pods() {
        let mut short = node(Some("True"), json!(null));
        let condition = json!({"type": "DiskPressure", "status": "True"});
        let conditions = short.status.as_mut().unwrap().conditions.as_mut().unwrap();
        conditions.push(serde_json::from_value(condition).unwrap());
        let mut marked = judged(&short, Life::Alive(None), at(0));
        assert_eq!(taints(&marked), ["disk-pressure:NoSchedule"]);
        assert_eq!(judged(&marked, Life::Alive(None), at(1)), marked);
        marked.status.as_mut().unwrap().conditions.as_mut().unwrap()[1].status = "False".into();
        assert_eq!(judged(&marked, Life::Alive(None), at(2)).spec.unwrap().taints, None);
    }

    #[test]
    fn what_the_agent_reports_is_believed_while_it_lives() {
        let not_ready = judged(&node(Some("False"), json!(null)), Life::Alive(Some("True")), at(0));
        assert_eq!(taints(&not_ready), ["not-ready:NoSchedule", "not-ready:NoExecute"]);
        assert_eq!(ready(&not_ready), "False");
        let silent = judged(&node(None, json!(null)), Life::Alive(None), at(0));
        assert_eq!(taints(&silent), ["not-ready:NoSchedule"]);
        assert_eq!(ready(&judged(&silent, Life::Lost, at(0))), "Unknown");
        let good = node(Some("True"), json!(null));
        assert_eq!(judged(&good, Life::Alive(None), at(0)).spec.unwrap().taints, None);
    }
}
