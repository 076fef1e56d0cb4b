//! Which server of the parent domain a master follows, and what follows when none keeps what
//! the domain lacks.

use std::time::Duration;

use super::master::lasts;
use super::source::copies_first;
use super::view::{Peer, STALE_MICROS, Sight, Told, View};
use super::{Decider, Decision, LAST_CALL, Lacking, Missing, Now, Refusal, Session, TURN};
use crate::lsn::Lsn;

/// A server of the parent domain that failed comes last for so long.
const TRIED: Duration = Duration::from_secs(2);

impl Decider {
    /// Follow the parent, and end this session there first.
    pub(super) fn lead(&mut self, now: Now, view: &View<'_>, depose: Option<Session>) -> Decision {
        let opening = self.parent.filter(|_| view.own.opening);
        // One that has fallen silent meanwhile is left for another one.
        let answers = |at: usize| match view.parents.get(at) {
            Some(parent) => parent.sight.is_live(self.takeover_after),
            None => true,
        };
        let chosen = match opening {
            Some(at) if answers(at) => opening,
            _ => self.choose(now, view, None).or(opening),
        };
        let Some(parent) = chosen else {
            return self.without_parent(now, view);
        };
        let elsewhere = self.parent.replace(parent).is_some_and(|at| at != parent);
        if elsewhere {
            // Who is in the way at one of them is nobody there.
            self.busy = None;
        }
        let may_depose = !elsewhere && !view.own.doubtful;
        Decision::Lead {
            parent,
            depose: depose.filter(|_| may_depose),
        }
    }

    /// A master goes to another server of the parent domain when that one serves better. Servers
    /// that have just started, or work off what has piled up, are behind each other for a moment.
    pub(super) fn better_parent(&mut self, now: Now, view: &View<'_>) -> Decision {
        let behind = is_behind(view, self.parent);
        let lags = lasts(&mut self.behind_since, behind, now) >= self.takeover_after;
        let present = self.parent.map(|at| Present { at, lags });
        match self.choose(now, view, present).zip(self.parent) {
            Some((better, present)) if better != present => self.lead(now, view, None),
            _ => Decision::Stay,
        }
    }

    /// As master: the server that is followed reads the top no more, and those that do have let go of
    /// what follows our end. From here on one of them has all.
    pub(super) fn only_kept_elsewhere(&self, view: &View<'_>) -> Option<Lsn> {
        let latest = latest(told_by(view.parents));
        let present = view.parents.get(self.parent?)?.told.as_ref()?;
        let own = &view.own.told;
        // What comes over the link tells of it as well.
        if is_fresh(present.top_time.max(own.top_time), latest) {
            return None;
        }
        let fresh = live(view.parents, view.limit).filter(|told| is_fresh(told.top_time, latest));
        let serving = fresh.filter(|told| may_serve(told, own));
        serving
            .map(|told| told.first)
            .min()
            .filter(|first| *first > own.flush)
    }

    fn choose(&mut self, now: Now, view: &View<'_>, present: Option<Present>) -> Option<usize> {
        self.tried.retain(|(_, at)| now - *at < TRIED);
        let tried: Vec<usize> = self.tried.iter().map(|(index, _)| *index).collect();
        let own = &view.own.told;
        choose_parent(own, view.parents, present, &tried, self.takeover_after)
    }

    /// None can be followed. If all that are there have forgotten what follows our end, others of
    /// our domain may have it.
    fn without_parent(&mut self, now: Now, view: &View<'_>) -> Decision {
        let own = &view.own.told;
        let answers = |parent: &&Peer| parent.sight == Sight::Answers;
        let told = view.parents.iter().filter(answers);
        let told: Vec<&Told> = told.filter_map(|parent| parent.told.as_ref()).collect();
        let is_below_us = |told: &&Told| told.domains.contains(&own.domain);
        let with_data = told.iter().filter(|told| told.has_data);
        match with_data.map(|told| told.first).min() {
            Some(first) if first > own.flush && !told.iter().any(is_below_us) => {
                self.refused(now, Refusal::Ahead(first));
                Decision::Stay
            }
            _ => {
                self.next_try = now + TURN / 2;
                self.busy = None;
                Decision::NoParent
            }
        }
    }

    /// The slot of the domain is not there; another server of the parent domain may have it, once
    /// it answers. A standby has none before it leads.
    pub(super) fn without_slot(&self, view: &View<'_>) -> Decision {
        let lacks =
            |(index, parent): (usize, &Peer)| parent.standby || self.without_slot.contains(&index);
        let sure = view.parents.iter().enumerate().all(lacks);
        self.gap(view, Missing::Slot, Vec::new(), sure)
    }

    /// Nobody in sight has what the parent has forgotten; those who do not answer may, and so may
    /// servers of the parent domain.
    pub(super) fn forgotten(
        &self,
        now: Now,
        view: &View<'_>,
        lacking: Lacking,
        mut unseen: Vec<String>,
    ) -> Decision {
        if view.own.doubtful {
            return Decision::Stay;
        }
        if view.parents.iter().any(|parent| parent.told.is_some()) {
            let silent = |parent: &&Peer| parent.sight != Sight::Answers;
            let silent = view.parents.iter().filter(silent);
            unseen.extend(silent.map(|parent| parent.name.clone()));
        }
        let sure = unseen.is_empty() || now - lacking.since >= LAST_CALL;
        self.gap(view, Missing::Forgotten(lacking.confirmed), unseen, sure)
    }

