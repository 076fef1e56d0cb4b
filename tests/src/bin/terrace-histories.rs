//! Random histories, set-wise and in order: `terrace-histories COUNT SEED`.

use std::process::ExitCode;
use std::time::Instant;

use terrace_tests::histories::{TREE, Tried, run};
use terrace_tests::process::end_all;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<u64>());
    let (Some(Ok(count)), Some(Ok(seed))) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: terrace-histories COUNT SEED");
        return ExitCode::from(2);
    };
    let handler = || {
        end_all();
        std::process::exit(130);
    };
    if let Err(error) = ctrlc::set_handler(handler) {
        eprintln!("terrace-histories: {error}");
        return ExitCode::FAILURE;
    }
    let (start, mut all) = (Instant::now(), Tried::default());
    for first in (0..count).step_by(TREE as usize) {
        let histories = TREE.min(count - first);
        all.add(&run(seed + first, histories));
        println!(
            "{} histories equal; {all}; {:.0} s",
            first + histories,
            start.elapsed().as_secs_f64()
        );
    }
    if count >= TREE {
        all.must_have_folded();
    }
    ExitCode::SUCCESS
}
