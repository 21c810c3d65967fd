//! What the checks share: the machines, kubectl, and a workload with a pod on each machine.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::command::{output, wait_until};
use mesh_tests::load::{Load, Report};
use mesh_tests::{Kubectl, artifacts};
use serde_json::Value;

use super::PATIENCE;
use super::machines::{Machine, Machines};

/// Host of the workload's ingress route.
const HOST: &str = "web.vm";
const RUNC: &str = "sudo runc --root /run/containerd/runc/k8s.io";

/// Everything that a check needs.
pub(crate) struct Lab {
    pub(crate) machines: Machines,
    pub(crate) kubectl: Kubectl,
}

/// One of the workload's pods.
#[derive(Debug, Clone)]
pub(crate) struct Pod {
    pub(crate) name: String,
    pub(crate) machine: Machine,
    pub(crate) v4: String,
    pub(crate) v6: String,
    container: String,
}

impl Lab {
    /// The machines that run, with the workload on them.
    pub(crate) fn open() -> Result<Self> {
        let machines = Machines::open()?;
        let kubectl = Kubectl::new(artifacts::kubectl(), machines.kubeconfig());
        let lab = Self { machines, kubectl };
        lab.kubectl.apply(WORKLOAD)?;
        lab.pods()?;
        Ok(lab)
    }

    /// The workload's pods, one on each machine, when all are ready.
    pub(crate) fn pods(&self) -> Result<Vec<Pod>> {
        let wanted = self.machines.all().len();
        wait_until("there is a pod on each machine", PATIENCE, || {
            let list = self.kubectl.wait_ready("app=web", wanted, PATIENCE)?;
            self.spread(&list)?;
            let mut pods = list.iter().map(|pod| self.pod(pod)).collect::<Result<Vec<_>>>()?;
            pods.sort_by(|a, b| a.machine.name.cmp(&b.machine.name));
            Ok(pods)
        })
    }

    /// Where a machine has two pods, because another one was away for long, the younger one has to go there.
    fn spread(&self, pods: &[Value]) -> Result<()> {
        let mut by_age: Vec<&Value> = pods.iter().collect();
        by_age.sort_by_key(|pod| pod["metadata"]["creationTimestamp"].to_string());
        let mut taken = BTreeSet::new();
        for pod in by_age {
            let node = pod["spec"]["nodeName"].to_string();
            if !taken.insert(node.clone()) {
                let name = pod["metadata"]["name"].as_str().unwrap_or_default();
                self.kubectl.run(&["delete", "pod", name, "--timeout=120s"])?;
                bail!("{name} was the second pod on {node}");
            }
        }
        Ok(())
    }

    fn pod(&self, pod: &Value) -> Result<Pod> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let node = text(&pod["spec"]["nodeName"]).context("a pod that runs has a node")?;
        let ips = pod["status"]["podIPs"].as_array().into_iter().flatten();
        let ips: Vec<String> = ips.filter_map(|ip| text(&ip["ip"])).collect();
        let of = |mark: char| ips.iter().find(|ip| ip.contains(mark)).cloned();
        let container = text(&pod["status"]["containerStatuses"][0]["containerID"]);
        let container = container.context("a pod that runs has a container")?;
        Ok(Pod {
            name: text(&pod["metadata"]["name"]).context("a pod has a name")?,
            machine: self.machine(&node)?.clone(),
            v4: of('.').context("the pod has no IPv4 address")?,
            v6: of(':').context("the pod has no IPv6 address")?,
            container: container.trim_start_matches("containerd://").to_owned(),
        })
    }

    /// The machine with this name.
    pub(crate) fn machine(&self, name: &str) -> Result<&Machine> {
        let found = self.machines.all().iter().find(|machine| machine.name == name);
        found.with_context(|| format!("no machine is called {name}"))
    }

    /// The service's addresses, IPv4 first.
    pub(crate) fn vips(&self) -> Result<[String; 2]> {
        let service = self.kubectl.json(&["service", "web"])?;
        let ips = service["spec"]["clusterIPs"].as_array().cloned().unwrap_or_default();
        let of = |mark: char| {
            let found = ips.iter().filter_map(Value::as_str).find(|ip| ip.contains(mark));
            found.map(str::to_owned).with_context(|| format!("addresses of the service: {ips:?}"))
        };
        Ok([of('.')?, of(':')?])
    }

    /// `meshctl ARGS -o json`, on the machine of the control service.
    pub(crate) fn meshctl(&self, args: &str) -> Result<Value> {
        let config = "/var/lib/mesh-control/admin.kubeconfig";
        let script = format!("sudo meshctl --kubeconfig {config} {args} -o json");
        let text = self.machines.control().run(&script)?;
        serde_json::from_str(&text).with_context(|| format!("understand {text:?}"))
    }

    /// Waits until all paths are direct, all pods are ready, and each pod reaches each other one.
    pub(crate) fn all_is_well(&self) -> Result<()> {
        self.pods()?;
        // Emulated machines pause now and then for longer than a path may be silent: not all have to be well at once.
        let mut direct = BTreeSet::new();
        wait_until("all paths are direct", PATIENCE, || {
            let peers = self.peers()?;
            let now = peers.iter().filter(|(.., peer)| peer["path"]["state"] == "direct");
            direct.extend(now.map(|(from, to, _)| (from.clone(), to.clone())));
            let missing = peers.iter().find(|(a, b, _)| !direct.contains(&(a.clone(), b.clone())));
            match missing {
                Some((from, to, peer)) => bail!("{from} to {to}: {}", peer["path"]),
                None => Ok(()),
            }
        })?;
        // Asked for each time: a machine that has booted may not have said yet that its containers are others.
        wait_until("all pods reach each other", PATIENCE, || {
            everybody_reaches_everybody(&self.pods()?)
        })
    }

    /// All pairs of nodes, as `meshctl peers` has them: from, to, what it says.
    pub(crate) fn peers(&self) -> Result<Vec<(String, String, Value)>> {
        let nodes = self.meshctl("peers")?;
        let mut pairs = vec![];
        for node in nodes.as_array().into_iter().flatten() {
            let from = node["node"].as_str().unwrap_or("?");
            for peer in node["peers"].as_array().into_iter().flatten() {
                let to = peer["node"].as_str().unwrap_or("?");
                pairs.push((from.to_owned(), to.to_owned(), peer.clone()));
            }
        }
        let count = self.machines.all().len();
        ensure!(pairs.len() == count * (count - 1), "{} pairs of {count} nodes", pairs.len());
        Ok(pairs)
    }

    /// Which engine carries a node's packets, by what the agent says of its node.
    pub(crate) fn engine(&self, machine: &Machine) -> Result<String> {
        let node = self.kubectl.json(&["node", &machine.name])?;
        let engine = node["metadata"]["annotations"]["mesh.dev/overlay"].as_str();
        engine.map(str::to_owned).with_context(|| format!("{} names no engine", machine.name))
    }

    /// How many backends of the workload on `node` the service tables of `at` have.
    pub(crate) fn backends(&self, at: &Machine, node: &Machine) -> Result<usize> {
        let text = at.run(
            "sudo curl -fsS -m 10 --unix-socket /run/mesh/agent.sock http://agent/mesh/v1/services",
        )?;
        let all: Value = serde_json::from_str(&text).context("understand the agent's services")?;
        let mine = all.as_array().into_iter().flatten().filter(|f| f["service"] == "default/web");
        let lists = mine.filter_map(|f| f["backends"].as_array());
        Ok(lists.flatten().filter(|backend| backend["node"] == node.name.as_str()).count())
    }

    /// A request to a machine's ingress, from this host.
    pub(crate) fn ingress(&self, machine: &Machine) -> Result<String> {
        let (host, url) = (format!("Host: {HOST}"), format!("http://{}/", machine.address));
        output(Command::new("curl").args(["-fsS", "-m", "10", "-H", &host, &url]))
    }
}

