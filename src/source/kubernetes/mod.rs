//! The Kubernetes API as the source.
