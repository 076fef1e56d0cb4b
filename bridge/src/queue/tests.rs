use std::os::unix::fs::FileExt;

use bytes::{BufMut, BytesMut};
use tempfile::TempDir;

use super::*;
use crate::record::{CommitInfo, Kind, Record, commit_record, put_frame};

fn identity() -> Identity {
    Identity {
        system_id: 1,
        timeline: 1,
        database: "app".into(),
        publication: "terrace".into(),
        format: 1,
    }
}

fn transaction(end: u64, size: usize) -> Record {
    let mut frames = BytesMut::new();
    put_frame(&mut frames, Lsn(end - 1), &vec![b'I'; size]);
    let info = CommitInfo {
        xid: end as u32,
        commit_lsn: Lsn(end - 1),
        commit_time: 0,
        tag: Default::default(),
    };
    commit_record(&info, Lsn(end), &frames)
}

fn schema(relid: u32, version: u8) -> Record {
    let mut body = BytesMut::new();
    body.put_u8(b'R');
    body.put_u32(relid);
    body.put_u8(version);
    Record::new(Kind::Schema, Lsn::ZERO, &body)
}

fn create(dir: &TempDir) -> (Queue, Writer) {
    Queue::create(dir.path(), identity(), Lsn(100)).unwrap()
}

/// What a reader gets, record by record and in runs, which must be the same.
fn all(queue: &Queue, from: u64) -> Vec<(Kind, u64)> {
    let mut reader = queue.reader(Lsn(from)).unwrap();
    let one_by_one: Vec<Record> = std::iter::from_fn(|| reader.try_next().unwrap()).collect();
    let mut reader = queue.reader(Lsn(from)).unwrap();
    let mut in_runs = Vec::new();
    while let Some((mut bytes, lsn)) = reader.try_next_bytes().unwrap() {
        while !bytes.is_empty() {
            let record = Record::take(&mut bytes).unwrap();
            assert!(record.lsn <= lsn, "{} in a run to {lsn}", record.lsn);
            in_runs.push(record);
        }
    }
    in_runs.retain(|record| record.kind != Kind::Mark);
    let bytes =
        |records: &[Record]| -> Vec<_> { records.iter().map(|r| r.bytes.clone()).collect() };
    assert_eq!(bytes(&one_by_one), bytes(&in_runs));
    one_by_one.iter().map(|r| (r.kind, r.lsn.0)).collect()
}

// Five hundred followers read each block five hundred times, and checked it as often.
#[test]
fn readers_near_each_other_read_and_check_once() {
    let dir = TempDir::new().unwrap();
    let (queue, mut writer) = create(&dir);
    for end in 1..=20 {
        writer.append(&transaction(100 + end * 10, 1000)).unwrap();
    }
    writer.publish().unwrap();
    let mut first = queue.reader(Lsn(100)).unwrap();
    assert_eq!(first.try_next().unwrap().unwrap().lsn, Lsn(110));
    let mut second = queue.reader(Lsn(150)).unwrap();
    // Who read it anew would find this.
    let file = fs::OpenOptions::new().write(true).open(last_segment(&dir));
    let file = file.unwrap();
    file.write_all_at(b"?", file.metadata().unwrap().len() - 3)
        .unwrap();
    let rest = |reader: &mut Reader| {
        let mut last = Ok(Lsn(0));
        while let Some(next) = reader.try_next().transpose() {
            last = next.map(|record| record.lsn);
            if last.is_err() {
                break;
            }
        }
        last
    };
    assert_eq!(rest(&mut first).unwrap(), Lsn(300));
    assert_eq!(rest(&mut second).unwrap(), Lsn(300));
    drop((first, second));
    let mut third = queue.reader(Lsn(100)).unwrap();
    let damage = rest(&mut third).unwrap_err();
    assert!(matches!(damage, QueueError::Damaged { .. }), "{damage}");
}

fn last_segment(dir: &TempDir) -> PathBuf {
    segment::list(dir.path()).unwrap().pop().unwrap()
}

