//! What needs the kernel's programs: the node's network, services, and pods' interfaces.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use mesh_kernel::node::LinuxNodeNetwork;
use mesh_kernel::pods::{LinuxPodNetwork, PodNetwork};
use mesh_kernel::{IfName, LinuxEdge, LoadOptions, NetNs, Programs};
use mesh_model::wellknown::OVERLAY_DEVICE;
use tokio::sync::mpsc;

use super::{Agent, LONGEST_RETRY, longer};
use crate::cni::ledger::{Ledger, LedgerHandle};
use crate::cni::{self, Cni, Succession, journal};
use crate::errors::chain;
use crate::originals::Originals;
use crate::reconcile::conflist::Conflist;
use crate::reconcile::edge::Edge;
use crate::reconcile::health::HealthChecks;
use crate::reconcile::node::{Node, watch_sysctls};
use crate::reconcile::policy::{Policies, Policy};
use crate::reconcile::services::Services;
use crate::sockets;

/// Name of the line on the board about programs of another ABI.
const SUCCESSION: &str = "succession";
/// How often sandboxes and interfaces are compared.
const SANDBOXES_EVERY: Duration = Duration::from_secs(60);

impl Agent {
    /// Loads the programs, as often as it takes; then everything that needs them, the overlay's device first when it
    /// `is_switched`.
    pub(super) async fn kernel(self: Arc<Self>, is_switched: bool) {
        let programs = self.load_programs().await;
        self.marks.forget(&programs);
        let disturbed = watch_sysctls(overlay_device());
        self.drive(Node {
            network: self.node_network(&programs),
            mtu: self.mtu,
            no_masquerade: self.options.no_masquerade.clone(),
            made: Arc::clone(&self.overlay_made),
            before: Originals::new(self.paths.sysctls()),
            board: self.board.clone(),
            compared: false,
            disturbed,
        });
        if is_switched {
            self.carries_again().await;
        }
        let (news, heard) = mpsc::unbounded_channel();
        tokio::spawn(sockets::end_departed(heard, Arc::clone(&programs)));
        self.drive(Services::new(programs.services(), news, self.board.clone()));
        let edge = LinuxEdge::new(NetNs::current(), Arc::clone(&programs));
        self.drive(Edge::new(edge, self.mtu, self.board.clone()));
        self.drive(HealthChecks::default());
        let (flows, desired) = (self.flows.clone(), self.desired.subscribe());
        tokio::spawn(flows.run(Arc::clone(&programs), desired, self.board.clone()));
        let (desired, board) = (self.desired.subscribe(), self.board.clone());
        let policies = Policies::new(programs.policy(), desired, board);
        let guard = Arc::new(policies.clone());
        let pods = LinuxPodNetwork::new(NetNs::current(), Arc::clone(&programs)).guarded(guard);
        let pods: Arc<dyn PodNetwork> = Arc::new(pods);
        self.drive(Policy { policies, pods: Arc::clone(&pods) });
        let mut pause = Duration::from_millis(100);
        loop {
            let Err(error) = self.serve_plugin(Arc::clone(&pods), &programs).await;
            let error = chain(error.as_ref());
            tracing::error!(error, "CNI not served, trying again");
            self.board.failed("cni", vec![error]);
            tokio::time::sleep(pause).await;
            pause = longer(pause);
        }
    }

    pub(super) fn node_network(&self, programs: &Arc<Programs>) -> Arc<LinuxNodeNetwork> {
        let new =
            || LinuxNodeNetwork::new(NetNs::current(), Arc::clone(programs), overlay_device());
        Arc::clone(self.network.get_or_init(|| Arc::new(new())))
    }

    async fn load_programs(&self) -> Arc<Programs> {
        let mut pause = Duration::from_millis(500);
        loop {
            self.load_programs_once().await;
            if let Some(programs) = self.programs.get() {
                return Arc::clone(programs);
            }
            tokio::time::sleep(pause).await;
            pause = longer(pause);
        }
    }

    /// Loads the programs unless they are loaded. Failures are on the board.
    pub(super) async fn load_programs_once(&self) {
        if self.programs.get().is_some() {
            return;
        }
        let mut options = LoadOptions::new(&self.options.bpf_dir, &self.options.cgroup);
        options.capacities = self.options.map_capacities.clone();
        let load = tokio::task::spawn_blocking(move || Programs::open_or_load(&options));
        match load.await {
            Ok(Ok(programs)) => {
                tracing::info!(dir = %self.options.bpf_dir.display(), "eBPF programs loaded and attached");
                self.board.done("programs");
                let _ = self.programs.set(Arc::new(programs));
            }
            Ok(Err(error)) => {
                let error = chain(&error);
                tracing::error!(error, "eBPF programs not loaded, trying again");
                self.board.failed("programs", vec![error]);
            }
            Err(panic) => self.board.failed("programs", vec![panic.to_string()]),
        }
    }

