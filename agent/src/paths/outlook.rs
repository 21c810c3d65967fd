//! What follows from the paths for everything else on the node: whom not to send to, and whom to reach by a relay.

use std::borrow::{Borrow, Cow};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_model::snapshot::{Backend, EdgeService, Frontend, L7Config, Leaving, WgKey};
use mesh_model::{NodeName, Snapshot};
use mesh_overlay::paths::{Pair, Via};
use serde::{Deserialize, Serialize};

use crate::files::write_atomically;

/// Whom not to send to, and whom to reach by a relay.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Outlook {
    /// Nodes that cannot be reached.
    pub(crate) away: BTreeSet<NodeName>,
    /// Where to send to reach a node through a relay.
    pub(crate) relays: BTreeMap<WgKey, SocketAddr>,
    /// Nodes that this one is behind NAT for, or whose relay it is behind NAT for: they get keepalives.
    pub(crate) keepalives: BTreeSet<WgKey>,
    /// Largest packets to nodes whose way carries less than the overlay device, in bytes.
    pub(crate) mtus: BTreeMap<WgKey, u16>,
}

impl Outlook {
    /// The frontends, without backends on nodes that are away.
    ///
    /// A frontend that would lose all its backends keeps them: refusing every connection is no better than trying,
    /// and if it is this node that is cut off, everything is in place when it is back.
    pub(crate) fn frontends<'s>(&self, snapshot: &'s Snapshot) -> Vec<Cow<'s, Frontend>> {
        self.narrow(snapshot, snapshot.frontends.as_slice())
    }

    /// The same for some of the snapshot's frontends.
    pub(crate) fn narrow<'s, F: Borrow<Frontend>>(
        &self,
        snapshot: &Snapshot,
        frontends: &'s [F],
    ) -> Vec<Cow<'s, Frontend>> {
        let away = Away::of(self, snapshot);
        let narrowed = |frontend: &'s Frontend| {
            match fewer(&frontend.backends, |b| away.has(b)) {
                Some(backends) => Cow::Owned(Frontend {
                    // They are there: what is established may come back with their node.
                    leaving: with_away(frontend, |b| away.has(b)),
                    backends,
                    ..frontend.clone()
                }),
                None => Cow::Borrowed(frontend),
            }
        };
        frontends.iter().map(|frontend| narrowed(frontend.borrow())).collect()
    }

    /// Services as clients outside see them, by the same rule.
    pub(crate) fn edge<'s>(
        &self,
        snapshot: &Snapshot,
        services: impl IntoIterator<Item = &'s Arc<EdgeService>>,
    ) -> impl Iterator<Item = Cow<'s, EdgeService>> {
        let away = Away::of(self, snapshot);
        let narrowed =
            move |service: &'s Arc<EdgeService>| match fewer(&service.backends, |b| away.has(b)) {
                Some(backends) => Cow::Owned(EdgeService { backends, ..(**service).clone() }),
                None => Cow::Borrowed(&**service),
            };
        services.into_iter().map(narrowed)
    }

    /// The proxy's routes, by the same rule.
    pub(crate) fn l7(&self, snapshot: &Snapshot) -> L7Config {
        let away = Away::of(self, snapshot);
        let mut l7 = (*snapshot.l7).clone();
        for route in &mut l7.routes {
            if let Some(backends) = fewer(&route.backends, |b| away.covers(b.ip())) {
                route.backends = backends;
            }
        }
        l7
    }
}

/// Those that leave, and those that are away.
fn with_away(frontend: &Frontend, away: impl Fn(&Backend) -> bool) -> Vec<Leaving> {
    let away = frontend.backends.iter().filter(|b| away(b));
    let away =
        away.map(|b| Leaving { address: SocketAddr::new(b.address, b.port), terminating: false });
    let mut all: Vec<Leaving> = frontend.leaving.iter().copied().chain(away).collect();
    all.sort();
    all
}

