//! Loading again: another version, a broken object, a cgroup that was made anew.

use std::net::SocketAddr;

use mesh_kernel::bpf::{LoadError, detach_all};
use mesh_kernel::services::ServiceReconciler;
use mesh_kernel::{LoadOptions, Programs};
use mesh_model::ObjectKey;
use mesh_model::snapshot::{Backend, FULL_WEIGHT, Frontend, FrontendKind, Protocol};

use crate::client::Client;
use crate::lab::{Lab, Net, names, privileged};

/// `10.96.0.1:80/UDP` with one backend.
fn publish(programs: &Programs, backend: SocketAddr) {
    let frontend = Frontend {
        vip: "10.96.0.1".parse().unwrap(),
        protocol: Protocol::Udp,
        port: 80,
        kind: FrontendKind::ClusterIp,
        service: ObjectKey::new("default", "web"),
        port_name: String::new(),
        affinity_secs: None,
        backends: vec![Backend {
            address: backend.ip(),
            port: backend.port(),
            node: None,
            weight: FULL_WEIGHT,
        }],
        leaving: vec![],
    };
    let outcome = ServiceReconciler::new(programs.services()).reconcile(&[frontend]).unwrap();
    assert!(outcome.failed.is_empty());
}

const HELLO: &str = "hello from 10.96.0.1:80";

#[test]
fn an_object_that_does_not_load_changes_nothing() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    publish(&lab.load(), net.answerer("127.0.0.1:0", "hello"));
    let mut client = Client::start(&lab.cgroup, &net);
    let built_in = mesh_kernel::bpf::built_in_object();
    for object in [b"not an object".to_vec(), built_in[..built_in.len() / 2].to_vec()] {
        let options = LoadOptions { object: Some(object), ..lab.options() };
        assert!(matches!(Programs::open_or_load(&options), Err(LoadError::Object(_))));
        assert_eq!(client.ask("udp 10.96.0.1:80"), HELLO);
    }
    let options = LoadOptions { object: Some(Vec::new()), ..lab.options() };
    assert!(matches!(Programs::open_or_load(&options), Err(LoadError::NoObject)));
    assert_eq!(client.ask("udp 10.96.0.1:80"), HELLO);
}

#[test]
fn another_version_serves_until_it_is_retired() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    let server = net.answerer("127.0.0.1:0", "hello");
    publish(&lab.load(), server);
    lab.change_version(999);
    let mut client = Client::start(&lab.cgroup, &net);
    let programs = lab.load();
    assert_eq!(programs.pressure().unwrap()["SERVICES"].0, 0);
    assert_eq!(client.ask("udp 10.96.0.1:80"), HELLO, "the new maps are still empty");
    publish(&programs, server);
    assert!(programs.retire_old_versions().unwrap());
    assert!(!programs.retire_old_versions().unwrap());
    assert_eq!(client.ask("udp 10.96.0.1:80"), HELLO);
    assert_eq!(names(&lab.bpf_dir()), [format!("v{}", mesh_abi::VERSION)]);
}

#[test]
fn what_was_asked_under_another_version_is_answered_by_the_service() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    let server = net.answerer("127.0.0.1:0", "hello");
    publish(&lab.load(), server);
    let mut client = Client::start(&lab.cgroup, &net);
    assert_eq!(client.ask("send 10.96.0.1:80"), "sent");
    lab.change_version(999);
    let programs = lab.load();
    publish(&programs, server);
    assert!(programs.retire_old_versions().unwrap());
    assert_eq!(client.ask("receive 10.96.0.1:80"), HELLO);
}

#[test]
fn a_cgroup_that_was_made_anew_gets_its_hooks() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    publish(&lab.load(), net.answerer("127.0.0.1:0", "hello"));
    let links = names(&lab.bpf_dir().join(format!("v{}/links", mesh_abi::VERSION)));
    std::fs::remove_dir(&lab.cgroup).unwrap();
    std::fs::create_dir(&lab.cgroup).unwrap();
    let mut before = Client::start(&lab.cgroup, &net);
    assert_eq!(before.ask("udp 10.96.0.1:80"), "error ENETUNREACH");
    lab.load();
    assert_eq!(before.ask("udp 10.96.0.1:80"), HELLO);
    assert_eq!(names(&lab.bpf_dir().join(format!("v{}/links", mesh_abi::VERSION))), links);
}

#[test]
fn a_cgroup_that_does_not_exist_is_named() {
    if !privileged() {
        return;
    }
    let lab = Lab::new();
    let missing = lab.cgroup.join("missing");
    let options = LoadOptions { cgroup_dir: missing.clone(), ..lab.options() };
    let error = Programs::open_or_load(&options).unwrap_err();
    assert_eq!(error.to_string(), format!("open cgroup {}", missing.display()));
}

#[test]
fn detaching_everything_leaves_an_empty_directory_and_is_repeatable() {
    if !privileged() {
        return;
    }
    let lab = Lab::new();
    drop(lab.load());
    std::fs::create_dir(lab.bpf_dir().join("of-somebody-else")).unwrap();
    for _ in 0..2 {
        detach_all(&lab.bpf_dir()).unwrap();
        assert_eq!(names(&lab.bpf_dir()), ["of-somebody-else"]);
    }
    std::fs::remove_dir(lab.bpf_dir().join("of-somebody-else")).unwrap();
    detach_all(&lab.bpf_dir()).unwrap();
    assert!(!lab.bpf_dir().exists());
    detach_all(&lab.bpf_dir()).unwrap();
}
