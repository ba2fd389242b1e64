//! How connections to servers come about.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::codegen::Service;
use tonic::codegen::http::Uri;

/// Bytes to and from a server.
pub trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// Makes connections in place of TCP: a simulated network, whose faults a seed decides.
pub trait Dial: fmt::Debug + Send + Sync + 'static {
    /// A connection to `address` (`host:port`). Dropping the future gives the attempt up.
    fn dial(&self, address: String) -> BoxFuture<'static, io::Result<Box<dyn Connection>>>;
}

/// A [`Dial`] as tonic wants it.
#[derive(Clone, Debug)]
pub(super) struct Dialer(pub(super) Arc<dyn Dial>);

impl Service<Uri> for Dialer {
    type Response = TokioIo<Box<dyn Connection>>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let address = uri.authority().map(|authority| authority.to_string()).unwrap_or_default();
        let dialled = self.0.dial(address);
        Box::pin(async move { Ok(TokioIo::new(dialled.await?)) })
    }
}
