//! What a master does: stay, make room, leave.

use std::time::Duration;

use super::parents::{can_go_on, top_in_sight};
use super::view::{Peer, STALE_MICROS, Sight, Told, View, goes_before, key};
use super::{Decider, Decision, Now, UNSEEN, copy_anew};
use crate::status::Role;

impl Decider {
    pub(super) fn as_master(&mut self, now: Now, view: &View<'_>) -> Decision {
        if let Some(to) = self.yields_to() {
            return hand_over(&to, "it is asked to");
        }
        if let Some(name) = self.rival(now, view) {
            return Decision::Leave(format!("{name} is master as well and goes first"));
        }
        let alone = self.is_outnumbered(now, view);
        self.makes_room(now, view, alone)
            .or_else(|| self.is_one_too_many(now, view, alone))
            .unwrap_or_else(|| self.better_parent(now, view))
    }

    /// For a slave that leads better. One that follows another master is no such slave.
    fn makes_room(&mut self, now: Now, view: &View<'_>, alone: bool) -> Option<Decision> {
        let stale = self.is_stale(now, view);
        let failed = |name: &str| self.unfit.get(name).is_some_and(|(_, until)| now < *until);
        let fit = |told: &Told| told.has_data && told.healthy && told.parent_ok;
        let fit = |told: &Told| fit(told) && !view.follows_another(told) && can_go_on(view, told);
        let best = |better: &dyn Fn(&Told) -> bool| {
            let willing = view.live().filter(|(name, _)| !failed(name));
            let better = willing.filter(|(_, told)| fit(told) && better(told));
            better
                .max_by_key(|(_, told)| key(told))
                .map(|(name, _)| name)
        };
        let anybody = best(&|_| true);
        if let Some(name) = anybody.filter(|_| !view.own.told.healthy) {
            let reason = "this server is out of order, that one is not";
            return Some(hand_over(name, reason));
        }
        let parent = view.parent();
        let cut_off = !parent.is_live(self.takeover_after) && parent != Sight::Unknown;
        if let Some(name) = anybody.filter(|_| cut_off) {
            let reason = "the parent is in reach from there, and not from here";
            return Some(hand_over(name, reason));
        }
        let reaches_more = |told: &Told| 2 * told.in_sight > self.members;
        if let Some(name) = best(&reaches_more).filter(|_| alone) {
            let reason = "most servers of the domain are in reach from there, and not from here";
            return Some(hand_over(name, reason));
        }
        let sees_more = |told: &Told| sees_later(told, view);
        if let Some(name) = best(&sees_more).filter(|_| stale) {
            let reason =
                "a parent server that reads the top is in reach from there, and none from here";
            return Some(hand_over(name, reason));
        }
        let first = self.only_kept_elsewhere(view)?;
        let has_it = |told: &Told| told.flush >= first && view.gives(told);
        let reason = "it can go on from a parent server that reads the top, and this one cannot";
        best(&has_it).map(|name| hand_over(name, reason))
    }

    /// Another one leads at another server of the parent domain, and only siblings see it.
    fn is_one_too_many(&mut self, now: Now, view: &View<'_>, alone: bool) -> Option<Decision> {
        if let Some(sibling) = view.sibling_with_master(view.limit)
            && alone
        {
            // Until it says so again, which is asked for at once.
            self.next_try = now + UNSEEN;
            let reason = format!("{} follows another master", sibling.name);
            return Some(Decision::Leave(reason));
        }
        let stuck = self.only_kept_elsewhere(view).is_some() && view.is_master_seen(view.limit);
        if !stuck {
            self.unserved_since = None;
            return None;
        }
        self.is_missed(now, view).then(|| copy_anew(view))
    }

    /// Whether others have seen the top later than any server that we reach for so long that it is
    /// no hiccup.
    fn is_stale(&mut self, now: Now, view: &View<'_>) -> bool {
        let stale = view.live().any(|(_, told)| sees_later(told, view));
        lasts(&mut self.stale_since, stale, now) >= self.takeover_after
    }

    /// Another master that goes first and has told so again since it came in sight.
    fn rival(&mut self, now: Now, view: &View<'_>) -> Option<String> {
        let goes_first = |peer: &&Peer| {
            let told = View::told(peer);
            told.role == Role::Master && goes_before(told, &view.own.told, self.members)
        };
        let rivals: Vec<&Peer> = view.live_peers().filter(goes_first).collect();
        let since = |peer: &&Peer| {
            let known = self.rivals.get(&peer.name).copied();
            (peer.name.clone(), known.unwrap_or(now))
        };
        self.rivals = rivals.iter().map(since).collect();
        let says_again = |peer: &&Peer| {
            let seen_for = now - self.rivals[&peer.name];
            seen_for >= UNSEEN && peer.age < seen_for
        };
        rivals
            .into_iter()
            .find(says_again)
            .map(|peer| peer.name.clone())
    }

    /// Whether a majority of the domain has been out of reach for so long that it is no hiccup.
    fn is_outnumbered(&mut self, now: Now, view: &View<'_>) -> bool {
        let outnumbered = !view.is_majority();
        lasts(&mut self.outnumbered_since, outnumbered, now) >= self.takeover_after
    }
}

/// For how long something has been so, which is noted in `since`.
pub(super) fn lasts(since: &mut Option<Now>, is_so: bool, now: Now) -> Duration {
    *since = since.or(Some(now)).filter(|_| is_so);
    since.map_or(Duration::ZERO, |since| now - since)
}

/// Where servers of the parent domain are bridges: it reaches one that has read the top later than
/// those that we reach.
fn sees_later(told: &Told, view: &View<'_>) -> bool {
    let ours = top_in_sight(view.parents, view.limit);
    ours != 0 && told.top_in_sight - ours >= STALE_MICROS
}

fn hand_over(to: &str, reason: &str) -> Decision {
    Decision::HandOver {
        to: to.to_owned(),
        reason: reason.to_owned(),
    }
}
