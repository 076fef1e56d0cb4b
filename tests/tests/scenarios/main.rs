//! Stories on real servers, in one program so that all of them share the machine's
//! cores, and the clusters that servers are copied from.

mod alters;
mod children;
mod copy;
mod ddl;
mod extension;
mod failover;
mod gathering;
mod identity;
mod layouts;
mod matching;
mod mistakes;
mod network;
mod owners;
mod partitions;
mod pieces;
mod refusals;
mod regressions;
mod rows;
mod rules;
mod setwise;
mod shapes;
mod stalls;
mod streams;
mod successors;
mod sums;
mod timeline;
mod tls;
mod tree;
mod types;
mod unique;
