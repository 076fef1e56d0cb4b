//! Where a node without data copies from.

use std::time::Duration;

use super::view::{Peer, Sight, Told, key};
use super::{LAST_CALL, MISSED, Now, TURN};
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
    // One that has not been heard of yet, or does not know yet what it has, may lead, or be about to.
    let unheard = |peer: &Peer| match &peer.told {
        None => peer.sight != Sight::Refused,
        Some(told) => told.opening && peer.sight == Sight::Answers,
    };
    if anew && waited < MISSED && peers.iter().any(unheard) {
        return Source::Wait;
    }
    let counts = |peer: &&Peer| {
        let led = |told: &Told| is_led(told) || told.copying;
        !anew || peer.told.as_ref().is_some_and(led)
    };
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

/// It leads, or follows one that does.
fn is_led(told: &Told) -> bool {
    match told.role {
        Role::Master => true,
        Role::Slave => told.master_ok,
        Role::None => false,
    }
}

/// What one that waits to copy from the parent has seen of the domain's slot there.
#[derive(Clone, Copy, Debug)]
pub struct SlotWatch {
    /// Not seen in use since then.
    used_at: Now,
    /// What it had confirmed when it was found in the way last, and since when.
    found: Option<(Lsn, Now)>,
}

impl SlotWatch {
    /// Nothing has been seen yet.
    pub fn new(now: Now) -> SlotWatch {
        SlotWatch {
            used_at: now,
            found: None,
        }
    }

    /// Notes that somebody uses it.
    pub fn in_use(&mut self, now: Now) {
        self.used_at = now;
    }

    /// Notes that it is in the way, with what it has confirmed; whether that is news.
    pub fn found(&mut self, now: Now, confirmed: Lsn) -> bool {
        if self.found.is_some_and(|(known, _)| known == confirmed) {
            return false;
        }
        if self.found.replace((confirmed, now)).is_some() {
            self.used_at = now;
        }
        true
    }

    /// Where it is, if it may make room for a copy: nobody else may lead with it. What others told
    /// before it was found as it is says nothing: one of them may have made it.
    pub fn may_go(&self, now: Now, peers: &[Peer]) -> Option<Lsn> {
        let (confirmed, since) = self.found?;
        let told_since = |peer: &Peer| peer.sight != Sight::Answers || peer.age < now - since;
        let free = confirmed > held_by_others(peers, now - self.used_at);
        (peers.iter().all(told_since) && free).then_some(confirmed)
    }
}

/// End of what another server of the domain may have, and lead with. Whoever is led goes on, and whoever
/// does not answer may have all; when nobody has used the slot for [`LAST_CALL`], `unused_for`
/// which it is known, it has not.
fn held_by_others(peers: &[Peer], unused_for: Duration) -> Lsn {
    let in_use = unused_for < LAST_CALL;
    let end = |peer: &Peer| match &peer.told {
        _ if peer.sight != Sight::Answers && in_use => Lsn::MAX,
        Some(told) if told.opening => Lsn::MAX,
        Some(told) if told.has_data && told.serves && is_led(told) => Lsn::MAX,
        // A database may be mended.
        Some(told) if told.has_data && told.serves && (told.healthy || in_use) => told.flush,
        _ => Lsn::ZERO,
    };
    peers.iter().map(end).max().unwrap_or(Lsn::ZERO)
}

