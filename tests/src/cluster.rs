//! A cluster: made, found again, changed to newer programs, and removed.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::artifacts::Artifacts;
use crate::command::{at_once, output, wait_until};
use crate::image;
use crate::kubectl::Kubectl;
use crate::layout::{Layout, MAX_NODES, Subnet};
use crate::node::Node;
use crate::process::{self, Daemon, Launch};
use crate::{cgroups, command, teardown, underlay};

/// A cluster's shape.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Distinguishes it from other clusters of the machine.
    pub id: String,
    /// How many nodes, 1 to 8.
    pub nodes: u8,
    /// Third octet of its underlay, 10.213.N.0/24.
    pub subnet: u8,
    /// Process (number and start time) whose end makes it an orphan; absent for one that stays.
    pub owner: Option<(i32, u64)>,
    /// How often the keys of pairs of nodes are replaced; as in production when absent.
    #[serde(default)]
    pub preshared_key_rotation_secs: Option<u32>,
}

/// A cluster on this machine.
#[derive(Debug, Clone)]
pub struct Cluster {
    layout: Layout,
    spec: Spec,
}

/// Called with what happens next.
pub type Progress<'a> = &'a (dyn Fn(&str) + Sync);

impl Cluster {
    /// The recorded cluster `id`, if there is one.
    pub fn open(id: &str) -> Result<Option<Self>> {
        let layout = Layout::new(id)?;
        let Ok(text) = fs::read_to_string(layout.record()) else { return Ok(None) };
        let record = layout.record();
        let spec = serde_json::from_str(&text).with_context(|| {
            format!("understand {}; `cargo xtask down` removes it", record.display())
        })?;
        Ok(Some(Self { layout, spec }))
    }

    /// Makes the cluster, or changes what is there to match: what is right already stays as it is.
    pub fn up(spec: Spec, artifacts: &Artifacts, progress: Progress) -> Result<Self> {
        let cluster = Self::machines(spec, artifacts, progress)?;
        cluster.start_programs(artifacts, progress)?;
        Ok(cluster)
    }

    /// Makes only what stands for machines: network, control groups, containerd with images.
    pub fn machines(spec: Spec, artifacts: &Artifacts, progress: Progress) -> Result<Self> {
        ensure!(
            (1..=MAX_NODES).contains(&spec.nodes),
            "--nodes {}: expected 1 to {MAX_NODES}",
            spec.nodes
        );
        artifacts.check()?;
        let layout = Layout::new(&spec.id)?;
        let old = Self::open(&spec.id)?.map(|c| c.spec);
        if old.is_some_and(|old| old.subnet != spec.subnet || old.nodes > spec.nodes) {
            progress("the cluster has another shape: removing it first");
            teardown::remove(&layout)?;
        }
        let cluster = Self { layout, spec };
        cluster.make_network(progress)?;
        progress(&format!("containerd and images on {} nodes", cluster.spec.nodes));
        let images = image::write_archive(artifacts, &cluster.archive())?;
        at_once(cluster.nodes(), |node| {
            node.start_containerd()?;
            node.import(&cluster.archive(), &images)
        })?;
        Ok(cluster)
    }

    /// Starts the control service and the agents, and waits until all nodes are ready.
    pub fn start_programs(&self, artifacts: &Artifacts, progress: Progress) -> Result<()> {
        self.start_control(artifacts, progress)?;
        progress("agents");
        let program = self.install(&artifacts.agent)?;
        at_once(self.nodes(), |node| node.start_agent(self, &program, &artifacts.cni))?;
        self.wait_ready(artifacts)
    }

    /// Removes it with all its traces.
    pub fn down(&self) -> Result<()> {
        teardown::remove(&self.layout)
    }

    /// Its names and paths.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Its shape.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Its underlay.
    pub fn subnet(&self) -> Subnet {
        Subnet(self.spec.subnet)
    }

    /// All nodes.
    pub fn nodes(&self) -> Vec<Node> {
        (1..=self.spec.nodes).map(|n| self.node(n)).collect()
    }

