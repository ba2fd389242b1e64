//! An MPI job on two VMs that share a network: it checkpoints itself, loses a VM at a bad moment, and
//! goes on from the newest set that counts.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::cluster::Cluster;
use crate::guest_image::GuestImage;
use crate::scenario::Say;
use crate::vm::{Link, Vm, VmSpec};

/// Two guests boot in 6 s on an idle machine; this is for a very busy one.
const BOOT: Duration = Duration::from_secs(300);
/// For anything that a running job does.
const SOON: Duration = Duration::from_secs(240);
/// Iterations that are done by then.
const ITERATIONS_SOON: u64 = 240;
/// Between two looks at the sets.
const PAUSE: Duration = Duration::from_millis(5);
/// The group of the job's VMs.
const GROUP: &str = "heat";

/// When a VM is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// So long after the first set was stable.
    After(Duration),
    /// When one VM has joined a set and the other has not.
    BetweenJoins,
    /// When all have joined a set that is not stable yet.
    WhilePending,
    /// When it goes on from a set and has taken no other one yet; only after a restart.
    BeforeASet,
}

/// The job: `heat NX NY ITERATIONS EVERY DIR`.
#[derive(Clone, Copy, Debug)]
pub struct Heat {
    /// Points in a row.
    pub nx: u32,
    /// Rows.
    pub ny: u32,
    /// Where it ends.
    pub iterations: u64,
    /// From one checkpoint to the next.
    pub every: u64,
}

impl Heat {
    fn args(self, dir: &Path) -> Vec<String> {
        let Self { nx, ny, iterations, every } = self;
        let numbers = [nx.to_string(), ny.to_string(), iterations.to_string(), every.to_string()];
        numbers.into_iter().chain([dir.display().to_string()]).collect()
    }

    /// The hash of the field that an undisturbed run on this machine ends with.
    ///
    /// # Errors
    /// When it does not run.
    pub fn undisturbed(self, program: &Path, dir: &Path) -> Result<String> {
        std::fs::create_dir_all(dir)?;
        let output = Command::new("mpirun.mpich")
            .args(["-np", "4"])
            .arg(program)
            .args(self.args(dir))
            .stdin(Stdio::null())
            .output()
            .context("cannot run mpirun.mpich; run tests/setup.sh as root")?;
        let said = String::from_utf8_lossy(&output.stdout);
        let hash = said.lines().find_map(|line| line.strip_prefix("hash "));
        let errors = String::from_utf8_lossy(&output.stderr);
        Ok(hash.with_context(|| format!("heat printed no hash: {said}{errors}"))?.to_owned())
    }
}

/// One VM of the job.
struct Node {
    name: &'static str,
    disk: PathBuf,
    socket: PathBuf,
}

/// The job on a cluster.
pub struct Job<'c> {
    cluster: &'c Cluster,
    image: GuestImage,
    heat: Heat,
    /// The guest's command that makes it a machine of the job.
    node: &'static str,
    /// The guest's command that runs it, before the numbers.
    program: &'static str,
    starts: u32,
}

impl<'c> Job<'c> {
    /// Imports the guest as image `job`. `program` is a command of the guest: `heat`, or something
    /// before it.
    ///
    /// # Errors
    /// When it cannot be imported.
    pub fn new(
        cluster: &'c Cluster,
        image: &GuestImage,
        heat: Heat,
        program: &'static str,
    ) -> Result<Self> {
        cluster.import(&image.disk, "job")?;
        Ok(Self { cluster, image: image.clone(), heat, node: "job-node", program, starts: 0 })
    }

    /// The same for a program that saves nothing: CRIU does, from outside.
    ///
    /// # Errors
    /// When it cannot be imported.
    pub fn by_images(cluster: &'c Cluster, image: &GuestImage, heat: Heat) -> Result<Self> {
        let program = "-env LD_PRELOAD /usr/lib/libblobcr_mpi.so heat-closed";
        Ok(Self { node: "job-criu", ..Self::new(cluster, image, heat, program)? })
    }

