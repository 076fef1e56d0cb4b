//! Positions and the identity of the history that they count.

use std::fmt;
use std::str::FromStr;

/// Position in the top's WAL: the one coordinate of the whole tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// PostgreSQL's invalid position, below every real one.
    pub const ZERO: Lsn = Lsn(0);
    /// Above every real position.
    pub const MAX: Lsn = Lsn(u64::MAX);
}

/// In JSON as the text that it has for people.
macro_rules! json_text {
    ($name:ident) => {
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(
                deserializer: D,
            ) -> Result<$name, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

json_text!(Lsn);
json_text!(Identity);

/// Position in the WAL of the Postgres beside this bridge. It counts another
/// log, so it has no ordering against [`Lsn`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LocalLsn(pub u64);

/// A text that is not a position of the form `X/X`.
#[derive(Debug, thiserror::Error)]
#[error("invalid LSN \"{0}\"")]
pub struct ParseLsnError(String);

fn parse(text: &str) -> Result<u64, ParseLsnError> {
    let bad = || ParseLsnError(text.chars().take(40).collect());
    let (high, low) = text.split_once('/').ok_or_else(bad)?;
    let half = |part: &str| {
        let plain = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_hexdigit());
        if plain {
            u32::from_str_radix(part, 16).map_err(|_| bad())
        } else {
            Err(bad())
        }
    };
    Ok(u64::from(half(high)?) << 32 | u64::from(half(low)?))
}

macro_rules! lsn_text {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:X}/{:X}", self.0 >> 32, self.0 as u32)
            }
        }

        impl FromStr for $name {
            type Err = ParseLsnError;

            fn from_str(text: &str) -> Result<Self, ParseLsnError> {
                parse(text).map($name)
            }
        }
    };
}

lsn_text!(Lsn);
lsn_text!(LocalLsn);

/// What an [`Lsn`] is a position of. LSNs of two identities are never compared.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The top's `system_identifier`.
    pub system_id: u64,
    /// The top's timeline.
    pub timeline: u32,
    /// The top's database.
    pub database: String,
    /// The publication read there.
    pub publication: String,
    /// Version of what the queue stores (see [`crate::record`]).
    pub format: u32,
}

impl Identity {
    /// Same history, on the same timeline or a later one. Whether that branched off
    /// after a given position its own history file tells.
    pub fn continues(&self, older: &Identity) -> bool {
        self.same_origin(older) && self.timeline >= older.timeline
    }

    /// Same history but for the timeline, which a promoted standby raises.
    pub fn same_origin(&self, other: &Identity) -> bool {
        self.system_id == other.system_id
            && self.database == other.database
            && self.publication == other.publication
            && self.format == other.format
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Identity {
            system_id,
            timeline,
            database,
            publication,
            format,
        } = self;
        write!(
            f,
            "{system_id}/{timeline}/{publication}/{format}/{database}"
        )
    }
}

/// A text that is not a stream identity.
#[derive(Debug, thiserror::Error)]
#[error("invalid stream identity \"{0}\"")]
pub struct ParseIdentityError(String);

impl FromStr for Identity {
    type Err = ParseIdentityError;

    fn from_str(text: &str) -> Result<Self, ParseIdentityError> {
        let bad = || ParseIdentityError(text.chars().take(80).collect());
        // The database comes last: its name may hold a slash.
        let mut parts = text.splitn(5, '/');
        let mut next = || parts.next().ok_or_else(bad);
        Ok(Identity {
            system_id: next()?.parse().map_err(|_| bad())?,
            timeline: next()?.parse().map_err(|_| bad())?,
            publication: next()?.to_owned(),
            format: next()?.parse().map_err(|_| bad())?,
            database: next()?.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lsn_round_trips_as_postgres_writes_it() {
        for (text, value) in [
            ("0/0", 0),
            ("0/16B3748", 0x16B3748),
            ("A1/FF", 0xA1_0000_00FF),
        ] {
            assert_eq!(text.parse::<Lsn>().unwrap(), Lsn(value));
            assert_eq!(Lsn(value).to_string(), text);
        }
        for bad in ["", "1", "/", "1/", "/1", "+1/1", "1/123456789", "g/1"] {
            assert!(bad.parse::<Lsn>().is_err(), "{bad}");
        }
    }

    #[test]
    fn identity_round_trips_with_a_slash_in_the_database() {
        let identity = Identity {
            system_id: 7_123_456_789,
            timeline: 3,
            database: "a/b".into(),
            publication: "terrace".into(),
            format: 1,
        };
        assert_eq!(identity.to_string().parse::<Identity>().unwrap(), identity);
    }
}
