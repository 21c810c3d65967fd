//! The `scale` subresource: the number of replicas as an object of its own.

use http::StatusCode;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::autoscaling::v1::{Scale, ScaleSpec, ScaleStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use serde_json::Value;

use super::{Patch, Writing, Written, to_value};
use crate::error::{ApiError, Cause};
use crate::registry::{Object, Part, Registry};

/// A kind with replicas.
trait Scaled: Object {
    fn replicas(&self) -> (Option<i32>, Option<i32>);
    fn set_replicas(&mut self, replicas: Option<i32>);
    fn selector(&self) -> Option<&LabelSelector>;
}

macro_rules! scaled {
    ($kind:ty, $observed:expr) => {
        impl Scaled for $kind {
            fn replicas(&self) -> (Option<i32>, Option<i32>) {
                let observed: fn(&$kind) -> Option<i32> = $observed;
                (self.spec.as_ref().and_then(|s| s.replicas), observed(self))
            }

            fn set_replicas(&mut self, replicas: Option<i32>) {
                self.spec.get_or_insert_default().replicas = replicas;
            }

            fn selector(&self) -> Option<&LabelSelector> {
                self.spec.as_ref().map(|s| &s.selector)
            }
        }
    };
}
scaled!(Deployment, |d| d.status.as_ref()?.replicas);
scaled!(ReplicaSet, |r| r.status.as_ref().map(|s| s.replicas));
scaled!(StatefulSet, |s| s.status.as_ref().map(|s| s.replicas));

macro_rules! with_scaled {
    ($kind:expr, $alias:ident => $body:expr) => {
        match $kind.kind {
            "Deployment" => {
                type $alias = Deployment;
                $body
            }
            "StatefulSet" => {
                type $alias = StatefulSet;
                $body
            }
            _ => {
                type $alias = ReplicaSet;
                $body
            }
        }
    };
}

/// GET.
pub(in crate::api) fn get(
    registry: &Registry,
    target: &crate::api::target::Target,
    name: &str,
) -> Result<Value, ApiError> {
    let ns = target.ns.as_deref();
    with_scaled!(target.kind, K => to_value(&scale_of(&registry.get::<K>(ns, name)?)))
}

/// PUT.
pub(super) async fn update(writing: &Writing<'_>, name: &str) -> Result<Written, ApiError> {
    let wanted = parse(writing.raw.value()?)?;
    with_scaled!(writing.target.kind, K => change::<K>(writing, name, |_| Ok(wanted.clone())).await)
}

/// PATCH.
pub(super) async fn patch(
    writing: &Writing<'_>,
    name: &str,
    patch: &Patch,
) -> Result<Written, ApiError> {
    let kind = writing.target.kind;
    let asked = |old: Scale| parse(patch.apply(kind, to_value(&old)?)?);
    with_scaled!(kind, K => change::<K>(writing, name, asked).await)
}

async fn change<K: Scaled>(
    writing: &Writing<'_>,
    name: &str,
    asked: impl Fn(Scale) -> Result<Scale, ApiError>,
) -> Result<Written, ApiError> {
    let ns = writing.target.ns.as_deref();
    let options = writing.options()?;
    let apply = |old: &K| {
        let scale = asked(scale_of(old))?;
        let replicas = scale.spec.as_ref().and_then(|s| s.replicas).unwrap_or(0);
        if replicas < 0 {
            let field = "spec.replicas".to_owned();
            let message = format!("Invalid value: {replicas}: must be greater than or equal to 0");
            let causes = vec![Cause { field, message }];
            return Err(ApiError::Invalid { kind: K::kind(), name: name.to_owned(), causes });
        }
        let mut new = old.clone();
        if scale.metadata.resource_version.as_ref().is_some_and(|v| !v.is_empty()) {
            new.metadata_mut().resource_version = scale.metadata.resource_version;
        }
        new.set_replicas(Some(replicas));
        Ok(new)
    };
    let stored = writing.registry.modify::<K>(ns, name, Part::Main, &options, apply).await?;
    let object = to_value(&scale_of(&stored))?;
    Ok(Written { status: StatusCode::OK, object, warnings: Vec::new() })
}

fn parse(value: Value) -> Result<Scale, ApiError> {
    serde_path_to_error::deserialize(&value)
        .map_err(|e| ApiError::BadRequest(format!("Scale: {}: {}", e.path(), e.inner())))
}

fn scale_of<K: Scaled>(object: &K) -> Scale {
    let (wanted, observed) = object.replicas();
    let meta = object.metadata();
    Scale {
        metadata: ObjectMeta {
            name: meta.name.clone(),
            namespace: meta.namespace.clone(),
            uid: meta.uid.clone(),
            resource_version: meta.resource_version.clone(),
            creation_timestamp: meta.creation_timestamp.clone(),
            ..ObjectMeta::default()
        },
        spec: Some(ScaleSpec { replicas: wanted }),
        status: Some(ScaleStatus {
            replicas: observed.unwrap_or(0),
            selector: object.selector().map(selector_text),
        }),
    }
}

/// A label selector as kubectl writes it.
fn selector_text(selector: &LabelSelector) -> String {
    let equal = selector.match_labels.iter().flatten().map(|(k, v)| format!("{k}={v}"));
    let sets = selector.match_expressions.iter().flatten().map(|e| {
        let values = e.values.as_deref().unwrap_or_default().join(",");
        match e.operator.as_str() {
            "In" => format!("{} in ({values})", e.key),
            "NotIn" => format!("{} notin ({values})", e.key),
            "DoesNotExist" => format!("!{}", e.key),
            _ => e.key.clone(),
        }
    });
    equal.chain(sets).collect::<Vec<_>>().join(",")
}
