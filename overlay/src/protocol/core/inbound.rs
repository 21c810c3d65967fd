//! Datagrams that arrived together: mostly from one session, which is looked up once.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use super::{Arrival, Sink};
use crate::protocol::ecn::Ecn;
use crate::protocol::gate::{Admission, Gate, Refusal};
use crate::protocol::narrow;
use crate::protocol::noise::message::{Data, TAG_BYTES, word};
use crate::protocol::noise::{Call, Session};
use crate::protocol::outbox::{Outbox, Way};
use crate::protocol::packet;
use crate::protocol::probe::Message;
use crate::protocol::table::{Entry, Table};
use crate::status::DropReason;

/// One batch, at one time, under one configuration.
pub(super) struct Batch<'t> {
    now: Instant,
    gate: &'t Gate,
    table: &'t Table,
    held: Option<Held<'t>>,
    /// The last source address found to belong to the peer at the place.
    allowed: Option<(IpAddr, u32)>,
}

/// The session of the last message, and what has come through it in this batch.
struct Held<'t> {
    entry: &'t Entry,
    place: u32,
    session: Arc<Session>,
    /// Where the peer is known to be.
    way: Option<Way>,
    authentic: bool,
    bytes: u64,
}

impl<'t> Batch<'t> {
    pub(super) fn new(now: Instant, gate: &'t Gate, table: &'t Table) -> Self {
        Self { now, gate, table, held: None, allowed: None }
    }

    /// Opens one datagram. The packet in it goes to the sink, an answer to the outbox.
    pub(super) fn open(
        &mut self,
        arrival: Arrival<'_>,
        sink: &mut impl Sink,
        outbox: &mut Outbox,
    ) -> Result<(), DropReason> {
        let (now, Arrival { back, ecn, bytes }) = (self.now, arrival);
        match self.gate.admit(now, back.to, bytes) {
            Ok(Admission::Data(data)) => self.data((back, ecn), &data, sink, outbox),
            Ok(Admission::Call(call)) => self.call(back, *call, outbox),
            Ok(Admission::Response(response)) => {
                self.entry(word(response, 8))?.lock().accept(now, back, response, outbox)
            }
            Ok(Admission::Cookie(reply)) => {
                self.entry(word(reply, 4))?.lock().keep_cookie(now, reply)
            }
            Err(Refusal::ShowCookie(reply)) => {
                if let Some(room) = outbox.room(reply.len()) {
                    room[..reply.len()].copy_from_slice(&reply);
                    outbox.commit(back, Ecn::NotCapable, reply.len());
                }
                Err(DropReason::UnderLoad)
            }
            Err(Refusal::Drop(reason)) => Err(reason),
        }
    }

    fn data(
        &mut self,
        (back, ecn): (Way, Ecn),
        data: &Data<'_>,
        sink: &mut impl Sink,
        outbox: &mut Outbox,
    ) -> Result<(), DropReason> {
        let now = self.now;
        let held = self.hold(data.receiver)?;
        let room = sink.room(data.sealed.len() - TAG_BYTES);
        let len = held.session.open(data, room).ok_or(DropReason::BadTag)?;
        if !held.session.accept(data.counter) {
            return Err(DropReason::Replayed);
        }
        held.authentic = true;
        // What is no packet is no traffic either.
        let probe = Message::read(&room[..len]);
        held.bytes += if probe.is_none() { len as u64 } else { 0 };
        if held.way != Some(back) || !held.session.is_confirmed() {
            held.entry.lock().heard(now, &held.session, back, outbox);
            held.way = Some(back);
        }
        if len == 0 {
            return Ok(()); // a keepalive
        }
        if let Some(message) = probe {
            held.entry.lock().probed(now, message, outbox);
            return Ok(());
        }
        let (place, narrow) = (held.place, held.entry.link().narrow());
        let len = packet::length(&room[..len]).ok_or(DropReason::MalformedInner)?;
        let from = packet::source(&room[..len]).ok_or(DropReason::MalformedInner)?;
        if self.allowed != Some((from, place)) {
            if self.table.routes().lookup(from) != Some(place) {
                return Err(DropReason::ForbiddenSource);
            }
            self.allowed = Some((from, place));
        }
        if !ecn.pass_on(&mut room[..len]) {
            return Err(DropReason::Congested);
        }
        if let Some(mtu) = narrow {
            narrow::clamp_segments(&mut room[..len], false, mtu);
        }
        sink.accept(len);
        Ok(())
    }

    fn call(&mut self, back: Way, call: Call, outbox: &mut Outbox) -> Result<(), DropReason> {
        let place = self.table.place_of_key(call.caller()).ok_or(DropReason::UnknownPeer)?;
        self.table.entry(place).lock().answer(self.now, back, call, self.gate, outbox)
    }

    fn entry(&self, index: u32) -> Result<&'t Entry, DropReason> {
        let place = self.table.place_of_index(index).ok_or(DropReason::UnknownSession)?;
        Ok(self.table.entry(place))
    }

    fn hold(&mut self, index: u32) -> Result<&mut Held<'t>, DropReason> {
        if self.held.as_ref().is_none_or(|held| held.session.index() != index) {
            self.settle();
            let place = self.table.place_of_index(index).ok_or(DropReason::UnknownSession)?;
            let entry = self.table.entry(place);
            let (session, way) = entry.link().session(index).ok_or(DropReason::UnknownSession)?;
            if !session.is_alive(self.now) {
                return Err(DropReason::UnknownSession);
            }
            self.held = Some(Held { entry, place, session, way, authentic: false, bytes: 0 });
        }
        match &mut self.held {
            Some(held) => Ok(held),
            None => unreachable!("it was just put there"),
        }
    }

    /// Writes down what came through the session held so far.
    fn settle(&mut self) {
        if let Some(held) = self.held.take().filter(|held| held.authentic) {
            held.entry.link().activity.received(self.now, held.bytes);
        }
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        self.settle();
    }
}
