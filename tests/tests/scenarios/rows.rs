//! Rows that are there already: tables that are added, resent, compared and repaired.

use std::process::Output;
use std::time::Duration;

use terrace_tests::load::{Background, STEPS, count_up};
use terrace_tests::server::{explain, rows};
use terrace_tests::{Tree, wait_until};

use super::stalls::wait_stalled;

const TREE: [(&str, Option<&str>, usize); 2] = [("region", None, 2), ("branch", Some("region"), 2)];

/// A table with a key, one without, and one in parts; made on every server.
const TABLES: &str = "
    CREATE TABLE stock (id int PRIMARY KEY, place text, at timestamptz, n numeric(20, 4), raw bytea,
        twice int GENERATED ALWAYS AS (id * 2) STORED, pad char(400) DEFAULT '') WITH (fillfactor = 10);
    CREATE TABLE notes (id int, line text);
    CREATE TABLE parts (id int PRIMARY KEY, v text) PARTITION BY HASH (id);
    CREATE TABLE parts_0 PARTITION OF parts FOR VALUES WITH (MODULUS 2, REMAINDER 0);
    CREATE TABLE parts_1 PARTITION OF parts FOR VALUES WITH (MODULUS 2, REMAINDER 1);";

const ROWS: &str = "
    INSERT INTO stock (id, place, at, n, raw) SELECT g, 'place \"' || g || E'\\\\ \\t\\n''é', now() + g * interval '1 h', g / 7.0,
        decode(md5(g::text), 'hex') FROM generate_series(1, 20000) g;
    UPDATE stock SET place = NULL, raw = NULL WHERE id % 50 = 0;
    INSERT INTO notes SELECT g / 3, repeat('line ', g % 40) FROM generate_series(1, 3000) g;
    INSERT INTO parts SELECT g, 'part' FROM generate_series(1, 2000) g;";

const NAMES: [&str; 3] = ["stock", "notes", "parts"];

fn said(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&text).into_owned()
}

pub fn command(tree: &mut Tree, node: &str, name: &str, arguments: &[&str]) -> (bool, String) {
    let output = tree.node(node).bridge.command(name, arguments);
    let output = output.expect("run the command");
    (output.status.success(), said(&output))
}

