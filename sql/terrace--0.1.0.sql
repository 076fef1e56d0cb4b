-- Terrace 0.1.0. Order: role, what flows where, receiving side, status, views, writing.

\echo Use "CREATE EXTENSION terrace" to load this file. \quit

-- The schema is a member of the extension, so that it goes with it.
CREATE SCHEMA terrace;
SET LOCAL search_path TO terrace, pg_catalog;

-- ----- role ------------------------------------------------------------------

-- May read what is synchronised and call terrace.report, nothing else. Roles
-- belong to the cluster, so it stays when the extension goes.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'terrace_reader') THEN
        CREATE ROLE terrace_reader NOLOGIN;
    END IF;
END $$;

GRANT USAGE ON SCHEMA terrace TO PUBLIC;

-- ----- what flows where ------------------------------------------------------

CREATE TABLE domain (
    name text PRIMARY KEY CHECK (name ~ '^[a-z][a-z0-9_]{0,39}$' AND name <> 'top'),
    parent text REFERENCES domain
);

CREATE TABLE sync_table (
    nspname text NOT NULL,
    relname text NOT NULL,
    domains text[],    -- NULL = everywhere; else with every domain on the way
    columns text[],    -- NULL = all
    filter text,       -- NULL = every row
    PRIMARY KEY (nspname, relname)
);

-- What flows is flowing data itself, so that it is exact at each position.
CREATE PUBLICATION terrace FOR TABLE domain, sync_table;

CREATE FUNCTION tie_publication(publication oid, extension oid) RETURNS void
    LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'tie_publication_wrapper';
SELECT tie_publication(p.oid, e.oid)
FROM pg_catalog.pg_publication p, pg_catalog.pg_extension e
WHERE p.pubname = 'terrace' AND e.extname = 'terrace';

-- ----- the tag ---------------------------------------------------------------

CREATE FUNCTION arm_tag() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'arm_tag_wrapper';
CREATE FUNCTION arm_now() RETURNS void
    LANGUAGE c AS 'MODULE_PATHNAME', 'arm_now_wrapper';

-- What a relay calls first in each session that it passes on. The pass-through role
-- could change itself otherwise: no grant keeps a role from that.
CREATE FUNCTION guard_session() RETURNS void
    LANGUAGE c AS 'MODULE_PATHNAME', 'guard_session_wrapper';

CREATE FUNCTION with_ancestors(names text[]) RETURNS text[]
    LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    unknown text;
BEGIN
    SELECT n INTO unknown FROM unnest(names) n
    WHERE NOT EXISTS (SELECT FROM terrace.domain d WHERE d.name = n) LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'domain "%" does not exist', unknown
            USING ERRCODE = 'undefined_object', HINT = 'See terrace.domains.';
    END IF;
    RETURN (
        WITH RECURSIVE way AS (
            SELECT d.name, d.parent FROM terrace.domain d WHERE d.name = ANY (names)
            UNION
            SELECT d.name, d.parent FROM terrace.domain d JOIN way ON d.name = way.parent
        )
        SELECT array_agg(name ORDER BY name) FROM way
    );
END $$;

CREATE FUNCTION current_tag() RETURNS text
    LANGUAGE sql AS 'SELECT pg_catalog.pg_current_xact_id()::text';

CREATE FUNCTION send(channel text, payload text) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    IF channel IS NULL OR pg_catalog.octet_length(channel) NOT BETWEEN 1 AND 63 THEN
        RAISE EXCEPTION 'channel name must have 1 to 63 bytes'
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF pg_catalog.octet_length(payload) > 7999 THEN
        RAISE EXCEPTION 'payload is too long'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'The limit is 7999 bytes.';
    END IF;
    PERFORM terrace.arm_now();
    PERFORM pg_catalog.pg_logical_emit_message(true, 'terrace.send',
        pg_catalog.json_build_object('channel', channel, 'payload', coalesce(payload, ''))::text);
END $$;

-- ----- table by table: publication, trigger, grant ---------------------------

-- Runs for each change of sync_table, at the top and where it is replayed.
CREATE FUNCTION follow_sync_table() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP IN ('UPDATE', 'DELETE') THEN
        PERFORM terrace.detach_table(OLD.nspname, OLD.relname);
    END IF;
    IF TG_OP IN ('UPDATE', 'INSERT') THEN
        PERFORM terrace.attach_table(NEW.nspname, NEW.relname);
    END IF;
    RETURN NULL;
