//! Bounded load: workers that send at a given rate for a given time, and one report.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::args::Args;
use crate::client::{self, Http, Target};
use crate::outcome::Outcome;
use crate::signals::EndSignals;

const MAX_SECS: u64 = 3600;
const MAX_WORKERS: u32 = 256;

struct Plan {
    target: Target,
    address: SocketAddr,
    keep: bool,
    host: Option<String>,
    pause: Duration,
    end: Instant,
    stop: AtomicBool,
}

impl Plan {
    fn over(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || Instant::now() >= self.end
    }
}

/// `load URL`: prints the report when the time is over or at SIGTERM.
pub(crate) fn run(args: &mut Args) -> Result<(), String> {
    let signals = EndSignals::hold()?;
    let url = args.positional().ok_or("load needs a URL")?;
    let secs = args.setting("--secs", 10u64)?.min(MAX_SECS);
    let workers = args.setting("--workers", 4u32)?.clamp(1, MAX_WORKERS);
    let rate = args.setting("--rate", 100u32)?.max(1);
    let (host, keep) = (args.optional("--host")?, args.switch("--keep"));
    args.finish()?;
    let target = Target::parse(&url)?;
    let address = target.resolve().map_err(|e| format!("resolve {}: {e}", target.authority))?;
    let start = Instant::now();
    let plan = Arc::new(Plan {
        target,
        address,
        keep,
        host,
        pause: Duration::from_secs(1) * workers / rate,
        end: start + Duration::from_secs(secs),
        stop: AtomicBool::new(false),
    });
    let work: Work = match plan.target.scheme.as_str() {
        "http" => http_worker,
        "tcp" => |plan| exchange_worker(plan, |p| client::tcp_exchange(p.address, "whoami")),
        "udp" => |plan| exchange_worker(plan, |p| client::udp_exchange(p.address, "whoami")),
        "dns" => |plan| {
            exchange_worker(plan, |p| client::dns_exchange(p.address, &p.target).map(drop_text))
        },
        "stream" => stream_worker,
        other => return Err(format!("{url}: cannot speak {other}")),
    };
    let threads: Vec<_> = (0..workers)
        .map(|n| {
            let plan = plan.clone();
            thread::spawn(move || {
                // Spread over the interval, so that the rate is even from the start.
                thread::sleep(plan.pause * n / workers);
                work(&plan)
            })
        })
        .collect();
    signals.ended_within(Some(plan.end.saturating_duration_since(Instant::now())));
    plan.stop.store(true, Ordering::Relaxed);
    let end = Instant::now();
    let mut total = Outcome::default();
    for thread in threads {
        total.merge(thread.join().map_err(|_| "a worker panicked".to_owned())?);
    }
    println!("{}", total.report(start, end));
    Ok(())
}

type Work = fn(&Plan) -> Outcome;

fn drop_text(_: String) -> String {
    String::new()
}

/// Calls `once` at the plan's pace: a slow answer is followed by a quicker succession, up to one interval.
fn paced(plan: &Plan, mut once: impl FnMut(&mut Outcome)) -> Outcome {
    let mut outcome = Outcome::default();
    let mut next = Instant::now();
    while !plan.over() {
        once(&mut outcome);
        next = (next + plan.pause).max(Instant::now().checked_sub(plan.pause).unwrap_or(next));
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    outcome
}

fn http_worker(plan: &Plan) -> Outcome {
    let mut http = Http::new(&plan.target, plan.host.as_deref(), plan.keep);
    paced(plan, |outcome| {
        let start = Instant::now();
        match http.exchange(plan.address) {
            Ok((200, body)) => {
                outcome.ok(start.elapsed(), field(&body, "host"), field(&body, "version"));
            }
            Ok((status, body)) => outcome.failed(&format!("status {status}"), body),
            Err(e) => outcome.failed(kind(&e), e.to_string()),
        }
    })
}

fn exchange_worker(plan: &Plan, exchange: fn(&Plan) -> io::Result<String>) -> Outcome {
    paced(plan, |outcome| {
        let start = Instant::now();
        match exchange(plan) {
            Ok(host) => outcome.ok(start.elapsed(), &host, ""),
            Err(e) => outcome.failed(kind(&e), e.to_string()),
        }
    })
}

/// One long connection: numbered lines that must come back in order. A reset ends it and counts once.
fn stream_worker(plan: &Plan) -> Outcome {
    let connect = || -> io::Result<TcpStream> {
        let stream = TcpStream::connect_timeout(&plan.address, client::LIMIT)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        Ok(stream)
    };
    let mut stream = connect();
    let mut number = 0u64;
    paced(plan, |outcome| {
        let start = Instant::now();
        number += 1;
        let echoed = match &mut stream {
            Ok(stream) => echo_line(stream, number),
            Err(e) => Err(io::Error::new(e.kind(), e.to_string())),
        };
        match echoed {
            Ok(()) => outcome.ok(start.elapsed(), "", ""),
            Err(e) => {
                outcome.failed(kind(&e), format!("line {number}: {e}"));
                stream = connect();
            }
        }
    })
}

fn echo_line(stream: &mut TcpStream, number: u64) -> io::Result<()> {
    let line = format!("{number:016}\n");
    stream.write_all(line.as_bytes())?;
    let mut back = [0; 17];
    stream.read_exact(&mut back)?;
    if back == line.as_bytes() { Ok(()) } else { Err(io::Error::other("another line came back")) }
}

fn field<'a>(json: &'a str, name: &str) -> &'a str {
    let mark = format!("\"{name}\":\"");
    let Some(at) = json.find(&mark) else { return "" };
    json[at + mark.len()..].split('"').next().unwrap_or_default()
}

fn kind(e: &io::Error) -> &'static str {
    use io::ErrorKind as K;
    match e.kind() {
        K::ConnectionRefused => "refused",
        K::ConnectionReset => "reset",
        K::WouldBlock | K::TimedOut => "timeout",
        K::UnexpectedEof => "closed",
        K::HostUnreachable | K::NetworkUnreachable => "unreachable",
        K::PermissionDenied => "denied",
        K::BrokenPipe => "broken pipe",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_the_description() {
        let json = "{\"host\":\"hello-1\",\"version\":\"2\"}";
        assert_eq!(field(json, "host"), "hello-1");
        assert_eq!(field(json, "version"), "2");
        assert_eq!(field("ok\n", "host"), "");
    }
}
