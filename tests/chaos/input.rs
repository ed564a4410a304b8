//! Bad manifests and settings that change while the agent runs.

use super::rig::{Lease, RATE, Rig, eventually_or};
use kinesin_abi::{SETTING_REJECT_NO_BACKEND, Settings};

impl Rig {
    /// Renamed into place, as every editor of a watched directory should.
    fn put_manifest(&self, name: &str, text: &str) {
        let early = self.lab.manifests_dir().join(format!(".{name}"));
        std::fs::write(&early, text).unwrap();
        std::fs::rename(&early, self.lab.manifests_dir().join(name)).unwrap();
    }

    /// Waits until the status of a node tells problems that satisfy a condition.
    async fn problems(&self, number: usize, what: &str, condition: impl Fn(&[String]) -> bool) {
        eventually_or(what, async || {
            let problems = self.status(number).await.problems;
            if condition(&problems) { Ok(()) } else { Err(format!("{problems:#?}")) }
        })
        .await;
    }

    fn reject_flag(&self, number: usize) -> bool {
        use kinesin::datapath::MapStore;
        let Settings { flags, .. } = self.maps(number).settings().unwrap();
        flags & SETTING_REJECT_NO_BACKEND != 0
    }
}

const SERVICE: &str = "\
apiVersion: v1
kind: Service
metadata:
  name: other
spec:
  clusterIP: 10.43.0.77
  externalIPs: [ADDRESS]
  ports:
    - name: http
      port: PORT
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_manifests_and_settings_are_reported_and_cost_nothing() {
    let rig = Rig::start("input", Lease::Patient, &[]).await;
    let owner = rig.owner(&[]).await;
    let load = rig.load().await;
    let web_stays = async || {
        let services: Vec<serde_json::Value> = rig.ask(owner, "/v1/services").await.unwrap_or_default();
        let web = services.iter().filter(|service| service["service"] == "default/web").count();
        assert_eq!(web, 4, "two addresses with two ports each: {services:#?}");
    };

    rig.put_manifest("other.yaml", "kind: [Service\napiVersion: {\n");
    rig.problems(owner, "a file that is no YAML", |p| p.iter().any(|text| text.contains("other.yaml:"))).await;
    web_stays().await;
    rig.put_manifest("other.yaml", &SERVICE.replace("PORT", "eighty").replace("ADDRESS", "10.0.0.9"));
    rig.problems(owner, "a port that is no number", |p| {
        p.iter().any(|text| text.contains("other.yaml:10:") && text.contains("spec.ports[0].port"))
    })
    .await;
    web_stays().await;
    rig.put_manifest("other.yaml", &SERVICE.replace("PORT", "80").replace("ADDRESS", "10.0.0.999"));
    rig.problems(owner, "an address that is none", |p| {
        p.iter().any(|text| {
            text.contains("default/other") && text.contains("spec.externalIPs") && text.contains("10.0.0.999")
        })
    })
    .await;
    web_stays().await;
    rig.put_manifest("other.yaml", &SERVICE.replace("PORT", "80").replace("ADDRESS", "10.0.0.9"));
    rig.problems(owner, "nothing to complain about", <[String]>::is_empty).await;
    std::fs::remove_file(rig.lab.manifests_dir().join("other.yaml")).unwrap();
    load.more(RATE.into()).await;

    // Settings, as a changed ConfigMap brings them.
    let node = rig.lab.node(owner);
    let generation = rig.status(owner).await.config.generation;
    assert!(rig.picture(owner)["maglev"].is_empty() && rig.reject_flag(owner));
    node.set_config("bpf-lb-algorithm", "maglev").unwrap();
    node.set_config("service-no-backend-response", "drop").unwrap();
    eventually_or("maglev is in force", async || {
        let (maglev, reject) = (rig.picture(owner)["maglev"].len(), rig.reject_flag(owner));
        if maglev > 0 && !reject { Ok(()) } else { Err(format!("{maglev} tables, reject {reject}")) }
    })
    .await;
    let changed = rig.status(owner).await;
    assert_ne!(changed.config.generation, generation);
    assert!(changed.kube_proxy_replacement.backend_selection.starts_with("Maglev"), "{changed:?}");
    assert_eq!(changed.problems, Vec::<String>::new());
    load.more(RATE.into()).await;

    node.set_config("bpf-lb-algorithm", "fastest").unwrap();
    rig.problems(owner, "a value that is none", |p| {
        p.iter().any(|text| text.contains("bpf-lb-algorithm=\"fastest\"") && text.contains("maglev"))
    })
    .await;
    let kept = rig.status(owner).await;
    assert_eq!(kept.config.generation, changed.config.generation, "the last good value stays");
    assert!(kept.kube_proxy_replacement.backend_selection.starts_with("Maglev"), "{kept:?}");
    load.more(RATE.into()).await;

    node.set_config("bpf-lb-algorithm", "random").unwrap();
    node.set_config("service-no-backend-response", "reject").unwrap();
    eventually_or("all is as in the beginning", async || {
        let status = rig.status(owner).await;
        let same = status.config.generation == generation && status.problems.is_empty();
        if same && rig.picture(owner)["maglev"].is_empty() && rig.reject_flag(owner) {
            Ok(())
        } else {
            Err(format!("{status:?}"))
        }
    })
    .await;
    load.more(RATE.into()).await;
    load.nothing_lost().await;
}
