//! The workload that examples and end-to-end tests run in pods: one static binary, three jobs.
//!
//! `serve` answers HTTP, TCP and UDP and says who it is; `pause` keeps a sandbox alive; `load`, `get` and `hold` are
//! the clients. Owns nothing but its sockets. Never does: anything with the cluster; it does not know that
//! there is one.
#![forbid(unsafe_code)]

mod args;
mod client;
mod load;
mod outcome;
mod pause;
mod serve;
mod signals;

use std::process::ExitCode;

use args::Args;

const HELP: &str = "\
mesh-hello: a small workload for trying a cluster network

  mesh-hello serve                        HTTP on 8080, TCP echo on 9000, UDP echo on 9001
      --http PORT, --tcp PORT, --udp PORT   other ports; 0 for any
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
";

fn main() -> ExitCode {
    let mut args = Args::from_env();
    let done = match args.positional().as_deref() {
        Some("serve") => serve::run(&mut args),
        Some("pause") => pause::run(),
        Some("get") => client::print_one(&mut args),
        Some("load") => load::run(&mut args),
        Some("help" | "--help" | "-h") => {
            print!("{HELP}");
            Ok(())
        }
        _ => Err(format!("expected serve, pause, get or load\n\n{HELP}")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("mesh-hello: {why}");
            ExitCode::FAILURE
        }
    }
}