#[test]
fn a_table_with_rows_is_added_while_data_flows() {
    let mut tree = Tree::grow(STEPS, &TREE);
    tree.top.sql(TABLES);
    tree.top.sql(ROWS);
    for node in &tree.nodes {
        node.server.sql(TABLES);
    }
    let counting = count_up(&tree.top);
    // Somebody goes on writing to the very table.
    let changing = Background::paced(&tree.top, |client, step| {
        let id = step % 20_000 + 1;
        client
            .batch_execute(&format!(
                "UPDATE stock SET n = n + 1 WHERE id = {id}; DELETE FROM stock WHERE id = {id} - 500;
                 INSERT INTO stock (id, place) VALUES (20000 + {step}, 'new') ON CONFLICT DO NOTHING;
                 INSERT INTO notes VALUES ({step}, 'new'); DELETE FROM notes WHERE id = {step} / 2"
            ))
    });
    changing.go_on(20);
    tree.top
        .sql("SELECT terrace.add_table(t::regclass) FROM unnest('{stock,notes,parts}'::text[]) t");
    // Whatever dies now has it from its queue, or from the start.
    for node in ["region-1", "region-2", "branch-1"] {
        tree.node(node).bridge.kill9();
        tree.node(node).bridge.restart().expect("restart");
    }
    changing.go_on(50);
    changing.stop();
    tree.wait_for_equal(&NAMES);

    // What is removed stays as it is below, until it is added again.
    tree.top
        .sql("SELECT terrace.remove_table('stock'); SELECT terrace.remove_table('notes')");
    tree.top.sql("UPDATE stock SET place = 'moved' WHERE id % 3 = 0; DELETE FROM stock WHERE id < 100; DELETE FROM notes");
    counting.go_on(50);
    tree.top
        .sql("SELECT terrace.add_table('stock', columns => '{id,place}', filter => 'id % 2 = 0')");
    tree.top.sql("SELECT terrace.add_table('notes')");
    let (listed, all) = (
        "SELECT id, place FROM stock",
        " WHERE id % 2 = 0 ORDER BY id",
    );
    let wanted = tree.top.rows(&format!("{listed}{all}"));
    for node in &tree.nodes {
        wait_until("the listed columns of the chosen rows are there", || {
            node.server.rows(&format!("{listed} ORDER BY id")) == wanted
        });
    }
    // The list follows a column that is renamed, and keeps one from going.
    let mut client = tree.top.connect();
    let rename = "SELECT terrace.replicate_ddl('ALTER TABLE stock RENAME COLUMN place TO spot')";
    client.batch_execute(rename).expect("rename");
    tree.top
        .sql("UPDATE stock SET spot = 'new' WHERE id % 7 = 0; SELECT terrace.resend('stock')");
    let wanted = tree
        .top
        .rows("SELECT id, spot FROM stock WHERE id % 2 = 0 ORDER BY id");
    for node in &tree.nodes {
        wait_until("the renamed column is there", || {
            let sql = "SELECT id, spot FROM stock ORDER BY id";
            rows(&mut node.server.connect(), sql).is_ok_and(|found| found == wanted)
        });
    }
    let refused = client.batch_execute("ALTER TABLE stock DROP COLUMN spot CASCADE");
    let refused = explain(&refused.expect_err("it is listed"));
    assert!(refused.contains("is synchronised by a column"), "{refused}");
    // What is for one domain is no other's, and changes nothing of the rest of a transaction.
    tree.top.sql("CREATE TABLE here (id int PRIMARY KEY); INSERT INTO here VALUES (1);
                  CREATE TABLE there (id int PRIMARY KEY); INSERT INTO there VALUES (1);
                  BEGIN; SELECT terrace.add_table('here', '{region}'); SELECT terrace.add_table('there', '{region}');
                  SELECT terrace.resend('notes', '{region}'); INSERT INTO notes VALUES (-1, 'for all'); COMMIT");
    for node in &tree.nodes {
        node.server
            .sql("CREATE TABLE here (id int PRIMARY KEY); CREATE TABLE there (id int PRIMARY KEY)");
    }
    tree.wait_for_equal(&["notes"]);
    for node in &tree.nodes {
        let rows = if node.domain == "region" {
            "1 1"
        } else {
            "0 0"
        };
        let found = "SELECT (SELECT count(*) FROM here) || ' ' || (SELECT count(*) FROM there)";
        assert_eq!(node.server.value(found), rows, "{}", node.server.name);
    }
    tree.all_is_well(counting);
    let conflicts = "SELECT count(*) FROM terrace.conflict";
    for node in &tree.nodes {
        assert_eq!(node.server.value(conflicts), "0", "{}", node.server.name);
    }
}

#[test]
fn what_differs_is_found_and_repaired() {
    let schema = format!(
        "{STEPS}{TABLES}{ROWS} SELECT terrace.add_table(t::regclass) FROM unnest('{{stock,notes,parts}}'::text[]) t"
    );
    let mut tree = Tree::grow(&schema, &TREE);
    tree.top
        .sql("ALTER ROLE ALL SET terrace.compare_slice = '64MB'");
    let counting = count_up(&tree.top);
    let changing = Background::paced(&tree.top, |client, step| {
        let id = step % 10_000 + 10_001;
        client.batch_execute(&format!("UPDATE stock SET n = n + 1 WHERE id = {id}"))
    });
    let (well, text) = command(&mut tree, "branch-2", "compare", &[]);
    assert!(well, "{text}");
    for line in [
        "public.stock:",
        "public.steps:",
        "branch/branch-2: equal, 20000 rows",
        "region/region-1: equal",
    ] {
        assert!(text.contains(line), "no \"{line}\" in {text}");
    }
    // Each of the slices of a large table at a position of its own.
    let done = "SELECT (count(*), min(slices) > 1, bool_and(done = slices), max(differ::text))::text FROM terrace.comparisons
         WHERE \"table\" = 'public.stock'";
    assert_eq!(tree.top.value(done), "(4,t,t,{})");

    let damage = "SET session_replication_role = replica;
        DELETE FROM stock WHERE id = 5; UPDATE stock SET place = 'wrong' WHERE id = 6789;
        INSERT INTO stock (id) VALUES (-5); DELETE FROM notes WHERE ctid = (SELECT min(ctid) FROM notes);
        UPDATE parts SET v = 'wrong' WHERE id = 3";
    tree.node("branch-1").server.sql(damage);
    let (well, text) = command(&mut tree, "region-1", "compare", &["--table", "stock"]);
    assert!(!well, "{text}");
    let wrong: Vec<&str> = text
        .lines()
        .filter(|line| line.contains("DIFFERS"))
        .collect();
    assert_eq!(wrong.len(), 1, "{text}");
    assert!(
        wrong[0].contains("branch/branch-1: DIFFERS in 2 of 100 ranges: id < "),
        "{text}"
    );
    // The bounds come from a sample: the second range is the one of row 6789, whatever it is.
    let bounds: Vec<i32> = wrong[0]
        .split('\'')
        .filter_map(|part| part.parse().ok())
        .collect();
    let [first, from, to] = bounds[..] else {
        panic!("three bounds: {text}");
    };
    assert!(first > 5 && from <= 6789 && 6789 < to, "{text}");
    let (well, text) = command(&mut tree, "region-1", "compare", &["--domain", "region"]);
    assert!(well, "{text}");
    // One that is not for that domain is none of it.
    tree.top.sql(
        "CREATE TABLE above (id int PRIMARY KEY); SELECT terrace.replicate_ddl('CREATE TABLE aabove (id int PRIMARY KEY)');
         SELECT terrace.create_domain('later', 'region')",
    );
    for node in &tree.nodes {
        node.server
            .sql("CREATE TABLE IF NOT EXISTS above (id int PRIMARY KEY)");
    }
    tree.top.sql(
        "SELECT terrace.add_table('above', '{region}'); SELECT terrace.add_table('aabove', '{later}')",
    );
    let (well, text) = command(&mut tree, "branch-2", "compare", &["--domain", "branch"]);
    assert!(
        !well && !text.contains("above") && text.contains("differences"),
        "{text}"
    );
    let (well, text) = command(&mut tree, "branch-2", "compare", &["--domain", "later"]);
    assert!(
        !well && text.contains("no server of domain \"later\" that a table flows to is known"),
        "{text}"
    );

    let (well, text) = command(&mut tree, "branch-2", "repair", &[]);
    assert!(well, "{text}");
    let (well, text) = command(&mut tree, "branch-2", "compare", &[]);
    assert!(well && !text.contains("DIFFERS"), "{text}");
    changing.stop();
    tree.wait_for_equal(&NAMES);

    // A whole table once more.
    tree.node("branch-1")
        .server
        .sql("SET session_replication_role = replica; TRUNCATE stock, notes");
    let (well, text) = command(
        &mut tree,
        "branch-1",
        "resync",
        &["--table", "public.stock"],
    );
    assert!(well, "{text}");
    let (well, text) = command(&mut tree, "branch-2", "resync", &["--table", "notes"]);
    assert!(well, "{text}");
    tree.wait_for_equal(&NAMES);

    for (name, reason) in [
        ("nothing", "does not exist"),
        ("pg_class", "is not synchronised"),
    ] {
        let (well, text) = command(&mut tree, "branch-1", "compare", &["--table", name]);
        let hint = text.contains("See terrace.tables");
        assert!(!well && text.contains(reason) && hint, "{text}");
    }
    // One that is down is told, and waited for no longer than that is known.
    tree.node("branch-2").bridge.kill9();
    let (well, text) = command(&mut tree, "region-1", "compare", &["--table", "notes"]);
    assert!(
        !well && text.contains("branch/branch-2: no answer (down)"),
        "{text}"
    );
    tree.node("branch-2").bridge.restart().expect("restart");
    tree.all_is_well(counting);
}

#[test]
fn sequences_are_ahead_and_local_writes_are_refused() {
    let schema = format!(
        "{STEPS} CREATE TABLE orders (id bigserial PRIMARY KEY, small smallint GENERATED ALWAYS AS IDENTITY,
             down int UNIQUE);
         CREATE SEQUENCE down INCREMENT -2 MINVALUE -1000000 START -10 OWNED BY orders.down;
         ALTER TABLE orders ALTER down SET DEFAULT nextval('down');
         CREATE TABLE parted (id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY) PARTITION BY HASH (id);
         CREATE TABLE parted_0 PARTITION OF parted FOR VALUES WITH (MODULUS 1, REMAINDER 0);
         INSERT INTO orders DEFAULT VALUES;
         CREATE TABLE aside (id text, f float8); CREATE SEQUENCE aside_id OWNED BY aside.id;
         CREATE SEQUENCE aside_f AS smallint OWNED BY aside.f;
         INSERT INTO aside VALUES ('A2', 100000), ('A3', 'Infinity');
         SELECT terrace.add_table('aside'), terrace.add_table('orders'), terrace.add_table('parted')"
    );
    let mut tree = Tree::grow(&schema, &TREE);
    tree.top.sql("INSERT INTO orders SELECT FROM generate_series(1, 30000); INSERT INTO parted SELECT FROM generate_series(1, 5)");
    tree.wait_for_equal(&["orders", "parted"]);
    let shown = "SELECT (sequences ->> 'id')::bigint > 30001 + 100 AND (sequences ->> 'down')::int < -60020 - 100 \
         AND (sequences ->> 'small')::int >= 30001 FROM terrace.tables WHERE \"table\" = 'public.orders'";
    for node in &tree.nodes {
        wait_until("sequences are ahead", || node.server.value(shown) == "t");
    }
    // They are no reason to wait for somebody who has locked a table.
    let node = tree.node("branch-2");
    let lock = node.server.lock("aside");
    let in_steps = |n: i32| format!("SELECT count(*) FROM steps WHERE n = {n}");
    for n in [1, 2] {
        tree.top.sql(&format!("INSERT INTO steps VALUES ({n})"));
        let node = tree.node("branch-2");
        wait_until("it comes all the same", || {
            node.server.value(&in_steps(n)) == "1"
        });
        // Under load they are looked at every ten seconds.
        std::thread::sleep(Duration::from_secs(if n == 1 { 12 } else { 0 }));
    }
    // Nor are those of other tables kept back.
    tree.top
        .sql("SELECT setval('orders_id_seq', 500000); INSERT INTO orders DEFAULT VALUES");
    let node = tree.node("branch-2");
    let shown = "SELECT last_value > 500100 FROM orders_id_seq";
    wait_until("they are ahead again", || node.server.value(shown) == "t");
    drop(lock);
    // What is made by hand below, as a server that stands still for it asks, is no less protected.
    tree.top
        .sql("CREATE TABLE by_hand (id int PRIMARY KEY); SELECT terrace.add_table('by_hand')");
    tree.top.sql("INSERT INTO by_hand VALUES (1)");
    for node in &tree.nodes {
        wait_stalled(node, &["by_hand"]);
        node.server.sql("CREATE TABLE by_hand (id int PRIMARY KEY)");
    }
    tree.wait_for_equal(&["by_hand"]);
    for node in &tree.nodes {
        let mut client = node.server.connect();
        let refused = client.batch_execute("INSERT INTO by_hand VALUES (2)");
        let refused = explain(&refused.expect_err("it is protected"));
        assert!(refused.contains("synchronised table"), "{refused}");
    }
    // A server that nothing comes to any more.
    let node = tree.node("branch-2");
    node.bridge.kill9();
    for write in [
        "INSERT INTO orders DEFAULT VALUES",
        "DELETE FROM parted",
        "UPDATE parted_0 SET id = 7",
        "TRUNCATE steps",
    ] {
        let refused = node.server.connect().batch_execute(write);
        let refused = explain(&refused.expect_err(write));
        assert!(
            refused.contains("cannot write to synchronised table"),
            "{write}: {refused}"
        );
    }
    node.server
        .sql("SELECT terrace.unprotect(); INSERT INTO orders SELECT FROM generate_series(1, 100)");
    node.server
        .sql("INSERT INTO parted DEFAULT VALUES; SELECT terrace.protect('parted')");
    assert_eq!(node.server.value("SELECT count(*) FROM orders"), "30102");
    assert!(
        node.server
            .connect()
            .batch_execute("DELETE FROM parted_0")
            .is_err()
    );
}