END $$;

-- Columns that tell one row from the others in the stream; NULL when there are none.
CREATE FUNCTION identity_of(rel regclass) RETURNS int2[]
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE relreplident
        WHEN 'f' THEN (SELECT array_agg(attnum) FROM pg_attribute
                       WHERE attrelid = rel AND attnum > 0 AND NOT attisdropped)
        -- PostgreSQL does not take a key that may be violated for a while.
        ELSE (SELECT (indkey::int2[])[0:indnkeyatts - 1] FROM pg_index
              WHERE indrelid = rel AND indisvalid AND indimmediate
                AND (relreplident = 'd' AND indisprimary OR relreplident = 'i' AND indisreplident))
        END
    FROM pg_class WHERE oid = rel
$$;

CREATE FUNCTION in_publication(rel regclass) RETURNS boolean
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT EXISTS (SELECT FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
                   WHERE p.pubname = 'terrace' AND r.prrelid = rel)
$$;

-- PostgreSQL refuses every UPDATE and DELETE of a published table, on each server,
-- whose old rows cannot be told or that is published by columns outside of that.
CREATE FUNCTION ensure_identity(rel regclass, columns text[]) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    identity int2[] := terrace.identity_of(rel);
    problem text;
    needed int2[] := ARRAY(
        SELECT DISTINCT m[1]::int2 FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid,
            regexp_matches(r.prqual::text, ':varattno (-?[0-9]+)', 'g') m
        WHERE p.pubname = 'terrace' AND r.prrelid = rel);
BEGIN
    IF identity IS NULL THEN
        problem := 'has no usable replica identity';
    ELSIF NOT needed <@ identity
          AND (SELECT relreplident FROM pg_class WHERE oid = rel) <> 'f' THEN
        problem := 'has a filter on columns outside its replica identity';
    END IF;
    IF columns IS NOT NULL THEN
        IF problem IS NULL AND (
            (SELECT relreplident FROM pg_class WHERE oid = rel) = 'f'
            OR NOT identity <@ ARRAY(SELECT attnum FROM pg_attribute
                                     WHERE attrelid = rel AND attname = ANY (columns))) THEN
            problem := 'has columns in its replica identity that are not listed';
        END IF;
        IF problem IS NULL THEN
            RETURN;
        ELSIF terrace.is_top() THEN
            RAISE EXCEPTION 'table "%" %', rel, problem
                USING ERRCODE = 'invalid_parameter_value',
                      DETAIL = 'With a list of columns, rows could not be updated or deleted.',
                      HINT = 'List the columns of the primary key and of the filter too, or leave columns out.';
        ELSIF terrace.in_publication(rel) THEN
            EXECUTE format('ALTER PUBLICATION terrace DROP TABLE ONLY %s', rel);  -- nothing reads it here
        END IF;
    ELSIF problem IS NOT NULL THEN
        IF terrace.is_top() AND NOT (SELECT relispartition FROM pg_class WHERE oid = rel) THEN
            RAISE NOTICE 'table "%" %, setting REPLICA IDENTITY FULL', rel, problem;
        END IF;
        EXECUTE format('ALTER TABLE %s REPLICA IDENTITY FULL', rel);
    END IF;
END $$;

CREATE FUNCTION attach_table(schema_name text, table_name text) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    rel regclass := to_regclass(format('%I.%I', schema_name, table_name));
    setting terrace.sync_table;
    parts regclass[];
    part regclass;
