//! `meshctl`: what an operator types to see where traffic goes, to check that it gets there, and to change it.
//!
//! Reads a kubeconfig like kubectl does; what only a node knows comes through the API's node proxy, or straight
//! from the agent's socket when the control service is away (`--socket`). stdout is data only; an error is one
//! line that names the cause and the cure.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser as _;

mod check;
mod cli;
mod connect;
mod flows;
mod logs;
mod manifest;
mod node;
mod objects;
mod output;
mod routes;
mod source;
mod token;
mod trace;
mod why;

use cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        eprintln!("meshctl: the TLS library was set up twice; this is a bug");
        return ExitCode::FAILURE;
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("meshctl: start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(cli)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("meshctl: {}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// The causes in one line, without repeating what a cause already says.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string().replace('\n', " ");
        if line.contains(&text) {
            continue;
        }
        if !line.is_empty() {
            line.push_str(": ");
        }
        line.push_str(&text);
    }
    line
}

async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let global = &cli.global;
    match cli.command {
        Command::Routes(args) => routes::routes(global, args).await?,
        Command::Services(args) => routes::services(global, args).await?,
        Command::Peers(args) => routes::peers(global, args).await?,
        Command::Flows(args) => flows::flows(global, args).await?,
        Command::Trace(args) => return trace::trace(global, args).await,
        Command::Why(args) => return why::why(global, args).await,
        Command::Check(args) => return check::check(global, args).await,
        Command::Node(args) => return node::node(global, args).await,
        Command::Apply(args) => objects::apply(global, args).await?,
        Command::Get(args) => objects::show(global, args).await?,
        Command::Delete(args) => objects::delete(global, args).await?,
        Command::Logs(args) => logs::logs(global, args).await?,
        Command::Token(args) => token::token(args)?,
        Command::Completion(args) => cli::completion(args),
    }
    Ok(ExitCode::SUCCESS)
}
