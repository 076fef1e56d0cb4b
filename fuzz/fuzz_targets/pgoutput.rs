//! What a walsender sends: decodes whole or not at all.

#![no_main]

use libfuzzer_sys::fuzz_target;
use terrace_bridge::pgoutput::{Datum, DecodeError, Message, Tuple, decode};

/// Bytes that the values of a tuple must have taken from the message.
fn weigh(tuple: &Tuple<'_>) -> usize {
    assert_eq!(tuple.iter().count(), tuple.len());
    let values = tuple.iter().map(|datum| match datum {
        Datum::Null | Datum::Unchanged => 1,
        Datum::Text(text) => 5 + text.len(),
    });
    2 + values.sum::<usize>()
}

fuzz_target!(|body: &[u8]| {
    let Ok(message) = decode(body) else { return };
    let tuples = match &message {
        Message::Insert { new, .. } => weigh(new),
        Message::Update { old, new, .. } => {
            weigh(new) + old.as_ref().map_or(0, |(_, old)| weigh(old))
        }
        Message::Delete { old, .. } => weigh(&old.1),
        Message::Truncate { relids, .. } => 4 * relids.len(),
        Message::Logical { content, .. } => content.len(),
        _ => 0,
    };
    assert!(tuples < body.len());
    assert!(decode(&body[..body.len() - 1]).is_err(), "a cut message");
    let longer = [body, &[0]].concat();
    assert!(
        matches!(
            decode(&longer),
            Err(DecodeError::TrailingBytes(1) | DecodeError::Malformed(_))
        ),
        "a byte too many"
    );
});