BEGIN
    IF rel IS NULL THEN
        RETURN;  -- not on this server; the bridge stalls when a change for it comes
    END IF;
    SELECT * INTO setting FROM terrace.sync_table
    WHERE nspname = schema_name AND relname = table_name;
    parts := ARRAY(SELECT relid FROM pg_partition_tree(rel) UNION SELECT rel);
    -- The triggers first: where they are, follow_made has nothing to do.
    FOREACH part IN ARRAY parts LOOP
        IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = part AND tgname = 'terrace_tag') THEN
            EXECUTE format('CREATE TRIGGER terrace_tag BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE '
                'ON %s FOR EACH STATEMENT EXECUTE FUNCTION terrace.arm_tag()', part);
            EXECUTE format('ALTER TRIGGER terrace_tag ON %s DEPENDS ON EXTENSION terrace', part);
        END IF;
        EXECUTE format('GRANT SELECT%s ON %s TO terrace_reader',
            (SELECT ' (' || string_agg(quote_ident(c), ', ') || ')' FROM unnest(setting.columns) c), part);
    END LOOP;
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO terrace_reader', schema_name);
    IF NOT terrace.in_publication(rel) THEN
        -- Those that inherit from it are tables of their own; partitions come along anyhow.
        EXECUTE format('ALTER PUBLICATION terrace ADD TABLE ONLY %s%s%s', rel,
            (SELECT '(' || string_agg(quote_ident(c), ', ') || ')' FROM unnest(setting.columns) c),
            ' WHERE (' || setting.filter || ')');
    END IF;
    FOREACH part IN ARRAY parts LOOP
        PERFORM terrace.ensure_identity(part, setting.columns);
    END LOOP;
END $$;

CREATE FUNCTION detach_table(schema_name text, table_name text) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    rel regclass := to_regclass(format('%I.%I', schema_name, table_name));
    part regclass;
BEGIN
    IF rel IS NULL THEN
        RETURN;
    END IF;
    IF terrace.in_publication(rel) THEN
        EXECUTE format('ALTER PUBLICATION terrace DROP TABLE ONLY %s', rel);
    END IF;
    FOR part IN SELECT relid FROM pg_partition_tree(rel) UNION SELECT rel LOOP
        EXECUTE format('DROP TRIGGER IF EXISTS terrace_tag ON %s', part);
        EXECUTE format('REVOKE SELECT ON %s FROM terrace_reader', part);
    END LOOP;
END $$;

-- A table that is made where it is listed already, or a partition that comes later.
CREATE FUNCTION follow_made() RETURNS event_trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    found record;
BEGIN
    FOR found IN
        SELECT DISTINCT s.nspname, s.relname
        FROM pg_event_trigger_ddl_commands() made
        CROSS JOIN LATERAL (SELECT made.objid UNION SELECT relid FROM pg_partition_ancestors(made.objid)) up
        JOIN pg_class c ON c.oid = up.objid AND c.relkind IN ('r', 'p')
        JOIN pg_namespace n ON n.oid = c.relnamespace
        JOIN terrace.sync_table s ON s.nspname = n.nspname AND s.relname = c.relname
        WHERE made.classid = 'pg_class'::regclass
          AND EXISTS (SELECT FROM (SELECT c.oid UNION SELECT relid FROM pg_partition_tree(c.oid)) part
                      WHERE NOT EXISTS (SELECT FROM pg_trigger t
                                        WHERE t.tgrelid = part.oid AND t.tgname = 'terrace_tag'))
    LOOP
        PERFORM terrace.attach_table(found.nspname, found.relname);
    END LOOP;
END $$;

-- What is dropped at the top is listed no more; below, the top's list counts.
CREATE FUNCTION follow_dropped() RETURNS event_trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    gone record;
BEGIN
    FOR gone IN
        SELECT s.nspname, s.relname
        FROM pg_event_trigger_dropped_objects() d
        JOIN terrace.sync_table s ON s.nspname = d.schema_name AND s.relname = d.object_name
        WHERE d.object_type = 'table' AND terrace.is_top()
    LOOP
        DELETE FROM terrace.sync_table s WHERE s.nspname = gone.nspname AND s.relname = gone.relname;
    END LOOP;
END $$;

CREATE TRIGGER follow AFTER INSERT OR UPDATE OR DELETE ON sync_table
    FOR EACH ROW EXECUTE FUNCTION follow_sync_table();
ALTER TABLE sync_table ENABLE ALWAYS TRIGGER follow;

CREATE TRIGGER terrace_tag BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON domain
    FOR EACH STATEMENT EXECUTE FUNCTION arm_tag();
CREATE TRIGGER terrace_tag BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON sync_table
    FOR EACH STATEMENT EXECUTE FUNCTION arm_tag();

-- ----- the receiving side ----------------------------------------------------

