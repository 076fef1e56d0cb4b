//! Framing of the PostgreSQL protocol 3, for either side of a connection.
//!
//! Guarantee: [`Framed::read_message`] gives whole messages and is cancel-safe:
//! a read that is given up loses nothing. A length beyond the limit ends the
//! connection before anything of that size is allocated.

mod output;

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use output::Output;
pub use output::empty;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;

/// Settings of every TCP connection, either way: nothing waits to be sent, and a
/// host that is gone without a word is noticed in about a minute.
pub fn tune(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(30))
        .with_interval(Duration::from_secs(10))
        .with_retries(3);
    SockRef::from(tcp).set_tcp_keepalive(&keepalive)
}

/// An address of several that has not answered for so long is left for the next one.
const NEXT_ADDRESS: Duration = Duration::from_secs(2);

/// Connects to the first address of `host` that answers.
pub async fn connect(host: (&str, u16)) -> io::Result<TcpStream> {
    let mut failed = io::Error::other("the host name has no address");
    let mut addresses = lookup_host(host).await?.peekable();
    while let Some(address) = addresses.next() {
        // One that swallows everything must not keep us from the next one.
        let limit = addresses.peek().map_or(Duration::MAX, |_| NEXT_ADDRESS);
        match timeout(limit, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return tune(&stream).map(|()| stream),
            // One that swallows everything is silent, whatever the others say.
            Ok(Err(_)) if failed.kind() == io::ErrorKind::TimedOut => {}
            Ok(Err(error)) => failed = error,
            Err(_) => failed = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(failed)
}

/// A connected byte stream: TCP, Unix socket or TLS over either.
pub trait Stream: AsyncRead + AsyncWrite + Send + Sync + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Stream for T {}

/// Longest message before a client is authenticated.
pub const MAX_UNAUTHENTICATED: usize = 64 << 10;
/// Longest message otherwise; PostgreSQL's own limit for a value is below it.
pub const MAX_MESSAGE: usize = (1 << 30) + (64 << 20);
const MAX_STARTUP: usize = 10_000;
const READ_BYTES: usize = 64 << 10;
/// After a message of more than this the buffer that it was in is not used again.
const LARGE_MESSAGE: usize = 1 << 20;

/// One message: its kind and what follows the length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// First byte.
    pub kind: u8,
    /// Without kind and length.
    pub body: Bytes,
}

/// A stream with buffers on both directions.
pub struct Framed {
    stream: Box<dyn Stream>,
    input: BytesMut,
    output: Output,
    /// Something of it is with the stream, which may hold it back.
    unflushed: bool,
    patience: Option<Duration>,
}

fn invalid(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

impl Framed {
    /// Wraps a fresh stream.
    pub fn new(stream: Box<dyn Stream>) -> Framed {
        Framed {
            stream,
            input: BytesMut::new(),
            output: Output::default(),
            unflushed: false,
            patience: None,
        }
    }

    /// From now on a flush fails when the other end takes nothing for so long. One
    /// that takes little, over a thin link, is waited for.
    pub fn give_up_after(&mut self, patience: Duration) {
        self.patience = Some(patience);
    }

    /// Bytes that go out with the next flush.
    pub fn out(&mut self) -> &mut BytesMut {
        self.output.tail()
    }

    /// Puts a message out whose body is `head` and then `rest`, which is not copied if it is large.
    pub fn put_shared(&mut self, kind: u8, head: &[u8], rest: Bytes) {
        let out = self.output.tail();
        out.put_u8(kind);
        out.put_u32((4 + head.len() + rest.len()) as u32);
        out.put_slice(head);
        self.output.push(rest);
    }

    /// So many bytes are put out and not sent yet.
    pub fn unsent(&self) -> usize {
        self.output.remaining()
    }

    /// Sends what has been put out.
    pub async fn flush(&mut self) -> io::Result<()> {
        while self.output.has_remaining() {
            let write = self.stream.write_buf(&mut self.output);
            if patiently(self.patience, write).await? == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        patiently(self.patience, self.stream.flush()).await
    }

    /// Sends what has been put out and reads the next message, whichever is done first; `None`
    /// when all is sent. Cancel-safe: what is not sent yet stays.
    pub async fn exchange(&mut self, limit: usize) -> io::Result<Option<Message>> {
        loop {
            if let Some(message) = self.buffered(limit)? {
                return Ok(Some(message));
            }
            if poll_fn(|cx| self.poll_exchange(cx)).await? {
                return Ok(None);
            }
        }
    }

    /// Sends what has been put out, and keeps what comes meanwhile: were both ends to send
    /// only, they would wait for each other for ever.
    pub async fn send_all(&mut self) -> io::Result<()> {
        while self.unflushed || self.output.has_remaining() {
            poll_fn(|cx| self.poll_exchange(cx)).await?;
        }
        Ok(())
    }

    /// Whether all is sent; otherwise something has been read.
    fn poll_exchange(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        while self.output.has_remaining() {
            self.unflushed = true;
            match pin!(self.stream.write_buf(&mut self.output)).poll(cx)? {
                Poll::Ready(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(_) => {}
                Poll::Pending => break,
            }
        }
        if self.unflushed && !self.output.has_remaining() {
            let flushed = pin!(self.stream.flush()).poll(cx)?;
            if flushed.is_ready() {
                self.unflushed = false;
                return Poll::Ready(Ok(true));
            }
        }
        pin!(self.fill()).poll(cx).map_ok(|()| false)
    }

    /// A whole message that has been read already.
    pub fn buffered(&mut self, limit: usize) -> io::Result<Option<Message>> {
        let message = take_message(&mut self.input, limit)?;
        if message
            .as_ref()
            .is_some_and(|message| message.body.len() > LARGE_MESSAGE)
        {
            // Or its size would be held for as long as the connection lasts.
            self.input = BytesMut::from(&self.input[..]);
        }
        Ok(message)
    }

    /// Reads what there is, once; waits for it.
    pub async fn fill(&mut self) -> io::Result<()> {
        self.input.reserve(READ_BYTES);
        match self.stream.read_buf(&mut self.input).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    /// The next message of at most `limit` bytes.
    pub async fn read_message(&mut self, limit: usize) -> io::Result<Message> {
        loop {
            if let Some(message) = self.buffered(limit)? {
                return Ok(message);
            }
            self.fill().await?;
        }
    }

    /// All whole messages of one kind that are there, as they came; waits for one. Empty when
    /// a message of another kind is next.
    pub async fn read_run(&mut self, kind: u8, limit: usize) -> io::Result<Bytes> {
        loop {
            let mut end = 0;
            while self.input.get(end) == Some(&kind)
                && let Some(len) = message_length(&self.input[end..], limit)?
            {
                end += len;
            }
            if end > 0 || self.input.first().is_some_and(|first| *first != kind) {
                return Ok(self.input.split_to(end).freeze());
            }
            self.fill().await?;
        }
    }

    /// The kind of the next message, which stays unread.
    pub async fn peek_kind(&mut self) -> io::Result<u8> {
        while self.input.is_empty() {
            self.fill().await?;
        }
        Ok(self.input[0])
    }

    /// A message without a kind: what a client sends first. Length not included.
    pub async fn read_startup(&mut self) -> io::Result<Bytes> {
        loop {
            if self.input.len() >= 4 {
                let len = (&self.input[..4]).get_u32() as usize;
                if !(8..=MAX_STARTUP).contains(&len) {
                    return Err(invalid("invalid length of startup packet"));
                }
                if self.input.len() >= len {
                    let mut packet = self.input.split_to(len).freeze();
                    packet.advance(4);
                    return Ok(packet);
                }
            }
            self.fill().await?;
        }
    }

    /// One byte, as the answer to an SSLRequest.
    pub async fn read_byte(&mut self) -> io::Result<u8> {
        while self.input.is_empty() {
            self.fill().await?;
        }
        Ok(self.input.get_u8())
    }

    /// The stream, if nothing is buffered that it would miss.
    pub fn into_stream(self) -> io::Result<Box<dyn Stream>> {
        if self.input.is_empty() && !self.output.has_remaining() {
            Ok(self.stream)
        } else {
            Err(invalid("unexpected data before the TLS handshake"))
        }
    }

    /// The stream and what was read ahead of it.
    pub fn into_parts(self) -> (Box<dyn Stream>, Bytes) {
        (self.stream, self.input.freeze())
    }
}

async fn patiently<T>(
    patience: Option<Duration>,
    step: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    match patience {
        None => step.await,
        Some(patience) => timeout(patience, step)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
    }
}

/// Of the message that begins here, with its kind; `None` while it is not there as a whole.
fn message_length(input: &[u8], limit: usize) -> io::Result<Option<usize>> {
    if input.len() < 5 {
        return Ok(None);
    }
    let len = (&input[1..5]).get_u32() as usize;
    if len < 4 || len > limit {
        return Err(invalid(format!("message length {len} is out of range")));
    }
    // The buffer grows as the bytes come, not by what the header claims.
    Ok((input.len() > len).then_some(len + 1))
}

fn take_message(input: &mut BytesMut, limit: usize) -> io::Result<Option<Message>> {
    let Some(len) = message_length(input, limit)? else {
        return Ok(None);
    };
    let kind = input[0];
    let mut body = input.split_to(len).freeze();
    body.advance(5);
    Ok(Some(Message { kind, body }))
}

/// Appends a message whose body `write` produces.
pub fn put(out: &mut BytesMut, kind: u8, write: impl FnOnce(&mut BytesMut)) {
    out.put_u8(kind);
    let at = out.len();
    out.put_u32(0);
    write(out);
    let len = (out.len() - at) as u32;
    out[at..at + 4].copy_from_slice(&len.to_be_bytes());
}

/// Appends a zero-terminated string; an inner zero ends it early.
pub fn put_cstr(out: &mut BytesMut, text: &str) {
    out.put_slice(text.split('\0').next().unwrap_or_default().as_bytes());
    out.put_u8(0);
}

/// Takes a zero-terminated UTF-8 string.
pub fn take_cstr(body: &mut Bytes) -> Option<String> {
    let end = body.iter().position(|byte| *byte == 0)?;
    let text = body.split_to(end);
    body.advance(1);
    String::from_utf8(text.to_vec()).ok()
}

/// Authentication request `code` with its data.
pub fn authentication(out: &mut BytesMut, code: u32, data: &[u8]) {
    put(out, b'R', |out| {
        out.put_u32(code);
        out.put_slice(data);
    });
}

/// ParameterStatus.
pub fn parameter_status(out: &mut BytesMut, name: &str, value: &str) {
    put(out, b'S', |out| {
        put_cstr(out, name);
        put_cstr(out, value);
    });
}

/// ReadyForQuery; `status` is I, T or E.
pub fn ready_for_query(out: &mut BytesMut, status: u8) {
    put(out, b'Z', |out| out.put_u8(status));
}

/// RowDescription of text columns: name and type OID.
pub fn row_description(out: &mut BytesMut, columns: &[(&str, u32)]) {
    put(out, b'T', |out| {
        out.put_u16(columns.len() as u16);
        for (name, oid) in columns {
            put_cstr(out, name);
            out.put_u32(0);
            out.put_u16(0);
            out.put_u32(*oid);
            out.put_i16(-1);
            out.put_i32(-1);
            out.put_u16(0);
        }
    });
}

/// DataRow of text values.
pub fn data_row(out: &mut BytesMut, values: &[Option<&str>]) {
    put(out, b'D', |out| {
        out.put_u16(values.len() as u16);
        for value in values {
            match value {
                None => out.put_i32(-1),
                Some(value) => {
                    out.put_u32(value.len() as u32);
                    out.put_slice(value.as_bytes());
                }
            }
        }
    });
}

/// CommandComplete.
pub fn command_complete(out: &mut BytesMut, completion: &str) {
    put(out, b'C', |out| put_cstr(out, completion));
}

/// ErrorResponse; an empty `hint` is left out.
pub fn error_response(out: &mut BytesMut, severity: &str, code: &str, text: &str, hint: &str) {
    put(out, b'E', |out| {
        for (field, value) in [
            (b'S', severity),
            (b'V', severity),
            (b'C', code),
            (b'M', text),
            (b'H', hint),
        ] {
            if !value.is_empty() {
                out.put_u8(field);
                put_cstr(out, value);
            }
        }
        out.put_u8(0);
    });
}

/// CopyBothResponse as a walsender sends it: text, no columns.
pub fn copy_both_response(out: &mut BytesMut) {
    put(out, b'W', |out| {
        out.put_u8(0);
        out.put_u16(0);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_are_framed_and_limited() {
        let (ours, mut theirs) = tokio::io::duplex(1024);
        let mut framed = Framed::new(Box::new(ours));
        theirs.write_all(b"Q\0\0\0\x06ab").await.unwrap();
        theirs.write_all(b"X\0\0\0\x04").await.unwrap();
        let message = framed.read_message(100).await.unwrap();
        assert_eq!((message.kind, &message.body[..]), (b'Q', &b"ab"[..]));
        assert_eq!(framed.read_message(100).await.unwrap().kind, b'X');
        for hostile in [
            &b"Q\x7f\xff\xff\xff"[..],
            b"Q\0\0\0\x03",
            b"Q\xff\xff\xff\xff",
        ] {
            let (ours, mut theirs) = tokio::io::duplex(1024);
            theirs.write_all(hostile).await.unwrap();
            assert!(
                Framed::new(Box::new(ours))
                    .read_message(1 << 20)
                    .await
                    .is_err()
            );
        }
    }

    #[tokio::test]
    async fn messages_of_one_kind_come_as_they_are() {
        let (ours, mut theirs) = tokio::io::duplex(1024);
        let mut framed = Framed::new(Box::new(ours));
        theirs
            .write_all(b"d\0\0\0\x05ad\0\0\0\x04d\0\0\0\x06b")
            .await
            .unwrap();
        let run = framed.read_run(b'd', 100).await.unwrap();
        assert_eq!(&run[..], b"d\0\0\0\x05ad\0\0\0\x04");
        theirs.write_all(b"cc\0\0\0\x04").await.unwrap();
        let run = framed.read_run(b'd', 100).await.unwrap();
        assert_eq!(&run[..], b"d\0\0\0\x06bc");
        assert!(framed.read_run(b'd', 100).await.unwrap().is_empty());
        assert_eq!(framed.read_message(100).await.unwrap().kind, b'c');
    }

    // A client that stopped reading used to keep its session and its cursor for ever.
    #[tokio::test]
    async fn a_peer_that_takes_nothing_is_given_up() {
        let (ours, mut theirs) = tokio::io::duplex(16);
        let mut framed = Framed::new(Box::new(ours));
        framed.give_up_after(Duration::from_secs(1));
        framed.out().put_bytes(7, 100);
        let slowly = async {
            // Takes longer in all than our patience lasts.
            for _ in 0..100 {
                tokio::time::sleep(Duration::from_millis(12)).await;
                theirs.read_u8().await.unwrap();
            }
        };
        let (flushed, ()) = tokio::join!(framed.flush(), slowly);
        flushed.unwrap();
        framed.out().put_bytes(7, 100);
        let error = framed.flush().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    // A client over a thin link whose messages nobody read while it was sent something.
    #[tokio::test]
    async fn both_ways_are_served_at_once() {
        let (ours, theirs) = tokio::io::duplex(16);
        let (mut from_us, mut to_us) = tokio::io::split(theirs);
        let mut framed = Framed::new(Box::new(ours));
        framed.out().put_bytes(7, 100);
        to_us.write_all(b"X\0\0\0\x04").await.unwrap();
        let message = framed.exchange(100).await.unwrap();
        assert_eq!(message.unwrap().kind, b'X');
        let mut read = [0; 100];
        let (sent, taken) = tokio::join!(framed.exchange(100), from_us.read_exact(&mut read));
        assert_eq!((sent.unwrap(), taken.unwrap()), (None, 100));
        assert_eq!(read, [7; 100]);
        to_us.write_all(b"Q\0\0\0\x04").await.unwrap();
        let message = framed.exchange(100).await.unwrap();
        assert_eq!(message.unwrap().kind, b'Q');
        drop((from_us, to_us));
        assert!(framed.exchange(100).await.is_err());
    }

    #[tokio::test]
    async fn both_ends_may_send_at_once() {
        let (ours, mut theirs) = tokio::io::duplex(1024);
        let mut framed = Framed::new(Box::new(ours));
        framed.out().put_bytes(7, 50_000);
        let other_end = async {
            theirs
                .write_all(&b"X\0\0\0\x04".repeat(10_000))
                .await
                .unwrap();
            theirs.read_exact(&mut [0; 50_000]).await.unwrap();
        };
        let (sent, ()) = tokio::join!(framed.send_all(), other_end);
        sent.unwrap();
        assert_eq!(framed.buffered(100).unwrap().unwrap().kind, b'X');
        framed.send_all().await.unwrap();
    }

    #[tokio::test]
    async fn startup_packets_are_limited() {
        for hostile in [
            &b"\x7f\xff\xff\xff"[..],
            b"\0\0\0\x07xxx",
            b"GET / HTTP/1.0\r\n\r\n",
        ] {
            let (ours, mut theirs) = tokio::io::duplex(1024);
            theirs.write_all(hostile).await.unwrap();
            assert!(Framed::new(Box::new(ours)).read_startup().await.is_err());
        }
    }
}
