//! How one row is told from the others: by a key, by an index, by all that is in it, by where it was
//! written.

use crate::layouts::flows;

#[test]
fn rows_are_told_by_an_index_by_all_columns_and_by_keys_out_of_line() {
    let schema = "
        CREATE TABLE by_index (id int PRIMARY KEY, code text NOT NULL, v text);
        CREATE UNIQUE INDEX by_code ON by_index (code);
        ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_code;
        CREATE TABLE index_only (a int NOT NULL, b text NOT NULL, v text);
        CREATE UNIQUE INDEX index_ab ON index_only (b, a);
        ALTER TABLE index_only REPLICA IDENTITY USING INDEX index_ab;
        CREATE TABLE by_all (id int PRIMARY KEY, big text, v int);
        ALTER TABLE by_all ALTER big SET STORAGE EXTERNAL, REPLICA IDENTITY FULL;
        CREATE TABLE by_nothing (id int PRIMARY KEY, big text, v int);
        ALTER TABLE by_nothing ALTER big SET STORAGE EXTERNAL, REPLICA IDENTITY NOTHING;
        CREATE TABLE all_keyless (a int, big text, v int);
        ALTER TABLE all_keyless ALTER big SET STORAGE EXTERNAL;
        CREATE TABLE big_key (k text PRIMARY KEY, n int, w text);
        ALTER TABLE big_key ALTER k SET STORAGE EXTERNAL, ALTER w SET STORAGE EXTERNAL;
        CREATE TABLE big_code (id int PRIMARY KEY, k text NOT NULL, n int);
        ALTER TABLE big_code ALTER k SET STORAGE EXTERNAL;
        CREATE UNIQUE INDEX big_k ON big_code (k);
        ALTER TABLE big_code REPLICA IDENTITY USING INDEX big_k;
        SELECT terrace.add_table(r) FROM unnest('{by_index, index_only, by_all, by_nothing, all_keyless, big_key,
                                                  big_code}'::regclass[]) r";
    // 2,500 bytes go into an index and stand out of line.
    let changes = "
        INSERT INTO by_index SELECT {n} + g, 'code ' || {n} + g, 'v' FROM generate_series(1, 50) g;
        UPDATE by_index SET v = 'w' WHERE id > {n} + 40;
        UPDATE by_index SET code = code || '!' WHERE id = {n} + 1;
        UPDATE by_index SET id = id + 500 WHERE id = {n} + 2;
        UPDATE by_index SET id = id + 500, code = 'both {n}' WHERE id = {n} + 3;
        BEGIN; UPDATE by_index SET code = 'x' WHERE id = {n} + 4;
        UPDATE by_index SET code = 'code {n} again' WHERE code = 'x'; COMMIT;
        DELETE FROM by_index WHERE id BETWEEN {n} + 6 AND {n} + 9;
        INSERT INTO index_only SELECT g, 'b {n}', NULL FROM generate_series(1, 50) g;
        UPDATE index_only SET v = b WHERE a < 10;
        UPDATE index_only SET a = -a WHERE a = 11;
        DELETE FROM index_only WHERE a = 12;
        INSERT INTO by_all SELECT {n} + g, repeat(g::text, 5000), g FROM generate_series(1, 12) g;
        UPDATE by_all SET v = v + 1 WHERE id > {n};
        UPDATE by_all SET big = repeat('changed', 2000) WHERE id = {n} + 1;
        UPDATE by_all SET id = id + 500 WHERE id = {n} + 2;
        UPDATE by_all SET big = NULL, v = NULL WHERE id = {n} + 3;
        DELETE FROM by_all WHERE id = {n} + 4;
        INSERT INTO by_nothing SELECT id, big, v FROM by_all WHERE id > {n};
        UPDATE by_nothing SET v = -1 WHERE id > {n} + 5;
        UPDATE by_nothing SET id = id + 700 WHERE id = {n} + 6;
        DELETE FROM by_nothing WHERE id = {n} + 7;
        INSERT INTO all_keyless SELECT g / 2, repeat('k', 9000), 1 FROM generate_series(1, 8) g;
        UPDATE all_keyless SET v = 2 WHERE ctid = (SELECT min(ctid) FROM all_keyless WHERE v = 1);
        UPDATE all_keyless SET big = repeat('l', 9000) WHERE ctid = (SELECT max(ctid) FROM all_keyless WHERE v = 1);
        DELETE FROM all_keyless WHERE ctid = (SELECT max(ctid) FROM all_keyless WHERE v = 1 AND big LIKE 'k%');
        INSERT INTO big_key SELECT repeat(chr(96 + g), 2500) || {n}, g, repeat('w', 5000) FROM generate_series(1, 20) g;
        UPDATE big_key SET n = n + 100 WHERE n < 10;
        UPDATE big_key SET w = 'short' WHERE n = 11;
        UPDATE big_key SET k = repeat('#', 2500) || {n} WHERE n = 12;
        UPDATE big_key SET n = 1012, w = NULL WHERE n = 12;
        DELETE FROM big_key WHERE n = 13;
        DO $$ BEGIN FOR i IN 14..20 LOOP FOR j IN 1..5 LOOP UPDATE big_key SET n = n + 20, w = nullif(w, 'w') WHERE n = i + 20 * (j - 1); COMMIT; END LOOP; END LOOP; END $$;
        INSERT INTO big_code SELECT {n} + g, repeat(chr(96 + g), 2500) || {n}, g FROM generate_series(1, 20) g;
        UPDATE big_code SET n = n + 100 WHERE n < 10 AND id > {n};
        UPDATE big_code SET id = id + 500 WHERE id = {n} + 11;
        UPDATE big_code SET k = repeat('#', 2500) || {n} WHERE id = {n} + 12;
        UPDATE big_code SET n = 1012 WHERE n = 12;
        DELETE FROM big_code WHERE n = 13";
    let tables = [
        "by_index",
        "index_only",
        "by_all",
        "by_nothing",
        "all_keyless",
        "big_key",
        "big_code",
    ];
    let tree = flows(schema, ["", ""], changes, &tables);
    let told = "SELECT string_agg(relreplident::text, '' ORDER BY relname) FROM pg_class \
                WHERE relname IN ('by_index', 'by_nothing')";
    // NOTHING would have every UPDATE refused at the top.
    assert_eq!(tree.top.value(told), "if");
    for node in &tree.nodes {
        assert_eq!(node.server.value(told), "if", "{}", node.server.name);
        assert!(node.bridge.logged().contains("applied set-wise"));
        let out_of_line =
            "SELECT pg_relation_size(reltoastrelid) > 0 FROM pg_class WHERE relname = 'big_key'";
        assert_eq!(node.server.value(out_of_line), "t", "{}", node.server.name);
    }
}