-- One row, changed in the transaction that changes the data: any snapshot of
-- the database says exactly where in the top's history it is.
CREATE TABLE progress (
    id boolean PRIMARY KEY DEFAULT true CHECK (id),
    identity text NOT NULL,
    lsn pg_lsn NOT NULL,
    commit_time timestamptz NOT NULL
) WITH (fillfactor = 10);

CREATE TABLE conflict (
    relation text,
    kind text,
    count bigint NOT NULL,
    last_seen timestamptz NOT NULL,
    PRIMARY KEY (relation, kind)
);

-- Changes that a server refused for their values (`on_error = "quarantine"`): the columns in
-- their types' text forms, with the position in the top's WAL.
CREATE TABLE quarantine (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    "time" timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    lsn pg_lsn NOT NULL,
    relation text NOT NULL,
    kind text NOT NULL,
    old jsonb,
    new jsonb,
    sqlstate text NOT NULL,
    error text NOT NULL
);

CREATE FUNCTION bump_conflict(relation text, kind text, n bigint) RETURNS void
    LANGUAGE sql AS $$
    INSERT INTO terrace.conflict AS c VALUES (relation, kind, n, pg_catalog.clock_timestamp())
    ON CONFLICT ON CONSTRAINT conflict_pkey
    DO UPDATE SET count = c.count + EXCLUDED.count, last_seen = EXCLUDED.last_seen
$$;

CREATE FUNCTION refuse_write() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'cannot write to synchronised table "%.%" on this server',
            TG_TABLE_SCHEMA, TG_TABLE_NAME
        USING ERRCODE = 'read_only_sql_transaction',
              HINT = 'Write at the top, or call terrace.unprotect first.';
END $$;

-- The guard does not fire for the bridge, whose session_replication_role is replica.
CREATE FUNCTION protect(rel regclass) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    EXECUTE format('CREATE OR REPLACE TRIGGER terrace_protect '
        'BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON %s '
        'FOR EACH STATEMENT EXECUTE FUNCTION terrace.refuse_write()', rel);
    EXECUTE format('ALTER TRIGGER terrace_protect ON %s DEPENDS ON EXTENSION terrace', rel);
END $$;

CREATE FUNCTION unprotect(rel regclass) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    EXECUTE format('DROP TRIGGER IF EXISTS terrace_protect ON %s', rel);
END $$;

-- ----- what is synchronised --------------------------------------------------

CREATE FUNCTION must_be_top() RETURNS void
    LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF EXISTS (SELECT FROM terrace.progress) THEN
        RAISE EXCEPTION 'this server receives from another one'
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'Define domains and tables at the top; they flow down by themselves.';
    END IF;
END $$;

CREATE FUNCTION create_domain(name text, parent text DEFAULT NULL) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM terrace.must_be_top();
    IF name IS NULL OR name !~ '^[a-z][a-z0-9_]{0,39}$' OR name = 'top' THEN
        RAISE EXCEPTION 'invalid domain name "%"', name
            USING ERRCODE = 'invalid_name', HINT = 'A name starts with a lower-case letter and goes '
                'on with lower-case letters, digits or "_", 40 in all; "top" is taken.';
    END IF;
    IF parent IS NOT NULL THEN
        PERFORM terrace.with_ancestors(ARRAY[parent]);
    END IF;
    IF EXISTS (SELECT FROM terrace.domain d WHERE d.name = create_domain.name) THEN
        RAISE EXCEPTION 'domain "%" already exists', name USING ERRCODE = 'duplicate_object';
    END IF;
    INSERT INTO terrace.domain VALUES (create_domain.name, create_domain.parent);
END $$;

CREATE FUNCTION drop_domain(name text) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM terrace.must_be_top();
    PERFORM terrace.with_ancestors(ARRAY[name]);
    IF EXISTS (SELECT FROM terrace.domain d WHERE d.parent = drop_domain.name) THEN
        RAISE EXCEPTION 'cannot drop domain "%" because other domains are below it', name
            USING ERRCODE = 'dependent_objects_still_exist', HINT = 'Drop those first.';
    END IF;
    DELETE FROM terrace.domain d WHERE d.name = drop_domain.name;
END $$;

CREATE FUNCTION add_table(rel regclass, domains text[] DEFAULT NULL, filter text DEFAULT NULL,
                          columns text[] DEFAULT NULL) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    class record;
    has_rows boolean;
