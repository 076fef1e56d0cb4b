//! What has happened, until a report has taken it.

use super::{Event, Shared};
use crate::clock::unix_micros;

/// Events kept until a report has taken them.
const MAX_EVENTS: usize = 1000;
/// Bytes of the reason of an event.
const MAX_REASON: usize = 4_000;

impl Shared {
    /// Queues an event for the next report and logs it; a reason that nobody would read is cut.
    pub fn event(&self, kind: &str, reason: &str) {
        let reason = &reason[..reason.floor_char_boundary(MAX_REASON)];
        let unix_micros = unix_micros();
        let node = &self.config.node;
        let (flush, replay) = (*self.flushed.borrow(), *self.replayed.borrow());
        tracing::info!(node = %node.name, domain = %node.domain, kind, reason, %flush, %replay,
            "event");
        self.change(|inner| {
            *inner.happened.entry(kind.into()).or_default() += 1;
            let id = format!("{}-{unix_micros}-{kind}", self.instance);
            let event = Event {
                id,
                unix_micros,
                kind: kind.into(),
                reason: reason.into(),
            };
            inner.events.push_back(event);
            if inner.events.len() > MAX_EVENTS {
                inner.events.pop_front();
            }
        });
    }

    /// Like [`Shared::event`], unless the last one says the same.
    pub fn event_once(&self, kind: &str, reason: &str) {
        let known = std::mem::replace(&mut self.inner().last_once, (kind.into(), reason.into()));
        if known != (kind.to_owned(), reason.to_owned()) {
            self.event(kind, reason);
        }
    }

    /// How often an event of this kind has happened since the start.
    pub fn happened(&self, kind: &str) -> u64 {
        self.inner().happened.get(kind).copied().unwrap_or_default()
    }

    /// The waiting events; [`Shared::events_reported`] removes them.
    pub fn events(&self) -> Vec<Event> {
        self.inner().events.iter().cloned().collect()
    }

    /// Removes the oldest `count` events.
    pub fn events_reported(&self, count: usize) {
        let mut inner = self.inner();
        let count = count.min(inner.events.len());
        inner.events.drain(..count);
    }
}
