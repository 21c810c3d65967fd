//! What the machine is, read once.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

/// Pods that a node takes at most, as the kubelet's default.
const MAX_PODS: u32 = 110;

/// Hardware and software of the machine.
pub(super) struct Facts {
    cpus: usize,
    memory_kib: u64,
    storage_kib: u64,
    kernel: String,
    os_image: String,
    machine_id: String,
    boot_id: String,
}

impl Facts {
    /// `disk` is a directory on the disk that pods write to.
    pub(super) fn read(disk: &Path) -> Self {
        let line = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        Self {
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_kib: memory_kib(&line("/proc/meminfo")),
            storage_kib: storage_kib(disk),
            kernel: line("/proc/sys/kernel/osrelease"),
            os_image: os_image(&line("/etc/os-release")),
            machine_id: line("/etc/machine-id"),
            boot_id: line("/proc/sys/kernel/random/boot_id"),
        }
    }

    /// What pods may use, as Kubernetes quantities.
    pub(super) fn resources(&self) -> Value {
        json!({
            "cpu": self.cpus.to_string(),
            "memory": format!("{}Ki", self.memory_kib),
            "ephemeral-storage": format!("{}Ki", self.storage_kib),
            "pods": MAX_PODS.to_string(),
        })
    }

    /// `status.nodeInfo`.
    pub(super) fn node_info(&self, container_runtime: &str) -> Value {
        json!({
            "architecture": architecture(),
            "bootID": self.boot_id,
            "containerRuntimeVersion": container_runtime,
            "kernelVersion": self.kernel,
            "kubeProxyVersion": "",
            "kubeletVersion": concat!("v", env!("CARGO_PKG_VERSION"), "+mesh"),
            "machineID": self.machine_id,
            "operatingSystem": "linux",
            "osImage": self.os_image,
            "systemUUID": "",
        })
    }
}

/// The architecture as Kubernetes names it.
pub(super) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn memory_kib(meminfo: &str) -> u64 {
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    total.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// The size of the disk that holds a directory.
pub(crate) fn storage_kib(path: &Path) -> u64 {
    let stat = nix::sys::statvfs::statvfs(path);
    stat.map_or(0, |stat| stat.blocks().saturating_mul(stat.fragment_size()) / 1024)
}

fn os_image(os_release: &str) -> String {
    let name = os_release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    name.unwrap_or("Linux").trim_matches('"').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_system_are_understood() {
        assert_eq!(memory_kib("MemTotal:       2048 kB\nMemFree: 1 kB"), 2048);
        assert_eq!(os_image("NAME=x\nPRETTY_NAME=\"Debian 12\"\n"), "Debian 12");
        assert!(storage_kib(Path::new("/")) > 1024);
        assert_eq!((memory_kib(""), os_image("").as_str()), (0, "Linux"));
    }
}
