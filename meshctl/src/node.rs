//! `node`: what is done to one node.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::bail;
use http::Method;
use mesh_model::report::{KeysReport, NodeReport};

use crate::cli::{Global, NodeArgs, NodeCommand, Output, RotateKeyArgs};
use crate::output;
use crate::source::{NodeState, Source};

mod drain;

const PAUSE: Duration = Duration::from_millis(250);
/// Exit status while nodes are waited for.
const WAITING: u8 = 3;

/// `meshctl node`.
pub(crate) async fn node(global: &Global, args: NodeArgs) -> anyhow::Result<ExitCode> {
    match args.what {
        NodeCommand::RotateKey(args) => return rotate_key(global, &args).await,
        NodeCommand::Cordon(args) => drain::cordon(global, &args, true).await?,
        NodeCommand::Uncordon(args) => drain::cordon(global, &args, false).await?,
        NodeCommand::Drain(args) => drain::drain(global, &args).await?,
        NodeCommand::Reset(args) => drain::reset(global, &args).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn rotate_key(global: &Global, args: &RotateKeyArgs) -> anyhow::Result<ExitCode> {
    let source = Source::open(global).await?;
    let Some(node) = source.nodes(Some(&args.node)).await?.into_iter().next() else {
        bail!("no node {:?}: see `meshctl get nodes`", args.node);
    };
    let before: KeysReport = source.ask(&node, Method::POST, "/mesh/v1/rotate-key").await?;
    let keys = wait(&source, &node, &before, Duration::from_secs(args.wait)).await?;
    let done = is_done(&before, &keys);
    match global.output {
        Output::Table | Output::Wide => println!("{}", sentence(&node.name, &keys, done)),
        other => output::report(other, &keys, || {})?,
    }
    Ok(if done { ExitCode::SUCCESS } else { ExitCode::from(WAITING) })
}

/// How it stands when it is done, or the time is over. An agent that does not answer for a moment is asked again.
async fn wait(
    source: &Source,
    node: &NodeState,
    before: &KeysReport,
    limit: Duration,
) -> anyhow::Result<KeysReport> {
    let start = Instant::now();
    loop {
        let answer: anyhow::Result<NodeReport> =
            source.ask(node, Method::GET, "/mesh/v1/status").await;
        let over = start.elapsed() >= limit;
        match answer {
            Ok(report) if over || is_done(before, &report.keys) => return Ok(report.keys),
            Err(error) if over => return Err(error),
            _ => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// The key that was in use is gone.
fn is_done(before: &KeysReport, now: &KeysReport) -> bool {
    let old = before.public.first();
    !now.replacing && now.public.len() == 1 && now.public.first() != old
}

fn sentence(node: &str, keys: &KeysReport, done: bool) -> String {
    let newest = keys.public.last().map_or("?".to_owned(), ToString::to_string);
    let waiting: Vec<&str> = keys.waiting_for.iter().map(|name| name.as_str()).collect();
    match (done, waiting.as_slice()) {
        (true, _) => format!("{node} has the key {newest}"),
        (false, []) => format!("{node} is getting another key; see `meshctl peers -o wide`"),
        (false, waiting) => {
            let waiting = waiting.join(", ");
            format!("{node} goes on with both keys until {waiting} know {newest}")
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_model::snapshot::WgKey;

    use super::*;

    fn keys(public: &[u8], replacing: bool) -> KeysReport {
        let public = public.iter().map(|n| WgKey([*n; 32])).collect();
        KeysReport { public, replacing, waiting_for: vec![] }
    }

    #[test]
    fn done_is_another_key_alone() {
        let before = keys(&[1], true);
        assert!(!is_done(&before, &keys(&[1], true)), "not begun");
        assert!(!is_done(&before, &keys(&[1], false)), "an agent that was killed before it began");
        assert!(!is_done(&before, &keys(&[1, 2], true)));
        assert!(is_done(&before, &keys(&[2], false)));
        let both = keys(&[1, 2], true);
        assert!(is_done(&both, &keys(&[2], false)), "one that was under way");
    }

    #[test]
    fn it_says_who_is_waited_for() {
        let mut waiting = keys(&[1, 2], true);
        waiting.waiting_for = vec!["node-3".parse().unwrap()];
        assert!(sentence("node-1", &waiting, false).contains("until node-3 know AgIC"));
    }
}