    /// No server of the domain can go on. When that is sure, and allowed, one of them copies from
    /// the parent; the others serve what they have until they can copy from that one.
    fn gap(&self, view: &View<'_>, missing: Missing, unseen: Vec<String>, sure: bool) -> Decision {
        let may = self.resync_on_gap && sure && !view.own.doubtful;
        if may && copies_first(&view.own.told, &view.peers, self.takeover_after) {
            return Decision::CopyAnew {
                missing: Some(missing),
            };
        }
        Decision::Gap {
            missing,
            unseen,
            sure,
        }
    }
}

/// The server of the parent domain that is followed.
#[derive(Clone, Copy)]
struct Present {
    at: usize,
    /// It has not read the top as lately as others, and not just for a moment.
    lags: bool,
}

/// The server that is followed has not read the top as lately as others.
fn is_behind(view: &View<'_>, present: Option<usize>) -> bool {
    let present = present.and_then(|at| view.parents.get(at)?.told.as_ref());
    present.is_some_and(|told| !is_fresh(told.top_time, latest(told_by(view.parents))))
}

/// Which server of the parent domain to attach to: the present one while it is
/// sound, else the first in the configured order that is sound, reads the top as
/// lately as the others, keeps what follows our end, and is not below us itself.
/// `tried` holds those that failed just now.
fn choose_parent(
    own: &Told,
    parents: &[Peer],
    present: Option<Present>,
    tried: &[usize],
    limit: Duration,
) -> Option<usize> {
    let latest = latest(told_by(parents));
    let grade = |index: usize, parent: &Peer| {
        let usable = match &parent.told {
            // A Postgres; whether it can be followed shows when it is tried.
            None => !parent.standby,
            Some(told) => keeps(told, own),
        };
        let told = parent.told.as_ref();
        let present = present.filter(|present| present.at == index);
        let keeps_up = present.is_some_and(|present| !present.lags);
        let sound =
            told.is_none_or(|told| told.healthy && (keeps_up || is_fresh(told.top_time, latest)));
        (
            usable && parent.sight.is_live(limit),
            !tried.contains(&index),
            sound,
            present.is_some(),
        )
    };
    let graded = parents
        .iter()
        .enumerate()
        .map(|(index, parent)| (grade(index, parent), index));
    graded
        .filter(|(grade, _)| grade.0)
        .max_by_key(|(grade, index)| (*grade, std::cmp::Reverse(*index)))
        .map(|(_, index)| index)
}

/// Which server of the parent domain to copy from; `failed` did not give it the last time.
pub fn parent_to_copy_from(
    own: &Told,
    parents: &[Peer],
    failed: Option<usize>,
    limit: Duration,
) -> Option<usize> {
    // Wherever its queue begins.
    let anywhere = Told {
        flush: Lsn::MAX,
        ..own.clone()
    };
    choose_parent(&anywhere, parents, None, failed.as_slice(), limit)
}

/// Whether what follows a sibling's end is kept by us, or, as far as we know, above.
pub(super) fn can_go_on(view: &View<'_>, sibling: &Told) -> bool {
    let may_keep = |parent: &Peer| parent.told.as_ref().is_none_or(|told| keeps(told, sibling));
    view.own.told.first <= sibling.flush || view.parents.iter().any(may_keep)
}

/// Whether a bridge of the parent domain keeps what follows our end.
pub(super) fn keeps_it(view: &View<'_>) -> bool {
    live(view.parents, view.limit).any(|told| keeps(told, &view.own.told))
}

/// What bridges of the parent domain have told last …
fn told_by(parents: &[Peer]) -> impl Iterator<Item = &Told> {
    parents.iter().filter_map(|parent| parent.told.as_ref())
}

/// … and those of them that answer.
fn live(parents: &[Peer], limit: Duration) -> impl Iterator<Item = &Told> {
    let live = parents
        .iter()
        .filter(move |parent| parent.sight.is_live(limit));
    live.filter_map(|parent| parent.told.as_ref())
}

/// The top's clock as any of these knows it; 0 without any.
fn latest<'a>(told: impl Iterator<Item = &'a Told>) -> i64 {
    told.map(|told| told.top_time).max().unwrap_or(0)
}

/// The top's clock as the latest of the bridges above that answer knows it; 0 without any.
pub fn top_in_sight(parents: &[Peer], limit: Duration) -> i64 {
    latest(live(parents, limit))
}

/// The top has been read as lately as by others.
fn is_fresh(top_time: i64, latest: i64) -> bool {
    latest - top_time < STALE_MICROS
}

/// It has what follows `own` end, and gives it.
fn keeps(told: &Told, own: &Told) -> bool {
    may_serve(told, own) && told.first <= own.flush
}

/// It has what it could give to us, and is not below us itself.
fn may_serve(told: &Told, own: &Told) -> bool {
    told.has_data && told.serves && !told.domains.contains(&own.domain)
}
