//! A server of the domain: its queue, its links, and what it makes of a decision. The rest of its
//! role is what `roles.rs` and `open.rs` do.

use std::time::Duration;

use terrace_bridge::domain::{
    Decider, Decision, Link, Missing, Own, Peer, Refusal, Session, Sight, SlotWatch, Told,
};
use terrace_bridge::lsn::Lsn;

use crate::copies::Copying;
use crate::upstream::{Holder, RATE, Slot};
use crate::without;
use crate::world::{TICK, World};

pub const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];
pub const TAKEOVER_AFTER: Duration = Duration::from_secs(3);
/// What a server told longer ago does not count for an acknowledgement. One that is alone
/// never goes on alone here.
const ACK_TIMEOUT: u64 = 100;
/// A link that brings nothing is given up after this many ticks.
const SILENCE: u64 = 100;
/// A server that has not let us in after so many ticks does not.
const OPENING_LIMIT: u64 = 50;

/// How another server looks from here.
#[derive(Clone)]
pub struct View {
    pub sight: Sight,
    pub told: Option<Told>,
    pub heard: u64,
}

/// A try at a server of the parent domain.
#[derive(Clone, Copy)]
struct Try {
    parent: usize,
    depose: Option<Session>,
    until: u64,
    gives_up: u64,
}

pub struct Node {
    pub index: usize,
    pub up: bool,
    pub paused_until: u64,
    started: u64,
    /// Its database does not say yet what it has.
    pub opening_until: u64,
    /// Its clock runs at this many per cent of the true one, and has jumped ahead.
    clock: u32,
    pub jumped: Duration,
    pub flush: u64,
    pub first: u64,
    pub has_data: bool,
    /// It has thrown its data away, to copy the parent's.
    pub anew: bool,
    pub waiting_to_copy: u64,
    /// What it has seen of the domain's slot.
    pub slot: SlotWatch,
    pub copying: Option<Copying>,
    pub healthy: bool,
    /// Its database is far behind its queue.
    pub lagging: bool,
    /// Its disk has not answered since then.
    pub hangs_since: Option<u64>,
    pub link: Link,
    /// The server of the parent domain that it follows.
    pub follows: usize,
    link_heard: u64,
    opening: Option<Try>,
    /// When the top was read that its data is of.
    pub top_read: u64,
    members: usize,
    resync: bool,
    /// For the story.
    decided: Decision,
    pub decider: Decider,
    /// Siblings first, then servers of the parent domain.
    pub views: Vec<View>,
    siblings: usize,
    /// When each other server is asked next.
    pub next_ask: Vec<u64>,
    /// Answers on their way: when they come, from whom, and what; none where nobody listens.
    pub answers: Vec<(u64, usize, Option<Option<Told>>)>,
    /// Flush positions that others told and when, for acknowledgements.
    said: Vec<(u64, u64)>,
}

impl Node {
    /// One of `count`, among `all` servers with those of the parent domain.
    pub fn new(index: usize, count: usize, all: usize, clock: u32, resync: bool) -> Node {
        // Of a domain with none, anybody is the majority.
        let members = if without("majority") { 0 } else { count };
        Node {
            index,
            up: false,
            paused_until: 0,
            started: 0,
            opening_until: 0,
            clock,
            jumped: Duration::ZERO,
            flush: 100,
            first: 100,
            has_data: true,
            anew: false,
            waiting_to_copy: 0,
            slot: SlotWatch::new(Duration::ZERO),
            copying: None,
            healthy: true,
            lagging: false,
            hangs_since: None,
            link: Link::None,
            follows: 0,
            link_heard: 0,
            opening: None,
            top_read: 0,
            members,
            resync,
            decided: Decision::Stay,
            decider: Decider::new(TAKEOVER_AFTER, members, resync),
            views: Vec::with_capacity(all),
            siblings: count,
            next_ask: vec![0; all],
            answers: Vec::new(),
            said: vec![(0, 0); count],
        }
    }

