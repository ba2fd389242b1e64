//! QEMU's machine protocol, as its emulator and its storage daemon speak it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// How long QEMU may take to answer one command.
const TIME: Duration = Duration::from_secs(30);

/// A conversation with QEMU in its machine protocol. A VM has one at a time.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    input: BufReader<UnixStream>,
}

impl Qmp {
    /// Begins one.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path)
            .with_context(|| format!("cannot connect to {}", path.display()))?;
        stream.set_read_timeout(Some(TIME))?;
        let mut qmp = Self { input: BufReader::new(stream.try_clone()?), stream };
        let mut greeting = String::new();
        qmp.input.read_line(&mut greeting)?;
        qmp.ask("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Gives QEMU one command and returns its answer.
    ///
    /// # Errors
    /// When QEMU refuses it or does not answer.
    pub fn ask(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        writeln!(self.stream, "{request}")?;
        loop {
            let mut line = String::new();
            if self.input.read_line(&mut line)? == 0 {
                bail!("QEMU closed its control socket during {command}");
            }
            let answer: Value = serde_json::from_str(&line)?;
            if let Some(error) = answer.get("error") {
                bail!("{command}: {}", error["desc"]);
            }
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            // Otherwise an event.
        }
    }
}