// Rows without a key may be equal, and yet be written in different ways.
#[test]
fn of_rows_that_are_equal_the_one_that_is_meant_is_changed() {
    let schema = "
        CREATE TABLE k (f float8, n numeric, i interval, c bpchar, x int);
        CREATE TABLE none ();
        CREATE TABLE made (a int GENERATED ALWAYS AS (1) STORED);
        SELECT terrace.add_table(r) FROM unnest('{k, none, made}'::regclass[]) r";
    let changes = "
        INSERT INTO k SELECT f, n, i, c, {n} FROM unnest('{0,-0}'::float8[]) f,
            unnest('{1.0,1.00}'::numeric[]) n, unnest('{1 mon,30 days}'::interval[]) i, unnest('{x,\"x \"}'::bpchar[]) c;
        UPDATE k SET x = x + 1 WHERE f::text = '-0' AND n::text = '1.00' AND i::text = '30 days' AND x = {n};
        DELETE FROM k WHERE f::text = '-0' AND n::text = '1.0' AND i::text = '30 days';
        UPDATE k SET n = 2, x = NULL WHERE octet_length(c) = 2 AND n::text = '1.0' AND x = {n};
        INSERT INTO none SELECT FROM generate_series(1, 3);
        INSERT INTO made SELECT FROM generate_series(1, 3);
        DELETE FROM none WHERE ctid = (SELECT min(ctid) FROM none);
        DELETE FROM made WHERE ctid = (SELECT min(ctid) FROM made)";
    let same = [
        "k",
        "(SELECT count(*) FROM none)",
        "(SELECT count(*) FROM made)",
    ];
    flows(schema, ["", ""], changes, &same);
}

