//! Services, and what other programs make of them: rules in the shape that kube-proxy gives them, and a proxy's configuration.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use mesh_model::ObjectKey;
use mesh_model::snapshot::{Backend, FULL_WEIGHT, Frontend, FrontendKind, Protocol};

/// Addresses of pods: what comes from others is masqueraded.
const PODS: &str = "10.80.0.0/12";
/// The port of all services.
const PORT: u16 = 80;

/// A service: its address, and its endpoints.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Service {
    pub(crate) number: u32,
    pub(crate) vip: Ipv4Addr,
    pub(crate) endpoints: Vec<SocketAddr>,
}

impl Service {
    pub(crate) fn frontend(&self) -> SocketAddr {
        SocketAddr::new(self.vip.into(), PORT)
    }
}

/// So many services with so many endpoints each; the one in the middle has the real ones.
pub(crate) fn list(services: u32, endpoints: u32, real: &[SocketAddr]) -> Vec<Service> {
    let service = |number: u32| {
        let endpoint = |n| SocketAddr::new(address(0x0ad0_0000, number * endpoints + n), 8080);
        let endpoints = if number == services / 2 && !real.is_empty() {
            real.to_vec()
        } else {
            (0..endpoints).map(endpoint).collect()
        };
        let IpAddr::V4(vip) = address(0x0a60_0001, number) else { unreachable!("made of 4 bytes") };
        Service { number, vip, endpoints }
    };
    (0..services).map(service).collect()
}

/// The endpoint that comes with a change.
pub(crate) fn another(number: u32) -> SocketAddr {
    SocketAddr::new(address(0x0aff_0000, number), 8080)
}

fn address(first: u32, number: u32) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from_bits(first + number))
}

/// As our tables take them.
pub(crate) fn frontends(services: &[Service]) -> Vec<Frontend> {
    services.iter().map(frontend).collect()
}

/// As our tables take one.
pub(crate) fn frontend(service: &Service) -> Frontend {
    let backend = |address: &SocketAddr| Backend {
        address: address.ip(),
        port: address.port(),
        node: None,
        weight: FULL_WEIGHT,
    };
    Frontend {
        vip: service.vip.into(),
        protocol: Protocol::Tcp,
        port: PORT,
        kind: FrontendKind::ClusterIp,
        service: ObjectKey::new("default", format!("s{}", service.number)),
        port_name: String::new(),
        affinity_secs: None,
        backends: service.endpoints.iter().map(backend).collect(),
        leaving: vec![],
    }
}

/// One look-up in a verdict map, a chain for each service, a chain for each endpoint, a random choice between them.
pub(crate) fn nft(services: &[Service]) -> String {
    let mut text = String::from(
        "table ip lb {\n\
         chain masquerade-later { meta mark set meta mark or 0x4000; }\n",
    );
    let mut elements = vec![];
    for service in services {
        for (place, endpoint) in service.endpoints.iter().enumerate() {
            let chain = format!("endpoint-{}-{place}", service.number);
            let _ = writeln!(text, "chain {chain} {{\n{}}}", nft_endpoint(*endpoint, "\n"));
        }
        let name = format!("service-{}", service.number);
        let _ = writeln!(text, "chain {name} {{\n{}}}", nft_service(service, "\n"));
        elements.push(format!("{} . tcp . {PORT} : goto {name}", service.vip));
    }
    let vips: Vec<String> = services.iter().map(|service| service.vip.to_string()).collect();
    let _ = writeln!(
        text,
        "map services {{ type ipv4_addr . inet_proto . inet_service : verdict; elements = {{ {} }}; }}\n\
         set vips {{ type ipv4_addr; elements = {{ {} }}; }}\n\
         map empty {{ type ipv4_addr . inet_proto . inet_service : verdict; }}\n\
         chain choose {{ ip daddr . meta l4proto . th dport vmap @services; }}\n\
         chain prerouting {{ type nat hook prerouting priority dstnat; jump choose; }}\n\
         chain output {{ type nat hook output priority -100; jump choose; }}\n\
         chain forward {{ type filter hook forward priority filter - 10;\n\
         ct state new ip daddr . meta l4proto . th dport vmap @empty\n\
         ct state new ip daddr @vips reject\n}}\n\
         chain postrouting {{ type nat hook postrouting priority srcnat;\n\
         meta mark & 0x4000 == 0 return\n\
         meta mark set meta mark xor 0x4000\n\
         masquerade fully-random\n}}\n}}",
        elements.join(", "),
        vips.join(", "),
    );
    text
}

/// One endpoint of a service is another one.
pub(crate) fn nft_change(service: &Service, place: usize) -> String {
    let (chain, endpoint) =
        (format!("endpoint-{}-{place}", service.number), service.endpoints[place]);
    let mut text = format!("flush chain ip lb {chain}\n");
    for line in nft_endpoint(endpoint, "\n").lines() {
        let _ = writeln!(text, "add rule ip lb {chain} {line}");
    }
    let name = format!("service-{}", service.number);
    let _ = writeln!(text, "flush chain ip lb {name}");
    for line in nft_service(service, "\n").lines() {
        let _ = writeln!(text, "add rule ip lb {name} {line}");
    }
    text
}

