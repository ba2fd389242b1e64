//! How fast a lost node's data is made again, beside plain copies of as many bytes: files that are
//! synced on the same file system, and a stream over loopback.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use blobcr_repository::{ConnectOptions, Repository};
use blobcr_steward::{RepairOptions, Repairer};
use blobcr_tests::disk_file::{noise, sparse};
use blobcr_tests::roles::{Outage, Plan, Roles, Which};

use crate::{MIB, Options};

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    println!("\nRepair after one of the nodes is lost");
    for (pool, nodes) in [("replica:3", 5), ("ec:4+2", 7)] {
        one(options, pool, nodes)?;
    }
    Ok(())
}

fn one(options: &Options, pool: &str, nodes: usize) -> anyhow::Result<()> {
    let bytes = options.scaled(1024) * MIB;
    let plan = Plan { nodes, pool: pool.to_owned(), node_down_after: 15, ..Plan::default() };
    let mut roles = Roles::start(&plan, |_| Ok(()))?;
    let raw = sparse(&roles.dir().join("raw"), bytes, &[(0, &noise(1, bytes as usize))])?;
    roles.json(&["image", "import", raw.to_str().context("ASCII")?, "image"])?;
    roles.take_away(Which::Node(0), Outage::Killed)?;
    // Until a new table gives its partitions to others.
    let moved = || roles.log().contains("a new placement table");
    while !moved() {
        std::thread::sleep(Duration::from_millis(100));
    }
    let runtime = tokio::runtime::Runtime::new()?;
    let servers = [roles.servers(0)];
    let (took, copied) = runtime.block_on(async {
        let repository = Repository::connect(&servers, ConnectOptions::default()).await?;
        let mut repairer = Repairer::new(repository, RepairOptions::default());
        let progress = repairer.progress();
        let begun = Instant::now();
        let mut copied = 0;
        while repairer.round().await?.partitions > 0 {
            copied = copied.max(progress.borrow().copied_bytes);
        }
        anyhow::Ok((begun.elapsed(), copied))
    })?;
    let rate = |took: Duration| copied as f64 / took.as_secs_f64() / MIB as f64;
    let disk = files(&options.scratch()?.path().join("copy"), copied)?;
    let loopback = stream(copied)?;
    println!(
        "{pool} on {nodes} nodes: {} MiB in {:.1} s, {:.0} MiB/s; synced files {:.0} MiB/s \
         (repair is {:.2} of it), loopback {:.0} MiB/s ({:.2})",
        copied / MIB,
        took.as_secs_f64(),
        rate(took),
        rate(disk),
        rate(took) / rate(disk),
        rate(loopback),
        rate(took) / rate(loopback),
    );
    Ok(())
}

/// Writes and syncs as a node does: a group of 8 MiB at a time.
fn files(path: &Path, bytes: u64) -> anyhow::Result<Duration> {
    let block = noise(2, 8 << 20);
    let begun = Instant::now();
    let mut file = File::create(path)?;
    for _ in 0..bytes.div_ceil(block.len() as u64) {
        file.write_all(&block)?;
        file.sync_data()?;
    }
    Ok(begun.elapsed())
}

fn stream(bytes: u64) -> anyhow::Result<Duration> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let begun = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || -> std::io::Result<()> {
            let (mut from, _) = listener.accept()?;
            let mut block = vec![0; 1 << 20];
            while from.read(&mut block)? > 0 {}
            Ok(())
        });
        let mut to = TcpStream::connect(address)?;
        let block = noise(3, 1 << 20);
        for _ in 0..bytes.div_ceil(1 << 20) {
            to.write_all(&block)?;
        }
        anyhow::Ok(())
    })?;
    Ok(begun.elapsed())
}
