//! The generated CRDs, and the files that are made from them.

use std::path::Path;

use super::*;

fn visit(value: &Value, path: &str, check: &mut impl FnMut(&Map<String, Value>, &str)) {
    let Value::Object(fields) = value else { return };
    check(fields, path);
    for nested in ["items", "additionalProperties"] {
        if let Some(inner) = fields.get(nested) {
            visit(inner, &format!("{path}.{nested}"), check);
        }
    }
    if let Some(Value::Object(properties)) = fields.get("properties") {
        for (name, inner) in properties {
            visit(inner, &format!("{path}.{name}"), check);
        }
    }
}

#[test]
fn the_files_are_what_the_types_say() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/crds");
    for definition in definitions() {
        let name = definition["metadata"]["name"].as_str().unwrap();
        let options = serde_saphyr::ser_options! { quote_all: true };
        let yaml = serde_saphyr::to_string_with_options(&definition, options).unwrap();
        let text =
            format!("# Generated from the Rust types; `KINESIN_BLESS=1 cargo test crds` writes it anew.\n{yaml}");
        assert_eq!(serde_saphyr::from_str::<Value>(&text).unwrap(), definition);
        let path = root.join(format!("{name}.yaml"));
        if std::env::var_os("KINESIN_BLESS").is_some_and(|v| v == "1") {
            std::fs::create_dir_all(&root).unwrap();
            std::fs::write(&path, &text).unwrap();
        }
        let known = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(known == text, "{} is out of date; run KINESIN_BLESS=1 cargo test crds", path.display());
    }
}

#[test]
fn every_schema_is_structural_and_parses_as_a_crd() {
    for definition in definitions() {
        let crd: CustomResourceDefinition = serde_json::from_value(definition.clone()).unwrap();
        assert_eq!(crd.spec.versions.iter().filter(|v| v.storage).count(), 1);
        for version in definition["spec"]["versions"].as_array().unwrap() {
            visit(&version["schema"]["openAPIV3Schema"], "", &mut |fields, path| {
                assert!(fields.get("type").is_some_and(Value::is_string), "{path} has no type: {fields:?}");
                for foreign in ["$ref", "$schema", "anyOf", "oneOf", "title", "const", "components"] {
                    assert!(!fields.contains_key(foreign), "{path} has {foreign}");
                }
                assert_eq!(fields["type"] == "array", fields.contains_key("items"), "{path}");
            });
        }
    }
}

