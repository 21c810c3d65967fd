//! Channels in WebSocket messages on the client's side, SPDY streams on the runtime's.
//!
//! A client that is slow holds back the runtime, and a process that does not read holds back the client: in each
//! direction one message at most is on its way here.

use std::collections::BTreeSet;
use std::time::Duration;

use axum::http::HeaderValue;
use bytes::BytesMut;
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Message;
use tokio_util::codec::FramedRead;

use super::channel::{self, Channels, Said};
use super::spdy::{self, Frame, Frames, HeaderBlocks, SpdyError};
use super::tunnel;
use super::websocket::{self, Ending, Messages, Sink};

/// What is spoken over SPDY: the status of the process comes as JSON, the size of the terminal has a stream.
const PROTOCOL: HeaderValue = HeaderValue::from_static("v4.channel.k8s.io");
/// How long the runtime may take to accept the streams; it gives clients 30 s.
const OPEN_LIMIT: Duration = Duration::from_secs(10);
/// Answers to pings that wait; more are not worth sending.
const PONGS: usize = 8;

/// Which streams there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) stdin: bool,
    pub(super) stdout: bool,
    pub(super) stderr: bool,
    pub(super) tty: bool,
}

/// When a session is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Until {
    /// The runtime has said how the process ended, and closes.
    Told,
    /// The runtime has ended every stream.
    AllEnded,
}

/// A stream of the runtime, and the channel that it is to the client.
#[derive(Debug)]
struct Stream {
    channel: u8,
    headers: Vec<(&'static str, String)>,
    is_writable: bool,
    /// What the client is told before all else.
    greeting: Option<[u8; 2]>,
}

/// The streams of a session, in the order of their SPDY numbers 1, 3, 5...
#[derive(Debug)]
pub(super) struct Streams {
    all: Vec<Stream>,
    until: Until,
}

impl Streams {
    /// Those of a process, in the order in which runtimes expect them.
    pub(super) fn of_process(wanted: Wanted) -> Self {
        let all = [
            (channel::ERROR, "error", true),
            (channel::STDIN, "stdin", wanted.stdin),
            (channel::STDOUT, "stdout", wanted.stdout),
            (channel::STDERR, "stderr", wanted.stderr && !wanted.tty),
            (channel::RESIZE, "resize", wanted.tty),
        ];
        let stream = |(channel, name, _): (u8, &str, bool)| Stream {
            channel,
            headers: vec![("streamtype", name.to_owned())],
            is_writable: matches!(channel, channel::STDIN | channel::RESIZE),
            greeting: None,
        };
        let all = all.into_iter().filter(|(.., is)| *is).map(stream).collect();
        Self { all, until: Until::Told }
    }

    /// One connection to each port, by two streams: what is said, on channels 0, 2, 4..., and what went wrong, on the one after it.
    pub(super) fn of_ports(ports: &[u16]) -> Self {
        let pair = |(data, port): (u8, &u16)| {
            [("error", data + 1), ("data", data)].map(|(kind, channel)| Stream {
                channel,
                headers: vec![
                    ("streamtype", kind.to_owned()),
                    ("port", port.to_string()),
                    ("requestid", (data / 2).to_string()),
                ],
                is_writable: kind == "data",
                greeting: Some(port.to_le_bytes()),
            })
        };
        let all = (0_u8..).step_by(2).zip(ports).flat_map(pair).collect();
        Self { all, until: Until::AllEnded }
    }

    /// What is spoken over SPDY.
    pub(super) fn protocol(&self) -> HeaderValue {
        match self.until {
            Until::Told => PROTOCOL,
            Until::AllEnded => tunnel::PROTOCOL,
        }
    }

    fn numbered(&self) -> impl Iterator<Item = (u32, &Stream)> {
        (0..).map(|i| 2 * i + 1).zip(&self.all)
    }

    fn channel(&self, stream: u32) -> Option<u8> {
        self.numbered().find(|(number, _)| *number == stream).map(|(_, stream)| stream.channel)
    }

    /// The stream of a channel that a client may write to.
    fn stream(&self, channel: u8) -> Option<u32> {
        let mut writable = self.numbered().filter(|(_, stream)| stream.is_writable);
        writable.find(|(_, stream)| stream.channel == channel).map(|(number, _)| number)
    }
}

/// Carries a session until either side ends.
pub(super) async fn run<C, R>(
    client: C,
    runtime: R,
    channels: Channels,
    streams: &Streams,
) -> Ending
where
    C: AsyncRead + AsyncWrite + Unpin,
    R: AsyncRead + AsyncWrite,
{
    let (mut sink, mut messages) = websocket::open(client).await;
    let (from, mut to) = tokio::io::split(runtime);
    let mut frames = FramedRead::new(from, Frames);
    let opened = tokio::time::timeout(OPEN_LIMIT, open(streams, &mut frames, &mut to)).await;
    let opened = opened.unwrap_or_else(|_| Err("the runtime takes no streams".to_owned()));
    let ending = match opened {
        Err(why) => Ending::Broken(why),
        Ok(()) => {
            let (pongs, mut pinged) = mpsc::channel(PONGS);
            let down = Down::new(streams, channels, pongs);
            let up = Up { streams, channels, runtime: &mut to, open: true };
            tokio::select! {
                ending = down.run(&mut frames, &mut sink) => ending,
                ending = up.run(&mut messages, &mut pinged) => ending,
            }
        }
    };
    // Ends the process's standard input, if it still runs.
    let _ = to.shutdown().await;
    drop((to, frames));
    websocket::close(sink, messages, &ending).await;
    ending
}

/// Opens the streams and waits until the runtime has taken all: it drops data of streams that it has not yet.
async fn open(
    streams: &Streams,
    frames: &mut FramedRead<impl AsyncRead + Unpin, Frames>,
    runtime: &mut (impl AsyncWrite + Unpin),
) -> Result<(), String> {
    let (mut blocks, mut out) = (HeaderBlocks::default(), BytesMut::new());
    for (number, stream) in streams.numbered() {
        blocks.open(number, &stream.headers, &mut out);
    }
    runtime.write_all(&out).await.map_err(|e| e.to_string())?;
    let mut missing: Vec<u32> = streams.numbered().map(|(number, _)| number).collect();
    while !missing.is_empty() {
        match frames.next().await {
            Some(Ok(Frame::Reply { stream })) => missing.retain(|number| *number != stream),
            Some(Ok(Frame::Ping { .. } | Frame::Other)) => {}
            Some(Ok(_)) | None => return Err("the runtime refused a stream".to_owned()),
            Some(Err(error)) => return Err(error.to_string()),
        }
    }
    Ok(())
}

/// From the runtime to the client.
struct Down<'a> {
    streams: &'a Streams,
    channels: Channels,
    pongs: mpsc::Sender<u32>,
    /// Streams that the runtime has not ended.
    open: BTreeSet<u32>,
    /// The runtime said how the process ended.
    is_told: bool,
}

