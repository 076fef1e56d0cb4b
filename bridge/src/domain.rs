//! Whom to follow: the decision, without I/O.
//!
//! Correctness never depends on it: every server holds a prefix of one history,
//! and whoever takes the slot verifies that nothing is missing. Deciding well
//! only saves bandwidth and time.

use std::time::Duration;

use crate::lsn::Lsn;
use crate::status::Role;

/// What is known of a member of the domain, oneself included.
#[derive(Clone, Debug)]
pub struct Member {
    /// Node name.
    pub name: String,
    /// Role that it told.
    pub role: Role,
    /// Whether it has been copied to.
    pub has_data: bool,
    /// Durable end of its queue.
    pub flush: Lsn,
    /// Configured preference.
    pub priority: i64,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Follow, or copy from, this member.
    Follow(String),
    /// Follow, or copy from, the parent: try to become master.
    Parent,
    /// Look again soon.
    Wait,
}

/// Decides from oneself, the members that answer, and how long no master has
/// been seen. A live master is followed. Without one the member with the
/// longest history goes first; the others give it `turn` each, in their order.
pub fn choose(own: &Member, others: &[Member], masterless: Duration, turn: Duration) -> Choice {
    let master = others.iter().find(|other| other.role == Role::Master);
    match master {
        Some(master) if master.has_data => return Choice::Follow(master.name.clone()),
        // The first master is still copying.
        Some(_) => return Choice::Wait,
        None => {}
    }
    if !own.has_data && others.iter().any(|other| other.has_data) {
        return Choice::Wait;
    }
    let rank = |member: &Member| (member.flush, member.priority, member.name.clone());
    let better = others
        .iter()
        .filter(|other| rank(other) > rank(own))
        .count();
    if masterless >= turn * better as u32 {
        Choice::Parent
    } else {
        Choice::Wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TURN: Duration = Duration::from_secs(3);

    fn member(name: &str, role: Role, flush: u64) -> Member {
        Member {
            name: name.into(),
            role,
            has_data: flush > 0,
            flush: Lsn(flush),
            priority: 100,
        }
    }

    #[test]
    fn a_live_master_is_followed() {
        let others = [member("b", Role::Slave, 900), member("c", Role::Master, 10)];
        let own = member("a", Role::None, 500);
        assert_eq!(
            choose(&own, &others, TURN * 9, TURN),
            Choice::Follow("c".into())
        );
    }

    #[test]
    fn without_a_master_the_longest_history_goes_first() {
        let (a, b) = (member("a", Role::None, 500), member("b", Role::None, 600));
        let wait = Duration::ZERO;
        assert_eq!(
            choose(&b, std::slice::from_ref(&a), wait, TURN),
            Choice::Parent
        );
        assert_eq!(
            choose(&a, std::slice::from_ref(&b), wait, TURN),
            Choice::Wait
        );
        assert_eq!(choose(&a, &[b], TURN, TURN), Choice::Parent);
    }

    #[test]
    fn an_empty_server_waits_for_one_with_data() {
        let own = member("a", Role::None, 0);
        let others = [member("b", Role::None, 600)];
        assert_eq!(choose(&own, &others, TURN * 9, TURN), Choice::Wait);
        assert_eq!(choose(&own, &[], Duration::ZERO, TURN), Choice::Parent);
    }
}
