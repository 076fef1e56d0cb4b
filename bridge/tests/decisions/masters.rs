//! What a master does: stay, make room, leave.

use std::time::Duration;

use terrace_bridge::domain::{Decider, Decision, Link, Sight, Told};
use terrace_bridge::status::Role;

use crate::{TAKEOVER_AFTER, own, peer, seconds, told, top};

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

/// Whether one of two masters in a domain of three leaves for the other.
fn leaves(me: Told, other: Told) -> bool {
    let mut decider = Decider::new(TAKEOVER_AFTER, 3, false);
    let mut own = own(100, Link::Parent);
    own.told = me;
    let peers = [peer(other)];
    let mut decide = |at| decider.decide(seconds(at), &own, &peers, &top());
    assert_eq!(decide(10), Decision::Stay);
    matches!(decide(12), Decision::Leave(_))
}

// Two that see each other only through others, each at a server of the parent domain of its own.
#[test]
fn of_two_masters_the_one_that_most_reach_stays() {
    // By priority and name the other one goes first.
    let master = |node, in_sight, priority| Told {
        in_sight,
        priority,
        ..told(node, Role::Master, 100)
    };
    assert!(!leaves(master("one", 2, 0), master("two", 1, 9)));
    assert!(leaves(master("one", 1, 0), master("two", 2, 9)));
}

// The old top and its successor both answer.
#[test]
fn of_two_masters_the_one_of_the_later_timeline_stays() {
    // The later it is, the less else speaks for it.
    let master = |node, timeline: u32| Told {
        identity: format!("1/{timeline}/terrace/1/app").parse().ok(),
        in_sight: 4 - timeline as usize,
        priority: 2 - i64::from(timeline),
        ..told(node, Role::Master, 100)
    };
    assert!(!leaves(master("one", 2), master("two", 1)));
    assert!(leaves(master("one", 2), master("two", 3)));
}

// All servers above that it reached were cut off from the top themselves.
#[test]
fn a_master_whose_servers_above_read_the_top_no_more_hands_over_to_one_that_has_others() {
    let mut decider = Decider::new(TAKEOVER_AFTER, 2, false);
    let above = Told {
        top_time: 1_000_000,
        domain: "above".into(),
        ..told("above", Role::Slave, 100)
    };
    let above = [peer(above)];
    let mut decide = |at: u64, top_in_sight: i64| {
        let sibling = Told {
            top_in_sight,
            ..told("two", Role::Slave, 100)
        };
        let me = own(100, Link::Parent);
        let decision = decider.decide(seconds(at), &me, &[peer(sibling)], &above);
        matches!(decision, Decision::HandOver { .. })
    };
    assert!(!decide(10, 4_000_000));
    assert!(!decide(12, 4_000_000));
    assert!(decide(13, 4_000_000));
    // Two seconds may be a hiccup, and so may be what was for a moment.
    assert!(!decide(14, 3_900_000));
    assert!(!decide(20, 4_000_000));
}

// Six bridges were started at once: of the servers above the first to come to what had piled up was
// ahead of the others for a second, and the master below went over to it, and back.
#[test]
fn a_server_above_that_is_behind_others_for_a_moment_is_not_left() {
    let above = |node: &str, top_time: i64| Told {
        top_time,
        domain: "above".into(),
        ..told(node, Role::Slave, 100)
    };
    let mut decider = Decider::new(TAKEOVER_AFTER, 1, false);
    let mut decide = |at: u64, link: Link, ahead: i64| {
        let parents = [
            peer(above("first", 1_000_000)),
            peer(above("second", ahead)),
        ];
        decider.decide(seconds(at), &own(100, link), &[], &parents)
    };
    let to = |parent| Decision::Lead {
        parent,
        depose: None,
    };
    assert_eq!(decide(10, Link::None, 1_000_000), to(0));
    assert_eq!(decide(11, Link::Parent, 9_000_000), Decision::Stay);
    assert_eq!(decide(13, Link::Parent, 9_000_000), Decision::Stay);
    assert_eq!(decide(14, Link::Parent, 9_000_000), to(1));
}