BEGIN
    PERFORM terrace.must_be_top();
    SELECT n.nspname, c.relname, c.relkind, c.relpersistence INTO class
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = rel;
    IF class.relkind IS NULL OR class.relkind NOT IN ('r', 'p') THEN
        RAISE EXCEPTION '"%" is not a table', rel
            USING ERRCODE = 'wrong_object_type', HINT = 'Only tables can be synchronised.';
    END IF;
    IF class.relpersistence <> 'p' THEN
        RAISE EXCEPTION 'table "%" is temporary or unlogged', rel
            USING ERRCODE = 'wrong_object_type', HINT = 'Such tables leave nothing in the WAL.';
    END IF;
    IF class.nspname IN ('terrace', 'pg_catalog', 'information_schema') THEN
        RAISE EXCEPTION 'table "%" belongs to the system', rel USING ERRCODE = 'wrong_object_type';
    END IF;
    IF EXISTS (SELECT FROM terrace.sync_table s
               WHERE s.nspname = class.nspname AND s.relname = class.relname) THEN
        RAISE EXCEPTION 'table "%" is synchronised already', rel
            USING ERRCODE = 'duplicate_object', HINT = 'Call terrace.remove_table first.';
    END IF;
    IF domains IS NOT NULL THEN
        domains := terrace.with_ancestors(domains);
    END IF;
    INSERT INTO terrace.sync_table VALUES (class.nspname, class.relname, domains, columns, filter);
    EXECUTE format('SELECT EXISTS (SELECT FROM %s%s)',
        CASE class.relkind WHEN 'r' THEN 'ONLY ' END, rel) INTO has_rows;
    IF has_rows AND (EXISTS (SELECT FROM terrace.status s WHERE s.domain <> 'top')
                     OR EXISTS (SELECT FROM pg_replication_slots WHERE slot_name LIKE 'terrace\_%')) THEN
        RAISE WARNING 'rows that table "%" has now do not reach servers that receive already', rel
            USING HINT = 'Only later changes do. Write the rows again, or run terrace-bridge resync on the servers below, '
                'parents first.';
    END IF;
END $$;

CREATE FUNCTION add_schema(name text) RETURNS integer
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    rel regclass;
    added integer := 0;
BEGIN
    IF to_regnamespace(quote_ident(name)) IS NULL THEN
        RAISE EXCEPTION 'schema "%" does not exist', name USING ERRCODE = 'undefined_schema';
    END IF;
    FOR rel IN SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
               WHERE n.nspname = name AND c.relkind IN ('r', 'p') AND c.relpersistence = 'p'
                 AND NOT c.relispartition
                 AND NOT EXISTS (SELECT FROM terrace.sync_table s
                                 WHERE s.nspname = n.nspname AND s.relname = c.relname)
    LOOP
        PERFORM terrace.add_table(rel);
        added := added + 1;
    END LOOP;
    RETURN added;
END $$;

CREATE FUNCTION remove_table(rel regclass) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM terrace.must_be_top();
    DELETE FROM terrace.sync_table s USING pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.oid = rel AND s.nspname = n.nspname AND s.relname = c.relname;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'table "%" is not synchronised', rel USING ERRCODE = 'undefined_object';
    END IF;
END $$;

CREATE VIEW domains AS
    WITH RECURSIVE tree AS (
        SELECT name, parent, 1 AS level, ARRAY[name] AS path FROM domain WHERE parent IS NULL
        UNION ALL
        SELECT d.name, d.parent, t.level + 1, t.path || d.name FROM domain d JOIN tree t ON d.parent = t.name
    )
    SELECT name, parent, level, path FROM tree;

CREATE VIEW tables AS
    SELECT pg_catalog.format('%I.%I', s.nspname, s.relname) AS "table", s.domains, s.columns, s.filter,
           CASE c.relreplident WHEN 'd' THEN 'default' WHEN 'n' THEN 'nothing'
                               WHEN 'f' THEN 'full' WHEN 'i' THEN 'index' END AS replica_identity
    FROM sync_table s
    LEFT JOIN pg_catalog.pg_namespace n ON n.nspname = s.nspname
    LEFT JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = s.relname;

-- ----- status ----------------------------------------------------------------

