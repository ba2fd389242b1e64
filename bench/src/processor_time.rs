//! What processes have used of the processors.

use anyhow::Context;

/// Seconds that a process has used, in user and kernel mode.
///
/// # Errors
/// When there is no such process.
pub fn of(pid: u32) -> anyhow::Result<f64> {
    fields(&std::fs::read_to_string(format!("/proc/{pid}/stat"))?, 11)
}

/// Seconds that those children of this process have used that were waited for.
///
/// # Errors
/// When the system does not tell.
pub fn of_children() -> anyhow::Result<f64> {
    fields(&std::fs::read_to_string("/proc/self/stat")?, 13)
}

/// User and system time, the first of which is that many fields behind the state.
fn fields(stat: &str, at: usize) -> anyhow::Result<f64> {
    // The name before may hold anything.
    let (_, rest) = stat.rsplit_once(") ").context("/proc/PID/stat")?;
    let ticks = rest.split(' ').skip(at).take(2).map(str::parse::<f64>);
    let ticks: f64 = ticks.sum::<Result<f64, _>>()?;
    Ok(ticks / rustix::param::clock_ticks_per_second() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_used_its_processor() {
        assert!(of(std::process::id()).unwrap() >= 0.0);
    }
}
