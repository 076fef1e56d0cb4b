//! Random tables with random histories, applied set-wise on one server and in order on
//! another: both must come to hold what the top holds.
//!
//! A history is what happens to one table, or to two by turns. The bridges are stopped meanwhile, so that it
//! piles up; a statement that goes alone ends each pile, so that each history is folded by
//! itself or not at all; every third one is a single transaction, which is folded in parts.
//! The server that applies in order has a trigger on each table,
//! enabled for replicas, which says no to folding. Below, tables may have their columns in
//! another order and one more.

mod table;

use std::fmt::{self, Write};

use postgres::Client;

use crate::random::Random;
use crate::{Server, Tree, wait_until};
use table::{TYPES, Table};

/// A tree carries so many histories, then another one is grown.
pub const TREE: u64 = 200;
/// Transactions of a history: always enough to be worth folding.
const TRANSACTIONS: (usize, usize) = (30, 80);
/// One of so many histories is as many times longer.
const LONGER: (u64, usize) = (25, 8);

/// Around a step of a history that is a single transaction.
const IN_BEGIN: &str = "SAVEPOINT step; SET CONSTRAINTS ALL DEFERRED;";
const IN_END: &str = "SET CONSTRAINTS ALL IMMEDIATE; RELEASE step";

/// The history of one or two tables.
struct History {
    seed: u64,
    tables: Vec<Table>,
    /// Those that were committed, or the steps of a single one.
    transactions: Vec<String>,
    /// How many of them come before the pile.
    before: usize,
}

impl History {
    fn of(seed: u64) -> (History, Random) {
        let mut random = Random::new(seed);
        let names = (0..1 + random.below(2)).map(|number| format!("h{seed}_{number}"));
        let names: Vec<String> = names.collect();
        let tables = names
            .into_iter()
            .map(|name| Table::random(&mut random, name));
        let tables = tables.collect();
        let transactions = Vec::new();
        let history = History {
            seed,
            tables,
            transactions,
            before: 0,
        };
        (history, random)
    }

    /// All of it is a single transaction.
    fn is_at_once(&self) -> bool {
        self.seed.is_multiple_of(3)
    }

    /// Most begin with rows that are there already, and are not folded with the rest.
    fn settle(&mut self, top: &mut Client, random: &mut Random) {
        if random.one_in(4) {
            return;
        }
        for table in &self.tables {
            let rows: Vec<String> = table.inserts(random).collect();
            // A constraint may refuse some.
            let kept = rows
                .into_iter()
                .filter(|row| top.batch_execute(row).is_ok());
            self.transactions.extend(kept);
        }
        self.before = self.transactions.len();
        self.end(top);
    }

    fn live(&mut self, top: &mut Client, random: &mut Random) {
        let at_once = self.is_at_once();
        let (begin, end, back) = match at_once {
            true => (IN_BEGIN, IN_END, "ROLLBACK TO step"),
            false => ("BEGIN;", "COMMIT", "ROLLBACK"),
        };
        let mut run = |sql: String, back: &str| match top.batch_execute(&sql) {
            Ok(()) => self.transactions.push(sql),
            // A constraint may refuse some: then they are no history.
            Err(_) => top.batch_execute(back).expect("rollback"),
        };
        if at_once {
            run("BEGIN".into(), "");
        }
        // A table that is seen for the first time ends a pile.
        let first = self
            .tables
            .iter()
            .filter_map(|table| table.inserts(random).next());
        run(format!("{begin}{}{end}", first.collect::<String>()), back);
        let (few, many) = TRANSACTIONS;
        let mut steps = few + random.below(many - few);
        if self.seed.is_multiple_of(LONGER.0) {
            steps *= LONGER.1;
        }
        for _ in 0..if at_once { 3 * steps } else { steps } {
            let mut sql = String::from(begin);
            for _ in 0..=random.below(4) {
                let table = &self.tables[random.below(self.tables.len())];
                sql += &table.statement(random);
                sql.push(';');
            }
            if at_once && random.one_in(30) {
                // It is described anew, which ends a part.
                let fill = 50 + random.below(50);
                let _ = write!(
                    sql,
                    "ALTER TABLE {} SET (fillfactor = {fill});",
                    self.tables[0].name
                );
            }
            sql += end;
            run(sql, back);
        }
        if at_once {
            run("COMMIT".into(), "");
        }
    }

