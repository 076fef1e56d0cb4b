//! What the servers below and beside hold, and what may be acknowledged by that.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::{Downstream, Shared};
use crate::lsn::Lsn;

impl Shared {
    /// Notes what a downstream bridge holds.
    pub fn set_downstream(&self, name: &str, write: Lsn, flush: Lsn, apply: Lsn) {
        let downstream = Downstream {
            write,
            flush,
            apply,
            heard: Instant::now(),
        };
        self.inner().downstreams.insert(name.to_owned(), downstream);
        self.moved.notify_one();
    }

    /// Forgets a downstream whose connection has ended.
    pub fn drop_downstream(&self, name: &str) {
        self.change(|inner| inner.downstreams.remove(name));
    }

    /// Every connected downstream bridge.
    pub fn downstreams(&self) -> BTreeMap<String, Downstream> {
        self.inner().downstreams.clone()
    }

    /// Position that the upstream may forget, and whether it is held by as many
    /// servers of the domain as `ack_members` asks for. With fewer in contact
    /// for longer than `ack_timeout`, what those hold (rule C of the design).
    pub fn acknowledgeable(&self, own: Lsn, fewer_for: Duration) -> (Lsn, bool) {
        let failover = &self.config.failover;
        let members = self.config.peers.len() + 1;
        let wanted = (failover.ack_members as usize).clamp(1, members);
        let domain = &self.config.node.domain;
        let mut inner = self.inner();
        let mut held = vec![own];
        for peer in self.config.peers.keys() {
            let downstream = inner.downstreams.get(&cursor_name(domain, peer));
            let told = downstream.map(|d| (d.flush, d.heard));
            let observed = inner.member_flush.get(peer).copied();
            let fresh = [told, observed].into_iter().flatten();
            let fresh = fresh.filter(|(_, heard)| heard.elapsed() < failover.ack_timeout);
            held.extend(fresh.map(|(flush, _)| flush).max());
        }
        held.sort_unstable_by(|a, b| b.cmp(a));
        let timed_out = fewer_for > failover.ack_timeout;
        inner.degraded = (held.len() < wanted && timed_out).then(|| {
            format!(
                "degraded: only {} of {wanted} servers hold changes",
                held.len()
            )
        });
        match held.get(wanted - 1) {
            Some(lsn) => ((*lsn).min(own), true),
            None if timed_out => (*held.last().unwrap_or(&own), false),
            None => (Lsn::ZERO, false),
        }
    }
}

/// Name of the cursor that `node` of `domain` keeps at a sibling. The point keeps
/// it apart from every domain's cursor.
pub fn cursor_name(domain: &str, node: &str) -> String {
    format!("terrace_{domain}.{node}")
}
