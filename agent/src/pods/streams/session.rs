//! Channels in WebSocket messages on the client's side, SPDY streams on the runtime's.
//!
//! A client that is slow holds back the runtime, and a process that does not read holds back the client: in each
//! direction one message at most is on its way here.

use std::time::Duration;

use axum::http::HeaderValue;
use bytes::BytesMut;
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio_util::codec::FramedRead;

use super::channel::{self, Channels, Said};
use super::spdy::{self, Frame, Frames, HeaderBlocks, SpdyError};
use super::websocket::{self, Ending, Messages, Sink};

/// What is spoken over SPDY: the status of the process comes as JSON, the size of the terminal has a stream.
pub(super) const PROTOCOL: HeaderValue = HeaderValue::from_static("v4.channel.k8s.io");
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

/// The streams of a session: channels in the order of their SPDY numbers 1, 3, 5...
struct Streams(Vec<u8>);

impl Streams {
    /// In the order in which runtimes expect them.
    fn new(wanted: Wanted) -> Self {
        let all = [
            (channel::ERROR, true),
            (channel::STDIN, wanted.stdin),
            (channel::STDOUT, wanted.stdout),
            (channel::STDERR, wanted.stderr && !wanted.tty),
            (channel::RESIZE, wanted.tty),
        ];
        Self(all.into_iter().filter(|(_, is)| *is).map(|(channel, _)| channel).collect())
    }

    fn numbered(&self) -> impl Iterator<Item = (u32, u8)> + '_ {
        (0..).map(|i| 2 * i + 1).zip(self.0.iter().copied())
    }

    fn channel(&self, stream: u32) -> Option<u8> {
        self.numbered().find(|(number, _)| *number == stream).map(|(_, channel)| channel)
    }

    /// The stream of a channel that a client may write to.
    fn stream(&self, channel: u8) -> Option<u32> {
        let writable = matches!(channel, channel::STDIN | channel::RESIZE);
        self.numbered().find(|(_, c)| writable && *c == channel).map(|(number, _)| number)
    }
}

fn stream_type(channel: u8) -> &'static str {
    match channel {
        channel::STDIN => "stdin",
        channel::STDOUT => "stdout",
        channel::STDERR => "stderr",
        channel::RESIZE => "resize",
        _ => "error",
    }
}

/// Carries a session until either side ends.
pub(super) async fn run<C, R>(client: C, runtime: R, channels: Channels, wanted: Wanted) -> Ending
where
    C: AsyncRead + AsyncWrite + Unpin,
    R: AsyncRead + AsyncWrite,
{
    let (mut sink, mut messages) = websocket::open(client).await;
    let (from, mut to) = tokio::io::split(runtime);
    let mut frames = FramedRead::new(from, Frames);
    let streams = Streams::new(wanted);
    let opened = tokio::time::timeout(OPEN_LIMIT, open(&streams, &mut frames, &mut to)).await;
    let opened = opened.unwrap_or_else(|_| Err("the runtime takes no streams".to_owned()));
    let ending = match opened {
        Err(why) => Ending::Broken(why),
        Ok(()) => {
            let (pongs, mut pinged) = mpsc::channel(PONGS);
            let down = Down { streams: &streams, channels, pongs };
            let up = Up { streams: &streams, channels, runtime: &mut to, open: true };
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
    for (number, channel) in streams.numbered() {
        blocks.open(number, &[("streamtype", stream_type(channel))], &mut out);
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
}

impl Down<'_> {
    async fn run<C>(
        self,
        frames: &mut FramedRead<impl AsyncRead + Unpin, Frames>,
        sink: &mut Sink<C>,
    ) -> Ending
    where
        C: AsyncRead + AsyncWrite + Unpin,
    {
        // Without a word on how the process ended the client must not take it for success.
        let mut told = false;
        loop {
            match frames.next().await {
                Some(Ok(Frame::Data { stream, payload, .. })) if !payload.is_empty() => {
                    let Some(channel) = self.streams.channel(stream) else { continue };
                    told |= channel == channel::ERROR;
                    if sink.send(self.channels.message(channel, &payload)).await.is_err() {
                        return Ending::Left;
                    }
                }
                // Even numbers are the server's; the others would answer pings that we have not sent.
                Some(Ok(Frame::Ping { id })) if id % 2 == 0 => {
                    let _ = self.pongs.try_send(id);
                }
                Some(Ok(Frame::GoAway)) | None if told => return Ending::Done,
                None => return Ending::Broken("the runtime ended the session".to_owned()),
                Some(Ok(_)) => {}
                Some(Err(SpdyError::Io(_))) if told => return Ending::Done,
                Some(Err(error)) => return Ending::Broken(error.to_string()),
            }
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
