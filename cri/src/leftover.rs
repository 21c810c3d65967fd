//! Tasks that are left of starts that nobody waited for any more.
//!
//! A caller that dies during `StartContainer` can leave a process that containerd knows and its CRI does not: for CRI the
//! container has ended with `StartError`, and deleting it fails for ever with "cannot delete running task" (containerd
//! issue 11037), and with it the deletion of its sandbox. CRI has no call for such a task, so it is ended by containerd's own.
//! A sandbox's own task needs nothing: CRI keeps one whose start was given up as unknown, and stopping it ends its task.

use std::time::Duration;

use tonic::Request;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;

use self::v1::tasks_client::TasksClient;
use self::v1::{DeleteTaskRequest, KillRequest, WaitRequest};
use crate::client::{limited, missing_is_done};
use crate::error::{CallError, Fault};

#[allow(missing_docs, unreachable_pub, clippy::all)]
mod v1 {
    tonic::include_proto!("containerd.services.tasks.v1");
}

/// Where CRI keeps its containers; containerd has no setting for it.
const NAMESPACE: &str = "k8s.io";
/// A killed process is gone long before.
const LIMIT: Duration = Duration::from_secs(20);
const SIGKILL: u32 = 9;

/// Whether a deletion can have failed because of a task that is left.
pub(crate) fn may_be_in_the_way(deleted: &Result<(), CallError>) -> bool {
    matches!(deleted, Err(error) if error.fault == Fault::Busy)
}

/// Ends the task of a container that CRI knows to have ended or never to have run: it stops all others by itself.
pub(crate) async fn end(channel: &Channel, id: &str) -> Result<(), CallError> {
    let mut tasks = TasksClient::new(channel.clone());
    let container_id = id.to_owned();
    let kill = KillRequest { container_id: container_id.clone(), signal: SIGKILL, all: true };
    missing_is_done(limited("Kill", LIMIT, tasks.kill(named(kill))).await)?;
    let wait = WaitRequest { container_id: container_id.clone() };
    missing_is_done(limited("Wait", LIMIT, tasks.wait(named(wait))).await)?;
    let delete = DeleteTaskRequest { container_id };
    missing_is_done(limited("Delete", LIMIT, tasks.delete(named(delete))).await)
}

fn named<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", MetadataValue::from_static(NAMESPACE));
    request
}
