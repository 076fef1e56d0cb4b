//! What happens to the servers, and what of it never heals.

use std::time::Duration;

use terrace_bridge::domain::Link;

use crate::node::NAMES;
use crate::world::{TICK, World};

/// Nobody's clock jumps further in all: it would wait in vain for those that are away.
const MAX_JUMP: Duration = Duration::from_secs(100);

impl World {
    pub fn fault(&mut self) {
        if self.random.one_in(4) {
            let at = self.random.below(self.parents.len() as u64) as usize;
            return match self.parents[at].slot {
                Some(_) => self.fault_at_postgres(),
                None => self.fault_at_bridge(at),
            };
        }
        let count = self.count() as u64;
        let node = self.random.below(count) as usize;
        match self.random.below(13) {
            0 | 1 if self.nodes[node].up => {
                self.tell(|| format!("{} crashes", NAMES[node]));
                self.crash(node);
            }
            0..=2 if !self.nodes[node].up => {
                self.tell(|| format!("{} starts", NAMES[node]));
                self.start(node);
            }
            3 => {
                let ticks = 5 + self.random.below(150);
                self.tell(|| format!("{} pauses for {ticks}", NAMES[node]));
                self.nodes[node].paused_until = self.now + ticks;
            }
            4 => {
                let other = self.random.below(self.cut.len() as u64) as usize;
                if other != node {
                    let both = self.random.one_in(2);
                    self.tell(|| format!("cut {node} -> {other}, both ways: {both}"));
                    self.cut[node][other] = true;
                    self.cut[other][node] |= both;
                }
            }
            5 => {
                self.tell(|| "all links heal".into());
                self.cut.iter_mut().flatten().for_each(|cut| *cut = false);
            }
            6 => self.lose_disk(node),
            7 => self.hang(node, self.nodes[node].hangs_since.is_none()),
            8 => {
                let other = self.random.below(self.cut.len() as u64) as usize;
                let ticks = self.random.below(30);
                self.tell(|| format!("{other} answers {node} after {ticks}"));
                self.slow[node][other] = ticks;
            }
            9 if self.nodes[node].jumped < MAX_JUMP => {
                let ticks = 1 + self.random.below(600) as u32;
                self.tell(|| format!("clock of {} jumps by {ticks}", NAMES[node]));
                self.nodes[node].jumped += TICK * ticks;
            }
            10 => self.switch_over(node),
            11 => {
                let lagging = self.random.one_in(2);
                self.tell(|| format!("database of {} lags: {lagging}", NAMES[node]));
                self.nodes[node].lagging = lagging;
            }
            _ => {
                let healthy = self.random.one_in(2);
                self.tell(|| format!("database of {} works: {healthy}", NAMES[node]));
                self.nodes[node].healthy = healthy;
            }
        }
    }

    fn fault_at_postgres(&mut self) {
        let (kind, now) = (self.random.below(8), self.now);
        let ticks = self.random.below(100);
        let (resync, head) = (self.resync, self.head);
        let server = &mut self.parents[0];
        let was = server.forgotten();
        let what = match kind {
            // With a gap nothing that anybody has is of use any more.
            0 if resync => {
                server.forget(head);
                "another client has read from the slot"
            }
            1 if resync => {
                server.forget(head);
                server.slot.as_mut().expect("a Postgres").exists = false;
                "the slot is dropped"
            }
            2 | 3 => {
                server.crash();
                server.up = true;
                "the parent restarts"
            }
            4 | 5 if server.up => {
                server.crash();
                "the parent crashes"
            }
            6 => {
                server.paused_until = now + ticks;
                "the parent pauses"
            }
            _ => {
                server.up = true;
                "the parent starts"
            }
        };
        self.tell(|| format!("{what}; it had confirmed {was}"));
    }

    fn fault_at_bridge(&mut self, at: usize) {
        let (kind, now) = (self.random.below(12), self.now);
        let ticks = self.random.below(150);
        let (resync, head) = (self.resync, self.head);
        let server = &mut self.parents[at];
        let what = match kind {
            0 | 1 if server.up => {
                server.crash();
                "crashes"
            }
            0..=3 if !server.up => {
                server.up = true;
                "starts"
            }
            2 | 4 => {
                server.paused_until = now + ticks;
                "pauses"
            }
            5 | 6 => {
                server.is_dry = !server.is_dry;
                "is cut off from the top, or no more"
            }
            7 => {
                server.healthy = !server.healthy;
                "has a broken database, or no more"
            }
            8 if resync => {
                server.lose_disk(head);
                "loses its disk"
            }
            9 if resync => {
                server.forget(head);
                "lets go of what it kept"
            }
            _ => return,
        };
        self.tell(|| format!("p{at} {what}"));
    }

    /// Only what somebody else holds may be lost: more is no failure of the decision.
    fn lose_disk(&mut self, index: usize) {
        let mut others = (0..self.count()).filter(|other| *other != index);
        if others.any(|other| self.has_all(other)) {
            self.tell(|| format!("{} loses its disk", NAMES[index]));
            self.crash(index);
            let node = &mut self.nodes[index];
            (node.flush, node.first, node.has_data) = (0, 0, false);
        }
    }

    /// Who leads is told to hand over to this one, whatever has become of it meanwhile.
    fn switch_over(&mut self, to: usize) {
        let leads = |index: &usize| self.nodes[*index].link == Link::Parent && self.runs(*index);
        let Some(master) = (0..self.count()).find(leads).filter(|index| *index != to) else {
            return;
        };
        self.tell(|| format!("{} is to hand over to {}", NAMES[master], NAMES[to]));
        let clock = self.nodes[master].clock(self.now);
        self.nodes[master].decider.yield_to(clock, NAMES[to]);
    }

