//! What switching something on costs: events of connections, and policies; and clients outside against plain forwarding.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use mesh_kernel::edge::{self, Desired};
use mesh_kernel::policy::{Place, PolicyReconciler, Step, Tables};
use mesh_kernel::services::FrontendKey;
use mesh_model::ObjectKey;
use mesh_model::policy::{FIRST_FREE, PodPolicy, PolicySet, Ports, Rule};
use mesh_model::snapshot::Protocol;

use crate::figures::{Figures, Turn};
use crate::reader::while_reading;
use crate::world::World;
use crate::{Settings, across};

const LOADS: [&str; 3] = ["stream", "close", "keep"];
/// The service's port on the node.
const NODE_PORT: u16 = 30_001;
const POLICIES: u32 = 1_000;
const IDENTITIES: u32 = 10_000;
/// Of each policy.
const RULES: u32 = 20;

/// Measures with and without in turns, also who comes first.
fn compare(
    settings: &Settings,
    loads: &[&'static str],
    [with, without]: [&str; 2],
    mut measure: impl FnMut(bool, &'static str) -> Result<Turn>,
) -> Result<Figures> {
    let mut figures = Figures::default();
    let wanted =
        |load: &&&str| settings.loads.is_empty() || settings.loads.iter().any(|l| l == **load);
    let loads: Vec<&'static str> = loads.iter().filter(wanted).copied().collect();
    ensure!(!loads.is_empty(), "none of {:?} is among these loads", settings.loads);
    for round in 0..settings.rounds * 2 {
        for &load in &loads {
            for on in [round % 2 == 0, round % 2 != 0] {
                figures.add(if on { with } else { without }, measure(on, load)?);
            }
        }
    }
    Ok(figures)
}

/// Events of connections, read or not asked for.
pub(crate) fn flows(settings: &Settings) -> Result<()> {
    let mut world = World::mesh(&[], settings.object.as_deref())?;
    let (to, mut events) = (world.backend(), 0);
    let names = ["events on", "events off"];
    let figures = compare(settings, &LOADS, names, |on, load| {
        // The same work before: on a busy machine, who has just paused runs first.
        let reader = Some(world.reader()?).filter(|_| on);
        let (turn, read) = while_reading(reader, || world.measure(false, load, to, settings.turn))?;
        events += read;
        Ok(turn)
    })?;
    let lost = world.reader()?.tally()?.lost;
    let title = format!("events of connections ({events} read, {lost} lost)");
    figures.show(&title, &[(names[0], names[1])]);
    Ok(())
}

/// Many policies and identities, enforced or not.
pub(crate) fn policies(settings: &Settings) -> Result<()> {
    let mut world = World::mesh(&[], settings.object.as_deref())?;
    let mut table = PolicyReconciler::new(world.programs()?.policy());
    let outcome = table.reconcile(&tables(&world)?)?;
    ensure!(outcome.failed.is_empty(), "{:?}", outcome.failed.first());
    let (to, names) = (world.backend(), ["policies on", "policies off"]);
    let figures = compare(settings, &LOADS, names, |on, load| {
        let outcome = table.carry_out([Step::SetActive(on)]);
        ensure!(outcome.failed.is_empty(), "{:?}", outcome.failed.first());
        world.measure(false, load, to, settings.turn)
    })?;
    let title = format!("{POLICIES} policies of {RULES} rules, {IDENTITIES} identities");
    figures.show(&title, &[(names[0], names[1])]);
    Ok(())
}

/// Both pods are restricted in both directions; what they say to each other is allowed.
fn tables(world: &World) -> Result<Tables> {
    let identity = |number: u32| FIRST_FREE + number % IDENTITIES;
    let policy = |number: u32| FIRST_FREE + IDENTITIES + number % POLICIES;
    let [client, backend] = [0, IDENTITIES / 2].map(identity);
    let ports = |first| Ports::Prefix { protocol: Protocol::Tcp, first, bits: 16 };
    let mut rules: Vec<Rule> = (0..POLICIES * RULES)
        .map(|number| Rule {
            policy: policy(number / RULES),
            identity: identity(number * 7),
            ports: ports(8000 + u16::try_from(number % RULES).unwrap_or_default()),
            number,
        })
        .collect();
    let [ingress, egress] = [POLICIES / 3, POLICIES / 2].map(policy);
    for (policy, identity) in [(ingress, client), (egress, backend)] {
        let number = u32::try_from(rules.len())?;
        rules.push(Rule { policy, identity, ports: ports(crate::world::PORT), number });
    }
    let mesh = world.mesh.as_ref().context("a node without our programs")?;
    let key = |number: u32| ObjectKey::new("default", format!("pod-{number}"));
    let place = |(at, (ifindex, port)): (u32, &(u32, mesh_kernel::pods::PodPort))| {
        (*ifindex, Place { pod: Some(key(at)), addresses: port.addresses().collect() })
    };
    let set = PolicySet {
        active: true,
        pods: [
            (key(0), PodPolicy { identity: client, ingress, egress }),
            (key(1), PodPolicy { identity: backend, ingress, egress }),
        ]
        .into(),
        identities: (0..IDENTITIES)
            .map(|number| (IpAddr::from((0x0ac0_0000 + number).to_be_bytes()), identity(number)))
            .collect(),
        rules: rules.into(),
        ..PolicySet::default()
    };
    let places = (0..).zip(&mesh.ports).map(place).collect();
    Ok(Tables::wanted(&set, &places, &[(Protocol::Tcp, 10_250)]))
}

/// A client outside reaches a pod by the node's port, on that node and on another one; against nodes that only route.
pub(crate) fn outside(settings: &Settings) -> Result<()> {
    let object = settings.object.as_deref();
    let title = "clients outside, pod on the node";
    compare_outside(settings, World::plain()?, World::mesh(&[], object)?, title)?;
    let Some(engine) = &settings.engine else {
        println!("clients outside, pod on another node: left out, --engine is not given");
        return Ok(());
    };
    let title = "clients outside, pod on another node, through the encrypted tunnel";
    compare_outside(settings, across::plain()?, across::mesh(engine, object)?, title)
}

fn compare_outside(
    settings: &Settings,
    mut plain: World,
    mut mesh: World,
    title: &str,
) -> Result<()> {
    let node: IpAddr = [192, 0, 2, 1].into();
    publish_outside(&mesh, node)?;
    let names = ["node port", "forwarding"];
    let loads = ["datagrams", "close", "keep", "stream"];
    let figures = compare(settings, &loads, names, |ours, load| {
        let time = settings.turn;
        match (ours, load) {
            (true, _) => {
                let reader = Some(mesh.reader()?);
                let to = SocketAddr::new(node, NODE_PORT);
                while_reading(reader, || mesh.measure(true, load, to, time)).map(|(turn, _)| turn)
            }
            (false, "datagrams") => plain.measure(false, load, plain.datagram_backend(), time),
            (false, _) => plain.measure(false, load, plain.backend(), time),
        }
    })?;
    figures.show(title, &[(names[0], names[1])]);
    Ok(())
}

fn publish_outside(world: &World, node: IpAddr) -> Result<()> {
    let via = across::way(world);
    let service = |backends: &[SocketAddr]| edge::Service {
        backends: backends.iter().map(|backend| (*backend, via.map(|(node, _)| node))).collect(),
        ..edge::Service::default()
    };
    let key = |protocol| FrontendKey { vip: node, protocol, port: NODE_PORT };
    let desired = Desired {
        services: [
            (key(Protocol::Tcp), service(&world.endpoints())),
            (key(Protocol::Udp), service(&[world.datagram_backend()])),
        ]
        .into(),
        nodes: via.into_iter().collect(),
        own: ["10.244.1.1".parse()?].into(),
        addresses: [node].into(),
        ..Desired::default()
    };
    across::settle(&world.node, world.programs()?, &desired)
}
