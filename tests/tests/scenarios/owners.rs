//! What a table brings along to be run when its rows change has the rights of its owner.

use terrace_tests::server::rows;
use terrace_tests::{Server, Tree, wait_until};

/// A role without rights, and code of it in every place where writing a row calls code. Each
/// call leaves who it was, and tries to become superuser.
const CODE: &str = "
    CREATE ROLE mallory;
    CREATE SCHEMA IF NOT EXISTS mal; ALTER SCHEMA mal OWNER TO mallory;
    SET ROLE mallory;
    CREATE TABLE mal.seen (place text, who text, PRIMARY KEY (place, who));
    CREATE FUNCTION mal.note(here text) RETURNS bool LANGUAGE plpgsql AS $f$ BEGIN
        INSERT INTO mal.seen VALUES (here, current_user) ON CONFLICT DO NOTHING;
        BEGIN EXECUTE 'ALTER ROLE mallory SUPERUSER'; EXCEPTION WHEN OTHERS THEN NULL; END;
        BEGIN EXECUTE 'RESET ROLE'; EXECUTE 'ALTER ROLE mallory SUPERUSER';
        EXCEPTION WHEN OTHERS THEN NULL; END;
        RETURN true; END $f$;
    -- Says of itself what it is not, as indexes want it.
    CREATE FUNCTION mal.still(here text) RETURNS bool IMMUTABLE LANGUAGE plpgsql
        AS $f$ BEGIN PERFORM mal.note(here); RETURN true; END $f$;
    CREATE FUNCTION mal.fire() RETURNS trigger LANGUAGE plpgsql AS $f$ BEGIN
        PERFORM mal.note(tg_argv[0]);
        IF tg_op = 'DELETE' THEN RETURN old; END IF; RETURN new; END $f$;
    -- A setting that outlives the statement would be seen by the next.
    CREATE FUNCTION mal.leave() RETURNS trigger LANGUAGE plpgsql AS $f$ BEGIN
        IF current_setting('terrace.label', true) = 'left' THEN
            INSERT INTO mal.seen VALUES ('setting', 'left') ON CONFLICT DO NOTHING; END IF;
        PERFORM set_config('terrace.label', 'left', false);
        RETURN NULL; END $f$;
    RESET ROLE;";

const TABLES_BELOW: &str = "
    SET ROLE mallory;
    CREATE DOMAIN mal.word AS text CHECK (mal.note('domain'));
    CREATE TABLE mal.t (id int PRIMARY KEY, a mal.word, b mal.word[], extra bool DEFAULT mal.note('default'),
                        CHECK (mal.note('check')));
    CREATE INDEX ON mal.t (mal.still('index' || left(a, 0)));
    CREATE SEQUENCE mal.t_numbers OWNED BY mal.t.id;
    CREATE TRIGGER leave BEFORE INSERT ON mal.t EXECUTE FUNCTION mal.leave();
    CREATE TRIGGER before BEFORE INSERT OR UPDATE OR DELETE ON mal.t FOR EACH ROW
        EXECUTE FUNCTION mal.fire('before');
    CREATE TRIGGER after AFTER INSERT OR UPDATE OR DELETE ON mal.t FOR EACH ROW
        EXECUTE FUNCTION mal.fire('after');
    CREATE CONSTRAINT TRIGGER late AFTER INSERT OR UPDATE OR DELETE ON mal.t
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION mal.fire('late');
    CREATE TRIGGER empty AFTER TRUNCATE ON mal.t EXECUTE FUNCTION mal.fire('truncate');
    ALTER TABLE mal.t ENABLE ALWAYS TRIGGER leave, ENABLE ALWAYS TRIGGER before, ENABLE ALWAYS TRIGGER after,
        ENABLE ALWAYS TRIGGER late, ENABLE ALWAYS TRIGGER empty;
    -- What can be folded is written in another way.
    CREATE DOMAIN mal.number AS int CHECK (mal.note('folded domain'));
    CREATE TABLE mal.folded (id int PRIMARY KEY, a mal.number, extra bool DEFAULT mal.note('folded default'),
                             CHECK (mal.note('folded check')));
    CREATE INDEX ON mal.folded (mal.still('folded index' || left(a::text, 0)));
    REVOKE SELECT, INSERT, UPDATE, DELETE ON mal.t, mal.folded FROM mallory;
    RESET ROLE;";

