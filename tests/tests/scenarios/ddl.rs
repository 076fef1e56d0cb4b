//! DDL in the stream: what is made at the top is made below, in its place among the rows.

use std::time::Duration;

use postgres::{Client, NoTls};
use terrace_tests::load::{STEPS, count_up};
use terrace_tests::server::{explain, rows};
use terrace_tests::{PASSWORD, Server, Tree, wait_until};

const TREE: [(&str, Option<&str>, usize); 2] = [("region", None, 2), ("branch", Some("region"), 1)];

/// Sessions at the top replicate DDL from now on.
const REPLICATE_DDL: &str = "
    DO $$ BEGIN
        EXECUTE format('ALTER DATABASE %I SET session_preload_libraries = ''terrace''', current_database());
        EXECUTE format('ALTER DATABASE %I SET terrace.ddl = on', current_database());
    END $$";

/// Everything in schemas `app` and `other`, as text.
const CATALOG: &str = "
    SELECT format('%s %s %s %s %s', c.relkind, c.relname, a.attname, format_type(a.atttypid, a.atttypmod),
                  pg_get_expr(d.adbin, d.adrelid)) AS line
    FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
    WHERE c.relnamespace IN (SELECT oid FROM pg_namespace WHERE nspname IN ('app', 'other'))
    UNION ALL SELECT pg_get_indexdef(indexrelid) || indisvalid FROM pg_index
    WHERE indexrelid IN (SELECT oid FROM pg_class WHERE relnamespace IN (SELECT oid FROM pg_namespace WHERE nspname IN ('app', 'other')))
    UNION ALL SELECT pg_get_viewdef(oid) FROM pg_class
    WHERE relkind = 'v' AND relnamespace IN (SELECT oid FROM pg_namespace WHERE nspname IN ('app', 'other'))
    UNION ALL SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace IN (SELECT oid FROM pg_namespace WHERE nspname IN ('app', 'other'))
    UNION ALL SELECT pg_get_triggerdef(t.oid) FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
    WHERE c.relnamespace IN (SELECT oid FROM pg_namespace WHERE nspname IN ('app', 'other')) AND NOT t.tgisinternal AND t.tgname NOT LIKE 'terrace%'
    UNION ALL SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE connamespace IN (SELECT oid FROM pg_namespace WHERE nspname IN ('app', 'other'))
    UNION ALL SELECT format('type %s %s', oid::regtype, typtype) FROM pg_type
    WHERE typnamespace IN (SELECT oid FROM pg_namespace WHERE nspname IN ('app', 'other'))
    UNION ALL SELECT enumtypid::regtype || enumlabel FROM pg_enum
    UNION ALL SELECT inhrelid::regclass || ' of ' || inhparent::regclass FROM pg_inherits
    UNION ALL SELECT relname || ' owned by ' || pg_get_userbyid(relowner) FROM pg_class
    WHERE relnamespace IN (SELECT oid FROM pg_namespace WHERE nspname IN ('app', 'other')) AND pg_get_userbyid(relowner) = 'maker'
    ORDER BY line";

pub fn tree_with_ddl(schema: &str) -> Tree {
    let tree = Tree::grow(schema, &TREE);
    tree.top.sql(REPLICATE_DDL);
    tree
}

pub fn wait_for_catalog(tree: &Tree) {
    let wanted = tree.top.rows(CATALOG);
    for node in &tree.nodes {
        wait_until(
            &format!("{} has what the top has", node.server.name),
            || {
                // What is dropped meanwhile is an error.
                let found = rows(&mut node.server.connect(), CATALOG);
                found.is_ok_and(|found| found == wanted)
            },
        );
    }
}

fn wait_for_stall(tree: &Tree, reason: &str) {
    let stalled = format!(
        "SELECT count(*) > 0 FROM terrace.lag WHERE state = 'stalled' AND reason LIKE '%{reason}%'"
    );
    wait_until(&format!("a stall tells of {reason}"), || {
        tree.top.value(&stalled) == "t"
    });
}

