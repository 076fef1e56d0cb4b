//! Terrace bridge: receives the change stream of one top-level database, keeps
//! it in a durable queue, applies it to the Postgres beside it and relays it.
//!
//! Data walks one way: [`upstream`] receives and [`assemble`]s records,
//! [`queue`] makes them durable, [`apply`] replays them, [`relay`] serves them
//! to slaves, child domains and stock clients. [`domain`] decides whom to follow
//! from what [`observe`] sees, and [`roles`] carries it out.

pub mod apply;
pub mod assemble;
pub mod check;
pub mod client;
pub mod clock;
pub mod compare;
pub mod config;
pub mod conninfo;
pub mod control;
pub mod copy;
pub mod domain;
pub mod durable;
pub mod handshake;
pub mod http;
pub mod log;
pub mod lsn;
pub mod matching;
pub mod node;
pub mod observe;
pub mod open;
pub mod pgoutput;
pub mod plain;
pub mod queue;
pub mod rate;
pub mod record;
pub mod relay;
pub mod report;
pub mod roles;
pub mod schema;
pub mod show;
pub mod status;
pub mod timeline;
pub mod tls;
pub mod top;
pub mod upstream;
pub mod wire;
