//! What nobody seems to have: who is waited for, and who copies anew.

use terrace_bridge::domain::{Decider, Decision, Link, Missing, Peer, Refusal, Sight, Told};
use terrace_bridge::lsn::Lsn;
use terrace_bridge::status::Role;

use crate::{TAKEOVER_AFTER, own, peer, seconds, told, top};

fn keeps(node: &str, role: Role, first: u64, flush: u64) -> Peer {
    peer(Told {
        first: Lsn(first),
        ..told(node, role, flush)
    })
}

// The master has forgotten what follows our end, and the sibling that keeps it was silent
// for a moment, or not asked yet: everything used to be copied anew.
#[test]
fn who_is_silent_for_a_moment_may_have_what_is_missing() {
    for sight in [Sight::Unknown, Sight::Silent(seconds(5)), Sight::Refused] {
        let mut decider = Decider::new(TAKEOVER_AFTER, 3, false);
        let master = keeps("two", Role::Master, 80, 100);
        let mut sibling = keeps("three", Role::Slave, 10, 100);
        (sibling.sight, sibling.age) = (sight, seconds(5));
        if sight == Sight::Unknown {
            sibling.told = None;
        }
        let own = own(50, Link::None);
        let peers = [master.clone(), sibling];
        assert_eq!(
            decider.decide(seconds(10), &own, &peers, &top()),
            Decision::Stay
        );
        assert_eq!(
            decider.decide(seconds(20), &own, &peers, &top()),
            Decision::Stay
        );
        // One that never comes back is not waited for for ever.
        let decision = decider.decide(seconds(41), &own, &peers, &top());
        assert_eq!(decision, Decision::CopyAnew { missing: None }, "{sight:?}");
        let back = [master, keeps("three", Role::Slave, 10, 100)];
        let follow = Decision::Follow("three".into());
        assert_eq!(decider.decide(seconds(42), &own, &back, &top()), follow);
    }
}

// The parent's position can go back, as it is saved late: one that lacked something used
// to wait for ever for a server that had died for good.
#[test]
fn the_parent_is_asked_again_for_what_it_has_confirmed() {
    let mut decider = Decider::new(TAKEOVER_AFTER, 2, false);
    let mut dead = peer(told("two", Role::None, 90));
    (dead.sight, dead.age) = (Sight::Refused, seconds(100));
    let (own, peers) = (own(50, Link::None), [dead]);
    decider.refused(seconds(10), Refusal::Ahead(Lsn(90)));
    assert_eq!(
        decider.decide(seconds(11), &own, &peers, &top()),
        Decision::Stay
    );
    // It is known who may have it, and not sure that nobody has.
    decider.refused(seconds(20), Refusal::Ahead(Lsn(90)));
    let gap = Decision::Gap {
        missing: Missing::Forgotten(Lsn(90)),
        unseen: vec!["two".into()],
        sure: false,
    };
    assert_eq!(decider.decide(seconds(21), &own, &peers, &top()), gap);
    let lead = Decision::Lead {
        parent: 0,
        depose: None,
    };
    assert_eq!(decider.decide(seconds(24), &own, &peers, &top()), lead);
    // It may be dead for good.
    decider.refused(seconds(310), Refusal::Ahead(Lsn(90)));
    let last = decider.decide(seconds(311), &own, &peers, &top());
    assert!(matches!(last, Decision::Gap { sure: true, .. }), "{last:?}");
}

// Positions of another history are none, and one that has diverged serves nobody.
#[test]
fn who_tells_another_history_is_neither_followed_nor_waited_for() {
    let identity = |system: u32| format!("{system}/1/terrace/1/app").parse().ok();
    let mut me = own(50, Link::None);
    me.told.identity = identity(1);
    let mut diverged = told("two", Role::None, 90);
    (diverged.serves, diverged.healthy, diverged.identity) = (false, false, identity(1));
    let mut other = told("three", Role::None, 90);
    other.identity = identity(2);
    let peers = [peer(diverged), peer(other)];
    let mut decider = Decider::new(TAKEOVER_AFTER, 3, false);
    let lead = Decision::Lead {
        parent: 0,
        depose: None,
    };
    assert_eq!(decider.decide(seconds(10), &me, &peers, &top()), lead);
    decider.refused(seconds(11), Refusal::Ahead(Lsn(90)));
    let gap =
        |decision: &Decision| matches!(decision, Decision::Gap { unseen, .. } if unseen.is_empty());
    let decision = decider.decide(seconds(12), &me, &peers, &top());
    assert!(gap(&decision), "{decision:?}");
}

