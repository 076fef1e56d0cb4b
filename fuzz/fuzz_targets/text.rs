//! What people and clients write: replication commands, connection strings,
//! positions, identities; and certificates, which come as bytes.

#![no_main]

use libfuzzer_sys::fuzz_target;
use terrace_bridge::conninfo::ConnInfo;
use terrace_bridge::lsn::{Identity, Lsn};
use terrace_bridge::relay::grammar;
use terrace_bridge::tls::certificate_hash;

fuzz_target!(|input: &[u8]| {
    let _ = certificate_hash(input);
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    let _ = grammar::parse(text);
    // The fuzzer need not find out what every command begins with.
    for command in [
        "CREATE_REPLICATION_SLOT ",
        "START_REPLICATION SLOT s LOGICAL ",
    ] {
        let _ = grammar::parse(&format!("{command}{text}"));
    }
    if let Ok(info) = ConnInfo::parse(text) {
        assert!(!info.user().contains('\0') || text.contains(['\0', '%']));
        let _ = (info.socket_path(), info.to_string(), info.connect_timeout());
    }
    if let Ok(lsn) = text.parse::<Lsn>() {
        assert_eq!(lsn.to_string().parse::<Lsn>().expect("its own text"), lsn);
    }
    if let Ok(identity) = text.parse::<Identity>() {
        assert_eq!(
            identity.to_string().parse::<Identity>().expect("its text"),
            identity
        );
    }
});
