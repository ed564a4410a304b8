//! The commands as processes, against an agent's admin socket that a small `Api` answers on, and the probes over TCP.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use agent::{Agent, command, service_object, stderr};
use kinesin::config;
use serde_json::{Value, json};

#[path = "cli/agent.rs"]
mod agent;

/// Status line, headers and body of a raw HTTP exchange.
fn exchange(mut stream: impl Read + Write, request: &str, body: &str) -> (String, String) {
    let length = body.len();
    let headers = format!("Host: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}");
    write!(stream, "{request} HTTP/1.1\r\n{headers}\r\n\r\n{body}").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_string(), body.to_string())
}

fn ask(addr: std::net::SocketAddr, path: &str) -> (String, String) {
    exchange(TcpStream::connect(addr).unwrap(), &format!("GET {path}"), "")
}

#[test]
fn services_as_json_have_exactly_the_documented_fields() {
    let agent = Agent::start();
    let services = agent.json(&["services"]);
    assert_eq!(
        services[1],
        json!({
            "address": "10.96.0.1:80/TCP", "type": "ClusterIP", "service": "shop/web", "portName": "http",
            "scope": "all", "status": "pending",
            "backends": [{ "address": "10.42.1.7:8080", "state": "terminating", "node": "pi-2", "zone": "" }],
        })
    );
    assert_eq!(services.as_array().unwrap().len(), 3);
}

#[test]
fn services_for_people_are_a_table_with_the_first_backends() {
    let agent = Agent::start();
    let expected = "\
ADDRESS             TYPE           SERVICE    PORT   SCOPE   STATUS       BACKENDS
10.0.0.100:80/TCP   LoadBalancer   shop/web   http   all     programmed   10.42.0.1:8080 pi-1
                                                                          10.42.0.2:8080 pi-1
                                                                          10.42.0.3:8080 pi-1
                                                                          … and 3 more
10.96.0.1:80/TCP    ClusterIP      shop/web   http   all     pending      10.42.1.7:8080 pi-2 (terminating)
10.96.0.2:80/TCP    ClusterIP      shop/web   http   all     programmed   -
";
    assert_eq!(agent.ok(&["services"]), expected);
}

#[test]
fn services_in_full_say_who_may_connect_and_why_a_backend_is_not_used() {
    let agent = Agent::start();
    let wide = agent.ok(&["services", "--wide"]);
    let rows: Vec<Vec<&str>> =
        wide.lines().map(|line| line.split("   ").map(str::trim).filter(|cell| !cell.is_empty()).collect()).collect();
    assert_eq!(
        rows[1],
        [
            "10.0.0.100:80/TCP",
            "LoadBalancer",
            "shop/web",
            "http",
            "external",
            "programmed",
            "Local/Cluster",
            "maglev",
            "3h",
            "deny 192.0.2.0/24",
            "31000",
            "10.42.0.1:8080 pi-1 a (active)",
        ],
        "{wide}"
    );
    assert_eq!(rows[2], ["10.42.0.2:8080 pi-1 (maintenance) not used: not ready"]);
    assert_eq!(agent.ok(&["services", "-o", "wide"]), wide);
    let json = agent.json(&["services", "--wide"]);
    assert_eq!(
        json[0]["backends"][1],
        json!({"address": "10.42.0.2:8080", "state": "maintenance", "node": "pi-1", "zone": "", "weight": 0, "unused": "not ready"})
    );
    assert_eq!((&json[0]["sessionAffinitySeconds"], &json[0]["sourceRangesPolicy"]), (&json!(10_800), &json!("deny")));
    let yaml: Value = serde_saphyr::from_str(&agent.ok(&["services", "--wide", "-o", "yaml"])).unwrap();
    assert_eq!(yaml, json);
}

#[test]
fn vips_as_json_have_exactly_the_documented_fields_and_null_for_the_unknown() {
    let agent = Agent::start();
    assert_eq!(
        agent.json(&["vips"]),
        json!([
            {
                "address": "10.0.0.100", "services": ["shop/web"], "pool": "first-pool", "owner": "pi-1",
                "interface": "eth0", "mac": "02:00:00:00:00:01", "since": "2026-01-02T03:04:05Z", "state": "announced",
            },
            {
                "address": "10.0.0.101", "services": ["shop/api"], "pool": null, "owner": null,
                "interface": null, "mac": null, "since": null, "state": "pending",
            },
        ])
    );
    let table = agent.ok(&["vips"]);
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["ADDRESS", "OWNER", "INTERFACE", "MAC", "STATE", "SINCE", "POOL", "SERVICES"]);
    assert_eq!(lines[1][..5], ["10.0.0.100", "pi-1", "eth0", "02:00:00:00:00:01", "announced"]);
    assert_eq!(lines[2], ["10.0.0.101", "-", "-", "-", "pending", "-", "-", "shop/api"]);
}

