use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use tokio::io::AsyncWriteExt as _;
use tokio::sync::mpsc;

use super::*;

const LOG: &str = "\
2026-01-01T00:00:01.000000000Z stdout F one
2026-01-01T00:00:02.000000000Z stdout P tw
2026-01-01T00:00:02.100000000Z stderr F oops
2026-01-01T00:00:02.200000000Z stdout F o
2026-01-01T00:00:03.000000000Z stdout F 
2026-01-01T00:00:04.000000000Z stdout F four
";

#[test]
fn records_are_parsed() {
    let record = parse(b"2026-01-01T00:00:01Z stderr P:x a  b ").unwrap();
    assert_eq!((record.time, record.stderr, record.partial), ("2026-01-01T00:00:01Z", true, true));
    assert_eq!(record.text, b"a  b ");
    assert_eq!(parse(b"t stdout F").map(|r| r.text.len()), Some(0));
    for bad in ["", "t", "t stdout", "t stdin F x", "t stdout X x", "plain text"] {
        assert_eq!(parse(bad.as_bytes()), None, "{bad}");
    }
}

async fn read(path: &Path, wanted: Wanted) -> String {
    let (sender, mut receiver) = mpsc::channel(100);
    follow::send(path, &wanted, &sender, || false).await.unwrap();
    drop(sender);
    let mut all = Vec::new();
    while let Some(chunk) = receiver.recv().await {
        all.extend(chunk);
    }
    String::from_utf8(all).unwrap()
}

#[tokio::test]
async fn a_file_is_read_as_wanted() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), LOG).unwrap();
    let all = read(file.path(), Wanted::default()).await;
    assert_eq!(all, "one\ntwoops\no\n\nfour\n");
    let tail = |lines| Wanted { tail_lines: Some(lines), ..Default::default() };
    assert_eq!(read(file.path(), tail(0)).await, "");
    assert_eq!(read(file.path(), tail(1)).await, "four\n");
    assert_eq!(read(file.path(), tail(3)).await, "o\n\nfour\n");
    assert_eq!(read(file.path(), tail(5)).await, all);
    assert_eq!(read(file.path(), tail(50)).await, all);
    let since = Wanted {
        since: Some("2026-01-01T00:00:03Z".parse().unwrap()),
        timestamps: true,
        ..Default::default()
    };
    assert_eq!(
        read(file.path(), since).await,
        "2026-01-01T00:00:03.000000000Z \n2026-01-01T00:00:04.000000000Z four\n"
    );
    let limited = Wanted { limit_bytes: Some(6), ..Default::default() };
    assert_eq!(read(file.path(), limited).await, "one\ntw");
}

#[test]
fn times_can_be_compared_as_text() {
    for (written, shown) in [
        ("2026-01-01T00:00:00.12Z", "2026-01-01T00:00:00.120000000Z"),
        ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00.000000000Z"),
        ("2026-01-01T00:00:00.123456789+01:00", "2026-01-01T00:00:00.123456789+01:00"),
        ("2026-01-01T00:00:00.1-05:00", "2026-01-01T00:00:00.100000000-05:00"),
        ("yesterday", "yesterday"),
    ] {
        let mut renderer = Renderer::new(&Wanted { timestamps: true, ..Default::default() });
        let mut output = Vec::new();
        renderer.render(format!("{written} stdout F x").as_bytes(), &mut output);
        assert_eq!(String::from_utf8(output).unwrap(), format!("{shown} x\n"));
    }
}

#[test]
fn the_end_of_a_log_is_the_end_of_its_text() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), LOG.repeat(100)).unwrap();
    assert_eq!(last_text(file.path(), 11).unwrap(), b"ps\no\n\nfour\n");
    assert!(last_text(Path::new("/nonexistent"), 10).is_err());
    let lines = |numbers: std::ops::Range<u32>, before: &str| -> String {
        numbers.map(|n| format!("{before}{n}\n")).collect()
    };
    std::fs::write(file.path(), lines(0..100, "2026-01-01T00:00:01Z stdout F ")).unwrap();
    let text = String::from_utf8(last_text(file.path(), 2048).unwrap()).unwrap();
    assert_eq!(text, lines(20..100, ""), "no more lines than the kubelet takes");
}

