//! What needs the node to be a member of the cluster: its certificate, and with it the API.

use std::sync::Arc;
use std::time::Duration;

use mesh_model::wellknown::AGENT_PORT;
use tokio::sync::watch;

use super::{Agent, longer};
use crate::errors::chain;
use crate::join::{Identity, JoinError, Joining};
use crate::listen::listen;
use crate::observe::Observer;
use crate::pods::{KubeReporter, Runner, RunnerOptions};
use crate::preshared::Keeper;
use crate::reconcile::pods::{self, Pods};
use crate::register::{self, Registration};
use crate::renewal::Renewal;
use crate::saved::Saved;
use crate::server::tls::TlsServerError;
use crate::settings::PodsChoice;
use crate::{api, capacity, drain, preshared, server};

/// What an agent that goes on from a saved snapshot may take to be as ready as the one before.
const PATIENCE: Duration = Duration::from_secs(10);

impl Agent {
    /// Everything that needs the node to be a member of the cluster. Ends only when it can never become one.
    pub(super) async fn member(self: Arc<Self>, saved: Saved) -> anyhow::Result<()> {
        let identity = self.identity().await?;
        let client = api::client(&identity)?;
        let pressures = (self.options.pods == PodsChoice::Cri)
            .then(|| self.run_pods(&identity, &client).pressures());
        let maps_full = watch::Sender::new(None);
        let registration = Registration {
            node: self.options.node.clone(),
            addresses: self.options.addresses.clone(),
            public_key: self.name_key,
            keys: self.rotation.published(),
            blocks_wanted: self.blocks_wanted.subscribe(),
            overlay: match self.overlay.kind() {
                mesh_overlay::Kind::Kernel => "kernel",
                mesh_overlay::Kind::User => "user",
            },
            overlay_port: identity.cluster.overlay_port,
            patience: if self.desired.borrow().is_some() { PATIENCE } else { Duration::ZERO },
            container_runtime: Arc::clone(&self.runtime_version),
            disk: self.paths.state().to_owned(),
            pressures,
            maps_full: maps_full.subscribe(),
        };
        tokio::spawn(register::run(client.clone(), registration, self.node.subscribe()));
        let (node, programs) = (self.options.node.clone(), Arc::clone(&self.programs));
        let board = self.board.clone();
        tokio::spawn(capacity::announce(client.clone(), node, board, programs, maps_full));
        tokio::spawn(Arc::clone(&self).serve_https(identity.clone()));
        tokio::spawn(Arc::clone(&self).renew_certificate(identity.clone(), client.clone()));
        tokio::spawn(self.keeper(client.clone()).run());
        let observer =
            Observer { client, node: self.options.node.clone(), cluster: identity.cluster, saved };
        observer.run(self.desired.clone()).await;
        Ok(())
    }

    pub(super) fn keeper(&self, client: kube::Client) -> Keeper {
        Keeper {
            client,
            overlay: Arc::clone(&self.overlay),
            desired: self.desired.clone(),
            ring: preshared::saved(&self.paths.preshared()),
            file: self.paths.preshared(),
        }
    }

    fn run_pods(&self, identity: &Identity, client: &kube::Client) -> Arc<Runner> {
        let options = RunnerOptions {
            containerd_socket: self.options.containerd.clone(),
            cgroup_parent: self.options.cgroup_parent.clone(),
            log_dir: self.options.pod_logs_dir.clone(),
            log_max_bytes: crate::pods::LOG_MAX_BYTES,
            static_pods_dir: self.options.static_pods_dir.clone(),
            state_dir: self.paths.state().to_owned(),
            run_dir: self.paths.run().to_owned(),
            node_name: self.options.node.clone(),
            node_addresses: self.options.addresses.clone(),
            cluster_domain: identity.cluster.domain.clone(),
            dns_servers: identity.cluster.dns_vips.clone(),
            eviction: self.options.eviction.clone(),
            unsafe_sysctls: self.options.unsafe_sysctls.clone(),
            single_process_oom_kill: self.options.single_process_oom_kill,
            host_resolv_conf: "/etc/resolv.conf".into(),
        };
        self.board.failed(pods::RUNTIME, vec!["not asked yet".to_owned()]);
        let reporter = KubeReporter::new(client.clone(), self.options.node.as_str());
        let drain = drain::start(self.desired.subscribe(), self.board.clone());
        let runner = Arc::new(Runner::start(options, reporter, drain));
        let _ = self.pod_routes.set(runner.router());
        let version = Arc::clone(&self.runtime_version);
        tokio::spawn(pods::watch_runtime(Arc::clone(&runner), self.board.clone(), version));
        self.drive(Pods(Arc::clone(&runner)));
        runner
    }

    pub(super) fn joining(&self) -> Joining<'_> {
        let options = &self.options;
        Joining {
            node: &options.node,
            addresses: &options.addresses,
            server: options.server.as_deref(),
            token: options.token.as_deref(),
            token_file: options.token_file.as_deref(),
            state_dir: self.paths.state(),
        }
    }

    async fn identity(&self) -> Result<Identity, JoinError> {
        let joining = self.joining();
        let mut pause = Duration::from_millis(200);
        loop {
            match joining.identity().await {
                Err(
                    error @ (JoinError::Connect { .. }
                    | JoinError::TimedOut { .. }
                    | JoinError::Http { .. }
                    | JoinError::TokenFile { .. }),
                ) => {
                    tracing::warn!(error = chain(&error), "not joined yet, trying again");
                    self.board.failed("join", vec![chain(&error)]);
                }
                Ok(identity) => {
                    self.board.done("join");
                    return Ok(identity);
                }
                Err(error) => return Err(error),
            }
            tokio::time::sleep(pause).await;
            pause = longer(pause);
        }
    }

    async fn renew_certificate(self: Arc<Self>, identity: Identity, client: kube::Client) {
        let (joining, board) = (self.joining(), &self.board);
        Renewal { identity: &identity, client: &client, joining, board }.keep().await;
    }

    async fn serve_https(self: Arc<Self>, identity: Identity) {
        let mut pause = Duration::from_millis(200);
        loop {
            let served = async {
                let listener = listen(AGENT_PORT)
                    .map_err(|source| TlsServerError::Listen { port: AGENT_PORT, source })?;
                self.board.done("https");
                server::tls::serve(&identity, listener, server::router(self.sources())).await
            };
            let Err(error) = served.await;
            tracing::error!(error = chain(&error), "HTTPS not served, trying again");
            self.board.failed("https", vec![chain(&error)]);
            tokio::time::sleep(pause).await;
            pause = longer(pause);
        }
    }
}
