//! Which node answers for a service's address on the local network, and telling the network when that changes.
//!
//! Every node decides by itself, from the nodes that exist and those that it knows to be away: no lease has to run out, and the
//! control service is not needed. Nodes that disagree for a moment, because one has heard of a death before another, end up with
//! the same owner, who tells the network again. Answering questions is the programs' part and goes on without the agent.
//!
//! Known gap: two halves of a cluster that do not see each other both answer, each with the backends that it has.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use mesh_kernel::edge::Announcement;
use mesh_model::snapshot::Announced;
use mesh_model::{NodeName, Snapshot};
use tokio::sync::watch;

use crate::errors::chain;
use crate::reconcile::edge::Uplinks;

/// When the network is told after a change: a single announcement may be lost.
const AFTER: [Duration; 3] =
    [Duration::ZERO, Duration::from_millis(200), Duration::from_millis(1000)];
/// How often it is told without a change: for switches that forget, and after somebody else was wrong.
const AGAIN: Duration = Duration::from_secs(10);

/// The addresses that this node answers for: those for which it comes first among the candidates that are there.
pub(crate) fn owned(
    announced: &[Announced],
    snapshot: &Snapshot,
    away: &BTreeSet<NodeName>,
) -> BTreeSet<IpAddr> {
    let peers = snapshot.peers.iter().map(|peer| &peer.node).filter(|node| !away.contains(*node));
    let present: Vec<&NodeName> = peers.chain([&snapshot.node.name]).collect();
    let is_own = |one: &&Announced| {
        let may = |node: &&&NodeName| one.nodes.as_ref().is_none_or(|nodes| nodes.contains(**node));
        let first =
            present.iter().filter(may).max_by_key(|node| (weight(one.address, node), **node));
        first.is_some_and(|node| **node == snapshot.node.name)
    };
    announced.iter().filter(is_own).map(|one| one.address).collect()
}

/// Rendezvous hashing: each address has its own order of nodes, so that addresses are shared out, and only those of a node that
/// goes move. FNV-1a, stirred; the same in all versions.
fn weight(address: IpAddr, node: &NodeName) -> u64 {
    let text = format!("{address} {node}");
    let sum = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let sum = (sum ^ sum >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    sum ^ sum >> 33
}

type Task = (BTreeSet<IpAddr>, Uplinks);

/// Tells the network for as long as it lives.
pub(crate) struct Announcer(watch::Sender<Task>);

impl Announcer {
    pub(crate) fn start() -> Self {
        let (sender, receiver) = watch::channel(Task::default());
        tokio::spawn(run(receiver));
        Self(sender)
    }

    /// Announces these addresses now, and again from time to time.
    pub(crate) fn announce(&self, owned: BTreeSet<IpAddr>, uplinks: Uplinks) {
        self.0.send_replace((owned, uplinks));
    }
}

async fn run(mut tasks: watch::Receiver<Task>) {
    let (mut round, mut said) = (0, None);
    loop {
        let task = tasks.borrow_and_update().clone();
        let wait = AFTER.get(round + 1).map_or(AGAIN, |next| *next - AFTER[round]);
        round = (round + 1).min(AFTER.len() - 1);
        // The one before goes on listening until the next one does.
        said = tell(task, said).await;
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            changed = tasks.changed() => match changed {
                Ok(()) => round = 0,
                Err(_) => return,
            },
        }
    }
}

/// Says it once; what is to be said is prepared when it is new.
async fn tell(task: Task, said: Option<(Task, Announcement)>) -> Option<(Task, Announcement)> {
    if task.0.is_empty() {
        return None;
    }
    let work = tokio::task::spawn_blocking(move || {
        let announcement = match said.filter(|(same, _)| *same == task) {
            Some((_, announcement)) => announcement,
            None => Announcement::new(task.0.clone(), &task.1)?,
        };
        announcement.tell()?;
        Ok((task, announcement))
    });
    match work.await {
        Ok(Ok(said)) => Some(said),
        Ok(Err(error)) => {
            let error: std::io::Error = error;
            tracing::warn!(error = chain(&error), "addresses of services not announced");
            None
        }
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use mesh_model::snapshot::{LocalNode, Peer, WgKey};
    use mesh_model::{Objects, compile};

    use super::*;

    fn name(n: u8) -> NodeName {
        format!("n{n}").parse().unwrap()
    }

    /// What node `own` of five knows.
    fn snapshot(own: u8) -> Snapshot {
        let peer = |n: u8| Peer {
            node: name(n),
            public_key: WgKey([n; 32]),
            keys: vec![],
            endpoints: vec![],
            allowed_ips: vec![],
        };
        Snapshot {
            node: LocalNode { name: name(own), blocks: vec![], addresses: vec![], zone: None },
            peers: std::sync::Arc::new((0..5).filter(|n| *n != own).map(peer).collect()),
            ..compile(&Objects::default(), &name(own))
        }
    }

    fn addresses() -> Vec<Announced> {
        let address = |n: u8| IpAddr::from([192, 0, 2, n]);
        (0..100).map(|n| Announced { address: address(n), nodes: None }).collect()
    }

    /// Who answers for each address, by what every node but those in `dead` says.
    fn owners(dead: &[u8]) -> Vec<Vec<u8>> {
        let away: BTreeSet<NodeName> = dead.iter().map(|n| name(*n)).collect();
        let mut all = vec![vec![]; 100];
        for own in (0..5).filter(|n| !dead.contains(n)) {
            for address in owned(&addresses(), &snapshot(own), &away) {
                let IpAddr::V4(v4) = address else { panic!() };
                all[usize::from(v4.octets()[3])].push(own);
            }
        }
        all
    }

    #[test]
    fn each_address_has_one_owner_and_only_those_of_a_dead_node_move() {
        let before = owners(&[]);
        let after = owners(&[3]);
        for (old, new) in before.iter().zip(&after) {
            assert_eq!((old.len(), new.len()), (1, 1));
            assert!(old == new || old[0] == 3, "moved from {old:?} to {new:?}");
        }
        for node in 0..5 {
            let share = before.iter().filter(|owner| owner[0] == node).count();
            assert!((5..=40).contains(&share), "node {node} has {share} of 100");
        }
    }

    #[test]
    fn only_candidates_answer() {
        let one = |nodes: &[u8]| Announced {
            address: "192.0.2.7".parse().unwrap(),
            nodes: Some(nodes.iter().map(|n| name(*n)).collect()),
        };
        let all = |announced: Announced| -> Vec<u8> {
            let mine = |own: &u8| {
                !owned(std::slice::from_ref(&announced), &snapshot(*own), &[].into()).is_empty()
            };
            (0..5).filter(mine).collect()
        };
        assert_eq!(all(one(&[2])), [2]);
        assert_eq!(all(one(&[])), [0_u8; 0]);
        assert_eq!(all(one(&[1, 4])).len(), 1);
    }
}
