//! Tables of every shape, made anywhere and at any time.

use terrace_tests::{Server, Tree, wait_until};

const ONE: [(&str, Option<&str>, usize); 1] = [("region", None, 1)];

// UPDATEs of a table that somebody made below without its key were refused there, as it is
// published there too.
#[test]
fn a_keyless_table_below_takes_updates() {
    let schema =
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a'), (2, 'b');
         SELECT terrace.add_table('t')";
    let mut tree = Tree::plant(schema).expect("boot the top");
    tree.boot(&ONE).expect("boot the server");
    tree.nodes[0].server.sql("CREATE TABLE t (id int, v text)");
    tree.start_bridges().expect("start the bridge");
    tree.wait_streaming();
    tree.top
        .sql("UPDATE t SET v = 'c' WHERE id = 1; DELETE FROM t WHERE id = 2");
    tree.wait_for_equal(&["t"]);
}

// What was made below after the stall that asks for it was published and granted to nobody,
// and neither were later partitions: the next copy from there was refused.
#[test]
fn a_table_that_is_made_later_is_copied_on() {
    let mut tree = Tree::grow(
        "CREATE TABLE parted (a int PRIMARY KEY, v text) PARTITION BY LIST (a);
         CREATE TABLE parted_1 PARTITION OF parted FOR VALUES IN (1);
         SELECT terrace.add_table('parted')",
        &ONE,
    );
    let late = "CREATE TABLE late (id int PRIMARY KEY, v text)";
    tree.top
        .sql(&format!("{late}; SELECT terrace.add_table('late')"));
    tree.top.sql("INSERT INTO late VALUES (1, 'a')");
    let stalled = "SELECT count(*) FROM terrace.lag WHERE state = 'stalled' AND reason LIKE '%create it here%'";
    wait_until("the stall is told", || tree.top.value(stalled) == "1");
    tree.nodes[0].server.sql(late);
    tree.wait_for_equal(&["late"]);
    let partition = "CREATE TABLE parted_2 PARTITION OF parted FOR VALUES IN (2)";
    tree.nodes[0].server.sql(partition);
    tree.top.sql(partition);
    tree.top.sql("INSERT INTO parted VALUES (1, 'a'), (2, 'b')");
    tree.wait_for_equal(&["parted"]);
    tree.boot(&[("branch", Some("region"), 1), ("far", None, 1)])
        .expect("boot more servers");
    tree.start_bridges().expect("start their bridges");
    tree.wait_streaming();
    tree.wait_for_equal(&["late", "parted"]);
    // What is dropped at the top leaves the list everywhere, and stays where it is below.
    tree.top.sql("DROP TABLE late");
    wait_until("it leaves the list", || {
        let listed = "SELECT count(*) FROM terrace.tables WHERE \"table\" = 'public.late'";
        tree.nodes
            .iter()
            .all(|node| node.server.value(listed) == "0")
    });
    tree.top.sql("UPDATE parted SET v = 'c' WHERE a = 2");
    tree.wait_for_equal(&["parted"]);
}

// Tables that are copied by a filter read those that inherit from them as well.
#[test]
fn rows_of_inheriting_tables_stay_out_of_the_copy() {
    let schema = "
        CREATE TABLE parent (id int PRIMARY KEY, v text); CREATE TABLE child () INHERITS (parent);
        INSERT INTO parent VALUES (1, 'a'); INSERT INTO child VALUES (2, 'b');
        SELECT terrace.add_table('parent', filter => 'id > 0')";
    let mut tree = Tree::plant(schema).expect("boot the top");
    tree.boot(&ONE).expect("boot the server");
    tree.start_bridges().expect("start the bridge");
    tree.wait_streaming();
    assert_eq!(
        tree.nodes[0].server.value("SELECT count(*) FROM parent"),
        "1"
    );
    tree.top
        .sql("INSERT INTO child VALUES (3, 'c'); INSERT INTO parent VALUES (4, 'd')");
    wait_until("the row arrives", || {
        tree.nodes[0]
            .server
            .value("SELECT string_agg(id::text, ' ' ORDER BY id) FROM parent")
            == "1 4"
    });
}
