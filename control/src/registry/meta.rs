//! The metadata of objects: what the service sets, what the user may, what may not change.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use mesh_model::kinds::Kind;
use rand::Rng as _;

use crate::error::ApiError;
use crate::strategy::{Causes, names};

/// Characters of generated names: no vowels, nothing that is read as something else.
const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
const GENERATED: usize = 5;
const MAX_BASE: usize = 63 - GENERATED;

/// Now, in whole seconds: what a timestamp in an object can hold.
pub(super) fn now() -> Time {
    let now = Timestamp::now();
    Time(Timestamp::from_second(now.as_second()).unwrap_or(now))
}

/// Replaces what a user cannot choose in a new object.
pub(super) fn prepare_create(meta: &mut ObjectMeta, generation: bool) {
    meta.uid = Some(uid());
    meta.creation_timestamp = Some(now());
    meta.generation = generation.then_some(1);
    meta.resource_version = None;
    meta.deletion_timestamp = None;
    meta.deletion_grace_period_seconds = None;
    meta.managed_fields = None;
    meta.self_link = None;
    normalise(meta);
}

/// Puts the namespace of the request into the object; refuses another one.
pub(super) fn settle_namespace(
    kind: &Kind,
    meta: &mut ObjectMeta,
    ns: Option<&str>,
) -> Result<(), ApiError> {
    let own = meta.namespace.as_deref().filter(|ns| !ns.is_empty());
    if !kind.namespaced {
        return match own {
            Some(_) => Err(ApiError::BadRequest(
                "namespace may not be set on a cluster-wide object".to_owned(),
            )),
            None => {
                meta.namespace = None;
                Ok(())
            }
        };
    }
    match (own, ns) {
        (Some(own), Some(ns)) if own != ns => Err(ApiError::BadRequest(
            "the namespace of the provided object does not match the namespace sent on the request"
                .to_owned(),
        )),
        (None, None) => {
            Err(ApiError::BadRequest("an object of a namespaced kind needs a namespace".to_owned()))
        }
        (own, ns) => {
            meta.namespace = own.or(ns).map(str::to_owned);
            Ok(())
        }
    }
}

/// A name from `generateName`.
pub(super) fn generate_name(base: &str) -> String {
    let mut rng = rand::rng();
    let mut name = generated_start(base);
    name.extend((0..GENERATED).map(|_| ALPHABET[rng.random_range(0..ALPHABET.len())] as char));
    name
}

/// What all names from that `generateName` begin with.
pub(super) fn generated_start(base: &str) -> String {
    base.chars().take(MAX_BASE).collect()
}

fn uid() -> String {
    let mut b: [u8; 16] = rand::rng().random();
    b[6] = (b[6] & 0x0f) | 0x40;
    b[8] = (b[8] & 0x3f) | 0x80;
    let h = hex::encode(b);
    format!("{}-{}-{}-{}-{}", &h[..8], &h[8..12], &h[12..16], &h[16..20], &h[20..])
}

/// Takes over what an update cannot change.
pub(super) fn prepare_update(meta: &mut ObjectMeta, old: &ObjectMeta) {
    meta.uid.clone_from(&old.uid);
    meta.creation_timestamp.clone_from(&old.creation_timestamp);
    meta.deletion_timestamp.clone_from(&old.deletion_timestamp);
    meta.deletion_grace_period_seconds = old.deletion_grace_period_seconds;
    meta.generate_name.clone_from(&old.generate_name);
    meta.generation = old.generation;
    meta.resource_version.clone_from(&old.resource_version);
    meta.self_link = None;
    normalise(meta);
}

/// An empty list or map means the same as none, and is not a change.
fn normalise(meta: &mut ObjectMeta) {
    meta.finalizers = meta.finalizers.take().filter(|f| !f.is_empty());
    meta.owner_references = meta.owner_references.take().filter(|o| !o.is_empty());
    meta.labels = meta.labels.take().filter(|l| !l.is_empty());
    meta.annotations = meta.annotations.take().filter(|a| !a.is_empty());
}

/// Names, labels, annotations, owners, finalizers.
pub(super) fn validate(kind: &Kind, meta: &ObjectMeta, causes: &mut Causes) {
    match meta.name.as_deref().unwrap_or_default() {
        "" => causes.add("metadata.name", "Required value: name or generateName is required"),
        name => names::object_name(kind, name, causes),
    }
    names::labels("metadata.labels", meta.labels.as_ref(), causes);
    names::annotations("metadata.annotations", meta.annotations.as_ref(), causes);
    for (i, owner) in meta.owner_references.iter().flatten().enumerate() {
        let parts = [
            ("apiVersion", &owner.api_version),
            ("kind", &owner.kind),
            ("name", &owner.name),
            ("uid", &owner.uid),
        ];
        for (part, value) in parts {
            if value.is_empty() {
                let field = format!("metadata.ownerReferences[{i}].{part}");
                causes.add(field, "Required value: must not be empty");
            }
        }
    }
    let controllers =
        meta.owner_references.iter().flatten().filter(|o| o.controller == Some(true)).count();
    if controllers > 1 {
        let text = "Invalid value: Only one reference can have Controller set to true";
        causes.add("metadata.ownerReferences", text);
    }
    for (i, finalizer) in meta.finalizers.iter().flatten().enumerate() {
        let plain = matches!(finalizer.as_str(), "orphan" | "foregroundDeletion" | "kubernetes");
        if !plain && !names::is_qualified(finalizer) {
            let message = format!(
                "Invalid value: {finalizer:?}: name part must consist of alphanumeric characters, '-', '_' or '.'"
            );
            causes.add(format!("metadata.finalizers[{i}]"), message);
        }
    }
}

/// What may not change in metadata.
pub(super) fn validate_update(meta: &ObjectMeta, old: &ObjectMeta, causes: &mut Causes) {
    if old.deletion_timestamp.is_none() {
        return;
    }
    let before = old.finalizers.as_deref().unwrap_or_default();
    let new: Vec<_> =
        meta.finalizers.iter().flatten().filter(|f| !before.contains(f)).cloned().collect();
    if !new.is_empty() {
        causes.add(
            "metadata.finalizers",
            format!("Forbidden: no new finalizers can be added if the object is being deleted, found new finalizers {new:?}"),
        );
    }
}
