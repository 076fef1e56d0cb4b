//! Rows that are at the top already, sent down the tree as what they are.
//!
//! Guarantee: the rows of one transaction's snapshot stand in the stream where that
//! transaction commits; `terrace.fill` holds off writers till then, so what flows before
//! and after fits to them without a gap. Several transactions may each send a piece of a table
//! while their session holds off its writers ([`crate::hold`]); the pieces are of one state.

use pgrx::prelude::*;

use crate::write_sealed;

/// Prefix of the messages that carry rows.
const PREFIX: &str = "terrace.rows";
/// So many rows are read at a time …
const ROWS: i64 = 500;
/// … and a message is written when it has as many bytes.
const BYTES: usize = 128 << 10;

/// Sends what `query` gives, one row as a JSON array a line; `header` says whose they are
/// (members of a JSON object), `clear` which rows make way for them, `null` for none. Gives their number.
#[pg_extern]
fn send_rows(header: &str, clear: &str, query: &str) -> Result<i64, spi::Error> {
    Spi::connect(|client| {
        let mut cursor = client.try_open_cursor(query, &[])?;
        let (mut rows, mut count) = (String::new(), 0);
        let mut clear = Some(clear).filter(|clear| *clear != "null");
        loop {
            let fetched = cursor.fetch(ROWS)?;
            let last = fetched.is_empty();
            for row in fetched {
                if !rows.is_empty() {
                    rows.push(',');
                }
                rows.push_str(row.get::<&str>(1)?.unwrap_or("[]"));
                count += 1;
                if rows.len() >= BYTES {
                    send(header, clear.take(), &rows);
                    rows.clear();
                }
            }
            if last {
                break;
            }
        }
        if !rows.is_empty() || clear.is_some() {
            send(header, clear, &rows);
        }
        Ok(count)
    })
}

fn send(header: &str, clear: Option<&str>, rows: &str) {
    let clear = clear.unwrap_or("null");
    write_sealed(
        PREFIX,
        &format!("{{{header},\"clear\":{clear},\"rows\":[{rows}]}}"),
    );
}
