//! Calls that carry chunks, without copying them.
//!
//! gRPC as ever on the wire: what is here talks to the generated clients and servers, and they to it.
//! Those copy a message as a whole into a buffer to send it, and again out of the frames that it came
//! in. Here a large payload is handed to the connection as it is ([`pieces`]), and what is received is
//! read where the frames lie ([`received`]).

mod call;
mod pieces;
mod received;
mod record_store;

pub use record_store::{BulkRecordStoreClient, BulkRecordStoreServer};

/// What gRPC puts before a message: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;

/// Of the content type of gRPC.
const CONTENT_TYPE: tonic::codegen::http::HeaderValue =
    tonic::codegen::http::HeaderValue::from_static("application/grpc");
