//! The Lease by which the control service knows that the node is alive.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Api, Patch, PatchParams, PostParams};
use mesh_model::{NodeName, wellknown};
use serde_json::{Value, json};

use crate::errors::chain;

const PERIOD: Duration = Duration::from_secs(10);
const DURATION_SECS: u32 = 40;
/// A renewal that hangs must not eat the next one.
const LIMIT: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_secs(2);

/// Renews the node's lease for ever.
pub(super) async fn renew(client: kube::Client, node: NodeName) {
    let leases: Api<Lease> = Api::namespaced(client, wellknown::LEASE_NAMESPACE);
    let mut away = false;
    loop {
        let failure = match tokio::time::timeout(LIMIT, once(&leases, &node)).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(chain(&error)),
            Err(_) => Some("no answer in time".to_owned()),
        };
        let pause = if failure.is_none() { PERIOD } else { RETRY };
        match failure {
            None => away = false,
            Some(error) if away => tracing::debug!(error, "lease still not renewed"),
            Some(error) => {
                away = true;
                tracing::warn!(error, "lease not renewed, trying again");
            }
        }
        tokio::time::sleep(pause).await;
    }
}

async fn once(leases: &Api<Lease>, node: &NodeName) -> Result<(), kube::Error> {
    let mut lease = lease(node, Timestamp::now());
    match leases.patch(node.as_str(), &PatchParams::default(), &Patch::Merge(&lease)).await {
        Err(kube::Error::Api(status)) if status.code == 404 => {
            lease["metadata"] = json!({"name": node, "namespace": wellknown::LEASE_NAMESPACE});
            let lease = serde_json::from_value(lease).map_err(kube::Error::SerdeError)?;
            leases.create(&PostParams::default(), &lease).await.map(drop)
        }
        result => result.map(drop),
    }
}

fn lease(node: &NodeName, now: Timestamp) -> Value {
    json!({
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "spec": {
            "holderIdentity": node,
            "leaseDurationSeconds": DURATION_SECS,
            "renewTime": microseconds(now),
        },
    })
}

/// `metav1.Time`: RFC 3339 in whole seconds.
pub(super) fn seconds(time: Timestamp) -> String {
    time.round(jiff::Unit::Second).unwrap_or(time).to_string()
}

/// `metav1.MicroTime`: RFC 3339 with exactly six digits.
fn microseconds(time: Timestamp) -> String {
    let zone = time.to_zoned(jiff::tz::TimeZone::UTC);
    let fraction = SignedDuration::from_nanos(i64::from(time.subsec_nanosecond())).as_micros();
    format!("{}.{fraction:06}Z", zone.strftime("%Y-%m-%dT%H:%M:%S"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_the_api_reads_them() {
        let time: Timestamp = "2026-11-21T04:05:06.000789Z".parse().unwrap();
        assert_eq!(microseconds(time), "2026-11-21T04:05:06.000789Z");
        assert_eq!(seconds(time), "2026-11-21T04:05:06Z");
        let lease: Lease = serde_json::from_value(lease(&"n".parse().unwrap(), time)).unwrap();
        assert_eq!(lease.spec.unwrap().lease_duration_seconds, Some(40));
    }
}
