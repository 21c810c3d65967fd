//! `mesh-agent reset`: the node as it was before the agent came.
//!
//! No agent may run: it would make everything anew. Pods are ended with ten seconds of grace; `meshctl node drain`
//! before lets them take their time. Key and certificate stay in the state directory, so that the node can come back; delete it to forget them.

use std::path::Path;
use std::sync::Arc;

use anyhow::bail;
use mesh_kernel::node::{LinuxNodeNetwork, NodeNetwork as _};
use mesh_kernel::pods::{LinuxPodNetwork, PodNetwork as _};
use mesh_kernel::wireguard::KernelWireGuard;
use mesh_kernel::{IfName, LoadOptions, NetNs, Programs, WireGuardDevice as _};
use mesh_model::wellknown::OVERLAY_DEVICE;
use mesh_worker::supervise;

use crate::errors::chain;
use crate::originals::Originals;
use crate::pods::Removal;
use crate::reconcile::conflist;
use crate::settings::{Options, PodsChoice};
use crate::workers::{self, Paths};

/// Stops the workers and removes what the agent made. Goes on after a failure and names all of them at the end.
pub(crate) async fn reset(options: &Options) -> anyhow::Result<()> {
    let paths = Paths::new(options);
    let lock = paths.state().join("agent.lock");
    let _alone = if paths.state().exists() { Some(crate::run::lock(&lock)?) } else { None };
    let mut failures = vec![];
    if options.pods == PodsChoice::Cri {
        // First, while the runtime can still ask the plugin to take their interfaces away.
        let (count, left) = removal(options).run().await;
        tracing::info!(count, "pods ended");
        failures.extend(left.into_iter().map(|failure| format!("pods: {failure}")));
    }
    let mut note = |what: &str, result: Result<(), &dyn std::error::Error>| match result {
        Ok(()) => tracing::info!(what, "removed"),
        Err(error) => failures.push(format!("{what}: {}", chain(error))),
    };
    let list = conflist::remove(&options.cni_conf_dir);
    note("CNI configuration", list.as_ref().map(drop).map_err(|e| e as _));
    for name in workers::ALL {
        let stopped = supervise::stop(&workers::any(name, &paths)).await;
        note(name, stopped.as_ref().map(drop).map_err(|e| e as _));
    }
    kernel(options, &mut note);
    let detached = mesh_kernel::bpf::detach_all(&options.bpf_dir);
    note("eBPF programs and maps", detached.as_ref().map(drop).map_err(|e| e as _));
    let sockets = remove_sockets(paths.run());
    note("sockets", sockets.as_ref().map(drop).map_err(|e| e as _));
    let derived = remove_derived(&paths);
    note("saved snapshot and journal", derived.as_ref().map(drop).map_err(|e| e as _));
    // It may hold what is not ours, and then stays.
    let _ = std::fs::remove_dir(paths.run());
    if failures.is_empty() {
        return Ok(());
    }
    bail!("not everything could be removed: {}", failures.join("; "))
}

fn removal(options: &Options) -> Removal {
    Removal {
        containerd_socket: options.containerd.clone(),
        cgroup_parent: options.cgroup_parent.clone(),
        log_dir: options.pod_logs_dir.clone(),
        state_dir: options.state_dir.clone(),
        run_dir: options.run_dir.clone(),
    }
}

type Note<'a> = dyn FnMut(&str, Result<(), &dyn std::error::Error>) + 'a;

/// Interfaces, routes and addresses. The programs are needed to know what is ours; without them, the marks suffice.
fn kernel(options: &Options, note: &mut Note<'_>) {
    let load = Programs::open_or_load(&LoadOptions::new(&options.bpf_dir, &options.cgroup));
    let programs = match load {
        Ok(programs) => Arc::new(programs),
        Err(error) => return note("kernel state", Err(&error)),
    };
    let pods = LinuxPodNetwork::new(NetNs::current(), Arc::clone(&programs));
    match pods.list() {
        Ok(ports) => {
            for port in ports {
                let detached = pods.detach(&port.host_interface, &[]);
                note(port.host_interface.as_str(), detached.as_ref().map(drop).map_err(|e| e as _));
            }
        }
        Err(error) => note("pods' interfaces", Err(&error)),
    }
    let closed = pods.publish(&[]);
    note("ports of the node", closed.as_ref().map(drop).map_err(|e| e as _));
    let buried = pods.bury();
    note("what is left of pods' interfaces", buried.as_ref().map(drop).map_err(|e| e as _));
    let overlay: IfName = OVERLAY_DEVICE.parse().expect("a constant and valid interface name");
    let device = KernelWireGuard::new(NetNs::current(), overlay.clone());
    let network = LinuxNodeNetwork::new(NetNs::current(), programs, overlay.clone());
    match network.remove_all(&overlay) {
        Ok((_, applied)) => {
            for (step, error) in &applied.failed {
                note(&format!("{step:?}"), Err(error));
            }
        }
        Err(error) => note("routes and addresses", Err(&error)),
    }
    let before = Originals::new(Paths::new(options).sysctls());
    let failed = network.restore(&before.read());
    for error in &failed {
        note("sysctls", Err(error));
    }
    if failed.is_empty() {
        let forgotten = before.forget();
        note("sysctls", forgotten.as_ref().map(drop).map_err(|e| e as _));
    }
    // By name, whichever engine made it.
    let removed = device.remove();
    note(OVERLAY_DEVICE, removed.as_ref().map(drop).map_err(|e| e as _));
}

/// What follows from the API or from what has just been removed. Key, certificate and join stay.
fn remove_derived(paths: &Paths) -> std::io::Result<()> {
    let derived = [paths.snapshot(), paths.paths(), paths.preshared()];
    let workers = workers::ALL.map(|name| paths.worker_state(name));
    let locks = workers.clone().map(|state| state.with_extension("lock"));
    // The journal, and releases that the plugin noted meanwhile: their interfaces are gone.
    match std::fs::remove_dir_all(paths.journal().with_file_name("")) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    for path in derived.into_iter().chain(workers).chain(locks) {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn remove_sockets(run_dir: &Path) -> std::io::Result<()> {
    let entries = match std::fs::read_dir(run_dir) {
        // An earlier reset.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "sock") {
            std::fs::remove_file(path)?;
        }
    }
    Ok(())
}
