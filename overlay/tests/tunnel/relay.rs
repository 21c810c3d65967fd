//! A relay, and a node that nothing can be sent to.

use std::io::IoSliceMut;
use std::net::{SocketAddr, UdpSocket};

use mesh_model::snapshot::WgKey;
use mesh_overlay::relay::{Relay, RelayConfig, RelayedPair};
use quinn_udp::{EcnCodepoint, RecvMeta, UdpSocketState};

use crate::traffic::LIMIT;
use crate::world::{Side, World, privileged};

const FIRST_PORT: u16 = 51901;

#[test]
fn a_node_that_nothing_can_be_sent_to_costs_the_others_no_mark() {
    if !privileged() {
        return;
    }
    let world = World::new();
    world.ip("node", Side::A, "route add blackhole 198.51.100.0/24");
    world.inside("node", Side::A, || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let _entered = runtime.enter();
        let here = SocketAddr::new(Side::A.underlay(false), 0);
        let [a, b, c] = [here; 3].map(|here| UdpSocket::bind(here).unwrap());
        let [at_a, at_b, at_c] = [&a, &b, &c].map(|socket| socket.local_addr().unwrap());
        let key = |n: u8| WgKey([n; 32]);
        let (a_next_key, b_next_key) = (None, None);
        let pair = RelayedPair {
            slot: 0,
            a: at_a,
            a_key: key(1),
            a_next_key,
            b: at_b,
            b_key: key(2),
            b_next_key,
        };
        let nowhere = SocketAddr::from(([198, 51, 100, 7], 51900));
        let lost = RelayedPair { a: at_c, a_key: key(3), b: nowhere, b_key: key(4), ..pair };
        let relay = Relay::default();
        relay.configure(&RelayConfig { first_port: FIRST_PORT, pairs: vec![pair, lost] }).unwrap();
        let port = SocketAddr::new(here.ip(), FIRST_PORT);
        c.send_to(&[7; 100], port).unwrap();
        // It is read after that one.
        socket2::SockRef::from(&a).set_tos_v4(EcnCodepoint::Ect0 as u32).unwrap();
        a.send_to(&[8; 100], port).unwrap();
        let state = UdpSocketState::new((&b).into()).unwrap();
        b.set_nonblocking(false).unwrap();
        b.set_read_timeout(Some(LIMIT)).unwrap();
        let (mut buffer, mut metas) = ([0; 2000], [RecvMeta::default()]);
        state.recv((&b).into(), &mut [IoSliceMut::new(&mut buffer)], &mut metas).unwrap();
        assert_eq!(metas[0].ecn, Some(EcnCodepoint::Ect0));
    });
}
