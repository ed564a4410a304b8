#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use kinesin_core::services::{Dispatch, Forwarding};
use tempfile::TempDir;

use super::resolve::defaults;
use super::*;

/// Inputs with a config dir holding `files`.
fn with_dir(files: &[(&str, &str)]) -> (TempDir, Inputs) {
    let dir = tempfile::tempdir().unwrap();
    for (name, value) in files {
        fs::write(dir.path().join(name), value).unwrap();
    }
    let inputs = Inputs { config_dir: Some(dir.path().into()), hostname: "Node-A\n".into(), ..Inputs::default() };
    (dir, inputs)
}

fn with_flags(flags: &[(&str, &str)]) -> Inputs {
    Inputs {
        flags: flags.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
        hostname: "n".into(),
        ..Inputs::default()
    }
}

fn env(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
}

fn loaded(inputs: &Inputs) -> (Config, Report) {
    load(inputs).unwrap()
}

fn setting<'a>(report: &'a Report, key: &str) -> &'a Setting {
    report.settings.iter().find(|s| s.key == key).unwrap()
}

#[test]
fn modes_and_annotations_that_do_not_go_together_are_said_and_made_usable() {
    let warned = |files: &[(&str, &str)]| {
        let (_dir, inputs) = with_dir(files);
        let (config, report) = loaded(&inputs);
        let about = report.warnings.into_iter().filter(|w| w.starts_with("bpf-lb-")).collect::<Vec<_>>();
        (config.services, about)
    };
    let (services, about) = warned(&[]);
    assert_eq!((services.mode, services.hands_on(), about.len()), (LbMode::Auto, true, 0));
    let (services, about) = warned(&[("node-port-mode", "snat"), ("bpf-lb-dsr-dispatch", "opt")]);
    assert_eq!((services.mode, services.hands_on(), about.len()), (LbMode::Snat, false, 0));
    let (services, about) = warned(&[("bpf-lb-mode", "dsr"), ("bpf-lb-dsr-dispatch", "geneve")]);
    assert_eq!(services.dsr_dispatch, DsrDispatch::L2);
    assert!(about.len() == 1 && about[0].contains("bpf-lb-dsr-dispatch=geneve is not supported"), "{about:?}");
    let (services, about) = warned(&[("bpf-lb-mode", "hybrid"), ("bpf-lb-dsr-dispatch", "ipip")]);
    let hybrid = Forwarding { tcp: Dispatch::Ipip, other: Dispatch::Snat };
    assert_eq!((services.forwarding(), services.beyond(), about.len()), (hybrid, Dispatch::Ipip, 0));
    // Only Services that ask for it cross routers.
    let (services, about) = warned(&[("bpf-lb-dsr-dispatch", "ipip"), ("bpf-lb-mode-annotation", "true")]);
    assert_eq!((services.forwarding(), services.beyond()), (Forwarding::all(Dispatch::L2), Dispatch::Ipip));
    assert_eq!((services.dsr_by_annotation(), about.len()), (Some(Forwarding::all(Dispatch::Ipip)), 0));
    let (services, _) = warned(&[("bpf-lb-dsr-dispatch", "ipip")]);
    assert_eq!(services.beyond(), Dispatch::L2, "auto takes what costs nothing");
    let (services, about) =
        warned(&[("bpf-lb-mode", "hybrid"), ("bpf-lb-dsr-dispatch", "l2"), ("bpf-lb-mode-annotation", "true")]);
    assert!(!services.mode_annotation && services.dsr_by_annotation().is_none());
    assert!(about.len() == 1 && about[0].contains("bpf-lb-mode-annotation=true does not go with"), "{about:?}");
}

#[test]
fn every_default_is_valid_and_reads_back_as_itself() {
    for key in keys::all() {
        let mut config = defaults();
        assert!(key.kind.set(key.default, &mut config), "default of {}", key.name);
        let shown = key.kind.show(&mut config);
        let mut again = defaults();
        assert!(key.kind.set(&shown, &mut again), "{} shown as {shown:?}", key.name);
        assert_eq!(config, again, "{}", key.name);
    }
}

#[test]
fn names_are_unique_and_no_key_is_also_without_effect() {
    let mut names: Vec<&str> = keys::all().map(|key| key.name).chain(WITHOUT_EFFECT.iter().copied()).collect();
    names.extend(keys::all().map(|key| key.alias).filter(|alias| !alias.is_empty()));
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count);
    assert!(WITHOUT_EFFECT.is_sorted());
}

