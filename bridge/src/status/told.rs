//! What a node says of itself, made from its live state.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Inner, Matching, Shared, State};
use crate::clock::{PG_EPOCH_MICROS, timestamp};
use crate::domain::Told;
use crate::lsn::Lsn;
use crate::matching::Dispute;

/// A node this far behind, by the top's clock, is catching up.
const CATCHUP_MICROS: i64 = 2_000_000;
/// A database so far behind the queue keeps those waiting who are to see its rows.
const LAGGING_BYTES: u64 = 64 << 20;
/// A database that fails for so long is out of order.
const PATIENCE: Duration = Duration::from_secs(1);
/// An upstream says something every second; without that what we know is not what is.
const FRESH: Duration = Duration::from_secs(2);

impl Shared {
    /// What other servers are told, and decisions are taken from.
    pub fn told(&self) -> Told {
        let flush = *self.flushed.borrow();
        let first = self
            .queue
            .borrow()
            .as_ref()
            .map_or(Lsn::ZERO, |open| open.queue.first());
        let node = &self.config.node;
        let disk_ok = self.disk_problem().is_none();
        let no_queue = self.queue.borrow().is_none();
        let inner = self.inner();
        let failing = inner.apply_failing_since;
        let serves = !inner.has_diverged();
        let mut view = inner.view.clone();
        // Where it stands is known from its data also while it follows nobody.
        let path = inner.domain_path.iter();
        let new = path.filter(|name| !view.domains.contains(name)).cloned();
        let domains: Vec<String> = new.collect();
        view.domains.extend(domains);
        Told {
            node: node.name.clone(),
            domain: node.domain.clone(),
            role: inner.role,
            opening: no_queue && !inner.empty,
            // What follows its end is known with its queue.
            has_data: inner.has_data && !no_queue,
            copying: view.copying,
            anew: inner.anew,
            healthy: disk_ok && serves && failing.is_none_or(|since| since.elapsed() < PATIENCE),
            serves,
            identity: inner.identity.clone(),
            parent_ok: view.parent_ok,
            master_ok: view.master.is_some(),
            in_sight: view.in_sight,
            lagging: flush.0.saturating_sub(self.replayed.borrow().0) > LAGGING_BYTES,
            flush,
            first,
            priority: node.priority,
            top_time: inner.top_time,
            top_in_sight: view.top_in_sight,
            path: view.path,
            domains: view.domains,
            yields_to: view.yields_to,
        }
    }

    /// State and reason as `terrace.lag` shows them.
    pub fn state(&self) -> (State, Option<String>) {
        let (replayed, disk) = (*self.replayed.borrow(), self.disk_problem());
        state_of(&self.inner(), replayed, disk)
    }

    /// The node's status: one element of a report's `nodes`, and what peers get.
    pub fn status_json(&self) -> Value {
        let replayed = *self.replayed.borrow();
        let told = self.told();
        let cursors = self
            .queue
            .borrow()
            .as_ref()
            .map(|open| open.queue.cursors());
        let children: BTreeMap<String, Lsn> = cursors
            .into_iter()
            .flatten()
            // A sibling's cursor has a point in its name.
            .filter(|cursor| cursor.0.starts_with("terrace_") && !cursor.0.contains('.'))
            .map(|(name, lsn, _)| (name, lsn))
            .collect();
        let peers: Vec<&String> = self.config.peers.keys().collect();
        let (disk, shown) = (self.disk_problem(), self.shown());
        let mut inner = self.inner();
        let (state, reason) = state_of(&inner, replayed, disk);
        let (apply_rate, catchup) = inner.rate.rates();
        let fresh = inner.heard_within(FRESH);
        // A link that has just been opened has told nothing yet of what is missing here.
        let wanted = inner.upstream_end.map(|end| end.max(inner.received));
        let caught_up = fresh && wanted.is_some_and(|end| replayed >= end);
        // From here the lag grows when it falls behind, also if nothing was ever applied.
        if caught_up {
            inner.applied.top_time = inner.top_time;
        }
        let top_time = inner.applied.top_time;
        let mut status = json!({
            "instance": self.instance,
            "run": self.started_micros,
            "seq": self.started_micros + self.started.elapsed().as_micros() as i64,
            "cursors": children,
            "peers": peers,
            "master": inner.view.master,
            "state": state,
            "reason": reason,
            "upstream": inner.upstream_name,
            "received_lsn": inner.received.to_string(),
            "replay_lsn": replayed.to_string(),
            "shown_lsn": shown.to_string(),
            "replay_time": (top_time != 0).then(|| timestamp(top_time + PG_EPOCH_MICROS)),
            "caught_up": caught_up,
            "apply_rate": apply_rate,
            "catchup_seconds": catchup,
            "last_tag": inner.applied.last_tag,
            "last_label": inner.applied.last_label,
            "windows": inner.matching.windows,
            "age_ms": 0,
        });
        if let (Value::Object(status), Ok(Value::Object(told))) =
            (&mut status, serde_json::to_value(told))
        {
            status.extend(told);
        }
        status
    }
}

impl Matching {
    fn problem(&self) -> Option<String> {
        let doubt = || self.doubt().map(Dispute::to_string);
        self.outvoted.clone().or_else(doubt)
    }
}

fn state_of(inner: &Inner, replayed: Lsn, disk: Option<String>) -> (State, Option<String>) {
    if let Some(problem) = &inner.diverged {
        return (State::Diverged, Some(problem.clone()));
    }
    if let Some(problem) = inner.matching.problem() {
        return (State::Diverged, Some(problem));
    }
    if disk.is_some() {
        return (State::Stalled, disk);
    }
    if let Some(problem) = &inner.apply_problem {
        return (State::Stalled, Some(problem.clone()));
    }
    if let (State::Stalled | State::Gap | State::Diverged, problem) =
        (inner.link, &inner.link_problem)
    {
        return (inner.link, problem.clone());
    }
    if let Some(problem) = &inner.report_problem {
        return (State::Stalled, Some(problem.clone()));
    }
    let full = || "the queue has come to retain_max: nothing more is received for now".to_owned();
    // A wrong configuration is behind much else.
    let reason = inner.view.problem.clone();
    let reason = reason
        .or_else(|| inner.full.then(full))
        .or_else(|| inner.link_problem.clone())
        .or_else(|| inner.degraded.clone());
    // These come beside whatever else there is.
    let besides = [&inner.view.trouble, &inner.relay_problem];
    let reason = besides
        .into_iter()
        .flatten()
        .fold(reason, |reason, more| match reason {
            Some(reason) if reason.contains(more.as_str()) => Some(reason),
            Some(reason) => Some(format!("{reason}; {more}")),
            None => Some(more.clone()),
        });
    match (inner.link, &inner.copy_progress) {
        (State::Copying, Some(progress)) => (State::Copying, Some(progress.clone())),
        (State::Streaming, _) if replayed < inner.received && behind(inner) => {
            (State::Catchup, reason)
        }
        (link, _) => (link, reason),
    }
}

/// More than a moment behind what has been received. Under load something is
/// always on its way; that alone is no catch-up.
fn behind(inner: &Inner) -> bool {
    inner.top_time - inner.applied.top_time > CATCHUP_MICROS
}