    /// Ends a pile.
    fn end(&self, top: &mut Client) {
        let name = &self.tables[0].name;
        let sql = format!("SELECT terrace.replicate_ddl('COMMENT ON TABLE {name} IS ''done''')");
        top.batch_execute(&sql).expect("end a pile");
    }

    fn must_be_everywhere(&self, tree: &Tree) {
        let [one, other] = [0, 1].map(|node| &tree.nodes[node].server);
        for table in &self.tables {
            let digest = table.digest();
            let wanted = tree.top.value(&digest);
            for server in [one, other] {
                self.must_be(server, server.value(&digest), &wanted);
            }
        }
        // In one order, whichever table it was.
        let said = format!(
            "SELECT count(*) || ' ' || coalesce(md5(string_agg(concat(name, what, old, new), E'\\n' ORDER BY n)), '') \
             FROM said WHERE name LIKE 'h{}\\_%'",
            self.seed
        );
        self.must_be(one, one.value(&said), &other.value(&said));
    }

    fn must_be(&self, server: &Server, found: String, wanted: &str) {
        assert_eq!(
            found,
            wanted,
            "{} after history {}:\n{}\n{}",
            server.name,
            self.seed,
            self.tables
                .iter()
                .map(|table| table.create(None))
                .collect::<String>(),
            self.transactions.join("\n")
        );
    }
}

/// What was tried.
#[derive(Default)]
pub struct Tried {
    /// Transactions at the top, but for those that are a whole history.
    pub transactions: usize,
    /// Those that came before the piles, which only insert.
    pub before: usize,
    /// Of the former those of tables without any that keeps its changes from being folded …
    pub foldable: usize,
    /// … and those, of any, that were folded.
    pub folded: usize,
    /// Parts of larger ones that were folded.
    pub parts: usize,
    /// Piles and parts that were folded with changes of a table with constraints beside its key …
    pub constrained: usize,
    /// … and those that such a constraint refused, which went in order.
    pub refused: usize,
}

impl Tried {
    /// Counts more of them in.
    pub fn add(&mut self, more: &Tried) {
        self.transactions += more.transactions;
        self.before += more.before;
        self.foldable += more.foldable;
        self.folded += more.folded;
        self.parts += more.parts;
        self.constrained += more.constrained;
        self.refused += more.refused;
    }

    /// Panics when so little was folded that it would prove nothing.
    pub fn must_have_folded(&self) {
        // Even if all that came before was.
        assert!(self.folded > self.before + self.foldable / 4, "{self}");
        assert!(self.parts > 5 && self.constrained > 5, "{self}");
        // What only inserts is refused by nothing.
        assert!(self.refused > 0, "{self}");
    }
}

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} transactions after {} inserts, {} of tables that can be folded; {} and {} parts of larger ones \
             folded, {} with further constraints, {} refused",
            self.transactions,
            self.before,
            self.foldable,
            self.folded,
            self.parts,
            self.constrained,
            self.refused
        )
    }
}