const TABLES: [&str; 2] = ["mal.t (id, a, b)", "mal.folded (id, a)"];

/// Who was seen in which place, without its owner's own.
const OTHERS: &str =
    "SELECT string_agg(place || ' as ' || who, ', ') FROM mal.seen WHERE who <> 'mallory'";

fn forget(tree: &Tree) {
    for node in &tree.nodes {
        node.server.sql("DELETE FROM mal.seen");
    }
}

/// Every one of `places` was seen, as the owner alone.
fn saw(tree: &Tree, places: &str) {
    for node in &tree.nodes {
        let (server, name) = (&node.server, &node.server.name);
        assert_eq!(server.value(OTHERS), "", "on {name}");
        let missing = format!(
            "SELECT string_agg(place, ', ') FROM unnest(string_to_array('{places}', ', ')) place \
             WHERE place NOT IN (SELECT place FROM mal.seen)"
        );
        assert_eq!(server.value(&missing), "", "not called on {name}");
        let risen = "SELECT rolsuper FROM pg_roles WHERE rolname = 'mallory'";
        assert_eq!(server.value(risen), "f", "on {name}");
    }
}

#[test]
fn a_tables_code_runs_with_its_owners_rights() {
    let mut tree = Tree::plant(
        "CREATE SCHEMA mal; CREATE TABLE mal.t (id int PRIMARY KEY, a text, b text[]);
         CREATE TABLE mal.folded (id int PRIMARY KEY, a int);
         SELECT terrace.add_table('mal.t'), terrace.add_table('mal.folded');
         INSERT INTO mal.t VALUES (1, 'copied', '{a}'); INSERT INTO mal.folded VALUES (1, 1)",
    )
    .expect("boot the top");
    tree.boot(&[("region", None, 2)]).expect("boot the servers");
    for node in &tree.nodes {
        node.server.sql(CODE);
        node.server.sql(TABLES_BELOW);
    }
    tree.start_bridges().expect("start the bridges");
    tree.wait_streaming();
    let equal = || {
        let wanted = TABLES.map(|table| content(&tree.top, table));
        for node in &tree.nodes {
            wait_until("the rows are the top's", || {
                TABLES.map(|table| content(&node.server, table)) == wanted
            });
        }
    };
    equal();
    saw(
        &tree,
        "domain, check, index, before, after, late, folded domain, folded check, folded index",
    );

    // One by one …
    for node in &tree.nodes {
        // A plan evaluates this, also that of a look for the highest number.
        node.server
            .sql("CREATE INDEX odd ON mal.t (id) WHERE mal.still('plan')");
        // Nor is the owner in its own way.
        node.server
            .sql("ALTER TABLE mal.folded ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY");
    }
    forget(&tree);
    tree.top.sql("INSERT INTO mal.t VALUES (2, 'two', '{b}')");
    tree.top.sql("UPDATE mal.t SET a = 'changed' WHERE id = 1");
    tree.top.sql("DELETE FROM mal.t WHERE id = 2");
    equal();
    saw(
        &tree,
        "domain, default, check, index, plan, before, after, late",
    );
    forget(&tree);
    tree.top.sql("TRUNCATE mal.t");
    equal();
    saw(&tree, "truncate");

    // … folded …
    tree.top.sql(
        "INSERT INTO mal.folded SELECT g, g FROM generate_series(2, 500) g;
         UPDATE mal.folded SET a = a + 1 WHERE id > 1; DELETE FROM mal.folded WHERE id > 400;
         UPDATE mal.folded SET a = 0 WHERE id = 1",
    );
    equal();
    tree.top.sql(
        "UPDATE mal.folded SET a = a + 1; DELETE FROM mal.folded WHERE id > 300;
         INSERT INTO mal.folded SELECT g, g FROM generate_series(301, 500) g",
    );
    equal();
    saw(
        &tree,
        "folded domain, folded default, folded check, folded index",
    );

    // … and with care, as one row is not there.
    forget(&tree);
    tree.top.sql("INSERT INTO mal.t VALUES (3, 'three', '{c}')");
    equal();
    for node in &tree.nodes {
        // Or a session of ours would be the one to fall for it.
        node.server.sql(
            "SELECT terrace.write_as_owners(); SET session_replication_role = replica; DELETE FROM mal.t",
        );
        node.server.sql("DELETE FROM mal.seen");
    }
    tree.top.sql("UPDATE mal.t SET a = 'again', b = '{d}'");
    equal();
    saw(
        &tree,
        "domain, default, check, index, plan, before, after, late",
    );

    // What is put in place of a statement is nobody's.
    for node in &tree.nodes {
        node.server.sql(
            "CREATE RULE evil AS ON UPDATE TO mal.folded DO ALSO SELECT mal.note('rule');
             ALTER TABLE mal.folded ENABLE ALWAYS RULE evil",
        );
    }
    tree.top.sql("UPDATE mal.folded SET a = -1 WHERE id = 1");
    stalls(&tree, "\"folded\" has rules that fire on replicas");
    for node in &tree.nodes {
        node.server.sql("ALTER TABLE mal.folded DISABLE RULE evil");
    }
    equal();
    let rule = "SELECT count(*) FROM mal.seen WHERE place = 'rule'";
    assert!(tree.nodes.iter().all(|node| node.server.value(rule) == "0"));

    // Nor is it lent what it may not call itself.
    for node in &tree.nodes {
        node.server.sql(
            "CREATE FUNCTION secret() RETURNS text LANGUAGE sql AS 'SELECT 1::text';
             REVOKE EXECUTE ON FUNCTION secret() FROM PUBLIC;
             ALTER TABLE mal.t ADD COLUMN more text, ALTER COLUMN more SET DEFAULT secret()",
        );
    }
    tree.top.sql("INSERT INTO mal.t VALUES (4, 'four', '{d}')");
    stalls(&tree, "permission denied for function secret");
    for node in &tree.nodes {
        node.server
            .sql("ALTER TABLE mal.t ALTER COLUMN more DROP DEFAULT");
    }
    equal();
}