/// The list without those that are gone; nothing when that is the whole list or none of it.
fn fewer<T: Clone>(all: &[T], gone: impl Fn(&T) -> bool) -> Option<Vec<T>> {
    let left: Vec<T> = all.iter().filter(|one| !gone(one)).cloned().collect();
    (!left.is_empty() && left.len() < all.len()).then_some(left)
}

/// Nodes that are away, and their addresses and those of their pods.
struct Away<'o> {
    names: &'o BTreeSet<NodeName>,
    blocks: Vec<IpNet>,
    nodes: Vec<IpAddr>,
}

impl<'o> Away<'o> {
    fn of(outlook: &'o Outlook, snapshot: &Snapshot) -> Self {
        let away = || snapshot.peers.iter().filter(|peer| outlook.away.contains(&peer.node));
        Self {
            names: &outlook.away,
            blocks: away().flat_map(|peer| peer.allowed_ips.iter().copied()).collect(),
            nodes: away().flat_map(|peer| peer.endpoints.iter().map(SocketAddr::ip)).collect(),
        }
    }

    /// By the node that the backend names, or else by its address.
    fn has(&self, backend: &Backend) -> bool {
        match &backend.node {
            Some(node) => self.names.contains(node),
            None => self.covers(backend.address),
        }
    }

    fn covers(&self, address: IpAddr) -> bool {
        self.nodes.contains(&address) || self.blocks.iter().any(|block| block.contains(&address))
    }
}

/// What an agent leaves to the next one, so that its end and its start change nothing. Lives in the run directory: after
/// a reboot nothing of it is true.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Legacy {
    /// Nodes that were down.
    pub(crate) down: BTreeSet<WgKey>,
    /// Nodes that could not be reached, whoever else could.
    pub(crate) away: BTreeSet<NodeName>,
    /// Relays in use, and where they are.
    pub(crate) routes: BTreeMap<WgKey, (Via, SocketAddr)>,
    /// Pairs that this node relays for.
    pub(crate) leases: Vec<Pair>,
    /// Where this node appears to others, when not at an endpoint of its own.
    #[serde(default)]
    pub(crate) outside: BTreeMap<WgKey, SocketAddr>,
    /// Largest packets to nodes whose way carries less than the overlay device, in bytes.
    #[serde(default)]
    pub(crate) mtus: BTreeMap<WgKey, u16>,
}

impl Legacy {
    /// What the agent before left; nothing is as good as nothing that can be read.
    pub(crate) fn load(file: &Path) -> Self {
        let read = std::fs::read(file).ok();
        read.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
    }

    pub(super) fn save(&self, file: &Path) -> std::io::Result<()> {
        write_atomically(file, &serde_json::to_vec(self)?)
    }

