//! The connection and the calls.

use std::collections::HashMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};
use tower::service_fn;

use crate::error::CallError;
use crate::leftover;
use crate::v1;
use crate::v1::image_service_client::ImageServiceClient;
use crate::v1::runtime_service_client::RuntimeServiceClient;

/// Calls that only read.
const READ_LIMIT: Duration = Duration::from_secs(20);
/// Calls that start or delete something.
const CHANGE_LIMIT: Duration = Duration::from_secs(120);
/// Fetching an image; registries are slow and images large.
const PULL_LIMIT: Duration = Duration::from_secs(1800);
/// A list of many containers with long annotations is larger than the 4 MiB that gRPC allows by default.
const MESSAGE_BYTES: usize = 16 << 20;

/// A connection to a container runtime. Cheap to clone; clones share the connection.
///
/// The socket is opened at the first call and again after it broke, so a runtime that restarts costs only the
/// calls under way.
#[derive(Debug, Clone)]
pub struct Client {
    channel: Channel,
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

impl Client {
    /// A client of the runtime that listens on `socket`. Does not connect yet; needs a Tokio runtime.
    pub fn new(socket: &Path) -> Self {
        let path: PathBuf = socket.to_owned();
        let connector = service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The address is never used: the connector goes to the socket.
        let channel =
            Endpoint::from_static("http://runtime.invalid").connect_with_connector_lazy(connector);
        Self {
            runtime: RuntimeServiceClient::new(channel.clone())
                .max_decoding_message_size(MESSAGE_BYTES),
            images: ImageServiceClient::new(channel.clone())
                .max_decoding_message_size(MESSAGE_BYTES),
            channel,
        }
    }

    /// Name and version of the runtime.
    pub async fn version(&self) -> Result<v1::VersionResponse, CallError> {
        let mut runtime = self.runtime.clone();
        limited("Version", READ_LIMIT, runtime.version(v1::VersionRequest::default())).await
    }

    /// The runtime's own conditions, `RuntimeReady` and `NetworkReady` among them.
    pub async fn status(&self) -> Result<Vec<v1::RuntimeCondition>, CallError> {
        let mut runtime = self.runtime.clone();
        let answer =
            limited("Status", READ_LIMIT, runtime.status(v1::StatusRequest::default())).await?;
        Ok(answer.status.map(|s| s.conditions).unwrap_or_default())
    }

    /// Creates and starts a sandbox; its identifier.
    pub async fn run_sandbox(&self, config: v1::PodSandboxConfig) -> Result<String, CallError> {
        let mut runtime = self.runtime.clone();
        let request =
            v1::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
        let call = runtime.run_pod_sandbox(request);
        Ok(limited("RunPodSandbox", CHANGE_LIMIT, call).await?.pod_sandbox_id)
    }

    /// Ends a sandbox's processes and gives back its network. A sandbox that does not exist is success.
    pub async fn stop_sandbox(&self, id: &str) -> Result<(), CallError> {
        let mut runtime = self.runtime.clone();
        let request = v1::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        let call = runtime.stop_pod_sandbox(request);
        missing_is_done(limited("StopPodSandbox", CHANGE_LIMIT, call).await)
    }

    /// Deletes a sandbox and its containers. A sandbox that does not exist is success.
    pub async fn remove_sandbox(&self, id: &str) -> Result<(), CallError> {
        let removed = self.try_to_remove_sandbox(id).await;
        if !leftover::may_be_in_the_way(&removed) {
            return removed;
        }
        let filter = v1::ContainerFilter { pod_sandbox_id: id.to_owned(), ..Default::default() };
        for container in self.containers(filter).await? {
            self.remove_container(&container.id).await?;
        }
        self.try_to_remove_sandbox(id).await
    }

    async fn try_to_remove_sandbox(&self, id: &str) -> Result<(), CallError> {
        let mut runtime = self.runtime.clone();
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        let call = runtime.remove_pod_sandbox(request);
        missing_is_done(limited("RemovePodSandbox", CHANGE_LIMIT, call).await)
    }

    /// One sandbox in detail.
    pub async fn sandbox_status(&self, id: &str) -> Result<v1::PodSandboxStatus, CallError> {
        let mut runtime = self.runtime.clone();
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        let call = runtime.pod_sandbox_status(request);
        let answer = limited("PodSandboxStatus", READ_LIMIT, call).await?;
        answer.status.ok_or(CallError::incomplete("PodSandboxStatus"))
    }

