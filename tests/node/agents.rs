//! How the lab starts agents; what they do then is other tests' matter.

use std::fs;
use std::time::Duration;

use kinesin::lab::AgentOptions;

use super::lab;

#[tokio::test]
async fn an_agent_that_ends_at_once_is_reported_with_its_command_line_and_last_words() {
    let lab = lab("agent").nodes(1).build().await.unwrap();
    let node = lab.node(1);
    // echo says what it was told and ends.
    let options =
        AgentOptions::on_manifests(&lab).binary("/bin/echo").arg("--log-level=debug").config("devices", "eth0");
    let agent = node.start_agent(&options).unwrap();
    let error = agent.wait_ready(Duration::from_secs(10)).await.unwrap_err().to_string();
    let expected = format!(
        "agent --config-dir {dir}/config --state-dir {state} --bpf-root {dir}/bpf --cgroup-root {cgroup} \
         --socket-path {dir}/agent.sock --log-level=debug",
        dir = node.dir().display(),
        state = lab.state_dir().display(),
        cgroup = node.cgroup().display(),
    );
    assert!(error.contains("not ready") && error.contains("exit status: 0") && error.contains(&expected), "{error}");
    let key = |name: &str| fs::read_to_string(node.config_dir().join(name)).unwrap();
    assert_eq!((key("source"), key("devices")), ("manifests".into(), "eth0".into()));
    assert_eq!(key("manifests-dir"), lab.manifests_dir().to_string_lossy());
}

#[tokio::test]
async fn a_binary_that_is_not_there_is_named() {
    let lab = lab("nothing").nodes(1).build().await.unwrap();
    let error = lab.node(1).start_agent(&AgentOptions::new("/no/such/binary")).unwrap_err().to_string();
    assert!(error.contains("start agent on node-1"), "{error}");
}

#[tokio::test]
async fn each_node_has_a_bpf_file_system_of_its_own() {
    let lab = lab("bpffs").nodes(2).build().await.unwrap();
    fs::create_dir(lab.node(1).bpf_root().join("only-here")).unwrap();
    assert!(!lab.node(2).bpf_root().join("only-here").exists());
    // Only directories, maps, programs and links can be in a BPF file system.
    assert!(fs::write(lab.node(1).bpf_root().join("file"), "").is_err());
}
