//! A pod: says who it is over HTTP and to a datagram that asks, and echoes everything else that it gets over TCP and UDP.

use std::convert::Infallible;
use std::net::{Ipv6Addr, SocketAddr};

use anyhow::Context;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use crate::lab::report::Backend;

/// Arguments of `kinesin lab-serve`.
#[derive(Debug, Clone, clap::Args)]
pub struct ServeOptions {
    /// The pod's name, for its answers
    #[arg(long)]
    pub pod: String,
    /// The node's name, for its answers
    #[arg(long)]
    pub node: String,
    /// Port for HTTP
    #[arg(long, default_value_t = crate::lab::HTTP_PORT)]
    pub http_port: u16,
    /// Port for echoing TCP and UDP
    #[arg(long, default_value_t = crate::lab::ECHO_PORT)]
    pub echo_port: u16,
}

/// Serves until it is killed, on all addresses of the namespace.
///
/// # Errors
/// When a port is taken.
pub async fn serve(options: ServeOptions) -> anyhow::Result<()> {
    let any = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let http = TcpListener::bind(any(options.http_port)).await.context("bind the HTTP port")?;
    let udp = UdpSocket::bind(any(options.echo_port)).await.context("bind the UDP echo port")?;
    let echo = TcpListener::bind(any(options.echo_port)).await.context("bind the TCP echo port")?;
    let me = |peer: SocketAddr| Backend {
        pod: options.pod.clone(),
        node: options.node.clone(),
        client: SocketAddr::new(peer.ip().to_canonical(), peer.port()),
    };
    let answers = async {
        loop {
            // A connection that is gone before it is accepted, or a lack of descriptors: the next one may work.
            let Ok((stream, peer)) = http.accept().await else {
                tokio::task::yield_now().await;
                continue;
            };
            tokio::spawn(answer(stream, me(peer)));
        }
    };
    let echoes = async {
        loop {
            if let Ok((stream, _)) = echo.accept().await {
                tokio::spawn(echo_stream(stream));
            } else {
                tokio::task::yield_now().await;
            }
        }
    };
    let datagrams = async {
        let mut bytes = vec![0; 65_536];
        loop {
            if let Ok((length, peer)) = udp.recv_from(&mut bytes).await {
                let who = (bytes[..length] == *super::WHO).then(|| me(peer).to_string());
                let _ = udp.send_to(who.as_ref().map_or(&bytes[..length], |line| line.as_bytes()), peer).await;
            } else {
                tokio::task::yield_now().await;
            }
        }
    };
    tokio::join!(answers, echoes, datagrams);
    Ok(())
}

/// Answers every request of a connection with one line. HTTP/1.1 with keep-alive, unless the client says otherwise.
async fn answer(stream: TcpStream, backend: Backend) {
    let line = format!("{backend}\n");
    let service = service_fn(move |_: Request<Incoming>| {
        let line = line.clone();
        async move { Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(line)))) }
    });
    // A client that went away is not the server's problem.
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

async fn echo_stream(mut stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let mut bytes = vec![0; 4096];
    while let Ok(length) = stream.read(&mut bytes).await {
        if length == 0 || stream.write_all(&bytes[..length]).await.is_err() {
            return;
        }
    }
}
