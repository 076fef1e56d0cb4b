//! How links ended, and what follows from that for the next ones.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::spawn_blocking;

use super::{AGAIN, REST, Roles};
use crate::domain::Refusal;
use crate::status::{Role, State};
use crate::timeline;
use crate::upstream::{LinkEnd, Target};

impl Roles {
    pub(super) fn may_try(&self, target: &Target) -> bool {
        let failed = self.failed.get(&target.name).map(|(_, until)| *until);
        Instant::now() >= failed.map_or(self.rest_until, |until| until.max(self.rest_until))
    }

    /// Who refuses does so until somebody mends it; who cannot be reached may be back the next moment.
    pub(super) fn note_failure(&mut self, target: &Target, opened: bool, end: &LinkEnd) {
        let limit = match end {
            LinkEnd::Shutdown | LinkEnd::Busy { .. } | LinkEnd::Queue(_) => return,
            _ if opened => {
                self.failed.remove(&target.name);
                return;
            }
            LinkEnd::Refused(_) | LinkEnd::Diverged { .. } | LinkEnd::SetBack(_) => {
                Duration::from_secs(5)
            }
            _ => Duration::from_secs(1),
        };
        let (times, until) = self
            .failed
            .entry(target.name.clone())
            .or_insert((0, Instant::now()));
        *times += 1;
        *until = Instant::now() + (AGAIN * 2_u32.pow((*times).min(8) / 2)).min(limit);
    }

    pub(super) fn note_end(&mut self, target: &Target, in_vain: bool, end: &LinkEnd) {
        let now = self.observer.now();
        let problem = format!("{}: {end}", target.name);
        let state = match end {
            LinkEnd::Shutdown => return,
            LinkEnd::Busy { holder, .. } => {
                // A place at a sibling is nobody's lead.
                if target.role == Role::Master {
                    self.decider.refused(now, Refusal::Busy(*holder));
                }
                tracing::debug!("{problem}");
                self.shared.set_link(State::Catchup, Some(problem));
                return;
            }
            LinkEnd::Gap { .. } if self.shared.config.parent.is_none() => {
                self.slot_lost = Some(problem);
                return;
            }
            LinkEnd::Gap { confirmed, .. } => {
                self.decider.refused(now, Refusal::Ahead(*confirmed));
                // Asked again, and nothing is new.
                match self.in_gap {
                    true => return,
                    false => State::Catchup,
                }
            }
            LinkEnd::NoSlot(_) => {
                self.slot_lost = Some(problem);
                self.decider.refused(now, Refusal::NoSlot);
                return;
            }
            LinkEnd::Diverged { .. } | LinkEnd::SetBack(_) => State::Diverged,
            LinkEnd::Queue(_) => {
                self.rest_until = Instant::now() + REST;
                State::Stalled
            }
            LinkEnd::Refused(_) => State::Stalled,
            LinkEnd::Lost(_) | LinkEnd::Gone(_) => State::Down,
        };
        if target.role == Role::Master {
            match in_vain {
                true => self.decider.led_in_vain(now),
                false => self.decider.failed(now),
            }
        }
        if self.shared.set_link(state, Some(problem.clone())) {
            tracing::warn!("link ended: {problem}");
        }
        if state == State::Diverged {
            self.shared.event_once("diverged", &problem);
            let hint = "; if that history is the one to keep, copy it with terrace-bridge resync";
            let problem = problem + hint;
            // After a restart nothing is served either, before the parent has been asked.
            if !std::mem::replace(&mut self.kept_divergence, true) {
                let (shared, text) = (Arc::clone(&self.shared), problem.clone());
                spawn_blocking(move || {
                    let dir = &shared.config.node.data_dir;
                    if let Err(error) = timeline::save_divergence(dir, &text) {
                        tracing::warn!("{error}");
                    }
                });
            }
            self.shared.set_diverged(problem);
            self.shared.stop_serving();
        }
    }
}
