//! Whether the node can take pods: one judgement, told to the plugin and to the API.

use std::collections::BTreeMap;

use tokio::sync::watch;

use crate::board::{Board, Standing};
use crate::observe::Desired;
use crate::{cni, register};

/// Concerns without which a pod would have no network at all.
const NEEDED: [&str; 2] = ["node", "services"];
const OVERLAY: &str = "overlay";
const RUNTIME: &str = crate::reconcile::pods::RUNTIME;

/// Judges anew whenever something changes, for ever.
pub(crate) async fn judge(
    mut desired: watch::Receiver<Option<Desired>>,
    board: Board,
    mtu: u16,
    plugin: watch::Sender<cni::Readiness>,
    node: watch::Sender<register::Readiness>,
) {
    let mut standings = board.subscribe();
    loop {
        let network =
            network(desired.borrow_and_update().as_ref(), &standings.borrow_and_update(), mtu);
        let status = status(&network, &standings.borrow());
        plugin.send_if_modified(|old| replace(old, network));
        node.send_if_modified(|old| replace(old, status));
        let changed = tokio::select! {
            changed = desired.changed() => changed,
            changed = standings.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}

fn replace<T: PartialEq>(old: &mut T, new: T) -> bool {
    let changed = *old != new;
    *old = new;
    changed
}

fn network(
    desired: Option<&Desired>,
    standings: &BTreeMap<&'static str, Standing>,
    mtu: u16,
) -> cni::Readiness {
    let Some(desired) = desired else {
        let why = "the API has not been reached yet, and there is no snapshot of an earlier run";
        return cni::Readiness::starting(why);
    };
    let blocks = &desired.snapshot.node.blocks;
    let standing = |concern: &str| standings.get(concern).cloned().unwrap_or_default();
    let pending = NEEDED.into_iter().find(|concern| !standing(concern).ever);
    let unavailable = if blocks.is_empty() {
        Some("the control service has not assigned addresses to this node yet".to_owned())
    } else {
        pending.map(|concern| format!("{concern}: {}", trouble(&standing(concern))))
    };
    let overlay = standing(OVERLAY);
    let limited = (!overlay.ever || !overlay.failures.is_empty()).then(|| trouble(&overlay));
    cni::Readiness { blocks: blocks.as_slice().into(), mtu: mtu.into(), unavailable, limited }
}

fn trouble(standing: &Standing) -> String {
    if standing.failures.is_empty() {
        "not configured yet".to_owned()
    } else {
        standing.failures.join("; ")
    }
}

fn status(
    network: &cni::Readiness,
    standings: &BTreeMap<&'static str, Standing>,
) -> register::Readiness {
    let not = |reason, message: &str| register::Readiness {
        ready: false,
        reason,
        message: message.to_owned(),
    };
    if let Some(why) = &network.unavailable {
        return not("NetworkNotReady", why);
    }
    if let Some(why) = &network.limited {
        return not("OverlayDown", why);
    }
    match standings.get(RUNTIME) {
        Some(runtime) if !runtime.failures.is_empty() => {
            not("ContainerRuntimeDown", &runtime.failures.join("; "))
        }
        _ => register::Readiness {
            ready: true,
            reason: "AgentReady",
            message: "pods can be started".to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use mesh_model::{Objects, compile};

    #[test]
    fn a_node_is_ready_when_its_network_is() {
        let board = Board::default();
        let judge = |desired: Option<&Desired>| {
            let standings = board.subscribe().borrow().clone();
            let network = network(desired, &standings, 1420);
            let status = status(&network, &standings);
            (network, status.reason)
        };
        assert_eq!(judge(None).1, "NetworkNotReady");
        let mut snapshot = compile(&Objects::default(), &"n".parse().unwrap());
        let wrap = |snapshot: &mesh_model::Snapshot| Desired {
            snapshot: Arc::new(snapshot.clone()),
            outlook: Arc::default(),
            synced: true,
            preshared: Arc::default(),
        };
        let without = judge(Some(&wrap(&snapshot))).0;
        assert!(without.unavailable.unwrap().contains("addresses"));

        snapshot.node.blocks = vec!["10.244.1.0/24".parse().unwrap()];
        let desired = wrap(&snapshot);
        assert!(judge(Some(&desired)).0.unavailable.unwrap().contains("node"));
        board.done("node");
        board.failed("services", vec!["map is full".to_owned()]);
        assert!(judge(Some(&desired)).0.unavailable.unwrap().contains("map is full"));
        board.done("services");
        assert_eq!(judge(Some(&desired)).1, "OverlayDown");
        board.done("overlay");
        let (network, reason) = judge(Some(&desired));
        assert_eq!((network.unavailable, network.limited, reason), (None, None, "AgentReady"));

        board.failed("services", vec!["x".to_owned()]);
        assert_eq!(judge(Some(&desired)).1, "AgentReady", "once it worked, pods can be added");
        board.failed("runtime", vec!["containerd is away".to_owned()]);
        assert_eq!(judge(Some(&desired)).1, "ContainerRuntimeDown");
    }
}
