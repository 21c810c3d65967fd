//! Carries out the steps of a plan.

use std::borrow::Cow;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, EphemeralContainer, Pod, PodSpec};
use mesh_cri::{CallError, Client, v1};
use mesh_model::ephemeral::as_container;
use mesh_model::snapshot::PodWork;
use tokio::sync::{Semaphore, watch};

use super::evict::Evictions;
use super::facts::Facts;
use super::layout::Layout;
use super::observed::PodRef;
use super::oom::Oom;
use super::outbox::Outbox;
use super::plan::Step;
use super::registry::Registry;
use super::report::{PodEvent, StatusReporter};
use super::resolv::ResolvConf;
use super::sandbox::sandbox_config;
use super::tokens::Tokens;
use super::turns::Turns;
use super::{
    PARALLEL_PULLS, PARALLEL_STARTS, RunnerOptions, apparmor, cpu_millis, memory_bytes,
    storage_bytes, sysctls, volumes,
};
use crate::drain::Drain;

mod start;
mod stop;

/// What all pods of the node share.
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) options: RunnerOptions,
    pub(crate) layout: Layout,
    pub(crate) outbox: Outbox,
    /// Gets the tokens of service accounts.
    pub(crate) tokens: Tokens,
    pub(crate) registry: Arc<Registry>,
    pub(crate) oom: Oom,
    /// The pods that the node cannot keep.
    pub(crate) evictions: watch::Sender<Evictions>,
    /// Tells when nobody sends to a pod any more.
    pub(crate) drain: Drain,
    /// Images that are fetched at the same time.
    pub(crate) pulls: Semaphore,
    /// Sandboxes and containers that the runtime starts at the same time.
    pub(crate) starts: Turns,
    pub(crate) cpu_millis: i64,
    pub(crate) memory_bytes: i64,
    pub(crate) storage_bytes: i64,
    /// The kernel enforces profiles of AppArmor.
    pub(crate) has_apparmor: bool,
    /// The first two numbers of the kernel's version.
    pub(crate) kernel: (u32, u32),
}

impl Context {
    /// What there is when nothing has been done yet.
    pub(crate) fn new(
        options: RunnerOptions,
        reporter: Arc<dyn StatusReporter>,
        drain: Drain,
    ) -> Self {
        Self {
            client: Client::new(&options.containerd_socket),
            layout: Layout::new(&options),
            outbox: Outbox::default(),
            tokens: Tokens::new(reporter),
            registry: Arc::new(Registry::default()),
            oom: Oom::new(&options.cgroup_parent, options.single_process_oom_kill),
            evictions: watch::Sender::default(),
            drain,
            pulls: Semaphore::new(PARALLEL_PULLS),
            starts: Turns::new(PARALLEL_STARTS),
            cpu_millis: cpu_millis(),
            memory_bytes: memory_bytes(),
            storage_bytes: storage_bytes(&options.state_dir),
            has_apparmor: apparmor::is_enabled(),
            kernel: sysctls::kernel(),
            options,
        }
    }

    /// Why the node must not run the pod: in one word, and for people.
    pub(crate) fn refusal(&self, pod: &Pod) -> Option<(&'static str, String)> {
        let allowed = &self.options.unsafe_sysctls;
        let spec = pod.spec.as_ref()?;
        let forbidden = sysctls::refusal(spec, allowed, self.kernel);
        let why = forbidden.map(|why| ("SysctlForbidden", why));
        why.or_else(|| apparmor::refusal(pod, self.has_apparmor).map(|why| ("AppArmor", why)))
    }
}

/// A step failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OpError {
    /// As Kubernetes calls it.
    pub(crate) reason: &'static str,
    /// For people.
    pub(crate) message: String,
}

impl OpError {
    fn new(reason: &'static str, message: impl ToString) -> Self {
        Self { reason, message: message.to_string() }
    }
}

