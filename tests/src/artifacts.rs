//! Where the programs are that a cluster runs: what `cargo xtask build` and `cargo xtask tools` made.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::command;

/// Folder of the source tree.
pub fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// Folder of everything built.
pub fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => env::current_dir().unwrap_or_default().join(folder),
        None => repository().join("target"),
    }
}

/// Triple of this machine's programs.
pub fn host_triple() -> String {
    format!("{}-unknown-linux-gnu", env::consts::ARCH)
}

/// kubectl of the version that we test with, from `cargo xtask tools`.
pub fn kubectl() -> PathBuf {
    target().join("tools/kubectl")
}

/// The programs.
#[derive(Debug, Clone)]
pub struct Artifacts {
    /// `mesh-control`.
    pub control: PathBuf,
    /// `mesh-agent`.
    pub agent: PathBuf,
    /// `meshctl`.
    pub meshctl: PathBuf,
    /// `mesh-cni`, static.
    pub cni: PathBuf,
    /// `mesh-hello`, static: workload and sandbox image.
    pub hello: PathBuf,
    /// A static busybox.
    pub busybox: PathBuf,
    /// kubectl.
    pub kubectl: PathBuf,
}

impl Artifacts {
    /// The paths, for a build with `--release` or without.
    pub fn locate(release: bool) -> Self {
        Self::below(&target(), release)
    }

    /// The same in another target folder.
    pub fn below(target: &Path, release: bool) -> Self {
        let built = target.join(if release { "release" } else { "debug" });
        let tiny = target.join(host_triple()).join("tiny");
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from);
        let found = busybox.iter().find(|p| p.is_file()).unwrap_or(&busybox[0]);
        Self {
            control: built.join("mesh-control"),
            agent: built.join("mesh-agent"),
            meshctl: built.join("meshctl"),
            cni: tiny.join("mesh-cni"),
            hello: tiny.join("mesh-hello"),
            busybox: found.clone(),
            kubectl: kubectl(),
        }
    }

    /// Says what is missing, and how to get it.
    pub fn check(&self) -> Result<()> {
        let built = [&self.control, &self.agent, &self.meshctl, &self.cni, &self.hello];
        for path in built {
            if !path.is_file() {
                bail!("{} is missing: run `cargo xtask build`", path.display());
            }
        }
        for path in [&self.busybox, &self.kubectl] {
            if !path.is_file() {
                bail!("{} is missing: run `cargo xtask tools`", path.display());
            }
        }
        for program in ["containerd", "runc", "ctr", "ip", "nsenter", "setsid"] {
            if !command::exists(program) {
                bail!("{program} is not installed: run `cargo xtask tools`");
            }
        }
        Ok(())
    }
}