#[test]
fn the_tree_shows_who_is_below_whom() {
    let agent = Agent::start();
    let expected = "\
NAME                         STATE        UPTIME   RESTARTS      MESSAGES   WAITING   MEAN    MAX   LAST ERROR
agent (one_for_one)          running      -        0             -          -         -       -     -
├─ datapath (rest_for_one)   running      -        0             -          -         -       -     -
│  ├─ loader                 running      1m1s     0             12         0         1.5ms   0µs   -
│  └─ map_writer             restarting   1m1s     2 (panic 2)   12         0         1.5ms   0µs   map is full
└─ health (one_for_one)      running      -        0             -          -         -       -     -
   └─ watchdog               running      1m1s     0             12         0         1.5ms   0µs   -
";
    assert_eq!(agent.ok(&["tree"]), expected);
    assert_eq!(agent.json(&["tree"])["children"][0]["children"][1]["state"], "restarting");
}

#[test]
fn status_says_what_is_wrong_first_and_the_rest_when_asked() {
    let agent = Agent::start();
    let text = agent.ok(&["status"]);
    for line in [
        "Node:                   pi-1   kinesin 0.1.0, up 1h1m",
        "Source:                 manifests: Ok /m",
        "KubeProxyReplacement:   True   [eth0 192.168.1.2]",
        "Lists:                  waiting for endpointslices (3 objects)",
        "Programs:               1/2 attached",
        "Configuration:          abc123: Ok",
        "Leader:                 pi-2",
        "  service shop/web: no pool contains 10.9.9.9",
    ] {
        assert!(text.lines().any(|l| l == line), "{line:?} in\n{text}");
    }
    assert!(text.contains("error: refused"), "a program that is not attached shows without being asked\n{text}");
    assert!(!text.contains("Maps:"));
    let verbose = agent.ok(&["status", "--verbose"]);
    assert!(verbose.contains("- NodePort:           Enabled (Range: 30000-32767)"), "{verbose}");
    assert!(verbose.contains("frontends   1      4     25.0%"), "{verbose}");
    let status = agent.json(&["status"]);
    assert_eq!(status["kubeProxyReplacement"]["backendSelection"], "Random");
    assert_eq!(status["config"]["generation"], "abc123");
}

#[test]
fn dump_lists_the_tables_and_shows_one_with_its_columns_in_order() {
    let agent = Agent::start();
    assert_eq!(agent.ok(&["dump"]), "TABLE       ROWS   WHAT\nfrontends   2      what the map holds\n");
    let expected = "\
ADDRESS             SERVICE-ID   NOTE
10.0.0.100:80/TCP   7            -
10.96.0.1:80/TCP    8            x
";
    assert_eq!(agent.ok(&["dump", "frontends"]), expected);
    assert_eq!(agent.json(&["dump", "frontends"])[1]["service_id"], 8);
    assert_eq!(agent.ok(&["dump", "with space/é"]), "with space/é is empty\n", "names are passed on as they are");
    let missing = agent.run(&["dump", "nothing"]);
    assert_eq!(missing.status.code(), Some(1));
    assert_eq!(stderr(&missing), "kinesin: no table nothing: see `kinesin dump`\n");
}

#[test]
fn get_looks_like_kubectl() {
    let agent = Agent::start();
    let expected = "\
NAMESPACE   NAME   TYPE           CLUSTER-IP   EXTERNAL-IP   PORT(S)               AGE
shop        web    LoadBalancer   10.96.0.1    10.0.0.100    80:30080/TCP,53/UDP   -
";
    for kind in ["svc", "service", "services", "Service"] {
        assert_eq!(agent.ok(&["get", kind]), expected);
    }
    assert!(agent.ok(&["get", "svc", "-o", "wide"]).contains("app=web"));
    assert_eq!(agent.json(&["get", "svc", "web", "-n", "shop"]), service_object());
    assert_eq!(agent.json(&["get", "svc", "shop/web"]), service_object());
    assert_eq!(agent.json(&["get", "svc"]), json!({ "apiVersion": "v1", "kind": "List", "items": [service_object()] }));
    let yaml: Value = serde_saphyr::from_str(&agent.ok(&["get", "svc", "web", "-o", "yaml"])).unwrap();
    assert_eq!(yaml, service_object());
    assert_eq!(agent.ok(&["get", "svc", "-n", "other"]), "no services\n");
    assert_eq!(agent.ok(&["get", "pools"]), "no ciliumloadbalancerippools\n");
}

