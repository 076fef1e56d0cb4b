//! Single decisions that once were wrong; `schedules.rs` tries the rest at random.

use std::time::Duration;

use terrace_bridge::domain::{Decider, Decision, Link, Own, Peer, Refusal, Sight, Told};
use terrace_bridge::lsn::Lsn;
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
    }
}

fn own(flush: u64, link: Link) -> Own {
    Own {
        told: told("one", Role::None, flush),
        link,
        parent: Sight::Answers,
    }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

// Two switchovers within a second: the chosen one followed nobody yet, and waited in vain
// for what the old master had beyond its end.
#[test]
fn who_takes_over_without_a_link_fetches_what_it_lacks() {
    let mut decider = Decider::new(TAKEOVER_AFTER, 3);
    let peers = [
        peer(told("two", Role::None, 90)),
        peer(told("three", Role::None, 50)),
    ];
    decider.take_over(seconds(10), Lsn(90));
    let follow = Decision::Follow("two".into());
    assert_eq!(
        decider.decide(seconds(10), &own(50, Link::None), &peers),
        follow
    );
    // Over a link that there is, it comes by itself.
    let linked = own(50, Link::Peer("three".into()));
    assert_eq!(decider.decide(seconds(10), &linked, &peers), Decision::Stay);
    let lead = Decision::Lead { depose: false };
    assert_eq!(
        decider.decide(seconds(11), &own(90, Link::None), &peers),
        lead
    );
}

// An old master that is cut off from the parent hands over, and its session there goes on
// holding the slot; whoever else has become master meanwhile is no such holder.
#[test]
fn who_takes_over_ends_a_session_that_nobody_in_sight_has() {
    for (role, depose) in [(Role::Slave, true), (Role::Master, false)] {
        let mut decider = Decider::new(TAKEOVER_AFTER, 3);
        let peers = [
            peer(told("two", Role::None, 90)),
            peer(told("three", role, 90)),
        ];
        decider.take_over(seconds(10), Lsn(90));
        decider.refused(seconds(10), Refusal::Busy);
        let decision = decider.decide(seconds(12), &own(90, Link::None), &peers);
        assert_eq!(decision, Decision::Lead { depose }, "{role}");
    }
}
