//! Large tables that are sent again range by range.

use std::time::{Duration, Instant};

use terrace_tests::load::{STEPS, count_up};
use terrace_tests::server::explain;
use terrace_tests::{Tree, wait_until};

use super::rows::command;

/// More than 32 MB, which is sent in three ranges.
const BIG: &str = "
    CREATE TABLE big (id int PRIMARY KEY, v text);
    INSERT INTO big SELECT g, repeat(md5(g::text), 32) FROM generate_series(1, 50000) g;
    ANALYZE big";

#[test]
fn a_large_table_comes_in_pieces_that_outlive_a_crash() {
    const DOMAINS: [(&str, Option<&str>, usize); 2] =
        [("region", None, 1), ("branch", Some("region"), 1)];
    let mut tree = Tree::grow(STEPS, &DOMAINS);
    tree.top.sql(BIG);
    // One has a row that no range holds, as its table has no primary key.
    tree.node("region-1")
        .server
        .sql("CREATE TABLE big (id int UNIQUE, v text); INSERT INTO big VALUES (NULL, 'stray')");
    tree.node("branch-1")
        .server
        .sql("CREATE TABLE big (id int PRIMARY KEY, v text)");
    // Who is not ready for the last piece has the others.
    tree.node("branch-1").server.sql(
        "INSERT INTO big VALUES (10, 'stray'), (60000, 'stray');
         CREATE FUNCTION trap() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN IF NEW.id = 49990 THEN RAISE EXCEPTION ''trapped''; END IF; RETURN NEW; END';
         CREATE TRIGGER trap BEFORE INSERT ON big FOR EACH ROW EXECUTE FUNCTION trap();
         ALTER TABLE big ENABLE ALWAYS TRIGGER trap",
    );
    let counting = count_up(&tree.top);
    tree.top
        .sql("SELECT terrace.add_table('big', rows => false)");
    let everywhere = ["--table", "big", "--everywhere"];
    let (well, text) = command(&mut tree, "branch-1", "resync", &everywhere);
    assert!(well && text.starts_with("50000 rows"), "{text}");
    let is_trapped =
        "SELECT count(*) FROM terrace.lag WHERE node = 'branch-1' AND reason LIKE '%trapped%'";
    wait_until("the last piece is refused", || {
        tree.top.value(is_trapped) == "1"
    });
    let there = "SELECT count(*) > 20000 AND count(*) < 49990 AND min(v) <> 'stray' FROM big WHERE id < 49990";
    assert_eq!(tree.node("branch-1").server.value(there), "t");

    // What died goes on with the piece that it was at; what is written meanwhile comes after it.
    tree.node("branch-1").bridge.kill9();
    tree.top.sql(
        "UPDATE big SET id = id + 100000 WHERE id % 1000 = 0; DELETE FROM big WHERE id = 49990",
    );
    tree.node("branch-1").server.sql("DROP TRIGGER trap ON big");
    tree.node("branch-1").bridge.restart().expect("restart");
    tree.all_is_well(counting);
    tree.wait_for_equal(&["big"]);
    for node in &tree.nodes {
        assert_eq!(
            node.server.value("SELECT count(*) FROM terrace.conflict"),
            "0"
        );
    }
}

#[test]
fn writers_of_a_table_wait_until_all_of_its_pieces_are_sent() {
    let tree = Tree::grow(BIG, &[]);
    let top = &tree.top;
    top.sql("SELECT terrace.add_table('big'); CREATE TABLE other (id int PRIMARY KEY)");
    let id = top.value("SELECT id FROM terrace.begin_comparison('big', 3)");
    let pieces = format!("SELECT count(*) FROM terrace.pieces_of({id}, '{{0,1,2}}')");
    assert_eq!(top.value(&pieces), "3");
    let mut writer = top.connect();
    let ready = "SET lock_timeout = '100ms'; INSERT INTO other VALUES (1)";
    writer.batch_execute(ready).expect("write elsewhere");
    let mut write = || writer.batch_execute("UPDATE big SET v = '' WHERE id = 1");
    // It ends with the session, idle or not, and with a transaction that fails.
    let terminate = "SELECT pg_terminate_backend(pg_backend_pid())";
    let ends = [
        None,
        Some(format!("BEGIN; LOCK TABLE big IN SHARE MODE; {terminate}")),
        Some("SELECT 1 / 0".into()),
    ];
    for end in ends {
        let mut holder = top.connect();
        let hold = format!("SELECT terrace.hold_rows({id})");
        holder.batch_execute(&hold).expect("hold");
        for piece in 0..2 {
            let send = format!("SELECT terrace.resend_ranges({id}, '{{{piece}}}', '{{}}', NULL)");
            holder.batch_execute(&send).expect("send");
            assert!(explain(&write().expect_err("it waits")).contains("lock timeout"));
        }
        match &end {
            None => drop(holder),
            Some(end) => drop(holder.batch_execute(end).expect_err("it fails")),
        }
        wait_until("nobody is held off", || write().is_ok());
    }
}