// A report tells of the last twenty comparisons, and those before them were waited for in vain.
#[test]
fn many_tables_are_compared_one_after_the_other() {
    let schema = "
        DO $$ BEGIN FOR i IN 1 .. 24 LOOP
            EXECUTE format('CREATE TABLE many_%s (id int PRIMARY KEY)', i);
            EXECUTE format('INSERT INTO many_%s SELECT generate_series(1, %1$s)', i);
            PERFORM terrace.add_table(format('many_%s', i)::regclass);
        END LOOP; END $$";
    let mut tree = Tree::grow(schema, &[("region", None, 1)]);
    tree.node("region-1")
        .server
        .sql("SET session_replication_role = replica; DELETE FROM many_3");
    let (well, text) = command(&mut tree, "region-1", "repair", &[]);
    assert!(well, "{text}");
    assert_eq!(text.matches(": equal, ").count(), 24, "{text}");
    assert_eq!(text.matches("DIFFERS").count(), 1, "{text}");
    let (well, text) = command(&mut tree, "region-1", "compare", &["--domain", "none"]);
    assert!(!well && text.contains("of domain \"none\""), "{text}");
}

// Nearly every row is a bound of a range.
#[test]
fn keys_of_words_and_of_padded_words_are_repaired() {
    let schema = "CREATE TABLE padded (k char(10) PRIMARY KEY, v int); CREATE TABLE words (k varchar PRIMARY KEY, v int);
        INSERT INTO padded SELECT 'k' || g, g FROM generate_series(1, 60) g; INSERT INTO words TABLE padded;
        SELECT terrace.add_table('padded'), terrace.add_table('words')";
    let mut tree = Tree::grow(schema, &[("region", None, 1)]);
    for table in ["padded", "words"] {
        tree.node("region-1").server.sql(&format!(
            "SET session_replication_role = replica; UPDATE {table} SET v = -v WHERE v % 7 = 0;
             DELETE FROM {table} WHERE v % 11 = 0; INSERT INTO {table} VALUES ('k', 0), ('stray', 1)"
        ));
        let (well, text) = command(&mut tree, "region-1", "repair", &["--table", table]);
        assert!(well, "{text}");
    }
    tree.wait_for_equal(&["padded", "words"]);
}

