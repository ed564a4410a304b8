//! What a lab leaves behind: nothing, whatever happened to it.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kinesin::lab::{BASE_DIR, HTTP_PORT, get_from};
use kinesin::net::{Netns, cgroup};

use super::{LIMIT, eventually, lab};

/// Everything in the system that carries this lab id.
fn traces(id: &str) -> Vec<String> {
    let mut found = Vec::new();
    found.extend(Netns::names().into_iter().filter(|name| name.starts_with(&format!("{id}."))));
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    found.extend(mounts.lines().filter(|line| line.contains(id)).map(str::to_string));
    let places = [cgroup::root().unwrap().join(format!("kinesin-lab-{id}")), Path::new(BASE_DIR).join(id)];
    found.extend(places.iter().filter(|place| place.exists()).map(|place| place.display().to_string()));
    found
}

/// Runs one of the helpers below in a process of its own.
fn helper(name: &str, report: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("lifetime::{name}"), "--nocapture", "--test-threads=1"]);
    command.env("KINESIN_TEST_REPORT", report).env("KINESIN_TEST_LAB", lab_name());
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command.process_group(0);
    command.spawn().unwrap()
}

/// Set only in a helper's process: where to write the lab's id and a pid.
fn report_path() -> Option<PathBuf> {
    std::env::var_os("KINESIN_TEST_REPORT").map(PathBuf::from)
}

/// The name of the killed lab: of this test process alone, or another one's labs would clean up first.
fn lab_name() -> String {
    std::env::var("KINESIN_TEST_LAB").unwrap_or_else(|_| format!("killed-{}", std::process::id()))
}

async fn read_report(path: &Path) -> (String, u32) {
    let mut text = String::new();
    eventually("the helper has its lab", async || {
        text = fs::read_to_string(path).unwrap_or_default();
        text.ends_with('\n')
    })
    .await;
    let (id, pid) = text.trim_end().split_once(' ').unwrap();
    (id.to_string(), pid.parse().unwrap())
}

/// Not a test of its own: makes a full lab, tells where it is, and panics.
#[tokio::test]
async fn helper_that_panics() {
    let Some(report) = report_path() else { return };
    let lab = lab("panics").nodes(2).pods_per_node(1).build().await.unwrap();
    lab.pod(1, 1).serve().await.unwrap();
    fs::write(report, format!("{} {}\n", lab.id(), std::process::id())).unwrap();
    panic!("on purpose");
}

/// Not a test of its own: makes a full lab, tells where it is, and waits to be killed.
#[tokio::test]
async fn helper_that_is_killed() {
    let Some(report) = report_path() else { return };
    let lab = lab(&lab_name()).nodes(2).pods_per_node(1).build().await.unwrap();
    lab.pod(1, 1).serve().await.unwrap();
    let mut command = Command::new("sleep");
    command.arg("1000");
    let sleeper = lab.node(1).spawn("sleeper", command).unwrap();
    fs::write(report, format!("{} {}\n", lab.id(), sleeper.pid())).unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn a_lab_leaves_nothing_when_it_is_dropped() {
    let lab = lab("dropped").nodes(2).pods_per_node(2).build().await.unwrap();
    lab.pod(2, 2).serve().await.unwrap();
    let id = lab.id().to_string();
    let there = traces(&id);
    // A LAN, a client, two nodes and four pods, each a name and a mount; two BPF file systems; a cgroup and a directory.
    assert_eq!(there.len(), 8 * 2 + 2 + 2, "{there:#?}");
    assert!(lab.node(1).bpf_root().is_dir());
    drop(lab);
    assert_eq!(traces(&id), Vec::<String>::new());
}

#[tokio::test]
async fn a_lab_leaves_nothing_when_its_process_panics() {
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().join("report");
    let mut child = helper("helper_that_panics", &report);
    let (id, _) = read_report(&report).await;
    let status = child.wait().unwrap();
    assert!(!status.success(), "the helper must have panicked");
    assert_eq!(traces(&id), Vec::<String>::new());
}

#[tokio::test]
async fn what_a_killed_lab_left_is_removed_by_the_next_of_its_name_and_its_processes_die_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().join("report");
    let mut child = helper("helper_that_is_killed", &report);
    let (id, sleeper) = read_report(&report).await;
    // While its owner lives, another lab of the name leaves it alone.
    drop(lab(&lab_name()).build().await.unwrap());
    assert!(!traces(&id).is_empty());
    assert!(Path::new(&format!("/proc/{sleeper}")).exists());

    child.kill().unwrap();
    child.wait().unwrap();
    eventually("the sleeper died with its parent", async || {
        kinesin::net::proc::stat(sleeper as i32).is_none_or(|stat| stat.state == 'Z')
    })
    .await;
    assert!(!traces(&id).is_empty(), "a killed process can not clean up, so this test proves nothing");

    let next = lab(&lab_name()).build().await.unwrap();
    assert_eq!(traces(&id), Vec::<String>::new());
    assert_ne!(next.id(), id);
}

#[tokio::test]
async fn two_labs_of_one_name_do_not_see_each_other() {
    let (one, two) =
        tokio::join!(lab("twins").nodes(1).pods_per_node(1).build(), lab("twins").nodes(1).pods_per_node(1).build());
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_ne!(one.id(), two.id());
    one.pod(1, 1).serve().await.unwrap();
    let url = format!("http://{}:{HTTP_PORT}/", one.pod(1, 1).address());
    assert_eq!(get_from(one.node(1).netns(), &url, LIMIT).await.unwrap().status, 200);
    let elsewhere = get_from(two.node(1).netns(), &url, Duration::from_secs(2)).await;
    assert!(elsewhere.is_err(), "the same address in the other lab has no server: {elsewhere:?}");
    drop(two);
    assert_eq!(get_from(one.node(1).netns(), &url, LIMIT).await.unwrap().status, 200);
}

#[tokio::test]
async fn a_lab_name_that_can_not_work_is_refused_with_the_rule() {
    for name in ["", "Upper", "a/b", "a.b"] {
        let error = lab(name).build().await.unwrap_err().to_string();
        assert!(error.contains("a-z, 0-9 and -"), "{error}");
    }
    let error = lab("crowd").nodes(40).build().await.unwrap_err().to_string();
    assert!(error.contains("39 nodes"), "{error}");
}
