//! The command line.

use std::path::PathBuf;

use clap::{Args, CommandFactory as _, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use mesh_model::flow::FlowVerdict;
use mesh_model::snapshot::Protocol;

/// See and change what the nodes of a Mesh cluster do.
#[derive(Debug, Parser)]
#[command(name = "meshctl", version, max_term_width = 100, propagate_version = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// The kubeconfig to use; by default $KUBECONFIG, then ~/.kube/config
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// Ask this node's agent directly, without the control service (run it on the node, as root)
    #[arg(long, global = true, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// How to print
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
}

/// Output formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// Columns for people
    Table,
    /// More columns
    Wide,
    /// JSON for programs
    Json,
    /// YAML, for objects
    Yaml,
    /// kind/name, for objects
    Name,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Where traffic goes: ingress routes, service addresses and overlay routes
    #[command(
        after_help = "Examples:\n  meshctl routes\n  meshctl routes ingress --host shop.example.org\n  meshctl routes overlay --node node-2 -o json"
    )]
    Routes(RoutesArgs),
    /// Service addresses and the endpoints behind them, as a node has them
    #[command(
        after_help = "Examples:\n  meshctl services\n  meshctl services -n default --node node-1"
    )]
    Services(NodeFilter),
    /// The encrypted tunnels between nodes
    #[command(after_help = "Examples:\n  meshctl peers\n  meshctl peers --node node-2 -o json")]
    Peers(PeersArgs),
    /// Connections: opened, closed with their figures, refused, denied or dropped and why; of all nodes
    #[command(
        after_help = "An arrow -> is told by the side that opened it, => by the side that received it, ~> by neither.\nWhat was lost or only counted is said on stderr.\n\nExamples:\n  meshctl flows -f\n  meshctl flows -f -n default --verdict dropped,denied\n  meshctl flows --service web --port 80 --tail 1000 -o json"
    )]
    Flows(FlowsArgs),
    /// Send one marked probe from a pod or from outside, show what every node decided about it, and name what is wrong
    #[command(
        after_help = "In the timeline > goes away from the pod, < comes back, and x ends there.\nFrom an address outside, the first packet comes in to a node as if that client had sent it; the answer goes to the client.\nExit status 1 when something is wrong.\n\nExamples:\n  meshctl trace 192.0.2.7 web:80 --via node-1\n  meshctl trace web-5d4f api:80\n  meshctl trace -n shop client api.store:80 -o json\n  meshctl trace web-5d4f pod/db-0:5432\n  meshctl trace web-5d4f 10.96.0.10:53 --udp\n  meshctl trace web-5d4f api:80 --bytes 4000"
    )]
    Trace(TraceArgs),
    /// Probe every hop on every node: tunnels, service addresses, DNS, ingress, programs
    #[command(
        after_help = "Exit status 1 when something is broken.\n\nExamples:\n  meshctl check\n  meshctl check --node node-2 --failed\n  meshctl check encryption"
    )]
    Check(CheckArgs),
    /// Whether network policy lets a connection pass, and which rule says so
    #[command(
        after_help = "SRC and DST are a pod, NAMESPACE/POD or an address. Without a port, protocols that have none are meant, such as ICMP.\nNo node is asked: the policies are compiled here, as the agents do it.\n\nExit status: 0 when it passes, 3 when it is denied.\n\nExamples:\n  meshctl why shop/cart-5d4f db/postgres-0:5432\n  meshctl why cart-5d4f 198.51.100.7:53 --protocol UDP\n  meshctl why 192.0.2.9 shop/cart-5d4f:80 -o json"
    )]
    Why(WhyArgs),
    /// Look after one node
    #[command(
        after_help = "Examples:\n  meshctl node drain node-2\n  meshctl node uncordon node-2\n  meshctl node rotate-key node-2\n  meshctl node reset node-2"
    )]
    Node(NodeArgs),
    /// Create or update the objects of manifests
    #[command(
        after_help = "Examples:\n  meshctl apply -f app.yaml\n  cat app.yaml | meshctl apply -f -"
    )]
    Apply(ApplyArgs),
    /// Show objects
    #[command(
        after_help = "Examples:\n  meshctl get pods -A -o wide\n  meshctl get deploy web -o yaml"
    )]
    Get(GetArgs),
    /// Delete objects
    #[command(after_help = "Examples:\n  meshctl delete deploy web\n  meshctl delete -f app.yaml")]
    Delete(DeleteArgs),
    /// Print the log of a pod
    #[command(
        after_help = "Examples:\n  meshctl logs web-5d4f --tail 20\n  meshctl logs -n kube-system web-5d4f -c app -f"
    )]
    Logs(LogsArgs),
    /// Print the token with which a node joins (run it where mesh-control runs)
    #[command(
        after_help = "Examples:\n  meshctl token\n  meshctl token --data-dir /var/lib/mesh-control"
    )]
    Token(TokenArgs),
    /// Print a completion script for a shell
    #[command(after_help = "Examples:\n  meshctl completion bash > /etc/bash_completion.d/meshctl")]
    Completion(CompletionArgs),
}