#[test]
fn defaults_without_any_input_are_clean() {
    let (config, report) = loaded(&with_flags(&[]));
    assert!(report.is_clean(), "{report:?}");
    assert!(report.settings.iter().all(|s| s.source == "default"));
    assert_eq!(config.services.node_port_range, PortRange { first: 30000, last: 32767 });
    assert_eq!(config.services.snat_ports(), (32768, 65535));
    assert_eq!(config.l2.lease_duration, Duration::from_secs(15));
    assert_eq!(config.services.maglev_seed.bytes, *b"\x24\xb7\xef\x82\x71\xdc\xda\x46\x92\x50\x56\x88");
    assert_eq!(config.observe.log_level(), LogLevel::Info);
    assert!(config.lb_ipam.enabled && config.families.ipv4 && !config.families.ipv6);
}

/// Each row: key, text, what it is shown as afterwards; `None` when it is refused.
#[test]
fn values_of_each_type_are_read_or_refused() {
    let rows: &[(&str, &str, Option<&str>)] = &[
        ("enable-ipv6", "true", Some("true")),
        ("enable-ipv6", "T", Some("true")),
        ("enable-ipv6", "1", Some("true")),
        ("enable-ipv6", "yes", None),
        ("enable-ipv6", "tRue", None),
        ("bpf-lb-sock", "False", Some("false")),
        ("bpf-lb-sock", "", Some("")),
        ("bpf-lb-sock", "strict", None),
        ("bpf-lb-map-max", "1024", Some("1024")),
        ("bpf-lb-map-max", "15", None),
        ("bpf-lb-map-max", "16777217", None),
        ("bpf-lb-map-max", "-1", None),
        ("bpf-lb-map-max", "64Ki", None),
        ("bpf-ct-global-tcp-max", "99999999999999999999", None),
        ("bpf-ct-global-tcp-max", "0", Some("0")),
        ("bpf-map-dynamic-size-ratio", "0.0025", Some("0.0025")),
        ("bpf-map-dynamic-size-ratio", "0.0", Some("0")),
        ("bpf-map-dynamic-size-ratio", "1.5", None),
        ("bpf-map-dynamic-size-ratio", "NaN", None),
        ("bpf-ct-timeout-service-tcp", "6h", Some("6h")),
        ("bpf-lb-maglev-table-size", "16381", Some("16381")),
        ("bpf-lb-maglev-table-size", "16384", None),
        ("k8s-client-qps", "50", Some("50")),
        ("k8s-client-qps", "0.5", Some("0.5")),
        ("k8s-client-qps", "0", None),
        ("k8s-client-qps", "NaN", None),
        ("k8s-client-qps", "inf", None),
        ("l2-announcements-retry-period", "500ms", Some("500ms")),
        ("l2-announcements-retry-period", "1m30s", Some("1m30s")),
        ("l2-announcements-retry-period", "90s", Some("1m30s")),
        ("l2-announcements-retry-period", "1.5s", Some("1s500ms")),
        ("l2-announcements-retry-period", ".5s", Some("500ms")),
        ("l2-announcements-retry-period", "1h1us", Some("1h1us")),
        ("l2-announcements-retry-period", "0", Some("0s")),
        ("l2-announcements-retry-period", "15", None),
        ("l2-announcements-retry-period", "-1s", None),
        ("l2-announcements-retry-period", "s", None),
        ("l2-announcements-retry-period", ".s", None),
        ("l2-announcements-retry-period", "1..5s", None),
        ("l2-announcements-retry-period", "1d", None),
        ("l2-announcements-retry-period", "99999999h", None),
        ("bpf-lb-algorithm", "maglev", Some("maglev")),
        ("bpf-lb-algorithm", "Maglev", None),
        ("log-level", "warning", Some("warn")),
        ("log-level", "", Some("")),
        ("log-level", "loud", None),
        ("state-dir", "/run/x", Some("/run/x")),
        ("state-dir", "run/x", None),
        ("cgroup-root", "", Some("")),
        ("devices", "eth+ !eth1,wlan0 ,, x", Some("eth+ !eth1 wlan0 x")),
        (
            "k8s-api-server-urls",
            "https://10.0.0.1:6443, http://[fd00::1]:80",
            Some("https://10.0.0.1:6443 http://[fd00::1]:80"),
        ),
        ("k8s-api-server-urls", "10.0.0.1:6443", None),
        ("nodeport-addresses", "192.168.1.7/16 fd00::/8,10.0.0.1", Some("192.168.0.0/16 fd00::/8 10.0.0.1/32")),
        ("nodeport-addresses", "192.168.0.0/33", None),
        ("prometheus-serve-addr", ":9962", Some(":9962")),
        ("prometheus-serve-addr", "127.0.0.1:0", Some("127.0.0.1:0")),
        ("prometheus-serve-addr", "[::1]:1", Some("[::1]:1")),
        ("prometheus-serve-addr", "localhost:1", Some("127.0.0.1:1")),
        ("prometheus-serve-addr", "9962", None),
        ("prometheus-serve-addr", "example.com:1", None),
        ("node-port-range", "30000,32767", Some("30000,32767")),
        ("node-port-range", "20000-20100", Some("20000,20100")),
        ("node-port-range", "32767,30000", None),
        ("node-port-range", "0,10", None),
        ("node-port-range", "30000,65535", None),
        ("node-port-range", "30000", None),
        ("bpf-lb-maglev-hash-seed", "AAAAAAAAAAAAAAA/", Some("AAAAAAAAAAAAAAA/")),
        ("bpf-lb-maglev-hash-seed", "AAAA", None),
        ("bpf-lb-maglev-hash-seed", "AAAAAAAAAAAAAAA=", None),
    ];
    for (name, text, expected) in rows {
        let key = keys::find(name).unwrap();
        let mut config = defaults();
        let before = config.clone();
        let read = key.kind.set(text, &mut config);
        assert_eq!(read.then(|| key.kind.show(&mut config)).as_deref(), *expected, "{name}={text:?}");
        if !read {
            assert_eq!(config, before, "a refused {name}={text:?} changes nothing");
        }
    }
}

