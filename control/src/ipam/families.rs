//! Which address families a Service gets: `ipFamilyPolicy`, `ipFamilies` and `clusterIPs` made consistent.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::ServiceSpec;

use super::FieldError;

/// An address family, in the order that Services prefer when the cluster does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    pub(super) fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    fn parse(name: &str, field: &str) -> Result<Self, FieldError> {
        match name {
            "IPv4" => Ok(Self::V4),
            "IPv6" => Ok(Self::V6),
            _ => Err(FieldError {
                field: field.to_owned(),
                message: format!(
                    "Unsupported value: {name:?}: supported values: \"IPv4\", \"IPv6\""
                ),
            }),
        }
    }
}

const SINGLE: &str = "SingleStack";
const PREFER: &str = "PreferDualStack";
const REQUIRE: &str = "RequireDualStack";

/// Whether the Service asks for no ClusterIP at all.
pub(super) fn is_headless(spec: &ServiceSpec) -> bool {
    spec.cluster_ips.as_ref().and_then(|ips| ips.first()).is_some_and(|ip| ip == "None")
        || spec.cluster_ip.as_deref() == Some("None")
}

/// Whether the Service is only an alias of a name.
pub(super) fn is_external_name(spec: &ServiceSpec) -> bool {
    spec.type_.as_deref() == Some("ExternalName")
}

/// Fills `ipFamilyPolicy` and `ipFamilies`, and returns the families in order.
///
/// `available` holds the families that the cluster has service ranges for, the preferred one first.
pub(super) fn resolve(
    spec: &mut ServiceSpec,
    available: &[Family],
) -> Result<Vec<Family>, FieldError> {
    let mut families = requested(spec, available)?;
    let headless = is_headless(spec);
    if headless && families.is_empty() && spec.selector.as_ref().is_none_or(|s| s.is_empty()) {
        // Nobody told which addresses the user's own endpoints have: all families may appear.
        families = available.to_vec();
        let policy = if families.len() > 1 { REQUIRE } else { SINGLE };
        spec.ip_family_policy.get_or_insert_with(|| policy.to_owned());
    }
    let policy = spec.ip_family_policy.get_or_insert_with(|| SINGLE.to_owned()).clone();
    if families.is_empty() {
        families.extend(available.first());
    }
    match policy.as_str() {
        SINGLE if families.len() > 1 => {
            return Err(FieldError::invalid(
                "spec.ipFamilyPolicy",
                policy,
                "must be RequireDualStack or PreferDualStack when multiple families are requested",
            ));
        }
        SINGLE => {}
        PREFER | REQUIRE => {
            let other = available.iter().find(|f| !families.contains(f)).copied();
            families.extend(other);
            if policy == REQUIRE && families.len() < 2 {
                return Err(FieldError::invalid(
                    "spec.ipFamilyPolicy",
                    policy,
                    "this cluster is not configured for dual-stack services",
                ));
            }
        }
        other => {
            return Err(FieldError {
                field: "spec.ipFamilyPolicy".to_owned(),
                message: format!(
                    "Unsupported value: {other:?}: supported values: {SINGLE:?}, {PREFER:?}, {REQUIRE:?}"
                ),
            });
        }
    }
    spec.ip_families = Some(families.iter().map(|f| f.name().to_owned()).collect());
    Ok(families)
}

/// The families that the user named, by `ipFamilies` or by requested addresses.
fn requested(spec: &ServiceSpec, available: &[Family]) -> Result<Vec<Family>, FieldError> {
    let mut families = Vec::new();
    for (i, name) in spec.ip_families.iter().flatten().enumerate() {
        let field = format!("spec.ipFamilies[{i}]");
        let family = Family::parse(name, &field)?;
        if families.contains(&family) {
            return Err(FieldError::duplicate(field, name));
        }
        if !available.contains(&family) {
            return Err(FieldError::invalid(field, name, "not configured on this cluster"));
        }
        families.push(family);
    }
    for (i, (text, address)) in requested_addresses(spec)?.into_iter().enumerate() {
        let field = format!("spec.clusterIPs[{i}]");
        let family = Family::of(address);
        match families.get(i) {
            Some(expected) if *expected != family => {
                let detail =
                    format!("expected an {} value as indicated by `ipFamilies`", expected.name());
                return Err(FieldError::invalid(field, text, &detail));
            }
            Some(_) => {}
            None if families.contains(&family) => {
                return Err(FieldError::invalid(
                    field,
                    text,
                    "may specify at most one IP for each IP family",
                ));
            }
            None if available.contains(&family) => families.push(family),
            None => {
                return Err(FieldError::invalid(
                    field,
                    text,
                    "the family is not configured on this cluster",
                ));
            }
        }
    }
    Ok(families)
}

/// The addresses that the Service asks for, as text and parsed; none for a headless one.
pub(super) fn requested_addresses(spec: &ServiceSpec) -> Result<Vec<(String, IpAddr)>, FieldError> {
    if is_headless(spec) {
        return Ok(Vec::new());
    }
    let texts = spec.cluster_ips.iter().flatten().filter(|text| !text.is_empty());
    texts
        .enumerate()
        .map(|(i, text)| match text.parse::<IpAddr>() {
            Ok(address) if i < 2 => Ok((text.clone(), address)),
            Ok(_) => Err(FieldError::invalid(
                "spec.clusterIPs",
                text,
                "may only hold up to 2 values, one for each IP family",
            )),
            Err(_) => Err(FieldError::invalid(
                format!("spec.clusterIPs[{i}]"),
                text,
                "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
            )),
        })
        .collect()
}