/// Which part of the routes to show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// Ingress routes
    Ingress,
    /// Service addresses
    Services,
    /// Overlay routes
    Overlay,
}

#[derive(Debug, Args)]
pub(crate) struct RoutesArgs {
    /// Only this part
    #[arg(value_enum)]
    pub(crate) part: Option<Part>,
    /// Only ingress routes that apply to this host name
    #[arg(long)]
    pub(crate) host: Option<String>,
    #[command(flatten)]
    pub(crate) filter: NodeFilter,
}

#[derive(Debug, Clone, Default, Args)]
pub(crate) struct NodeFilter {
    /// As this node has them; by default the first ready one
    #[arg(long)]
    pub(crate) node: Option<String>,
    /// Only of this namespace
    #[arg(short, long)]
    pub(crate) namespace: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct FlowsArgs {
    /// Go on as new ones come
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Begin with so many of those that each node remembers [default: 100, with -f 0]
    #[arg(long, value_name = "EVENTS")]
    pub(crate) tail: Option<usize>,
    /// Only what this node tells; by default all nodes
    #[arg(long)]
    pub(crate) node: Option<String>,
    /// Only of pods or services of this namespace
    #[arg(short, long)]
    pub(crate) namespace: Option<String>,
    /// Only of this pod, on either side
    #[arg(long)]
    pub(crate) pod: Option<String>,
    /// Only through this service
    #[arg(long)]
    pub(crate) service: Option<String>,
    /// Only these: opened, closed, failed, datagram, refused, denied, dropped
    #[arg(long, value_delimiter = ',')]
    pub(crate) verdict: Vec<FlowVerdict>,
    /// Only to this port, of the service or of the pod
    #[arg(long)]
    pub(crate) port: Option<u16>,
    /// Only of this protocol: tcp, udp, icmp
    #[arg(long)]
    pub(crate) protocol: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct TraceArgs {
    /// The pod that it leaves, NAME or NAMESPACE/NAME, or the address of a client outside
    #[arg(value_name = "POD|ADDRESS")]
    pub(crate) source: String,
    /// To what: a service's name or an address with a port, or pod/NAME:PORT
    #[arg(value_name = "DESTINATION:PORT")]
    pub(crate) destination: String,
    /// Of a client outside: the node where the probe comes in; by default the first that is ready
    #[arg(long, value_name = "NODE")]
    pub(crate) via: Option<String>,
    /// A datagram instead of a connection
    #[arg(long)]
    pub(crate) udp: bool,
    /// How long to wait for an answer, milliseconds
    #[arg(long, value_name = "MS", default_value_t = 2000, value_parser = clap::value_parser!(u16).range(1..=5000))]
    pub(crate) wait_ms: u16,
    /// Send so many bytes, too: a way that loses large packets shows
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=8192))]
    pub(crate) bytes: u16,
    /// Namespace of pods that are given without one
    #[arg(short, long)]
    pub(crate) namespace: Option<String>,
}

impl TraceArgs {
    /// The protocol of the probe.
    pub(crate) fn protocol(&self) -> Protocol {
        if self.udp { Protocol::Udp } else { Protocol::Tcp }
    }
}

#[derive(Debug, Args)]
pub(crate) struct PeersArgs {
    /// Only the tunnels of this node; by default of all nodes
    #[arg(long)]
    pub(crate) node: Option<String>,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct CheckArgs {
    #[command(subcommand)]
    pub(crate) what: Option<CheckWhat>,
    /// Only from this node; by default from all
    #[arg(long)]
    pub(crate) node: Option<String>,
    /// Print only what is broken
    #[arg(long)]
    pub(crate) failed: bool,
}

/// Checks that take more than a probe.
#[derive(Debug, Subcommand)]
pub(crate) enum CheckWhat {
    /// Prove that nothing between nodes can be read: send canaries through pods, and look for them on the underlay
    #[command(
        after_help = "Canaries go between all nodes, over IPv4 and IPv6, by UDP and TCP, from pods and from nodes, straight and through\na service address (a Service of kube-system that exists as long as the check). Each node looks for them on all its\nways out. One more is sent beside the overlay: a node that does not see that one is not believed.\n\nExit status: 0 when nothing could be read, 1 when something could, 3 when one cannot tell.\n\nExamples:\n  meshctl check encryption\n  meshctl check encryption --node node-2 --secs 30\n  meshctl check encryption -o json"
    )]
    Encryption(EncryptionArgs),
}

#[derive(Debug, Args)]
pub(crate) struct EncryptionArgs {
    /// Only pairs of nodes with this one
    #[arg(long)]
    pub(crate) node: Option<String>,
    /// How long canaries are sent
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=45))]
    pub(crate) secs: u16,
    /// Leave out service addresses: nothing is created
    #[arg(long)]
    pub(crate) no_service: bool,
}