proptest::proptest! {
    #[test]
    fn durations_are_read_back_as_they_were(nanos in 0..=i64::MAX as u64) {
        let duration = Duration::from_nanos(nanos);
        proptest::prop_assert_eq!(parse_duration(&format_duration(duration)), Some(duration));
    }

    #[test]
    fn no_text_makes_any_key_panic(text in "\\PC{0,40}|[0-9a-zA-Z.,:/+µ-]{0,30}") {
        for key in keys::all() {
            let mut config = defaults();
            if key.kind.set(&text, &mut config) {
                let shown = key.kind.show(&mut config);
                let mut again = defaults();
                proptest::prop_assert!(key.kind.set(&shown, &mut again), "{}={:?}", key.name, shown);
                proptest::prop_assert_eq!(config, again);
            }
        }
    }
}

#[test]
fn flags_win_over_environment_over_directory_over_default() {
    let (_dir, mut inputs) = with_dir(&[
        ("bpf-lb-map-max", "100\n"),
        ("bpf-ct-global-tcp-max", "2000"),
        ("bpf-ct-global-any-max", "2000"),
        ("k8s-client-burst", "70"),
    ]);
    inputs.env = env(&[
        ("CILIUM_BPF_LB_MAP_MAX", "200"),
        ("CILIUM_BPF_CT_GLOBAL_TCP_MAX", "3000"),
        ("KINESIN_BPF_CT_GLOBAL_TCP_MAX", "4000"),
        ("KINESIN_BPF_CT_GLOBAL_ANY_MAX", "5000"),
    ]);
    inputs.flags = vec![("bpf-ct-global-any-max".into(), "1".into()), ("bpf-ct-global-any-max".into(), "6000".into())];
    let (config, report) = loaded(&inputs);
    assert!(report.is_clean(), "{report:?}");
    let services = &config.services;
    assert_eq!((services.sizes.lb, services.sizes.tcp, services.sizes.any), (200, 4000, 6000));
    assert_eq!(config.kubernetes.burst, 70);
    assert_eq!(setting(&report, "bpf-lb-map-max").source, "environment variable CILIUM_BPF_LB_MAP_MAX");
    assert_eq!(setting(&report, "bpf-ct-global-tcp-max").source, "environment variable KINESIN_BPF_CT_GLOBAL_TCP_MAX");
    assert_eq!(setting(&report, "bpf-ct-global-any-max").source, "flag --bpf-ct-global-any-max");
    assert!(setting(&report, "k8s-client-burst").source.ends_with("/k8s-client-burst"));
    assert_eq!(setting(&report, "enable-ipv4").source, "default");
}

