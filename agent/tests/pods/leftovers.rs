//! What is left in the runtime of calls whose caller died.

use mesh_cri::v1::{
    ContainerConfig, ContainerMetadata, ImageSpec, PodSandboxConfig, PodSandboxMetadata,
};

use crate::image::BUSYBOX;
use crate::machine;
use crate::rig::Rig;

fn sandbox_config(name: &str) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            namespace: "test".to_owned(),
            attempt: 0,
        }),
        ..Default::default()
    }
}

async fn create(rig: &Rig, sandbox: &str, name: &str) -> String {
    let config = ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(ImageSpec { image: BUSYBOX.to_owned(), ..Default::default() }),
        command: vec!["sleep".to_owned(), "1000".to_owned()],
        ..Default::default()
    };
    rig.client.create_container(sandbox, config, sandbox_config("p")).await.unwrap()
}

/// Tasks and containers.
fn known_to_containerd(rig: &Rig) -> (String, String) {
    (rig.ctr(&["tasks", "ls", "-q"]), rig.ctr(&["containers", "ls", "-q"]))
}

#[test]
fn a_task_that_cri_does_not_know_goes_with_its_container_and_its_sandbox() {
    let name = "leftovers::a_task_that_cri_does_not_know_goes_with_its_container_and_its_sandbox";
    machine::run(name, async |rig| {
        let sandbox = rig.client.run_sandbox(sandbox_config("p")).await.unwrap();
        let [first, second] =
            [create(&rig, &sandbox, "first").await, create(&rig, &sandbox, "second").await];
        for container in [&first, &second] {
            rig.ctr(&["tasks", "start", "--detach", container]);
            assert!(known_to_containerd(&rig).0.contains(container));
        }
        rig.client.remove_container(&first).await.unwrap();
        let (tasks, containers) = known_to_containerd(&rig);
        assert!(!tasks.contains(&first) && !containers.contains(&first));
        assert!(tasks.contains(&second) && containers.contains(&second), "nobody asked for it");
        rig.client.stop_sandbox(&sandbox).await.unwrap();
        rig.client.remove_sandbox(&sandbox).await.unwrap();
        assert_eq!(known_to_containerd(&rig), (String::new(), String::new()));
    });
}
