use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use mesh_kernel::wireguard::{FakeWireGuard, ObservedPeer};
use mesh_worker::supervise::Replacement;

use super::*;

const A: WgKey = WgKey([1; 32]);
const B: WgKey = WgKey([2; 32]);
const C: WgKey = WgKey([3; 32]);

struct Rig {
    dir: tempfile::TempDir,
    fake: Arc<FakeWireGuard>,
}

impl Rig {
    fn new(holder: Holder) -> Self {
        let fake = Arc::new(FakeWireGuard::new());
        fake.put(holder);
        Self { dir: tempfile::tempdir().unwrap(), fake }
    }

    fn paths(&self) -> Paths {
        Paths::at(self.dir.path(), self.dir.path())
    }

    fn switch(&self, supported: fn() -> bool) -> Switch {
        let worker = workers::any(workers::OVERLAY, &self.paths());
        Switch { device: self.fake.clone(), supported, worker, paths: self.paths() }
    }

    /// A worker that says nothing, but lives.
    fn worker(&self) -> WorkerSpec {
        WorkerSpec {
            program: "/bin/sleep".into(),
            args: vec!["300".to_owned()],
            replacement: Replacement::Exclusive,
            ..workers::any(workers::OVERLAY, &self.paths())
        }
    }
}

fn exists(pid: &str) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(pid).join("stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.starts_with(" Z"))
}

#[tokio::test]
async fn the_worker_and_its_device_make_way_for_the_kernel() {
    let rig = Rig::new(Holder::Other);
    let keeper = tokio::spawn(supervise::keep(rig.worker()));
    let identity = rig.worker().identity_file;
    let mut pid = None;
    for _ in 0..1000 {
        let text = fs::read_to_string(&identity).unwrap_or_default();
        pid = text.strip_prefix("{\"pid\":").and_then(|t| t.split(',').next()).map(str::to_owned);
        if pid.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let pid = pid.expect("a worker");
    keeper.abort();
    let _ = keeper.await;
    let state = rig.paths().worker_state(workers::OVERLAY);
    fs::write(&state, "{}").unwrap();

    // A kernel without WireGuard takes nothing over, whatever it is told.
    rig.switch(|| false).to(Kind::Kernel).await.unwrap();
    assert!(exists(&pid) && state.exists());
    assert_eq!(rig.fake.holder().unwrap(), Holder::Other);

    rig.switch(|| true).to(Kind::Kernel).await.unwrap();
    assert!(!exists(&pid) && !state.exists() && !identity.exists());
    assert_eq!(rig.fake.holder().unwrap(), Holder::Nobody);
    rig.switch(|| true).to(Kind::Kernel).await.unwrap();
}

#[tokio::test]
async fn the_kernel_makes_way_for_the_worker_and_tells_where_peers_are() {
    let rig = Rig::new(Holder::WireGuard);
    rig.fake.tamper(|device| {
        device.listen_port = 51900;
        let peer = |at: &str, heard: bool| {
            let mut peer = ObservedPeer { endpoint: at.parse().ok(), ..ObservedPeer::default() };
            peer.statistics.last_handshake = heard.then(SystemTime::now);
            peer
        };
        device.peers.insert(A, peer("198.51.100.1:40000", true));
        device.peers.insert(B, peer("198.51.100.2:51901", true)); // a relay's port
        device.peers.insert(C, peer("198.51.100.3:51900", false)); // a guess
    });
    let found = rig.switch(|| true).to(Kind::User).await.unwrap();
    assert_eq!(found, [(A, "198.51.100.1:40000".parse().unwrap())].into());
    assert_eq!(rig.fake.holder().unwrap(), Holder::Nobody);
    assert!(rig.switch(|| true).to(Kind::User).await.unwrap().is_empty());
}

#[tokio::test]
async fn whoever_carries_the_packets_already_is_left_alone() {
    static ASKED: AtomicBool = AtomicBool::new(false);
    let never = || {
        ASKED.store(true, Ordering::Relaxed);
        true
    };
    for (holder, kind) in [
        (Holder::Other, Kind::User),
        (Holder::Nobody, Kind::User),
        (Holder::WireGuard, Kind::Kernel),
        (Holder::Nobody, Kind::Kernel),
    ] {
        let rig = Rig::new(holder);
        assert!(rig.switch(never).to(kind).await.unwrap().is_empty());
        assert_eq!(rig.fake.holder().unwrap(), holder);
    }
    assert!(!ASKED.load(Ordering::Relaxed));
}

#[test]
fn only_peers_that_were_heard_directly_are_anywhere() {
    let peer = |key, at: &str, age, relay: Option<&str>| PeerStatus {
        knows_next_key: false,
        public_key: key,
        endpoint: at.parse().ok(),
        allowed_ips: vec![],
        handshake_age_ms: age,
        received_bytes: 0,
        sent_bytes: 0,
        unanswered: 0,
        preshared: true,
        preshared_agreed: true,
        relay: relay.map(|at| at.parse().unwrap()),
        direct_answers: 0,
        keepalive_secs: None,
        mtu: None,
    };
    let at = "198.51.100.1:40000";
    let peers = [
        peer(A, at, Some(1), None),
        peer(B, at, None, None),
        peer(C, "198.51.100.3:51903", Some(1), Some("198.51.100.3:51903")),
    ];
    assert_eq!(whereabouts(&peers, 51900), [(A, at.parse().unwrap())].into());
}

#[test]
fn the_kernel_does_not_take_over_where_peers_would_not_hear_it() {
    let [none, hour] = [Duration::ZERO, Duration::from_secs(3600)];
    let kernels: fn() -> Kind = || Kind::Kernel;
    let cases = [
        (OverlayChoice::Auto, kernels, none, Kind::Kernel),
        (OverlayChoice::Auto, kernels, hour, Kind::User),
        (OverlayChoice::Auto, || Kind::User, none, Kind::User),
        // Who says so gets it.
        (OverlayChoice::Kernel, kernels, hour, Kind::Kernel),
        (OverlayChoice::User, kernels, none, Kind::User),
    ];
    for (choice, detect, ahead, wanted) in cases {
        assert_eq!(kind(choice, detect, ahead), wanted, "{choice:?}, {ahead:?}");
    }
}
