//! Scores: which of the nodes that can take a pod should.

use super::fit::{Request, term_matches};
use super::state::{NodeFacts, Usage, load};
use super::taints::tolerated;

/// Weight of taints that ask to be avoided.
const AVOID: i64 = 60;
/// Weight of each kind of wish in the manifest.
const WISH: i64 = 40;
/// Weight of having few pods of the same controller: above load, below what people ask for.
const SPREAD: i64 = 20;

/// A node that can take the pod.
pub(super) struct Candidate<'a> {
    pub(super) name: &'a str,
    pub(super) facts: &'a NodeFacts,
    pub(super) usage: &'a Usage,
}

/// The name of the best candidate; ties go to the node with fewer pods, then by name.
pub(super) fn best<'a>(request: &Request, candidates: &[Candidate<'a>]) -> Option<&'a str> {
    let scale = |value: fn(&Request, &Candidate<'_>) -> i64| {
        scaled(candidates.iter().map(|c| value(request, c)).collect())
    };
    let avoid = scale(|r, c| -avoided(r, c));
    let nodes = scale(preference);
    let pods = scale(|r, c| r.topology.wish(&c.facts.labels));
    let crowding = scale(|r, c| -r.topology.crowding(&c.facts.labels));
    let spread = scale(|r, c| -siblings(r, c));
    let total = |i: usize| {
        avoid[i] * AVOID
            + (nodes[i] + pods[i] + crowding[i]) * WISH
            + spread[i] * SPREAD
            + idleness(request, &candidates[i])
    };
    (0..candidates.len())
        .max_by_key(|i| {
            let c = &candidates[*i];
            (total(*i), std::cmp::Reverse((c.usage.pods, c.name)))
        })
        .map(|i| candidates[i].name)
}

/// Values mapped to 0..=100 by their extremes; all 0 when they are equal.
fn scaled(values: Vec<i64>) -> Vec<i64> {
    let least = values.iter().min().copied().unwrap_or(0);
    let range = values.iter().max().copied().unwrap_or(0) - least;
    values.into_iter().map(|v| if range == 0 { 0 } else { (v - least) * 100 / range }).collect()
}

fn avoided(request: &Request, candidate: &Candidate<'_>) -> i64 {
    let soft = candidate.facts.taints().filter(|t| t.effect == "PreferNoSchedule");
    soft.filter(|t| !tolerated(&request.tolerations, t)).count() as i64
}

fn preference(request: &Request, candidate: &Candidate<'_>) -> i64 {
    let matching = request
        .preferred
        .iter()
        .filter(|(_, term)| term_matches(term, candidate.name, &candidate.facts.labels));
    matching.map(|(weight, _)| weight).sum()
}

fn siblings(request: &Request, candidate: &Candidate<'_>) -> i64 {
    let owner = request.owner.as_ref();
    owner.and_then(|owner| candidate.usage.owners.get(owner)).copied().unwrap_or(0)
}

/// 0..=100: how much CPU and memory stays free, on average.
fn idleness(request: &Request, candidate: &Candidate<'_>) -> i64 {
    let (cpu, memory) = load(&request.resources);
    let free = |resource: &str, used: i64| match candidate.facts.allocatable.of(resource) {
        total if total > 0 => ((total - used).max(0) as f64 / total as f64 * 100.0) as i64,
        _ => 0,
    };
    (free("cpu", candidate.usage.load.0 + cpu) + free("memory", candidate.usage.load.1 + memory))
        / 2
}
