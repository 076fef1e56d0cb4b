//! A walsender that is asked to gathers what it sends: the same bytes, in few pieces, and nothing
//! is held back where nothing waits.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use terrace_tests::{Scratch, Server, ServerOptions, wait_until};

const SCHEMA: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v text);
    CREATE TABLE unpublished ();
    CREATE PUBLICATION p FOR TABLE t";
const SLOTS: &str = "SELECT pg_create_logical_replication_slot(name, 'pgoutput') \
                     FROM unnest('{plain, gathered}'::name[]) name";
const TRANSACTIONS: usize = 2000;

/// A replication session, as a client that trusts everybody has it.
struct Stream {
    socket: TcpStream,
    /// When something came last, and the longest time in which nothing did.
    silence: (Instant, Duration),
}

impl Stream {
    /// A session whose walsender waits so long for an answer.
    fn open(server: &Server, patience: &str) -> Stream {
        let mut socket = TcpStream::connect(("127.0.0.1", server.port)).expect("connect");
        let limit = Some(Duration::from_secs(20));
        socket.set_read_timeout(limit).expect("limit");
        let parameters = format!(
            "\0\x03\0\0user\0postgres\0database\0app\0replication\0database\0\
             options\0-c wal_sender_timeout={patience}\0\0"
        );
        let length = (parameters.len() as u32 + 4).to_be_bytes();
        socket
            .write_all(&[&length, parameters.as_bytes()].concat())
            .expect("start");
        let mut stream = Stream::over(socket);
        stream.skip_to(b'Z');
        stream
    }

    fn over(socket: TcpStream) -> Stream {
        let silence = (Instant::now(), Duration::ZERO);
        Stream { socket, silence }
    }

    /// To write to while this one is read.
    fn other_end(&self) -> Stream {
        Stream::over(self.socket.try_clone().expect("clone"))
    }

    fn message(&mut self) -> (u8, Vec<u8>) {
        let mut head = [0; 5];
        self.socket.read_exact(&mut head).expect("a message");
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
        let mut body = vec![0; length as usize - 4];
        self.socket.read_exact(&mut body).expect("its body");
        self.silence.1 = self.silence.1.max(self.silence.0.elapsed());
        self.silence.0 = Instant::now();
        assert_ne!(head[0], b'E', "{}", String::from_utf8_lossy(&body));
        (head[0], body)
    }

    fn skip_to(&mut self, wanted: u8) {
        while self.message().0 != wanted {}
    }

    fn ask(&mut self, sql: &str) {
        let length = (sql.len() as u32 + 5).to_be_bytes();
        self.socket
            .write_all(&[b"Q", &length[..], sql.as_bytes(), b"\0"].concat())
            .expect("ask");
    }

    fn start(&mut self, slot: &str) {
        self.ask(&format!(
            "START_REPLICATION SLOT {slot} LOGICAL 0/0 (proto_version '1', publication_names 'p')"
        ));
        self.skip_to(b'W');
    }

    /// Frames without their clocks, up to the one that ends so many transactions.
    fn transactions(&mut self, mut count: usize) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while count > 0 {
            let (kind, mut body) = self.message();
            if kind == b'd' && body[0] == b'w' {
                body.drain(17..25);
                count -= usize::from(body[17] == b'C');
                frames.push(body);
            }
        }
        frames
    }

    /// Says that we are there, and nothing of positions.
    fn ask_for_reply(&mut self) {
        let status = [&b"d\0\0\0\x26r"[..], &[0; 32], &[1]].concat();
        self.socket.write_all(&status).expect("ask");
    }

    /// Segments that have come with data in them; `None` where nobody can tell.
    fn segments(&self) -> Option<u64> {
        let port = self.socket.local_addr().ok()?.port();
        let output = Command::new("ss")
            .args(["-tinH", &format!("sport = :{port}")])
            .output()
            .ok()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let number = said.split("data_segs_in:").nth(1)?;
        number.split_whitespace().next()?.parse().ok()
    }
}

