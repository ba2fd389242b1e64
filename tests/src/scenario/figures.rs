//! What the main job cost.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result};

/// What the main job cost.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Of importing the image.
    pub imported: Duration,
    /// Of attaching a disk from it.
    pub attach: Duration,
    /// How long COMMIT held the disk.
    pub downtime: Duration,
    /// From the guest's question to the host's answer.
    pub guest_call: Duration,
    /// How long the guest flushed its file systems before it asked.
    pub guest_flush: Duration,
    /// Bytes of the chunks that had changed.
    pub dirty_bytes: u64,
    /// Bytes that were new to the repository.
    pub stored_bytes: u64,
    /// From the answer until the snapshot was stable, as the guest saw it.
    pub time_to_stable: Duration,
    /// Of attaching a disk from the snapshot.
    pub attach_snapshot: Duration,
    /// From the start of the second VM until its program had resumed.
    pub restart: Duration,
}

/// The number behind ` KEY=` in a line that the guest printed.
fn number(line: &str, key: &str) -> Result<u64> {
    let found = line.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    found.and_then(|text| text.parse().ok()).with_context(|| format!("no {key}= in {line:?}"))
}

impl Figures {
    /// Takes them from what the guest says when its checkpoint was accepted.
    pub(super) fn take_checkpoint(&mut self, line: &str) -> Result<()> {
        self.downtime = Duration::from_micros(number(line, "downtime_us")?);
        self.guest_call = Duration::from_micros(number(line, "elapsed_us")?);
        self.guest_flush = Duration::from_micros(number(line, "flush_us")?);
        self.dirty_bytes = number(line, "dirty_bytes")?;
        Ok(())
    }

    /// Takes them from what the guest says when its checkpoint is stable.
    pub(super) fn take_stable(&mut self, line: &str) -> Result<()> {
        self.stored_bytes = number(line, "stored_bytes")?;
        self.time_to_stable = Duration::from_micros(number(line, "waited_us")?);
        Ok(())
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kib = |bytes: u64| bytes.div_ceil(1024);
        writeln!(f, "import of the image           {:>10} ms", self.imported.as_millis())?;
        writeln!(f, "attach from the image         {:>10} ms", self.attach.as_millis())?;
        writeln!(f, "downtime of the disk          {:>10} µs", self.downtime.as_micros())?;
        writeln!(f, "CHECKPOINT call in the guest  {:>10} µs", self.guest_call.as_micros())?;
        writeln!(f, "the guest's own flush before  {:>10} µs", self.guest_flush.as_micros())?;
        writeln!(f, "dirty                         {:>10} KiB", kib(self.dirty_bytes))?;
        writeln!(f, "stored                        {:>10} KiB", kib(self.stored_bytes))?;
        writeln!(f, "time to stable                {:>10} ms", self.time_to_stable.as_millis())?;
        writeln!(f, "attach from the snapshot      {:>10} ms", self.attach_snapshot.as_millis())?;
        write!(f, "boot until resumed            {:>10} ms", self.restart.as_millis())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_the_lines_of_a_guest() {
        let mut figures = Figures::default();
        figures
            .take_checkpoint(
                "worker: checkpoint at step 4: d@2 disk=first downtime_us=12 dirty_bytes=524288 \
                 elapsed_us=900 flush_us=7000",
            )
            .unwrap();
        figures.take_stable("worker: at step 9: d@2 stable stored_bytes=1 waited_us=5").unwrap();
        assert_eq!(figures.downtime, Duration::from_micros(12));
        assert_eq!((figures.dirty_bytes, figures.stored_bytes), (524_288, 1));
        assert!(figures.take_stable("worker: at step 9: d@2 stable").is_err());
    }
}