#[test]
fn a_reader_gets_what_is_above_its_start_with_definitions_first() {
    let dir = TempDir::new().unwrap();
    let (queue, mut writer) = create(&dir);
    writer.append(&schema(1, 0)).unwrap();
    writer.append(&transaction(110, 10)).unwrap();
    writer.append(&schema(1, 0)).unwrap();
    writer.append(&transaction(120, 10)).unwrap();
    assert_eq!(all(&queue, 100), [], "nothing is seen before publish");
    writer.publish().unwrap();
    writer.append(&Record::watermark(Lsn(130), 0)).unwrap();
    writer.append(&transaction(120, 10)).unwrap();
    writer.publish().unwrap();
    let (s, c, w) = (Kind::Schema, Kind::Commit, Kind::Watermark);
    assert_eq!(all(&queue, 100), [(s, 0), (c, 110), (c, 120), (w, 130)]);
    assert_eq!(all(&queue, 110), [(s, 0), (c, 120), (w, 130)]);
    assert_eq!(all(&queue, 130), [(s, 0)]);
    assert_eq!(all(&queue, 500), [(s, 0)]);
    assert!(matches!(
        queue.reader(Lsn(99)),
        Err(QueueError::Gone { .. })
    ));
}

/// A downstream that is ahead of the server that it went to got the parts of
/// transactions that it had, as if they belonged to the next one.
#[test]
fn a_reader_that_is_ahead_gets_no_part_of_what_it_has() {
    let dir = TempDir::new().unwrap();
    let (queue, mut writer) = create(&dir);
    let part = Record::new(Kind::Part, Lsn::ZERO, &[0; 40]);
    let mut reader = queue.reader(Lsn(120)).unwrap();
    assert!(reader.try_next().unwrap().is_none());
    for end in [110, 120, 130] {
        writer.append(&part).unwrap();
        writer.append(&schema(end, 0)).unwrap();
        writer.append(&transaction(end.into(), 10)).unwrap();
        writer.publish().unwrap();
    }
    let read: Vec<_> = std::iter::from_fn(|| reader.try_next().unwrap())
        .map(|record| (record.kind, record.lsn.0))
        .collect();
    let (s, p, c) = (Kind::Schema, Kind::Part, Kind::Commit);
    assert_eq!(read, [(s, 0), (s, 0), (p, 0), (s, 0), (c, 130)]);
}

#[test]
fn another_timeline_is_gone_on_with() {
    let dir = TempDir::new().unwrap();
    let (queue, mut writer) = create(&dir);
    let mut reader = queue.reader(Lsn(100)).unwrap();
    let timeline = |timeline| Identity {
        timeline,
        ..identity()
    };
    // In an empty segment that is being read, and in one that is not empty.
    for (number, end) in [(2, 110), (3, 120)] {
        assert!(reader.try_next().unwrap().is_none());
        writer.adopt(&timeline(number)).unwrap();
        writer.append(&transaction(end, 10)).unwrap();
        writer.publish().unwrap();
        assert_eq!(reader.try_next().unwrap().unwrap().lsn, Lsn(end));
        assert_eq!(queue.identity(), timeline(number));
    }
    // Who follows reads what both have in common, and must ask for the rest.
    let mut follower = queue
        .reader(Lsn(100))
        .unwrap()
        .up_to_timeline(queue.identity().timeline)
        .unwrap();
    writer.adopt(&timeline(4)).unwrap();
    writer.append(&transaction(130, 10)).unwrap();
    writer.publish().unwrap();
    assert_eq!(follower.try_next().unwrap().unwrap().lsn, Lsn(110));
    assert_eq!(follower.try_next().unwrap().unwrap().lsn, Lsn(120));
    assert!(matches!(follower.try_next(), Err(QueueError::Timeline(4))));
    let mut follower = queue
        .reader(Lsn(100))
        .unwrap()
        .up_to_timeline(queue.identity().timeline)
        .unwrap();
    let rest: Vec<Lsn> = std::iter::from_fn(|| follower.try_next().unwrap())
        .map(|record| record.lsn)
        .collect();
    assert_eq!(rest, [Lsn(110), Lsn(120), Lsn(130)]);
    // Also who has it all to where the next one begins, and heard of the one before.
    writer.adopt(&timeline(5)).unwrap();
    let late = queue.reader(Lsn(130)).unwrap().up_to_timeline(4);
    assert!(matches!(late, Err(QueueError::Timeline(5))));
    writer.append(&transaction(140, 10)).unwrap();
    writer.publish().unwrap();
    let late = queue.reader(Lsn(130)).unwrap().up_to_timeline(4);
    assert!(matches!(late, Err(QueueError::Timeline(5))));
    drop((reader, queue, writer));
    let (queue, _writer) = Queue::open(dir.path()).unwrap().unwrap();
    assert_eq!(queue.identity(), timeline(5));
    let commits = [120, 130, 140].map(|end| (Kind::Commit, end));
    assert_eq!(all(&queue, 115), commits);
}

