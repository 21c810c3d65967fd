//! `check`: every node probes every hop, and what is broken is named with its cure.

use std::process::ExitCode;

use http::Method;
use mesh_model::report::CheckStep;
use serde::Serialize;

use crate::cli::{CheckArgs, CheckWhat, Global};
use crate::output;
use crate::source::{NodeState, Source};

mod encryption;

/// A step and the node that took it.
#[derive(Serialize)]
struct Row {
    node: String,
    #[serde(flatten)]
    step: CheckStep,
}

/// `meshctl check`. Exit status 1 when a step failed.
pub(crate) async fn check(global: &Global, args: CheckArgs) -> anyhow::Result<ExitCode> {
    if let Some(CheckWhat::Encryption(args)) = args.what {
        return encryption::check(global, args).await;
    }
    let source = Source::open(global).await?;
    let nodes = source.nodes(args.node.as_deref()).await?;
    let mut rows = Vec::new();
    for node in &nodes {
        let steps = one_node(&source, node).await;
        rows.extend(steps.into_iter().map(|step| Row { node: node.name.clone(), step }));
    }
    let failed = rows.iter().filter(|r| !r.step.ok).count();
    let total = rows.len();
    if args.failed {
        rows.retain(|r| !r.step.ok);
    }
    output::report(global.output, &rows, || {
        print_table(&rows);
        match failed {
            0 => println!("\nAll {total} probes from {} nodes succeeded.", nodes.len()),
            _ => println!("\n{failed} of {total} probes failed."),
        }
    })?;
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn one_node(source: &Source, node: &NodeState) -> Vec<CheckStep> {
    let mut steps = Vec::new();
    if !node.ready {
        steps.push(CheckStep {
            hop: "node".to_owned(),
            target: node.name.clone(),
            ok: false,
            detail: "not Ready".to_owned(),
            cure: format!("see `meshctl get node {} -o yaml`, status.conditions", node.name),
        });
    }
    match source.ask::<Vec<CheckStep>>(node, Method::POST, "/mesh/v1/check").await {
        Ok(more) => steps.extend(more),
        Err(error) => steps.push(CheckStep {
            hop: "agent".to_owned(),
            target: node.name.clone(),
            ok: false,
            detail: format!("{error:#}"),
            cure: "is mesh-agent running there? its log says why not".to_owned(),
        }),
    }
    steps
}

fn print_table(rows: &[Row]) {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let step = &row.step;
            vec![
                row.node.clone(),
                step.hop.clone(),
                step.target.clone(),
                if step.ok { "ok" } else { "FAILED" }.to_owned(),
                if step.ok {
                    step.detail.clone()
                } else {
                    format!("{} -> {}", step.detail, step.cure)
                },
            ]
        })
        .collect();
    output::table(&["NODE", "HOP", "TARGET", "RESULT", "DETAIL"], &cells);
}
