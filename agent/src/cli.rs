//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use mesh_model::wellknown;

use crate::settings::{DRAIN_SECS, LONGEST_DRAIN_SECS, Settings};

/// The agent of a Mesh node.
#[derive(Debug, Parser)]
#[command(
    name = "mesh-agent",
    version,
    max_term_width = 100,
    args_conflicts_with_subcommands = true
)]
#[command(
    after_help = "Examples:\n  mesh-agent --server https://10.0.0.1:6443 --token mesh1.…\n  mesh-agent --config /etc/mesh/agent.yaml\n  mesh-agent reset\n\nLogs go to stderr. MESH_LOG says what is logged, such as debug or info,mesh_agent::pods=debug [default: info];\nMESH_LOG_FORMAT=json makes each line a JSON object."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) settings: Settings,
}

/// The commands; without one, the agent itself runs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the agent (the default)
    Run(Box<Settings>),
    /// Worker: the node's DNS server (started by the agent)
    Dns(DnsArgs),
    /// Worker: the node's L7 proxy (started by the agent)
    Ingress(IngressArgs),
    /// Worker: user-space WireGuard (started by the agent)
    Overlay(OverlayArgs),
    /// Worker: forwards between nodes that cannot reach each other (started by the agent)
    Relay(RelayArgs),
    /// Stop the workers and remove everything that the agent made on this node
    Reset(Box<Settings>),
}

/// Paths that each worker has.
#[derive(Debug, Clone, Args)]
pub(crate) struct WorkerPaths {
    /// Where the agent speaks to the worker
    #[arg(long, value_name = "PATH")]
    pub(crate) control_socket: PathBuf,
    /// Where the worker keeps its last configuration
    #[arg(long, value_name = "FILE")]
    pub(crate) state_file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct DnsArgs {
    #[command(flatten)]
    pub(crate) paths: WorkerPaths,
    /// Address and port to answer on; may be given several times
    #[arg(long, required = true, value_name = "ADDRESS:PORT")]
    pub(crate) listen: Vec<SocketAddr>,
}

#[derive(Debug, Args)]
pub(crate) struct IngressArgs {
    #[command(flatten)]
    pub(crate) paths: WorkerPaths,
    /// Address and port for plain HTTP; may be given several times
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) http: Vec<SocketAddr>,
    /// Address and port for TLS; may be given several times
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) https: Vec<SocketAddr>,
    /// How long requests and tunnels may go on when the worker is asked to end
    #[arg(long, value_name = "SECONDS", default_value_t = DRAIN_SECS, value_parser = clap::value_parser!(u64).range(..=LONGEST_DRAIN_SECS))]
    pub(crate) drain_secs: u64,
}

#[derive(Debug, Args)]
pub(crate) struct OverlayArgs {
    #[command(flatten)]
    pub(crate) paths: WorkerPaths,
    /// Name of the device
    #[arg(long, default_value = wellknown::OVERLAY_DEVICE, value_name = "NAME")]
    pub(crate) device: String,
    /// The node's private key
    #[arg(long, value_name = "FILE")]
    pub(crate) private_key: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct RelayArgs {
    #[command(flatten)]
    pub(crate) paths: WorkerPaths,
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
        mesh_tests::documented::assert_exist("mesh-agent", Cli::try_parse_from);
    }
}
