//! Clients while the programs of one ABI version follow on those of another.

use std::net::{SocketAddr, TcpStream};

use mesh_model::snapshot::Protocol;

use super::{Published, World, any, ask, at, echo, frontends, say, udp_teller, unchanged, v4, v6};
use crate::lab::{PATIENCE, privileged};

const PORT: u16 = 30_001;

/// Both families, and both protocols.
fn connect(world: &World) -> Vec<TcpStream> {
    let open = |to: &SocketAddr| TcpStream::connect_timeout(to, PATIENCE).unwrap();
    frontends(PORT).iter().map(|frontend| world.client.run(|| open(frontend))).collect()
}

#[test]
fn connections_of_clients_go_on_at_every_step() {
    if !privileged() {
        return;
    }
    let mut world = World::new();
    let pod = &world.nodes[0].pod;
    echo(pod, "one");
    for address in [v4(1, 5), v6(1, 5)] {
        udp_teller(pod, at(address, 53), "one");
    }
    let services: &[Published<'_>] =
        &[(Protocol::Tcp, PORT, &[(1, 80)]), (Protocol::Udp, PORT, &[(1, 53)])];
    world.publish(services, unchanged);
    let mut streams = connect(&world);
    let sockets = frontends(PORT).map(|frontend| (world.client.udp(any(frontend)), frontend));
    let mut step = |world: &World, what: &str| {
        // The ones that are open, and new ones that are open in the next step.
        streams.extend(connect(world));
        for stream in &mut streams {
            let said = say(stream).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(said, "one", "{what}");
        }
        for (socket, frontend) in &sockets {
            assert!(ask(socket, *frontend, 1).0.starts_with("one"), "{what}");
        }
    };
    step(&world, "before");
    world.nodes[0].change_version(2);
    step(&world, "loaded");
    world.publish(services, unchanged);
    step(&world, "published");
    world.nodes[0].take_over();
    step(&world, "taken over");
    assert!(world.nodes[0].programs.retire_old_versions().unwrap());
    step(&world, "retired");
    assert!(world.nodes[0].losses()["client_to_pod"] > 0, "by the new programs");
}