#[test]
fn the_reference_users_config_map_is_accepted() {
    let (_dir, inputs) = with_dir(&[
        ("kube-proxy-replacement", "true"),
        ("kube-proxy-replacement-healthz-bind-address", "0.0.0.0:10256"),
        ("cluster-pool-ipv4-cidr", "10.42.0.0/16"),
        ("enable-l2-announcements", "true"),
        ("enable-external-ips", "true"),
        ("k8s-client-qps", "50"),
        ("k8s-client-burst", "200"),
        ("prometheus-serve-addr", ":9962"),
        ("hubble-metrics", "dns:query drop tcp flow port-distribution icmp http"),
        ("enable-ipv4", "true"),
        ("devices", ""),
        ("bpf-lb-sock", "false"),
    ]);
    let (config, report) = loaded(&inputs);
    assert_eq!(report.unknown, vec![]);
    assert_eq!(report.invalid, vec![]);
    assert_eq!(report.accepted_without_effect, ["cluster-pool-ipv4-cidr", "enable-external-ips", "hubble-metrics"]);
    // The chart writes `bpf-lb-sock=false` beside `kube-proxy-replacement=true`, so that is no reason to warn.
    assert!(report.is_clean(), "{report:?}");
    assert!(config.l2.enabled && config.services.socket_lb());
    assert_eq!(config.observe.healthz.unwrap().to_string(), "0.0.0.0:10256");
    assert_eq!(config.observe.prometheus.unwrap().candidates().len(), 2);
    assert_eq!(config.node_name, "node-a");
}

#[test]
fn an_unknown_key_names_its_file_and_the_nearest_known_key() {
    let (dir, inputs) = with_dir(&[("enable-l2-anouncements", "true"), ("quite-something-else", "1")]);
    let (_, report) = loaded(&inputs);
    let file = dir.path().display();
    assert_eq!(
        report.problems(),
        [
            format!(
                "unknown key enable-l2-anouncements ({file}/enable-l2-anouncements): did you mean enable-l2-announcements?"
            ),
            format!(
                "unknown key quite-something-else ({file}/quite-something-else): see `kinesin agent --help` for the keys"
            ),
        ]
    );
}

#[test]
fn an_invalid_value_names_key_value_source_and_what_is_allowed_and_the_default_is_used() {
    let (dir, inputs) = with_dir(&[("bpf-lb-algorithm", "roundrobin")]);
    let (config, report) = loaded(&inputs);
    assert_eq!(config.services.algorithm, Algorithm::Random);
    assert_eq!(
        report.problems(),
        [format!(
            "bpf-lb-algorithm=\"roundrobin\" ({}/bpf-lb-algorithm) is not one of random, maglev; using \"random\"",
            dir.path().display()
        )]
    );
}

#[test]
fn an_empty_value_of_a_type_without_one_counts_as_not_set() {
    let (_dir, inputs) = with_dir(&[("enable-lb-ipam", ""), ("k8s-client-qps", "\n"), ("node-port-range", "")]);
    let (config, report) = loaded(&inputs);
    assert!(report.is_clean(), "{report:?}");
    assert!(config.lb_ipam.enabled);
    assert_eq!(setting(&report, "k8s-client-qps").source, "default");
}

#[test]
fn dot_files_and_directories_and_binary_files_are_no_keys() {
    let (dir, inputs) = with_dir(&[(".hidden", "x"), ("debug~", "x")]);
    fs::create_dir(dir.path().join("sub")).unwrap();
    fs::write(dir.path().join("devices"), [0xff, 0xfe]).unwrap();
    let (config, report) = loaded(&inputs);
    assert!(config.devices.is_empty());
    assert_eq!(report.unknown, vec![]);
    assert_eq!(report.problems(), [format!("{}/devices is ignored: not UTF-8 text", dir.path().display())]);
}

