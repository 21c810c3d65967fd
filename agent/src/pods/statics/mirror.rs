//! The mirrors of static pods: objects of the API that show what a file of the node makes run. Only their status counts.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::sync::watch;

use super::{ANNOTATION_HASH, annotation};
use crate::pods::observed::PodRef;
use crate::pods::report::{PodEvent, ReportError, StatusReporter};
use crate::pods::tokens::{Token, TokenWanted};

/// Marks an object as a mirror.
const ANNOTATION_MIRROR: &str = "kubernetes.io/config.mirror";
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(30);

/// Whether the object of the API is a mirror.
pub(crate) fn is_mirror(pod: &Pod) -> bool {
    annotation(pod, ANNOTATION_MIRROR).is_some()
}

/// The static pods of the node, and the mirrors that the API has of this node.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Mirrors {
    pub(crate) statics: Vec<Pod>,
    /// Absent until the API is known.
    pub(crate) mirrors: Option<Vec<Pod>>,
}

#[derive(Debug, Clone, PartialEq)]
enum Step {
    Delete(PodRef),
    Create(Box<Pod>),
}

impl Mirrors {
    /// The mirror that shows that static pod as it is.
    pub(crate) fn of(&self, pod: &Pod) -> Option<&Pod> {
        let mut all = self.mirrors.iter().flatten();
        all.find(|mirror| shows(mirror, pod) && mirror.metadata.deletion_timestamp.is_none())
    }

    /// What makes the API show each static pod once. What has to go first goes first: the rest follows when it is gone.
    fn plan(&self) -> Vec<Step> {
        let Some(mirrors) = &self.mirrors else { return Vec::new() };
        let is_right = |mirror: &Pod| {
            mirror.metadata.deletion_timestamp.is_none()
                && self.statics.iter().any(|pod| shows(mirror, pod))
        };
        let wrong = mirrors.iter().filter(|mirror| !is_right(mirror));
        let mut steps: Vec<Step> = wrong.filter_map(PodRef::of).map(Step::Delete).collect();
        let same = |a: &Pod, b: &Pod| {
            (&a.metadata.namespace, &a.metadata.name) == (&b.metadata.namespace, &b.metadata.name)
        };
        let missing = self.statics.iter().filter(|pod| !mirrors.iter().any(|m| same(m, pod)));
        steps.extend(missing.map(|pod| Step::Create(Box::new(mirror(pod)))));
        steps
    }
}

fn shows(mirror: &Pod, pod: &Pod) -> bool {
    (&mirror.metadata.namespace, &mirror.metadata.name)
        == (&pod.metadata.namespace, &pod.metadata.name)
        && annotation(mirror, ANNOTATION_MIRROR) == annotation(pod, ANNOTATION_HASH)
}

/// What the API is to store.
fn mirror(pod: &Pod) -> Pod {
    let mut mirror = pod.clone();
    let hash = annotation(pod, ANNOTATION_HASH).unwrap_or_default().to_owned();
    let meta = &mut mirror.metadata;
    meta.uid = None;
    meta.annotations.get_or_insert_default().insert(ANNOTATION_MIRROR.to_owned(), hash);
    mirror
}

/// Keeps the mirrors right until it is cancelled.
pub(crate) async fn keep<R: StatusReporter>(
    mut wanted: watch::Receiver<Mirrors>,
    reporter: Arc<Mirrored<R>>,
) {
    let mut retry = FIRST_RETRY;
    loop {
        let steps = wanted.borrow_and_update().plan();
        let mut failed = false;
        for step in steps {
            let done = match &step {
                Step::Delete(pod) => reporter.inner.deleted(pod).await,
                Step::Create(pod) => reporter.inner.mirror(pod).await,
            };
            match done {
                Ok(()) | Err(ReportError::Gone) => {}
                Err(error) => {
                    failed = true;
                    tracing::warn!(%error, "mirror of a static pod not made right, will retry");
                }
            }
        }
        retry = if failed { (retry * 2).min(LAST_RETRY) } else { FIRST_RETRY };
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(retry), if failed => {}
        }
    }
}

/// Tells the API about static pods under the names of their mirrors, and about all others as they are.
pub(crate) struct Mirrored<R> {
    inner: R,
    uids: Arc<Uids>,
}

/// The uid of the mirror of each static pod, once there is one.
#[derive(Debug, Default)]
pub(crate) struct Uids(Mutex<BTreeMap<String, Option<String>>>);

