//! `blobcr image` and `blobcr snapshot` against a real `blobcr up`.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use blobcr_tests::cluster::Cluster;
use blobcr_tests::disk_file::{allocated, noise, same, sparse};
use blobcr_tests::mounted::MountedDisk;

const CHUNK: u64 = 256 << 10;

fn text(path: &Path) -> &str {
    path.to_str().expect("a temporary path is ASCII")
}

fn qemu_img(args: &[&str]) -> Result<()> {
    let output = Command::new("qemu-img").args(args).output().context("qemu-img")?;
    ensure!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[test]
fn raw_files_of_every_size_come_back_as_they_were() -> Result<()> {
    let cluster = Cluster::start(&[])?;
    for (at, size) in
        [0, 1, 511, 512, 4096, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 10 * CHUNK + 12_345]
            .into_iter()
            .enumerate()
    {
        let name = format!("size-{size}");
        let bytes = noise(size, size as usize);
        let raw = cluster.scratch().join(&name);
        fs::write(&raw, &bytes)?;
        let made = cluster.import(&raw, &name)?;
        assert_eq!((&made["snapshot"], &made["state"]), (&1.into(), &"stable".into()));
        assert_eq!(made["size_bytes"], size);
        let out = cluster.scratch().join(format!("out-{at}"));
        cluster.json(&["image", "export", &name, text(&out)])?;
        same(&raw, &out).with_context(|| name)?;
    }
    Ok(())
}

#[test]
fn a_sparse_terabyte_stays_sparse_and_takes_no_time() -> Result<()> {
    const SIZE: u64 = 1 << 40;
    let cluster = Cluster::start(&[])?;
    let data = noise(7, 3 << 20);
    let pieces: [(u64, &[u8]); 3] = [(0, b"boot"), (SIZE / 2 + 777, &data), (SIZE - 4, b"tail")];
    let raw = sparse(&cluster.scratch().join("big"), SIZE, &pieces)?;
    let made = cluster.import(&raw, "big")?;
    assert_eq!(made["size_bytes"], SIZE);
    assert!(made["stored_bytes"].as_u64().unwrap() < 4 << 20, "{made}");

    let out = cluster.scratch().join("out");
    cluster.json(&["image", "export", "big@1", text(&out)])?;
    assert_eq!(fs::metadata(&out)?.len(), SIZE);
    assert!(allocated(&out)? < 8 << 20);
    let back = File::open(&out)?;
    for (offset, bytes) in pieces {
        let mut found = vec![0; bytes.len()];
        back.read_exact_at(&mut found, offset)?;
        assert!(found == bytes, "piece at {offset}");
    }
    let verified = cluster.json(&["snapshot", "verify", "big@1"])?;
    assert_eq!(verified["intact"], true);
    Ok(())
}

#[test]
fn qcow2_files_come_in_and_go_out() -> Result<()> {
    const SIZE: u64 = 40 << 20;
    let cluster = Cluster::start(&[])?;
    let dir = cluster.scratch().to_owned();
    let path = |name: &str| dir.join(name);
    let pieces: [(u64, &[u8]); 2] =
        [(5 << 20, &noise(1, 1 << 20)), (SIZE - 70_000, &noise(2, 70_000))];
    let raw = sparse(&path("raw"), SIZE, &pieces)?;
    for (name, options) in [("plain", &[][..]), ("compressed", &["-c"][..])] {
        let qcow2 = path(name);
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2"];
        args.extend(options);
        qemu_img(&[&args[..], &[text(&raw), text(&qcow2)]].concat())?;
        cluster.import(&qcow2, name)?;
        let out = path(&format!("{name}.raw"));
        cluster.json(&["image", "export", name, text(&out)])?;
        same(&raw, &out)?;
        let out = path(&format!("{name}.qcow2"));
        cluster.json(&["image", "export", name, text(&out), "--format", "qcow2"])?;
        qemu_img(&["check", "-f", "qcow2", text(&out)])?;
        qemu_img(&["compare", "-f", "raw", "-F", "qcow2", text(&raw), text(&out)])?;
    }
    // Both are the same disk: the same root, and nothing stored twice.
    let plain = cluster.json(&["snapshot", "list", "plain"])?;
    let compressed = cluster.json(&["snapshot", "list", "compressed"])?;
    assert_eq!(plain[0]["root"], compressed[0]["root"]);
    assert_eq!(compressed[0]["stored_chunks"], 0);
    Ok(())
}

#[test]
fn an_image_comes_from_a_pipe_as_well() -> Result<()> {
    let cluster = Cluster::start(&[])?;
    let mut bytes = noise(3, 700_000);
    bytes.extend(vec![0; 5 << 20]);
    bytes.extend(noise(4, 99));
    let mut import = cluster
        .command(&["--json", "image", "import", "-", "piped"])?
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    import.stdin.take().context("no stdin")?.write_all(&bytes)?;
    ensure!(import.wait()?.success());
    let out = cluster.scratch().join("out");
    cluster.json(&["image", "export", "piped", text(&out)])?;
    assert!(fs::read(&out)? == bytes);
    Ok(())
}

#[test]
fn chunk_size_and_pool_are_the_operators_choice() -> Result<()> {
    let cluster = Cluster::start(&["--nodes", "2"])?;
    let raw = sparse(&cluster.scratch().join("raw"), 5 << 20, &[(1 << 20, &noise(1, 300_000))])?;
    let pool = cluster.json(&["pool", "create", "safe", "--policy", "replica:2"])?;
    assert_eq!((&pool["pool"], &pool["policy"]), (&"safe".into(), &"replica:2".into()));
    for (name, size) in [("small", "64K"), ("large", "4M")] {
        let args = ["image", "import", text(&raw), name, "--chunk-size", size, "--pool", "safe"];
        cluster.json(&args)?;
        let out = cluster.scratch().join(name);
        cluster.json(&["image", "export", name, text(&out)])?;
        same(&raw, &out)?;
    }
    let info = cluster.json(&["image", "info", "small"])?;
    assert_eq!((&info["chunk_size"], &info["pool"]), (&65_536.into(), &"safe".into()));
    let refused = cluster.run(&["image", "import", text(&raw), "odd", "--chunk-size", "100K"])?;
    assert_eq!(refused.code, 2, "{refused:?}");
    Ok(())
}

#[test]
fn a_clone_outlives_the_image_that_it_came_from() -> Result<()> {
    let cluster = Cluster::start(&[])?;
    let raw = sparse(&cluster.scratch().join("raw"), 1 << 20, &[(9, b"hello")])?;
    cluster.import(&raw, "base")?;
    let clone = cluster.json(&["image", "clone", "base@1", "copy"])?;
    assert_eq!((&clone["image"], &clone["snapshot"]), (&"copy".into(), &1.into()));
    assert_eq!(clone["state"], "stable");
    let images = cluster.json(&["image", "list"])?;
    let names: Vec<_> = images.as_array().unwrap().iter().map(|i| i["image"].clone()).collect();
    assert_eq!(names, ["base", "copy"]);
    assert_eq!(images[1]["parent"]["image"], "base");

    cluster.json(&["image", "remove", "base"])?;
    assert_eq!(cluster.run(&["image", "info", "base"])?.code, 3);
    let info = cluster.json(&["image", "info", "copy"])?;
    assert!(info["parent"]["image"].is_null() && info["parent"]["snapshot"] == 1, "{info}");
    let out = cluster.scratch().join("out");
    cluster.json(&["image", "export", "copy", text(&out)])?;
    same(&raw, &out)?;
    // The name is free again, the id is not.
    let id = info["id"].as_u64();
    cluster.import(&raw, "base")?;
    assert!(cluster.json(&["image", "info", "base"])?["id"].as_u64() > id);
    Ok(())
}

#[test]
fn an_export_never_replaces_a_file_unasked_and_leaves_no_scraps() -> Result<()> {
    let cluster = Cluster::start(&[])?;
    let raw = sparse(&cluster.scratch().join("raw"), 1 << 20, &[(0, b"new")])?;
    cluster.import(&raw, "image")?;
    let dir = cluster.scratch().join("out");
    fs::create_dir(&dir)?;
    let out = dir.join("file");
    fs::write(&out, "old")?;
    for format in ["raw", "qcow2"] {
        let args = ["image", "export", "image", text(&out), "--format", format];
        let refused = cluster.run(&args)?;
        assert_eq!(refused.code, 4);
        assert!(refused.stderr.contains("--force"), "{}", refused.stderr);
        assert_eq!(fs::read(&out)?, b"old");
    }
    cluster.json(&["image", "export", "image", text(&out), "--force"])?;
    same(&raw, &out)?;
    let nowhere = cluster.run(&["image", "export", "image", text(&dir.join("no/file"))])?;
    assert_eq!(nowhere.code, 3, "{nowhere:?}");
    let names: Vec<_> = fs::read_dir(&dir)?.map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["file"]);
    Ok(())
}

