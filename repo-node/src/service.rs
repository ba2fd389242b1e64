//! The store behind gRPC.
//!
//! Checking and disk reads run on blocking threads; puts, touches and deletes then wait for the
//! writer without holding one.

use std::sync::Arc;
use std::time::Duration;

use blobcr_proto::MESSAGE_BYTES_MAX;
use blobcr_proto::bulk::BulkRecordStoreServer;
use blobcr_proto::record::RecordKey;
use blobcr_proto::v1;
use blobcr_proto::v1::record_store_server::RecordStore;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, SemaphorePermit};
use tonic::{Request, Response, Status};

use crate::error::StoreError;
use crate::store::{ChunkStore, Fetched, delete_outcome, put_outcome, touch_outcome};
use crate::tables::Tables;

/// Records or refs in one request: what a 16 MiB message holds of small tree nodes, about.
pub const RECORDS_PER_REQUEST_MAX: usize = 65_536;

/// Records on one page of a listing: 64 bytes each in the answer, a quarter of what it may be.
pub const LIST_LIMIT_MAX: usize = 65_536;

/// Puts that are being checked or written at a time. Each has at most one message in memory, so
/// half a GiB at the worst; more would wait for the disk anyway.
const PUTS_IN_FLIGHT_MAX: usize = 32;

/// Gets that are being read at a time: as deep a queue as a disk makes use of.
const GETS_IN_FLIGHT_MAX: usize = 32;

/// Touches, deletes and listings at a time.
const SMALL_IN_FLIGHT_MAX: usize = 64;

/// What the answer to a get needs besides payloads, in bytes: for each record, and as a whole.
const ANSWER_BYTES_EACH: usize = 128;
const ANSWER_BYTES_BASE: usize = 1024;

/// Requests of one connection that are worked on at a time.
const REQUESTS_PER_CONNECTION_MAX: usize = 128;

/// A gRPC server with the settings that chunk traffic wants: a window of a whole chunk for each
/// stream and of eight for a connection (the default of 64 KiB would stall at every round trip),
/// 1 MiB frames, no Nagle, and pings that notice a peer that is gone. Tells the log, at `debug`, of
/// each call, as target `blobcr::rpc`.
#[must_use]
pub fn server_builder() -> tonic::transport::Server {
    tonic::transport::Server::builder()
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(32 << 20)
        .max_frame_size(1 << 20)
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        .concurrency_limit_per_connection(REQUESTS_PER_CONNECTION_MAX)
        .trace_fn(|call| {
            tracing::debug!(target: "blobcr::rpc", path = call.uri().path());
            tracing::Span::none()
        })
}

/// The service over `store`.
#[must_use]
pub fn service(store: Arc<ChunkStore>) -> BulkRecordStoreServer<NodeService> {
    BulkRecordStoreServer::new(NodeService::new(store))
}

/// The same; what is put is checked by threads of `background`, for a host that has guests, too.
#[must_use]
pub fn service_that_gives_way(
    store: Arc<ChunkStore>,
    background: Handle,
) -> BulkRecordStoreServer<NodeService> {
    BulkRecordStoreServer::new(NodeService {
        background: Some(background),
        ..NodeService::new(store)
    })
}

/// [`ChunkStore`] as the `RecordStore` service.
pub struct NodeService {
    store: Arc<ChunkStore>,
    puts: Semaphore,
    gets: Semaphore,
    small: Semaphore,
    tables: Tables,
    /// Where puts are checked, where that is not where everything else is done.
    background: Option<Handle>,
}

impl NodeService {
    /// The service over `store`, to be wrapped; [`service`] is ready to be mounted.
    #[must_use]
    pub fn new(store: Arc<ChunkStore>) -> Self {
        Self {
            store,
            puts: Semaphore::new(PUTS_IN_FLIGHT_MAX),
            gets: Semaphore::new(GETS_IN_FLIGHT_MAX),
            small: Semaphore::new(SMALL_IN_FLIGHT_MAX),
            tables: Tables::default(),
            background: None,
        }
    }

    /// Runs `work` on a thread that may block, if the store has threads at all.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&ChunkStore) -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
        self.blocking_on(&Handle::current(), work).await
    }

    /// The same for what is put.
    async fn putting<T: Send + 'static>(
        &self,
        work: impl FnOnce(&ChunkStore) -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
        match &self.background {
            Some(background) => self.blocking_on(background, work).await,
            None => self.blocking(work).await,
        }
    }

    async fn blocking_on<T: Send + 'static>(
        &self,
        runtime: &Handle,
        work: impl FnOnce(&ChunkStore) -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
        if self.store.is_stepped() {
            return work(&self.store);
        }
        let store = Arc::clone(&self.store);
        runtime
            .spawn_blocking(move || work(&store))
            .await
            .map_err(|error| Status::internal(format!("a worker of the node failed: {error}")))?
    }
}

async fn permit(semaphore: &Semaphore) -> Result<SemaphorePermit<'_>, Status> {
    semaphore.acquire().await.map_err(|_| Status::unavailable("the node is shutting down"))
}

impl From<StoreError> for Status {
    fn from(error: StoreError) -> Self {
        let message = error.to_string();
        match error {
            StoreError::Full { .. } => Self::resource_exhausted(message),
            StoreError::Poisoned { .. } => Self::failed_precondition(message),
            StoreError::Record(_) | StoreError::Refused(_) => Self::invalid_argument(message),
            StoreError::Closed => Self::unavailable(message),
            StoreError::Io { .. } => Self::internal(message),
        }
    }
}

fn check_count(count: usize) -> Result<(), Status> {
    if count > RECORDS_PER_REQUEST_MAX {
        return Err(Status::invalid_argument(format!(
            "{count} records in one request; send at most {RECORDS_PER_REQUEST_MAX}"
        )));
    }
    Ok(())
}

