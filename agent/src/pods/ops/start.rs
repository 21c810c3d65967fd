//! Starting a container: image, configuration, create, start, hook.

use std::time::Duration;

use k8s_openapi::api::core::v1::Container;
use mesh_cri::v1;

use super::{Job, OpError, blocking, find_ephemeral, writable_file, write_changed};
use crate::pods::apparmor;
use crate::pods::container::{ConfigError, Parts, container_config, container_environment};
use crate::pods::env::Environment;
use crate::pods::hosts::hosts;
use crate::pods::image;
use crate::pods::memory::RUN_FAILED;
use crate::pods::observed::LABEL_CONTAINER;
use crate::pods::plan::{LEAST_GRACE, grace_of};
use crate::pods::probes::action::{Action, Trouble};
use crate::pods::volumes::container_mounts;

/// A hook may take this long; the API has no limit of its own for `postStart`.
const HOOK_LIMIT: Duration = Duration::from_secs(600);
const TERMINATION_LOG: &str = "/dev/termination-log";

impl Job {
    pub(super) async fn start(
        &self,
        name: &str,
        sandbox: &str,
        attempt: u32,
        delay: Duration,
    ) -> Result<(), OpError> {
        let container = self.container(name)?.into_owned();
        let image = self.image(&container).await?;
        let config = self.container_config(&container, &image, attempt, delay).await?;
        let mut sandbox_config = self.config(self.sandbox_attempt).await?;
        if let Some(linux) = &mut sandbox_config.linux {
            linux.cgroup_parent = self.context.oom.parent(&self.pod.uid, name, attempt);
        }
        let client = &self.context.client;
        let turn = self.context.starts.container().await;
        let id = match client.create_container(sandbox, config, sandbox_config).await {
            Ok(id) => id,
            Err(error) => {
                self.event(true, name, "Failed", format!("Error: {}", error.message));
                return Err(OpError::new("CreateContainerError", error.message));
            }
        };
        self.event(false, name, "Created", format!("Created container {name}"));
        self.context.oom.prepare(&id);
        if let Err(error) = client.start_container(&id).await {
            self.event(true, name, "Failed", format!("Error: {}", error.message));
            return Err(OpError::new(RUN_FAILED, error.message));
        }
        // A hook may take long, and is no work of the runtime's.
        drop(turn);
        tracing::info!(pod = %self.pod, container = name, attempt, id, "container started");
        self.event(false, name, "Started", format!("Started container {name}"));
        self.post_start(&container, &id).await;
        Ok(())
    }

    async fn image(&self, container: &Container) -> Result<v1::Image, OpError> {
        let (client, name) = (&self.context.client, container.name.as_str());
        let reference = container.image.as_deref().unwrap_or_default();
        let failed = |error: image::ImageError| {
            let (reason, message) = (error.reason(), error.to_string());
            self.event(true, name, "Failed", capitalised(&message));
            self.event(true, name, "Failed", format!("Error: {reason}"));
            OpError { reason, message }
        };
        if let Some(image) = image::present(client, container).await.map_err(failed)? {
            let message = format!("Container image \"{reference}\" already present on machine");
            self.event(false, name, "Pulled", message);
            return Ok(image);
        }
        self.event(false, name, "Pulling", format!("Pulling image \"{reference}\""));
        let begun = std::time::Instant::now();
        let _permit = self.context.pulls.acquire().await;
        let pulled = image::pull(client, container, self.work()?).await.map_err(|error| {
            let failure = failed(error);
            let message = format!("Back-off pulling image \"{reference}\"");
            self.event(false, name, "BackOff", message);
            failure
        })?;
        let took = begun.elapsed().as_millis();
        let message = format!("Successfully pulled image \"{reference}\" in {took}ms");
        self.event(false, name, "Pulled", message);
        Ok(pulled)
    }

    async fn container_config(
        &self,
        container: &Container,
        image: &v1::Image,
        attempt: u32,
        delay: Duration,
    ) -> Result<v1::ContainerConfig, OpError> {
        let refused = |error: ConfigError| {
            self.event(true, &container.name, "Failed", format!("Error: {error}"));
            OpError::new("CreateContainerConfigError", error)
        };
        let (work, facts) = (self.work()?, self.facts());
        let environment = container_environment(work, container, &facts).map_err(refused)?;
        let mounts = self.mounts(container, &environment, attempt).await?.map_err(refused)?;
        let parts = Parts {
            identity: &self.pod,
            spec: self.spec()?,
            container,
            facts: &facts,
            environment: &environment,
            image,
            mounts,
            attempt,
            delay_secs: delay.as_secs(),
            target: self.target(container).await?,
            seccomp_profiles: &self.context.options.seccomp_dir(),
            apparmor: apparmor::profile(&work.pod, self.spec()?, container),
            unified: self.context.oom.unified(),
        };
        container_config(parts).map_err(refused)
    }