#[test]
fn what_is_sent_for_a_command_that_was_cut_off_ends() {
    let mut tree = Tree::grow(BIG, &[("region", None, 1), ("branch", Some("region"), 1)]);
    for node in &tree.nodes {
        node.server
            .sql("CREATE TABLE big (id int PRIMARY KEY, v text)");
    }
    tree.top.sql("SELECT terrace.add_table('big')");
    let locked = tree.top.lock("big");
    let bridge = &tree.node("branch-1").bridge;
    let cut_off = bridge.command_within(Duration::from_secs(3), "resync", &["--table", "big"]);
    assert!(!cut_off.expect("run it").status.success());
    let asks = "SELECT count(*) FROM pg_stat_activity
                WHERE query LIKE '%begin_resend%' AND pid <> pg_backend_pid()";
    let start = Instant::now();
    wait_until("nobody asks any more", || tree.top.value(asks) == "0");
    assert!(
        start.elapsed() < Duration::from_secs(20),
        "{:?}",
        start.elapsed()
    );
    drop(locked);
}

/// Stops whoever sends `big`, with one piece left.
const TRAP: &str = "
    CREATE FUNCTION trap() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN RAISE EXCEPTION ''trapped''; END';
    CREATE TRIGGER trap BEFORE UPDATE ON terrace.sending FOR EACH ROW
        WHEN (NEW.ranges = '{}') EXECUTE FUNCTION trap()";
const SENDING: &str = "SELECT sending FROM terrace.tables WHERE \"table\" = 'public.big'";

#[test]
fn a_large_table_that_is_added_comes_in_pieces_whoever_dies() {
    const DOMAINS: [(&str, Option<&str>, usize); 2] =
        [("region", None, 2), ("branch", Some("region"), 1)];
    let mut tree = Tree::grow(STEPS, &DOMAINS);
    let create = "CREATE TABLE big (id int PRIMARY KEY, v text);
        ALTER TABLE big ALTER v SET STORAGE EXTERNAL";
    for server in tree.nodes.iter().map(|node| &node.server) {
        server.sql(create);
    }
    // Rows out of line are not told again when their key changes.
    let fill =
        "INSERT INTO big SELECT g, repeat(md5(g::text), CASE g % 100 WHEN 0 THEN 300 ELSE 30 END)
                    FROM generate_series(1, 40000) g;
                ANALYZE big";
    tree.top.sql(&format!("{create}; {fill}; {TRAP}"));
    let counting = count_up(&tree.top);
    tree.top.sql("SELECT terrace.add_table('big')");
    wait_until("one piece is left", || {
        tree.top.value(SENDING).starts_with("1 of")
    });
    let sender =
        "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'terrace rows%'";
    wait_until("the sender is stopped", || tree.top.value(sender) == "0");
    let shown = tree.top.value(SENDING);
    assert!(shown.contains("pieces left: trapped"), "{shown}");

    // Nobody holds off writers now. A row of the piece that is left comes to those that are sent.
    tree.top.sql(
        "UPDATE big SET id = -id WHERE id IN (39900, 40000);
         UPDATE big SET v = 'new' WHERE id = 39999; DELETE FROM big WHERE id = 39998;
         UPDATE big SET id = id + 100000 WHERE id IN (5, 100); INSERT INTO big VALUES (40001, 'later')",
    );
    tree.top.kill9();
    tree.top.restart().expect("start the top");
    let master = tree.settled_master("region");
    tree.node(&master).bridge.kill9();
    tree.top.sql("DROP TRIGGER trap ON terrace.sending");
    wait_until("all is sent", || tree.top.value(SENDING).is_empty());
    tree.node(&master).bridge.restart().expect("restart");
    let end = tree.top.value(
        "SELECT substring(reason FROM 'all rows of table \"public.big\" are sent, up to (.*)') FROM terrace.events
         WHERE kind = 'sent'",
    );
    let arrived = format!("SELECT terrace.wait_for('{end}', timeout => '60s')");
    assert_eq!(tree.top.value(&arrived), "t");
    for node in &tree.nodes {
        let rows = node.server.value("SELECT count(*) FROM big");
        assert_eq!(rows, "40000", "{}", node.server.name);
        // What was changed when nobody was held off was not there yet.
        let kinds = "WITH gone AS (DELETE FROM terrace.conflict RETURNING kind)
                     SELECT string_agg(DISTINCT kind, ' ' ORDER BY kind) FROM gone";
        assert_eq!(node.server.value(kinds), "delete_missing update_missing");
    }
    tree.must_have_no_conflict();
    tree.all_is_well(counting);
    tree.wait_for_equal(&["big"]);
}

