//! Telling flows: what is remembered, then what comes.

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use mesh_kernel::flows::Event;
use mesh_kernel::traces::identity;
use mesh_model::flow::{FlowLine, FlowLosses, FlowQuery};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc};

use super::report::{Reporter, wall_offset};
use super::{Batch, Flows};

/// Between two lines about losses: also how soon a client that has gone is noticed.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// Parts of an answer that wait for a slow client; after that events wait in the feed, and then they are lost and counted.
const PARTS: usize = 4;

impl Flows {
    /// The answer to a query.
    pub(crate) fn answer(&self, query: FlowQuery) -> Response {
        let (sender, receiver) = mpsc::channel(PARTS);
        tokio::spawn(Follower { flows: self.clone(), query, sender, missed: 0 }.run());
        let stream = futures_util::stream::unfold(receiver, |mut receiver| async {
            let part: Bytes = receiver.recv().await?;
            Some((Ok::<_, Infallible>(part), receiver))
        });
        ([(CONTENT_TYPE, "application/jsonl")], Body::from_stream(stream)).into_response()
    }

    /// What is remembered, and all that comes after it.
    fn subscribe(&self, tail: Option<usize>) -> (Batch, broadcast::Receiver<Arc<Batch>>) {
        let history = self.history();
        let skipped = history.events.len().saturating_sub(tail.unwrap_or(usize::MAX));
        let events: Vec<Event> = history.events.iter().skip(skipped).copied().collect();
        let first = history.next - events.len() as u64;
        (Batch { first, events }, self.0.feed.subscribe())
    }

    fn losses(&self, missed: u64) -> FlowLine {
        let history = self.history();
        FlowLine::Losses(FlowLosses {
            node: self.0.node.clone(),
            lost: history.tally.lost + missed,
            limited: history.tally.limited,
            lacking: history.lacking.clone(),
        })
    }

    /// Lines of those events that pass the filter.
    fn lines(&self, events: &[Event], query: &FlowQuery) -> Vec<u8> {
        let (reasons, programs) = {
            let history = self.history();
            (Arc::clone(&history.reasons), history.programs.clone())
        };
        let sender = |event: &Event| -> Option<IpAddr> {
            let wanted = event.source.ip().is_unspecified().then_some(event.netns)?;
            let addresses = programs.as_ref()?.addresses_of_namespace(wanted);
            addresses.into_iter().find(|a| a.is_ipv4() == event.destination.is_ipv4())
        };
        let identity = |address| identity(programs.as_ref()?, address).ok().flatten();
        let names = self.names();
        let reporter = Reporter {
            node: &self.0.node,
            names: &names,
            reasons: &reasons,
            wall_offset: wall_offset(),
            identity: &identity,
        };
        let mut text = Vec::new();
        for event in events {
            let flow = reporter.report(event, sender(event));
            if query.filter.matches(&flow) {
                line(&FlowLine::Flow(Box::new(flow)), &mut text);
            }
        }
        text
    }
}

fn line(line: &FlowLine, text: &mut Vec<u8>) {
    // Plain data: there is nothing in it that could not be written.
    if serde_json::to_writer(&mut *text, line).is_ok() {
        text.push(b'\n');
    }
}

/// One client.
struct Follower {
    flows: Flows,
    query: FlowQuery,
    sender: mpsc::Sender<Bytes>,
    /// Events that this client was too slow for.
    missed: u64,
}

/// The client is gone.
struct Gone;

impl Follower {
    async fn run(mut self) {
        let following = Follow::new(&self.flows, self.query.follow);
        // Either the client has gone or all is said.
        let _ = self.tell().await;
        drop(following);
    }

    async fn tell(&mut self) -> Result<(), Gone> {
        self.flows.catch_up().await;
        let (remembered, mut feed) = self.flows.subscribe(self.query.tail);
        self.send_losses().await?;
        self.send(self.flows.lines(&remembered.events, &self.query)).await?;
        if !self.query.follow {
            return Ok(());
        }
        let mut expected = remembered.first + remembered.events.len() as u64;
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                batch = feed.recv() => match batch {
                    Ok(batch) => {
                        self.missed += batch.first.saturating_sub(expected);
                        expected = batch.first + batch.events.len() as u64;
                        self.send(self.flows.lines(&batch.events, &self.query)).await?;
                    }
                    // How many events that were shows with the next batch.
                    Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return Ok(()),
                },
                _ = heartbeat.tick() => self.send_losses().await?,
            }
        }
    }

    async fn send_losses(&self) -> Result<(), Gone> {
        let mut text = Vec::new();
        line(&self.flows.losses(self.missed), &mut text);
        self.send(text).await
    }

    async fn send(&self, text: Vec<u8>) -> Result<(), Gone> {
        if text.is_empty() {
            return Ok(());
        }
        self.sender.send(text.into()).await.map_err(|_| Gone)
    }
}

