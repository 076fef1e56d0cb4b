//! The decision of [`terrace_bridge::domain`] under random schedules of crashes,
//! restarts, lost disks, disks that hang, broken databases, partitions, slow links,
//! paused processes, clocks that run wrong or jump, databases that lag, switchovers to whomever,
//! and a parent that forgets what was confirmed last, with a model of the slot and the queues. A link that is cut one way
//! passes nothing, as TCP has it.
//!
//! Properties: no server ever skips a part of the history or goes back; when the
//! faults end there is one master within a bounded time, everybody holds all, and
//! nobody takes the slot from it any more. Some things never heal: in half of the
//! schedules one server stays sick, and is not the master then; in a third of them a
//! minority stays dead, or cut off from the others (the parent may still be in its
//! reach), and the rest does without it; in some others one of four or five servers
//! keeps the parent and a single sibling, which leads or has another one lead.
//!
//! `SCHEDULES=100000 cargo test --release --test schedules` runs many; a failing
//! seed is printed, and `SEED=n` replays it with its story. `WITHOUT=A` (or `D`, `G`)
//! takes a rule out, for seeing a property fail; `WITHOUT=majority` lets anybody depose,
//! with `WITHOUT=outnumbered` nobody tells whom it reaches, with `WITHOUT=opening` a server
//! that has just started is taken for empty, and with `WITHOUT=floor` acknowledgements go back.

use std::sync::LazyLock;
use std::time::Duration;

use terrace_bridge::domain::{
    Decider, Decision, Link, Own, Peer, Refusal, Sight, Source, Told, copy_source,
};
use terrace_bridge::lsn::Lsn;
use terrace_bridge::status::Role;

const TICK: Duration = Duration::from_millis(100);
const TAKEOVER_AFTER: Duration = Duration::from_secs(3);
/// The parent gives up a silent session after this (`wal_sender_timeout`).
const LEASE: u64 = 100;
/// Ticks of faults, and of the calm once all is settled.
const FAULTS: u64 = 300;
const CALM: u64 = 200;
/// How soon all is settled; later when one that holds the slot must be deposed, for that
/// is tried at growing intervals, or when what others may keep is waited for.
const SOON: u64 = 200;
const LATER: u64 = 900;
/// What a server told longer ago does not count for an acknowledgement. One that is alone
/// never goes on alone here.
const ACK_TIMEOUT: u64 = 100;
/// An answer that takes longer is none.
const ANSWER_LIMIT: u64 = 20;
const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

#[derive(Clone)]
struct View {
    sight: Sight,
    told: Option<Told>,
    heard: u64,
}

struct Node {
    up: bool,
    paused_until: u64,
    started: u64,
    /// Its database does not say yet what it has.
    opening_until: u64,
    /// Its clock runs at this many per cent of the true one, and has jumped ahead.
    clock: u32,
    jumped: Duration,
    flush: u64,
    first: u64,
    has_data: bool,
    waiting_to_copy: u64,
    healthy: bool,
    /// Its database is far behind its queue.
    lagging: bool,
    /// Its disk has not answered since then.
    hangs_since: Option<u64>,
    link: Link,
    link_heard: u64,
    decider: Decider,
    views: Vec<View>,
    parent: Sight,
    parent_heard: u64,
    next_poll: u64,
    /// When each other server is asked next.
    next_ask: Vec<u64>,
    /// Answers on their way: when they come, from whom, and what.
    answers: Vec<(u64, usize, Option<Told>)>,
    /// Flush positions that others told and when, for acknowledgements.
    said: Vec<(u64, u64)>,
}

#[derive(Clone, Copy)]
struct Holder {
    node: usize,
    session: u32,
    heard: u64,
    /// What it has acknowledged, and who was before it.
    acknowledged: u64,
}

