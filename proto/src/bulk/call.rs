//! One call, from both of its ends.

use std::future::poll_fn;

use bytes::Bytes;
use prost::Message;
use tonic::body::Body;
use tonic::codegen::http::header::{CONTENT_TYPE, TE};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::codegen::http::{self, HeaderMap, HeaderValue, Method, StatusCode, Uri, Version};
use tonic::codegen::{Service, StdError};
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

use super::pieces::Outgoing;
use super::received::Received;

/// Calls `path` over `channel`.
pub(super) async fn call<R: Message + Default>(
    mut channel: Channel,
    path: &'static str,
    request: Request<impl Message>,
) -> Result<Response<R>, Status> {
    let (metadata, extensions, message) = request.into_parts();
    let mut request = http::Request::new(Body::new(Outgoing::request(&message)?));
    drop(message);
    *request.method_mut() = Method::POST;
    *request.version_mut() = Version::HTTP_2;
    *request.uri_mut() = Uri::from(PathAndQuery::from_static(path));
    *request.extensions_mut() = extensions;
    *request.headers_mut() = metadata.into_headers();
    request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
    request.headers_mut().insert(CONTENT_TYPE, super::CONTENT_TYPE);
    let failed = |error: tonic::transport::Error| Status::from_error(error.into());
    poll_fn(|cx| channel.poll_ready(cx)).await.map_err(failed)?;
    let (parts, body) = channel.call(request).await.map_err(failed)?.into_parts();
    let early = outcome(&parts.headers);
    if let Some(Err(status)) = early {
        return Err(status);
    }
    let received = Received::all_of(body).await?;
    outcome(&received.trailers).or(early).unwrap_or_else(|| Err(no_outcome(parts.status)))?;
    Ok(Response::new(received.message()?))
}

/// What `headers` say of how the call went, if they do.
fn outcome(headers: &HeaderMap) -> Option<Result<(), Status>> {
    let status = Status::from_header_map(headers)?;
    Some(if status.code() == Code::Ok { Ok(()) } else { Err(status) })
}

/// Something between here and the server answered, or the stream broke off.
fn no_outcome(answer: StatusCode) -> Status {
    let message = format!("the answer (HTTP {answer}) does not say how the call went");
    match answer {
        StatusCode::TOO_MANY_REQUESTS
        | StatusCode::BAD_GATEWAY
        | StatusCode::SERVICE_UNAVAILABLE
        | StatusCode::GATEWAY_TIMEOUT => Status::unavailable(message),
        StatusCode::NOT_FOUND => Status::unimplemented(message),
        _ => Status::unknown(message),
    }
}

/// Answers `request` by what `handle` makes of it.
pub(super) async fn answer<M, R, B, F>(
    request: http::Request<B>,
    handle: impl FnOnce(Request<M>) -> F,
) -> http::Response<Body>
where
    M: Message + Default,
    R: Message,
    B: tonic::codegen::Body<Data = Bytes, Error: Into<StdError>>,
    F: Future<Output = Result<Response<R>, Status>>,
{
    let (parts, body) = request.into_parts();
    let answered = async {
        let message = Received::all_of(body).await?.message()?;
        let metadata = MetadataMap::from_headers(parts.headers);
        let response = handle(Request::from_parts(metadata, parts.extensions, message)).await?;
        let (metadata, message, extensions) = response.into_parts();
        let mut answer = http::Response::new(Body::new(Outgoing::answer(&message)?));
        *answer.headers_mut() = metadata.into_headers();
        *answer.extensions_mut() = extensions;
        answer.headers_mut().insert(CONTENT_TYPE, super::CONTENT_TYPE);
        Ok(answer)
    };
    answered.await.unwrap_or_else(Status::into_http)
}