-- What each bridge said last; worth nothing after a crash, so unlogged.
CREATE UNLOGGED TABLE status (
    node text PRIMARY KEY,
    instance text NOT NULL,
    domain text NOT NULL,
    reply_time timestamptz NOT NULL,
    self boolean NOT NULL,
    report jsonb NOT NULL
);

CREATE TABLE event (
    seq bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    id text PRIMARY KEY,
    "time" timestamptz NOT NULL,
    node text NOT NULL,
    domain text NOT NULL,
    kind text NOT NULL,
    reason text
);

-- A bridge tells of itself first, then of what it was told from below. What is
-- wrong with itself is an error; what is wrong with another is left out.
CREATE FUNCTION report(report jsonb) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    n jsonb;
    e jsonb;
    first boolean := true;
    heard timestamptz;
    told boolean := false;
BEGIN
    FOR n IN SELECT jsonb_array_elements(report -> 'nodes') LOOP
        BEGIN
            PERFORM terrace.check_reporter(n);
        EXCEPTION WHEN undefined_object OR duplicate_object OR data_exception THEN
            IF first THEN
                RAISE;
            END IF;
            CONTINUE;
        END;
        first := false;
        heard := clock_timestamp() - make_interval(secs => greatest((n ->> 'age_ms')::float8, 0) / 1000);
        INSERT INTO terrace.status AS s
        VALUES (n ->> 'node', n ->> 'instance', n ->> 'domain', heard,
                terrace.is_own_report(n), n - 'age_ms' - 'self')
        ON CONFLICT (node) DO UPDATE
        SET instance = EXCLUDED.instance, domain = EXCLUDED.domain,
            reply_time = EXCLUDED.reply_time, self = EXCLUDED.self, report = EXCLUDED.report
        -- What was held up on the way says nothing of now.
        WHERE s.instance <> EXCLUDED.instance OR s.reply_time < clock_timestamp() - interval '5 s'
           OR coalesce((s.report ->> 'seq')::bigint, 0) < (EXCLUDED.report ->> 'seq')::bigint;
    END LOOP;
    FOR e IN SELECT jsonb_array_elements(report -> 'events') LOOP
        -- One that is wrong would come again with every report, and keep the others away.
        BEGIN
            INSERT INTO terrace.event ("id", "time", node, domain, kind, reason)
            SELECT e ->> 'id', (e ->> 'time')::timestamptz, e ->> 'node', e ->> 'domain', e ->> 'kind',
                   e ->> 'reason'
            WHERE isfinite((e ->> 'time')::timestamptz)
            ON CONFLICT DO NOTHING;
            told := told OR FOUND;
        EXCEPTION WHEN data_exception OR integrity_constraint_violation OR program_limit_exceeded THEN
            CONTINUE;
        END;
    END LOOP;
    IF told THEN
        DELETE FROM terrace.event WHERE seq < (SELECT max(seq) FROM terrace.event) - 10000;
    END IF;
END $$;

-- The views cast and subtract what a report says, and one that they fail on would
-- hide the whole tree from every server above: it must not get in.
CREATE FUNCTION check_reporter(n jsonb) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r record;
    key text;
