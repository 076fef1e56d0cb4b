//! Tables that look different below than at the top, or are changed in ways that few are:
//! by the copy, in order and piled up, on two levels.

use terrace_tests::load::{STEPS, fill_partitions};
use terrace_tests::{Server, Tree, wait_until};

use super::stalls::wait_stalled;

const ONE: [(&str, Option<&str>, usize); 1] = [("region", None, 1)];
const CHAIN: [(&str, Option<&str>, usize); 2] =
    [("region", None, 1), ("branch", Some("region"), 1)];

/// Each statement of `sql` as a transaction of its own, with `from` in place of `{n}`.
fn run(top: &Server, sql: &str, from: i32) {
    let sql = sql.replace("{n}", &from.to_string());
    let mut client = top.connect();
    for statement in sql.split(";\n").filter(|text| !text.trim().is_empty()) {
        let done = client.batch_execute(statement);
        done.unwrap_or_else(|error| {
            panic!("{statement}: {}", terrace_tests::server::explain(&error))
        });
    }
}

/// Runs `changes` before the copy, in order, and while the bridges are stopped; what
/// `tables` select must be the same everywhere each time. `below` is run on the servers of
/// region and branch before their bridges start.
pub fn flows(schema: &str, below: [&str; 2], changes: &str, tables: &[&str]) -> Tree {
    let mut tree = Tree::plant(schema).expect("boot the top");
    run(&tree.top, changes, 0);
    tree.boot(&CHAIN).expect("boot the servers");
    for (node, sql) in tree.nodes.iter().zip(below) {
        node.server.sql(sql);
    }
    tree.start_bridges().expect("start the bridges");
    tree.wait_streaming();
    tree.wait_for_equal(tables);
    run(&tree.top, changes, 1000);
    tree.wait_for_equal(tables);
    for node in &mut tree.nodes {
        node.bridge.stop();
    }
    run(&tree.top, changes, 2000);
    tree.start_bridges_on_a_pile();
    tree.wait_streaming();
    tree.wait_for_equal(tables);
    tree.must_have_no_conflict();
    tree
}

