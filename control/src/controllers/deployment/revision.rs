//! Which ReplicaSet carries which template, and the revision numbers that `kubectl rollout` reads.

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

use crate::controllers::ownership;
use crate::objects::{self, Labels};
use crate::registry::Object;

/// Revision number, on Deployments and their ReplicaSets.
pub(in crate::controllers) const REVISION: &str = "deployment.kubernetes.io/revision";
/// Revisions that a ReplicaSet had before it was rolled back to, joined by commas.
pub(super) const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
/// Replicas of the Deployment when the set was scaled last.
pub(super) const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
/// The most pods that the Deployment was allowed then.
pub(super) const MOST: &str = "deployment.kubernetes.io/max-replicas";
/// Label that tells apart the pods of a Deployment's templates.
pub(super) const TEMPLATE_HASH: &str = "pod-template-hash";

const NOT_COPIED: &[&str] = &[
    "kubectl.kubernetes.io/last-applied-configuration",
    "deprecated.deployment.rollback.to",
    REVISION,
    REVISION_HISTORY,
    DESIRED,
    MOST,
];

/// A short hash of the template, made of letters and digits that spell no words.
pub(in crate::controllers) fn template_hash(template: &PodTemplateSpec, collisions: i32) -> String {
    const ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    let json = serde_json::to_vec(template).expect("a stored template is valid JSON");
    // FNV-1a, 32 bits.
    let bytes =
        json.iter().copied().chain(collisions.to_le_bytes().into_iter().filter(|b| *b != 0));
    let hash = bytes
        .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    hash.to_string().bytes().map(|b| ALPHABET[usize::from(b) % 27] as char).collect()
}

/// Whether the set was made from the Deployment's present template.
pub(super) fn has_template(set: &ReplicaSet, deployment: &Deployment) -> bool {
    let (Some(spec), Some(wanted)) = (&set.spec, &deployment.spec) else {
        return false;
    };
    let same = |set: &Option<PodTemplateSpec>, wanted: &PodTemplateSpec| {
        set.as_ref().is_some_and(|template| without_hash(template) == without_hash(wanted))
    };
    // One of them may have been stored by a version of this program that had other defaults.
    same(&spec.template, &wanted.template)
        || same(
            &defaulted(set).spec.unwrap_or_default().template,
            &defaulted(deployment).spec.unwrap_or_default().template,
        )
}

fn defaulted<K: Object>(object: &K) -> K {
    let mut object = object.clone();
    object.set_defaults();
    object
}

fn without_hash(template: &PodTemplateSpec) -> PodTemplateSpec {
    let mut template = template.clone();
    let metadata = template.metadata.get_or_insert_default();
    if let Some(labels) = &mut metadata.labels {
        labels.remove(TEMPLATE_HASH);
    }
    if metadata.labels.as_ref().is_some_and(|labels| labels.is_empty()) {
        metadata.labels = None;
    }
    template
}

/// The revision number of an object; 0 when it has none.
pub(in crate::controllers) fn revision(meta: &ObjectMeta) -> i64 {
    number(meta, REVISION)
}

/// A number in an annotation; 0 when there is none.
pub(super) fn number(meta: &ObjectMeta, key: &str) -> i64 {
    let text = meta.annotations.as_ref().and_then(|annotations| annotations.get(key));
    text.and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// The annotations that the new set should have: the Deployment's own, and its revision.
pub(super) fn set_annotations(
    deployment: &Deployment,
    current: Option<&ReplicaSet>,
    revision_wanted: i64,
) -> Labels {
    let mut result = current.and_then(|set| set.metadata.annotations.clone()).unwrap_or_default();
    for (key, value) in deployment.metadata.annotations.iter().flatten() {
        if !NOT_COPIED.contains(&key.as_str()) {
            result.insert(key.clone(), value.clone());
        }
    }
    let before = current.map_or(0, |set| revision(&set.metadata));
    if before < revision_wanted {
        if before > 0 {
            let history = result.entry(REVISION_HISTORY.to_owned()).or_default();
            if !history.is_empty() {
                history.push(',');
            }
            history.push_str(&before.to_string());
        }
        result.insert(REVISION.to_owned(), revision_wanted.to_string());
    }
    result
}

/// A new set of the Deployment's present template, with no replicas yet.
pub(super) fn new_set(deployment: &Deployment, revision: i64) -> ReplicaSet {
    let spec = deployment.spec.clone().unwrap_or_default();
    let collisions = deployment.status.as_ref().and_then(|s| s.collision_count).unwrap_or(0);
    let hash = template_hash(&spec.template, collisions);
    let with_hash = |labels: Option<Labels>| {
        let mut labels = labels.unwrap_or_default();
        labels.insert(TEMPLATE_HASH.to_owned(), hash.clone());
        Some(labels)
    };
    let mut template = spec.template;
    let metadata = template.metadata.get_or_insert_default();
    metadata.labels = with_hash(metadata.labels.take());
    let labels = metadata.labels.clone();
    let mut selector = spec.selector;
    selector.match_labels = with_hash(selector.match_labels.take());
    ReplicaSet {
        metadata: ObjectMeta {
            name: Some(format!("{}-{hash}", objects::name(&deployment.metadata))),
            namespace: deployment.metadata.namespace.clone(),
            labels,
            annotations: Some(set_annotations(deployment, None, revision)),
            owner_references: Some(vec![owner_reference(deployment)]),
            ..ObjectMeta::default()
        },
        spec: Some(ReplicaSetSpec {
            replicas: Some(0),
            min_ready_seconds: spec.min_ready_seconds,
            selector,
            template: Some(template),
        }),
        status: None,
    }
}

/// The reference by which a Deployment controls its sets.
pub(in crate::controllers) fn owner_reference(deployment: &Deployment) -> OwnerReference {
    ownership::reference(deployment)
}
