//! From the command line to the part of the program that it names.

use std::io;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser as _;
use tracing_subscriber::EnvFilter;

use crate::cli::{Cli, Command, DnsArgs, IngressArgs, OverlayArgs, RelayArgs};
use crate::errors::chain;
use crate::settings::Settings;
use crate::{reset, run};

/// Runs what the command line says, and returns when it ends.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    log_to_stderr();
    // Only fails when there is a default already, which is the same one.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let result = match cli.command {
        None => agent(cli.settings),
        Some(Command::Run(settings)) => agent(*settings),
        Some(Command::Reset(settings)) => clean(*settings),
        Some(Command::Dns(args)) => dns(args),
        Some(Command::Ingress(args)) => ingress(args),
        Some(Command::Overlay(args)) => overlay(args),
        Some(Command::Relay(args)) => relay(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let text = chain(error.as_ref());
            tracing::error!(error = text, "ended");
            ExitCode::FAILURE
        }
    }
}

/// Libraries that say something about each question or each failed call, unless they are asked for by name.
const QUIET: &str = "hickory_server=warn,hickory_resolver=warn,kube_client=off";

/// `MESH_LOG` filters, as `RUST_LOG` does elsewhere; `MESH_LOG_FORMAT=json` is for machines.
fn log_to_stderr() {
    let wanted = std::env::var("MESH_LOG").unwrap_or_else(|_| "info".to_owned());
    let filter = EnvFilter::new(format!("{QUIET},{wanted}"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    if std::env::var("MESH_LOG_FORMAT").is_ok_and(|format| format == "json") {
        log.json().init();
    } else {
        log.with_ansi(false).with_target(false).init();
    }
}

fn agent(settings: Settings) -> anyhow::Result<()> {
    let options = settings.resolve()?;
    mesh_worker::memory::share();
    let threads = std::thread::available_parallelism().map_or(1, usize::from).clamp(2, 4);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .thread_keep_alive(Duration::from_secs(2))
        .enable_all()
        .build()
        .context("start the runtime")?;
    let result = runtime.block_on(run::run(options));
    // What still runs in the background must not delay the end: it is all repeatable.
    runtime.shutdown_background();
    result
}

fn clean(mut settings: Settings) -> anyhow::Result<()> {
    // Nothing that is removed depends on the node's addresses.
    settings.node_ip.get_or_insert_default();
    let options = settings.resolve()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(reset::reset(&options))
}

fn dns(args: DnsArgs) -> anyhow::Result<()> {
    Ok(mesh_dns::run(mesh_dns::WorkerOptions {
        control_socket: args.paths.control_socket,
        state_file: args.paths.state_file,
        listen: args.listen,
    })?)
}

fn ingress(args: IngressArgs) -> anyhow::Result<()> {
    let mut options =
        mesh_ingress::WorkerOptions::new(args.paths.control_socket, args.paths.state_file);
    options.http = args.http;
    options.https = args.https;
    options.proxy.timeouts.drain = Duration::from_secs(args.drain_secs);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(mesh_ingress::run(options))?)
}

fn overlay(args: OverlayArgs) -> anyhow::Result<()> {
    Ok(mesh_overlay::worker::run(&mesh_overlay::worker::WorkerOptions {
        socket: args.paths.control_socket,
        state: args.paths.state_file,
        device: args.device,
        private_key: args.private_key,
    })?)
}

fn relay(args: RelayArgs) -> anyhow::Result<()> {
    Ok(mesh_overlay::relay::run(&mesh_overlay::relay::RelayOptions {
        socket: args.paths.control_socket,
        state: args.paths.state_file,
    })?)
}
