//! A server of the parent domain: the top's Postgres with the domain's slot, or a bridge with its
//! queue and the domain's place in it.

use terrace_bridge::domain::{Session, Told};
use terrace_bridge::lsn::Lsn;
use terrace_bridge::status::Role;

use crate::without;

/// A silent session is given up after this many ticks (`wal_sender_timeout`).
pub const LEASE: u64 = 100;
/// Taken from above in a tick, at most.
pub const RATE: u64 = 200;

/// Who streams from a server.
#[derive(Clone, Copy)]
pub struct Holder {
    pub node: usize,
    pub session: Session,
    pub heard: u64,
    /// What it has acknowledged, and who was before it.
    pub acknowledged: u64,
}

/// The top's Postgres.
pub struct Slot {
    pub exists: bool,
    pub made_at: u64,
    pub confirmed: u64,
    /// What a crash leaves of that.
    pub saved: u64,
}

pub struct Server {
    pub index: usize,
    pub up: bool,
    pub paused_until: u64,
    pub healthy: bool,
    pub holder: Option<Holder>,
    /// Of a Postgres.
    pub slot: Option<Slot>,
    /// Ends of what a bridge keeps, and where it knows the domain below to be.
    pub first: u64,
    pub flush: u64,
    pub place: u64,
    /// Gets nothing from above.
    pub is_dry: bool,
    /// When it has read the top last.
    pub read_at: u64,
}

impl Server {
    pub fn postgres() -> Server {
        let slot = Slot {
            exists: true,
            made_at: 0,
            confirmed: 100,
            saved: 100,
        };
        Server {
            slot: Some(slot),
            place: 0,
            ..Server::bridge(0)
        }
    }

    pub fn bridge(index: usize) -> Server {
        Server {
            index,
            up: true,
            paused_until: 0,
            healthy: true,
            holder: None,
            slot: None,
            first: 100,
            flush: 100,
            place: 100,
            is_dry: false,
            read_at: 0,
        }
    }

    pub fn name(&self) -> String {
        format!("p{}", self.index)
    }

    pub fn runs(&self, now: u64) -> bool {
        self.up && self.paused_until <= now
    }

    /// What lies before is not sent any more.
    pub fn forgotten(&self) -> u64 {
        match &self.slot {
            Some(slot) => slot.confirmed,
            None => self.first,
        }
    }

    /// What it has been told, or is about to note.
    pub fn acknowledged(&self) -> u64 {
        let told = self.holder.map_or(0, |holder| holder.acknowledged);
        self.place.max(told)
    }

    pub fn crash(&mut self) {
        self.up = false;
        self.holder = None;
        if let Some(slot) = &mut self.slot {
            slot.confirmed = slot.saved;
        }
    }

    /// Another server of its domain gives it all anew.
    pub fn lose_disk(&mut self, head: u64) {
        self.crash();
        (self.first, self.flush, self.place) = (head, head, 0);
    }

    /// Nothing of what was sent is kept.
    pub fn forget(&mut self, head: u64) {
        match &mut self.slot {
            Some(slot) => (slot.confirmed, slot.saved) = (head, head),
            None => self.first = self.flush,
        }
        self.holder = None;
    }

    pub fn tick(&mut self, now: u64, head: u64, save: bool) {
        if self.holder.is_some_and(|holder| now - holder.heard > LEASE) {
            self.holder = None;
        }
        if let Some(slot) = &mut self.slot {
            (self.flush, self.read_at) = (head, now);
            if save {
                slot.saved = slot.confirmed;
            }
        } else if self.runs(now) && !self.is_dry {
            self.flush = self.flush.max(head.min(self.flush + RATE));
            self.read_at = now;
        }
    }

    /// What it lets go of below a place that it knows.
    pub fn trim(&mut self, keep: u64) {
        if self.slot.is_none() && self.place > 0 {
            let needed = self.place.saturating_sub(keep);
            self.first = self.first.max(needed.min(self.flush));
        }
    }

    /// The domain below holds all up to here.
    pub fn acknowledge(&mut self, held: u64) {
        let Some(holder) = &mut self.holder else {
            return;
        };
        let held = match without("floor") {
            true => held,
            false => held.max(holder.acknowledged),
        };
        holder.acknowledged = held;
        match &mut self.slot {
            Some(slot) => {
                // Older PostgreSQL takes what it is told, and has let go of what lies between.
                assert!(held >= slot.confirmed, "the acknowledged goes back");
                slot.confirmed = held;
            }
            None => self.place = self.place.max(held.min(self.flush)),
        }
    }

    /// What it tells; a Postgres tells nothing.
    pub fn told(&self) -> Option<Told> {
        self.slot.is_none().then(|| Told {
            node: self.name(),
            domain: "p".into(),
            role: Role::Slave,
            has_data: true,
            healthy: self.healthy,
            serves: true,
            flush: Lsn(self.flush),
            first: Lsn(self.first),
            top_time: micros(self.read_at),
            path: vec![self.name()],
            domains: vec!["p".into()],
            ..Told::default()
        })
    }
}

/// The top's clock at that tick.
pub fn micros(tick: u64) -> i64 {
    i64::try_from(tick).unwrap() * 100_000
}