#[test]
fn an_unfinished_transaction_is_never_seen_and_can_be_cut() {
    let dir = TempDir::new().unwrap();
    let (queue, mut writer) = create(&dir);
    writer.append(&transaction(110, 10)).unwrap();
    writer
        .append(&Record::new(Kind::Part, Lsn::ZERO, &vec![0; 2 << 20]))
        .unwrap();
    writer.append(&schema(7, 0)).unwrap();
    writer.publish().unwrap();
    assert_eq!(all(&queue, 100), [(Kind::Commit, 110)]);
    writer.cut_data().unwrap();
    writer.append(&transaction(120, 10)).unwrap();
    writer.publish().unwrap();
    let expected = [(Kind::Commit, 110), (Kind::Schema, 0), (Kind::Commit, 120)];
    assert_eq!(all(&queue, 100), expected);
    writer.append(&schema(8, 0)).unwrap();
    writer.cut().unwrap();
    writer.append(&transaction(130, 10)).unwrap();
    writer.publish().unwrap();
    assert_eq!(all(&queue, 120), [(Kind::Schema, 0), (Kind::Commit, 130)]);
}

#[test]
fn a_torn_tail_is_cut_and_the_rest_is_kept() {
    let dir = TempDir::new().unwrap();
    let (queue, mut writer) = create(&dir);
    writer.append(&schema(1, 0)).unwrap();
    writer.append(&transaction(110, 10)).unwrap();
    writer.publish().unwrap();
    let whole = fs::metadata(last_segment(&dir)).unwrap().len();
    writer.append(&transaction(120, 100)).unwrap();
    writer.publish().unwrap();
    let torn = fs::metadata(last_segment(&dir)).unwrap().len();
    drop((queue, writer));
    for len in [torn - 1, whole + 30, whole + 1] {
        let file = fs::OpenOptions::new()
            .write(true)
            .open(last_segment(&dir))
            .unwrap();
        file.set_len(len).unwrap();
        let (queue, writer) = Queue::open(dir.path()).unwrap().unwrap();
        assert_eq!(writer.end(), Lsn(110), "cut at {len}");
        assert_eq!(all(&queue, 100), [(Kind::Schema, 0), (Kind::Commit, 110)]);
        // Nothing of it may be found again behind what is written next.
        let left = fs::metadata(last_segment(&dir)).unwrap().len();
        assert_eq!(left, whole, "cut at {len}");
        drop((queue, writer));
        let file = fs::OpenOptions::new()
            .write(true)
            .open(last_segment(&dir))
            .unwrap();
        file.set_len(torn).unwrap();
    }
    let (_, mut writer) = Queue::open(dir.path()).unwrap().unwrap();
    writer.append(&transaction(120, 10)).unwrap();
    writer.publish().unwrap();
}

