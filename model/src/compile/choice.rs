//! Which endpoints new connections go to: readiness, traffic policy, topology, as kube-proxy decides.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use super::endpoints::Candidate;
use crate::NodeName;
use crate::snapshot::{Backend, Leaving, LocalNode};

/// Where a client may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// Anywhere, and the same on every node.
    Anywhere,
    /// Anywhere; near ones first where the endpoints say so.
    Cluster,
    /// To this node only (`internalTrafficPolicy: Local`).
    Local,
}

/// The endpoints of a service port, told apart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Choice {
    /// Where new connections go.
    pub(super) backends: Vec<Backend>,
    /// The others that are there.
    pub(super) leaving: Vec<Leaving>,
}

/// The ready ones that `reach` allows; when there are none, those that still serve while they terminate (EndpointSlice v1,
/// `EndpointConditions`). One of weight 0 gets nothing. Ordered, without duplicates.
pub(super) fn choose(candidates: &[Candidate<'_>], reach: Reach, local: &LocalNode) -> Choice {
    let mut all: BTreeMap<(IpAddr, u16), &Candidate<'_>> = BTreeMap::new();
    for one in candidates {
        // One that moves from slice to slice may be in both for a moment, and pods in a node's network share an address. Whoever
        // serves there is meant.
        let known = all.entry((one.address, one.port)).or_insert(one);
        if (one.ready, one.serving) > (known.ready, known.serving) {
            *known = one;
        }
    }
    // What gets nothing is near to nobody: else a client beside it would be refused, and the others serve.
    let mut taken: Vec<&Candidate<'_>> = all.values().copied().filter(|c| c.is_open()).collect();
    match reach {
        Reach::Local => taken.retain(|c| c.is_on(&local.name)),
        Reach::Cluster => near(&mut taken, local),
        Reach::Anywhere => {}
    }
    if taken.is_empty() {
        let finishing = |c: &&Candidate<'_>| c.serving && c.terminating && c.weight > 0;
        taken = all.values().copied().filter(finishing).collect();
        if reach == Reach::Local {
            taken.retain(|c| c.is_on(&local.name));
        }
    }
    let is_taken = |c: &Candidate<'_>| {
        taken.binary_search_by_key(&(c.address, c.port), |t| (t.address, t.port)).is_ok()
    };
    let there = |c: &&&Candidate<'_>| (c.ready || c.terminating) && !is_taken(c);
    let leaving = all.values().filter(there).map(|c| Leaving {
        address: SocketAddr::new(c.address, c.port),
        terminating: c.terminating,
    });
    Choice { leaving: leaving.collect(), backends: taken.iter().map(|c| c.backend()).collect() }
}

