//! What the tests share: the cluster, and the workload that most of them talk to.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::command::{output, wait_until};
use mesh_tests::layout::{Layout, Subnet};
use mesh_tests::load::Load;
use mesh_tests::pod::Pod;
use mesh_tests::{Artifacts, Cluster, Kubectl, Node, Spec, process, underlay};

/// Host of the workload's ingress route.
pub(crate) const HOST: &str = "web.test";
/// Labels of the workload's pods.
pub(crate) const WEB: &str = "app=web";
/// Replicas when no test has changed them.
pub(crate) const REPLICAS: usize = 3;
/// How long pods may take to come and go on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A test, named.
pub(crate) struct Named {
    /// Its name.
    pub(crate) name: &'static str,
    /// What it does.
    pub(crate) run: fn(&World) -> Result<()>,
}

/// A list of tests from functions, each by its own name.
#[macro_export]
macro_rules! tests {
    ($($test:ident),+ $(,)?) => {
        pub(crate) const TESTS: &[$crate::world::Named] =
            &[$($crate::world::Named { name: stringify!($test), run: $test }),+];
    };
}

/// The cluster of this run: its id is our process's, so that several runs do not meet.
pub(crate) fn spec() -> Result<Spec> {
    let pid = std::process::id();
    let id = format!("t{}", pid % 1_000_000);
    let subnet: Subnet = underlay::free_subnet(&Layout::new(&id)?, 1 + (pid % 200) as u8)?;
    let start = process::start_time(pid.cast_signed()).context("read our own start time")?;
    Ok(Spec {
        id,
        nodes: 3,
        subnet: subnet.0,
        owner: Some((pid.cast_signed(), start)),
        preshared_key_rotation_secs: Some(5),
    })
}

/// The cluster and the tools to work on it.
pub(crate) struct World {
    /// The cluster.
    pub(crate) cluster: Cluster,
    /// The programs.
    pub(crate) artifacts: Artifacts,
    /// kubectl for the cluster.
    pub(crate) kubectl: Kubectl,
}

impl World {
    pub(crate) fn new(cluster: Cluster, artifacts: Artifacts) -> Self {
        let kubectl = cluster.kubectl(&artifacts);
        Self { cluster, artifacts, kubectl }
    }

    /// A cluster that runs already.
    pub(crate) fn open(id: &str) -> Result<Self> {
        let cluster = Cluster::open(id)?.with_context(|| format!("there is no cluster {id}"))?;
        let world = Self::new(cluster, Artifacts::locate(false));
        world.start_workload()?;
        Ok(world)
    }

    /// Applies the workload with its first version and waits until it serves.
    pub(crate) fn start_workload(&self) -> Result<()> {
        self.kubectl.apply(&workload(REPLICAS, 1))?;
        self.kubectl.wait_ready(WEB, REPLICAS, PATIENCE)?;
        wait_until("the workload answers through every node", Duration::from_secs(20), || {
            self.cluster.nodes().iter().try_for_each(|node| self.curl(node, "/", &[]).map(drop))
        })
    }

    /// The workload's pods.
    pub(crate) fn pods(&self) -> Result<Vec<Pod>> {
        let list = self.kubectl.wait_ready(WEB, REPLICAS, PATIENCE)?;
        list.iter().map(|p| Pod::from_json(&self.cluster, p)).collect()
    }

    /// Two of the workload's pods, on two nodes.
    pub(crate) fn two_pods(&self) -> Result<(Pod, Pod)> {
        let pods = self.pods()?;
        let first = pods.first().context("the workload has no pod")?;
        let other = pods.iter().find(|p| p.node.name() != first.node.name());
        Ok((first.clone(), other.context("all pods are on one node")?.clone()))
    }

    /// The service's addresses, IPv4 first.
    pub(crate) fn vips(&self) -> Result<(String, String)> {
        let service = self.kubectl.json(&["service", "web"])?;
        let all: Vec<&str> = service["spec"]["clusterIPs"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|v| v.as_str())
            .collect();
        let of = |mark: char| all.iter().find(|a| a.contains(mark)).map(|a| (*a).to_owned());
        Ok((of('.').context("no IPv4 address")?, of(':').context("no IPv6 address")?))
    }

    /// A request to the workload through a node's ingress, from outside the cluster.
    pub(crate) fn curl(&self, node: &Node, path: &str, more: &[&str]) -> Result<String> {
        let host = format!("Host: {HOST}");
        let url = format!("http://{}{path}", node.addresses().0);
        let mut curl = Command::new("curl");
        output(curl.args(["-fsS", "-m", "5", "-H", &host]).args(more).arg(url))
    }

    /// Load on a node's ingress from outside the cluster.
    pub(crate) fn ingress_load(&self, node: &Node, settings: &[&str]) -> Result<Load> {
        let mut command = Command::new(&self.artifacts.hello);
        let url = format!("http://{}/", node.addresses().0);
        command.args(["load", &url, "--host", HOST]).args(settings);
        Load::start(command)
    }

    /// Load from inside a pod.
    pub(crate) fn pod_load(&self, pod: &Pod, url: &str, settings: &[&str]) -> Result<Load> {
        let mut words = vec!["/bin/mesh-hello", "load", url];
        words.extend(settings);
        Load::start(pod.command(&words))
    }

    /// An empty folder for this test's files.
    pub(crate) fn scratch(&self, name: &str) -> Result<PathBuf> {
        let folder = self.cluster.layout().state().join("scratch").join(name);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).context("make a scratch folder")?;
        Ok(folder)
    }

    /// Removes objects, whether or not they are there.
    pub(crate) fn clean(&self, objects: &[&str]) -> Result<()> {
        let mut args = vec!["delete", "--ignore-not-found", "--timeout=60s"];
        args.extend(objects);
        self.kubectl.run(&args).map(drop)
    }
}

/// Fails with what was seen.
pub(crate) fn expect(what: &str, seen: &str, part: &str) -> Result<()> {
    ensure!(seen.contains(part), "{what}: expected {part:?} in {seen:?}");
    Ok(())
}

/// The manifest: a Deployment, its Service on both families, and an Ingress.
pub(crate) fn workload(replicas: usize, version: u8) -> String {
    format!(
        "
apiVersion: apps/v1
kind: Deployment
metadata: {{name: web}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {{app: web}}}}
  template:
    metadata: {{labels: {{app: web}}}}
    spec:
      terminationGracePeriodSeconds: 20
      containers:
      - name: web
        image: mesh.local/hello:{version}
        ports: [{{name: http, containerPort: 8080}}]
        readinessProbe:
          httpGet: {{path: /ready, port: http}}
          periodSeconds: 1
---
apiVersion: v1
kind: Service
metadata: {{name: web}}
spec:
  ipFamilyPolicy: PreferDualStack
  selector: {{app: web}}
  ports:
  - {{name: http, port: 80, targetPort: http}}
  - {{name: tcp, port: 9000}}
  - {{name: udp, port: 9001, protocol: UDP}}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {{name: web}}
spec:
  rules:
  - host: {HOST}
    http:
      paths:
      - {{path: /, pathType: Prefix, backend: {{service: {{name: web, port: {{name: http}}}}}}}}
"
    )
}