// Definitions of the first transaction of a segment were taken for those that the segment
// begins with, and the cut went through the middle of a record.
#[test]
fn a_first_transaction_that_a_crash_tore_is_cut_whole() {
    let dir = TempDir::new().unwrap();
    let (queue, mut writer) = create(&dir);
    let start = fs::metadata(last_segment(&dir)).unwrap().len();
    for version in 0..2 {
        let part = Record::new(Kind::Part, Lsn::ZERO, &vec![0; 3 << 20]);
        writer.append(&part).unwrap();
        writer.append(&schema(7, version)).unwrap();
    }
    drop((queue, writer));
    let torn = fs::metadata(last_segment(&dir)).unwrap().len();
    assert!(torn > start + (3 << 20), "{torn}");
    let (_, mut writer) = Queue::open(dir.path()).unwrap().unwrap();
    assert_eq!(fs::metadata(last_segment(&dir)).unwrap().len(), start);
    writer.append(&schema(8, 0)).unwrap();
    writer.append(&transaction(110, 10)).unwrap();
    writer.publish().unwrap();
    drop(writer);
    let (queue, _writer) = Queue::open(dir.path()).unwrap().unwrap();
    assert_eq!(all(&queue, 100), [(Kind::Schema, 0), (Kind::Commit, 110)]);
}

#[test]
fn a_flipped_bit_in_what_was_durable_is_refused() {
    let dir = TempDir::new().unwrap();
    let (queue, mut writer) = create(&dir);
    writer.append(&transaction(110, 10)).unwrap();
    writer.publish().unwrap();
    let inside = fs::metadata(last_segment(&dir)).unwrap().len() - 3;
    queue.active().sync().unwrap();
    writer.append(&transaction(120, 10)).unwrap();
    writer.publish().unwrap();
    drop((queue, writer));
    let mut bytes = fs::read(last_segment(&dir)).unwrap();
    bytes[inside as usize] ^= 4;
    fs::write(last_segment(&dir), bytes).unwrap();
    let error = Queue::open(dir.path()).err().unwrap();
    assert!(
        error.to_string().contains("is damaged at offset"),
        "{error}"
    );
}

// A mark with a good checksum but without an offset, behind a damaged record,
// used to end the bridge with a panic at its start.
#[test]
fn a_mark_of_another_length_covers_nothing() {
    let dir = TempDir::new().unwrap();
    let (queue, mut writer) = create(&dir);
    writer.append(&transaction(110, 10)).unwrap();
    writer.publish().unwrap();
    drop((queue, writer));
    let mut bytes = fs::read(last_segment(&dir)).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    bytes.extend_from_slice(&Record::new(Kind::Mark, Lsn::ZERO, &[]).bytes);
    bytes.extend_from_slice(&[0; 8]);
    fs::write(last_segment(&dir), bytes).unwrap();
    let (queue, writer) = Queue::open(dir.path()).unwrap().unwrap();
    assert_eq!(writer.end(), Lsn(100));
    assert_eq!(all(&queue, 100), []);
}

#[test]
fn segments_roll_carry_the_schema_and_are_trimmed() {
    let dir = TempDir::new().unwrap();
    let (queue, mut writer) = create(&dir);
    writer.append(&schema(1, 0)).unwrap();
    for end in 1..=40 {
        writer
            .append(&transaction(100 + end * 10, 1 << 20))
            .unwrap();
        writer.publish().unwrap();
    }
    assert!(segment::list(dir.path()).unwrap().len() >= 3);
    assert_eq!(
        all(&queue, 100)
            .iter()
            .filter(|r| r.0 == Kind::Commit)
            .count(),
        40
    );
    let tail = all(&queue, 480);
    assert_eq!(
        tail,
        [(Kind::Schema, 0), (Kind::Commit, 490), (Kind::Commit, 500)]
    );

    queue.set_cursor("slow", Lsn(100));
    assert!(queue.trim(Lsn(500), 0, u64::MAX).unwrap().is_empty());
    assert_eq!(queue.first(), Lsn(100), "a cursor holds the queue");
    assert_eq!(queue.trim(Lsn(500), 0, 1).unwrap(), ["slow"]);
    assert!(queue.first() > Lsn(100), "beyond the ceiling it does not");
    queue.save_cursors().unwrap();
    drop((queue, writer));
    let (queue, _writer) = Queue::open(dir.path()).unwrap().unwrap();
    assert_eq!(queue.cursors(), [("slow".to_owned(), Lsn(100), true)]);
    assert_eq!(all(&queue, 480), tail);
}

