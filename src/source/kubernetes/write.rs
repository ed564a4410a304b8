//! Writes to the API: status subresources and Leases, one call each.

use std::net::IpAddr;

use kinesin_core::objects::{Condition, Lease, Object, ObjectKey, Service};
use kube::api::{DeleteParams, GetParams, Patch, PatchParams, PostParams};
use kube::core::Request;
use serde_json::{Value, json};

use super::servers::{CallError, Class};
use super::wire::{self, Kind};
use super::{Shared, path};
use crate::source::{IPAM_CONDITION, LEASE_LABEL, LEASE_LABEL_VALUE, WriteError, status};

/// Field manager of what LB-IPAM writes, the one that tools know.
pub(super) const LB_IPAM: &str = "cilium-operator-lb-ipam";
/// Field manager of what the agents write on policies.
pub(super) const L2_ANNOUNCER: &str = "cilium-agent-l2-announcer";
/// Field manager of Leases.
const LEASES: &str = "kinesin-agent";

/// Strategic merge: conditions merge by type, the list of addresses is replaced.
pub(super) async fn service_status(
    shared: &Shared,
    key: &ObjectKey,
    ingress: &[IpAddr],
    condition: Option<&Condition>,
) -> Result<(), WriteError> {
    let known = shared.conditions().of_service(key);
    let condition = condition.map(|condition| status::transition(known.as_slice(), condition, &status::now()));
    let entries: Vec<Value> = ingress.iter().map(|ip| json!({"ip": ip})).collect();
    let mut patch =
        json!({"status": {"loadBalancer": {"ingress": if entries.is_empty() { Value::Null } else { entries.into() }}}});
    match &condition {
        Some(condition) => patch["status"]["conditions"] = json!([condition]),
        // Nothing to delete where nothing was seen: the directive would fail on a Service without any condition.
        None if known.is_none() => {}
        None => patch["status"]["conditions"] = json!([{"$patch": "delete", "type": IPAM_CONDITION}]),
    }
    let params = PatchParams { field_manager: Some(LB_IPAM.to_owned()), ..PatchParams::default() };
    let failed = |error: CallError| error.into_write_error(Service::KIND, key.to_string());
    let request = Request::new(path::<Service>(Some(&key.namespace)))
        .patch_subresource("status", &key.name, &params, &Patch::Strategic(patch))
        .map_err(|error| failed(CallError::Transport(error.to_string())))?;
    shared.servers.call(Class::Status, request).await.map_err(failed)?;
    shared.conditions().remember_service(key.clone(), condition.as_ref());
    Ok(())
}

/// Server-side apply: the list of conditions is a map by type. A manager's types that it does not repeat are removed, so all
/// that are known go along.
pub(super) async fn custom_status<T: Kind>(
    shared: &Shared,
    name: &str,
    conditions: &[Condition],
    manager: &str,
) -> Result<(), WriteError> {
    let known = shared.conditions().of_custom(T::KIND, name);
    let conditions = status::merge_conditions(&known, conditions, &status::now());
    let patch = json!({
        "apiVersion": T::API_VERSIONS[0],
        "kind": T::KIND,
        "metadata": {"name": name},
        "status": {"conditions": conditions},
    });
    let failed = |error: CallError| error.into_write_error(T::KIND, name.to_owned());
    let request = Request::new(path::<T>(None))
        .patch_subresource("status", name, &PatchParams::apply(manager).force(), &Patch::Apply(patch))
        .map_err(|error| failed(CallError::Transport(error.to_string())))?;
    let answer = shared.servers.call(Class::Status, request).await.map_err(failed)?;
    if let Ok(object) = wire::object::<T>(&answer) {
        object.remember_conditions(shared);
    }
    Ok(())
}

fn leases(shared: &Shared) -> Request {
    Request::new(path::<Lease>(Some(&shared.namespace)))
}

fn lease_error(name: &str) -> impl Fn(CallError) -> WriteError {
    move |error| error.into_write_error(Lease::KIND, name.to_owned())
}

fn stored(name: &str, answer: &[u8]) -> Result<Lease, WriteError> {
    wire::object(answer).map_err(|message| WriteError::Unavailable {
        kind: Lease::KIND,
        name: name.to_owned(),
        message,
    })
}

pub(super) async fn get_lease(shared: &Shared, name: &str) -> Result<Option<Lease>, WriteError> {
    let failed = lease_error(name);
    let request = leases(shared)
        .get(name, &GetParams::default())
        .map_err(|error| failed(CallError::Transport(error.to_string())))?;
    match shared.servers.call(Class::Lease, request).await {
        Ok(answer) => stored(name, &answer).map(Some),
        Err(CallError::Answer(status)) if status.code == 404 => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

/// The API server compares the resource version; without one the object must be new.
pub(super) async fn put_lease(shared: &Shared, lease: &Lease) -> Result<Lease, WriteError> {
    let name = lease.metadata.name.as_str();
    let failed = lease_error(name);
    let broken = |error: String| failed(CallError::Transport(error));
    let mut lease = lease.clone();
    lease.metadata.namespace = shared.namespace.as_str().into();
    lease.metadata.labels.insert(LEASE_LABEL.into(), LEASE_LABEL_VALUE.into());
    let mut body = serde_json::to_value(&lease).map_err(|error| broken(error.to_string()))?;
    body["apiVersion"] = json!(Lease::API_VERSIONS[0]);
    body["kind"] = json!(Lease::KIND);
    let body = body.to_string().into_bytes();
    let params = PostParams { field_manager: Some(LEASES.to_owned()), ..PostParams::default() };
    let request = if lease.metadata.resource_version.is_empty() {
        leases(shared).create(&params, body)
    } else {
        leases(shared).replace(name, &params, body)
    };
    let request = request.map_err(|error| broken(error.to_string()))?;
    let answer = shared.servers.call(Class::Lease, request).await.map_err(failed)?;
    stored(name, &answer)
}

pub(super) async fn delete_lease(shared: &Shared, name: &str) -> Result<(), WriteError> {
    let failed = lease_error(name);
    let request = leases(shared)
        .delete(name, &DeleteParams::default())
        .map_err(|error| failed(CallError::Transport(error.to_string())))?;
    shared.servers.call(Class::Lease, request).await.map_err(failed).map(drop)
}