/// Whether the file holds a snapshot.
fn is_at(cluster: &Cluster, file: &Path, snapshot: &str) -> Result<()> {
    let whole = cluster.scratch().join("whole");
    cluster.json(&["image", "export", snapshot, text(&whole), "--force"])?;
    same(&whole, file).with_context(|| snapshot.to_owned())
}

#[test]
fn an_export_since_a_snapshot_writes_what_differs_into_the_file_of_it() -> Result<()> {
    // Not a whole number of chunks: the last one is changed, too.
    const SIZE: u64 = 40 * CHUNK + 512;
    let cluster = Cluster::start(&[])?;
    let data = noise(1, 30 * CHUNK as usize);
    let raw = sparse(&cluster.scratch().join("raw"), SIZE, &[(0, &data)])?;
    cluster.import(&raw, "base")?;
    let disk = MountedDisk::open(&cluster.attach("base", "disk")?, false)?;
    for at in [5, 6, 20] {
        disk.file().write_all_at(&noise(at, 4096), at * CHUNK + 4096)?;
    }
    // Was zeros; becomes zeros.
    disk.file().write_all_at(&noise(3, 512), 40 * CHUNK)?;
    disk.file().write_all_at(&vec![0; CHUNK as usize], 7 * CHUNK)?;
    let taken = disk.commit_stable()?;
    let newer = format!("{}@{}", taken.image, taken.number);

    let file = cluster.scratch().join("file");
    cluster.json(&["image", "export", "base@1", text(&file)])?;
    let since =
        |to: &str, from: &str| cluster.run(&["image", "export", to, text(&file), "--since", from]);
    // Untouched bytes stay untouched, whatever they are.
    let mark = File::options().write(true).open(&file)?;
    mark.write_all_at(b"mark", 10 * CHUNK)?;
    ensure!(since(&newer, "base@1")?.code == 0);
    mark.write_all_at(&data[10 * CHUNK as usize..][..4], 10 * CHUNK)?;
    is_at(&cluster, &file, &newer)?;
    // Half of the way, as an interrupted one leaves it; and back again, which it can do twice.
    mark.write_all_at(&data[5 * CHUNK as usize..][..CHUNK as usize], 5 * CHUNK)?;
    ensure!(since(&newer, "base@1")?.code == 0);
    is_at(&cluster, &file, &newer)?;
    for _ in 0..2 {
        ensure!(since("base@1", &newer)?.code == 0);
        is_at(&cluster, &file, "base@1")?;
    }

    // Not the file of that snapshot: nothing is written.
    mark.write_all_at(b"mark", 20 * CHUNK)?;
    let before = fs::read(&file)?;
    let refused = since(&newer, "base@1")?;
    assert_eq!(refused.code, 4, "{refused:?}");
    assert!(refused.stderr.contains(&format!("from {}", 20 * CHUNK)), "{refused:?}");
    assert!(fs::read(&file)? == before);
    mark.set_len(SIZE - 1)?;
    let refused = since(&newer, "base@1")?;
    assert!(refused.code == 4 && refused.stderr.contains("no raw file of"), "{refused:?}");
    fs::remove_file(&file)?;
    assert_eq!(since(&newer, "base@1")?.code, 3);
    Ok(())
}