    /// The outlook that it stands for.
    pub(crate) fn outlook(&self) -> Outlook {
        let behind =
            |(_, (via, _)): &(&WgKey, &(Via, SocketAddr))| self.outside.contains_key(&via.relay);
        let relayed = self.routes.iter().filter(behind).map(|(key, _)| *key);
        Outlook {
            away: self.away.clone(),
            relays: self.routes.iter().map(|(key, (_, endpoint))| (*key, *endpoint)).collect(),
            keepalives: self.outside.keys().copied().chain(relayed).collect(),
            mtus: self.mtus.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_model::snapshot::Peer;
    use mesh_model::{Objects, compile};
    use serde_json::json;

    use super::*;

    fn snapshot() -> Snapshot {
        let mut snapshot = compile(&Objects::default(), &"a".parse().unwrap());
        for (node, n) in [("b", 2u8), ("c", 3)] {
            Arc::make_mut(&mut snapshot.peers).push(Peer {
                node: node.parse().unwrap(),
                keys: vec![],
                public_key: WgKey([n; 32]),
                endpoints: vec![([192, 0, 2, n], 51900).into()],
                allowed_ips: vec![format!("10.244.{n}.0/24").parse().unwrap()],
            });
        }
        let frontend = |backends: serde_json::Value| -> Frontend {
            serde_json::from_value(json!({
                "vip": "10.96.0.9", "protocol": "TCP", "port": 80, "kind": "clusterIp",
                "service": "default/web", "portName": "", "affinitySecs": null, "backends": backends,
            }))
            .unwrap()
        };
        let on = |node: &str, n: u8| json!({"address": format!("10.244.{n}.7"), "port": 80, "node": node});
        let frontends = [
            frontend(json!([on("a", 1), on("b", 2), on("c", 3)])),
            frontend(json!([on("b", 2)])),
            frontend(json!([{"address": "192.0.2.2", "port": 1, "node": null}, on("c", 3)])),
            frontend(json!([on("a", 1)])),
        ];
        snapshot.frontends = Arc::new(frontends.map(Arc::new).into());
        snapshot.l7 = serde_json::from_value(json!({"certificates": [], "routes": [{
            "ingress": "default/web", "host": null, "path": {"prefix": "/"}, "service": "default/web", "port": 80,
            "backends": ["10.244.2.7:80", "10.244.3.7:80"],
        }]}))
        .unwrap();
        snapshot
    }

    #[test]
    fn backends_on_nodes_that_are_away_are_left_out_but_never_all() {
        let snapshot = snapshot();
        let away = |names: &[&str]| Outlook {
            away: names.iter().map(|name| name.parse().unwrap()).collect(),
            ..Outlook::default()
        };
        let counts = |outlook: &Outlook| -> Vec<usize> {
            outlook.frontends(&snapshot).iter().map(|f| f.backends.len()).collect()
        };
        assert_eq!(counts(&away(&[])), [3, 1, 2, 1]);
        let narrowed = away(&["b"]).frontends(&snapshot);
        assert_eq!(counts(&away(&["b"])), [2, 1, 1, 1]);
        let left = [Leaving { address: "10.244.2.7:80".parse().unwrap(), terminating: false }];
        assert_eq!(narrowed[0].leaving, left, "it is there, and what is established stays");
        let owned = |frontend: &Cow<'_, Frontend>| matches!(frontend, Cow::Owned(_));
        assert_eq!(narrowed.iter().map(owned).collect::<Vec<_>>(), [true, false, true, false]);
        assert_eq!(
            counts(&away(&["b", "c"])),
            [1, 1, 2, 1],
            "a node that is cut off keeps its tables"
        );
        assert_eq!(away(&["b"]).l7(&snapshot).routes[0].backends.len(), 1);
        assert_eq!(away(&["b", "c"]).l7(&snapshot).routes[0].backends.len(), 2);
    }

    #[test]
    fn what_is_left_behind_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("paths.json");
        assert_eq!(Legacy::load(&file), Legacy::default());
        let via = Via { relay: WgKey([3; 32]), slot: 2 };
        let legacy = Legacy {
            down: [WgKey([1; 32])].into(),
            away: ["b".parse().unwrap()].into(),
            routes: [(WgKey([2; 32]), (via, "192.0.2.3:51903".parse().unwrap()))].into(),
            leases: vec![Pair { a: WgKey([1; 32]), b: WgKey([2; 32]), slot: 0 }],
            outside: [(WgKey([3; 32]), "198.51.100.1:4711".parse().unwrap())].into(),
            mtus: [(WgKey([3; 32]), 1340)].into(),
        };
        legacy.save(&file).unwrap();
        assert_eq!(Legacy::load(&file), legacy);
        assert_eq!(legacy.outlook().relays.len(), 1);
        let kept = [WgKey([2; 32]), WgKey([3; 32])];
        assert!(legacy.outlook().keepalives.iter().eq(&kept), "the relay, and who is behind it");
        std::fs::write(&file, b"{").unwrap();
        assert_eq!(Legacy::load(&file), Legacy::default());
    }
}
