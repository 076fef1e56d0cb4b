//! What a disk gives back: a damaged file opens as the beginning of what it held,
//! or not at all; a file of any content harms nobody.

#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use bytes::{BufMut, BytesMut};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;
use terrace_bridge::lsn::{Identity, Lsn};
use terrace_bridge::queue::{Queue, QueueError, Writer, inspect};
use terrace_bridge::record::{CommitInfo, Kind, Record, commit_record, put_frame};

const START: Lsn = Lsn(100);
const KINDS: [Kind; 5] = [
    Kind::Schema,
    Kind::Part,
    Kind::Commit,
    Kind::Watermark,
    Kind::Mark,
];

struct Sample {
    directory: TempDir,
    /// The one file, whole.
    file: PathBuf,
    content: Vec<u8>,
    /// What a reader gets from it.
    records: Vec<Vec<u8>>,
    /// All before this offset had been fsynced, and a mark says so.
    durable: usize,
}

fn schema(relid: u32, version: u8) -> Record {
    let mut body = BytesMut::new();
    body.put_u8(b'R');
    body.put_u32(relid);
    body.put_u8(version);
    Record::new(Kind::Schema, Lsn::ZERO, &body)
}

fn transaction(end: u64) -> Record {
    let mut frames = BytesMut::new();
    put_frame(&mut frames, Lsn(end - 1), b"Insert");
    let info = CommitInfo {
        xid: 7,
        commit_lsn: Lsn(end - 1),
        commit_time: 0,
        tag: Default::default(),
    };
    commit_record(&info, Lsn(end), &frames)
}

fn append(writer: &mut Writer, records: &[Record]) {
    for record in records {
        writer.append(record).expect("append");
    }
    writer.publish().expect("publish");
}

/// Fsyncs, so that the next publish marks it.
fn make_durable(queue: &Queue) {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.expect("a runtime").block_on(async {
        let mut durable = queue.durable();
        tokio::select! {
            error = queue.keep_durable() => panic!("{error}"),
            durable = durable.wait_for(|lsn| *lsn >= Lsn(120)) => { durable.expect("a queue"); }
        }
    });
}

fn sample() -> &'static Sample {
    static SAMPLE: OnceLock<Sample> = OnceLock::new();
    SAMPLE.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a directory");
        let identity: Identity = "1/1/terrace/1/app".parse().expect("an identity");
        let (queue, mut writer) =
            Queue::create(directory.path(), identity, START).expect("a queue");
        let part = Record::new(Kind::Part, Lsn::ZERO, b"\0\0\0\x01\0\0\0\0\0\0\0\x05B");
        append(&mut writer, &[schema(1, 0), transaction(110)]);
        append(&mut writer, &[part, schema(2, 0), transaction(120)]);
        let file = directory.path().join("0000000000000064.seg");
        let durable = fs::metadata(&file).expect("a file").len() as usize;
        make_durable(&queue);
        append(&mut writer, &[Record::watermark(Lsn(130), 0)]);
        append(&mut writer, &[schema(1, 1), transaction(140)]);
        let records = read(&queue, START).expect("read");
        assert_eq!(records.len(), 8);
        let content = fs::read(&file).expect("read");
        Sample {
            directory,
            file,
            content,
            records,
            durable,
        }
    })
}

fn read(queue: &Queue, from: Lsn) -> Result<Vec<Vec<u8>>, QueueError> {
    let (mut reader, mut records) = (queue.reader(from)?, Vec::new());
    while let Some(record) = reader.try_next()? {
        let _ = (record.commit(), record.top_time(), record.frames().count());
        records.push(record.bytes.to_vec());
    }
    Ok(records)
}

/// Opens, reads, appends; what a reader got, and the first error.
fn exercise(sample: &Sample, content: &[u8]) -> Result<Vec<Vec<u8>>, QueueError> {
    fs::write(&sample.file, content).expect("write");
    let inspected = inspect(&sample.file);
    let Some((queue, mut writer)) = Queue::open(sample.directory.path())? else {
        panic!("the file is there");
    };
    if let Ok(count) = inspected {
        assert!(count <= content.len() / 24);
    }
    let records = read(&queue, queue.first())?;
    let _ = read(&queue, Lsn(115));
    if writer.end() < Lsn(1 << 60) {
        let next = transaction(1 << 60);
        append(&mut writer, std::slice::from_ref(&next));
        let grown = read(&queue, queue.first())?;
        assert_eq!(grown.last(), Some(&next.bytes.to_vec()));
    }
    Ok(records)
}

fuzz_target!(|input: &[u8]| {
    let sample = sample();
    let Some((&how, input)) = input.split_first() else {
        return;
    };
    match how % 4 {
        0 => drop(exercise(sample, input)),
        // Flips and a cut: what opens is the beginning of what was there.
        1 => {
            let mut content = sample.content.clone();
            let (flips, cut) = input.as_chunks::<3>();
            let mut hits = Vec::new();
            for [high, low, mask] in flips {
                let at = usize::from(u16::from_be_bytes([*high, *low])) % content.len();
                content[at] ^= mask;
            }
            for (at, (is, was)) in content.iter().zip(&sample.content).enumerate() {
                if is != was {
                    hits.push(at);
                }
            }
            if let [back, ..] = cut {
                content.truncate(content.len().saturating_sub(usize::from(*back)));
            }
            if let Ok(found) = exercise(sample, &content) {
                assert!(sample.records.starts_with(&found), "not what was there");
                let covered = content.len() == sample.content.len() && hits.len() == 1;
                assert!(
                    !covered || hits[0] >= sample.durable,
                    "damage at {} went unseen",
                    hits[0]
                );
            }
        }
        // Whole records of any kind and content behind the good ones, or behind a damaged one.
        _ => {
            let mut content = sample.content.clone();
            for record in input.split(|byte| *byte == 0xff) {
                let Some((&[kind, lsn], body)) = record.split_first_chunk::<2>() else {
                    continue;
                };
                let kind = KINDS[usize::from(kind) % KINDS.len()];
                let record = Record::new(kind, Lsn(u64::from(lsn) * 2), body);
                content.extend_from_slice(&record.bytes);
            }
            if how % 4 == 3 {
                let damaged = sample.content.len() - 1 - usize::from(how);
                content[damaged] ^= 1;
            }
            drop(exercise(sample, &content));
        }
    }
});
