//! One agent in a network namespace of its own, without control service or containerd: it goes on from a saved snapshot.
//! Enough for its CNI side, which needs neither.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use mesh_tests::command::{output_with_input, run, wait_until};
use mesh_tests::process::resident_kib;
use mesh_tests::{Artifacts, cgroups};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(120);

/// The node. Dropping it ends its processes and removes what was made for it.
pub(crate) struct Alone {
    name: String,
    dir: PathBuf,
    cgroup: PathBuf,
    bpf: PathBuf,
    artifacts: Artifacts,
    agent: Option<Child>,
}

impl Alone {
    /// Makes it and waits until it can take pods. `which` tells the nodes of one process apart.
    pub(crate) fn start(artifacts: Artifacts, which: &str) -> Result<Self> {
        let name = format!("mesh-alone-{}-{which}", std::process::id());
        let mut node = Self {
            dir: Path::new("/run").join(&name),
            cgroup: cgroups::make(&name)?,
            bpf: Path::new("/sys/fs/bpf").join(&name),
            name,
            artifacts,
            agent: None,
        };
        run("ip", &["netns", "add", &node.name])?;
        for words in [
            "link set lo up",
            "link add up0 type veth peer name up1",
            "addr add 192.0.2.1/24 dev up0",
            "link set up0 up",
            "link set up1 up",
        ] {
            let mut all = vec!["-n", node.name.as_str()];
            all.extend(words.split(' '));
            run("ip", &all)?;
        }
        fs::create_dir_all(node.cgroup.join("daemons"))?;
        fs::create_dir_all(node.state())?;
        fs::write(node.state().join("snapshot.json"), node.snapshot().to_string())?;
        node.start_agent()?;
        Ok(node)
    }

    /// The name of its network namespace.
    pub(crate) fn namespace(&self) -> &str {
        &self.name
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    pub(crate) fn bpf(&self) -> &Path {
        &self.bpf
    }

    /// Resident memory of the agent.
    pub(crate) fn agent_kib(&self) -> Option<u64> {
        resident_kib(Pid::from_raw(self.agent.as_ref()?.id().cast_signed()))
    }

    /// Starts the agent and waits until the plugin is configured and answers.
    pub(crate) fn start_agent(&mut self) -> Result<()> {
        let text = |path: PathBuf| path.display().to_string();
        let log = fs::File::options().create(true).append(true).open(self.dir.join("log"))?;
        let script = r#"echo $$ > "$0" && exec nsenter --net=/run/netns/"$1" "${@:2}""#;
        let mut command = Command::new("bash");
        command.args(["-c", script]).arg(self.cgroup.join("daemons/cgroup.procs")).arg(&self.name);
        command.arg(&self.artifacts.agent).arg("run");
        for (flag, value) in [
            ("--node-name", self.name.clone()),
            ("--node-ip", "192.0.2.1".to_owned()),
            ("--server", "https://192.0.2.9:6443".to_owned()),
            ("--token", format!("mesh1.{}.{}", "ab".repeat(32), "0f".repeat(16))),
            ("--run-dir", text(self.dir.join("run"))),
            ("--state-dir", text(self.state())),
            ("--bpf-dir", text(self.bpf.clone())),
            ("--cgroup", text(self.cgroup.clone())),
            ("--cni-conf-dir", text(self.dir.join("net.d"))),
            ("--dns-upstream", "192.0.2.9".to_owned()),
            ("--overlay", "user".to_owned()),
        ] {
            command.args([flag, &value]);
        }
        self.agent = Some(command.stdin(Stdio::null()).stderr(log).spawn()?);
        wait_until("the node can take pods", PATIENCE, || {
            self.cni("STATUS", "", "").map(drop).context("STATUS of the plugin")
        })
    }

    /// As a crash does; it is collected by [`kill_agent`](Self::kill_agent).
    pub(crate) fn kill_now(&self) -> Result<()> {
        if let Some(child) = &self.agent {
            kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL)?;
        }
        Ok(())
    }

    /// As a crash does.
    pub(crate) fn kill_agent(&mut self) -> Result<()> {
        let Some(mut child) = self.agent.take() else { return Ok(()) };
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL)?;
        child.wait()?;
        Ok(())
    }

    /// What a runtime gives to the plugin on its standard input.
    pub(crate) fn config(&self) -> Result<String> {
        let file = self.dir.join("net.d/10-mesh.conflist");
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let list: Value = serde_json::from_str(&text)?;
        let mut plugin = list["plugins"][0].clone();
        plugin["name"] = list["name"].clone();
        plugin["cniVersion"] = json!("1.1.0");
        Ok(plugin.to_string())
    }

    /// Runs the plugin once.
    pub(crate) fn cni(&self, verb: &str, id: &str, netns: &str) -> Result<String> {
        call(&self.artifacts.cni, &self.config()?, verb, id, netns)
    }

    /// The plugin.
    pub(crate) fn plugin(&self) -> &Path {
        &self.artifacts.cni
    }

    /// Does something inside the node's network namespace, on a thread of its own; programs started there are inside, too.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = fs::File::open(Path::new("/run/netns").join(&self.name))?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&file, CloneFlags::CLONE_NEWNET)?;
                work()
            });
            match thread.join() {
                Ok(result) => result,
                Err(_) => bail!("a thread panicked"),
            }
        })
    }

    fn snapshot(&self) -> Value {
        json!({
            "cluster": {},
            "node": {
                "name": self.name,
                "blocks": ["10.244.1.0/24", "fd10:244:0:1::/64"],
                "addresses": ["192.0.2.1"],
            },
            "peers": [], "frontends": [],
            "dns": {"domain": "cluster.local", "services": [], "namespaces": ["default"], "podCidrs": []},
            "l7": {"routes": [], "certificates": []},
            "pods": [],
        })
    }
}

/// The programs of the build that was made last, and whether they are optimised.
pub(crate) fn newest() -> (Artifacts, bool) {
    let both = [Artifacts::locate(false), Artifacts::locate(true)];
    let built = both.each_ref().map(|a| fs::metadata(&a.agent).and_then(|m| m.modified()).ok());
    let [debug, release] = both;
    if built[1] > built[0] { (release, true) } else { (debug, false) }
}

/// Runs a plugin once, as a runtime does.
pub(crate) fn call(
    plugin: &Path,
    config: &str,
    verb: &str,
    id: &str,
    netns: &str,
) -> Result<String> {
    let mut command = Command::new(plugin);
    command
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("CNI_COMMAND", verb)
        .env("CNI_CONTAINERID", id)
        .env("CNI_NETNS", netns)
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", plugin.parent().unwrap_or(plugin));
    output_with_input(&mut command, config.as_bytes())
}

impl Drop for Alone {
    fn drop(&mut self) {
        // Nothing here can be done about a failure but to go on.
        let _ = cgroups::kill_all(&self.name);
        if let Some(mut child) = self.agent.take() {
            let _ = child.wait();
        }
        let _ = run("ip", &["netns", "del", &self.name]);
        let _ = fs::remove_dir_all(&self.bpf);
        let _ = fs::remove_dir_all(&self.dir);
        let _ = cgroups::remove(&self.name);
    }
}