    /// The run of the container whose processes an ephemeral one is to see.
    async fn target(&self, container: &Container) -> Result<Option<String>, OpError> {
        let ephemeral = find_ephemeral(self.spec()?, &container.name);
        let name = ephemeral.and_then(|e| e.target_container_name.as_deref());
        let Some(name) = name.filter(|name| !name.is_empty()) else { return Ok(None) };
        let listed = self.context.client.list_containers(self.pod.labels()).await;
        let listed = listed.map_err(|error| OpError::new("RuntimeError", error))?;
        let is_target = |c: &&v1::Container| {
            c.labels.get(LABEL_CONTAINER).is_some_and(|own| own == name)
                && c.state() == v1::ContainerState::Running
        };
        let missing = || {
            let text = format!("target container {name:?} does not run");
            OpError::new("CreateContainerConfigError", text)
        };
        listed.iter().find(is_target).map(|c| Some(c.id.clone())).ok_or_else(missing)
    }

    /// The container's volumes, `/etc/hosts` and the file for its last words.
    async fn mounts(
        &self,
        container: &Container,
        environment: &Environment,
        attempt: u32,
    ) -> Result<Result<Vec<v1::Mount>, ConfigError>, OpError> {
        let work = std::sync::Arc::clone(self.work()?);
        let (container, environment) = (container.clone(), environment.clone());
        let (layout, uid) = (self.context.layout.clone(), self.pod.uid.clone());
        let domain = self.context.options.cluster_domain.clone();
        let ips = self.pod_ips.clone();
        blocking(move || {
            let Some(spec) = work.pod.spec.as_ref() else { return Ok(Vec::new()) };
            let mut mounts = container_mounts(spec, &container, &uid, &environment, &layout)?;
            let node_file = std::fs::read_to_string("/etc/hosts").unwrap_or_default();
            let path = layout.hosts(&uid);
            write_changed(&path, &hosts(&work.pod, spec, &ips, &domain, &node_file))
                .map_err(file_error("/etc/hosts"))?;
            add(&mut mounts, "/etc/hosts", &path);
            let path = layout.termination(&uid, &container.name, attempt);
            let target = container.termination_message_path.as_deref().unwrap_or(TERMINATION_LOG);
            writable_file(&path).map_err(file_error(target))?;
            add(&mut mounts, target, &path);
            Ok(mounts)
        })
        .await
    }

    async fn post_start(&self, container: &Container, id: &str) {
        let hook = container.lifecycle.as_ref().and_then(|l| l.post_start.as_ref());
        let Some(hook) = hook else { return };
        let result = match Action::of_hook(hook, container, self.pod_ips.first().copied()) {
            Ok(action) => action.run(&self.context.client, id, HOOK_LIMIT).await,
            Err(why) => Err(Trouble::Failed(why)),
        };
        let Err(why) = result else { return };
        self.event(
            true,
            &container.name,
            "FailedPostStartHook",
            format!("PostStartHook failed: {why}"),
        );
        let grace = self.work.as_ref().map_or(Duration::ZERO, |work| grace_of(&work.pod));
        // The restart policy decides what follows.
        let stopped =
            self.stop(id, &container.name, grace.max(LEAST_GRACE), "FailedPostStartHook").await;
        if let Err(error) = stopped {
            let why = error.message;
            tracing::warn!(pod = %self.pod, container = container.name, why, "not stopped after its hook failed");
        }
    }
}

fn file_error(path: &str) -> impl FnOnce(std::io::Error) -> ConfigError {
    let path = path.to_owned();
    move |cause| ConfigError::Mount(crate::pods::volumes::MountError::Io { path, cause })
}

/// Adds a mount, unless the pod mounts something of its own there.
fn add(mounts: &mut Vec<v1::Mount>, target: &str, source: &std::path::Path) {
    if mounts.iter().all(|mount| mount.container_path != target) {
        mounts.push(v1::Mount {
            container_path: target.to_owned(),
            host_path: source.display().to_string(),
            readonly: false,
            selinux_relabel: true,
            propagation: v1::MountPropagation::Private.into(),
        });
    }
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}