struct World {
    random: Random,
    now: u64,
    head: u64,
    confirmed: u64,
    saved: u64,
    holder: Option<Holder>,
    nodes: Vec<Node>,
    /// `cut[a][b]`: nothing gets from a to b; the last index is the parent.
    cut: Vec<Vec<bool>>,
    /// Ticks that an answer of b to a takes.
    slow: Vec<Vec<u64>>,
    deposed: u64,
    takeovers: u64,
    /// Stays sick to the end.
    sick: Option<usize>,
    /// Never come back to the others.
    lost: Vec<usize>,
    /// Keeps one sibling, and the parent.
    narrow: Option<usize>,
    story: bool,
}

impl World {
    fn new(seed: u64, story: bool) -> World {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let count = 2 + random.below(4) as usize;
        let nodes = (0..count)
            .map(|_| Node {
                up: true,
                paused_until: 0,
                started: 0,
                opening_until: 0,
                clock: 90 + random.below(21) as u32,
                jumped: Duration::ZERO,
                flush: 100,
                first: 100,
                has_data: true,
                waiting_to_copy: 0,
                healthy: true,
                lagging: false,
                hangs_since: None,
                link: Link::None,
                link_heard: 0,
                decider: Decider::new(TAKEOVER_AFTER, members(count)),
                views: Vec::new(),
                parent: Sight::Unknown,
                parent_heard: 0,
                next_poll: 0,
                next_ask: Vec::new(),
                answers: Vec::new(),
                said: vec![(0, 0); count],
            })
            .collect();
        let mut world = World {
            random,
            now: 0,
            head: 100,
            confirmed: 100,
            saved: 100,
            holder: None,
            nodes,
            cut: vec![vec![false; count + 1]; count + 1],
            slow: vec![vec![0; count + 1]; count + 1],
            deposed: 0,
            takeovers: 0,
            sick: None,
            lost: Vec::new(),
            narrow: None,
            story,
        };
        (0..count).for_each(|node| world.start(node));
        world
    }

    fn tell(&self, text: impl Fn() -> String) {
        if self.story {
            println!("{:6.1} s  {}", self.now as f64 / 10.0, text());
        }
    }

    fn count(&self) -> usize {
        self.nodes.len()
    }

    fn runs(&self, node: usize) -> bool {
        self.nodes[node].up && self.nodes[node].paused_until <= self.now
    }

    fn talks(&self, a: usize, b: usize) -> bool {
        !self.cut[a][b] && !self.cut[b][a]
    }

    fn start(&mut self, index: usize) {
        let (now, count) = (self.now, self.count());
        let opening = self.random.below(60);
        let node = &mut self.nodes[index];
        node.up = true;
        node.started = now;
        node.opening_until = now + opening;
        node.link = Link::None;
        node.decider = Decider::new(TAKEOVER_AFTER, members(count));
        let unknown = View {
            sight: Sight::Unknown,
            told: None,
            heard: now,
        };
        node.views = vec![unknown; count];
        node.parent = Sight::Unknown;
        node.next_poll = now;
        node.next_ask = vec![now; count];
        node.answers.clear();
        node.jumped = Duration::ZERO;
        node.waiting_to_copy = 0;
        node.said = vec![(0, 0); count];
    }

    fn crash(&mut self, index: usize) {
        self.nodes[index].up = false;
        self.nodes[index].link = Link::None;
        let parent = self.count();
        if self.holder.is_some_and(|h| h.node == index) && !self.cut[index][parent] {
            self.holder = None;
        }
    }

    // ----- faults -----------------------------------------------------------

