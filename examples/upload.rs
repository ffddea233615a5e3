//! Uploads a video in chunks, and revokes the token after half of them.
//!
//! ```text
//! cargo run --example upload                  # a generated film
//! cargo run --example upload -- holiday.mp4   # a file of yours
//! ```
//!
//! The chunk that is challenged is retried with another token, although its body is a stream, and the file arrives byte
//! for byte. The API is the crate's test server in this process.

use std::{env, path::PathBuf, sync::Arc};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{Request, StatusCode, header::CONTENT_RANGE};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use indicatif::{ProgressBar, ProgressStyle};
use ring::digest::{SHA256, digest};
use tower::{Layer, Service, ServiceExt};
use tower_bearer::{ApiVideo, BearerAuthLayer, BoxError, TokenProvider};
use tower_bearer_testing::AuthServer;

/// The minimum size of a chunk at api.video, except for the last one.
const CHUNK: usize = 5 << 20;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let api = AuthServer::start().await?;
    let source = ApiVideo::new(api.api_key()).base_url(api.uri());
    let videos = format!("{}videos", source.api_base());
    let provider = TokenProvider::new(source);
    let mut client = BearerAuthLayer::with_provider(provider)
        .buffered(CHUNK)
        .layer(Client::builder(TokioExecutor::new()).build_http());

    let path = env::args().nth(1).map_or_else(film, |path| Ok(PathBuf::from(path)))?;
    let video = Bytes::from(std::fs::read(&path)?);
    if video.is_empty() {
        return Err(format!("{} is empty", path.display()).into());
    }
    println!("{}: {} bytes", path.display(), video.len());
    let request = Request::post(&videos).body(body(r#"{"title": "A film"}"#.into(), None))?;
    let made = Service::call(client.ready().await?, request).await?.into_body().collect().await?.to_bytes();
    let made: serde_json::Value = serde_json::from_slice(&made)?;
    let source = format!("{videos}/{}/source", made["videoId"].as_str().unwrap_or_default());

    let style = "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta} left";
    let bar = Arc::new(ProgressBar::new(video.len() as u64).with_style(ProgressStyle::with_template(style)?));
    let chunks = video.len().div_ceil(CHUNK);
    for chunk in 0..chunks {
        if chunk == chunks / 2 {
            bar.println(format!("chunk {} of {chunks}: the token is revoked", chunk + 1));
            api.revoke_access_tokens();
        }
        let (first, end) = (chunk * CHUNK, video.len().min((chunk + 1) * CHUNK));
        let request = Request::post(&source)
            .header(CONTENT_RANGE, format!("bytes {first}-{}/{}", end - 1, video.len()))
            .body(body(video.slice(first..end), Some(Arc::clone(&bar))))?;
        let answer = Service::call(client.ready().await?, request).await?;
        if answer.status() != StatusCode::CREATED {
            return Err(format!("chunk {}: {}", chunk + 1, answer.status()).into());
        }
        answer.into_body().collect().await?;
    }
    bar.finish();

    let (counters, upload) = (api.counters(), api.uploads().pop().ok_or("nothing arrived")?);
    println!("401s healed         {}, by {} refresh", counters.challenged, counters.refresh_grants);
    println!("chunks arrived      {} of {chunks}", upload.chunks);
    let sent: String = digest(&SHA256, &video).as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let whole = upload.sha256 == sent && upload.bytes == video.len() as u64;
    println!("byte for byte       {}", if whole { "yes" } else { "NO" });
    whole.then_some(()).ok_or_else(|| "the file that arrived is another".into())
}

/// Returns a body of small frames. The bar counts each frame once, even if it is sent again.
fn body(data: Bytes, bar: Option<Arc<ProgressBar>>) -> UnsyncBoxBody<Bytes, BoxError> {
    let frames =
        (0..data.len()).step_by(64 << 10).map(move |at| data.slice(at..data.len().min(at + (64 << 10))));
    let counted =
        stream::iter(frames).inspect(move |frame| bar.iter().for_each(|bar| bar.inc(frame.len() as u64)));
    StreamBody::new(counted.map(|frame| Ok(Frame::data(frame)))).boxed_unsync()
}

/// Three seconds of a moving square, uncompressed (YUV4MPEG2, which ffmpeg and VLC play).
fn film() -> Result<PathBuf, BoxError> {
    const WIDTH: usize = 640;
    const HEIGHT: usize = 360;
    let mut film = format!("YUV4MPEG2 W{WIDTH} H{HEIGHT} F25:1 Ip A1:1 C420\n").into_bytes();
    for frame in 0..75 {
        film.extend(b"FRAME\n");
        let inside = |x: usize, y: usize| (x.abs_diff(6 * frame + 90) < 60) && y.abs_diff(HEIGHT / 2) < 60;
        film.extend((0..HEIGHT * WIDTH).map(|at| if inside(at % WIDTH, at / WIDTH) { 210 } else { 40 }));
        film.extend(std::iter::repeat_n(128, HEIGHT * WIDTH / 2));
    }
    let path = env::temp_dir().join("tower-bearer-film.y4m");
    std::fs::write(&path, film)?;
    Ok(path)
}