    /// Attaches a disk for each VM and gives it its channel.
    fn fresh(&self) -> Result<[Node; 2]> {
        let node = |name: &'static str| -> Result<Node> {
            let disk = self.cluster.attach("job", name)?;
            let words = ["vm", "add", name, "--disk", name, "--group", GROUP];
            let added = self.cluster.json(&words)?;
            let socket = added["socket"].as_str().context("a socket")?.into();
            Ok(Node { name, disk, socket })
        };
        Ok([node("node0")?, node("node1")?])
    }

    /// The same from the newest set that counts, and the set's number.
    fn restarted(&self) -> Result<([Node; 2], u64)> {
        let view = self.cluster.json(&["set", "restart", GROUP])?;
        let node = |name: &'static str| -> Result<Node> {
            let vms = view["vms"].as_array().context("VMs")?;
            let vm = vms.iter().find(|vm| vm["vm"] == name).context("a VM is missing")?;
            let text =
                |value: &Value| Ok::<_, anyhow::Error>(value.as_str().context("text")?.into());
            Ok(Node { name, disk: text(&vm["disks"][0]["path"])?, socket: text(&vm["socket"])? })
        };
        Ok(([node("node0")?, node("node1")?], view["set"].as_u64().context("a set")?))
    }

    /// Boots both VMs. The first one starts the job as soon as the other is up.
    fn boot(&mut self, nodes: &[Node; 2]) -> Result<[Vm; 2]> {
        self.starts += 1;
        let socket = self.cluster.scratch().join(format!("job-{}.sock", self.starts));
        let start = |number: usize| -> Result<Vm> {
            let node = &nodes[number];
            let args = self.heat.args(Path::new("/root/job")).join(" ");
            let run = match number {
                0 => format!("{} 0 {} {args}", self.node, self.program),
                _ => format!("{} {number}", self.node),
            };
            let spec = VmSpec {
                channel: Some(node.socket.clone()),
                link: Some(Link { socket: socket.clone(), listens: number == 0 }),
                memory_mib: 384,
                ..VmSpec::new(&self.image, &node.disk, run)
            };
            let dir = self.cluster.scratch().join(format!("{}-{}", node.name, self.starts));
            Vm::start(&spec, &dir)
        };
        Ok([start(0)?, start(1)?])
    }

    /// Runs it until a VM is killed at that moment, then both are gone.
    ///
    /// # Errors
    /// When the moment does not come, or the job fails before it.
    pub fn run_and_kill(&mut self, victim: usize, moment: Moment, say: Say<'_>) -> Result<()> {
        let nodes = self.fresh()?;
        let mut vms = self.boot(&nodes)?;
        self.kill_at(&mut vms, victim, moment, say)
    }

    fn kill_at(
        &self,
        vms: &mut [Vm; 2],
        victim: usize,
        moment: Moment,
        say: Say<'_>,
    ) -> Result<()> {
        if moment == Moment::BeforeASet {
            return kill(vms, victim, say);
        }
        let before = self.newest_stable()?;
        let is_new = |set: &Value| set["set"].as_u64() > before;
        let first = self.wait_for_set(vms, BOOT, |set| is_new(set) && set["state"] == "stable")?;
        say(&format!("set {} is stable", first["set"]));
        // One that was left by an earlier kill is none of these.
        let is_later = |set: &Value| set["set"].as_u64() > first["set"].as_u64();
        match moment {
            Moment::BeforeASet => {}
            Moment::After(time) => std::thread::sleep(time),
            Moment::BetweenJoins => {
                // Without a channel it asks in vain, and the other one joins without it.
                self.cluster.json(&["vm", "remove", &format!("node{victim}")])?;
                let alone = |set: &Value| {
                    is_later(set) && set["state"] == "incomplete" && set["joined_vms"] == 1
                };
                let set = self.wait_for_set(vms, SOON, alone)?;
                say(&format!("set {} has one VM of two", set["set"]));
            }
            Moment::WhilePending => {
                let pending = |set: &Value| is_later(set) && set["state"] == "pending";
                let set = self.wait_for_set(vms, SOON, pending)?;
                say(&format!("set {} is pending", set["set"]));
            }
        }
        kill(vms, victim, say)
    }

    fn newest_stable(&self) -> Result<Option<u64>> {
        let ran = self.cluster.run(&["--json", "set", "latest", GROUP])?;
        if ran.code != 0 {
            return Ok(None);
        }
        Ok(serde_json::from_str::<Value>(&ran.stdout)?["set"].as_u64())
    }

    fn wait_for_set(
        &self,
        vms: &mut [Vm; 2],
        time: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let until = Instant::now() + time;
        loop {
            let sets = self.cluster.json(&["set", "list", GROUP, "--limit", "3"])?;
            let sets = sets.as_array().context("sets")?;
            if let Some(set) = sets.iter().find(|set| wanted(set)) {
                return Ok(set.clone());
            }
            for vm in vms.iter_mut() {
                ensure!(!vm.has_ended()?, "a VM ended:\n{}", vm.console());
            }
            if Instant::now() > until {
                bail!("no such set in time; there are {sets:?}\n{}", vms[0].console());
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Starts all VMs from the newest set that counts, and kills one again, as [`Self::run_and_kill`].
    ///
    /// # Errors
    /// When it does not go on from there, or the moment does not come.
    pub fn resume_and_kill(&mut self, victim: usize, moment: Moment, say: Say<'_>) -> Result<()> {
        let mut vms = self.restart(say)?;
        self.kill_at(&mut vms, victim, moment, say)
    }

    fn restart(&mut self, say: Say<'_>) -> Result<[Vm; 2]> {
        let (nodes, set) = self.restarted()?;
        say(&format!("restart all from set {set}"));
        let mut vms = self.boot(&nodes)?;
        self.goes_on(&mut vms[0], set, say)?;
        Ok(vms)
    }

    /// Starts all VMs from the newest set that counts, and returns what the job ended with.
    ///
    /// # Errors
    /// When it does not go on from there to its end, or its files are not those of an undisturbed run.
    pub fn resume(&mut self, say: Say<'_>) -> Result<String> {
        let mut vms = self.restart(say)?;
        // A long job may take long.
        let time = SOON * u32::try_from(self.heat.iterations.div_ceil(ITERATIONS_SOON))?;
        let hash = vms[0].wait_for("hash ", time)?;
        let ended = vms[0].wait_for("job: ended with", SOON)?;
        ensure!(ended.ends_with("with 0"), "{ended}\n{}", vms[0].console());
        let log = vms[0].wait_for("job: log_lines=", SOON)?;
        say(&log);
        let all = self.heat.iterations;
        let expected = format!("log_lines={all} last={all} once_in_order=yes");
        ensure!(log.ends_with(&expected), "the log should be {expected}: {log}");
        vms[0].wait_until_down(SOON)?;
        vms[1].kill()?;
        Ok(hash.trim_start_matches("hash ").to_owned())
    }

    /// Waits until it goes on from the set, not from the beginning.
    fn goes_on(&self, vm: &mut Vm, set: u64, say: Say<'_>) -> Result<()> {
        if self.node == "job-criu" {
            let restarted = vm.wait_for("blobcr_mpi: restarted from the set ", BOOT)?;
            say(&restarted);
            ensure!(restarted.contains(&format!(" the set {set} in ")), "{restarted}");
            return Ok(());
        }
        let resumed = vm.wait_for("resumed at ", BOOT)?;
        say(&resumed);
        let at: u64 = resumed.rsplit(' ').next().unwrap_or_default().parse()?;
        // Who does not choose the moment is saved at any.
        let chosen = self.program == "heat";
        ensure!(at > 0 && (!chosen || at.is_multiple_of(self.heat.every)), "{resumed}");
        Ok(())
    }
}

fn kill(vms: &mut [Vm; 2], victim: usize, say: Say<'_>) -> Result<()> {
    let pid = vms[victim].pid();
    say(&format!("kill -9 VM {victim} (process {pid}), and switch the other off"));
    vms[victim].kill()?;
    vms[1 - victim].kill()
}