    fn fault(&mut self) {
        let count = self.count() as u64;
        let node = self.random.below(count) as usize;
        match self.random.below(14) {
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
                let other = self.random.below(count + 1) as usize;
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
            6 => {
                self.tell(|| format!("the parent restarts, at {}", self.saved));
                self.confirmed = self.saved;
                self.holder = None;
                for index in 0..self.count() {
                    if self.nodes[index].link == Link::Parent && self.runs(index) {
                        self.nodes[index].link = Link::None;
                    }
                }
            }
            7 => self.lose_disk(node),
            9 => {
                let other = self.random.below(count + 1) as usize;
                let ticks = self.random.below(30);
                self.tell(|| format!("{other} answers {node} after {ticks}"));
                self.slow[node][other] = ticks;
            }
            10 => {
                let ticks = 1 + self.random.below(600) as u32;
                self.tell(|| format!("clock of {} jumps by {ticks}", NAMES[node]));
                self.nodes[node].jumped += TICK * ticks;
            }
            8 => self.hang(node, self.nodes[node].hangs_since.is_none()),
            11 => self.switch_over(node),
            12 => {
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

    /// Only what somebody else holds may be lost: more is no failure of the decision.
    fn lose_disk(&mut self, index: usize) {
        let confirmed = self.confirmed;
        let held = (0..self.count()).any(|other| {
            other != index && self.nodes[other].has_data && self.nodes[other].flush >= confirmed
        });
        if held {
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
        let now = self.clock(master);
        self.nodes[master].decider.yield_to(now, NAMES[to]);
    }

    fn hang(&mut self, index: usize, hangs: bool) {
        self.tell(|| format!("disk of {} hangs: {hangs}", NAMES[index]));
        let node = &mut self.nodes[index];
        node.hangs_since = hangs.then_some(self.now);
        // A connection that was told to end ends at last.
        if !hangs && node.link != Link::Parent && self.holder.is_some_and(|h| h.node == index) {
            self.holder = None;
        }
    }

    fn hangs(&self, index: usize) -> bool {
        self.nodes[index].hangs_since.is_some()
    }

    fn heal(&mut self) {
        self.tell(|| "--- everything heals".into());
        self.cut.iter_mut().flatten().for_each(|cut| *cut = false);
        self.slow.iter_mut().flatten().for_each(|slow| *slow = 0);
        for index in 0..self.count() {
            self.nodes[index].paused_until = 0;
            self.nodes[index].healthy = true;
            self.nodes[index].lagging = false;
            self.hang(index, false);
            if !self.nodes[index].up {
                self.start(index);
            }
        }
        if self.random.one_in(3) {
            self.lose_minority();
        }
        let sick = self.random.below(2 * self.count() as u64) as usize;
        // What only it has, nobody could get from a database that is broken for ever.
        let mut others =
            (0..self.count()).filter(|other| *other != sick && !self.lost.contains(other));
        if sick < self.count()
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
        if self.lost.is_empty() && self.count() > 3 && self.random.one_in(3) {
            self.narrow();
        }
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

    fn has_all(&self, index: usize) -> bool {
        let node = &self.nodes[index];
        node.has_data && node.flush >= self.confirmed
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
            let reach = if fate == 1 { count + 1 } else { count };
            let parts = |other: &usize| rest(other) || *other != node && !together;
            for other in (0..reach).filter(parts) {
                (self.cut[node][other], self.cut[other][node]) = (true, true);
            }
        }
        self.lost = lost;
    }

    // ----- one step of everything -------------------------------------------

    fn tick(&mut self) {
        self.now += 1;
        self.head += self.random.below(20);
        if self.random.one_in(20) {
            self.saved = self.confirmed;
        }
        if let Some(holder) = self.holder
            && self.now - holder.heard > LEASE
        {
            self.holder = None;
        }
        for index in 0..self.count() {
            if self.runs(index) {
                self.observe(index);
                if self.nodes[index].opening_until <= self.now {
                    self.stream(index);
                    self.decide(index);
                }
            }
        }
    }

    fn told(&self, index: usize) -> Told {
        let node = &self.nodes[index];
        if node.opening_until > self.now {
            return Told {
                node: NAMES[index].to_owned(),
                domain: "d".into(),
                opening: !without("opening"),
                healthy: true,
                serves: true,
                ..Told::default()
            };
        }
        let (role, path) = match &node.link {
            Link::None => (Role::None, vec![]),
            Link::Parent => (Role::Master, vec![NAMES[index].to_owned()]),
            Link::Peer(name) => {
                let via = NAMES.iter().position(|n| n == name).unwrap();
                let mut path = node.views[via]
                    .told
                    .as_ref()
                    .map_or(vec![], |t| t.path.clone());
                path.push(NAMES[index].to_owned());
                (Role::Slave, path)
            }
        };
        let master_ok = role == Role::Master
            || node.views.iter().enumerate().any(|(other, view)| {
                other != index
                    && view
                        .told
                        .as_ref()
                        .is_some_and(|told| told.role == Role::Master)
                    && matches!(view.sight, Sight::Answers)
            });
        let answers = |view: &&View| view.sight == Sight::Answers && view.told.is_some();
        let answering = node.views.iter().filter(answers).count();
        let silent = node.hangs_since.is_some_and(|since| self.now - since >= 30);
        Told {
            node: NAMES[index].to_owned(),
            domain: "d".into(),
            role,
            opening: false,
            has_data: node.has_data,
            copying: false,
            healthy: node.healthy && !silent,
            serves: true,
            identity: None,
            parent_ok: matches!(node.parent, Sight::Answers),
            master_ok,
            lagging: node.lagging,
            in_sight: match without("outnumbered") {
                true => 1,
                false => 1 + answering,
            },
            flush: Lsn(node.flush),
            first: Lsn(node.first),
            priority: 100,
            top_time: 0,
            path,
            domains: vec![],
            yields_to: node.decider.yields_to(),
        }
    }

    fn observe(&mut self, index: usize) {
        let parent = self.count();
        let pause = match self.nodes[index].link {
            Link::None => 2,
            _ => 10,
        };
        for other in (0..self.count()).filter(|other| *other != index) {
            if self.now < self.nodes[index].next_ask[other] {
                continue;
            }
            self.nodes[index].next_ask[other] = self.now + pause + self.random.below(2);
            if !self.talks(index, other) {
                continue;
            }
            let up = self.nodes[other].up;
            let answer = match (self.runs(other), up) {
                (true, _) => Some(self.told(other)),
                (false, true) => continue,
                (false, false) => None,
            };
            // The next question waits for the answer, or for its limit.
            let takes = self.slow[index][other];
            self.nodes[index].next_ask[other] += takes.min(ANSWER_LIMIT);
            if takes < ANSWER_LIMIT {
                let answer = (self.now + takes, other, answer);
                self.nodes[index].answers.push(answer);
            }
        }
        self.hear(index);
        if self.now >= self.nodes[index].next_poll {
            self.nodes[index].next_poll = self.now + pause;
            if self.talks(index, parent) && self.slow[index][parent] < ANSWER_LIMIT {
                self.nodes[index].parent = Sight::Answers;
                self.nodes[index].parent_heard = self.now;
            }
        }
        let now = self.now;
        let node = &mut self.nodes[index];
        let age = |heard: u64| TICK * u32::try_from(now - heard).unwrap();
        for view in &mut node.views {
            if view.sight != Sight::Refused && view.sight != Sight::Unknown && now - view.heard > 10
            {
                view.sight = Sight::Silent(age(view.heard));
            }
        }
        if node.parent != Sight::Unknown && now - node.parent_heard > 10 {
            node.parent = Sight::Silent(age(node.parent_heard));
        }
    }

    /// What others have answered, as of when they did.
    fn hear(&mut self, index: usize) {
        let now = self.now;
        let node = &mut self.nodes[index];
        let come = node.answers.extract_if(.., |answer| answer.0 <= now);
        for (_, other, answer) in come.collect::<Vec<_>>() {
            let view = &mut node.views[other];
            match answer {
                Some(told) => {
                    (view.sight, view.heard) = (Sight::Answers, now);
                    node.said[other] = (told.flush.0, now);
                    view.told = Some(told);
                }
                None => view.sight = Sight::Refused,
            }
        }
    }

    fn stream(&mut self, index: usize) {
        let (now, parent) = (self.now, self.count());
        match self.nodes[index].link.clone() {
            Link::None => {}
            _ if self.hangs(index) => {}
            Link::Parent => {
                let talks = self.talks(index, parent);
                match self.holder.as_mut().filter(|holder| holder.node == index) {
                    None if talks => self.nodes[index].link = Link::None,
                    Some(holder) if talks => {
                        holder.heard = now;
                        self.nodes[index].link_heard = now;
                        self.receive_from_parent(index);
                    }
                    _ => {}
                }
            }
            Link::Peer(name) => {
                let via = NAMES.iter().position(|n| *n == name).unwrap();
                if !self.talks(index, via) {
                } else if !self.nodes[via].up {
                    self.nodes[index].link = Link::None;
                } else if self.runs(via) {
                    self.nodes[index].link_heard = now;
                    let (first, flush) = (self.nodes[via].first, self.nodes[via].flush);
                    let empty = !self.nodes[via].has_data;
                    let node = &mut self.nodes[index];
                    if first > node.flush || empty {
                        node.link = Link::None;
                    } else {
                        let received = flush.min(node.flush + 200);
                        node.flush = match without("D") {
                            true => received,
                            false => node.flush.max(received),
                        };
                    }
                }
            }
        }
        if now - self.nodes[index].link_heard > 100 {
            self.nodes[index].link = Link::None;
        }
    }

    fn receive_from_parent(&mut self, index: usize) {
        // A START below the confirmed position is forwarded without a word.
        let now = self.now;
        let node = &mut self.nodes[index];
        assert!(self.confirmed <= node.flush, "{} has a hole", NAMES[index]);
        node.flush = node.flush.max(self.head.min(node.flush + 200));
        // Rule C: what two members hold.
        let mut held: Vec<u64> = (0..node.said.len())
            .map(|other| {
                let (flush, at) = node.said[other];
                match other == index {
                    true => node.flush,
                    false if now - at > ACK_TIMEOUT => 0,
                    false => flush,
                }
            })
            .collect();
        held.sort_unstable_by(|a, b| b.cmp(a));
        let mut acknowledged = held[1.min(held.len() - 1)].min(node.flush);
        if let Some(holder) = &mut self.holder
            && !without("floor")
        {
            acknowledged = acknowledged.max(holder.acknowledged);
            holder.acknowledged = acknowledged;
        }
        // Older PostgreSQL takes what it is told, and has let go of what lies between.
        assert!(acknowledged >= self.confirmed, "the acknowledged goes back");
        self.confirmed = acknowledged;
        if self.random.one_in(100) {
            // Retention: what the others have said to hold is let go.
            let least = self.nodes[index]
                .said
                .iter()
                .map(|(flush, _)| *flush)
                .filter(|flush| *flush > 0)
                .min();
            let node = &mut self.nodes[index];
            node.first = node
                .first
                .max(least.unwrap_or(0).saturating_sub(2000))
                .min(node.flush);
        }
    }

    fn decide(&mut self, index: usize) {
        let told = self.told(index);
        let node = &self.nodes[index];
        let peers: Vec<Peer> = (0..self.count())
            .filter(|other| *other != index)
            .map(|other| Peer {
                name: NAMES[other].to_owned(),
                // What comes over the link tells of who is followed as well.
                sight: match node.views[other].sight {
                    Sight::Silent(age) if node.link == Link::Peer(NAMES[other].to_owned()) => {
                        let heard = TICK * u32::try_from(self.now - node.link_heard).unwrap();
                        match heard < Duration::from_millis(1500) {
                            true => Sight::Silent(age.min(heard)),
                            false => Sight::Silent(age),
                        }
                    }
                    sight => sight,
                },
                told: node.views[other].told.clone(),
                age: TICK * u32::try_from(self.now - node.views[other].heard).unwrap(),
            })
            .collect();
        let now = self.clock(index);
        if !node.has_data {
            return match self.hangs(index) {
                true => {}
                false => self.copy(index, &told, &peers),
            };
        }
        let own = Own {
            told,
            link: node.link.clone(),
            // What comes over the link tells of the parent as well.
            parent: match node.link == Link::Parent && self.now - node.link_heard < 30 {
                true => Sight::Answers,
                false => node.parent,
            },
        };
        let before = own.link.clone();
        let decision = self.nodes[index].decider.decide(now, &own, &peers);
        if decision != Decision::Stay {
            self.tell(|| {
                format!(
                    "{} at {}: {decision:?}",
                    NAMES[index], self.nodes[index].flush
                )
            });
        }
        // A link that hangs in its disk takes no other's place; it can only be given up.
        let decision = match decision {
            Decision::Lead { .. } | Decision::Follow(_) | Decision::CopyAnew
                if self.hangs(index) =>
            {
                Decision::Leave("for another".into())
            }
            decision => decision,
        };
        match decision {
            Decision::Stay => {}
            Decision::HandOver { .. } if without("G") => {}
            Decision::Lead { depose } => self.lead(index, depose, now),
            Decision::Follow(name) => {
                self.nodes[index].link = Link::Peer(name);
                self.nodes[index].link_heard = self.now;
            }
            Decision::Leave(_) => self.nodes[index].link = Link::None,
            Decision::HandOver { to, .. } => {
                self.nodes[index].link = Link::None;
                let to_index = NAMES.iter().position(|n| *n == to).unwrap();
                self.nodes[index].decider.yield_to(now, &to);
                if self.runs(to_index) && self.talks(index, to_index) {
                    let end = Lsn(self.nodes[index].flush);
                    let theirs = self.clock(to_index);
                    self.nodes[to_index].decider.take_over(theirs, end);
                }
            }
            // Who does not answer may have it: that is told, and nothing is done.
            Decision::Gap { unseen, .. } if !unseen.is_empty() => {}
            Decision::Gap { confirmed, .. } => {
                panic!("{} cries gap at {confirmed}", NAMES[index])
            }
            Decision::CopyAnew => {
                let node = &mut self.nodes[index];
                node.has_data = false;
                node.link = Link::None;
                (node.flush, node.first) = (0, 0);
            }
        }
        // What held the slot lets it go.
        if before == Link::Parent
            && self.nodes[index].link != Link::Parent
            && self.holder.is_some_and(|h| h.node == index)
            && self.talks(index, self.count())
            && !self.hangs(index)
        {
            self.holder = None;
        }
    }

    /// Time as the node counts it.
    fn clock(&self, index: usize) -> Duration {
        let node = &self.nodes[index];
        TICK * u32::try_from(self.now - node.started).unwrap() * node.clock / 100 + node.jumped
    }

    fn copy(&mut self, index: usize, own: &Told, peers: &[Peer]) {
        self.nodes[index].waiting_to_copy += 1;
        let waited = TICK * u32::try_from(self.nodes[index].waiting_to_copy).unwrap();
        if let Source::Peer(name) = copy_source(waited, own, peers, TAKEOVER_AFTER) {
            let via = NAMES.iter().position(|n| *n == name).unwrap();
            let works = self.nodes[via].has_data && self.nodes[via].healthy;
            if self.runs(via) && self.talks(index, via) && works {
                let flush = self.nodes[via].flush;
                self.tell(|| format!("{} copies from {name} at {flush}", NAMES[index]));
                let node = &mut self.nodes[index];
                (node.flush, node.first, node.has_data) = (flush, flush, true);
            }
        }
    }

    fn lead(&mut self, index: usize, depose: Option<u32>, now: Duration) {
        let parent = self.count();
        if !self.talks(index, parent) {
            self.nodes[index].decider.failed(now);
            return;
        }
        if let Some(holder) = self.holder
            && depose == Some(holder.session)
        {
            self.holder = None;
            self.deposed += 1;
        }
        if depose.is_some() {
            self.nodes[index].decider.deposes(now);
        }
        if let Some(holder) = self.holder {
            let busy = Refusal::Busy(holder.session);
            self.nodes[index].decider.refused(now, busy);
        } else if self.confirmed > self.nodes[index].flush && !without("A") {
            let ahead = Refusal::Ahead(Lsn(self.confirmed));
            self.nodes[index].decider.refused(now, ahead);
        } else {
            self.takeovers += 1;
            self.holder = Some(Holder {
                node: index,
                session: u32::try_from(self.takeovers).unwrap(),
                heard: self.now,
                acknowledged: self.confirmed,
            });
            let node = &mut self.nodes[index];
            (node.link, node.link_heard) = (Link::Parent, self.now);
            node.decider.leads();
        }
    }

    // ----- properties -------------------------------------------------------

    fn settled(&self) -> Result<(), String> {
        let masters: Vec<usize> = (0..self.count())
            .filter(|index| self.nodes[*index].link == Link::Parent && self.nodes[*index].up)
            .collect();
        let [master] = masters[..] else {
            return Err(format!("{} masters", masters.len()));
        };
        if self.sick == Some(master) {
            return Err(format!("{} leads, and is sick", NAMES[master]));
        }
        if self.narrow == Some(master) {
            return Err(format!("{} leads, and reaches no majority", NAMES[master]));
        }
        if self.lost.contains(&master) {
            // If two of them hold what the rest lacks, the rest must not lead.
            let rest = (0..self.count()).filter(|index| !self.lost.contains(index));
            if !rest.into_iter().any(|index| self.has_all(index)) {
                return Ok(());
            }
            return Err(format!("{} leads, and is lost", NAMES[master]));
        }
        for (index, node) in self.nodes.iter().enumerate() {
            if self.hangs(index) || self.lost.contains(&index) {
                continue;
            }
            if node.flush + 200 < self.head {
                return Err(format!(
                    "{} is at {} of {}",
                    NAMES[index], node.flush, self.head
                ));
            }
            let through_another = self.narrow == Some(index) && node.link != Link::None;
            let follows = node.link == Link::Peer(NAMES[master].into()) || through_another;
            if index != master && !follows {
                return Err(format!("{} follows {:?}", NAMES[index], node.link));
            }
        }
        Ok(())
    }
}

/// Of a domain with none, anybody is the majority.
fn members(count: usize) -> usize {
    if without("majority") { 0 } else { count }
}

fn without(rule: &str) -> bool {
    static TAKEN_OUT: LazyLock<Option<String>> = LazyLock::new(|| std::env::var("WITHOUT").ok());
    TAKEN_OUT.as_deref() == Some(rule)
}

fn run(seed: u64, story: bool) {
    let mut world = World::new(seed, story);
    while world.now < FAULTS {
        if world.now > 30 && world.random.one_in(12) {
            world.fault();
        }
        let before: Vec<u64> = world.nodes.iter().map(|node| node.flush).collect();
        world.tick();
        for (index, node) in world.nodes.iter().enumerate() {
            let back = node.has_data && node.flush < before[index];
            assert!(!back, "{} went back to {}", NAMES[index], node.flush);
        }
    }
    world.heal();
    let soon = match world.lost.is_empty() && world.narrow.is_none() {
        true => SOON,
        false => LATER,
    };
    let mut settled_at = None;
    while world.now < FAULTS + soon + CALM {
        world.tick();
        // What was seen before the faults ended may be acted on for a moment, and a disk that
        // hangs is found out after one. With some lost for good, one that leads may have to
        // be deposed yet.
        let moment = if world.lost.is_empty() { 60 } else { soon };
        let early = world.now < FAULTS + moment;
        if !early && settled_at.is_none() && world.settled().is_ok() {
            settled_at = Some((world.now, world.takeovers, world.deposed));
        }
    }
    let state = world.settled();
    assert_eq!(state, Ok(()), "at the end of the calm");
    let (at, takeovers, deposed) = settled_at.expect("settled");
    assert!(
        at - FAULTS <= soon,
        "settled only after {} ticks",
        at - FAULTS
    );
    assert_eq!(takeovers, world.takeovers, "the master changes in calm");
    assert_eq!(deposed, world.deposed, "steal war");
}

#[test]
fn the_tree_heals_after_every_schedule() {
    if let Ok(seed) = std::env::var("SEED") {
        return run(seed.parse().expect("SEED is a number"), true);
    }
    let count =
        std::env::var("SCHEDULES").map_or(1_000, |n| n.parse().expect("SCHEDULES is a number"));
    for seed in 1..=count {
        if let Err(panic) = std::panic::catch_unwind(|| run(seed, false)) {
            println!("schedule {seed} fails; replay it with SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}