// Of equal rows in two partitions below both were changed: a row's place is one only within
// its partition.
#[test]
fn a_table_may_be_partitioned_below() {
    let schema = "
        CREATE TABLE sale (id int, day date, v text, PRIMARY KEY (id, day));
        CREATE TABLE visit (day date, v text);
        SELECT terrace.add_table('sale'), terrace.add_table('visit')";
    // The branch has nothing beforehand: it gets what region has.
    let below = "
        CREATE TABLE sale (id int, day date, v text, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
        CREATE TABLE sale_old PARTITION OF sale FOR VALUES FROM (MINVALUE) TO ('2026-01-01');
        CREATE TABLE sale_new PARTITION OF sale FOR VALUES FROM ('2026-01-01') TO (MAXVALUE);
        CREATE TABLE visit (day date, v text) PARTITION BY LIST (v);
        CREATE TABLE visit_a PARTITION OF visit FOR VALUES IN ('a');
        CREATE TABLE visit_other PARTITION OF visit DEFAULT PARTITION BY HASH (day);
        CREATE TABLE visit_other_0 PARTITION OF visit_other FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE visit_other_1 PARTITION OF visit_other FOR VALUES WITH (MODULUS 2, REMAINDER 1)";
    let changes = "
        INSERT INTO sale SELECT {n} + g, '2025-12-25'::date + g, 'new' FROM generate_series(1, 20) g;
        INSERT INTO visit SELECT '2026-01-01'::date + {n} + g / 2, chr(97 + g % 3) FROM generate_series(1, 30) g;
        UPDATE sale SET day = '2026-02-02' WHERE id = {n} + 1;
        UPDATE sale SET day = '2025-02-02', v = 'back' WHERE id IN ({n} + 1, {n} + 19);
        UPDATE sale SET id = id + 100, day = '2026-03-03' WHERE id = {n} + 2;
        DELETE FROM sale WHERE id IN ({n} + 3, {n} + 18);
        UPDATE visit SET v = 'b' WHERE day = '2026-01-03'::date + {n};
        UPDATE visit SET v = 'a' WHERE ctid = (SELECT min(ctid) FROM visit WHERE v = 'b');
        DELETE FROM visit WHERE ctid = (SELECT max(ctid) FROM visit WHERE v = 'a');
        DELETE FROM visit WHERE ctid = (SELECT min(ctid) FROM visit);
        BEGIN; TRUNCATE visit; INSERT INTO visit SELECT '2026-01-01', v FROM unnest('{a,a,b,c}'::text[]) v; COMMIT;
        UPDATE visit SET v = 'd' WHERE ctid = (SELECT min(ctid) FROM visit)";
    let tree = flows(schema, [below, ""], changes, &["sale", "visit"]);
    for node in &tree.nodes {
        let spread = "SELECT count(DISTINCT tableoid) FROM sale";
        assert_eq!(node.server.value(spread), "2", "{}", node.server.name);
    }
}

// By range and list there, by year or not at all here; partitions there had to have tables of
// their names here.
#[test]
fn a_table_may_be_partitioned_in_another_way_below() {
    let schema = "
        CREATE TABLE sale (id int, day date, v text, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
        CREATE TABLE sale_25a PARTITION OF sale FOR VALUES FROM ('2025-01-01') TO ('2025-07-01');
        CREATE TABLE sale_25b PARTITION OF sale FOR VALUES FROM ('2025-07-01') TO ('2026-01-01');
        CREATE TABLE sale_26 PARTITION OF sale FOR VALUES FROM ('2026-01-01') TO ('2027-01-01') PARTITION BY RANGE (id);
        CREATE TABLE sale_26_few PARTITION OF sale_26 FOR VALUES FROM (MINVALUE) TO (1030);
        CREATE TABLE sale_26_rest PARTITION OF sale_26 DEFAULT;
        CREATE TABLE visit (day date, v text) PARTITION BY LIST (v);
        CREATE TABLE visit_a PARTITION OF visit FOR VALUES IN ('a', 'it''s');
        CREATE TABLE visit_rest PARTITION OF visit DEFAULT;
        CREATE TABLE spot (id int PRIMARY KEY, v text) PARTITION BY HASH (id);
        CREATE TABLE spot_0 PARTITION OF spot FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE spot_1 PARTITION OF spot FOR VALUES WITH (MODULUS 2, REMAINDER 1);
        CREATE TABLE cell (id int, k text) PARTITION BY LIST (k);
        CREATE TABLE cell_a PARTITION OF cell FOR VALUES IN ('a', 'b') PARTITION BY HASH (id, (upper(k)));
        CREATE TABLE cell_a_0 PARTITION OF cell_a FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE cell_a_1 PARTITION OF cell_a FOR VALUES WITH (MODULUS 2, REMAINDER 1);
        CREATE TABLE cell_c PARTITION OF cell DEFAULT;
        SELECT terrace.add_table(r) FROM unnest('{sale, visit, spot, cell}'::regclass[]) r";
    let below = "
        CREATE TABLE sale (id int, day date, v text, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
        CREATE TABLE sale_old PARTITION OF sale FOR VALUES FROM (MINVALUE) TO ('2026-01-01');
        CREATE TABLE sale_new PARTITION OF sale FOR VALUES FROM ('2026-01-01') TO (MAXVALUE);
        CREATE TABLE visit (day date, v text);
        CREATE TABLE spot (id int PRIMARY KEY, v text);
        CREATE TABLE cell (k text, id int);
        CREATE ROLE keeper NOLOGIN; GRANT CREATE ON SCHEMA public TO keeper; ALTER TABLE cell OWNER TO keeper";
    let changes = "
        INSERT INTO sale SELECT {n} + g, '2025-06-20'::date + g, 'new' FROM generate_series(1, 20) g;
        INSERT INTO sale SELECT {n} + g, '2025-12-20'::date + g, 'new' FROM generate_series(21, 40) g;
        INSERT INTO visit SELECT '2026-01-01'::date + {n} + g / 2, chr(97 + g % 3) FROM generate_series(1, 30) g;
        INSERT INTO spot SELECT {n} + g, 'x' FROM generate_series(1, 100) g;
        UPDATE sale SET day = '2026-02-02' WHERE id = {n} + 1;
        UPDATE sale SET day = '2025-02-02', v = 'back' WHERE id IN ({n} + 1, {n} + 39);
        UPDATE sale SET v = 'sold' WHERE day > '2026-01-05' AND id % 2 = 0;
        UPDATE sale SET id = id + 100, day = '2025-08-03' WHERE id = {n} + 2;
        DELETE FROM sale WHERE id IN ({n} + 3, {n} + 38);
        UPDATE visit SET v = 'it''s' WHERE day = '2026-01-03'::date + {n};
        UPDATE visit SET v = 'a' WHERE ctid = (SELECT min(ctid) FROM visit_rest) AND tableoid = 'visit_rest'::regclass;
        DELETE FROM visit_a WHERE ctid = (SELECT max(ctid) FROM visit_a);
        BEGIN; TRUNCATE visit_a; INSERT INTO visit VALUES ('2026-01-01', 'a'), ('2026-01-01', 'it''s'), ('2026-01-01', 'a'); COMMIT;
        TRUNCATE sale_25a, sale_26_rest;
        INSERT INTO sale SELECT {n} + g, '2025-03-20', 'again' FROM generate_series(1, 5) g;
        UPDATE spot SET v = 'y', id = id + 500 WHERE id % 7 = 0;
        DELETE FROM spot WHERE id % 5 = 0;
        TRUNCATE spot_1;
        INSERT INTO cell SELECT {n} + g, chr(97 + g % 3) FROM generate_series(1, 60) g;
        TRUNCATE cell_a_0;
        INSERT INTO cell SELECT {n} + g, chr(97 + g % 3) FROM generate_series(1, 30) g";
    let tables = ["sale", "visit", "spot", "(SELECT id, k FROM cell)"];
    let role = "CREATE ROLE keeper NOLOGIN; GRANT CREATE ON SCHEMA public TO keeper";
    let tree = flows(schema, [below, role], changes, &tables);
    for node in &tree.nodes {
        let parts = "SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class \
                     WHERE relkind IN ('r', 'p') AND relname ~ '^(sale|visit|spot|cell)'";
        let shown = node.server.value(parts);
        assert_eq!(
            shown, "cell sale sale_new sale_old spot visit",
            "{}",
            node.server.name
        );
    }

    // Policies hide nothing from what is to be removed, be it the owner that they are for.
    for node in &tree.nodes {
        node.server.sql(
            "ALTER TABLE cell ENABLE ROW LEVEL SECURITY; ALTER TABLE cell FORCE ROW LEVEL SECURITY",
        );
    }
    tree.top
        .sql("TRUNCATE cell_a_0; INSERT INTO cell VALUES (-1, 'a'), (-2, 'a'), (-3, 'a')");
    // Partitions come with rows and without, and go with theirs; there their DDL is nothing here.
    tree.top.sql("ALTER DATABASE app SET session_preload_libraries = 'terrace'; ALTER DATABASE app SET terrace.ddl = on");
    for sql in [
        "CREATE TABLE sale_27 PARTITION OF sale FOR VALUES FROM ('2027-01-01') TO ('2028-01-01')",
        "INSERT INTO sale SELECT g, '2027-01-01'::date + g, 'late' FROM generate_series(1, 50) g",
        "CREATE TABLE sale_28 (LIKE sale INCLUDING ALL)",
        "INSERT INTO sale_28 SELECT g, '2028-01-01'::date + g, 'before' FROM generate_series(1, 50) g",
        "ALTER TABLE sale ATTACH PARTITION sale_28 FOR VALUES FROM ('2028-01-01') TO ('2029-01-01')",
        "UPDATE sale SET v = 'after' WHERE day > '2028-01-20'",
        "ALTER TABLE sale DETACH PARTITION sale_25b",
        "UPDATE sale_25b SET v = 'alone'; DELETE FROM sale_25b WHERE id % 2 = 0",
        "ALTER TABLE sale ATTACH PARTITION sale_25b FOR VALUES FROM ('2025-07-01') TO ('2026-01-01')",
        "ALTER TABLE sale_25a RENAME TO sale_early",
        "CREATE TABLE sale_29 PARTITION OF sale FOR VALUES FROM ('2029-01-01') TO ('2030-01-01') PARTITION BY RANGE (id)",
        "CREATE TABLE sale_29_all PARTITION OF sale_29 DEFAULT",
        "INSERT INTO sale SELECT g, '2029-01-01'::date + g, 'last' FROM generate_series(1, 50) g",
        "ALTER TABLE spot DETACH PARTITION spot_0",
        "UPDATE spot_0 SET v = 'apart'; DELETE FROM spot_0 WHERE id % 3 = 0",
        "ALTER TABLE spot ATTACH PARTITION spot_0 FOR VALUES WITH (MODULUS 2, REMAINDER 0)",
        "DROP TABLE sale_26, visit_a",
        "ALTER TABLE sale ADD COLUMN w int DEFAULT 7",
        "INSERT INTO sale VALUES (1, '2025-03-03', 'wide', 8)",
    ] {
        tree.top.sql(sql);
    }
    tree.wait_for_equal(&tables);
    tree.wait_streaming();
    let counts = "SELECT count(*) > 150 AND bool_and(day NOT BETWEEN '2026-01-01' AND '2026-12-31') FROM sale";
    assert_eq!(tree.nodes[1].server.value(counts), "t");
    let output = tree.nodes[1]
        .bridge
        .command("compare", &["--table", "sale"]);
    let output = output.expect("run compare");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    // What is synchronised no more stays as it is.
    let count = "SELECT count(*) FROM sale";
    let had = tree.nodes[1].server.value(count);
    tree.top
        .sql("SELECT terrace.remove_table('sale'); DROP TABLE sale_27");
    tree.top.sql("INSERT INTO spot VALUES (-1, 'after')");
    tree.wait_for_equal(&["spot"]);
    assert_eq!(tree.nodes[1].server.value(count), had);
    assert_eq!(
        tree.top
            .value("SELECT count(*) FROM terrace.partition WHERE relname LIKE 'sale%'"),
        "0"
    );
}

// One that was to be emptied for a copy could not be: PostgreSQL refuses TRUNCATE ONLY of it;
// and rows that it had were not seen, and those of the copy came on top.
#[test]
fn a_table_that_is_partitioned_below_is_emptied_for_a_new_copy() {
    let schema = "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT terrace.add_table('t');
                  INSERT INTO t SELECT g, 'x' FROM generate_series(1, 10) g";
    let mut tree = Tree::plant(schema).expect("boot the top");
    tree.boot(&ONE).expect("boot the server");
    tree.nodes[0].server.sql(
        "CREATE TABLE t (id int PRIMARY KEY, v text) PARTITION BY HASH (id);
         CREATE TABLE t_0 PARTITION OF t FOR VALUES WITH (MODULUS 2, REMAINDER 0);
         CREATE TABLE t_1 PARTITION OF t FOR VALUES WITH (MODULUS 2, REMAINDER 1);
         INSERT INTO t VALUES (100, 'somebody''s')",
    );
    tree.start_bridges().expect("start the bridge");
    let server = &tree.nodes[0].server;
    let reason = "SELECT coalesce(max(reason), '') FROM terrace.lag";
    wait_until("it is not emptied unasked", || {
        server.value(reason).contains("already has rows")
    });
    server.sql("TRUNCATE t");
    tree.wait_streaming();
    tree.wait_for_equal(&["t"]);
    tree.nodes[0].bridge.resync();
    let copies = "SELECT count(*) FROM terrace.events WHERE kind = 'resync'";
    wait_until("it copies anew", || tree.top.value(copies) == "1");
    tree.wait_streaming();
    tree.top.sql("UPDATE t SET v = 'y' WHERE id > 5");
    tree.wait_for_equal(&["t"]);
}

// Until DDL travels, a partition is made below first, and detached there by hand.
#[test]
fn partitions_are_attached_and_detached_in_traffic() {
    let tree = Tree::grow(
        "CREATE TABLE parted (a int, n bigint, PRIMARY KEY (a, n)) PARTITION BY LIST (a);
         CREATE TABLE parted_1 PARTITION OF parted FOR VALUES IN (1);
         SELECT terrace.add_table('parted')",
        &CHAIN,
    );
    let writing = fill_partitions(&tree.top);
    writing.go_on(20);
    for node in tree.nodes.iter().rev() {
        node.server
            .sql("CREATE TABLE parted_2 PARTITION OF parted FOR VALUES IN (2)");
    }
    tree.top.sql("CREATE TABLE parted_2 (LIKE parted)");
    tree.top
        .sql("ALTER TABLE parted ATTACH PARTITION parted_2 FOR VALUES IN (2)");
    writing.go_on(50);
    let rows = "SELECT count(*) > 20 FROM parted_2";
    for node in &tree.nodes {
        wait_until("its rows arrive", || node.server.value(rows) == "t");
    }
    // What is detached is synchronised no more, also when it is written to.
    tree.top.sql("ALTER TABLE parted DETACH PARTITION parted_2");
    writing.go_on(50);
    writing.stop();
    let all = "SELECT terrace.wait_for(pg_current_wal_lsn(), timeout => '30s')";
    assert_eq!(tree.top.value(all), "t");
    tree.wait_for_equal(&["parted_1", "parted_2"]);
    tree.top
        .sql("DELETE FROM parted_2; INSERT INTO parted VALUES (1, -1)");
    tree.wait_for_equal(&["parted_1"]);
    for node in &tree.nodes {
        assert_eq!(node.server.value(rows), "t", "{}", node.server.name);
        // Nor is it protected any more.
        node.server
            .sql("ALTER TABLE parted DETACH PARTITION parted_2");
        node.server.sql("INSERT INTO parted_2 VALUES (2, -2)");
    }
    tree.wait_for_equal(&["parted"]);
    tree.must_have_no_conflict();
}

#[test]
fn columns_stand_in_another_order_below_and_there_are_more() {
    let schema = "
        CREATE TABLE t (a int PRIMARY KEY, b text, c numeric, d date DEFAULT '2026-01-01');
        CREATE TABLE keyless (x int, y text);
        CREATE TABLE dropped (gone int, id int, w text, PRIMARY KEY (id));
        ALTER TABLE dropped DROP COLUMN gone;
        SELECT terrace.add_table(r) FROM unnest('{t, keyless, dropped}'::regclass[]) r";
    let region = "
        CREATE TABLE t (d date, extra text DEFAULT 'local', c numeric, a int PRIMARY KEY, b text);
        CREATE TABLE keyless (more int DEFAULT 7, y text, x int);
        CREATE TABLE dropped (w text, id int PRIMARY KEY)";
    // What region has of its own comes with its copy, so that the branch needs it too.
    let branch = "
        CREATE TABLE t (made int GENERATED ALWAYS AS (a * 2) STORED, extra text, b text, x serial,
                        a int PRIMARY KEY, c numeric, d date);
        CREATE TABLE keyless (x int, y text, more int DEFAULT 8, at timestamptz DEFAULT now());
        CREATE TABLE dropped (id int PRIMARY KEY, never text, w text)";
    let changes = "
        INSERT INTO t SELECT {n} + g, 'b' || g, g / 3.0 FROM generate_series(1, 200) g;
        DO $$ BEGIN FOR i IN 1..60 LOOP UPDATE t SET c = c * 10 WHERE a = {n} + i; COMMIT; END LOOP; END $$;
        DO $$ BEGIN FOR i IN 201..260 LOOP INSERT INTO t VALUES ({n} + i); COMMIT; END LOOP; END $$;
        UPDATE t SET b = NULL, d = '2025-05-05' WHERE a % 5 = 0 AND a > {n};
        SELECT terrace.replicate_ddl('COMMENT ON TABLE t IS ''a pile ends here''');
        UPDATE t SET a = a + 500 WHERE a % 7 = 0 AND a BETWEEN {n} AND {n} + 200;
        DELETE FROM t WHERE a % 11 = 0 AND a > {n};
        INSERT INTO dropped SELECT {n} + g, 'w' FROM generate_series(1, 50) g;
        UPDATE dropped SET w = id::text WHERE id > {n} + 10;
        INSERT INTO keyless SELECT {n}, 'same' FROM generate_series(1, 10);
        UPDATE keyless SET y = 'other' WHERE ctid = (SELECT min(ctid) FROM keyless);
        DELETE FROM keyless WHERE ctid = (SELECT max(ctid) FROM keyless)";
    let same = [
        "(SELECT a, b, c, d FROM t)",
        "(SELECT x, y FROM keyless)",
        "(SELECT id, w FROM dropped)",
    ];
    let tree = flows(schema, [region, branch], changes, &same);
    for (node, branch) in tree.nodes.iter().zip([false, true]) {
        let server = &node.server;
        assert!(node.bridge.logged().contains("applied set-wise"));
        // Of the copy, and of the stream; the branch has no default of its own.
        let extra = "SELECT bool_and(extra = 'local') FILTER (WHERE a < 1000) || ' ' || \
                     bool_and(extra IS NULL) FILTER (WHERE a > 1000) FROM t";
        let expected = if branch { "true true" } else { "true false" };
        assert_eq!(server.value(extra), expected, "{}", server.name);
    }
}

/// `start`, filled up to the 63 bytes that a name may have.
fn longest(start: &str) -> String {
    let mut name = start.to_owned();
    while name.len() + 2 <= 63 {
        name.push('ž');
    }
    name + &"x".repeat((63 - start.len()) % 2)
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn quote_literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

#[test]
fn names_are_quoted_and_long() {
    let names = [
        "Ša\"tna.%s $1 \\",
        "TABLE \"a\".b; -- 'x'",
        "TABLE \"a\".b; -- 'y'",
        "Stays: \"here\" *?",
    ]
    .map(longest);
    let [schema, table, other, apart] = names.each_ref().map(|name| quoted(name));
    let [key, column, odd] = [
        "select \"Key\", %I",
        "select \"Value\", \\n",
        "\t$$ :x ? 名前",
    ]
    .map(|start| quoted(&longest(start)));
    let sql = format!(
        "CREATE SCHEMA {schema};
         CREATE TABLE {schema}.{table} ({key} int PRIMARY KEY, {column} text, {odd} text);
         CREATE TABLE {schema}.{other} ({key} int, {column} text) PARTITION BY LIST ({key});
         CREATE TABLE {schema}.{odd} PARTITION OF {schema}.{other} DEFAULT;
         CREATE INDEX ON {schema}.{table} ({column});
         SELECT terrace.add_schema({name});
         SELECT terrace.remove_schema({name});
         CREATE TABLE {schema}.{apart} ({key} int)",
        name = quote_literal(&names[0])
    );
    let changes = format!(
        "INSERT INTO {schema}.{table} SELECT {{n}} + g, g::text FROM generate_series(1, 150) g;
         UPDATE {schema}.{table} SET {odd} = repeat({column}, 1000) WHERE {key} % 3 = 0;
         UPDATE {schema}.{table} SET {key} = {key} + 500 WHERE {key} = {{n}} + 5;
         DELETE FROM {schema}.{table} WHERE {key} % 10 = 0;
         INSERT INTO {schema}.{other} SELECT {{n}}, 'twice' FROM generate_series(1, 2);
         UPDATE {schema}.{other} SET {column} = 'once' WHERE ctid = (SELECT max(ctid) FROM {schema}.{other});
         DELETE FROM {schema}.{other} WHERE {column} = 'twice' AND {key} = {{n}}"
    );
    let tables = [format!("{schema}.{table}"), format!("{schema}.{other}")];
    let tables: Vec<&str> = tables.iter().map(String::as_str).collect();
    let tree = flows(&sql, ["", ""], &changes, &tables);
    for node in &tree.nodes {
        let there = format!(
            "SELECT count(*) FROM pg_class WHERE relname = {}",
            quote_literal(&names[3])
        );
        assert_eq!(node.server.value(&there), "0", "what is not added stays");
    }
}

// The first TRUNCATE of several tables that a session of the bridge met was left out.
#[test]
fn tables_are_truncated_one_by_one_and_together() {
    let schema = "
        CREATE TABLE a (id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, v text);
        CREATE TABLE b (id serial PRIMARY KEY, a int REFERENCES a);
        CREATE TABLE c (id int PRIMARY KEY, b int REFERENCES b);
        CREATE TABLE apart (b int REFERENCES b);
        CREATE TABLE stem (id int PRIMARY KEY, v text); CREATE TABLE twig (PRIMARY KEY (id)) INHERITS (stem);
        CREATE TABLE parted (id int PRIMARY KEY, v text) PARTITION BY HASH (id);
        CREATE TABLE parted_0 PARTITION OF parted FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE parted_1 PARTITION OF parted FOR VALUES WITH (MODULUS 2, REMAINDER 1);
        SELECT terrace.add_table(r) FROM unnest('{a, b, c, stem, twig, parted}'::regclass[]) r";
    let fill = "
        INSERT INTO a (v) SELECT 'v' FROM generate_series(1, 20) g;
        INSERT INTO b (a) SELECT id FROM a;
        INSERT INTO c SELECT id, id FROM b;
        INSERT INTO apart SELECT id FROM b;
        INSERT INTO stem SELECT g FROM generate_series(1, 5) g;
        INSERT INTO twig SELECT g FROM generate_series(6, 9) g;
        INSERT INTO parted SELECT g FROM generate_series(1, 20) g;\n";
    let changes = format!(
        "TRUNCATE c;
         TRUNCATE a, b, c, apart RESTART IDENTITY;
         TRUNCATE stem;
         TRUNCATE parted;
         {fill}
         INSERT INTO a (v) VALUES ('{{n}}');
         TRUNCATE ONLY stem;
         TRUNCATE parted_0;
         UPDATE stem SET v = 'left' WHERE id = 7;
         TRUNCATE b CASCADE;
         INSERT INTO b (a) SELECT id FROM a WHERE id > 5;
         BEGIN; TRUNCATE a RESTART IDENTITY CASCADE; INSERT INTO a (v) VALUES ('one'), ('two');
         INSERT INTO b (a) VALUES (1); TRUNCATE c, parted_1; COMMIT;
         BEGIN; SAVEPOINT s; TRUNCATE a, b, stem CASCADE; ROLLBACK TO s; UPDATE a SET v = 'kept'; COMMIT;
         BEGIN; TRUNCATE a CASCADE; ROLLBACK;
         BEGIN; INSERT INTO c VALUES (1, NULL); TRUNCATE c; INSERT INTO c VALUES (1, NULL), (2, NULL); COMMIT"
    );
    let tables = ["a", "b", "c", "stem", "ONLY stem", "twig", "parted"];
    let mut tree = flows(schema, ["", ""], &changes, &tables);
    for node in &mut tree.nodes {
        node.bridge.stop();
    }
    tree.top.sql("TRUNCATE a, b, c, apart, stem");
    tree.start_bridges().expect("start the bridges");
    tree.wait_streaming();
    tree.wait_for_equal(&tables);
    // One of the tables goes to one level alone, and is written to as it joins: a branch that
    // has no such table used to ask for it.
    for server in [&tree.top, &tree.nodes[0].server] {
        server.sql("CREATE TABLE near (id int PRIMARY KEY)");
    }
    tree.top.sql(
        "SELECT terrace.add_table('near', '{region}'); INSERT INTO near SELECT generate_series(1, 5)",
    );
    let near = &tree.nodes[0].server;
    let count = "SELECT count(*) FROM near";
    wait_until("its rows are there", || near.value(count) == "5");
    tree.top.sql("TRUNCATE near, stem");
    wait_until("and are gone", || near.value(count) == "0");
    tree.wait_for_equal(&tables);
    tree.wait_streaming();
    // Numbers begin anew on every server.
    tree.top.sql("INSERT INTO a (id, v) VALUES (500000, 'far')");
    let far = "SELECT last_value > 500000 FROM a_id_seq";
    for node in &tree.nodes {
        wait_until("it is ahead", || node.server.value(far) == "t");
    }
    tree.top
        .sql("TRUNCATE a RESTART IDENTITY CASCADE; INSERT INTO a (v) VALUES ('first')");
    tree.wait_for_equal(&tables);
    for node in &tree.nodes {
        assert_eq!(node.server.value(far), "f", "{}", node.server.name);
    }
}

#[test]
fn what_is_rolled_back_in_part_leaves_nothing() {
    let schema = "
        CREATE TABLE t (id int PRIMARY KEY, v text); ALTER TABLE t ALTER v SET STORAGE EXTERNAL;
        CREATE TABLE trace (id int, v text);
        SELECT terrace.add_table('t'), terrace.add_table('trace');
        CREATE FUNCTION churn(base int) RETURNS void LANGUAGE plpgsql AS $f$
        BEGIN
            FOR i IN 1..5000 LOOP
                BEGIN
                    INSERT INTO t VALUES (base * 6 + i / 2, 'loop');
                    INSERT INTO trace VALUES (i, 'kept');
                    IF i % 4 = 0 THEN RAISE EXCEPTION 'no'; END IF;
                EXCEPTION WHEN unique_violation OR raise_exception THEN
                    IF i % 100 = 0 THEN INSERT INTO trace VALUES (i, 'caught'); END IF;
                END;
            END LOOP;
        END $f$;
        ALTER DATABASE app SET logical_decoding_work_mem = '64kB'";
    let changes = "
        SELECT churn({n});
        BEGIN; INSERT INTO t VALUES (-{n} - 1, 'a'); SAVEPOINT one; UPDATE t SET v = 'b' WHERE id = -{n} - 1;
        SAVEPOINT two; DELETE FROM t WHERE id = -{n} - 1; INSERT INTO t VALUES (-{n} - 2, repeat('gone', 5000));
        ROLLBACK TO two; UPDATE t SET v = v || 'c' WHERE id = -{n} - 1; RELEASE two;
        INSERT INTO t VALUES (-{n} - 2, repeat('kept', 5000)); SAVEPOINT three;
        UPDATE t SET v = 'gone' WHERE id < 0; TRUNCATE trace; ROLLBACK TO three; ROLLBACK TO three;
        UPDATE t SET id = id - 3 WHERE id = -{n} - 2; COMMIT;
        BEGIN; SAVEPOINT all_of_it; DELETE FROM t; DELETE FROM trace; ROLLBACK TO all_of_it; COMMIT;
        BEGIN; INSERT INTO trace VALUES ({n}, 'gone'); ROLLBACK";
    let tree = flows(schema, ["", ""], changes, &["t", "trace"]);
    let gone = "SELECT count(*) FILTER (WHERE v LIKE '%gone%') || ' ' || (count(*) > 7000) FROM t";
    assert_eq!(tree.nodes[1].server.value(gone), "0 true");
}

// PostgreSQL turns the text of each value into the encoding of the database.
#[test]
fn a_database_below_may_have_another_encoding() {
    let schema = "CREATE TABLE word (id int PRIMARY KEY, w text);
        INSERT INTO word VALUES (1, 'né'); SELECT terrace.add_table('word');";
    let mut tree = Tree::plant(&format!("{STEPS} {schema}")).expect("boot the top");
    tree.boot(&[("region", None, 1), ("branch", Some("region"), 1)])
        .expect("boot the servers");
    for node in &mut tree.nodes {
        node.server.sql(
            "UPDATE pg_database SET encoding = pg_char_to_encoding('LATIN1'), datcollate = 'C', datctype = 'C'
             WHERE datname = 'app'",
        );
        node.server.restart().expect("restart");
    }
    tree.start_bridges().expect("start the bridges");
    tree.wait_streaming();
    let wanted = "é à ü ñ";
    tree.top
        .sql(&format!("INSERT INTO word VALUES (2, '{wanted}')"));
    tree.wait_for_equal(&["steps"]);
    // Many of them, which go set-wise, while the apply waits.
    let fill =
        "INSERT INTO word SELECT 10 + g, repeat('ö', g % 50) FROM generate_series(1, 5000) g;
        UPDATE word SET w = w || 'ß' WHERE id % 3 = 0; DELETE FROM word WHERE id % 7 = 0";
    tree.top.sql(fill);
    tree.top
        .sql("SELECT terrace.replicate_ddl('CREATE TABLE \"Größe\" (\"Länge\" int PRIMARY KEY)')");
    tree.top
        .sql("SELECT terrace.add_table('\"Größe\"'); INSERT INTO \"Größe\" VALUES (1)");
    let rows =
        "SELECT md5(string_agg(id || convert_to(w, 'UTF8')::text, ',' ORDER BY id)) FROM word";
    let sizes = "SELECT sum(\"Länge\") FROM \"Größe\"";
    for node in &tree.nodes {
        let server = &node.server;
        assert_eq!(server.value("SHOW server_encoding"), "LATIN1");
        wait_until("its rows are the top's", || {
            server.value("SELECT to_regclass('\"Größe\"') IS NOT NULL") == "t"
                && server.value(rows) == tree.top.value(rows)
                && server.value(sizes) == "1"
        });
    }
    let compared = tree.nodes[1]
        .bridge
        .command("compare", &["--table", "word"]);
    let compared = compared.expect("compare");
    let said = String::from_utf8_lossy(&compared.stdout).into_owned();
    assert!(compared.status.success(), "{said}");

    // One in a label keeps nothing back.
    tree.top
        .sql("BEGIN; SET LOCAL terrace.label = 'né 5 €'; INSERT INTO steps VALUES (9); COMMIT");
    for node in &tree.nodes {
        let noted = "SELECT label FROM terrace.delivery";
        wait_until("it is noted", || node.server.value(noted) == "n? 5 ?");
    }
    let told = "SELECT count(*) FROM terrace.lag WHERE last_label LIKE 'n_ 5 _'";
    wait_until("it is told", || tree.top.value(told) == "2");

    // A character that it cannot hold is a row that does not fit.
    tree.top.sql("INSERT INTO word VALUES (3, '5 €')");
    for node in &tree.nodes {
        wait_stalled(node, &["public.word", "encoding"]);
    }
}
