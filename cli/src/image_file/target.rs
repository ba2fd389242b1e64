//! The file that an export writes: nothing has its name before it is whole.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use bytes::Bytes;
use tempfile::NamedTempFile;

use super::{qcow2, qemu_img, spool};
use crate::args::ExportFormat;
use crate::exit::{Exit, Refusal};
use crate::progress::Progress;

/// A sparse raw file that becomes FILE, or is converted to it.
#[derive(Debug)]
pub struct Target {
    path: PathBuf,
    replace: bool,
    raw: Arc<File>,
    /// What will get the name. For raw it is the same file as `raw`.
    named: NamedTempFile,
    format: ExportFormat,
}

/// What the operator's umask leaves of it is the mode of the file.
const MODE: u32 = 0o666;

impl Target {
    /// Begins a file of `size_bytes` zeros.
    ///
    /// # Errors
    /// When FILE exists (and is not to be replaced), or its directory cannot be written.
    pub fn create(
        path: &Path,
        format: ExportFormat,
        replace: bool,
        size_bytes: u64,
    ) -> anyhow::Result<Self> {
        check_free(path, replace)?;
        let dir = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let named = tempfile::Builder::new()
            .prefix(".blobcr-export-")
            .permissions(Permissions::from_mode(MODE))
            .tempfile_in(dir)
            .with_context(|| format!("cannot write to {}", dir.display()))?;
        let raw = match format {
            ExportFormat::Raw => named.reopen()?,
            ExportFormat::Qcow2 => spool::unnamed(dir)?,
        };
        raw.set_len(size_bytes).with_context(|| {
            format!("{} cannot hold a file of {size_bytes} bytes", dir.display())
        })?;
        Ok(Self { path: path.to_owned(), replace, raw: Arc::new(raw), named, format })
    }

    /// Writes a piece of the disk. Blocks.
    ///
    /// # Errors
    /// When the disk is full, or breaks.
    pub fn writer(&self) -> impl Fn(u64, Bytes) -> io::Result<()> + Clone + Send + use<> {
        let raw = Arc::clone(&self.raw);
        move |offset, bytes| raw.write_all_at(&bytes, offset)
    }

    /// Makes everything durable and gives the file its name.
    ///
    /// # Errors
    /// When the disk is full, or somebody made FILE meanwhile.
    pub async fn finish(self) -> anyhow::Result<()> {
        if self.format == ExportFormat::Qcow2 {
            convert(&self.raw, self.named.path()).await?;
        }
        let path = self.path.clone();
        let persisted = tokio::task::spawn_blocking(move || {
            self.named.as_file().sync_all()?;
            let dir = self.named.path().parent().map(Path::to_owned);
            if self.replace {
                self.named.persist(&self.path).map_err(|e| e.error)?;
            } else {
                self.named.persist_noclobber(&self.path).map_err(|e| e.error)?;
            }
            dir.map_or(Ok(()), |dir| File::open(dir)?.sync_all())
        });
        match persisted.await? {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(taken(&path).into()),
            other => Ok(other?),
        }
    }
}

fn taken(path: &Path) -> Refusal {
    let message = format!("{} exists; give --force to replace it", path.display());
    Refusal::new(Exit::Conflict, message)
}

fn check_free(path: &Path, replace: bool) -> anyhow::Result<()> {
    if path == Path::new("-") {
        let message = "an export writes holes, which needs a file: give its name";
        return Err(Refusal::new(Exit::Usage, message).into());
    }
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.is_file() => {
            let message = format!("{} is no regular file, and is not replaced", path.display());
            Err(Refusal::new(Exit::Conflict, message).into())
        }
        Ok(_) if !replace => Err(taken(path).into()),
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

async fn convert(raw: &File, to: &Path) -> anyhow::Result<()> {
    let to = qemu_img::plain_path(to)?;
    let args =
        qemu_img::args(["convert", "-f", "raw", "-O", "qcow2"], &[&qemu_img::path_of(raw), &to]);
    let growing = File::open(&to)?;
    let progress = Progress::bytes("pack", qcow2::allocated_bytes(raw));
    let output = qcow2::watch_growth(&growing, &progress, qemu_img::run(args)).await?;
    if output.status.success() {
        return Ok(());
    }
    let message = format!("cannot make the qcow2 file: {}", qemu_img::complaint(&output));
    Err(Refusal::new(Exit::Other, message).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[tokio::test]
    async fn the_name_appears_with_the_whole_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let target = Target::create(&path, ExportFormat::Raw, false, 1 << 30).unwrap();
        target.writer()(1 << 20, Bytes::from_static(b"hello")).unwrap();
        assert!(!path.exists());
        target.finish().await.unwrap();
        let file = File::open(&path).unwrap();
        let mut back = [0; 5];
        file.read_exact_at(&mut back, 1 << 20).unwrap();
        assert_eq!((&back, file.metadata().unwrap().len()), (b"hello", 1 << 30));
        assert_eq!(names(dir.path()), ["out"]);
    }

    #[tokio::test]
    async fn an_export_given_up_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        drop(Target::create(&dir.path().join("out"), ExportFormat::Raw, false, 5).unwrap());
        assert!(names(dir.path()).is_empty());
    }

    #[tokio::test]
    async fn nothing_is_replaced_unasked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let late = Target::create(&path, ExportFormat::Raw, false, 5).unwrap();
        fs::write(&path, "old").unwrap();
        for refusal in [
            Target::create(&path, ExportFormat::Raw, false, 5).unwrap_err(),
            late.finish().await.unwrap_err(),
            Target::create(dir.path(), ExportFormat::Raw, true, 5).unwrap_err(),
        ] {
            assert_eq!(crate::exit::code(&refusal), Exit::Conflict, "{refusal}");
        }
        assert_eq!(fs::read(&path).unwrap(), b"old");
        let forced = Target::create(&path, ExportFormat::Raw, true, 5).unwrap();
        forced.finish().await.unwrap();
        assert_eq!(fs::read(&path).unwrap(), [0; 5]);
    }
}
