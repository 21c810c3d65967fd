//! The cluster's address plan: from a file at the first start, from the store ever after.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::ConfigMap;
use mesh_model::ClusterConfig;
use mesh_model::names::is_subdomain;
use mesh_model::wellknown::{CLUSTER_CONFIG_KEY, CLUSTER_CONFIG_MAP, SYSTEM_NAMESPACE};

use crate::api::body;
use crate::error::ApiError;
use crate::registry::{Object as _, decode, key};
use crate::store::Store;

/// The address plan cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read --cluster-config {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file makes no sense.
    #[error("--cluster-config {path}: {detail}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// The plan is fixed at the first start.
    #[error(
        "--cluster-config {path} differs from the plan that this cluster was made with; the plan \
         cannot change: leave the option out, or start a new cluster with another --data-dir"
    )]
    Differs {
        /// The file.
        path: PathBuf,
    },
    /// The stored plan makes no sense.
    #[error("the stored address plan is damaged: {0}")]
    Stored(String),
}

/// The plan to use.
pub(super) fn settle(store: &dyn Store, file: Option<&Path>) -> Result<ClusterConfig, ConfigError> {
    let given = file.map(read).transpose()?;
    let stored = stored(store)?;
    match (stored, given, file) {
        (Some(stored), Some(given), Some(path)) if stored != given => {
            Err(ConfigError::Differs { path: path.to_owned() })
        }
        (Some(stored), ..) => Ok(stored),
        (None, given, _) => Ok(given.unwrap_or_default()),
    }
}

fn stored(store: &dyn Store) -> Result<Option<ClusterConfig>, ConfigError> {
    let key = key(ConfigMap::kind(), Some(SYSTEM_NAMESPACE), CLUSTER_CONFIG_MAP);
    let Some(record) = store.get(&key) else { return Ok(None) };
    let map: ConfigMap =
        decode(&record).map_err(|e: ApiError| ConfigError::Stored(e.to_string()))?;
    let text = map.data.as_ref().and_then(|data| data.get(CLUSTER_CONFIG_KEY));
    let text = text.ok_or_else(|| ConfigError::Stored(format!("no key {CLUSTER_CONFIG_KEY}")))?;
    serde_json::from_str(text).map(Some).map_err(|e| ConfigError::Stored(e.to_string()))
}

fn read(path: &Path) -> Result<ClusterConfig, ConfigError> {
    let bytes = std::fs::read(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    parse(&bytes).map_err(|detail| ConfigError::Invalid { path: path.to_owned(), detail })
}

fn parse(bytes: &[u8]) -> Result<ClusterConfig, String> {
    let value = body::yaml(bytes).map_err(|e| e.to_string())?;
    let plan: ClusterConfig = serde_path_to_error::deserialize(&value)
        .map_err(|e| format!("{}: {}", e.path(), e.inner()))?;
    let known = serde_json::to_value(&plan).map_err(|e| e.to_string())?;
    let given = value.as_object().ok_or("expected a map")?;
    if let Some(unknown) = given.keys().find(|key| known.get(key).is_none()) {
        return Err(format!("unknown field {unknown:?}"));
    }
    check(&plan)?;
    Ok(plan)
}

fn check(plan: &ClusterConfig) -> Result<(), String> {
    if !is_subdomain(&plan.domain) {
        return Err(format!("domain {:?} is not a DNS name", plan.domain));
    }
    for (field, ranges) in [("podCidrs", &plan.pod_cidrs), ("serviceCidrs", &plan.service_cidrs)] {
        let of = |v4: bool| ranges.iter().filter(|r| r.addr().is_ipv4() == v4).count();
        if ranges.is_empty() || of(true) > 1 || of(false) > 1 {
            return Err(format!(
                "{field}: expected one IPv4 range, one IPv6 range, or one of each"
            ));
        }
    }
    let overlap = |a: &IpNet, b: &IpNet| a.contains(&b.network()) || b.contains(&a.network());
    for pods in &plan.pod_cidrs {
        if plan.service_cidrs.iter().any(|services| overlap(pods, services)) {
            return Err(format!("podCidrs: {pods} overlaps serviceCidrs"));
        }
        let (prefix, most) = match pods {
            IpNet::V4(_) => (plan.node_prefix_v4, 30),
            IpNet::V6(_) => (plan.node_prefix_v6, 126),
        };
        if prefix < pods.prefix_len() || prefix > most {
            let from = pods.prefix_len();
            return Err(format!(
                "the node prefix /{prefix} of {pods} must be from /{from} to /{most}"
            ));
        }
    }
    let inside = |vip: &IpAddr| plan.service_cidrs.iter().any(|range| range.contains(vip));
    if let Some(vip) = plan.dns_vips.iter().find(|vip| !inside(vip)) {
        return Err(format!("dnsVips: {vip} is not in serviceCidrs"));
    }
    let (first, last) = plan.node_ports;
    if first == 0 || first > last {
        return Err(format!("nodePorts: [{first}, {last}] is not a range of ports"));
    }
    for range in &plan.load_balancer_cidrs {
        if plan.pod_cidrs.iter().chain(&plan.service_cidrs).any(|inside| overlap(inside, range)) {
            return Err(format!("loadBalancerCidrs: {range} overlaps podCidrs or serviceCidrs"));
        }
    }
    if plan.overlay_port == 0 {
        return Err("overlayPort: must be from 1 to 65535".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_that_makes_no_sense_is_refused_with_the_field() {
        assert_eq!(parse(b"domain: mesh.test").unwrap().domain, "mesh.test");
        for (bad, word) in [
            ("domain: -x", "domain"),
            ("podCidrs: [10.0.0.0/33]", "podCidrs"),
            ("podCidrs: [10.96.0.0/12]\ndomain: x", "overlaps"),
            ("nodePrefixV4: 8", "node prefix"),
            ("dnsVips: [10.0.0.1]", "dnsVips"),
            ("nodePorts: [5, 1]", "nodePorts"),
            ("loadBalancerCidrs: [10.96.0.0/24]", "loadBalancerCidrs"),
            ("frob: 1", "frob"),
            ("- a", "map"),
            ("{", "YAML"),
        ] {
            let error = parse(bad.as_bytes()).unwrap_err();
            assert!(error.contains(word), "{bad}: {error}");
        }
    }
}