#[test]
fn what_the_agent_refuses_is_exit_code_1_with_its_words() {
    let agent = Agent::start();
    for (args, words) in [
        (vec!["get", "svc", "none"], "kinesin: no Service none\n"),
        (vec!["get", "cats"], "kinesin: no objects of kind cats are read\n"),
        (vec!["debug", "kill", "nobody"], "kinesin: no actor nobody\n"),
    ] {
        let output = agent.run(&args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert_eq!(stderr(&output), words);
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn wrong_usage_is_exit_code_2() {
    let agent = Agent::start();
    for args in [
        vec![],
        vec!["servces"],
        vec!["services", "-o", "xml"],
        vec!["get"],
        vec!["get", "svc", "shop/web", "-n", "shop"],
        vec!["agent", "--bpf-lb-algoritm=maglev"],
    ] {
        assert_eq!(agent.run(&args).status.code(), Some(2), "{args:?}");
    }
    let output = agent.run(&["agent", "--bpf-lb-algoritm=maglev"]);
    assert!(stderr(&output).contains("--bpf-lb-algorithm"), "the nearest flag is suggested: {}", stderr(&output));
}

#[test]
fn no_agent_is_exit_code_3_and_names_the_socket_and_what_to_check() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none.sock");
    let output = command(&["vips", "--socket-path"]).arg(&path).output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    let text = stderr(&output);
    assert!(text.contains(&path.display().to_string()) && text.contains("--socket-path (or KINESIN_SOCKET)"), "{text}");
    // A socket file that a killed agent left behind.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let output = command(&["vips"]).env("KINESIN_SOCKET_PATH", &path).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    // Somebody who hangs up.
    std::fs::remove_file(&path).unwrap();
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let thread = std::thread::spawn(move || drop(listener.accept()));
    let output = command(&["vips"]).env("KINESIN_SOCKET", &path).output().unwrap();
    thread.join().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("does not answer"), "{}", stderr(&output));
}

#[test]
fn config_shows_each_value_with_its_source_and_what_is_wrong() {
    let agent = Agent::start();
    let text = agent.ok(&["config"]);
    assert!(text.starts_with("Node pi-1, generation "), "{text}");
    let row =
        |key: &str| text.lines().find(|line| line.starts_with(key)).unwrap().split_whitespace().collect::<Vec<_>>();
    assert_eq!(row("devices "), ["devices", "eth0", "flag", "--devices", "reattach"]);
    assert_eq!(row("enable-ipv4 "), ["enable-ipv4", "true", "default", "live"]);
    assert!(
        text.contains("! bpf-lb-algorithm=\"maglef\" (flag --bpf-lb-algorithm) is not one of random, maglev"),
        "{text}"
    );
    assert!(text.contains("! unknown key enable-ipv44 (flag --enable-ipv44): did you mean enable-ipv4?"), "{text}");
    assert!(text.ends_with("Accepted, no effect: 1 (enable-hubble)\n"), "{text}");
    let set = agent.ok(&["config", "--set"]);
    assert!(set.contains("devices") && !set.contains("enable-lb-ipam"), "{set}");
}

#[test]
fn killing_an_actor_reaches_it_for_root_only() {
    let agent = Agent::start();
    assert_eq!(agent.ok(&["debug", "kill", "map_writer"]), "map_writer was told to panic\n");
    assert_eq!(*agent.api.killed.lock().unwrap(), ["map_writer"]);

    let socket = agent.socket();
    std::fs::set_permissions(agent.dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let as_nobody = |socket: PathBuf| {
        std::thread::spawn(move || {
            // SAFETY: the raw system call changes the credentials of this thread only, which ends right after.
            let done = unsafe { libc::syscall(libc::SYS_setresuid, -1, 65534, -1) };
            assert_eq!(done, 0, "this test needs root");
            let stream = UnixStream::connect(socket).map_err(|error| error.kind())?;
            Ok::<_, std::io::ErrorKind>(exchange(stream, "POST /v1/debug/kill", r#"{"actor":"map_writer"}"#))
        })
        .join()
        .unwrap()
    };
    assert_eq!(as_nobody(socket.clone()), Err(std::io::ErrorKind::PermissionDenied), "the file keeps others out");
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o666)).unwrap();
    let (head, body) = as_nobody(socket).unwrap();
    assert!(head.starts_with("HTTP/1.1 403"), "{head}");
    assert_eq!(body, r#"{"error":"only root may make map_writer panic"}"#);
    assert_eq!(agent.api.killed.lock().unwrap().len(), 1);
}

#[test]
fn healthz_is_503_until_the_first_complete_sync_and_has_kube_proxys_fields() {
    let agent = Agent::start();
    let (head, body) = ask(agent.healthz, "/healthz");
    assert!(head.starts_with("HTTP/1.1 503"), "{head}");
    let never = "0001-01-01T00:00:00Z";
    let now = "2026-01-02T03:04:05Z";
    let family =
        |time: &str, healthy: bool| format!(r#""status":{{"IPv4":{{"lastUpdated":"{time}","healthy":{healthy}}}}}"#);
    let expected = format!(
        r#"{{"lastUpdated":"{never}","currentTime":"{now}","nodeEligible":true,"healthy":false,{}}}"#,
        family(never, false)
    );
    assert_eq!(body, expected);
    agent.api.synced.store(true, Ordering::SeqCst);
    let (head, body) = ask(agent.healthz, "/healthz");
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert!(head.to_lowercase().contains("x-content-type-options: nosniff"), "{head}");
    let well = |eligible: &str| {
        format!(r#"{{"lastUpdated":"{now}","currentTime":"{now}",{eligible}"healthy":true,{}}}"#, family(now, true))
    };
    assert_eq!(body, well(r#""nodeEligible":true,"#));
    // A node that goes away is drained, while the proxy on it is left alone.
    agent.api.leaving.store(true, Ordering::SeqCst);
    let (head, body) = ask(agent.healthz, "/healthz");
    assert!(head.starts_with("HTTP/1.1 503"), "{head}");
    assert_eq!(body, well(r#""nodeEligible":false,"#));
    let (head, body) = ask(agent.healthz, "/livez");
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert_eq!(body, well(""));
    assert!(ask(agent.healthz, "/metrics").0.starts_with("HTTP/1.1 404"), "this address serves nothing else");
}

#[test]
fn metrics_and_probes_answer_over_tcp_and_over_the_socket() {
    let agent = Agent::start();
    let (head, body) = ask(agent.metrics, "/metrics");
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    assert_eq!(body, "agent_up 1\n");
    assert!(ask(agent.metrics, "/livez").0.starts_with("HTTP/1.1 200"));
    let (head, body) = ask(agent.metrics, "/readyz");
    assert!(head.starts_with("HTTP/1.1 503") && body.contains("no complete list yet"), "{head} {body}");
    agent.api.synced.store(true, Ordering::SeqCst);
    assert!(ask(agent.metrics, "/readyz").0.starts_with("HTTP/1.1 200"));
    let over_socket = |path: &str| exchange(UnixStream::connect(agent.socket()).unwrap(), &format!("GET {path}"), "");
    assert_eq!(over_socket("/metrics").1, "agent_up 1\n");
    let (head, body) = over_socket("/v1/nothing");
    assert!(head.starts_with("HTTP/1.1 404") && body.contains("of one version?"), "{head} {body}");
    assert!(ask(agent.metrics, "/v1/status").0.starts_with("HTTP/1.1 404"), "the admin part is not on the network");
}

#[test]
fn the_agents_help_lists_every_key_in_groups() {
    let output = command(&["agent", "--help"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    for (group, keys) in config::docs::groups() {
        assert!(text.contains(&format!("\n{group}:\n")), "{group}");
        for key in keys {
            assert!(text.contains(&format!("--{}", key.name)), "{}", key.name);
        }
    }
    assert!(!text.contains("--enable-hubble"), "keys without effect are accepted but not advertised");
}

#[test]
fn version_needs_no_agent() {
    let output = command(&["version", "-o", "json"]).output().unwrap();
    let version: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
}

/// What `args` write to a terminal.
fn on_a_terminal(agent: &Agent, args: &[&str], no_color: &str) -> String {
    let (mut ours, mut theirs) = (-1, -1);
    let none = std::ptr::null_mut();
    // SAFETY: both out-pointers are valid for the call; the optional ones may be null.
    let made = unsafe { libc::openpty(&mut ours, &mut theirs, none, none.cast(), none.cast()) };
    assert_eq!(made, 0, "openpty");
    // SAFETY: the call above made both descriptors, and nobody else owns them.
    let (ours, theirs) = unsafe { (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) };
    let mut command = command(args);
    command.env("KINESIN_SOCKET", agent.socket()).env("NO_COLOR", no_color).stdout(theirs);
    assert!(command.status().unwrap().success());
    // The other end is open in `command`; once closed, reading ends with an error instead of an end of file.
    drop(command);
    let mut bytes = Vec::new();
    let _ = std::fs::File::from(ours).read_to_end(&mut bytes);
    String::from_utf8(bytes).unwrap()
}

#[test]
fn a_terminal_gets_colours_unless_its_user_objects() {
    let agent = Agent::start();
    assert!(on_a_terminal(&agent, &["vips"], "").contains("\x1b["));
    let plain = on_a_terminal(&agent, &["vips"], "1");
    assert!(plain.contains("announced") && !plain.contains('\x1b'), "{plain}");
}

#[test]
fn the_log_level_changes_while_running() {
    use kinesin::config::{LogLevel, logging};
    use tracing::{Level, enabled};
    logging::init(logging::LogFormat::Text, LogLevel::Error);
    assert!(enabled!(target: "kinesin", Level::ERROR) && !enabled!(target: "kinesin", Level::WARN));
    logging::set_level(LogLevel::Debug);
    assert!(enabled!(target: "kinesin::config", Level::DEBUG) && !enabled!(target: "hyper", Level::DEBUG));
    logging::set_level(LogLevel::Warn);
    assert!(!enabled!(target: "kinesin", Level::INFO));
}

#[test]
fn nothing_is_coloured_when_nobody_watches() {
    let agent = Agent::start();
    for args in [vec!["services"], vec!["vips"], vec!["tree"], vec!["status", "--verbose"]] {
        assert!(!agent.ok(&args).contains('\x1b'), "{args:?}");
    }
}

#[test]
fn trace_shows_the_ways_with_their_chances_and_refuses_questions_that_make_no_sense() {
    let agent = Agent::start();
    let expected = "\
host -> 10.0.0.100:80
 1  connection    a new one
CHANCE   BACKEND          STATE    WHERE       OUTCOME
75.0 %   10.42.0.1:8080   active   this node   the socket talks to 10.42.0.1:8080, and sees the service's address
25.0 %   10.42.0.1:8081   active   elsewhere   the socket talks to 10.42.0.1:8081, and sees the service's address
";
    assert_eq!(agent.ok(&["trace", "host", "10.0.0.100:80"]), expected);
    let wide = agent.ok(&["trace", "host", "10.0.0.100:80", "-o", "wide"]);
    assert!(wide.contains("with a chance of 25.0 %:\n=> the socket talks to 10.42.0.1:8081"), "{wide}");
    let json = agent.json(&["trace", "host", "10.0.0.100:80"]);
    assert_eq!((&json["from"], &json["ways"][1]["verdict"]["kind"]), (&json!("agent"), &json!("connects")));

    let wrong = agent.run(&["trace", "host", "10.0.0.100"]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(stderr(&wrong).contains("dst \"10.0.0.100\": no port; add one as in 10.0.0.100:80"), "{}", stderr(&wrong));
    let unknown = agent.run(&["trace", "10.0.0.1@gone", "10.0.0.100:80"]);
    assert_eq!(unknown.status.code(), Some(0), "src names the device, --device does not");
    let unknown = agent.run(&["trace", "10.0.0.1", "10.0.0.100:80", "--device", "gone"]);
    assert_eq!(unknown.status.code(), Some(1), "what only the agent can know, it answers");
}

#[test]
fn trace_without_agent_and_without_pinned_maps_says_that_nobody_answers() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("none.sock");
    let args = ["trace", "host", "10.0.0.1:80", "--socket-path", socket.to_str().unwrap()];
    let output = command(&args).arg("--bpf-root").arg(dir.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(stderr(&output).contains("no agent answers on"), "{}", stderr(&output));
}
