//! The lab's manifests, read back as the agent reads them.

use kinesin::lab::{HTTP_PORT, manifests};
use kinesin_core::objects::{EndpointSlice, L2Policy, Node, Pool, Service, ServiceType};
use serde::de::DeserializeOwned;

use super::lab;

fn read<T: DeserializeOwned>(text: &str) -> Vec<T> {
    text.split("---\n")
        .filter(|document| document.contains("kind:"))
        .map(|document| serde_saphyr::from_str(document).unwrap_or_else(|e| panic!("{e}\n{document}")))
        .collect()
}

#[tokio::test]
async fn the_labs_manifests_are_a_service_with_all_pods_and_the_guides_pool_as_it_stands() {
    let lab = lab("objects").nodes(3).pods_per_node(2).build().await.unwrap();
    manifests::write_all(&lab).unwrap();
    let file = |name: &str| std::fs::read_to_string(manifests::path(&lab, name)).unwrap();

    assert_eq!(file("pool-and-policy.yaml"), include_str!("../../config/manifests/cilium-config.yaml"));
    let documents: Vec<&str> = manifests::POOL_AND_POLICY.split("---\n").filter(|d| !d.is_empty()).collect();
    let pool: Pool = serde_saphyr::from_str(documents[0]).unwrap();
    let policy: L2Policy = serde_saphyr::from_str(documents[1]).unwrap();
    assert_eq!(pool.metadata.name, "first-pool");
    assert_eq!(policy.metadata.name, "default-l2-announcement-policy");

    let nodes: Vec<Node> = read(&file("nodes.yaml"));
    assert_eq!(nodes.len(), 3);
    assert_eq!(nodes[1].metadata.name, "node-2");
    assert_eq!(nodes[1].status.addresses[0].address, lab.node(2).address().to_string());

    let service = read::<Service>(&file("service.yaml")).remove(0);
    assert_eq!(service.spec.kind, ServiceType::LoadBalancer);
    assert_eq!(format!("{}/{}", service.metadata.namespace, service.metadata.name), manifests::SERVICE);

    let slice = read::<EndpointSlice>(&file("endpoints.yaml")).remove(0);
    assert_eq!(slice.service().unwrap().to_string(), manifests::SERVICE);
    assert_eq!(slice.ports[0].port, Some(HTTP_PORT));
    assert_eq!(
        slice.ports.iter().map(|p| &p.name).collect::<Vec<_>>(),
        service.spec.ports.iter().map(|p| &p.name).collect::<Vec<_>>()
    );
    let found: Vec<String> = slice.endpoints.iter().map(|e| e.address.to_string()).collect();
    let pods: Vec<String> = lab.pods().iter().map(|pod| pod.address().to_string()).collect();
    assert_eq!(found, pods);

    manifests::write_endpoints(&lab, &["node-1"]).unwrap();
    let slice = read::<EndpointSlice>(&file("endpoints.yaml")).remove(0);
    assert_eq!(slice.endpoints.len(), 4);
    assert!(slice.endpoints.iter().all(|e| e.node_name != "node-1"));

    manifests::write_endpoints(&lab, &["node-1", "node-2", "node-3"]).unwrap();
    let slice = read::<EndpointSlice>(&file("endpoints.yaml")).remove(0);
    assert!(slice.endpoints.is_empty());
}
