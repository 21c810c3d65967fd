use proptest::prelude::*;

use super::*;

fn timing(success_threshold: u32, failure_threshold: u32) -> Timing {
    Timing {
        initial_delay: Duration::ZERO,
        period: Duration::from_secs(1),
        timeout: Duration::from_secs(1),
        success_threshold,
        failure_threshold,
    }
}

#[test]
fn verdicts_need_their_threshold() {
    // Answers, and the verdicts that they lead to, one for one.
    type Row = (u32, u32, Option<bool>, &'static [bool], &'static [Option<bool>]);
    let table: &[Row] = &[
        (1, 3, None, &[true, true], &[Some(true), None]),
        (1, 3, Some(true), &[false, false, false, false], &[None, None, Some(false), None]),
        (
            1,
            3,
            Some(true),
            &[false, false, true, false, false, false],
            &[None, None, None, None, None, Some(false)],
        ),
        (2, 1, Some(false), &[true, false, true, true], &[None, None, None, Some(true)]),
        (1, 1, Some(false), &[false, true, false], &[None, Some(true), Some(false)]),
    ];
    for (successes, failures, start, answers, verdicts) in table {
        let mut counter = Counter::new(timing(*successes, *failures), *start);
        let seen: Vec<Option<bool>> = answers.iter().map(|a| counter.record(*a)).collect();
        assert_eq!(seen, *verdicts, "{answers:?}");
    }
}

#[test]
fn defaults_are_those_of_the_api() {
    let default = Timing::of(&Probe::default());
    assert_eq!((default.period.as_secs(), default.timeout.as_secs()), (10, 1));
    assert_eq!((default.success_threshold, default.failure_threshold), (1, 3));
    let odd = Probe { period_seconds: Some(0), failure_threshold: Some(-1), ..Default::default() };
    assert_eq!(Timing::of(&odd).period.as_secs(), 1);
    assert_eq!(Timing::of(&odd).failure_threshold, 3);
}

/// Whoever has just been started is not left alone for its first period.
/// Probes a container that has started, on this host. Ends when the first of the two is dropped.
fn probed(container: serde_json::Value) -> (Probers, mpsc::Receiver<Finding>) {
    let (sender, findings) = mpsc::channel(8);
    let mut probers = Probers::new(Client::new(std::path::Path::new("/none")), sender);
    probers.start(Subject {
        run: "r".to_owned(),
        container: serde_json::from_value(container).unwrap(),
        address: Some("127.0.0.1".parse().unwrap()),
        started_at: Timestamp::now(),
        started: true,
        ready: false,
    });
    (probers, findings)
}

#[tokio::test]
async fn a_container_is_ready_soon_after_it_answers() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let container = serde_json::json!({
        "name": "c",
        "readinessProbe": {"tcpSocket": {"port": free.port()}, "periodSeconds": 3600},
    });
    let (_probers, mut findings) = probed(container);
    let first = findings.recv().await.unwrap();
    assert!(first.failure.is_some() && first.verdict.is_none(), "{first:?}");
    let _listener = std::net::TcpListener::bind(free).unwrap();
    let next = tokio::time::timeout(Duration::from_secs(60), findings.recv()).await;
    let next = next.expect("long before the next period").unwrap();
    assert_eq!((next.verdict, next.failure), (Some(true), None));
}

#[tokio::test]
async fn a_probe_that_is_led_elsewhere_passes_and_says_so_once() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (heard, mut asked) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 1024]).await;
            let answer = "HTTP/1.1 302 F\r\nlocation: http://elsewhere.example/\r\ncontent-length: 0\r\n\r\n";
            stream.write_all(answer.as_bytes()).await.unwrap();
            heard.send(()).await.unwrap();
        }
    });
    let container = serde_json::json!({"name": "c",
        "readinessProbe": {"httpGet": {"port": port}, "periodSeconds": 1, "timeoutSeconds": 30}});
    let (_probers, mut findings) = probed(container);
    let first = findings.recv().await.unwrap();
    assert_eq!((first.verdict, first.failure), (Some(true), None));
    assert!(first.warning.unwrap().contains("elsewhere.example"));
    for _ in 0..3 {
        asked.recv().await.unwrap();
    }
    assert!(findings.try_recv().is_err(), "it is known");
}

#[tokio::test]
async fn a_container_that_is_to_end_is_asked_only_whether_it_is_ready() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let probe = serde_json::json!({"tcpSocket": {"port": closed.port()}, "periodSeconds": 1, "failureThreshold": 1000});
    let container =
        serde_json::json!({"name": "c", "readinessProbe": probe.clone(), "livenessProbe": probe});
    let (sender, mut findings) = mpsc::channel(8);
    let mut probers = Probers::new(Client::new(std::path::Path::new("/none")), sender);
    probers.start(Subject {
        run: "r".to_owned(),
        container: serde_json::from_value(container).unwrap(),
        address: Some("127.0.0.1".parse().unwrap()),
        started_at: Timestamp::now(),
        started: true,
        ready: true,
    });
    let mut kinds = async |count: usize| {
        let mut kinds = Vec::new();
        while kinds.len() < count {
            kinds.push(findings.recv().await.unwrap().kind);
        }
        kinds
    };
    let before = kinds(4).await;
    assert!(before.contains(&Kind::Liveness) && before.contains(&Kind::Readiness), "{before:?}");
    probers.leave();
    // One more may have been on its way.
    let after = kinds(5).await;
    assert!(after[2..].iter().all(|kind| *kind == Kind::Readiness), "{after:?}");
}

/// A runtime that is being restarted must not end the containers that it looks after.
#[tokio::test(start_paused = true)]
async fn a_container_that_could_not_be_asked_has_not_failed() {
    let probe = serde_json::json!({"exec": {"command": ["true"]}, "periodSeconds": 1, "failureThreshold": 1});
    let container =
        serde_json::json!({"name": "c", "readinessProbe": probe.clone(), "livenessProbe": probe});
    let (sender, mut findings) = mpsc::channel(8);
    let mut probers = Probers::new(Client::new(std::path::Path::new("/none")), sender);
    probers.start(Subject {
        run: "r".to_owned(),
        container: serde_json::from_value(container).unwrap(),
        address: None,
        started_at: Timestamp::now(),
        started: true,
        ready: true,
    });
    let found = tokio::time::timeout(Duration::from_secs(60), findings.recv()).await;
    assert!(found.is_err(), "{found:?}");
}

proptest! {
    /// A verdict changes only after as many equal answers in a row as its threshold, and always to the other value.
    #[test]
    fn verdicts_follow_runs_of_answers(
        successes in 1u32..5, failures in 1u32..5, answers in proptest::collection::vec(any::<bool>(), 0..60)
    ) {
        let mut counter = Counter::new(timing(successes, failures), Some(true));
        let mut verdict = true;
        let mut run = (true, 0u32);
        for answer in answers {
            run = if run.0 == answer { (answer, run.1 + 1) } else { (answer, 1) };
            let threshold = if answer { successes } else { failures };
            match counter.record(answer) {
                Some(changed) => {
                    prop_assert_eq!(changed, !verdict);
                    prop_assert_eq!(changed, answer);
                    prop_assert!(run.1 >= threshold);
                    verdict = changed;
                }
                None => prop_assert!(verdict == answer || run.1 < threshold),
            }
        }
    }
}
