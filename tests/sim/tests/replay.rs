//! A seed replays a run exactly, message for message.

use std::process::Command;

use blobcr_sim::{Settings, Verdict, simulate};

const SEEDS: [u64; 4] = [3, 7, 11, 42];

fn whole(seed: u64) -> Verdict {
    simulate(Settings { whole_trace: true, ..Settings::of(seed) })
}

#[test]
fn a_seed_replays_a_run_in_one_process_whatever_else_runs() {
    for seed in SEEDS {
        let first = whole(seed);
        assert!(first.events > 5_000, "{} events", first.events);
        let other = std::thread::spawn(move || whole(seed + 1000));
        let again = whole(seed);
        other.join().unwrap();
        let differs = first.trace.iter().zip(&again.trace).position(|(a, b)| a != b);
        assert_eq!(differs, None, "seed {seed} differs from this line on");
        assert!(first == again, "seed {seed}");
    }
    assert_ne!(whole(3).hash, whole(4).hash);
}

#[test]
fn a_seed_replays_a_run_in_another_process() {
    let run = |seed: u64| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blobcr-simulate"));
        let output = command.args(["--trace", "--seed", &seed.to_string()]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    for seed in SEEDS {
        let first = run(seed);
        assert!(first == run(seed), "seed {seed}");
        let here = whole(seed);
        let sum = format!("{} events, hash {:016x}", here.events, here.hash);
        assert!(first.contains(&sum), "seed {seed}: {sum} here");
    }
}
