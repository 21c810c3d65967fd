//! What an update of a Service means for the addresses and ports that the stored one has.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{ServicePort, ServiceSpec};

use super::super::FieldError;
use super::{Item, Protocol};

/// Takes over from `old` what an update leaves out; trims what a downgrade to one family leaves over.
pub(super) fn take_over(spec: &mut ServiceSpec, old: &ServiceSpec) {
    if spec.cluster_ip.as_deref().unwrap_or_default().is_empty()
        && spec.cluster_ips.as_ref().is_none_or(|ips| ips.is_empty())
    {
        spec.cluster_ip.clone_from(&old.cluster_ip);
    }
    if spec.cluster_ips.as_ref().is_none_or(|ips| ips.is_empty())
        && spec.cluster_ip == old.cluster_ip
    {
        spec.cluster_ips.clone_from(&old.cluster_ips);
    }
    if spec.ip_family_policy.is_none() {
        spec.ip_family_policy.clone_from(&old.ip_family_policy);
    }
    if spec.ip_families.as_ref().is_none_or(|families| families.is_empty()) {
        spec.ip_families.clone_from(&old.ip_families);
    }
    if spec.ip_family_policy.as_deref() == Some("SingleStack")
        && old.ip_family_policy.as_deref() != Some("SingleStack")
    {
        spec.ip_families.get_or_insert_default().truncate(1);
        spec.cluster_ips.get_or_insert_default().truncate(1);
    }
}

/// Makes `clusterIP` and `clusterIPs` say the same.
pub(super) fn normalise(spec: &mut ServiceSpec) -> Result<(), FieldError> {
    let first = spec.cluster_ip.clone().filter(|ip| !ip.is_empty());
    let list = spec.cluster_ips.get_or_insert_default();
    match (&first, list.first()) {
        (Some(first), None) => list.push(first.clone()),
        (Some(first), Some(head)) if first != head => {
            return Err(FieldError::invalid(
                "spec.clusterIPs[0]",
                head,
                "first value must match `clusterIP`",
            ));
        }
        (None, Some(head)) => spec.cluster_ip = Some(head.clone()),
        _ => {}
    }
    if let [first, second, ..] = list.as_slice()
        && (first == "None" || second == "None")
    {
        return Err(FieldError::invalid(
            "spec.clusterIPs",
            list,
            "'None' must be the first and only value",
        ));
    }
    Ok(())
}

/// Refuses a change of an address that clients may already use.
pub(super) fn unchanged(spec: &ServiceSpec, old: &ServiceSpec) -> Result<(), FieldError> {
    let (new, old) = (spec.cluster_ips.iter().flatten(), old.cluster_ips.iter().flatten());
    for (i, (new, old)) in new.zip(old).enumerate() {
        if new != old {
            let field = format!("spec.clusterIPs[{i}]");
            return Err(FieldError::invalid(field, new, "may not change once set"));
        }
    }
    Ok(())
}

/// Removes node ports that a former type of the Service left; refuses those that the user wrote.
pub(super) fn drop_node_ports(
    ports: &mut [ServicePort],
    type_: &str,
    held: &BTreeSet<Item>,
) -> Result<(), FieldError> {
    for (i, port) in ports.iter_mut().enumerate() {
        let Some(number) = port.node_port else { continue };
        let item = u16::try_from(number).map(|n| Item::Port(Protocol::of(port), n));
        if !item.is_ok_and(|item| held.contains(&item)) {
            return Err(FieldError::forbidden(
                format!("spec.ports[{i}].nodePort"),
                &format!("may not be used when `type` is '{type_}'"),
            ));
        }
        port.node_port = None;
    }
    Ok(())
}

/// Takes over node ports from the stored Service where the update names none: that of the port of the same name, which may have
/// another number now, or else that of the same number.
pub(super) fn inherit_node_ports(ports: &mut [ServicePort], old: Option<&ServiceSpec>) {
    let mut named: BTreeSet<_> =
        ports.iter().filter_map(|p| Some((Protocol::of(p), p.node_port?))).collect();
    let stored = old.and_then(|old| old.ports.as_deref()).unwrap_or_default();
    let same: [fn(&ServicePort, &ServicePort) -> bool; 2] = [
        |a, b| a.name.as_deref().unwrap_or("") == b.name.as_deref().unwrap_or(""),
        |a, b| a.port == b.port,
    ];
    for same in same {
        for port in ports.iter_mut().filter(|p| p.node_port.is_none()) {
            let protocol = Protocol::of(port);
            let before = stored.iter().find(|o| Protocol::of(o) == protocol && same(o, port));
            let number = before.and_then(|o| o.node_port).filter(|n| *n != 0);
            port.node_port = number.filter(|n| named.insert((protocol, *n)));
        }
    }
}
