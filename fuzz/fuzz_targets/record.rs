//! What a bridge sends: a record that decodes is the one that was encoded.

#![no_main]

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use terrace_bridge::lsn::Lsn;
use terrace_bridge::record::{CommitInfo, Kind, Record, commit_record, put_frame};

const KINDS: [Kind; 5] = [
    Kind::Schema,
    Kind::Part,
    Kind::Commit,
    Kind::Watermark,
    Kind::Mark,
];

/// Reads all that there is to read.
fn walk(record: &Record) {
    let _ = (record.commit(), record.top_time());
    let (mut taken, mut failed) = (0, false);
    for frame in record.frames() {
        assert!(!failed, "it ends after an error");
        match frame {
            Ok(frame) => taken += frame.payload.len(),
            Err(_) => failed = true,
        }
    }
    assert!(taken <= record.body().len());
}

fuzz_target!(|input: &[u8]| {
    let mut raw = Bytes::copy_from_slice(input);
    while let Ok(record) = Record::take(&mut raw) {
        walk(&record);
    }
    let Some((&[kind, cut], body)) = input.split_first_chunk::<2>() else {
        return;
    };
    // Bodies of any content under a good checksum, as from a peer that is broken or lies.
    let kind = KINDS[usize::from(kind) % KINDS.len()];
    let record = Record::new(kind, Lsn(u64::from(cut)), body);
    walk(&Record::take(&mut record.bytes.clone()).expect("what was built"));
    let mut short = record
        .bytes
        .slice(..usize::from(cut).min(record.bytes.len() - 1));
    assert!(Record::take(&mut short).is_err(), "a cut record");

    // Frames of any content.
    let mut frames = BytesMut::new();
    let parts: Vec<&[u8]> = body
        .split(|byte| *byte == cut)
        .filter(|part| !part.is_empty())
        .collect();
    for part in &parts {
        put_frame(&mut frames, Lsn(7), part);
    }
    let info = CommitInfo {
        xid: 1,
        commit_lsn: Lsn(5),
        commit_time: -1,
        tag: Bytes::copy_from_slice(body),
    };
    let record = commit_record(&info, Lsn(9), &frames);
    let record = Record::take(&mut record.bytes.clone()).expect("what was built");
    if body.len() <= usize::from(u16::MAX) {
        assert_eq!(record.commit().expect("a commit"), info);
    }
    let read: Vec<&[u8]> = record
        .frames()
        .map(|frame| frame.expect("a frame").payload)
        .collect();
    assert_eq!(read, parts);
});