#[test]
fn what_is_wanted_once_more_comes_whoever_dies() {
    const DOMAINS: [(&str, Option<&str>, usize); 3] = [
        ("region", None, 1),
        ("branch", Some("region"), 1),
        ("other", None, 1),
    ];
    let mut tree = Tree::grow(STEPS, &DOMAINS);
    let tables = ["big", "words"];
    let create = "CREATE TABLE big (id int PRIMARY KEY, v text);
        CREATE TABLE words (word text PRIMARY KEY, id int, v text);
        ALTER TABLE big ALTER v SET STORAGE EXTERNAL; ALTER TABLE words ALTER v SET STORAGE EXTERNAL";
    for server in tree.nodes.iter().map(|node| &node.server) {
        server.sql(create);
    }
    tree.top.sql(&format!(
        "{create};
         INSERT INTO big SELECT g, repeat(md5(g::text), CASE g % 100 WHEN 0 THEN 300 ELSE 30 END)
         FROM generate_series(1, 40000) g;
         INSERT INTO words SELECT 'w' || lpad(id::text, 5, '0'), id, v FROM big;
         SELECT terrace.add_table('big'), terrace.add_table('words')"
    ));
    let counting = count_up(&tree.top);
    let shown = |tree: &Tree, table: &str| {
        let sql = format!("SELECT sending FROM terrace.tables WHERE \"table\" = 'public.{table}'");
        tree.top.value(&sql)
    };
    for table in tables {
        wait_until("all is sent", || shown(&tree, table).is_empty());
    }
    tree.wait_for_equal(&tables);

    // Only the branch wants them; what the others have of their own stays.
    let accident = "SET session_replication_role = replica; TRUNCATE big, words";
    tree.node("branch-1").server.sql(accident);
    let stray = "SET session_replication_role = replica;
        INSERT INTO big VALUES (70000, 'stray'); INSERT INTO words VALUES ('w70000', 70000, 'stray')";
    tree.node("other-1").server.sql(stray);
    tree.top.sql(TRAP);
    let bridge = &tree.node("branch-1").bridge;
    for table in tables {
        let cut_off = bridge.command_within(Duration::from_secs(4), "resync", &["--table", table]);
        assert!(!cut_off.expect("run it").status.success());
    }
    for table in tables {
        wait_until("one piece is left", || {
            let shown = shown(&tree, table);
            shown.starts_with("again: 1 of") && shown.contains("pieces left: trapped")
        });
    }
    // Nobody holds off writers now. Rows of the piece that is left come to those that are sent.
    tree.top.sql(
        "UPDATE big SET id = -id WHERE id IN (39900, 40000); DELETE FROM big WHERE id = 39998;
         UPDATE big SET id = id + 100000 WHERE id IN (5, 100);
         UPDATE words SET word = 'a' || word WHERE id IN (39900, 40000); DELETE FROM words WHERE id = 39998",
    );
    tree.node("region-1").bridge.kill9();
    tree.top.sql("DROP FUNCTION trap CASCADE");
    for table in tables {
        wait_until("all is sent", || shown(&tree, table).is_empty());
    }
    tree.node("region-1").bridge.restart().expect("restart");
    tree.wait_streaming();
    for table in tables {
        let end = tree.top.value(&format!(
            "SELECT substring(reason FROM '^\\d+ rows of table \"public.{table}\" are sent again, up to (.*)')
             FROM terrace.events WHERE kind = 'sent' AND reason LIKE '%{table}\" are sent again%'"
        ));
        let arrived = format!("SELECT terrace.wait_for('{end}', timeout => '60s')");
        assert_eq!(tree.top.value(&arrived), "t", "{table}: {end}");
        let branch = &tree.node("branch-1").server;
        assert_eq!(
            branch.checksum(table).expect("sum"),
            tree.top.checksum(table).expect("sum")
        );
        let strays = format!("SELECT count(*) FROM {table} WHERE v = 'stray'");
        let other = &tree.node("other-1").server;
        assert_eq!(other.value(&strays), "1");
        // To all, with nothing in the way.
        let everywhere = ["--table", table, "--everywhere"];
        let (well, text) = command(&mut tree, "branch-1", "resync", &everywhere);
        assert!(well && text.contains("are sent again, up to"), "{text}");
    }
    tree.wait_for_equal(&tables);
    for node in &tree.nodes {
        node.server.sql("DELETE FROM terrace.conflict");
    }
    tree.must_have_no_conflict();

    // Of a wish that cannot be fulfilled: the domain that it was for goes, or somebody takes it back. What was
    // altered is divided anew.
    tree.top.sql(TRAP);
    let ask = "SELECT terrace.begin_resend('big', '{other}') IS NOT NULL,
        terrace.begin_resend('words', '{branch}') IS NOT NULL";
    tree.top.sql(ask);
    for table in tables {
        wait_until("one piece is left", || {
            shown(&tree, table).contains("1 of 2 pieces left: trapped")
        });
    }
    let words = "ALTER TABLE words RENAME word TO term";
    for server in tree.nodes.iter().map(|node| &node.server) {
        server.sql(&format!("SET session_replication_role = replica; {words}"));
    }
    tree.top
        .sql(&format!("{words}; SELECT terrace.drop_domain('other')"));
    let gone = tree.nodes.pop().expect("other-1");
    assert_eq!(gone.server.name, "other-1");
    wait_until("nobody wants it any more", || {
        shown(&tree, "big").is_empty()
    });
    let left = "SELECT count(*) FROM terrace.sending WHERE again AND tries > 1";
    wait_until("it is tried again", || tree.top.value(left) == "1");
    let taken_back = "DELETE FROM terrace.sending WHERE again AND rel = 'words'::regclass";
    tree.top.sql(taken_back);
    tree.top.sql("DROP FUNCTION trap CASCADE");
    let (well, text) = command(&mut tree, "branch-1", "resync", &["--table", "words"]);
    assert!(well && text.starts_with("39999 rows"), "{text}");
    tree.wait_for_equal(&tables);
    for node in &tree.nodes {
        node.server.sql("DELETE FROM terrace.conflict");
    }
    tree.must_have_no_conflict();
    tree.all_is_well(counting);
}