// A temporary cursor used to come back after a crash, and held the queue for ever.
#[test]
fn a_cursor_of_a_session_does_not_outlive_the_process() {
    let dir = TempDir::new().unwrap();
    let (queue, writer) = create(&dir);
    assert!(queue.create_cursor("lasting", Lsn(100), false));
    assert!(queue.create_cursor("session", Lsn(100), true));
    assert!(!queue.create_cursor("session", Lsn(100), false));
    queue.set_cursor("session", Lsn(101));
    queue.save_cursors().unwrap();
    assert_eq!(queue.cursors().len(), 2);
    drop((queue, writer));
    let (queue, _writer) = Queue::open(dir.path()).unwrap().unwrap();
    assert_eq!(queue.cursors(), [("lasting".to_owned(), Lsn(100), false)]);
}

// Two at a time used to write into one file.
#[test]
fn cursors_are_saved_by_several_threads() {
    let dir = TempDir::new().unwrap();
    let (queue, writer) = create(&dir);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let queue = &queue;
            scope.spawn(move || {
                for number in 0..50 {
                    let name = format!("{thread} {number}");
                    queue.create_cursor(&name, Lsn(100), false);
                    queue.save_cursors().unwrap();
                    let saved = read_cursors(&queue.inner.dir.join(CURSORS_FILE)).unwrap();
                    assert!(saved.contains_key(&name));
                }
            });
        }
    });
    drop((queue, writer));
    let (queue, _writer) = Queue::open(dir.path()).unwrap().unwrap();
    assert_eq!(queue.cursors().len(), 200);
}

#[tokio::test]
async fn a_waiting_reader_wakes_and_the_fsync_is_told() {
    let dir = TempDir::new().unwrap();
    let (queue, mut writer) = create(&dir);
    let mut reader = queue.reader(Lsn(100)).unwrap();
    let syncing = tokio::spawn({
        let queue = queue.clone();
        async move { queue.keep_durable().await }
    });
    let read = tokio::spawn(async move { reader.next().await.unwrap().lsn });
    tokio::task::yield_now().await;
    writer.append(&transaction(110, 10)).unwrap();
    writer.publish().unwrap();
    assert_eq!(read.await.unwrap(), Lsn(110));
    queue
        .durable()
        .wait_for(|lsn| *lsn == Lsn(110))
        .await
        .unwrap();
    syncing.abort();
}

// A failed fsync at a segment's end used to be tried again, and the second one succeeds
// without having written anything.
#[tokio::test]
async fn a_failed_fsync_ends_the_queue_wherever_it_happens() {
    let dir = TempDir::new().unwrap();
    let segment = Arc::new(Segment::unsyncable(dir.path(), &identity(), Lsn(100)));
    let queue = Queue::assemble(dir.path(), identity(), vec![Arc::clone(&segment)], Lsn(100));
    let queue = queue.unwrap();
    let mut writer = Writer::new(queue.clone(), Lsn(100), BTreeMap::new());
    let large = transaction(110, SEGMENT_BYTES as usize);
    let error = writer.append(&large).unwrap_err().to_string();
    assert!(error.contains("fsync"), "{error}");
    assert_eq!(queue.active().start, Lsn(100), "nothing is built on it");
    let again = segment.sync().unwrap_err().to_string();
    assert!(again.contains("an earlier fsync failed"), "{again}");
    // Also when nothing new has been written.
    queue.inner.durable.send_replace(queue.end());
    let ended = tokio::time::timeout(Duration::from_secs(5), queue.keep_durable());
    assert!(ended.await.unwrap().to_string().contains("fsync"));
}