#[test]
fn who_wrote_a_row_is_told_where_that_is_known() {
    const DOMAINS: [(&str, Option<&str>, usize); 2] =
        [("region", None, 1), ("branch", Some("region"), 1)];
    let mut tree = Tree::plant(
        "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE whole (id int PRIMARY KEY, v text);
         ALTER TABLE whole REPLICA IDENTITY FULL; CREATE TABLE keyless (v text);
         INSERT INTO t SELECT g, 'v' FROM generate_series(1, 2000) g; INSERT INTO whole TABLE t;
         INSERT INTO keyless VALUES ('v'); SELECT terrace.add_table(r) FROM unnest('{t, whole, keyless}'::regclass[]) r",
    )
    .expect("boot the top");
    tree.boot(&DOMAINS).expect("boot the servers");
    for node in &mut tree.nodes {
        node.server
            .sql("ALTER SYSTEM SET track_commit_timestamp = on");
        node.server.restart().expect("restart");
    }
    tree.start_bridges().expect("start the bridges");
    tree.wait_streaming();
    let tables = ["t", "whole", "keyless"];
    let kinds =
        "SELECT coalesce(string_agg(format('%s %s %s %s', relation, kind, count, last_key), ', '
                     ORDER BY relation, kind), '') FROM terrace.conflict";
    let counted = |tree: &Tree, wanted: &str| {
        for node in &tree.nodes {
            wait_until("it is counted", || node.server.value(kinds) == wanted);
        }
    };
    // What was copied, and what came since, is the top's; one by one and set-wise.
    for _ in 0..2 {
        tree.top.sql("UPDATE t SET v = 'w' WHERE id = 1");
        tree.top.sql("UPDATE whole SET v = 'w' WHERE id = 1");
        tree.top
            .sql("UPDATE t SET v = v || 'x'; DELETE FROM t WHERE id = (SELECT max(id) FROM t); UPDATE keyless SET v = 'w'");
        tree.wait_for_equal(&tables);
    }
    counted(&tree, "");
    for node in &tree.nodes {
        let log = node.bridge.logged();
        assert!(log.contains("a part went set-wise"), "nothing was folded");
        assert!(!log.contains("applying with care"), "{log}");
        node.server.sql(
            "SET session_replication_role = replica; UPDATE t SET v = 'local' WHERE id <= 4;
             UPDATE whole SET v = 'local' WHERE id = 7; INSERT INTO t VALUES (9999, 'local')",
        );
    }
    tree.top.sql("UPDATE t SET v = 'top' WHERE id = 1");
    tree.top.sql("DELETE FROM t WHERE id = 2");
    tree.top.sql("UPDATE whole SET v = 'top' WHERE id = 7");
    tree.top.sql("UPDATE t SET v = 'top' WHERE id <> 4");
    let all = "public.t delete_origin_differs 1 (id)=(2), public.t insert_exists 1 (id)=(9999), \
               public.t update_origin_differs 2 (id)=(3), public.whole update_origin_differs 1 (id)=(7)";
    // One that comes and goes in one fold does away with what is here.
    tree.top.sql(
        "BEGIN; INSERT INTO t VALUES (9999, 'top'); UPDATE t SET v = v || '.' WHERE id > 5; DELETE FROM t WHERE id = 9999; COMMIT",
    );
    counted(&tree, all);
    tree.top.sql(
        "UPDATE t SET v = 'again' WHERE id <> 4; DELETE FROM whole; UPDATE keyless SET v = 'x'",
    );
    for node in &tree.nodes {
        node.server
            .sql("SET session_replication_role = replica; UPDATE t SET v = 'vxx' WHERE id = 4");
    }
    tree.wait_for_equal(&tables);
    counted(&tree, all);
}

