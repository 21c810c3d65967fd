//! Sockets of this node that are connected to a backend that is gone.
//!
//! A connected datagram socket never meets the socket hooks again: it would send to nobody for ever. It is ended, and its
//! owner connects anew. A stream whose pod is gone would wait for its time-outs; it is ended, too. Looks into this node's own
//! namespace and those of its pods, and only when a backend has gone, or when an agent starts: the one before may have been killed when
//! it was about to.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_kernel::services::{FrontendKey, Gone, Observed};
use mesh_kernel::sockets::{Connection, Ended, end_connections};
use mesh_kernel::{NetNs, Programs, ServiceTable as _};
use mesh_model::snapshot::Protocol;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::errors::chain;
use crate::reconcile::services::News;

/// What goes within this time goes together, and this is the least time between two rounds: a rollout is many.
const GATHER: Duration = Duration::from_millis(200);

/// Ends the sockets of what departs, for ever.
pub(crate) async fn end_departed(mut news: UnboundedReceiver<News>, programs: Arc<Programs>) {
    while let Some(first) = news.recv().await {
        tokio::time::sleep(GATHER).await;
        let (mut gone, mut begun) = (BTreeSet::new(), false);
        let mut next = Some(first);
        while let Some(one) = next {
            match one {
                News::Begun => begun = true,
                News::Gone(some) => gone.extend(some),
            }
            next = news.try_recv().ok();
        }
        let programs = Arc::clone(&programs);
        let index = Index::new(gone);
        let _ = tokio::task::spawn_blocking(move || end(&programs, &index, begun)).await;
    }
}

/// Ends what is connected to these, and where an agent has just `begun` also what is connected to none of a frontend's backends.
fn end(programs: &Programs, gone: &Index, begun: bool) {
    let mut protocols = gone.protocols();
    if begun && !protocols.contains(&Protocol::Udp) {
        protocols.push(Protocol::Udp);
    }
    if protocols.is_empty() {
        return;
    }
    let table = programs.services();
    let now = begun.then(|| table.observe()).and_then(|observed| {
        observed.inspect_err(|error| tracing::warn!(error = chain(error), "services not read")).ok()
    });
    let mut namespaces = programs.pod_namespaces().unwrap_or_else(|error| {
        tracing::warn!(%error, "pods' namespaces not found, their sockets stay");
        vec![]
    });
    namespaces.push(NetNs::current());
    let mut all = Ended::default();
    for namespace in namespaces {
        let meant = |connection: &Connection| {
            let reached_by = || table.reached_by(connection.cookie, connection.remote);
            gone.means(connection, reached_by)
                || now.as_ref().is_some_and(|now| is_stranded(now, connection, reached_by))
        };
        match end_connections(&namespace, &protocols, meant) {
            Ok(ended) => {
                all.ended += ended.ended;
                all.refused += ended.refused;
            }
            // A pod that is just going away.
            Err(error) => tracing::debug!(error = chain(&error), "sockets not looked at"),
        }
    }
    if all.refused > 0 {
        tracing::warn!(
            sockets = all.refused,
            "the kernel does not end sockets to backends that are gone"
        );
    } else if all.ended > 0 {
        tracing::info!(sockets = all.ended, "sockets to backends that are gone ended");
    }
}

/// Whether a datagram socket got through a frontend to what is none of its backends any more.
fn is_stranded(
    now: &Observed,
    connection: &Connection,
    reached_by: impl FnOnce() -> Option<SocketAddr>,
) -> bool {
    let Connection { protocol, remote, .. } = *connection;
    protocol == Protocol::Udp
        && reached_by().is_some_and(|vip| {
            !now.has(&FrontendKey { vip: vip.ip(), protocol, port: vip.port() }, remote)
        })
}

/// What is gone, by where it was.
struct Index(BTreeMap<(Protocol, SocketAddr), Vec<Gone>>);

impl Index {
    fn new(gone: impl IntoIterator<Item = Gone>) -> Self {
        let mut index: BTreeMap<_, Vec<Gone>> = BTreeMap::new();
        // A stream may go on where a Service only does not mean its pod any more.
        let counts = |gone: &Gone| match gone.frontend.protocol {
            Protocol::Tcp => gone.terminating,
            Protocol::Udp => true,
            Protocol::Sctp => false,
        };
        for gone in gone.into_iter().filter(counts) {
            index.entry((gone.frontend.protocol, gone.backend)).or_default().push(gone);
        }
        Self(index)
    }

