//! Records what a real walsender says, for the decoder's tests in `bridge/tests/pgoutput.rs`.

use std::fmt::Write;

use terrace_tests::{Scratch, Server, ServerOptions};

const SETUP: &str = "
    CREATE SCHEMA \"Übung\";
    CREATE TYPE mood AS ENUM ('calm', 'cross');
    CREATE TABLE item (id int PRIMARY KEY, name text, price numeric(10,2), feels mood, long text);
    ALTER TABLE item ALTER long SET STORAGE EXTERNAL;
    CREATE TABLE whole (a int, b text);
    ALTER TABLE whole REPLICA IDENTITY FULL;
    CREATE TABLE \"Übung\".\"a \"\"b\" (x int NOT NULL, y varchar(9), z int);
    CREATE UNIQUE INDEX pair ON \"Übung\".\"a \"\"b\" (x);
    ALTER TABLE \"Übung\".\"a \"\"b\" REPLICA IDENTITY USING INDEX pair;
    CREATE TABLE log (at timestamptz, ok bool, bytes bytea, list int[], doc jsonb, ratio float8);
    ALTER TABLE log REPLICA IDENTITY NOTHING;
    CREATE TABLE child (item int REFERENCES item);
    SELECT pg_replication_origin_create('elsewhere');
    CREATE PUBLICATION terrace FOR ALL TABLES;";

/// One transaction each.
const STORY: &[&str] = &[
    "INSERT INTO item VALUES (1, 'tea', 1.50, 'calm', repeat('x', 2100)), (2, NULL, NULL, NULL, '')",
    "UPDATE item SET name = 'green tea' WHERE id = 1",
    "UPDATE item SET id = 3, feels = 'cross' WHERE id = 1",
    "DELETE FROM item WHERE id = 2",
    "INSERT INTO whole VALUES (1, 'it''s \\ \"é\"'), (NULL, NULL)",
    "UPDATE whole SET b = 'new' WHERE a = 1",
    "DELETE FROM whole WHERE a IS NULL",
    "INSERT INTO \"Übung\".\"a \"\"b\" VALUES (1, 'one', 10)",
    "UPDATE \"Übung\".\"a \"\"b\" SET z = 11",
    "UPDATE \"Übung\".\"a \"\"b\" SET x = 2",
    "DELETE FROM \"Übung\".\"a \"\"b\"",
    "INSERT INTO log VALUES ('2024-02-29 12:00:00.25+02', true, '\\x00ff', '{1,NULL}', \
     '{\"a\": [1]}', 0.1)",
    "BEGIN; SAVEPOINT s; INSERT INTO whole VALUES (7, 'gone'); ROLLBACK TO s; \
     INSERT INTO whole VALUES (8, 'kept'); COMMIT",
    "ALTER TABLE whole ADD c int DEFAULT 5",
    "INSERT INTO whole VALUES (9, 'wider', NULL)",
    "TRUNCATE log",
    "TRUNCATE item CASCADE",
    "TRUNCATE whole, log RESTART IDENTITY",
    "BEGIN; SELECT pg_logical_emit_message(true, 'terrace', '{\"tag\": \"7\"}'); \
     INSERT INTO whole VALUES (10, 'tagged', 1); COMMIT",
    "SELECT pg_logical_emit_message(false, 'other', 'é'::bytea || '\\x00ff')",
    "BEGIN; SELECT pg_replication_origin_session_setup('elsewhere'); \
     SELECT pg_replication_origin_xact_setup('1/2', '2024-02-29 12:00:00+00'); \
     INSERT INTO whole VALUES (11, 'from elsewhere', 1); COMMIT",
];

/// `cargo test -p terrace-tests streams:: -- --ignored` writes the file of the
/// PostgreSQL that PG_CONFIG names.
#[test]
#[ignore = "writes into the source tree"]
fn record_the_streams() {
    let scratch = Scratch::new("terrace-").expect("scratch");
    let options = ServerOptions {
        top: true,
        extension: false,
        ..Default::default()
    };
    let server = Server::start(&scratch, "recorded", &options).expect("boot");
    server.sql(SETUP);
    server.sql("SELECT pg_create_logical_replication_slot('s', 'pgoutput')");
    let version = server.value("SHOW server_version");
    let mut text = format!(
        "# pgoutput, protocol 1, as PostgreSQL {version} sends it; written by tests/tests/scenarios/streams.rs.\n\
         # After each statement its messages: LSN, and the bytes in hex.\n"
    );
    let settings = "SET timezone = 'UTC'; SET datestyle = 'ISO'; SET extra_float_digits = 3; \
                    SET bytea_output = hex;";
    for statement in STORY {
        server.sql(statement);
        let changes = format!(
            "{settings} SELECT lsn, encode(data, 'hex') FROM pg_logical_slot_get_binary_changes(
                 's', NULL, NULL,
                 'proto_version', '1', 'publication_names', 'terrace', 'messages', 'true')"
        );
        let statement: Vec<&str> = statement.split_whitespace().collect();
        writeln!(text, "\n# {}", statement.join(" ")).expect("write");
        for row in server.rows(&changes) {
            writeln!(text, "{} {}", row[0], row[1]).expect("write");
        }
    }
    let major = version.split(['.', ' ']).next().unwrap_or_default();
    let path = format!(
        "{}/../bridge/tests/streams/postgresql-{major}.txt",
        env!("CARGO_MANIFEST_DIR")
    );
    std::fs::write(path, text).expect("write the file");
}