BEGIN
    SELECT * INTO r FROM jsonb_to_record(n) AS r(node text, instance text, domain text, "self" boolean,
        received_lsn pg_lsn, flush_lsn pg_lsn, replay_lsn pg_lsn, replay_time timestamptz,
        caught_up boolean, apply_rate float8, catchup_seconds float8, age_ms float8, seq bigint);
    FOREACH key IN ARRAY ARRAY['node', 'instance', 'domain'] LOOP
        IF coalesce(octet_length(n ->> key), 0) NOT BETWEEN 1 AND 200 THEN
            RAISE EXCEPTION '"%" of a report must have 1 to 200 bytes', key
                USING ERRCODE = 'invalid_parameter_value';
        END IF;
    END LOOP;
    FOREACH key IN ARRAY ARRAY['received_lsn', 'flush_lsn', 'replay_lsn'] LOOP
        PERFORM ((n ->> key)::pg_lsn - '0/0')::bigint;
    END LOOP;
    -- A comparison takes NaN for more than any number.
    FOREACH key IN ARRAY ARRAY['apply_rate', 'catchup_seconds', 'age_ms'] LOOP
        IF abs((n ->> key)::float8) > 1e12 THEN
            RAISE EXCEPTION '"%" of a report is out of range', key
                USING ERRCODE = 'numeric_value_out_of_range';
        END IF;
    END LOOP;
    PERFORM make_interval(secs => r.catchup_seconds),
            clock_timestamp() - make_interval(secs => r.age_ms / 1000);
    IF NOT isfinite(r.replay_time)
       OR EXISTS (SELECT FROM jsonb_to_recordset(nullif(n -> 'conflicts', 'null'))
                      AS c("table" text, kind text, count bigint, last_seen timestamptz)
                  WHERE NOT isfinite(c.last_seen)) THEN
        RAISE EXCEPTION 'a time in a report is infinite' USING ERRCODE = 'datetime_field_overflow';
    END IF;
    IF r.domain <> 'top'
       AND NOT EXISTS (SELECT FROM terrace.domain d WHERE d.name = r.domain)
       AND NOT terrace.is_own_report(n) THEN
        RAISE EXCEPTION 'domain "%" does not exist', r.domain
            USING ERRCODE = 'undefined_object',
                  HINT = 'Create it at the top with terrace.create_domain.';
    END IF;
    IF EXISTS (SELECT FROM terrace.status s
               WHERE s.node = r.node AND s.instance <> r.instance
                 AND s.reply_time > clock_timestamp() - interval '5 s') THEN
        RAISE EXCEPTION 'node name "%" is already in use by another bridge', r.node
            USING ERRCODE = 'duplicate_object', HINT = 'Give each server its own node.name.';
    END IF;
END $$;

-- Only the bridge beside this server, a superuser, tells of the server itself.
CREATE FUNCTION is_own_report(n jsonb) RETURNS boolean
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT (n ->> 'self')::boolean IS TRUE
       AND (SELECT rolsuper FROM pg_roles WHERE rolname = session_user)
$$;

-- What the bridge beside this server tells its upstream: conflicts here, the
-- servers below, and the events that came after number "after".
CREATE FUNCTION to_report(after bigint) RETURNS jsonb
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT jsonb_build_object(
        'paths', (SELECT jsonb_object_agg(name, path) FROM terrace.domains),
        'conflicts', (SELECT jsonb_agg(jsonb_build_object('table', relation, 'kind', kind,
                          'count', count, 'last_seen', last_seen)) FROM terrace.conflict),
        'nodes', (SELECT coalesce(jsonb_agg(report || jsonb_build_object('age_ms',
                      extract(epoch FROM clock_timestamp() - reply_time) * 1000)), '[]')
                  FROM terrace.status WHERE NOT self AND reply_time > now() - interval '1 min'),
        'events', (SELECT coalesce(jsonb_agg(to_jsonb(e)), '[]') FROM (
                      SELECT * FROM terrace.event WHERE seq > after ORDER BY seq LIMIT 200) e))
$$;

CREATE VIEW node_status AS
    SELECT s.node, s.domain, s.reply_time, s.self, r.*,
           s.reply_time < pg_catalog.clock_timestamp() - interval '5 s' AS silent
    FROM status s, pg_catalog.jsonb_to_record(s.report) AS r(
        role text, state text, reason text, upstream text, received_lsn pg_lsn, flush_lsn pg_lsn,
        replay_lsn pg_lsn, replay_time timestamptz, caught_up boolean, apply_rate float8,
        catchup_seconds float8, last_tag text, last_label text, conflicts jsonb);

-- The top's position as far as it is known here.
CREATE FUNCTION top_lsn() RETURNS pg_lsn
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN EXISTS (SELECT FROM terrace.progress)
        THEN (SELECT max(received_lsn) FROM terrace.node_status WHERE self)
        WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
        ELSE pg_current_wal_lsn() END
$$;

CREATE FUNCTION is_top() RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS
    'SELECT NOT EXISTS (SELECT FROM terrace.progress)';