#[test]
fn conflicts_tell_the_last_key_to_those_who_may_read_the_rows() {
    let schema = "
        CREATE TABLE pair (id int, b text, v int, PRIMARY KEY (id, b));
        CREATE TABLE whole (id int PRIMARY KEY, big text, v int);
        ALTER TABLE whole REPLICA IDENTITY FULL, ALTER big SET STORAGE EXTERNAL;
        CREATE TABLE keyless (a text);
        SELECT terrace.add_table(r) FROM unnest('{pair, whole, keyless}'::regclass[]) r;
        INSERT INTO pair SELECT g, 'b' || g, g FROM generate_series(1, 9) g;
        INSERT INTO whole SELECT g, repeat(g::text, 9000), g FROM generate_series(1, 9) g;
        INSERT INTO keyless VALUES ('private')";
    let tree = Tree::grow(schema, &[("region", None, 1)]);
    tree.nodes[0].server.sql(
        "SET session_replication_role = replica; DELETE FROM pair WHERE id IN (2, 3, 4);
         DELETE FROM whole; DELETE FROM keyless",
    );
    for change in [
        "DELETE FROM pair WHERE id = 2",
        "DELETE FROM pair WHERE id = 3",
        "UPDATE pair SET v = -1 WHERE id = 4",
        // What stands out of line and does not change is in the old row.
        "UPDATE whole SET v = v + 1",
        "DELETE FROM keyless",
    ] {
        tree.top.sql(change);
    }
    tree.wait_for_equal(&["pair", "whole", "keyless"]);
    let wanted = "SELECT string_agg(concat_ws(' ', \"table\", kind, count, coalesce(last_key, '-')), ', ' \
                  ORDER BY \"table\", kind) FROM terrace.conflicts";
    let expected = "public.keyless delete_missing 1 -, public.pair delete_missing 2 (id, b)=(3, b3), \
                    public.pair update_missing 1 (id, b)=(4, b4), public.whole update_missing 9 (id)=(9)";
    wait_until("conflicts are told", || tree.top.value(wanted) == expected);
    tree.top.sql("CREATE ROLE anybody");
    let mut client = tree.top.connect();
    client.batch_execute("SET ROLE anybody").expect("set role");
    let told = rows(&mut client, wanted).expect("conflicts are for everybody");
    let told = &told[0][0];
    assert!(told.contains("public.pair delete_missing 2 -"), "{told}");
    let looks =
        "SELECT count(id) FROM terrace.comparison; SELECT count(*) FROM terrace.comparisons";
    rows(&mut client, looks).expect("comparisons are for everybody");
    for hidden in [
        "SELECT count(report) >= 0 FROM terrace.status",
        "SELECT count(last_key) >= 0 FROM terrace.conflict",
        "SELECT bool_or(conflicts::text LIKE '%b3%') FROM terrace.node_status",
        "SELECT count(bounds) >= 0 FROM terrace.comparison",
    ] {
        let shown = rows(&mut client, hidden).is_ok_and(|found| found[0][0] == "t");
        assert!(!shown, "{hidden}");
    }
}