#[test]
fn large_tables_of_any_shape_come_in_pieces() {
    const DOMAINS: [(&str, Option<&str>, usize); 2] =
        [("region", None, 1), ("branch", Some("region"), 1)];
    let mut tree = Tree::grow(STEPS, &DOMAINS);
    // Words for a key and values that no equality of columns keeps apart; no key at all, and rows
    // that are equal; the same in partitions, one far larger than the other.
    let create = "CREATE EXTENSION IF NOT EXISTS btree_gist;
        CREATE TABLE words (word text PRIMARY KEY, u int, v text, UNIQUE (u) DEFERRABLE, EXCLUDE USING gist (u WITH =));
        CREATE UNIQUE INDEX ON words ((u + 1)) WHERE u > 0;
        CREATE TABLE heap (n int, v text);
        CREATE TABLE parted (n int, v text) PARTITION BY LIST (n);
        CREATE TABLE parted_0 PARTITION OF parted FOR VALUES IN (0);
        CREATE TABLE parted_1 PARTITION OF parted DEFAULT";
    for server in tree.nodes.iter().map(|node| &node.server) {
        server.sql(create);
        // All that is there makes way.
        server.sql(
            "INSERT INTO words VALUES ('w1', 2, 'old'), ('stray', 1, 'old');
             INSERT INTO heap VALUES (1, 'stray'), (1, 'stray'); INSERT INTO parted VALUES (7, 'stray')",
        );
    }
    tree.top.sql(&format!(
        "{create};
         INSERT INTO words SELECT 'w' || g, g, repeat(md5(g::text), 32) FROM generate_series(1, 40000) g;
         INSERT INTO heap SELECT g % 100, repeat('x', 1000) FROM generate_series(1, 40000) g;
         INSERT INTO parted SELECT (g % 10)::bool::int, repeat('y', 1000) FROM generate_series(1, 40000) g;
         {TRAP}"
    ));
    let counting = count_up(&tree.top);
    let tables = ["words", "heap", "parted"];
    let shown = |tree: &Tree, table: &str| {
        tree.top.value(&format!(
            "SELECT sending FROM terrace.tables WHERE \"table\" = 'public.{table}'"
        ))
    };
    for table in tables {
        tree.top
            .sql(&format!("SELECT terrace.add_table('{table}')"));
        assert_ne!(shown(&tree, table), "");
    }
    for table in tables {
        wait_until("the last piece is trapped", || {
            let shown = shown(&tree, table);
            shown.starts_with("1 of") && shown.contains("trapped")
        });
    }
    // Nobody holds off writers now: what they do meets rows that are there, and such that are not.
    tree.top.sql(
        "UPDATE words SET word = 'x' || u, u = -u WHERE u % 1000 = 0; DELETE FROM words WHERE u % 1000 = 1;
         INSERT INTO words VALUES ('later', 2000, 'new');
         DELETE FROM heap WHERE ctid IN (SELECT ctid FROM heap WHERE n = 5 LIMIT 3);
         UPDATE heap SET n = -n WHERE ctid IN (SELECT max(ctid) FROM heap GROUP BY n);
         INSERT INTO parted VALUES (0, 'new'), (1, 'new'), (1, 'new');
         DELETE FROM parted WHERE ctid IN (SELECT max(ctid) FROM parted_1)",
    );
    // Its domain has no other, and as what is trapped comes again and again it is never at rest.
    tree.node("region-1").bridge.kill9();
    tree.top.sql("DROP TRIGGER trap ON terrace.sending");
    tree.node("region-1").bridge.restart().expect("restart");
    for table in tables {
        wait_until("all is sent", || shown(&tree, table).is_empty());
    }
    tree.wait_for_equal(&tables);
    for node in &tree.nodes {
        // What was changed when nobody was held off was not there yet.
        node.server.sql("DELETE FROM terrace.conflict");
        let strays = "SELECT (SELECT count(*) FROM words WHERE v = 'old')
            + (SELECT count(*) FROM heap WHERE v = 'stray') + (SELECT count(*) FROM parted WHERE v = 'stray')";
        assert_eq!(node.server.value(strays), "0");
    }
    tree.must_have_no_conflict();
    tree.all_is_well(counting);
    let pieces =
        "SELECT string_agg(DISTINCT (cardinality(bounds) + 1)::text, ' ') FROM terrace.comparison";
    assert_eq!(tree.top.value(pieces), "2");
}

