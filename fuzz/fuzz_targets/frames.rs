//! What comes from a socket, in pieces of any size: the same messages as in one
//! piece, and never more memory than the limit.

#![no_main]

use std::cell::RefCell;
use std::io::ErrorKind;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use terrace_bridge::client::{DbError, affected};
use terrace_bridge::wire::{Framed, take_cstr};
use tokio::io::AsyncWriteExt;
use tokio::runtime::{Builder, Runtime};

const LIMIT: usize = 300;

thread_local! {
    static RUNTIME: RefCell<Runtime> =
        RefCell::new(Builder::new_current_thread().build().expect("a runtime"));
}

/// Everything that `input` holds when it arrives `piece` bytes at a time.
async fn read(input: &[u8], startup: bool, piece: usize) -> (Vec<Vec<u8>>, ErrorKind) {
    let (ours, mut theirs) = tokio::io::duplex(piece);
    let write = async {
        // The reader hangs up at what it does not like.
        let _ = theirs.write_all(input).await;
        drop(theirs);
    };
    let read = async {
        let (mut framed, mut found) = (Framed::new(Box::new(ours)), Vec::new());
        loop {
            let next = if startup && found.is_empty() {
                framed.read_startup().await.map(|body| (0, body))
            } else {
                framed.read_message(LIMIT).await.map(|m| (m.kind, m.body))
            };
            match next {
                Ok((kind, body)) => {
                    assert!(startup && found.is_empty() || body.len() <= LIMIT - 4);
                    found.push([&[kind], &body[..]].concat());
                    understand(kind, body);
                }
                Err(error) => return (found, error.kind()),
            }
        }
    };
    tokio::join!(write, read).1
}

/// What the client makes of a message.
fn understand(kind: u8, mut body: Bytes) {
    match kind {
        b'E' => drop(DbError::parse(&body).to_string()),
        b'C' => drop(affected(&body)),
        _ => while take_cstr(&mut body).is_some() {},
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((&how, input)) = input.split_first() else {
        return;
    };
    let (startup, piece) = (how & 1 == 1, usize::from(how >> 1) + 1);
    RUNTIME.with_borrow(|runtime| {
        let whole = runtime.block_on(read(input, startup, 1 << 16));
        let pieces = runtime.block_on(read(input, startup, piece));
        assert_eq!(whole, pieces);
        // Nothing is lost and nothing is invented.
        let header = |index| if startup && index == 0 { 3 } else { 4 };
        let bytes = whole.0.iter().enumerate();
        let taken: usize = bytes.map(|(index, body)| body.len() + header(index)).sum();
        assert!(taken <= input.len());
        if whole.1 == ErrorKind::UnexpectedEof {
            assert!(input.len() - taken < LIMIT.max(10_000) + 5);
        }
    });
});
