//! What the runtime has of one pod: sandboxes and containers, read back by our labels.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use jiff::Timestamp;
use mesh_cri::v1;

/// Label that marks what this agent made; nothing without it is ever touched.
pub(crate) const LABEL_OWNER: &str = "mesh.dev/managed-by";
/// Value of [`LABEL_OWNER`].
pub(crate) const OWNER: &str = "mesh-agent";
/// Labels and annotations that tools such as crictl expect.
pub(crate) const LABEL_POD_NAME: &str = "io.kubernetes.pod.name";
pub(crate) const LABEL_POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
pub(crate) const LABEL_POD_UID: &str = "io.kubernetes.pod.uid";
pub(crate) const LABEL_CONTAINER: &str = "io.kubernetes.container.name";
pub(crate) const ANNOTATION_RESTARTS: &str = "io.kubernetes.container.restartCount";
pub(crate) const ANNOTATION_HASH: &str = "io.kubernetes.container.hash";
pub(crate) const ANNOTATION_GRACE: &str = "io.kubernetes.pod.terminationGracePeriod";
/// Seconds that were waited before this start, so that the back-off survives a restart of the agent.
pub(crate) const ANNOTATION_DELAY: &str = "mesh.dev/restart-delay-secs";
/// How long the container is asked to stop before it is killed, when its pod is no longer known.
pub(crate) const DEFAULT_GRACE_SECS: i64 = 30;

/// A pod on this node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodRef {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its identity: a pod that was deleted and made again has another one.
    pub uid: String,
}

impl std::fmt::Display for PodRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl PodRef {
    /// The pod that an object is; a pod without identity was never stored and has none here.
    pub fn of(pod: &k8s_openapi::api::core::v1::Pod) -> Option<Self> {
        Some(Self {
            namespace: pod.metadata.namespace.clone()?,
            name: pod.metadata.name.clone()?,
            uid: pod.metadata.uid.clone()?,
        })
    }

    /// The pod that a sandbox or container was made for.
    pub(crate) fn from_labels(labels: &HashMap<String, String>) -> Option<Self> {
        Some(Self {
            namespace: labels.get(LABEL_POD_NAMESPACE)?.clone(),
            name: labels.get(LABEL_POD_NAME)?.clone(),
            uid: labels.get(LABEL_POD_UID)?.clone(),
        })
    }

    /// The labels of everything that belongs to the pod.
    pub(crate) fn labels(&self) -> HashMap<String, String> {
        [
            (LABEL_OWNER, OWNER),
            (LABEL_POD_NAMESPACE, &self.namespace),
            (LABEL_POD_NAME, &self.name),
            (LABEL_POD_UID, &self.uid),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
    }

    /// Directory of the pod's logs below the log directory, as other tools expect it.
    pub(crate) fn log_directory(&self) -> String {
        format!("{}_{}_{}", self.namespace, self.name, self.uid)
    }
}

/// The labels that select everything that this agent made.
pub(crate) fn owned() -> HashMap<String, String> {
    [(LABEL_OWNER.to_owned(), OWNER.to_owned())].into()
}

/// A sandbox: the pod's network and namespaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sandbox {
    pub(crate) id: String,
    pub(crate) attempt: u32,
    pub(crate) ready: bool,
    pub(crate) created_at: Timestamp,
    /// Addresses; empty with the node's network.
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) grace_secs: Option<i64>,
}

/// What a container is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State {
    /// Made, never started.
    Created,
    /// Runs.
    Running { started_at: Timestamp },
    /// Ended.
    Exited(Exit),
    /// The runtime cannot tell.
    Unknown,
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Exit {
    pub(crate) started_at: Timestamp,
    pub(crate) finished_at: Timestamp,
    pub(crate) code: i32,
    pub(crate) reason: String,
    pub(crate) message: String,
}

impl Exit {
    /// How long it ran. One that could not be started has no time of its start.
    pub(crate) fn ran(&self) -> std::time::Duration {
        if self.started_at == Timestamp::UNIX_EPOCH {
            return std::time::Duration::ZERO;
        }
        self.finished_at.duration_since(self.started_at).try_into().unwrap_or_default()
    }
}

/// One run of a container of the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Instance {
    pub(crate) id: String,
    pub(crate) sandbox: String,
    pub(crate) name: String,
    /// How often it had been restarted before; part of its name and of its log file's.
    pub(crate) attempt: u32,
    pub(crate) created_at: Timestamp,
    pub(crate) state: State,
    pub(crate) image_id: String,
    pub(crate) hash: String,
    /// Seconds that were waited before it was started.
    pub(crate) delay_secs: u64,
}

impl Instance {
    pub(crate) fn is_running(&self) -> bool {
        matches!(self.state, State::Running { .. })
    }

    pub(crate) fn exit(&self) -> Option<&Exit> {
        match &self.state {
            State::Exited(exit) => Some(exit),
            _ => None,
        }
    }
}

/// Everything that the runtime has of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Observed {
    /// Newest first.
    pub(crate) sandboxes: Vec<Sandbox>,
    /// Newest first.
    pub(crate) instances: Vec<Instance>,
}