#[test]
fn who_copies_between_two_pieces_has_no_row_twice() {
    let mut tree = Tree::grow(STEPS, &[("region", None, 1), ("other", None, 1)]);
    let create = "CREATE TABLE heap (n int, v text)";
    for node in &tree.nodes {
        node.server.sql(create);
    }
    tree.top.sql(&format!(
        "{create}; INSERT INTO heap SELECT g, repeat('x', 1000) FROM generate_series(1, 80000) g;
         CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN PERFORM pg_sleep(3); RETURN NEW; END';
         CREATE TRIGGER slow BEFORE UPDATE ON terrace.sending FOR EACH ROW
             WHEN (NEW.ranges <> OLD.ranges) EXECUTE FUNCTION slow();
         SELECT terrace.add_table('heap')"
    ));
    let left = |tree: &Tree| {
        let sql = "SELECT coalesce(sum(cardinality(ranges)), 0) FROM terrace.sending";
        tree.top.value(sql).parse::<u32>().expect("a number")
    };
    wait_until("it is divided", || left(&tree) == 5);
    // Nobody reaches into it but who sends.
    let id = tree
        .top
        .value("SELECT comparison FROM terrace.sending LIMIT 1");
    for piece in ["{0}", "{4}"] {
        let send = format!("SELECT terrace.resend_ranges({id}, '{piece}', '{{}}', NULL)");
        let refusal = tree.top.refusal(&send);
        assert!(
            refusal.contains("is not being sent by this session"),
            "{refusal}"
        );
    }
    wait_until("some pieces are sent", || left(&tree) == 4);
    let sender = tree.top.value(
        "SELECT split_part(application_name, ' ', 3) FROM pg_stat_activity WHERE application_name LIKE 'terrace rows%'",
    );
    let another = if sender == "other-1" {
        "region-1"
    } else {
        "other-1"
    };
    let bridge = &tree.node(another).bridge;
    let (copied, before) = ("all rows are copied", bridge.logged());
    bridge.resync();
    wait_until("it has copied", || {
        bridge.logged().matches(copied).count() > before.matches(copied).count()
    });
    let left_then = left(&tree);
    assert!((1..=3).contains(&left_then), "{left_then} pieces left");
    wait_until("all is sent", || left(&tree) == 0);
    tree.wait_for_equal(&["heap"]);
}

