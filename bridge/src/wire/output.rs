//! What is to be sent over one connection.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes, BytesMut};

/// A piece of at least so many bytes is sent from where it is; a smaller one is copied.
const SHARED: usize = 16 << 10;
/// So much memory is kept when everything is sent.
const KEPT: usize = 64 << 10;

/// Empties a buffer that is used again; what it has grown to is given back if it is more than `kept`.
pub fn empty(buffer: &mut BytesMut, kept: usize) {
    match buffer.capacity() > kept {
        true => *buffer = BytesMut::new(),
        false => buffer.clear(),
    }
}

/// Bytes in the order in which they go out. Large pieces may be others' as well: what goes to
/// many connections is in memory once.
#[derive(Default)]
pub(super) struct Output {
    pieces: VecDeque<Bytes>,
    /// After the pieces.
    tail: BytesMut,
}

impl Output {
    /// Where more can be appended.
    pub fn tail(&mut self) -> &mut BytesMut {
        &mut self.tail
    }

    /// Appends `bytes`.
    pub fn push(&mut self, bytes: Bytes) {
        if bytes.len() < SHARED {
            self.tail.extend_from_slice(&bytes);
            return;
        }
        if !self.tail.is_empty() {
            self.pieces.push_back(self.tail.split().freeze());
        }
        self.pieces.push_back(bytes);
    }
}

impl Buf for Output {
    fn remaining(&self) -> usize {
        self.pieces.iter().map(Bytes::len).sum::<usize>() + self.tail.len()
    }

    fn chunk(&self) -> &[u8] {
        self.pieces.front().map_or(&self.tail[..], |piece| piece)
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let chunks = self.pieces.iter().map(|piece| &piece[..]);
        let chunks = chunks.chain((!self.tail.is_empty()).then_some(&self.tail[..]));
        let mut filled = 0;
        for (slice, chunk) in slices.iter_mut().zip(chunks) {
            *slice = IoSlice::new(chunk);
            filled += 1;
        }
        filled
    }

    fn advance(&mut self, mut count: usize) {
        while let Some(front) = self.pieces.front_mut() {
            if count < front.len() {
                front.advance(count);
                return;
            }
            count -= front.len();
            self.pieces.pop_front();
        }
        self.tail.advance(count);
        // A burst must not hold its memory for as long as the connection lasts.
        if self.tail.is_empty() {
            empty(&mut self.tail, KEPT);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(output: &mut Output, step: usize) -> Vec<u8> {
        let mut sent = Vec::new();
        while output.has_remaining() {
            let mut slices = [IoSlice::new(&[]); 3];
            let filled = output.chunks_vectored(&mut slices);
            assert_eq!(&slices[0][..], output.chunk());
            let there: usize = slices[..filled].iter().map(|slice| slice.len()).sum();
            let taken = step.min(there);
            let bytes = slices[..filled].iter().flat_map(|slice| slice.iter());
            sent.extend(bytes.take(taken));
            output.advance(taken);
        }
        sent
    }

    #[test]
    fn pieces_go_out_in_order_however_much_is_taken() {
        for step in [1, 7, SHARED, SHARED + 1, usize::MAX] {
            let mut output = Output::default();
            let mut expected = Vec::new();
            for (fill, len) in [
                (1, 5),
                (2, SHARED),
                (3, SHARED - 1),
                (4, 3 * SHARED),
                (5, 0),
                (6, 2),
            ] {
                let bytes = vec![fill; len];
                expected.extend_from_slice(&bytes);
                output.push(bytes.into());
            }
            output.tail().extend_from_slice(b"end");
            expected.extend_from_slice(b"end");
            assert_eq!(output.remaining(), expected.len());
            assert_eq!(all(&mut output, step), expected);
        }
    }

    // Five hundred connections kept half a MiB each after a burst.
    #[test]
    fn a_large_piece_is_not_copied_and_no_memory_of_a_burst_is_kept() {
        let mut output = Output::default();
        let large = Bytes::from(vec![7; 1 << 20]);
        output.tail().extend_from_slice(b"head");
        output.push(large.clone());
        assert_eq!(output.pieces[1].as_ptr(), large.as_ptr());
        output.tail().extend_from_slice(&[1; 4 * KEPT]);
        let before = output.remaining();
        output.advance(before);
        assert!(output.pieces.is_empty() && output.tail.capacity() <= KEPT);
    }
}