impl Uids {
    fn uids(&self) -> MutexGuard<'_, BTreeMap<String, Option<String>>> {
        // The map is replaced whole: a panic elsewhere leaves it usable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Learns them anew.
    pub(crate) fn learn(&self, mirrors: &Mirrors) {
        let entry = |pod: &Pod| {
            let mirror = mirrors.of(pod).and_then(|mirror| mirror.metadata.uid.clone());
            Some((pod.metadata.uid.clone()?, mirror))
        };
        *self.uids() = mirrors.statics.iter().filter_map(entry).collect();
    }
}

impl<R> Mirrored<R> {
    pub(crate) fn new(inner: R, uids: Arc<Uids>) -> Self {
        Self { inner, uids }
    }

    /// The pod as the API knows it; none when it does not know it yet.
    fn known(&self, pod: &PodRef) -> Option<PodRef> {
        match self.uids.uids().get(&pod.uid) {
            None => Some(pod.clone()),
            Some(uid) => uid.clone().map(|uid| PodRef { uid, ..pod.clone() }),
        }
    }

    fn is_static(&self, pod: &PodRef) -> bool {
        self.uids.uids().contains_key(&pod.uid)
    }
}

#[async_trait]
impl<R: StatusReporter> StatusReporter for Mirrored<R> {
    async fn status(&self, pod: &PodRef, status: &PodStatus) -> Result<(), ReportError> {
        match self.known(pod) {
            Some(pod) => self.inner.status(&pod, status).await,
            // It is told again as soon as there is a mirror.
            None => Ok(()),
        }
    }

    async fn event(&self, event: &PodEvent) -> Result<(), ReportError> {
        let pod = self.known(&event.pod).unwrap_or_else(|| event.pod.clone());
        self.inner.event(&PodEvent { pod, ..event.clone() }).await
    }

    async fn deleted(&self, pod: &PodRef) -> Result<(), ReportError> {
        if self.is_static(pod) { Ok(()) } else { self.inner.deleted(pod).await }
    }

    async fn mirror(&self, pod: &Pod) -> Result<(), ReportError> {
        self.inner.mirror(pod).await
    }

    async fn token(&self, wanted: &TokenWanted) -> Result<Token, ReportError> {
        self.inner.token(wanted).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, uid: &str, annotation: (&str, &str)) -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": {"namespace": "d", "name": name, "uid": uid,
                "annotations": {annotation.0: annotation.1}},
            "spec": {"containers": []}}))
        .unwrap()
    }

    fn of_file(name: &str, hash: &str) -> Pod {
        pod(name, hash, (ANNOTATION_HASH, hash))
    }

    fn of_api(name: &str, uid: &str, hash: &str) -> Pod {
        pod(name, uid, (ANNOTATION_MIRROR, hash))
    }

    fn shown(mirrors: &Mirrors) -> Vec<String> {
        let show = |step: Step| match step {
            Step::Delete(pod) => format!("delete {} {}", pod.name, pod.uid),
            Step::Create(pod) => {
                assert!(is_mirror(&pod) && pod.metadata.uid.is_none());
                format!("create {}", pod.metadata.name.unwrap())
            }
        };
        mirrors.plan().into_iter().map(show).collect()
    }

    #[test]
    fn each_file_has_one_mirror_of_its_present_version() {
        let mut all =
            Mirrors { statics: vec![of_file("a", "1"), of_file("b", "2")], mirrors: None };
        assert_eq!(shown(&all), [""; 0], "the API is not known");
        all.mirrors = Some(vec![]);
        assert_eq!(shown(&all), ["create a", "create b"]);
        all.mirrors = Some(vec![of_api("a", "m1", "1"), of_api("b", "m2", "old")]);
        assert_eq!(shown(&all), ["delete b m2"], "its name is free only then");
        let mut leaving = of_api("b", "m3", "2");
        leaving.metadata.deletion_timestamp =
            serde_json::from_value(serde_json::json!("2026-01-01T00:00:00Z")).unwrap();
        all.mirrors = Some(vec![of_api("a", "m1", "1"), leaving, of_api("gone", "m4", "9")]);
        assert_eq!(shown(&all), ["delete b m3", "delete gone m4"]);
        assert_eq!(all.of(&all.statics[1]), None);
        all.mirrors = Some(vec![of_api("a", "m1", "1"), of_api("b", "m5", "2")]);
        assert_eq!(shown(&all), [""; 0]);

        let uids = Arc::new(Uids::default());
        uids.learn(&all);
        let reporter = Mirrored::new((), uids);
        let reference =
            |uid: &str| PodRef { namespace: "d".into(), name: "a".into(), uid: uid.into() };
        assert_eq!(reporter.known(&reference("1")).unwrap().uid, "m1");
        assert_eq!(reporter.known(&reference("x")).unwrap().uid, "x", "an ordinary pod");
        assert!(reporter.is_static(&reference("2")) && !reporter.is_static(&reference("m1")));
    }
}
