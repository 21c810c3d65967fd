//! Which canaries go where. Pure.

use std::net::{IpAddr, SocketAddr};

use mesh_model::encryption::{Canary, Mark, Origin, Plain, Sending, Tag, Watching};

use super::Said;
use super::service::CheckService;

/// Tags of plain canaries have this bit.
const PLAIN: Tag = 1 << 31;

/// How canaries get to a receiver.
pub(super) enum Route<'s> {
    /// Straight only, as was asked.
    Straight,
    /// Straight, and through a service address.
    Both(&'s CheckService),
    /// Straight only, because there is no service address.
    Missing(String),
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub(super) enum Family {
    #[serde(rename = "IPv4")]
    V4,
    #[serde(rename = "IPv6")]
    V6,
}

impl Family {
    pub(super) const ALL: [Self; 2] = [Self::V4, Self::V6];

    pub(super) fn holds(self, address: IpAddr) -> bool {
        address.is_ipv4() == (self == Self::V4)
    }
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if *self == Self::V4 { "IPv4" } else { "IPv6" })
    }
}

/// A canary of a pair of nodes.
pub(super) struct Flow {
    pub(super) from: String,
    pub(super) to: String,
    pub(super) family: Family,
    pub(super) by_service: bool,
    pub(super) canary: Canary,
}

impl Flow {
    /// `udp from pod to service`.
    pub(super) fn describe(&self) -> String {
        let protocol = self.canary.protocol.to_string().to_lowercase();
        let to = if self.by_service { " through a service address" } else { "" };
        format!("{protocol} from {}{to}", self.canary.origin)
    }
}

/// A plain canary of a pair of nodes.
pub(super) struct PlainFlow {
    pub(super) from: String,
    pub(super) to: String,
    pub(super) plain: Plain,
}

/// All canaries.
pub(super) struct Plan {
    /// Pairs of nodes that are checked are those with this one.
    pub(super) only: Option<String>,
    pub(super) flows: Vec<Flow>,
    pub(super) plain: Vec<PlainFlow>,
    /// Why there is no service address, if there should be one.
    pub(super) no_service: Option<String>,
}

impl Plan {
    pub(super) fn new(watching: &Said<Watching>, only: Option<&str>, route: &Route<'_>) -> Self {
        let no_service = match route {
            Route::Missing(why) => Some(why.clone()),
            _ => None,
        };
        let only = only.map(str::to_owned);
        let mut plan = Self { only, flows: vec![], plain: vec![], no_service };
        let able = || watching.iter().filter_map(|(name, said)| Some((name, said.as_ref().ok()?)));
        for (from, sender) in able() {
            for (to, receiver) in able() {
                if plan.has(from, to) {
                    plan.pair((from, sender), (to, receiver), route);
                }
            }
        }
        plan
    }

    /// What a node has to send.
    pub(super) fn of(&self, node: &str, mark: Mark, secs: u16) -> Sending {
        let canaries = self.flows.iter().filter(|f| f.from == node).map(|f| f.canary);
        let plain = self.plain.iter().filter(|p| p.from == node).map(|p| p.plain);
        Sending { mark, secs, canaries: canaries.collect(), plain: plain.collect() }
    }

    /// Whether canaries go between these.
    pub(super) fn has(&self, from: &str, to: &str) -> bool {
        let only = self.only.as_deref();
        from != to && only.is_none_or(|only| from == only || to == only)
    }

    fn pair(
        &mut self,
        (from, sender): (&String, &Watching),
        (to, receiver): (&String, &Watching),
        route: &Route<'_>,
    ) {
        // Where no pod runs, both origins are the same.
        let origins: &[Origin] = match sender.pod {
            Some(_) => &[Origin::Pod, Origin::Node],
            None => &[Origin::Node],
        };
        for taker in &receiver.receivers {
            let of_service = match route {
                Route::Both(service) => service.address(to, taker).map(|address| (address, true)),
                _ => None,
            };
            for (address, by_service) in [(taker.address, false)].into_iter().chain(of_service) {
                for &origin in origins {
                    let tag = self.flows.len() as Tag;
                    self.flows.push(Flow {
                        from: from.clone(),
                        to: to.clone(),
                        family: family(taker.address),
                        by_service,
                        canary: Canary { tag, origin, protocol: taker.protocol, to: address },
                    });
                }
            }
        }
        for &address in &receiver.addresses {
            let tag = PLAIN | self.plain.len() as Tag;
            let plain = Plain { tag, to: address };
            self.plain.push(PlainFlow { from: from.clone(), to: to.clone(), plain });
        }
    }
}

fn family(address: SocketAddr) -> Family {
    if address.is_ipv4() { Family::V4 } else { Family::V6 }
}
