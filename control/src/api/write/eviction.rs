//! The `eviction` subresource (`policy/v1`): a pod leaves its node as if it were deleted, and says why.
//!
//! A PodDisruptionBudget is asked first, and counted down in the same write.

use http::StatusCode;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::{Eviction, PodDisruptionBudget};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Status, Time};
use k8s_openapi::jiff::Timestamp;

use super::{Writing, Written, to_value};
use crate::controllers::disruption::plan;
use crate::error::ApiError;
use crate::objects;
use crate::registry::{Part, Registry, WriteOptions};

const REASON: &str = "EvictionByEvictionAPI";
const TOO_MANY: &str = "Cannot evict pod as it would violate the pod's disruption budget.";
/// How long the controller is given to look at a changed budget.
const UNPROCESSED_SECS: i32 = 10;

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
    if needs_leave(&pod) {
        ask_budget(registry, &pod, &writing.options()?, dry).await?;
    }
    if !dry && objects::is_active(&pod) {
        // Its preconditions hold for the mark, too: another pod of that name is not touched.
        let wanted = options.preconditions.as_ref().and_then(|p| p.uid.clone());
        let marked = |old: &Pod| match &wanted {
            Some(uid) if Some(uid) != old.metadata.uid.as_ref() => Ok(old.clone()),
            _ => Ok(objects::disrupted(old, REASON, "Eviction API: evicting", Timestamp::now())),
        };
        registry.modify::<Pod>(ns, name, Part::Status, &writing.options()?, marked).await?;
    }
    registry.delete::<Pod>(ns, name, &options).await?;
    let status =
        Status { status: Some("Success".to_owned()), code: Some(201), ..Status::default() };
    Ok(Written { status: StatusCode::CREATED, object: to_value(&status)?, warnings: Vec::new() })
}

/// A pod that does nothing yet, or nothing any more, is missed by nobody.
fn needs_leave(pod: &Pod) -> bool {
    objects::is_active(pod) && objects::phase(pod) != "Pending"
}

/// Takes one from what the pod's budget allows; refuses when nothing is left.
async fn ask_budget(
    registry: &Registry,
    pod: &Pod,
    options: &WriteOptions,
    dry: bool,
) -> Result<(), ApiError> {
    let ns = pod.metadata.namespace.as_deref();
    let mut budgets = registry.list::<PodDisruptionBudget>(ns)?.items;
    budgets.retain(|budget| plan::covers(budget, pod));
    let budget = match budgets.as_slice() {
        [] => return Ok(()),
        [budget] => objects::name(&budget.metadata).to_owned(),
        _ => {
            let text = "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.";
            return Err(ApiError::Storage(text.to_owned()));
        }
    };
    let options = WriteOptions { dry_run: options.dry_run || dry, ..options.clone() };
    let now = Timestamp::now();
    let counted = |budget: &PodDisruptionBudget| counted(budget, pod, now);
    registry.modify(ns, &budget, Part::Status, &options, counted).await.map(drop)
}

/// The budget with the eviction of the pod noted.
fn counted(
    budget: &PodDisruptionBudget,
    pod: &Pod,
    now: Timestamp,
) -> Result<PodDisruptionBudget, ApiError> {
    let name = objects::name(&budget.metadata);
    let mut new = budget.clone();
    let status = new.status.get_or_insert_default();
    let policy = budget.spec.as_ref().and_then(|s| s.unhealthy_pod_eviction_policy.as_deref());
    let (healthy, desired) =
        (status.current_healthy.unwrap_or(0), status.desired_healthy.unwrap_or(0));
    if status.observed_generation.unwrap_or(0) < budget.metadata.generation.unwrap_or(0) {
        return Err(ApiError::TooManyRequests {
            message: TOO_MANY.to_owned(),
            cause: Some(format!(
                "The disruption budget {name} is still being processed by the server."
            )),
            retry_after_secs: Some(UNPROCESSED_SECS),
        });
    }
    // A pod that does not serve takes nothing away, as long as enough others do.
    let spare = policy == Some("AlwaysAllow") || healthy >= desired && desired > 0;
    if !plan::is_healthy(pod) && spare {
        return Ok(new);
    }
    let allowed = status.disruptions_allowed.unwrap_or(0);
    if allowed <= 0 {
        let needs = format!(
            "The disruption budget {name} needs {desired} healthy pods and has {healthy} currently"
        );
        return Err(ApiError::TooManyRequests {
            message: TOO_MANY.to_owned(),
            cause: Some(needs),
            retry_after_secs: None,
        });
    }
    status.disruptions_allowed = Some(allowed - 1);
    let disrupted = status.disrupted_pods.get_or_insert_default();
    let at = Timestamp::from_second(now.as_second()).unwrap_or(now);
    disrupted.insert(objects::name(&pod.metadata).to_owned(), Time(at));
    Ok(new)
}
