//! The cluster's address plan: the few facts that every node must agree on.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// Cluster-wide settings, chosen when the control service starts first and then fixed.
///
/// Carried by the ConfigMap [`CLUSTER_CONFIG_MAP`](crate::wellknown::CLUSTER_CONFIG_MAP) and by the answer to a join.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClusterConfig {
    /// DNS domain of the cluster, without a final dot.
    pub domain: String,
    /// Ranges that node blocks are cut from: one IPv4, one IPv6, either may be absent.
    pub pod_cidrs: Vec<IpNet>,
    /// Prefix length of a node's IPv4 block.
    pub node_prefix_v4: u8,
    /// Prefix length of a node's IPv6 block.
    pub node_prefix_v6: u8,
    /// Ranges that ClusterIPs come from.
    pub service_cidrs: Vec<IpNet>,
    /// The ClusterIPs of the DNS service.
    pub dns_vips: Vec<IpAddr>,
    /// First and last node port, inclusive.
    pub node_ports: (u16, u16),
    /// UDP port of the overlay on every node.
    pub overlay_port: u16,
    /// Ranges that `externalIPs` of Services may be in. Others are ignored: whoever may create a Service could draw
    /// anybody's traffic to himself (CVE-2020-8554).
    pub external_ip_cidrs: Vec<IpNet>,
    /// Ranges that addresses of `LoadBalancer` services come from; none by default.
    pub load_balancer_cidrs: Vec<IpNet>,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        Self {
            domain: "cluster.local".to_owned(),
            pod_cidrs: vec![
                v4(Ipv4Addr::new(10, 244, 0, 0), 16),
                v6(Ipv6Addr::new(0xfd10, 0x244, 0, 0, 0, 0, 0, 0), 56),
            ],
            node_prefix_v4: 24,
            node_prefix_v6: 64,
            service_cidrs: vec![
                v4(Ipv4Addr::new(10, 96, 0, 0), 16),
                v6(Ipv6Addr::new(0xfd10, 0x96, 0, 0, 0, 0, 0, 0), 112),
            ],
            dns_vips: vec![
                Ipv4Addr::new(10, 96, 0, 10).into(),
                Ipv6Addr::new(0xfd10, 0x96, 0, 0, 0, 0, 0, 10).into(),
            ],
            node_ports: (30_000, 32_767),
            overlay_port: 51_900,
            external_ip_cidrs: vec![],
            load_balancer_cidrs: vec![],
        }
    }
}

fn v4(address: Ipv4Addr, prefix: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new(address, prefix).expect("a constant prefix length of at most 32"))
}

fn v6(address: Ipv6Addr, prefix: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new(address, prefix).expect("a constant prefix length of at most 128"))
}

/// The address that a node uses for itself inside its pod block: the first one after the network address.
///
/// Never handed to a pod. Packets of the node to pods carry it, so that the overlay accepts them.
pub fn node_overlay_address(block: &IpNet) -> IpAddr {
    match block.network() {
        IpAddr::V4(a) => Ipv4Addr::from(u32::from(a).wrapping_add(1)).into(),
        IpAddr::V6(a) => Ipv6Addr::from(u128::from(a).wrapping_add(1)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_fields_take_the_defaults() {
        let config: ClusterConfig = serde_json::from_str(r#"{"domain":"mesh.test"}"#).unwrap();
        assert_eq!(config.domain, "mesh.test");
        assert_eq!(config.overlay_port, 51_900);
        assert!(config.service_cidrs[0].contains(&config.dns_vips[0]));
        assert!(config.service_cidrs[1].contains(&config.dns_vips[1]));
    }

    #[test]
    fn a_node_takes_the_first_address_of_its_block() {
        let v4: IpNet = "10.244.3.0/24".parse().unwrap();
        let v6: IpNet = "fd10:244:0:3::/64".parse().unwrap();
        assert_eq!(node_overlay_address(&v4).to_string(), "10.244.3.1");
        assert_eq!(node_overlay_address(&v6).to_string(), "fd10:244:0:3::1");
    }
}
