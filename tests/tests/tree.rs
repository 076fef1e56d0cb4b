//! A tree of real servers: what is written at the top is everywhere below, whole
//! and in order, whatever dies meanwhile.

use std::time::Duration;

use terrace_tests::{Server, Tree};

const SCHEMA: &str = "
    CREATE TABLE account (id int PRIMARY KEY, balance bigint NOT NULL, note text);
    INSERT INTO account SELECT g, 1000, NULL FROM generate_series(1, 100) g;
    CREATE TABLE line (n bigserial PRIMARY KEY, at timestamptz DEFAULT now());
    CREATE TABLE keyless (a int, b text);
    SELECT terrace.add_table('account');
    SELECT terrace.add_table('line');
    SELECT terrace.add_table('keyless');";

const TRANSFER: &str = "
    WITH a AS (SELECT 1 + (random() * 99)::int AS src, 1 + (random() * 99)::int AS dst)
    UPDATE account SET balance = balance
        + CASE WHEN id = dst AND src <> dst THEN 7 ELSE 0 END
        - CASE WHEN id = src AND src <> dst THEN 7 ELSE 0 END
    FROM a WHERE id IN (src, dst)";

async fn load(top: &Server, rounds: usize) {
    let client = top.connect().await;
    for round in 0..rounds {
        client.batch_execute(TRANSFER).await.expect("transfer");
        client
            .batch_execute("INSERT INTO line DEFAULT VALUES")
            .await
            .expect("insert");
        if round % 10 == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Reads one server over and over: the sum of all accounts never changes.
async fn observe(server: &Server, rounds: usize) {
    let client = server.connect().await;
    for _ in 0..rounds {
        let row = client
            .query_one("SELECT count(*), sum(balance)::bigint FROM account", &[])
            .await;
        if let Ok(row) = row {
            let (count, sum): (i64, Option<i64>) = (row.get(0), row.get(1));
            assert!(
                count == 0 || sum == Some(100_000),
                "{} shows {count} {sum:?}",
                server.name
            );
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_levels_hold_what_the_top_holds() {
    let mut tree = Tree::start(&[("region", 3), ("branch", 3)], SCHEMA).await;

    // Rows that were there before, copied while others come.
    load(&tree.top, 200).await;
    for server in tree.below() {
        server
            .wait_value("SELECT count(*) FROM terrace.progress", "1")
            .await;
    }
    tree.assert_equal("account").await;
    tree.assert_equal("line").await;

    // Every kind of change.
    let client = tree.top.connect().await;
    client
        .batch_execute(
            "INSERT INTO keyless VALUES (1, 'x'), (1, 'x'), (2, NULL);
             DELETE FROM keyless WHERE ctid = (SELECT min(ctid) FROM keyless WHERE a = 1);
             UPDATE keyless SET b = 'it''s \\ \"ü\"' WHERE a = 2;
             UPDATE account SET note = repeat('long ', 20000) WHERE id = 5;
             UPDATE account SET balance = balance WHERE id = 5;
             UPDATE account SET id = 1005 WHERE id = 6;
             UPDATE account SET id = 6 WHERE id = 1005;
             BEGIN; SAVEPOINT s; INSERT INTO keyless VALUES (9, 'gone'); ROLLBACK TO s;
             INSERT INTO keyless VALUES (3, 'kept'); COMMIT",
        )
        .await
        .expect("mixed changes");
    for table in ["account", "line", "keyless"] {
        tree.assert_equal(table).await;
    }

    // What stays at the top, and labels.
    // One call each: statements sent together are one transaction.
    for sql in [
        "SET terrace.sync = off",
        "INSERT INTO keyless VALUES (100, 'stays')",
        "RESET terrace.sync",
        "SET terrace.label = 'prices 7'",
        "INSERT INTO keyless VALUES (4, 'labelled')",
    ] {
        client.batch_execute(sql).await.expect(sql);
    }
    tree.settle().await;
    for server in tree.below() {
        let sql = "SELECT string_agg(a::text, ' ' ORDER BY a) FROM keyless";
        server.wait_value(sql, "1 2 3 4").await;
    }
    for sql in [
        "SET terrace.sync = off",
        "DELETE FROM keyless WHERE a = 100",
        "RESET ALL",
    ] {
        client.batch_execute(sql).await.expect(sql);
    }
    let sql = "SELECT count(*) FROM terrace.lag WHERE last_label = 'prices 7' AND level > 0";
    tree.top.wait_value(sql, "6").await;
    let sql = "SELECT count(*) FILTER (WHERE role = 'master') || ' ' || count(*) FROM terrace.lag \
               WHERE level > 0 AND state = 'streaming'";
    tree.top.wait_value(sql, "2 6").await;
    let sql = "SELECT terrace.wait_for(pg_current_wal_lsn())";
    tree.top.wait_value(sql, "t").await;

    // A paused bridge falls behind, visibly, and comes back.
    let branch = &tree.domains[1].bridges[0];
    branch.signal("STOP");
    let sql = "SELECT replay_lag > interval '2 s' FROM terrace.lag WHERE node = 'branch-1'";
    tree.top.wait_value(sql, "t").await;
    branch.signal("CONT");
    let sql = "SELECT replay_lag < interval '1 s' FROM terrace.lag WHERE node = 'branch-1'";
    tree.top.wait_value(sql, "t").await;

    // Killed under load, one after the other: a bridge of each level, the
    // Postgres of servers at both, and the top's.
    let faults = async {
        let (top, domains) = (&mut tree.top, &mut tree.domains);
        for domain in domains.iter_mut() {
            for index in [0, 2] {
                domain.bridges[index].kill9();
                tokio::time::sleep(Duration::from_millis(300)).await;
                domain.bridges[index].start();
                domain.servers[index].kill9();
                domain.servers[index].resume();
                domain.servers[index].connect().await;
            }
        }
        load(top, 100).await;
        top.kill9();
        top.resume();
        top.connect().await;
        load(top, 100).await;
    };
    faults.await;
    let observers = async {
        let reads: Vec<_> = tree.below().map(|server| observe(server, 200)).collect();
        for read in reads {
            read.await;
        }
    };
    tokio::join!(load(&tree.top, 1_000), observers);
    for table in ["account", "line", "keyless"] {
        tree.assert_equal(table).await;
    }
}