    /// Node `number`, from 1.
    pub fn node(&self, number: u8) -> Node {
        Node::new(&self.layout, self.subnet(), number)
    }

    /// The control service.
    pub fn control(&self) -> Daemon {
        Daemon::new("control", &self.layout.run(), self.layout.logs().join("control.log"))
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.layout.control_state().join("admin.kubeconfig")
    }

    /// The API's URL.
    pub fn server(&self) -> String {
        format!("https://{}:6443", self.subnet().control().0)
    }

    /// kubectl for it.
    pub fn kubectl(&self, artifacts: &Artifacts) -> Kubectl {
        Kubectl::new(artifacts.kubectl.clone(), self.kubeconfig())
    }

    /// Copies a program into the cluster's own folder, unless it is there already, and returns the copy's path.
    fn install(&self, program: &Path) -> Result<PathBuf> {
        let copy = self.installed(program)?;
        process::install(program, &copy)?;
        Ok(copy)
    }

    /// The bridge, the namespaces, the control groups and the bpffs.
    fn make_network(&self, progress: Progress) -> Result<()> {
        progress(&format!("bridge {} and {} nodes", self.layout.bridge(), self.spec.nodes));
        for folder in [self.layout.run(), self.layout.bin(), self.layout.logs()] {
            fs::create_dir_all(&folder).with_context(|| {
                format!("make {}: a cluster needs root; run with sudo", folder.display())
            })?;
        }
        let record = serde_json::to_string_pretty(&self.spec).context("write down the shape")?;
        fs::write(self.layout.record(), record).context("write down the shape")?;
        underlay::make_bridge(&self.layout, self.subnet())?;
        mount_bpffs(&self.layout.bpffs())?;
        cgroups::make(&self.control_cgroup())?;
        self.nodes().iter().try_for_each(|node| node.make_machine(&self.layout))
    }

    fn control_cgroup(&self) -> String {
        format!("{}/control", self.layout.cgroup())
    }

    fn archive(&self) -> PathBuf {
        self.layout.state().join("images.tar")
    }

    /// Where the cluster's own copy of a program is.
    fn installed(&self, program: &Path) -> Result<PathBuf> {
        let name = program.file_name().context("a program has a file name")?;
        Ok(self.layout.bin().join(name))
    }

    /// Starts the control service again: the very program that ran before.
    pub fn restart_control(&self, artifacts: &Artifacts) -> Result<()> {
        let program = self.installed(&artifacts.control)?;
        self.control().start(&self.launch_control(&program))?;
        self.wait_control()
    }

    /// Starts a node's agent again: the very program that ran before.
    pub fn restart_agent(&self, node: &Node, artifacts: &Artifacts) -> Result<()> {
        node.start_agent(self, &self.installed(&artifacts.agent)?, &artifacts.cni)
    }

    /// Puts another file in the place of the agent's program, with the same content, and starts a node's agent anew.
    pub fn upgrade_agent(&self, node: &Node, artifacts: &Artifacts) -> Result<()> {
        let program = self.installed(&artifacts.agent)?;
        let new = program.with_extension("new");
        fs::copy(&program, &new).with_context(|| format!("copy {}", program.display()))?;
        fs::rename(&new, &program).with_context(|| format!("replace {}", program.display()))?;
        node.start_agent(self, &program, &artifacts.cni)
    }

    /// Starts the control service, or restarts it when its program changed; waits until it answers.
    fn start_control(&self, artifacts: &Artifacts, progress: Progress) -> Result<()> {
        let daemon = self.control();
        let program = self.install(&artifacts.control)?;
        let launch = self.launch_control(&program);
        if daemon.runs(&launch) {
            return self.wait_control();
        }
        progress("mesh-control");
        daemon.stop(Duration::from_secs(10))?;
        fs::create_dir_all(self.layout.control_state())
            .context("make the data folder of mesh-control")?;
        fs::write(self.plan(), self.subnet().plan()).context("write the cluster's plan")?;
        daemon.start(&launch)?;
        self.wait_control().with_context(|| format!("last lines of its log:\n{}", daemon.tail(5)))
    }

