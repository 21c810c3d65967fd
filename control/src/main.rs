//! `mesh-control`: command line, logs, signals. Everything else is in the library.
#![forbid(unsafe_code)]

use std::io::IsTerminal as _;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use mesh_control::pki::DEFAULT_LIFETIME;
use mesh_control::preshared::DEFAULT_ROTATION;
use mesh_control::server::{DEFAULT_LISTEN, Options, Server};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// The control service of a Mesh cluster: the Kubernetes API, address assignment, scheduler, controllers, CA.
#[derive(Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  mesh-control serve
  mesh-control serve --data-dir /srv/mesh --listen 10.0.0.1:6443
  mesh-control serve --advertise-address 203.0.113.7 --cluster-config plan.yaml

Files in the data folder: admin.kubeconfig (for kubectl), join-token (for nodes), ca.crt, ca.key, store.redb.
The word `serve` may be left out."
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: Serve,
}

#[derive(Subcommand)]
enum Command {
    /// Serve until SIGTERM
    Serve(Serve),
}

#[derive(Args)]
struct Serve {
    /// Where everything is kept
    #[arg(
        long,
        value_name = "DIR",
        default_value = "/var/lib/mesh-control",
        env = "MESH_CONTROL_DATA_DIR"
    )]
    data_dir: PathBuf,
    /// Address and port to listen on
    #[arg(long, value_name = "ADDRESS:PORT", default_value_t = DEFAULT_LISTEN)]
    listen: SocketAddr,
    /// Address at which nodes and people reach this service; may be repeated
    ///
    /// The first one goes into admin.kubeconfig, all of them into the serving certificate.
    /// Default: the address of --listen, or the one that leads to the default route.
    #[arg(long = "advertise-address", value_name = "IP")]
    advertise_address: Vec<IpAddr>,
    /// File with the cluster's address plan (YAML or JSON), for the first start
    ///
    /// Fields: domain, podCidrs, nodePrefixV4, nodePrefixV6, serviceCidrs, dnsVips, nodePorts, overlayPort, externalIpCidrs,
    /// loadBalancerCidrs.
    #[arg(long, value_name = "FILE")]
    cluster_config: Option<PathBuf>,
    /// How often the keys that pairs of nodes share are replaced
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_ROTATION.as_secs(), value_parser = clap::value_parser!(u64).range(1..=86_400))]
    preshared_key_rotation: u64,
    /// For how long certificates are made: shorter ones show in a test how they are renewed
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_LIFETIME.as_secs(), value_parser = clap::value_parser!(u64).range(1..=DEFAULT_LIFETIME.as_secs()), hide = true)]
    certificate_lifetime: u64,
    /// What to log, such as info or mesh_control=debug
    #[arg(long, value_name = "FILTER", default_value = "info", env = "MESH_LOG")]
    log: String,
    /// How to log
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    /// For people
    Text,
    /// One JSON object per line
    Json,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let args = match cli.command {
        Some(Command::Serve(args)) => args,
        None => cli.serve,
    };
    start_logs(&args)?;
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("a TLS provider is installed already"))?;
    let runtime = tokio::runtime::Runtime::new().context("start the runtime")?;
    runtime.block_on(serve(args))
}

async fn serve(args: Serve) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let options = Options {
        data_dir: args.data_dir,
        listen: args.listen,
        advertise: args.advertise_address,
        cluster_config: args.cluster_config,
        preshared_key_rotation: Duration::from_secs(args.preshared_key_rotation),
        certificate_lifetime: Duration::from_secs(args.certificate_lifetime),
    };
    let server = Server::start(options).await?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    server.stop().await;
    Ok(())
}

fn start_logs(args: &Serve) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&args.log).with_context(|| format!("--log {:?}", args.log))?;
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match args.log_format {
        LogFormat::Text => logs.init(),
        LogFormat::Json => logs.json().init(),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_documented_command_exists() {
        mesh_tests::documented::assert_exist("mesh-control", Cli::try_parse_from);
    }
}
