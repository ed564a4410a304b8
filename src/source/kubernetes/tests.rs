//! The real client over real sockets against a server that misbehaves on command.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::StreamExt;
use serde_json::json;

use super::testing::{Api, StreamingLists};
use super::*;
use crate::source::{Event, IPAM_CONDITION};

const SERVICES: &str = "/api/v1/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
const POOLS: &str = "/apis/cilium.io/v2/ciliumloadbalancerippools";
const POLICIES: &str = "/apis/cilium.io/v2alpha1/ciliuml2announcementpolicies";
const BOUND: Duration = Duration::from_secs(20);

fn options(urls: &[&str]) -> KubernetesOptions {
    KubernetesOptions {
        kubeconfig: None,
        api_server_urls: urls.iter().map(ToString::to_string).collect(),
        namespace: "kube-system".into(),
        qps: 0.0,
        burst: 1,
    }
}

async fn connect(api: &Api) -> Arc<KubernetesSource> {
    KubernetesSource::connect(options(&[&api.url])).await.unwrap()
}

async fn next<T: Object>(events: &mut Events<T>) -> Event<T> {
    tokio::time::timeout(BOUND, events.next()).await.expect("an event in time").expect("a stream that does not end")
}

/// A stream, and what a consumer makes of it.
struct Follower<T: Object> {
    events: Events<T>,
    objects: BTreeMap<String, T>,
    listing: Option<BTreeMap<String, T>>,
    problems: Vec<String>,
    lists: usize,
}

impl<T: Object> Follower<T> {
    async fn new(events: Events<T>) -> Self {
        let mut follower = Self::unlisted(events);
        follower.until(|f| f.lists == 1).await;
        follower
    }

    fn unlisted(events: Events<T>) -> Self {
        Self { events, objects: BTreeMap::new(), listing: None, problems: vec![], lists: 0 }
    }

    async fn step(&mut self) {
        match next(&mut self.events).await {
            Event::Init => self.listing = Some(BTreeMap::new()),
            Event::InitApply(object) => {
                self.listing.as_mut().expect("an Init before").insert(object.key().to_string(), object);
            }
            Event::InitDone => {
                self.objects = self.listing.take().expect("an Init before");
                self.lists += 1;
            }
            Event::Apply(object) => drop(self.objects.insert(object.key().to_string(), object)),
            Event::Delete(key) => drop(self.objects.remove(&key.to_string())),
            Event::Problem(text) => self.problems.push(text),
        }
    }

    async fn until(&mut self, condition: impl Fn(&Self) -> bool) {
        while !condition(self) {
            self.step().await;
        }
    }

    fn names(&self) -> Vec<&str> {
        self.objects.keys().map(String::as_str).collect()
    }
}

fn service(port: u16) -> serde_json::Value {
    json!({"spec": {"type": "LoadBalancer", "ports": [{"port": port}]}})
}

#[tokio::test]
async fn a_streaming_list_is_followed_by_its_changes() {
    let api = Api::start().await;
    api.put(SERVICES, "x", "a", service(80));
    let source = connect(&api).await;
    let mut services = Follower::new(source.services()).await;
    assert_eq!(services.names(), ["x/a"]);
    api.put(SERVICES, "x", "b", service(80));
    api.put(SERVICES, "x", "a", service(81));
    services.until(|s| s.names().len() == 2 && s.objects["x/a"].spec.ports[0].port == 81).await;
    api.delete(SERVICES, "x", "b");
    services.until(|s| s.names() == ["x/a"]).await;
    assert_eq!((services.lists, services.problems.len()), (1, 0));
    let health = source.health();
    assert!(health.connected && health.location.starts_with(&api.url) && health.calls == 1, "{health:?}");
}

#[tokio::test]
async fn servers_without_streaming_lists_are_read_in_pages() {
    for streaming in [StreamingLists::Refused, StreamingLists::Unknown] {
        let api = Api::start().await;
        api.world().streaming = streaming;
        for n in 0..1100 {
            api.put(SERVICES, "x", &format!("s{n}"), service(80));
        }
        let source = connect(&api).await;
        let mut services = Follower::new(source.services()).await;
        assert_eq!((services.objects.len(), services.lists), (1100, 1), "{streaming:?}");
        api.delete(SERVICES, "x", "s7");
        services.until(|s| s.objects.len() == 1099).await;
        assert!(services.problems.is_empty(), "{streaming:?}: {:?}", services.problems);
    }
}