/// A step, with all that it needs.
pub(crate) struct Job {
    pub(crate) context: Arc<Context>,
    pub(crate) pod: PodRef,
    /// The pod as it was known last; absent for a pod that was never known to this agent.
    pub(crate) work: Option<Arc<PodWork>>,
    pub(crate) pod_ips: Vec<IpAddr>,
    /// Attempt of the sandbox that containers are created in.
    pub(crate) sandbox_attempt: u32,
    pub(crate) step: Step,
}

impl Job {
    /// Does it.
    pub(crate) async fn run(self) -> Result<(), OpError> {
        let client = &self.context.client;
        let failed = |error: CallError| OpError::new("RuntimeError", error);
        match &self.step {
            Step::PrepareVolumes => self.prepare_volumes().await,
            Step::RunSandbox { attempt } => self.run_sandbox(*attempt).await,
            Step::StopSandbox { id } => client.stop_sandbox(id).await.map_err(failed),
            Step::RemoveSandbox { id } => client.remove_sandbox(id).await.map_err(failed),
            Step::RemoveContainer { id } => client.remove_container(id).await.map_err(failed),
            Step::Start { name, sandbox, attempt, delay } => {
                self.start(name, sandbox, *attempt, *delay).await
            }
            Step::Stop { id, name, grace, why, .. } => self.stop(id, name, *grace, why).await,
            // Its hook runs already, and the signal is sent once: only the kill comes sooner.
            Step::Hurry { id, grace } => {
                tracing::info!(pod = %self.pod, id, grace_secs = grace.as_secs(), "stopping sooner");
                client.stop_container(id, *grace).await.map_err(failed)
            }
            Step::Free => self.free().await,
            Step::Clean => self.clean().await,
            Step::Confirm => {
                self.context.outbox.deleted(&self.pod);
                Ok(())
            }
            Step::CancelStart { .. } => Ok(()),
        }
    }

    fn event(&self, warning: bool, container: &str, reason: &'static str, message: String) {
        self.context.outbox.event(PodEvent {
            pod: self.pod.clone(),
            field: self.field(container),
            warning,
            reason,
            message,
        });
    }

    fn field(&self, container: &str) -> String {
        field_of(self.spec().ok(), container)
    }

    fn work(&self) -> Result<&Arc<PodWork>, OpError> {
        self.work.as_ref().ok_or_else(|| OpError::new("PodUnknown", "the pod is not known"))
    }

    fn spec(&self) -> Result<&PodSpec, OpError> {
        let spec = self.work()?.pod.spec.as_ref();
        spec.ok_or_else(|| OpError::new("PodUnknown", "the pod has no spec"))
    }