impl<'a> Down<'a> {
    fn new(streams: &'a Streams, channels: Channels, pongs: mpsc::Sender<u32>) -> Self {
        let open = streams.numbered().map(|(number, _)| number).collect();
        Self { streams, channels, pongs, open, is_told: false }
    }

    async fn run<C>(
        mut self,
        frames: &mut FramedRead<impl AsyncRead + Unpin, Frames>,
        sink: &mut Sink<C>,
    ) -> Ending
    where
        C: AsyncRead + AsyncWrite + Unpin,
    {
        for stream in &self.streams.all {
            let Some(greeting) = stream.greeting else { continue };
            if sink.send(self.channels.message(stream.channel, &greeting)).await.is_err() {
                return Ending::Left;
            }
        }
        while self.streams.until == Until::Told || !self.open.is_empty() {
            let message = match self.message(frames.next().await) {
                Ok(Some(message)) => message,
                Ok(None) => continue,
                Err(ending) => return ending,
            };
            if sink.send(message).await.is_err() {
                return Ending::Left;
            }
        }
        Ending::Done
    }

    /// What the client is to hear of a frame; or how the session ends with it.
    fn message(
        &mut self,
        frame: Option<Result<Frame, SpdyError>>,
    ) -> Result<Option<Message>, Ending> {
        // Without a word on how the process ended the client must not take it for success.
        let frame = match frame {
            Some(Ok(Frame::GoAway) | Err(SpdyError::Io(_))) | None if self.is_told => {
                return Err(Ending::Done);
            }
            Some(Ok(frame)) => frame,
            None => return Err(Ending::Broken("the runtime ended the session".to_owned())),
            Some(Err(error)) => return Err(Ending::Broken(error.to_string())),
        };
        if let Frame::Data { stream, end: true, .. } | Frame::Reset { stream } = &frame {
            self.open.remove(stream);
        }
        match frame {
            Frame::Data { stream, payload, .. } if !payload.is_empty() => {
                let Some(channel) = self.streams.channel(stream) else { return Ok(None) };
                self.is_told |= self.streams.until == Until::Told && channel == channel::ERROR;
                Ok(Some(self.channels.message(channel, &payload)))
            }
            // Even numbers are the server's; the others would answer pings that we have not sent.
            Frame::Ping { id } if id % 2 == 0 => {
                let _ = self.pongs.try_send(id);
                Ok(None)
            }
            _ => Ok(None),
        }
    }
}

/// From the client to the runtime.
struct Up<'a, W> {
    streams: &'a Streams,
    channels: Channels,
    runtime: &'a mut W,
    /// Whether the runtime takes more. When it has closed, its last words may still be on their way down.
    open: bool,
}

impl<W: AsyncWrite + Unpin> Up<'_, W> {
    async fn run<C>(
        mut self,
        messages: &mut Messages<C>,
        pinged: &mut mpsc::Receiver<u32>,
    ) -> Ending
    where
        C: AsyncRead + AsyncWrite + Unpin,
    {
        let mut out = BytesMut::new();
        loop {
            let message = tokio::select! {
                Some(id) = pinged.recv() => {
                    spdy::pong(id, &mut out);
                    self.send(&mut out).await;
                    continue;
                }
                message = messages.next() => message,
            };
            let message = match message {
                Some(Ok(message)) => message,
                None => return Ending::Left,
                Some(Err(error)) => return websocket::ending(&error),
            };
            match self.channels.parse(message) {
                Ok(Said::Data(channel, bytes)) => {
                    let Some(stream) = self.streams.stream(channel) else { continue };
                    for piece in bytes.chunks(spdy::DATA_BYTES) {
                        spdy::data(stream, piece, &mut out);
                        self.send(&mut out).await;
                    }
                }
                Ok(Said::End(channel)) => {
                    let Some(stream) = self.streams.stream(channel) else { continue };
                    spdy::end(stream, &mut out);
                    self.send(&mut out).await;
                }
                Ok(Said::Nothing) => {}
                Ok(Said::Leave) => return Ending::Left,
                Err(error) => return Ending::Violation(error.to_string()),
            }
        }
    }

    async fn send(&mut self, out: &mut BytesMut) {
        if self.open {
            self.open = self.runtime.write_all(out).await.is_ok();
        }
        out.clear();
    }
}

#[cfg(test)]
mod tests;
