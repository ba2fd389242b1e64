//! A virtual machine under QEMU, as a test drives it.
//!
//! Its processor is emulated (TCG) unless `BLOBCR_TEST_ACCEL` says otherwise, so that it runs the
//! same way on every machine.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;

use crate::daemon::blobcr;
use crate::guest_image::GuestImage;
use crate::qmp::Qmp;

const QEMU: &str = "qemu-system-x86_64";
/// Between two looks at the console and the process.
const PAUSE: Duration = Duration::from_millis(10);
/// The kernel takes a command line of 2 KiB.
const COMMAND_BYTES_MAX: usize = 1200;

/// How QEMU reads and writes the disk's file. The host's page cache is never used (cache=none).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aio {
    /// `aio=native`
    Native,
    /// `aio=io_uring`
    IoUring,
    /// `aio=threads`
    Threads,
}

impl Aio {
    fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::IoUring => "io_uring",
            Self::Threads => "threads",
        }
    }
}

/// How a VM finds its operating system.
#[derive(Clone, Debug)]
pub enum Boot {
    /// QEMU loads it.
    Kernel {
        /// The kernel.
        kernel: PathBuf,
        /// The initramfs.
        initrd: PathBuf,
    },
    /// By the boot loader on its first disk.
    Firmware,
}

/// One end of a network of two VMs: a Unix socket between their hypervisors.
#[derive(Clone, Debug)]
pub struct Link {
    /// The socket.
    pub socket: PathBuf,
    /// Whether this end makes it; the other one connects, and again when it is made anew.
    pub listens: bool,
}

/// What a VM is made of.
#[derive(Clone, Debug)]
pub struct VmSpec {
    /// How it boots.
    pub boot: Boot,
    /// Its disks, `/dev/vda` first, each a raw file.
    pub disks: Vec<PathBuf>,
    /// How the disks' files are read and written.
    pub aio: Aio,
    /// The Unix socket that its checkpoint port is connected to, and again when that went away.
    pub channel: Option<PathBuf>,
    /// The network that it shares with another VM.
    pub link: Option<Link>,
    /// More of QEMU's arguments, such as `blobcr vm add` prints. A `blobcr` in them is the one that
    /// was built beside the tests.
    pub arguments: Vec<String>,
    /// The shell command that the guest runs before it halts.
    pub run: String,
    /// MiB of memory.
    pub memory_mib: u32,
    /// Virtual processors.
    pub cpus: u32,
    /// The user that QEMU runs as; only root can choose one.
    pub uid: Option<u32>,
}

impl VmSpec {
    /// A VM that boots `disk` with the kernel of the guest image and runs a command.
    #[must_use]
    pub fn new(image: &GuestImage, disk: impl Into<PathBuf>, run: impl Into<String>) -> Self {
        let boot = Boot::Kernel { kernel: image.kernel.clone(), initrd: image.initrd.clone() };
        Self { run: run.into(), ..Self::of(boot, disk, Aio::Native) }
    }

    /// A VM with one disk.
    #[must_use]
    pub fn of(boot: Boot, disk: impl Into<PathBuf>, aio: Aio) -> Self {
        Self {
            boot,
            disks: vec![disk.into()],
            aio,
            channel: None,
            link: None,
            arguments: Vec::new(),
            run: String::new(),
            memory_mib: 256,
            cpus: 1,
            uid: None,
        }
    }

    fn command(&self, dir: &Path) -> Result<Command> {
        let accel =
            std::env::var("BLOBCR_TEST_ACCEL").unwrap_or_else(|_| "tcg,thread=multi".to_owned());
        ensure!(self.run.len() <= COMMAND_BYTES_MAX, "the guest's command is too long");
        let mut command = Command::new(QEMU);
        command
            .args(["-M", "q35", "-accel", &accel, "-cpu", "max"])
            .args(["-smp", &self.cpus.to_string(), "-m", &self.memory_mib.to_string()])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .arg("-serial")
            .arg(format!("file:{}", option_path(&dir.join("console"))?))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", option_path(&dir.join("qmp"))?));
        if let Boot::Kernel { kernel, initrd } = &self.boot {
            let append = format!(
                "console=ttyS0 quiet no_timer_check reboot=t panic=-1 root=/dev/vda run={}",
                base64(self.run.as_bytes())
            );
            command
                .arg("-kernel")
                .arg(kernel)
                .arg("-initrd")
                .arg(initrd)
                .args(["-append", &append]);
        }
        for (i, disk) in self.disks.iter().enumerate() {
            command
                .arg("-blockdev")
                .arg(format!(
                    "driver=file,node-name=file{i},filename={},cache.direct=on,aio={},\
                     discard=unmap",
                    option_path(disk)?,
                    self.aio.name()
                ))
                .arg("-blockdev")
                .arg(format!(
                    "driver=raw,node-name=disk{i},file=file{i},cache.direct=on,discard=unmap"
                ))
                .args(["-device", &format!("virtio-blk-pci,drive=disk{i}")]);
        }
        if let Some(channel) = &self.channel {
            command
                .args(["-device", "virtio-serial-pci", "-chardev"])
                .arg(format!("socket,id=ckpt,path={},reconnect-ms=100", option_path(channel)?))
                .args(["-device", "virtserialport,chardev=ckpt,name=org.blobcr.checkpoint.0"]);
        }
        if let Some(Link { socket, listens }) = &self.link {
            let socket = option_path(socket)?;
            let (role, number) =
                if *listens { ("server=on", 1) } else { ("server=off,reconnect-ms=100", 2) };
            command
                .arg("-netdev")
                .arg(format!("stream,id=job,addr.type=unix,addr.path={socket},{role}"))
                .arg("-device")
                .arg(format!("virtio-net-pci,netdev=job,mac=52:54:00:b1:0b:{number:02x}"));
        }
        if !self.arguments.is_empty() {
            let own = blobcr()?.parent().map(Path::to_owned).context("no directory")?;
            let path = std::env::var_os("PATH").unwrap_or_default();
            let all = std::iter::once(own).chain(std::env::split_paths(&path));
            command.args(&self.arguments).env("PATH", std::env::join_paths(all)?);
        }
        if let Some(uid) = self.uid {
            use std::os::unix::process::CommandExt;
            command.uid(uid);
        }
        Ok(command)
    }
}

