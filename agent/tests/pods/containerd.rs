//! The machine's containerd, with the images. Dropping it is a crash: the containers stay.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mesh_cri::Client;

use crate::image;

/// Nothing here takes longer, unless it fails.
const LIMIT: Duration = Duration::from_secs(90);
/// Where CRI keeps its containers.
pub(crate) const NAMESPACE: &str = "k8s.io";

pub(crate) struct Containerd {
    directory: PathBuf,
    child: Child,
}

impl Containerd {
    /// Starts it with its files in `directory`, and waits until it answers.
    pub(crate) async fn start(directory: &Path, plugins: &Path, networks: &Path) -> Self {
        std::fs::create_dir_all(directory.join("tmp")).unwrap();
        std::fs::write(directory.join("config.toml"), config(directory, plugins, networks))
            .unwrap();
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(directory.join("containerd.log"))
            .unwrap();
        let child = Command::new("containerd")
            .arg("--config")
            .arg(directory.join("config.toml"))
            .env("TMPDIR", directory.join("tmp"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let containerd = Self { directory: directory.to_owned(), child };
        let client = Client::new(&containerd.socket());
        let begun = Instant::now();
        while client.version().await.is_err() {
            assert!(begun.elapsed() < LIMIT, "containerd does not answer");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        containerd
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.join("containerd.sock")
    }

    /// `ctr` for the containers of CRI.
    pub(crate) fn ctr(&self) -> Command {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(self.socket()).args(["--namespace", NAMESPACE]);
        command
    }

    pub(crate) fn import_images(&self) {
        let archive = self.directory.join("images.tar");
        image::write(&archive);
        let mut import = self.ctr();
        import.args(["images", "import", "--snapshotter", "native"]).arg(&archive);
        let imported = import.output().unwrap();
        assert!(imported.status.success(), "{}", String::from_utf8_lossy(&imported.stderr));
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // It has ended already when the machine was taken down.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.directory.join("containerd.log"));
            let log = log.unwrap_or_default();
            let lines: Vec<&str> = log.lines().filter(|l| l.contains("level=error")).collect();
            eprintln!("containerd:\n{}", lines[lines.len().saturating_sub(15)..].join("\n"));
        }
    }
}

fn config(directory: &Path, plugins: &Path, networks: &Path) -> String {
    let quoted = |path: &Path| format!("{:?}", path.display().to_string());
    let at = |name: &str| quoted(&directory.join(name));
    format!(
        r#"version = 2
root = {root}
state = {state}
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.internal.v1.tracing"]
[grpc]
  address = {socket}
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  disable_tcp_service = true
  stream_server_address = "127.0.0.1"
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = {bin}
  conf_dir = {conf}
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "native"
  default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
"#,
        root = at("root"),
        state = at("state"),
        socket = at("containerd.sock"),
        bin = quoted(plugins),
        conf = quoted(networks),
        pause = image::PAUSE,
    )
}
