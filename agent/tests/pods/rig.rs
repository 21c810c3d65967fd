//! What runs on a test's machine: containerd, and the runner that is tested.
//!
//! ```text
//!   machine's network:  containerd, runner, host side of each pod's veth (10.88.0.1)
//!                                   |
//!   pod's network:                 eth0 10.88.0.N
//! ```
//!
//! The CNI plugin is a shell script, so that nothing but containerd, runc and iproute2 is needed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use mesh_agent::drain::Drain;
use mesh_agent::pods::{Removal, Runner, RunnerOptions, Thresholds};
use mesh_cri::Client;

use crate::api::Api;
use crate::containerd::Containerd;
use crate::machine;

/// Nothing here takes longer, unless it fails.
const LIMIT: Duration = Duration::from_secs(90);

/// Where shims and runc keep what they know, whatever the configuration says. Gone after a reboot.
const RUNTIME: &str = "/run/containerd";

const PLUGIN: &str = r#"#!/bin/sh
set -e
dir=$(dirname "$0")/addresses
mkdir -p "$dir"
reply() { echo "{\"cniVersion\":\"1.0.0\",\"interfaces\":[{\"name\":\"$CNI_IFNAME\",\"sandbox\":\"$CNI_NETNS\"}],\"ips\":[{\"interface\":0,\"address\":\"$1\"}]}"; }
case "$(basename "$0") $CNI_COMMAND" in
*VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["0.3.1","0.4.0","1.0.0"]}' ;;
"loopback ADD") nsenter --net="$CNI_NETNS" ip link set lo up; reply 127.0.0.1/8 ;;
"wire ADD")
  # A link is made with its owner in one step: this program may be killed after each.
  n=2; while ! ln -s "$CNI_CONTAINERID" "$dir/$n" 2>/dev/null; do n=$((n+1)); done
  ip link add "tp$n" type veth peer name "$CNI_IFNAME" netns "$CNI_NETNS"
  ip addr add 10.88.0.1/32 dev "tp$n"; ip link set "tp$n" up; ip route add "10.88.0.$n/32" dev "tp$n"
  nsenter --net="$CNI_NETNS" sh -c "ip addr add 10.88.0.$n/32 dev $CNI_IFNAME; ip link set $CNI_IFNAME up; ip route add 10.88.0.1/32 dev $CNI_IFNAME"
  reply "10.88.0.$n/32" ;;