    fn hang(&mut self, index: usize, hangs: bool) {
        self.tell(|| format!("disk of {} hangs: {hangs}", NAMES[index]));
        let node = &mut self.nodes[index];
        node.hangs_since = hangs.then_some(self.now);
        // A connection that was told to end ends at last.
        let (at, leads) = (node.follows, node.link == Link::Parent);
        if !hangs && !leads && self.holds(index, at) {
            self.parents[at].holder = None;
        }
    }

    // ----- the end of the faults --------------------------------------------

    pub fn heal(&mut self) {
        self.tell(|| "--- everything heals".into());
        self.cut.iter_mut().flatten().for_each(|cut| *cut = false);
        self.slow.iter_mut().flatten().for_each(|slow| *slow = 0);
        for server in &mut self.parents {
            (server.up, server.healthy, server.is_dry) = (true, true, false);
            server.paused_until = 0;
        }
        for index in 0..self.count() {
            self.nodes[index].paused_until = 0;
            self.nodes[index].healthy = true;
            self.nodes[index].lagging = false;
            self.hang(index, false);
            if !self.nodes[index].up {
                self.start(index);
            }
        }
        let slot = self.parents[0].slot.as_ref();
        let slot_lost = slot.is_some_and(|slot| !slot.exists);
        self.in_gap = slot_lost || !(0..self.count()).any(|index| self.has_all(index));
        if self.in_gap {
            return;
        }
        if self.random.one_in(3) {
            self.lose_parents();
        }
        let dry = self.lost_parents.iter().any(|at| self.parents[*at].is_dry);
        if dry && self.random.one_in(2) {
            self.shut_off();
        }
        if self.shut_off.is_none() && self.random.one_in(3) {
            self.lose_minority();
        }
        let sick = self.random.below(2 * self.count() as u64) as usize;
        // What only it has, nobody could get from a database that is broken for ever.
        let mut others =
            (0..self.count()).filter(|other| *other != sick && !self.lost.contains(other));
        if self.shut_off.is_none()
            && sick < self.count()
            && !self.lost.contains(&sick)
            && self.has_all(sick)
            && others.any(|other| self.has_all(other))
        {
            self.sick = Some(sick);
            match self.random.one_in(2) {
                true => self.hang(sick, true),
                false => self.nodes[sick].healthy = false,
            }
        }
        let whole = self.lost.is_empty() && self.shut_off.is_none();
        if whole && self.count() > 3 && self.random.one_in(3) {
            self.narrow();
        }
    }

    /// All but one at the most, unless only they keep what the domain lacks.
    fn lose_parents(&mut self) {
        for at in 0..self.parents.len() {
            if self.lost_parents.len() + 1 == self.parents.len() || self.random.one_in(2) {
                continue;
            }
            self.lost_parents.push(at);
            if !(0..self.count()).any(|index| self.has_all(index)) {
                self.lost_parents.pop();
                continue;
            }
            let fate = self.random.below(3);
            self.tell(|| format!("p{at} is lost for good: {fate}"));
            match fate {
                0 => self.parents[at].crash(),
                1 => self.parents[at].is_dry = true,
                _ => {
                    let place = self.count() + at;
                    for index in 0..self.count() {
                        (self.cut[index][place], self.cut[place][index]) = (true, true);
                    }
                }
            }
        }
    }

    /// One server reaches none of those above that read the top.
    fn shut_off(&mut self) {
        let one = self.random.below(self.count() as u64) as usize;
        self.tell(|| format!("{} reaches nobody that reads the top", NAMES[one]));
        for at in (0..self.parents.len()).filter(|at| !self.lost_parents.contains(at)) {
            let place = self.count() + at;
            (self.cut[one][place], self.cut[place][one]) = (true, true);
        }
        self.shut_off = Some(one);
    }

    /// One server keeps a single sibling, and both are sound.
    fn narrow(&mut self) {
        let count = self.count();
        let one = self.random.below(count as u64) as usize;
        let hub = (one + 1 + self.random.below(count as u64 - 1) as usize) % count;
        if self.sick == Some(one) || self.sick == Some(hub) {
            return;
        }
        self.tell(|| format!("{} reaches only {}", NAMES[one], NAMES[hub]));
        for other in (0..count).filter(|other| *other != hub && *other != one) {
            (self.cut[one][other], self.cut[other][one]) = (true, true);
        }
        self.narrow = Some(one);
    }

    /// Unless only these have what was confirmed.
    fn lose_minority(&mut self) {
        let count = self.count();
        let most = (count - 1) / 2;
        let lost: Vec<usize> = (0..count)
            .filter(|_| self.random.one_in(2))
            .take(most)
            .collect();
        let rest = |index: &usize| !lost.contains(index);
        if !(0..count).filter(rest).any(|index| self.has_all(index)) {
            return;
        }
        let together = self.random.one_in(2);
        for &node in &lost {
            let fate = self.random.below(3);
            self.tell(|| format!("{} is lost for good: {fate}", NAMES[node]));
            if fate == 0 {
                self.crash(node);
            }
            let reach = if fate == 1 { self.cut.len() } else { count };
            let parts =
                |other: &usize| *other >= count || rest(other) || *other != node && !together;
            for other in (0..reach).filter(parts) {
                (self.cut[node][other], self.cut[other][node]) = (true, true);
            }
        }
        self.lost = lost;
    }
}