/// Keeps those that are meant for this node, or else for its zone; all, where one of them has no hint, or none is meant for us.
fn near(ready: &mut Vec<&Candidate<'_>>, local: &LocalNode) {
    let all_have = |hint: fn(&Candidate<'_>) -> bool| ready.iter().all(|c| hint(c));
    let for_node = |c: &&Candidate<'_>| c.for_nodes.iter().any(|n| *n == local.name.as_str());
    if all_have(|c| !c.for_nodes.is_empty()) && ready.iter().any(for_node) {
        return ready.retain(|c| for_node(c));
    }
    let Some(zone) = local.zone.as_deref() else { return };
    let for_zone = |c: &&Candidate<'_>| c.for_zones.contains(&zone);
    if all_have(|c| !c.for_zones.is_empty()) && ready.iter().any(for_zone) {
        ready.retain(|c| for_zone(c));
    }
}

impl Candidate<'_> {
    /// Whether it gets new connections for its own sake, not for want of others.
    pub(super) fn is_open(&self) -> bool {
        self.ready && self.weight > 0
    }

    pub(super) fn is_on(&self, node: &NodeName) -> bool {
        self.node.as_ref() == Some(node)
    }

    fn backend(&self) -> Backend {
        Backend {
            address: self.address,
            port: self.port,
            node: self.node.clone(),
            weight: self.weight,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::FULL_WEIGHT;

    fn local(zone: Option<&str>) -> LocalNode {
        LocalNode {
            name: "n1".parse().unwrap(),
            blocks: vec![],
            addresses: vec![],
            zone: zone.map(str::to_owned),
        }
    }

    fn on(host: u8, node: &'static str) -> Candidate<'static> {
        Candidate {
            address: IpAddr::from([10, 244, 0, host]),
            port: 80,
            node: Some(node.parse().unwrap()),
            ready: true,
            serving: true,
            terminating: false,
            weight: FULL_WEIGHT,
            for_nodes: vec![],
            for_zones: vec![],
        }
    }

    fn terminating(one: Candidate<'static>) -> Candidate<'static> {
        Candidate { ready: false, terminating: true, ..one }
    }

    /// Last bytes of the addresses: those that are chosen, those that are leaving.
    fn hosts(choice: &Choice) -> (Vec<u8>, Vec<u8>) {
        let last = |address: IpAddr| match address {
            IpAddr::V4(v4) => v4.octets()[3],
            IpAddr::V6(_) => 0,
        };
        let backends = choice.backends.iter().map(|b| last(b.address));
        (backends.collect(), choice.leaving.iter().map(|l| last(l.address.ip())).collect())
    }

    #[test]
    fn readiness_then_what_still_serves_then_nobody() {
        let cluster = |all: &[Candidate<'_>]| hosts(&choose(all, Reach::Cluster, &local(None)));
        let unready = Candidate { ready: false, ..on(3, "n1") };
        let all = [on(1, "n1"), terminating(on(2, "n2")), unready.clone()];
        assert_eq!(cluster(&all), (vec![1], vec![2]));
        assert_eq!(cluster(&all[1..]), (vec![2], vec![]));
        let ended = Candidate { serving: false, ..terminating(on(2, "n2")) };
        assert_eq!(cluster(&[ended, unready]), (vec![], vec![2]));
        let twice = [terminating(on(1, "n1")), on(1, "n1")];
        assert_eq!(cluster(&twice), (vec![1], vec![]));
        let next = Candidate { ready: false, serving: false, ..on(1, "n1") };
        let two_pods = [next, terminating(on(1, "n1"))];
        assert_eq!(cluster(&two_pods), (vec![1], vec![]), "the next one waits for the port");
    }

    #[test]
    fn local_means_this_node_also_for_what_terminates() {
        let here = |all: &[Candidate<'_>]| hosts(&choose(all, Reach::Local, &local(None)));
        assert_eq!(here(&[on(1, "n1"), on(2, "n2")]), (vec![1], vec![2]));
        assert_eq!(here(&[terminating(on(1, "n1")), on(2, "n2")]), (vec![1], vec![2]));
        assert_eq!(here(&[on(2, "n2"), terminating(on(3, "n2"))]), (vec![], vec![2, 3]));
    }

    #[test]
    fn near_ones_first_where_all_endpoints_have_hints() {
        let hinted = |host, node: &'static str, zone: &'static str| Candidate {
            for_nodes: vec![node],
            for_zones: vec![zone],
            ..on(host, node)
        };
        let all = [hinted(1, "n1", "a"), hinted(2, "n2", "a"), hinted(3, "n3", "b")];
        let near =
            |all: &[Candidate<'_>], zone| hosts(&choose(all, Reach::Cluster, &local(zone))).0;
        assert_eq!(near(&all, Some("a")), [1], "same node");
        assert_eq!(near(&all[1..], Some("a")), [2], "same zone");
        assert_eq!(near(&all[1..], Some("c")), [2, 3], "nobody is near");
        assert_eq!(near(&all[1..], None), [2, 3], "our zone is not known");
        let some = [all[0].clone(), all[2].clone(), on(4, "n4")];
        assert_eq!(near(&some, Some("a")), [1, 3, 4], "one without hints");
        let anywhere = hosts(&choose(&all, Reach::Anywhere, &local(Some("a")))).0;
        assert_eq!(anywhere, [1, 2, 3], "for clients outside nobody is near");
        let gone = [terminating(all[0].clone()), all[1].clone(), all[2].clone()];
        assert_eq!(near(&gone, Some("a")), [2], "what terminates does not count");
    }

    #[test]
    fn weight_zero_gets_nothing_and_keeps_what_it_has() {
        let mut all = [on(1, "n1"), on(2, "n2")];
        all[0].weight = 0;
        let cluster = |all: &[Candidate<'_>]| hosts(&choose(all, Reach::Cluster, &local(None)));
        assert_eq!(cluster(&all), (vec![2], vec![1]));
        assert_eq!(cluster(&all[..1]), (vec![], vec![1]), "on purpose, so nobody stands in");
        all[0].for_nodes = vec!["n1"];
        all[1].for_nodes = vec!["n2"];
        assert_eq!(cluster(&all), (vec![2], vec![1]), "the near one was taken out");
    }
}