#[tokio::test]
async fn a_watch_that_ends_goes_on_where_it_was() {
    let api = Api::start().await;
    let source = connect(&api).await;
    let mut services = Follower::new(source.services()).await;
    api.put(SERVICES, "x", "a", service(80));
    services.until(|s| s.names() == ["x/a"]).await;
    for round in 0..3 {
        api.cut();
        let name = format!("b{round}");
        api.put(SERVICES, "x", &name, service(80));
        services.until(|s| s.objects.contains_key(&format!("x/{name}"))).await;
    }
    assert_eq!((services.lists, services.problems.len()), (1, 0));
}

#[tokio::test]
async fn a_version_that_is_gone_means_a_new_list() {
    let api = Api::start().await;
    api.put(SERVICES, "x", "old", service(80));
    let source = connect(&api).await;
    let mut services = Follower::new(source.services()).await;
    // The change is missed, the watch's version is compacted away: on the wire as an answer …
    api.world().streaming = StreamingLists::Refused;
    {
        let mut world = api.world();
        world.missing.insert(SERVICES.to_owned());
    }
    api.cut();
    services.until(|s| !s.problems.is_empty()).await;
    api.delete(SERVICES, "x", "old");
    api.put(SERVICES, "x", "new", service(80));
    api.compact();
    api.world().missing.clear();
    services.until(|s| s.lists == 2).await;
    assert_eq!(services.names(), ["x/new"]);
    // … and as an event.
    let expired =
        json!({"kind": "Status", "status": "Failure", "reason": "Expired", "message": "too old", "code": 410});
    api.send(SERVICES, json!({"type": "ERROR", "object": expired}));
    services.until(|s| s.lists == 3).await;
    assert_eq!(services.names(), ["x/new"]);
    assert_eq!(services.problems.len(), 1, "{:?}", services.problems);
}

#[tokio::test]
async fn bookmarks_keep_a_quiet_watch_young() {
    let api = Api::start().await;
    let source = connect(&api).await;
    let mut services = Follower::new(source.services()).await;
    api.put(SERVICES, "x", "a", service(80));
    services.until(|s| s.names() == ["x/a"]).await;
    // Version 102; nothing of this kind happens after 101.
    api.bookmark(SERVICES);
    let before = api.world().seen.len();
    api.cut();
    while api.world().seen.len() == before {
        tokio::select! {
            () = services.step() => {}
            () = tokio::task::yield_now() => {}
        }
    }
    let resumed = api.world().seen[before].query["resourceVersion"].clone();
    assert_eq!(resumed, "102", "resumed from the bookmark");
    assert_eq!(services.lists, 1);
}

#[tokio::test]
async fn a_kind_that_is_not_installed_is_reported_and_awaited() {
    let api = Api::start().await;
    api.world().missing.insert(POOLS.to_owned());
    api.put(SERVICES, "x", "a", service(80));
    let source = connect(&api).await;
    let mut pools = Follower::unlisted(source.pools());
    pools.until(|p| !p.problems.is_empty()).await;
    assert!(pools.problems[0].contains("CiliumLoadBalancerIPPool") && pools.problems[0].contains("CRD"));
    assert!(pools.listing.is_none() && pools.lists == 0);
    assert_eq!(source.health().problems, pools.problems);
    // Nobody else waits for it.
    assert_eq!(Follower::new(source.services()).await.names(), ["x/a"]);
    api.put(POOLS, "", "p", json!({"spec": {"blocks": [{"cidr": "10.0.0.0/24"}]}}));
    api.world().missing.clear();
    pools.until(|p| p.lists == 1).await;
    assert_eq!(pools.names(), ["p"]);
    assert_eq!(pools.problems.len(), 1, "said once: {:?}", pools.problems);
    assert!(source.health().problems.is_empty());
}

