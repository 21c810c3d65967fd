//! One question at a time: strict about what it accepts, from the zone or from upstream.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use hickory_net::xfer::Protocol;
use hickory_proto::op::{Edns, Header, HeaderCounts, MessageType, Metadata, OpCode, ResponseCode};
use hickory_proto::rr::DNSClass;
use hickory_proto::serialize::binary::{
    BinDecodable as _, BinDecoder, BinEncodable as _, BinEncoder,
};
use hickory_server::server::Request;
use hickory_server::zone_handler::MessageResponseBuilder;
use tokio::sync::Semaphore;

use crate::answer::{self, Answered};
use crate::forward::Forwarder;
use crate::zone::Zone;

/// Largest UDP answer that crosses any path unfragmented (DNS flag day 2020).
const MAX_UDP_PAYLOAD: u16 = 1232;
/// Largest one to a client that does not say what it takes (RFC 1035, section 4.2.1).
const PLAIN_UDP_PAYLOAD: u16 = 512;
/// Questions that may wait for upstream servers at the same time; more are refused, the zone is still answered.
const MAX_WAITING: usize = 1024;

/// What the server answers from; replaced as a whole.
pub(crate) struct Tables {
    pub(crate) zone: Zone,
    pub(crate) forwarder: Arc<Forwarder>,
}

/// Counters since the start of the process.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) zone: AtomicU64,
    pub(crate) forwarded: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) failed: AtomicU64,
}

/// What answers, shared by all sockets.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) tables: Arc<ArcSwap<Tables>>,
    pub(crate) counters: Arc<Counters>,
    waiting: Arc<Semaphore>,
}

impl Server {
    pub(crate) fn new(tables: Tables) -> Self {
        Self {
            tables: Arc::new(ArcSwap::from_pointee(tables)),
            counters: Arc::new(Counters::default()),
            waiting: Arc::new(Semaphore::new(MAX_WAITING)),
        }
    }

    /// The answer to a message, whatever it holds; none to what is no question and must not be answered.
    pub(crate) async fn respond(
        &self,
        message: Vec<u8>,
        from: SocketAddr,
        protocol: Protocol,
    ) -> Option<Vec<u8>> {
        let header = Header::read(&mut BinDecoder::new(&message)).ok()?;
        if header.metadata.message_type == MessageType::Response {
            // Two servers would answer each other for ever.
            return None;
        }
        let Ok(request) = Request::from_bytes(message, from, protocol) else {
            self.count(ResponseCode::FormErr);
            return bare(&header.metadata, ResponseCode::FormErr);
        };
        let answered = self.answer(&request).await;
        self.count(answered.code);
        encode(&request, &answered, protocol)
            .or_else(|| bare(&header.metadata, ResponseCode::ServFail))
    }

    async fn answer(&self, request: &Request) -> Answered {
        let refuse = |code| Answered { code, ..Answered::default() };
        if request.metadata.op_code != OpCode::Query {
            return refuse(ResponseCode::NotImp);
        }
        if request.edns.as_ref().is_some_and(|e| e.version() != 0) {
            return refuse(ResponseCode::BADVERS);
        }
        let Ok(info) = request.request_info() else { return refuse(ResponseCode::FormErr) };
        if info.query.query_class() != DNSClass::IN {
            return refuse(ResponseCode::Refused);
        }
        let (name, kind) = (info.query.original().name(), info.query.query_type());
        let tables = self.tables.load_full();
        let Some(mut answered) = answer::from_zone(&tables.zone, name, kind) else {
            return self.forward(&tables, name, kind).await;
        };
        self.counters.zone.fetch_add(1, Ordering::Relaxed);
        if let Some(target) = answered.follow.take() {
            let rest = self.forward(&tables, &target, kind).await;
            answered.answers.extend(rest.answers);
            answered.code = rest.code;
        }
        answered
    }

    async fn forward(
        &self,
        tables: &Tables,
        name: &hickory_proto::rr::Name,
        kind: hickory_proto::rr::RecordType,
    ) -> Answered {
        let Ok(_place) = self.waiting.try_acquire() else {
            return Answered { code: ResponseCode::ServFail, ..Answered::default() };
        };
        self.counters.forwarded.fetch_add(1, Ordering::Relaxed);
        tables.forwarder.ask(name, kind).await
    }

    fn count(&self, code: ResponseCode) {
        let counter = match code {
            ResponseCode::ServFail => &self.counters.failed,
            ResponseCode::NoError | ResponseCode::NXDomain => return,
            _ => &self.counters.refused,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// The answer as bytes, cut to what the client can take; none when a record cannot be encoded.
fn encode(request: &Request, answered: &Answered, protocol: Protocol) -> Option<Vec<u8>> {
    let mut metadata = Metadata::response_from_request(&request.metadata);
    metadata.authoritative = answered.authoritative;
    metadata.recursion_available = true;
    metadata.response_code = answered.code;
    let edns = request.edns.as_ref().map(|asked| {
        let mut edns = Edns::new();
        edns.set_max_payload(asked.max_payload().clamp(PLAIN_UDP_PAYLOAD, MAX_UDP_PAYLOAD));
        edns
    });
    let limit = match protocol {
        Protocol::Udp => edns.as_ref().map_or(PLAIN_UDP_PAYLOAD, Edns::max_payload),
        _ => u16::MAX,
    };
    let builder = MessageResponseBuilder::new(&request.queries, edns.as_ref());
    let message = builder.build(
        metadata,
        &answered.answers,
        [],
        answered.soa.as_ref(),
        &answered.additionals,
    );
    let mut bytes = Vec::with_capacity(usize::from(PLAIN_UDP_PAYLOAD));
    let mut encoder = BinEncoder::new(&mut bytes);
    encoder.set_max_size(limit);
    match message.destructive_emit(&mut encoder) {
        Ok(_) => Some(bytes),
        Err(error) => {
            tracing::warn!(%error, "answer not encoded");
            None
        }
    }
}

/// An answer that is a header only.
fn bare(question: &Metadata, code: ResponseCode) -> Option<Vec<u8>> {
    let mut metadata = Metadata::response_from_request(question);
    metadata.response_code = code;
    let header = Header { metadata, counts: HeaderCounts::default() };
    header.to_bytes().ok()
}
