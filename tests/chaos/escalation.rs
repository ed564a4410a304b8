//! Children that cannot start.

use std::path::PathBuf;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::rig::{LIMIT, Lease, RATE, Rig, difference};

/// Seven attempts of the child in each of four attempts of its group, with their pauses, on a busy machine.
const BOUND: Duration = Duration::from_secs(60);

/// Another file system in the place of one; as before when dropped.
struct Overmount(PathBuf);

impl Overmount {
    fn new(dir: PathBuf) -> Self {
        mount(Some("tmpfs"), &dir, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        Self(dir)
    }
}

impl Drop for Overmount {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_child_that_cannot_start_ends_the_process_and_the_traffic_goes_on() {
    let mut rig = Rig::start("escalate", Lease::Patient, &[]).await;
    let owner = rig.owner(&[]).await;
    let standby = (1..=3).find(|number| *number != owner).unwrap();
    let load = rig.load().await;
    let before = rig.picture(owner);

    // Where maps are pinned, nothing can be pinned any more.
    let obstacle = Overmount::new(kinesin::datapath::maps_dir(&rig.lab.node(owner).bpf_root()));
    assert!(rig.kill(owner, "loader").await);
    // The admin socket is prepared in a file of this name.
    let in_the_way = rig.lab.node(standby).dir().join("agent.sock.new");
    std::fs::create_dir(&in_the_way).unwrap();
    rig.kill(standby, "health_server").await;

    for (number, child, why) in [(owner, "loader", "pin"), (standby, "health_server", "directory")] {
        let agent = rig.take_agent(number);
        let status = agent.process().wait(BOUND).await;
        let status = status.unwrap_or_else(|| panic!("not ended within {BOUND:?}: {}", agent.process().report()));
        assert!(!status.success(), "{child}: {status}");
        let words = agent.logs(3);
        let last = words.lines().last().unwrap_or_default().to_lowercase();
        assert!(last.contains(child) && last.contains(why), "its last words name the child and the reason: {words}");
    }
    assert_eq!(rig.answering().await, [owner], "the programs go on");
    load.more(RATE.into()).await;

    drop(obstacle);
    std::fs::remove_dir(&in_the_way).unwrap();
    for number in [owner, standby] {
        rig.start_agent(number);
    }
    for number in [owner, standby] {
        rig.agent(number).wait_ready(LIMIT).await.unwrap();
    }
    assert_eq!(rig.owner(&[]).await, owner);
    let changes = difference(&before, &rig.picture(owner));
    assert!(changes.is_empty(), "{changes:#?}");
    load.more(RATE.into()).await;
    load.nothing_lost().await;
}
