//! An agent with another ABI than the one that made the pods: upgraded, or taken back to what it was.

use serde_json::{Value, json};

use super::node::{Container, FIRST_POD, Node, POD_PORT, until, until_left};
use super::runtime::Attachment;
use crate::machine;

const SERVER: u32 = 101;
const CLIENT: u32 = 102;
const TO_SERVER: u32 = 201;

/// As CRI names a pod.
fn pod(container: &Container, name: &str) -> Attachment {
    container.eth0().args(&format!("K8S_POD_NAMESPACE=default;K8S_POD_NAME={name}"))
}

/// The server receives from these identities.
fn policy(clients: &[u32]) -> Value {
    let rule = |client: &u32| json!({"policy": TO_SERVER, "identity": client, "ports": "everything", "number": 300});
    json!({
        "active": true,
        "pods": {
            "default/server": {"identity": SERVER, "ingress": TO_SERVER, "egress": 0},
            "default/client": {"identity": CLIENT, "ingress": 0, "egress": 0},
        },
        "identities": {},
        "blocks": {},
        "rules": clients.iter().map(rule).collect::<Vec<_>>(),
        "names": {},
    })
}

#[test]
fn changed_policies_reach_pods_that_another_version_made() {
    let name = "network::versions::changed_policies_reach_pods_that_another_version_made";
    machine::run_empty(name, async |cgroup| {
        let mut node = Node::start(cgroup);
        let network = Node::network();
        let before = Node::left();
        let (server, client) = (Container::new("server"), Container::new("client"));
        let (serves, asks) = (pod(&server, "server"), pod(&client, "client"));
        let result = network.add(&serves).unwrap();
        let other = network.add(&asks).unwrap();
        let _server = server.serve();
        let page = format!("http://{FIRST_POD}:{POD_PORT}");
        let ask = || client.run(&["timeout", "2", "busybox", "wget", "-qO-", &page]);
        let is_served = || ask().is_ok_and(|said| said.trim() == "server");
        until("the client is served", is_served);

        // There and back: the second time they are pods of a version that they were not made by.
        for _ in 0..2 {
            node.kill_agent();
            let theirs = node.change_version();
            node.start_agent();
            until("the other version has ended", || !theirs.exists());
            assert!(is_served());
            for (clients, allowed) in [(vec![], false), (vec![103], false), (vec![CLIENT], true)] {
                node.kill_agent();
                node.save_policy(policy(&clients));
                node.start_agent();
                until("the new policy is in force", || is_served() == allowed);
            }
            let checked = network.clone().version("1.1.0");
            checked.check(&serves, &result).unwrap();
            checked.check(&asks, &other).unwrap();
        }
        network.del(&serves, &result).unwrap();
        network.del(&asks, &other).unwrap();
        drop((server, client));
        until_left(&before);
        drop(node);
    });
}
