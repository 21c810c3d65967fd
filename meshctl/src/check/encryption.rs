//! `check encryption`: canaries from node to node, and who could read them.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::bail;
use futures_util::StreamExt as _;
use mesh_model::encryption::{
    FINISH_PATH, Findings, Finish, Mark, SEND_PATH, Sending, Sent, WATCH_PATH, Watch, Watching,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use self::judge::{Evidence, Outcome, Verdict};
use self::plan::{Plan, Route};
use self::service::CheckService;
use crate::cli::{EncryptionArgs, Global};
use crate::output;
use crate::source::{NodeState, Source};

mod judge;
mod plan;
mod service;

/// Nodes that are spoken to at the same time.
const AT_ONCE: usize = 32;
/// What starting and ending takes, beside sending.
const MARGIN_SECS: u16 = 30;

/// What each node said, or why it said nothing.
type Said<T> = BTreeMap<String, Result<T, String>>;

/// `meshctl check encryption`.
pub(crate) async fn check(global: &Global, args: EncryptionArgs) -> anyhow::Result<ExitCode> {
    let source = Source::open(global).await?;
    let Source::Api(api) = &source else {
        bail!("canaries go from node to node: leave out --socket, this needs the API");
    };
    let nodes = source.nodes(None).await?;
    if let Some(only) = args.node.as_ref().filter(|&only| nodes.iter().all(|n| n.name != *only)) {
        bail!("no node {only:?}: see `meshctl get nodes`");
    }
    let mark = random()?;
    let watch = Watch { mark, secs: args.secs + MARGIN_SECS };
    let watching: Said<Watching> = tell_all(&source, &nodes, WATCH_PATH, |_| Some(&watch)).await;
    let service = match args.no_service {
        true => None,
        false => Some(CheckService::create(api, mark, &watching).await),
    };
    let checked = tokio::select! {
        evidence = send(&source, &nodes, (mark, &args), watching, &service) => Some(evidence),
        _ = tokio::signal::ctrl_c() => None,
    };
    // Whatever came of it: what the check made goes away with it. Captures end on their own, too.
    let removed = match &service {
        Some(Ok(service)) => service.remove(api).await,
        _ => Ok(()),
    };
    let Some((plan, evidence)) = checked else {
        removed?;
        bail!("interrupted");
    };
    let verdicts = judge::judge(&nodes, &plan, &evidence);
    output::report(global.output, &verdicts, || print_table(&verdicts))?;
    removed?;
    Ok(exit_code(&verdicts))
}

async fn send(
    source: &Source,
    nodes: &[NodeState],
    (mark, args): (Mark, &EncryptionArgs),
    watching: Said<Watching>,
    service: &Option<Result<CheckService, String>>,
) -> (Plan, Evidence) {
    let route = match service {
        None => Route::Straight,
        Some(Ok(service)) => {
            // One that does not know it in time shows as canaries that do not arrive.
            futures_util::stream::iter(nodes)
                .for_each_concurrent(AT_ONCE, |node| service.wait_known(source, node))
                .await;
            Route::Both(service)
        }
        Some(Err(why)) => Route::Missing(why.clone()),
    };
    let plan = Plan::new(&watching, args.node.as_deref(), &route);
    let sendings: BTreeMap<&str, Sending> =
        nodes.iter().map(|n| (n.name.as_str(), plan.of(&n.name, mark, args.secs))).collect();
    let sent: Said<Sent> =
        tell_all(source, nodes, SEND_PATH, |n| sendings.get(n.name.as_str())).await;
    let finish = Finish { mark };
    let findings: Said<Findings> = tell_all(source, nodes, FINISH_PATH, |_| Some(&finish)).await;
    (plan, Evidence { watching, sent, findings })
}

async fn tell_all<'m, M: Serialize + 'm, T: DeserializeOwned>(
    source: &Source,
    nodes: &[NodeState],
    path: &str,
    message: impl Fn(&NodeState) -> Option<&'m M>,
) -> Said<T> {
    let tell = |node: &NodeState| {
        let (node, message) = (node.clone(), message(node));
        async move {
            let answer = match message {
                Some(message) => source.tell(&node, path, message).await,
                None => Err(anyhow::anyhow!("nothing to say")),
            };
            (node.name, answer.map_err(|error| crate::one_line(&error)))
        }
    };
    let asked: Vec<_> = nodes.iter().map(tell).collect();
    futures_util::stream::iter(asked).buffer_unordered(AT_ONCE).collect().await
}

fn random() -> anyhow::Result<Mark> {
    let mut bytes = [0; 16];
    let random = rustls::crypto::aws_lc_rs::default_provider().secure_random;
    random.fill(&mut bytes).map_err(|_| anyhow::anyhow!("the system gives no random bytes"))?;
    Ok(Mark(bytes))
}

fn print_table(verdicts: &[Verdict]) {
    let rows: Vec<Vec<String>> = verdicts
        .iter()
        .map(|v| {
            let outcome = v.outcome.to_string();
            vec![v.from.clone(), v.to.clone(), v.family.to_string(), outcome, v.detail.clone()]
        })
        .collect();
    output::table(&["FROM", "TO", "FAMILY", "RESULT", "DETAIL"], &rows);
    let count = |outcome| verdicts.iter().filter(|v| v.outcome == outcome).count();
    let (readable, unknown) = (count(Outcome::Plaintext), count(Outcome::Unknown));
    println!();
    match (verdicts.len(), readable, unknown) {
        (0, ..) => println!("There is one node only: nothing goes between nodes."),
        (all, 0, 0) => println!("Nothing could be read between nodes: {all} of {all} are ok."),
        (all, readable, unknown) => {
            println!("Of {all}, {readable} could be read; of {unknown} one cannot tell.");
        }
    }
}

/// The one table of this command's exit codes.
fn exit_code(verdicts: &[Verdict]) -> ExitCode {
    let any = |outcome| verdicts.iter().any(|v| v.outcome == outcome);
    match (any(Outcome::Plaintext), any(Outcome::Unknown)) {
        (true, _) => ExitCode::from(1),
        (false, true) => ExitCode::from(3),
        (false, false) => ExitCode::SUCCESS,
    }
}