/// Each pod asks each other one, over both families.
pub(crate) fn everybody_reaches_everybody(pods: &[Pod]) -> Result<()> {
    for from in pods {
        let urls: Vec<String> = pods
            .iter()
            .filter(|to| to.name != from.name)
            .flat_map(|to| [format!("http://{}:8080/", to.v4), format!("http://[{}]:8080/", to.v6)])
            .collect();
        let answers = from.get(&urls)?;
        for to in pods.iter().filter(|to| to.name != from.name) {
            let heard = answers.matches(&format!("\"host\":\"{}\"", to.name)).count();
            ensure!(heard == 2, "{} heard {} {heard} times of 2: {answers}", from.name, to.name);
        }
    }
    Ok(())
}

impl Pod {
    /// `mesh-hello get` of each URL in the pod; what they answer.
    pub(crate) fn get(&self, urls: &[String]) -> Result<String> {
        let id = &self.container;
        let all: Vec<String> = urls.iter().map(|url| format!("'{url}'")).collect();
        let each = "for url; do /bin/mesh-hello get \"$url\"; echo; done";
        // One process for all, since an emulated machine takes a second to start one in a container.
        let script =
            format!("{RUNC} exec {id} /bin/sh -ec '{each}' sh {} </dev/null", all.join(" "));
        self.machine.run(&script).with_context(|| format!("in pod {}", self.name))
    }

    /// Load from inside the pod for so long.
    pub(crate) fn load(&self, url: &str, time: Duration) -> Result<Load> {
        let (id, secs) = (&self.container, time.as_secs());
        let settings = format!("--secs {secs} --rate 20 --workers 1");
        let mut ssh = self.machine.ssh();
        ssh.arg(format!("{RUNC} exec {id} /bin/mesh-hello load '{url}' {settings}"));
        Load::start(ssh)
    }
}

/// Waits for a load's report, shows it, and fails when a request failed.
pub(crate) fn unharmed(what: &str, load: Load) -> Result<Report> {
    let report = load.wait()?;
    println!("    {what}: {}", report.line());
    report.none_failed().with_context(|| what.to_owned())?;
    Ok(report)
}

/// Asks until `limit`; an error that stays names what was waited for.
pub(crate) fn soon(what: &str, limit: Duration, check: impl FnMut() -> Result<()>) -> Result<()> {
    let start = std::time::Instant::now();
    wait_until(what, limit, check)?;
    println!("    {what} after {:.1} s", start.elapsed().as_secs_f32());
    Ok(())
}

/// Fails when `seen` lacks `part`.
pub(crate) fn expect(what: &str, seen: &str, part: &str) -> Result<()> {
    if seen.contains(part) {
        return Ok(());
    }
    bail!("{what}: expected {part:?} in {seen:?}")
}

/// One pod for each machine: the scheduler spreads the pods of a Deployment.
const WORKLOAD: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: web
        image: mesh.local/hello:1
        ports: [{name: http, containerPort: 8080}]
        readinessProbe:
          httpGet: {path: /ready, port: http}
          periodSeconds: 1
          timeoutSeconds: 10
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  ipFamilyPolicy: PreferDualStack
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: http}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: web}
spec:
  rules:
  - host: web.vm
    http:
      paths:
      - {path: /, pathType: Prefix, backend: {service: {name: web, port: {name: http}}}}
";
