//! The `eviction` subresource (`policy/v1`): a pod leaves its node as if it were deleted, and says why.
//!
//! Disruption budgets are no served kind, so there is none to respect.

use http::StatusCode;
use k8s_openapi::api::core::v1::{Pod, PodCondition};
use k8s_openapi::api::policy::v1::Eviction;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Status, Time};
use k8s_openapi::jiff::Timestamp;

use super::{Writing, Written, value};
use crate::error::ApiError;
use crate::objects;
use crate::registry::Part;

const CONDITION: &str = "DisruptionTarget";

/// POST.
pub(super) async fn create(writing: &Writing<'_>, name: &str) -> Result<Written, ApiError> {
    let eviction: Eviction = serde_path_to_error::deserialize(&writing.raw.value()?)
        .map_err(|e| ApiError::BadRequest(format!("Eviction: {e}")))?;
    let named = eviction.metadata.name.as_deref().unwrap_or(name);
    if named != name {
        let text = format!("name in URL ({name}) does not match name in Eviction object ({named})");
        return Err(ApiError::BadRequest(text));
    }
    let mut options = eviction.delete_options.unwrap_or_default();
    let dry = writing.query.dry_run()? || options.dry_run.iter().flatten().next().is_some();
    options.dry_run = dry.then(|| vec!["All".to_owned()]);
    let (registry, ns) = (writing.registry, writing.target.ns.as_deref());
    let pod: Pod = registry.get(ns, name)?;
    if !dry && objects::is_active(&pod) {
        // Its preconditions hold for the mark, too: another pod of that name is not touched.
        let wanted = options.preconditions.as_ref().and_then(|p| p.uid.clone());
        let marked = |old: &Pod| match &wanted {
            Some(uid) if Some(uid) != old.metadata.uid.as_ref() => Ok(old.clone()),
            _ => Ok(targeted(old, Timestamp::now())),
        };
        registry.modify::<Pod>(ns, name, Part::Status, &writing.options()?, marked).await?;
    }
    registry.delete::<Pod>(ns, name, &options).await?;
    let status =
        Status { status: Some("Success".to_owned()), code: Some(201), ..Status::default() };
    Ok(Written { status: StatusCode::CREATED, object: value(&status)?, warnings: Vec::new() })
}

/// The pod with the condition that tells why it goes.
fn targeted(pod: &Pod, now: Timestamp) -> Pod {
    let mut pod = pod.clone();
    let conditions = pod.status.get_or_insert_default().conditions.get_or_insert_default();
    conditions.retain(|condition| condition.type_ != CONDITION);
    conditions.push(PodCondition {
        type_: CONDITION.to_owned(),
        status: "True".to_owned(),
        reason: Some("EvictionByEvictionAPI".to_owned()),
        message: Some("Eviction API: evicting".to_owned()),
        last_transition_time: Timestamp::from_second(now.as_second()).ok().map(Time),
        ..PodCondition::default()
    });
    pod
}
