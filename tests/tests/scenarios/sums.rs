//! Sums over tables: the same rows have the same sums, however they are come by.

use postgres::NoTls;
use terrace_tests::server::explain;
use terrace_tests::{top, wait_until};

// A snapshot of before a TRUNCATE shows no rows: that is no difference.
#[test]
fn a_table_that_is_written_anew_is_not_compared() {
    let (top, _scratch) = top();
    top.sql(
        "CREATE TABLE t (id int PRIMARY KEY); SELECT terrace.add_table('t');
         INSERT INTO t SELECT generate_series(1, 100)",
    );
    let compare = |between: &str| {
        let id = top.value("SELECT id FROM terrace.begin_comparison('t')");
        let mut reader = top.connect();
        let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1";
        reader.batch_execute(begin).expect("begin");
        top.sql(&format!("SELECT terrace.begin_slice({id}, 0)"));
        top.sql(between);
        let finish = format!("SELECT terrace.finish_slice({id}, 0); COMMIT");
        let done = reader.batch_execute(&finish);
        done.map_err(|error| terrace_tests::server::explain(&error))
    };
    compare("INSERT INTO t VALUES (101)").expect("compare");
    let rows = "SELECT rows FROM terrace.checksum WHERE range = -1";
    assert_eq!(top.value(rows), "100");
    let refused = compare("ALTER TABLE t ALTER id TYPE bigint").expect_err("compare");
    assert!(refused.contains("written anew"), "{refused}");
    compare("DELETE FROM t").expect("compare");
    // Nor is it altered while somebody waits for his turn.
    let id = top.value("SELECT id FROM terrace.begin_comparison('t')");
    let mut reader = top.connect();
    let hold = format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1; SELECT terrace.hold_compared({id})"
    );
    reader.batch_execute(&hold).expect("hold");
    let alter = "SET lock_timeout = '100ms'; ALTER TABLE t ADD v int";
    let refused = top.connect().batch_execute(alter).expect_err("alter");
    let refused = terrace_tests::server::explain(&refused);
    assert!(refused.contains("lock timeout"), "{refused}");
    drop(reader);
    top.sql("ALTER TABLE t ADD v int");
}

// However it is cut and whatever index there is, the sums are the same.
#[test]
fn a_large_table_is_compared_in_slices() {
    let (top, _scratch) = top();
    top.sql(
        "ALTER ROLE ALL SET terrace.compare_slice = '64MB'; ALTER ROLE ALL SET track_functions = 'all';
         CREATE TABLE near (id int PRIMARY KEY, pad char(400) DEFAULT '') WITH (fillfactor = 10);
         CREATE TABLE wide (id uuid PRIMARY KEY, pad char(40) DEFAULT '') WITH (fillfactor = 10);
         SELECT terrace.add_table('near'), terrace.add_table('wide');
         INSERT INTO near SELECT generate_series(1, 30000);
         INSERT INTO wide SELECT gen_random_uuid() FROM generate_series(1, 200000)",
    );
    let begin = |table: &str| {
        let made = format!("SELECT id || ' ' || slices FROM terrace.begin_comparison('{table}')");
        let made = top.value(&made);
        let (id, slices) = made.split_once(' ').expect("two numbers");
        (id.to_owned(), slices.parse::<u32>().expect("slices"))
    };
    let (_, slices) = begin("wide");
    assert_eq!(slices, 1, "each slice would read the whole table");
    let (sliced, slices) = begin("near");
    assert!(slices > 1, "{slices} slices");
    for number in 0..slices {
        for step in ["begin", "finish"] {
            top.sql(&format!("SELECT terrace.{step}_slice({sliced}, {number})"));
        }
    }
    let sums = |slices: u32, filter: &str| {
        top.value(&format!(
            "SELECT string_agg(s::text, ' ' ORDER BY range)
             FROM terrace.comparison c, jsonb_populate_record(c, '{{\"slices\": {slices}}}') cut,
                 generate_series(0, {slices} - 1) number, terrace.checksums(cut, number, {filter}) s
             WHERE c.id = {sliced} AND s.range >= 0"
        ))
    };
    let calls = "SELECT sum(calls) >= 2 FROM pg_stat_user_functions WHERE funcname = 'sum_tables'";
    wait_until("slices are read by their pages", || top.value(calls) == "t");
    let wanted = sums(1, "NULL");
    let found = format!(
        "SELECT string_agg((range, rows, sum)::text, ' ' ORDER BY range), count(*)
         FROM terrace.checksum WHERE comparison = {sliced} AND range >= 0"
    );
    assert_eq!(top.rows(&found)[0], [wanted.as_str(), "100"]);
    let even = sums(1, "'id % 2 = 0'");
    assert!(even != wanted);
    assert_eq!(sums(slices, "'id % 2 = 0'"), even);

    let refused = |sql: &str| {
        let error = top.connect().batch_execute(sql).expect_err(sql);
        terrace_tests::server::explain(&error)
    };
    let beyond = refused(&format!("SELECT terrace.begin_slice({sliced}, {slices})"));
    assert!(beyond.contains("has no slice"), "{beyond}");
    let unknown = refused("SELECT terrace.begin_slice(77, 0)");
    assert!(unknown.contains("Compare again"), "{unknown}");
    top.sql("ALTER TABLE near DROP CONSTRAINT near_pkey");
    assert_eq!(sums(slices, "NULL"), wanted, "without its index");
    assert_eq!(sums(slices, "'id % 2 = 0'"), even);
    top.sql("ALTER TABLE near ALTER id DROP NOT NULL; INSERT INTO near VALUES (NULL)");
    let odd = sums(1, "NULL");
    assert!(odd != wanted);
    assert_eq!(sums(slices, "NULL"), odd, "a row without a key");
    let altered = refused(&format!("SELECT terrace.begin_slice({sliced}, 0)"));
    assert!(altered.contains("was altered while"), "{altered}");
}