    pub fn name(&self) -> &'static str {
        NAMES[self.index]
    }

    pub fn start(&mut self, now: u64, opening: u64) {
        self.up = true;
        self.started = now;
        self.opening_until = now + opening;
        self.unlink();
        self.decider = Decider::new(TAKEOVER_AFTER, self.members, self.resync);
        let unknown = View {
            sight: Sight::Unknown,
            told: None,
            heard: now,
        };
        self.views = vec![unknown; self.next_ask.len()];
        self.next_ask.fill(now);
        self.answers.clear();
        self.jumped = Duration::ZERO;
        self.waiting_to_copy = 0;
        self.slot = SlotWatch::new(ticks(now));
        self.said.fill((0, 0));
    }

    pub fn unlink(&mut self) {
        self.link = Link::None;
        self.opening = None;
        self.copying = None;
    }

    /// Time as the node counts it.
    pub fn clock(&self, now: u64) -> Duration {
        ticks(now - self.started) * self.clock / 100 + self.jumped
    }

    /// What others have answered, as of when they did.
    pub fn hear(&mut self, now: u64) {
        let come = self.answers.extract_if(.., |answer| answer.0 <= now);
        for (_, other, answer) in come.collect::<Vec<_>>() {
            let view = &mut self.views[other];
            let Some(told) = answer else {
                view.sight = Sight::Refused;
                continue;
            };
            (view.sight, view.heard) = (Sight::Answers, now);
            if let Some(said) = self.said.get_mut(other) {
                *said = (told.as_ref().map_or(0, |told| told.flush.0), now);
            }
            view.told = told;
        }
        for view in &mut self.views {
            let known = !matches!(view.sight, Sight::Refused | Sight::Unknown);
            if known && now - view.heard > 10 {
                view.sight = Sight::Silent(ticks(now - view.heard));
            }
        }
    }

    fn look(&self, now: u64, others: std::ops::Range<usize>) -> Vec<Peer> {
        let others = others.filter(|other| *other != self.index);
        let peer = |other: usize| {
            let view = &self.views[other];
            let name = match NAMES.get(other).filter(|_| other < self.siblings) {
                Some(name) => (*name).to_owned(),
                None => format!("p{}", other - self.siblings),
            };
            Peer {
                name,
                sight: match view.sight {
                    Sight::Silent(_) | Sight::Refused if without("unheard") => Sight::Answers,
                    sight => sight,
                },
                told: view.told.clone(),
                age: match without("unheard") {
                    true => Duration::ZERO,
                    false => ticks(now - view.heard),
                },
                standby: false,
            }
        };
        others.map(peer).collect()
    }

    fn peers(&self, now: u64) -> Vec<Peer> {
        self.look(now, 0..self.siblings)
    }

    pub fn parents(&self, now: u64) -> Vec<Peer> {
        self.look(now, self.siblings..self.views.len())
    }

    pub fn heard(&self, now: u64) -> Option<Duration> {
        (self.link != Link::None).then(|| ticks(now - self.link_heard))
    }

    /// Rule C: what two members hold.
    fn held(&self, now: u64) -> u64 {
        let held = |(other, (flush, at)): (usize, &(u64, u64))| match other == self.index {
            true => self.flush,
            false if now - at > ACK_TIMEOUT => 0,
            false => *flush,
        };
        let mut held: Vec<u64> = self.said.iter().enumerate().map(held).collect();
        held.sort_unstable_by(|a, b| b.cmp(a));
        held[1.min(held.len() - 1)].min(self.flush)
    }

    /// Retention: what the others have said to hold is let go.
    fn trim(&mut self) {
        let said = self.said.iter().map(|(flush, _)| *flush);
        let least = said.filter(|flush| *flush > 0).min().unwrap_or(0);
        let needed = least.saturating_sub(2000);
        self.first = self.first.max(needed).min(self.flush);
    }

    fn receive(&mut self, flush: u64) {
        let received = flush.min(self.flush + RATE);
        self.flush = match without("D") {
            true => received,
            false => self.flush.max(received),
        };
    }

    pub fn has_copied(&mut self, position: u64) {
        (self.flush, self.first) = (position, position);
        (self.has_data, self.anew, self.copying) = (true, false, None);
    }

    fn throw_away(&mut self, now: u64, anew: bool) {
        self.unlink();
        (self.has_data, self.anew) = (false, anew);
        (self.flush, self.first, self.waiting_to_copy) = (0, 0, 0);
        self.slot = SlotWatch::new(ticks(now));
    }
}

pub fn ticks(ticks: u64) -> Duration {
    TICK * u32::try_from(ticks).unwrap()
}

impl World {
    // ----- the link ---------------------------------------------------------

    pub fn stream(&mut self, index: usize) {
        match self.nodes[index].link.clone() {
            Link::None => {}
            _ if self.hangs(index) => {}
            Link::Parent => self.stream_from_parent(index),
            Link::Peer(name) => {
                let via = NAMES.iter().position(|n| *n == name).unwrap();
                self.stream_from_peer(index, via);
            }
        }
        if self.now - self.nodes[index].link_heard > SILENCE {
            self.lose_link(index, None);
        }
    }

