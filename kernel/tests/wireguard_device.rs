//! The kernel's WireGuard, where there is one.

use std::collections::BTreeMap;
use std::time::Duration;

use mesh_kernel::WireGuardDevice;
use mesh_kernel::wireguard::{
    Config, Holder, KernelWireGuard, PeerConfig, SecretKey, plan, supported,
};
use mesh_model::snapshot::WgKey;

use crate::lab::{Net, privileged};

#[test]
fn it_is_told_whose_a_name_is() {
    if !privileged() {
        return;
    }
    let net = Net::new();
    let device = KernelWireGuard::new(net.handle(), "mesh-wg".parse().unwrap());
    assert_eq!(device.holder().unwrap(), Holder::Nobody);
    net.ip("link add mesh-wg type veth peer name other");
    assert_eq!(device.holder().unwrap(), Holder::Other);
    device.remove().unwrap();
    assert_eq!(device.holder().unwrap(), Holder::Nobody);
    if supported(&net.handle()).unwrap() {
        device.ensure().unwrap();
        assert_eq!(device.holder().unwrap(), Holder::WireGuard);
    }
}

#[test]
fn the_probe_answers_and_the_device_takes_a_configuration() {
    if !privileged() {
        return;
    }
    let net = Net::new();
    let device = KernelWireGuard::new(net.handle(), "mesh-wg".parse().unwrap());
    let links = net.ip("-o link");
    if !supported(&net.handle()).unwrap() {
        // Nothing to test but that the refusal is clean; other kernels go on below.
        assert!(device.ensure().is_err() && device.observe().is_err());
        assert_eq!(net.ip("-o link"), links);
        return;
    }
    assert!(device.ensure().unwrap() && !device.ensure().unwrap(), "made once");
    let peer = PeerConfig {
        endpoint: "192.0.2.1:51900".parse().ok(),
        pinned: false,
        allowed_ips: ["10.244.2.0/24".parse().unwrap(), "fd10:244:0:2::/64".parse().unwrap()]
            .into(),
        keepalive: Some(Duration::from_secs(25)),
        preshared_key: Some(SecretKey([5; 32])),
    };
    // A private key as X25519 wants it, so that the kernel gives back what it was given.
    let mut private_key = [0x50; 32];
    private_key[0] &= 248;
    let mut config = Config {
        private_key: SecretKey(private_key),
        listen_port: 51_900,
        fwmark: 0,
        peers: BTreeMap::from([(WgKey([7; 32]), peer)]),
    };
    device.apply(&plan(&config, &device.observe().unwrap())).unwrap();
    assert!(plan(&config, &device.observe().unwrap()).steps.is_empty());
    config.peers.clear();
    device.apply(&plan(&config, &device.observe().unwrap())).unwrap();
    assert!(device.observe().unwrap().peers.is_empty());
    device.remove().unwrap();
    device.remove().unwrap();
    assert_eq!(net.ip("-o link"), links);
}