/// Whether a sound server that answers has what a slot has confirmed: it is copied from also when
/// it cannot lead.
pub fn has_in_sight(peers: &[Peer], confirmed: Lsn) -> bool {
    let sound = |told: &Told| told.has_data && told.serves && told.healthy;
    let has_it = |told: &Told| sound(told) && told.flush >= confirmed;
    let mut answer = peers.iter().filter(|peer| peer.sight == Sight::Answers);
    answer.any(|peer| peer.told.as_ref().is_some_and(has_it))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(sight: Sight, told: Option<Told>) -> Peer {
        Peer {
            name: "two".into(),
            sight,
            told,
            age: Duration::ZERO,
            standby: false,
        }
    }

    fn sound() -> Told {
        Told {
            has_data: true,
            serves: true,
            healthy: true,
            flush: Lsn(60),
            ..Told::default()
        }
    }

    #[test]
    fn a_slot_is_kept_for_whoever_may_have_what_follows_it() {
        let held = |edit: &dyn Fn(&mut Peer, &mut Told)| {
            let (mut peer, mut told) = (peer(Sight::Answers, None), sound());
            edit(&mut peer, &mut told);
            peer.told = Some(told);
            [Duration::ZERO, LAST_CALL].map(|unused| held_by_others(&[peer.clone()], unused))
        };
        assert_eq!(held(&|_, _| ()), [Lsn(60), Lsn(60)]);
        assert_eq!(held(&|_, told| told.role = Role::Master), [Lsn::MAX; 2]);
        assert_eq!(held(&|_, told| told.role = Role::Slave), [Lsn(60); 2]);
        let led = |_: &mut Peer, told: &mut Told| (told.role, told.master_ok) = (Role::Slave, true);
        assert_eq!(held(&led), [Lsn::MAX; 2]);
        assert_eq!(held(&|_, told| told.opening = true), [Lsn::MAX; 2]);
        let broken = held(&|_, told| told.healthy = false);
        assert_eq!(broken, [Lsn(60), Lsn::ZERO]);
        assert_eq!(held(&|_, told| told.serves = false), [Lsn::ZERO; 2]);
        assert_eq!(held(&|_, told| told.has_data = false), [Lsn::ZERO; 2]);
        let silent = held(&|peer, _| peer.sight = Sight::Silent(MISSED));
        assert_eq!(silent, [Lsn::MAX, Lsn(60)]);
        let dead = held(&|peer, _| peer.sight = Sight::Refused);
        assert_eq!(dead, [Lsn::MAX, Lsn(60)]);
    }

    #[test]
    fn who_has_thrown_its_data_away_copies_the_parents_or_that_of_one_who_is_led() {
        let anew = Told {
            anew: true,
            ..Told::default()
        };
        let source = |waited: u64, told: Option<Told>| {
            let sight = told.as_ref().map_or(Sight::Unknown, |_| Sight::Answers);
            let limit = Duration::from_secs(3);
            copy_source(
                Duration::from_secs(waited),
                &anew,
                &[peer(sight, told)],
                limit,
            )
        };
        let of = |edit: &dyn Fn(&mut Told)| {
            let mut told = sound();
            edit(&mut told);
            source(10, Some(told))
        };
        assert_eq!(of(&|_| ()), Source::Parent);
        let two = Source::Peer("two".into());
        assert_eq!(of(&|told| told.role = Role::Master), two);
        let led = |told: &mut Told| (told.role, told.master_ok) = (Role::Slave, true);
        assert_eq!(of(&led), two);
        let copying = |told: &mut Told| (told.copying, told.has_data) = (true, false);
        assert_eq!(of(&copying), Source::Wait);
        // One that may lead is waited for.
        assert_eq!(of(&|told| told.opening = true), Source::Wait);
        assert_eq!(source(10, None), Source::Wait);
        assert_eq!(source(31, None), Source::Parent);
    }

    #[test]
    fn what_was_told_before_a_slot_was_made_does_not_count() {
        let mut empty = [peer(Sight::Answers, Some(Told::default()))];
        empty[0].age = Duration::from_millis(300);
        // Long out of use, as far as is known.
        let mut watch = SlotWatch::new(Duration::ZERO);
        let made = LAST_CALL * 2;
        assert!(watch.found(made, Lsn(60)));
        assert!(!watch.found(made, Lsn(60)));
        let after = |millis| made + Duration::from_millis(millis);
        assert_eq!(watch.may_go(after(300), &empty), None);
        assert_eq!(watch.may_go(after(301), &empty), Some(Lsn(60)));
        assert_eq!(watch.may_go(after(0), &[]), Some(Lsn(60)));
    }
}
