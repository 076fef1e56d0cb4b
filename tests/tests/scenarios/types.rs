//! Values of every type, through the initial copy and the stream, set-wise and in order,
//! on two levels.

use std::fmt::Write;

use terrace_tests::Tree;
use terrace_tests::histories::folded;

const DOMAINS: [(&str, Option<&str>, usize); 2] =
    [("region", None, 2), ("branch", Some("region"), 1)];

/// Types, and values at the edges of each. NULL is tried with all of them.
const TYPES: &[(&str, &[&str])] = &[
    ("boolean", &["true", "false"]),
    ("smallint", &["-32768", "32767", "0"]),
    ("integer", &["-2147483648", "2147483647"]),
    ("bigint", &["-9223372036854775808", "9223372036854775807"]),
    (
        "numeric",
        &[
            "'NaN'",
            "'Infinity'",
            "'-Infinity'",
            "repeat('9', 1000)::numeric",
            "('0.' || repeat('1', 1000))::numeric",
            "-1e-100",
            "0.00",
            "1.10",
        ],
    ),
    ("numeric(10,3)", &["-1234567.891", "0"]),
    (
        "real",
        &[
            "'NaN'",
            "'Infinity'",
            "'-Infinity'",
            "1.17549435e-38",
            "3.4028235e38",
            "'-0'",
            "0.1",
        ],
    ),
    (
        "double precision",
        &[
            "'NaN'",
            "'-Infinity'",
            "2.2250738585072014e-308",
            "1.7976931348623157e308",
            "5e-324",
            "0.1",
            "1::float8/3",
        ],
    ),
    (
        "money",
        &["'-92233720368547758.08'", "'92233720368547758.07'", "12.34"],
    ),
    (
        "text",
        &[
            "''",
            "' '",
            r#"E'\\\t\n\r\'"{},()NULL'"#,
            "'NULL'",
            r"'\N'",
            r"'\.'",
            "'čau — ☃ 𝄞'",
            "repeat(md5('x'), 5000)",
        ],
    ),
    ("varchar(10)", &["''", "'ten chars!'", "'a  '"]),
    ("char(5)", &["''", "'ab'", "'abcde'"]),
    ("\"char\"", &["'a'", "''", r"'\200'"]),
    ("name", &["'n'", "repeat('n', 63)"]),
    (
        "bytea",
        &[
            r"'\x'",
            r"'\x00ff5c27'",
            "decode(repeat('00ff', 20000), 'hex')",
        ],
    ),
    ("bit(7)", &["B'0000000'", "B'1010101'"]),
    ("bit varying", &["B''", "B'1'", "repeat('10', 500)::varbit"]),
    (
        "date",
        &[
            "'infinity'",
            "'-infinity'",
            "'4713-01-01 BC'",
            "'5874897-12-31'",
            "'2000-02-29'",
        ],
    ),
    ("time", &["'00:00'", "'24:00'", "'23:59:59.999999'"]),
    (
        "timetz",
        &["'00:00+15:59'", "'24:00-15:59'", "'12:34:56.789+05:30'"],
    ),
    (
        "timestamp",
        &[
            "'infinity'",
            "'-infinity'",
            "'4713-01-01 00:00:00 BC'",
            "'294276-12-31 23:59:59.999999'",
            "'2026-03-29 02:30'",
        ],
    ),
    (
        "timestamptz",
        &[
            "'infinity'",
            "'4713-01-02 00:00:00+00 BC'",
            "'294276-12-31 23:59:59.999999+00'",
            "'2026-10-25 02:30 Europe/Prague'",
            "'2026-10-25 00:30+00'",
        ],
    ),
    (
        "interval",
        &[
            "'-178000000 years'",
            "'178000000 years'",
            "'1 mon -1 day 00:00:00.000001'",
            "'0'",
            "'-1 year -2 mons +3 days -04:05:06'",
        ],
    ),
    (
        "uuid",
        &[
            "'00000000-0000-0000-0000-000000000000'",
            "'ffffffff-ffff-ffff-ffff-ffffffffffff'",
        ],
    ),
    (
        "inet",
        &["'0.0.0.0/0'", "'10.1.2.3'", "'::1'", "'2001:db8::/32'"],
    ),
    ("cidr", &["'10.0.0.0/8'", "'::/0'"]),
    ("macaddr", &["'08:00:2b:01:02:03'"]),
    ("macaddr8", &["'08:00:2b:01:02:03:04:05'"]),
    ("point", &["'(1.5,-2)'", "'(NaN,Infinity)'"]),
    ("line", &["'{1,2,3}'"]),
    ("lseg", &["'[(0,0),(1,1)]'"]),
    ("box", &["'((1,1),(0,0))'"]),
    ("path", &["'[(0,0),(1,1)]'", "'((0,0),(1,1))'"]),
    ("polygon", &["'((0,0),(1,0),(1,1))'"]),
    ("circle", &["'<(0,0),1.5>'"]),
    (
        "xml",
        &[
            r#"'<a b="c">d</a>'"#,
            "''",
            "'no element &amp; <![CDATA[<]]> é<!-- x -->'",
        ],
    ),
    (
        "json",
        &["'null'", r#"'{"b": 1,  "a":[1,2.50,"x\u0041"]}'"#, "'\"\"'"],
    ),
    (
        "jsonb",
        &["'null'", r#"'{"b": 1e400, "a": {"n": null}}'"#, "'[]'"],
    ),
    ("jsonpath", &["'$.a[*] ? (@ > 1)'"]),
    (
        "tsvector",
        &[
            "''",
            "to_tsvector('simple', 'the quick ''brown'' fox')",
            "'a:1A,2B b'",
        ],
    ),
    ("tsquery", &["'a & !b:A | c <-> d'"]),
    ("int4range", &["'empty'", "'(,)'", "'[1,5)'"]),
    ("int8range", &["'empty'", "'[-9223372036854775808,)'"]),
    ("numrange", &["'(1.0,2.50]'", "'[,3)'"]),
    ("tsrange", &["'[-infinity,\"2026-01-01 00:00\")'", "'(,)'"]),
    (
        "tstzrange",
        &["'[-infinity,infinity]'", "'[\"2026-01-01 00:00+00\",)'"],
    ),
    ("daterange", &["'[2026-01-01,2026-02-01)'"]),
    ("int4multirange", &["'{(,)}'", "'{[1,3),[5,7)}'"]),
    ("int8multirange", &["'{}'", "'{[1,3),[5,)}'"]),
    ("nummultirange", &["'{[1.50,2.0],(3,)}'"]),
    ("tsmultirange", &["'{[\"2026-01-01 00:00\",infinity)}'"]),
    ("tstzmultirange", &["'{(,\"2026-10-25 00:30+00\"]}'"]),
    (
        "datemultirange",
        &["'{[2026-01-01,2026-01-02),[2026-03-01,)}'"],
    ),
    ("pg_lsn", &["'0/0'", "'FFFFFFFF/FFFFFFFF'"]),
    ("oid", &["0", "4294967295"]),
    ("txid_snapshot", &["'10:20:10,14,15'"]),
    ("pg_snapshot", &["'10:20:10,14,15'"]),
    ("xid", &["'4294967295'"]),
    ("xid8", &["'18446744073709551615'"]),
    ("cid", &["'7'"]),
    ("tid", &["'(4294967295,65535)'"]),
    ("int2vector", &["'1 -2'"]),
    ("oidvector", &["'1 4294967295'"]),
    ("refcursor", &["'a \"b\"'"]),
    ("regclass", &["'pg_class'", "'\"k boolean\"'", "'-'"]),
    ("regtype", &["'shape.pair[]'", "'timestamp with time zone'"]),
    ("regproc", &["'pg_catalog.now'"]),
    ("regprocedure", &["'pg_catalog.abs(bigint)'"]),
    ("regoper", &["'pg_catalog.||/'"]),
    ("regoperator", &["'pg_catalog.+(integer,integer)'"]),
    ("regnamespace", &["'shape'"]),
    ("regrole", &["'pg_monitor'"]),
    ("regconfig", &["'simple'"]),
    ("regdictionary", &["'simple'"]),
    ("regcollation", &["'\"C\"'"]),
    (
        "integer[]",
        &["'{}'", "'{1,NULL,3}'", "'[-1:0]={1,2}'", "'{{1,2},{3,4}}'"],
    ),
    (
        "text[]",
        &[
            "'{}'",
            r#"'{"",NULL,"NULL","a,b","{}","\"","\\"," x "}'"#,
            "ARRAY[['a','b'],['c','d']]",
        ],
    ),
    ("numeric[]", &["'{NaN,1.50,NULL}'"]),
    (
        "timestamptz[]",
        &["ARRAY['infinity'::timestamptz, NULL, '2026-10-25 00:30+00']"],
    ),
    ("bytea[]", &[r#"ARRAY['\x00'::bytea, '\x', NULL]"#]),
    ("jsonb[]", &[r#"ARRAY['{"a": "b,c"}'::jsonb, NULL]"#]),
    ("int4range[]", &["ARRAY['[1,2)'::int4range, 'empty']"]),
    ("boolean[]", &["'{t,f,NULL}'"]),
    ("bit(3)[]", &["'{101,NULL}'"]),
    ("varbit[]", &["ARRAY[B'', B'10110']"]),
    ("inet[]", &["'{10.0.0.1/8,::1,NULL}'"]),
    ("macaddr[]", &["'{08:00:2b:01:02:03}'"]),
    ("money[]", &["'{-92233720368547758.08,12.34}'"]),
    ("uuid[]", &["'{00000000-0000-0000-0000-000000000000,NULL}'"]),
    ("date[]", &["ARRAY['infinity'::date, '4713-01-01 BC']"]),
    ("time[]", &["'{24:00:00,00:00:00.000001}'"]),
    (
        "interval[]",
        &["ARRAY[interval '-1 mon 2 days -3.5 s', NULL]"],
    ),
    ("float8[]", &["'{NaN,-Infinity,-0,0.1}'"]),
    ("xml[]", &[r#"ARRAY['<a b="1,2">{"}\</a>'::xml]"#]),
    (
        "tsvector[]",
        &["ARRAY['''a b'':1A c'::tsvector, ''::tsvector]"],
    ),
    (
        "int4multirange[]",
        &["ARRAY['{[1,2),[5,)}'::int4multirange, '{}']"],
    ),
    (
        "daterange[]",
        &["ARRAY['[2026-01-01,infinity]'::daterange, NULL]"],
    ),
    // Their elements stand apart by semicolons.
    ("box[]", &["'{(1,2),(0,0);(3,4),(-1,0.5)}'"]),
    ("point[]", &[r#"'{"(1,2)",NULL}'"#]),
    (
        "shape.hstore[]",
        &[r#"ARRAY['a=>"b,{}"'::shape.hstore, NULL]"#],
    ),
    ("shape.citext[]", &["ARRAY['MiXed'::shape.citext, 'a,b']"]),
    (
        "shape.ltree[]",
        &["ARRAY['Top.Science'::shape.ltree, ''::shape.ltree]"],
    ),
    (
        "shape.floats[]",
        &["ARRAY['[0.1,0.3)'::shape.floats, NULL]"],
    ),
    ("shape.mood", &["'sad'", "'čilý, \"ano\"'"]),
    (
        "shape.mood[]",
        &["ARRAY['sad', NULL, 'čilý, \"ano\"']::shape.mood[]"],
    ),
    ("shape.positive", &["1", "2147483647"]),
    ("shape.positive[]", &["'{1,2}'"]),
    ("shape.tags", &["'{}'", "'{\"a,b\",NULL}'"]),
    ("shape.feeling", &["'sad'"]),
    ("shape.feeling[]", &["'{sad,NULL}'"]),
    ("shape.short", &["''", "'abc'"]),
    ("shape.short[]", &["'{\"\",abc}'"]),
    (
        "shape.pair",
        &["ROW(1, 'a,\"b\"')", "ROW(NULL, NULL)", "ROW(NULL, '')"],
    ),
    ("shape.pair[]", &["ARRAY[ROW(1, '(')::shape.pair, NULL]"]),
    ("shape.floats", &["'[0.1,0.3)'", "'empty'"]),
    ("shape.hstore", &["''", r#"'a=>NULL, "b c"=>"d\"\\ "'"#]),
    ("shape.citext", &["'MiXed'", "''"]),
    ("shape.ltree", &["'Top.Science.Astronomy'", "''"]),
];

const SHAPES: &str = "
    CREATE SCHEMA shape;
    CREATE EXTENSION hstore SCHEMA shape; CREATE EXTENSION citext SCHEMA shape;
    CREATE EXTENSION ltree SCHEMA shape;
    CREATE TYPE shape.mood AS ENUM ('sad', 'čilý, \"ano\"');
    CREATE DOMAIN shape.positive AS int CHECK (VALUE > 0);
    CREATE DOMAIN shape.tags AS text[]; CREATE DOMAIN shape.feeling AS shape.mood;
    CREATE DOMAIN shape.short AS varchar(3);
    CREATE TYPE shape.pair AS (a int, b text);
    CREATE TYPE shape.floats AS RANGE (subtype = float8);";

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// One table a type: with the type as a value, and as a part of a whole row that is the
/// identity, as nothing else identifies a row there.
fn tables() -> (String, Vec<String>) {
    let (mut sql, mut names) = (SHAPES.to_owned(), Vec::new());
    for (of, _) in TYPES {
        let (keyed, keyless) = (format!("k {of}"), format!("f {of}"));
        write!(
            sql,
            "CREATE TABLE {} (id int PRIMARY KEY, v {of}, n int NOT NULL DEFAULT 0);
             CREATE TABLE {} (v {of}, id int, n int NOT NULL DEFAULT 0);",
            quoted(&keyed),
            quoted(&keyless)
        )
        .expect("write");
        names.extend([quoted(&keyed), quoted(&keyless)]);
    }
    for name in &names {
        write!(sql, "SELECT terrace.add_table('{name}'::regclass);").expect("write");
    }
    (sql, names)
}

/// Tables with a key, or without one.
const KEYED: &str = "k";
const KEYLESS: &str = "f";

/// Each value once, from this id on, and a NULL.
fn inserts(kind: &str, from: usize) -> String {
    let mut sql = String::new();
    for (of, values) in TYPES {
        let all = values.iter().copied().chain(["NULL"]);
        for (at, value) in all.enumerate() {
            let id = from + at;
            let name = quoted(&format!("{kind} {of}"));
            writeln!(
                sql,
                "INSERT INTO {name} (id, v) VALUES ({id}, ({value})::{of});"
            )
            .expect("write");
        }
    }
    sql
}

/// Changes beside the value, of the value, and removals.
fn changes(kind: &str, from: usize) -> String {
    let mut sql = String::new();
    for (of, values) in TYPES {
        let name = quoted(&format!("{kind} {of}"));
        let (last, next) = (values[values.len() - 1], from + 1);
        write!(
            sql,
            "UPDATE {name} SET n = n + 1 WHERE id >= {from};
                 UPDATE {name} SET v = ({last})::{of} WHERE id = {from};
                 UPDATE {name} SET v = NULL WHERE id = {next};
                 DELETE FROM {name} WHERE id = {from} + {};\n",
            values.len()
        )
        .expect("write");
    }
    sql
}

/// What each bridge has logged.
fn logged(tree: &Tree) -> impl Iterator<Item = String> {
    tree.nodes.iter().map(|node| node.bridge.logged())
}

/// Runs statements while no bridge does; gives the number of their transactions, and what the first bridge to apply
/// them then logs: a slave shows them as its master does, which may be few at a time.
fn pile_up(tree: &mut Tree, names: &[&str], kind: &str, sql: &str) -> (usize, String) {
    for node in &mut tree.nodes {
        node.bridge.stop();
    }
    let before = logged(tree).map(|log| log.len()).collect::<Vec<_>>();
    // What a table is comes before its first change, and what is new ends a pile.
    let tables = TYPES.iter().map(|(of, _)| quoted(&format!("{kind} {of}")));
    let first: String = tables
        .map(|name| format!("INSERT INTO {name} (id) VALUES (900);\n"))
        .collect();
    run(tree, &first);
    let transactions = run(tree, sql);
    tree.start_bridges_on_a_pile();
    tree.wait_streaming();
    tree.wait_for_equal(names);
    let master = tree.with_role("region", "master");
    let at = tree
        .nodes
        .iter()
        .position(|node| node.server.name == master);
    let at = at.expect("a master");
    let log = logged(tree).nth(at).expect("its log");
    (transactions, log[before[at]..].to_owned())
}

/// But for a few, which are sooner done in order.
fn all_are_folded((transactions, log): (usize, String)) {
    let folded = folded(&log);
    assert!(
        folded + 60 > transactions && !log.contains("applying"),
        "{folded} of {transactions}: {log}"
    );
}

/// Each statement by itself, so that they pile up as many transactions; gives their number.
fn run(tree: &Tree, sql: &str) -> usize {
    let mut client = tree.top.connect();
    let mut transactions = 0;
    for statement in sql
        .split_inclusive(";\n")
        .flat_map(|part| part.split(";\n"))
    {
        if !statement.trim().is_empty() {
            client.batch_execute(statement).unwrap_or_else(|error| {
                panic!("{statement}: {}", terrace_tests::server::explain(&error))
            });
            transactions += 1;
        }
    }
    transactions
}

#[test]
fn values_of_every_type_arrive_by_copy_and_stream() {
    let (schema, names) = tables();
    let mut tree = Tree::plant(&schema).expect("boot the top");
    // Through the copy.
    for kind in [KEYED, KEYLESS] {
        run(&tree, &inserts(kind, 0));
    }
    // What a server is set to must not matter.
    tree.boot(&DOMAINS).expect("boot");
    for (node, settings) in tree.nodes.iter().zip([
        "DateStyle = 'SQL, DMY'; ALTER DATABASE app SET IntervalStyle = 'sql_standard'",
        "TimeZone = 'Asia/Kathmandu'; ALTER DATABASE app SET extra_float_digits = -5; \
         ALTER DATABASE app SET array_nulls = off",
        "bytea_output = 'escape'; ALTER DATABASE app SET xmloption = 'document'; \
         ALTER DATABASE app SET default_transaction_read_only = on",
    ]) {
        node.server
            .sql(&format!("ALTER DATABASE app SET {settings}"));
    }
    tree.start_bridges().expect("start the bridges");
    tree.wait_streaming();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    tree.wait_for_equal(&names);
    // In order.
    for kind in [KEYED, KEYLESS] {
        run(&tree, &inserts(kind, 100));
        run(&tree, &changes(kind, 100));
    }
    tree.wait_for_equal(&names);
    // Piled up: what has a key, which is folded whatever is done to it, what has none and is only added to, and
    // what has none and is changed, which goes in order.
    let keyed = [inserts(KEYED, 200), changes(KEYED, 200), changes(KEYED, 0)].concat();
    all_are_folded(pile_up(&mut tree, &names, KEYED, &keyed));
    let keyless = inserts(KEYLESS, 200);
    all_are_folded(pile_up(&mut tree, &names, KEYLESS, &keyless));
    let rest = [changes(KEYLESS, 200), changes(KEYLESS, 0)].concat();
    pile_up(&mut tree, &names, KEYLESS, &rest);
    tree.must_have_no_conflict();
}
