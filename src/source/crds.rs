//! The CustomResourceDefinitions of pools and L2 announcement policies, generated from the Rust types.
//!
//! Names, versions and columns are Cilium's, so that existing objects, `kubectl get ippools` and GitOps repositories go on
//! working. What Cilium accepts and can use is accepted; what could never work is refused with a sentence that says why.
//! Deliberately absent: defaults that would be stored where a Cilium installation stores none, and any conversion webhook.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kinesin_core::objects::{L2Policy, L2PolicySpec, L2PolicyStatus, Object, Pool, PoolSpec, PoolStatus};
use kube::api::PostParams;
use kube::{Api, Client, ResourceExt};
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

/// Label with the version of the schema, as Cilium's operator writes it: whoever has the newer schema installs it.
pub const SCHEMA_VERSION_LABEL: &str = "io.cilium.k8s.crd.schema.version";
/// Version of these schemas. Low on purpose: the CRDs of a Cilium installation stay as they are.
pub const SCHEMA_VERSION: &str = "1.0.0";

/// Field manager of the CRDs.
const MANAGER: &str = "kinesin-agent";
/// No object of etcd's 1.5 MiB has more blocks; the bound lets the API server estimate the rules' cost.
const MAX_BLOCKS: u32 = 65_536;
/// No IP address is longer, with zone; bounds the rules' cost.
const MAX_ADDRESS: u32 = 64;

/// What became of a CRD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registered {
    /// It was missing.
    Created,
    /// It was older, or did not serve a version that Kinesin reads.
    Updated,
    /// It was as new or newer.
    Kept,
}

/// A CRD that could not be registered.
#[derive(Debug, thiserror::Error)]
#[error("register CRD {name}: {message}")]
pub struct RegisterError {
    /// `plural.group`
    pub name: String,
    /// What the server said, and what to do about it.
    pub message: String,
}

impl RegisterError {
    fn new(name: &str, error: &kube::Error) -> Self {
        let message = match error {
            kube::Error::Api(status) if status.code == 403 => {
                format!("{}; let the agents write CRDs, or apply deploy/crds and set skip-crd-creation", status.message)
            }
            error => super::kubernetes::chain(error),
        };
        Self { name: name.to_owned(), message }
    }
}

/// All CRDs, in the order in which they are registered.
pub fn definitions() -> [Value; 2] {
    [pools(), policies()]
}