#[tokio::test]
async fn one_bad_object_is_reported_and_the_others_arrive() {
    for streaming in [StreamingLists::Served, StreamingLists::Refused] {
        let api = Api::start().await;
        api.world().streaming = streaming;
        let slice =
            |port: serde_json::Value| json!({"addressType": "IPv4", "ports": [{"port": port}], "endpoints": null});
        api.put(SLICES, "x", "a", slice(json!(80)));
        api.put(SLICES, "x", "bad", slice(json!("http")));
        api.put(SLICES, "x", "c", slice(json!(80)));
        let source = connect(&api).await;
        let mut slices = Follower::new(source.endpoint_slices()).await;
        assert_eq!(slices.names(), ["x/a", "x/c"], "{streaming:?}");
        assert!(slices.problems[0].contains("EndpointSlice x/bad: ports[0].port"), "{:?}", slices.problems);
        // A good object that turns bad keeps its last good state; a bad one that turns good arrives.
        api.put(SLICES, "x", "c", slice(json!("https")));
        slices.until(|s| s.problems.len() == 2).await;
        assert_eq!(slices.objects["x/c"].ports[0].port, Some(80));
        assert_eq!(source.health().problems.len(), 2);
        api.put(SLICES, "x", "bad", slice(json!(81)));
        api.delete(SLICES, "x", "c");
        slices.until(|s| s.names() == ["x/a", "x/bad"]).await;
        assert!(source.health().problems.is_empty(), "{:?}", source.health());
    }
}

#[tokio::test]
async fn an_outage_keeps_what_is_known_and_ends_by_itself() {
    let api = Api::start().await;
    api.put(SERVICES, "x", "a", service(80));
    let source = connect(&api).await;
    let mut services = Follower::new(source.services()).await;
    let mut slices = Follower::new(source.endpoint_slices()).await;
    let (address, world) = api.stop().await;
    services.until(|s| !s.problems.is_empty()).await;
    let health = source.health();
    assert!(!health.connected && health.last_error.is_some() && health.calls_failed > 0, "{health:?}");
    let gone = source.get_lease("duties").await.unwrap_err();
    assert!(matches!(gone, WriteError::Unavailable { .. }), "{gone}");
    assert_eq!(services.names(), ["x/a"]);

    let api = Api::serve(&address, world).await;
    api.put(SERVICES, "x", "b", service(80));
    api.put(SLICES, "x", "s", json!({}));
    services.until(|s| s.names().len() == 2).await;
    slices.until(|s| s.names().len() == 1).await;
    assert!(source.health().connected && source.health().problems.is_empty(), "{:?}", source.health());
    assert_eq!(services.lists, 1);
}

#[tokio::test]
async fn a_dead_server_is_left_for_the_next_one() {
    let first = Api::start().await;
    let second = Api::start().await;
    first.put(SERVICES, "x", "a", service(80));
    second.put(SERVICES, "x", "a", service(80));
    let (dead, _) = first.stop().await;
    let urls = [format!("http://{dead}"), second.url.clone()];
    let source = KubernetesSource::connect(options(&[&urls[0], &urls[1]])).await.unwrap();
    let mut services = Follower::new(source.services()).await;
    assert_eq!(services.names(), ["x/a"]);
    assert!(source.health().location.starts_with(&second.url));
    // And back, when the second dies and the first has returned.
    let (_, world) = second.stop().await;
    let first = Api::serve(&dead, world).await;
    first.put(SERVICES, "x", "b", service(80));
    services.until(|s| s.names().len() == 2).await;
}

#[tokio::test]
async fn a_server_that_fails_half_of_the_time_is_enough() {
    let api = Api::start().await;
    {
        let mut world = api.world();
        world.streaming = StreamingLists::Refused;
        world.fail_every = (2, 500);
        world.latency = Duration::from_millis(20);
    }
    for n in 0..700 {
        api.put(SERVICES, "x", &format!("s{n}"), service(80));
    }
    let source = connect(&api).await;
    let mut services = Follower::new(source.services()).await;
    assert_eq!(services.objects.len(), 700);
    api.cut();
    api.delete(SERVICES, "x", "s1");
    services.until(|s| s.objects.len() == 699).await;
}

fn condition(kind: &str, status: &str, reason: &str) -> Condition {
    Condition { kind: kind.into(), status: status.into(), reason: reason.into(), ..Condition::default() }
}

