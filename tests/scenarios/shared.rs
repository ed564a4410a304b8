//! What all tests of the binary share: a runtime, and one control plane, started by the first who needs it.

use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use anyhow::Result;
use kinesin::source::crds;
use kube::Client;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::OnceCell;

use crate::support::control_plane::{ControlPlane, Options};

pub static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    // The first caller's; a second one is told that there is one already.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap()
});

/// The control plane and what everybody needs of it.
pub struct Plane {
    pub kubeconfig: PathBuf,
    pub client: Client,
    /// Objects are in the way of others: whoever writes some holds this.
    pub turn: Arc<tokio::sync::Mutex<()>>,
}

static PLANE: OnceCell<Plane> = OnceCell::const_new();
static RUNNING: Mutex<Option<(ControlPlane, TempDir)>> = Mutex::new(None);

/// The only control plane of this binary, with the custom resources registered.
pub async fn plane() -> Result<&'static Plane> {
    PLANE
        .get_or_try_init(async || {
            let (plane, dir) = tokio::task::spawn_blocking(|| {
                let dir = tempfile::tempdir()?;
                let options = Options { service_cidr: "10.96.0.0/16,fd00:96::/112".into(), ..Options::default() };
                anyhow::Ok((ControlPlane::start(dir.path(), options)?, dir))
            })
            .await??;
            let kubeconfig = plane.kubeconfig();
            *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) = Some((plane, dir));
            let config = kube::config::Kubeconfig::read_from(&kubeconfig)?;
            let client = Client::try_from(kube::Config::from_custom_kubeconfig(config, &Default::default()).await?)?;
            crds::register(client.clone()).await?;
            Ok(Plane { kubeconfig, client, turn: Arc::default() })
        })
        .await
}

/// Ends the control plane; a static is never dropped.
pub fn close() {
    drop(RUNNING.lock().unwrap_or_else(PoisonError::into_inner).take());
}
