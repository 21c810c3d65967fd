//! `flows`: which connections there are and what becomes of them, from all nodes in one list.

mod names;
mod print;

use std::time::Duration;

use anyhow::{Context as _, bail};
use futures_util::StreamExt as _;
use futures_util::io::AsyncBufReadExt as _;
use mesh_model::flow::{FLOWS_PATH, Flow, FlowFilter, FlowLine, FlowLosses, FlowQuery};
use tokio::sync::mpsc;

use crate::cli::{FlowsArgs, Global, Output};
use crate::source::{NodeState, Source, Stream};
use names::PodNames;
use print::Printer;
pub(crate) use print::{text, time_of_day};

/// What is remembered is shown so far when nothing is said.
const TAIL: usize = 100;
/// How long lines of different nodes are held to be put in order.
const ORDER: Duration = Duration::from_millis(100);

/// What a node says, or that it says nothing any more.
enum Said {
    Line(FlowLine),
    Ended(String, anyhow::Result<()>),
}

/// `meshctl flows`.
pub(crate) async fn flows(global: &Global, args: FlowsArgs) -> anyhow::Result<()> {
    if !matches!(global.output, Output::Table | Output::Wide | Output::Json) {
        bail!("-o yaml and -o name are for objects: use table, wide or json here");
    }
    let source = Source::open(global).await?;
    let nodes = source.nodes(args.node.as_deref()).await?;
    let query = query(&args);
    let mut names = PodNames::new(&source);
    let mut printer = Printer::new(global.output);
    let (sender, mut said) = mpsc::channel(256);
    let ask = nodes.iter().map(|node| listen(&source, node, &query, sender.clone()));
    let ask = futures_util::future::join_all(ask);
    drop(sender);
    let print = async {
        let mut failed = vec![];
        let mut waiting: Vec<Flow> = vec![];
        loop {
            let next = if waiting.is_empty() || !args.follow {
                Ok(said.recv().await)
            } else {
                tokio::time::timeout(ORDER, said.recv()).await
            };
            match next {
                Ok(Some(Said::Line(FlowLine::Flow(flow)))) => waiting.push(*flow),
                Ok(Some(Said::Line(FlowLine::Losses(losses)))) => printer.losses(&losses),
                Ok(Some(Said::Ended(node, Err(error)))) => failed.push((node, error)),
                Ok(Some(Said::Ended(_, Ok(())))) => {}
                Ok(None) => {
                    show(&mut waiting, &mut names, &mut printer, &query.filter).await?;
                    return Ok::<_, anyhow::Error>(failed);
                }
                Err(_) => show(&mut waiting, &mut names, &mut printer, &query.filter).await?,
            }
        }
    };
    let (_, failed) = tokio::join!(ask, print);
    let failed = failed?;
    for (node, error) in &failed {
        eprintln!("meshctl: flows of {node}: {}", crate::one_line(error));
    }
    if failed.len() == nodes.len() { bail!("no node tells its flows") } else { Ok(()) }
}

fn query(args: &FlowsArgs) -> FlowQuery {
    let default = if args.follow { 0 } else { TAIL };
    FlowQuery {
        follow: args.follow,
        tail: Some(args.tail.unwrap_or(default)),
        filter: FlowFilter {
            namespace: args.namespace.clone(),
            pod: args.pod.clone(),
            service: args.service.clone(),
            verdicts: args.verdict.clone(),
            port: args.port,
            protocol: args.protocol.clone(),
        },
    }
}

/// Puts what has gathered in order and prints it. What only names from the API tell is filtered here.
async fn show(
    waiting: &mut Vec<Flow>,
    names: &mut PodNames<'_>,
    printer: &mut Printer,
    filter: &FlowFilter,
) -> anyhow::Result<()> {
    waiting.sort_by_key(|flow| flow.time_us);
    for mut flow in waiting.drain(..) {
        names.complete(&mut flow).await;
        if filter.matches(&flow) {
            printer.flow(&flow)?;
        }
    }
    Ok(())
}

async fn listen(source: &Source, node: &NodeState, query: &FlowQuery, sender: mpsc::Sender<Said>) {
    let result = lines(source, node, query, &sender).await;
    // When nobody receives any more the command is at its end.
    let _ = sender.send(Said::Ended(node.name.clone(), result)).await;
}

async fn lines(
    source: &Source,
    node: &NodeState,
    query: &FlowQuery,
    sender: &mpsc::Sender<Said>,
) -> anyhow::Result<()> {
    // Names of pods elsewhere are known here only, so that nodes cannot filter by them.
    let filter = FlowFilter { namespace: None, pod: None, ..query.filter.clone() };
    let asked = match source {
        Source::Api(_) => FlowQuery { filter, ..query.clone() },
        Source::Socket(_) => query.clone(),
    };
    let stream = source.stream(node, FLOWS_PATH, &asked).await?;
    read_lines(stream, async |line| sender.send(Said::Line(line)).await.is_ok()).await
}

/// Takes lines until there are no more, or `take` wants no more.
pub(crate) async fn read_lines(
    stream: Stream,
    mut take: impl AsyncFnMut(FlowLine) -> bool,
) -> anyhow::Result<()> {
    let mut lines = futures_util::io::BufReader::new(stream).lines();
    while let Some(line) = lines.next().await {
        let line = line.context("read flows")?;
        let line = serde_json::from_str(&line).context("understand the agent")?;
        if !take(line).await {
            break;
        }
    }
    Ok(())
}

/// What is new about a node's losses, in words.
fn describe_losses(before: Option<&FlowLosses>, now: &FlowLosses) -> Vec<String> {
    let Some(before) = before else {
        return now.lacking.iter().map(|lacking| format!("{}: {lacking}", now.node)).collect();
    };
    let lost = now.lost.saturating_sub(before.lost);
    let limited = now.limited.saturating_sub(before.limited);
    let mut text = vec![];
    if lost > 0 {
        text.push(format!(
            "{}: {lost} events lost: they came faster than they were read",
            now.node
        ));
    }
    if limited > 0 {
        text.push(format!("{}: {limited} more drops were only counted", now.node));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_told_when_they_grow() {
        let losses = |lost, limited| FlowLosses {
            node: "a".parse().unwrap(),
            lost,
            limited,
            lacking: vec!["no kernel drops".to_owned()],
        };
        assert_eq!(describe_losses(None, &losses(9, 9)), ["a: no kernel drops"]);
        assert!(describe_losses(Some(&losses(9, 9)), &losses(9, 9)).is_empty());
        let text = describe_losses(Some(&losses(9, 9)), &losses(12, 10));
        assert_eq!(text.len(), 2);
        assert!(text[0].starts_with("a: 3 events lost"), "{text:?}");
        assert!(text[1].starts_with("a: 1 more drops"), "{text:?}");
    }
}
