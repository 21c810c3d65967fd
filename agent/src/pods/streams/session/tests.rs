//! A client and a runtime, both pretended, around a real session.

use bytes::Bytes;
use tokio::io::{DuplexStream, ReadHalf, WriteHalf, duplex};
use tokio::task::JoinHandle;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::Role;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::*;

const ALL: Wanted = Wanted { stdin: true, stdout: true, stderr: true, tty: false };
const SUCCESS: &[u8] = br#"{"status":"Success"}"#;

/// What a runtime does, as far as a session sees it.
struct Runtime {
    frames: FramedRead<ReadHalf<DuplexStream>, Frames>,
    to: WriteHalf<DuplexStream>,
}

impl Runtime {
    /// Takes so many streams.
    async fn accept(end: DuplexStream, streams: usize) -> Self {
        let (from, to) = tokio::io::split(end);
        let mut runtime = Self { frames: FramedRead::new(from, Frames), to };
        for i in 0..streams {
            // A stream that is opened is nothing that concerns a client.
            assert_eq!(runtime.next().await, Some(Frame::Other));
            let number = u8::try_from(2 * i + 1).unwrap();
            runtime.write(&[0x80, 3, 0, 2, 0, 0, 0, 4, 0, 0, 0, number]).await;
        }
        runtime
    }

    async fn next(&mut self) -> Option<Frame> {
        self.frames.next().await.map(Result::unwrap)
    }

    async fn write(&mut self, bytes: &[u8]) {
        self.to.write_all(bytes).await.unwrap();
    }

    async fn say(&mut self, stream: u32, bytes: &[u8]) {
        let mut out = BytesMut::new();
        spdy::data(stream, bytes, &mut out);
        self.write(&out).await;
    }
}

fn start(wanted: Wanted) -> (DuplexStream, DuplexStream, JoinHandle<Ending>) {
    let (near, client) = duplex(1000);
    let (far, runtime) = duplex(1000);
    (client, runtime, tokio::spawn(session(near, far, Channels::V5, Streams::of_process(wanted))))
}

async fn session(
    near: DuplexStream,
    far: DuplexStream,
    channels: Channels,
    streams: Streams,
) -> Ending {
    run(near, far, channels, &streams).await
}

async fn client(end: DuplexStream) -> WebSocketStream<DuplexStream> {
    WebSocketStream::from_raw_socket(end, Role::Client, None).await
}

fn message(channel: u8, bytes: &[u8]) -> Message {
    Channels::V5.message(channel, bytes)
}

#[tokio::test]
async fn input_ends_output_and_status_arrive() {
    let (end, runtime, session) = start(ALL);
    let runtime = tokio::spawn(async move {
        let mut runtime = Runtime::accept(runtime, 4).await;
        runtime.write(&[0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 2]).await;
        assert_eq!(runtime.next().await, Some(Frame::Ping { id: 2 }));
        let (mut input, mut frames) = (Vec::new(), 0);
        while let Some(Frame::Data { stream: 3, payload, end: false }) = runtime.next().await {
            assert!(payload.len() <= spdy::DATA_BYTES);
            input.extend_from_slice(&payload);
            frames += 1;
        }
        // The loop ended with the end of input. Output and errors, then how it ended.
        assert_eq!(frames, 4);
        for piece in input.chunks(3000) {
            runtime.say(5, piece).await;
        }
        runtime.say(7, b"warning").await;
        runtime.say(1, SUCCESS).await;
        runtime
    });
    let mut client = client(end).await;
    let input: Vec<u8> = (0..100_000_u32).map(|i| (i % 253) as u8).collect();
    client.send(message(channel::STDIN, &input)).await.unwrap();
    client.send(message(9, b"no such channel")).await.unwrap();
    client.send(Message::binary(vec![255, channel::STDIN])).await.unwrap();
    let (mut output, mut rest) = (Vec::new(), Vec::new());
    let reading = async {
        while let Some(Ok(message)) = client.next().await {
            match Channels::V5.parse(message.clone()).unwrap() {
                Said::Data(channel::STDOUT, bytes) => output.extend_from_slice(&bytes),
                Said::Data(channel, bytes) => rest.push((channel, bytes)),
                _ => return message,
            }
        }
        panic!("no closing");
    };
    let (last, _gone) = tokio::join!(reading, async { drop(runtime.await.unwrap()) });
    assert!(output == input, "{} bytes came back", output.len());
    let warning = (channel::STDERR, Bytes::from_static(b"warning"));
    assert_eq!(rest, [warning, (channel::ERROR, Bytes::from_static(SUCCESS))]);
    let Message::Close(Some(bye)) = last else { panic!("{last:?}") };
    assert_eq!(bye.code, CloseCode::Normal);
    drop(client);
    assert_eq!(session.await.unwrap(), Ending::Done);
}