    /// Sandboxes that carry all of these labels.
    pub async fn list_sandboxes(
        &self,
        labels: HashMap<String, String>,
    ) -> Result<Vec<v1::PodSandbox>, CallError> {
        let mut runtime = self.runtime.clone();
        let filter = v1::PodSandboxFilter { label_selector: labels, ..Default::default() };
        let call = runtime.list_pod_sandbox(v1::ListPodSandboxRequest { filter: Some(filter) });
        Ok(limited("ListPodSandbox", READ_LIMIT, call).await?.items)
    }

    /// Creates a container in a sandbox; its identifier.
    pub async fn create_container(
        &self,
        sandbox: &str,
        config: v1::ContainerConfig,
        sandbox_config: v1::PodSandboxConfig,
    ) -> Result<String, CallError> {
        let mut runtime = self.runtime.clone();
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        let call = runtime.create_container(request);
        Ok(limited("CreateContainer", CHANGE_LIMIT, call).await?.container_id)
    }

    /// Starts a created container.
    pub async fn start_container(&self, id: &str) -> Result<(), CallError> {
        let mut runtime = self.runtime.clone();
        let request = v1::StartContainerRequest { container_id: id.to_owned() };
        let call = runtime.start_container(request);
        limited("StartContainer", CHANGE_LIMIT, call).await.map(drop)
    }

    /// Sends the stop signal, waits up to `grace`, then kills. A container that does not exist is success.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<(), CallError> {
        let mut runtime = self.runtime.clone();
        let timeout = i64::try_from(grace.as_secs()).unwrap_or(i64::MAX);
        let request = v1::StopContainerRequest { container_id: id.to_owned(), timeout };
        let call = runtime.stop_container(request);
        missing_is_done(limited("StopContainer", grace.saturating_add(CHANGE_LIMIT), call).await)
    }

    /// Deletes a container. A container that does not exist is success.
    pub async fn remove_container(&self, id: &str) -> Result<(), CallError> {
        let removed = self.try_to_remove_container(id).await;
        // A runtime without tasks has its own reason, which stays the answer.
        if leftover::may_be_in_the_way(&removed) && leftover::end(&self.channel, id).await.is_ok() {
            return self.try_to_remove_container(id).await;
        }
        removed
    }

    async fn try_to_remove_container(&self, id: &str) -> Result<(), CallError> {
        let mut runtime = self.runtime.clone();
        let request = v1::RemoveContainerRequest { container_id: id.to_owned() };
        let call = runtime.remove_container(request);
        missing_is_done(limited("RemoveContainer", CHANGE_LIMIT, call).await)
    }

    /// Containers that carry all of these labels.
    pub async fn list_containers(
        &self,
        labels: HashMap<String, String>,
    ) -> Result<Vec<v1::Container>, CallError> {
        self.containers(v1::ContainerFilter { label_selector: labels, ..Default::default() }).await
    }

    async fn containers(
        &self,
        filter: v1::ContainerFilter,
    ) -> Result<Vec<v1::Container>, CallError> {
        let mut runtime = self.runtime.clone();
        let call = runtime.list_containers(v1::ListContainersRequest { filter: Some(filter) });
        Ok(limited("ListContainers", READ_LIMIT, call).await?.containers)
    }

    /// One container in detail.
    pub async fn container_status(&self, id: &str) -> Result<v1::ContainerStatus, CallError> {
        let mut runtime = self.runtime.clone();
        let request = v1::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let call = runtime.container_status(request);
        let answer = limited("ContainerStatus", READ_LIMIT, call).await?;
        answer.status.ok_or(CallError::incomplete("ContainerStatus"))
    }

    /// What the containers use that carry all of these labels.
    pub async fn container_stats(
        &self,
        labels: HashMap<String, String>,
    ) -> Result<Vec<v1::ContainerStats>, CallError> {
        let mut runtime = self.runtime.clone();
        let filter = v1::ContainerStatsFilter { label_selector: labels, ..Default::default() };
        let request = v1::ListContainerStatsRequest { filter: Some(filter) };
        let call = runtime.list_container_stats(request);
        Ok(limited("ListContainerStats", READ_LIMIT, call).await?.stats)
    }

    /// Makes the runtime open a container's log file again.
    pub async fn reopen_log(&self, id: &str) -> Result<(), CallError> {
        let mut runtime = self.runtime.clone();
        let request = v1::ReopenContainerLogRequest { container_id: id.to_owned() };
        let call = runtime.reopen_container_log(request);
        limited("ReopenContainerLog", READ_LIMIT, call).await.map(drop)
    }