#[test]
fn rows_are_summed_alike_where_they_say_the_same() {
    let (top, _scratch) = top();
    top.sql(
        "CREATE TYPE mood AS ENUM ('sad'); CREATE DOMAIN small AS smallint CHECK (value < 100);
         CREATE DOMAIN padded AS char(5);
         CREATE TABLE far (t text, p text); ALTER TABLE far ALTER t SET STORAGE EXTERNAL;
         INSERT INTO far SELECT repeat('far ', 10000), repeat('near', 10000)",
    );
    top.sql("CREATE DATABASE latin TEMPLATE template1");
    top.sql(
        "UPDATE pg_database SET encoding = pg_char_to_encoding('LATIN1'), datcollate = 'C', datctype = 'C'
         WHERE datname = 'latin'",
    );
    let mut latin = top.config();
    let mut latin = latin.dbname("latin").connect(NoTls).expect("connect");
    latin
        .batch_execute("CREATE EXTENSION terrace")
        .expect("extension");
    let mut client = top.connect();
    let mut sums = |queries: &[&str], bounds: &str| {
        let sums = "SELECT coalesce(string_agg(concat_ws('/', range, rows, sum), ' '), '') FROM terrace.sum_rows($1, $2::text::bigint[])";
        let row = client.query_one(sums, &[&queries, &bounds]);
        row.map(|row| row.get::<_, String>(0))
            .map_err(|error| explain(&error))
    };
    let mut of = |row: &str| sums(&[&format!("SELECT 0, {row}")], "{}").expect("sums");
    for (one, other) in [
        ("7::int2, -7::int4, 7::int8", "7::int8, -7::int2, 7::oid"),
        ("7::small, '2024-02-29'::date", "7, '2024-02-29'::date"),
        ("'sad'::mood", "'sad'::text"),
        ("'ab'::char(5), 'é'::char(40)", "'ab'::varchar, 'é'::text"),
        ("repeat(' ', 40)::char(40)", "''"),
        ("'ab '::padded", "'ab'::text"),
        (
            "t, p FROM far",
            "repeat('far ', 10000), repeat('near', 10000)",
        ),
        ("NULL::int, NULL::mood", "NULL::text, NULL::jsonb"),
        (
            "'[1,3)'::int4range, ARRAY[1.50]",
            "'[1,2]'::int4range, '{1.50}'::text",
        ),
    ] {
        assert_eq!(of(one), of(other), "{one} and {other}");
    }
    for (one, other) in [
        ("'a', 'bc'", "'ab', 'c'"),
        ("NULL, ''", "'', NULL"),
        ("NULL::int", "0"),
        ("1.0::numeric", "1.00::numeric"),
        ("0.0::float8", "-0.0::float8"),
        ("'ab '::text", "'ab'::text"),
        ("'ab '::bpchar", "'ab'::bpchar"),
        ("'\\x00'::bytea", "'\\x0000'::bytea"),
        ("repeat('x', 33)", "repeat('x', 32)"),
        ("repeat('x', 90000), 1", "repeat('x', 90000) || 'y', 1"),
        ("repeat('x', 90000)", "repeat('x', 90001)"),
        ("1::int8", "4294967297"),
    ] {
        assert_ne!(of(one), of(other), "{one} and {other}");
    }
    let foreign = "SELECT string_agg(concat_ws('/', range, rows, sum), ' ')
        FROM terrace.sum_rows(ARRAY['SELECT 0, ''Größe''::text, ''é ''::char(9), ''{é}''::text[]'], '{}')";
    let foreign: String = latin.query_one(foreign, &[]).expect("sums").get(0);
    assert_eq!(foreign, of("'Größe', 'é', '{é}'"));

    let many = "SELECT g, g FROM generate_series(1, 30) g";
    let parts = [
        "SELECT g, g FROM generate_series(16, 30) g",
        "SELECT g, g FROM generate_series(15, 1, -1) g",
    ];
    let whole = sums(&[many], "{10,20,40}").expect("sums");
    assert_eq!(sums(&parts, "{10,20,40}").expect("sums"), whole);
    let rows: Vec<&str> = whole.split(['/', ' ']).collect();
    assert_eq!(
        [rows[0], rows[1], rows[3], rows[4], rows[6], rows[7]],
        ["0", "9", "1", "10", "2", "11"]
    );
    assert_eq!(sums(&["SELECT 1 WHERE false"], "{}").expect("sums"), "");
    for (query, reason) in [
        ("SELECT 'a'", "is an integer"),
        ("SELECT", "is an integer"),
        ("SELECT 1, 1 / 0", "division by zero"),
        ("DELETE FROM far RETURNING 1", "not allowed"),
        ("COMMIT", "was not run"),
    ] {
        let refused = sums(&[query], "{}").expect_err(query);
        assert!(refused.contains(reason), "{query}: {refused}");
    }
}

