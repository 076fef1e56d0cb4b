//! Which server of the parent domain is followed, and why none is.

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::{Next, Roles, TRIED};
use crate::domain::{self, Link, Own, Peer, Refusal, Session, Sight};
use crate::lsn::Lsn;
use crate::status::{Role, State};
use crate::upstream::Target;

impl Roles {
    /// What comes over the link says that the parent is there, also where so many packets
    /// get lost that questions go unanswered.
    pub(super) fn parent_sight(&self, link: &Link, parents: &[Peer]) -> Sight {
        let limit = self.shared.config.failover.takeover_after;
        match link {
            Link::Parent if self.shared.heard_within(limit) => Sight::Answers,
            _ => best_sight(
                parents
                    .iter()
                    .filter(|parent| !self.observer.is_standby(&parent.name)),
            ),
        }
    }

    pub(super) fn choose_parent(&mut self, own: &Own, parents: &[Peer]) -> Option<usize> {
        self.tried.retain(|(_, at)| at.elapsed() < TRIED);
        let tried: Vec<usize> = self.tried.iter().map(|(index, _)| *index).collect();
        let limit = self.shared.config.failover.takeover_after;
        let present = (own.link == Link::Parent).then_some(self.parent).flatten();
        domain::choose_parent(&own.told, parents, present, &tried, limit)
    }

    pub(super) fn lead(
        &mut self,
        own: &Own,
        peers: &[Peer],
        parents: &[Peer],
        depose: Option<Session>,
    ) -> Next {
        let limit = self.shared.config.failover.takeover_after;
        let opening = self.parent.filter(|_| self.opening);
        let answers = |at: usize| parents.get(at).is_none_or(|at| at.sight.is_live(limit));
        // One that has fallen silent meanwhile is left for another one.
        let chosen = match opening {
            Some(at) if answers(at) => opening,
            _ => self.choose_parent(own, parents).or(opening),
        };
        if let Some(index) = chosen
            && let Some(info) = self.observer.parent_info(index)
        {
            if self.parent.replace(index) != Some(index) {
                self.decider.goes_elsewhere();
            }
            return Next::Go(Target {
                name: info.endpoint(),
                conninfo: info.clone(),
                slot: self.shared.config.slot_name(),
                role: Role::Master,
                why: self.why_lead(&own.told.node, peers),
                depose,
                deposed: AtomicBool::new(false),
            });
        }
        let now = self.observer.now();
        let (state, problem) = why_no_parent(&own.told, parents, self.observer.why_not(parents));
        match problem {
            NoParent::Forgotten(first) => self.decider.refused(now, Refusal::Ahead(first)),
            NoParent::Other(problem) => {
                self.decider.failed(now);
                self.shared.set_link(state, Some(problem));
            }
        }
        Next::Nothing
    }

    pub(super) fn note_master(&mut self, peers: &[Peer]) {
        if let Some(master) = peers.iter().find(|peer| peer.leads()) {
            self.last_master = Some(master.name.clone());
        }
    }

    /// What has become of the master before, for people.
    fn why_lead(&self, own: &str, peers: &[Peer]) -> String {
        let last = self.last_master.as_ref();
        let Some(last) = last.and_then(|last| peers.iter().find(|peer| peer.name == *last)) else {
            return String::new();
        };
        let name = &last.name;
        let yields = last
            .told
            .as_ref()
            .and_then(|told| told.yields_to.as_deref());
        match last.sight {
            Sight::Answers if yields == Some(own) => format!(", as {name} hands over"),
            Sight::Answers => format!(", as {name} leads no more"),
            Sight::Silent(age) => {
                format!(", as {name} has been silent for {:.1} s", age.as_secs_f32())
            }
            Sight::Refused => format!(", as nobody listens at {name} any more"),
            Sight::Unknown => String::new(),
        }
    }

    /// A master goes to another server of the parent domain when that one serves better.
    pub(super) fn better_parent(&mut self, own: &Own, peers: &[Peer], parents: &[Peer]) -> Next {
        match self.choose_parent(own, parents) {
            Some(index) if self.parent != Some(index) => self.lead(own, peers, parents, None),
            _ => Next::Nothing,
        }
    }
}

/// The best sight of any of the servers.
fn best_sight<'a>(servers: impl Iterator<Item = &'a Peer>) -> Sight {
    let order = |sight: &Sight| match sight {
        Sight::Answers => (0, Duration::ZERO),
        Sight::Silent(age) => (1, *age),
        Sight::Unknown => (2, Duration::ZERO),
        Sight::Refused => (3, Duration::ZERO),
    };
    let sights = servers.map(|server| server.sight);
    sights.min_by_key(order).unwrap_or(Sight::Unknown)
}

enum NoParent {
    /// The oldest position that a parent server still has.
    Forgotten(Lsn),
    Other(String),
}

fn why_no_parent(
    own: &domain::Told,
    parents: &[Peer],
    (troubled, words): (bool, Vec<String>),
) -> (State, NoParent) {
    let live = parents
        .iter()
        .filter(|parent| parent.sight == Sight::Answers);
    let told: Vec<_> = live.filter_map(|parent| parent.told.as_ref()).collect();
    if let Some(parent) = told.iter().find(|told| told.domains.contains(&own.domain)) {
        let text = format!(
            "parent {} is itself below domain \"{}\"; correct [parent]",
            parent.node, own.domain
        );
        return (State::Stalled, NoParent::Other(text));
    }
    let with_data = told.iter().filter(|told| told.has_data);
    match with_data.map(|told| told.first).min() {
        Some(first) if first > own.flush => (State::Gap, NoParent::Forgotten(first)),
        Some(_) => (
            State::Down,
            NoParent::Other("no parent server is fit to be followed".into()),
        ),
        None if told.is_empty() && troubled => (State::Stalled, NoParent::Other(words.join("; "))),
        None if told.is_empty() => {
            let text = format!("no parent server answers ({})", words.join(", "));
            (State::Down, NoParent::Other(text))
        }
        None => (
            State::Down,
            NoParent::Other("no parent server has data yet".into()),
        ),
    }
}
