//! The directory of an endpoint: what it is, and where the other roles are.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use blobcr_proto::v1;
use blobcr_proto::v1::directory_server::{Directory, DirectoryServer};
use tonic::{Request, Response, Status};

use crate::endpoint::checked_address;

/// Answers `Describe`, and takes the announcements of a proxy where a mirror runs.
#[derive(Debug, Clone)]
pub struct Described {
    description: v1::Description,
    /// Where this host's proxy said that it is. `None` where no mirror runs.
    proxy: Option<Arc<Mutex<String>>>,
}

impl Described {
    /// A role that others find by its address alone, and knows nobody.
    #[must_use]
    pub fn new(role: &str) -> Self {
        let description = v1::Description {
            role: role.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..v1::Description::default()
        };
        Self { description, proxy: None }
    }

    /// It knows these metadata servers.
    #[must_use]
    pub fn with_metadata(mut self, addresses: &[String]) -> Self {
        self.description.metadata = addresses.to_vec();
        self
    }

    /// It knows this mirror.
    #[must_use]
    pub fn with_mirror(mut self, address: &str) -> Self {
        self.description.mirror = address.to_owned();
        self
    }

    /// A proxy will tell it where it is.
    #[must_use]
    pub fn expecting_proxy(mut self) -> Self {
        self.proxy = Some(Arc::default());
        self
    }

    /// The service.
    #[must_use]
    pub fn service(self) -> DirectoryServer<Self> {
        DirectoryServer::new(self)
    }
}

#[tonic::async_trait]
impl Directory for Described {
    async fn describe(
        &self,
        _: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::Description>, Status> {
        let mut description = self.description.clone();
        if let Some(proxy) = &self.proxy {
            description.proxy.clone_from(&proxy.lock().unwrap_or_else(PoisonError::into_inner));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        description.now_unix_ms = now.as_millis() as u64;
        Ok(Response::new(description))
    }

    async fn announce_proxy(
        &self,
        request: Request<v1::AnnounceProxyRequest>,
    ) -> Result<Response<v1::AnnounceProxyResponse>, Status> {
        let Some(proxy) = &self.proxy else {
            return Err(Status::unimplemented("no mirror runs here"));
        };
        let address = request.into_inner().address;
        let address =
            checked_address(&address).map_err(|e| Status::invalid_argument(e.to_string()))?;
        *proxy.lock().unwrap_or_else(PoisonError::into_inner) = address;
        Ok(Response::new(v1::AnnounceProxyResponse {}))
    }
}