impl Observed {
    /// Puts the newest first, whatever order the runtime answered in.
    pub(crate) fn new(mut sandboxes: Vec<Sandbox>, mut instances: Vec<Instance>) -> Self {
        sandboxes.sort_by(|a, b| {
            (b.attempt, b.created_at, &b.id).cmp(&(a.attempt, a.created_at, &a.id))
        });
        instances.sort_by(|a, b| {
            (b.attempt, b.created_at, &b.id).cmp(&(a.attempt, a.created_at, &a.id))
        });
        Self { sandboxes, instances }
    }

    /// The sandbox that the pod's containers run in.
    pub(crate) fn sandbox(&self) -> Option<&Sandbox> {
        self.sandboxes.iter().find(|s| s.ready)
    }

    /// The runs of one container, newest first.
    pub(crate) fn runs<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Instance> + 'a {
        self.instances.iter().filter(move |i| i.name == name)
    }

    /// The newest run of one container.
    pub(crate) fn newest(&self, name: &str) -> Option<&Instance> {
        self.instances.iter().find(|i| i.name == name)
    }

    /// The newest run of one container, when it is in that sandbox.
    pub(crate) fn newest_in(&self, name: &str, sandbox: &str) -> Option<&Instance> {
        self.newest(name).filter(|i| i.sandbox == sandbox)
    }

    /// Whether the runtime has that run of a container.
    pub(crate) fn has(&self, run: &str) -> bool {
        self.instances.iter().any(|i| i.id == run)
    }

    /// Nothing is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.sandboxes.is_empty() && self.instances.is_empty()
    }
}

/// A sandbox as the list shows it; its addresses come from the status.
pub(crate) fn sandbox(from: &v1::PodSandbox, ips: Vec<IpAddr>) -> Sandbox {
    Sandbox {
        id: from.id.clone(),
        attempt: from.metadata.as_ref().map_or(0, |m| m.attempt),
        ready: from.state() == v1::PodSandboxState::Ready,
        created_at: timestamp(from.created_at),
        ips,
        grace_secs: from.annotations.get(ANNOTATION_GRACE).and_then(|g| g.parse().ok()),
    }
}

/// A run of a container; `status` has its times and exit code.
pub(crate) fn instance(from: &v1::Container, status: &v1::ContainerStatus) -> Instance {
    let metadata = from.metadata.clone().unwrap_or_default();
    let annotation = |key: &str| from.annotations.get(key).cloned().unwrap_or_default();
    Instance {
        id: from.id.clone(),
        sandbox: from.pod_sandbox_id.clone(),
        name: from.labels.get(LABEL_CONTAINER).cloned().unwrap_or(metadata.name),
        attempt: attempt(from),
        created_at: timestamp(from.created_at),
        state: state(status),
        image_id: status.image_ref.clone(),
        hash: annotation(ANNOTATION_HASH),
        delay_secs: annotation(ANNOTATION_DELAY).parse().unwrap_or(0),
    }
}

/// How often the container had been restarted before this run.
pub(crate) fn attempt(from: &v1::Container) -> u32 {
    let named = from.annotations.get(ANNOTATION_RESTARTS).and_then(|text| text.parse().ok());
    named.or(from.metadata.as_ref().map(|m| m.attempt)).unwrap_or_default()
}

fn state(status: &v1::ContainerStatus) -> State {
    match status.state() {
        v1::ContainerState::Created => State::Created,
        v1::ContainerState::Running => State::Running { started_at: timestamp(status.started_at) },
        v1::ContainerState::Unknown => State::Unknown,
        v1::ContainerState::Exited => State::Exited(Exit {
            started_at: timestamp(status.started_at),
            finished_at: timestamp(status.finished_at),
            code: status.exit_code,
            reason: exit_reason(status),
            message: status.message.clone(),
        }),
    }
}

fn exit_reason(status: &v1::ContainerStatus) -> String {
    match (status.reason.as_str(), status.exit_code) {
        ("", 0) => "Completed".to_owned(),
        ("", _) => "Error".to_owned(),
        (reason, _) => reason.to_owned(),
    }
}

fn timestamp(nanos: i64) -> Timestamp {
    Timestamp::from_nanosecond(i128::from(nanos)).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// States of all sandboxes and containers of each pod: what tells that a pod has to be looked at again.
pub(crate) fn fingerprints(
    sandboxes: &[v1::PodSandbox],
    containers: &[v1::Container],
) -> BTreeMap<PodRef, Vec<(String, i32)>> {
    let mut all: BTreeMap<PodRef, Vec<(String, i32)>> = BTreeMap::new();
    let sandboxes = sandboxes.iter().map(|s| (&s.labels, &s.id, s.state));
    for (labels, id, state) in
        sandboxes.chain(containers.iter().map(|c| (&c.labels, &c.id, c.state)))
    {
        if let Some(pod) = PodRef::from_labels(labels) {
            all.entry(pod).or_default().push((id.clone(), state));
        }
    }
    all.values_mut().for_each(|states| states.sort());
    all
}
