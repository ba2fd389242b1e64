//! The snapshot below a disk that may be larger: behind its end are zeros, for which nobody is
//! asked.

use std::sync::Arc;

use bytes::Bytes;

use super::BaseError;
use super::shape::Shape;
use super::upstreams::Base;

#[derive(Clone)]
pub(super) struct BaseView {
    base: Arc<dyn Base>,
    /// Chunks that the snapshot reaches into.
    chunks: u64,
}

impl std::fmt::Debug for BaseView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BaseView").field("chunks", &self.chunks).finish_non_exhaustive()
    }
}

impl BaseView {
    pub(super) fn new(base: Arc<dyn Base>, shape: Shape) -> Self {
        let chunks = shape.chunk_size.chunks_in(base.size_bytes());
        Self { base, chunks }
    }

    /// As [`Base::read_local`].
    pub(super) fn read_local(
        &self,
        chunk: u64,
        within: u64,
        out: &mut [u8],
    ) -> Result<bool, BaseError> {
        if chunk >= self.chunks {
            out.fill(0);
            return Ok(true);
        }
        self.base.read_local(chunk, within, out)
    }

    /// As [`Base::fetch`].
    pub(super) async fn fetch(&self, chunk: u64) -> Result<Option<Bytes>, BaseError> {
        if chunk >= self.chunks { Ok(None) } else { self.base.fetch(chunk).await }
    }

    /// As [`Base::fetch_unawaited`].
    pub(super) async fn fetch_unawaited(&self, chunk: u64) -> Result<Option<Bytes>, BaseError> {
        if chunk >= self.chunks { Ok(None) } else { self.base.fetch_unawaited(chunk).await }
    }

    /// As [`Base::may_have_data`].
    pub(super) fn may_have_data(&self, chunk: u64) -> Option<bool> {
        if chunk >= self.chunks { Some(false) } else { self.base.may_have_data(chunk) }
    }
}