// All of it used to be written at its end, in one call, and the upstream gave us up meanwhile.
#[test]
fn a_large_transaction_goes_to_disk_while_it_comes() {
    let dir = TempDir::new().unwrap();
    let (queue, mut writer) = create(&dir);
    let part = Record::new(Kind::Part, Lsn::ZERO, &vec![0; 1 << 20]);
    let mut most = 0;
    for _ in 0..100 {
        writer.append(&part).unwrap();
        most = most.max(queue.active().dirty());
    }
    assert!(most >= writer::DIRTY_BYTES, "it has been written");
    assert!(most <= 5 * writer::DIRTY_BYTES, "{most} bytes at once");
    assert_eq!(queue.end(), Lsn(100), "nothing is shown of it");
}

// With an SD card it took longer than the upstream waits, each time anew.
#[test]
fn less_of_it_waits_for_a_slow_disk() {
    assert_eq!(writer::most_dirty(u64::MAX), 4 * writer::DIRTY_BYTES);
    assert_eq!(writer::most_dirty(3 << 20), 6 << 20);
    assert_eq!(writer::most_dirty(1), 1 << 20);
    let dir = TempDir::new().unwrap();
    let (queue, mut writer) = create(&dir);
    queue.active().set_pace(1 << 20);
    let part = Record::new(Kind::Part, Lsn::ZERO, &vec![0; 256 << 10]);
    for _ in 0..16 {
        writer.append(&part).unwrap();
    }
    let dirty = queue.active().dirty();
    assert!(dirty <= 3 << 20, "{dirty} bytes");
}

/// Small transactions and large ones, with definitions before and in them.
fn write_mixed(writer: &mut Writer) {
    for n in 1..=12_u32 {
        let end = 100 + u64::from(n) * 10;
        if n % 3 != 0 {
            writer.append(&schema(n % 4, n as u8)).unwrap();
        }
        let parts = if n % 5 == 0 { 0 } else { n % 4 * 2 };
        for part in 0..parts {
            let body = vec![part as u8; 100 << 10];
            writer
                .append(&Record::new(Kind::Part, Lsn::ZERO, &body))
                .unwrap();
            writer.append(&schema(10 + n, part as u8)).unwrap();
        }
        let end = match n % 5 {
            0 => Record::watermark(Lsn(end), 0),
            _ => transaction(end, 10),
        };
        writer.append(&end).unwrap();
        writer.publish().unwrap();
    }
}

#[test]
fn who_begins_where_others_did_gets_the_same() {
    let dir = TempDir::new().unwrap();
    let (queue, mut writer) = create(&dir);
    write_mixed(&mut writer);
    drop((queue, writer));
    let places: Vec<u64> = (100..=230).step_by(5).collect();
    let anew = |from: &u64| all(&Queue::open(dir.path()).unwrap().unwrap().0, *from);
    let wanted: Vec<_> = places.iter().map(anew).collect();
    let (queue, _writer) = Queue::open(dir.path()).unwrap().unwrap();
    // Forwards, backwards, and to and fro.
    for step in [1, 26, 7, 11, 16] {
        for at in (0..places.len()).map(|n| n * step % places.len()) {
            assert_eq!(all(&queue, places[at]), wanted[at], "above {}", places[at]);
        }
    }
}

