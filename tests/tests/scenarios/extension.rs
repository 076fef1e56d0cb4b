//! What SQL users meet at the top.

use std::sync::{Arc, Mutex};

use postgres::NoTls;
use terrace_tests::server::explain;
use terrace_tests::{Server, top};

#[test]
fn tables_join_and_leave() {
    let (top, _scratch) = top();
    top.sql("CREATE TABLE keyed (id int PRIMARY KEY); CREATE TABLE bare (a int);
             CREATE SCHEMA shop; CREATE TABLE shop.price (id int PRIMARY KEY);
             SELECT terrace.add_table('keyed'), terrace.add_table('bare'), terrace.add_schema('shop')");
    let published = "SELECT string_agg(tablename, ' ' ORDER BY tablename) \
                     FROM pg_publication_tables WHERE pubname = 'terrace' AND schemaname <> 'terrace'";
    assert_eq!(top.value(published), "bare keyed price");
    assert_eq!(
        top.value("SELECT relreplident FROM pg_class WHERE relname = 'bare'"),
        "f"
    );
    top.sql("SELECT terrace.remove_table('keyed')");
    assert_eq!(top.value(published), "bare price");
    // A removed table can be written to, and joins again.
    top.sql("INSERT INTO keyed VALUES (1); SELECT terrace.add_table('keyed')");
    assert_eq!(top.value(published), "bare keyed price");
}

#[test]
fn wrong_calls_are_refused() {
    let (top, _scratch) = top();
    top.sql(
        "CREATE TABLE t (id int);
             SELECT terrace.create_domain('region'), terrace.create_domain('branch', 'region')",
    );
    for (sql, words) in [
        ("SELECT terrace.create_domain('region')", "already exists"),
        (
            "SELECT terrace.create_domain('Region 1')",
            "invalid domain name",
        ),
        (
            "SELECT terrace.create_domain('x', 'nowhere')",
            "\"nowhere\" does not exist",
        ),
        (
            "SELECT terrace.drop_domain('region')",
            "other domains are below it",
        ),
        (
            "SELECT terrace.add_schema('terrace')",
            "belongs to the system",
        ),
        (
            "SELECT terrace.remove_schema('public')",
            "is not synchronised",
        ),
        ("SELECT terrace.send('', 'x')", "channel name"),
        (
            "SELECT terrace.add_table('t'); SET terrace.label = '$LONG'; INSERT INTO t VALUES (1)",
            "terrace.label is too long",
        ),
    ] {
        let sql = &sql.replace("$LONG", &"x".repeat(1001));
        let error = top.connect().batch_execute(sql).expect_err(sql);
        assert!(
            explain(&error).contains(words),
            "{sql}: {}",
            explain(&error)
        );
    }
}

// By the number that programs go by, and with what to do instead.
#[test]
fn what_cannot_be_synchronised_is_refused_with_a_hint() {
    let (top, _scratch) = top();
    top.sql(
        "CREATE VIEW v AS SELECT 1; CREATE MATERIALIZED VIEW m AS SELECT 1; CREATE SEQUENCE s;
         CREATE UNLOGGED TABLE u (); CREATE TABLE t (id int PRIMARY KEY, v text);
         CREATE TABLE twice (id int PRIMARY KEY); SELECT terrace.add_table('twice');
         CREATE TABLE p (id int) PARTITION BY HASH (id);
         CREATE TABLE half (id int) PARTITION BY HASH (id);
         CREATE UNLOGGED TABLE half_0 PARTITION OF half FOR VALUES WITH (MODULUS 2, REMAINDER 0);
         CREATE FOREIGN DATA WRAPPER nothing; CREATE SERVER nowhere FOREIGN DATA WRAPPER nothing;
         CREATE FOREIGN TABLE f (id int) SERVER nowhere;
         SELECT terrace.create_domain('region')",
    );
    for (call, code, words) in [
        ("add_table('v')", "42809", "not a table"),
        ("add_table('m')", "42809", "not a table"),
        ("add_table('s')", "42809", "not a table"),
        ("add_table('f')", "42809", "not a table"),
        ("add_table('u')", "42809", "unlogged"),
        ("add_table('own')", "42809", "temporary or unlogged"),
        (
            "add_table('half')",
            "42809",
            "partition \"public.half_0\" of a synchronised table cannot be unlogged",
        ),
        ("add_table('pg_class')", "42809", "belongs to the system"),
        ("add_table('twice')", "42710", "synchronised already"),
        (
            "add_table('t', '{nowhere}')",
            "42704",
            "\"nowhere\" does not exist",
        ),
        ("add_table('t', '{}')", "22023", "no domain is named"),
        (
            "add_table('p', '{region}')",
            "0A000",
            "for some domains only",
        ),
        (
            "add_table('p', filter => 'id > 0')",
            "0A000",
            "cannot be synchronised in part",
        ),
        (
            "add_table('p', columns => '{id}')",
            "0A000",
            "cannot be synchronised in part",
        ),
        (
            "add_table('t', filter => 'id >')",
            "42601",
            "is no condition",
        ),
        (
            "add_table('t', filter => 'no > 1')",
            "42703",
            "is no condition",
        ),
        (
            "add_table('t', filter => 'id + 1')",
            "42804",
            "is no condition",
        ),
        (
            "add_table('t', filter => 'random() < 1')",
            "0A000",
            "cannot be published",
        ),
        (
            "add_table('t', filter => 'v IS NOT NULL')",
            "42P10",
            "outside its replica identity",
        ),
        (
            "add_table('t', filter => 'id > 0 AND v IS NULL')",
            "42P10",
            "outside its replica identity",
        ),
        (
            "add_table('t', columns => '{v}')",
            "42P10",
            "replica identity that are not listed",
        ),
        (
            "add_table('t', columns => '{id,no}')",
            "42703",
            "no column \"no\"",
        ),
        (
            "add_table('t', columns => '{id,id}')",
            "42701",
            "is listed twice",
        ),
        ("remove_table('t')", "42704", "not synchronised"),
        ("resend('t')", "42704", "is not synchronised"),
        ("begin_comparison('t')", "42704", "is not synchronised"),
        ("begin_comparison('v')", "42704", "not synchronised"),
        (
            "replicate_ddl('CREATE TABLE a (); CREATE TABLE b ()')",
            "22023",
            "takes one statement, not 2",
        ),
        ("replicate_ddl('')", "22023", "takes one statement, not 0"),
        (
            "replicate_ddl('CREATE TABEL a ()')",
            "42601",
            "syntax error",
        ),
        ("replicate_ddl(NULL)", "22023", "takes one statement"),
        (
            "replicate_ddl('CREATE INDEX CONCURRENTLY i ON t (v)')",
            "25001",
            "cannot be run by a function",
        ),
        (
            "replicate_ddl('DROP INDEX CONCURRENTLY t_pkey')",
            "25001",
            "cannot be run by a function",
        ),
        (
            "replicate_ddl('INSERT INTO t VALUES (1)')",
            "22023",
            "cannot be replicated as DDL",
        ),
    ] {
        let mut client = top.connect();
        client
            .batch_execute("CREATE TEMP TABLE own (id int)")
            .expect("a temporary table");
        let sql = format!("SELECT terrace.{call}");
        let error = client.batch_execute(&sql).expect_err(&sql);
        let said = error.as_db_error().expect("of the database");
        assert!(said.message().contains(words), "{call}: {said}");
        assert_eq!(said.code().code(), code, "{call}: {said}");
        assert!(said.hint().is_some(), "{call}: no hint");
    }
    let left = "SELECT count(*) FROM terrace.tables";
    assert_eq!(top.value(left), "1");
}

#[test]
fn a_partition_leaves_no_mark_when_it_is_detached_and_none_is_unlogged() {
    let (top, _scratch) = top();
    top.sql(
        "CREATE TABLE p (id int) PARTITION BY LIST (id); CREATE TABLE p_1 PARTITION OF p FOR VALUES IN (1);
         SELECT terrace.add_table('p')",
    );
    let marks = "SELECT (SELECT count(*) FROM pg_trigger WHERE tgrelid = 'p_1'::regclass AND tgname LIKE 'terrace%'),
        has_table_privilege('terrace_reader', 'p_1', 'SELECT')";
    let marked = |expected: [&str; 2]| assert_eq!(top.rows(marks), [expected]);
    marked(["1", "t"]);
    top.sql("ALTER TABLE p DETACH PARTITION p_1");
    marked(["0", "f"]);
    top.sql("ALTER TABLE p ATTACH PARTITION p_1 FOR VALUES IN (1)");
    marked(["1", "t"]);
    for sql in [
        "CREATE UNLOGGED TABLE p_2 PARTITION OF p FOR VALUES IN (2)",
        "CREATE UNLOGGED TABLE p_2 (id int); ALTER TABLE p ATTACH PARTITION p_2 FOR VALUES IN (2)",
        "ALTER TABLE p_1 SET UNLOGGED",
    ] {
        let error = top.connect().batch_execute(sql).expect_err(sql);
        let said = error.as_db_error().expect("of the database");
        assert_eq!(said.code().code(), "42809", "{sql}: {said}");
        assert!(said.message().contains("cannot be unlogged"), "{said}");
        assert!(
            said.hint().is_some_and(|hint| hint.contains("SET LOGGED")),
            "{said}"
        );
    }
}

/// Every transaction has one tag; rolled back and unsynchronised ones are told apart.
#[test]
fn each_transaction_is_tagged_once() {
    let (top, _scratch) = top();
    top.sql("CREATE TABLE t (id int PRIMARY KEY); SELECT terrace.add_table('t')");
    top.sql("SELECT pg_create_logical_replication_slot('look', 'pgoutput')");
    let messages = "SELECT count(*) FROM pg_logical_slot_get_binary_changes('look', NULL, NULL, \
         'proto_version', '1', 'publication_names', 'terrace', 'messages', 'true') \
         WHERE get_byte(data, 0) = ascii('M')";
    top.sql("BEGIN; INSERT INTO t VALUES (1); INSERT INTO t VALUES (2); UPDATE t SET id = 3 WHERE id = 1; COMMIT");
    assert_eq!(top.value(messages), "1");
    // What it says, and that it is what the session was told.
    let mut client = top.connect();
    let tag = "SELECT encode(data, 'escape') \
         FROM pg_logical_slot_get_binary_changes('look', NULL, NULL, \
         'proto_version', '1', 'publication_names', 'terrace', 'messages', 'true') \
         WHERE get_byte(data, 0) = ascii('M')";
    let sql = "SET terrace.sync = off; SET terrace.label = 'a label'; \
               BEGIN; INSERT INTO t VALUES (7); SELECT terrace.current_tag(); COMMIT";
    let told = terrace_tests::server::rows(&mut client, sql).expect("a tag");
    let said = top.value(tag);
    for part in [
        format!("\"tag\":\"{}\"", told[0][0]),
        "\"label\":\"a label\"".to_owned(),
        "\"sync\":false".to_owned(),
        "\"user\":\"postgres\"".to_owned(),
    ] {
        assert!(said.contains(&part), "{part}: {said}");
    }
    top.sql("BEGIN; INSERT INTO t VALUES (5); ROLLBACK");
    assert_eq!(top.value(messages), "0");
    top.sql("CREATE TABLE apart (id int); INSERT INTO apart VALUES (1)");
    assert_eq!(top.value(messages), "0");
}

#[test]
fn unlogged_tables_of_a_schema_are_left_out_and_named() {
    let (top, _scratch) = top();
    top.sql("CREATE SCHEMA s; CREATE UNLOGGED TABLE s.u (id int); CREATE TABLE s.t (id int PRIMARY KEY)");
    let said = notices(&top, "SELECT terrace.add_schema('s')");
    assert!(
        said.contains("unlogged table \"s.u\" stays at the top"),
        "{said}"
    );
    let said = notices(&top, "CREATE UNLOGGED TABLE s.v (id int)");
    assert!(said.contains("unlogged table \"s.v\" stays"), "{said}");
    assert_eq!(notices(&top, "CREATE TABLE s.w (id int PRIMARY KEY)"), "");
    assert_eq!(top.value("SELECT count(*) FROM terrace.tables"), "2");
}

#[test]
fn a_domain_goes_and_names_the_slot_that_it_leaves() {
    let (top, _scratch) = top();
    top.sql("SELECT terrace.create_domain('region'), terrace.create_domain('apart')");
    top.sql("SELECT pg_create_logical_replication_slot('terrace_region', 'pgoutput')");
    assert_eq!(notices(&top, "SELECT terrace.drop_domain('apart')"), "");
    let said = notices(&top, "SELECT terrace.drop_domain('region')");
    assert!(said.contains("\"terrace_region\" goes on"), "{said}");
    assert_eq!(top.value("SELECT count(*) FROM terrace.domains"), "0");
}

#[test]
fn dropping_the_extension_leaves_nothing() {
    let (top, _scratch) = top();
    top.sql("CREATE TABLE t (id int PRIMARY KEY); SELECT terrace.add_table('t'); INSERT INTO t VALUES (1)");
    top.sql("DROP EXTENSION terrace CASCADE");
    for left in [
        "pg_trigger WHERE NOT tgisinternal",
        "pg_publication",
        "pg_namespace WHERE nspname = 'terrace'",
    ] {
        assert_eq!(
            top.value(&format!("SELECT count(*) FROM {left}")),
            "0",
            "{left}"
        );
    }
    top.sql("INSERT INTO t VALUES (2); CREATE EXTENSION terrace");
}

/// Warnings and notices that `sql` raises.
fn notices(top: &Server, sql: &str) -> String {
    let heard = Arc::new(Mutex::new(String::new()));
    let hear = Arc::clone(&heard);
    let mut config = top.config();
    config.notice_callback(move |notice| {
        let mut heard = hear.lock().expect("no panic");
        *heard += &format!(
            "{}: {} {}\n",
            notice.severity(),
            notice.message(),
            notice.hint().unwrap_or_default()
        );
    });
    let mut client = config.connect(NoTls).expect("connect");
    client
        .batch_execute(sql)
        .unwrap_or_else(|error| panic!("{sql}: {}", explain(&error)));
    drop(client);
    let heard = heard.lock().expect("no panic");
    heard.clone()
}

// One report with an infinite time made terrace.lag fail on every server above, for ever.
#[test]
fn a_report_that_cannot_be_shown_is_refused() {
    let (top, _scratch) = top();
    top.sql("SELECT terrace.create_domain('region')");
    let node = |name: &str, bad: &str| {
        format!(
            "jsonb_build_object('node', '{name}', 'instance', 'i-{name}', 'domain', 'region', \
             'role', 'slave', 'state', 'streaming', 'received_lsn', '0/10', 'flush_lsn', '0/10', \
             'replay_lsn', '0/10', 'replay_time', now(), 'caught_up', false, 'apply_rate', 1, \
             'catchup_seconds', 1, 'age_ms', 0, 'seq', 1) || '{bad}'"
        )
    };
    let report = |nodes: &[String]| {
        format!(
            "SELECT terrace.report(jsonb_build_object('nodes', jsonb_build_array({}), 'events', '[]'::jsonb))",
            nodes.join(", ")
        )
    };
    let long = format!(r#"{{"node": "{}"}}"#, "md5 ".repeat(5000));
    let bad = [
        r#"{"replay_time": "-infinity"}"#,
        r#"{"replay_time": "infinity"}"#,
        r#"{"catchup_seconds": "NaN"}"#,
        r#"{"catchup_seconds": "-Infinity"}"#,
        r#"{"catchup_seconds": 1e300}"#,
        r#"{"catchup_seconds": 1e15}"#,
        r#"{"apply_rate": "NaN"}"#,
        r#"{"apply_rate": "Infinity"}"#,
        r#"{"age_ms": "Infinity"}"#,
        r#"{"age_ms": "NaN"}"#,
        r#"{"age_ms": 1e300}"#,
        r#"{"replay_lsn": "FFFFFFFF/FFFFFFFF"}"#,
        r#"{"received_lsn": "FFFFFFFF/FFFFFFFF"}"#,
        r#"{"self": "perhaps"}"#,
        r#"{"node": null}"#,
        r#"{"instance": null}"#,
        r#"{"domain": null}"#,
        r#"{"conflicts": 7}"#,
        r#"{"conflicts": [{"table": "t", "kind": "k", "count": 1, "last_seen": "infinity"}]}"#,
        r#"{"conflicts": [{"table": "t", "kind": "k", "count": "x"}]}"#,
        &long,
    ];
    let views = [
        "lag",
        "topology",
        "events",
        "conflicts",
        "node_status",
        "domains",
        "tables",
    ];
    let all_show = |what: &str| {
        for view in views {
            let shown = top
                .connect()
                .simple_query(&format!("SELECT * FROM terrace.{view}"));
            shown.unwrap_or_else(|error| panic!("{what}: {view}: {}", explain(&error)));
        }
        top.value("SELECT terrace.to_report(0)");
    };
    let mut taken = Vec::new();
    for bad in bad {
        if top
            .connect()
            .batch_execute(&report(&[node("n", bad)]))
            .is_ok()
        {
            taken.push(bad);
        }
        all_show(bad);
        // From below it is left out, and what comes with it is not.
        top.sql("TRUNCATE terrace.status");
        top.sql(&report(&[
            node("first", "{}"),
            node("n", bad),
            node("last", "{}"),
        ]));
        let nodes = "SELECT string_agg(node, ' ' ORDER BY node) FROM terrace.status";
        assert_eq!(top.value(nodes), "first last", "{bad}");
        all_show(bad);
        top.sql("TRUNCATE terrace.status");
    }
    assert!(taken.is_empty(), "{taken:?}");

    // An event that is wrong keeps none of the others away.
    let event = |id: &str, time: &str| {
        format!(r#"{{"id": {id}, "time": "{time}", "node": "n", "domain": "region", "kind": "k"}}"#)
    };
    let events = [
        event("\"a\"", "2026-01-01"),
        event("\"b\"", "infinity"),
        event("null", "2026-01-01"),
        event("\"c\"", "yesterday or so"),
        event("\"d\"", "2026-01-02"),
    ];
    top.sql(&format!(
        "SELECT terrace.report('{{\"nodes\": [], \"events\": [{}]}}')",
        events.join(", ")
    ));
    assert_eq!(
        top.value("SELECT string_agg(id, ' ' ORDER BY id) FROM terrace.event"),
        "a d"
    );
    all_show("events");
}

// PostgreSQL refuses every UPDATE and DELETE of a published table whose old rows cannot
// be told.
#[test]
fn what_is_added_can_be_updated() {
    let (top, _scratch) = top();
    top.sql(
        "CREATE TABLE late (id int PRIMARY KEY DEFERRABLE, v int);
         CREATE TABLE seen (id int PRIMARY KEY, open bool);
         CREATE TABLE pair (id int PRIMARY KEY, a int, b int);
         CREATE TABLE inner_key (id int, a int PRIMARY KEY, b int);
         CREATE TABLE keyless (a int, b int);
         CREATE TABLE parted (a int, b int) PARTITION BY LIST (a);
         CREATE TABLE parted_1 PARTITION OF parted FOR VALUES IN (1)",
    );
    let said = notices(
        &top,
        "SELECT terrace.add_table('late'), terrace.add_table('parted')",
    );
    assert_eq!(said.matches("REPLICA IDENTITY FULL").count(), 2, "{said}");
    top.sql("ALTER TABLE seen REPLICA IDENTITY FULL");
    let said = notices(&top, "SELECT terrace.add_table('seen', filter => 'open')");
    assert_eq!(said, "");
    let said = notices(
        &top,
        "SELECT terrace.add_table('pair', columns => '{id, a}', filter => 'id > 0')",
    );
    assert_eq!(said, "");
    for sql in [
        "SELECT terrace.add_table('inner_key', columns => '{id, b}')",
        "SELECT terrace.add_table('keyless', columns => '{a}')",
        "SELECT terrace.add_table('inner_key', columns => '{a, b}', filter => 'b > 0')",
    ] {
        let said = top.refusal(sql);
        assert!(said.contains("replica identity"), "{sql}: {said}");
    }
    top.sql(
        "INSERT INTO late VALUES (1, 1); UPDATE late SET v = 2; DELETE FROM late;
         INSERT INTO seen VALUES (1, true); UPDATE seen SET open = false; DELETE FROM seen;
         INSERT INTO pair VALUES (1, 1, 1); UPDATE pair SET a = 2; DELETE FROM pair;
         INSERT INTO parted VALUES (1, 1); UPDATE parted SET b = 2; DELETE FROM parted",
    );
    // What has told the rows may go later.
    let dropped = "ALTER TABLE pair DROP CONSTRAINT pair_pkey";
    assert!(top.refusal(dropped).contains("replica identity"));
    top.sql("ALTER TABLE pair DROP CONSTRAINT pair_pkey, ADD PRIMARY KEY (a, id)");
    top.sql("INSERT INTO pair VALUES (1, 1, 1); UPDATE pair SET b = 2; DELETE FROM pair");
    let said = notices(&top, "ALTER TABLE seen REPLICA IDENTITY NOTHING");
    assert!(said.contains("REPLICA IDENTITY FULL"), "{said}");
    top.sql("INSERT INTO seen VALUES (1, true); UPDATE seen SET open = false; DELETE FROM seen");
}

// A parent table dragged the tables that inherit from it into the publication, and took
// one that was synchronised in its own right out with it.
#[test]
fn a_table_joins_without_those_that_inherit_from_it() {
    let (top, _scratch) = top();
    top.sql(
        "CREATE TABLE parent (id int PRIMARY KEY); CREATE TABLE child (PRIMARY KEY (id)) INHERITS (parent);
         CREATE TABLE other (PRIMARY KEY (id)) INHERITS (parent);
         SELECT terrace.add_table('parent')",
    );
    let published = "SELECT string_agg(tablename, ' ' ORDER BY tablename) \
                     FROM pg_publication_tables WHERE pubname = 'terrace' AND schemaname <> 'terrace'";
    assert_eq!(top.value(published), "parent");
    top.sql("SELECT terrace.add_table('child')");
    assert_eq!(top.value(published), "child parent");
    top.sql("SELECT terrace.remove_table('parent')");
    assert_eq!(top.value(published), "child");
}

const JOINED: &str = "SELECT string_agg(c.relname, ' ' ORDER BY c.relname) FROM pg_class c \
     WHERE c.relkind IN ('r', 'p') AND c.relnamespace = 'public'::regnamespace \
       AND has_table_privilege('terrace_reader', c.oid, 'SELECT') \
       AND EXISTS (SELECT FROM pg_trigger WHERE tgrelid = c.oid AND tgname = 'terrace_tag') \
       AND c.relreplident = CASE WHEN c.relname LIKE 'bare%' THEN 'f' ELSE 'd' END::\"char\"";

#[test]
fn later_partitions_join_and_dropped_tables_leave() {
    let (top, _scratch) = top();
    top.sql(
        "CREATE TABLE bare (a int, b int) PARTITION BY LIST (a);
         CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE u (id int PRIMARY KEY);
         CREATE SCHEMA shop; CREATE TABLE shop.price (id int PRIMARY KEY);
         SELECT terrace.add_table('bare'), terrace.add_table('t'), terrace.add_table('u'), terrace.add_schema('shop')",
    );
    top.sql(
        "CREATE TABLE bare_1 PARTITION OF bare FOR VALUES IN (1) PARTITION BY LIST (b);
         CREATE TABLE bare_1_1 PARTITION OF bare_1 FOR VALUES IN (1);
         CREATE TABLE bare_2 (a int, b int); ALTER TABLE bare ATTACH PARTITION bare_2 FOR VALUES IN (2);
         CREATE TABLE apart (a int)",
    );
    assert_eq!(top.value(JOINED), "bare bare_1 bare_1_1 bare_2 t u");
    top.sql("INSERT INTO bare VALUES (1, 1), (2, 2); UPDATE bare SET b = b");

    let known = "SELECT string_agg(\"table\", ' ' ORDER BY \"table\") FROM terrace.tables";
    top.sql("DROP TABLE t; DROP SCHEMA shop CASCADE; DROP TABLE bare_2");
    assert_eq!(top.value(known), "public.bare public.u");
    top.sql("CREATE TABLE t (id int PRIMARY KEY); SELECT terrace.add_table('t')");
    assert_eq!(top.value(known), "public.bare public.t public.u");
    // Whoever may drop a table need not know of us.
    top.sql(
        "CREATE ROLE owner LOGIN; GRANT CREATE ON SCHEMA public TO owner; ALTER TABLE u OWNER TO owner;
         SET ROLE owner; CREATE TABLE theirs (a int); DROP TABLE theirs; DROP TABLE u",
    );
    assert_eq!(top.value(known), "public.bare public.t");
    top.sql("DROP EXTENSION terrace; DROP TABLE t; CREATE TABLE t (id int)");
    assert_eq!(top.value("SELECT count(*) FROM pg_event_trigger"), "0");
}

// What a table holds when it is added goes down with it, once there is somebody below.
#[test]
fn rows_that_are_there_are_sent_to_those_that_receive() {
    let (top, _scratch) = top();
    top.sql(
        "CREATE TABLE t AS SELECT 1 AS a; CREATE TABLE u AS SELECT 1 AS a;
         SELECT terrace.create_domain('region')",
    );
    top.sql("SELECT pg_create_logical_replication_slot('look', 'test_decoding')");
    let sent = "SELECT count(*) FROM pg_logical_slot_get_changes('look', NULL, NULL) \
                WHERE data LIKE '%prefix: terrace.rows%'";
    top.sql("SELECT terrace.add_table('t')");
    assert_eq!(top.value(sent), "0", "nobody receives yet");
    top.sql(
        "SELECT terrace.report('{\"nodes\": [{\"node\": \"region-1\", \"instance\": \"x\", \
         \"domain\": \"region\"}], \"events\": []}')",
    );
    top.sql("SELECT terrace.add_table('u')");
    assert_eq!(top.value(sent), "1");
    let mut client = top.connect();
    let old = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1; SELECT terrace.resend('u')";
    let refused = client.batch_execute(old).expect_err("an older snapshot");
    assert!(
        explain(&refused).contains("READ COMMITTED only"),
        "{refused}"
    );
}

// A user of a site's relay could tell of servers that nobody has, and a domain with one too many
// follows no parent.
#[test]
fn a_report_speaks_for_what_is_below_alone() {
    let (top, _scratch) = top();
    top.sql("SELECT terrace.create_domain('region'), terrace.create_domain('branch', 'region'), terrace.create_domain('other')");
    let report = |node: &str, domain: &str, more: &str| {
        format!(
            "SELECT terrace.report(jsonb_build_object('nodes', jsonb_build_array(jsonb_build_object(
                 'node', '{node}', 'instance', '{node}', 'domain', '{domain}', 'seq', 1) || '{more}'), 'events', '[]'::jsonb))"
        )
    };
    top.sql(&report("region-1", "region", "{\"self\": true}"));
    top.sql(&report("region-2", "region", "{}"));
    top.sql(&report("branch-1", "branch", "{}"));
    for domain in ["other", "top"] {
        let said = top.refusal(&report("ghost", domain, "{}"));
        assert!(said.contains("is not below this server"), "{said}");
    }
    let long = format!("{{\"reason\": \"{}\"}}", "x".repeat(2_000_000));
    let said = top.refusal(&report("branch-2", "branch", &long));
    assert!(said.contains("longer than 1 MB"), "{said}");

    top.sql("SELECT terrace.forget_node('branch-1')");
    let said = top.refusal("SELECT terrace.forget_node('branch-1')");
    assert!(said.contains("has not reported"), "{said}");
    let known = "SELECT string_agg(node, ' ' ORDER BY node) FROM terrace.node_status";
    assert_eq!(top.value(known), "region-1 region-2");
}

// After a cut, what a bridge had said before it came in late, and was shown as news.
#[test]
fn a_report_that_was_held_up_says_nothing_of_now() {
    let (top, _scratch) = top();
    top.sql("SELECT terrace.create_domain('region')");
    let told = |run: u32, seq: u32, role: &str| {
        top.sql(&format!(
            "SELECT terrace.report(jsonb_build_object('nodes', jsonb_build_array(jsonb_build_object( \
                 'node', 'region-1', 'instance', 'one', 'domain', 'region', 'run', {run}, 'seq', {seq}, \
                 'role', '{role}', 'state', 'streaming', 'age_ms', 0)), 'events', '[]'::jsonb))"
        ));
        top.value("SELECT role FROM terrace.lag WHERE node = 'region-1'")
    };
    let time_passes =
        || top.sql("UPDATE terrace.status SET reply_time = reply_time - interval '1 min'");
    assert_eq!(told(100, 107, "slave"), "slave");
    assert_eq!(told(100, 105, "master"), "slave", "held up for a moment");
    time_passes();
    assert_eq!(told(100, 105, "master"), "slave", "held up for a minute");
    assert_eq!(
        told(50, 51, "none"),
        "none",
        "started with its clock set back"
    );
}