#[test]
fn an_old_name_works_and_the_new_one_wins() {
    let (_dir, inputs) = with_dir(&[("node-port-algorithm", "maglev")]);
    let (config, report) = loaded(&inputs);
    assert_eq!(config.services.algorithm, Algorithm::Maglev);
    assert!(report.warnings[0].contains("is an old name: write bpf-lb-algorithm"), "{report:?}");

    let (_dir, inputs) = with_dir(&[("node-port-algorithm", "maglev"), ("bpf-lb-algorithm", "random")]);
    let (config, report) = loaded(&inputs);
    assert_eq!(config.services.algorithm, Algorithm::Random);
    assert!(report.warnings[0].contains("is ignored: bpf-lb-algorithm is set too"), "{report:?}");
}

#[test]
fn service_variables_of_kubernetes_are_no_mistakes_but_typos_of_ours_are() {
    let inputs = Inputs {
        env: env(&[
            ("KINESIN_SERVICE_HOST", "10.0.0.1"),
            ("CILIUM_AGENT_PORT_9962_TCP", "tcp://10.0.0.1:9962"),
            ("CILIUM_K8S_NAMESPACE", "kube-system"),
            ("KINESIN_ENABLE_IPV5", "true"),
            ("K8S_NODE_NAME", "pi-1"),
        ]),
        hostname: "x".into(),
        ..Inputs::default()
    };
    let (config, report) = loaded(&inputs);
    assert_eq!(config.kubernetes.namespace, "kube-system");
    assert_eq!(config.node_name, "pi-1");
    assert_eq!(report.unknown.len(), 1);
    assert_eq!(report.unknown[0].source, "environment variable KINESIN_ENABLE_IPV5");
}

#[test]
fn what_cannot_run_is_an_error_with_the_fix() {
    let error = load(&with_flags(&[("source", "manifests")])).unwrap_err().to_string();
    assert_eq!(error, "source=manifests needs a directory to read: set manifests-dir, or source=kubernetes");
    let error = load(&with_flags(&[("enable-ipv4", "false")])).unwrap_err().to_string();
    assert!(error.contains("set one to true"), "{error}");
    assert_eq!(load(&Inputs::default()).unwrap_err(), ConfigError::NoNodeName);
}

#[test]
fn a_missing_directory_at_start_is_a_warning() {
    let inputs = Inputs { config_dir: Some("/does/not/exist".into()), hostname: "n".into(), ..Inputs::default() };
    let (_, report) = loaded(&inputs);
    assert!(report.warnings[0].starts_with("config-dir /does/not/exist cannot be read: "), "{report:?}");
}

#[test]
fn lease_times_that_do_not_fit_into_each_other_are_adjusted() {
    let (config, report) = loaded(&with_flags(&[
        ("l2-announcements-lease-duration", "4s"),
        ("l2-announcements-renew-deadline", "4s"),
        ("l2-announcements-retry-period", "2s"),
        ("agent-liveness-update-interval", "3s"),
    ]));
    assert_eq!(config.l2.renew_deadline, Duration::from_secs(2));
    assert_eq!(config.l2.retry_period, Duration::from_secs(1));
    assert_eq!(config.l2.liveness_interval, Duration::from_secs(4) / 3);
    assert_eq!(report.warnings.len(), 3, "{report:?}");
    assert_eq!(report.warnings[0], "l2-announcements-renew-deadline=4s is not shorter than the lease: using 2s");
    assert_eq!(setting(&report, "l2-announcements-renew-deadline").value, "2s");
}

#[test]
fn maglev_tables_have_one_of_ten_sizes() {
    for size in kinesin_abi::MAGLEV_TABLE_SIZES {
        let (config, report) = loaded(&with_flags(&[("bpf-lb-maglev-table-size", &size.to_string())]));
        assert_eq!((config.services.maglev_table_size, report.warnings.len()), (size, 0), "{report:?}");
    }
}

#[test]
fn debug_raises_the_level_unless_one_is_set() {
    assert_eq!(loaded(&with_flags(&[("debug", "true")])).0.observe.log_level(), LogLevel::Debug);
    let both = with_flags(&[("debug", "true"), ("log-level", "error")]);
    assert_eq!(loaded(&both).0.observe.log_level(), LogLevel::Error);
}

#[test]
fn equal_settings_have_equal_generations_on_all_nodes_and_any_change_shows() {
    let generation = |flags: &[(&str, &str)], host: &str| {
        let mut inputs = with_flags(flags);
        inputs.hostname = host.into();
        loaded(&inputs).0.generation
    };
    let one = generation(&[], "a");
    assert_eq!(one.len(), 12);
    assert_eq!(one, generation(&[("enable-ipv4", "T")], "b"));
    assert_ne!(one, generation(&[("devices", "eth0")], "a"));
}

