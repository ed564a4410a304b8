#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener as StdUnixListener;

use super::views::{DumpRow, NodeKind, TreeView};
use super::*;
use crate::config::ListenAddr;

#[tokio::test]
async fn the_socket_is_private_and_its_directory_is_made_and_the_file_goes_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run/kinesin.sock");
    let socket = AdminSocket::bind(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    drop(socket);
    assert!(!path.exists());
}

#[tokio::test]
async fn a_socket_that_nobody_listens_on_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(StdUnixListener::bind(&path).unwrap());
    assert!(path.exists(), "left behind, as after kill -9");
    // So is one that was being prepared.
    drop(StdUnixListener::bind(dir.path().join("s.new")).unwrap());
    let _socket = AdminSocket::bind(&path).unwrap();
    assert!(std::os::unix::net::UnixStream::connect(&path).is_ok());
}

#[tokio::test]
async fn a_socket_in_use_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let _first = AdminSocket::bind(&path).unwrap();
    let error = AdminSocket::bind(&path).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
    assert!(error.to_string().contains("socket-path"), "{error}");
    assert!(path.exists());
}

#[tokio::test]
async fn a_socket_of_a_newer_agent_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let old = AdminSocket::bind(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let _newer = AdminSocket::bind(&path).unwrap();
    drop(old);
    assert!(path.exists());
}

#[tokio::test]
async fn a_path_that_no_socket_can_have_is_refused_by_name() {
    let path = std::path::PathBuf::from(format!("/tmp/{}", "x".repeat(110)));
    let error = AdminSocket::bind(&path).unwrap_err().to_string();
    assert!(error.contains("is longer than 103 bytes"), "{error}");
}

#[tokio::test]
async fn an_address_in_use_is_named() {
    let first = bind(&ListenAddr { ip: Some([127, 0, 0, 1].into()), port: 0 }).await.unwrap();
    let addr = first.local_addr().unwrap();
    let error = bind(&ListenAddr { ip: Some(addr.ip()), port: addr.port() }).await.unwrap_err();
    assert!(error.to_string().starts_with(&format!("listen on {addr}: ")), "{error}");
}

#[test]
fn rows_keep_the_order_of_their_columns() {
    let row = DumpRow::new([("zulu", 1), ("alpha", 2)]);
    let text = serde_json::to_string(&row).unwrap();
    assert_eq!(text, r#"{"zulu":1,"alpha":2}"#);
    assert_eq!(serde_json::from_str::<DumpRow>(&text).unwrap(), row);
}

#[test]
fn a_tree_reads_back_as_it_was_written() {
    let child = TreeView { name: "map_writer".into(), restarts: [("panic".into(), 2)].into(), ..TreeView::default() };
    let tree = TreeView { kind: NodeKind::Supervisor, children: vec![child], ..TreeView::default() };
    let text = serde_json::to_string(&tree).unwrap();
    assert!(text.contains(r#""mailboxDepth":0"#) && text.contains(r#""kind":"supervisor""#), "{text}");
    assert_eq!(serde_json::from_str::<TreeView>(&text).unwrap(), tree);
}