#[test]
fn the_definitions_are_the_ones_that_users_and_tools_know() {
    let [pools, policies] = definitions();
    assert_eq!(pools["metadata"]["name"], "ciliumloadbalancerippools.cilium.io");
    assert_eq!(pools["spec"]["scope"], "Cluster");
    assert_eq!(pools["spec"]["names"]["shortNames"], json!(["ippools", "ippool", "lbippool", "lbippools"]));
    let versions = &pools["spec"]["versions"];
    assert_eq!((&versions[0]["name"], &versions[0]["storage"]), (&json!("v2"), &json!(true)));
    assert_eq!((&versions[1]["name"], &versions[1]["deprecated"]), (&json!("v2alpha1"), &json!(true)));
    assert_eq!(versions[0]["schema"], versions[1]["schema"]);
    let columns: Vec<&str> =
        versions[0]["additionalPrinterColumns"].as_array().unwrap().iter().filter_map(|c| c["name"].as_str()).collect();
    assert_eq!(columns, ["Disabled", "Conflicting", "IPs Available", "Age"]);
    let spec = &versions[0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
    assert_eq!(spec["allowFirstLastIPs"]["enum"], json!(["Yes", "No"]));
    assert_eq!(spec["blocks"]["items"]["properties"]["cidr"]["format"], "cidr");
    assert_eq!(spec["serviceSelector"]["properties"]["matchLabels"]["additionalProperties"]["type"], "string");

    assert_eq!(policies["metadata"]["name"], "ciliuml2announcementpolicies.cilium.io");
    assert_eq!(policies["spec"]["names"]["shortNames"], json!(["l2announcement"]));
    let versions = policies["spec"]["versions"].as_array().unwrap();
    assert_eq!((versions.len(), &versions[0]["name"]), (1, &json!("v2alpha1")));
    let spec = &versions[0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
    let fields: Vec<&String> = spec.as_object().unwrap().keys().collect();
    assert_eq!(fields, ["externalIPs", "interfaces", "loadBalancerIPs", "nodeSelector", "serviceSelector"]);
}

/// Everything that the Rust types write is described by the schema, or the server would drop it.
#[test]
fn nothing_that_the_types_know_is_pruned() {
    let full = json!({
        "blocks": [{"cidr": "10.0.0.0/24"}, {"start": "10.0.0.1", "stop": "10.0.0.9"}],
        "serviceSelector": {"matchLabels": {"a": "b"}, "matchExpressions": [{"key": "k", "operator": "In", "values": ["v"]}]},
        "allowFirstLastIPs": "No", "disabled": true,
    });
    let spec: PoolSpec = serde_json::from_value(full.clone()).unwrap();
    assert_eq!(serde_json::to_value(&spec).unwrap(), full);
    fn known(value: &Value, schema: &Value, path: &str) {
        match value {
            Value::Object(fields) => {
                for (name, inner) in fields {
                    let inner_schema = schema["properties"].get(name).or_else(|| schema.get("additionalProperties"));
                    known(inner, inner_schema.unwrap_or_else(|| panic!("{path}.{name} is pruned")), name);
                }
            }
            Value::Array(items) => items.iter().for_each(|item| known(item, &schema["items"], path)),
            _ => {}
        }
    }
    let [pools, _] = definitions();
    let schema = &pools["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"];
    known(&full, &schema["spec"], "spec");
    let condition = json!({"conditions": [{"type": "t", "status": "True", "reason": "r", "message": "m",
                           "observedGeneration": 1, "lastTransitionTime": "2026-01-01T00:00:00Z"}]});
    known(&condition, &schema["status"], "status");
}

#[test]
fn versions_compare_as_numbers_and_nonsense_is_older_than_all() {
    assert!(version("1.10.0") > version("1.9.9"));
    assert_eq!(version("v1.2"), Some((1, 2, 0)));
    assert_eq!(version("1.2.3-rc1"), Some((1, 2, 3)));
    for nonsense in ["", "x", "1", "1.x"] {
        assert!(version(nonsense) < version("0.0.0"), "{nonsense}");
    }
}

#[tokio::test]
async fn missing_definitions_are_created_older_ones_updated_and_newer_ones_kept() {
    use crate::source::kubernetes::testing::Api as Server;
    use crate::source::{KubernetesOptions, KubernetesSource};
    const CRDS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

    let server = Server::start().await;
    let options = KubernetesOptions {
        kubeconfig: None,
        api_server_urls: vec![server.url.clone()],
        namespace: "kube-system".into(),
        qps: 0.0,
        burst: 1,
    };
    let source = KubernetesSource::connect(options).await.unwrap();
    let outcomes = async || {
        let outcomes = register(source.client()).await.unwrap();
        outcomes.into_iter().map(|(_, outcome)| outcome).collect::<Vec<_>>()
    };
    assert_eq!(outcomes().await, [Registered::Created, Registered::Created]);
    assert_eq!(outcomes().await, [Registered::Kept, Registered::Kept]);

    let [pools, policies] = ["ciliumloadbalancerippools.cilium.io", "ciliuml2announcementpolicies.cilium.io"];
    // A newer one of Cilium's stays; one of an old Cilium, without v2, does not.
    let mut newer = server.get(CRDS, "", policies);
    newer["metadata"]["labels"][SCHEMA_VERSION_LABEL] = json!("1.40.0");
    server.put(CRDS, "", policies, newer);
    let mut old = server.get(CRDS, "", pools);
    old["metadata"]["labels"] = json!({SCHEMA_VERSION_LABEL: "1.26.8", "other": "kept"});
    old["spec"]["versions"].as_array_mut().unwrap().remove(0);
    server.put(CRDS, "", pools, old);
    assert_eq!(outcomes().await, [Registered::Updated, Registered::Kept]);
    let updated = server.get(CRDS, "", pools);
    assert_eq!(updated["spec"]["versions"][0]["name"], "v2");
    assert_eq!(updated["metadata"]["labels"]["other"], "kept");
    assert_eq!(outcomes().await, [Registered::Kept, Registered::Kept]);
}