#[tokio::test]
async fn service_status_is_one_patch_that_leaves_foreign_conditions_alone() {
    let api = Api::start().await;
    let foreign = json!({"type": "foreign", "status": "True", "lastTransitionTime": "2020-01-01T00:00:00Z"});
    let mut object = service(80);
    object["status"] = json!({"conditions": [foreign], "loadBalancer": {"ingress": [{"hostname": "elsewhere"}]}});
    api.put(SERVICES, "x", "a", object);
    let source = connect(&api).await;
    let mut services = Follower::new(source.services()).await;
    let key = ObjectKey::new("x", "a");
    let unsatisfied = condition(IPAM_CONDITION, "False", "no_pool");
    source.write_service_status(&key, &[], Some(&unsatisfied)).await.unwrap();
    let write = &api.writes()[0];
    assert_eq!((write.method.as_str(), write.path.as_str()), ("PATCH", "/api/v1/namespaces/x/services/a/status"));
    assert_eq!(write.content_type, "application/strategic-merge-patch+json");
    assert_eq!(write.query["fieldManager"], "cilium-operator-lb-ipam");

    let ours = |api: &Api| {
        let conditions = api.get(SERVICES, "x", "a")["status"]["conditions"].clone();
        conditions.as_array().unwrap().iter().find(|c| c["type"] == IPAM_CONDITION).cloned()
    };
    let since = ours(&api).unwrap()["lastTransitionTime"].as_str().unwrap().to_owned();
    // Another reason keeps the time, also for an agent that only knows it from its watch.
    let other = connect(&api).await;
    let _seen = Follower::new(other.services()).await;
    api.put(SERVICES, "x", "a", {
        let mut object = api.get(SERVICES, "x", "a");
        object["status"]["conditions"][1]["lastTransitionTime"] = json!("2021-01-01T00:00:00Z");
        object
    });
    let mut seen = Follower::new(other.services()).await;
    seen.until(|s| s.objects["x/a"].status.conditions.len() == 2).await;
    other.write_service_status(&key, &[], Some(&condition(IPAM_CONDITION, "False", "out_of_ips"))).await.unwrap();
    assert_eq!(ours(&api).unwrap()["lastTransitionTime"], "2021-01-01T00:00:00Z");
    assert_ne!(since, "2021-01-01T00:00:00Z");

    let addresses = ["10.0.0.100".parse().unwrap(), "fd00::1".parse().unwrap()];
    source.write_service_status(&key, &addresses, Some(&condition(IPAM_CONDITION, "True", "satisfied"))).await.unwrap();
    services.until(|s| s.objects["x/a"].ingress_addresses().collect::<Vec<_>>() == addresses).await;
    source.write_service_status(&key, &[], None).await.unwrap();
    services.until(|s| s.objects["x/a"].ingress_addresses().count() == 0).await;
    assert!(ours(&api).is_none());
    assert_eq!(api.get(SERVICES, "x", "a")["status"]["conditions"], json!([foreign]));

    let gone = source.write_service_status(&ObjectKey::new("x", "gone"), &[], None).await;
    assert!(matches!(gone, Err(WriteError::NotFound { .. })), "{gone:?}");
}

#[tokio::test]
async fn custom_resources_are_written_by_server_side_apply() {
    let api = Api::start().await;
    api.put(
        POOLS,
        "",
        "p",
        json!({"spec": {}, "status": {"conditions": [
        {"type": "cilium.io/IPsTotal", "status": "Unknown", "lastTransitionTime": "2021-01-01T00:00:00Z"}]}}),
    );
    api.put(POLICIES, "", "l2", json!({"spec": {}}));
    let source = connect(&api).await;
    let _pools = Follower::new(source.pools()).await;
    let mut total = condition("cilium.io/IPsTotal", "Unknown", "noreason");
    total.message = "101".into();
    source.write_pool_status("p", &[total, condition("cilium.io/PoolConflict", "False", "resolved")]).await.unwrap();
    source.write_policy_status("l2", &[condition("io.cilium/bad-node-selector", "True", "error")]).await.unwrap();
    let writes = api.writes();
    assert_eq!(writes[0].path, format!("{POOLS}/p/status"));
    assert_eq!(writes[0].content_type, "application/apply-patch+yaml");
    assert_eq!(writes[0].body["apiVersion"], "cilium.io/v2");
    assert_eq!(writes[0].body["status"]["conditions"][0]["lastTransitionTime"], "2021-01-01T00:00:00Z");
    assert!(writes[0].body["status"]["conditions"][1]["lastTransitionTime"].as_str().unwrap().ends_with('Z'));
    // A type that is not repeated by the caller is repeated for it.
    source.write_pool_status("p", &[condition("cilium.io/PoolConflict", "True", "cidr_overlap")]).await.unwrap();
    let applied = api.writes()[2].body["status"]["conditions"].clone();
    assert_eq!((&applied[0]["message"], &applied[1]["status"]), (&json!("101"), &json!("True")));
    let managers: Vec<&str> = writes.iter().map(|write| write.query["fieldManager"].as_str()).collect();
    assert_eq!(managers, ["cilium-operator-lb-ipam", "cilium-agent-l2-announcer"]);
}

