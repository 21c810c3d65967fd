//! Which system calls carry trains of datagrams for the least processor time: batched calls through quinn-udp, as the
//! engine makes them, or `io_uring`? `udp_calls [SECONDS]` prints processor seconds per gigabyte for each, in turns.
//!
//! Sender and receiver are threads on one socket pair of the loopback device, which passes trains uncut. The receiver
//! tells how far it is, so that nothing is lost and both do the same work in each run.

mod quinn;
mod uring;

use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike as _};

/// Bytes of a datagram, as the overlay's at an MTU of 1500.
pub(crate) const SEGMENT: usize = 1452;

/// Datagrams of a train: the most that one message carries.
pub(crate) const TRAIN: usize = SEGMENT * 45;

/// Trains that the engine seals before it sends them.
pub(crate) const BATCH: usize = 3;

/// Sent and not received yet.
const WINDOW: u64 = 16 * TRAIN as u64;

const ROUNDS: usize = 5;

/// One end's work: sends batches, or receives, until told to stop.
type Send = fn(&UdpSocket, &Progress) -> io::Result<()>;
type Receive = fn(&UdpSocket, &Progress) -> io::Result<()>;

struct Contestant {
    name: &'static str,
    send: Send,
    receive: Receive,
}

const CONTESTANTS: [Contestant; 3] = [
    Contestant { name: "quinn-udp", send: quinn::send, receive: quinn::receive },
    Contestant { name: "io_uring", send: uring::send, receive: uring::receive },
    Contestant {
        name: "io_uring, zero copy",
        send: uring::send_zero_copy,
        receive: uring::receive,
    },
];

/// How far both ends are.
pub(crate) struct Progress {
    until: Instant,
    sent: AtomicU64,
    received: AtomicU64,
}

impl Progress {
    /// Waits until a batch may be sent; false when the time is over.
    pub(crate) fn may_send(&self) -> bool {
        while self.sent.load(Ordering::Relaxed) > self.received.load(Ordering::Acquire) + WINDOW {
            if Instant::now() > self.until {
                return false;
            }
            thread::yield_now();
        }
        Instant::now() < self.until
    }

    pub(crate) fn sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Release);
    }

    /// Whether the receiver has nothing to wait for.
    pub(crate) fn is_over(&self) -> bool {
        Instant::now() > self.until + Duration::from_millis(200)
    }
}

fn main() -> ExitCode {
    let seconds = std::env::args().nth(1).map_or(Ok(2), |word| word.parse());
    let Ok(seconds) = seconds else {
        eprintln!("usage: udp_calls [SECONDS]");
        return ExitCode::from(2);
    };
    println!("{:<22} {:>8} {:>14} {:>14}", "", "GB/s", "send CPU s/GB", "receive CPU s/GB");
    for _ in 0..ROUNDS {
        for contestant in &CONTESTANTS {
            match run(contestant, Duration::from_secs(seconds)) {
                Ok(line) => println!("{:<22} {line}", contestant.name),
                Err(error) => println!("{:<22} {error}", contestant.name),
            }
        }
    }
    ExitCode::SUCCESS
}

fn run(contestant: &Contestant, time: Duration) -> io::Result<String> {
    let receiver = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    sender.connect(receiver.local_addr()?)?;
    receiver.connect(sender.local_addr()?)?;
    socket2::SockRef::from(&receiver).set_recv_buffer_size(8 << 20)?;
    let progress = Progress {
        until: Instant::now() + time,
        sent: AtomicU64::new(0),
        received: AtomicU64::new(0),
    };
    let (sending, receiving) = thread::scope(|scope| {
        let receiving = scope.spawn(|| timed(|| (contestant.receive)(&receiver, &progress)));
        let sending = scope.spawn(|| timed(|| (contestant.send)(&sender, &progress)));
        (sending.join(), receiving.join())
    });
    let panicked = |_| io::Error::other("a thread panicked");
    let (sending, receiving) = (sending.map_err(panicked)??, receiving.map_err(panicked)??);
    let gigabytes = progress.received.load(Ordering::Acquire) as f64 / 1e9;
    let per_gigabyte = |time: Duration| time.as_secs_f64() / gigabytes;
    let (rate, sending, receiving) =
        (gigabytes / time.as_secs_f64(), per_gigabyte(sending), per_gigabyte(receiving));
    Ok(format!("{rate:>8.2} {sending:>14.3} {receiving:>14.3}"))
}

/// Processor time of this thread for it.
fn timed(work: impl FnOnce() -> io::Result<()>) -> io::Result<Duration> {
    let begun = spent()?;
    work()?;
    Ok(spent()?.saturating_sub(begun))
}

fn spent() -> io::Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_THREAD)?;
    let micros = |time: TimeVal| u64::try_from(time.num_microseconds()).unwrap_or(0);
    Ok(Duration::from_micros(micros(usage.user_time()) + micros(usage.system_time())))
}
