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
    });
}
