//! How a server of the domain gets its data, and what becomes of the slot meanwhile: what
//! `open.rs` and `copy.rs` do.

use terrace_bridge::domain::{Peer, Source, Told, copy_source, has_in_sight, parent_to_copy_from};
use terrace_bridge::lsn::Lsn;

use crate::node::{NAMES, Node, TAKEOVER_AFTER, ticks};
use crate::upstream::{LEASE, Slot};
use crate::world::World;

/// A copy of another server's data.
pub struct Copying {
    /// A node, or after those a server of the parent domain.
    pub from: usize,
    /// What it holds when it is complete.
    position: u64,
    until: u64,
    /// When it went on last.
    alive: u64,
}

impl World {
    pub fn copy(&mut self, index: usize, own: &Told, peers: &[Peer], parents: &[Peer]) {
        if let Some(copying) = self.nodes[index].copying.take() {
            return self.go_on_copying(index, copying);
        }
        self.nodes[index].waiting_to_copy += 1;
        let waited = ticks(self.nodes[index].waiting_to_copy);
        let from = match copy_source(waited, own, peers, TAKEOVER_AFTER) {
            Source::Wait => return,
            Source::Peer(name) => NAMES.iter().position(|n| *n == name),
            Source::Parent => {
                let chosen = parent_to_copy_from(own, parents, None, TAKEOVER_AFTER);
                let chosen = chosen.filter(|at| self.may_copy(index, *at, peers));
                let slot = self.parents[0].slot.as_ref().filter(|slot| slot.exists);
                let has_it = |slot: &Slot| has_in_sight(peers, Lsn(slot.confirmed));
                if chosen.is_none() && slot.is_some_and(has_it) {
                    self.nodes[index].anew = false;
                }
                chosen.map(|at| self.count() + at)
            }
        };
        let Some(from) = from.filter(|from| self.gives_data(index, *from)) else {
            return;
        };
        let position = match from.checked_sub(self.count()) {
            None => self.nodes[from].flush,
            Some(at) => {
                self.drop_slot(index, at);
                self.parents[at].flush
            }
        };
        let until = self.now + 5 + self.random.below(60);
        self.tell(|| format!("{} copies from {from} at {position}", NAMES[index]));
        self.nodes[index].copying = Some(Copying {
            from,
            position,
            until,
            alive: self.now,
        });
    }

    /// The permanent one, at the end of a copy.
    fn make_slot(&mut self, at: usize, position: u64) -> bool {
        let server = &mut self.parents[at];
        if let Some(slot) = &mut server.slot {
            if slot.exists {
                return false;
            }
            (slot.exists, slot.made_at) = (true, self.now);
            (slot.confirmed, slot.saved) = (position, position);
        }
        server.forgotten() <= position
    }

    /// One that is there makes room for a copy.
    fn drop_slot(&mut self, index: usize, at: usize) {
        // One whose database is broken may never lead again.
        let able = |other: &usize| self.has_all(*other) && self.nodes[*other].healthy;
        let able = (0..self.count()).find(able);
        let head = self.head;
        let slot = self.parents[at].slot.as_mut();
        let Some(slot) = slot.filter(|slot| slot.exists) else {
            return;
        };
        if let Some(able) = able {
            panic!("{} drops the slot of {}", NAMES[index], NAMES[able]);
        }
        slot.exists = false;
        (slot.confirmed, slot.saved) = (head, head);
    }

    fn gives_data(&self, index: usize, from: usize) -> bool {
        let works = match self.nodes.get(from) {
            Some(node) => node.has_data && node.healthy,
            None => true,
        };
        self.runs(from) && self.talks(index, from) && works
    }

    /// A slot that is there belongs to a server that has data, unless that was found wanting.
    fn may_copy(&mut self, index: usize, at: usize, peers: &[Peer]) -> bool {
        let server = &self.parents[at];
        let from = self.count() + at;
        let copies = |other: &Node| {
            let copying = other.copying.as_ref();
            let copying = copying.filter(|copying| copying.from == from);
            copying.is_some_and(|copying| self.now - copying.alive <= LEASE)
        };
        let mut others = self.nodes.iter().filter(|other| other.index != index);
        if server.holder.is_some() || others.any(copies) {
            self.nodes[index].slot.in_use(ticks(self.now));
            return false;
        }
        match &server.slot {
            Some(slot) if slot.exists => {
                let node = &mut self.nodes[index];
                node.slot.found(ticks(self.now), Lsn(slot.confirmed));
                node.anew && node.slot.may_go(ticks(self.now), peers).is_some()
            }
            _ => true,
        }
    }

    fn go_on_copying(&mut self, index: usize, mut copying: Copying) {
        let ended = self.now - copying.alive > LEASE;
        if ended || !self.gives_data(index, copying.from) {
            return;
        }
        copying.alive = self.now;
        if self.now < copying.until {
            self.nodes[index].copying = Some(copying);
            return;
        }
        let kept = match copying.from.checked_sub(self.count()) {
            None => self.nodes[copying.from].first <= copying.position,
            Some(at) => self.make_slot(at, copying.position),
        };
        if kept {
            self.tell(|| format!("{} has copied", NAMES[index]));
            self.nodes[index].has_copied(copying.position);
        }
    }
}