#[test]
fn snapshots_are_listed_compared_and_removed() -> Result<()> {
    let cluster = Cluster::start(&[])?;
    let first = sparse(&cluster.scratch().join("1"), 4 * CHUNK, &[(0, b"a"), (CHUNK, b"b")])?;
    let second = sparse(&cluster.scratch().join("2"), 4 * CHUNK, &[(0, b"A"), (3 * CHUNK, b"c")])?;
    cluster.import(&first, "one")?;
    cluster.import(&second, "two")?;
    let diff = cluster.json(&["snapshot", "diff", "one@1", "two@1"])?;
    let kinds: Vec<_> = diff["ranges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| (r["offset_bytes"].as_u64().unwrap() / CHUNK, r["kind"].as_str().unwrap()))
        .collect();
    assert_eq!(kinds, [(0, "changed"), (1, "removed"), (3, "added")]);
    assert_eq!(diff["changed_bytes"], 3 * CHUNK);
    let itself = cluster.json(&["snapshot", "diff", "one@1", "one@1"])?;
    assert_eq!(itself["ranges"], serde_json::json!([]));

    let waited = cluster.json(&["snapshot", "wait", "one@1"])?;
    assert_eq!((&waited["image"], &waited["state"]), (&"one".into(), &"stable".into()));
    let listed = cluster.json(&["snapshot", "list", "one"])?;
    assert_eq!(listed[0]["snapshot"], 1);
    // The latest snapshot of an image goes only with the image.
    let refused = cluster.run(&["image", "remove", "one@1"])?;
    assert_eq!(refused.code, 4, "{refused:?}");
    Ok(())
}