#[test]
fn a_large_table_waits_for_a_bridge_and_ends_when_it_is_removed() {
    let mut tree = Tree::grow(STEPS, &[("region", None, 1)]);
    tree.node("region-1").bridge.stop();
    tree.top.sql(BIG);
    tree.top
        .sql("CREATE TABLE half (id int PRIMARY KEY, v text); INSERT INTO half TABLE big");
    // What is wrong with it is said at once, and it is there only once.
    for (add, wanted) in [
        ("filter => 'v > ''1'''", "outside its replica identity"),
        ("columns => '{v}'", "not listed"),
        ("domains => '{nowhere}'", "does not exist"),
    ] {
        let error = tree
            .top
            .refusal(&format!("SELECT terrace.add_table('half', {add})"));
        assert!(error.contains(wanted), "{error}");
    }
    tree.top
        .sql("SELECT terrace.add_table('big'), terrace.add_table('half', filter => 'id % 2 = 0')");
    let again = tree.top.refusal("SELECT terrace.add_table('big')");
    assert!(again.contains("synchronised already"), "{again}");
    assert_eq!(tree.top.value(SENDING), "not begun");
    assert_eq!(
        tree.top.value("SELECT terrace.add_schema('public') >= 0"),
        "t"
    );
    // One that cannot be sent keeps no other one back.
    tree.top.sql(
        "SELECT terrace.remove_schema('public'); CREATE TABLE broken (id int PRIMARY KEY, a text, b text);
         INSERT INTO broken SELECT id, v FROM big;
         SELECT terrace.add_table('broken', columns => '{id, a}'); ALTER TABLE broken RENAME a TO c;
         UPDATE terrace.sending SET next_try = next_try - interval '1 hour' WHERE rel = 'broken'::regclass",
    );
    // Nothing of it flows yet; one that is removed or dropped never does.
    tree.top.sql("UPDATE big SET v = 'x' WHERE id = 1");
    tree.top.sql("SELECT terrace.remove_table('half')");
    let gone = tree.top.refusal("SELECT terrace.remove_table('half')");
    assert!(gone.contains("not synchronised"), "{gone}");
    tree.top
        .sql("SELECT terrace.add_table('half'); DROP TABLE half");
    let region = &mut tree.node("region-1");
    region
        .server
        .sql("CREATE TABLE big (id int PRIMARY KEY, v text)");
    region.bridge.restart().expect("restart");
    wait_until("all is sent", || tree.top.value(SENDING).is_empty());
    tree.wait_for_equal(&["big"]);
    let shown = tree
        .top
        .value("SELECT sending FROM terrace.tables WHERE \"table\" = 'public.broken'");
    assert!(shown.starts_with("not begun: column \"a\""), "{shown}");
    tree.top.sql("SELECT terrace.remove_table('broken')");
    let conflicts = "SELECT count(*) FROM terrace.conflict";
    assert_eq!(tree.node("region-1").server.value(conflicts), "0");

    // Each piece takes a while: not all are waited for.
    tree.top.sql("SELECT terrace.remove_table('big')");
    tree.top.sql(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN PERFORM pg_sleep(2); RETURN NEW; END';
         CREATE TRIGGER slow BEFORE UPDATE ON terrace.sending FOR EACH ROW
             WHEN (NEW.ranges <> OLD.ranges) EXECUTE FUNCTION slow();
         SELECT terrace.add_table('big')",
    );
    wait_until("the first piece is sent", || {
        tree.top.value(SENDING).starts_with("2 of")
    });
    tree.top.sql("SELECT terrace.remove_table('big')");
    let sent = "SELECT count(*) FROM terrace.events WHERE kind = 'sent'";
    assert_eq!(tree.top.value(sent), "1");
    tree.top.sql("UPDATE big SET v = 'y' WHERE id = 1");
}

