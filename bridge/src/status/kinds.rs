//! What a node's state is made of.

use std::fmt;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::lsn::Lsn;

/// Whom this node follows: its parent domain or a member of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Holds the domain's slot or cursor at the parent.
    Master,
    /// Follows a member of its domain.
    Slave,
    /// Follows nobody at present.
    #[default]
    None,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Master => "master",
            Role::Slave => "slave",
            Role::None => "none",
        })
    }
}

/// What the node is doing, as `terrace.lag` shows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Initial copy is under way or about to be.
    Copying,
    /// Behind, and going on.
    Catchup,
    /// Up to date with its upstream.
    Streaming,
    /// Cannot go on without a change from outside; the reason says why.
    Stalled,
    /// Part of the history is to be had nowhere.
    Gap,
    /// The upstream tells another history.
    Diverged,
    /// Not in contact.
    #[default]
    Down,
}

impl State {
    /// Each of them.
    pub const ALL: [State; 7] = [
        State::Copying,
        State::Catchup,
        State::Streaming,
        State::Stalled,
        State::Gap,
        State::Diverged,
        State::Down,
    ];
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Copying => "copying",
            State::Catchup => "catchup",
            State::Streaming => "streaming",
            State::Stalled => "stalled",
            State::Gap => "gap",
            State::Diverged => "diverged",
            State::Down => "down",
        })
    }
}

/// Something that happened to a node's role or data.
#[derive(Clone, Debug, Serialize)]
pub struct Event {
    /// Unique in the tree.
    pub id: String,
    /// Microseconds since 1970-01-01 UTC.
    pub unix_micros: i64,
    /// `master`, `slave`, `copied`, `gap` …
    pub kind: String,
    /// Why, for a person.
    pub reason: String,
}

/// Positions that a downstream bridge told last.
#[derive(Clone, Copy, Debug)]
pub struct Downstream {
    /// Arrived there.
    pub write: Lsn,
    /// Durable there.
    pub flush: Lsn,
    /// Replayed there.
    pub apply: Lsn,
    /// When it told.
    pub heard: Instant,
}

/// What the applier has done.
#[derive(Clone, Debug, Default)]
pub struct Applied {
    /// Transactions since start.
    pub transactions: u64,
    /// Id of the last tag.
    pub last_tag: Option<String>,
    /// Its label.
    pub last_label: Option<String>,
    /// Top's clock at the last replayed position, microseconds since 2000-01-01.
    pub top_time: i64,
    /// Conflicts resolved since start.
    pub conflicts: u64,
}
