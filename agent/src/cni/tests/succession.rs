//! Pods that were made under another ABI version.

use super::*;

fn host(id: &str) -> IfName {
    IfName::for_pod(id, "eth0")
}

/// An agent with these pods; then one with another ABI.
async fn upgraded(node: &Node, ids: &[&str]) -> Cni {
    let cni = node.agent();
    for id in ids {
        let pod = PodName { namespace: "default".to_owned(), name: (*id).to_owned() };
        let Request::Add { owner, netns, wishes, .. } = add(id) else { panic!("not an ADD") };
        let request = Request::Add { owner, netns, wishes, pod: Some(pod) };
        assert_eq!(code(&cni.handle(request).await), 0);
    }
    drop(cni);
    node.network.change_version();
    let cni = node.agent();
    cni.recover().await.unwrap();
    cni
}

#[tokio::test]
async fn one_that_cannot_be_had_keeps_no_other() {
    let node = Node::new("10.0.0.0/24");
    let cni = upgraded(&node, &["a", "b", "c"]).await;
    node.network.keep_back([host("b")]);
    let first = cni.take_over().await.unwrap();
    assert_eq!((first.taken, first.failures.len()), (2, 1), "{first:?}");
    assert!(first.failures[0].starts_with("b/eth0: "), "{first:?}");
    assert_eq!(node.network.others(), [host("b")].into());

    node.network.keep_back([]);
    let second = cni.take_over().await.unwrap();
    assert_eq!(second, Succession { taken: 1, failures: vec![] });
    assert!(node.network.others().is_empty());
    assert_eq!(cni.take_over().await.unwrap(), Succession::default(), "nothing is left to do");
}

/// What is said of a pod is what it was attached with: its policies are found by its name.
#[tokio::test]
async fn a_pod_is_taken_over_as_it_was_attached() {
    let node = Node::new("10.0.0.0/24");
    let cni = upgraded(&node, &["a"]).await;
    cni.take_over().await.unwrap();
    let essence = |port: &PodPort| {
        (port.host_interface.clone(), port.owner.clone(), port.v4, port.v6, port.pod_mac())
    };
    let [attached] = &node.network.ports()[..] else { panic!("one pod") };
    let [taken] = &node.network.taken_over()[..] else { panic!("one pod") };
    assert_eq!(essence(taken), essence(attached));
    assert!(taken.owner.ends_with(" default/a"), "{}", taken.owner);
}

#[tokio::test]
async fn what_goes_is_not_taken_over() {
    let node = Node::new("10.0.0.0/24");
    let cni = upgraded(&node, &["a", "b"]).await;
    cni.0.ledger.change(Change::Retire(owner("a"))).await.unwrap().unwrap();
    node.network.vanish(&host("b"));
    assert_eq!(cni.take_over().await.unwrap(), Succession::default());
    assert_eq!(node.network.others(), [host("a")].into());
}
