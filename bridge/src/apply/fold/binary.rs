//! Values in the binary form that COPY reads, which costs the server a third less of wide rows than text.
//!
//! Guarantee: what is written is what the type's input function makes of the text that the top sent. Of
//! a text that is not known for certain nothing is written, and the rows travel as text, whose
//! errors are PostgreSQL's own.

use bytes::{BufMut, BytesMut};

use crate::apply::relation::Input;

/// A type whose binary form is written here (PostgreSQL: `int4recv` and the like of `src/backend/utils/adt`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binary {
    Bool,
    Int2,
    Int4,
    Int8,
    /// Also varchar and json, whose length and syntax are checked where they are read.
    Text,
    Jsonb,
    Bytea,
    Uuid,
    Date,
    Timestamp,
    Timestamptz,
}

/// The only version of jsonb's form.
const JSONB: u8 = 1;
/// From 1970-01-01 to PostgreSQL's epoch, 2000-01-01.
const EPOCH_DAYS: i64 = 10_957;
const DAY_MICROS: i64 = 86_400_000_000;

impl Binary {
    /// The form of values that are read in this way.
    pub fn of(input: &Input) -> Option<Binary> {
        if !input.plain {
            return None;
        }
        Some(match input.type_name.as_str() {
            "boolean" => Binary::Bool,
            "smallint" => Binary::Int2,
            "integer" => Binary::Int4,
            "bigint" => Binary::Int8,
            "text" | "character varying" | "json" => Binary::Text,
            "jsonb" => Binary::Jsonb,
            "bytea" => Binary::Bytea,
            "uuid" => Binary::Uuid,
            "date" => Binary::Date,
            "timestamp without time zone" => Binary::Timestamp,
            "timestamp with time zone" => Binary::Timestamptz,
            _ => return None,
        })
    }

    /// Writes a value as the top's sessions print it (`upstream/session.rs`), after its length.
    pub fn put(self, text: &[u8], out: &mut BytesMut) -> Option<()> {
        let start = out.len();
        out.put_i32(0);
        match self {
            Binary::Bool => out.put_u8(match text {
                b"t" => 1,
                b"f" => 0,
                _ => return None,
            }),
            Binary::Int2 => out.put_i16(number(text)?),
            Binary::Int4 => out.put_i32(number(text)?),
            Binary::Int8 => out.put_i64(number(text)?),
            Binary::Text => out.put_slice(text),
            Binary::Jsonb => {
                out.put_u8(JSONB);
                out.put_slice(text);
            }
            Binary::Bytea => put_hex(text.strip_prefix(b"\\x")?, out)?,
            Binary::Uuid => put_uuid(text, out)?,
            Binary::Date => out.put_i32(i32::try_from(days(text)?).ok()?),
            Binary::Timestamp => out.put_i64(micros(text)?),
            Binary::Timestamptz => out.put_i64(micros(text.strip_suffix(b"+00")?)?),
        }
        let len = i32::try_from(out.len() - start - 4).ok()?;
        out[start..start + 4].copy_from_slice(&len.to_be_bytes());
        Some(())
    }
}

fn number<N: std::str::FromStr>(text: &[u8]) -> Option<N> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn put_hex(digits: &[u8], out: &mut BytesMut) -> Option<()> {
    let (pairs, rest) = digits.as_chunks::<2>();
    for [high, low] in pairs {
        let digit = |byte: u8| char::from(byte).to_digit(16);
        out.put_u8((digit(*high)? << 4 | digit(*low)?) as u8);
    }
    rest.is_empty().then_some(())
}

fn put_uuid(text: &[u8], out: &mut BytesMut) -> Option<()> {
    let groups = text.split(|byte| *byte == b'-');
    let lengths: Vec<usize> = groups.clone().map(<[u8]>::len).collect();
    if lengths != [8, 4, 4, 4, 12] {
        return None;
    }
    groups.into_iter().try_for_each(|group| put_hex(group, out))
}

/// Digits alone, as many as are said.
fn digits(text: &[u8], count: usize) -> Option<i64> {
    (text.len() == count && text.iter().all(u8::is_ascii_digit))
        .then(|| number(text))
        .flatten()
}

/// Days since 2000-01-01 of `YYYY-MM-DD`; of other years, BC and infinity `None`.
fn days(text: &[u8]) -> Option<i64> {
    if text.len() != 10 || text[4] != b'-' || text[7] != b'-' {
        return None;
    }
    let (year, month, day) = (
        digits(&text[..4], 4)?,
        digits(&text[5..7], 2)?,
        digits(&text[8..], 2)?,
    );
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let length = match month {
        2 => 28 + i64::from(leap),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    };
    if year == 0 || !(1..=12).contains(&month) || !(1..=length).contains(&day) {
        return None;
    }
    // The other way round than in `clock.rs`: years that start in March.
    let (year, month) = (year - i64::from(month <= 2), (month + 9) % 12);
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * month + 2) / 5 + day - 1;
    let in_era = of_era * 365 + of_era / 4 - of_era / 100 + of_year;
    Some(era * 146_097 + in_era - 719_468 - EPOCH_DAYS)
}

