//! Where to copy from, and which server of the parent domain to attach to.

use std::time::Duration;

use super::view::{Peer, STALE_MICROS, Sight, Told, key};
use super::{MISSED, TURN};
use crate::status::Role;

/// What a node without data does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Copy from this member.
    Peer(String),
    /// Copy from the parent.
    Parent,
    /// Look again soon.
    Wait,
}

/// Whom a node without data copies from: one that has data, a sound one before
/// others, then the master; else the parent, one member after the other.
pub fn copy_source(waited: Duration, own: &Told, peers: &[Peer], limit: Duration) -> Source {
    let view = peers
        .iter()
        .filter(|peer| peer.sight.is_live(limit))
        .filter_map(|peer| Some((&peer.name, peer.told.as_ref()?)));
    let with_data = view
        .clone()
        .filter(|(_, told)| told.has_data && told.serves);
    // One that is out of order may still be read; if nobody else has data it is tried.
    let best = with_data
        .max_by_key(|(name, told)| (told.healthy, told.role == Role::Master, told.flush, *name));
    if let Some((name, _)) = best {
        return Source::Peer(name.clone());
    }
    if view.clone().any(|(_, told)| told.copying) {
        return Source::Wait;
    }
    let key = |told: &Told| (told.parent_ok, told.priority, told.node.clone());
    let before = view.filter(|(_, told)| key(told) > key(own)).count();
    // One that is only starting may have data.
    let opening = |peer: &Peer| peer.told.as_ref().is_some_and(|told| told.opening);
    let patience = match peers.iter().any(|peer| peer.sight == Sight::Unknown) {
        _ if peers.iter().any(|p| p.sight.is_live(limit) && opening(p)) => MISSED,
        true => limit,
        false => Duration::ZERO,
    };
    let turn = TURN * u32::try_from(before).unwrap_or(u32::MAX);
    match waited >= turn.max(patience) {
        true => Source::Parent,
        false => Source::Wait,
    }
}

/// Whether, of the servers of a domain that none can go on, this one is to copy from the
/// parent: the first by the order in which they would lead, and one at a time.
pub fn copies_first(own: &Told, peers: &[Peer], limit: Duration) -> bool {
    let live = peers.iter().filter(|peer| peer.sight.is_live(limit));
    live.filter_map(|peer| peer.told.as_ref())
        .all(|told| !told.copying && (!told.has_data || key(told) < key(own)))
}

/// Which server of the parent domain to attach to: the present one while it is
/// sound, else the first in the configured order that is sound, reads the top as
/// lately as the others, keeps what follows our end, and is not below us itself.
/// `tried` holds those that failed just now.
pub fn choose_parent(
    own: &Told,
    parents: &[Peer],
    present: Option<usize>,
    tried: &[usize],
    limit: Duration,
) -> Option<usize> {
    let latest = parents
        .iter()
        .filter_map(|parent| Some(parent.told.as_ref()?.top_time))
        .max()
        .unwrap_or(0);
    let grade = |index: usize, parent: &Peer| {
        let usable = match &parent.told {
            // A Postgres; whether it can be followed shows when it is tried.
            None => true,
            Some(told) => {
                let serves = told.has_data && told.serves && told.first <= own.flush;
                !told.domains.contains(&own.domain) && serves
            }
        };
        let told = parent.told.as_ref();
        let sound = told.is_none_or(|told| told.healthy && latest - told.top_time < STALE_MICROS);
        (
            usable && parent.sight.is_live(limit),
            !tried.contains(&index),
            sound,
            present == Some(index),
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