// Whatever its rows are like, and whatever others do to them.
#[test]
fn a_file_has_the_rows_that_a_query_has() {
    let (top, _scratch) = top();
    top.sql(
        r#"CREATE TYPE mood AS ENUM ('sad'); CREATE DOMAIN short AS int2;
           CREATE TABLE odd (gone int, b bool, id int8, c "char", s int2, k short, d date, x interval, u uuid, n name,
               t text, f text, z text, p char(20), v numeric, a int[], r int4range, m mood, w varbit, o oid)
               WITH (fillfactor = 60);
           ALTER TABLE odd ALTER f SET STORAGE EXTERNAL;
           CREATE FUNCTION fill(first int, last int) RETURNS void LANGUAGE sql AS $$
               INSERT INTO odd (id, b, c, s, k, d, x, u, n, t, f, z, p, v, a, r, m, w, o)
               SELECT g, g % 2 = 0, chr(65 + g % 26)::"char", -g % 300, g % 400,
                   CASE WHEN g % 3 > 0 THEN date '1999-01-01' - g END, g * interval '1 h',
                   CASE WHEN g % 5 > 0 THEN md5(g::text)::uuid END, 'n' || g, repeat('t', g % 150),
                   CASE g % 50 WHEN 0 THEN repeat('far', 3000) WHEN 1 THEN NULL ELSE '' END,
                   repeat('zip', g % 2000), 'p' || g, g / 7.0, ARRAY[g, NULL], int4range(g, g + 9),
                   CASE WHEN g % 7 > 0 THEN 'sad'::mood END, g::bit(32), g
               FROM generate_series(first, last) g $$;
           SELECT fill(1, 3000);
           ALTER TABLE odd DROP COLUMN gone;
           ALTER TABLE odd ADD later int DEFAULT 7, ADD word text DEFAULT 'later', ADD none text;
           INSERT INTO odd (id, later, none) VALUES (NULL, NULL, 'some'), (-5, 8, NULL);
           SELECT fill(3001, 4000);
           CREATE INDEX odd_id ON odd (id DESC); CREATE INDEX odd_pair ON odd (id, t);
           CREATE INDEX odd_s ON odd (s, c DESC); CREATE INDEX odd_k ON odd (k); CREATE INDEX odd_t ON odd (t)"#,
    );
    const INDEXES: [(&str, &str); 4] = [
        ("id", "odd_id"),
        ("id", "odd_pair"),
        ("s", "odd_s"),
        ("k", "odd_k"),
    ];
    let all = "none,b,id,c,s,k,d,x,u,n,t,f,z,p,v,a,r,m,w,o,word,later";
    let equal = |client: &mut postgres::Client, from_file: &str, by_query: &str| {
        let [from_file, by_query] = [from_file, by_query].map(|call| {
            let sql = format!("SELECT string_agg(s::text, ' ') FROM terrace.{call} s");
            let row = client.query_one(&sql, &[]).expect("sums");
            row.get::<_, Option<String>>(0).unwrap_or_default()
        });
        assert_eq!(from_file, by_query);
        from_file
    };
    let both = |client: &mut postgres::Client, key: Option<&str>, columns: &str| {
        let (place, bounds) = (key.unwrap_or("0"), "'{0,50,3500}'");
        let named = key.map_or("NULL".into(), |key| format!("'{key}'"));
        let file = format!("ARRAY['odd'::regclass::oid], {named}, '{{{columns}}}', {bounds}");
        let query = format!("SELECT {place}, {columns} FROM odd");
        for index in INDEXES.iter().filter(|index| index.0 == place) {
            for (first, before) in [("NULL", "0"), ("0", "70"), ("70", "3200"), ("3200", "NULL")] {
                equal(
                    client,
                    &format!(
                        "sum_tables({file}, ARRAY['{}'::regclass::oid], {first}, {before})",
                        index.1
                    ),
                    &format!(
                        "sum_rows(ARRAY['{query} WHERE {place} >= {} AND {place} < {}'], {bounds})",
                        first.replace("NULL", "-1000"),
                        before.replace("NULL", "10000")
                    ),
                );
            }
        }
        equal(
            client,
            &format!("sum_tables({file}, NULL, NULL, NULL)"),
            &format!("sum_rows(ARRAY['{query}'], {bounds})"),
        )
    };
    let (mut reader, mut writer) = (top.connect(), top.connect());
    let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1";
    reader.batch_execute(begin).expect("begin");
    let before = both(&mut reader, Some("id"), all);
    assert_eq!(before.split(' ').count(), 4, "{before}");
    for key in [Some("id"), Some("s"), Some("k"), None] {
        both(&mut reader, key, "word");
        both(&mut reader, key, "o,b,t");
    }
    for step in [
        "DELETE FROM odd WHERE id % 3 = 0",
        "UPDATE odd SET t = t || '!', id = id + 1 WHERE id % 4 = 1",
        "UPDATE odd SET later = 9 WHERE id % 5 = 1",
        "BEGIN; SELECT fill(5000, 5100); ROLLBACK",
        "BEGIN; SELECT fill(6000, 6100); DELETE FROM odd WHERE id < 90; SAVEPOINT s;
         DELETE FROM odd WHERE id < 200; ROLLBACK TO s; SELECT FROM odd WHERE id < 200 FOR UPDATE",
    ] {
        writer.batch_execute(step).expect(step);
    }
    let old = both(&mut reader, Some("id"), all);
    assert_eq!(old, before, "the old snapshot");
    let own = both(&mut writer, Some("id"), all);
    reader.batch_execute("COMMIT").expect("commit");
    let between = both(&mut reader, Some("id"), all);
    assert!(between != before && between != own);
    writer.batch_execute("COMMIT").expect("commit");
    writer.batch_execute("VACUUM odd").expect("vacuum");
    assert_eq!(
        both(&mut reader, Some("id"), all),
        own,
        "pages that all see"
    );
    writer
        .batch_execute("BEGIN; DELETE FROM odd")
        .expect("delete");
    assert_eq!(both(&mut reader, Some("id"), all), own);
    assert_eq!(both(&mut writer, Some("id"), all), "");
    writer
        .batch_execute("COMMIT; TRUNCATE odd")
        .expect("truncate");
    assert_eq!(both(&mut reader, None, all), "");

    for (table, column, reason) in [
        ("odd", "nobody", "has no column \"nobody\""),
        ("odd", "gone", "has no column \"gone\""),
        ("odd", "ctid", "has no column \"ctid\""),
        ("pg_tables", "tablename", "does not keep its rows in a heap"),
    ] {
        let sql = format!(
            "SELECT terrace.sum_tables(ARRAY['{table}'::regclass::oid], NULL, '{{{column}}}', '{{}}', NULL, NULL, NULL)"
        );
        let error = explain(&reader.batch_execute(&sql).expect_err(column));
        assert!(error.contains(reason), "{error}");
    }
    let sql = "SELECT terrace.sum_tables(ARRAY['odd'::regclass::oid], 'id', '{id}', '{}', ARRAY['odd_t'::regclass::oid], 1, 2)";
    let error = explain(&reader.batch_execute(sql).expect_err("texts"));
    assert!(error.contains("not one of integers"), "{error}");
}

