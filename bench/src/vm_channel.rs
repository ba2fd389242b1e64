//! A VM's checkpoint channel, used from the host as QEMU would carry it for a guest.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use blobcr_proto::channel::{Decoded, Frame, decode};
use blobcr_proto::v1::{ChannelReply, ChannelRequest, CheckpointRequest};
use blobcr_proto::v1::{channel_reply::Reply, channel_request::Request};
use bytes::BytesMut;
use prost::Message;

use blobcr_tests::cluster::Cluster;

/// Longer than any checkpoint takes: a lost answer ends the benchmark instead of hanging it.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// One connection to the channel of one VM.
#[derive(Debug)]
pub struct VmChannel {
    stream: UnixStream,
    next_request: u64,
}

impl VmChannel {
    /// Makes the VM `vm` with one disk, and connects to its channel.
    ///
    /// # Errors
    /// When the verb or the connection fails.
    pub fn add(cluster: &Cluster, vm: &str, disk: &str) -> anyhow::Result<Self> {
        let added = cluster.json(&["vm", "add", vm, "--disk", disk])?;
        let socket = added["socket"].as_str().context("no socket in the new VM")?;
        let stream = UnixStream::connect(socket).with_context(|| format!("connect {socket}"))?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        Ok(Self { stream, next_request: 1 })
    }

    /// CHECKPOINT; returns how long the guest would have waited.
    ///
    /// # Errors
    /// When the host refuses, or does not answer.
    pub fn checkpoint(&mut self) -> anyhow::Result<Duration> {
        let request_id = self.next_request;
        self.next_request += 1;
        let request = CheckpointRequest {
            idempotency_key: format!("bench-{}-{request_id}", std::process::id()),
            ..CheckpointRequest::default()
        };
        let body = ChannelRequest { request: Some(Request::Checkpoint(request)) };
        let mut out = BytesMut::new();
        Frame { request_id, body: body.encode_to_vec().into() }.encode(&mut out)?;
        let start = Instant::now();
        self.stream.write_all(&out)?;
        let reply = self.receive(request_id)?;
        let took = start.elapsed();
        match reply.reply {
            Some(Reply::Checkpoint(_)) => Ok(took),
            other => bail!("the host answered {other:?}"),
        }
    }

    fn receive(&mut self, request_id: u64) -> anyhow::Result<ChannelReply> {
        let mut buffer = BytesMut::new();
        let mut part = [0; 4096];
        loop {
            match decode(&mut buffer) {
                Decoded::Frame(frame) if frame.request_id == request_id => {
                    return Ok(ChannelReply::decode(frame.body)?);
                }
                Decoded::Frame(_) | Decoded::Skipped(_) => {}
                Decoded::Incomplete => {
                    let len = self.stream.read(&mut part)?;
                    ensure!(len > 0, "the host closed the channel");
                    buffer.extend_from_slice(&part[..len]);
                }
            }
        }
    }
}