    /// The file with the plan that the control service starts with.
    fn plan(&self) -> PathBuf {
        self.layout.control_state().join("plan.yaml")
    }

    fn launch_control(&self, program: &Path) -> Launch {
        let group = cgroups::unified_root().map(|root| root.join(self.control_cgroup()));
        let data = self.layout.control_state().display().to_string();
        let listen = format!("{}:6443", self.subnet().control().0);
        let program = program.display().to_string();
        let plan = self.plan().display().to_string();
        let words =
            [program.as_str(), "--data-dir", &data, "--listen", &listen, "--cluster-config", &plan];
        let mut words = words.map(str::to_owned).to_vec();
        if let Some(secs) = self.spec.preshared_key_rotation_secs {
            words.extend(["--preshared-key-rotation".to_owned(), secs.to_string()]);
        }
        Launch { words, cgroup: group.ok(), env: backtrace(), netns: None }
    }

    fn wait_control(&self) -> Result<()> {
        let url = format!("{}/readyz", self.server());
        wait_until("mesh-control answers", Duration::from_secs(20), || {
            if self.control().pid().is_none() {
                bail!("it does not run");
            }
            ensure!(self.kubeconfig().exists(), "it has not written its kubeconfig");
            command::run("curl", &["-ksS", "--max-time", "3", "-o", "/dev/null", &url]).map(drop)
        })
    }

    /// Waits until the API knows all nodes as ready.
    pub fn wait_ready(&self, artifacts: &Artifacts) -> Result<()> {
        let kubectl = self.kubectl(artifacts);
        wait_until("all nodes are ready", Duration::from_secs(60), || {
            let list = kubectl.json(&["nodes"])?;
            let items = list["items"].as_array().cloned().unwrap_or_default();
            let ready = items.iter().filter(|n| crate::kubectl::is_ready(n)).count();
            if ready == usize::from(self.spec.nodes) {
                return Ok(());
            }
            let log = self.nodes().iter().map(|n| n.agent().tail(2)).collect::<Vec<_>>().join("\n");
            bail!("{ready} of {} are ready; the agents' last words:\n{log}", self.spec.nodes)
        })
    }

    /// Keeps the record of the last state of all programs, for a failed test: logs go to `folder`.
    pub fn save_logs(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).context("make a folder for logs")?;
        let from = format!("{}/.", self.layout.logs().display());
        command::run("cp", &["-r", &from, &folder.display().to_string()]).map(drop)
    }
}

/// Clusters whose owner has ended: left by a test run that was killed.
pub fn orphans() -> Result<Vec<Cluster>> {
    let sample = Layout::new("x")?;
    let folder = sample.state();
    let all = folder.parent().map(Path::to_owned).unwrap_or_default();
    let mut found = Vec::new();
    for entry in fs::read_dir(all).into_iter().flatten().flatten() {
        let Ok(id) = entry.file_name().into_string() else { continue };
        let Ok(Some(cluster)) = Cluster::open(&id) else { continue };
        let alive = |(pid, start)| process::start_time(pid) == Some(start);
        if cluster.spec.owner.is_some_and(|o| !alive(o)) {
            found.push(cluster);
        }
    }
    Ok(found)
}

/// Each program tells where it panicked.
pub(crate) fn backtrace() -> Vec<(String, String)> {
    vec![("RUST_BACKTRACE".to_owned(), "1".to_owned())]
}

fn mount_bpffs(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let kind = command::run("stat", &["-f", "-c", "%T", &folder.display().to_string()])?;
    if kind.trim() == "bpf_fs" {
        return Ok(());
    }
    let mut mount = std::process::Command::new("mount");
    mount.args(["-t", "bpf", "bpf"]).arg(folder);
    output(&mut mount).map(drop)
}