#[tokio::test]
async fn a_runtime_that_goes_without_a_word_is_an_error() {
    let (end, runtime, session) = start(Wanted { tty: true, ..ALL });
    let mut client = client(end).await;
    client.send(message(channel::RESIZE, b"{}")).await.unwrap();
    let mut runtime = Runtime::accept(runtime, 4).await;
    let payload = Bytes::from_static(b"{}");
    assert_eq!(runtime.next().await, Some(Frame::Data { stream: 7, payload, end: false }));
    drop(runtime);
    let Some(Ok(Message::Close(Some(bye)))) = client.next().await else { panic!("no closing") };
    assert_eq!(bye.code, CloseCode::Error);
    drop(client);
    assert!(matches!(session.await.unwrap(), Ending::Broken(_)));
}

#[tokio::test]
async fn a_client_that_leaves_or_lies_ends_the_runtimes_side() {
    let (end, runtime, session) = start(ALL);
    let mut runtime = Runtime::accept(runtime, 4).await;
    drop(end);
    assert_eq!(runtime.next().await, None);
    assert_eq!(session.await.unwrap(), Ending::Left);
    let (end, runtime, session) = start(ALL);
    let mut runtime = Runtime::accept(runtime, 4).await;
    let mut client = client(end).await;
    client.send(Message::binary(vec![255])).await.unwrap();
    assert_eq!(runtime.next().await, None);
    let Some(Ok(Message::Close(Some(bye)))) = client.next().await else { panic!("no closing") };
    assert_eq!(bye.code, CloseCode::Protocol);
    drop(client);
    assert!(matches!(session.await.unwrap(), Ending::Violation(_)));
}

#[tokio::test(start_paused = true)]
async fn a_runtime_that_takes_no_streams_is_not_waited_for() {
    let (end, _runtime, session) = start(ALL);
    let mut client = client(end).await;
    let Some(Ok(Message::Close(Some(bye)))) = client.next().await else { panic!("no closing") };
    assert_eq!((bye.code, bye.reason.as_str()), (CloseCode::Error, "the runtime takes no streams"));
    drop(client);
    assert!(matches!(session.await.unwrap(), Ending::Broken(_)));
}

#[tokio::test]
async fn a_client_that_says_goodbye_is_answered() {
    let (end, runtime, session) = start(ALL);
    let mut runtime = Runtime::accept(runtime, 4).await;
    let mut client = client(end).await;
    client.send(Message::Close(None)).await.unwrap();
    assert_eq!(runtime.next().await, None);
    assert!(matches!(client.next().await, Some(Ok(Message::Close(_)))));
    assert_eq!(session.await.unwrap(), Ending::Left);
}

#[tokio::test]
async fn each_port_has_a_connection_and_two_channels() {
    let (near, end) = duplex(1000);
    let (far, runtime) = duplex(1000);
    let form = Channels::V4;
    let session = tokio::spawn(session(near, far, form, Streams::of_ports(&[80, 8080])));
    let mut runtime = Runtime::accept(runtime, 4).await;
    let mut client = client(end).await;
    let mut heard = Vec::new();
    for _ in 0..4 {
        heard.push(client.next().await.unwrap().unwrap());
    }
    heard.sort_by_key(|message| message.clone().into_data());
    let greeting = |channel: u8, port: [u8; 2]| form.message(channel, &port);
    let expected = [greeting(0, [80, 0]), greeting(1, [80, 0])];
    assert_eq!(heard[..2], expected);
    assert_eq!(heard[2..], [greeting(2, [0x90, 0x1f]), greeting(3, [0x90, 0x1f])]);

    client.send(form.message(2, b"to 8080")).await.unwrap();
    client.send(form.message(1, b"nobody reads this")).await.unwrap();
    client.send(form.message(0, b"to 80")).await.unwrap();
    let data = |stream, text: &'static [u8]| {
        Some(Frame::Data { stream, payload: Bytes::from_static(text), end: false })
    };
    assert_eq!(runtime.next().await, data(7, b"to 8080"));
    assert_eq!(runtime.next().await, data(3, b"to 80"));
    runtime.say(3, b"from 80").await;
    runtime.say(5, b"refused").await;
    assert_eq!(client.next().await.unwrap().unwrap(), form.message(0, b"from 80"));
    assert_eq!(client.next().await.unwrap().unwrap(), form.message(3, b"refused"));

    // One connection ends, and then the other.
    for stream in [5, 7, 1, 3] {
        let mut out = BytesMut::new();
        spdy::end(stream, &mut out);
        runtime.write(&out).await;
    }
    let Some(Ok(Message::Close(Some(bye)))) = client.next().await else { panic!("no closing") };
    assert_eq!(bye.code, CloseCode::Normal);
    drop(client);
    assert_eq!(session.await.unwrap(), Ending::Done);
}
