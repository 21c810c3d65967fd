//! The end of `up`: an example application, requests to it by every way in, and what to try next.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::command::{output, wait_until};
use mesh_tests::pod::Pod;
use mesh_tests::{Artifacts, Cluster, artifacts};

use crate::say;

const HOST: &str = "hello.mesh.local";

/// Applies `examples/hello.yaml`, waits for its pods and asks them through ingress, service address and name.
pub(crate) fn example(cluster: &Cluster, built: &Artifacts) -> Result<()> {
    let manifest = artifacts::repository().join("examples/hello.yaml");
    say::step("apply examples/hello.yaml and wait for its pods");
    let mut apply = Command::new(&built.meshctl);
    apply.arg("--kubeconfig").arg(cluster.kubeconfig()).arg("apply").arg("-f").arg(&manifest);
    output(&mut apply)?;
    let kubectl = cluster.kubectl(built);
    kubectl.run(&["rollout", "status", "deployment/hello", "--timeout=90s"])?;
    say::step("ask it: by two nodes' ingress, by service address, by name");
    for node in cluster.nodes().iter().take(2) {
        let answer = ask(&format!("ingress of {}", node.name()), || {
            let url = format!("http://{}/", node.addresses().0);
            output(Command::new("curl").args([
                "-fsS",
                "-m",
                "3",
                "-H",
                &format!("Host: {HOST}"),
                &url,
            ]))
        })?;
        println!("  ingress of {}: {}", node.name(), answer.trim());
    }
    let service = kubectl.json(&["service", "hello"])?;
    let vip = service["spec"]["clusterIP"].as_str().context("the service has no address")?;
    let node = cluster.node(cluster.spec().nodes);
    let url = format!("http://{vip}/");
    let answer = ask("service address", || node.exec(&["curl", "-fsS", "-m", "3", &url]))?;
    println!("  {url} on {}: {}", node.name(), answer.trim());
    let pods = kubectl.pods("app=hello")?;
    let pod = Pod::from_json(cluster, pods.first().context("no pod of the example")?)?;
    let url = "http://hello.default.svc.cluster.local/";
    let answer = ask("name", || pod.get(url))?;
    println!("  {url} in pod {}: {}", pod.name, answer.trim());
    Ok(())
}

fn ask(what: &str, mut request: impl FnMut() -> Result<String>) -> Result<String> {
    wait_until(&format!("an answer by {what}"), Duration::from_secs(15), || {
        let answer = request()?;
        ensure!(answer.contains("\"host\":\"hello-"), "not the example's answer: {answer}");
        Ok(answer)
    })
}

/// What to try next.
pub(crate) fn print_next_steps(
    cluster: &Cluster,
    built: &Artifacts,
    kubeconfig: &Path,
    took: Duration,
) {
    let here = std::env::current_dir().unwrap_or_default();
    let short = |path: &Path| path.strip_prefix(&here).unwrap_or(path).display().to_string();
    let ingress: Vec<String> =
        cluster.nodes().iter().map(|n| format!("http://{}/", n.addresses().0)).collect();
    println!(
        "\nA cluster of {} nodes runs ({} s).\n\n  \
         ingress   {}  (Host: {HOST})\n  \
         API       {}\n\n\
         Try:\n  \
         export KUBECONFIG={}\n  \
         {} get pods -A -o wide\n  \
         curl -H 'Host: {HOST}' {}\n  \
         {} routes\n  \
         {} check\n  \
         cargo xtask status\n  \
         cargo xtask exec node-1 -- curl -s http://10.96.0.1\n  \
         cargo xtask logs node-1 -f\n  \
         cargo xtask down",
        cluster.spec().nodes,
        took.as_secs(),
        ingress.join("  "),
        cluster.server(),
        short(kubeconfig),
        short(&built.kubectl),
        ingress[0],
        short(&built.meshctl),
        short(&built.meshctl),
    );
}