fn keys(refs: &[v1::RecordRef]) -> Result<Vec<RecordKey>, Status> {
    check_count(refs.len())?;
    refs.iter()
        .map(RecordKey::try_from)
        .collect::<Result<_, _>>()
        .map_err(|error| StoreError::from(error).into())
}

fn known_kind(kind: v1::RecordKind) -> Result<v1::RecordKind, Status> {
    match kind {
        v1::RecordKind::Unspecified => Err(Status::invalid_argument("unknown kind of record")),
        kind => Ok(kind),
    }
}

#[tonic::async_trait]
impl RecordStore for NodeService {
    async fn put(
        &self,
        request: Request<v1::PutRequest>,
    ) -> Result<Response<v1::PutResponse>, Status> {
        let _permit = permit(&self.puts).await?;
        let v1::PutRequest { pool, generation, records, table_version } = request.into_inner();
        let newest_table = self.tables.newest(pool, table_version);
        check_count(records.len())?;
        let pending =
            self.putting(move |store| Ok(store.begin_put(pool, generation, &records)?)).await?;
        let done = put_outcome(pending.wait_async().await?)?;
        let (stored, stored_bytes) = (done.stored, done.stored_bytes);
        Ok(Response::new(v1::PutResponse { stored, stored_bytes, newest_table }))
    }

    async fn get(
        &self,
        request: Request<v1::GetRequest>,
    ) -> Result<Response<v1::GetResponse>, Status> {
        let _permit = permit(&self.gets).await?;
        let v1::GetRequest { pool, refs, table_version } = request.into_inner();
        let newest_table = self.tables.newest(pool, table_version);
        let keys = keys(&refs)?;
        let found = self.blocking(move |store| get(store, pool, &keys)).await?;
        Ok(Response::new(v1::GetResponse { found, newest_table }))
    }

    async fn touch(
        &self,
        request: Request<v1::TouchRequest>,
    ) -> Result<Response<v1::TouchResponse>, Status> {
        let _permit = permit(&self.small).await?;
        let v1::TouchRequest { pool, generation, refs, table_version } = request.into_inner();
        let newest_table = self.tables.newest(pool, table_version);
        let keys = keys(&refs)?;
        let pending =
            self.blocking(move |store| Ok(store.begin_touch(pool, generation, &keys))).await?;
        let present = touch_outcome(pending.wait_async().await?)?;
        Ok(Response::new(v1::TouchResponse { present, newest_table }))
    }

    async fn delete(
        &self,
        request: Request<v1::DeleteRequest>,
    ) -> Result<Response<v1::DeleteResponse>, Status> {
        let _permit = permit(&self.small).await?;
        let v1::DeleteRequest { pool, refs, before_generation } = request.into_inner();
        let keys = keys(&refs)?;
        let pending = self
            .blocking(move |store| Ok(store.begin_delete(pool, before_generation, &keys)))
            .await?;
        let done = delete_outcome(pending.wait_async().await?)?;
        Ok(Response::new(v1::DeleteResponse { deleted: done.deleted, kept: done.kept }))
    }

    async fn list(
        &self,
        request: Request<v1::ListRequest>,
    ) -> Result<Response<v1::ListResponse>, Status> {
        let _permit = permit(&self.small).await?;
        let request = request.into_inner();
        let kind = known_kind(request.kind())?;
        let after = request.after.as_ref().map(RecordKey::try_from).transpose();
        let after = after.map_err(StoreError::from)?;
        let limit = match request.limit as usize {
            0 => LIST_LIMIT_MAX,
            limit => limit.min(LIST_LIMIT_MAX),
        };
        let (records, more) =
            self.blocking(move |store| Ok(store.list(request.pool, kind, after, limit))).await?;
        Ok(Response::new(v1::ListResponse { records, more }))
    }

    async fn check(
        &self,
        request: Request<v1::CheckRequest>,
    ) -> Result<Response<v1::CheckResponse>, Status> {
        let _permit = permit(&self.gets).await?;
        let request = request.into_inner();
        let kind = known_kind(request.kind())?;
        let after = request.after.as_ref().map(RecordKey::try_from).transpose();
        let after = after.map_err(StoreError::from)?;
        let checked = self
            .blocking(move |store| Ok(store.check(request.pool, kind, after, request.limit_bytes)))
            .await?;
        Ok(Response::new(checked))
    }

    async fn status(
        &self,
        _: Request<v1::NodeStatusRequest>,
    ) -> Result<Response<v1::NodeStatus>, Status> {
        let _permit = permit(&self.small).await?;
        Ok(Response::new(self.blocking(|store| Ok(store.status())).await?))
    }
}

fn get(store: &ChunkStore, pool: u32, keys: &[RecordKey]) -> Result<Vec<v1::Found>, Status> {
    let payload = |key: &RecordKey| store.stored_len(pool, *key).unwrap_or(0) as usize;
    let payloads: usize = keys.iter().map(payload).sum();
    let answer = payloads + keys.len() * ANSWER_BYTES_EACH + ANSWER_BYTES_BASE;
    if answer > MESSAGE_BYTES_MAX {
        return Err(Status::invalid_argument(format!(
            "the records asked for take {payloads} bytes, more than one answer may have \
             ({MESSAGE_BYTES_MAX}): ask for fewer at a time"
        )));
    }
    let found = |key: &RecordKey| match store.get(pool, *key) {
        Fetched::Absent => v1::Found { record: None, damaged: false },
        Fetched::Damaged => v1::Found { record: None, damaged: true },
        Fetched::Found(record) => v1::Found { record: Some(record), damaged: false },
    };
    Ok(keys.iter().map(found).collect())
}
