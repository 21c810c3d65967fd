//! The workload that examples and end-to-end tests run in pods: one static binary, few jobs.
//!
//! `serve` answers HTTP, TCP and UDP and says who it is; `pause` keeps a sandbox alive; `load`, `get` and `probe` are
//! the clients. Owns nothing but its sockets. Never does: anything with the cluster; it does not know that
//! there is one.
#![forbid(unsafe_code)]

mod args;
mod client;
mod load;
mod outcome;
mod pause;
mod probe;
mod sctp;
mod serve;
mod signals;

use std::process::ExitCode;

use args::Args;

const HELP: &str = "\
mesh-hello: a small workload for trying a cluster network

  mesh-hello serve                        HTTP on 8080, TCP echo on 9000, UDP echo on 9001
      --http PORT, --tcp PORTS, --udp PORTS   other ports: one, or several with commas; 0 for any
      --sctp PORTS     SCTP packets to these ports are echoed, too; the kernel need not know SCTP
  mesh-hello pause                        wait for SIGTERM and reap zombies
  mesh-hello get URL                      one request; prints the answer
      URL: http://HOST:PORT/PATH  tcp://HOST:PORT/TEXT  udp://HOST:PORT/TEXT
  mesh-hello load URL [settings]          bounded load; prints a JSON report
      URL: as above, or dns://SERVER:53/NAME, or stream://HOST:PORT (one long TCP echo per worker)
      --secs N         how long (default 10; SIGTERM ends it earlier)
      --workers N      how many at a time (default 4)
      --rate N         requests per second, all workers together (default 100)
      --keep           keep connections (default: a new one per request)
      --host NAME      Host header (default: from the URL)
  mesh-hello probe                        whom can I reach? Reads lines `MILLISECONDS TARGET...` and answers each with a line
      TARGET: PROTOCOL/HOST/PORT/NAME; PROTOCOL is tcp4, tcp6, udp4, udp6, sctp4 or sctp6, NAME the server's host name
      answer: a letter for each target: + answered, . silence, R refused, ? somebody else, N no such name, E another error
";

fn main() -> ExitCode {
    let mut args = Args::from_env();
    let done = match args.positional().as_deref() {
        Some("serve") => serve::run(&mut args),
        Some("pause") => pause::run(),
        Some("get") => client::print_one(&mut args),
        Some("load") => load::run(&mut args),
        Some("probe") => probe::run(&args),
        Some("help" | "--help" | "-h") => {
            print!("{HELP}");
            Ok(())
        }
        _ => Err(format!("expected serve, pause, get, load or probe\n\n{HELP}")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("mesh-hello: {why}");
            ExitCode::FAILURE
        }
    }
}