// With somebody's snapshot all versions of the one row stay, and a look through them for each
// transaction takes longer and longer.
#[test]
fn what_a_long_snapshot_keeps_is_not_looked_through() {
    let schema = "CREATE TABLE t (id int PRIMARY KEY); SELECT terrace.add_table('t')";
    let tree = Tree::grow(schema, &[("region", None, 1)]);
    let server = &tree.nodes[0].server;
    let mut reader = server.connect();
    let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1";
    reader.batch_execute(begin).expect("begin");
    let count = |what: &str| -> i64 {
        let sql = format!(
            "SELECT {what} FROM pg_stat_all_tables WHERE relid = 'terrace.progress'::regclass"
        );
        server.value(&sql).parse().expect("a number")
    };
    let (written, scanned) = (count("n_tup_upd"), count("seq_scan"));
    let mut ids = 0..;
    // Some may be applied together, and what is done is counted with a delay.
    wait_until("many are written", || {
        for id in ids.by_ref().take(5) {
            tree.top.sql(&format!("INSERT INTO t VALUES ({id})"));
        }
        count("n_tup_upd") - written >= 200
    });
    tree.wait_for_equal(&["t"]);
    let (written, scanned) = (count("n_tup_upd") - written, count("seq_scan") - scanned);
    assert!(scanned < written / 2, "{scanned} scans, {written} writes");
    reader.batch_execute("COMMIT").expect("commit");
}

