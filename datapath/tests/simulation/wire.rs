//! The control connection: two ordered ways with delays, cuts, closes and, if the peer is hostile,
//! with messages that are not what was sent.

use std::collections::VecDeque;
use std::time::Duration;

use pageferry_datapath::control::{Decoder, Message, encode};
use pageferry_datapath::source::Input as SourceInput;
use pageferry_datapath::target::Input as TargetInput;

use crate::messages;
use crate::scenario::{Peer, Side, any_kind};
use crate::world::{Event, World, failure};

enum Parcel {
    Message(Message),
    Bytes(Vec<u8>),
}

/// One direction of the connection.
#[derive(Default)]
pub(crate) struct Way {
    queue: VecDeque<Parcel>,
    last_arrival: Duration,
    /// Nothing more can be sent on it.
    down: bool,
    /// Its receiver knows that it has ended.
    told: bool,
    decoder: Decoder,
}

impl World {
    /// Whether it could be sent, as far as the sender can tell.
    pub(crate) fn send(&mut self, from: Side, message: Message) -> bool {
        self.note(|| format!("{from:?} sends {message:?}"));
        let to = from.other();
        if self.ways[to as usize].down {
            return !self.random.chance(50);
        }
        for parcel in self.parcels(from, message) {
            let delay = self.about(self.scenario.message_time);
            let way = &mut self.ways[to as usize];
            let arrival = (self.now + delay).max(way.last_arrival);
            way.last_arrival = arrival;
            way.queue.push_back(parcel);
            self.schedule(arrival, Event::Deliver(to));
        }
        true
    }

    fn parcels(&mut self, from: Side, message: Message) -> Vec<Parcel> {
        let lies = self.scenario.peer == Peer::Hostile(from)
            && self.random.chance(self.scenario.hostile_percent);
        let messages = match if lies { self.random.below(5) } else { 9 } {
            0 => vec![],
            1 => vec![message.clone(), message],
            2 => vec![messages::any(any_kind(&mut self.random), &mut self.random)],
            3 => vec![messages::any(message.kind(), &mut self.random)],
            4 => {
                let mut bytes = encode(&message);
                self.garble(&mut bytes);
                return vec![Parcel::Bytes(bytes)];
            }
            _ => vec![message],
        };
        let mut parcels = Vec::new();
        for message in messages {
            if !self.scenario.bytes {
                parcels.push(Parcel::Message(message));
                continue;
            }
            let mut bytes = encode(&message);
            let rest = bytes.split_off(self.random.below(bytes.len()));
            parcels.extend([Parcel::Bytes(bytes), Parcel::Bytes(rest)]);
        }
        parcels
    }

    fn garble(&mut self, bytes: &mut Vec<u8>) {
        let at = self.random.below(bytes.len());
        match self.random.below(3) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, self.random.number() as u8),
            _ => bytes[at] ^= 1 << self.random.below(8),
        }
    }

    pub(crate) fn deliver(&mut self, to: Side) {
        if self.partitioned() {
            return self.schedule(self.partition_until, Event::Deliver(to));
        }
        match self.ways[to as usize].queue.pop_front() {
            None => {}
            Some(Parcel::Message(message)) => self.hand_over(to, message),
            Some(Parcel::Bytes(bytes)) => {
                self.ways[to as usize].decoder.push(&bytes);
                loop {
                    match self.ways[to as usize].decoder.next_message() {
                        Ok(Some(message)) => self.hand_over(to, message),
                        Ok(None) => return,
                        Err(error) => {
                            self.note(|| format!("{to:?} can't read that: {error}"));
                            return self.end_of_control(to);
                        }
                    }
                }
            }
        }
    }

    fn hand_over(&mut self, to: Side, message: Message) {
        match to {
            _ if self.ways[to as usize].told => {}
            // Goes straight to the monitor.
            Side::Source if matches!(message, Message::ReturnPath(_)) => {}
            Side::Source => self.tell_source(SourceInput::Message(message)),
            Side::Target => self.tell_target(TargetInput::Message(message)),
        }
    }

    pub(crate) fn end_of_control(&mut self, side: Side) {
        if std::mem::replace(&mut self.ways[side as usize].told, true) {
            return;
        }
        let lost = failure("the control connection is gone");
        match side {
            Side::Source => self.tell_source(SourceInput::PeerLost(lost)),
            Side::Target => self.tell_target(TargetInput::PeerLost(lost)),
        }
    }

    /// The connection breaks; both sides notice, each in its time. What was on its way may arrive
    /// in part.
    pub(crate) fn cut(&mut self, noticed_within: Duration) {
        for side in [Side::Source, Side::Target] {
            self.lose_some(side);
            self.ways[side as usize].down = true;
            let noticed = self.now + self.random.up_to(noticed_within);
            let last = self.ways[side as usize].last_arrival;
            self.schedule(noticed.max(last), Event::EndOfControl(side));
        }
    }

    fn lose_some(&mut self, to: Side) {
        let kept = self.random.below(self.ways[to as usize].queue.len() + 1);
        self.ways[to as usize].queue.truncate(kept);
    }

    /// This side closes the connection, by its death if `abruptly`.
    pub(crate) fn close_control(&mut self, by: Side, noticed_after: Duration, abruptly: bool) {
        let peer = by.other();
        if abruptly && self.random.chance(50) {
            self.lose_some(peer);
        }
        self.ways[by as usize].down = true;
        self.finish_control(by, noticed_after);
    }

    /// This side will send nothing more.
    pub(crate) fn finish_control(&mut self, by: Side, noticed_after: Duration) {
        let delay = noticed_after + self.about(self.scenario.message_time);
        let way = &mut self.ways[by.other() as usize];
        way.down = true;
        let at = (self.now + delay).max(way.last_arrival).max(self.partition_until);
        way.last_arrival = at;
        self.schedule(at, Event::EndOfControl(by.other()));
    }
}