fn nft_endpoint(endpoint: SocketAddr, end: &str) -> String {
    format!(
        "ip saddr {} jump masquerade-later{end}meta l4proto tcp dnat to {endpoint}{end}",
        endpoint.ip()
    )
}

fn nft_service(service: &Service, end: &str) -> String {
    let places: Vec<String> = (0..service.endpoints.len())
        .map(|place| format!("{place} : goto endpoint-{}-{place}", service.number))
        .collect();
    format!(
        "ip daddr {} tcp dport {PORT} ip saddr != {PODS} jump masquerade-later{end}\
         numgen random mod {} vmap {{ {} }}{end}",
        service.vip,
        places.len(),
        places.join(", ")
    )
}

/// A rule for each service in one chain, a chain for each service, a chain for each endpoint, each with its probability.
pub(crate) fn iptables(services: &[Service]) -> String {
    let (mut chains, mut rules) = (String::new(), String::new());
    for service in services {
        iptables_service(service, &mut chains, &mut rules);
    }
    iptables_restore(services, &chains, &rules)
}

/// What is written for one changed service: its chains, and the list of all services again.
pub(crate) fn iptables_change(services: &[Service], changed: &Service) -> String {
    let (mut chains, mut rules) = (String::new(), String::new());
    iptables_service(changed, &mut chains, &mut rules);
    iptables_restore(services, &chains, &rules)
}

fn iptables_service(service: &Service, chains: &mut String, rules: &mut String) {
    let (number, count) = (service.number, service.endpoints.len());
    let _ = writeln!(chains, ":SVC-{number} - [0:0]");
    let _ = writeln!(
        rules,
        "-A SVC-{number} ! -s {PODS} -d {}/32 -p tcp -m tcp --dport {PORT} -j LATER",
        service.vip
    );
    for (place, endpoint) in service.endpoints.iter().enumerate() {
        let _ = writeln!(chains, ":SEP-{number}-{place} - [0:0]");
        let left = u32::try_from(count - place).unwrap_or(u32::MAX);
        let share = match left {
            1 => String::new(),
            left => {
                format!("-m statistic --mode random --probability {:.10} ", 1.0 / f64::from(left))
            }
        };
        let _ = writeln!(rules, "-A SVC-{number} {share}-j SEP-{number}-{place}");
        let _ = writeln!(rules, "-A SEP-{number}-{place} -s {}/32 -j LATER", endpoint.ip());
        let _ = writeln!(
            rules,
            "-A SEP-{number}-{place} -p tcp -m tcp -j DNAT --to-destination {endpoint}"
        );
    }
}

fn iptables_restore(services: &[Service], chains: &str, rules: &str) -> String {
    let mut text = format!(
        "*nat\n:SERVICES - [0:0]\n:LATER - [0:0]\n:LEAVE - [0:0]\n{chains}{rules}\
         -A LATER -j MARK --or-mark 0x4000\n\
         -A LEAVE -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
         -A LEAVE -j MARK --xor-mark 0x4000\n\
         -A LEAVE -j MASQUERADE --random-fully\n"
    );
    for service in services {
        let _ = writeln!(
            text,
            "-A SERVICES -d {}/32 -p tcp -m tcp --dport {PORT} -j SVC-{}",
            service.vip, service.number
        );
    }
    text + "COMMIT\n"
}

/// Jumps into what [`iptables`] writes.
pub(crate) const IPTABLES_HOOKS: &str = "*nat\n:SERVICES - [0:0]\n:LEAVE - [0:0]\n\
     -A PREROUTING -j SERVICES\n-A OUTPUT -j SERVICES\n-A POSTROUTING -j LEAVE\nCOMMIT\n";

/// A listener for each service, on the service's own address.
pub(crate) fn haproxy(services: &[Service], socket: &str) -> String {
    let mut text = format!(
        "global\n maxconn 2000\n nbthread 2\n stats socket {socket} mode 600 level admin\n\
         defaults\n mode tcp\n balance random\n timeout connect 5s\n timeout client 60s\n \
         timeout server 60s\n"
    );
    for service in services {
        let _ = writeln!(text, "listen s{}\n bind {}:{PORT}", service.number, service.vip);
        for (place, endpoint) in service.endpoints.iter().enumerate() {
            let _ = writeln!(text, " server e{place} {endpoint}");
        }
    }
    text
}

/// The command by which one endpoint becomes another.
pub(crate) fn haproxy_change(service: &Service, place: usize) -> String {
    let endpoint = service.endpoints[place];
    let (number, ip, port) = (service.number, endpoint.ip(), endpoint.port());
    format!("set server s{number}/e{place} addr {ip} port {port}\n")
}
