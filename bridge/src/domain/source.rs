//! Where a node without data copies from.

use std::time::Duration;

use super::view::{Peer, Sight, Told, key};
use super::{MISSED, TURN};
use crate::lsn::Lsn;
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
///
/// When it has thrown its data away to copy anew from the parent, as no server of the domain
/// could go on, what the others hold is no better, unless one of them leads by now, or follows
/// one that does.
pub fn copy_source(waited: Duration, own: &Told, peers: &[Peer], limit: Duration) -> Source {
    let anew = own.anew;
    // One that has not been heard of yet may lead, or be about to.
    let unheard = |peer: &Peer| peer.told.is_none() && peer.sight != Sight::Refused;
    if anew && waited < MISSED && peers.iter().any(unheard) {
        return Source::Wait;
    }
    let is_led = |told: &Told| match told.role {
        Role::Master => true,
        Role::Slave => told.master_ok,
        Role::None => told.copying,
    };
    let counts = |peer: &&Peer| !anew || peer.told.as_ref().is_some_and(is_led);
    let peers: Vec<&Peer> = peers.iter().filter(counts).collect();
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
    let copies = |told: &Told| told.copying || told.anew && told.healthy && told.parent_ok;
    let live = peers.iter().filter(|peer| peer.sight.is_live(limit));
    live.filter_map(|peer| peer.told.as_ref())
        .all(|told| !copies(told) && (!told.has_data || key(told) < key(own)))
}

/// End of what a sound server of the domain may have, and lead with; one that has just fallen
/// silent may be one of these, and has gone on since it told of itself if it followed anybody.
pub fn held_by_others(peers: &[Peer]) -> Lsn {
    let sound = |told: &&Told| told.has_data && told.serves && told.healthy;
    let heard = peers.iter().filter(|peer| peer.age < MISSED);
    let held = heard.filter_map(|peer| peer.told.as_ref()).filter(sound);
    let end = |told: &Told| match told.role {
        Role::None => told.flush,
        Role::Master | Role::Slave => Lsn::MAX,
    };
    held.map(end).max().unwrap_or(Lsn::ZERO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_kept_for_a_sound_server_that_was_heard_of() {
        let peer = |flush: u64, edit: &dyn Fn(&mut Peer)| {
            let told = Told {
                has_data: true,
                serves: true,
                healthy: true,
                flush: Lsn(flush),
                ..Told::default()
            };
            let mut peer = Peer {
                name: String::new(),
                sight: Sight::Silent(Duration::from_secs(8)),
                told: Some(told),
                age: Duration::from_secs(8),
                standby: false,
            };
            edit(&mut peer);
            peer
        };
        let diverged = |peer: &mut Peer| peer.told.as_mut().unwrap().serves = false;
        let empty = |peer: &mut Peer| peer.told.as_mut().unwrap().has_data = false;
        let gone = |peer: &mut Peer| peer.age = MISSED;
        let mut peers = vec![peer(70, &diverged), peer(80, &empty), peer(90, &gone)];
        assert_eq!(held_by_others(&peers), Lsn::ZERO);
        peers.push(peer(60, &|_| ()));
        assert_eq!(held_by_others(&peers), Lsn(60));
        let leads = |peer: &mut Peer| peer.told.as_mut().unwrap().role = Role::Master;
        peers.push(peer(50, &leads));
        assert_eq!(held_by_others(&peers), Lsn::MAX);
    }
}
