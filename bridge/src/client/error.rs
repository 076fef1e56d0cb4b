//! Why a session fails, and what people are told of it.

use std::borrow::Cow;
use std::io;

use bytes::{Buf, Bytes};

use crate::wire::take_cstr;

const SYNTAX_ERROR: &str = "42601";
/// Errors that show the bytes of a text.
const OF_BYTES: [&str; 2] = ["22021", "22P05"];

/// What a server says of a failure.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DbError {
    /// ERROR, FATAL …
    pub severity: String,
    /// SQLSTATE.
    pub code: String,
    /// Primary message.
    pub message: String,
    /// DETAIL.
    pub detail: Option<String>,
    /// HINT.
    pub hint: Option<String>,
}

impl DbError {
    /// Reads the body of an ErrorResponse or NoticeResponse.
    pub fn parse(body: &Bytes) -> DbError {
        let mut error = DbError::default();
        let mut body = body.clone();
        while body.has_remaining() {
            let field = body.get_u8();
            let Some(value) = (field != 0).then(|| take_cstr(&mut body)).flatten() else {
                break;
            };
            match field {
                b'S' => error.severity = value,
                b'C' => error.code = value,
                b'M' => error.message = value,
                b'D' => error.detail = Some(value),
                b'H' => error.hint = Some(value),
                _ => {}
            }
        }
        error
    }

    /// Whether the detail may hold values of a row. Reasons are read by everybody, at the top
    /// too, and PostgreSQL itself keeps these from who may not read the table: class 22 is of
    /// data, 23 of constraints.
    fn tells_of_rows(&self) -> bool {
        self.is_of_a_value() || self.code.starts_with("23")
    }

    /// Text search has its own syntax errors; those of SQL are "at or near" something.
    fn is_of_a_value(&self) -> bool {
        self.code.starts_with("22")
            || self.code == SYNTAX_ERROR && self.message.starts_with("syntax error in ")
    }

    /// The message for everybody, in the words of `lc_messages = C`: one about a value quotes it, which
    /// may have quotes itself, or tells its bytes.
    pub fn open_message(&self) -> Cow<'_, str> {
        if OF_BYTES.contains(&self.code.as_str()) {
            return "a text has characters that the encoding here has not".into();
        }
        let quotes = || Some((self.message.find('"')?, self.message.rfind('"')?));
        match quotes().filter(|_| self.is_of_a_value()) {
            Some((first, last)) if first < last => {
                let (before, after) = (&self.message[..=first], &self.message[last..]);
                format!("{before}…{after}").into()
            }
            _ => self.message.as_str().into(),
        }
    }

    /// What is kept from everybody, for the log of this server.
    pub fn hidden(&self) -> Option<String> {
        let detail = self.detail.as_ref().filter(|_| self.tells_of_rows());
        match detail {
            Some(detail) => Some(format!("{} ({detail})", self.message)),
            None => (self.open_message() != self.message).then(|| self.message.clone()),
        }
    }
}

impl std::fmt::Display for DbError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.open_message())?;
        if let Some(detail) = self.detail.as_ref().filter(|_| !self.tells_of_rows()) {
            write!(f, " ({detail})")?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "; hint: {hint}")?;
        }
        write!(f, " [SQLSTATE {}]", self.code)
    }
}

/// Why a session failed.
#[derive(Debug, thiserror::Error)]
pub enum PgError {
    /// The server answered with an error.
    #[error("{0}")]
    Db(Box<DbError>),
    /// The connection failed.
    #[error("connection failed: {0}")]
    Io(io::Error),
    /// TLS could not be set up.
    #[error("TLS: {0}")]
    Tls(String),
    /// Authentication could not be completed.
    #[error("authentication: {0}")]
    Auth(String),
    /// The server sent what the protocol does not allow here.
    #[error("protocol violation: {0}")]
    Protocol(String),
    /// The server replays the WAL of another one.
    #[error(
        "the server is a standby; name the primary that it follows, or promote it (a bridge that \
         waits for that goes on by itself)"
    )]
    Standby,
}

