//! From a question to records: the zone's answer in DNS terms, without sockets.

use std::net::IpAddr;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::{A, AAAA, CNAME, NS, PTR, SOA, SRV, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};

use crate::zone::{Answer, Records, Srv, Zone};

/// Life of an answer in caches: short, since services move; the specification leaves it open.
const TTL_SECS: u32 = 5;
/// Aliases that are followed from one name to the next.
const MOST_ALIASES: usize = 8;

/// A complete answer.
#[derive(Debug, Default)]
pub(crate) struct Answered {
    pub(crate) code: ResponseCode,
    pub(crate) answers: Vec<Record>,
    /// The zone's SOA, for a negative answer (RFC 2308, section 3).
    pub(crate) soa: Option<Record>,
    pub(crate) additionals: Vec<Record>,
    /// Whether the answer is the zone's own.
    pub(crate) authoritative: bool,
    /// An alias that leaves the cluster and has to be followed upstream.
    pub(crate) follow: Option<Name>,
}

/// What the cluster's zone says; `None` when the name is not the cluster's.
pub(crate) fn from_zone(zone: &Zone, name: &Name, kind: RecordType) -> Option<Answered> {
    let text = text(name);
    let mut answered = Answered { authoritative: true, ..Answered::default() };
    match zone.answer(&text) {
        Answer::Elsewhere => return None,
        Answer::NoName => answered.code = ResponseCode::NXDomain,
        Answer::Pointer(names) => answered.answers = pointers(name, kind, names),
        Answer::Found(records) => found(zone, name, kind, &records, &mut answered),
    }
    if answered.answers.is_empty() {
        answered.soa = soa(zone, name);
    }
    Some(answered)
}

/// A name as the zone index knows it.
pub(crate) fn text(name: &Name) -> String {
    let mut text = name.to_ascii().to_ascii_lowercase();
    if text.ends_with('.') {
        text.pop();
    }
    text
}

fn pointers(name: &Name, kind: RecordType, names: &[String]) -> Vec<Record> {
    if !matches!(kind, RecordType::PTR | RecordType::ANY) {
        return vec![];
    }
    names.iter().filter_map(|n| Some(record(name, RData::PTR(PTR(absolute(n)?))))).collect()
}

fn found(zone: &Zone, name: &Name, kind: RecordType, records: &Records, answered: &mut Answered) {
    if let Some(target) = records.alias.as_deref().and_then(absolute) {
        answered.answers.push(record(name, RData::CNAME(CNAME(target.clone()))));
        if kind != RecordType::CNAME {
            alias(zone, target, kind, answered);
        }
        return;
    }
    let wants = |one| kind == one || kind == RecordType::ANY;
    answered.answers.extend(addresses(name, kind, &records.addresses));
    if wants(RecordType::SRV) {
        services(zone, name, &records.srv, answered);
    }
    if wants(RecordType::TXT) {
        let texts = records.text.iter().map(|t| RData::TXT(TXT::new(vec![t.clone()])));
        answered.answers.extend(texts.map(|data| record(name, data)));
    }
    let is_apex = text(name) == zone.domain();
    if is_apex && wants(RecordType::SOA) {
        answered.answers.extend(soa(zone, name));
    }
    if is_apex && wants(RecordType::NS) {
        answered.answers.extend(server_name(zone).map(|ns| record(name, RData::NS(NS(ns)))));
    }
}

/// Follows an alias through the cluster, from name to name, and out of it upstream. A circle has no end.
fn alias(zone: &Zone, mut target: Name, kind: RecordType, answered: &mut Answered) {
    for _ in 0..MOST_ALIASES {
        let records = match zone.answer(&text(&target)) {
            Answer::Found(records) => records,
            Answer::Elsewhere => return answered.follow = Some(target),
            Answer::NoName | Answer::Pointer(_) => return answered.code = ResponseCode::NXDomain,
        };
        let Some(next) = records.alias.as_deref().and_then(absolute) else {
            return answered.answers.extend(addresses(&target, kind, &records.addresses));
        };
        answered.answers.push(record(&target, RData::CNAME(CNAME(next.clone()))));
        target = next;
    }
    answered.code = ResponseCode::ServFail;
}