/// Microseconds since 2000-01-01 of `YYYY-MM-DD HH:MM:SS`, perhaps with a fraction.
fn micros(text: &[u8]) -> Option<i64> {
    let (date, time) = text.split_at_checked(10)?;
    let [b' ', h1, h2, b':', m1, m2, b':', s1, s2, fraction @ ..] = time else {
        return None;
    };
    let (hour, minute, second) = (
        digits(&[*h1, *h2], 2)?,
        digits(&[*m1, *m2], 2)?,
        digits(&[*s1, *s2], 2)?,
    );
    if hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let fraction = match fraction {
        [] => 0,
        [b'.', places @ ..] if places.len() <= 6 => {
            digits(places, places.len())? * 10_i64.pow(6 - places.len() as u32)
        }
        _ => return None,
    };
    let seconds = (hour * 60 + minute) * 60 + second;
    Some(days(date)? * DAY_MICROS + seconds * 1_000_000 + fraction)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{PG_EPOCH_MICROS, timestamp};

    fn put(kind: Binary, text: &str) -> Option<Vec<u8>> {
        let mut out = BytesMut::new();
        kind.put(text.as_bytes(), &mut out)?;
        let len = i32::from_be_bytes(out[..4].try_into().unwrap());
        assert_eq!(len as usize, out.len() - 4);
        Some(out[4..].to_vec())
    }

    fn time(text: &str) -> Option<i64> {
        let bytes = put(Binary::Timestamptz, text)?;
        Some(i64::from_be_bytes(bytes.try_into().unwrap()))
    }

    #[test]
    fn values_are_as_postgres_sends_them() {
        let bytes = |hex: &[u8]| Some(hex.to_vec());
        assert_eq!(put(Binary::Bool, "t"), bytes(&[1]));
        assert_eq!(put(Binary::Int2, "-32768"), bytes(&[0x80, 0]));
        assert_eq!(put(Binary::Int4, "258"), bytes(&[0, 0, 1, 2]));
        assert_eq!(put(Binary::Int8, "-1"), bytes(&[255; 8]));
        assert_eq!(put(Binary::Text, "\\N\t"), bytes(b"\\N\t"));
        assert_eq!(put(Binary::Jsonb, "{}"), bytes(b"\x01{}"));
        assert_eq!(put(Binary::Bytea, "\\x00fF"), bytes(&[0, 255]));
        let uuid = "00010203-0405-0607-0809-0a0b0c0d0e0f";
        assert_eq!(put(Binary::Uuid, uuid), Some((0..16).collect()));
        assert_eq!(put(Binary::Date, "2000-01-01"), bytes(&[0; 4]));
        assert_eq!(put(Binary::Date, "1999-12-31"), bytes(&[255; 4]));
    }

    #[test]
    fn times_are_the_other_way_round_than_they_are_written() {
        for unix in (-62_135_596_800_i64..253_402_300_800).step_by(86_399 * 37) {
            let micros = unix * 1_000_000 + unix.rem_euclid(999_983);
            assert_eq!(time(&timestamp(micros)), Some(micros - PG_EPOCH_MICROS));
        }
        assert_eq!(time("2000-01-01 00:00:00.5+00"), Some(500_000));
    }

    #[test]
    fn what_is_not_known_for_certain_is_left_to_postgres() {
        for (kind, text) in [
            (Binary::Bool, "true"),
            (Binary::Int2, "32768"),
            (Binary::Int4, " 1"),
            (Binary::Int8, ""),
            (Binary::Bytea, "\\x0"),
            (Binary::Bytea, "\\x+0"),
            (Binary::Bytea, "\\000"),
            (Binary::Uuid, "0001020304050607-0809-0a0b0c0d0e0f"),
            (Binary::Date, "infinity"),
            (Binary::Date, "4713-01-01 BC"),
            (Binary::Date, "2001-02-29"),
            (Binary::Date, "0000-01-01"),
            (Binary::Timestamp, "2000-01-01 24:00:00"),
            (Binary::Timestamp, "2000-01-01 00:00:60"),
            (Binary::Timestamp, "2000-01-01 00:00:00.0000001"),
            (Binary::Timestamp, "294276-12-31 23:59:59"),
            (Binary::Timestamptz, "2000-01-01 00:00:00+01"),
        ] {
            assert_eq!(put(kind, text), None, "{text}");
        }
    }
}