#[test]
fn a_reload_names_what_changed() {
    let (dir, inputs) = with_dir(&[("bpf-lb-map-max", "100")]);
    let (first, _) = loaded(&inputs);
    assert_eq!(reload(&inputs, &first).changed_keys, Vec::<&str>::new());
    fs::write(dir.path().join("bpf-lb-algorithm"), "maglev").unwrap();
    fs::remove_file(dir.path().join("bpf-lb-map-max")).unwrap();
    let next = reload(&inputs, &first);
    assert_eq!(next.changed_keys, ["bpf-lb-algorithm", "bpf-lb-map-max"]);
    assert_eq!(next.config.services.sizes.lb, 65536);
    assert_ne!(next.config.generation, first.generation);
}

#[test]
fn a_reload_keeps_the_last_good_value_of_what_is_invalid_and_takes_the_rest() {
    let (dir, inputs) = with_dir(&[("bpf-lb-map-max", "100"), ("k8s-client-burst", "30")]);
    let (first, _) = loaded(&inputs);
    fs::write(dir.path().join("bpf-lb-map-max"), "many").unwrap();
    fs::write(dir.path().join("k8s-client-burst"), "40").unwrap();
    let next = reload(&inputs, &first);
    assert_eq!((next.config.services.sizes.lb, next.config.kubernetes.burst), (100, 40));
    assert_eq!(next.changed_keys, ["k8s-client-burst"]);
    assert_eq!(next.report.invalid[0].used, "100");
    assert_eq!(setting(&next.report, "bpf-lb-map-max").source, "last good value");
    // And it stays so over further reloads.
    assert_eq!(reload(&inputs, &next.config).config, next.config);
}

#[test]
fn a_reload_keeps_the_last_good_values_of_what_contradicts() {
    let (dir, inputs) = with_dir(&[("enable-ipv4", "false"), ("enable-ipv6", "true")]);
    let (first, _) = loaded(&inputs);
    fs::write(dir.path().join("enable-ipv6"), "false").unwrap();
    fs::write(dir.path().join("source"), "manifests").unwrap();
    fs::write(dir.path().join("debug"), "true").unwrap();
    let next = reload(&inputs, &first);
    assert_eq!(next.changed_keys, ["debug"]);
    assert_eq!(next.config.families, Families { ipv4: false, ipv6: true });
    assert_eq!(next.config.source.kind, SourceKind::Kubernetes);
    let keys: Vec<_> = next.report.invalid.iter().map(|i| i.key.as_str()).collect();
    assert_eq!(keys, ["enable-ipv6", "source"]);
    assert!(next.report.problems()[0].contains("set one to true"), "{:?}", next.report);
}

#[test]
fn a_reload_without_a_directory_keeps_everything() {
    let (dir, inputs) = with_dir(&[("bpf-lb-map-max", "100")]);
    let (first, _) = loaded(&inputs);
    drop(dir);
    let next = reload(&inputs, &first);
    assert_eq!(next.config, first);
    assert!(next.report.warnings[0].ends_with("keeping the last good configuration"), "{:?}", next.report);
    assert_eq!(next.report.settings.len(), keys::all().count());
}

/// Writes a generation as the kubelet does and points `..data` at it in one step.
fn swap(dir: &Path, generation: &str, files: &[(&str, &str)]) {
    let data = dir.join(generation);
    fs::create_dir(&data).unwrap();
    for (name, value) in files {
        fs::write(data.join(name), value).unwrap();
        let link = dir.join(name);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new("..data").join(name), link).unwrap();
        }
    }
    let old = fs::read_link(dir.join("..data")).ok();
    symlink(generation, dir.join("..data_tmp")).unwrap();
    fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
    if let Some(old) = old {
        fs::remove_dir_all(dir.join(old)).unwrap();
    }
}

async fn soon(watch: &mut Watch, what: &str) {
    tokio::time::timeout(Duration::from_secs(20), watch.changed()).await.unwrap_or_else(|_| panic!("{what}"));
}