    /// Programs of another ABI serve until the new maps are filled. Then they hand over the pods, and end. A pod that cannot be
    /// had yet keeps its programs, and is tried again. Returns when nobody fills maps any more.
    async fn succeed(&self, cni: Cni, programs: &Arc<Programs>) {
        let mut standings = self.board.subscribe();
        let filled = |concern| self.board.standing(concern).ever;
        while !["services", "node", "edge", "policy"].into_iter().all(filled) {
            if standings.changed().await.is_err() {
                return;
            }
        }
        loop {
            let failures = match cni.take_over().await {
                Ok(Succession { taken, mut failures }) => {
                    if taken > 0 {
                        tracing::info!(pods = taken, "pods taken over from another version");
                    }
                    failures.extend(retire(Arc::clone(programs)).await.err());
                    failures
                }
                Err(error) => vec![chain(&error)],
            };
            if failures.is_empty() {
                self.board.done(SUCCESSION);
                return pending().await;
            }
            tracing::warn!(?failures, "programs of another version not replaced yet, trying again");
            self.board.failed(SUCCESSION, failures);
            tokio::time::sleep(LONGEST_RETRY).await;
        }
    }

    /// Asks the runtime which sandboxes it has, for ever. One that is away, or is not CRI's, is left in peace.
    async fn compare_sandboxes(&self, cni: Cni) {
        let runtime = mesh_cri::Client::new(&self.options.containerd);
        let mut look = tokio::time::interval(SANDBOXES_EVERY);
        loop {
            look.tick().await;
            let Ok(sandboxes) = runtime.list_sandboxes(HashMap::new()).await else { continue };
            let known = sandboxes.into_iter().map(|sandbox| sandbox.id).collect();
            if let Err(error) = cni.compare_sandboxes(&known).await {
                tracing::warn!(error = chain(&error), "sandboxes and interfaces not compared");
            }
        }
    }

    async fn serve_plugin(
        &self,
        network: Arc<dyn PodNetwork>,
        programs: &Arc<Programs>,
    ) -> anyhow::Result<Infallible> {
        let boot = journal::boot_id().context("read the boot id")?;
        let storage = journal::FileStorage::new(self.paths.journal());
        let (ledger, damaged) = Ledger::open(Box::new(storage), &boot)
            .with_context(|| format!("open {}", self.paths.journal().display()))?;
        if damaged > 0 {
            tracing::warn!(damaged, "lines of the address journal made no sense");
        }
        let ledger = LedgerHandle::start(ledger).context("start the address ledger")?;
        let state = self.paths.state().to_owned();
        let cni = Cni::new(ledger, network, self.plugin.subscribe(), state);
        cni.recover().await?;
        tracing::info!(socket = %self.paths.cni_socket().display(), "serving CNI");
        let conflist = Conflist {
            directory: self.options.cni_conf_dir.clone(),
            socket: self.paths.cni_socket(),
            state_dir: self.paths.state().to_owned(),
        };
        let keep = conflist.keep(self.plugin.subscribe(), self.board.clone());
        let socket = self.paths.cni_socket();
        let (looking, comparing) = (cni.clone(), cni.clone());
        let heir = cni.clone();
        tokio::select! {
            () = self.succeed(heir, programs) => bail!("nobody takes pods over"),
            () = self.compare_sandboxes(comparing) => bail!("nobody compares sandboxes"),
            () = looking.watch_room(self.blocks_wanted.clone()) => bail!("nobody looks for room"),
            () = keep => bail!("readiness ended"),
            ended = cni::serve(&socket, cni) => Ok(ended?),
        }
    }
}

/// Ends what is not of our version, if there is any.
async fn retire(programs: Arc<Programs>) -> Result<(), String> {
    match tokio::task::spawn_blocking(move || programs.retire_old_versions()).await {
        Ok(Ok(true)) => tracing::info!("eBPF programs of another version retired"),
        Ok(Ok(false)) => {}
        Ok(Err(error)) => return Err(chain(&error)),
        Err(panic) => return Err(panic.to_string()),
    }
    Ok(())
}

pub(super) fn overlay_device() -> IfName {
    OVERLAY_DEVICE.parse().expect("a constant and valid interface name")
}