/// Runs so many histories, from `seed` on, on a tree of their own; panics, with the history,
/// where a server comes to hold something else than the top.
pub fn run(seed: u64, count: u64) -> Tried {
    let mut tree = Tree::plant(TYPES).expect("boot the top");
    tree.boot(&[("folding", None, 1), ("in_order", None, 1)])
        .expect("boot the servers");
    tree.start_bridges().expect("start the bridges");
    tree.wait_streaming();
    tree.nodes.iter_mut().for_each(|node| {
        node.bridge.stop();
    });
    let mut histories: Vec<(History, Random)> = (seed..seed + count).map(History::of).collect();
    make_tables(&tree, &mut histories);
    let mut top = tree.top.connect();
    for (history, random) in &mut histories {
        history.settle(&mut top, random);
        history.live(&mut top, random);
        history.end(&mut top);
    }
    tree.start_bridges_on_a_pile();
    tree.wait_streaming();
    let end = tree.top.value("SELECT pg_current_wal_insert_lsn()");
    let behind =
        format!("SELECT count(*) FROM terrace.lag WHERE level > 0 AND replay_lsn < '{end}'");
    wait_until("all is applied", || tree.top.value(&behind) == "0");
    let mut tried = Tried::default();
    for (history, _) in &histories {
        history.must_be_everywhere(&tree);
        tried.before += history.before;
        if !history.is_at_once() {
            let transactions = history.transactions.len() - history.before;
            tried.transactions += transactions;
            if history.tables.iter().all(Table::is_foldable) {
                tried.foldable += transactions;
            }
        }
    }
    let [folding, in_order] = &tree.nodes[..] else {
        panic!("two servers");
    };
    let (log, other) = (folding.bridge.logged(), in_order.bridge.logged());
    (tried.folded, tried.parts) = (folded(&log), log.matches(PART).count());
    let tables = numbers(&log, CONSTRAINED);
    tried.constrained = tables.filter(|tables| *tables > 0).count();
    tried.refused = refusals(&log);
    for node in &tree.nodes {
        let conflicts = node.server.value("SELECT count(*) FROM terrace.conflicts");
        assert_eq!(conflicts, "0", "rows were not as expected");
    }
    assert_eq!(
        folded(&other) + other.matches(PART).count(),
        0,
        "one goes in order"
    );
    tried
}

/// What a bridge's log says of a part that was folded.
const PART: &str = "went set-wise";

/// Before the number of tables with further constraints in what was folded.
const CONSTRAINED: &str = "constrained=";

/// Transactions of each pile that a bridge's log says was applied set-wise.
pub fn piles(log: &str) -> impl Iterator<Item = usize> {
    numbers(log, "applied set-wise transactions=")
}

/// Those of all piles.
pub fn folded(log: &str) -> usize {
    piles(log).sum()
}

fn numbers<'a>(log: &'a str, before: &'static str) -> impl Iterator<Item = usize> + 'a {
    log.split(before).skip(1).map(|rest| {
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next();
        digits
            .and_then(|digits| digits.parse().ok())
            .expect("a number")
    })
}

/// Folds that were refused; only what the order of rows can do may be why.
fn refusals(log: &str) -> usize {
    let refused = log
        .lines()
        .filter(|line| line.contains("applying in order"));
    let is_constraint = |line: &&str| {
        line.contains("violates unique constraint")
            || line.contains("violates exclusion constraint")
    };
    let lines: Vec<&str> = refused.collect();
    let other = lines.iter().find(|line| !is_constraint(line));
    assert_eq!(other, None, "a fold went wrong");
    lines.len()
}

fn make_tables(tree: &Tree, histories: &mut [(History, Random)]) {
    let mut everywhere = String::new();
    let mut below: Vec<String> = tree.nodes.iter().map(|_| TYPES.to_owned()).collect();
    let mut added = String::new();
    for (history, random) in histories {
        for table in &history.tables {
            everywhere += &table.create(None);
            for (node, sql) in tree.nodes.iter().zip(&mut below) {
                *sql += &table.create(random.one_in(2).then_some(&mut *random));
                sql.extend(table.trigger());
                if node.server.name.starts_with("in_order") {
                    let name = &table.name;
                    let _ = write!(
                        sql,
                        "CREATE TRIGGER nothing BEFORE INSERT OR UPDATE ON {name} FOR EACH ROW EXECUTE FUNCTION nothing(); \
                     ALTER TABLE {name} ENABLE ALWAYS TRIGGER nothing;"
                    );
                }
            }
            added += &table.add();
        }
    }
    let run = |server: &Server, sql: &str| {
        let result = server.connect().batch_execute(sql);
        result.unwrap_or_else(|error| panic!("{}: {error:?}", server.name));
    };
    run(&tree.top, &everywhere);
    for (node, sql) in tree.nodes.iter().zip(&below) {
        run(&node.server, sql);
    }
    tree.top.sql(&added);
}