#[tokio::test]
async fn following_ends_with_the_container() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), LOG).unwrap();
    let running = AtomicBool::new(true);
    let (sender, mut receiver) = mpsc::channel(100);
    let wanted = Wanted { follow: true, tail_lines: Some(1), ..Default::default() };
    let reader = follow::send(file.path(), &wanted, &sender, || running.load(Ordering::SeqCst));
    let writer = async {
        assert_eq!(receiver.recv().await.as_deref(), Some(&b"four\n"[..]));
        let mut log = tokio::fs::OpenOptions::new().append(true).open(file.path()).await.unwrap();
        log.write_all(b"2026-01-01T00:00:05Z stdout F fi").await.unwrap();
        log.flush().await.unwrap();
        log.write_all(b"ve\n").await.unwrap();
        log.flush().await.unwrap();
        assert_eq!(receiver.recv().await.as_deref(), Some(&b"five\n"[..]));
        running.store(false, Ordering::SeqCst);
    };
    let (read, ()) = tokio::join!(reader, writer);
    read.unwrap();
}

#[tokio::test]
async fn a_slow_follower_gets_all_files_that_are_still_there() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("0.log");
    let begin = |number: u32| {
        std::fs::write(&log, format!("2026-01-01T00:00:0{number}Z stdout F {number}\n")).unwrap();
    };
    let put_aside = |number: u32| {
        std::fs::rename(&log, log.with_file_name(format!("0.log.20260101-00000{number}"))).unwrap();
        begin(number + 1);
    };
    begin(1);
    let running = AtomicBool::new(true);
    let (sender, mut receiver) = mpsc::channel(100);
    let wanted = Wanted { follow: true, ..Default::default() };
    let reader = follow::send(&log, &wanted, &sender, || running.load(Ordering::SeqCst));
    let writer = async {
        let mut said = async |text: &str| {
            assert_eq!(receiver.recv().await.as_deref(), Some(text.as_bytes()));
        };
        said("1\n").await;
        // All of it between two looks at the log.
        (1..=3).for_each(put_aside);
        for number in 2..=4 {
            said(&format!("{number}\n")).await;
        }
        (4..=6).for_each(put_aside);
        for old in 1..=4 {
            std::fs::remove_file(log.with_file_name(format!("0.log.20260101-00000{old}"))).unwrap();
        }
        for number in 5..=7 {
            said(&format!("{number}\n")).await;
        }
        running.store(false, Ordering::SeqCst);
    };
    let (read, ()) = tokio::join!(reader, writer);
    read.unwrap();
}

#[tokio::test]
async fn one_stream_may_be_read_alone() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), LOG).unwrap();
    let only = |stderr| Wanted { stderr: Some(stderr), ..Default::default() };
    assert_eq!(read(file.path(), only(true)).await, "oops\n");
    assert_eq!(read(file.path(), only(false)).await, "one\ntwo\n\nfour\n");
}

proptest! {
    /// Whatever is logged, the last lines are the end of the whole.
    #[test]
    fn a_tail_is_the_end_of_the_whole(
        lines in proptest::collection::vec(("[a-z ]{0,80}", any::<bool>()), 0..60), wanted in 0u64..70
    ) {
        let log: String = lines.iter().map(|(text, partial)| {
            format!("2026-01-01T00:00:00Z stdout {} {text}\n", if *partial { "P" } else { "F" })
        }).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), log).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (all, tail) = runtime.block_on(async {
            let tail = Wanted { tail_lines: Some(wanted), ..Default::default() };
            (read(file.path(), Wanted::default()).await, read(file.path(), tail).await)
        });
        prop_assert!(all.ends_with(&tail));
        let ended = tail.matches('\n').count() as u64;
        let whole = lines.iter().filter(|(_, partial)| !partial).count() as u64;
        prop_assert_eq!(ended, whole.min(wanted));
    }

    #[test]
    fn nothing_makes_the_parser_panic(bytes in any::<Vec<u8>>()) {
        let mut output = Vec::new();
        Renderer::new(&Wanted { timestamps: true, ..Default::default() }).render(&bytes, &mut output);
    }
}