"wire DEL")
  for link in "$dir"/*; do
    if [ "$(readlink "$link")" = "$CNI_CONTAINERID" ]; then
      n=$(basename "$link"); ip link del "tp$n" 2>/dev/null || true; rm -f "$link"
    fi
  done ;;
esac
"#;

pub(crate) struct Rig {
    pub(crate) api: Api,
    pub(crate) client: Client,
    directory: PathBuf,
    containerd: Option<Containerd>,
    cgroup: String,
}

impl Rig {
    /// A machine with containerd and the images.
    pub(crate) async fn start(cgroup: String) -> Self {
        let directory = PathBuf::from("/run/rig");
        let mut rig = Self {
            api: Api::default(),
            client: Client::new(&directory.join("containerd.sock")),
            cgroup,
            containerd: None,
            directory,
        };
        for folder in ["cni/bin", "cni/conf", "tmp"] {
            std::fs::create_dir_all(rig.path(folder)).unwrap();
        }
        for plugin in ["loopback", "wire"] {
            write_program(&rig.path("cni/bin").join(plugin), PLUGIN);
        }
        let conf = r#"{"cniVersion":"1.0.0","name":"test","plugins":[{"type":"wire"}]}"#;
        std::fs::write(rig.path("cni/conf/10-test.conflist"), conf).unwrap();
        rig.start_containerd().await;
        rig.containerd.as_ref().unwrap().import_images();
        rig
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    pub(crate) async fn start_containerd(&mut self) {
        self.containerd = None;
        let cni = (self.path("cni/bin"), self.path("cni/conf"));
        self.containerd = Some(Containerd::start(&self.directory, &cni.0, &cni.1).await);
    }

    /// Ends containerd as a crash would; the containers stay.
    pub(crate) fn kill_containerd(&mut self) {
        self.containerd = None;
    }

    /// What a power failure does: every process is gone, and with them the network namespaces.
    pub(crate) async fn reboot(&mut self) {
        self.kill_containerd();
        machine::kill_everything();
        mesh_tests::teardown::unmount_below(std::slice::from_ref(&self.directory)).unwrap();
        for folder in
            ["state", "run"].map(|name| self.path(name)).into_iter().chain([RUNTIME.into()])
        {
            let _ = std::fs::remove_dir_all(folder);
        }
        self.start_containerd().await;
    }

    /// Addresses that the CNI plugin has given out.
    pub(crate) fn addresses(&self) -> usize {
        std::fs::read_dir(self.path("cni/bin/addresses")).map_or(0, Iterator::count)
    }

    /// A new runner, as a new agent would start it.
    pub(crate) fn runner(&self) -> Runner {
        let runner = self.runner_without_api();
        runner.set_desired(self.api.work());
        runner
    }

    /// The same without a control service and without what an earlier agent knew.
    pub(crate) fn runner_without_api(&self) -> Runner {
        let options = RunnerOptions {
            containerd_socket: self.path("containerd.sock"),
            cgroup_parent: format!("/{}", self.cgroup),
            log_dir: self.path("log"),
            log_max_bytes: 64 << 10,
            static_pods_dir: self.path("static"),
            state_dir: self.path("agent"),
            run_dir: self.path("run"),
            node_name: "node-1".parse().unwrap(),
            node_addresses: vec!["127.0.0.1".parse().unwrap()],
            cluster_domain: "cluster.local".to_owned(),
            dns_servers: vec!["10.96.0.10".parse().unwrap()],
            // The disk is the machine's own, and others fill it.
            eviction: Thresholds::default(),
            unsafe_sysctls: "net.core.somaxconn".parse().unwrap(),
            single_process_oom_kill: false,
            host_resolv_conf: "/etc/resolv.conf".into(),
        };
        Runner::start(options, self.api.clone(), Drain::alone())
    }

    /// Waits until so many containers of the pod run.
    pub(crate) async fn until_running(&self, pod: &str, count: usize) {
        let begun = Instant::now();
        loop {
            let all = self.client.list_containers(Default::default()).await.unwrap();
            let runs = all.iter().filter(|c| {
                c.state() == mesh_cri::v1::ContainerState::Running
                    && c.labels.get("io.kubernetes.pod.name").is_some_and(|name| name == pod)
            });
            if runs.count() == count {
                return;
            }
            assert!(begun.elapsed() < LIMIT, "{pod} does not run");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What takes all pods down without an agent.
    pub(crate) fn removal(&self) -> Removal {
        Removal {
            containerd_socket: self.path("containerd.sock"),
            cgroup_parent: format!("/{}", self.cgroup),
            log_dir: self.path("log"),
            state_dir: self.path("agent"),
            run_dir: self.path("run"),
        }
    }

    /// Waits until it holds, passing each change of the API on to the runner, as a watch does.
    pub(crate) async fn until(&self, runner: &Runner, what: &str, holds: impl Fn(&Api) -> bool) {
        let begun = Instant::now();
        let mut seen = None;
        while !holds(&self.api) {
            if begun.elapsed() > LIMIT {
                let report = self.api.read(|state| {
                    format!(
                        "{:#?}\n{:#?}",
                        state.pods.values().map(|p| &p.status).collect::<Vec<_>>(),
                        state.events
                    )
                });
                panic!("not seen: {what}\n{report}");
            }
            let version = self.api.read(|state| state.version);
            if seen != Some(version) {
                runner.set_desired(self.api.work());
                seen = Some(version);
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        runner.set_desired(self.api.work());
    }

    /// A container's log, as an HTTP client reads it.
    pub(crate) async fn logs(&self, runner: &Runner, path: &str) -> (u16, String) {
        use http_body_util::BodyExt as _;
        use tower::ServiceExt as _;
        let request = axum::http::Request::get(format!("/containerLogs/test/{path}"))
            .body(axum::body::Body::empty())
            .unwrap();
        let response = runner.router().oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    /// Waits until a container that runs has said this, and nothing else.
    pub(crate) async fn until_said(&self, runner: &Runner, path: &str, text: &str) {
        let begun = Instant::now();
        loop {
            let logged = self.logs(runner, path).await;
            if logged == (200, text.to_owned()) {
                return;
            }
            assert!(begun.elapsed() < LIMIT, "{path}: {logged:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until nothing is left of any pod: what a killed agent had asked for may come to be after its pod is gone,
    /// and is taken down then.
    pub(crate) async fn nothing_is_left(&self) {
        let begun = Instant::now();
        loop {
            let left = (self.everything().await, self.addresses());
            if left == (vec![], 0) {
                return;
            }
            assert!(begun.elapsed() < LIMIT, "left: {left:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What containerd itself knows of CRI's containers or tasks, one identifier a line.
    pub(crate) fn ctr(&self, arguments: &[&str]) -> String {
        let output = self.containerd.as_ref().unwrap().ctr().args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Identifiers of all sandboxes and containers.
    pub(crate) async fn everything(&self) -> Vec<String> {
        let sandboxes = self.client.list_sandboxes(Default::default()).await.unwrap();
        let containers = self.client.list_containers(Default::default()).await.unwrap();
        let sandboxes = sandboxes.into_iter().map(|s| s.id);
        sandboxes.chain(containers.into_iter().map(|c| c.id)).collect()
    }
}

/// Written by another process: a file that this one has just written may still be open in a child that another thread is
/// starting, and cannot be executed then.
fn write_program(path: &Path, text: &str) {
    std::fs::write(path.with_extension("text"), text).unwrap();
    let copied = Command::new("install")
        .args(["-m", "755"])
        .arg(path.with_extension("text"))
        .arg(path)
        .status()
        .unwrap();
    assert!(copied.success());
}