    fn protocols(&self) -> Vec<Protocol> {
        let all = [Protocol::Tcp, Protocol::Udp];
        let present = |protocol: &Protocol| self.0.keys().any(|(present, _)| present == protocol);
        all.into_iter().filter(present).collect()
    }

    /// Whether the socket has to end. A datagram socket only if it got there through the frontend that lost the backend:
    /// who named the pod itself meant it.
    fn means(
        &self,
        connection: &Connection,
        reached_by: impl FnOnce() -> Option<SocketAddr>,
    ) -> bool {
        let Some(gone) = self.0.get(&(connection.protocol, connection.remote)) else {
            return false;
        };
        if connection.protocol == Protocol::Tcp {
            return true;
        }
        reached_by().is_some_and(|vip| {
            gone.iter().any(|gone| {
                let frontend = gone.frontend;
                // A node port by the address of any node.
                let address = frontend.vip == vip.ip() || frontend.vip.is_unspecified();
                address && frontend.port == vip.port()
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use mesh_kernel::services::FrontendKey;

    use super::*;

    fn gone(vip: &str, protocol: Protocol, terminating: bool) -> Gone {
        Gone {
            frontend: FrontendKey { vip: vip.parse().unwrap(), protocol, port: 53 },
            backend: "10.244.1.5:5353".parse().unwrap(),
            terminating,
        }
    }

    #[test]
    fn what_an_earlier_agent_left_is_found_in_the_table() {
        use mesh_kernel::services::{Entry, Member};
        let frontend = |vip: &str| FrontendKey {
            vip: vip.parse().unwrap(),
            protocol: Protocol::Udp,
            port: 53,
        };
        let entry = |id| Entry { id, count: 1, affinity_secs: 0 };
        let leaving = Member { leaving: true, terminating: false };
        let [here, there] = ["10.244.1.5:5353", "10.244.1.6:5353"].map(|at| at.parse().unwrap());
        let now = Observed {
            entries: [(frontend("10.96.0.1"), entry(1)), (frontend("0.0.0.0"), entry(2))].into(),
            members: [((1, here), leaving), ((2, there), Member::default())].into(),
            ..Observed::default()
        };
        let stranded = |protocol, vip: &str, remote| {
            let connection = Connection { protocol, remote, cookie: 1 };
            is_stranded(&now, &connection, || vip.parse().ok())
        };
        assert!(!stranded(Protocol::Udp, "10.96.0.1:53", here), "it may finish");
        assert!(stranded(Protocol::Udp, "10.96.0.1:53", there));
        assert!(!stranded(Protocol::Udp, "it named the pod", there));
        assert!(!stranded(Protocol::Udp, "192.0.2.1:53", there), "a node port");
        assert!(stranded(Protocol::Udp, "192.0.2.1:53", here));
        assert!(stranded(Protocol::Udp, "10.96.0.9:53", here), "the service is gone");
        assert!(!stranded(Protocol::Tcp, "10.96.0.9:53", here), "the other side says so");
    }

    #[test]
    fn only_what_cannot_go_on_is_ended() {
        let to = |protocol, remote: &str| Connection {
            protocol,
            remote: remote.parse().unwrap(),
            cookie: 1,
        };
        let through = |vip: &str| Some(vip.parse().unwrap());
        let index = Index::new([
            gone("10.96.0.1", Protocol::Udp, false),
            gone("10.96.0.1", Protocol::Tcp, false),
            gone("::", Protocol::Sctp, true),
        ]);
        assert_eq!(index.protocols(), [Protocol::Udp], "a stream to a pod that lives goes on");
        let udp = to(Protocol::Udp, "10.244.1.5:5353");
        assert!(index.means(&udp, || through("10.96.0.1:53")));
        assert!(!index.means(&udp, || through("10.96.0.2:53")), "another service has it");
        assert!(!index.means(&udp, || None), "it named the pod");
        assert!(!index.means(&to(Protocol::Udp, "10.244.1.6:5353"), || through("10.96.0.1:53")));
        let index = Index::new([
            gone("10.96.0.1", Protocol::Tcp, true),
            gone("0.0.0.0", Protocol::Udp, true),
        ]);
        assert!(index.means(&to(Protocol::Tcp, "10.244.1.5:5353"), || None));
        assert!(index.means(&udp, || through("192.0.2.7:53")), "a node port");
        assert!(!index.means(&udp, || through("192.0.2.7:54")));
    }
}
