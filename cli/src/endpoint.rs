//! Where the repository is: an address, or the directory of a `blobcr up`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::exit::{Exit, Refusal};

/// The file in which a running `blobcr up` leaves its address.
const FILE_NAME: &str = "endpoint";

/// The address of the repository that `--endpoint` or `BLOBCR_ENDPOINT` names.
///
/// # Errors
/// When none is named, it makes no sense, or nothing runs in the directory.
pub fn resolve(endpoint: Option<&str>) -> Result<String, Refusal> {
    let Some(endpoint) = endpoint.filter(|text| !text.is_empty()) else {
        return Err(Refusal::new(
            Exit::Usage,
            "no repository is named: give --endpoint or set BLOBCR_ENDPOINT to an address \
             (host:port) or to the directory of a `blobcr up`",
        ));
    };
    let text = endpoint.strip_prefix("http://").unwrap_or(endpoint);
    if text.contains('/') || Path::new(text).is_dir() {
        return of_directory(Path::new(text));
    }
    checked_address(text)
}

/// Every address that `--endpoint` names: metadata servers may be several, comma-separated.
///
/// # Errors
/// As [`resolve`], for any of them.
pub fn resolve_all(endpoint: Option<&str>) -> Result<Vec<String>, Refusal> {
    match endpoint {
        Some(list) if list.contains(',') && !Path::new(list).exists() => {
            list.split(',').map(|one| resolve(Some(one))).collect()
        }
        one => Ok(vec![resolve(one)?]),
    }
}

/// `host:port` as it is; refuses anything else.
///
/// # Errors
/// When it has no port or no host.
pub fn checked_address(text: &str) -> Result<String, Refusal> {
    let valid = text.rsplit_once(':').is_some_and(|(host, port)| {
        let bare_v6 = host.contains(':') && !host.starts_with('[');
        let digits = port.bytes().all(|byte| byte.is_ascii_digit());
        !host.is_empty() && !bare_v6 && digits && port.parse::<u16>().is_ok()
    });
    let uri = format!("http://{text}").parse::<tonic::transport::Uri>();
    // With anything behind the port, the rest would be dropped or dialled wrongly.
    let whole = uri.is_ok_and(|uri| {
        uri.port().is_some() && uri.authority().is_some_and(|authority| authority.as_str() == text)
    });
    if !valid || !whole {
        return Err(Refusal::new(
            Exit::Usage,
            format!(
                "{text:?} is neither an address (host:port) nor the directory of a `blobcr up`"
            ),
        ));
    }
    Ok(text.to_owned())
}

fn of_directory(dir: &Path) -> Result<String, Refusal> {
    let file = path_in(dir);
    match fs::read_to_string(&file) {
        Ok(address) => checked_address(address.trim()).map_err(|_| {
            Refusal::new(
                Exit::Other,
                format!(
                    "{} does not hold an address; remove it and start `blobcr up` again",
                    file.display()
                ),
            )
        }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let dir = dir.display();
            Err(Refusal::new(
                Exit::Unavailable,
                format!("no blobcr runs in {dir}: start one with `blobcr up --dir {dir}`"),
            ))
        }
        Err(e) => Err(Refusal::new(Exit::Other, format!("cannot read {}: {e}", file.display()))),
    }
}

fn path_in(dir: &Path) -> PathBuf {
    dir.join(FILE_NAME)
}

/// `DIR/endpoint` while `blobcr up` serves: there when it is ready, gone when it stopped.
#[derive(Debug)]
pub struct EndpointFile(PathBuf);

impl EndpointFile {
    /// Writes the file: a reader sees all of it or none.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn publish(dir: &Path, address: &str) -> io::Result<Self> {
        let path = path_in(dir);
        let temporary = path.with_extension("new");
        fs::write(&temporary, format!("{address}\n"))?;
        fs::rename(&temporary, &path)?;
        Ok(Self(path))
    }

    /// Removes what a killed predecessor left. The caller holds the directory's lock.
    ///
    /// # Errors
    /// When it is there and cannot be removed.
    pub fn remove_stale(dir: &Path) -> io::Result<()> {
        match fs::remove_file(path_in(dir)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

impl Drop for EndpointFile {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_file(&self.0) {
            tracing::warn!(path = %self.0.display(), error = %e, "cannot remove the endpoint file");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_directories_are_told_apart() {
        for good in ["127.0.0.1:7400", "[::1]:80", "node-1.example:1"] {
            assert_eq!(resolve(Some(good)).unwrap(), good);
        }
        assert_eq!(resolve(Some("http://h:1")).unwrap(), "h:1");
        for bad in ["host", "host:", ":1", "host:99999", "::1", "a b:1"] {
            assert_eq!(resolve(Some(bad)).unwrap_err().exit, Exit::Usage, "{bad}");
        }
        assert_eq!(resolve(None).unwrap_err().exit, Exit::Usage);
        assert_eq!(resolve(Some("")).unwrap_err().exit, Exit::Usage);
    }

    #[test]
    fn several_addresses_are_one_endpoint() {
        assert_eq!(resolve_all(Some("a:1,http://b:2")).unwrap(), ["a:1", "b:2"]);
        assert_eq!(resolve_all(Some("a:1")).unwrap(), ["a:1"]);
        for bad in [None, Some(""), Some("a:1,"), Some("a:1,b")] {
            assert_eq!(resolve_all(bad).unwrap_err().exit, Exit::Usage, "{bad:?}");
        }
    }

    #[test]
    fn a_directory_gives_its_address_only_while_something_runs() {
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().to_str().unwrap();
        let refusal = resolve(Some(name)).unwrap_err();
        assert_eq!(refusal.exit, Exit::Unavailable);
        assert!(refusal.message.contains("blobcr up --dir"), "{refusal}");

        let file = EndpointFile::publish(dir.path(), "127.0.0.1:5").unwrap();
        assert_eq!(resolve(Some(name)).unwrap(), "127.0.0.1:5");
        drop(file);
        assert_eq!(resolve(Some(name)).unwrap_err().exit, Exit::Unavailable);

        for rubbish in ["rubbish", "host/path:5", "host?query:5", "host:+5", "a\nb:5"] {
            fs::write(path_in(dir.path()), rubbish).unwrap();
            assert_eq!(resolve(Some(name)).unwrap_err().exit, Exit::Other, "{rubbish:?}");
        }
        EndpointFile::remove_stale(dir.path()).unwrap();
        EndpointFile::remove_stale(dir.path()).unwrap();
    }
}
