//! `package`: Debian packages of what was built. Units and examples lie in `dist/`.
//!
//! | Package | What is in it |
//! |---|---|
//! | `mesh-control` | the control service and its unit, which runs as a user of its own |
//! | `mesh-agent` | the agent with its workers and eBPF programs, `mesh-cni`, and the agent's unit |
//! | `meshctl` | the operator's tool |

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use mesh_tests::command::{self, run};
use mesh_tests::{Artifacts, artifacts};

use crate::say;

/// Shell that runs on the machine where a package is installed or removed.
struct Scripts {
    postinst: &'static str,
    prerm: &'static str,
}

struct Package {
    name: &'static str,
    description: &'static str,
    depends: &'static str,
    /// What goes where, with its mode.
    files: Vec<(PathBuf, &'static str, u32)>,
    /// Files that belong to the administrator once they are installed.
    conffiles: &'static str,
    scripts: Option<Scripts>,
}

/// Writes the packages into `folder` and returns their paths.
pub(crate) fn write(built: &Artifacts, folder: &Path) -> Result<Vec<PathBuf>> {
    if !command::exists("dpkg-deb") {
        bail!("dpkg-deb is not installed: packages are made on a Debian machine");
    }
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    packages(built).iter().map(|package| package.write(folder)).collect()
}

/// Where packages of a build go.
pub(crate) fn folder() -> PathBuf {
    artifacts::target().join("packages")
}

fn packages(built: &Artifacts) -> [Package; 3] {
    let dist = |name: &str| artifacts::repository().join("dist").join(name);
    [
        Package {
            name: "mesh-control",
            description: "Mesh: the control service of a container cluster",
            depends: "libc6 (>= 2.34), systemd, tzdata",
            files: vec![
                (built.control.clone(), "usr/bin/mesh-control", 0o755),
                (dist("mesh-control.service"), "lib/systemd/system/mesh-control.service", 0o644),
                (dist("mesh-control.sysusers"), "usr/lib/sysusers.d/mesh-control.conf", 0o644),
                (dist("mesh-control.default"), "etc/default/mesh-control", 0o644),
            ],
            conffiles: "/etc/default/mesh-control\n",
            scripts: Some(Scripts { postinst: CONTROL_POSTINST, prerm: CONTROL_PRERM }),
        },
        Package {
            name: "mesh-agent",
            description: "Mesh: network, services, names and pods of a node",
            depends: "libc6 (>= 2.34), systemd, containerd | containerd.io, containernetworking-plugins, nftables",
            files: vec![
                (built.agent.clone(), "usr/bin/mesh-agent", 0o755),
                // Where Debian's containerd looks for plugins.
                (built.cni.clone(), "usr/lib/cni/mesh-cni", 0o755),
                (dist("mesh-agent.service"), "lib/systemd/system/mesh-agent.service", 0o644),
                (dist("agent.yaml"), "usr/share/doc/mesh-agent/examples/agent.yaml", 0o644),
            ],
            conffiles: "",
            scripts: Some(Scripts { postinst: AGENT_POSTINST, prerm: AGENT_PRERM }),
        },
        Package {
            name: "meshctl",
            description: "Mesh: shows where traffic goes, and checks that it gets there",
            depends: "libc6 (>= 2.34)",
            files: vec![(built.meshctl.clone(), "usr/bin/meshctl", 0o755)],
            conffiles: "",
            scripts: None,
        },
    ]
}

/// Enabled, and what runs already is restarted as the new version.
const AGENT_POSTINST: &str = "#!/bin/sh
set -e
if [ \"$1\" = configure ] && [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    systemctl enable --quiet mesh-agent.service
    systemctl try-restart mesh-agent.service
fi
";

/// Without the program nobody would look after what it made.
const AGENT_PRERM: &str = "#!/bin/sh
set -e
if [ \"$1\" = remove ] && [ -d /run/systemd/system ]; then
    systemctl disable --quiet --now mesh-agent.service || true
    if [ -f /etc/mesh/agent.yaml ]; then
        mesh-agent reset --config /etc/mesh/agent.yaml || true
    fi
fi
";

const CONTROL_POSTINST: &str = "#!/bin/sh
set -e
if [ \"$1\" = configure ] && [ -d /run/systemd/system ]; then
    systemd-sysusers mesh-control.conf
    systemctl daemon-reload
    systemctl enable --quiet mesh-control.service
    systemctl restart mesh-control.service
fi
";

const CONTROL_PRERM: &str = "#!/bin/sh
set -e
if [ \"$1\" = remove ] && [ -d /run/systemd/system ]; then
    systemctl disable --quiet --now mesh-control.service || true
fi
";

impl Package {
    fn write(&self, folder: &Path) -> Result<PathBuf> {
        let (version, architecture) = (env!("CARGO_PKG_VERSION"), architecture()?);
        let tree = folder.join(format!("{}.tree", self.name));
        let _ = fs::remove_dir_all(&tree);
        for (from, to, mode) in &self.files {
            install(from, &tree.join(to), *mode)?;
        }
        let program = tree.join("usr/bin").join(self.name);
        // Debug information is a multiple of the program, and stays in the build folder.
        run("strip", &["--strip-debug", &program.display().to_string()])?;
        let control = format!(
            "Package: {}\nVersion: {version}\nArchitecture: {architecture}\nSection: net\nPriority: optional\n\
             Maintainer: Mesh <mesh@localhost>\nDepends: {}\nDescription: {}\n",
            self.name, self.depends, self.description
        );
        put(&tree.join("DEBIAN/control"), &control, 0o644)?;
        if !self.conffiles.is_empty() {
            put(&tree.join("DEBIAN/conffiles"), self.conffiles, 0o644)?;
        }
        if let Some(scripts) = &self.scripts {
            put(&tree.join("DEBIAN/postinst"), scripts.postinst, 0o755)?;
            put(&tree.join("DEBIAN/prerm"), scripts.prerm, 0o755)?;
        }
        let package = folder.join(format!("{}_{version}_{architecture}.deb", self.name));
        let (from, to) = (tree.display().to_string(), package.display().to_string());
        say::step(&format!("package {}", self.name));
        run("dpkg-deb", &["--root-owner-group", "-Zgzip", "-z6", "--build", &from, &to])?;
        fs::remove_dir_all(&tree).with_context(|| format!("remove {from}"))?;
        Ok(package)
    }
}

fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => bail!("no Debian architecture is known for {other}"),
    }
}

fn install(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let bytes = fs::read(from)
        .with_context(|| format!("read {}: run `cargo xtask build`", from.display()))?;
    put(to, bytes, mode)
}

fn put(path: &Path, content: impl AsRef<[u8]>, mode: u32) -> Result<()> {
    let parent = path.parent().context("a file has a folder")?;
    fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
    fs::write(path, content).with_context(|| format!("write {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .with_context(|| format!("set the mode of {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_name_the_files_that_the_packages_install() {
        for package in packages(&Artifacts::locate(false)) {
            let unit = package.files.iter().find(|(_, to, _)| to.ends_with(".service"));
            let Some((unit, _, _)) = unit else { continue };
            let unit = fs::read_to_string(unit).unwrap();
            let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=/")).unwrap();
            let program = start.split(' ').next().unwrap();
            assert!(package.files.iter().any(|(_, to, mode)| *to == program && *mode == 0o755));
        }
    }

    #[test]
    fn packages_hold_what_was_given() {
        let dir = tempfile::tempdir().unwrap();
        let program = std::env::current_exe().unwrap();
        let mut built = Artifacts::locate(false);
        for path in [&mut built.control, &mut built.agent, &mut built.meshctl, &mut built.cni] {
            path.clone_from(&program);
        }
        let [.., meshctl] = packages(&built);
        let package = meshctl.write(dir.path()).unwrap();
        let listed = run("dpkg-deb", &["--contents", &package.display().to_string()]).unwrap();
        let line = listed.lines().find(|line| line.ends_with("./usr/bin/meshctl"));
        assert!(line.is_some_and(|line| line.starts_with("-rwxr-xr-x root/root")), "{listed}");
    }
}