    /// Runs a command in a container; fails with [`Fault::TimedOut`](crate::Fault) when it takes longer than `limit`.
    pub async fn exec_sync(
        &self,
        id: &str,
        command: Vec<String>,
        limit: Duration,
    ) -> Result<v1::ExecSyncResponse, CallError> {
        let mut runtime = self.runtime.clone();
        let timeout = i64::try_from(limit.as_secs()).unwrap_or(i64::MAX).max(1);
        let request = v1::ExecSyncRequest { container_id: id.to_owned(), cmd: command, timeout };
        let call = runtime.exec_sync(request);
        limited("ExecSync", limit.saturating_add(Duration::from_secs(5)), call).await
    }

    /// Prepares a command that somebody talks to; the URL where the runtime waits for one connection.
    pub async fn exec(&self, request: v1::ExecRequest) -> Result<String, CallError> {
        let mut runtime = self.runtime.clone();
        Ok(limited("Exec", READ_LIMIT, runtime.exec(request)).await?.url)
    }

    /// Prepares talking to a container's process; the URL where the runtime waits for one connection.
    pub async fn attach(&self, request: v1::AttachRequest) -> Result<String, CallError> {
        let mut runtime = self.runtime.clone();
        Ok(limited("Attach", READ_LIMIT, runtime.attach(request)).await?.url)
    }

    /// Prepares connections to a sandbox's ports; the URL where the runtime waits for one connection.
    pub async fn port_forward(&self, sandbox: &str) -> Result<String, CallError> {
        let mut runtime = self.runtime.clone();
        let request =
            v1::PortForwardRequest { pod_sandbox_id: sandbox.to_owned(), port: Vec::new() };
        Ok(limited("PortForward", READ_LIMIT, runtime.port_forward(request)).await?.url)
    }

    /// The image that `reference` (a name or an identifier) stands for on this node, if it is here.
    pub async fn image(&self, reference: &str) -> Result<Option<v1::Image>, CallError> {
        let mut images = self.images.clone();
        let request = v1::ImageStatusRequest { image: Some(spec(reference)), verbose: false };
        let call = images.image_status(request);
        Ok(limited("ImageStatus", READ_LIMIT, call).await?.image)
    }

    /// All images on this node.
    pub async fn list_images(&self) -> Result<Vec<v1::Image>, CallError> {
        let mut images = self.images.clone();
        let call = images.list_images(v1::ListImagesRequest::default());
        Ok(limited("ListImages", READ_LIMIT, call).await?.images)
    }

    /// Fetches an image; its identifier.
    pub async fn pull_image(
        &self,
        reference: &str,
        auth: Option<v1::AuthConfig>,
    ) -> Result<String, CallError> {
        let mut images = self.images.clone();
        let request =
            v1::PullImageRequest { image: Some(spec(reference)), auth, sandbox_config: None };
        let call = images.pull_image(request);
        Ok(limited("PullImage", PULL_LIMIT, call).await?.image_ref)
    }

    /// Mount points of the file systems that hold images.
    pub async fn image_file_systems(&self) -> Result<Vec<PathBuf>, CallError> {
        let mut images = self.images.clone();
        let call = images.image_fs_info(v1::ImageFsInfoRequest::default());
        let answer = limited("ImageFsInfo", READ_LIMIT, call).await?;
        let points = answer.image_filesystems.into_iter().filter_map(|usage| usage.fs_id);
        Ok(points.map(|id| id.mountpoint.into()).collect())
    }

    /// Deletes an image. An image that does not exist is success.
    pub async fn remove_image(&self, reference: &str) -> Result<(), CallError> {
        let mut images = self.images.clone();
        let call = images.remove_image(v1::RemoveImageRequest { image: Some(spec(reference)) });
        missing_is_done(limited("RemoveImage", CHANGE_LIMIT, call).await)
    }
}

fn spec(reference: &str) -> v1::ImageSpec {
    v1::ImageSpec { image: reference.to_owned(), ..Default::default() }
}

pub(crate) async fn limited<T>(
    name: &'static str,
    limit: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, CallError> {
    match tokio::time::timeout(limit, call).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(CallError::from_status(name, &status)),
        Err(_) => Err(CallError::timed_out(name, limit)),
    }
}

pub(crate) fn missing_is_done<T>(result: Result<T, CallError>) -> Result<(), CallError> {
    match result {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Fault;

    #[tokio::test]
    async fn a_socket_that_is_not_there_is_unavailable() {
        let client = Client::new(Path::new("/nonexistent/containerd.sock"));
        let error = client.version().await.expect_err("nobody listens");
        assert_eq!(error.fault, Fault::Unavailable);
        assert_eq!(error.call, "Version");
    }
}