#[test]
fn unique_values_go_from_one_piece_to_another() {
    let mut tree = Tree::grow("", &[("region", None, 2)]);
    let create = "CREATE TABLE big (id int PRIMARY KEY, v text, u int, w int)";
    let (by_index, another) = ("region-1", "region-2");
    tree.top.sql(&format!(
        "{create}; ALTER TABLE big ADD UNIQUE (u), ADD UNIQUE (w);
         INSERT INTO big SELECT g, repeat(md5(g::text), 32), g, NULL FROM generate_series(1, 50000) g;
         ANALYZE big"
    ));
    // What came long ago: values of the first rows are those of the last ones here, and of some that are
    // no more.
    let old = "INSERT INTO big (id, v, u, w) VALUES (50000, 'old', 1, NULL), (49999, 'old', 2, NULL), (70000, 'old', 3, NULL),
        (25000, 'old', NULL, NULL)";
    tree.node(by_index).server.sql(&format!(
        "{create}; ALTER TABLE big ADD UNIQUE (u, w); CREATE UNIQUE INDEX ON big (u); {old}"
    ));
    // Names of columns mean nothing.
    tree.node(another).server.sql(&format!(
        "{create}; ALTER TABLE big ADD own int, ADD sent int, ADD terrace_row int, ADD r int;
         CREATE UNIQUE INDEX ON big (u); {old}"
    ));
    tree.top
        .sql("SELECT terrace.add_table('big', rows => false)");
    let everywhere = ["--table", "big", "--everywhere"];
    let (well, text) = command(&mut tree, "region-1", "resync", &everywhere);
    assert!(well && text.starts_with("50000 rows"), "{text}");
    tree.wait_for_equal(&["(SELECT id, v, u, w FROM big)"]);

    // A constraint of one server alone, which the top's rows do not hold to, stays one; and no row
    // of the top's goes for it.
    tree.top.sql(
        "UPDATE big SET w = id WHERE id <= 2; UPDATE big SET v = 'same' WHERE id IN (3, 25000)",
    );
    tree.wait_for_equal(&["(SELECT id, v, u, w FROM big)"]);
    tree.node(by_index)
        .server
        .sql("SET session_replication_role = replica; DELETE FROM big WHERE id = 25000; CREATE UNIQUE INDEX ON big (md5(v))");
    let (well, text) = command(&mut tree, "region-1", "resync", &everywhere);
    assert!(well && text.starts_with("50000 rows"), "{text}");
    let stalled = "SELECT count(*) FROM terrace.lag WHERE node = 'region-1' AND state = 'stalled'";
    wait_until("it is refused", || tree.top.value(stalled) == "1");
    let kept = "SELECT v FROM big WHERE id = 3";
    assert_eq!(tree.node(by_index).server.value(kept), "same");
    tree.node(by_index).server.sql("DROP INDEX big_md5_idx");
    tree.wait_for_equal(&["(SELECT id, v, u, w FROM big)"]);

    // What no equality of columns tells goes at once.
    for index in [
        "CREATE UNIQUE INDEX odd ON big ((u + 1))",
        "CREATE UNIQUE INDEX odd ON big (u) WHERE u > 0",
        "CREATE UNIQUE INDEX odd ON big (u, w) NULLS NOT DISTINCT",
    ] {
        tree.top.sql(index);
        let at_once = "SELECT terrace.begin_resend('big') IS NULL";
        assert_eq!(tree.top.value(at_once), "t", "{index}");
        tree.top.sql("DROP INDEX odd");
    }
}

