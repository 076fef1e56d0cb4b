//! Single decisions, of which many once were wrong; `schedules` tries the rest at random.

mod gaps;
mod masters;

use std::time::Duration;

use terrace_bridge::domain::{Decider, Decision, Link, Own, Peer, Refusal, Sight, Told};
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