/// Events are read for as long as this exists.
pub(crate) struct Follow(Option<Flows>);

impl Follow {
    pub(super) fn new(flows: &Flows, follow: bool) -> Self {
        let counted = follow.then(|| flows.clone());
        if let Some(flows) = &counted {
            flows.0.followers.send_modify(|n| *n += 1);
            // It may be asleep for longer than a follower likes to wait.
            if let Some(reading) = &*flows.reading() {
                reading.wake();
            }
        }
        Self(counted)
    }
}

impl Drop for Follow {
    fn drop(&mut self) {
        if let Some(flows) = &self.0 {
            flows.0.followers.send_modify(|n| *n -= 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use mesh_kernel::flows::Kind;
    use mesh_model::flow::{Flow, FlowFilter, FlowVerdict};

    use super::super::report::tests::event;
    use super::*;

    fn parse(bytes: &[u8]) -> (Vec<Flow>, Vec<FlowLosses>) {
        let (mut flows, mut losses) = (vec![], vec![]);
        for line in bytes.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
            match serde_json::from_slice(line).unwrap() {
                FlowLine::Flow(flow) => flows.push(*flow),
                FlowLine::Losses(loss) => losses.push(loss),
            }
        }
        (flows, losses)
    }

    #[tokio::test]
    async fn what_is_remembered_is_told_through_the_filter() {
        let flows = Flows::new("a".parse().unwrap(), 10);
        let closed = Event { kind: Kind::Closed, ..event() };
        flows.add(vec![closed, event(), closed]);
        let ask = |tail, verdicts| {
            flows.answer(FlowQuery {
                tail,
                filter: FlowFilter { verdicts, ..FlowFilter::default() },
                ..FlowQuery::default()
            })
        };
        let all = ask(None, vec![]).into_body().collect().await.unwrap().to_bytes();
        assert_eq!(parse(&all).0.len(), 3);
        let some = ask(Some(2), vec![FlowVerdict::Closed]).into_body().collect().await.unwrap();
        let (told, losses) = parse(&some.to_bytes());
        assert_eq!((told.len(), losses.len()), (1, 1));
    }

    #[tokio::test]
    async fn a_follower_sees_what_comes_and_who_is_gone_is_noticed() {
        let flows = Flows::new("a".parse().unwrap(), 10);
        flows.add(vec![event()]);
        let query = FlowQuery { follow: true, tail: Some(0), ..FlowQuery::default() };
        let mut body = flows.answer(query).into_body();
        let mut seen = vec![];
        let mut followers = flows.0.followers.subscribe();
        followers.wait_for(|n| *n == 1).await.unwrap();
        while seen.is_empty() {
            // The subscription is made by another task: until then nothing arrives.
            flows.add(vec![event()]);
            let part = tokio::time::timeout(Duration::from_millis(50), body.frame()).await;
            if let Ok(Some(frame)) = part {
                seen = parse(&frame.unwrap().into_data().unwrap()).0;
            }
        }
        assert_eq!(seen[0].verdict, FlowVerdict::Opened);
        drop(body);
        while *followers.borrow_and_update() != 0 {
            flows.add(vec![event()]);
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn what_a_slow_follower_misses_is_counted() {
        let flows = Flows::new("a".parse().unwrap(), 0);
        let query = FlowQuery { follow: true, ..FlowQuery::default() };
        let mut body = flows.answer(query).into_body();
        let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
        assert_eq!(parse(&first).1[0].lost, 0);
        let all = 200_u64;
        for _ in 0..all {
            flows.add(vec![event()]);
        }
        let (mut told, mut lost) = (0, 0);
        while told + lost < all {
            let frame = body.frame().await.unwrap().unwrap().into_data().unwrap();
            let (flows_, losses) = parse(&frame);
            told += flows_.len() as u64;
            lost = losses.last().map_or(lost, |losses| losses.lost);
            flows.add(vec![]);
        }
        assert!(lost > 0 && told > 0, "{told} told, {lost} lost");
        assert_eq!(told + lost, all);
    }
}
