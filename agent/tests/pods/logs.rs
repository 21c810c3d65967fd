//! Logs that grow.

use crate::image::BUSYBOX;
use crate::machine;

const LINES: usize = 30_000;

#[test]
fn a_follower_misses_nothing_when_the_log_is_rotated() {
    machine::run("logs::a_follower_misses_nothing_when_the_log_is_rotated", async |rig| {
        // Some seconds of 250 kB each, which is four times what a file may have.
        let script = format!(
            "until test -e /v/go; do sleep 0.05; done; i=0; while test $i -lt {LINES}; do seq $i $((i+499)); i=$((i+500)); sleep 0.1; done"
        );
        let chatty = serde_json::json!({"restartPolicy": "Never",
            "volumes": [{"name": "v", "emptyDir": {}}],
            "containers": [{"name": "c", "image": BUSYBOX, "command": ["sh", "-c", script],
                "volumeMounts": [{"name": "v", "mountPath": "/v"}]}]});
        rig.api.apply("chatty", chatty);
        let runner = rig.runner();
        rig.until(&runner, "it runs", |api| api.phase("chatty") == "Running").await;
        std::fs::write(rig.path("agent/pods/uid-chatty/volumes/v/go"), "").unwrap();
        let (code, log) = rig.logs(&runner, "chatty/c?follow=true").await;
        assert_eq!(code, 200);
        let wrong = log.lines().enumerate().find(|(n, line)| line.parse() != Ok(*n));
        assert_eq!((wrong, log.lines().count()), (None, LINES));

        rig.until(&runner, "it has ended", |api| api.phase("chatty") == "Succeeded").await;
        let directory = rig.path("log/test_chatty_uid-chatty/c");
        let files: Vec<_> = std::fs::read_dir(directory).unwrap().flatten().collect();
        assert!((2..=5).contains(&files.len()), "{files:?}");

        let links = || -> Vec<_> {
            let entries = std::fs::read_dir(rig.path("containers")).into_iter().flatten();
            entries.flatten().map(|entry| entry.path()).collect()
        };
        rig.until(&runner, "collectors find it", |_| links().len() == 1).await;
        let container = rig.api.container("chatty").unwrap().container_id.unwrap();
        let id = container.strip_prefix("containerd://").unwrap();
        let link = &links()[0];
        assert!(link.ends_with(format!("chatty_test_c-{id}.log")), "{link:?}");
        let last = std::fs::read_to_string(link).unwrap();
        assert!(last.ends_with(&format!(" stdout F {}\n", LINES - 1)), "{last}");
        rig.api.delete("chatty");
        rig.until(&runner, "nothing leads to a log that is gone", |_| links().is_empty()).await;
    });
}