CREATE VIEW lag AS
    WITH top AS MATERIALIZED (SELECT top_lsn() AS lsn, is_top() AS here)
    SELECT s.domain, CASE WHEN s.domain = 'top' THEN 0 ELSE d.level END AS level, s.node, s.role,
           CASE WHEN s.silent THEN 'down' ELSE s.state END AS state, s.upstream,
           s.received_lsn, s.flush_lsn, s.replay_lsn,
           greatest(top.lsn - s.replay_lsn, 0)::bigint AS lag_bytes,
           CASE WHEN s.caught_up AND NOT s.silent THEN interval '0'
                ELSE greatest(pg_catalog.clock_timestamp() - s.replay_time, interval '0')
           END AS replay_lag,
           s.apply_rate, pg_catalog.make_interval(secs => s.catchup_seconds) AS catchup_interval,
           s.last_tag, s.last_label, s.reply_time,
           CASE WHEN s.silent THEN 'no report for more than 5 s' ELSE s.reason END AS reason
    FROM node_status s CROSS JOIN top LEFT JOIN domains d ON d.name = s.domain
    UNION ALL
    SELECT 'top', 0, 'top', 'master', 'streaming', NULL, lsn, lsn, lsn, 0, interval '0', NULL, NULL,
           NULL, NULL, pg_catalog.clock_timestamp(), NULL
    FROM top WHERE here AND NOT EXISTS (
        -- A bridge of the top tells by itself; one of another domain is copying to this server.
        SELECT FROM status WHERE domain = 'top' OR self AND reply_time > now() - interval '5 s')
    ORDER BY 2, 1, 4, 3;

CREATE VIEW topology AS
    SELECT tree, role, state FROM (
        SELECT pg_catalog.repeat('    ', l.level) || l.node AS tree, l.role, l.state,
               coalesce(d.path, '{}') || ARRAY['', l.role, l.node] AS place
        FROM lag l LEFT JOIN domains d ON d.name = l.domain
        UNION ALL
        SELECT pg_catalog.repeat('    ', level - 1) || '  ' || name || ':', NULL, NULL, path
        FROM domains
        WHERE is_top() OR name IN (SELECT domain FROM status)
    ) rows ORDER BY place;

CREATE VIEW events AS SELECT "time", node, domain, kind, reason FROM event ORDER BY "time";

CREATE VIEW conflicts AS
    SELECT coalesce((SELECT node FROM status WHERE self), 'top') AS node, relation AS "table", kind,
           count, last_seen
    FROM conflict
    UNION ALL
    SELECT s.node, c."table", c.kind, c.count, c.last_seen
    FROM node_status s, pg_catalog.jsonb_to_recordset(s.conflicts)
        AS c("table" text, kind text, count bigint, last_seen timestamptz)
    WHERE NOT s.self;

CREATE FUNCTION wait_for(lsn pg_lsn, domain text DEFAULT NULL, timeout interval DEFAULT '10s')
    RETURNS boolean LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    deadline timestamptz := clock_timestamp() + timeout;
    done boolean;
BEGIN
    IF domain IS NOT NULL THEN
        PERFORM terrace.with_ancestors(ARRAY[domain]);
    END IF;
    LOOP
        SELECT bool_and(s.replay_lsn >= wait_for.lsn) INTO done FROM terrace.node_status s
        WHERE NOT s.silent AND s.domain <> 'top'
          AND (wait_for.domain IS NULL OR s.domain = wait_for.domain);
        IF done OR clock_timestamp() > deadline THEN
            RETURN coalesce(done, false);
        END IF;
        PERFORM pg_sleep(0.01);
    END LOOP;
END $$;

-- ----- who may what ----------------------------------------------------------

-- Whoever may write at the top may send, so send is for everybody; a session through
-- a relay is kept from it by its guard, as it is from pg_notify and the like.
REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA terrace FROM PUBLIC;
GRANT EXECUTE ON FUNCTION arm_now(), current_tag(), with_ancestors(text[]), send(text, text),
    top_lsn(), is_top(), wait_for(pg_lsn, text, interval) TO PUBLIC;
GRANT EXECUTE ON FUNCTION report(jsonb), guard_session() TO terrace_reader;
GRANT SELECT ON domain, sync_table, domains, tables, status, node_status, lag, topology, event,
    events, conflict, conflicts, progress TO PUBLIC;

-- Last, as they would fire for the tables of this file.
CREATE EVENT TRIGGER terrace_made ON ddl_command_end
    WHEN TAG IN ('CREATE TABLE', 'CREATE TABLE AS', 'SELECT INTO', 'CREATE SCHEMA', 'ALTER TABLE')
    EXECUTE FUNCTION follow_made();
CREATE EVENT TRIGGER terrace_dropped ON sql_drop EXECUTE FUNCTION follow_dropped();