#[tokio::test]
async fn a_config_map_swap_is_noticed_and_read_as_a_whole() {
    let dir = tempfile::tempdir().unwrap();
    swap(dir.path(), "..2026_1", &[("bpf-lb-map-max", "100"), ("debug", "true")]);
    let inputs = Inputs { config_dir: Some(dir.path().into()), hostname: "n".into(), ..Inputs::default() };
    let (first, report) = loaded(&inputs);
    assert_eq!(first.services.sizes.lb, 100);
    assert!(setting(&report, "debug").source.ends_with("/debug") && !setting(&report, "debug").source.contains(".."));

    // The rescan is out of reach: only events can make this pass.
    let mut watch = watch::watch_every(dir.path(), Duration::from_secs(3600));
    swap(dir.path(), "..2026_2", &[("bpf-lb-map-max", "200")]);
    soon(&mut watch, "the swap").await;
    let next = reload(&inputs, &first);
    assert_eq!(next.config.services.sizes.lb, 200);
    // The link of the removed key dangles until the kubelet removes it; the key is gone already.
    assert_eq!(next.changed_keys, ["bpf-lb-map-max", "debug"]);
}

#[test]
fn a_directory_that_is_swapped_while_it_is_read_is_never_read_in_part() {
    let dir = tempfile::tempdir().unwrap();
    let write = |n: u32| {
        let value = (1000 + n).to_string();
        swap(dir.path(), &format!("..{n}"), &[("bpf-lb-map-max", &value), ("k8s-client-burst", &value)]);
    };
    write(0);
    let inputs = Inputs { config_dir: Some(dir.path().into()), hostname: "n".into(), ..Inputs::default() };
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            (1..300).for_each(write);
            done.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        let (mut config, _) = loaded(&inputs);
        let mut last = false;
        while !last {
            last = done.load(std::sync::atomic::Ordering::SeqCst);
            config = reload(&inputs, &config).config;
            assert_eq!(config.services.sizes.lb, config.kubernetes.burst);
        }
        assert_eq!(config.services.sizes.lb, 1299, "the last generation is read in the end");
    });
}

#[tokio::test]
async fn an_edit_of_a_single_file_is_noticed() {
    let (dir, _) = with_dir(&[("debug", "false")]);
    let mut watch = watch::watch_every(dir.path(), Duration::from_secs(3600));
    fs::write(dir.path().join("debug"), "true").unwrap();
    soon(&mut watch, "the edit").await;
    fs::write(dir.path().join("devices"), "eth0").unwrap();
    soon(&mut watch, "the new file").await;
}

#[tokio::test]
async fn a_directory_that_appears_later_is_noticed() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("config");
    let mut watch = watch::watch_every(&dir, Duration::from_millis(20));
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("debug"), "true").unwrap();
    soon(&mut watch, "the directory").await;
}

#[test]
fn generated_files_are_up_to_date() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (path, text) in docs::files() {
        let path = root.join(path);
        if std::env::var_os("KINESIN_BLESS").is_some() {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, &text).unwrap();
        }
        let committed = fs::read_to_string(&path).unwrap_or_default();
        assert!(committed == text, "{} is out of date: run with KINESIN_BLESS=1", path.display());
    }
}

#[test]
fn the_commented_config_map_is_yaml_and_says_what_the_defaults_are() {
    let (_, text) = docs::files().into_iter().find(|(path, _)| path.ends_with(".yaml")).unwrap();
    // By default the reader refuses more than 32 comments in a row.
    let options = serde_saphyr::options! { emit_comments: false };
    let read = |text: &str| serde_saphyr::from_str_with_options::<serde_json::Value>(text, options.clone()).unwrap();
    let map = read(&text);
    assert_eq!(map["data"]["debug"], "false");
    // Uncommenting every key gives the defaults.
    let all: String = text
        .lines()
        .map(|line| {
            let key = line.trim_start().trim_start_matches("# ").split(": ").next().unwrap_or_default();
            if line.starts_with("  # ") && keys::find(key).is_some() { line.replacen("# ", "", 1) } else { line.into() }
        })
        .filter(|line| line != "  debug: \"false\"")
        .collect::<Vec<_>>()
        .join("\n");
    let map = read(&all);
    let data = map["data"].as_object().unwrap();
    assert_eq!(data.len(), keys::all().count() - 1);
    let flags = data.iter().map(|(k, v)| (k.clone(), v.as_str().unwrap().to_string())).collect();
    let (written, report) = loaded(&Inputs { flags, hostname: "n".into(), ..Inputs::default() });
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(written, loaded(&with_flags(&[])).0);
}
