//! Reading one record, with all its checks.

use std::io;

use blobcr_proto::codec::crc32c;
use bytes::Bytes;

use crate::format::segment::{HeaderEvent, Place, RECORD_HEADER_LEN, RecordHeader};
use crate::format::{Key, StoreId};
use crate::index::State;
use crate::segments::Segment;

/// Why a record could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    /// The disk failed.
    #[error("the disk cannot read it: {0}")]
    Io(#[from] io::Error),
    /// What is there is not the record.
    #[error("{0}")]
    Damaged(&'static str),
}

/// Reads the record `key` where the index says it is.
pub(crate) fn read_record(
    segment: &Segment,
    store: StoreId,
    key: &Key,
    state: State,
) -> Result<(RecordHeader, Bytes), ReadError> {
    let len = RECORD_HEADER_LEN + state.stored_len as usize;
    let bytes = Bytes::from(segment.file.read_at(state.location.offset(), len)?);
    if bytes.len() < len {
        return Err(ReadError::Damaged("the segment is shorter than it was"));
    }
    let place = Place { store, location: state.location };
    let (header, _) = RecordHeader::decode(&bytes, place)
        .map_err(|_| ReadError::Damaged("its header is damaged"))?;
    let is_it = header.event == HeaderEvent::Put
        && header.key == *key
        && header.stored_len == state.stored_len;
    if !is_it {
        return Err(ReadError::Damaged("another record is in its place"));
    }
    let payload = bytes.slice(RECORD_HEADER_LEN..);
    if crc32c(&payload) != header.payload_crc {
        return Err(ReadError::Damaged("its payload does not match its checksum"));
    }
    Ok((header, payload))
}
