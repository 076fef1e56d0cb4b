//! What a node does next: what it sees, what is decided, and what it tells of both.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tokio::task::spawn_blocking;

use super::{End, Next, Roles};
use crate::conninfo::ConnInfo;
use crate::domain::{self, Decision, Link, Missing, Own, Peer, Session, Sight, Told};
use crate::status::{Role, State, View, cursor_name};
use crate::timeline;
use crate::upstream::Target;

impl Roles {
    pub(super) fn next(&mut self, link: &Link) -> Next {
        let (peers, parents) = (self.observer.peers(), self.observer.parents());
        let problem = self.observer.problem(&self.shared.told());
        let doubtful = problem.is_some();
        let is_led = self.publish_view(link, &peers, &parents, problem);
        if let Some((segment, reason)) = self.shared.take_damage()
            && let Some(next) = self.damaged(&segment, reason)
        {
            return next;
        }
        if self.shared.config.parent.is_none() {
            return self.next_at_top(link);
        }
        if *link != Link::None {
            self.note_link(is_led);
        }
        self.observer.hurry(*link == Link::None);
        let own = Own {
            told: self.shared.told(),
            link: link.clone(),
            heard: self.shared.heard_ago(),
            opening: self.opening,
            doubtful,
        };
        let handing_over = self.decider.yields_to();
        let now = self.observer.now();
        let decision = self.decider.decide(now, &own, &peers, &parents);
        if let Some(to) = handing_over.filter(|_| self.decider.yields_to().is_none()) {
            self.tell_handover(&to, &peers);
        }
        self.note_master(&peers);
        self.carry_out(decision, &own, &peers, &parents)
    }

    /// A bridge of the top reads the slot of the Postgres beside it.
    fn next_at_top(&mut self, link: &Link) -> Next {
        if let Some(reason) = self.slot_lost.take() {
            self.shared.event_once("gap", &reason);
            let hint = "; stop this bridge, remove its data_dir and start it: it makes a new slot, \
                        and the domains below copy anew";
            self.shared.set_link(State::Stalled, Some(reason + hint));
            return Next::Nothing;
        }
        match link {
            Link::None => Next::Go(self.own_database()),
            _ => Next::Nothing,
        }
    }

    fn note_link(&mut self, is_led: bool) {
        if is_led {
            self.in_gap = false;
            // A link to a sibling outlives what was said while nobody led.
            self.shared.set_link(State::Streaming, None);
        }
        if std::mem::take(&mut self.kept_divergence) {
            let shared = Arc::clone(&self.shared);
            spawn_blocking(move || timeline::forget_divergence(&shared.config.node.data_dir));
        }
    }

    fn carry_out(
        &mut self,
        decision: Decision,
        own: &Own,
        peers: &[Peer],
        parents: &[Peer],
    ) -> Next {
        match decision {
            Decision::Stay => Next::Nothing,
            Decision::Lead { parent, depose } => {
                self.parent_target(parent, self.why_lead(&own.told.node, peers), depose)
            }
            Decision::Follow(name) => self.peer_target(name),
            Decision::Leave(reason) => {
                tracing::info!(reason, "leaves its upstream");
                Next::Leave
            }
            Decision::HandOver { to, reason } => {
                if self.decider.yields_to().is_none() {
                    let why = self.shared.state().1.unwrap_or_default();
                    let reason = format!("to {to}: {reason} ({why})");
                    self.shared
                        .event("handover", reason.trim_end_matches(" ()"));
                }
                Next::HandOver(to)
            }
            Decision::NoParent => {
                let why_not = self.observer.why_not(parents);
                let (state, problem) = why_no_parent(&own.told, parents, why_not);
                self.shared.set_link(state, Some(problem));
                Next::Nothing
            }
            Decision::NoSource => {
                let reason = "no server of the domain keeps what follows this one's end; waits for one \
                              that is in order, to copy from it";
                self.shared.set_link(State::Down, Some(reason.into()));
                Next::Nothing
            }
            Decision::Gap {
                missing,
                unseen,
                sure,
            } => self.tell_gap(missing, &unseen, sure),
            Decision::CopyAnew { missing } => Next::End(End::CopyAnew {
                reason: match missing {
                    Some(missing) => self.why_gap(missing),
                    None => "no server of the domain keeps what follows this one's end".into(),
                },
                from_parent: missing.is_some(),
            }),
        }
    }

    /// A part of the queue cannot be read. If the database has it, only a server that
    /// follows may miss it, and finds it elsewhere; once that cannot be undone by a crash.
    fn damaged(&self, segment: &Path, reason: String) -> Option<Next> {
        let shared = &self.shared;
        let fetch = |reason| Some(Next::End(End::Fetch { reason }));
        let Some(open) = shared.queue.borrow().clone() else {
            return fetch(reason);
        };
        match open
            .queue
            .remove_damaged(segment, *shared.replay_durable.borrow())
        {
            Ok(true) => shared.event("damaged", &reason),
            Err(error) => tracing::warn!("{error}"),
            Ok(false) => match open.queue.end_of(segment) {
                Some(end) if end <= *shared.replayed.borrow() => {
                    shared.keep_damage(segment.to_owned(), reason);
                    return None;
                }
                _ => return fetch(reason),
            },
        }
        Some(Next::Nothing)
    }

    fn why_gap(&self, missing: Missing) -> String {
        match missing {
            Missing::Forgotten(confirmed) => {
                let end = self.shared.told().flush;
                format!(
                    "the parent has forgotten what lies between {end} and {confirmed}, and no \
                     server of the domain has it"
                )
            }
            Missing::Slot => self.slot_lost.clone().unwrap_or_default(),
        }
    }