// PostgreSQL 18 publishes what is generated if it is told to, and refuses to change such rows otherwise.
#[test]
fn rows_without_a_key_have_generated_columns_which_may_be_others_below() {
    let schema = "
        CREATE TABLE k (a int, twice int GENERATED ALWAYS AS (a * 2) STORED, v text);
        CREATE TABLE later (a int, v text);
        SELECT terrace.add_table('k'), terrace.add_table('later')";
    let region = "
        CREATE TABLE k (v text, a int, twice int GENERATED ALWAYS AS (a * 3) STORED);
        CREATE TABLE later (a int, v text, g0 int GENERATED ALWAYS AS (a + 0) STORED)";
    let changes = "
        INSERT INTO k (a, v) SELECT {n} + g % 50, 'v' FROM generate_series(1, 100) g;
        INSERT INTO later (a, v) SELECT {n} + g % 50, 'v' FROM generate_series(1, 100) g;
        SELECT terrace.replicate_ddl('ALTER TABLE later ADD COLUMN g{n} int GENERATED ALWAYS AS (a + {n}) STORED');
        UPDATE k SET v = 'one', a = a + 1 WHERE ctid IN (SELECT min(ctid) FROM k WHERE a > {n} GROUP BY a);
        UPDATE later SET v = 'one', a = a + 1 WHERE ctid IN (SELECT min(ctid) FROM later WHERE a > {n} GROUP BY a);
        DELETE FROM k WHERE ctid = (SELECT max(ctid) FROM k);
        DELETE FROM later WHERE ctid = (SELECT max(ctid) FROM later)";
    let tree = flows(
        schema,
        [region, ""],
        changes,
        &["(SELECT a, v FROM k)", "later"],
    );
    let there = &tree.nodes[0].server;
    let computed = there.value("SELECT bool_and(twice = a * 3) AND count(*) > 200 FROM k");
    assert_eq!(computed, "t");
}

