//! A node's own containerd: configuration, start, images.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::command::{self, output, wait_until};
use crate::image::{self, Named};
use crate::layout::NodeLayout;
use crate::process::{Daemon, Launch};

/// Namespace in which CRI keeps its containers.
pub const NAMESPACE: &str = "k8s.io";

/// Writes the configuration and starts containerd in the node, unless it runs with this configuration.
pub fn start(node: &NodeLayout, daemon: &Daemon, mut launch: Launch) -> Result<()> {
    let file = node.state.join("containerd.toml");
    let wanted = config(node);
    let same = fs::read_to_string(&file).is_ok_and(|text| text == wanted);
    if same && daemon.pid().is_some() {
        return Ok(());
    }
    daemon.stop(Duration::from_secs(10))?;
    for folder in [cni_bin(node), cni_conf(node), node.containerd_run()] {
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    }
    fs::write(&file, wanted).with_context(|| format!("write {}", file.display()))?;
    launch.words = ["containerd", "--config"].map(str::to_owned).to_vec();
    launch.words.push(file.display().to_string());
    daemon.start(&launch)?;
    wait_ready(node).with_context(|| format!("last lines of its log:\n{}", daemon.tail(5)))
}

/// Waits until containerd answers.
pub fn wait_ready(node: &NodeLayout) -> Result<()> {
    let what = format!("containerd of {} answers", node.name);
    wait_until(&what, Duration::from_secs(30), || output(ctr(node).arg("version")).map(drop))
}

/// `ctr` for the node's containerd and CRI's namespace.
pub fn ctr(node: &NodeLayout) -> Command {
    let mut command = Command::new("ctr");
    command.arg("--address").arg(node.containerd_socket()).args(["--namespace", NAMESPACE]);
    command
}

/// Folder with the CNI plugin.
pub fn cni_bin(node: &NodeLayout) -> PathBuf {
    node.state.join("cni/bin")
}

/// Folder with the CNI configuration.
pub fn cni_conf(node: &NodeLayout) -> PathBuf {
    node.state.join("cni/net.d")
}

/// Imports the images that the node does not have.
pub fn import(node: &NodeLayout, archive: &Path, images: &[Named]) -> Result<()> {
    let present = output(ctr(node).args(["images", "list"]))?;
    let has = |image: &Named| {
        present.lines().any(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            words.first() == Some(&image.name.as_str()) && words.contains(&image.digest.as_str())
        })
    };
    if images.iter().all(has) {
        return Ok(());
    }
    let mut command = ctr(node);
    command.args(["images", "import", "--snapshotter", snapshotter(node)]).arg(archive);
    output(&mut command).with_context(|| format!("import images into {}", node.name)).map(drop)
}

/// Name of the snapshotter: overlayfs cannot lie on overlayfs, which is what a container's own root usually is.
pub fn snapshotter(node: &NodeLayout) -> &'static str {
    let path = node.state.display().to_string();
    let kind = command::run("stat", &["--file-system", "--format=%T", &path]);
    if kind.is_ok_and(|k| k.trim() == "overlayfs") { "native" } else { "overlayfs" }
}

fn config(node: &NodeLayout) -> String {
    let quoted = |path: PathBuf| format!("{:?}", path.display().to_string());
    format!(
        r#"version = 2
root = {root}
state = {state}

[grpc]
  address = {socket}

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  # Without CAP_SYS_RESOURCE nobody may be made less killable than containerd is.
  restrict_oom_score_adj = true
  # Pod namespaces below our own state folder, so that several containerds do not meet.
  netns_mounts_under_state_dir = true
  disable_tcp_service = true
  stream_server_address = "127.0.0.1"

[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = {cni_bin}
  conf_dir = {cni_conf}

[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "{snapshotter}"
  default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
  SystemdCgroup = false
"#,
        root = quoted(node.state.join("containerd")),
        state = quoted(node.containerd_run()),
        socket = quoted(node.containerd_socket()),
        pause = image::PAUSE,
        cni_bin = quoted(cni_bin(node)),
        cni_conf = quoted(cni_conf(node)),
        snapshotter = snapshotter(node),
    )
}