    fn tell_gap(&mut self, missing: Missing, unseen: &[String], sure: bool) -> Next {
        let mut reason = self.why_gap(missing);
        if !unseen.is_empty() {
            let unseen = unseen.join(", ");
            reason += &format!(", unless one of those that do not answer: {unseen}");
        }
        if !std::mem::replace(&mut self.in_gap, true) {
            self.shared.event("gap", &reason);
        }
        let hint = match self.shared.config.failover.resync_on_gap {
            true if sure => "; waits for another server of the domain to copy anew",
            true => "; those are waited for, before one server of the domain copies anew",
            false => {
                "; copy the data anew with terrace-bridge resync, or set failover.resync_on_gap"
            }
        };
        let state = match missing {
            Missing::Forgotten(_) => State::Gap,
            Missing::Slot => State::Stalled,
        };
        self.shared.set_link(state, Some(reason + hint));
        Next::Nothing
    }

    /// Tells the others and the reports what this node sees; whether it sees a master.
    pub(super) fn publish_view(
        &self,
        link: &Link,
        peers: &[Peer],
        parents: &[Peer],
        problem: Option<String>,
    ) -> bool {
        let node = &self.shared.config.node;
        let upstream = match link {
            Link::None => None,
            Link::Parent => self.decider.parent().and_then(|index| parents.get(index)),
            Link::Peer(name) => peers.iter().find(|peer| peer.name == *name),
        };
        let told = upstream
            .and_then(|peer| peer.told.clone())
            .unwrap_or_default();
        let (mut path, mut domains) = (told.path, told.domains);
        if *link != Link::None {
            path.push(node.name.clone());
        }
        if !domains.contains(&node.domain) {
            domains.push(node.domain.clone());
        }
        let own = self.shared.identity();
        for peer in peers.iter().filter(|peer| peer.sight == Sight::Answers) {
            // Positions of another history, or of one that is in doubt, are none of ours.
            if let Some(told) = &peer.told
                && told.serves
                && told.identity == own
            {
                self.shared.set_member_flush(&peer.name, told.flush);
            }
        }
        let master = match link {
            Link::Parent => Some(node.name.clone()),
            _ => peers
                .iter()
                .find(|peer| peer.leads())
                .map(|peer| peer.name.clone()),
        };
        let is_led = master.is_some();
        let limit = self.shared.config.failover.takeover_after;
        let heard = self.shared.heard_ago();
        self.shared.set_view(View {
            parent_ok: domain::parent_sight(link, heard, parents, limit) == Sight::Answers,
            master,
            in_sight: domain::in_sight(peers),
            copying: false,
            path,
            domains,
            yields_to: self.decider.yields_to(),
            report_to: self.observer.parent_in_sight(parents),
            top_in_sight: domain::top_in_sight(parents, limit),
            problem,
            trouble: self.observer.trouble(),
        });
        is_led
    }

    fn own_database(&self) -> Target {
        // The configuration has been checked when it was read.
        let url = &self.shared.config.database.url;
        let conninfo = ConnInfo::parse(url).expect("a checked connection string");
        Target {
            name: conninfo.endpoint(),
            conninfo,
            slot: self.shared.config.slot_name(),
            role: Role::Master,
            why: String::new(),
            depose: None,
            deposed: AtomicBool::new(false),
        }
    }

    fn peer_target(&self, name: String) -> Next {
        let node = &self.shared.config.node;
        let Some(info) = self.observer.peer_info(&name) else {
            return Next::Nothing;
        };
        Next::Go(Target {
            conninfo: info.clone(),
            slot: cursor_name(&node.domain, &node.name),
            role: Role::Slave,
            why: String::new(),
            depose: None,
            deposed: AtomicBool::new(false),
            name,
        })
    }

    fn parent_target(&self, parent: usize, why: String, depose: Option<Session>) -> Next {
        let Some(info) = self.observer.parent_info(parent) else {
            return Next::Nothing;
        };
        Next::Go(Target {
            name: info.endpoint(),
            conninfo: info.clone(),
            slot: self.shared.config.slot_name(),
            role: Role::Master,
            why,
            depose,
            deposed: AtomicBool::new(false),
        })
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
}

/// The state that it makes, and the reason for people.
fn why_no_parent(
    own: &Told,
    parents: &[Peer],
    (troubled, words): (bool, Vec<String>),
) -> (State, String) {
    let answers = |parent: &&Peer| parent.sight == Sight::Answers;
    let told = parents.iter().filter(answers);
    let told: Vec<&Told> = told.filter_map(|parent| parent.told.as_ref()).collect();
    let below = told.iter().find(|told| told.domains.contains(&own.domain));
    if let Some(parent) = below {
        let text = format!(
            "parent {} is itself below domain \"{}\"; correct [parent]",
            parent.node, own.domain
        );
        return (State::Stalled, text);
    }
    let is_standby = |parent: &&Peer| parent.standby && parent.sight == Sight::Answers;
    if let Some(parent) = parents.iter().find(is_standby).filter(|_| told.is_empty()) {
        let text = format!(
            "{} is a standby, and no other parent server answers: name the primary that it follows, or \
             promote it",
            parent.name
        );
        return (State::Stalled, text);
    }
    if told.is_empty() {
        return match troubled {
            true => (State::Stalled, words.join("; ")),
            false => {
                let text = format!("no parent server answers ({})", words.join(", "));
                (State::Down, text)
            }
        };
    }
    let text = match told.iter().any(|told| told.has_data) {
        true => "no parent server is fit to be followed",
        false => "no parent server has data yet",
    };
    (State::Down, text.into())
}