// Not as a source, which would be told twice.
impl From<io::Error> for PgError {
    fn from(error: io::Error) -> PgError {
        PgError::Io(error)
    }
}

impl PgError {
    /// From the body of an ErrorResponse.
    pub fn from_error_response(body: &Bytes) -> PgError {
        PgError::Db(Box::new(DbError::parse(body)))
    }

    /// For a person, without the SQLSTATE when it comes from a server.
    pub fn message(&self) -> String {
        match self {
            PgError::Db(error) => error.message.clone(),
            error => error.to_string(),
        }
    }

    /// The same with what to do, where the server says that.
    pub fn advice(&self) -> String {
        let hint = match self {
            PgError::Db(error) => error.hint.as_ref(),
            _ => None,
        };
        hint.map_or_else(
            || self.message(),
            |hint| format!("{}; hint: {hint}", self.message()),
        )
    }

    /// Nobody listens there: the host answered that, at once.
    pub fn is_refused(&self) -> bool {
        matches!(self, PgError::Io(error) if error.kind() == io::ErrorKind::ConnectionRefused)
    }

    /// Whether it is for people to mend, and waiting is of no use: a password, a certificate, a
    /// line of pg_hba.conf.
    pub fn is_for_people(&self) -> bool {
        match self {
            PgError::Db(_) => matches!(self.class(), Some("28" | "3D" | "42")),
            PgError::Tls(_) | PgError::Auth(_) | PgError::Protocol(_) => true,
            PgError::Io(_) | PgError::Standby => false,
        }
    }

    /// What to do about a session that could not be opened, as far as that is known.
    pub fn way_out(&self) -> &'static str {
        match self {
            _ if self.is_refused() => {
                "; start it, or correct host and port in its connection string"
            }
            PgError::Io(_) => "; correct host and port in its connection string, or let us through",
            PgError::Tls(_) => "; see sslmode and the other ssl keys of its connection string",
            _ => match self.code() {
                Some("28P01") => {
                    "; correct the password in its connection string or the passfile, or set it there \
                     with ALTER ROLE"
                }
                Some("28000") => "; make the role there, or let it in by a line of pg_hba.conf",
                Some("3D000") => "; correct dbname in its connection string, or make the database",
                _ => "",
            },
        }
    }

    /// Class of the SQLSTATE, its first two characters.
    pub fn class(&self) -> Option<&str> {
        self.code()?.get(..2)
    }

    /// SQLSTATE, when the server gave one.
    pub fn code(&self) -> Option<&str> {
        match self {
            PgError::Db(error) => Some(&error.code),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_tells_everybody_nothing_of_rows() {
        let of = |code: &str| DbError {
            code: code.into(),
            message: "refused".into(),
            detail: Some("Failing row contains (secret)".into()),
            ..DbError::default()
        };
        assert_eq!(of("23502").to_string(), "refused [SQLSTATE 23502]");
        assert!(
            of("23502")
                .hidden()
                .is_some_and(|text| text.contains("secret"))
        );
        assert!(of("42P01").to_string().contains("Failing row"));
        let quoted = DbError {
            code: "22P02".into(),
            message: "invalid input syntax for type json: \"a \"secret\" b\"".into(),
            ..DbError::default()
        };
        let shown = "invalid input syntax for type json: \"…\" [SQLSTATE 22P02]";
        assert_eq!(quoted.to_string(), shown);
        assert_eq!(quoted.hidden(), Some(quoted.message.clone()));
        let bytes = of("22021").to_string();
        assert!(!bytes.contains("refused"), "{bytes}");
        assert_eq!(of("22003").to_string(), "refused [SQLSTATE 22003]");
    }

    #[test]
    fn a_sqlstate_may_be_anything() {
        for (code, class) in [("28P01", Some("28")), ("\u{20ac}", None), ("", None)] {
            let body = format!("SFATAL\0C{code}\0Mno\0\0");
            let error = PgError::from_error_response(&Bytes::from(body));
            assert_eq!((error.code(), error.class()), (Some(code), class));
            assert_eq!(error.is_for_people(), class.is_some());
        }
    }
}