// What is computed here may be a column like others at the top, and need not be in the file.
#[test]
fn computed_columns_are_summed_as_they_are_read() {
    let (top, _scratch) = top();
    let virtual_ = top.value("SELECT current_setting('server_version_num')::int >= 180000") == "t";
    let kind = if virtual_ { "VIRTUAL" } else { "STORED" };
    top.sql(&format!(
        "CREATE TABLE plain (id int PRIMARY KEY, a int, twice int);
         CREATE TABLE computed (id int PRIMARY KEY, a int, twice int GENERATED ALWAYS AS (a * 2) {kind});
         INSERT INTO plain SELECT g, g, g * 2 FROM generate_series(1, 100) g;
         INSERT INTO computed SELECT g, g FROM generate_series(1, 100) g;
         SELECT terrace.add_table('plain')"
    ));
    let [plain, computed] = ["plain", "computed"].map(|table| {
        top.value(&format!(
            "SELECT string_agg(s::text, ' ') FROM terrace.begin_comparison('plain') c,
                 jsonb_populate_record(c, '{{\"relname\": \"{table}\"}}') other, terrace.checksums(other, 0, NULL) s"
        ))
    });
    assert_eq!(plain, computed);
}

// An ALTER that waits for a comparison makes everybody else wait for it.
#[test]
fn a_table_that_somebody_waits_for_is_summed_without_rests() {
    let (top, _scratch) = top();
    top.sql("CREATE TABLE t (id int, pad text DEFAULT repeat('x', 500)); INSERT INTO t SELECT generate_series(1, 200000)");
    // What is seen of its rests.
    let rests = |mut reader: postgres::Client| {
        let sql = "SELECT pg_backend_pid()";
        let pid: i32 = reader.query_one(sql, &[]).expect("pid").get(0);
        let sum = "SELECT terrace.sum_tables(ARRAY['t'::regclass::oid], NULL, '{id,pad}', '{}', NULL, NULL, NULL)";
        let sum = std::thread::spawn(move || reader.batch_execute(&format!("{sum}; COMMIT")));
        let rest = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE pid = {pid} AND wait_event_type = 'Extension'"
        );
        let mut seen = 0;
        while !sum.is_finished() {
            seen += usize::from(top.value(&rest) == "1");
        }
        sum.join().expect("no panic").expect("sums");
        seen
    };
    assert!(rests(top.connect()) > 0);
    let mut reader = top.connect();
    reader
        .batch_execute("BEGIN; LOCK TABLE t IN ACCESS SHARE MODE")
        .expect("lock");
    let mut other = top.connect();
    let alter = std::thread::spawn(move || other.batch_execute("ALTER TABLE t ADD v int"));
    let waits = "SELECT count(*) FROM pg_locks WHERE relation = 't'::regclass AND NOT granted";
    wait_until("it waits", || top.value(waits) == "1");
    assert_eq!(rests(reader), 0);
    alter.join().expect("no panic").expect("alter");
}