// An UPDATE of a synchronised table without its key was refused at the top.
#[test]
fn a_key_may_be_dropped_and_made_anew() {
    let schema = "
        CREATE TABLE keyed (id int PRIMARY KEY, v text);
        CREATE TABLE by_index (code int NOT NULL, v text);
        CREATE UNIQUE INDEX by_code ON by_index (code);
        ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_code;
        CREATE TABLE parted (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
        CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (5000);
        SELECT terrace.add_table(r) FROM unnest('{keyed, by_index, parted}'::regclass[]) r";
    // Without its key a table may have rows that are equal, all of them in one or two of a kind.
    let changes = ["keyed", "by_index", "parted"].map(|table| {
        let (key, drop, make, tell) = match table {
            "by_index" => (
                "code",
                "DROP INDEX by_code",
                "CREATE UNIQUE INDEX by_code ON by_index (code)",
                "ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_code",
            ),
            _ => (
                "id",
                "ALTER TABLE {t} DROP CONSTRAINT {t}_pkey",
                "ALTER TABLE {t} ADD PRIMARY KEY (id)",
                match table {
                    "parted" => "ALTER TABLE parted_1 REPLICA IDENTITY DEFAULT",
                    _ => "ALTER TABLE keyed REPLICA IDENTITY DEFAULT",
                },
            ),
        };
        "INSERT INTO {t} SELECT {n} + g, 'v' FROM generate_series(1, 20) g;
         SELECT terrace.replicate_ddl('{drop}');
         INSERT INTO {t} SELECT {n} + g, 'v' FROM generate_series(1, 10) g;
         UPDATE {t} SET v = 'w' WHERE ctid IN (SELECT min(ctid) FROM {t} WHERE {key} > {n} GROUP BY {key});
         UPDATE {t} SET {key} = {key} + 500 WHERE {key} = {n} + 20;
         DELETE FROM {t} WHERE {key} > {n} AND v = 'v';
         SELECT terrace.replicate_ddl('{make}');
         SELECT terrace.replicate_ddl('{tell}');
         UPDATE {t} SET v = 'x' WHERE {key} = {n} + 3;
         DELETE FROM {t} WHERE {key} = {n} + 4"
            .replace("{drop}", drop)
            .replace("{make}", make)
            .replace("{tell}", tell)
            .replace("{key}", key)
            .replace("{t}", table)
    });
    let tables = ["keyed", "by_index", "parted"];
    let tree = flows(schema, ["", ""], &changes.join(";\n"), &tables);
    let told = "SELECT string_agg(relname || ' ' || relreplident::text, ', ' ORDER BY relname) FROM pg_class \
                WHERE relname IN ('keyed', 'by_index', 'parted_1')";
    let below = tree.nodes.iter().map(|node| &node.server);
    for server in below.chain([&tree.top]) {
        let found = server.value(told);
        assert_eq!(found, "by_index i, keyed d, parted_1 d", "{}", server.name);
    }
}

// It was told by the rest of its key: others went with it.
#[test]
fn a_row_whose_key_is_generated_is_told_by_all_that_is_in_it() {
    let schema = "
        CREATE TABLE t (grp text, seq int, g text GENERATED ALWAYS AS (lower(grp)) STORED, v text,
                        PRIMARY KEY (g, seq));
        CREATE TABLE doc (doc jsonb, id text GENERATED ALWAYS AS (doc ->> 'id') STORED PRIMARY KEY);
        SELECT terrace.add_table('t'), terrace.add_table('doc')";
    let changes = "
        INSERT INTO t (grp, seq, v) SELECT x, {n} + g, x FROM unnest('{A,B,C}'::text[]) x, generate_series(1, 5) g;
        UPDATE t SET v = 'new' WHERE grp = 'A' AND seq > {n} + 2;
        UPDATE t SET grp = 'D' WHERE grp = 'B' AND seq = {n} + 1;
        DELETE FROM t WHERE grp = 'C' AND seq > {n};
        INSERT INTO doc (doc) SELECT jsonb_build_object('id', {n} + g, 'n', 0) FROM generate_series(1, 5) g;
        UPDATE doc SET doc = doc || '{\"n\": 1}' WHERE id > ({n} + 2)::text;
        DELETE FROM doc WHERE id = ({n} + 5)::text";
    flows(schema, ["", ""], changes, &["t", "doc"]);
}

// A part of a key of this server alone was taken for a key.
#[test]
fn a_key_that_the_top_does_not_send_tells_no_row() {
    let schema = "CREATE TABLE event (at date, v text); SELECT terrace.add_table('event')";
    let region = "CREATE TABLE event (at date, v text, n bigserial, PRIMARY KEY (at, n))";
    let changes = "
        INSERT INTO event SELECT '2026-01-01'::date + {n}, chr(97 + g) FROM generate_series(1, 9) g;
        UPDATE event SET v = v || '!' WHERE v = 'b';
        DELETE FROM event WHERE v IN ('c', 'd')";
    flows(
        schema,
        [region, region],
        changes,
        &["(SELECT at, v FROM event)"],
    );
}

// A row type is null by SQL's IS NULL when all in it is; a cast to text may be anybody's.
#[test]
fn a_value_of_a_row_type_is_told_from_no_value_whatever_casts_there_are() {
    let schema = "
        CREATE TYPE pair AS (a int, b text);
        CREATE FUNCTION as_text(pair) RETURNS text IMMUTABLE LANGUAGE sql RETURN $1.a || '/' || $1.b;
        CREATE CAST (pair AS text) WITH FUNCTION as_text(pair);
        CREATE TABLE k (p pair, v int); SELECT terrace.add_table('k')";
    let changes = "
        INSERT INTO k VALUES (ROW(NULL, NULL), {n}), (NULL, {n}), (ROW({n}, 'x'), {n}), (ROW({n}, 'y'), {n});
        UPDATE k SET v = v + 1 WHERE (p).b = 'x' AND v = {n};
        DELETE FROM k WHERE (p).b = 'y' AND v = {n};
        DELETE FROM k WHERE num_nulls(p) = 1";
    let below = "
        CREATE TYPE pair AS (a int, b text);
        CREATE FUNCTION as_text(pair) RETURNS text IMMUTABLE LANGUAGE sql RETURN $1.a || '/' || $1.b;
        CREATE CAST (pair AS text) WITH FUNCTION as_text(pair);";
    flows(
        schema,
        [below, ""],
        changes,
        &["(SELECT format('%s', p), num_nulls(p), v FROM k)"],
    );
}

// From PostgreSQL 17 on a partition has the identity column of the whole, and can have no other.
#[test]
fn an_identity_column_may_be_that_of_a_partitioned_table() {
    let schema = "
        CREATE TABLE p (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text) PARTITION BY RANGE (id);
        CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (1) TO (100);
        CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (100) TO (10000) PARTITION BY RANGE (id);
        CREATE TABLE p2a PARTITION OF p2 FOR VALUES FROM (100) TO (10000);
        SELECT terrace.add_table('p')";
    let changes = "
        INSERT INTO p (v) SELECT 'v' FROM generate_series(1, 70);
        UPDATE p SET v = 'new' WHERE id % 10 = 3 AND v = 'v';
        DELETE FROM p WHERE id % 10 = 4";
    flows(schema, ["", ""], changes, &["p"]);
}