// A top that has failed over: the old one is a standby by now, and comes first in the list.
#[test]
fn a_standby_is_neither_followed_nor_copied_from() {
    let [standby] = top().map(|mut old| {
        old.standby = true;
        old
    });
    let [primary] = top();
    let mut decider = Decider::new(TAKEOVER_AFTER, 1, false);
    let me = own(50, Link::None);
    let decision = decider.decide(seconds(10), &me, &[], &[standby.clone(), primary]);
    let lead = Decision::Lead {
        parent: 1,
        depose: None,
    };
    assert_eq!(decision, lead);
    let mut decider = Decider::new(TAKEOVER_AFTER, 1, false);
    let decision = decider.decide(seconds(10), &me, &[], &[standby]);
    assert_eq!(decision, Decision::NoParent);
}

// Led again and again by others, it was thought to have waited for what it lacks all the while.
#[test]
fn who_finds_the_slot_in_use_waits_anew_for_what_it_lacks() {
    let mut decider = Decider::new(TAKEOVER_AFTER, 2, true);
    let mut silent = peer(told("two", Role::Master, 90));
    (silent.sight, silent.age) = (Sight::Silent(seconds(400)), seconds(400));
    let (own, peers) = (own(50, Link::None), [silent]);
    decider.refused(seconds(10), Refusal::Ahead(Lsn(90)));
    decider.refused(seconds(300), Refusal::Busy(7));
    decider.refused(seconds(320), Refusal::Ahead(Lsn(95)));
    let decision = decider.decide(seconds(322), &own, &peers, &top());
    assert!(
        !matches!(decision, Decision::CopyAnew { .. }),
        "{decision:?}"
    );
}

// One that slept, or that has no more than we have, was copied from.
#[test]
fn nothing_is_thrown_away_for_a_server_that_has_no_more_or_is_out_of_order() {
    let decide = |end: u64, first: u64, healthy: bool| {
        let mut decider = Decider::new(TAKEOVER_AFTER, 2, true);
        let mut master = keeps("two", Role::Master, first, 100);
        master.told.as_mut().expect("told").healthy = healthy;
        let (me, peers) = (own(end, Link::None), [master]);
        decider.decide(seconds(10), &me, &peers, &top());
        decider.decide(seconds(11), &me, &peers, &top())
    };
    assert_eq!(decide(50, 80, true), Decision::CopyAnew { missing: None });
    assert_eq!(decide(50, 80, false), Decision::NoSource);
    assert_eq!(decide(100, 101, true), Decision::NoSource);
}

// Those who could not go on either were empty at once.
#[test]
fn after_a_gap_one_server_copies_and_the_others_keep_what_they_have() {
    let copies = |name: &str, edit: &dyn Fn(&mut Told)| {
        let mut decider = Decider::new(TAKEOVER_AFTER, 2, true);
        let mut me = own(50, Link::None);
        me.told.node = name.into();
        let mut other = told("two", Role::None, 50);
        edit(&mut other);
        let lead = decider.decide(seconds(10), &me, &[peer(other.clone())], &top());
        if !matches!(lead, Decision::Lead { .. }) {
            // It waits its turn.
            let later = decider.decide(seconds(12), &me, &[peer(other.clone())], &top());
            assert!(matches!(later, Decision::Lead { .. }), "{later:?}");
        }
        decider.refused(seconds(12), Refusal::NoSlot);
        let decision = decider.decide(seconds(13), &me, &[peer(other)], &top());
        matches!(decision, Decision::CopyAnew { .. })
    };
    assert!(copies("zero", &|_| ()));
    assert!(!copies("one", &|_| ()));
    let empty = |told: &mut Told| (told.has_data, told.flush) = (false, Lsn::ZERO);
    assert!(copies("one", &empty));
    assert!(!copies("zero", &|told| (told.copying, told.has_data) =
        (true, false)));
    assert!(!copies("zero", &|told| (told.anew, told.has_data) = (true, false)));
}

// A server above that was only restarting had kept what was missing.
#[test]
fn who_is_silent_above_may_have_what_is_missing() {
    let above = |name: &str, sight| {
        let mut above = keeps(name, Role::Master, 80, 100);
        above.told.as_mut().expect("told").domain = "above".into();
        above.sight = sight;
        above
    };
    let silent = Sight::Silent(seconds(60));
    for (sight, at, sure) in [
        (Sight::Answers, 14, true),
        (silent, 14, false),
        (silent, 314, true),
    ] {
        let mut decider = Decider::new(TAKEOVER_AFTER, 1, false);
        let parents = [above("high", Sight::Answers), above("higher", sight)];
        let me = own(50, Link::None);
        decider.refused(seconds(10), Refusal::Ahead(Lsn(80)));
        decider.refused(seconds(at - 1), Refusal::Ahead(Lsn(80)));
        let decision = decider.decide(seconds(at), &me, &[], &parents);
        match decision {
            Decision::Gap {
                sure: found,
                unseen,
                ..
            } => {
                assert_eq!((found, unseen.is_empty()), (sure, sight == Sight::Answers));
            }
            other => panic!("{other:?}"),
        }
    }
}