fn addresses(name: &Name, kind: RecordType, addresses: &[IpAddr]) -> Vec<Record> {
    let wants = |one| kind == one || kind == RecordType::ANY;
    let data = |address: &IpAddr| match address {
        IpAddr::V4(a) if wants(RecordType::A) => Some(RData::A(A(*a))),
        IpAddr::V6(a) if wants(RecordType::AAAA) => Some(RData::AAAA(AAAA(*a))),
        _ => None,
    };
    addresses.iter().filter_map(data).map(|data| record(name, data)).collect()
}

/// SRV records, weights that sum up to about 100, and the addresses of their targets beside them.
fn services(zone: &Zone, name: &Name, srv: &[Srv], answered: &mut Answered) {
    let weight = 100 / u16::try_from(srv.len()).unwrap_or(u16::MAX).max(1);
    let mut told = Vec::new();
    for one in srv {
        let Some(target) = absolute(&one.target) else { continue };
        let data = SRV::new(0, weight.max(1), one.port, target.clone());
        answered.answers.push(record(name, RData::SRV(data)));
        if told.contains(&target) {
            continue;
        }
        if let Answer::Found(records) = zone.answer(&one.target) {
            let glue = addresses(&target, RecordType::ANY, &records.addresses);
            answered.additionals.extend(glue);
        }
        told.push(target);
    }
}

fn soa(zone: &Zone, asked: &Name) -> Option<Record> {
    let own = absolute(zone.domain())?;
    // A negative answer about an address has the reverse tree as its zone, not the cluster's domain.
    let apex = if own.zone_of(asked) { own } else { asked.base_name() };
    let data = SOA::new(
        server_name(zone)?,
        absolute(&format!("hostmaster.{}", zone.domain()))?,
        1,
        7200,
        1800,
        86_400,
        TTL_SECS,
    );
    Some(record(&apex, RData::SOA(data)))
}

fn server_name(zone: &Zone) -> Option<Name> {
    absolute(&format!("ns.dns.{}", zone.domain()))
}

fn absolute(text: &str) -> Option<Name> {
    let mut name = Name::from_ascii(text).ok()?;
    name.set_fqdn(true);
    Some(name)
}

fn record(name: &Name, data: RData) -> Record {
    Record::from_rdata(name.clone(), TTL_SECS, data)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mesh_model::ObjectKey;
    use mesh_model::snapshot::{DnsService, DnsTarget, DnsZone};

    use super::*;

    /// Services of the namespace `n`, each an alias, and `web` with an address.
    fn zone(aliases: &[(&str, &str)]) -> Zone {
        let service =
            |name: &str, target| Arc::new(DnsService { key: ObjectKey::new("n", name), target });
        let addresses = vec!["10.96.0.7".parse().unwrap()];
        let web = service("web", DnsTarget::ClusterIp { addresses, ports: vec![] });
        let alias =
            |(name, to): &(&str, &str)| service(name, DnsTarget::ExternalName((*to).to_owned()));
        Zone::new(&DnsZone {
            domain: "c.local".to_owned(),
            namespaces: vec!["n".to_owned()],
            pod_cidrs: vec![],
            services: aliases.iter().map(alias).chain([web]).collect(),
        })
    }

    #[test]
    fn aliases_of_aliases_are_followed() {
        let name = |service: &str| absolute(&format!("{service}.n.svc.c.local")).unwrap();
        let all = zone(&[
            ("first", "second.n.svc.c.local"),
            ("second", "web.n.svc.c.local"),
            ("away", "out.n.svc.c.local"),
            ("out", "db.example"),
            ("lost", "gone.n.svc.c.local"),
            ("round", "about.n.svc.c.local"),
            ("about", "round.n.svc.c.local"),
        ]);
        let ask = |service| from_zone(&all, &name(service), RecordType::A).unwrap();
        let found = ask("first");
        let chain: Vec<&Name> = found.answers.iter().map(|record| &record.name).collect();
        assert_eq!(chain, [&name("first"), &name("second"), &name("web")]);
        let away = ask("away");
        assert_eq!((away.answers.len(), away.follow), (2, absolute("db.example")));
        assert_eq!(ask("lost").code, ResponseCode::NXDomain);
        assert_eq!(ask("round").code, ResponseCode::ServFail);
    }
}
