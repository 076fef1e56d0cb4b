//! What people ask of a node, and how one master makes way for the next.

use tokio::time::timeout;

use super::{End, Order, Ordered, Roles};
use crate::client::quote_ident;
use crate::domain::{self, Link, Peer, Sight, Told};
use crate::observe::command;
use crate::status::{Role, State};

/// A server further behind than this cannot take over: the domain would wait for it.
const SWITCHOVER_BYTES: u64 = 64 << 20;

impl Roles {
    pub(super) async fn obey(&mut self, (order, reply): Ordered, link: &Link) -> Option<End> {
        let now = self.observer.now();
        let (outcome, end) = match order {
            Order::Resync => match self.resync_from_parent(link) {
                Ok(from_parent) => {
                    let reason = "asked to copy anew".into();
                    let end = End::CopyAnew {
                        reason,
                        from_parent,
                    };
                    (Ok(()), Some(end))
                }
                Err(problem) => (Err(problem.to_owned()), None),
            },
            Order::Skip(lsn) => (self.shared.order_skip(lsn), None),
            Order::TakeOver(lsn) => {
                self.decider.take_over(now, lsn);
                (Ok(()), None)
            }
            Order::Switchover(to) if *link == Link::Parent => (self.switchover(to), None),
            Order::Switchover(to) => match self.pass_on(to) {
                // Its answer may take a while, in which others decide.
                Ok(asking) => {
                    tokio::spawn(async move { reply.send(asking.await).ok() });
                    return None;
                }
                Err(problem) => (Err(problem), None),
            },
        };
        // Nobody may wait for the answer any more.
        reply.send(outcome).ok();
        end
    }

    /// Whether the data here is to come anew from the parent, or from the master; the error says
    /// why it must stay. All servers of a domain are never without data at once: who leads keeps
    /// what it has, and the others throw theirs away only while one leads.
    fn resync_from_parent(&self, link: &Link) -> Result<bool, &'static str> {
        let state = self.shared.state().0;
        let lost = self.in_gap || matches!(state, State::Gap | State::Diverged);
        // What the others hold is no better, unless they are the majority.
        if lost && !self.shared.is_outvoted() || self.shared.config.peers.is_empty() {
            return Ok(true);
        }
        let peers = self.observer.peers();
        match peers.iter().any(Peer::leads) {
            true => Ok(false),
            false if *link == Link::Parent => Err(
                "this server is the master, from which the others would copy; make another one \
                 master first, with terrace-bridge switchover; if there is none any more, take \
                 them out of [peers] and start this bridge again",
            ),
            false => Err(
                "no other server of the domain is master, so that there is nobody to copy from; \
                 wait until one is: terrace.topology shows it",
            ),
        }
    }

    /// Checks a wish for another master, and starts to hand over.
    fn switchover(&mut self, to: Option<String>) -> Result<(), String> {
        let own = self.shared.told();
        let peers = self.observer.peers();
        let to = match to {
            Some(to) => to,
            None => best_successor(&own, &peers)
                .ok_or("no other server of the domain is fit to take over")?,
        };
        if to == own.node {
            return Err(format!("{to} is the master already"));
        }
        let Some(peer) = peers.iter().find(|peer| peer.name == to) else {
            return Err(format!(
                "node \"{to}\" is no server of domain \"{}\"",
                own.domain
            ));
        };
        if let Some(problem) = unfit(&own, peer) {
            return Err(problem);
        }
        self.shared
            .event("switchover", &format!("to {to}, as asked"));
        self.decider.yield_to(self.observer.now(), &to);
        Ok(())
    }

    /// The master is the one to do it.
    fn pass_on(
        &self,
        to: Option<String>,
    ) -> Result<impl Future<Output = Result<(), String>> + use<>, String> {
        let peers = self.observer.peers();
        let master = peers.iter().find(|peer| peer.leads());
        let info = master.and_then(|master| self.observer.peer_info(&master.name));
        let info = info.ok_or("no master of the domain is in sight")?;
        let target = to.map_or(String::new(), |to| format!(" TO {}", quote_ident(&to)));
        let text = format!("SWITCHOVER{target}");
        let (info, node) = (info.clone(), self.shared.config.node.name.clone());
        Ok(async move {
            let asked = command(&info, &node, &text).await;
            asked.map_err(|error| error.message())
        })
    }

    /// With the slot let go: tells `to` that it may take it.
    pub(super) async fn hand_over(&mut self, to: &str) {
        if self.decider.yields_to().is_none() {
            self.decider.yield_to(self.observer.now(), to);
        }
        let (peers, parents) = (self.observer.peers(), self.observer.parents());
        let problem = self.observer.problem(&self.shared.told());
        self.publish_view(&Link::None, &peers, &parents, problem);
        let Some(info) = self.observer.peer_info(to) else {
            return;
        };
        let text = format!("TAKE_OVER {}", self.shared.told().flush);
        let told = command(info, &self.shared.config.node.name, &text);
        // The others wait for it as long as we do.
        let problem = match timeout(domain::HANDOVER / 2, told).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer".into(),
        };
        self.shared
            .event("handover", &format!("to {to} has failed: {problem}"));
        self.decider.keep(self.observer.now());
    }

    /// One that was to lead by now does, or not.
    pub(super) fn tell_handover(&self, to: &str, peers: &[Peer]) {
        let leads = |peer: &Peer| {
            let told = peer.told.as_ref();
            peer.name == to && told.is_some_and(|told| told.role == Role::Master)
        };
        if !peers.iter().any(leads) {
            let reason = format!("to {to} has failed: it does not lead");
            self.shared.event("handover", &reason);
        }
    }
}

/// Why a server cannot take over.
fn unfit(own: &Told, peer: &Peer) -> Option<String> {
    let to = &peer.name;
    let told = match (&peer.told, peer.sight) {
        (Some(told), Sight::Answers) => told,
        _ => return Some(format!("node \"{to}\" does not answer")),
    };
    let behind = own.flush.0.saturating_sub(told.flush.0);
    if let Some(problem) = domain::stranger(own, std::slice::from_ref(peer)) {
        Some(problem)
    } else if !told.has_data || !told.healthy {
        Some(format!(
            "node \"{to}\" is not in order; see its state in terrace.lag"
        ))
    } else if !told.parent_ok {
        Some(format!("node \"{to}\" does not reach the parent"))
    } else if behind > SWITCHOVER_BYTES {
        Some(format!(
            "node \"{to}\" is {behind} bytes behind; wait until it has caught up"
        ))
    } else if told.lagging {
        Some(format!(
            "the database of node \"{to}\" is far behind; wait until it has caught up"
        ))
    } else {
        None
    }
}

fn best_successor(own: &Told, peers: &[Peer]) -> Option<String> {
    let fit = peers.iter().filter(|peer| unfit(own, peer).is_none());
    let best = fit.max_by_key(|peer| {
        let told = peer.told.as_ref();
        told.map(|told| (told.priority, told.flush))
    });
    best.map(|peer| peer.name.clone())
}