    fn stream_from_peer(&mut self, index: usize, via: usize) {
        if !self.talks(index, via) {
        } else if !self.nodes[via].up {
            self.nodes[index].link = Link::None;
        } else if self.runs(via) {
            let now = self.now;
            let source = &self.nodes[via];
            let (first, flush, top_read) = (source.first, source.flush, source.top_read);
            let empty = !source.has_data;
            let node = &mut self.nodes[index];
            node.link_heard = now;
            if first > node.flush || empty {
                node.link = Link::None;
            } else {
                node.receive(flush);
                node.top_read = top_read;
            }
        }
    }

    fn stream_from_parent(&mut self, index: usize) {
        let (now, at) = (self.now, self.nodes[index].follows);
        if !self.talks_to_parent(index, at) || self.parents[at].paused_until > now {
            return;
        }
        if !self.holds(index, at) {
            return self.lose_link(index, None);
        }
        let server = &mut self.parents[at];
        let node = &mut self.nodes[index];
        if let Some(holder) = &mut server.holder {
            holder.heard = now;
        }
        node.link_heard = now;
        if server.forgotten() > node.flush {
            // A START below the confirmed position is forwarded without a word.
            assert!(server.slot.is_none(), "{} has a hole", node.name());
            let ahead = Refusal::Ahead(Lsn(server.first));
            return self.lose_link(index, Some(ahead));
        }
        node.receive(server.flush);
        node.top_read = server.read_at;
        server.acknowledge(node.held(now));
        if self.random.one_in(100) {
            self.nodes[index].trim();
        }
    }

    /// The link has ended by itself.
    fn lose_link(&mut self, index: usize, refusal: Option<Refusal>) {
        let now = self.now;
        let was = self.nodes[index].link.clone();
        self.let_go_of_parent(index);
        let node = &mut self.nodes[index];
        node.link = Link::None;
        if was == Link::Parent {
            let clock = node.clock(now);
            match refusal {
                Some(refusal) => node.decider.refused(clock, refusal),
                None if now - node.link_heard >= SILENCE - 10 => node.decider.led_in_vain(clock),
                None => node.decider.failed(clock),
            }
        }
    }

    /// What held the slot lets it go, if that gets there.
    fn let_go_of_parent(&mut self, index: usize) {
        let at = self.nodes[index].follows;
        let gets_there = self.talks_to_parent(index, at) && !self.hangs(index);
        if self.nodes[index].link == Link::Parent && self.holds(index, at) && gets_there {
            self.parents[at].holder = None;
        }
    }

    // ----- the decision -----------------------------------------------------

    pub fn decide(&mut self, index: usize) {
        let now = self.now;
        let told = self.told(index).expect("a node tells");
        let node = &self.nodes[index];
        let (peers, parents) = (node.peers(now), node.parents(now));
        let hangs = self.hangs(index);
        if !node.has_data {
            if !hangs {
                self.copy(index, &told, &peers, &parents);
            }
            return;
        }
        let own = Own {
            told,
            link: node.link.clone(),
            heard: node.heard(now),
            opening: node.opening.is_some(),
            doubtful: false,
        };
        let clock = node.clock(now);
        let decision = self.nodes[index]
            .decider
            .decide(clock, &own, &peers, &parents);
        let node = &mut self.nodes[index];
        if decision != node.decided && decision != Decision::NoParent {
            node.decided = decision.clone();
            let node = &self.nodes[index];
            self.tell(|| format!("{} at {}: {decision:?}", node.name(), node.flush));
        }
        // A link that hangs in its disk takes no other's place; it can only be given up.
        let decision = match decision {
            Decision::Lead { .. } | Decision::Follow(_) | Decision::CopyAnew { .. } if hangs => {
                Decision::Leave("for another".into())
            }
            decision => decision,
        };
        self.carry_out(index, decision);
        self.try_parent(index);
    }