#[derive(Debug, Args)]
pub(crate) struct WhyArgs {
    /// Who begins the connection
    #[arg(value_name = "SRC")]
    pub(crate) from: String,
    /// Who is spoken to
    #[arg(value_name = "DST[:PORT]")]
    pub(crate) to: String,
    /// Protocol of the port; TCP when absent
    #[arg(long, value_name = "TCP|UDP|SCTP")]
    pub(crate) protocol: Option<String>,
    /// Namespace of pods without one
    #[arg(short, long)]
    pub(crate) namespace: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct NodeArgs {
    #[command(subcommand)]
    pub(crate) what: NodeCommand,
}

/// What to do with a node.
#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// Replace the node's own WireGuard key; nothing is lost on the way
    #[command(
        after_help = "Both keys serve until every other node has proved to know the new one. A node that is off is waited for: for as\nlong as it takes, unless its Node object is deleted. `meshctl peers -o wide` shows who knows it.\n\nExit status: 0 when it is replaced, 3 when nodes are still waited for.\n\nExamples:\n  meshctl node rotate-key node-2\n  meshctl node rotate-key node-2 --wait 0"
    )]
    RotateKey(RotateKeyArgs),
    /// New pods go elsewhere; those that are there stay
    #[command(after_help = "Examples:\n  meshctl node cordon node-2")]
    Cordon(CordonArgs),
    /// New pods may come again
    #[command(after_help = "Examples:\n  meshctl node uncordon node-2")]
    Uncordon(CordonArgs),
    /// Cordon the node and let its pods leave, each in its own time
    #[command(
        after_help = "Pods of a DaemonSet and static pods stay. A pod that nobody makes anew elsewhere has to be deleted with --force.\nWhat a pod keeps in an emptyDir is lost.\n\nExamples:\n  meshctl node drain node-2\n  meshctl node drain node-2 --timeout 120 --force"
    )]
    Drain(DrainArgs),
    /// Drain the node and take it out of the cluster
    #[command(
        after_help = "Afterwards, on the node, `mesh-agent reset` removes everything that the agent made; the node's key and its\ncertificate stay, so that it may come back.\n\nExamples:\n  meshctl node reset node-2"
    )]
    Reset(ResetArgs),
}

#[derive(Debug, Args)]
pub(crate) struct CordonArgs {
    /// The node
    pub(crate) node: String,
}

#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    /// The node
    pub(crate) node: String,
    /// Give up after this time; 0 waits for ever
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub(crate) timeout: u64,
    /// How long each pod may take to end; by default as long as it says itself
    #[arg(long, value_name = "SECONDS")]
    pub(crate) grace_period: Option<u64>,
    /// Also delete pods that nobody makes anew
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ResetArgs {
    #[command(flatten)]
    pub(crate) drain: DrainArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RotateKeyArgs {
    /// The node
    pub(crate) node: String,
    /// How long to wait for the end of it
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub(crate) wait: u64,
}

#[derive(Debug, Args)]
pub(crate) struct ApplyArgs {
    /// Manifest, YAML or JSON; `-` is stdin; may be given several times
    #[arg(short, long = "filename", required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// Namespace of objects that name none
    #[arg(short, long)]
    pub(crate) namespace: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct GetArgs {
    /// Kind: pods, svc, deploy, ...
    pub(crate) kind: String,
    /// Name; all when absent
    pub(crate) name: Option<String>,
    /// Namespace
    #[arg(short, long, conflicts_with = "all_namespaces")]
    pub(crate) namespace: Option<String>,
    /// All namespaces
    #[arg(short = 'A', long)]
    pub(crate) all_namespaces: bool,
    /// Only objects with these labels
    #[arg(short = 'l', long)]
    pub(crate) selector: Option<String>,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["kind", "files"]))]
pub(crate) struct DeleteArgs {
    /// Kind: pods, svc, deploy, ...
    #[arg(requires = "names")]
    pub(crate) kind: Option<String>,
    /// Names
    pub(crate) names: Vec<String>,
    /// Delete the objects of this manifest; `-` is stdin
    #[arg(short, long = "filename", value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// Namespace
    #[arg(short, long)]
    pub(crate) namespace: Option<String>,
    /// Succeed when the object does not exist
    #[arg(long)]
    pub(crate) ignore_not_found: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// The pod
    pub(crate) pod: String,
    /// The container; needed when there are several
    #[arg(short, long)]
    pub(crate) container: Option<String>,
    /// Namespace
    #[arg(short, long)]
    pub(crate) namespace: Option<String>,
    /// Go on as new lines come
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only the last lines
    #[arg(long, value_name = "LINES")]
    pub(crate) tail: Option<u64>,
    /// Of the container before its last restart
    #[arg(short, long)]
    pub(crate) previous: bool,
    /// With the time of each line
    #[arg(long)]
    pub(crate) timestamps: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TokenArgs {
    /// Data directory of mesh-control
    #[arg(long, default_value = "/var/lib/mesh-control", value_name = "DIR")]
    pub(crate) data_dir: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct CompletionArgs {
    /// The shell
    #[arg(value_enum)]
    pub(crate) shell: Shell,
}

/// Prints the completion script.
pub(crate) fn completion(args: CompletionArgs) {
    clap_complete::generate(args.shell, &mut Cli::command(), "meshctl", &mut std::io::stdout());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_documented_command_exists() {
        mesh_tests::documented::assert_exist("meshctl", Cli::try_parse_from);
    }
}
