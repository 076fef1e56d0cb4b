//! Single decisions that once were wrong; `schedules.rs` tries the rest at random.

use std::time::Duration;

use terrace_bridge::domain::{Decider, Decision, Link, Missing, Own, Peer, Refusal, Sight, Told};
use terrace_bridge::lsn::{Identity, Lsn};
use terrace_bridge::status::Role;

const TAKEOVER_AFTER: Duration = Duration::from_secs(3);

fn told(node: &str, role: Role, flush: u64) -> Told {
    Told {
        node: node.into(),
        domain: "region".into(),
        role,
        has_data: true,
        healthy: true,
        serves: true,
        parent_ok: true,
        flush: Lsn(flush),
        ..Told::default()
    }
}

fn peer(told: Told) -> Peer {
    Peer {
        name: told.node.clone(),
        sight: Sight::Answers,
        told: Some(told),
        age: Duration::ZERO,
        standby: false,
    }
}

/// The parent, which answers.
fn top() -> [Peer; 1] {
    [Peer {
        name: "top".into(),
        told: None,
        ..peer(told("top", Role::None, 0))
    }]
}

fn own(flush: u64, link: Link) -> Own {
    Own {
        told: told("one", Role::None, flush),
        link,
        heard: None,
        opening: false,
        doubtful: false,
    }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

// Two switchovers within a second: the chosen one followed nobody yet, and waited in vain
// for what the old master had beyond its end.
#[test]
fn who_takes_over_without_a_link_fetches_what_it_lacks() {
    let mut decider = Decider::new(TAKEOVER_AFTER, 3, false);
    let peers = [
        peer(told("two", Role::None, 90)),
        peer(told("three", Role::None, 50)),
    ];
    decider.take_over(seconds(10), Lsn(90));
    let follow = Decision::Follow("two".into());
    assert_eq!(
        decider.decide(seconds(10), &own(50, Link::None), &peers, &top()),
        follow
    );
    // Over a link that there is, it comes by itself.
    let linked = own(50, Link::Peer("three".into()));
    assert_eq!(
        decider.decide(seconds(10), &linked, &peers, &top()),
        Decision::Stay
    );
    let lead = Decision::Lead {
        parent: 0,
        depose: None,
    };
    assert_eq!(
        decider.decide(seconds(11), &own(90, Link::None), &peers, &top()),
        lead
    );
}

// One with another top, or none, was the master that goes first: a healthy one made way for it,
// and threw its data away.
#[test]
fn a_server_of_another_history_is_as_if_it_were_not_there() {
    let history = |system_id: u64| {
        Some(Identity {
            system_id,
            timeline: 1,
            database: "app".into(),
            publication: "terrace".into(),
            format: 1,
        })
    };
    let mut stranger = told("two", Role::Master, 900);
    stranger.identity = history(2);
    let seen = |at: u64| {
        let mut peer = peer(stranger.clone());
        peer.told.as_mut().unwrap().top_time = at as i64 * 1_000_000;
        [peer]
    };
    let ours = |link| {
        let mut own = own(100, link);
        own.told.identity = history(1);
        own
    };
    let mut decider = Decider::new(TAKEOVER_AFTER, 2, false);
    for at in 10..20 {
        let decision = decider.decide(seconds(at), &ours(Link::Parent), &seen(at), &top());
        assert_eq!(decision, Decision::Stay);
    }
    let mut decider = Decider::new(TAKEOVER_AFTER, 2, false);
    let lead = Decision::Lead {
        parent: 0,
        depose: None,
    };
    let decision = decider.decide(seconds(10), &ours(Link::None), &seen(10), &top());
    assert_eq!(decision, lead);
    let problem = terrace_bridge::domain::stranger(&ours(Link::None).told, &seen(10));
    assert!(problem.unwrap().contains("node two holds another history"));
    // Of one's own history it is what it says.
    let mut peers = seen(10);
    peers[0].told.as_mut().unwrap().identity = history(1);
    let decision = decider.decide(seconds(11), &ours(Link::None), &peers, &top());
    assert_eq!(decision, Decision::Follow("two".into()));
}

// Rule G: a master with a majority out of its reach makes room for a slave that reaches one, and for no other.
#[test]
fn a_master_that_most_cannot_reach_hands_over_to_one_that_they_can() {
    let mut silent = peer(told("three", Role::Slave, 100));
    silent.sight = Sight::Silent(seconds(60));
    let own = own(100, Link::Parent);
    let sees = |in_sight| {
        let sibling = Told {
            in_sight,
            ..told("two", Role::Slave, 100)
        };
        [peer(sibling), silent.clone()]
    };
    for (in_sight, members, goes) in [(3, 4, true), (2, 4, false), (3, 3, false)] {
        let mut decider = Decider::new(TAKEOVER_AFTER, members, false);
        let mut decide = |at| decider.decide(seconds(at), &own, &sees(in_sight), &top());
        assert_eq!(decide(10), Decision::Stay);
        assert_eq!(decide(12), Decision::Stay);
        let went = matches!(decide(13), Decision::HandOver { to, .. } if to == "two");
        assert_eq!(went, goes, "{in_sight} of {members}");
    }
}

// A deposed master that comes back into sight says for a moment what it was.
#[test]
fn a_master_leaves_for_another_one_that_goes_on_saying_so() {
    for (says_again, leaves) in [(false, false), (true, true)] {
        let mut decider = Decider::new(TAKEOVER_AFTER, 3, false);
        let mut decide = |at: u64, age: u64| {
            let mut rival = peer(told("two", Role::Master, 100));
            rival.age = Duration::from_millis(age);
            decider.decide(
                Duration::from_millis(at),
                &own(100, Link::Parent),
                &[rival],
                &top(),
            )
        };
        assert_eq!(decide(10_000, 0), Decision::Stay);
        assert_eq!(decide(10_900, 100), Decision::Stay);
        let age = if says_again { 100 } else { 1_200 };
        let left = matches!(decide(11_200, age), Decision::Leave(_));
        assert_eq!(left, leaves);
    }
}

// An old master that is cut off from the parent hands over, and its session there goes on
// holding the slot; whoever else has become master meanwhile is no such holder.
#[test]
fn who_takes_over_ends_a_session_that_nobody_in_sight_has() {
    for (role, depose) in [(Role::Slave, Some(7)), (Role::Master, None)] {
        let mut decider = Decider::new(TAKEOVER_AFTER, 3, false);
        let asks = Told {
            yields_to: Some("one".into()),
            ..told("two", Role::None, 90)
        };
        let peers = [peer(asks), peer(told("three", role, 90))];
        decider.take_over(seconds(10), Lsn(90));
        decider.refused(seconds(10), Refusal::Busy(7));
        let decision = decider.decide(seconds(12), &own(90, Link::None), &peers, &top());
        assert_eq!(decision, Decision::Lead { parent: 0, depose }, "{role}");
    }
}

// Two siblings waited for a slot to get free; the one that came second ended the session of
// the one that had just got it, and the third one led.
#[test]
fn who_has_just_taken_the_slot_is_given_time_to_say_so() {
    let mut decider = Decider::new(TAKEOVER_AFTER, 3, false);
    let peers = [
        peer(told("two", Role::None, 90)),
        peer(told("three", Role::None, 90)),
    ];
    let me = own(90, Link::None);
    decider.decide(seconds(10), &me, &peers, &top());
    decider.refused(seconds(15), Refusal::Busy(7));
    decider.refused(seconds(17), Refusal::Busy(8));
    let lead = |depose| Decision::Lead { parent: 0, depose };
    let at = seconds(17) + TAKEOVER_AFTER / 4;
    assert_eq!(decider.decide(at, &me, &peers, &top()), lead(None));
    // It is some other client's.
    assert_eq!(
        decider.decide(seconds(20), &me, &peers, &top()),
        lead(Some(8))
    );
}

/// Somebody holds the slot whom nobody in sight knows of.
fn in_the_way() -> (Decider, Vec<Peer>, Own) {
    let mut decider = Decider::new(TAKEOVER_AFTER, 3, false);
    let mut master = peer(told("two", Role::Master, 90));
    (master.sight, master.age) = (Sight::Silent(seconds(5)), seconds(5));
    let peers = vec![peer(told("three", Role::None, 90)), master];
    let me = own(90, Link::None);
    decider.decide(seconds(10), &me, &peers, &top());
    decider.refused(seconds(11), Refusal::Busy(7));
    (decider, peers, me)
}

// After packet loss a slave deposed a master in good health: its tries at the parent and its
// questions to the master had failed for the same reason.
#[test]
fn who_gets_no_answers_himself_deposes_nobody() {
    let lead = |depose| Decision::Lead { parent: 0, depose };
    let (mut decider, peers, me) = in_the_way();
    assert_eq!(
        decider.decide(seconds(13), &me, &peers, &top()),
        lead(Some(7))
    );
    decider.failed(seconds(13));
    decider.refused(seconds(14), Refusal::Busy(7));
    let at = seconds(14) + TAKEOVER_AFTER / 4;
    assert_eq!(decider.decide(at, &me, &peers, &top()), lead(None));
    assert_eq!(
        decider.decide(seconds(16), &me, &peers, &top()),
        lead(Some(7))
    );

    // Of a majority that was there a moment ago.
    let (mut decider, mut peers, me) = in_the_way();
    peers[0].sight = Sight::Silent(seconds(2));
    assert_eq!(decider.decide(seconds(13), &me, &peers, &top()), lead(None));

    // Where somebody knows of a master, whom we cannot follow him to.
    let (mut decider, mut peers, me) = in_the_way();
    let behind_us = Told {
        master_ok: true,
        path: vec!["one".into()],
        ..told("three", Role::Slave, 90)
    };
    peers[0] = peer(behind_us);
    assert_eq!(decider.decide(seconds(13), &me, &peers, &top()), lead(None));
}

// What is decided and not done, as while a link is being opened, costs nothing; and a master
// that comes and goes is deposed ever more rarely.
#[test]
fn the_pause_grows_with_what_is_done() {
    let (mut decider, mut peers, me) = in_the_way();
    let lead = |depose| Decision::Lead { parent: 0, depose };
    for _ in 0..5 {
        assert_eq!(
            decider.decide(seconds(13), &me, &peers, &top()),
            lead(Some(7))
        );
    }
    let mut now = seconds(13);
    let mut pauses = Vec::new();
    for _ in 0..4 {
        decider.deposes(now);
        let deposed = now;
        // A glimpse of it.
        (peers[1].sight, peers[1].age) = (Sight::Answers, Duration::ZERO);
        decider.decide(now, &me, &peers, &top());
        (peers[1].sight, peers[1].age) = (Sight::Silent(seconds(5)), seconds(5));
        loop {
            now += Duration::from_millis(500);
            decider.refused(now, Refusal::Busy(7));
            if decider.decide(now + TAKEOVER_AFTER / 10, &me, &peers, &top()) == lead(Some(7)) {
                break;
            }
        }
        pauses.push((now - deposed).as_secs());
    }
    assert!(
        pauses.windows(2).all(|two| two[1] >= 2 * two[0] - 1),
        "{pauses:?}"
    );
}

// An order to take over that came late, over a link that was cut, ended the session of the
// one that leads, without a majority.
#[test]
fn who_is_asked_no_more_deposes_by_the_majority_alone() {
    let (mut decider, mut peers, me) = in_the_way();
    peers[0].sight = Sight::Silent(seconds(5));
    decider.take_over(seconds(12), Lsn(90));
    decider.refused(seconds(12), Refusal::Busy(7));
    let decision = decider.decide(seconds(14), &me, &peers, &top());
    assert_eq!(
        decision,
        Decision::Lead {
            parent: 0,
            depose: None
        }
    );
}

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

// Everybody below would wait until its database has caught up.
#[test]
fn whose_database_is_far_behind_leads_last() {
    let me = own(50, Link::None);
    let leads_at = |lagging: bool| {
        let mut more = told("two", Role::None, 90);
        more.lagging = lagging;
        let mut decider = Decider::new(TAKEOVER_AFTER, 3, false);
        let peers = [peer(more), peer(told("three", Role::None, 10))];
        let leads = |at: &u64| {
            let decision = decider.decide(Duration::from_millis(*at), &me, &peers, &top());
            matches!(decision, Decision::Lead { .. })
        };
        (10_000..20_000).step_by(10).find(leads).expect("it leads")
    };
    assert!(leads_at(true) + 100 < leads_at(false));
}

#[test]
fn a_handover_to_one_that_has_died_is_over() {
    let leads_at = |sight: Sight| {
        let mut decider = Decider::new(TAKEOVER_AFTER, 3, false);
        decider.yield_to(seconds(10), "two");
        let mut two = peer(told("two", Role::Slave, 50));
        two.sight = sight;
        let peers = [two, peer(told("three", Role::None, 50))];
        let me = own(90, Link::None);
        let leads = |at: &u64| {
            let decision = decider.decide(Duration::from_millis(*at), &me, &peers, &top());
            matches!(decision, Decision::Lead { .. })
        };
        (10_000..20_000).step_by(10).find(leads).expect("it leads")
    };
    assert!(leads_at(Sight::Refused) < 11_000);
    assert!(leads_at(Sight::Answers) >= 15_000);
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

// Seen and asked again and again, it never led.
#[test]
fn who_did_not_take_over_is_asked_ever_more_rarely() {
    let mut decider = Decider::new(TAKEOVER_AFTER, 2, false);
    let mut me = own(100, Link::Parent);
    me.told.healthy = false;
    let peers = [peer(told("two", Role::Slave, 100))];
    let mut asked = Vec::new();
    for at in (10_000..400_000).step_by(100) {
        let now = Duration::from_millis(at);
        me.link = match decider.decide(now, &me, &peers, &top()) {
            Decision::HandOver { to, .. } => {
                asked.push(at);
                decider.yield_to(now, &to);
                Link::None
            }
            Decision::Lead { .. } => Link::Parent,
            _ => me.link,
        };
    }
    let pauses: Vec<u64> = asked.windows(2).map(|two| two[1] - two[0]).collect();
    assert!(pauses.len() > 3, "{asked:?}");
    let grows = pauses.windows(2).all(|two| two[1] > two[0] * 5 / 4);
    assert!(grows, "{pauses:?}");
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