/// All servers tell of it.
fn stalls(tree: &Tree, reason: &str) {
    let stalled = format!(
        "SELECT count(*) FROM terrace.lag WHERE state = 'stalled' AND reason LIKE '%{reason}%'"
    );
    let all = tree.nodes.len().to_string();
    wait_until(reason, || tree.top.value(&stalled) == all);
}

fn content(server: &Server, table: &str) -> Vec<Vec<String>> {
    let (name, columns) = table.split_once(" (").expect("columns");
    let columns = columns.trim_end_matches(')');
    let columns = columns.replace(", ", "::text, ");
    // Or we would be the ones to fall for it.
    let mut client = server.connect();
    client
        .batch_execute("SELECT terrace.write_as_owners()")
        .expect("a session");
    let sql = format!("SELECT {columns}::text FROM {name} ORDER BY id");
    rows(&mut client, &sql).expect("the rows")
}

#[test]
fn what_an_owner_puts_in_place_of_its_table_lends_it_nothing() {
    let mut tree = Tree::plant(
        "CREATE SCHEMA mal; CREATE TABLE mal.late (id int PRIMARY KEY, a text);
         CREATE TABLE mal.parts (id int PRIMARY KEY, a text);
         CREATE TABLE mal.v (id text PRIMARY KEY, s bool);
         CREATE TABLE mal.cut (id int PRIMARY KEY, a text);
         SELECT terrace.add_table(t) FROM unnest(ARRAY['mal.late', 'mal.parts', 'mal.v', 'mal.cut']::regclass[]) t",
    )
    .expect("boot the top");
    tree.boot(&[("region", None, 1)]).expect("boot the servers");
    let node = &tree.nodes[0];
    node.server.sql(CODE);
    node.server.sql(
        "CREATE ROLE trent; GRANT ALL ON SCHEMA mal TO trent; SET ROLE mallory;
         CREATE DOMAIN mal.word AS text CHECK (mal.note('domain'));
         CREATE DOMAIN mal.three AS varchar(3);
         CREATE TABLE mal.late (id int PRIMARY KEY, a text);
         CREATE TABLE mal.parts (id int PRIMARY KEY, a text) PARTITION BY RANGE (id);
         CREATE TABLE mal.rest PARTITION OF mal.parts DEFAULT;
         CREATE TRIGGER empty AFTER TRUNCATE ON mal.rest EXECUTE FUNCTION mal.fire('leaf');
         ALTER TABLE mal.rest ENABLE ALWAYS TRIGGER empty;
         CREATE TABLE mal.v (id text PRIMARY KEY, s bool);
         CREATE TABLE mal.cut (id int PRIMARY KEY, a mal.three)",
    );
    tree.start_bridges().expect("start the bridges");
    tree.wait_streaming();
    let (top, here) = (&tree.top, &tree.nodes[0].server);
    let equal = |table: &str| {
        wait_until("the rows are the top's", || {
            content(here, table) == content(top, table)
        });
    };
    // A look at the table is no promise.
    top.sql("INSERT INTO mal.late VALUES (1, 'a')");
    equal("mal.late (id, a)");
    here.sql("SET SESSION AUTHORIZATION mallory; ALTER TABLE mal.late ALTER a TYPE mal.word; DELETE FROM mal.seen");
    top.sql("UPDATE mal.late SET a = 'b'");
    equal("mal.late (id, a)");
    saw(&tree, "domain");

    // Parts have triggers of their own, and owners.
    top.sql("INSERT INTO mal.parts VALUES (1, 'a')");
    equal("mal.parts (id, a)");
    top.sql("TRUNCATE mal.parts");
    equal("mal.parts (id, a)");
    saw(&tree, "leaf");
    here.sql("ALTER TABLE mal.rest OWNER TO trent");
    top.sql("INSERT INTO mal.parts VALUES (2, 'b')");
    stalls(
        &tree,
        "partition of table \"parts\" belongs to somebody else",
    );
    here.sql("ALTER TABLE mal.rest OWNER TO mallory");
    equal("mal.parts (id, a)");

    // A view of who is superuser …
    let aside = "ALTER TABLE mal.v RENAME TO aside; ALTER INDEX mal.v_pkey RENAME TO aside_pkey";
    let back = "ALTER TABLE mal.aside RENAME TO v; ALTER INDEX mal.aside_pkey RENAME TO v_pkey";
    top.sql("INSERT INTO mal.v VALUES ('mallory', false)");
    equal("mal.v (id, s)");
    here.sql(aside);
    here.sql("CREATE VIEW mal.v AS SELECT rolname::text AS id, rolsuper AS s FROM pg_authid; ALTER VIEW mal.v OWNER TO mallory");
    top.sql("UPDATE mal.v SET s = true");
    stalls(&tree, "v\" is no table on this server");
    saw(&tree, "leaf");
    here.sql("DROP VIEW mal.v");
    here.sql(back);
    equal("mal.v (id, s)");
    // … and what is nothing of the kind harms nobody either.
    top.sql("INSERT INTO mal.v SELECT g, false FROM generate_series(1, 100) g");
    equal("mal.v (id, s)");
    let started =
        here.value("SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'");
    here.sql(aside);
    here.sql("CREATE TYPE mal.v AS (id text, s bool)");
    top.sql("INSERT INTO mal.v SELECT g, false FROM generate_series(101, 200) g");
    stalls(&tree, "v");
    here.sql("DROP TYPE mal.v");
    here.sql(back);
    equal("mal.v (id, s)");
    let still = here.value("SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'");
    assert_eq!(started, still, "the server has not been restarted");

    // What does not fit is not cut.
    top.sql("INSERT INTO mal.cut VALUES (1, 'abcdef')");
    stalls(&tree, "value too long");
    here.sql("ALTER TABLE mal.cut ALTER a TYPE text");
    equal("mal.cut (id, a)");

    // At the top, too, nobody else looks at a table with more rights than its owner has.
    top.sql(CODE);
    top.sql(
        "ALTER TABLE mal.seen OWNER TO mallory; CREATE TABLE mal.whole (id int PRIMARY KEY) PARTITION BY RANGE (id);
         ALTER TABLE mal.whole OWNER TO mallory; SELECT terrace.add_table('mal.whole');
         SET SESSION AUTHORIZATION mallory; CREATE TABLE mal.part (id int PRIMARY KEY);
         CREATE INDEX ON mal.part (id) WHERE mal.still('top');
         ALTER TABLE mal.whole ATTACH PARTITION mal.part FOR VALUES FROM (10) TO (20); RESET SESSION AUTHORIZATION;
         SELECT FROM terrace.begin_comparison('mal.whole')",
    );
    assert_eq!(top.value(OTHERS), "", "at the top");
    let seen = "SELECT count(*) FROM mal.seen WHERE place = 'top'";
    assert_eq!(top.value(seen), "1");
}