#[test]
fn a_backlog_comes_in_few_pieces_and_news_at_once() {
    let scratch = Scratch::new("terrace-").expect("scratch");
    let options = ServerOptions {
        top: true,
        ..Default::default()
    };
    let server = Server::start(&scratch, "top", &options).expect("boot");
    let hba = server.value("SHOW hba_file");
    let lines = std::fs::read_to_string(&hba).expect("pg_hba.conf");
    std::fs::write(
        &hba,
        format!("host all postgres 127.0.0.1/32 trust\n{lines}"),
    )
    .expect("trust");
    server.sql("SELECT pg_reload_conf()");
    server.sql(SCHEMA);
    server.sql(SLOTS);
    server.sql(&format!(
        "DO $$ BEGIN FOR i IN 1..{TRANSACTIONS} LOOP
             INSERT INTO t VALUES (i, repeat('x', i % 200)); COMMIT; END LOOP; END $$"
    ));
    let open = |slot: &str, gather: bool, patience: &str| {
        let active = format!("SELECT active FROM pg_replication_slots WHERE slot_name = '{slot}'");
        wait_until("the slot is free", || server.value(&active) == "f");
        let mut stream = Stream::open(&server, patience);
        if gather {
            stream.ask("SELECT terrace.gather_sends()");
            stream.skip_to(b'Z');
        }
        stream.start(slot);
        stream
    };
    let read = |slot: &str, gather: bool| {
        let mut stream = open(slot, gather, "60s");
        let frames = stream.transactions(TRANSACTIONS);
        (stream.segments(), frames, stream)
    };
    // A reader that is kept waiting gets them in few pieces however they were sent; nothing that
    // it read is confirmed, so it may try again.
    let tries = (0..10).map(|_| {
        let (plain, wanted, _) = read("plain", false);
        let (gathered, frames, stream) = read("gathered", true);
        assert!(frames == wanted, "the same is sent");
        (plain.unwrap_or(0), gathered.unwrap_or(0), stream)
    });
    let clear = |(plain, ..): &(u64, u64, Stream)| *plain > TRANSACTIONS as u64;
    let is_few = |(plain, gathered, _): &(u64, u64, Stream)| gathered * 5 < *plain;
    // Where others keep the walsender from running it has less to gather.
    let mut clear_ones = tries.filter(clear).take(3).peekable();
    let is_told = clear_ones.peek().is_some();
    let mut stream = match clear_ones.find(is_few) {
        Some((.., stream)) => stream,
        None if is_told => panic!("the pieces are not few in any of three tries"),
        None => {
            println!("skipped: nobody tells (ss), or it is too busy here, how many pieces came");
            read("gathered", true).2
        }
    };
    let asked = Instant::now();
    server.sql("INSERT INTO t VALUES (-1, 'news')");
    stream.transactions(1);
    assert!(asked.elapsed() < Duration::from_secs(1), "news at once");
    // A client that asks all the while is answered while much is read that it is not told of.
    drop(stream);
    let mut stream = open("plain", true, "400ms");
    let (answered, mut asking) = (AtomicBool::new(false), stream.other_end());
    let begun = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            server.sql("INSERT INTO unpublished SELECT FROM generate_series(1, 3000000)");
            server.sql("INSERT INTO t VALUES (-2, 'news')");
        });
        scope.spawn(|| {
            while !answered.load(Ordering::Relaxed) {
                asking.ask_for_reply();
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        // All of it again, as nothing was confirmed.
        stream.transactions(TRANSACTIONS + 1);
        stream.silence = (Instant::now(), Duration::ZERO);
        stream.transactions(1);
        answered.store(true, Ordering::Relaxed);
    });
    let (all, longest) = (begun.elapsed(), stream.silence.1);
    assert!(longest * 4 < all, "{longest:?} of {all:?}");
    // In a session that does not stream it does nothing.
    server.sql("SELECT terrace.gather_sends(); SELECT terrace.gather_sends()");
}