// One that has much to catch up with could meet any number of slices, and hold a snapshot for each.
#[test]
fn slices_that_are_too_many_at_once_are_left_out() {
    let schema = "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1); SELECT terrace.add_table('t')";
    let mut tree = Tree::grow(schema, &[("region", None, 1)]);
    let mut holder = tree.nodes[0].server.connect();
    let hold = "BEGIN; LOCK TABLE terrace.own_checksum IN SHARE MODE";
    holder.batch_execute(hold).expect("hold");
    tree.top.sql(
        "DO $$ BEGIN FOR i IN 1 .. 40 LOOP
            PERFORM terrace.begin_slice(id, 0) FROM terrace.begin_comparison('t');
        END LOOP; END $$; INSERT INTO t VALUES (2)",
    );
    let told = "SELECT count(*) FROM terrace.events WHERE kind = 'comparison' AND reason LIKE '%left out%'";
    wait_until("they are left out", || tree.top.value(told) != "0");
    tree.wait_for_equal(&["t"]);
    let sessions =
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'terrace comparison'";
    let held = tree.nodes[0].server.value(sessions);
    let held: u32 = held.parse().expect("a number");
    assert!(held <= 17, "{held} sessions");
    holder.batch_execute("ROLLBACK").expect("let go");
    let at_rest = || ["0", "1"].contains(&tree.nodes[0].server.value(sessions).as_str());
    wait_until("the others end", at_rest);
    let (well, text) = command(&mut tree, "region-1", "compare", &[]);
    assert!(well && text.contains("equal, 2 rows"), "{text}");
}