    fn container(&self, name: &str) -> Result<Cow<'_, Container>, OpError> {
        find_container(self.spec()?, name)
            .ok_or_else(|| OpError::new("PodUnknown", "the container is not in the pod"))
    }

    fn facts(&self) -> Facts {
        Facts {
            node_name: self.context.options.node_name.to_string(),
            host_ips: self.context.options.node_addresses.clone(),
            pod_ips: self.pod_ips.clone(),
            cpu_millis: self.context.cpu_millis,
            memory_bytes: self.context.memory_bytes,
            storage_bytes: self.context.storage_bytes,
            tokens: Default::default(),
        }
    }

    async fn prepare_volumes(&self) -> Result<(), OpError> {
        let failed = |error: String| {
            let message = format!("MountVolume.SetUp failed: {error}");
            self.event(true, "", "FailedMount", message.clone());
            OpError::new("FailedMount", message)
        };
        let work = Arc::clone(self.work()?);
        let (uid, layout) = (self.pod.uid.clone(), self.context.layout.clone());
        let tokens = self.context.tokens.of(&work.pod, &self.pod, &layout.tokens(&uid)).await;
        // The volumes keep what they had: that is told, and holds nothing up.
        for why in tokens.refusals {
            failed(why);
        }
        let facts = Facts { tokens: tokens.texts, ..self.facts() };
        let done = blocking(move || volumes::prepare(&work, &uid, &facts, &layout)).await?;
        done.map_err(|error| failed(error.to_string()))
    }

    async fn config(&self, attempt: u32) -> Result<v1::PodSandboxConfig, OpError> {
        let options = &self.context.options;
        let host = ResolvConf::of_node(&options.host_resolv_conf).await;
        let pod = &self.work()?.pod;
        Ok(sandbox_config(pod, self.spec()?, &self.pod, options, attempt, &host))
    }

    async fn run_sandbox(&self, attempt: u32) -> Result<(), OpError> {
        if attempt > 0 {
            let message = "Pod sandbox changed, it will be killed and re-created.".to_owned();
            self.event(false, "", "SandboxChanged", message);
        }
        let directory = self.context.layout.logs(&self.pod);
        let made = tokio::fs::create_dir_all(&directory).await;
        made.map_err(|e| {
            OpError::new("FailedCreatePodSandBox", format!("make the log directory: {e}"))
        })?;
        let config = self.config(attempt).await?;
        let _turn = self.context.starts.sandbox().await;
        match self.context.client.run_sandbox(config).await {
            Ok(id) => {
                tracing::info!(pod = %self.pod, sandbox = id, attempt, "sandbox runs");
                Ok(())
            }
            Err(error) => {
                let message = format!("Failed to create pod sandbox: {}", error.message);
                self.event(true, "", "FailedCreatePodSandBox", message.clone());
                Err(OpError::new("FailedCreatePodSandBox", message))
            }
        }
    }

    async fn free(&self) -> Result<(), OpError> {
        let directories = self.context.layout.volumes(&self.pod.uid);
        let done = blocking(move || directories.iter().try_for_each(|d| volumes::clean(d))).await?;
        done.map_err(|error| OpError::new("FailedCleanup", error))
    }

    async fn clean(&self) -> Result<(), OpError> {
        let layout = &self.context.layout;
        let mut directories = vec![layout.logs(&self.pod)];
        directories.extend(layout.pod(&self.pod.uid));
        self.context.tokens.forget(&self.pod.uid);
        let done = blocking(move || directories.iter().try_for_each(|d| volumes::clean(d))).await?;
        done.map_err(|error| OpError::new("FailedCleanup", error))
    }
}

/// The container of that name, whatever its kind.
pub(crate) fn find_container<'a>(spec: &'a PodSpec, name: &str) -> Option<Cow<'a, Container>> {
    let mut all = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let found = all.find(|c| c.name == name).map(Cow::Borrowed);
    found.or_else(|| find_ephemeral(spec, name).map(|c| Cow::Owned(as_container(c))))
}

/// The ephemeral container of that name.
pub(crate) fn find_ephemeral<'a>(spec: &'a PodSpec, name: &str) -> Option<&'a EphemeralContainer> {
    spec.ephemeral_containers.iter().flatten().find(|c| c.name == name)
}

/// The field that an event about a container names.
pub(crate) fn field_of(spec: Option<&PodSpec>, container: &str) -> String {
    if container.is_empty() {
        return String::new();
    }
    let init =
        spec.is_some_and(|s| s.init_containers.iter().flatten().any(|c| c.name == container));
    let added = spec.is_some_and(|s| find_ephemeral(s, container).is_some());
    let list = match (init, added) {
        (true, _) => "initContainers",
        (_, true) => "ephemeralContainers",
        _ => "containers",
    };
    format!("spec.{list}{{{container}}}")
}

/// Runs something that waits for the disk beside the event loop.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, OpError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| OpError::new("Internal", "a task of the agent ended early"))
}

/// Makes an empty file that everybody may write, as the target of a mount.
fn writable_file(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::File::create(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))
}

/// Writes a file unless it has that text already.
fn write_changed(path: &Path, text: &str) -> std::io::Result<()> {
    if std::fs::read_to_string(path).is_ok_and(|present| present == text) {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    // In place: running containers have this very file mounted.
    std::fs::write(path, text)
}

#[cfg(test)]
mod tests;
