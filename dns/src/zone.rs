//! The cluster's names, indexed once, then read without locks.
//!
//! Built from [`DnsZone`]; a name is found by one hash look-up. Names are lower case, relative to the
//! cluster's domain and without a final dot: `web.default.svc`.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_model::snapshot::{DnsEndpoint, DnsPort, DnsTarget, DnsZone};

mod names;
#[cfg(test)]
mod tests;

pub use names::{pod_name, reverse_address};

/// The version of the DNS specification that is answered (record `dns-version.DOMAIN`).
pub const SPEC_VERSION: &str = "1.1.0";

/// A place that SRV records point to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Srv {
    /// Port number.
    pub port: u16,
    /// Full name of the host, without a final dot.
    pub target: String,
}

/// What a name has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Records {
    /// Addresses, both families.
    pub addresses: Vec<IpAddr>,
    /// SRV records.
    pub srv: Vec<Srv>,
    /// The name that this one is an alias of. It then has nothing else (RFC 1034, section 3.6.2).
    pub alias: Option<String>,
    /// TXT records.
    pub text: Vec<String>,
}

/// The answer to a question about the cluster's names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer<'a> {
    /// The name exists and has these records; those of the type asked for may be none.
    Found(std::borrow::Cow<'a, Records>),
    /// The name stands for an address: full names, without a final dot.
    Pointer(&'a [String]),
    /// The name does not exist (NXDOMAIN).
    NoName,
    /// Not a name of the cluster: ask upstream.
    Elsewhere,
}

/// All names of a cluster.
#[derive(Debug, Default)]
pub struct Zone {
    domain: String,
    names: HashMap<String, Records>,
    pointers: HashMap<IpAddr, Vec<String>>,
    namespaces: BTreeSet<String>,
    pod_cidrs: Vec<IpNet>,
}

impl Zone {
    /// Indexes a zone. Linear in the number of endpoints and ports.
    pub fn new(zone: &DnsZone) -> Self {
        let mut built = Self {
            domain: zone.domain.to_ascii_lowercase(),
            namespaces: zone.namespaces.iter().cloned().collect(),
            pod_cidrs: zone.pod_cidrs.clone(),
            ..Self::default()
        };
        built.name("dns-version").text.push(SPEC_VERSION.to_owned());
        for parent in ["svc", "pod", ""] {
            built.name(parent);
        }
        for namespace in &zone.namespaces {
            built.name(&format!("{namespace}.svc"));
            built.name(&format!("{namespace}.pod"));
        }
        for service in &zone.services {
            let base = format!("{}.{}.svc", service.key.name, service.key.namespace);
            match &service.target {
                DnsTarget::ClusterIp { addresses, ports } => {
                    built.cluster_ip(&base, addresses, ports);
                }
                DnsTarget::Headless { endpoints } => built.headless(&base, endpoints),
                DnsTarget::ExternalName(target) => {
                    built.name(&base).alias = Some(target.trim_end_matches('.').to_owned());
                }
            }
        }
        for records in built.names.values_mut() {
            records.srv.sort();
            records.srv.dedup();
        }
        built
    }

    /// The cluster's domain, lower case, without a final dot.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Number of names that have records.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether the zone has no names; true before the first configuration.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Answers for `name`: lower case, absolute, without the final dot.
    pub fn answer(&self, name: &str) -> Answer<'_> {
        if let Some(relative) = self.relative(name) {
            return match self.names.get(relative) {
                Some(records) => Answer::Found(std::borrow::Cow::Borrowed(records)),
                None => self.pod(relative),
            };
        }
        match reverse_address(name) {
            Some(address) => match self.pointers.get(&address) {
                Some(names) => Answer::Pointer(names),
                None if self.owns(&address) => Answer::NoName,
                None => Answer::Elsewhere,
            },
            None => Answer::Elsewhere,
        }
    }

    fn relative<'n>(&self, name: &'n str) -> Option<&'n str> {
        if self.domain.is_empty() {
            return None;
        }
        let rest = name.strip_suffix(self.domain.as_str())?;
        if rest.is_empty() { Some(rest) } else { rest.strip_suffix('.') }
    }

    /// `a-b-c-d.NAMESPACE.pod`: the address is in the name itself.
    fn pod(&self, relative: &str) -> Answer<'_> {
        let address = pod_name(relative)
            .filter(|(_, namespace)| self.namespaces.contains(*namespace))
            .map(|(address, _)| address)
            .filter(|address| self.owns(address));
        match address {
            Some(address) => Answer::Found(std::borrow::Cow::Owned(Records {
                addresses: vec![address],
                ..Records::default()
            })),
            None => Answer::NoName,
        }
    }

    /// Whether the address belongs to the cluster, so that nobody upstream can know its name.
    fn owns(&self, address: &IpAddr) -> bool {
        self.pod_cidrs.iter().any(|range| range.contains(address))
    }

    fn cluster_ip(&mut self, base: &str, addresses: &[IpAddr], ports: &[DnsPort]) {
        let full = self.absolute(base);
        self.name(base).addresses.extend(addresses);
        for address in addresses {
            self.pointers.entry(*address).or_default().push(full.clone());
        }
        for port in ports {
            self.service_port(base, port, &full);
        }
    }

    fn headless(&mut self, base: &str, endpoints: &[DnsEndpoint]) {
        self.name(base);
        for endpoint in endpoints {
            let label = match &endpoint.hostname {
                Some(hostname) => hostname.clone(),
                None => endpoint.address.to_string().replace(['.', ':'], "-"),
            };
            let host = format!("{label}.{base}");
            let full = self.absolute(&host);
            self.name(base).addresses.push(endpoint.address);
            self.name(&host).addresses.push(endpoint.address);
            if endpoint.hostname.is_some() {
                self.pointers.entry(endpoint.address).or_default().push(full.clone());
            }
            for port in &endpoint.ports {
                self.service_port(base, port, &full);
            }
        }
        // Two hosts may be at one address; endpoints are ordered by that.
        self.name(base).addresses.dedup();
    }

    /// `_port._protocol.SERVICE` for a named port; a question for the service itself gets all ports.
    fn service_port(&mut self, base: &str, port: &DnsPort, target: &str) {
        let srv = Srv { port: port.port, target: target.to_owned() };
        self.name(base).srv.push(srv.clone());
        if port.name.is_empty() {
            return;
        }
        let protocol = format!("_{}.{base}", port.protocol.to_string().to_lowercase());
        self.name(&protocol);
        self.name(&format!("_{}.{protocol}", port.name)).srv.push(srv);
    }

    fn absolute(&self, relative: &str) -> String {
        format!("{relative}.{}", self.domain)
    }

    fn name(&mut self, relative: &str) -> &mut Records {
        self.names.entry(relative.to_owned()).or_default()
    }
}