#[test]
fn a_key_of_words_is_cut_alike_in_every_order_and_encoding() {
    let mut tree = Tree::plant(STEPS).expect("boot the top");
    tree.boot(&[("region", None, 1), ("branch", Some("region"), 1)])
        .expect("boot the servers");
    let branch = &mut tree.node("branch-1").server;
    branch.sql(
        "UPDATE pg_database SET encoding = pg_char_to_encoding('WIN1252'), datcollate = 'C', datctype = 'C'
         WHERE datname = 'app'",
    );
    branch.restart().expect("restart");
    let create = "CREATE TABLE words (word text PRIMARY KEY, u int UNIQUE, v text)";
    // The second piece begins within those with a €, which in the other encoding come before letters.
    tree.top.sql(&format!(
        "{create}; ALTER TABLE words ALTER word TYPE varchar COLLATE \"en-x-icu\";
         INSERT INTO words SELECT (ARRAY['é', 'Z', '€', '€', '€', 'ä', '€'])[1 + g % 7] || g, g, repeat(md5(g::text), 32)
         FROM generate_series(1, 40000) g"
    ));
    tree.start_bridges().expect("start the bridges");
    tree.wait_streaming();
    for node in &tree.nodes {
        node.server.sql(create);
    }
    tree.top
        .sql("SELECT terrace.add_table('words', rows => false)");
    let rows = "SELECT count(*) || ' ' || coalesce(md5(string_agg(
        concat_ws(' ', convert_to(word, 'UTF8')::text, u, md5(v)), ',' ORDER BY u)), '') FROM words";
    let id = tree
        .top
        .value("SELECT id FROM terrace.begin_comparison('words', 2)");
    let pieces = format!("SELECT count(*) FROM terrace.pieces_of({id}, '{{0,1}}')");
    assert_eq!(tree.top.value(&pieces), "2");
    let of_many = format!(
        "SELECT count(*) || ' ' || sum(cardinality(p)) FROM terrace.pieces_of({id}, ARRAY(SELECT generate_series(0, 99))) p"
    );
    assert_eq!(tree.top.value(&of_many), "32 100");
    for accident in [
        "TRUNCATE words",
        "DELETE FROM words WHERE u % 3 = 0; UPDATE words SET u = u - 1 WHERE u % 3 = 1;
         INSERT INTO words VALUES ('é stray', -7), ('€ stray', -8); UPDATE words SET word = '€ ' || u WHERE u % 10 = 2",
    ] {
        for node in &tree.nodes {
            node.server
                .sql(&format!("SET session_replication_role = replica; {accident}"));
        }
        let everywhere = ["--table", "words", "--everywhere"];
        let (well, text) = command(&mut tree, "branch-1", "resync", &everywhere);
        assert!(well && text.starts_with("40000 rows"), "{text}");
        for node in &tree.nodes {
            wait_until("its rows are the top's", || {
                node.server.value(rows) == tree.top.value(rows)
            });
        }
    }
}
