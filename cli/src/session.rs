//! From one endpoint to every role that a verb needs.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use blobcr_proto::v1::checkpoint_client::CheckpointClient;
use blobcr_proto::v1::directory_client::DirectoryClient;
use blobcr_proto::v1::mirror_client::MirrorClient;
use blobcr_proto::v1::{DescribeRequest, Description};
use blobcr_repository::{ConnectOptions, Repository};
use tonic::transport::Channel;

use crate::channel::{lazy, within};
use crate::endpoint;
use crate::exit::{Exit, Refusal, RemoteError};

/// An answer from memory: a role that takes longer is stuck.
const DESCRIBE_DEADLINE: Duration = Duration::from_secs(10);

/// An operator waits: long enough for a metadata server that is just being started again, and for
/// trying a second one where the first does not answer.
const METADATA_DEADLINE: Duration = Duration::from_secs(8);

/// What the endpoint at `address` is, and which others it knows.
///
/// # Errors
/// When it does not answer, or is none of ours.
pub async fn describe(address: &str) -> anyhow::Result<Description> {
    let mut client = DirectoryClient::new(lazy(address)?);
    let answer = client.describe(within(DESCRIBE_DEADLINE, DescribeRequest {})).await;
    Ok(answer.map_err(|status| RemoteError::new("blobcr", address, &status))?.into_inner())
}

/// The first of `addresses` that answers, and what it is. `addresses` is not empty.
///
/// # Errors
/// Of the last one, when none answers.
pub async fn describe_first(addresses: &[String]) -> anyhow::Result<(&String, Description)> {
    let mut failure = None;
    for address in addresses {
        match describe(address).await {
            Ok(description) => return Ok((address, description)),
            Err(error) => failure = Some(error),
        }
    }
    Err(failure.context("no address was given")?)
}

/// What to do about an endpoint that does not answer.
fn start_hint(endpoint: &str) -> String {
    if Path::new(endpoint).is_dir() {
        return format!(
            "the blobcr of {endpoint} does not answer; if it was killed, start it again with \
             `blobcr up --dir {endpoint}`"
        );
    }
    format!("no repository answers at {endpoint}; start it, or name another with --endpoint")
}

/// The roles that one endpoint leads to.
#[derive(Debug, Clone)]
pub struct Session {
    /// The endpoint itself.
    pub address: String,
    /// What it said.
    pub description: Description,
}

impl Session {
    /// Asks the endpoint that `--endpoint` names.
    ///
    /// # Errors
    /// When none is named, or it does not answer.
    pub async fn open(endpoint: Option<&str>) -> anyhow::Result<Self> {
        let addresses = endpoint::resolve_all(endpoint)?;
        let (address, mut description) = describe_first(&addresses)
            .await
            .with_context(|| start_hint(endpoint.unwrap_or_default()))?;
        let address = address.clone();
        // Where an endpoint names no address for a role that it is itself, this one led there.
        match description.role.as_str() {
            "metadata" => {
                let others = addresses.iter().filter(|other| **other != address);
                description.metadata = std::iter::once(&address).chain(others).cloned().collect();
            }
            "mirror" => description.mirror.clone_from(&address),
            "up" => {
                description.metadata = vec![address.clone()];
                description.mirror.clone_from(&address);
                description.proxy.clone_from(&address);
            }
            "proxy" => {
                description.proxy.clone_from(&address);
                if !description.mirror.is_empty() {
                    description.metadata = describe(&description.mirror).await?.metadata;
                }
            }
            _ => {}
        }
        Ok(Self { address, description })
    }

    /// The repository: metadata servers and nodes.
    ///
    /// # Errors
    /// When the endpoint knows no metadata server.
    pub async fn repository(&self) -> anyhow::Result<Repository> {
        let addresses = &self.description.metadata;
        if addresses.is_empty() {
            return Err(self.lacks("metadata server"));
        }
        let options =
            ConnectOptions { metadata_deadline: METADATA_DEADLINE, ..ConnectOptions::default() };
        Ok(Repository::connect(addresses, options).await?)
    }

    /// The mirror of a host, and its address.
    ///
    /// # Errors
    /// When the endpoint knows none.
    pub fn mirror(&self) -> anyhow::Result<Role<MirrorClient<Channel>>> {
        let address = self.described(&self.description.mirror, "mirror")?;
        Ok(Role { client: MirrorClient::new(lazy(&address)?), name: "mirror", address })
    }

    /// The checkpoint proxy of a host, and its address.
    ///
    /// # Errors
    /// When the endpoint knows none.
    pub fn proxy(&self) -> anyhow::Result<Role<CheckpointClient<Channel>>> {
        let address = self.described(&self.description.proxy, "proxy")?;
        Ok(Role { client: CheckpointClient::new(lazy(&address)?), name: "proxy", address })
    }

    fn described(&self, address: &str, role: &str) -> anyhow::Result<String> {
        if address.is_empty() { Err(self.lacks(role)) } else { Ok(address.to_owned()) }
    }

    fn lacks(&self, wanted: &str) -> anyhow::Error {
        let Self { address, description } = self;
        let message = format!(
            "the {} at {address} knows no {wanted}; name one with --endpoint (disks and VMs: the \
             address of their host's mirror)",
            description.role
        );
        Refusal::new(Exit::Unavailable, message).into()
    }
}

/// A client of one role.
#[derive(Debug, Clone)]
pub struct Role<C> {
    /// The generated client.
    pub client: C,
    name: &'static str,
    address: String,
}

impl<C> Role<C> {
    /// Unwraps an answer.
    ///
    /// # Errors
    /// What the role said instead, or that it did not answer.
    pub fn answer<T>(
        &self,
        answer: Result<tonic::Response<T>, tonic::Status>,
    ) -> Result<T, RemoteError> {
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| RemoteError::new(self.name, &self.address, &status))
    }
}
