//! Tables of every shape, made anywhere and at any time.

use terrace_tests::{Tree, wait_until};

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
