//! Everything there is, one step of it, and what must be true in the end.

use std::time::Duration;

use terrace_bridge::domain::{Link, Sight, Told, parent_sight, top_in_sight};
use terrace_bridge::lsn::Lsn;
use terrace_bridge::status::Role;

use crate::node::{NAMES, Node, TAKEOVER_AFTER, View};
use crate::upstream::{RATE, Server, micros};
use crate::{Random, without};

pub const TICK: Duration = Duration::from_millis(100);
/// An answer that takes longer is none.
pub const ANSWER_LIMIT: u64 = 20;

pub struct World {
    pub random: Random,
    pub now: u64,
    pub head: u64,
    pub nodes: Vec<Node>,
    /// Of the parent domain; in the tables below they come after the nodes.
    pub parents: Vec<Server>,
    /// A gap may be ended by copying anew.
    pub resync: bool,
    /// `cut[a][b]`: nothing gets from a to b.
    pub cut: Vec<Vec<bool>>,
    /// Ticks that an answer of b to a takes.
    pub slow: Vec<Vec<u64>>,
    pub deposed: u64,
    pub takeovers: u64,
    /// Stays sick to the end.
    pub sick: Option<usize>,
    /// Never come back to the others.
    pub lost: Vec<usize>,
    pub lost_parents: Vec<usize>,
    /// Keeps one sibling, and the parent.
    pub narrow: Option<usize>,
    /// Reaches only servers of the parent domain that read the top no more.
    pub shut_off: Option<usize>,
    /// When the faults ended, nobody could go on.
    pub in_gap: bool,
    pub story: bool,
}

impl World {
    pub fn new(seed: u64, story: bool) -> World {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let count = 2 + random.below(4) as usize;
        let parents: Vec<Server> = match random.below(6) {
            0..=2 => vec![Server::postgres()],
            bridges => (0..bridges as usize - 2).map(Server::bridge).collect(),
        };
        let all = count + parents.len();
        let resync = random.one_in(2);
        let clocks: Vec<u32> = (0..count).map(|_| 90 + random.below(21) as u32).collect();
        let nodes = (0..count).map(|index| Node::new(index, count, all, clocks[index], resync));
        let mut world = World {
            now: 0,
            head: 100,
            nodes: nodes.collect(),
            parents,
            resync,
            cut: vec![vec![false; all]; all],
            slow: vec![vec![0; all]; all],
            deposed: 0,
            takeovers: 0,
            sick: None,
            lost: Vec::new(),
            lost_parents: Vec::new(),
            narrow: None,
            shut_off: None,
            in_gap: false,
            story,
            random,
        };
        (0..count).for_each(|node| world.start(node));
        world
    }

    pub fn tell(&self, text: impl Fn() -> String) {
        if self.story {
            println!("{:6.1} s  {}", self.now as f64 / 10.0, text());
        }
    }

    pub fn count(&self) -> usize {
        self.nodes.len()
    }

    /// Of nodes and servers of the parent domain.
    pub fn runs(&self, index: usize) -> bool {
        match index.checked_sub(self.count()) {
            None => self.nodes[index].up && self.nodes[index].paused_until <= self.now,
            Some(parent) => self.parents[parent].runs(self.now),
        }
    }

    fn is_up(&self, index: usize) -> bool {
        match index.checked_sub(self.count()) {
            None => self.nodes[index].up,
            Some(parent) => self.parents[parent].up,
        }
    }

    pub fn talks(&self, a: usize, b: usize) -> bool {
        !self.cut[a][b] && !self.cut[b][a]
    }

    pub fn talks_to_parent(&self, index: usize, parent: usize) -> bool {
        self.talks(index, self.count() + parent)
    }

    pub fn holds(&self, index: usize, parent: usize) -> bool {
        let holder = self.parents[parent].holder;
        holder.is_some_and(|holder| holder.node == index)
    }

    pub fn start(&mut self, index: usize) {
        let opening = self.random.below(60);
        let now = self.now;
        self.nodes[index].start(now, opening);
    }

    pub fn crash(&mut self, index: usize) {
        self.nodes[index].up = false;
        self.nodes[index].unlink();
        for parent in 0..self.parents.len() {
            if self.holds(index, parent) && self.talks_to_parent(index, parent) {
                self.parents[parent].holder = None;
            }
        }
    }

    pub fn hangs(&self, index: usize) -> bool {
        self.nodes[index].hangs_since.is_some()
    }

    /// Whether it could go on from any server of the parent domain that is not lost, also when that
    /// one lets go of what the domain has acknowledged.
    pub fn has_all(&self, index: usize) -> bool {
        let node = &self.nodes[index];
        if self
            .parents
            .iter()
            .any(|server| server.acknowledged() > node.flush)
        {
            return false;
        }
        let kept = |(at, server): (usize, &Server)| {
            !self.lost_parents.contains(&at) && server.forgotten() <= node.flush
        };
        node.has_data && self.parents.iter().enumerate().any(kept)
    }

    // ----- one step of everything -------------------------------------------