/// Creates what is missing and replaces what is older. For the elected agent only.
pub async fn register(client: Client) -> Result<Vec<(String, Registered)>, RegisterError> {
    let api: Api<CustomResourceDefinition> = Api::all(client);
    let mut outcomes = Vec::new();
    for definition in definitions() {
        let name = definition["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let fail = |error: kube::Error| RegisterError::new(&name, &error);
        let wanted: CustomResourceDefinition =
            serde_json::from_value(definition).map_err(|error| fail(kube::Error::SerdeError(error)))?;
        let outcome = register_one(&api, &wanted).await.map_err(fail)?;
        tracing::info!(crd = name, outcome = ?outcome, "CRD registered");
        outcomes.push((name, outcome));
    }
    Ok(outcomes)
}

async fn register_one(
    api: &Api<CustomResourceDefinition>,
    wanted: &CustomResourceDefinition,
) -> kube::Result<Registered> {
    let params = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
    // Another agent may create or change it at the same time; the second look settles it.
    for last in [false, true] {
        let outcome = match api.get_opt(&wanted.name_any()).await? {
            None => api.create(&params, wanted).await.map(|_| Registered::Created),
            Some(known) if is_current(&known, wanted) => return Ok(Registered::Kept),
            Some(known) => {
                let mut replacement = known.clone();
                replacement.labels_mut().insert(SCHEMA_VERSION_LABEL.to_owned(), SCHEMA_VERSION.to_owned());
                // A conversion webhook of somebody's stays.
                let conversion = known.spec.conversion.clone();
                replacement.spec = wanted.spec.clone();
                replacement.spec.conversion = conversion;
                api.replace(&wanted.name_any(), &params, &replacement).await.map(|_| Registered::Updated)
            }
        };
        match outcome {
            Err(kube::Error::Api(status)) if status.code == 409 && !last => {}
            outcome => return outcome,
        }
    }
    Ok(Registered::Kept)
}

fn is_current(known: &CustomResourceDefinition, wanted: &CustomResourceDefinition) -> bool {
    let label = known.labels().get(SCHEMA_VERSION_LABEL).map(String::as_str).unwrap_or_default();
    let serves = |name: &str| known.spec.versions.iter().any(|v| v.name == name && v.served);
    version(label) >= version(SCHEMA_VERSION) && wanted.spec.versions.iter().all(|v| serves(&v.name))
}

/// The numbers of a version; one that is none is older than all.
fn version(text: &str) -> Option<(u64, u64, u64)> {
    let text = text.trim_start_matches('v');
    let mut numbers = text.split('.').map(|part| part.split(['-', '+']).next().unwrap_or_default().parse::<u64>());
    let mut next = || numbers.next().transpose().ok().flatten();
    Some((next()?, next()?, next().unwrap_or(0)))
}

fn pools() -> Value {
    let mut spec = schema_of::<PoolSpec>();
    let properties = &mut spec["properties"];
    properties["disabled"]["default"] = json!(false);
    let blocks = &mut properties["blocks"];
    blocks["maxItems"] = json!(MAX_BLOCKS);
    let block = &mut blocks["items"];
    block["properties"]["cidr"]["format"] = json!("cidr");
    for field in ["start", "stop"] {
        block["properties"][field]["maxLength"] = json!(MAX_ADDRESS);
    }
    block["x-kubernetes-validations"] = json!([
        {"rule": "has(self.cidr) || has(self.start)",
         "message": "a block needs a cidr or a start; start and stop of one range belong to the same list item"},
        {"rule": "!has(self.start) || self.start.matches('^[0-9A-Fa-f:.%a-z]*$')",
         "message": "start is not an IP address"},
        {"rule": "!has(self.stop) || self.stop.matches('^[0-9A-Fa-f:.%a-z]*$')",
         "message": "stop is not an IP address"},
    ]);
    selector(&mut properties["serviceSelector"]);
    let column = |name: &str, path: &str| json!({"name": name, "type": "string", "jsonPath": path});
    let columns = json!([
        {"name": "Disabled", "type": "boolean", "jsonPath": ".spec.disabled"},
        column("Conflicting", ".status.conditions[?(@.type==\"cilium.io/PoolConflict\")].status"),
        column("IPs Available", ".status.conditions[?(@.type==\"cilium.io/IPsAvailable\")].message"),
        age(),
    ]);
    let schema = object_schema::<PoolStatus>("A pool of addresses for LoadBalancer Services.", spec);
    definition::<Pool>(
        "ciliumloadbalancerippool",
        &["ippools", "ippool", "lbippool", "lbippools"],
        vec![
            served("v2", true, None, &columns, &schema),
            served("v2alpha1", false, Some("cilium.io/v2alpha1 is deprecated; write cilium.io/v2"), &columns, &schema),
        ],
    )
}

fn policies() -> Value {
    let mut spec = schema_of::<L2PolicySpec>();
    selector(&mut spec["properties"]["serviceSelector"]);
    selector(&mut spec["properties"]["nodeSelector"]);
    let about = "Which Services' addresses are announced on the local network, by which nodes, on which devices.";
    let schema = object_schema::<L2PolicyStatus>(about, spec);
    let columns = json!([age()]);
    definition::<L2Policy>(
        "ciliuml2announcementpolicy",
        &["l2announcement"],
        vec![served("v2alpha1", true, None, &columns, &schema)],
    )
}

fn age() -> Value {
    json!({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"})
}

fn definition<T: Object>(singular: &str, short_names: &[&str], versions: Vec<Value>) -> Value {
    let group = T::API_VERSIONS[0].split('/').next().unwrap_or_default();
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{}.{group}", T::PLURAL),
            "labels": {SCHEMA_VERSION_LABEL: SCHEMA_VERSION},
        },
        "spec": {
            "group": group,
            "names": {
                "kind": T::KIND,
                "listKind": format!("{}List", T::KIND),
                "plural": T::PLURAL,
                "singular": singular,
                "shortNames": short_names,
                "categories": ["cilium"],
            },
            "scope": if T::NAMESPACED { "Namespaced" } else { "Cluster" },
            "versions": versions,
        },
    })
}