/// QEMU's options are separated by commas; a comma in a value is written twice.
fn option_path(path: &Path) -> Result<String> {
    let text = path.to_str().with_context(|| format!("{} is no text", path.display()))?;
    Ok(text.replace(',', ",,"))
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for three in bytes.chunks(3) {
        let word =
            three.iter().enumerate().fold(0u32, |w, (i, b)| w | u32::from(*b) << (16 - 8 * i));
        for i in 0..4 {
            let digit = DIGITS[(word >> (18 - 6 * i)) as usize & 63];
            out.push(if i <= three.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

/// A running virtual machine. It is killed when this is dropped.
pub struct Vm {
    child: Child,
    dir: PathBuf,
    /// How much of the console was taken by [`Vm::wait_for`].
    taken: usize,
    ended: Option<ExitStatus>,
}

impl Vm {
    /// Starts a VM whose console and control socket are in `dir`.
    ///
    /// # Errors
    /// When QEMU cannot be started.
    pub fn start(spec: &VmSpec, dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        if let Some(uid) = spec.uid {
            std::os::unix::fs::chown(dir, Some(uid), None)?;
        }
        for name in ["console", "qmp"] {
            drop(fs::remove_file(dir.join(name)));
        }
        let errors = File::create(dir.join("qemu.err")).context("cannot create qemu.err")?;
        let child = spec
            .command(dir)?
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .with_context(|| format!("cannot start {QEMU}; run tests/setup.sh as root"))?;
        Ok(Self { child, dir: dir.to_owned(), taken: 0, ended: None })
    }

    /// The process of the VM.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything that the guest has printed.
    #[must_use]
    pub fn console(&self) -> String {
        let bytes = fs::read(self.dir.join("console")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    /// Waits for the next whole line that contains `text`, after those that were waited for before.
    ///
    /// # Errors
    /// When it does not come in time, or the VM ends without it; the message has the console's end.
    pub fn wait_for(&mut self, text: &str, time: Duration) -> Result<String> {
        let until = Instant::now() + time;
        loop {
            let ended = self.has_ended()?;
            let console = self.console();
            let whole = console.rfind('\n').map_or(0, |end| end + 1);
            let mut at = self.taken.min(whole);
            for line in console[at..whole].split_inclusive('\n') {
                at += line.len();
                if line.contains(text) {
                    self.taken = at;
                    return Ok(line.trim_end().to_owned());
                }
            }
            if ended || Instant::now() > until {
                let why = match self.ended {
                    Some(status) => format!("the VM ended ({status})"),
                    None => "it did not come in time".to_owned(),
                };
                return Err(self.explain(&format!("no line with {text:?} on the console: {why}")));
            }
            sleep(PAUSE);
        }
    }

    fn explain(&self, what: &str) -> anyhow::Error {
        let console = self.console();
        let mut lines: Vec<&str> = console.lines().rev().take(40).collect();
        lines.reverse();
        let errors = fs::read_to_string(self.dir.join("qemu.err")).unwrap_or_default();
        anyhow!("{what}\nQEMU says: {errors}\nthe console's end:\n{}", lines.join("\n"))
    }

    pub(crate) fn has_ended(&mut self) -> Result<bool> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().context("cannot wait for QEMU")?;
        }
        Ok(self.ended.is_some())
    }

    /// Waits until the guest has halted.
    ///
    /// # Errors
    /// When it does not in time, or QEMU failed.
    pub fn wait_until_down(&mut self, time: Duration) -> Result<()> {
        let until = Instant::now() + time;
        while !self.has_ended()? {
            if Instant::now() > until {
                return Err(self.explain("the VM did not halt in time"));
            }
            sleep(PAUSE);
        }
        match self.ended {
            Some(status) if status.success() => Ok(()),
            status => Err(self.explain(&format!("QEMU failed: {status:?}"))),
        }
    }

    /// Kills the VM the way a power cut does: SIGKILL, nothing is flushed.
    ///
    /// # Errors
    /// When it had ended by itself before.
    pub fn kill(&mut self) -> Result<()> {
        if self.has_ended()? {
            return Err(self.explain("the VM had ended before it was killed"));
        }
        self.child.kill().context("cannot kill QEMU")?;
        let status = self.child.wait().context("cannot wait for QEMU")?;
        self.ended = Some(status);
        if status.signal() != Some(9) {
            return Err(self.explain(&format!("the VM ended before it was killed: {status}")));
        }
        Ok(())
    }

    /// The socket of QEMU's machine protocol, for [`Qmp::connect`].
    #[must_use]
    pub fn qmp_socket(&self) -> PathBuf {
        self.dir.join("qmp")
    }

    /// Gives QEMU one command of its machine protocol and returns its answer.
    ///
    /// # Errors
    /// When QEMU refuses it or does not answer.
    pub fn qmp(&self, command: &str, arguments: Value) -> Result<Value> {
        Qmp::connect(&self.qmp_socket())?.ask(command, arguments)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It may have ended already; there is nothing to do about any other failure.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_every_length() {
        for (plain, coded) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("fooba", "Zm9vYmE=")]
        {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }
}