    fn carry_out(&mut self, index: usize, decision: Decision) {
        let now = self.now;
        match decision {
            Decision::Stay | Decision::NoParent | Decision::NoSource => {}
            Decision::HandOver { .. } if without("G") => {}
            Decision::Lead { parent, depose } => self.start_try(index, parent, depose),
            Decision::Follow(name) => {
                self.let_go_of_parent(index);
                let node = &mut self.nodes[index];
                node.opening = None;
                (node.link, node.link_heard) = (Link::Peer(name), now);
            }
            Decision::Leave(_) => {
                self.let_go_of_parent(index);
                self.nodes[index].unlink();
            }
            Decision::HandOver { to, .. } => {
                self.let_go_of_parent(index);
                let clock = self.nodes[index].clock(now);
                self.nodes[index].unlink();
                self.nodes[index].decider.yield_to(clock, &to);
                let to = NAMES.iter().position(|n| *n == to).unwrap();
                if self.runs(to) && self.talks(index, to) {
                    let end = Lsn(self.nodes[index].flush);
                    let theirs = self.nodes[to].clock(now);
                    self.nodes[to].decider.take_over(theirs, end);
                }
            }
            // Who does not answer may have it: that is told, and nothing is done.
            Decision::Gap { sure: false, .. } => {}
            Decision::Gap { missing, .. } => {
                let name = self.nodes[index].name();
                assert!(self.resync, "{name} cries gap: {missing:?}");
            }
            Decision::CopyAnew { missing } => {
                match missing {
                    Some(Missing::Forgotten(_)) => self.assert_is_gap(index),
                    Some(Missing::Slot) => {
                        // It may just have been made anew, by another one's copy.
                        let flush = self.nodes[index].flush;
                        let is_old = |slot: &Slot| slot.exists && now - slot.made_at > 10;
                        let serves = |slot: &Slot| is_old(slot) && slot.confirmed <= flush;
                        let slot = self.parents[0].slot.as_ref();
                        assert!(!slot.is_some_and(serves), "the slot is there");
                    }
                    None => {}
                }
                self.let_go_of_parent(index);
                let now = self.now;
                self.nodes[index].throw_away(now, missing.is_some());
            }
        }
    }

    fn start_try(&mut self, index: usize, parent: usize, depose: Option<Session>) {
        let takes = 1 + 2 * self.slow[index][self.count() + parent];
        self.let_go_of_parent(index);
        let node = &mut self.nodes[index];
        node.link = Link::None;
        if node.opening.is_none_or(|opening| opening.parent != parent) {
            node.opening = Some(Try {
                parent,
                depose,
                until: self.now + takes,
                gives_up: self.now + OPENING_LIMIT,
            });
        }
    }

    /// What a try at a server of the parent domain comes to, when its answer is there.
    fn try_parent(&mut self, index: usize) {
        let now = self.now;
        let Some(opening) = self.nodes[index].opening else {
            return;
        };
        let reaches = self.talks_to_parent(index, opening.parent);
        let server = &self.parents[opening.parent];
        let answers = reaches && server.paused_until <= now && opening.until <= now;
        if now < opening.gives_up && !answers || self.hangs(index) {
            return;
        }
        self.nodes[index].opening = None;
        let clock = self.nodes[index].clock(now);
        if !answers || !self.parents[opening.parent].up {
            return self.nodes[index].decider.failed(clock);
        }
        match self.acquire(index, &opening, clock) {
            Ok(()) => {
                let node = &mut self.nodes[index];
                (node.link, node.link_heard) = (Link::Parent, now);
                node.follows = opening.parent;
            }
            Err(refusal) => {
                self.tell(|| format!("{} is refused: {refusal:?}", NAMES[index]));
                self.nodes[index].decider.refused(clock, refusal);
            }
        }
    }

    fn acquire(&mut self, index: usize, opening: &Try, clock: Duration) -> Result<(), Refusal> {
        let now = self.now;
        let node = &mut self.nodes[index];
        let server = &mut self.parents[opening.parent];
        if server.slot.as_ref().is_some_and(|slot| !slot.exists) {
            return Err(Refusal::NoSlot);
        }
        if let Some(session) = opening.depose {
            node.decider.deposes(clock);
            if server
                .holder
                .is_some_and(|holder| holder.session == session)
            {
                server.holder = None;
                self.deposed += 1;
            }
        }
        if let Some(holder) = server.holder {
            return Err(Refusal::Busy(holder.session));
        }
        if server.forgotten() > node.flush && !without("A") {
            return Err(Refusal::Ahead(Lsn(server.forgotten())));
        }
        self.takeovers += 1;
        let confirmed = server.slot.as_ref().map_or(0, |slot| slot.confirmed);
        server.holder = Some(Holder {
            node: index,
            session: u32::try_from(self.takeovers).unwrap(),
            heard: now,
            acknowledged: confirmed,
        });
        Ok(())
    }
}
