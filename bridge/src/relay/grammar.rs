//! The replication commands (PostgreSQL's `repl_gram.y`, `repl_scanner.l`).

use crate::lsn::Lsn;
use crate::roles::Order;

/// A command of a replication session.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "field names are those of the commands' documentation"
)]
pub enum Command {
    /// IDENTIFY_SYSTEM
    IdentifySystem,
    /// TIMELINE_HISTORY
    TimelineHistory(u32),
    /// SHOW of this setting
    Show(String),
    /// CREATE_REPLICATION_SLOT
    Create {
        slot: String,
        temporary: bool,
        logical: bool,
        snapshot: Option<String>,
    },
    /// DROP_REPLICATION_SLOT
    Drop { slot: String, wait: bool },
    /// START_REPLICATION … LOGICAL
    Start {
        slot: String,
        from: Lsn,
        options: Vec<(String, Option<String>)>,
    },
    /// An order from one bridge to another: `SWITCHOVER [TO node]`, `TAKE_OVER lsn`, `RESYNC`,
    /// `SKIP lsn`
    Order(Order),
    /// Asks the top, by way of our own upstream: `AT_TOP 'request'`
    AtTop(String),
    /// A command that this server does not serve
    Unsupported(&'static str),
    /// Anything else
    Sql,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    Quoted(String),
    Literal(String),
    Sign(char),
}

fn tokens(text: &str) -> Option<Vec<Token>> {
    let mut tokens = Vec::new();
    let mut chars = text.chars().peekable();
    while let Some(&char) = chars.peek() {
        match char {
            char if char.is_whitespace() => {
                chars.next();
            }
            '\'' | '"' => {
                chars.next();
                let mut value = String::new();
                loop {
                    let next = chars.next()?;
                    if next != char {
                        value.push(next);
                    } else if chars.peek() == Some(&char) {
                        chars.next();
                        value.push(char);
                    } else {
                        break;
                    }
                }
                tokens.push(if char == '"' {
                    Token::Quoted(value)
                } else {
                    Token::Literal(value)
                });
            }
            char if char.is_alphanumeric() || char == '_' => {
                let mut word = String::new();
                while let Some(&next) = chars.peek() {
                    if !(next.is_alphanumeric() || matches!(next, '_' | '/' | '.' | '$')) {
                        break;
                    }
                    word.push(next);
                    chars.next();
                }
                tokens.push(Token::Word(word));
            }
            char => {
                chars.next();
                tokens.push(Token::Sign(char));
            }
        }
    }
    Some(tokens)
}

/// Reads one command; `None` for a replication command with a syntax error.
pub fn parse(text: &str) -> Option<Command> {
    let Some(tokens) = tokens(text.trim().trim_end_matches(';')) else {
        return Some(Command::Sql);
    };
    let Some((Token::Word(first), rest)) = tokens.split_first() else {
        return Some(Command::Sql);
    };
    match first.as_str() {
        "IDENTIFY_SYSTEM" => rest.is_empty().then_some(Command::IdentifySystem),
        "SHOW" => match rest {
            [Token::Word(name)] => Some(Command::Show(name.clone())),
            _ => Some(Command::Sql),
        },
        "CREATE_REPLICATION_SLOT" => create(rest),
        "DROP_REPLICATION_SLOT" => match rest {
            [slot] => Some(Command::Drop {
                slot: identifier(slot)?,
                wait: false,
            }),
            [slot, Token::Word(wait)] if wait == "WAIT" => Some(Command::Drop {
                slot: identifier(slot)?,
                wait: true,
            }),
            _ => None,
        },
        "START_REPLICATION" => start(rest),
        "SWITCHOVER" => match rest {
            [] => Some(Command::Order(Order::Switchover(None))),
            [Token::Word(to), node] if to == "TO" => {
                Some(Command::Order(Order::Switchover(Some(identifier(node)?))))
            }
            _ => None,
        },
        "TAKE_OVER" => match rest {
            [Token::Word(lsn)] => Some(Command::Order(Order::TakeOver(lsn.parse().ok()?))),
            _ => None,
        },
        "SKIP" => match rest {
            [Token::Word(lsn)] => Some(Command::Order(Order::Skip(lsn.parse().ok()?))),
            _ => None,
        },
        "RESYNC" => rest.is_empty().then_some(Command::Order(Order::Resync)),
        "AT_TOP" => match rest {
            [Token::Literal(request)] => Some(Command::AtTop(request.clone())),
            _ => None,
        },
        "TIMELINE_HISTORY" => match rest {
            [Token::Word(number)] => Some(Command::TimelineHistory(number.parse().ok()?)),
            _ => None,
        },
        "BASE_BACKUP" => Some(Command::Unsupported("BASE_BACKUP")),
        "READ_REPLICATION_SLOT" => Some(Command::Unsupported("READ_REPLICATION_SLOT")),
        "ALTER_REPLICATION_SLOT" => Some(Command::Unsupported("ALTER_REPLICATION_SLOT")),
        _ => Some(Command::Sql),
    }
}

fn identifier(token: &Token) -> Option<String> {
    match token {
        Token::Word(name) => Some(name.to_lowercase()),
        Token::Quoted(name) => Some(name.clone()),
        _ => None,
    }
}

fn word(token: Option<&Token>) -> Option<&str> {
    match token {
        Some(Token::Word(word)) => Some(word),
        _ => None,
    }
}

fn create(tokens: &[Token]) -> Option<Command> {
    let (slot, mut rest) = tokens.split_first()?;
    let slot = identifier(slot)?;
    let temporary = word(rest.first()) == Some("TEMPORARY");
    if temporary {
        rest = &rest[1..];
    }
    let logical = match word(rest.first())? {
        "LOGICAL" => {
            rest.get(1)?;
            rest = &rest[2..];
            true
        }
        "PHYSICAL" => {
            rest = &rest[1..];
            false
        }
        _ => return None,
    };
    let mut snapshot = Some("export".to_owned());
    if rest.first() == Some(&Token::Sign('(')) {
        for (name, value) in options(rest)? {
            if name.eq_ignore_ascii_case("snapshot") {
                snapshot = value;
            }
        }
    } else {
        for token in rest {
            match word(Some(token))? {
                "EXPORT_SNAPSHOT" => snapshot = Some("export".into()),
                "NOEXPORT_SNAPSHOT" => snapshot = Some("nothing".into()),
                "USE_SNAPSHOT" => snapshot = Some("use".into()),
                _ => {}
            }
        }
    }
    Some(Command::Create {
        slot,
        temporary,
        logical,
        snapshot,
    })
}

fn start(tokens: &[Token]) -> Option<Command> {
    let [
        Token::Word(keyword),
        slot,
        Token::Word(kind),
        Token::Word(from),
        rest @ ..,
    ] = tokens
    else {
        return Some(Command::Unsupported("physical replication"));
    };
    if keyword != "SLOT" || kind != "LOGICAL" {
        return Some(Command::Unsupported("physical replication"));
    }
    let from = from.parse().ok()?;
    let options = if rest.is_empty() {
        Vec::new()
    } else {
        options(rest)?
    };
    Some(Command::Start {
        slot: identifier(slot)?,
        from,
        options,
    })
}

/// `( name [value], … )`
fn options(tokens: &[Token]) -> Option<Vec<(String, Option<String>)>> {
    let [Token::Sign('('), inner @ .., Token::Sign(')')] = tokens else {
        return None;
    };
    inner
        .split(|token| *token == Token::Sign(','))
        .map(|option| match option {
            [name] => Some((identifier(name)?, None)),
            [name, Token::Literal(value) | Token::Word(value)] => {
                Some((identifier(name)?, Some(value.clone())))
            }
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn create(snapshot: &str, temporary: bool) -> Option<Command> {
        let snapshot = Some(snapshot.to_owned());
        Some(Command::Create {
            slot: "s".into(),
            temporary,
            logical: true,
            snapshot,
        })
    }

    #[test]
    fn what_clients_send_is_understood() {
        assert_eq!(parse("IDENTIFY_SYSTEM"), Some(Command::IdentifySystem));
        assert_eq!(
            parse("SHOW terrace.status;"),
            Some(Command::Show("terrace.status".into()))
        );
        let text = "CREATE_REPLICATION_SLOT \"s\" LOGICAL \"pgoutput\" ( SNAPSHOT 'nothing')";
        assert_eq!(parse(text), create("nothing", false));
        let text = "CREATE_REPLICATION_SLOT \"s\" LOGICAL pgoutput (TWO_PHASE, FAILOVER, SNAPSHOT 'nothing')";
        assert_eq!(parse(text), create("nothing", false));
        let text = "CREATE_REPLICATION_SLOT \"s\" TEMPORARY LOGICAL pgoutput (SNAPSHOT 'export')";
        assert_eq!(parse(text), create("export", true));
        let text = "CREATE_REPLICATION_SLOT s LOGICAL pgoutput NOEXPORT_SNAPSHOT";
        assert_eq!(parse(text), create("nothing", false));
        let text = "START_REPLICATION SLOT \"s\" LOGICAL 0/1F (proto_version '3', streaming 'on', publication_names '\"p1\",\"p2\"')";
        let options = [
            ("proto_version", "3"),
            ("streaming", "on"),
            ("publication_names", "\"p1\",\"p2\""),
        ]
        .map(|(name, value)| (name.to_owned(), Some(value.to_owned())));
        let start = Command::Start {
            slot: "s".into(),
            from: Lsn(0x1f),
            options: options.to_vec(),
        };
        assert_eq!(parse(text), Some(start));
        let drop = Some(Command::Drop {
            slot: "a\"b".into(),
            wait: true,
        });
        assert_eq!(parse("DROP_REPLICATION_SLOT \"a\"\"b\" WAIT"), drop);
        assert_eq!(
            parse("SELECT pg_catalog.set_config('search_path', '', false);"),
            Some(Command::Sql)
        );
        assert_eq!(parse("START_REPLICATION SLOT s LOGICAL zz (a 'b')"), None);
        assert_eq!(
            parse("START_REPLICATION 0/0"),
            Some(Command::Unsupported("physical replication"))
        );
        assert_eq!(parse("SELECT 'open"), Some(Command::Sql));
    }
}