fn lease(name: &str, holder: &str) -> Lease {
    let mut lease = Lease::default();
    lease.metadata.name = name.into();
    lease.spec.holder_identity = Some(holder.into());
    lease
}

#[tokio::test]
async fn leases_are_compared_and_swapped_by_the_server() {
    let api = Api::start().await;
    api.put("/apis/coordination.k8s.io/v1/leases", "kube-system", "foreign", json!({"spec": {}}));
    let source = connect(&api).await;
    let mut leases = Follower::new(source.leases()).await;
    assert!(leases.names().is_empty(), "foreign leases are not ours");
    assert_eq!(source.get_lease("duties").await.unwrap(), None);
    let created = source.put_lease(&lease("duties", "n1")).await.unwrap();
    assert_eq!(created.metadata.namespace, "kube-system");
    leases.until(|l| l.objects.get("kube-system/duties") == Some(&created)).await;
    for stale in [lease("duties", "n2"), {
        let renewed = source.put_lease(&created).await.unwrap();
        assert_ne!(renewed.metadata.resource_version, created.metadata.resource_version);
        created.clone()
    }] {
        assert!(matches!(source.put_lease(&stale).await, Err(WriteError::Conflict { .. })));
    }
    let current = source.get_lease("duties").await.unwrap().unwrap();
    let contenders = (0..8).map(|n| {
        let (source, mut mine) = (source.clone(), current.clone());
        mine.spec.holder_identity = Some(format!("n{n}").into());
        async move { source.put_lease(&mine).await.is_ok() }
    });
    let wins = futures::future::join_all(contenders).await.into_iter().filter(|won| *won).count();
    assert_eq!(wins, 1);
    source.delete_lease("duties").await.unwrap();
    assert!(matches!(source.delete_lease("duties").await, Err(WriteError::NotFound { .. })));
    leases.until(|l| l.names().is_empty()).await;
    assert!(matches!(source.put_lease(&current).await, Err(WriteError::Conflict { .. })));
}

#[tokio::test]
async fn status_writes_wait_for_the_rate_limit_while_leases_and_watches_do_not() {
    let api = Api::start().await;
    api.put(SERVICES, "x", "a", service(80));
    let mut options = options(&[&api.url]);
    (options.qps, options.burst) = (0.001, 2);
    let source = KubernetesSource::connect(options).await.unwrap();
    let key = ObjectKey::new("x", "a");
    for _ in 0..2 {
        source.write_service_status(&key, &[], None).await.unwrap();
    }
    let waiting = tokio::spawn({
        let (source, key) = (source.clone(), key.clone());
        async move { source.write_service_status(&key, &[], None).await }
    });
    while source.health().calls_limited == 0 {
        tokio::task::yield_now().await;
    }
    for n in 0..5 {
        source.put_lease(&lease(&format!("l{n}"), "n1")).await.unwrap();
    }
    assert_eq!(Follower::new(source.services()).await.names(), ["x/a"]);
    assert!(!waiting.is_finished());
    source.set_rate_limit(1000.0, 100);
    tokio::time::timeout(BOUND, waiting).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn wrong_options_are_refused_with_the_key_to_change() {
    let fails = async |change: fn(&mut KubernetesOptions)| {
        let mut options = options(&[]);
        change(&mut options);
        KubernetesSource::connect(options).await.err().map(|error| error.to_string()).unwrap_or_default()
    };
    let error = fails(|o| o.api_server_urls = vec!["not a url".into()]).await;
    assert!(error.contains("k8s-api-server-urls") && error.contains("not a url"), "{error}");
    let error = fails(|o| o.kubeconfig = Some("/does/not/exist".into())).await;
    assert!(error.contains("k8s-kubeconfig-path /does/not/exist"), "{error}");
}

#[tokio::test]
async fn a_kubeconfig_names_server_and_credentials() {
    let api = Api::start().await;
    api.put(SERVICES, "x", "a", service(80));
    let dir = tempfile::TempDir::new().unwrap();
    let path = dir.path().join("kubeconfig");
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: k, cluster: {{server: \"{}\"}}}}]\n\
         users: [{{name: u, user: {{token: secret}}}}]\ncontexts: [{{name: c, context: {{cluster: k, user: u}}}}]\n",
        api.url
    );
    std::fs::write(&path, text).unwrap();
    let mut options = options(&[]);
    options.kubeconfig = Some(path);
    let source = KubernetesSource::connect(options).await.unwrap();
    assert_eq!(Follower::new(source.services()).await.names(), ["x/a"]);
}
