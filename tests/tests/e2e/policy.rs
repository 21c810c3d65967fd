//! NetworkPolicies, applied with kubectl, between real pods on two nodes.

use std::time::Duration;

use anyhow::{Result, ensure};

use mesh_tests::command::wait_until;
use mesh_tests::pod::Pod;

use crate::tests;
use crate::world::World;

tests![policies_deny_and_allow_pods,];

const POLICIES: [&str; 2] = ["networkpolicy/web-closed", "networkpolicy/web-http"];
/// Much longer than a change takes; a denied connection is not refused, so that each try takes its time.
const SOON: Duration = Duration::from_secs(30);

/// Nobody may speak to the workload.
const CLOSED: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web-closed}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress]
";

/// Its own pods may, at the port with that name.
const HTTP: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web-http}
spec:
  podSelector: {matchExpressions: [{key: app, operator: In, values: [web]}]}
  ingress:
  - from: [{podSelector: {matchLabels: {app: web}}}]
    ports: [{port: http}]
";

fn policies_deny_and_allow_pods(world: &World) -> Result<()> {
    world.clean(&POLICIES)?;
    let result = deny_and_allow(world);
    world.clean(&POLICIES)?;
    result?;
    let (a, b) = world.two_pods()?;
    wait_until("everything is allowed again", SOON, || sees(&a, &b, [true, true, true]))
}

fn deny_and_allow(world: &World) -> Result<()> {
    let (a, b) = world.two_pods()?;
    sees(&a, &b, [true, true, true])?;
    world.kubectl.apply(CLOSED)?;
    wait_until("everything is denied", SOON, || sees(&a, &b, [false, false, false]))?;
    // The node's own probes go on: the pods stay ready.
    ensure!(world.pods()?.len() == crate::world::REPLICAS, "a pod is not ready any more");
    world.kubectl.apply(HTTP)?;
    wait_until("HTTP is allowed", SOON, || sees(&a, &b, [true, false, false]))
}

/// Whether HTTP, another TCP port and UDP get through from one pod to the other, by both families.
fn sees(from: &Pod, to: &Pod, expected: [bool; 3]) -> Result<()> {
    for address in [to.v4()?.to_owned(), format!("[{}]", to.v6()?)] {
        let urls = [
            format!("http://{address}:8080/"),
            format!("tcp://{address}:9000/x"),
            format!("udp://{address}:9001/x"),
        ];
        let seen = urls.map(|url| from.get(&url).is_ok());
        ensure!(
            seen == expected,
            "{address}: HTTP, TCP, UDP pass: {seen:?}, expected {expected:?}"
        );
    }
    Ok(())
}