    pub fn tick(&mut self) {
        self.now += 1;
        self.head += self.random.below(20);
        for at in 0..self.parents.len() {
            let save = self.random.one_in(20);
            self.parents[at].tick(self.now, self.head, save);
        }
        self.let_go();
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

    /// The servers of a parent domain learn each other's places, and let go of what is below.
    fn let_go(&mut self) {
        if !self.random.one_in(30) {
            return;
        }
        let place = self.parents.iter().map(|server| server.place).max();
        let now = self.now;
        for at in 0..self.parents.len() {
            let keep = self.random.below(2) * 300;
            let server = &mut self.parents[at];
            if server.runs(now) {
                server.place = place.unwrap_or(0);
                server.trim(keep);
            }
        }
    }

    pub fn told(&self, index: usize) -> Option<Told> {
        let Some(node) = self.nodes.get(index) else {
            return self.parents[index - self.count()].told();
        };
        if node.opening_until > self.now {
            return Some(Told {
                node: node.name().to_owned(),
                domain: "d".into(),
                opening: !without("opening"),
                healthy: true,
                serves: true,
                ..Told::default()
            });
        }
        let (role, path) = match &node.link {
            Link::None => (Role::None, vec![]),
            Link::Parent => (Role::Master, vec![node.name().to_owned()]),
            Link::Peer(name) => {
                let via = NAMES.iter().position(|n| n == name).unwrap();
                let told = node.views[via].told.as_ref();
                let mut path = told.map_or(vec![], |told| told.path.clone());
                path.push(node.name().to_owned());
                (Role::Slave, path)
            }
        };
        let siblings = &node.views[..self.count()];
        let leads = |view: &View| {
            let told = view.told.as_ref();
            view.sight == Sight::Answers && told.is_some_and(|told| told.role == Role::Master)
        };
        let answers = |view: &&View| view.sight == Sight::Answers && view.told.is_some();
        let in_sight = 1 + siblings.iter().filter(answers).count();
        let silent = node.hangs_since.is_some_and(|since| self.now - since >= 30);
        let copying = node.copying.as_ref();
        let (heard, parents) = (node.heard(self.now), node.parents(self.now));
        Some(Told {
            node: node.name().to_owned(),
            domain: "d".into(),
            role,
            opening: false,
            has_data: node.has_data,
            copying: copying.is_some_and(|copying| copying.from >= self.count()),
            anew: node.anew,
            healthy: node.healthy && !silent,
            serves: true,
            identity: None,
            parent_ok: parent_sight(&node.link, heard, &parents, TAKEOVER_AFTER) == Sight::Answers,
            master_ok: role == Role::Master || siblings.iter().any(leads),
            lagging: node.lagging,
            in_sight: if without("outnumbered") { 1 } else { in_sight },
            flush: Lsn(node.flush),
            first: Lsn(node.first),
            priority: 100,
            top_time: micros(node.top_read),
            top_in_sight: top_in_sight(&parents, TAKEOVER_AFTER),
            path,
            domains: vec![],
            yields_to: node.decider.yields_to(),
        })
    }

    fn observe(&mut self, index: usize) {
        let pause = match self.nodes[index].link {
            Link::None => 2,
            _ => 10,
        };
        for other in (0..self.cut.len()).filter(|other| *other != index) {
            if self.now < self.nodes[index].next_ask[other] {
                continue;
            }
            self.nodes[index].next_ask[other] = self.now + pause + self.random.below(2);
            if !self.talks(index, other) {
                continue;
            }
            let answer = match (self.runs(other), self.is_up(other)) {
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
        let now = self.now;
        self.nodes[index].hear(now);
    }

    // ----- properties -------------------------------------------------------

    pub fn is_quick_to_heal(&self) -> bool {
        let whole = self.lost.is_empty() && self.lost_parents.is_empty();
        whole && self.narrow.is_none() && !self.in_gap
    }

    /// What lacks in the domain, and nobody can have: no reason to copy it anew before that is so.
    pub fn assert_is_gap(&self, index: usize) {
        let could = |node: &&Node| {
            let kept = |server: &Server| server.forgotten() <= node.flush;
            node.has_data && self.parents.iter().any(kept)
        };
        if let Some(other) = self.nodes.iter().find(could) {
            let (name, other) = (self.nodes[index].name(), other.name());
            panic!("{name} is to copy anew, and {other} could go on");
        }
    }

    pub fn settled(&self) -> Result<(), String> {
        let sound = |index: &usize| !self.lost.contains(index) && self.sick != Some(*index);
        let sound = |index: &usize| sound(index) && self.shut_off != Some(*index);
        let mut rest = (0..self.count()).filter(sound);
        let harmed = !self.lost.is_empty() || self.shut_off.is_some();
        if harmed && !rest.any(|index| self.has_all(index)) {
            // Two others hold what the rest lacks, which must not go on.
            return Ok(());
        }
        let leads = |node: &&Node| node.link == Link::Parent && node.up;
        let mut masters: Vec<&Node> = self.nodes.iter().filter(leads).collect();
        if masters.len() > 1 && self.parents.len() > 1 {
            // Each server of a parent domain lets one lead; who is cut off from its siblings
            // goes on by itself.
            masters.retain(|node| !self.lost.contains(&node.index));
        }
        let [master] = masters[..] else {
            return Err(format!("{} masters", masters.len()));
        };
        let name = master.name();
        if self.sick == Some(master.index) {
            return Err(format!("{name} leads, and is sick"));
        }
        if self.shut_off == Some(master.index) {
            return Err(format!(
                "{name} leads, and reaches no server that reads the top"
            ));
        }
        if self.narrow == Some(master.index) {
            return Err(format!("{name} leads, and reaches no majority"));
        }
        if self.lost.contains(&master.index) {
            return Err(format!("{name} leads, and is lost"));
        }
        for (index, node) in self.nodes.iter().enumerate() {
            if self.hangs(index) || self.lost.contains(&index) {
                continue;
            }
            if node.flush + RATE < self.head {
                return Err(format!(
                    "{} is at {} of {}",
                    node.name(),
                    node.flush,
                    self.head
                ));
            }
            let through_another = self.narrow == Some(index) && node.link != Link::None;
            let follows = node.link == Link::Peer(name.into()) || through_another;
            if index != master.index && !follows {
                return Err(format!("{} follows {:?}", node.name(), node.link));
            }
        }
        Ok(())
    }
}