// Writers wait behind the lock only for moments, and whoever asked is told in the end.
#[test]
fn a_table_that_somebody_writes_to_all_the_time_is_not_compared() {
    let schema = "CREATE TABLE t (id int PRIMARY KEY); SELECT terrace.add_table('t');
                  CREATE TABLE z (id int PRIMARY KEY); SELECT terrace.add_table('z')";
    let mut tree = Tree::grow(schema, &[("region", None, 1)]);
    let mut holder = tree.top.connect();
    let write = "BEGIN; INSERT INTO t VALUES (0)";
    holder.batch_execute(write).expect("write");
    let writing = Background::paced(&tree.top, |client, step| {
        client.batch_execute(&format!("INSERT INTO t VALUES ({})", step + 1))
    });
    let limit = Duration::from_secs(200);
    let bridge = &tree.node("region-1").bridge;
    let output = bridge.command_within(limit, "compare", &[]);
    let output = output.expect("run the command");
    let text = said(&output);
    assert!(
        text.contains(
            "compare table public.t: a lock against writes could not be had for a minute; hint: "
        ),
        "{text}"
    );
    assert_eq!(output.status.code(), Some(1));
    // It holds up no other one.
    let other = "public.z:\n  region/region-1: equal";
    let said = text.contains(other) && text.contains("could not compare 1 of the tables");
    assert!(said, "{text}");
    writing.stop();
    holder.batch_execute("COMMIT").expect("commit");
    let (well, text) = command(&mut tree, "region-1", "compare", &[]);
    assert!(well, "{text}");
    tree.wait_for_equal(&["t"]);
}

// It reads a table for as long as that takes, and nothing in the stream waits for it longer than 20 s.
#[test]
fn a_comparison_gives_way_to_what_waits_for_it() {
    let schema = "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1); SELECT terrace.add_table('t')";
    let tree = Tree::grow(schema, &[("region", None, 1)]);
    let mut reader = tree.nodes[0].server.connect();
    reader
        .batch_execute("SET application_name = 'terrace comparison'; BEGIN; SELECT FROM t")
        .expect("read");
    tree.top.sql("TRUNCATE t; INSERT INTO t VALUES (2)");
    // Whoever looked into the table would wait as well.
    let told = "SELECT count(*) > 0 FROM terrace.events WHERE kind = 'copy_ended'";
    wait_until("it is ended", || tree.top.value(told) == "t");
    tree.wait_for_equal(&["t"]);
    reader.batch_execute("COMMIT").expect_err("it was ended");
}