fn served(name: &str, storage: bool, deprecation: Option<&str>, columns: &Value, schema: &Value) -> Value {
    let mut version = json!({
        "name": name,
        "served": true,
        "storage": storage,
        "subresources": {"status": {}},
        "additionalPrinterColumns": columns,
        "schema": {"openAPIV3Schema": schema},
    });
    if let Some(warning) = deprecation {
        version["deprecated"] = json!(true);
        version["deprecationWarning"] = json!(warning);
    }
    version
}

fn object_schema<Status: JsonSchema>(description: &str, spec: Value) -> Value {
    let mut status = schema_of::<Status>();
    let conditions = &mut status["properties"]["conditions"];
    // Server-side apply merges conditions by type.
    conditions["x-kubernetes-list-type"] = json!("map");
    conditions["x-kubernetes-list-map-keys"] = json!(["type"]);
    conditions["items"]["required"] = json!(["status", "type"]);
    let fields = &mut conditions["items"]["properties"];
    fields["status"]["enum"] = json!(["True", "False", "Unknown"]);
    fields["lastTransitionTime"]["format"] = json!("date-time");
    json!({
        "type": "object",
        "description": description,
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
    })
}

/// What the API server checks of selectors in its own kinds.
fn selector(schema: &mut Value) {
    let requirement = &mut schema["properties"]["matchExpressions"]["items"];
    requirement["required"] = json!(["key", "operator"]);
    requirement["properties"]["operator"]["enum"] = json!(["In", "NotIn", "Exists", "DoesNotExist"]);
}

/// The structural schema of a type.
fn schema_of<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::openapi3().with(|settings| {
        settings.inline_subschemas = true;
        settings.meta_schema = None;
    });
    let schema = settings.into_generator().into_root_schema_for::<T>();
    structural(schema.to_value())
}

/// Rewrites a JSON schema to the subset that CRDs take: one type each, no unions, no titles; defaults are Rust's own affair.
fn structural(schema: Value) -> Value {
    let Value::Object(mut fields) = schema else { return schema };
    // An optional value is one that may be absent.
    for union in ["anyOf", "oneOf"] {
        if let Some(Value::Array(variants)) = fields.remove(union) {
            merge_variants(&mut fields, variants);
        }
    }
    for noise in ["$schema", "title", "default", "nullable", "components", "const"] {
        fields.remove(noise);
    }
    if let Some(Value::Array(types)) = fields.get("type") {
        let one = types.iter().find(|t| *t != "null").cloned();
        fields.insert("type".to_owned(), one.unwrap_or_else(|| json!("string")));
    }
    if let Some(Value::String(text)) = fields.get_mut("description") {
        *text = text.split_whitespace().collect::<Vec<_>>().join(" ").replace('`', "");
    }
    for nested in ["items", "additionalProperties"] {
        if let Some(value) = fields.remove(nested) {
            fields.insert(nested.to_owned(), structural(value));
        }
    }
    if let Some(Value::Object(properties)) = fields.remove("properties") {
        let properties: Map<String, Value> =
            properties.into_iter().map(|(name, value)| (name, structural(value))).collect();
        fields.insert("properties".to_owned(), Value::Object(properties));
        fields.remove("required");
    }
    Value::Object(fields)
}

/// `Option<T>` becomes T, documented unit variants become an enum.
fn merge_variants(fields: &mut Map<String, Value>, variants: Vec<Value>) {
    let is_null = |v: &Value| v["type"] == "null" || v["enum"] == json!([null]);
    let variants: Vec<Value> = variants.into_iter().filter(|v| !is_null(v)).map(unwrap_constant).collect();
    let names: Vec<Value> = variants.iter().filter_map(|v| v["enum"].as_array()).flatten().cloned().collect();
    if names.len() >= variants.len() && !names.is_empty() {
        fields.insert("type".to_owned(), json!("string"));
        fields.insert("enum".to_owned(), names.into());
    } else if let Some(Value::Object(only)) = variants.into_iter().next() {
        for (name, value) in only {
            // The field's own description says more than its type's.
            fields.entry(name).or_insert(value);
        }
    }
}

fn unwrap_constant(mut variant: Value) -> Value {
    // Nested unions: the enum inside an Option.
    if variant.get("oneOf").is_some() || variant.get("anyOf").is_some() {
        return structural(variant);
    }
    if let Some(name) = variant.get("const").cloned() {
        variant["enum"] = json!([name]);
    }
    variant
}

#[cfg(test)]
#[path = "crds_tests.rs"]
mod tests;
