//! Maps in the kernel: made once, used by one test after the other, empty in between.

use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError};

use kinesin::datapath::{Datapath, KernelMaps, LoadOptions, MapSizes, MapStore, ensure_bpffs};
use kinesin_abi::MAGLEV_TABLE_SIZE;
use kinesin_core::maglev::HashSeed;
use kinesin_core::plan::{Actual, Limits, Planner};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// Of memory maps as of the kernel's: small where there is a table per service, as usual elsewhere.
pub fn sizes() -> MapSizes {
    MapSizes { frontends: 1024, slots: 4096, backends: 1024, maglev: 64, ranges: 1024, ..MapSizes::default() }
}

/// What a planner may put into maps of [`sizes`].
pub fn limits() -> Limits {
    let sizes = sizes();
    Limits {
        frontends: sizes.frontends,
        slots: sizes.slots,
        backends: sizes.backends,
        maglev_tables: sizes.maglev,
        source_ranges: sizes.ranges,
        maglev_size: MAGLEV_TABLE_SIZE,
        maglev_seed: HashSeed::default(),
    }
}

/// Empty maps. Those that are not given back, because a test failed and nobody knows who still writes to them, end here.
pub struct Borrowed(Arc<KernelMaps>);

static IDLE: Mutex<Vec<Arc<KernelMaps>>> = Mutex::new(Vec::new());

/// Maps that nobody else uses.
pub fn borrow() -> Borrowed {
    let idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner).pop();
    Borrowed(idle.unwrap_or_else(made))
}

impl Borrowed {
    pub fn maps(&self) -> &Arc<KernelMaps> {
        &self.0
    }

    /// For the next one. Nobody may write to them any more.
    pub fn give_back(self) -> anyhow::Result<()> {
        empty(&self.0)?;
        IDLE.lock().unwrap_or_else(PoisonError::into_inner).push(self.0);
        Ok(())
    }
}

/// As a restarted agent does with what nobody wants any more.
pub fn empty(maps: &KernelMaps) -> anyhow::Result<()> {
    let mut planner = Planner::new(limits());
    maps.apply(&planner.adopt(maps.read()?))?;
    maps.apply(&planner.prune())?;
    anyhow::ensure!(maps.read()? == Actual::default(), "maps are not empty after a prune");
    Ok(())
}

/// Makes maps as the agent does: they stay in the kernel while their descriptors are open, without their pins.
fn made() -> Arc<KernelMaps> {
    let (send, receive) = sync_channel(1);
    // A mount namespace of its own, which ends with the thread and takes the file system with it.
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).expect("root may unshare");
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("mounts become private");
        let root = tempfile::tempdir().expect("a temporary directory");
        ensure_bpffs(root.path()).expect("root may mount bpf");
        let options = LoadOptions { max_entries: sizes(), ..LoadOptions::new(root.path()) };
        let datapath = Datapath::load(&options).expect("the maps are made");
        let _ = send.send(datapath.kernel_maps());
        drop(datapath);
        let _ = umount2(root.path(), MntFlags::MNT_DETACH);
    });
    let maps = receive.recv();
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    maps.expect("sent before the thread ended")
}