#[test]
fn what_is_made_at_the_top_is_made_below() {
    let tree = tree_with_ddl(STEPS);
    let counting = count_up(&tree.top);
    let top = &tree.top;
    top.sql("CREATE SCHEMA app");
    top.sql("SELECT terrace.add_schema('app')");
    top.sql("CREATE TYPE app.mood AS ENUM ('good', 'bad'); CREATE DOMAIN app.few AS int CHECK (value < 1000)");
    // A table of a synchronised schema is synchronised from its first row on.
    top.sql(
        "BEGIN; CREATE TABLE app.t (id int PRIMARY KEY, mood app.mood, n app.few);
             INSERT INTO app.t SELECT g, 'good', g FROM generate_series(1, 500) g; COMMIT",
    );
    // DDL and rows in one transaction, with what is rolled back in it.
    top.sql(
        "BEGIN; UPDATE app.t SET n = n + 1 WHERE id <= 10;
             ALTER TABLE app.t ADD COLUMN c text NOT NULL DEFAULT 'before';
             INSERT INTO app.t VALUES (501, 'bad', 5, 'after');
             SAVEPOINT s; ALTER TABLE app.t ADD COLUMN gone int; ROLLBACK TO s;
             UPDATE app.t SET c = 'changed' WHERE id < 5; COMMIT",
    );
    top.sql("ALTER TYPE app.mood ADD VALUE 'odd' BEFORE 'bad'");
    top.sql("INSERT INTO app.t VALUES (502, 'odd', 1, 'x')");
    // The whole table is written anew, and rows go on.
    top.sql("ALTER TABLE app.t ALTER COLUMN id TYPE bigint, ALTER COLUMN c TYPE varchar(20)");
    top.sql("INSERT INTO app.t VALUES (5000000000, 'odd', 1, 'y'); DELETE FROM app.t WHERE id = 7");
    top.sql("CREATE INDEX ON app.t (c); CREATE UNIQUE INDEX u ON app.t (id, c)");
    top.sql("CREATE INDEX CONCURRENTLY late ON app.t (mood)");
    top.sql("CREATE INDEX CONCURRENTLY never ON app.t (n)");
    top.sql("DROP INDEX CONCURRENTLY app.never");
    top.sql(
        "CREATE FUNCTION app.double(n int) RETURNS int LANGUAGE sql AS 'SELECT n * 2';
             CREATE FUNCTION app.fire() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
             CREATE TRIGGER fire BEFORE INSERT ON app.t FOR EACH ROW EXECUTE FUNCTION app.fire();
             CREATE VIEW app.seen AS SELECT id, app.double(n) FROM app.t;
             COMMENT ON TABLE app.t IS 'a table'",
    );
    top.sql(
        "SET search_path = app; SET datestyle = 'SQL, DMY';
             CREATE TABLE found (id int PRIMARY KEY, at date DEFAULT '01/02/2020', m mood);
             INSERT INTO found (id, m) VALUES (1, 'odd')",
    );
    top.sql("CREATE TABLE app.parted (k int, v text, PRIMARY KEY (k)) PARTITION BY RANGE (k)");
    top.sql(
        "CREATE TABLE app.parted_1 PARTITION OF app.parted FOR VALUES FROM (0) TO (100);
             INSERT INTO app.parted VALUES (1, 'a')",
    );
    // A partition that comes with rows that nobody below has.
    top.sql("SELECT terrace.remove_schema('app')");
    top.sql(
        "CREATE TABLE app.parted_2 (k int NOT NULL, v text);
             INSERT INTO app.parted_2 SELECT g, 'row ' || g FROM generate_series(100, 149) g",
    );
    top.sql("SELECT terrace.add_schema('app')");
    top.sql("ALTER TABLE app.parted ATTACH PARTITION app.parted_2 FOR VALUES FROM (100) TO (200)");
    top.sql(
        "INSERT INTO app.parted VALUES (2, 'b'); UPDATE app.parted SET k = k + 148 WHERE k = 2",
    );
    // Its rows are rows, not the query's of each server.
    top.sql("CREATE TABLE app.made AS SELECT id, clock_timestamp() AS at FROM app.t WITH DATA");
    top.sql("CREATE TEMP TABLE own (id int, at timestamptz DEFAULT now()); INSERT INTO own VALUES (1), (2);
             CREATE TABLE app.from_own AS SELECT * FROM own; CREATE VIEW on_own AS SELECT * FROM own;
             PREPARE p AS SELECT id FROM own; CREATE TABLE app.from_p AS EXECUTE p WITH DATA /* all */;
             SELECT id INTO app.selected FROM own");
    // What every server would fill in in a way of its own.
    top.sql("ALTER TABLE app.t ADD COLUMN at timestamptz DEFAULT clock_timestamp(), ADD COLUMN u uuid DEFAULT gen_random_uuid()");
    top.sql("CREATE TABLE app.late_key (v text); INSERT INTO app.late_key SELECT g FROM generate_series(1, 9) g;
             DELETE FROM app.late_key WHERE v = '1'; INSERT INTO app.late_key VALUES ('10')");
    top.sql("VACUUM app.late_key");
    top.sql("INSERT INTO app.late_key VALUES ('11')");
    top.sql("ALTER TABLE app.late_key ADD COLUMN id serial PRIMARY KEY; ALTER TABLE app.late_key REPLICA IDENTITY DEFAULT;
             UPDATE app.late_key SET v = 'changed' WHERE v = '11'");
    top.sql("ALTER TABLE app.t DISABLE TRIGGER ALL");
    top.sql("ALTER TABLE app.found RENAME TO kept; ALTER TABLE app.kept RENAME COLUMN m TO mood");
    top.sql("INSERT INTO app.kept VALUES (2, '2020-05-04', 'bad')");
    top.sql("CREATE TABLE app.short (id int PRIMARY KEY); INSERT INTO app.short VALUES (1)");
    top.sql("DROP TABLE app.short");
    top.sql("CREATE TEMP TABLE own (id int); ALTER TABLE own ADD COLUMN c int; DROP TABLE own");
    top.sql(
        "DO $$ BEGIN EXECUTE 'CREATE TABLE app.inner (id int PRIMARY KEY)'; END $$;
             INSERT INTO app.inner VALUES (1)",
    );
    wait_for_catalog(&tree);
    tree.wait_for_equal(&[
        "app.t",
        "app.kept",
        "app.parted",
        "app.made",
        "app.inner",
        "app.from_own",
        "app.from_p",
        "app.selected",
        "app.late_key",
    ]);
    // A schema that has another name now is synchronised as before.
    top.sql("ALTER SCHEMA app RENAME TO app2");
    top.sql("CREATE TABLE app2.new (id int PRIMARY KEY); INSERT INTO app2.new VALUES (1)");
    top.sql("UPDATE app2.t SET c = 'end' WHERE id < 100");
    tree.wait_for_equal(&["app2.t", "app2.new", "app2.kept"]);
    tree.all_is_well(counting);
    let conflicts = "SELECT count(*) FROM terrace.conflict";
    for node in &tree.nodes {
        assert_eq!(node.server.value(conflicts), "0", "{}", node.server.name);
    }
}

#[test]
fn ddl_runs_as_the_role_that_ran_it() {
    let tree = tree_with_ddl(STEPS);
    let role = format!("CREATE ROLE maker LOGIN PASSWORD '{PASSWORD}'");
    tree.top.sql(&format!(
        "{role}; CREATE SCHEMA app; CREATE SCHEMA mal; GRANT CREATE, USAGE ON SCHEMA app, mal TO maker"
    ));
    for node in &tree.nodes {
        wait_until("the schema is there", || {
            node.server
                .value("SELECT to_regnamespace('mal') IS NOT NULL")
                == "t"
        });
    }
    let mut client = tree
        .top
        .config()
        .user("maker")
        .password(PASSWORD)
        .connect(NoTls)
        .expect("connect");
    client
        .batch_execute("CREATE TABLE app.own (id int); SELECT terrace.replicate_ddl('CREATE VIEW app.v AS SELECT 1 AS one')")
        .expect("make a table");
    wait_for_stall(&tree, "role \"maker\" does not exist on this server");
    for node in &tree.nodes {
        node.server.sql(&format!(
            "{role}; GRANT CREATE, USAGE ON SCHEMA app, mal TO maker"
        ));
    }
    wait_for_catalog(&tree);
    // One that has more rights here than there would lend them.
    for node in &tree.nodes {
        node.server.sql("ALTER ROLE maker SUPERUSER");
    }
    client
        .batch_execute("SELECT terrace.replicate_ddl('CREATE VIEW app.w AS SELECT 2 AS two')")
        .expect("make a view");
    wait_for_stall(&tree, "\"maker\" is a superuser on this server");
    for node in &tree.nodes {
        node.server.sql("ALTER ROLE maker NOSUPERUSER");
    }
    wait_for_catalog(&tree);
    // Its code has its rights alone, here where the extension runs it and below.
    let code = "
        CREATE FUNCTION app.rise() RETURNS int LANGUAGE plpgsql AS $f$ BEGIN
            BEGIN EXECUTE 'RESET ROLE'; EXECUTE 'ALTER ROLE maker SUPERUSER';
            EXCEPTION WHEN OTHERS THEN NULL; END;
            BEGIN EXECUTE 'ALTER ROLE maker SUPERUSER'; EXCEPTION WHEN OTHERS THEN NULL; END;
            RETURN 1; END $f$;
        CREATE TYPE app.odd AS (x int);
        CREATE FUNCTION app.to_text(app.odd) RETURNS text LANGUAGE sql AS 'SELECT app.rise()::text';
        CREATE CAST (app.odd AS text) WITH FUNCTION app.to_text(app.odd);
        CREATE TABLE app.made AS SELECT 1 AS id, row(1)::app.odd AS o;
        ALTER TABLE app.made ADD COLUMN c int DEFAULT app.rise();
        CREATE VIEW pg_temp.pg_am AS SELECT app.rise();
        CREATE FUNCTION app.rises(text) RETURNS bool LANGUAGE sql AS 'SELECT app.rise() = 1';
        CREATE DOMAIN app.bool AS text CHECK (app.rises(value));
        CREATE FUNCTION app.same(oid, regclass) RETURNS pg_catalog.bool LANGUAGE sql AS 'SELECT app.rise() = 1';
        CREATE OPERATOR app.= (FUNCTION = app.same, LEFTARG = oid, RIGHTARG = regclass);
        SET search_path = app, pg_catalog; CREATE TABLE app.last (id int);
        RESET search_path;";
    // Nor is it the superuser's turn when something is put off to the commit.
    let put_off = "
        CREATE TABLE mal.evil (x int); CREATE TABLE mal.parts (a int) PARTITION BY LIST (a);
        CREATE FUNCTION mal.rise() RETURNS int LANGUAGE plpgsql AS $f$ BEGIN
            BEGIN EXECUTE 'ALTER ROLE maker SUPERUSER'; EXCEPTION WHEN OTHERS THEN NULL; END;
            RETURN 1; END $f$;
        CREATE FUNCTION mal.fire() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM mal.rise(); RETURN NULL; END';
        CREATE CONSTRAINT TRIGGER later AFTER INSERT ON mal.evil DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION mal.fire();
        ALTER TABLE mal.evil ENABLE ALWAYS TRIGGER later;
        CREATE FUNCTION mal.go() RETURNS int LANGUAGE plpgsql AS $f$ BEGIN
            BEGIN INSERT INTO mal.evil VALUES (1); EXCEPTION WHEN OTHERS THEN NULL; END;
            BEGIN EXECUTE 'DECLARE held CURSOR WITH HOLD FOR SELECT mal.rise()';
            EXCEPTION WHEN OTHERS THEN NULL; END;
            RETURN 1; END $f$;
        CREATE TABLE mal.parts_1 PARTITION OF mal.parts FOR VALUES IN (mal.go());
        CREATE FUNCTION mal.zero() RETURNS int IMMUTABLE LANGUAGE plpgsql AS $f$ BEGIN
            BEGIN EXECUTE 'RESET ROLE'; EXECUTE 'ALTER ROLE maker SUPERUSER';
            EXCEPTION WHEN OTHERS THEN NULL; END; RETURN 0; END $f$;
        CREATE TABLE mal.odd (a int) PARTITION BY RANGE ((a + mal.zero()));
        CREATE TABLE mal.odd_1 PARTITION OF mal.odd FOR VALUES FROM (0) TO (9)";
    let index = "CREATE INDEX CONCURRENTLY by_id ON app.last (id)";
    tree.top.sql("SELECT terrace.add_schema('app')");
    client.batch_execute(code).expect("try to rise");
    client.batch_execute(put_off).expect("try to rise later");
    for statement in [
        "SET search_path = app, pg_catalog",
        index,
        "SET search_path = mal, pg_catalog",
        "ALTER TABLE odd DETACH PARTITION odd_1 CONCURRENTLY",
        "RESET search_path",
    ] {
        client.batch_execute(statement).expect("try to rise");
    }
    wait_for_catalog(&tree);
    tree.wait_for_equal(&["app.made"]);
    let made = "SELECT to_regclass('mal.parts_1') IS NOT NULL AND NOT relispartition \
                FROM pg_class WHERE oid = to_regclass('mal.odd_1')";
    for node in &tree.nodes {
        wait_until("one partition is made and one detached", || {
            node.server.value(made) == "t"
        });
    }
    let risen = "SELECT rolsuper FROM pg_roles WHERE rolname = 'maker'";
    let all = tree
        .nodes
        .iter()
        .map(|node| &node.server)
        .chain([&tree.top]);
    for server in all {
        assert_eq!(server.value(risen), "f", "{}", server.name);
    }
    // What it may not do here it may not do there.
    let refused = client
        .batch_execute("DROP TABLE public.steps")
        .expect_err("not its own");
    assert!(explain(&refused).contains("must be owner"), "{refused}");
    tree.top.sql("INSERT INTO steps VALUES (1)");
    tree.wait_for_equal(&["steps"]);
    tree.settled_master("region");
}

#[test]
fn a_statement_that_cannot_run_below_is_shown_and_goes_on() {
    let mut tree = tree_with_ddl(STEPS);
    tree.node("branch-1")
        .server
        .sql("CREATE TABLE public.clash (other int)");
    tree.top.sql(
        "CREATE TABLE public.clash (id int PRIMARY KEY); SELECT terrace.add_table('public.clash');
                  INSERT INTO public.clash VALUES (1)",
    );
    wait_for_stall(
        &tree,
        "CREATE TABLE public.clash (id int PRIMARY KEY)%already exists",
    );
    let lag = "SELECT count(*) FROM terrace.lag WHERE state = 'stalled'";
    assert_eq!(tree.top.value(lag), "1", "nobody else is held up");
    tree.node("branch-1").server.sql("DROP TABLE public.clash");
    tree.wait_for_equal(&["public.clash"]);
    // The other way out: what stands in the way is left out, also when positions that are
    // written late come before it.
    tree.top.sql("INSERT INTO steps VALUES (1)");
    std::thread::sleep(Duration::from_millis(700));
    tree.node("branch-1")
        .server
        .sql("CREATE TABLE public.other (b int)");
    tree.top.sql("CREATE TABLE public.other (a int)");
    wait_for_stall(&tree, "CREATE TABLE public.other (a int)%already exists");
    let end = "SELECT substring(reason FROM 'ends at ([0-9A-F]+/[0-9A-F]+)') FROM terrace.lag WHERE state = 'stalled'";
    let end = tree.top.value(end);
    let skipped = tree
        .node("branch-1")
        .bridge
        .command("skip", &["--lsn", &end]);
    assert!(skipped.expect("run skip").status.success());
    tree.top.sql("INSERT INTO steps VALUES (2)");
    tree.wait_for_equal(&["steps"]);
    // Of several tables that are dropped at once, a server need not have all.
    tree.top.sql(
        "CREATE TABLE public.\"One\" (); CREATE TABLE public.two (); INSERT INTO steps VALUES (3)",
    );
    tree.wait_for_equal(&["steps"]);
    tree.node("branch-1").server.sql("DROP TABLE public.two");
    tree.top
        .sql("DROP TABLE public.two, public.\"One\"; INSERT INTO steps VALUES (4)");
    tree.wait_for_equal(&["steps"]);
    let left = "SELECT to_regclass('public.\"One\"') IS NULL";
    assert_eq!(tree.node("branch-1").server.value(left), "t");
}

// Each of these stalled the whole tree, and took `skip` to go on.
#[test]
fn what_needs_something_that_is_not_below_is_left_out() {
    let schema = format!(
        "{STEPS} CREATE TABLE part (id int PRIMARY KEY, a int, hidden int);
         CREATE TABLE local_here (id int PRIMARY KEY);
         SELECT terrace.add_table('part', columns => '{{id, a}}')"
    );
    let tree = tree_with_ddl(&schema);
    // What did nothing at the top does nothing to a table that a server has for itself.
    for node in &tree.nodes {
        let own = "SET terrace.ddl = off; CREATE TABLE import_tmp AS SELECT 1 AS a, 2 AS b;
            CREATE FUNCTION own(int) RETURNS int LANGUAGE sql AS 'SELECT 7'; CREATE TYPE owned AS ENUM ('own');
            CREATE AGGREGATE own_sum(int) (SFUNC = int4pl, STYPE = int);
            CREATE SCHEMA its_own; CREATE FUNCTION fires() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
            CREATE TRIGGER own BEFORE INSERT ON steps FOR EACH ROW EXECUTE FUNCTION fires()";
        node.server.sql(own);
    }
    tree.top.sql(
        "CREATE FUNCTION briefly(int) RETURNS int LANGUAGE sql AS 'SELECT 1'; CREATE TYPE brief_type AS ENUM ();
         CREATE AGGREGATE brief_sum(int) (SFUNC = int4pl, STYPE = int);
         DROP AGGREGATE IF EXISTS own_sum(int), brief_sum(int);
         CREATE SCHEMA brief_schema; DROP FUNCTION IF EXISTS own(int); DROP FUNCTION IF EXISTS own(int), briefly;
         DROP FUNCTION IF EXISTS briefly(int); DROP TYPE IF EXISTS brief_type, owned CASCADE; DROP TYPE IF EXISTS owned;
         DROP SCHEMA IF EXISTS its_own; DROP SCHEMA IF EXISTS its_own, brief_schema; DROP TRIGGER IF EXISTS own ON steps;
         DROP TRIGGER IF EXISTS own ON nowhere.steps; DROP FUNCTION IF EXISTS own(nowhere.type);
         DROP CAST IF EXISTS (steps AS int); DROP OPERATOR IF EXISTS + (steps, steps);
         SELECT terrace.replicate_ddl('DROP TABLE IF EXISTS import_tmp')",
    );
    tree.top.sql(
        "CREATE TABLE short_lived (); DROP TABLE IF EXISTS import_tmp;
         ALTER TABLE IF EXISTS import_tmp DROP COLUMN b; ALTER TABLE IF EXISTS import_tmp RENAME b TO c;
         DROP TABLE IF EXISTS short_lived, import_tmp",
    );
    tree.top.sql(
        "CREATE INDEX part_hidden ON part (hidden);
         ALTER TABLE part ADD CONSTRAINT few CHECK (hidden < 1000);
         COMMENT ON COLUMN part.hidden IS 'not below';
         ALTER TABLE part RENAME hidden TO unseen; ALTER TABLE part ALTER unseen SET DEFAULT 7;
         CREATE STATISTICS part_statistics ON a, unseen FROM part;
         CREATE VIEW shows AS SELECT unseen FROM part;
         CREATE VIEW of_the_top AS SELECT * FROM local_here; CREATE VIEW of_that AS SELECT * FROM of_the_top;
         COMMENT ON VIEW of_that IS 'not below either';
         CREATE MATERIALIZED VIEW kept AS SELECT * FROM local_here;
         BEGIN; INSERT INTO part VALUES (1, 1, 1); ALTER TABLE part ADD c int GENERATED ALWAYS AS (unseen + 1) STORED;
         INSERT INTO part VALUES (2, 2, 2); COMMIT; INSERT INTO steps VALUES (1)",
    );
    tree.wait_for_equal(&["steps", "(SELECT id, a FROM part)"]);
    for node in &tree.nodes {
        let own = "SELECT a + b || ' ' || (to_regclass('short_lived') IS NULL) FROM import_tmp";
        assert_eq!(node.server.value(own), "3 true");
        let own = "SELECT concat_ws(' ', own(1), 'own'::owned, to_regnamespace('its_own'), to_regproc('briefly'), to_regproc('brief_sum'),
                       to_regproc('own_sum'),
                       to_regtype('brief_type'), to_regnamespace('brief_schema'), tgname)
                   FROM pg_trigger WHERE tgrelid = 'steps'::regclass AND tgname = 'own'";
        assert_eq!(
            node.server.value(own),
            "7 own its_own own_sum own",
            "{}",
            node.server.name
        );
    }
    let left_out = "SELECT count(*) FROM terrace.events WHERE kind = 'left_out' AND reason LIKE '%needs what is not here%'";
    wait_until("all is told", || {
        tree.top.value(left_out).parse::<u32>().expect("count") >= 3 * 10
    });
    // A value that a cast of a user's makes is the top's everywhere.
    tree.top.sql(
        "CREATE TYPE made AS (a int); CREATE TABLE casted (id int PRIMARY KEY, v made);
         SELECT terrace.add_table('casted');
         CREATE FUNCTION at_random(made) RETURNS text LANGUAGE sql VOLATILE AS 'SELECT random()::text';
         CREATE CAST (made AS text) WITH FUNCTION at_random(made) AS ASSIGNMENT;
         INSERT INTO casted SELECT g, ROW(g)::made FROM generate_series(1, 5) g;
         ALTER TABLE casted ALTER v TYPE text; INSERT INTO steps VALUES (2)",
    );
    tree.wait_for_equal(&["steps", "casted"]);
    // What roles own, and what is temporary, is each server's own.
    tree.top.sql("CREATE ROLE owner_here");
    for node in &tree.nodes {
        node.server.sql(
            "CREATE ROLE owner_here; CREATE TABLE own (); ALTER TABLE own OWNER TO owner_here",
        );
    }
    let mut client = tree.top.connect();
    for (sql, reason) in [
        (
            "SELECT terrace.replicate_ddl('DROP OWNED BY owner_here')",
            "cannot be replicated",
        ),
        (
            "CREATE TABLE like_that (LIKE brief)",
            "like a temporary one",
        ),
    ] {
        client
            .batch_execute("CREATE TEMPORARY TABLE IF NOT EXISTS brief (a int)")
            .expect("make it");
        let said = explain(&client.batch_execute(sql).expect_err(sql));
        assert!(said.contains(reason), "{sql}: {said}");
    }
    client
        .batch_execute(
            "DROP OWNED BY owner_here; CREATE FUNCTION pg_temp.brief() RETURNS int LANGUAGE sql AS 'SELECT 1';
             COMMENT ON FUNCTION pg_temp.brief() IS 'brief'; DROP FUNCTION pg_temp.brief();
             INSERT INTO steps VALUES (3)",
        )
        .expect("what is run here alone");
    tree.wait_for_equal(&["steps"]);
    for node in &tree.nodes {
        let kept = "SELECT to_regclass('own') IS NOT NULL";
        assert_eq!(node.server.value(kept), "t", "{}", node.server.name);
    }
}

// Whoever may write messages at the top must not run anything below.
#[test]
fn a_forged_message_is_not_obeyed() {
    let tree = Tree::grow(STEPS, &TREE);
    tree.top
        .sql(&format!("CREATE ROLE nobody LOGIN PASSWORD '{PASSWORD}'"));
    let mut nobody = tree
        .top
        .config()
        .user("nobody")
        .password(PASSWORD)
        .connect(NoTls)
        .expect("connect");
    let forge = |client: &mut Client, prefix: &str, content: &str| {
        client.execute(
            "SELECT pg_logical_emit_message(true, $1, $2::text)",
            &[&prefix, &content],
        )
    };
    forge(
        &mut nobody,
        "terrace.ddl",
        r#"{"sql":"CREATE TABLE public.forged (a int)","role":"postgres","superuser":true,"settings":{},"outside":false}"#,
    )
    .expect("anybody may write messages");
    forge(
        &mut nobody,
        "terrace.rows",
        r#"{"table":["public","steps"],"columns":["n"],"clear":"true","rows":[["-1"]]}"#,
    )
    .expect("anybody may write messages");
    // Nor is it noted what a label says that the extension would not write.
    for tag in [
        r#"{"label":"x"}"#,
        r#"{"tag":"1","label":"a\u0000"}"#,
        r#"{"tag":"a\u0000"}"#,
    ] {
        forge(&mut nobody, "terrace", tag).expect("anybody may write messages");
    }
    for call in [
        "INSERT INTO terrace.seal VALUES ('x')",
        "SELECT terrace.write_sealed('terrace.ddl', '{}')",
        "SELECT terrace.send_rows('', '', 'SELECT 1')",
        "SELECT terrace.resend('steps')",
    ] {
        let refused = nobody.batch_execute(call).expect_err(call);
        assert!(
            explain(&refused).contains("permission denied"),
            "{call}: {}",
            explain(&refused)
        );
    }
    // A seal is for one message, and not for another that says the same.
    let once = r#"{"sql":"CREATE TABLE public.once (a int)","role":"postgres","superuser":true,"settings":{},"outside":false,"about":[]}"#;
    tree.top.sql(&format!(
        "BEGIN; SELECT terrace.write_sealed('terrace.ddl', '{once}');
         SELECT pg_logical_emit_message(true, 'terrace.ddl', '{once}'); COMMIT"
    ));
    tree.top.sql("INSERT INTO steps VALUES (1)");
    tree.wait_for_equal(&["steps"]);
    for node in &tree.nodes {
        assert_eq!(
            node.server
                .value("SELECT to_regclass('forged') IS NULL AND to_regclass('once') IS NOT NULL"),
            "t"
        );
    }
}

#[test]
fn wrong_statements_are_refused() {
    let tree = tree_with_ddl(STEPS);
    let mut client = tree.top.connect();
    let mut refused = |sql: &str| explain(&client.batch_execute(sql).expect_err(sql));
    let wrong = [
        (
            "SELECT terrace.replicate_ddl('CREATE ROLE x')",
            "cannot be replicated as DDL",
        ),
        (
            "SELECT terrace.replicate_ddl('CREATE TABEL x')",
            "syntax error",
        ),
        ("CREATE INDEX CONCURRENTLY ON steps (n)", "without a name"),
    ];
    for (sql, reason) in wrong {
        let said = refused(sql);
        assert!(said.contains(reason), "{sql}: {said}");
    }
    // What has failed is not told when the next one, which is not to be told, is made.
    let mut client = tree.top.connect();
    for failing in [
        "CREATE TABLE broken AS SELECT 1 / n AS n FROM (VALUES (0)) v (n)",
        "DO $$ BEGIN BEGIN CREATE TABLE broken AS SELECT 1 / n AS n FROM (VALUES (0)) v (n);
         EXCEPTION WHEN OTHERS THEN NULL; END; SET LOCAL terrace.ddl = off;
         CREATE TABLE apart_too AS SELECT 1 AS a; END $$",
    ] {
        client.batch_execute(failing).ok();
    }
    client
        .batch_execute("SET terrace.ddl = off; CREATE TABLE apart AS SELECT 1 AS a")
        .expect("make a table that stays");
    // One that succeeds though a part of it fails is told.
    client
        .batch_execute(
            "SET terrace.ddl = on; CREATE FUNCTION tries() RETURNS int LANGUAGE plpgsql AS
             'BEGIN BEGIN PERFORM 1 / 0; EXCEPTION WHEN OTHERS THEN NULL; END; RETURN 1; END';
             CREATE TABLE tried AS SELECT tries() AS a",
        )
        .expect("make a table");
    for node in &tree.nodes {
        wait_until("what was told is there", || {
            node.server.value("SELECT to_regclass('tried') IS NOT NULL") == "t"
        });
        let apart = "SELECT coalesce(to_regclass('apart'), to_regclass('apart_too')) IS NULL";
        assert_eq!(node.server.value(apart), "t", "{}", node.server.name);
    }
    let below: &Server = &tree.nodes[0].server;
    let said = below
        .connect()
        .batch_execute("SELECT terrace.replicate_ddl('CREATE TABLE a (b int)')");
    let said = explain(&said.expect_err("not the top"));
    assert!(said.contains("receives from another"), "{said}");
    // With the library loaded too late, the first statement is refused rather than forgotten.
    tree.top.sql("DO $$ BEGIN EXECUTE format('ALTER DATABASE %I RESET session_preload_libraries', current_database()); END $$");
    let mut client = tree.top.connect();
    let said = explain(
        &client
            .batch_execute("CREATE TABLE early (a int)")
            .expect_err("too early"),
    );
    assert!(said.contains("had not loaded terrace"), "{said}");
    client
        .batch_execute("CREATE TABLE early (a int)")
        .expect("again");
    for node in &tree.nodes {
        wait_until("it is there", || {
            node.server.value("SELECT to_regclass('early') IS NOT NULL") == "t"
        });
    }
}

#[test]
fn bridges_die_in_the_middle_of_ddl() {
    let mut tree = tree_with_ddl(STEPS);
    let counting = count_up(&tree.top);
    tree.top
        .sql("CREATE SCHEMA app; SELECT terrace.add_schema('app')");
    for round in 0..6 {
        tree.top.sql(&format!(
            "CREATE TABLE app.t{round} AS SELECT g AS id, 'row' AS v FROM generate_series(1, 20000) g;
             ALTER TABLE app.t{round} ADD PRIMARY KEY (id)"
        ));
        tree.top.sql(&format!(
            "CREATE INDEX CONCURRENTLY i{round} ON app.t{round} (v)"
        ));
        tree.top.sql(&format!(
            "ALTER TABLE app.t{round} ADD COLUMN w int DEFAULT {round}"
        ));
        tree.top.sql(&format!(
            "UPDATE app.t{round} SET w = id WHERE id % 100 = 0"
        ));
        std::thread::sleep(Duration::from_millis(40 * round));
        for node in &mut tree.nodes {
            node.bridge.kill9();
            node.bridge.restart().expect("restart");
        }
    }
    tree.wait_streaming();
    wait_for_catalog(&tree);
    tree.wait_for_equal(&["app.t0", "app.t1", "app.t2", "app.t3", "app.t4", "app.t5"]);
    tree.all_is_well(counting);
}
