//! Which etcd, and which repository in it.

use std::fmt;
use std::str::FromStr;

use blobcr_proto::RepositoryName;
use tonic::transport::Uri;

/// What the text of a target begins with.
const SCHEME: &str = "etcd:";
/// The repository that is meant when none is named.
const NAME_DEFAULT: &str = "default";
/// Members at most; etcd itself advises seven.
const MEMBERS_MAX: usize = 16;

/// `etcd:URL,URL,…#NAME`: the members of an etcd, and the name of a repository in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdTarget {
    urls: Vec<String>,
    name: RepositoryName,
}

/// A text that is no target.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no etcd: {problem}; write etcd:http://HOST:PORT,http://HOST:PORT[#NAME]")]
pub struct TargetError {
    text: String,
    problem: String,
}

impl EtcdTarget {
    /// The addresses of the members, in order of preference.
    #[must_use]
    pub fn urls(&self) -> &[String] {
        &self.urls
    }

    /// The repository's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.name.as_str()
    }
}

impl FromStr for EtcdTarget {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        let wrong = |problem: String| TargetError { text: text.to_owned(), problem };
        let rest = text.strip_prefix(SCHEME);
        let rest = rest.ok_or_else(|| wrong(format!("it does not begin with {SCHEME}")))?;
        let (urls, name) = rest.split_once('#').unwrap_or((rest, NAME_DEFAULT));
        let name = RepositoryName::new(name).map_err(|error| wrong(error.to_string()))?;
        let urls: Vec<String> =
            urls.split(',').map(member).collect::<Result<_, String>>().map_err(wrong)?;
        if urls.len() > MEMBERS_MAX {
            return Err(wrong(format!("it has more than {MEMBERS_MAX} members")));
        }
        Ok(Self { urls, name })
    }
}

/// The URL of one member; `http://` may be left out.
fn member(text: &str) -> Result<String, String> {
    if text.starts_with("https://") {
        return Err(format!("{text}: TLS to etcd is not there"));
    }
    let address = text.strip_prefix("http://").unwrap_or(text);
    let address = address.strip_suffix('/').unwrap_or(address);
    let url = format!("http://{address}");
    let uri: Option<Uri> = url.parse().ok();
    // The parser takes an empty path for "/".
    let sound = uri.filter(|_| !address.ends_with('/')).is_some_and(|uri| {
        uri.host().is_some_and(|host| !host.is_empty())
            && uri.port_u16().is_some_and(|port| port != 0)
            && uri.path_and_query().is_none_or(|path| path == "/")
    });
    if sound { Ok(url) } else { Err(format!("{text:?} is no URL of a member")) }
}

impl fmt::Display for EtcdTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}#{}", self.urls.join(","), self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_read_back_as_they_are_written() {
        let target: EtcdTarget = "etcd:http://a:2379,b:1,http://[::1]:2/#prod".parse().unwrap();
        assert_eq!(target.urls(), ["http://a:2379", "http://b:1", "http://[::1]:2"]);
        assert_eq!(target.name(), "prod");
        assert_eq!(target.to_string().parse(), Ok(target));
        let target: EtcdTarget = "etcd:a:1".parse().unwrap();
        assert_eq!(target.to_string(), "etcd:http://a:1#default");
    }

    #[test]
    fn what_is_no_target_is_refused() {
        let many = format!("etcd:{}", ["a:1"; 17].join(","));
        for text in [
            "",
            "sled",
            "etcd:",
            "etcd:a",
            "etcd:a:0",
            "etcd:a:1,",
            "etcd:https://a:1",
            "etcd:http://a:1/path",
            "etcd:a:1//",
            "etcd:http://:1",
            "etcd:a:1#",
            "etcd:a:1#b/c",
            many.as_str(),
        ] {
            assert!(text.parse::<EtcdTarget>().is_err(), "{text:?}");
        }
    }
}