// Five hundred followers that were cut off went through all of it each, and were given up meanwhile.
#[test]
fn a_large_transaction_is_gone_through_once_by_those_who_stand_before_it() {
    let dir = TempDir::new().unwrap();
    let (queue, mut writer) = create(&dir);
    writer.append(&transaction(110, 10)).unwrap();
    let part = Record::new(Kind::Part, Lsn::ZERO, &vec![0; 1 << 20]);
    (0..8).for_each(|_| writer.append(&part).unwrap());
    writer.append(&transaction(120, 10)).unwrap();
    writer.publish().unwrap();
    drop(queue.reader(Lsn(110)).unwrap());
    // Who went through it would find this.
    let file = fs::OpenOptions::new().write(true).open(last_segment(&dir));
    file.unwrap().write_all_at(b"?", 5 << 20).unwrap();
    for from in [110, 115] {
        assert!(queue.reader(Lsn(from)).is_ok(), "above {from}");
    }
    let mut reader = queue.reader(Lsn(110)).unwrap();
    let damage = std::iter::from_fn(|| reader.try_next().transpose()).find_map(Result::err);
    assert!(matches!(damage, Some(QueueError::Damaged { .. })));
    assert!(queue.reader(Lsn(120)).is_err(), "it has to go through it");
}

#[test]
fn a_file_that_is_shorter_than_it_was_is_damaged() {
    let dir = TempDir::new().unwrap();
    let (queue, mut writer) = create(&dir);
    for end in [110, 120] {
        writer.append(&transaction(end, 1000)).unwrap();
    }
    writer.publish().unwrap();
    let file = fs::OpenOptions::new().write(true).open(last_segment(&dir));
    file.unwrap().set_len(900).unwrap();
    let damage = queue.reader(Lsn(100)).err();
    assert!(matches!(damage, Some(QueueError::Damaged { .. })));
}

// Tables that were dropped long ago were defined at the head of each segment, for ever.
#[test]
fn what_a_new_session_does_not_define_is_forgotten() {
    let dir = TempDir::new().unwrap();
    let (queue, mut writer) = create(&dir);
    let full = SEGMENT_BYTES as usize;
    for relid in [1, 2, 3] {
        writer.append(&schema(relid, 0)).unwrap();
    }
    writer.append(&transaction(110, 10)).unwrap();
    writer.begin_session();
    writer.append(&schema(2, 0)).unwrap();
    writer.append(&transaction(120, full)).unwrap();
    writer.append(&transaction(130, 10)).unwrap();
    writer.append(&schema(3, 0)).unwrap();
    writer.append(&transaction(140, 10)).unwrap();
    writer.publish().unwrap();
    let (s, c) = (Kind::Schema, Kind::Commit);
    // Whoever is before the end of the session before has all, also from the disk.
    let early = [
        (s, 0),
        (s, 0),
        (s, 0),
        (c, 110),
        (c, 120),
        (s, 0),
        (c, 130),
        (s, 0),
        (c, 140),
    ];
    assert_eq!(all(&queue, 100), early);
    assert_eq!(all(&queue, 120), [(s, 0), (c, 130), (s, 0), (c, 140)]);
    drop((queue, writer));
    let (queue, mut writer) = Queue::open(dir.path()).unwrap().unwrap();
    assert_eq!(all(&queue, 100), early);
    writer.begin_session();
    writer.append(&schema(3, 0)).unwrap();
    writer.append(&transaction(150, full)).unwrap();
    writer.publish().unwrap();
    assert_eq!(all(&queue, 150), [(s, 0)]);
}

// With definitions of more than a segment each transaction began another one.
#[test]
fn definitions_however_many_are_the_smaller_part_of_a_segment() {
    let dir = TempDir::new().unwrap();
    let (queue, mut writer) = create(&dir);
    let mut large = BytesMut::new();
    for relid in 0..3_u32 {
        large.clear();
        large.put_u8(b'R');
        large.put_u32(relid);
        large.put_bytes(1, SEGMENT_BYTES as usize / 2);
        let defined = Record::new(Kind::Schema, Lsn::ZERO, &large);
        writer.append(&defined).unwrap();
    }
    for end in 11..=30 {
        writer.append(&transaction(end * 10, 10)).unwrap();
    }
    writer.publish().unwrap();
    assert_eq!(segment::list(dir.path()).unwrap().len(), 2);
    assert_eq!(all(&queue, 290).last(), Some(&(Kind::Commit, 300)));
}
