//! `ctr run --cni`: a container without CRI and without us, on our network because our network is the one that is configured.

use std::fs;
use std::path::Path;
use std::process::Command;

use mesh_agent::drain::Drain;
use mesh_agent::pods::{AllowedSysctls, Runner, RunnerOptions, Thresholds};
use mesh_tests::command::output;

use super::node::{FIRST_POD, NETWORKS, Node, PLUGINS, POD_PORT, SERVICE, ask, until, until_left};
use crate::api::Api;
use crate::containerd::Containerd;
use crate::image::BUSYBOX;
use crate::machine;

const WEB: &str = "apiVersion: v1
kind: Pod
metadata: {name: web, namespace: default, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: mesh.test/busybox:1
    command: [sh, -c, 'echo served by web > /index.html; exec httpd -f -p 8080 -h /']
";

/// Runs the pod of a file, as the agent of a node does that has joined.
fn runner(containerd: &Containerd, cgroup: &str) -> Runner {
    fs::write("/etc/mesh/static-pods/web.yaml", WEB).unwrap();
    let options = RunnerOptions {
        containerd_socket: containerd.socket(),
        cgroup_parent: format!("/{cgroup}/pods"),
        log_dir: "/run/pod-logs".into(),
        log_max_bytes: 64 << 10,
        static_pods_dir: "/etc/mesh/static-pods".into(),
        state_dir: "/run/runner/state".into(),
        run_dir: "/run/runner/run".into(),
        node_name: "node-1".parse().unwrap(),
        node_addresses: vec!["192.0.2.1".parse().unwrap()],
        cluster_domain: "cluster.local".to_owned(),
        dns_servers: vec!["10.96.0.10".parse().unwrap()],
        eviction: Thresholds::default(),
        unsafe_sysctls: AllowedSysctls::default(),
        single_process_oom_kill: false,
        host_resolv_conf: "/etc/resolv.conf".into(),
    };
    Runner::start(options, Api::default(), Drain::alone())
}

/// A container in the part of the control group tree whose processes use services.
fn container(containerd: &Containerd, cgroup: &str, name: &str, flags: &[&str]) -> Command {
    let mut command = containerd.ctr();
    command.args(["run", "--cni", "--snapshotter", "native"]);
    command.args(["--cgroup", &format!("/{cgroup}/pods/{name}")]).args(flags).args([BUSYBOX, name]);
    command
}

#[test]
fn a_container_of_ctr_is_on_the_network() {
    machine::run_empty("network::ctr::a_container_of_ctr_is_on_the_network", async |cgroup| {
        let rig = Path::new("/run/rig");
        fs::create_dir_all(rig).unwrap();
        let (plugins, networks) = (Path::new(PLUGINS), Path::new(NETWORKS));
        let mut node = Node::start(cgroup.clone());
        let containerd = Containerd::start(rig, plugins, networks).await;
        containerd.import_images();
        let _runner = runner(&containerd, &cgroup);
        let pod = format!("{FIRST_POD}:{POD_PORT}");
        let address = pod.clone();
        let answers = move || ask(&address).is_ok_and(|said| said == "served by web");
        // Beside this task, which the runner shares its thread with.
        tokio::task::spawn_blocking(|| until("the pod answers", answers)).await.unwrap();
        let before = Node::left();

        // It ends by itself, and its DEL comes from ctr.
        let get = |server: &str| {
            let (address, port) = server.split_once(':').unwrap();
            format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {address} {port}")
        };
        let script = format!("ip -4 -o addr show eth0; {}; {}", get(&pod), get(SERVICE));
        let mut run = container(&containerd, &cgroup, "once", &["--rm"]);
        let said = output(run.args(["sh", "-c", &script])).unwrap();
        assert!(said.contains("inet 10.244.1."), "it has an address: {said}");
        assert_eq!(said.matches("served by web").count(), 2, "the pod and the service: {said}");
        until_left(&before);

        // It is thrown away without a DEL, which ctr leaves out for detached ones: the next agent sees that it is gone.
        let mut run = container(&containerd, &cgroup, "stays", &["--detach"]);
        output(run.args(["sleep", "1000"])).unwrap();
        assert_ne!(Node::left().links, before.links);
        for words in [
            ["task", "kill", "--signal", "KILL", "stays"].as_slice(),
            &["task", "delete", "--force", "stays"],
            &["container", "delete", "stays"],
        ] {
            // The task may be gone before it is deleted.
            let _ = output(containerd.ctr().args(words));
        }
        node.kill_agent();
        node.start_agent();
        until_left(&before);
        let leased = Node::leased();
        assert!(leased.len() == 1 && !leased.contains("k8s.io-stays"), "{leased:?}");
    });
}
